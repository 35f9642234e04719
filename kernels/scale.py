"""The scale rule and the sums of its search: part of the encode kernel. Definition: :func:`.naive.quantize`.

A value that belongs to a scale is a tuple of ``[R]`` tensors, one for each of the head's NORMS scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .nearest import nearest

FP16_MAX = 65504.0
TINY = 1e-30  # below it a vector counts as zero: its float16 scale would be, too


@triton.jit
def to_channels(values, norm, NORMS: tl.constexpr):
    """Per row and scale values to the channels ``norm`` of a tile; 1 where a channel is not stored."""
    if NORMS == 1:
        out = values[0][:, None]
    else:
        out = tl.full([values[0].shape[0], norm.shape[0]], 1.0, tl.float32)
        for n in tl.static_range(NORMS):
            out = tl.where((norm == n)[None, :], values[n][:, None], out)
    return out


@triton.jit
def sums(
    a,
    b,
    c,
    channels,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    FLAT: tl.constexpr,
    PADDED: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Per scale the sums over a tile's channels of ``w a b`` and ``w a c``, w the weights."""
    if NORMS == 1 and FLAT:
        w0 = tl.load(channels + START)
        ab = (w0 * tl.sum(a * b, 1),)
        ac = (w0 * tl.sum(a * c, 1),)
    else:
        channel = START + tl.arange(0, SIZE)
        wa = tl.load(channels + channel)[None, :] * a
        norm = tl.load(channels + PADDED + channel)
        ab, ac = (), ()
        for n in tl.static_range(NORMS):
            wan = wa
            if NORMS > 1:
                wan = tl.where((norm == n)[None, :], wa, 0.0)
            ab += (tl.sum(wan * b, 1),)
            ac += (tl.sum(wan * c, 1),)
    return ab, ac


@triton.jit
def sums_of_squares(
    u,
    channels,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    FLAT: tl.constexpr,
    PADDED: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Per scale the sums over a tile's channels of ``u u`` and ``w u u``."""
    channel = START + tl.arange(0, SIZE)
    square = u * u
    if NORMS == 1 and FLAT:
        plain = (tl.sum(square, 1),)
        weighted = (plain[0] * tl.load(channels + START),)
    else:
        w = tl.load(channels + channel)[None, :]
        norm = tl.load(channels + PADDED + channel)
        plain, weighted = (), ()
        for n in tl.static_range(NORMS):
            member = tl.where((norm == n)[None, :], square, 0.0)
            plain += (tl.sum(member, 1),)
            weighted += (tl.sum(member * w, 1),)
    return plain, weighted


@triton.jit
def add(a, b, NORMS: tl.constexpr):
    out = ()
    for n in tl.static_range(NORMS):
        out += (a[n] + b[n],)
    return out


@triton.jit
def try_factor(
    us,
    factor,
    channels,
    cells,
    TILES: tl.constexpr,
    PADDED: tl.constexpr,
    NORMS: tl.constexpr,
    BOOKS: tl.constexpr,
    COUNT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Per scale the weighted sums of e e and e c, with c the scaled codewords of u and e what they miss."""
    ees = (tl.zeros(factor.shape, tl.float32),) * NORMS
    ecs = (tl.zeros(factor.shape, tl.float32),) * NORMS
    for t in tl.static_range(len(TILES) // 7):
        a = tl.abs(us[t])
        c, _ = nearest(
            a,
            factor[:, None],
            channels,
            cells,
            TILES[7 * t],
            TILES[7 * t + 1],
            TILES[7 * t + 2],
            PADDED,
            BOOKS,
            COUNT,
            INTERPRET,
        )
        e = a - c
        ee, ec = sums(e, e, c, channels, TILES[7 * t], TILES[7 * t + 1], TILES[7 * t + 3], PADDED, NORMS)
        ees, ecs = add(ees, ee, NORMS), add(ecs, ec, NORMS)
    return ees, ecs


@triton.jit
def correct(ee, ec, uu, RULE: tl.constexpr):
    """The scale rule's correction d and the error left, from sums over e and c where u = c + e.

    The corrected scale is ``1 + d`` times the one in c. Unlike sums of u and c, these do not cancel at high widths.
    """
    cc = uu - 2 * ec - ee
    cc = tl.where(cc > 0, cc, 1.0)
    if RULE == "lsq":
        d = ec / cc
    elif RULE == "norm":
        d = (2 * ec + ee) / (cc + tl.sqrt(uu * cc))
    else:
        d = (ec + ee) / tl.where(cc + ec > 0, cc + ec, 1.0)
    return d, ee + d * (d * cc - 2 * ec)


@triton.jit
def of_first_best(error, value, SLOTS: tl.constexpr):
    """``value [R]`` of the first row with the least error among each SLOTS rows, in all of them."""
    GROUPS: tl.constexpr = error.shape[0] // SLOTS
    first = tl.argmin(tl.reshape(error, [GROUPS, SLOTS]), 1)[:, None] == tl.arange(0, SLOTS)[None, :]
    best = tl.sum(tl.where(first, tl.reshape(value, [GROUPS, SLOTS]), 0.0), 1)
    return tl.reshape(tl.broadcast_to(best[:, None], [GROUPS, SLOTS]), [GROUPS * SLOTS])
