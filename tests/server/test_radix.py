"""Radix proof: however a prompt's rows came to be in the pool, they are the same rows.

Log-probabilities are compared in float32, so that what is left between two ways is the cache.
"""

from __future__ import annotations

import json
from statistics import fmean

import psutil
import pytest
import requests

pytestmark = pytest.mark.server

PREFIX, SUFFIX = 192, 32
POOL = 560  # tokens; two other prompts push the first one out

# Mean |difference of log-probability| per token on the small model at K3V3.
SAME = 2e-3  # the same rows, computed and read in the same way: float32 noise
# Two ways that see different rows of the same prompt: the codec's own error. In raw mode a hit has packed keys where
# the cold run had exact ones. In quantized mode rows agree in exact arithmetic, but matrix products round differently
# for different numbers of rows, and a code that flips at a threshold is one step off for all later layers.
QUANTIZATION = 0.35
WARM = 0.03  # quantized, cold against its own repetition: below 0.002 seen; room for another CPU's rounding


#: Rows that each step compares with their checksums: all that a request of these lengths has.
CHECKED = 600
SPOILED_LAYER, SPOILED_POSITION, SPOILED_BYTE = 17, 40, 5


def ends_with_a_spoiled_row(server, prompt) -> None:
    """One bit of one row, under a server that had nothing to say up to here."""
    server.flush()
    assert server.log.read_text().count("rows of each layer compared: all are as written") == 2
    server.generate(prompt)
    order = server.record.with_name(server.record.name + ".spoil")
    order.write_text(json.dumps([SPOILED_LAYER, SPOILED_POSITION, SPOILED_BYTE]))
    with pytest.raises(requests.RequestException):
        server.generate(prompt)
    psutil.Process(server.process.pid).wait(60)
    (done,) = order.parent.glob(order.name + ".*")
    where = f"the row at slot {done.suffix[1:]} of layer {SPOILED_LAYER} is not what was written for the token"
    says = f"{where} at position {SPOILED_POSITION}; answers from this cache cannot be trusted"
    assert says in server.log.read_text()


def mean_gap(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def check_records(server) -> None:
    """Equal codec inputs gave equal rows, every row read was the row written, and both really happened."""
    lines = server.records()
    assert not [line for line in lines if "corrupt" in line]
    assert sum(line.get("read", 0) for line in lines) > 500
    rows_of: dict[tuple, set] = {}
    writes = 0
    for line in lines:
        if "key" in line:
            rows_of.setdefault((line["layer"], line["key"]), set()).add(line["row"])
            writes += 1
    assert all(len(rows) == 1 for rows in rows_of.values())
    assert writes - len(rows_of) > 200, "too few inputs came twice for the comparison to mean anything"


@pytest.fixture(scope="module")
def cold_answers() -> dict[str, list[float]]:
    """Cold log-probabilities by setting, to compare servers with each other."""
    return {}


@pytest.mark.parametrize(
    ("mode", "page", "chunk"),
    [("quantized", 1, 64), ("quantized", 16, -1), ("raw", 1, -1), ("raw", 16, 96)],
    ids=lambda x: str(x),
)
def test_every_way_to_a_prefix(launch, token_ids, cold_answers, mode, page, chunk):
    server = launch(
        "--dtype=float32",
        f"--page-size={page}",
        f"--max-total-tokens={POOL}",
        f"--kv-quant-chunk-attention={mode}",
        f"--chunked-prefill-size={chunk}",
        f"--kv-quant-check-rows={CHECKED}",
        record="recorder",
    )
    prompt = token_ids[: PREFIX + SUFFIX]
    cold, hits = server.logprobs(prompt, PREFIX)
    assert hits == 0

    warm, hits = server.logprobs(prompt, PREFIX)
    assert PREFIX - page < hits <= PREFIX

    branch, hits = server.logprobs(token_ids[:PREFIX] + token_ids[1000 : 1000 + SUFFIX], PREFIX)
    assert PREFIX - page < hits <= PREFIX
    assert mean_gap(branch, cold) > 0.5, "another continuation must not get this one's log-probabilities"
    back, hits = server.logprobs(prompt, PREFIX)
    assert PREFIX - page < hits <= PREFIX

    for start in (1500, 2400):  # push everything out
        server.generate(token_ids[start : start + 400])
    refilled, hits = server.logprobs(prompt, PREFIX)
    assert hits == 0

    # A shorter first request makes the rest of the prompt an extension of a hit, cut elsewhere.
    server.flush()
    server.generate(prompt[:80])
    extended, hits = server.logprobs(prompt, PREFIX)
    assert 64 <= hits <= 80
    assert server.info()["kv_quant"]["check_rows"] == CHECKED
    server.stop() if page > 1 or mode != "raw" else ends_with_a_spoiled_row(server, prompt)

    assert mean_gap(cold, refilled) < SAME
    assert mean_gap(warm, back) < SAME
    assert mean_gap(cold, warm) < (WARM if mode == "quantized" else QUANTIZATION)
    assert mean_gap(cold, extended) < QUANTIZATION
    check_records(server)
    cold_answers.setdefault(mode, cold)
    assert mean_gap(cold, cold_answers[mode]) < QUANTIZATION
