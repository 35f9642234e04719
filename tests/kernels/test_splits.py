"""How decode is cut, against its twin, and the merge of what the splits leave."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_blockgtq.kernels import attention
from sglang_blockgtq.kernels.attention import DecodeScratch
from sglang_blockgtq.kernels.merge_splits import CHUNK
from sglang_blockgtq.kernels.splits import (
    SPLIT_UNIT,
    by_multiprocessor,
    find_split,
    num_splits,
    request_block,
    split_lengths,
    splits_of,
)

from .matrix import DEVICE, SMALL, data, relative_error


@triton.jit
def _where_kernel(kv_indptr, num_requests, target, found, of, SPLITS: tl.constexpr, REQUESTS: tl.constexpr):
    for split in range(SPLITS):
        request, begin, end = find_split(kv_indptr, num_requests, target, split, REQUESTS)
        tl.store(found + 3 * split, request)
        tl.store(found + 3 * split + 1, begin)
        tl.store(found + 3 * split + 2, end)
    for request in range(num_requests):
        first, count = splits_of(kv_indptr, num_requests, target, request, REQUESTS)
        tl.store(of + 2 * request, first)
        tl.store(of + 2 * request + 1, count)


LENGTHS = st.lists(st.one_of(st.integers(0, 70), st.integers(0, 200_000)), min_size=1, max_size=9)


@given(LENGTHS, st.integers(1, 40), st.sampled_from([torch.int32, torch.int64]))
@example([0, 0], 3, torch.int32)
@example([131072] * 9, 132 * 12, torch.int32)
@settings(max_examples=12, deadline=None)
def test_kernels_cut_as_their_twin(lengths, target, dtype):
    """Every token of every request lies in one split, and the grid has room for all splits."""
    batch, grid = len(lengths), min(num_splits(len(lengths), target), 14)
    kv_indptr = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, dtype)
    found = torch.full((grid, 3), -1, dtype=torch.int32, device=DEVICE)
    of = torch.full((batch, 2), -1, dtype=torch.int32, device=DEVICE)
    _where_kernel[(1,)](kv_indptr, batch, target, found, of, SPLITS=grid, REQUESTS=request_block(batch))

    size, counts = split_lengths(torch.tensor(lengths), target)
    assert size % SPLIT_UNIT == 0 and size > 0
    assert int(counts.sum()) <= num_splits(batch, target)
    assert of[:, 1].tolist() == counts.tolist()
    assert of[:, 0].tolist() == (counts.cumsum(0) - counts).tolist()
    want = [(b, i * size, (i + 1) * size) for b, n in enumerate(counts.tolist()) for i in range(n)]
    for b, n in enumerate(lengths):
        assert (counts[b] - 1) * size < n <= counts[b] * size or n == counts[b] == 0
    assert [tuple(x) for x in found.tolist()[: len(want)]] == want[:grid]
    assert all(request >= batch for request, _, _ in found.tolist()[len(want) :]), "the rest has nothing to do"


def test_splits_fill_what_is_wanted():
    """One long request is cut into nearly all that may run at once, whatever short ones are beside it."""
    for target in (12, 132, 1584):
        for lengths in ([131072], [131072, 1, 17, 0], [4096] * 8):
            size, counts = split_lengths(torch.tensor(lengths), target)
            wanted = min(target, sum(lengths) // SPLIT_UNIT)
            assert 0.3 * wanted <= int(counts.sum()) <= max(target, len(lengths))


@pytest.mark.parametrize("target", [132, 264, 528])
@pytest.mark.parametrize("lengths", [[32768] * 8, [32768] * 19, [8192] * 32, [131072, 500, 500], [100, 9000, 30000, 7]])
def test_no_split_is_much_longer_than_the_share_of_each(lengths, target):
    """What all programs wait for is the longest split: requests of a length get an even share, and no others get more
    than what leaves each of them a split to round up with."""
    size, counts = split_lengths(torch.tensor(lengths), target)
    assert int(counts.sum()) <= target
    sure = -(-sum(lengths) // (target - len(lengths)))
    even = -(-max(lengths) // (target // len(lengths)))
    assert size < min(sure, even) + SPLIT_UNIT


def scratch_and_twin(case, lengths, target, q_len):
    """Random partial results, poisoned where no split lies, and their merge by a plain softmax."""
    d = data(case)
    heads, dim = case.heads * case.group, d.tables.v.dim
    generator = torch.Generator().manual_seed(7)
    _, counts = split_lengths(torch.tensor(lengths), target)
    splits = num_splits(len(lengths), target)
    out = torch.randn(splits, q_len, heads, dim, generator=generator)
    lse = 5 * torch.randn(splits, q_len, heads, generator=generator)
    first = 0
    want, want_lse = [], []
    for length, count in zip(lengths, counts.tolist(), strict=True):
        mine = slice(first, first + count)
        # Of some splits the first query sees nothing, and of a short request nothing at all.
        unseen = slice(first, first + count, 3 if length > 5 else 1) if count > 1 or length <= 5 else slice(0)
        lse[unseen, 0], out[unseen, 0] = -torch.inf, 0
        total = lse[mine].double().logsumexp(0) if count else torch.full((q_len, heads), -torch.inf)
        share = torch.exp(lse[mine].double() - torch.where(total == -torch.inf, 0.0, total))
        want.append((share[..., None] * out[mine]).sum(0))
        want_lse.append(total)
        first += count
    out[first:], lse[first:] = torch.nan, torch.nan
    merged = torch.cat(want).unflatten(1, (case.heads, case.group))
    turned = torch.einsum("mhge,hde->mhgd", merged, d.codec.v_out.double().cpu()).flatten(1, 2)
    return DecodeScratch(out.to(DEVICE), lse.to(DEVICE)), turned.float(), torch.cat(want_lse).float()


@pytest.mark.parametrize("at_once, alone", [(0, 0), (0, 1 << 30), (1 << 30, 0)], ids=["tile", "row", "group"])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[5]], ids=str)
@pytest.mark.parametrize("target, q_len", [(1, 1), (5, 3), (2 * CHUNK + 1, 1), (5 * CHUNK + 1, 1)])
def test_merge_matches_twin(case, at_once, alone, target, q_len, monkeypatch):
    """Of few splits, of many, and of so many that one row has more chunks than there are programs for it."""
    monkeypatch.setattr(attention, "_GROUPS_AT_ONCE", at_once)
    monkeypatch.setattr(attention, "_ROWS_ALONE", alone)
    lengths = [0, 100_000 if target > 4 * CHUNK else 5000, 3]
    scratch, want, want_lse = scratch_and_twin(case, lengths, target, q_len)
    kv_indptr = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    out = torch.full((len(lengths) * q_len, *want.shape[1:]), torch.nan, device=DEVICE)
    lse = torch.full(out.shape[:2], torch.nan, device=DEVICE)
    attention._merge(data(case).tables, scratch, kv_indptr, q_len, target, out, lse)
    out, lse = out.cpu(), lse.cpu()
    empty = want_lse == -torch.inf
    assert bool(empty.any()) and torch.equal(lse == -torch.inf, empty) and not out[empty].any()
    torch.testing.assert_close(lse[~empty], want_lse[~empty], rtol=1e-5, atol=1e-5)
    # The GPU's dots are in three pieces of TF32.
    for head in range(out.shape[1]):
        assert relative_error(out[:, head], want[:, head]) < (1e-5 if DEVICE == "cpu" else 1e-4)


@triton.jit
def _places_kernel(total, count, places):
    for program in range(total):
        tl.store(places + program, by_multiprocessor(program, total, count))


@pytest.mark.parametrize("total, count", [(1, 1), (7, 1), (5, 8), (24, 8), (29, 8)])
def test_a_multiprocessors_programs_get_numbers_in_a_row(total, count):
    places = torch.full((total,), -1, dtype=torch.int32, device=DEVICE)
    _places_kernel[(1,)](total, count, places)
    assert sorted(places.tolist()) == list(range(total))
    for first in range(min(total, count)):
        mine = places[first::count].tolist()
        assert mine == list(range(mine[0], mine[0] + len(mine)))
