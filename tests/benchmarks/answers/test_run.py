"""Whole runs against the stand-in server: rows, files, the reference, resumption, failures."""

from __future__ import annotations

import csv
import json
import re
from contextlib import contextmanager

import pytest

from benchmarks.answers import __main__ as program
from benchmarks.answers import quote
from benchmarks.answers.engines import Reply
from benchmarks.answers.schema import Schema
from benchmarks.answers.tools import Tools
from benchmarks.launch import ServerError


def arguments(model, fake, out, *more):
    common = ["--model-path", model, "--url", fake.url, "--name", "k3v3", "--reference", "k3v3", "--commit", "abc"]
    return [*common, "--out", str(out), *more]


def table(out):
    with out.open() as f:
        return {(r["config"], r["test"], r["measure"]): r for r in csv.DictReader(f)}


def lines(out):
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]


class Listener:
    """Notes the body of a chat request."""

    def chat(self, body, timeout):
        self.body = body
        return {}, Reply("", 1, None, 1, "")


def asked(test, samples):
    """What the stand-in is asked, and what a right answer to it is made of."""
    for i in range(samples):
        listener, question = Listener(), test.question(i)
        question.ask(listener, 1)
        yield listener.body["messages"][0]["content"], question.score.keywords


@pytest.fixture(scope="module")
def able():
    """A model that makes every call and fills every record rightly."""
    known = {}
    for text, right in asked(Tools(0), 50):
        call = {"name": right["wanted"].name, "arguments": json.dumps(right["arguments"])}
        known[text] = {"content": None, "tool_calls": [{"function": call}]}
    for text, right in asked(Schema(0), 20):
        free = {name: "x" for name in right["schema"]["properties"] if name not in right["wanted"]}
        known[text] = {"content": json.dumps({**right["wanted"], **free})}
    return lambda body: known[body["messages"][0]["content"]]


def quotes(text):
    """Quotes the sentence that is asked for; writes sixteen bytes of anything else."""
    opening = re.search(r'begins with "([^"]*)"', text)
    return re.search(rf"\s({re.escape(opening[1])}[^.]*[.])", text)[1] if opening else "All is well, or."


def test_every_test_of_an_able_model(model, fake, able, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quote, "QUOTE_TOKENS", 600)  # its tokens are bytes
    fake.call, fake.say = able, quotes
    fake.behind = lambda i: 0.0 if i < 500 else 0.5
    out = tmp_path / "folder" / "answers.csv"
    assert program.main(arguments(model, fake, out)) == 0
    rows = table(out)
    values = {(test, measure): (float(r["value"]), int(r["samples"])) for (_, test, measure), r in rows.items()}
    assert values["tools", "valid"] == values["tools", "correct"] == (1.0, 50)
    assert values["schema", "valid"] == values["schema", "correct"] == (1.0, 20)
    assert values["quote", "exact"] == (1.0, 10) and values["quote", "character errors"] == (0.0, 10)
    assert values["length", "mean"] == (16.0, 20) and values["length", "cut off"] == (0.0, 20)
    assert values["bash", "worst token, own"] == (-0.5, 80) and values["bash", "is best"] == (1.0, 80)
    assert values["long", "behind best 250-500"] == (0.0, 1000)
    assert values["long", "behind best 1000-2000"] == (0.5, 4000) and values["long", "slope"][0] > 0.2
    assert values["long", "distinct 4-grams"][0] < 0.01 and values["long", "went on after its end"] == (0.0, 4)
    low, high = (float(rows["k3v3", "tools", "valid"][end]) for end in ("low", "high"))
    assert (low, high) == (pytest.approx(0.9287, abs=1e-3), 1.0)

    answers = [line for line in lines(out) if "reply" in line]
    assert len(answers) == 50 + 20 + 4 + 20 + 10 + 5 and len(lines(out)) == len(answers) + 4 + 5
    long = next(a for a in answers if a["test"] == "long")
    assert len(long["reply"]["ids"]) == 2000 and long["reply"]["text"].startswith("All is well")
    meta = json.loads(out.with_suffix(".json").read_text())
    assert meta["commit"] == "abc" and meta["failed"] == meta["not_measured"] == meta["left_out"] == {}
    assert meta["not_read"] == 0 and str(tmp_path) not in json.dumps(meta)
    assert re.search(r"tools +valid +k3v3 +1 share +\(0\.929 to 1\)", capsys.readouterr().out)


def test_bad_answers_score_nothing(model, fake, tmp_path):
    out = tmp_path / "a.csv"
    assert program.main(arguments(model, fake, out, "--tests", "tools", "schema", "quote", "--samples", "0.1")) == 0
    rows = table(out)
    assert float(rows["k3v3", "tools", "valid"]["value"]) == 0 and rows["k3v3", "tools", "valid"]["samples"] == "5"
    assert float(rows["k3v3", "schema", "valid"]["value"]) == float(rows["k3v3", "schema", "correct"]["value"]) == 0
    assert float(rows["k3v3", "quote", "exact"]["value"]) == 0
    assert float(rows["k3v3", "quote", "character errors"]["value"]) > 0.5


def test_a_second_run_goes_on_and_adds_samples(model, fake, tmp_path):
    out = tmp_path / "a.csv"
    argv = arguments(model, fake, out, "--tests", "bash", "length")
    assert program.main([*argv, "--samples", "0.2"]) == 0
    asked, before = len(fake.requests), out.read_text()
    file = out.with_suffix(".jsonl")
    file.write_text(file.read_text() + '{"config": "k3v3", "eng')  # a run that was killed while writing
    assert program.main([*argv, "--samples", "0.2"]) == 0
    assert len(fake.requests) == asked and out.read_text() == before
    assert program.main([*argv, "--samples", "0.4"]) == 0
    assert table(out)["k3v3", "length", "mean"]["samples"] == "8"
    assert len(lines(out)) == 8 + 2 + 2 and len(json.loads(out.with_suffix(".json").read_text())["resumed"]) == 2


def test_other_settings_are_not_mixed(model, fake, tmp_path, capsys):
    out = tmp_path / "a.csv"
    argv = arguments(model, fake, out, "--tests", "bash", "--samples", "0.2")
    assert program.main(argv) == 0
    assert program.main([*argv, "--seed", "1"]) == 2
    assert "--out a.csv: seed of its answers was 0, is 1; name another file" in capsys.readouterr().err


def test_scripts_are_all_there_are(model, fake, tmp_path, capsys):
    out = tmp_path / "a.csv"
    assert program.main(arguments(model, fake, out, "--tests", "bash", "--samples", "3")) == 0
    assert "left out: bash: --samples 3 asks for 15 of its questions, there are 5" in capsys.readouterr().err
    assert table(out)["k3v3", "bash", "worst token, own"]["samples"] == str(5 * len("A fine answer. "))


def test_a_template_without_tools_leaves_them_out(tokenizer, fake, tmp_path, capsys):
    folder = tmp_path / "plain"
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "config.json").write_text("{}")
    out = tmp_path / "a.csv"
    assert program.main(arguments(str(folder), fake, out, "--tests", "tools", "bash", "--samples", "0.2")) == 0
    assert "left out: tools: the model's chat template knows no tools" in capsys.readouterr().err
    assert {test for _, test, _ in table(out)} == {"bash"}


@pytest.fixture
def served(fake, monkeypatch):
    """Configurations are all the stand-in; k2v2 does not start. The order of their starts."""
    started = []

    @contextmanager
    def serve(config, path, cuda, tokens, user, log, timeout):
        started.append((config, user))
        if config == "k2v2":
            raise ServerError("the server died with exit code 1:\nValueError: no memory")
        fake.config = config
        yield fake.url, {"engine": "sglang", "args": "x"}

    monkeypatch.setattr(program, "serve", serve)
    monkeypatch.setattr(program, "gpu", lambda: {"name": "a GPU"})
    return started


def test_the_reference_is_started_last_and_reads_everybody(model, fake, served, tmp_path):
    out = tmp_path / "a.csv"
    readers = []
    fake.behind = lambda i: readers.append(fake.config) or 0.25
    argv = ["--model-path", model, "--out", str(out), "--commit", "abc", "--configs", "k4v4", "k2v2", "k3v3"]
    argv += ["--tests", "bash", "tools", "--samples", "0.02", "--server-args=--a --b"]
    assert program.main(argv) == 1
    assert served == [(c, ["--tool-call-parser=qwen25", "--a", "--b"]) for c in ("k2v2", "k3v3", "k4v4")]
    rows = table(out)
    assert set(readers) == {"k4v4"}
    assert {c for c, test, measure in rows if measure == "behind best"} == {"k4v4", "k3v3"}
    assert all(float(r["value"]) == 0.25 for (_, _, measure), r in rows.items() if measure == "behind best")
    meta = json.loads(out.with_suffix(".json").read_text())
    assert meta["failed"] == {"k2v2": "the server died with exit code 1: ValueError: no memory"}
    assert meta["not_measured"] == {"k2v2": 2} and meta["servers"].keys() == {"k4v4", "k3v3"}


def test_another_reference_reads_what_a_given_server_wrote(model, fake, served, tmp_path):
    out = tmp_path / "a.csv"
    argv = ["--model-path", model, "--out", str(out), "--url", fake.url, "--name", "mine", "--tests", "bash"]
    assert program.main([*argv, "--samples", "0.2", "--commit", "abc"]) == 0
    assert [config for config, _ in served] == ["bf16"]
    rows = table(out)
    assert {config for config, *_ in rows} == {"mine"} and ("mine", "bash", "behind best") in rows


def test_a_spent_budget_is_no_failure_and_says_what_is_missing(model, fake, tmp_path, capsys):
    out = tmp_path / "a.csv"
    assert program.main(arguments(model, fake, out, "--tests", "bash", "--budget", "0")) == 0
    assert fake.requests == [] and "not measured: 5 samples of k3v3" in capsys.readouterr().err
    assert json.loads(out.with_suffix(".json").read_text())["not_measured"] == {"k3v3": 5}


def test_an_error_is_named_and_the_next_run_goes_on(model, fake, tmp_path):
    out = tmp_path / "a.csv"
    argv = arguments(model, fake, out, "--tests", "bash", "--samples", "0.2")
    fake.status = 500
    assert program.main(argv) == 1
    assert "bash trial 0: /generate answered 500" in json.loads(out.with_suffix(".json").read_text())["failed"]["k3v3"]
    fake.status = 200
    assert program.main(argv) == 0
    assert json.loads(out.with_suffix(".json").read_text())["failed"] == {}


def test_without_a_gpu_bf16_has_no_chat_api(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "gpu", lambda: {})
    out = tmp_path / "a.csv"
    argv = ["--model-path", model, "--out", str(out), "--configs", "bf16", "--tests", "tools", "--commit", "abc"]
    assert program.main(argv) == 0
    assert "left out: bf16 tools: transformers has no chat API" in capsys.readouterr().err
    assert program.main([*argv[:-4], "fp8", "--tests", "bash"]) == 2
    assert "fp8 needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--url", "u"], "--url and --name need each other"),
        (["--samples", "0"], "--samples 0: a number above 0 is needed"),
        (["--samples", "nan"], "--samples nan: a number above 0 is needed"),
        (["--concurrency", "0"], "--concurrency 0: 1 is the least"),
        (["--reference", "exact"], "--reference exact: bf16, fp8,"),
        (["--tests", "poems"], "invalid choice: 'poems'"),
    ],
)
def test_bad_options_say_what_would_work(argv, message, capsys):
    with pytest.raises(SystemExit):
        program.parse(["--model-path", "m", "--out", "o.csv", *argv])
    assert message in capsys.readouterr().err
