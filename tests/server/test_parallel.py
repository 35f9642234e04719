"""Tensor and pipeline parallelism: one table for the whole model, whoever computes it, and the same answers."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch

from sglang_blockgtq.calibrate.table import AllocationTable

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def tiny(smollm2, tmp_path_factory) -> str:
    """Two random layers with 4 query and 2 KV heads, and the real model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.2,  # makes attention sharp enough to see an error in it
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


PARALLEL = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "/nonexistent.so"}


@pytest.fixture(scope="module")
def serve(launch, tiny, token_ids, tmp_path_factory):
    """Serve the tiny model with the given options: log-probabilities after a hit, the table, server info."""

    def run(*extra: str, env: dict[str, str]) -> tuple[list[float], AllocationTable, dict]:
        cache = tmp_path_factory.mktemp("cache")
        flags = ["--dtype=float32", "--max-total-tokens=1000", f"--kv-quant-cache-dir={cache}"]
        server = launch(*flags, *extra, model=tiny, env=env)
        server.generate(token_ids[:128])
        logprobs, hits = server.logprobs(token_ids[:160], 128)
        assert hits == 128
        info = server.info()["kv_quant"]
        server.stop()
        (file,) = Path(cache, "tables").iterdir()
        return logprobs, AllocationTable.load(file), info

    return run


@pytest.fixture(scope="module")
def alone(serve):
    return serve(env={})


# A rank's row: one head of 52 bytes padded to 56 in two layers, or two heads in one layer.
@pytest.mark.parametrize(("parallel", "rank_bytes"), [("--tp-size=2", 2 * 56), ("--pp-size=2", 2 * 52)])
def test_parallel_ranks_serve_one_table(serve, alone, parallel, rank_bytes):
    logprobs, table, info = serve(parallel, env=PARALLEL)
    one_logprobs, one, one_info = alone
    assert torch.equal(table.tensors["widths"], one.tensors["widths"])
    assert (table.header.layers, table.header.kv_heads) == (one.header.layers, one.header.kv_heads) == (2, 2)
    assert table.header.rope == ((64, True), (64, True))
    assert fmean(abs(a - b) for a, b in zip(logprobs, one_logprobs, strict=True)) < 2e-3
    assert one_info["bytes_per_token"] == 2 * 2 * 52
    assert info["bytes_per_token"] == rank_bytes
