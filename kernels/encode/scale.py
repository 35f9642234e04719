"""The scale rule and the sums of its search: part of the encode kernels. Definition: :func:`..reference.quantize`."""

from __future__ import annotations

import triton
import triton.language as tl

from .nearest import nearest
from .plan import TILE_FIELDS

TINY = 1e-30  # below it a vector counts as zero: its float16 scale would be, too
_N = tl.constexpr(TILE_FIELDS)


@triton.jit
def _sums(a, b, c, lookup, START: tl.constexpr, SIZE: tl.constexpr, FLAT: tl.constexpr):
    """Sums over a tile's channels of ``w a b`` and ``w a c``, w the weights."""
    if FLAT:
        w = tl.load(lookup + START)
        ab, ac = w * tl.sum(a * b, 1), w * tl.sum(a * c, 1)
    else:
        wa = tl.load(lookup + START + tl.arange(0, SIZE))[None, :] * a
        ab, ac = tl.sum(wa * b, 1), tl.sum(wa * c, 1)
    return ab, ac


@triton.jit
def sums_of_squares(u, lookup, START: tl.constexpr, SIZE: tl.constexpr, FLAT: tl.constexpr):
    """Sums over a tile's channels of ``u u`` and ``w u u``."""
    square = u * u
    plain = tl.sum(square, 1)
    if FLAT:
        weighted = plain * tl.load(lookup + START)
    else:
        weighted = tl.sum(square * tl.load(lookup + START + tl.arange(0, SIZE))[None, :], 1)
    return plain, weighted


@triton.jit
def gain(mean, y, lookup, START: tl.constexpr, SIZE: tl.constexpr, FLAT: tl.constexpr):
    """By how much of a tile's weighted energy ``mean - y`` is less than ``y``."""
    my, mm = _sums(mean, y, mean, lookup, START, SIZE, FLAT)
    return 2 * my - mm


@triton.jit
def try_factor(
    us,
    factor,
    lookup,
    cells,
    TILES: tl.constexpr,
    PADDED: tl.constexpr,
    BOOKS: tl.constexpr,
    COUNT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The weighted sums of e e and e c, with c the scaled codewords of u and e what they miss."""
    ee, ec = tl.zeros(factor.shape, tl.float32), tl.zeros(factor.shape, tl.float32)
    for t in tl.static_range(len(TILES) // _N):
        a = tl.abs(us[t])
        c, _ = nearest(
            a, factor[:, None], lookup, cells, TILES[_N * t], TILES[_N * t + 1], TILES[_N * t + 2], PADDED, BOOKS,
            COUNT, INTERPRET,
        )  # fmt: skip
        e = a - c
        part_ee, part_ec = _sums(e, e, c, lookup, TILES[_N * t], TILES[_N * t + 1], TILES[_N * t + 3])
        ee += part_ee
        ec += part_ec
    return ee, ec


@triton.jit
def correct(ee, ec, uu, RULE: tl.constexpr):
    """The scale rule's correction d and the error left, from sums over e and c where u = c + e.

    The corrected scale is ``1 + d`` times the one in c. Unlike sums of u and c, these do not cancel at high widths.
    """
    cc = uu - 2 * ec - ee
    cc = tl.where(cc > 0, cc, 1.0)
    if RULE == "norm":
        d = (2 * ec + ee) / (cc + tl.sqrt(uu * cc))
    else:
        d = (ec + ee) / tl.where(cc + ec > 0, cc + ec, 1.0)
    return d, ee + d * (d * cc - 2 * ec)


@triton.jit
def of_first_best(error, value, TRIES: tl.constexpr):
    """``value [R]`` of the first row with the least error among each TRIES rows, in all of them."""
    GROUPS: tl.constexpr = error.shape[0] // TRIES
    first = tl.argmin(tl.reshape(error, [GROUPS, TRIES]), 1)[:, None] == tl.arange(0, TRIES)[None, :]
    best = tl.sum(tl.where(first, tl.reshape(value, [GROUPS, TRIES]), 0.0), 1)
    return tl.reshape(tl.broadcast_to(best[:, None], [GROUPS, TRIES]), [GROUPS * TRIES])
