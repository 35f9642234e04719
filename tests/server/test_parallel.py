"""Tensor and pipeline parallelism: one table for the whole model, whoever computes it, and the same answers. Two
servers that start at once, and one that loses a rank.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import psutil
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
    """Serve the tiny model with the given options, by several servers that start at once with an empty cache of tables:
    of each log-probabilities after a hit, the table, server info."""

    def run(
        *extra: str, env: dict[str, str], servers: int = 1, end=lambda server: server.stop()
    ) -> list[tuple[list[float], AllocationTable, dict]]:
        cache, out = tmp_path_factory.mktemp("cache"), []
        flags = ["--dtype=float32", "--max-total-tokens=1000", f"--kv-quant-cache-dir={cache}"]
        started = [launch(*flags, *extra, model=tiny, env=env, wait=False) for _ in range(servers)]
        for server in started:
            server.wait()
            server.generate(token_ids[:128])
            logprobs, hits = server.logprobs(token_ids[:160], 128)
            assert hits == 128
            out.append((logprobs, server.info()["kv_quant"]))
            end(server)
        (file,) = Path(cache, "tables").iterdir()
        table = AllocationTable.load(file)
        return [(logprobs, table, info) for logprobs, info in out]

    return run


@pytest.fixture(scope="module")
def at_once(serve):
    return serve(env={}, servers=2)


@pytest.fixture(scope="module")
def alone(at_once):
    return at_once[0]


def test_servers_that_start_at_once_keep_one_table(at_once):
    (one, table, info), (other, _, other_info) = at_once
    assert one == other
    assert info["table_hash"] == other_info["table_hash"] == table.header.table_hash
    assert "calibrated" in (info["table_origin"], other_info["table_origin"])


def end_by_a_killed_rank(server) -> None:
    """The server ends, with all its processes, and says what died."""
    main = psutil.Process(server.process.pid)
    family = main.children(recursive=True)
    (rank,) = [process for process in family if "TP1" in " ".join(process.cmdline())]
    rank.kill()
    server.process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and server.process.returncode != 0
    assert "scheduler" in server.tail()


# A rank's row: one head of 52 bytes padded to 56 in two layers, or two heads in one layer.
@pytest.mark.parametrize(("parallel", "rank_bytes"), [("--tp-size=2", 2 * 56), ("--pp-size=2", 2 * 52)])
def test_parallel_ranks_serve_one_table(serve, alone, parallel, rank_bytes):
    end = {"end": end_by_a_killed_rank} if "tp" in parallel else {}
    ((logprobs, table, info),) = serve(parallel, env=PARALLEL, **end)
    one_logprobs, one, one_info = alone
    assert torch.equal(table.tensors["widths"], one.tensors["widths"])
    assert (table.header.layers, table.header.kv_heads) == (one.header.layers, one.header.kv_heads) == (2, 2)
    assert table.header.rope == ((64, True), (64, True))
    assert fmean(abs(a - b) for a, b in zip(logprobs, one_logprobs, strict=True)) < 2e-3
    assert one_info["bytes_per_token"] == 2 * 2 * 52
    assert info["bytes_per_token"] == rank_bytes
