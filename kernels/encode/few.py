"""Encode a few tokens: the kernel of a decode step, where latency is everything.

A program takes one key or value. Beside a model's weights, which pass through the cache between two layers, neither
tables nor instructions are ever in it: whatever a program reads is asked for at once, at its start, no look-up
follows, and loops stay loops. So the nearest level is found by bisection over the codebook's own polynomial, and codes
become words by shifts and sums over the 16 columns of their segments (:mod:`..format.columns`). All factors of the
scale search are tried at the same time, a warp each; a token is multiplied by its matrix in float32, without a tensor
core.

Larger batches are the business of the kernel in :mod:`.many`, which agrees but for values that lie on a threshold to
float32 rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.address import block_base
from ..device.dependent import wait_and_release
from ..device.page_mean import stored_at
from ..device.rotate import project_and_store
from ..format.codec import SCALE_MAX, V_SCALE_MAX
from ..format.columns import COLUMNS
from ..format.layout import BLOCK_SLOTS
from ..format.page_mean import SCALE_MIN
from .layers import of_layer
from .plan import COEFFICIENTS
from .scale import TINY, correct

_COLUMNS = tl.constexpr(COLUMNS)
_SLOTS = tl.constexpr(BLOCK_SLOTS)
_TERMS = tl.constexpr(COEFFICIENTS)
_MATRIX = tl.constexpr(1 << 14)  # entries of a matrix that a program holds in registers
_SCALE_MAX = tl.constexpr(SCALE_MAX)
_V_SCALE_MAX = tl.constexpr(V_SCALE_MAX)
_TINY = tl.constexpr(TINY)
_SCALE_MIN = tl.constexpr(SCALE_MIN)


@triton.jit
def _multiply(x, loc, matrix, mean_at, DIM: tl.constexpr, PADDED: tl.constexpr, DEPENDENT: tl.constexpr):
    """The vector at ``x`` times a matrix (in, out), float32 ``[PADDED]``, what lies at ``loc``, and the mean at
    ``mean_at``, 0 where that is None.

    Waits for the kernel ahead once the matrix and the mean are under way.
    """
    BLOCK: tl.constexpr = PADDED if PADDED * PADDED <= _MATRIX else _MATRIX // PADDED
    out = tl.arange(0, PADDED)
    y = tl.zeros([PADDED], tl.float32)
    slot, mean = 0, 0.0
    for start in tl.static_range(0, PADDED, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        part = tl.load(matrix + channel[:, None] * PADDED + out[None, :])
        if start == 0:
            if mean_at is not None:
                mean = tl.load(mean_at + out)
            wait_and_release(DEPENDENT)
            slot = tl.load(loc).to(tl.int64)
        value = tl.load(x + channel, mask=channel < DIM, other=0.0).to(tl.float32)
        y += tl.sum(part * value[:, None], 0)
    return y, slot, mean


@triton.jit
def _odd(z, coefficients):
    """The odd polynomial of these coefficients, ``[P]`` each, at ``z [.., P]``."""
    square = z * z
    y = coefficients[_TERMS - 1][None, :] * square
    for i in tl.static_range(1, _TERMS - 1):
        y = (y + coefficients[_TERMS - 1 - i][None, :]) * square
    return (y + coefficients[0][None, :]) * z


@triton.jit
def _coefficients(channels, FIRST: tl.constexpr, PADDED: tl.constexpr):
    out = ()
    for i in tl.static_range(_TERMS):
        out += (tl.load(channels + (FIRST + i) * PADDED + tl.arange(0, PADDED)),)
    return out


@triton.jit
def _store_bin(block, bits, move, codes, within, BIN: tl.constexpr, BINS: tl.constexpr, PADDED: tl.constexpr):
    """One bin of a head's codes ``bits [PADDED]`` to slot ``within`` of a block. codes: the head's first byte."""
    WORDS: tl.constexpr = BINS[BIN][1]
    moved = ((bits >> (move & 15)) & (move >> 8)) << (move >> 4 & 15)
    word = tl.sum(tl.reshape(moved, [PADDED // _COLUMNS, _COLUMNS]), 0)
    if WORDS < _COLUMNS:
        word = tl.sum(tl.reshape(word, [_COLUMNS // WORDS, WORDS]), 0)
    to = (codes + BINS[BIN][0]) * (_SLOTS // 2) + within * WORDS
    tl.store(block + to + tl.arange(0, WORDS), word.to(tl.int16))


@triton.jit
def _encode(
    x,
    words,  # the rows as int16 and float16
    scales,
    loc,
    matrix,
    channels,
    pack,
    search,
    num_factors,
    token,
    places,  # of the tokens' vectors, or None: one after another
    positions,  # None without page means
    means,  # in stored channels
    heads,
    stride_t,
    stride_h,
    row_bytes,
    codes_at,  # first byte of head 0's codes
    code_bytes,
    norm_offset,
    pad_at,  # first byte of the row's padding, or row_bytes
    head,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,  # positions of a page; 0: vectors have no mean
    BITS: tl.constexpr,  # widest code
    BINS: tl.constexpr,  # (byte, words, columns per word) of each bin
    RULE: tl.constexpr,
    TRIES: tl.constexpr,  # num_factors and up, a power of two
    VALUES: tl.constexpr,  # whether these are values, which are also whose program writes the padding
    DEPENDENT: tl.constexpr,
):
    mean_at = None
    if PAGE > 0:
        # Asked for first, since the mean's place depends on it.
        mean_at = means + stored_at(tl.load(positions + token).to(tl.int32), head, heads, PAGE, PADDED)
    channel = tl.arange(0, PADDED)
    channels += head * (4 + 2 * _TERMS) * PADDED
    weight = tl.load(channels + channel)
    share = tl.load(channels + PADDED + channel)  # in the mean of squares
    half = tl.load(channels + 2 * PADDED + channel)
    step = tl.load(channels + 3 * PADDED + channel)
    thresholds = _coefficients(channels, 4, PADDED)
    levels = _coefficients(channels, 4 + _TERMS, PADDED)
    moves = ()
    for b in tl.static_range(len(BINS)):
        moves += (tl.load(pack + (head * len(BINS) + b) * PADDED + channel),)
    index = tl.arange(0, TRIES)
    factor = tl.load(search + index, mask=index < num_factors, other=1.0)
    place = token
    if places is not None:
        place = tl.maximum(tl.load(places + token), 0)
    x += place.to(tl.int64) * stride_t + head * stride_h
    matrix += head * PADDED * PADDED
    y, slot, mean = _multiply(x, loc + token, matrix, mean_at, DIM, PADDED, DEPENDENT)
    if PAGE > 0:
        flag = tl.sum(weight * mean * (2 * y - mean), 0) > 0
        y = tl.where(flag, mean - y, y)

    # The mean of squares is taken of y / max|y|, so that no input overflows or underflows it.
    top = tl.maximum(tl.max(tl.abs(y), 0), _TINY)
    scaled = y * (1.0 / top)
    rms = tl.sqrt(tl.sum(scaled * scaled * share, 0))
    inverse = tl.where(rms > 0, 1.0 / tl.where(rms > 0, rms, 1.0), 0.0)
    u = scaled * inverse
    total = tl.sum(u * u * weight, 0)

    # Codes count from zero up, from the middle of the codebook: bit by bit, from the highest.
    size = tl.abs(u)[None, :] + tl.zeros([TRIES, PADDED], tl.float32)
    seen = size * (1.0 / factor)[:, None]
    code = tl.zeros([TRIES, PADDED], tl.float32)
    bit = (1 << BITS) * 0.25
    for _ in range(BITS - 1):
        trial = code + bit
        above = (trial < half[None, :]) & (seen > _odd(trial * step[None, :], thresholds))
        code = tl.where(above, trial, code)
        bit *= 0.5
    level = _odd((code + 0.5) * step[None, :], levels) * factor[:, None]
    error = size - level
    weighted = error * weight[None, :]
    d, left = correct(tl.sum(error * weighted, 1), tl.sum(level * weighted, 1), total, RULE)
    left = tl.where(index < num_factors, left, float("inf"))
    best = index == tl.argmin(left, 0)
    scale = tl.sum(tl.where(best, factor + factor * d, 0.0), 0) * (rms * top)
    most: tl.constexpr = _V_SCALE_MAX if VALUES else _SCALE_MAX
    scale = tl.where(rms > 0, tl.minimum(scale, most), 0.0)
    code = tl.sum(tl.where(best[:, None], code, 0.0), 0)
    bits = tl.where(u > 0, half + code, tl.maximum(half - 1.0 - code, 0.0)).to(tl.int32)

    block, within = block_base(slot, row_bytes // 2), slot % _SLOTS
    for b in tl.static_range(len(BINS)):
        _store_bin(words + block, bits, moves[b], codes_at + head * code_bytes, within, b, BINS, PADDED)
    side: tl.constexpr = 1 if VALUES else 0
    to = block + (norm_offset + 4 * head) * (_SLOTS // 2) + within * 2 + side
    if PAGE > 0:
        scale = tl.where(flag, -tl.maximum(scale, _SCALE_MIN), scale)
    tl.store(scales + to, scale.to(tl.float16))
    if VALUES:
        if head == 0:
            count = (row_bytes - pad_at) // 2
            word = tl.arange(0, 4)
            to = block + pad_at * (_SLOTS // 2) + within * count
            tl.store(words + to + word, tl.zeros([4], tl.int16), mask=word < count)


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
_FREE = ["num_factors", "num_tokens", "num_queries", "heads", "row_bytes", "norm_offset", "pad_at"]
_FREE += ["k_code_bytes", "k_at", "v_code_bytes", "v_at"]


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["loc", "positions", "places"])
def encode_few_kernel(
    k,  # [T, H, DIM]
    v,  # [T, H, V_DIM]
    q,  # [T, H * GROUP, DIM], or None
    rotated,  # the same, float32
    words,
    scales,
    loc,
    positions,  # [T]; this and the means None where keys have none
    means,  # [pages, H, PADDED], in stored channels
    layers,  # int64 [L, 10]: addresses of what each of several layers has (.layers); None: of this one alone
    places,  # [T], of the tokens' keys and values, or None: one after another
    k_matrix,
    k_channels,
    k_pack,
    v_matrix,
    v_channels,
    v_pack,
    q_matrix,
    search,
    num_factors,
    num_tokens,
    num_queries,  # num_tokens * GROUP
    heads,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_qt,
    stride_qh,
    stride_rt,
    stride_rh,
    row_bytes,
    norm_offset,
    pad_at,
    k_at,
    k_code_bytes,
    v_at,
    v_code_bytes,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    V_BITS: tl.constexpr,
    V_BINS: tl.constexpr,
    RULE: tl.constexpr,
    TRIES: tl.constexpr,
    GROUP: tl.constexpr,  # 0: no query
    ROWS: tl.constexpr,  # queries of a program, and channels
    CHANNELS: tl.constexpr,
    PAGE: tl.constexpr,  # 0: keys have no means
    DEPENDENT: tl.constexpr,
):
    head, token = tl.program_id(0) % heads, tl.program_id(0) // heads
    if layers is not None:
        k, v, words, scales, k_matrix, k_channels, k_pack, v_matrix, v_channels, v_pack, means = of_layer(
            layers, tl.program_id(2), k, v, words, scales, k_matrix, k_channels, k_pack, v_matrix, v_channels, v_pack,
            means,
        )  # fmt: skip
    if token < num_tokens:
        _encode(
            k, words, scales, loc, k_matrix, k_channels, k_pack, search, num_factors, token, places, positions, means,
            heads, stride_kt, stride_kh, row_bytes, k_at, k_code_bytes, norm_offset, pad_at, head,
            DIM, PADDED, PAGE, BITS, BINS, RULE, TRIES, False, DEPENDENT,
        )  # fmt: skip
    elif token < 2 * num_tokens:
        _encode(
            v, words, scales, loc, v_matrix, v_channels, v_pack, search, num_factors, token - num_tokens, places, None,
            None, heads, stride_vt, stride_vh, row_bytes, v_at, v_code_bytes, norm_offset, pad_at, head,
            V_DIM, V_PADDED, 0, V_BITS, V_BINS, RULE, TRIES, True, DEPENDENT,
        )  # fmt: skip
    elif GROUP > 0:
        part = token - 2 * num_tokens
        rows, channels = part // (PADDED // CHANNELS), part % (PADDED // CHANNELS)
        wait_and_release(DEPENDENT)
        project_and_store(
            q, q_matrix, rotated, num_queries, stride_qt, stride_qh, stride_rt, stride_rh, head, rows,
            channels * CHANNELS, GROUP, DIM, PADDED, ROWS, CHANNELS,
        )  # fmt: skip
