"""Nearest codewords in registers: part of the encode kernel. Codebooks and tiles are those of :mod:`.plan`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest_in_chain(a, factor, BITS: tl.constexpr, BOOKS: tl.constexpr):
    """Nearest of a small codebook's magnitudes times ``factor``, and its code from zero up, by every threshold.

    Sums of steps, since a product with the comparison's 0 or 1 takes the pipe that comparisons leave idle.
    """
    c = tl.zeros(a.shape, tl.float32) + BOOKS[16 * BITS] * factor
    code = tl.zeros(a.shape, tl.float32)
    for j in tl.static_range(1, 1 << (BITS - 1)):
        above = (a > BOOKS[16 * BITS + 8 + j] * factor).to(tl.float32)
        step = tl.zeros(a.shape, tl.float32) + (BOOKS[16 * BITS + j] - BOOKS[16 * BITS + j - 1]) * factor
        c = tl.fma(above, step, c)
        code += above
    return c, code


@triton.jit
def _nearest_in_cells(a, factor, start, scale, cells, COUNT: tl.constexpr, INTERPRET: tl.constexpr):
    """The same for any codebook, by one look-up: a cell holds at most one threshold."""
    x = a * (1.0 / factor)
    at = tl.minimum(tl.floor(x * scale[None, :]), COUNT - 1.0) + start[None, :]
    record = cells + at.to(tl.int32) * 4
    if INTERPRET:
        edge, below, above, code = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    else:  # a plain load would bring the tile to another layout through shared memory
        edge, below, above, code = tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,l",
            [record.to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    over = x > edge
    return tl.where(over, above, below) * factor, code + over.to(tl.float32)


@triton.jit
def nearest(
    a,
    factor,
    lookup,
    cells,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PADDED: tl.constexpr,
    BOOKS: tl.constexpr,
    COUNT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Magnitudes times ``factor`` that are nearest to ``a`` in a tile of channels, and their codes from zero up."""
    if BITS > 0:
        c, code = _nearest_in_chain(a, factor, BITS, BOOKS)
    else:
        channel = START + tl.arange(0, SIZE)
        start, scale = tl.load(lookup + PADDED + channel), tl.load(lookup + 2 * PADDED + channel)
        c, code = _nearest_in_cells(a, factor, start, scale, cells, COUNT, INTERPRET)
    return c, code
