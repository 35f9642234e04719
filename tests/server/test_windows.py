"""Layers with a sliding window in a real server: what transformers answers, and every packed row the same however it
came to be there. Gemma 2 has them among the packed ones, with capped logits; Mellum has them in a pool of their own."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from .test_radix import check_records

pytestmark = pytest.mark.server

PREFIX, LENGTH, NEW = 160, 200, 60  # windows of 48 tokens
POOL = 500  # tokens; two other prompts push the first one out
#: Mean |difference of log-probability|, nats, at 8 bits in float32. Without windows or caps it is above 0.2.
LIMIT = 0.03


def exact(folder: str, ids: list[int], **changes) -> list[float]:
    """Log-probabilities of the tokens after PREFIX, by transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **changes)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs[PREFIX - 1 : -1].gather(1, torch.tensor(ids[PREFIX:])[:, None])[:, 0].tolist()


def gap(a: list[float], b: list[float]) -> float:
    return fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def start(launch, folder: str, *args: str):
    return launch(
        "--dtype=float32",
        f"--max-total-tokens={POOL}",
        "--kv-quant-k-bits=8",
        "--kv-quant-v-bits=8",
        "--kv-quant-chunk-attention=quantized",
        "--chunked-prefill-size=64",
        *args,
        record="recorder",
        model=folder,
    )


def check_every_way(server, folder: str, token_ids: list[int], **without: dict) -> None:
    """without: changes of the config, each of which must give other answers."""
    prompt = token_ids[:LENGTH]
    want = exact(folder, prompt)
    for name, value in without.items():
        assert gap(want, exact(folder, prompt, **{name: value})) > 0.2

    cold, hits = server.logprobs(prompt, PREFIX - 1)
    assert hits == 0 and gap(cold[-len(want) :], want) < LIMIT
    warm, hits = server.logprobs(prompt, PREFIX - 1)
    assert hits > PREFIX - 64 and gap(warm[-len(want) :], want) < LIMIT
    branch = token_ids[:PREFIX] + token_ids[1000 : 1000 + LENGTH - PREFIX]
    found, hits = server.logprobs(branch, PREFIX)
    assert hits == PREFIX and gap(found[-len(want) + 1 :], exact(folder, branch)[1:]) < LIMIT

    for start in (1500, 2400):  # push everything out
        server.generate(token_ids[start : start + 300])
    refilled, hits = server.logprobs(prompt, PREFIX - 1)
    assert hits == 0 and gap(refilled[-len(want) :], want) < LIMIT

    answer = server.generate(prompt[:PREFIX], NEW)["output_ids"]
    server.flush()
    assert max(server.behind_best(prompt[:PREFIX], answer)) < 0.3 and len(answer) == NEW


def test_windows_and_caps(launch, gemma2, token_ids):
    server = start(launch, gemma2)
    check_every_way(server, gemma2, token_ids, sliding_window=1024, attn_logit_softcapping=None)
    server.stop()
    check_records(server)


def test_windows_in_a_pool_of_their_own(launch, mellum, token_ids):
    """Of slots for fewer tokens than a prompt has: what no query sees is given to others while its rows stay."""
    server = start(launch, mellum, "--swa-full-tokens-ratio=0.5")
    info = server.info()["kv_quant"]
    # Two of four layers, two heads: keys and values of 32 codes of 8 bits and a scale each.
    assert info["bytes_per_token"] == 2 * 2 * 2 * (32 + 2) and info["bf16_bytes_per_token"] == 2 * 2 * 2 * 32 * 2
    assert info["window_bytes_per_token"] == 2 * 2 * 2 * 32 * 4
    check_every_way(server, mellum, token_ids, sliding_window=1024)
    # SGLang counts the slots of both pools when nothing runs, and ends where some are lost.
    assert server.process.poll() is None
    server.stop()
    log = server.log.read_text(errors="replace")
    assert f"swa size: {POOL // 2}, full size: {POOL}" in log and "memory leak" not in log
    check_records(server)
