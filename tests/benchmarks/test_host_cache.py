"""The benchmark of host memory against a stand-in server that keeps prompts in two places."""

from __future__ import annotations

import csv
import json
import textwrap

import pytest

from benchmarks import host_cache

#: Answers like launch_server with HiCache: of prompts, the last that fit are in device memory, and all in host memory.
#: FAKE=small has little host memory, FAKE=forgets loads nothing from it, FAKE=spoils loads other bytes, FAKE=quiet does
#: not log its size.
FAKE_SERVER = textwrap.dedent(
    """
    import json, os, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    ARGS, MODE = sys.argv[1:], os.environ.get("FAKE", "")
    VALUES = dict(arg.split("=", 1) for arg in ARGS if "=" in arg)
    POOL, GB = int(VALUES["--max-total-tokens"]), int(VALUES["--hicache-size"])
    BYTES = 26624 if "--kv-quant=blockgtq" in ARGS else 131072
    HOST = 100 if MODE == "small" else GB * 10**9 // BYTES
    SEEN, COMPARED = [], []

    def shared(old, ids):
        return next((i for i, (a, b) in enumerate(zip(old, ids)) if a != b), min(len(old), len(ids)))

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body):
            self.send_response(200); self.end_headers(); self.wfile.write(body)
        def do_GET(self):
            info = {"max_total_num_tokens": POOL}
            if BYTES == 26624: info["kv_quant"] = {"bytes_per_token": BYTES}
            self.reply(json.dumps(info).encode())
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            with open(os.environ["REQUESTS"], "a") as f:
                f.write(json.dumps([self.path, body]) + "\\n")
            if self.path.startswith("/flush_cache"):
                SEEN.clear()
                return self.reply(b"")
            ids, came, room = body["input_ids"], {}, POOL
            for old in reversed(SEEN):  # what was used last
                place = "device" if room >= len(old) else "host"
                room -= len(old)
                n = min(shared(old, ids), len(ids) - 1, body.get("logprob_start_len", len(ids)))
                if n > max([*came.values(), 50]) and not (place == "host" and MODE == "forgets"):
                    came = {place: n}
            if ids in SEEN: SEEN.remove(ids)
            SEEN.append(ids)
            cached = sum(came.values())
            meta = {"completion_tokens": 1, "cached_tokens": cached, "cached_tokens_details": came or None}
            if body.get("stream"):
                line = b"data: " + json.dumps({"text": "x", "meta_info": meta}).encode() + b"\\n\\n"
                return self.reply(line + b"data: [DONE]\\n\\n")
            COMPARED.append(ids)
            worse = 0.25 * (len(COMPARED) - 1) * (MODE == "spoils")
            new = len(ids) - body["logprob_start_len"]
            meta["input_token_logprobs"] = [[-i - worse if i else None, 7, None] for i in range(new)]
            self.reply(json.dumps({"meta_info": meta}).encode())
        def log_message(self, *args): pass

    server = HTTPServer(("127.0.0.1", int(ARGS[ARGS.index("--port") + 1])), Handler)
    if MODE != "quiet":
        print(f"Allocating kv hierarchical KV host pool: {HOST} tokens, {HOST * BYTES / 1e9:.2f} GB host memory.")
    print("The server is fired up and ready to roll!", flush=True)
    server.serve_forever()
    """
)
SMALL = ("--tokens=640", "--question=64", "--repeats=2", "--host-gb=4", "--commit=abc")


@pytest.fixture
def fake(instead_of_sglang, monkeypatch):
    """The stand-in, by the file of its requests."""
    monkeypatch.setattr(host_cache, "CHUNK", 64)
    return instead_of_sglang(FAKE_SERVER)


def run(tmp_path, *options: str) -> tuple[int, list[dict], dict]:
    out = tmp_path / "results" / "host.csv"
    code = host_cache.main(["--out", str(out), "--model", "tiny=some/config,some/tokenizer", *SMALL, *options])
    with out.open() as f:
        return code, list(csv.DictReader(f)), json.loads(out.with_suffix(".json").read_text())


def test_rows_of_two_servers(fake, tmp_path):
    code, rows, meta = run(tmp_path, "--method", "bf16-fa3", "blockgtq-k3v3")
    assert code == 0 and meta["failed"] == {} and meta["not_measured"] == [] and meta["commit"] == "abc"
    assert [(r["method"], r["came"]) for r in rows] == [
        (method, came) for method in ("bf16-fa3", "blockgtq-k3v3") for came in ("cold", "device", "host")
    ]
    assert [r["cached_tokens"] for r in rows[:3]] == ["0", "640", "640"]
    assert [r["apart"] for r in rows[:3]] == ["", "", "0"]
    assert {r["host_tokens"] for r in rows[:3]} == {"30517"} and {r["host_tokens"] for r in rows[3:]} == {"150240"}
    assert abs(float(rows[0]["host_bytes"]) / 131072 - 1) < 1e-3
    assert abs(float(rows[3]["host_bytes"]) / 26624 - 1) < 1e-3
    assert {(r["tokens"], r["question"], r["host_gb"]) for r in rows} == {("640", "64", "4")}
    assert all(len(r["note"].split()) == 3 for r in rows)  # "samples" and two of them
    assert meta["servers"]["tiny/blockgtq-k3v3"]["kv_quant"] == {"bytes_per_token": 26624}


def test_other_bytes_show(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "spoils")
    assert [row["apart"] for row in run(tmp_path, "--method", "bf16-fa3")[1]] == ["", "", "0.25"]


def test_every_method_is_asked_the_same(fake, tmp_path):
    assert run(tmp_path, "--method", "bf16-fa3", "blockgtq-k3v3")[0] == 0
    sent = [json.loads(line) for line in fake.read_text().splitlines()]
    assert sent[: len(sent) // 2] == sent[len(sent) // 2 :]
    prefix = host_cache.prompt("prefix", 640)
    behind = [body["input_ids"] for path, body in sent if path == "/generate" and body["input_ids"][:640] == prefix]
    questions = [tuple(ids[640:]) for ids in behind[: len(behind) // 2] if len(ids) > 640]
    assert len(set(questions)) == len(questions) - 1  # one is asked twice, to compare


@pytest.mark.parametrize(
    "mode, what", [("small", "--host-gb"), ("forgets", "in host memory came"), ("quiet", "nothing of a host pool")]
)
def test_what_was_not_measured_is_said(fake, tmp_path, monkeypatch, mode, what):
    monkeypatch.setenv("FAKE", mode)
    code, rows, meta = run(tmp_path, "--method", "bf16-fa3")
    assert code == 1 and what in meta["failed"]["tiny/bf16-fa3"]
    assert [r["came"] for r in rows] == (["cold", "device"] if mode == "forgets" else [])
    assert meta["not_measured"][-1] == "tiny/bf16-fa3/host"


def test_server_arguments():
    options = ["--out", "x.csv", "--model", "a=b,c", "--method", "blockgtq-k3v3", "--quick-graphs"]
    args = host_cache.parse([*options, "--server-args=--hicache-size=3"])
    asked = host_cache.server_args(args.model[0], "blockgtq-k3v3", args)
    assert asked[0] == "--load-format=dummy" and "--kv-quant=blockgtq" in asked and asked[-1] == "--hicache-size=3"
    assert "--enable-hierarchical-cache" in asked and "--page-size=64" in asked and "--hicache-size=24" in asked
    # A prefix fits the GPU's cache twice, and the others together push it out.
    assert 2 * 32768 < host_cache.pool_tokens(args) < sum(map(len, host_cache.others(args)))


@pytest.mark.parametrize("option", ["--tokens=1", "--question=1", "--repeats=0", "--host-gb=0"])
def test_bad_options(option, capsys):
    with pytest.raises(SystemExit):
        host_cache.parse(["--out", "x.csv", "--method", "bf16-fa3", "--model", "a=b", option])
    assert option.split("=")[0] in capsys.readouterr().err
