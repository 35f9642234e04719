"""How many requests have exact copies of their last tokens."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_blockgtq import recent
from sglang_blockgtq.recent import MOST_MEMORY, MOST_REQUESTS, default_window, new_copies

LAYERS = [SimpleNamespace(heads=2, head_dim=32, v_head_dim=16)] * 3
TOKEN = 3 * 2 * (32 + 16) * 2  # bytes, in 16 bits


def runner_of(queries: int) -> SimpleNamespace:
    """Whose steps verify chains of so many tokens."""
    algorithm = SpeculativeAlgorithm.EAGLE if queries > 1 else SpeculativeAlgorithm.NONE
    names = {"dtype": torch.bfloat16, "device": "cpu", "spec_algorithm": algorithm}
    return SimpleNamespace(**names, decode_num_tokens_per_req=lambda: queries)


@pytest.fixture
def copies(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(recent, "is_rank_zero", lambda: True)

    def make(requests: int, memory: float, window: int = 8, queries: int = 1):
        monkeypatch.setattr(recent, "memory_of", lambda device: memory)
        runner = runner_of(queries)
        return new_copies(SimpleNamespace(exact_recent=window), runner, LAYERS, requests)

    return make


@pytest.mark.parametrize(
    "requests, memory, rows",
    [(5, 1e9, 5), (4096, 1e9, MOST_REQUESTS), (4096, 40.5 * 9 * TOKEN / MOST_MEMORY, 40), (4096, 1, 1)],
    ids=["all", "most", "what fits", "one"],
)
def test_requests_with_copies(copies, caplog, requests, memory, rows):
    """All, up to a number, up to a share of the memory; the server says so where it is not all."""
    made = copies(requests, memory)
    assert (made.rows, made.room, made.window, made.step.shape[1]) == (rows, rows, 8, requests)
    assert made.k.nbytes + made.v.nbytes <= max(MOST_MEMORY * memory, 2 * 8 * TOKEN) + 8 * TOKEN
    said = f"the last 8 tokens of {rows} requests at a time are read exactly, of others the last one"
    assert (said in caplog.text) == (rows < requests)


@pytest.mark.parametrize(
    "requests, fit, window",
    [(4096, 256 * 33, 32), (4096, 256 * 33 - 1, 16), (64, 64 * 17, 16), (64, 64 * 17 - 1, 8), (4096, 1, 8)],
)
def test_tokens_where_nothing_is_said(monkeypatch, requests, fit, window):
    """The widest window that leaves copies for every request, up to a number of them; 8 tokens at least."""
    monkeypatch.setattr(recent, "memory_of", lambda device: (fit * TOKEN + 1) / MOST_MEMORY)
    assert default_window(runner_of(1), TOKEN // 2, requests) == window


def test_chains_of_drafts_have_places_of_their_own(copies):
    """Beside what their first query reads, in the same share of the memory."""
    made = copies(4096, 20.5 * (8 + 5) * TOKEN / MOST_MEMORY, queries=5)
    assert (made.rows, made.window, made.ring, made.queries) == (20, 8, 12, 5)


def test_none_without_exact_tokens(copies):
    assert copies(5, 1e9, window=0) is None
    assert recent.memory_of("cpu") > 1 << 28
