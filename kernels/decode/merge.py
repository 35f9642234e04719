"""Merges of partial attentions over disjoint keys, exact by their log-sum-exp.

Definition: :func:`..reference.merge_states`. :func:`merge_splits` merges decode attention's splits and rotates the
result by ``v_out``. Both are linear in the splits' outputs, so the rotation comes last and once, and behind it the
exact tokens (:mod:`.ahead`). One launch does it all where each request has a few splits, by a program for the heads of
a group, which share the matrix, and where rows are few, by a program for a row and some of its columns. Else it takes
two: the first one merges a row's splits in the place of the first of them, the second one rotates the rows, 16 at a
time, so that the matrix is read a sixteenth as often.

:func:`merge_into` merges attention over a piece of a prefix into what there is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..device.dependent import dependent, wait_and_release
from ..device.launch import Launch
from ..device.tables import Side
from .splits import request_block, request_splits, splits_of

_GROUPS_AT_ONCE = 128  # tokens times KV heads up to which one launch merges and rotates a group
_GROUP_PARTS = 256  # rows of splits that such a launch takes at a time: what 8 warps hold in registers
_ROWS_ALONE = 128  # output rows up to which each gets programs of its own
_MANY_SPLITS = 64  # of a request, beyond which it does
_THREAD_ELEMENTS = 64  # of splits that such a program takes at a time
_ROW_ELEMENTS = 16 * 32 * _THREAD_ELEMENTS  # the same of all its warps, at most
_ELEMENTS = 4096  # of an output tile of merge_into


@triton.jit
def _fold(partial_out, partial_lse, row, live, channel, peak, total, merged, DIM: tl.constexpr):
    """Take the parts at ``row [S, ...]`` into running softmaxes: peak and total ``[...]``, merged ``[..., PADDED]``."""
    state = tl.load(partial_lse + row, mask=live, other=float("-inf"))
    mask = tl.expand_dims(live, -1) & (channel < DIM)
    part = tl.load(partial_out + tl.expand_dims(row, -1) * DIM + channel, mask=mask, other=0.0).to(tl.float32)
    new_peak = tl.maximum(peak, tl.max(state, 0))
    share = tl.exp(state - new_peak)
    keep = tl.exp(peak - new_peak)
    kept = merged * tl.expand_dims(keep, -1)
    return new_peak, total * keep + tl.sum(share, 0), kept + tl.sum(part * tl.expand_dims(share, -1), 0)


@triton.jit
def _finish(peak, total, merged):
    """What :func:`_fold` leaves, as an output and its log-sum-exp; zeros and -inf of no part."""
    safe_total = tl.where(total > 0, total, 1.0)
    return merged / tl.expand_dims(safe_total, -1), tl.where(total > 0, peak + tl.log(safe_total), float("-inf"))


@triton.jit
def _merge_row(partial_out, partial_lse, first, count, token, j, num_heads, QUERIES: tl.constexpr,
               DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A row's output and log-sum-exp, of the ``count`` splits from ``first`` on."""
    channel = tl.arange(0, PADDED)
    peak = -1e30
    total = 0.0
    merged = tl.zeros([PADDED], tl.float32)
    for start in range(0, count, BLOCK):
        split = start + tl.arange(0, BLOCK)
        row = ((first + split).to(tl.int64) * QUERIES + token % QUERIES) * num_heads + j
        peak, total, merged = _fold(partial_out, partial_lse, row, split < count, channel, peak, total, merged, DIM)
    return _finish(peak, total, merged)


@triton.jit
def _beside_sinks(sinks, j, lse, live):
    """What the sinks of the query heads ``j`` leave of outputs whose log-sum-exp knows none."""
    sink = tl.load(sinks + j, mask=live, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(sink - lse))


@triton.jit
def _weights(matrix, head, channel, column, PADDED: tl.constexpr):
    """Rows ``channel`` and columns ``column`` of a KV head's matrix. Asked for before the wait: in a server they come
    from memory each time."""
    return tl.load(matrix + head.to(tl.int64) * PADDED * PADDED + channel[:, None] * PADDED + column[None, :])


@triton.jit
def _exact(out, lse, row, live, column, DIM: tl.constexpr):
    """Of the exact tokens: the lse of rows ``[R]``, and columns of their outputs ``[R, C]``."""
    part = tl.load(out + row[:, None] * DIM + column[None, :], mask=live[:, None] & (column < DIM)[None, :], other=0.0)
    return tl.load(lse + row, mask=live, other=float("-inf")), part


@triton.jit
def _join(lse, other):
    """What two parts of these log-sum-exps are multiplied with, and the lse of both."""
    top = tl.maximum(lse, other)
    safe = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp(lse - safe), tl.exp(other - safe)
    whole = a + b
    some = tl.where(whole > 0, whole, 1.0)
    return a / some, b / some, tl.where(whole > 0, safe + tl.log(some), float("-inf"))


@triton.jit(
    do_not_specialize=["num_requests", "target", "num_heads"],
    do_not_specialize_on_alignment=["kv_indptr"],
)
def merge_run_kernel(
    partial_out,  # float16 or float32 [splits, QUERIES, Hq, DIM]
    partial_lse,  # float32 [splits, QUERIES, Hq]
    kv_indptr,
    num_requests,
    target,
    num_heads,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    REQUESTS: tl.constexpr,
    SPAN: tl.constexpr,  # tokens that are seen of a request; 0: all
    BLOCK: tl.constexpr,  # splits taken at a time
    DEPENDENT: tl.constexpr,
):
    """The splits of a request and row, into the place of the first."""
    j, token = tl.program_id(0), tl.program_id(1)
    first, count = splits_of(kv_indptr, num_requests, target, token // QUERIES, REQUESTS, SPAN)
    wait_and_release(DEPENDENT)
    if count == 0:
        return
    merged, lse = _merge_row(partial_out, partial_lse, first, count, token, j, num_heads, QUERIES, DIM, PADDED, BLOCK)
    channel, to = tl.arange(0, PADDED), (first.to(tl.int64) * QUERIES + token % QUERIES) * num_heads + j
    tl.store(partial_out + to * DIM + channel, merged, mask=channel < DIM)
    tl.store(partial_lse + to, lse)


@triton.jit(
    do_not_specialize=["num_requests", "target", "num_heads"],
    do_not_specialize_on_alignment=["kv_indptr"],
)
def merge_group_kernel(
    partial_out,
    partial_lse,
    matrix,  # float32 [H, PADDED, PADDED] (in, out)
    sinks,  # [Hq], or None
    exact_out,  # float32 [T, Hq, DIM] and [T, Hq] of the exact tokens (ahead), or None
    exact_lse,
    kv_indptr,
    out,
    lse,
    num_requests,
    target,
    num_heads,
    stride_ot,
    stride_oh,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # at least GROUP
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the output, per program
    REQUESTS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,  # splits taken at a time
    DEPENDENT: tl.constexpr,
):
    """All splits of a request, for the query heads of one KV head, and the rotation: the only launch."""
    head, token, first_column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * COLUMNS
    channel = tl.arange(0, PADDED)
    column = first_column + tl.arange(0, COLUMNS)
    weights = _weights(matrix, head, channel, column, PADDED)
    first, count = splits_of(kv_indptr, num_requests, target, token // QUERIES, REQUESTS, SPAN)
    g = tl.arange(0, ROWS)
    j = head * GROUP + g
    wait_and_release(DEPENDENT)
    if exact_out is not None:
        exact = _exact(exact_out, exact_lse, token.to(tl.int64) * num_heads + j, g < GROUP, column, DIM)
    # Within a request 32 bits are enough to count in.
    base = (first.to(tl.int64) * QUERIES + token % QUERIES) * num_heads
    parts, states = partial_out + base * DIM, partial_lse + base
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    merged = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, count, BLOCK):
        split = start + tl.arange(0, BLOCK)
        live = (split < count)[:, None] & (g < GROUP)[None, :]
        row = (split * (QUERIES * num_heads))[:, None] + j[None, :]
        peak, total, merged = _fold(parts, states, row, live, channel, peak, total, merged, DIM)
    merged, merged_lse = _finish(peak, total, merged)
    rotated = tl.dot(tl.trans(weights), tl.trans(merged), input_precision="tf32x3")
    if exact_out is not None:
        packed_share, exact_share, merged_lse = _join(merged_lse, exact[0])
        rotated = rotated * packed_share[None, :] + tl.trans(exact[1] * exact_share[:, None])
    if sinks is not None:
        rotated *= _beside_sinks(sinks, j, merged_lse, g < GROUP)[None, :]
    to = out + token.to(tl.int64) * stride_ot + j[None, :] * stride_oh + column[:, None]
    live_row = g < GROUP
    tl.store(to, rotated.to(out.dtype.element_ty), mask=live_row[None, :] & (column < DIM)[:, None])
    if first_column == 0:
        tl.store(lse + token * num_heads + j, merged_lse, mask=live_row)


@triton.jit(
    do_not_specialize=["num_requests", "target", "num_heads"],
    do_not_specialize_on_alignment=["kv_indptr"],
)
def merge_row_kernel(
    partial_out,
    partial_lse,
    matrix,  # float32 [H, PADDED, PADDED] (in, out)
    sinks,  # [Hq], or None
    exact_out,  # float32 [T, Hq, DIM] and [T, Hq] of the exact tokens (ahead), or None
    exact_lse,
    kv_indptr,
    out,
    lse,
    num_requests,
    target,
    num_heads,
    stride_ot,
    stride_oh,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the output, per program: they share the reading of the matrix
    BLOCK: tl.constexpr,  # splits taken at a time
    REQUESTS: tl.constexpr,
    SPAN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    j, token, first_column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * COLUMNS
    channel = tl.arange(0, PADDED)
    column = first_column + tl.arange(0, COLUMNS)
    weights = _weights(matrix, j // GROUP, channel, column, PADDED)
    first, count = splits_of(kv_indptr, num_requests, target, token // QUERIES, REQUESTS, SPAN)
    wait_and_release(DEPENDENT)
    if exact_out is not None:
        at = token.to(tl.int64) * num_heads + j
        exact = tl.load(exact_lse + at), tl.load(exact_out + at * DIM + column, mask=column < DIM, other=0.0)
    merged, merged_lse = _merge_row(
        partial_out, partial_lse, first, count, token, j, num_heads, QUERIES, DIM, PADDED, BLOCK
    )
    rotated = tl.sum(merged[:, None] * weights, 0)
    if exact_out is not None:
        packed_share, exact_share, merged_lse = _join(merged_lse, exact[0])
        rotated = rotated * packed_share + exact[1] * exact_share
    if sinks is not None:
        rotated *= _beside_sinks(sinks, j, merged_lse, True)
    to = out + token.to(tl.int64) * stride_ot + j * stride_oh
    tl.store(to + column, rotated.to(out.dtype.element_ty), mask=column < DIM)
    if first_column == 0:
        tl.store(lse + token * num_heads + j, merged_lse)


@triton.jit(
    do_not_specialize=["num_rows", "num_requests", "target", "num_heads"],
    do_not_specialize_on_alignment=["kv_indptr"],
)
def merge_tile_kernel(
    partial_out,
    partial_lse,
    matrix,
    sinks,
    exact_out,
    exact_lse,
    kv_indptr,
    out,
    lse,
    num_rows,  # tokens * GROUP
    num_requests,
    target,
    num_heads,
    stride_ot,
    stride_oh,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the output, per program
    ROWS: tl.constexpr,
    REQUESTS: tl.constexpr,
    SPAN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    BLOCK_K: tl.constexpr = 32 if PADDED >= 32 else PADDED
    head, first_column = tl.program_id(1), tl.program_id(2) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    weights = ()
    for i in tl.static_range(PADDED // BLOCK_K):
        channel = i * BLOCK_K + tl.arange(0, BLOCK_K)
        weights += (_weights(matrix, head, channel, column, PADDED),)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < num_rows
    token, j = r // GROUP, head * GROUP + r % GROUP
    # Behind merge_run_kernel each row has one part, at its first split.
    request = tl.where(live, token // QUERIES, -1)
    index = tl.arange(0, REQUESTS)
    _, count = request_splits(kv_indptr, num_requests, target, REQUESTS, SPAN)
    some = tl.sum(tl.where(index[None, :] == request[:, None], count[None, :], 0), 1) > 0
    firsts = tl.sum(tl.where(index[None, :] < request[:, None], count[None, :], 0), 1)
    state_at = (firsts.to(tl.int64) * QUERIES + token % QUERIES) * num_heads + j
    wait_and_release(DEPENDENT)
    if exact_out is not None:
        exact = _exact(exact_out, exact_lse, token.to(tl.int64) * num_heads + j, live, column, DIM)
    state = tl.load(partial_lse + state_at, mask=some, other=float("-inf"))
    some = some & (state > float("-inf"))

    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.static_range(PADDED // BLOCK_K):
        channel = i * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = some[:, None] & (channel < DIM)[None, :]
        merged = tl.load(partial_out + state_at[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
        tile = tl.dot(merged.to(tl.float32), weights[i], tile, input_precision="tf32x3")
    if exact_out is not None:
        packed_share, exact_share, state = _join(state, exact[0])
        tile = tile * packed_share[:, None] + exact[1] * exact_share[:, None]
    if sinks is not None:
        tile *= _beside_sinks(sinks, j, state, live)[:, None]
    to = out + (token.to(tl.int64) * stride_ot + j * stride_oh)[:, None] + column[None, :]
    tl.store(to, tile.to(out.dtype.element_ty), mask=live[:, None] & (column < DIM)[None, :])
    if first_column == 0:
        tl.store(lse + token * num_heads + j, state, mask=live)


def merge_splits(
    side: Side,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    kv_indptr: torch.Tensor,
    q_len: int,
    target: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    span: int = 0,
    sinks: torch.Tensor | None = None,
    exact: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Splits ``[S, q_len, Hq, Dv]`` with lse ``[S, q_len, Hq]`` into ``out [B * q_len, Hq, Dv]`` and ``lse``.

    side: of the values. target, span: see :mod:`.splits`. sinks ``[Hq]``: taken into out, not into lse. exact: out
    and lse of what is read exactly besides, of those shapes, float32, contiguous. The partial results are overwritten.
    """
    tokens, num_heads = lse.shape
    heads, requests = side.back.shape[0], kv_indptr.shape[0] - 1
    group = num_heads // heads
    shared = {
        "QUERIES": q_len,
        "DIM": side.dim,
        "PADDED": side.padded,
        "REQUESTS": request_block(requests),
        "SPAN": span,
        "DEPENDENT": dependent(out.device),
        "launch_pdl": dependent(out.device),
    }
    exact_out, exact_lse = exact or (None, None)
    per_request, narrow = target // requests, side.padded <= 128
    if tokens * num_heads <= _ROWS_ALONE and target > _MANY_SPLITS * requests:
        # A quarter of a row's share of splits at a time or more, which leaves room beside attention for a program, and
        # few columns, to fill the device.
        columns, share = min(32, side.padded), triton.next_power_of_2(per_request) // 4
        block = min(max(share, _MANY_SPLITS), _ROW_ELEMENTS // side.padded)
        merge_row_kernel[(num_heads, tokens, side.padded // columns)](
            partial_out, partial_lse, side.back, sinks, exact_out, exact_lse, kv_indptr, out, lse, requests, target,
            num_heads, out.stride(0), out.stride(1), **shared, GROUP=group, COLUMNS=columns, BLOCK=block,
            num_warps=max(4, block * side.padded // (32 * _THREAD_ELEMENTS)),
        )  # fmt: skip
        return
    if narrow and tokens * heads <= _GROUPS_AT_ONCE:
        columns, rows = min(64, side.padded), max(8, triton.next_power_of_2(group))
        merge_group_kernel[(heads, tokens, side.padded // columns)](
            partial_out, partial_lse, side.back, sinks, exact_out, exact_lse, kv_indptr, out, lse, requests, target,
            num_heads, out.stride(0), out.stride(1), **shared, GROUP=group, COLUMNS=columns, ROWS=rows,
            BLOCK=max(4, min(_GROUP_PARTS // rows, triton.next_power_of_2(per_request))), num_warps=8,
        )  # fmt: skip
        return
    # A request that is much longer than the others has more splits than its share.
    block = max(4, min(64, triton.next_power_of_2(2 * per_request)))
    merge_run_kernel[(num_heads, tokens)](
        partial_out, partial_lse, kv_indptr, requests, target, num_heads, **shared, BLOCK=block,
        num_warps=4 if block > 8 else 1,
    )  # fmt: skip
    columns = min(64, side.padded)
    merge_tile_kernel[(triton.cdiv(tokens * group, 16), heads, side.padded // columns)](
        partial_out, partial_lse, side.back, sinks, exact_out, exact_lse, kv_indptr, out, lse, tokens * group,
        requests, target, num_heads, out.stride(0), out.stride(1), **shared, GROUP=group, COLUMNS=columns, ROWS=16,
        num_warps=4,
    )  # fmt: skip


# Numbers that differ between calls are not specialised on: one binary serves them all.
@triton.jit(
    do_not_specialize=["num_tokens", "stride_lh", "stride_plh"],
    do_not_specialize_on_alignment=["lse", "part_lse"],
)
def _merge_into_kernel(
    out,
    lse,
    part,
    part_lse,
    num_tokens,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    stride_pt,
    stride_ph,
    stride_plt,
    stride_plh,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    token = token.to(tl.int64)
    lse_at = lse + token * stride_lt + head * stride_lh
    a = tl.load(lse_at, mask=live, other=float("-inf"))
    b = tl.load(part_lse + token * stride_plt + head * stride_plh, mask=live, other=float("-inf"))
    # FlashAttention calls the LSE of no keys +inf where it leaves the kernel out.
    b = tl.where(b == float("inf"), float("-inf"), b)
    peak = tl.maximum(a, b)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    a = tl.exp(a - peak)
    b = tl.exp(b - peak)
    total = a + b
    safe = tl.where(total > 0, total, 1.0)

    channel = tl.arange(0, PADDED)
    inside = (channel < DIM)[None, :]
    out_at = out + (token * stride_ot + head * stride_oh)[:, None] + channel[None, :]
    part_at = part + (token * stride_pt + head * stride_ph)[:, None] + channel[None, :]
    # A part without keys is not read: its output may be anything.
    x = tl.load(out_at, mask=(live & (a > 0))[:, None] & inside, other=0.0)
    y = tl.load(part_at, mask=(live & (b > 0))[:, None] & inside, other=0.0).to(tl.float32)
    merged = x * (a / safe)[:, None] + y * (b / safe)[:, None]
    tl.store(out_at, merged, mask=live[:, None] & inside)
    tl.store(lse_at, tl.where(total > 0, peak + tl.log(safe), float("-inf")), mask=live)


def merge_into(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge ``part [T, Hq, Dv]`` with ``part_lse [T, Hq]`` into float32 ``out`` and ``lse`` of those shapes.

    LSE is in natural logarithm and -inf where there were no keys; any strides but contiguous channels.
    """
    if out.dtype != torch.float32 or lse.dtype != torch.float32 or part_lse.dtype != torch.float32:
        raise ValueError(f"out {out.dtype}, lse {lse.dtype}, part_lse {part_lse.dtype}: float32 is needed")
    if not (out.shape == part.shape and lse.shape == part_lse.shape == out.shape[:2]):
        raise ValueError(
            f"out {tuple(out.shape)}, lse {tuple(lse.shape)}, part {tuple(part.shape)}, part_lse "
            f"{tuple(part_lse.shape)}: [T, Hq, Dv] and [T, Hq] of one size are needed"
        )
    tokens, heads, dim = out.shape
    if not tokens:
        return
    launch, block = _prepared(_merge_into_kernel, dim)
    stride_ot, stride_oh, _ = out.stride()
    stride_pt, stride_ph, _ = part.stride()
    stride_lt, stride_lh = lse.stride()
    stride_plt, stride_plh = part_lse.stride()
    launch(
        (-(-tokens // block), heads, 1),
        out=out,
        lse=lse,
        part=part,
        part_lse=part_lse,
        num_tokens=tokens,
        stride_ot=stride_ot,
        stride_oh=stride_oh,
        stride_lt=stride_lt,
        stride_lh=stride_lh,
        stride_pt=stride_pt,
        stride_ph=stride_ph,
        stride_plt=stride_plt,
        stride_plh=stride_plh,
    )


@cache
def _prepared(kernel: Any, dim: int) -> tuple[Launch, int]:
    """The launch for heads of ``dim`` channels, and the tokens of a program."""
    padded = triton.next_power_of_2(dim)
    block = max(1, _ELEMENTS // padded)
    return Launch(kernel, DIM=dim, PADDED=padded, TOKENS=block), block
