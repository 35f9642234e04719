"""The slots of a decode step: every request's row of SGLang's table of requests, one after the other.

SGLang's own metadata takes four launches before each step's graph, one of which copies a request's slots with a single
program. Here it is one launch of a fixed grid, so that it stands *in* the graph: the host does nothing for it, and the
whole GPU copies a long request, in numbers of 32 bits. Definition: :func:`..reference.gather_slots`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..device.gpu import multiprocessors
from .recent import Recent
from .splits import request_block

BLOCK = 1024  # tokens that a program copies at a time
_PER_SM = 8  # programs; each has 4 warps


@triton.jit(
    do_not_specialize=["more", "num_requests", "stride", "top", "rows", "steps", "room"],
    do_not_specialize_on_alignment=["requests", "lengths", "first"],
)
def gather_slots_kernel(
    req_to_token,  # int32 [rows, stride]
    requests,  # [B], each request's row
    lengths,  # [B], tokens of each
    kv_indptr,  # int32 or int64 [B + 1]
    kv_indices,  # int32 or int64, room for the sum of lengths
    more,  # tokens of each request behind its length
    num_requests,
    stride,
    first,  # int32 [rows], from which position exact copies are there (decode.recent); or None
    step,  # int32 [4, steps]
    top,
    rows,
    steps,
    room,
    REQUESTS: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, request = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, REQUESTS)
    length_of = tl.load(lengths + r, mask=r < num_requests, other=0).to(tl.int64) + more
    row = tl.load(requests + request).to(tl.int64)
    if first is not None:
        copies = top - tl.load(requests + r, mask=r < num_requests, other=0).to(tl.int32)
        there = (r < num_requests) & (copies >= 0) & (copies < rows)
        exact = length_of.to(tl.int32) - tl.load(first + copies, mask=there, other=0)
        exact = tl.minimum(tl.maximum(tl.where(there, exact, 1), 1), WINDOW)  # a token itself needs no copy
        exact = tl.minimum(exact, length_of.to(tl.int32))
        if (part == 0) & (request == 0):
            tl.store(step + r, tl.where(there, copies, -1), mask=r < num_requests)
            tl.store(step + steps + r, (length_of - 1).to(tl.int32), mask=r < num_requests)
            tl.store(step + 2 * steps + r, exact, mask=r < num_requests)
            place = copies * RING + (length_of - 1).to(tl.int32) % RING
            place = tl.where(there, place, tl.where(r < room, rows * RING + r, -1))
            tl.store(step + 3 * steps + r, tl.where(length_of > 0, place, -1), mask=r < num_requests)
        length_of -= exact
    begin = tl.sum(tl.where(r < request, length_of, 0), 0)
    length = tl.sum(tl.where(r == request, length_of, 0), 0).to(tl.int32)
    if part == 0:
        tl.store(kv_indptr + request, begin.to(kv_indptr.dtype.element_ty))
        if request == num_requests - 1:
            tl.store(kv_indptr + num_requests, (begin + length).to(kv_indptr.dtype.element_ty))
    source, target = req_to_token + row * stride, kv_indices + begin
    for at in range(part * BLOCK, length, tl.num_programs(0) * BLOCK):
        token = at + tl.arange(0, BLOCK)
        slot = tl.load(source + token, mask=token < length)
        tl.store(target + token, slot.to(kv_indices.dtype.element_ty), mask=token < length)


def _programs(device: torch.device) -> int:
    return _PER_SM * multiprocessors(device)


def gather_slots(
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    lengths: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    more: int = 0,
    recent: Recent | None = None,
) -> None:
    """Fill ``kv_indptr [B + 1]`` with the running sum of lengths and ``kv_indices`` with the requests' slots.

    req_to_token int32 ``[rows, most tokens]``, contiguous within a row. requests ``[B]``: the rows; lengths ``[B]``:
    how many of a row's slots; more: of those that follow. recent: whose exact tokens are left out, and whose ``step``
    is filled; the last of the slots is then that of the step's first query. kv_indices: room for all of them, which is
    not checked, as lengths are on the device.
    The grid does not depend on a length. Raises ValueError on other shapes.
    """
    batch = requests.shape[0]
    if lengths.shape != (batch,) or kv_indptr.shape != (batch + 1,):
        shapes = f"lengths {tuple(lengths.shape)}, kv_indptr {tuple(kv_indptr.shape)}"
        raise ValueError(f"{shapes}: [{batch}] and [{batch + 1}] are needed")
    if req_to_token.dim() != 2 or req_to_token.stride(1) != 1:
        raise ValueError(f"req_to_token {tuple(req_to_token.shape)}: rows of contiguous slots are needed")
    if recent is not None and recent.step.shape[1] < batch:
        raise ValueError(f"recent: a step of {recent.step.shape[1]} requests at most, not of {batch}")
    if not batch:
        kv_indptr.zero_()
        return
    gather_slots_kernel[(triton.cdiv(_programs(req_to_token.device), batch), batch)](
        req_to_token,
        requests,
        lengths,
        kv_indptr,
        kv_indices,
        more,
        batch,
        req_to_token.stride(0),
        recent and recent.first,
        recent and recent.step,
        recent.top if recent else 0,
        recent.rows if recent else 0,
        recent.step.shape[1] if recent else 0,
        recent.room if recent else 0,
        REQUESTS=request_block(batch),
        WINDOW=recent.window if recent else 0,
        RING=recent.ring if recent else 0,
        BLOCK=BLOCK,
        num_warps=4,
    )
