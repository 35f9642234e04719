"""The example with ``sgl.Engine(kv_quant=...)``, and prefill chunks mixed with decoding."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

pytestmark = pytest.mark.server

TIE = 0.3  # nats: codes that rounding turned moved a log-probability by 0.07 here; a wrong cache costs several

ENGINE = Path(__file__).parents[2] / "examples" / "engine.py"


def test_engine(smollm2, table_cache, tmp_path):
    run = subprocess.run(
        [sys.executable, str(ENGINE), smollm2, "--cache-dir", table_cache],
        capture_output=True, text=True, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    # K: 64 channels x 4 bits, V: 3.5 bits, two float16 scales.
    assert "PackedKVPool: K 4.0 bits, V 3.5 bits, 64 bytes per token and head" in run.stdout
    assert "The capital of France is Paris" in run.stdout


def test_mixed_chunks_answer_like_separate_ones(launch, token_ids):
    """A batch that holds both decoding requests and a prefill chunk gives each its own answer.

    Where two tokens are equally likely, rounding decides: the answers are not compared token by token, but
    each token must be the most likely one, up to TIE, when the server reads prompt and answer alone.

    So does a prefill of a fresh prompt beside what is new behind cached ones. Pages have 16 tokens, chunks 64, and
    lengths lie around both; a client that gives up leaves nothing behind: SGLang ends the server for a slot too few.
    """
    server = launch(
        "--dtype=float32",
        "--max-total-tokens=2000",
        "--chunked-prefill-size=64",
        "--enable-mixed-chunk",
        "--page-size=16",
        "--kv-quant-chunk-attention=quantized",
        record="recorder",
    )
    prompts = [token_ids[a : a + n] for a, n in ((0, 40), (600, 200), (1200, 150))]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda p: server.generate(p, max_new_tokens=8)["output_ids"], prompts))
    # One new token beside many: a request that decodes while another's chunk is read.
    assert any(1 in new and max(new) > 1 for r in server.records() if (new := r.get("new")))

    begin, starts = len(server.records()), (2000, 2500, 3000, 3500)
    body = {"input_ids": token_ids[4000:4100], "sampling_params": {"max_new_tokens": 60}, "stream": True}
    with requests.post(server.url + "/generate", json=body, stream=True, timeout=600) as given_up:
        next(given_up.iter_content(1))
    hits = [prompts[1] + token_ids[a : a + 10] for a in starts[:2]]
    fresh = [token_ids[a : a + n] for a, n in zip(starts, (63, 64, 65, 129), strict=True)]
    together = [*hits, *fresh]
    prompts += together
    answers += [answer["output_ids"] for answer in server.generate(together, max_new_tokens=8)]
    batches = [new for line in server.records()[begin:] if (new := line.get("new"))]
    assert any(sum(n > 1 for n in new) > 1 for new in batches), batches
    server.flush()
    behind = [server.behind_best(p, a) for p, a in zip(prompts, answers, strict=True)]
    server.stop()
    assert not [r for r in server.records() if "corrupt" in r]
    assert all(len(a) == 8 for a in answers)
    assert max(map(max, behind)) < TIE, (answers, behind)


@pytest.mark.skipif(not importlib.util.find_spec("sglang_router"), reason="sglang-router is not installed")
def test_router(launch):
    """Two servers with one table; the router sends what goes on to the server that has its beginning."""
    eight = ("--max-total-tokens=1000", "--mem-fraction-static=0.8", "--kv-quant-k-bits=8", "--kv-quant-v-bits=8")
    workers = [launch(*eight) for _ in range(2)]
    run = subprocess.run(
        [sys.executable, str(ENGINE.with_name("router.py")), "--workers", *(server.url for server in workers)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    first, *stories = run.stdout.splitlines()
    assert first == "2 servers, 1 table"
    found = [[int(x) for x in re.findall(r"\d+", line)] for line in stories]
    assert len(found) == 4
    for cold, cached, total in found:
        assert cold < 15 and total - cached <= 10, "what was read before is read from the cache"
    answered = [server.log.read_text().count("POST /generate HTTP/1.1") for server in workers]
    assert min(answered) >= 2, answered
    assert workers[1].info()["kv_quant"]["table_origin"] == "cache"
    for server in workers:
        server.stop()
