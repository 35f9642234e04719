"""The server benchmark against a stand-in server: its requests, rows, files, failures and budget."""

from __future__ import annotations

import argparse
import csv
import json
import os
import textwrap
from types import SimpleNamespace

import pytest
import torch

from benchmarks import server_steps as steps
from benchmarks.launch import Server, ServerError, Stream, shown, wait_for
from benchmarks.models import Model
from benchmarks.watch_forwards import blockgtq_forwards

#: Answers like launch_server, with a prefix cache. fp8_e4m3 dies, FAKE=deaf never forgets, FAKE=slow never starts.
FAKE_SERVER = textwrap.dedent(
    """
    import json, os, sys, time
    from http.server import BaseHTTPRequestHandler, HTTPServer

    ARGS, MODE = sys.argv[1:], os.environ.get("FAKE", "")
    if "--kv-cache-dtype=fp8_e4m3" in ARGS:
        sys.exit("  ValueError: no fp8 here")
    SEEN = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body):
            self.send_response(200); self.end_headers(); self.wfile.write(body)
        def do_GET(self):
            info = {"max_total_num_tokens": 4321}
            if "--kv-quant=blockgtq" in ARGS:
                info["kv_quant"] = {"table_origin": "calibrated", "table_seconds": 2.5}
            self.reply(json.dumps(info).encode())
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            with open(os.environ["REQUESTS"], "a") as f:
                f.write(json.dumps([self.path, body]) + "\\n")
            if self.path.startswith("/flush_cache"):
                if MODE != "deaf": SEEN.clear()
                return self.reply(b"")
            ids, cached = body["input_ids"], 0
            for old in SEEN:
                n = next((i for i, (a, b) in enumerate(zip(old, ids)) if a != b), min(len(old), len(ids)))
                cached = max(cached, min(n, len(ids) - 1))
            SEEN.append(ids)
            if "watch_forwards" in os.environ.get("PYTHONPATH", "") and MODE != "cpu":
                line = f"blockgtq_forwards: {len(ids) - cached} tokens of {len(ids)} in {10 + len(SEEN)}.5 ms"
                print(line, flush=True)
            lines = b""
            new = body["sampling_params"]["max_new_tokens"]
            for n in [n for n in range(1, new + 1) if n != 2]:  # the second token comes with the third
                meta = {"completion_tokens": n, "cached_tokens": cached}
                lines += b"data: " + json.dumps({"text": "x", "meta_info": meta}).encode() + b"\\n\\n"
            self.reply(lines + b"data: [DONE]\\n\\n")
        def log_message(self, *args): pass

    server = HTTPServer(("127.0.0.1", int(ARGS[ARGS.index("--port") + 1])), Handler)
    print("Load weight end. elapsed=1.50 s, type=X")
    print("Capture target prefill CUDA graph end. elapsed=84.25 s, mem usage=1 GB")
    print("Capture target decode CUDA graph end. bs=[1, 2], elapsed=3.75 s, mem usage=1 GB")
    if MODE == "slow": time.sleep(600)
    print("The server is fired up and ready to roll!", flush=True)
    server.serve_forever()
    """
)


@pytest.fixture
def fake(instead_of_sglang, monkeypatch):
    """The stand-in, by the file of its requests."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    return instead_of_sglang(FAKE_SERVER)


def run(tmp_path, *options: str) -> tuple[int, list[dict], dict]:
    out = tmp_path / "results" / "steps.csv"
    code = steps.main(["--out", str(out), "--model", "tiny=some/config,some/tokenizer", *options])
    with out.open() as f:
        return code, list(csv.DictReader(f)), json.loads(out.with_suffix(".json").read_text())


def requests_of(fake) -> list:
    return [json.loads(line) for line in fake.read_text().splitlines()]


def test_rows_of_a_server(fake, tmp_path):
    code, rows, meta = run(tmp_path, "--method", "blockgtq-k3v3", "--lengths", "200,50", "--commit", "abc")
    assert code == 0
    measures = ["decode_step", "extend", "prefill"]
    assert [r["measure"] for r in rows] == ["start", "table", *measures, *measures]
    assert [r["input_tokens"] for r in rows] == ["", "", "50", "562", "50", "200", "712", "200"]
    assert [r["cached_tokens"] for r in rows if r["measure"] == "extend"] == ["50", "200"]
    assert {(r["model"], r["method"], r["k_bits"], r["batch"], r["kv_tokens"]) for r in rows} == {
        ("tiny", "blockgtq-k3v3", "3", "1", "4321")
    }
    assert rows[1]["ms"] == "2500"
    step = rows[2]
    assert "of 111" in step["note"]  # 120 tokens, 119 gaps, 8 left out
    assert float(step["tokens_per_s"]) == pytest.approx(1e3 / float(step["ms"]), rel=1e-3)
    extend = rows[3]
    assert float(extend["tokens_per_s"]) == pytest.approx(512e3 / float(extend["ms"]), rel=1e-3)
    assert meta["commit"] == "abc" and meta["not_measured"] == [] and meta["failed"] == {}
    assert meta["servers"]["tiny/blockgtq-k3v3"]["phases_s"] == {
        "weights": 1.5,
        "prefill_graphs": 84.25,
        "decode_graphs": 3.75,
    }


def test_forward_passes_are_timed_where_a_server_tells_of_them(fake, tmp_path, monkeypatch):
    options = "--method", "bf16-fa3", "--lengths", "50", "--forwards"
    code, rows, meta = run(tmp_path, *options)
    assert code == 0 and meta["not_measured"] == []
    extend, prefill, forward = rows[-3:]
    assert [r["measure"] for r in (extend, prefill, forward)] == ["extend", "prefill", "forward"]
    assert forward["note"] == "samples 12.5 13.5 14.5" and forward["ms"] == "13.5"
    where = "input_tokens", "cached_tokens"
    assert [forward[name] for name in where] == [extend[name] for name in where] == ["562", "50"]
    monkeypatch.setenv("FAKE", "cpu")
    code, _, meta = run(tmp_path, *options)
    assert code == 1 and "--forwards: the server told of no forward pass" in meta["failed"]["tiny/bf16-fa3"]


def test_a_pass_is_timed_once_a_later_one_begins(monkeypatch, caplog):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.clock += 1.25
            self.at = Event.clock

        def query(self):
            return True

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    capturing = iter([False, True, False])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(capturing))
    caplog.set_level("INFO")

    def passes(mode, tokens, total, device="cuda"):
        batch = SimpleNamespace(forward_mode=mode, input_ids=[0] * tokens, seq_lens_sum=total)
        return blockgtq_forwards.time_forward(lambda *_: tokens, SimpleNamespace(device=device), batch)

    extend, decode = (SimpleNamespace(is_extend=lambda yes=yes: yes) for yes in (True, False))
    assert passes(extend, 8, 72) == 8 and not caplog.messages
    assert passes(extend, 5, 6) == 5  # of a graph that is being captured
    assert passes(decode, 1, 73) == 1 and passes(extend, 9, 9, "cpu") == 9
    assert passes(extend, 3, 76) == 3
    assert caplog.messages == ["blockgtq_forwards: 8 tokens of 72 in 1.250 ms"]
    assert steps.forwards("\n".join(caplog.messages), 8, 72) == [0.00125]
    blockgtq_forwards._under_way.clear()


def test_prompts_are_random_fresh_and_the_same_for_every_method(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "AGREE", 0)  # always a third fresh prompt
    code, _, _ = run(tmp_path, "--method", "bf16-fa3", "blockgtq-k2v2", "--lengths", "64", "--extend-tokens", "8")
    assert code == 0
    sent = requests_of(fake)
    one, two = sent[: len(sent) // 2], sent[len(sent) // 2 :]
    assert one == two
    prompts = [body["input_ids"] for path, body in one if path == "/generate"]
    assert [len(p) for p in prompts] == [64, 72, 64, 64, 72, 72, 72, 64]  # warm-up, fresh, answered, extended, third
    answered, extended = prompts[3], prompts[4:7]
    assert all(p[:64] == answered for p in extended) and len({tuple(p) for p in prompts}) == len(prompts)
    assert all(t in steps.TOKEN_IDS for p in prompts for t in p) and len(set(answered)) > 48
    for i, (path, body) in enumerate(one):
        if path == "/generate" and len(body["input_ids"]) == 64:
            assert one[i - 1][0].startswith("/flush_cache")
            assert body["sampling_params"]["temperature"] == 0 and body["sampling_params"]["ignore_eos"]


def test_a_dead_server_costs_only_its_own_rows(fake, tmp_path, capsys):
    for extra in ((), ("--together",)):
        code, rows, meta = run(tmp_path, "--method", "fp8-fa3", "bf16-fa3", "--lengths", "32", *extra)
        assert code == 1
        assert {r["method"] for r in rows} == {"bf16-fa3"} and len(rows) == 4
        assert "exit code 1" in meta["failed"]["tiny/fp8-fa3"]
        assert meta["failed"]["tiny/fp8-fa3"].endswith("ValueError: no fp8 here")
        assert meta["not_measured"] == [f"tiny/fp8-fa3/{x}" for x in ("decode_step/32", "extend/544", "prefill/32")]
    assert rows[0]["note"] == "started together with 1 more"


def test_a_fresh_prompt_that_was_cached_is_refused(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "deaf")
    monkeypatch.setattr(steps, "prompt", lambda seed, tokens: [500] * tokens)
    code, rows, meta = run(tmp_path, "--method", "bf16-fa3", "--lengths", "32")
    assert code == 1 and [r["measure"] for r in rows] == ["start"]
    assert "came from the cache" in meta["failed"]["tiny/bf16-fa3"]


def test_budget_cuts_off_without_failing(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "slow")
    code, rows, meta = run(tmp_path, "--method", "bf16-fa3", "blockgtq-k3v3", "--lengths", "32", "--budget", "1")
    assert code == 0 and rows == [] and meta["failed"] == {}
    assert len(meta["not_measured"]) == 6


def test_stop_ends_the_process_and_its_log(fake):
    with Server("m") as server:
        server.wait(60)
        assert server.log.exists()
    assert server.process.returncode is not None and not server.log.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(server.process.pid, 0)


def test_a_late_server_is_named(fake, monkeypatch):
    monkeypatch.setenv("FAKE", "slow")
    with Server("m") as server:
        assert "within 0 s" in str(wait_for([server], 0)[server])
        with pytest.raises(ServerError, match="did not start"):
            server.wait(0)


def test_gaps():
    stream = Stream(((1.0, 1), (1.5, 2), (2.5, 4), (2.75, 5)), 0)
    assert stream.first == 1.0
    assert stream.gaps() == [0.5, 0.5, 0.5, 0.25]
    assert stream.gaps(3) == [0.25]


def test_server_arguments():
    options = ["--out", "x.csv", "--method", "fp8-fa3", "--quick-graphs", "--together", "--lengths", "131072"]
    args = steps.parse([*options, "--model", "a=b", "c=d,e", "--server-args=--device cpu --chunked-prefill-size 128"])
    real, random = (steps.method_args(model, "fp8-fa3", args) for model in args.model)
    assert random[:3] == ["--load-format=dummy", "--tokenizer-path", "e"] and random[3:] == real
    assert real[-4:] == ["--device", "cpu", "--chunked-prefill-size", "128"]
    values = dict(x.split("=") for x in real if "=" in x)
    # A request is never longer than the context, and a prefix with all its extensions fits the cache.
    assert int(values["--context-length"]) > 131072 + 512 + 1
    assert int(values["--max-total-tokens"]) > 131072 + steps.DECODE_TOKENS + steps.EXTENDS * 512
    at = real.index("--cuda-graph-bs-prefill")
    assert real[at + 1 : at + 3] == ["512", "8192"]


@pytest.mark.parametrize("text", ["", "8K", "0,5", "-1"])
def test_bad_lengths(text):
    with pytest.raises(argparse.ArgumentTypeError, match="8192,32768"):
        steps.lengths(text)


@pytest.mark.parametrize(
    "options", [["--decode-tokens", "10"], ["--extend-tokens", "0"], ["--model", "a=b", "a=c"]], ids=lambda o: o[0]
)
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit):
        steps.parse(["--out", "x.csv", "--method", "bf16-fa3", "--model", "a=b", *options])
    assert options[0] in capsys.readouterr().err


def test_missing_names_what_was_asked_for():
    args = SimpleNamespace(model=[Model("m", "p")], method=["bf16-fa3"], lengths=[8], extend_tokens=4, forwards=False)
    row = steps.Row("m", "bf16-fa3", "extend", 1.0, 2.0, input_tokens=12)
    assert steps.missing(args, [row]) == ["m/bf16-fa3/decode_step/8", "m/bf16-fa3/prefill/8"]


def test_result_files_name_no_folders_of_the_machine():
    text = "--model a=/opt/x/configs/a,/opt/x/tok b=/opt/y --out benchmarks/results/s.csv '--server-args=--a /tmp/b'"
    assert shown(text) == "--model a=a,tok b=y --out benchmarks/results/s.csv '--server-args=--a b'"
