"""Takes the place of sglang's server and load generators, in one file: ``write`` puts it into a package."""

from __future__ import annotations

import textwrap
from pathlib import Path

#: FAKE=nan: packed servers answer without numbers; positive: with probabilities over 1; off: with wrong ones;
#: drift: the same request gets other ones
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

ARGS, MODE = sys.argv[1:], os.environ.get("FAKE", "")
PACKED = "--kv-quant=blockgtq" in ARGS
if "--kv-cache-dtype=fp8_e4m3" in ARGS:
    sys.exit("ValueError: no fp8 here")
STATE = {"asked": 0, "cached": []}
TOKENS = 4000 if PACKED else 1000

def logprob(token):
    value = -1 - token % 7 / 10
    if PACKED and MODE == "off": value -= 3 * (token % 2)
    if MODE == "drift": value -= STATE["asked"] / 2
    if PACKED and MODE == "positive": value = 0.5
    return None if PACKED and MODE == "nan" else value

class Handler(BaseHTTPRequestHandler):
    def reply(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(body)
    def do_GET(self):
        if self.path == "/metrics":
            STATE["retracted"] = STATE.get("retracted", -2) + 2
            return self.reply(b'sglang:num_retracted_requests_total{a="b"} %d.0\\n' % STATE["retracted"])
        use = {"weight": 1.5, "kvcache": 2.0, "graph": {"prefill": 0.25, "decode": 0.25}}
        server = {"memory_usage": use, "effective_max_running_requests_per_dp": 9, "context_length": 996}
        info = {"max_total_num_tokens": TOKENS, "internal_states": [server]}
        if PACKED:
            info["kv_quant"] = {"table_origin": "calibrated", "table_seconds": 2.5, "pool_bytes": 400000}
        self.reply(json.dumps(info).encode())
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        if self.path.startswith("/flush_cache"):
            STATE["cached"] = []
            return self.reply(b"")
        ids, start = body["input_ids"], body["logprob_start_len"]
        STATE["asked"] += 1
        cached = 0
        for a, b in zip(STATE["cached"], ids):
            if a != b: break
            cached += 1
        STATE["cached"] = ids
        new = body["sampling_params"]["max_new_tokens"]
        out = [[logprob(t), t, None] for t in range(100, 100 + new)]
        meta = {"cached_tokens": cached, "output_token_logprobs": out}
        if start >= 0:
            meta["input_token_logprobs"] = [[None, ids[start], None], *([logprob(t), t, None] for t in ids[start + 1:])]
        self.reply(json.dumps({"meta_info": meta}).encode())
    def log_message(self, *args): pass

server = HTTPServer(("127.0.0.1", int(ARGS[ARGS.index("--port") + 1])), Handler)
print("Load weight end. elapsed=1.50 s, type=X")
print("The server is fired up and ready to roll!", flush=True)
server.serve_forever()
"""

#: notes its arguments in CALLS; a packed server is twice as fast. BROKEN=KIND fails, FAILS=1 loses a request
GENERATOR = """
import json, os, sys, urllib.request

ARGS, KIND = [], "@KIND@"
def of(name, many=False):
    at = ARGS.index(name) + 1
    if not many: return ARGS[at]
    out = []
    while at < len(ARGS) and not ARGS[at].startswith("--"): out.append(int(ARGS[at])); at += 1
    return out

def cli_main():
    global ARGS
    ARGS = sys.argv[1:]
    with open(os.environ["CALLS"], "a") as f:
      f.write(json.dumps([KIND, *ARGS]) + "\\n")
    load()

def load():
    get = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    info = json.loads(get(of("--base-url") + "/server_info").read())
    fast = 2.0 if "kv_quant" in info else 1.0
    if os.environ.get("BROKEN") == KIND:
        sys.exit("RuntimeError: no load today")
    if KIND == "serving":
        line = json.loads(open(os.environ["SAMPLE"]).read())
        line["output_throughput"] *= fast
        line["median_ttft_ms"] /= fast
        if os.environ.get("FAILS"): line["errors"][1] = "Bad gateway"
        open(of("--output-file"), "a").write(json.dumps(line) + "\\n")
    else:
        batch, steps = int(of("--batch-size")), int(of("--output-len"))
        for length in of("--input-len", True):
            if batch * (length + steps) > info["max_total_num_tokens"]:
                need, fit = batch * (length + steps), info["max_total_num_tokens"]
                print(f"====Skip benchmark batch_size={batch} input_len={length} output_len={steps}: "
                      f"resident_tokens={need} > skip_token_capacity_threshold={fit} due to kv cache limit.====")
                continue
            line = {"batch_size": batch, "input_len": length, "output_len": steps, "total_output_tokens": batch * steps,
                    "last_ttft": length / 1e3, "steady_state_output_throughput": 100 * batch * fast}
            open(of("--result-filename"), "a").write(json.dumps(line) + "\\n")
"""


def write(folder: Path) -> Path:
    """The package; returns what belongs on PYTHONPATH."""
    bench = folder / "sglang" / "benchmark"
    bench.mkdir(parents=True)
    for package in (bench, bench.parent):
        (package / "__init__.py").touch()
    (bench.parent / "launch_server.py").write_text(textwrap.dedent(SERVER))
    for kind in ("serving", "one_batch_server"):
        (bench / f"{kind}.py").write_text(GENERATOR.replace("@KIND@", kind))
    return folder
