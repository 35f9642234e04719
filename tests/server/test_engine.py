"""``sgl.Engine(kv_quant=...)`` in a program of its own, and prefill chunks mixed with decoding."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.server

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
    """A batch that holds both decoding requests and a prefill chunk gives each its own answer."""
    server = launch(
        "--dtype=float32",
        "--max-total-tokens=2000",
        "--chunked-prefill-size=64",
        "--enable-mixed-chunk",
        "--kv-quant-chunk-attention=quantized",
    )
    prompts = [token_ids[a : a + n] for a, n in ((0, 40), (600, 200), (1200, 150))]
    alone = [server.generate(p, max_new_tokens=8)["output_ids"] for p in prompts]
    server.flush()
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda p: server.generate(p, max_new_tokens=8)["output_ids"], prompts))
    server.stop()
    assert together == alone
