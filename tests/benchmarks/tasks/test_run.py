"""The task runner against a stand-in OpenAI server: requests, records, resumption, budget, calibration, pictures."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.launch import ServerError
from benchmarks.tasks import __main__ as program
from benchmarks.tasks import plot, servers
from benchmarks.tasks.client import Client
from benchmarks.tasks.prompts import Sample, Tokens
from benchmarks.tasks.record import wilson
from benchmarks.tasks.reference import Reference
from benchmarks.tasks.run import Job

from ..stand_in import JsonServer, tiny_llama_of


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> str:
    """A folder with a tokenizer; no weights are needed."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


class Fake(JsonServer):
    """Answers like /v1/completions and /v1/chat/completions with a prefix cache; ``answer`` is asked for the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answer: Callable[[str], str]):
        super().__init__()
        self.answer, self.seen, self.extra_tokens, self.tokenizer = answer, [], 0, tokenizer

    def reply(self, path: str, body: dict) -> dict:
        if path == "/v1/chat/completions":
            text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = body["prompt"]
            text = self.tokenizer.decode(ids)
        cached = 0
        for old in self.seen[-8:]:  # requests at a time are fewer
            same = next((i for i, (a, b) in enumerate(zip(old, ids, strict=False)) if a != b), min(len(old), len(ids)))
            cached = max(cached, min(same, len(ids) - 1))
        self.seen.append(ids)
        said = self.answer(text) if body["max_tokens"] > 1 else "x"
        usage = {"prompt_tokens": len(ids) + self.extra_tokens, "completion_tokens": 3}
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
        choice = {"text": said, "message": {"content": said}, "finish_reason": "stop"}
        return {"choices": [choice], "usage": usage}


@pytest.fixture
def fake(tokenizer) -> Iterator[Fake]:
    server = Fake(tokenizer, knows)
    yield server
    server.stop()


def knows(text: str) -> str:
    """Finds the access code that is asked for."""
    name = re.search(r"What is the access code for the (\w+ \w+)\?", text)[1]
    return " " + re.search(rf"The access code for the {name} is (\d+)\.", text)[1] + "."


def deep_only(text: str) -> str:
    """Finds it in the second half of the text only."""
    return knows(text) if text.index(knows(text).strip(" .")) > len(text) / 2 else "12"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A haystack of sentences of many sizes."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = "near the river an old mill stands and turns its wheel all day while rain falls on green hills".split()
    sentences = [" ".join(words[i % 9 : i % 9 + 4 + i % 8]).capitalize() + "e" * (i % 5) + "." for i in range(120)]
    file.write_text(" ".join(sentences))
    return file


def arguments(model: str, fake: Fake, text: Path, out: Path, *more: str) -> list[str]:
    more = ("--text", str(text), *more)
    common = ["--model-path", model, "--url", fake.url, "--name", "k3v3", "--commit", "abc", "--trials", "2"]
    return [*common, "--out", str(out), "--tasks", "single", "multikey", "--lengths", "1500,2000", *more]


def table(out: Path) -> list[dict]:
    with out.open() as f:
        return list(csv.DictReader(f))


def test_several_difficulties_of_one_cell(model, fake, text, tmp_path):
    out = tmp_path / "results.csv"
    assert program.main(arguments(model, fake, text, out, "--depths", "50", "--rungs", "0,2")) == 0
    assert {(r["task"], r["knobs"]) for r in table(out) if r["length"] == "1500"} == {
        ("single", "digits=3"),
        ("single", "digits=5"),
        ("multikey", "digits=3 count=2"),
        ("multikey", "digits=5 count=2"),
    }


def test_a_run_that_is_cut_short_has_some_of_everything():
    def job(task: str, length: int, depth: float | None, trial: int) -> Job:
        return Job(task, length, depth, trial, {"digits": 3}, lambda: None)

    jobs = [job("single", n, d, t) for n in (512, 1024) for d in (0.0, 1.0) for t in range(2)]
    jobs += [job("words", 512, None, t) for t in range(4)]
    shown = [(j.task, j.length, j.depth, j.trial) for j in program.in_turn(jobs)]
    assert sorted(shown, key=str) == sorted([(j.task, j.length, j.depth, j.trial) for j in jobs], key=str)
    assert shown[:6] == [
        ("single", 512, 0.0, 0),
        ("single", 1024, 0.0, 0),
        ("words", 512, None, 0),
        ("single", 512, 1.0, 0),
        ("single", 1024, 1.0, 0),
        ("words", 512, None, 1),
    ]


def test_run_writes_rates_answers_provenance_and_picture(model, fake, text, tmp_path, capsys):
    out = tmp_path / "folder" / "results.csv"
    fake.answer = deep_only
    assert program.main(arguments(model, fake, text, out, "--depths", "0,100", "--seed", "5")) == 0
    rows = table(out)
    assert {(r["task"], r["length"], r["depth"]) for r in rows} == {
        (task, n, d) for task in ("single", "multikey") for n in ("1500", "2000") for d in ("0", "1")
    }
    for row in rows:
        deep = row["depth"] == "1"
        assert (row["config"], row["engine"], row["samples"]) == ("k3v3", "given", "2")
        assert float(row["pass_rate"]) == float(row["score"]) == deep
        low, high = wilson(float(deep), 2)
        assert (float(row["pass_low"]), float(row["pass_high"])) == pytest.approx((low, high), abs=1e-3)
        assert row["prompt_tokens"] == row["length"]
        assert int(row["cached_tokens"]) > 0.8 * int(row["length"])  # the question was answered over a cached context
    answers = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(answers) == 16 and all(a["passed"] == (a["depth"] == 1) for a in answers)
    meta = json.loads(out.with_suffix(".json").read_text())
    assert meta["commit"] == "abc" and meta["failed"] == meta["not_measured"] == {}
    assert meta["settings"]["seed"] == 5 and meta["settings"]["context"] == "cached"
    assert str(tmp_path) not in json.dumps(meta)
    assert (tmp_path / "folder" / "results_k3v3.png").read_bytes()[:4] == b"\x89PNG"
    assert re.search(r"single +k3v3 \(given\) +8 +50\.0  21\.5 to 78\.5", capsys.readouterr().out)


def test_requests_are_greedy_and_the_context_comes_first(model, fake, text, tmp_path):
    assert program.main(arguments(model, fake, text, tmp_path / "a.csv", "--depths", "50", "--concurrency", "1")) == 0
    assert len(fake.requests) == 16 and all(path == "/v1/completions" for path, _ in fake.requests)
    for (_, first), (_, second) in zip(fake.requests[::2], fake.requests[1::2], strict=True):
        assert first["max_tokens"] == 1 < second["max_tokens"]
        assert first["temperature"] == second["temperature"] == 0
        assert second["prompt"][: len(first["prompt"])] == first["prompt"]
        rest = fake.tokenizer.decode(second["prompt"][len(first["prompt"]) :])
        assert rest.strip().startswith("Question:")


def test_fresh_and_chat_send_one_request(model, fake, text, tmp_path):
    assert program.main(arguments(model, fake, text, tmp_path / "f.csv", "--depths", "50", "--context", "fresh")) == 0
    assert len(fake.requests) == 8 and all(len(body["prompt"]) in (1500, 2000) for _, body in fake.requests)
    fake.requests.clear()
    assert program.main(arguments(model, fake, text, tmp_path / "c.csv", "--depths", "50", "--api", "chat")) == 0
    assert len(fake.requests) == 8 and all(path == "/v1/chat/completions" for path, _ in fake.requests)
    assert {row["prompt_tokens"] for row in table(tmp_path / "c.csv")} == {"1500", "2000"}


def test_a_second_run_goes_on(model, fake, text, tmp_path):
    out = tmp_path / "r.csv"
    assert program.main(arguments(model, fake, text, out, "--depths", "0")) == 0
    asked, before = len(fake.requests), out.read_text()
    lines = out.with_suffix(".jsonl")
    lines.write_text(lines.read_text() + '{"config": "k3v3", "eng')  # a run that was killed while writing
    assert program.main(arguments(model, fake, text, out, "--depths", "0")) == 0
    assert len(fake.requests) == asked and out.read_text() == before
    assert program.main(arguments(model, fake, text, out, "--depths", "0,100")) == 0
    assert len(fake.requests) == 2 * asked
    answers = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(answers) == 16 and all(a["config"] == "k3v3" for a in answers) and len(table(out)) == 8
    assert len(json.loads(out.with_suffix(".json").read_text())["resumed"]) == 2


def test_other_settings_are_not_mixed(model, fake, text, tmp_path, capsys):
    out = tmp_path / "r.csv"
    assert program.main(arguments(model, fake, text, out, "--depths", "0")) == 0
    before = out.with_suffix(".jsonl").read_text()
    assert program.main(arguments(model, fake, text, out, "--depths", "0", "--seed", "1")) == 2
    assert "seed was 0, is 1" in capsys.readouterr().err
    assert out.with_suffix(".jsonl").read_text() == before


def test_failures_end_the_configuration_and_are_named(model, fake, text, tmp_path):
    out = tmp_path / "r.csv"
    fake.extra_tokens = 1  # as from a server that adds a token of its own
    assert program.main(arguments(model, fake, text, out, "--depths", "0", "--concurrency", "1")) == 1
    meta = json.loads(out.with_suffix(".json").read_text())
    assert "the server counts 1501 tokens, not 1500" in meta["failed"]["k3v3"]
    assert meta["not_measured"] == {"k3v3": 8} and table(out) == []
    assert len(fake.requests) == 2  # not one more after the first that failed
    fake.extra_tokens, fake.status = 0, 500
    assert program.main(arguments(model, fake, text, out, "--depths", "0")) == 1
    assert "answered 500" in json.loads(out.with_suffix(".json").read_text())["failed"]["k3v3"]
    fake.status = 200
    assert program.main(arguments(model, fake, text, out, "--depths", "0")) == 0
    assert json.loads(out.with_suffix(".json").read_text())["not_measured"] == {}


def test_a_spent_budget_is_no_failure(model, fake, text, tmp_path):
    out = tmp_path / "r.csv"
    assert program.main(arguments(model, fake, text, out, "--depths", "0", "--budget", "0")) == 0
    assert fake.requests == []
    assert json.loads(out.with_suffix(".json").read_text())["not_measured"] == {"k3v3": 8}


def test_every_configuration_is_started_and_one_may_fail(model, fake, text, tmp_path, monkeypatch):
    started = []

    @contextmanager
    def serve(config, path, cuda, tokens, user, log, timeout):
        started.append((config, path, user, tokens))
        if config == "k4v4":
            raise ServerError("the server died with exit code 1:\nValueError: no memory")
        yield fake.url, {"engine": "sglang", "args": "x"}

    monkeypatch.setattr(program, "serve", serve)
    monkeypatch.setattr(program, "gpu", lambda: {})
    out = tmp_path / "r.csv"
    argv = ["--model-path", model, "--out", str(out), "--configs", "bf16", "k4v4", "k2v2", "--tasks", "single"]
    argv += ["--lengths", "1500", "--depths", "0", "--trials", "1", "--text", str(text), "--concurrency", "3"]
    argv += ["--server-args=--a --b"]
    assert program.main(argv) == 1
    assert [(config, user) for config, _, user, _ in started] == [(c, ["--a", "--b"]) for c in ("bf16", "k4v4", "k2v2")]
    assert all(tokens > 3 * 1500 for *_, tokens in started)
    assert [(r["config"], r["engine"]) for r in table(out)] == [("bf16", "transformers"), ("k2v2", "sglang")]
    meta = json.loads(out.with_suffix(".json").read_text())
    assert meta["failed"] == {"k4v4": "the server died with exit code 1: ValueError: no memory"}
    assert meta["not_measured"] == {"k4v4": 1} and meta["servers"].keys() == {"bf16", "k2v2"}


def test_server_arguments():
    user = ["--context-length=9"]
    assert servers.arguments("bf16", True, 100, user) == ["--dtype=bfloat16", "--enable-cache-report", *user]
    packed = servers.arguments("k4v4", False, 100, user)
    assert "--kv-quant=blockgtq" in packed and "--kv-quant-v-bits=4" in packed and "--max-total-tokens=100" in packed
    assert packed[-1] == user[0]
    assert servers.engine("bf16", True) == servers.engine("k3v3", False) == "sglang"
    assert servers.engine("bf16", False) == "transformers"
    with pytest.raises(ValueError, match="fp8 needs a CUDA device"):
        servers.engine("fp8", False)


def test_calibration_is_kept_used_and_resumed(model, fake, text, tmp_path, capsys):
    """A model that passes up to 5 digits, and two thirds of the time at 7."""

    def limited(text: str) -> str:
        code = knows(text).strip(" .")
        return code if len(code) <= 5 or (len(code) == 7 and int(code) % 10 < 7) else "0"

    fake.answer = limited
    file = tmp_path / "knobs.json"
    argv = ["--model-path", model, "--url", fake.url, "--name", "bf16", "--calibrate", str(file), "--tasks", "single"]
    argv += ["--lengths", "1500", "--depths", "0,50,100", "--trials", "5", "--commit", "abc"]
    argv += ["--text", str(text)]
    assert program.main(argv) == 0
    cell = json.loads(file.read_text())["tasks"]["single"]["1500"]
    assert cell["knobs"] == {"digits": 7} and cell["note"] == "" and cell["samples"] == 15
    assert 0.6 <= cell["pass_rate"] <= 0.95 and cell["rates"].keys() == {"4", "1", "2", "3"}
    asked = len(fake.requests)
    assert program.main(argv) == 0 and len(fake.requests) == asked
    assert program.main([*argv, "--seed", "3"]) == 2 and "other settings" in capsys.readouterr().err

    more = ["--tasks", "single", "--lengths", "1500", "--depths", "0", "--knobs", str(file)]
    calibrated = {tuple(body["prompt"]) for _, body in fake.requests}
    fake.requests.clear()
    assert program.main(arguments(model, fake, text, tmp_path / "r.csv", *more)) == 0
    assert {r["knobs"] for r in table(tmp_path / "r.csv")} == {"digits=7"}
    assert not calibrated & {tuple(body["prompt"]) for _, body in fake.requests}  # measured on other samples
    assert program.main(arguments(model, fake, text, tmp_path / "s.csv", "--knobs", str(file))) == 2
    assert r"single at 2000 tokens was not calibrated (1500 was)" in capsys.readouterr().err


def test_a_length_that_holds_no_task_starts_nothing(model, fake, text, tmp_path, capsys):
    assert program.main(arguments(model, fake, text, tmp_path / "r.csv", "--lengths", "100")) == 2
    assert "length 100" in capsys.readouterr().err
    assert program.main(arguments(model, fake, text, tmp_path / "r.csv", "--lengths", "250")) == 2
    assert re.search(r"length 250: 2\d% of it would be prose.* 25% is the least", capsys.readouterr().err)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "either --out or --calibrate"),
        (["--out", "x", "--calibrate", "y"], "either --out or --calibrate"),
        (["--out", "x", "--url", "u"], "--url and --name"),
        (["--out", "x", "--longbench", "d"], "--longbench needs --max-length"),
        (["--out", "x", "--tasks", "nothing"], "--tasks nothing: there are single"),
        (["--out", "x", "--depths", "0,101"], "0,101: per cents are needed"),
        (["--out", "x", "--api", "chat", "--context", "cached"], "need --api completions"),
        (["--out", "x", "--trials", "0"], "--trials 0: 1 is the least"),
    ],
)
def test_bad_options_say_what_would_work(argv, message, capsys):
    with pytest.raises(SystemExit):
        program.parse(["--model-path", "m", *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"context": "cached"}, {"context": "fresh"}])
def test_client_refuses_what_chat_cannot_say(tokenizer, options):
    with pytest.raises(ValueError, match="chat message cannot"):
        Client("http://x", Tokens(tokenizer), api="chat", **options)


def test_wilson():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="at least one sample"):
        wilson(0.5, 0)


def test_heat_map(tmp_path):
    def row(task, length, depth, rate, config="a"):
        return {"config": config, "task": task, "length": length, "depth": depth, "samples": 4, "pass_rate": rate}

    rows = [row("single", n, d, 0.5) for n in (1024, 1500) for d in (0.0, 1.0)] + [row("words", 1024, None, 1.0)]
    assert plot.heat_map(rows, "a", tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"
    none = [{**rows[0], "pass_rate": None}, row("single", "4-8k", None, 1.0), row("single", 1024, 0.0, 1.0, "b")]
    assert not plot.heat_map(none, "a", tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_reference_answers_as_the_model_generates(tokenizer):
    llama = tiny_llama_of(tokenizer, eos_token_id=0)
    sample = Sample("t", "Some context.", " A question?", len, new_tokens=6, prefix="So")
    tokens = Tokens(tokenizer)
    ids, _ = tokens.prompt(sample)
    expected = llama.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    with Reference(llama, tokenizer) as reference:
        client = Client(reference.url, tokens)
        reply = client.ask(sample, 60)
        assert reply.text == tokenizer.decode(expected, skip_special_tokens=True) != ""
        assert (reply.prompt_tokens, reply.cached_tokens) == (len(ids), None)
        with pytest.raises(ServerError, match=r"temperature 0\.5: only 0"):
            client.post("completions", {"prompt": ids, "max_tokens": 2, "temperature": 0.5}, 60)
        with pytest.raises(ServerError, match="token ids"):
            client.post("completions", {"prompt": "text", "max_tokens": 2, "temperature": 0}, 60)
