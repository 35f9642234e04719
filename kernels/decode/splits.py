"""How decode attention is cut into splits: worked out by every program for itself, from the lengths alone.

All requests are cut into pieces of one size, chosen so that their number is what the GPU runs at a time. Nothing
is planned on the host or in another launch: the grid is fixed by the batch size, so a captured CUDA graph stays
right whatever the lengths become, and only ``kv_indptr`` is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLIT_UNIT = 32  # tokens
_UNIT = tl.constexpr(SPLIT_UNIT)
_STEPS = 6  # sizes that are tried, from the ideal one up to one that is sure to do
_TRIES = tl.constexpr(_STEPS)
_ALIGN = tl.constexpr(64)  # tokens, of the largest tile: splits of a window begin at the border of one


def num_splits(batch: int, target: int) -> int:
    """Most splits that a batch can take."""
    return max(batch, target)


def request_block(requests: int) -> int:
    """Requests that a kernel's tile has room for: a power of 8, so that all batch sizes share a few binaries."""
    block = 8
    while block < requests:
        block *= 8
    return block


def _unit(tokens: int) -> int:
    return max(-(-tokens // SPLIT_UNIT), 1) * SPLIT_UNIT


def split_lengths(lengths: torch.Tensor, target: int, span: int = 0) -> tuple[int, torch.Tensor]:
    """Twin of :func:`request_splits`: tokens of a split, and how many splits each request takes."""
    if span:
        lengths = lengths - (lengths - span).clamp(min=0) // _ALIGN.value * _ALIGN.value
    total, batch = int(lengths.sum()), len(lengths)
    ideal = -(-total // target)
    size = total
    if target > batch:
        size = min(-(-total // (target - batch)), -(-int(lengths.max()) // (target // batch)))
    size = _unit(size)
    room = size - ideal
    for k in reversed(range(_STEPS)):
        trial = _unit(ideal + room * k // _STEPS)
        if int((-(-lengths // trial)).sum()) <= target:
            size = trial
    return size, -(-lengths // size)


@triton.jit
def unseen(length, SPAN: tl.constexpr):
    """How many of a request's first tokens no query sees, as far as they are whole tiles. SPAN: the tokens that all
    queries see together, of its last ones; 0: all."""
    return tl.maximum(length - SPAN, 0) // _ALIGN * _ALIGN if SPAN > 0 else 0 * length


@triton.jit
def request_splits(kv_indptr, num_requests, target, REQUESTS: tl.constexpr, SPAN: tl.constexpr = 0):
    """Tokens of a split, and ``[REQUESTS]`` the number of splits of each request.

    The size is the smallest tried one under which all requests together take at most ``target`` splits, so that
    all of them run at once. Two sizes are sure to do: one that leaves each request a split to round up with, and the
    longest request's share of as many splits as each can have, which is the best one for requests of a length. Those
    below it may. Where there are that many requests, each is one split.
    """
    r = tl.arange(0, REQUESTS)
    live = r < num_requests
    start = tl.load(kv_indptr + r, mask=live, other=0)
    length = (tl.load(kv_indptr + r + 1, mask=live, other=0) - start).to(tl.int32)
    length -= unseen(length, SPAN)
    total = tl.sum(length, 0)
    ideal = tl.cdiv(total, target)
    size = total
    if target > num_requests:
        size = tl.minimum(tl.cdiv(total, target - num_requests), tl.cdiv(tl.max(length, 0), target // num_requests))
    size = tl.maximum(tl.cdiv(size, _UNIT), 1) * _UNIT
    room = size - ideal  # not negative: a share of no more splits than are wanted
    for i in tl.static_range(_TRIES):
        trial = tl.maximum(tl.cdiv(ideal + room * (_TRIES - 1 - i) // _TRIES, _UNIT), 1) * _UNIT
        size = tl.where(tl.sum(tl.cdiv(length, trial), 0) <= target, trial, size)
    return size, tl.cdiv(length, size)


@triton.jit
def find_split(kv_indptr, num_requests, target, split, REQUESTS: tl.constexpr, SPAN: tl.constexpr = 0):
    """The request of a split (num_requests or more: there is no such split) and its tokens ``[begin, end)``."""
    r = tl.arange(0, REQUESTS)
    size, count = request_splits(kv_indptr, num_requests, target, REQUESTS, SPAN)
    upto = tl.cumsum(count, 0)
    request = tl.sum((upto <= split).to(tl.int32), 0)
    first = tl.sum(tl.where(r < request, count, 0), 0)
    begin = (split - first) * size
    if SPAN > 0:
        live = request < num_requests
        start = tl.load(kv_indptr + request, mask=live, other=0)
        begin += unseen((tl.load(kv_indptr + request + 1, mask=live, other=0) - start).to(tl.int32), SPAN)
    return request, begin, begin + size


@triton.jit
def by_multiprocessor(program, total, count):
    """Numbers 0 .. total - 1 so that the programs of a multiprocessor get numbers in a row.

    For programs 0 .. total - 1 that go to ``count`` multiprocessors in turn; whatever the GPU does, each number once.
    """
    share, more = total // count, total % count
    first = program % count
    return first * share + tl.minimum(first, more) + program // count


@triton.jit
def splits_of(kv_indptr, num_requests, target, request, REQUESTS: tl.constexpr, SPAN: tl.constexpr):
    """The first split of a request and their number."""
    r = tl.arange(0, REQUESTS)
    _, count = request_splits(kv_indptr, num_requests, target, REQUESTS, SPAN)
    first = tl.sum(tl.where(r < request, count, 0), 0)
    return first, tl.sum(tl.where(r == request, count, 0), 0)
