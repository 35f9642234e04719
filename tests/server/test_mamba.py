"""Mamba beside attention over packed rows (Granite 4), with SGLang's extra buffer of states, which lets it schedule a
step while the one before runs and have pages of several tokens. SGLang has it on accelerators; here it is on the CPU.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch

from .test_hicache import PLUGIN as HICACHE
from .test_hicache import ask, push_out
from .test_hybrid import ENV, Truth, apart, table_without_server, wait_for_steps
from .test_radix import SAME, check_records, mean_gap

pytestmark = pytest.mark.server

PLUGIN = Path(__file__).parent / "mamba_on_cpu"
PAGE, GRID = 16, 64  # tokens; states are kept at multiples of the second
#: nats. Measured: 3e-6 for a cold prompt, which attention reads as it is, and 2e-2 over rows of eight bits.
EXACT, LIMIT = 1e-4, 6e-2


@pytest.fixture(scope="module")
def granite(smollm2, tmp_path_factory) -> str:
    from transformers import AutoTokenizer, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    folder = str(tmp_path_factory.mktemp("model") / "granite")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = GraniteMoeHybridConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, shared_intermediate_size=256,
        num_hidden_layers=2, layer_types=["mamba", "attention"], num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=0, num_experts_per_tok=0, position_embedding_type="rope", mamba_n_heads=8, mamba_d_head=32,
        mamba_d_state=16, mamba_chunk_size=GRID, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = GraniteMoeHybridForCausalLM(config)
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1 and "conv" not in name:
            parameter.data.normal_(0, 0.08)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def truth(granite) -> Truth:
    return Truth(granite)


@pytest.fixture(scope="module")
def server(launch, granite, tmp_path_factory):
    table = table_without_server(granite, tmp_path_factory.mktemp("table"))
    path = os.pathsep.join(filter(None, (str(PLUGIN), os.environ.get("PYTHONPATH"))))
    return launch(
        "--dtype=float32",
        f"--kv-quant-table={table}",
        "--max-total-tokens=1600",
        "--max-running-requests=3",
        "--max-mamba-cache-size=24",
        f"--page-size={PAGE}",
        f"--mamba-track-interval={GRID}",
        "--enable-mixed-chunk",
        "--chunked-prefill-size=640",
        record="recorder",
        model=granite,
        env={**ENV, "PYTHONPATH": path, "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"},
    )


def test_what_sglang_chooses(server):
    info = server.info()
    assert (info["mamba_radix_cache_strategy"], info["disable_overlap_schedule"]) == ("extra_buffer", False)
    assert (info["page_size"], info["kv_quant"]["pool"]) == (PAGE, "PackedKVPool")


def test_branches_and_answers(server, token_ids, truth):
    """The second prompt on a prefix leaves a state where it branched, and the third goes on from there; the decode
    steps of a conversation leave one, too."""
    server.flush()
    prefix = token_ids[:80]
    for start, expected, limit in ((1000, 0, EXACT), (1100, 0, EXACT), (1200, GRID, LIMIT), (1200, GRID, LIMIT)):
        ids = prefix + token_ids[start : start + 60]
        logprobs, cached = server.logprobs(ids, len(prefix))
        assert cached == expected and apart(logprobs, truth.logprobs(ids)[len(prefix) :]) < limit
    asked = token_ids[3000:3100], token_ids[3200:3250]
    begin = len(server.records())
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(server.generate, asked[0], 40)
        wait_for_steps(server, begin)
        second = server.generate(asked[1], 10)
        answers = [found["output_ids"] for found in (first.result(), second)]
    assert [50, 1] in [line["new"] for line in server.records()[begin:] if "new" in line]
    for ids, answer in zip(asked, answers, strict=True):
        assert truth.behind_best(ids, answer) < LIMIT
    more = asked[0] + answers[0] + token_ids[4000:4020]
    logprobs, cached = server.logprobs(more, 2 * GRID)
    assert cached == 2 * GRID > len(asked[0]) and apart(logprobs, truth.logprobs(more)[2 * GRID :]) < LIMIT


def test_sglangs_branching_kit(server):
    from sglang.test.kits.prefix_cache_branching_kit import PrefixCacheBranchingMixin

    class Kit(PrefixCacheBranchingMixin):
        base_url, cache_chunk_size, flush_cache = server.url, GRID, server.flush

    Kit.test_prefix_cache_branching()


def test_aborted_requests(server, token_ids, truth):
    """SGLang looks for lost slots and states, and dies of them."""
    server.flush()
    begin = len(server.records())
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(server.generate, token_ids[i : i + 40], 600) for i in (0, 500)]
        wait_for_steps(server, begin)
        requests.post(server.url + "/abort_request", json={"abort_all": True}, timeout=60).raise_for_status()
        assert all(request.result()["meta_info"]["finish_reason"]["type"] == "abort" for request in asked)
    server.flush()
    ids = token_ids[:60]
    assert apart(server.logprobs(ids, 0)[0], truth.logprobs(ids)) < EXACT
    server.stop()
    check_records(server)


@pytest.mark.long
def test_states_come_back_from_host_memory_with_their_rows(launch, granite, truth, token_ids, tmp_path):
    path = os.pathsep.join(filter(None, (str(PLUGIN), str(HICACHE), os.environ.get("PYTHONPATH"))))
    server = launch(
        "--dtype=float32",
        f"--kv-quant-table={table_without_server(granite, tmp_path)}",
        "--max-total-tokens=576",
        "--max-running-requests=3",
        "--max-mamba-cache-size=24",
        f"--page-size={PAGE}",
        f"--mamba-track-interval={GRID}",
        "--enable-hierarchical-cache",
        "--enable-cache-report",
        "--hicache-ratio=4",
        model=granite,
        env={**ENV, "PYTHONPATH": path},
    )
    prefix = 3 * GRID
    prompt = token_ids[: prefix + 32]
    ask(server, prompt)
    from_cache, came = ask(server, prompt)
    assert came == {"device": prefix}
    push_out(server, token_ids)
    from_host, came = ask(server, prompt)
    assert came == {"host": prefix}
    server.stop()
    assert mean_gap(from_host, from_cache) < SAME
    assert apart(from_host, truth.logprobs(prompt)[-len(from_host) :]) < LIMIT
