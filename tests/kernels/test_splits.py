"""How decode is cut, against its definition."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_blockgtq.kernels.decode.splits import (
    SPLIT_UNIT,
    by_multiprocessor,
    find_split,
    num_splits,
    request_block,
    split_lengths,
    splits_of,
)

from .matrix import DEVICE


@triton.jit
def _where_kernel(kv_indptr, num_requests, target, found, of, SPLITS: tl.constexpr, REQUESTS: tl.constexpr,
                  SPAN: tl.constexpr):  # fmt: skip
    for split in range(SPLITS):
        request, begin, end = find_split(kv_indptr, num_requests, target, split, REQUESTS, SPAN)
        tl.store(found + 3 * split, request)
        tl.store(found + 3 * split + 1, begin)
        tl.store(found + 3 * split + 2, end)
    for request in range(num_requests):
        first, count = splits_of(kv_indptr, num_requests, target, request, REQUESTS, SPAN)
        tl.store(of + 2 * request, first)
        tl.store(of + 2 * request + 1, count)


LENGTHS = st.lists(st.one_of(st.integers(0, 70), st.integers(0, 200_000)), min_size=1, max_size=9)


@given(LENGTHS, st.integers(1, 40), st.sampled_from([torch.int32, torch.int64]), st.sampled_from([0, 1, 100, 5000]))
@example([0, 0], 3, torch.int32, 0)
@example([131072] * 9, 132 * 12, torch.int32, 0)
@example([131072, 127, 128, 129], 40, torch.int32, 128)
@settings(max_examples=16, deadline=None)
def test_kernels_cut_as_defined(lengths, target, dtype, span):
    """Every token of every request that is seen lies in one split, and the grid has room for all splits."""
    batch, grid = len(lengths), min(num_splits(len(lengths), target), 14)
    kv_indptr = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, dtype)
    found = torch.full((grid, 3), -1, dtype=torch.int32, device=DEVICE)
    of = torch.full((batch, 2), -1, dtype=torch.int32, device=DEVICE)
    _where_kernel[(1,)](kv_indptr, batch, target, found, of, SPLITS=grid, REQUESTS=request_block(batch), SPAN=span)

    size, counts = split_lengths(torch.tensor(lengths), target, span)
    assert size % SPLIT_UNIT == 0 and size > 0
    skipped = [max(n - span, 0) // 64 * 64 if span else 0 for n in lengths]
    assert int(counts.sum()) <= num_splits(batch, target)
    assert of[:, 1].tolist() == counts.tolist()
    assert of[:, 0].tolist() == (counts.cumsum(0) - counts).tolist()
    want = [(b, skipped[b] + i * size, skipped[b] + (i + 1) * size) for b, n in enumerate(counts) for i in range(n)]
    for b, n in enumerate(lengths):
        left = n - skipped[b]
        assert left >= min(n, span) and (left < span + 64 or not span)
        assert (counts[b] - 1) * size < left <= counts[b] * size or left == counts[b] == 0
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
def test_no_split_is_much_longer_than_the_share_of_each(target):
    """What all programs wait for is the longest split: requests of a length get an even share, and no others get more
    than what leaves each of them a split to round up with."""
    for lengths in ([32768] * 8, [32768] * 19, [8192] * 32, [131072, 500, 500], [100, 9000, 30000, 7]):
        size, counts = split_lengths(torch.tensor(lengths), target)
        assert int(counts.sum()) <= target
        sure = -(-sum(lengths) // (target - len(lengths)))
        even = -(-max(lengths) // (target // len(lengths)))
        assert size < min(sure, even) + SPLIT_UNIT


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
