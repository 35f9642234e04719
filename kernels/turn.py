"""Matrices at the two ends of attention and before encoding, one d x d matrix for each KV head.

:func:`turn` brings queries to the stored channels; :func:`merge_and_turn` merges the splits of an
attention output and turns it back. Encode uses :func:`project` in its own kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dependent import dependent, wait_and_release
from .tables import SideTables

BLOCK = 16  # rows per program, the least a tensor-core dot takes
#: The interpreter keeps bfloat16 as its bits and multiplies those; in float32 the products are the same.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _project_chunk(part, matrix, at, PADDED: tl.constexpr, acc):
    """``acc + part @ matrix[at]``: bfloat16 rows times a matrix in two bfloat16 pieces, others in tf32x3."""
    if part.dtype == tl.bfloat16:
        if _WIDEN:
            part = part.to(tl.float32)
        acc = tl.dot(part, tl.load(matrix + PADDED * PADDED + at).to(part.dtype), acc)
        acc = tl.dot(part, tl.load(matrix + at).to(part.dtype), acc)
    else:
        acc = tl.dot(part.to(tl.float32), tl.load(matrix + at), acc, input_precision="tf32x3")
    return acc


@triton.jit
def project(x, at, live, matrix, head, first, TILES: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The rows of DIM channels at ``x + at`` times the head's matrix (in, out): a tuple of float32 tiles.

    TILES: ``plan.EncodePlan.flat_tiles``, of which only first channel, from ``first``, and size of each tile matter.
    The matrix is ``[H, 2, PADDED, PADDED]`` bfloat16 pieces, (out, in), for bfloat16 rows, else float32
    ``[H, PADDED, PADDED]``.
    """
    SPLIT: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    # All of a common matrix at once: it is one trip to the cache.
    BLOCK_K: tl.constexpr = (PADDED if PADDED <= 128 else 64) if SPLIT else 32 if PADDED >= 32 else PADDED
    matrix += head * PADDED * PADDED * (2 if SPLIT else 1)
    ys = ()
    for t in tl.static_range(len(TILES) // 7):
        ys += (tl.full([live.shape[0], TILES[7 * t + 1]], 0.0, tl.float32),)
    for start in range(0, DIM, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        part = tl.load(x + at[:, None] + channel[None, :], mask=live[:, None] & (channel < DIM)[None, :], other=0.0)
        sums = ()
        for t in tl.static_range(len(TILES) // 7):
            out = first + TILES[7 * t] + tl.arange(0, TILES[7 * t + 1])
            if SPLIT:
                to = channel[:, None] + out[None, :] * PADDED
            else:
                to = channel[:, None] * PADDED + out[None, :]
            sums += (_project_chunk(part, matrix, to, PADDED, ys[t]),)
        ys = sums
    return ys


@triton.jit
def project_and_store(
    x,
    matrix,
    y,
    num_rows,
    stride_xt,
    stride_xh,
    stride_yt,
    stride_yh,
    head,
    block,
    first,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of ``y[t, j] = x[t, j] @ matrix[j // GROUP]``, float32: COLUMNS channels from ``first``."""
    r = block * ROWS + tl.arange(0, ROWS)
    token, j = (r // GROUP).to(tl.int64), head * GROUP + r % GROUP
    live = r < num_rows
    tiles: tl.constexpr = (0, COLUMNS, 0, 0, 0, 0, 0)
    tile = project(x, token * stride_xt + j * stride_xh, live, matrix, head, first, tiles, DIM, PADDED)[0]
    channel = first + tl.arange(0, COLUMNS)
    to = token * stride_yt + j * stride_yh
    tl.store(y + to[:, None] + channel[None, :], tile, mask=live[:, None] & (channel < DIM)[None, :])


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
@triton.jit(do_not_specialize=["num_rows"])
def _turn_kernel(
    x,
    matrix,
    y,
    num_rows,
    stride_xt,
    stride_xh,
    stride_yt,
    stride_yh,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_and_release(DEPENDENT)
    head, first = tl.program_id(1), tl.program_id(2) * COLUMNS
    project_and_store(
        x,
        matrix,
        y,
        num_rows,
        stride_xt,
        stride_xh,
        stride_yt,
        stride_yh,
        head,
        tl.program_id(0),
        first,
        GROUP,
        DIM,
        PADDED,
        ROWS,
        COLUMNS,
    )


@triton.jit(do_not_specialize=["num_rows", "max_splits"])
def _merge_kernel(
    partial_out,
    partial_lse,
    matrix,
    out,
    lse,
    num_rows,
    max_splits,
    stride_pt,
    stride_ph,
    stride_ps,
    stride_lt,
    stride_lh,
    stride_ls,
    stride_ot,
    stride_oh,
    num_heads,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Exact merge of the splits by their log-sum-exp, then ``v_out``, which is linear and so comes last."""
    BLOCK_K: tl.constexpr = 32 if PADDED >= 32 else PADDED
    head = tl.program_id(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < num_rows
    token, j = (r // GROUP).to(tl.int64), head * GROUP + r % GROUP
    lse_at = partial_lse + token * stride_lt + j * stride_lh
    part_at = partial_out + token * stride_pt + j * stride_ph

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for s in range(max_splits):
        peak = tl.maximum(peak, tl.load(lse_at + s * stride_ls, mask=live, other=float("-inf")))
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([ROWS], tl.float32)
    for s in range(max_splits):
        total += tl.exp(tl.load(lse_at + s * stride_ls, mask=live, other=float("-inf")) - peak)
    safe = tl.where(total > 0, total, 1.0)

    out_channel = tl.arange(0, PADDED)
    tile = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, DIM, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        merged = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for s in range(max_splits):
            share = tl.exp(tl.load(lse_at + s * stride_ls, mask=live, other=float("-inf")) - peak) / safe
            # A split without tokens has written nothing.
            mask = (live & (share > 0))[:, None] & (channel < DIM)[None, :]
            part = tl.load(part_at[:, None] + s * stride_ps + channel[None, :], mask=mask, other=0.0)
            merged += part * share[:, None]
        weights = tl.load(matrix + head * PADDED * PADDED + channel[:, None] * PADDED + out_channel[None, :])
        tile = tl.dot(merged, weights, tile, input_precision="tf32x3")
    to = out + (token * stride_ot + j * stride_oh)[:, None] + out_channel[None, :]
    tl.store(to, tile.to(out.dtype.element_ty), mask=live[:, None] & (out_channel < DIM)[None, :])
    tl.store(lse + token * num_heads + j, tl.where(total > 0, peak + tl.log(safe), float("-inf")), mask=live)


def turn(side: SideTables, x: torch.Tensor, group: int) -> torch.Tensor:
    """``x [T, group * H, dim]`` times the side's ``back`` matrices, float32."""
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rows = x.shape[0] * group
    # Few rows are a matter of reading the matrix: its columns are spread over programs.
    block, columns = (64, side.padded) if rows > 256 else (16, min(32, side.padded))
    _turn_kernel[(triton.cdiv(rows, block), side.back.shape[0], side.padded // columns)](
        x,
        side.back_pieces if x.dtype == torch.bfloat16 else side.back,
        y,
        rows,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        y.stride(1),
        GROUP=group,
        DIM=side.dim,
        PADDED=side.padded,
        ROWS=block,
        COLUMNS=columns,
        DEPENDENT=dependent(x.device),
        launch_pdl=dependent(x.device),
    )
    return y


def merge_and_turn(
    side: SideTables, partial_out: torch.Tensor, partial_lse: torch.Tensor, group: int, out: torch.Tensor
) -> torch.Tensor:
    """Merge splits ``[T, Hq, S, dim]``, ``[T, Hq, S]`` and turn the result into ``out [T, Hq, dim]``.

    Returns the merged lse ``[T, Hq]``. A split with lse -inf is not read.
    """
    tokens, heads, splits = partial_lse.shape
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=out.device)
    _merge_kernel[(triton.cdiv(tokens * group, BLOCK), side.back.shape[0])](
        partial_out,
        partial_lse,
        side.back,
        out,
        lse,
        tokens * group,
        splits,
        *partial_out.stride()[:3],
        *partial_lse.stride(),
        out.stride(0),
        out.stride(1),
        heads,
        GROUP=group,
        DIM=side.dim,
        PADDED=side.padded,
        ROWS=BLOCK,
    )
    return lse
