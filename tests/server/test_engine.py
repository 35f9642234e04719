"""``sgl.Engine(kv_quant=...)`` in a program of its own, and prefill chunks mixed with decoding."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.server

TIE = 0.3  # nats: codes that rounding turned moved a log-probability by 0.07 here; a wrong cache costs several

PROGRAM = """
import sys
import sglang as sgl

if __name__ == "__main__":
    model, cache = sys.argv[1:]
    engine = sgl.Engine(
        model_path=model,
        kv_quant="blockgtq",
        kv_quant_k_bits=4,
        kv_quant_v_bits="3.5",
        kv_quant_cache_dir=cache,
        max_total_tokens=1000,
        mem_fraction_static=0.3,
        dtype="float32",
    )
    info = engine.get_server_info()["kv_quant"]
    print(info["pool"], info["k_bits"], info["v_bits"], info["bytes_per_token_head"])
    out = engine.generate("The capital of France is", {"max_new_tokens": 3, "temperature": 0})
    print(out["text"])
    engine.shutdown()
"""


def test_engine(smollm2, table_cache, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, str(program), smollm2, table_cache], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr[-3000:]
    # K: 64 channels x 4 bits, V: 3.5 bits, two float16 scales.
    assert "PackedKVPool 4.0 3.5 64.0" in run.stdout
    assert " Paris" in run.stdout.split("PackedKVPool")[1]


def test_mixed_chunks_answer_like_separate_ones(launch, token_ids):
    """A batch that holds both decoding requests and a prefill chunk gives each its own answer.

    Where two tokens are equally likely, rounding decides: the answers are not compared token by token, but
    each token must be the most likely one, up to TIE, when the server reads prompt and answer alone.
    """
    server = launch(
        "--dtype=float32",
        "--max-total-tokens=2000",
        "--chunked-prefill-size=64",
        "--enable-mixed-chunk",
        "--kv-quant-chunk-attention=quantized",
        record="recorder",
    )
    prompts = [token_ids[a : a + n] for a, n in ((0, 40), (600, 200), (1200, 150))]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda p: server.generate(p, max_new_tokens=8)["output_ids"], prompts))
    # One new token beside many: a request that decodes while another's chunk is read.
    assert any(1 in new and max(new) > 1 for r in server.records() if (new := r.get("new")))
    server.flush()
    behind = [server.behind_best(p, a) for p, a in zip(prompts, answers, strict=True)]
    server.stop()
    assert not [r for r in server.records() if "corrupt" in r]
    assert all(len(a) == 8 for a in answers)
    assert max(map(max, behind)) < TIE, (answers, behind)
