"""--kv-quant-exact-recent in the real server: what is exact is exact, for every request, and is a request's own.

Two bits, with which a packed token shows, and so many exact tokens that a short request reads nothing else: its
log-probabilities are those of transformers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch

pytestmark = pytest.mark.server

EXACT, NEW = 48, 12
FIRST = 3000  # token ids from here on begin the prompts, so that none has its beginning from another's
#: The server's type, on a GPU one that SGLang's kernels take; and how far a token's log-probability may be from that in
#: float32, nats: sums in another order, in 16 bits also rounding. What one of packed rows is off by at least.
DTYPE, SAME = ("float16", 3e-2) if torch.cuda.is_available() else ("float32", 2e-3)
PACKED = 0.05


@pytest.fixture(scope="module")
def server(launch):
    bits = "--kv-quant-k-bits=2", "--kv-quant-v-bits=2", f"--kv-quant-exact-recent={EXACT}"
    return launch(f"--dtype={DTYPE}", "--max-total-tokens=3000", "--max-running-requests=6", *bits)


@pytest.fixture(scope="module")
def gap(server, smollm2):
    """prompt -> the largest |difference| of an answer's log-probabilities from transformers', and the cached tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    def of(prompt: list[int]) -> tuple[float, int]:
        worst, meta = server.off(model, prompt, NEW)
        return worst, meta["cached_tokens"]

    return of


def test_requests_that_are_exact_as_a_whole(server, gap, token_ids):
    """Side by side, of all lengths, more than run at a time, so that copies of earlier requests lie in their places."""
    prompts = [[FIRST + i, *token_ids[i * 50 : i * 50 + 2 + 3 * i]] for i in range(11)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(gap, prompts))
    assert all(worst < SAME and cached == 0 for worst, cached in found), found
    assert server.info()["kv_quant"]["exact_recent"] == EXACT


def test_what_lies_before_is_packed(gap, token_ids):
    assert gap([FIRST + 20, *token_ids[1000:1200]])[0] > PACKED


def test_a_cached_beginning_is_packed(gap, token_ids):
    """Its exact copies were another request's."""
    prompt = [FIRST + 21, *token_ids[2001 : 2000 + EXACT - NEW]]
    cold, cached = gap(prompt)
    assert cold < SAME and cached == 0
    worst, cached = gap(prompt)
    assert worst > PACKED and cached == len(prompt) - 1


def test_beams_are_refused(server, token_ids):
    """Which take each other's tokens over."""
    body = {"input_ids": token_ids[:8], "sampling_params": {"max_new_tokens": 2, "beam_width": 2}}
    response = requests.post(server.url + "/generate", json=body, timeout=60)
    assert response.status_code == 400
    assert f"not supported with --kv-quant-exact-recent {EXACT}" in response.text
