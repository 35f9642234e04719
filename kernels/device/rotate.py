"""Rotation of queries to the stored channels, by one d x d matrix for each KV head.

Encode rotates keys and values by :func:`project` in its own kernels, and the step's queries beside them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dependent import dependent, wait_and_release
from .page_mean import flag_gain, fold_and_store, load_mean, narrowed
from .tables import ColumnTables, Tables

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
def _load_rows(x, at, live, channel, DIM: tl.constexpr):
    return tl.load(x + at[:, None] + channel[None, :], mask=live[:, None] & (channel < DIM)[None, :], other=0.0)


@triton.jit
def flag_rows(x, at, live, head, page, means, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Which rows of keys of ``page [R]`` are flagged (see :mod:`.page_mean`)."""
    BLOCK: tl.constexpr = PADDED if PADDED <= 64 else 64
    gain = tl.zeros([live.shape[0]], tl.float32)
    for start in range(0, DIM, BLOCK):
        channel = (start + tl.arange(0, BLOCK))[None, :]
        key = _load_rows(x, at, live, start + tl.arange(0, BLOCK), DIM).to(tl.float32)
        mean = load_mean(means, head, page[:, None], channel, PADDED // 2)
        gain += tl.sum(flag_gain(means, head, channel, key, mean, PADDED // 2), 1)
    return gain > 0


@triton.jit
def project(
    x, at, live, matrix, head, first, TILES: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    page=None, flag=None, means=None,
):  # fmt: skip
    """The rows of DIM channels at ``x + at`` times the head's matrix (in, out): a tuple of float32 tiles.

    page ``[R]``, flag ``[R]``, means: of keys, which are taken from their page's mean where they are flagged.
    TILES: ``plan.EncodePlan.flat_tiles``, of which only first channel, from ``first``, and size of each tile matter.
    The matrix is ``[H, 2, PADDED, PADDED]`` bfloat16 pieces, (out, in), for bfloat16 rows, else float32
    ``[H, PADDED, PADDED]``.
    """
    SPLIT: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    # All of a common matrix at once: it is one trip to the cache. Means beside it are more than registers hold.
    WHOLE: tl.constexpr = PADDED <= (128 if means is None else 64)
    BLOCK_K: tl.constexpr = (PADDED if WHOLE else 64) if SPLIT else 32 if PADDED >= 32 else PADDED
    matrix += head * PADDED * PADDED * (2 if SPLIT else 1)
    ys = ()
    for t in tl.static_range(len(TILES) // 5):
        ys += (tl.full([live.shape[0], TILES[5 * t + 1]], 0.0, tl.float32),)
    if means is not None:
        # As numbers: the compiler cannot bring truth values into the layout of a product's operand.
        share, sign = tl.where(flag, 1.0, 0.0), tl.where(flag, -1.0, 1.0)
    for start in range(0, DIM, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        part = _load_rows(x, at, live, channel, DIM)
        if means is not None:
            mean = load_mean(means, head, page[:, None], channel[None, :], PADDED // 2)
            part = narrowed(mean * share[:, None] + part.to(tl.float32) * sign[:, None], part.dtype)
        sums = ()
        for t in tl.static_range(len(TILES) // 5):
            out = first + TILES[5 * t] + tl.arange(0, TILES[5 * t + 1])
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
    tiles: tl.constexpr = (0, COLUMNS, 0, 0, 0)
    tile = project(x, token * stride_xt + j * stride_xh, live, matrix, head, first, tiles, DIM, PADDED)[0]
    channel = first + tl.arange(0, COLUMNS)
    to = token * stride_yt + j * stride_yh
    tl.store(y + to[:, None] + channel[None, :], tile, mask=live[:, None] & (channel < DIM)[None, :])


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
@triton.jit(do_not_specialize=["num_rows"])
def _rotate_kernel(
    x,
    matrix,
    pairs,  # None without page means, as fold
    fold,
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
    if fold is not None:
        if first == PADDED:
            fold_and_store(
                x, pairs, fold, y, num_rows, stride_xt, stride_xh, stride_yt, stride_yh, head, tl.program_id(0),
                GROUP, DIM, PADDED // 2, ROWS,
            )  # fmt: skip
            return
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


def rotate_queries(tables: Tables, x: torch.Tensor, group: int) -> torch.Tensor:
    """Queries ``x [T, group * H, dim]`` times the ``back`` matrices of the keys, float32.

    For keys with page means the queries' part in them follows: ``[T, group * H, ColumnTables.query_channels]``.
    """
    side, means = tables.k, tables.means if isinstance(tables, ColumnTables) else None
    channels = side.dim if means is None else side.dim + 2 * means.blocks
    y = torch.empty(*x.shape[:2], channels, dtype=torch.float32, device=x.device)
    rows = x.shape[0] * group
    # Few rows are a matter of reading the matrix: its columns are spread over programs.
    block, columns = (64, side.padded) if rows > 256 else (16, min(32, side.padded))
    parts = side.padded // columns + (means is not None)
    _rotate_kernel[(triton.cdiv(rows, block), side.back.shape[0], parts)](
        x,
        side.back_pieces if x.dtype == torch.bfloat16 else side.back,
        None if means is None else means.pairs,
        None if means is None else means.fold,
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
