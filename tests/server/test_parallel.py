"""Tensor, pipeline and data parallelism: one table for the whole model, whoever computes it, and the same answers.

A new table on two ranks, once they have new weights. And a server that loses a rank.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import psutil
import pytest
import requests
import torch

from sglang_blockgtq.calibrate.table import AllocationTable

pytestmark = pytest.mark.server


def save(path: Path, tokenizer, seed: int) -> str:
    """Two random layers with 4 query and 2 KV heads, and the real model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

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
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def tiny(smollm2, tmp_path_factory) -> list[str]:
    """Two models of one shape."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [save(tmp_path_factory.mktemp("tiny"), tokenizer, seed) for seed in (0, 1)]


PARALLEL = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "/nonexistent.so"}


@pytest.fixture(scope="module")
def serve(launch, tiny, token_ids, tmp_path_factory):
    """Serve the first tiny model with the given options: log-probabilities after a hit, the table, server info.

    replicas: servers that share nothing but the table. then: what else is asked of the server. end: how it ends.
    """

    def run(
        *extra: str, env: dict[str, str], replicas: int = 1, then=None, end=lambda server: server.stop()
    ) -> tuple[list[float], AllocationTable, dict]:
        cache = tmp_path_factory.mktemp("cache")
        flags = ["--dtype=float32", "--max-total-tokens=1000", f"--kv-quant-cache-dir={cache}"]
        server = launch(*flags, *extra, model=tiny[0], env=env)
        answers = []
        for replica in range(replicas):
            to = {"routed_dp_rank": replica} if replicas > 1 else {}
            server.generate(token_ids[:128], **to)
            logprobs, hits = server.logprobs(token_ids[:160], 128, **to)
            assert hits == 128
            answers.append(logprobs)
        assert all(answer == answers[0] for answer in answers)
        info = server.info()
        states = [state["kv_quant"] for state in info["internal_states"]]
        assert len(states) == replicas and not any(state["weights_replaced"] for state in states)
        assert {state["table_hash"] for state in states} == {info["kv_quant"]["table_hash"]}
        (file,) = Path(cache, "tables").iterdir()
        if then is not None:
            then(server, answers[0])
        end(server)
        return answers[0], AllocationTable.load(file), info["kv_quant"]

    return run


@pytest.fixture(scope="module")
def alone(serve):
    """Two replicas of one rank, which find no table when they start and make it at once."""
    return serve("--dp-size=2", env=PARALLEL, replicas=2)


@pytest.fixture
def recalibrates(tiny, token_ids):
    """New weights, and back: a flush makes the table of those that are there."""

    def ask(server, first: list[float]) -> None:
        hashes = [server.info()["kv_quant"]["table_hash"]]
        for path in reversed(tiny):
            body = {"model_path": path}
            done = requests.post(server.url + "/update_weights_from_disk", json=body, timeout=600).json()
            assert done["success"], done
            stale = server.info()["internal_states"][0]["kv_quant"]
            assert stale["weights_replaced"] and stale["table_hash"] == hashes[-1]
            server.flush()
            fresh = server.info()["internal_states"][0]["kv_quant"]
            assert (fresh["weights_replaced"], fresh["table_origin"]) == (False, "recalibrated")
            hashes.append(fresh["table_hash"])
            server.generate(token_ids[:128])
            logprobs, hits = server.logprobs(token_ids[:160], 128)
            assert hits == 128
        assert len(set(hashes)) == 3  # a table that is kept knows its weights, too
        assert logprobs == first

    return ask


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
def test_parallel_ranks_serve_one_table(serve, alone, recalibrates, parallel, rank_bytes):
    more = {}
    if "tp" in parallel:
        more = {"then": recalibrates, "end": end_by_a_killed_rank}
    flags = ["--kv-quant-recalibrate=flush"] * bool(more)
    logprobs, table, info = serve(parallel, *flags, env=PARALLEL, **more)
    one_logprobs, one, one_info = alone
    assert torch.equal(table.tensors["widths"], one.tensors["widths"])
    assert (table.header.layers, table.header.kv_heads) == (one.header.layers, one.header.kv_heads) == (2, 2)
    assert table.header.rope == ((64, True), (64, True))
    assert fmean(abs(a - b) for a, b in zip(logprobs, one_logprobs, strict=True)) < 2e-3
    assert one_info["bytes_per_token"] == 2 * 2 * 52
    assert info["bytes_per_token"] == rank_bytes
