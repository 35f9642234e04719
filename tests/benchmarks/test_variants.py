"""The comparison of a server's forms, with servers that are made up."""

from __future__ import annotations

import csv
import json
import math
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event

import pytest

from benchmarks import variants
from benchmarks.launch import ServerError, Stream
from benchmarks.variants import Answer, Named, parted

NEW = 4
#: of the words that a server is started with: what its answers are
ANSWERS = {"plain": [5, 6, 7, 8], "other": [5, 6, 9, 9], "lost": [5, 42, 7, 8]}


class MadeUp:
    """In a Server's place. An argument names it; "broken" does not start."""

    def __init__(self, model, *words, log, env):
        self.words, self.start_s, self.flushed = words, 3.0, False
        self.name = next(word for word in words if word in (*ANSWERS, "broken"))
        assert env["PYTHONPATH"].split(":")[0].endswith("alone")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        pass

    def flush(self):
        self.flushed = True

    def info(self):
        return {"max_total_num_tokens": 1000} | (
            {"kv_quant": {"table_hash": "0" * 64}} if "packed" in self.words else {}
        )

    def logprobs(self, ids, start):
        cached, self.flushed = not self.flushed, False
        return [-1.0 - 0.1 * cached - 0.01 * (self.name != "plain")] * (len(ids) - start - 1), cached

    def generate(self, ids, new=1):
        self.flushed = False
        return {"cached_tokens": 0, "output_token_logprobs": [[-0.1, token, None] for token in ANSWERS["other"][:new]]}

    def stream(self, ids, new):
        return Stream(((0.5, 1), (1.5, 1 + 3)), 0)


def test_answers_part_where_their_tokens_do():
    def of(tokens):
        best = [{token: -0.1, 1: -1.0, 9: -0.25} for token in tokens]
        return Answer(tokens, best, None, 1.0, 1.0)

    first = of(ANSWERS["plain"])
    assert parted(first, ANSWERS["plain"]) == (4, 0.0)
    assert parted(first, ANSWERS["other"]) == (2, pytest.approx(0.15))
    assert parted(first, ANSWERS["lost"]) == (1, pytest.approx(0.9))  # at least: it is not among the likely ones


def test_rows_of_several_servers(tmp_path, monkeypatch, capsys):
    class Response:
        def __init__(self, tokens):
            self.tokens = tokens

        def raise_for_status(self):
            pass

        def json(self):
            made = [[-0.1, token, None] for token in self.tokens]
            likely = [[[-0.1, token, None], [-0.25, 9, None]] for token in self.tokens]
            meta = {"output_token_logprobs": made, "output_top_logprobs": likely}
            return {"meta_info": meta | ({"spec_accept_length": 2.5} if self.tokens != ANSWERS["plain"] else {})}

    asked = []
    monkeypatch.setattr(variants, "Server", type("Asked", (MadeUp,), {"url": property(lambda self: self.name)}))
    monkeypatch.setattr(
        variants.requests, "post", lambda url, json, timeout: asked.append(json) or Response(ANSWERS[url.split("/")[0]])
    )
    monkeypatch.setattr(variants, "prompts", lambda tokenizer, tokens, count: [list(range(tokens))] * count)
    monkeypatch.setattr(
        variants,
        "wait_for",
        lambda servers, timeout: {
            s: ServerError("it died:\nerror: no room\nend") for s in servers if s.name == "broken"
        },
    )
    (tmp_path / "tokenizer_config.json").write_text("{}")
    words = ["--model", str(tmp_path), "--out", str(tmp_path / "v.csv"), "--cache", "bf16", "k3=packed"]
    words += ["--variant", "a=plain", "b=other", "c=broken", "--lengths", "70", "--prompts", "2", f"--new={NEW}"]
    words += ["--beside", "3"]
    beside = []
    monkeypatch.setattr(
        variants, "answered_beside", lambda server, ids, new, others: beside.append(len(others)) or ANSWERS["lost"]
    )
    assert variants.main([*words, "--share", "0.6", "--commit", "abc"]) == 1
    rows = list(csv.DictReader((tmp_path / "v.csv").open()))
    assert [(r["cache"], r["variant"]) for r in rows] == [
        (c, v) for c in ("bf16", "k3") for v in ("a", "a+3", "b", "c")
    ]
    plain, again, other, broken = rows[4:]
    assert (again["same"], again["of"], again["cold"], again["tokens_per_s"]) == ("1", "4", "", "")
    assert math.isclose(float(again["tie"]), 0.15, rel_tol=1e-4) and beside == [3] * 4
    assert (plain["cold"], plain["same"], plain["tie"], plain["accept"]) == ("0", "4", "0", "")
    assert (float(other["cold"]), float(other["warm"])) == (pytest.approx(0.01), pytest.approx(0.11))
    assert (other["same"], other["of"], other["accept"], other["table"]) == ("2", "4", "2.5", "0" * 12)
    assert math.isclose(float(other["tie"]), 0.15, rel_tol=1e-4)
    assert (other["tokens_per_s"], other["first_s"], rows[0]["table"]) == ("3", "0.5", "")
    assert broken["note"] == "error: no room" and broken["tokens"] == ""
    assert all(body["sampling_params"]["temperature"] == 0 for body in asked)
    made = json.loads((tmp_path / "v.json").read_text())
    assert made["commit"] == "abc" and "--variant" in made["command"] and str(tmp_path) not in made["command"]


class AtOnce(ThreadPoolExecutor):
    def submit(self, function, *args):
        done = super().submit(function, *args)
        wait([done])
        return done


class Beside:
    """Of a server: posts of other answers, which go on until they are given up, or are over too soon."""

    def __init__(self, ends: bool):
        self.ends, self.over, self.begun, self.asked = ends, Event(), 0, []

    def post(self, url, json, timeout, stream=False):
        if url.endswith("/abort_request"):
            assert json == {"abort_all": True}
            self.over.set()
            return None
        assert stream and json["stream"]
        self.asked.append(json["sampling_params"]["max_new_tokens"])
        return self

    def raise_for_status(self):
        pass

    def iter_lines(self):
        self.begun += 1
        yield b"data: a token"
        if not self.ends:
            assert self.over.wait(10)


@pytest.mark.parametrize("ends", [False, True])
def test_an_answer_beside_others(monkeypatch, ends):
    server, beside = MadeUp("", "plain", log=None, env={"PYTHONPATH": "alone"}), Beside(ends)
    server.url = ""
    monkeypatch.setattr(variants.requests, "post", beside.post)
    if ends:
        monkeypatch.setattr(variants, "ThreadPoolExecutor", AtOnce)
        with pytest.raises(ServerError, match="beside a prompt"):
            variants.answered_beside(server, [1], NEW, [[2], [3]])
    else:
        assert variants.answered_beside(server, [1], NEW, [[2], [3]]) == ANSWERS["other"]
    assert beside.over.is_set() and beside.begun == 2 and beside.asked == [4 * NEW] * 2


@pytest.mark.parametrize(
    "more, what",
    [
        (["--lengths", "64"], "more than 64 are needed"),
        (["--prompts", "0"], "--prompts 0: 1 is the least"),
        (["--cache", "=x"], "a name is needed"),
    ],
)
def test_bad_arguments(tmp_path, capsys, more, what):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    words = ["--model", str(tmp_path), "--out", "v.csv", "--cache", "bf16", "--variant", "a", *more]
    with pytest.raises(SystemExit):
        variants.main(words)
    assert what in capsys.readouterr().err


def test_names_stand_for_arguments():
    assert Named.parse('k3=--a=b --c "d e"') == Named("k3", ("--a=b", "--c", "d e"))
    assert Named.parse("plain") == Named("plain", ())


def test_prompts_are_python(smollm2):
    texts = variants.prompts(smollm2, 300, 2)
    assert [len(ids) for ids in texts] == [300, 300] and texts[0] != texts[1]
