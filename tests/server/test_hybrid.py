"""A hybrid model through the real server: short convolutions with states of SGLang's own, attention over packed rows.

The convolutions are SGLang's Triton kernels, in Triton's interpreter. The model is small and its weights are random.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sglang_blockgtq.calibrate.table import AllocationTable

pytestmark = pytest.mark.server

PLUGIN = Path(__file__).parent / "interpreted"
PROMPT, MORE, NEW = 70, 14, 5
#: nats. Measured: 3e-6 for a cold prompt, which attention reads as it is, and 1e-2 over rows of eight bits.
EXACT, LIMIT = 1e-4, 3e-2
ARGS = (
    "--dtype=float32",
    "--max-total-tokens=600",
    "--max-running-requests=4",
    "--max-mamba-cache-size=16",
    "--kv-quant-k-bits=8",
    "--kv-quant-v-bits=8",
)


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


@pytest.fixture(scope="module")
def true_logprobs(model):
    """Of each token of a sequence but the first, by transformers."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def read(ids: list[int]) -> list[float]:
        with torch.no_grad():
            logprobs = loaded(torch.tensor([ids])).logits[0].log_softmax(-1)
        return logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    return read


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def check(server, token_ids: list[int], true_logprobs) -> None:
    """Cold, step by step, and after a hit, whose states are copied."""
    prompt, whole = token_ids[:PROMPT], token_ids[: PROMPT + MORE]
    cold, cached = server.logprobs(whole, 0)
    assert cached == 0 and apart(cold, true_logprobs(whole)) < EXACT
    server.flush()
    meta = server.generate(prompt, max_new_tokens=NEW, logprob_start=PROMPT - 1)["meta_info"]
    answer = [token for _, token, *_ in meta["output_token_logprobs"]]
    steps = [lp for lp, *_ in meta["output_token_logprobs"]]
    assert len(steps) == NEW and apart(steps, true_logprobs(prompt + answer)[PROMPT - 1 :]) < LIMIT
    for _ in range(2):  # the state of the prompt stays as it was
        hit, cached = server.logprobs(whole, PROMPT)
        assert cached == PROMPT and apart(hit, true_logprobs(whole)[PROMPT:]) < LIMIT


@pytest.fixture(scope="module")
def offline(model, tmp_path_factory) -> str:
    """A table made without a server."""
    from sglang_blockgtq.calibrate.__main__ import main

    table = str(tmp_path_factory.mktemp("table") / "table.safetensors")
    bits = ["--k-bits=8", "--v-bits=8", "--device=cpu", "--dtype=float32"]
    assert main(["--model-path", model, "--out", table, *bits]) == 0
    return table


def test_a_hybrid_model_calibrates_itself(launch, model, offline, token_ids, true_logprobs, tmp_path):
    server = launch(*ARGS, f"--kv-quant-cache-dir={tmp_path}", model=model, env={"TRITON_INTERPRET": "1"})
    info = server.info()["kv_quant"]
    check(server, token_ids, true_logprobs)
    server.stop()
    # Each sequence begins with states of zero, as it does without a server.
    (file,) = (tmp_path / "tables").glob("*.safetensors")
    mine, other = AllocationTable.load(file).tensors, AllocationTable.load(offline).tensors
    for name in ("widths", "order", "balance", "v_gain", "theta", "mean"):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-6)
    # Two layers of two heads with 32 channels; the table's rows are theirs.
    assert (info["pool"], info["table_origin"], info["bf16_bytes_per_token"]) == ("PackedKVPool", "calibrated", 512)
    assert info["bytes_per_token"] == 2 * 2 * (2 * 32 + 2 + 2)
    assert info["quality"]["worst_layer"] in (1, 3) and info["quality"]["kl"] < 1e-4
    assert info["page"] > 0  # keys were found to turn as the model says


def test_kernels_and_a_table_made_offline(launch, model, offline, token_ids, true_logprobs):
    """The CUDA backend beside SGLang's backend of the convolutions, and no calibration in the server."""
    path = os.pathsep.join(filter(None, (str(PLUGIN), os.environ.get("PYTHONPATH"))))
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    server = launch(*ARGS, f"--kv-quant-table={offline}", model=model, env=env)
    assert server.info()["kv_quant"]["table_origin"] == "file"
    check(server, token_ids, true_logprobs)
    server.stop()
