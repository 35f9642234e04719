"""Layers with a sliding window and capped logits (Gemma 2) in a real server: what transformers answers, and every row
the same however it came to be there."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from .test_radix import check_records

pytestmark = pytest.mark.server

PREFIX, LENGTH, NEW = 160, 200, 12  # several windows long
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


def test_windows_and_caps(launch, gemma2, token_ids):
    server = launch(
        "--dtype=float32",
        f"--max-total-tokens={POOL}",
        "--kv-quant-k-bits=8",
        "--kv-quant-v-bits=8",
        "--kv-quant-chunk-attention=quantized",
        "--chunked-prefill-size=64",
        record="recorder",
        model=gemma2,
    )
    prompt = token_ids[:LENGTH]
    want = exact(gemma2, prompt)
    assert gap(want, exact(gemma2, prompt, sliding_window=1024)) > 0.2
    assert gap(want, exact(gemma2, prompt, attn_logit_softcapping=None)) > 0.2

    cold, hits = server.logprobs(prompt, PREFIX - 1)
    assert hits == 0 and gap(cold[-len(want) :], want) < LIMIT
    warm, hits = server.logprobs(prompt, PREFIX - 1)
    assert hits > PREFIX - 64 and gap(warm[-len(want) :], want) < LIMIT
    branch = token_ids[:PREFIX] + token_ids[1000 : 1000 + LENGTH - PREFIX]
    found, hits = server.logprobs(branch, PREFIX)
    assert hits == PREFIX and gap(found[-len(want) + 1 :], exact(gemma2, branch)[1:]) < LIMIT

    for start in (1500, 2400):  # push everything out
        server.generate(token_ids[start : start + 300])
    refilled, hits = server.logprobs(prompt, PREFIX - 1)
    assert hits == 0 and gap(refilled[-len(want) :], want) < LIMIT

    answer = server.generate(prompt[:PREFIX], NEW)["output_ids"]
    server.flush()
    assert max(server.behind_best(prompt[:PREFIX], answer)) < 0.3 and len(answer) == NEW
    server.stop()
    check_records(server)
