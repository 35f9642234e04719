"""Short convolutions with states of SGLang's own beside attention over packed rows (LFM2), through the real server.

The convolutions are SGLang's Triton kernels, in Triton's interpreter. The model is small and its weights are random;
states are float32, so that what is left between two ways is the cache.
"""

from __future__ import annotations

import os
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch

from sglang_blockgtq.calibrate import RECENT
from sglang_blockgtq.calibrate.quality import Quality
from sglang_blockgtq.calibrate.table import AllocationTable

from .test_parallel import PARALLEL
from .test_radix import check_records

pytestmark = pytest.mark.server

PLUGIN = Path(__file__).parent / "interpreted"
PROMPT, MORE, NEW = 70, 14, 5
CHUNK, PREFIX, LENGTH = 64, 160, 200  # tokens of a prefill, of a prefix that branches, of a prompt
POOL, STATES = 600, 12  # tokens and states: two long prompts push out the tokens of the first, short ones its states
#: nats. Measured: 3e-6 for a cold prompt, which attention reads as it is, and 1e-2 over rows of eight bits.
EXACT, LIMIT = 1e-4, 3e-2
ARGS = (
    "--dtype=float32",
    f"--max-total-tokens={POOL}",
    "--max-running-requests=4",
    f"--max-mamba-cache-size={STATES}",
    "--kv-quant-k-bits=8",
    "--kv-quant-v-bits=8",
)
ENV = {"TRITON_INTERPRET": "1", "SGLANG_MAMBA_CONV_DTYPE": "float32"}


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> str:
    from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

    folder = str(tmp_path_factory.mktemp("model") / "hybrid")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        num_hidden_layers=4,
        block_auto_adjust_ff_dim=False,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    made = Lfm2ForCausalLM(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Truth:
    """What transformers says of a model, in float32."""

    def __init__(self, folder: str):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def _predicted(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)

    def logprobs(self, ids: list[int]) -> list[float]:
        """Of each token of a sequence but the first."""
        return self._predicted(ids).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    def behind_best(self, prompt: list[int], answer: list[int]) -> float:
        """How far the worst token of an answer is below the most likely one."""
        predicted = self._predicted(prompt + answer)[len(prompt) - 1 :]
        return float((predicted.amax(-1) - predicted.gather(-1, torch.tensor(answer)[:, None])[:, 0]).max())


@pytest.fixture(scope="module")
def truth(model) -> Truth:
    return Truth(model)


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def check(server, token_ids: list[int], truth: Truth, cold: float = EXACT) -> None:
    """Cold, step by step, and after a hit, whose states are copied."""
    prompt, whole = token_ids[:PROMPT], token_ids[: PROMPT + MORE]
    found, cached = server.logprobs(whole, 0)
    assert cached == 0 and apart(found, truth.logprobs(whole)) < cold
    server.flush()
    meta = server.generate(prompt, max_new_tokens=NEW, logprob_start=PROMPT - 1)["meta_info"]
    answer = [token for _, token, *_ in meta["output_token_logprobs"]]
    steps = [lp for lp, *_ in meta["output_token_logprobs"]]
    assert len(steps) == NEW and apart(steps, truth.logprobs(prompt + answer)[PROMPT - 1 :]) < LIMIT
    for _ in range(2):  # the state of the prompt stays as it was
        hit, cached = server.logprobs(whole, PROMPT)
        assert cached == PROMPT and apart(hit, truth.logprobs(whole)[PROMPT:]) < LIMIT


def wait_for_steps(server, begin: int) -> None:
    """Until a request decodes, by the server's records from ``begin`` on."""
    deadline = time.monotonic() + 60
    while not any(line.get("read") and line["new"] is None for line in server.records()[begin:]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def table_without_server(model: str, folder: Path) -> str:
    """Its cost is said to be known, so that no server measures it in the interpreter."""
    from sglang_blockgtq.calibrate.__main__ import main

    table = str(folder / "table.safetensors")
    bits = ["--k-bits=8", "--v-bits=8", "--device=cpu", "--dtype=float32"]
    assert main(["--model-path", model, "--out", table, *bits]) == 0
    AllocationTable.load(table).with_quality(Quality(0.0, 0.0, 0, 0.0, 1, RECENT)).save(table)
    return table


@pytest.fixture(scope="module")
def offline(model, tmp_path_factory) -> str:
    return table_without_server(model, tmp_path_factory.mktemp("table"))


def check_table(cache: Path, offline: str) -> None:
    """Each sequence begins with states of zero, as it does without a server."""
    (file,) = (cache / "tables").glob("*.safetensors")
    mine, other = AllocationTable.load(file).tensors, AllocationTable.load(offline).tensors
    for name in ("widths", "order", "balance", "v_gain", "theta", "mean"):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(launch, model, cache):
    """Calibrates itself. SGLang looks for lost slots and states at every batch and whenever nothing runs, and dies of
    them."""
    return launch(
        *ARGS,
        f"--kv-quant-cache-dir={cache}",
        "--kv-quant-chunk-attention=quantized",
        f"--chunked-prefill-size={CHUNK}",
        "--enable-mixed-chunk",
        "--enable-metrics",
        record="recorder",
        model=model,
        env={**ENV, "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"},
    )


def test_it_calibrates_itself(server, cache, offline):
    info = server.info()
    assert info["mamba_radix_cache_strategy"] == "no_buffer" and info["disable_overlap_schedule"]
    check_table(cache, offline)
    # Two layers of two heads with 32 channels; the table's rows are theirs.
    info = info["kv_quant"]
    assert (info["pool"], info["table_origin"], info["bf16_bytes_per_token"]) == ("PackedKVPool", "calibrated", 512)
    assert info["bytes_per_token"] == 2 * 2 * (2 * 32 + 2 + 2)
    assert info["quality"]["worst_layer"] in (1, 3) and info["quality"]["kl"] < 1e-4
    assert info["page"] > 0  # keys were found to turn as the model says


def test_every_way_to_a_prefix(server, token_ids, truth):
    """Cold, hit, branch, without its states, without its tokens: with chunks that end at the same tokens, the same
    tokens have the same rows in every layer, bit for bit."""
    server.flush()
    begin, prompt = len(server.records()), token_ids[:LENGTH]

    def read(ids: list[int], expected: int) -> None:
        logprobs, cached = server.logprobs(ids, PREFIX)
        assert cached == expected and apart(logprobs, truth.logprobs(ids)[PREFIX:]) < LIMIT

    whole_chunks = PREFIX // CHUNK * CHUNK
    read(prompt, 0)
    read(prompt, whole_chunks)
    read(token_ids[:PREFIX] + token_ids[1000 : 1000 + LENGTH - PREFIX], whole_chunks)
    read(prompt, whole_chunks)
    for i in range(STATES):
        server.generate(token_ids[1100 + 10 * i : 1110 + 10 * i])
    read(prompt, 0)  # its tokens are there, but no state to go on from
    for start in (1500, 2400):
        server.generate(token_ids[start : start + POOL // 2])
    read(prompt, 0)
    rows: dict[tuple, list] = {}
    for line in server.records()[begin:]:
        if "text" in line:
            rows.setdefault((line["layer"], line["text"]), []).append(line["row"])
    assert {layer for layer, _ in rows} == {1, 3}
    assert all(len(set(found)) == 1 for found in rows.values())
    assert sum(len(found) - 1 for found in rows.values()) > 2 * LENGTH * 2  # written again, in each of two layers

    # A prefix that ends elsewhere is found, too. Its matrices are of another size, and round otherwise.
    server.flush()
    server.generate(prompt[: PREFIX - 17])
    read(prompt, PREFIX - 17)


def test_prefill_beside_decode_steps(server, token_ids, truth):
    server.flush()
    begin, prompts = len(server.records()), [token_ids[1000 * i : 1000 * i + 20] for i in range(3)]
    late = token_ids[4000 : 4000 + LENGTH]
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(server.generate, prompt, 40) for prompt in prompts]
        wait_for_steps(server, begin)
        found = [server.generate(late, 8), *(request.result() for request in running)]
    for prompt, answer in zip([late, *prompts], found, strict=True):
        assert truth.behind_best(prompt, answer["output_ids"]) < LIMIT
    assert truth.behind_best(late, token_ids[:40]) > 1  # other tokens are far behind
    mixed = [line["new"] for line in server.records()[begin:] if max(line.get("new") or [0]) > 20]
    assert sum(1 in new for new in mixed) >= LENGTH // CHUNK


def test_aborted_requests(server, token_ids, truth):
    """By their names, by a closed connection, and all with SGLang's own kit, running and waiting: nothing is lost."""
    from sglang.test.kits.abort_timeout_kit import AbortAllMixin

    class Kit(AbortAllMixin, unittest.TestCase):
        base_url, process = server.url, server.process
        abort_all_num_requests, abort_all_max_new_tokens, abort_all_sleep = 6, POOL // 2, 1.0

    def post(ids: list[int], **more) -> requests.Response:
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": POOL // 2, "ignore_eos": True}, **more}
        return requests.post(server.url + "/generate", json=body, timeout=600, stream="stream" in more)

    server.flush()
    with ThreadPoolExecutor(2) as threads, post(token_ids[:30], stream=True) as streamed:
        next(streamed.iter_content(1))
        named = [threads.submit(post, token_ids[:length], rid=f"of {length}") for length in (50, LENGTH)]
        time.sleep(0.5)
        for length in (50, LENGTH):
            requests.post(server.url + "/abort_request", json={"rid": f"of {length}"}, timeout=60).raise_for_status()
        reasons = [request.result().json()["meta_info"]["finish_reason"]["type"] for request in named]
        assert reasons == ["abort", "abort"]
    Kit("test_abort_all").test_abort_all()
    deadline = time.monotonic() + 30
    while server.get("/v1/loads").json()["loads"][0]["num_running_reqs"] and time.monotonic() < deadline:
        time.sleep(0.1)
    server.flush()  # fails while anything runs
    check(server, token_ids, truth, cold=LIMIT)
    server.flush()
    for start in (0, 1000):  # twice all but the whole pool
        server.generate(token_ids[start : start + POOL - 20])
    assert server.process.poll() is None


def test_sglangs_turns_and_branches(server, model, token_ids):
    """SGLang's own kit: prefixes branch, conversations go on, and what was decoded over the cache is what a prefill
    without it reads."""
    from sglang.test.kl_multiturn_utils import test_input_output_logprobs_match_prefill_cache_hit_helper as kit

    prefixes = [token_ids[i : i + 50] for i in (0, 0, 500, 500)]
    branches = [prefix + token_ids[1000 + 20 * i : 1020 + 20 * i] for i, prefix in enumerate(prefixes)]
    turns = [token_ids[2000 + 20 * i : 2020 + 20 * i] for i in range(4)]
    given = {"prefix_input_ids": prefixes, "full_input_ids": branches, "turn_suffixes": [turns]}
    kit(server.url, model, 1e-4, **given, branches_per_group=2, max_new_tokens=8)


def test_rows_are_those_written(server):
    """Last of this server: the records of all that was done with it."""
    server.stop()
    check_records(server)


def test_kernels_and_a_table_made_offline(launch, model, offline, token_ids, truth):
    """The CUDA backend beside SGLang's backend of the convolutions, and no calibration in the server."""
    path = os.pathsep.join(filter(None, (str(PLUGIN), os.environ.get("PYTHONPATH"))))
    server = launch(*ARGS, f"--kv-quant-table={offline}", model=model, env={**ENV, "PYTHONPATH": path})
    assert server.info()["kv_quant"]["table_origin"] == "file"
    check(server, token_ids, truth)
    server.stop()


def test_two_ranks(launch, model, offline, token_ids, truth, tmp_path):
    """Each has half of every convolution and one head of keys, and both make one table."""
    flags = *ARGS, "--tp-size=2", f"--kv-quant-cache-dir={tmp_path}"
    server = launch(*flags, model=model, env={**ENV, **PARALLEL})
    assert server.info()["kv_quant"]["bf16_bytes_per_token"] == 256
    check_table(tmp_path, offline)
    check(server, token_ids, truth)
    server.stop()
