"""Rotation of queries to the stored channels, by one d x d matrix for each KV head.

Encode rotates keys and values by :func:`project` in its own kernels, and the step's queries beside them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dependent import dependent, wait_and_release
from .rope import load_turned
from .tables import Side

BLOCK = 16  # rows per program, the least a tensor-core dot takes
FEW_ROWS = 256  # of a head, up to which a program takes so few, and a part of the columns
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
def project(
    x,
    at,
    live,
    matrix,
    head,
    first,
    TILES: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    angles=None,
    ROTARY: tl.constexpr = 0,
):
    """The rows of DIM channels at ``x + at`` times the head's matrix (in, out): a tuple of float32 tiles.

    angles: of each row ``[rows, 1]``, by which its first ROTARY channels are turned before (:mod:`.rope`).

    TILES: ``plan.EncodePlan.flat_tiles``, of which only first channel, from ``first``, and size of each tile matter.
    The matrix is ``[H, 2, PADDED, PADDED]`` bfloat16 pieces, (out, in), for bfloat16 rows, else float32
    ``[H, PADDED, PADDED]``.
    """
    SPLIT: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    # All of a common matrix at once: it is one trip to the cache.
    BLOCK_K: tl.constexpr = (PADDED if PADDED <= 128 else 64) if SPLIT else 32 if PADDED >= 32 else PADDED
    matrix += head * PADDED * PADDED * (2 if SPLIT else 1)
    ys = ()
    for t in tl.static_range(len(TILES) // 5):
        ys += (tl.full([live.shape[0], TILES[5 * t + 1]], 0.0, tl.float32),)
    for start in range(0, DIM, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        inside = live[:, None] & (channel < DIM)[None, :]
        part = load_turned(x, at[:, None], channel[None, :], inside, angles, ROTARY)
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
    angles=None,
    ROTARY: tl.constexpr = 0,
):
    """A block of ``y[t, j] = x[t, j] @ matrix[j // GROUP]``, float32: COLUMNS channels from ``first``. angles
    ``[T, ROTARY]``: by which a token's x is turned before."""
    r = block * ROWS + tl.arange(0, ROWS)
    token, j = (r // GROUP).to(tl.int64), head * GROUP + r % GROUP
    live = r < num_rows
    tiles: tl.constexpr = (0, COLUMNS, 0, 0, 0)
    at, own = token * stride_xt + j * stride_xh, None
    if ROTARY:
        own = angles + tl.where(live, token, 0)[:, None] * ROTARY
    tile = project(x, at, live, matrix, head, first, tiles, DIM, PADDED, own, ROTARY)[0]
    channel = first + tl.arange(0, COLUMNS)
    to = token * stride_yt + j * stride_yh
    tl.store(y + to[:, None] + channel[None, :], tile, mask=live[:, None] & (channel < DIM)[None, :])


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
@triton.jit(do_not_specialize=["num_rows"])
def _rotate_kernel(
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


def tiling(side: Side, rows: int) -> tuple[int, int]:
    """Rows of a head, and columns, of a program. Few rows are a matter of reading the matrix, whose columns are spread
    over programs."""
    return (64, side.padded) if rows > FEW_ROWS else (BLOCK, min(32, side.padded))


def tokens_of_each_binary(group: int) -> tuple[int, int]:
    """A number of tokens for each one that :func:`rotate_queries` takes."""
    return 1, FEW_ROWS // group + 1


def rotate_queries(side: Side, x: torch.Tensor, group: int) -> torch.Tensor:
    """Queries ``x [T, group * H, dim]`` times the ``back`` matrices of the keys, float32."""
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rows = x.shape[0] * group
    block, columns = tiling(side, rows)
    _rotate_kernel[(triton.cdiv(rows, block), side.back.shape[0], side.padded // columns)](
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
