"""The encode kernel of prefill: blocks of rows of one head, keys or values, and of queries beside them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.address import block_base
from ..device.page_mean import stored_at
from ..device.rotate import project, project_and_store
from ..format.codec import SCALE_MAX, V_SCALE_MAX
from ..format.columns import COLUMNS
from ..format.layout import BLOCK_SLOTS
from ..format.page_mean import SCALE_MIN
from .layers import of_layer
from .nearest import nearest
from .plan import TILE_FIELDS
from .scale import TINY, correct, gain, of_first_best, sums_of_squares, try_factor

_COLUMNS = tl.constexpr(COLUMNS)
_SLOTS = tl.constexpr(BLOCK_SLOTS)
_SCALE_MAX = tl.constexpr(SCALE_MAX)
_V_SCALE_MAX = tl.constexpr(V_SCALE_MAX)
_TINY = tl.constexpr(TINY)
_SCALE_MIN = tl.constexpr(SCALE_MIN)
_N = tl.constexpr(TILE_FIELDS)
#: Adding 2^23 to a whole float32 puts the number into its low bits.
_WHOLE = tl.constexpr(8388608.0)


@triton.jit
def _store_bin(
    block,
    codes,
    pack,
    first,
    within,
    live,
    BIN: tl.constexpr,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One bin of the codes, a tile ``[R, size]`` of them after the other, to slots ``within [R]`` of their blocks.

    first: the head's first byte. pack: of the head, see :class:`.plan.EncodePlan`.
    """
    WORDS: tl.constexpr = BINS[BIN][1]
    ROWS: tl.constexpr = within.shape[0]
    word = tl.zeros([ROWS, _COLUMNS], tl.int32)
    for t in tl.static_range(len(TILES) // _N):
        if TILES[_N * t + 4] >> BIN & 1:
            move = tl.load(pack + BIN * PADDED + TILES[_N * t] + tl.arange(0, TILES[_N * t + 1]))[None, :]
            moved = ((codes[t] >> (move & 15)) & (move >> 8)) << (move >> 4 & 15)
            word += tl.sum(tl.reshape(moved, [ROWS, TILES[_N * t + 1] // _COLUMNS, _COLUMNS]), 1)
    if WORDS < _COLUMNS:
        word = tl.sum(tl.reshape(word, [ROWS, _COLUMNS // WORDS, WORDS]), 1)
    to = block + (first + BINS[BIN][0]) * (_SLOTS // 2) + within * WORDS
    tl.store(to[:, None] + tl.arange(0, WORDS)[None, :], word.to(tl.int16), mask=live[:, None])


@triton.jit
def _load_means(means, at, TILES: tl.constexpr):
    """Those that begin at ``at [R]``, in tiles ``[R, size]``."""
    out = ()
    for t in tl.static_range(len(TILES) // _N):
        out += (tl.load(means + (at[:, None] + (TILES[_N * t] + tl.arange(0, TILES[_N * t + 1]))[None, :])),)
    return out


@triton.jit
def _residual(ys, means, lookup, TILES: tl.constexpr):
    """What is coded of keys, tiles ``[R, size]``, and their flags: see :func:`..format.page_mean.residual`."""
    total = tl.zeros([ys[0].shape[0]], tl.float32)
    for t in tl.static_range(len(TILES) // _N):
        total += gain(means[t], ys[t], lookup, TILES[_N * t], TILES[_N * t + 1], TILES[_N * t + 3])
    flag, out = total > 0, ()
    for t in tl.static_range(len(TILES) // _N):
        out += (tl.where(flag[:, None], means[t] - ys[t], ys[t]),)
    return out, flag


@triton.jit
def _encode(
    x,
    words,  # the rows as int16 and float16
    scales,
    loc,
    matrix,
    lookup,
    pack,
    cells,
    search,
    num_factors,
    spread,  # rows per token: 1, or TRIES with a factor each
    num_tokens,
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
    TILES: tl.constexpr,
    BINS: tl.constexpr,
    BOOKS: tl.constexpr,
    COUNT: tl.constexpr,
    INTERPRET: tl.constexpr,
    RULE: tl.constexpr,
    TRIES: tl.constexpr,
    VALUES: tl.constexpr,  # whether these are values, which are also whose program writes the padding
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, trial = row // spread, row % spread
    live = token < num_tokens
    place = token
    if places is not None:
        place = tl.maximum(tl.load(places + token, mask=live, other=0), 0)
    at = place.to(tl.int64) * stride_t + head * stride_h
    lookup += head * 4 * PADDED
    if PAGE > 0:
        # Asked for before the product, which hides the way to them.
        position = tl.load(positions + token, mask=live, other=0).to(tl.int32)
        page_means = _load_means(means, stored_at(position, head, heads, PAGE, PADDED), TILES)
    ys = project(x, at, live, matrix, head, 0, TILES, DIM, PADDED)
    if PAGE > 0:
        ys, flag = _residual(ys, page_means, lookup, TILES)

    # Sums of squares are taken of y / max|y|, so that no input overflows or underflows them.
    top = tl.full([ROWS], _TINY, tl.float32)
    for t in tl.static_range(len(TILES) // _N):
        top = tl.maximum(top, tl.max(tl.abs(ys[t]), 1))
    inverse_top = 1.0 / top
    squares, weighted = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for t in tl.static_range(len(TILES) // _N):
        part, weighted_part = sums_of_squares(
            ys[t] * inverse_top[:, None], lookup, TILES[_N * t], TILES[_N * t + 1], TILES[_N * t + 3]
        )
        squares += part
        weighted += weighted_part

    # From here on y is in units of its rms.
    r = tl.sqrt(squares * (1.0 / DIM))
    inverse = tl.where(r > 0, 1.0 / tl.where(r > 0, r, 1.0), 0.0)
    rms, total = r * top, weighted * inverse * inverse
    us = ()
    for t in tl.static_range(len(TILES) // _N):
        us += (ys[t] * (inverse * inverse_top)[:, None],)

    best_error = tl.full([ROWS], float("inf"), tl.float32)
    best_factor = tl.full([ROWS], 1.0, tl.float32)
    best_scale = tl.zeros([ROWS], tl.float32)
    tries = tl.where(spread > 1, 1, num_factors)
    for i in range(tries):
        listed = trial + i < num_factors
        factor = tl.load(search + trial + i, mask=listed, other=1.0)
        ee, ec = try_factor(us, factor, lookup, cells, TILES, PADDED, BOOKS, COUNT, INTERPRET)
        d, error = correct(ee, ec, total, RULE)
        better = listed & (error < best_error)
        best_error = tl.where(better, error, best_error)
        best_factor = tl.where(better, factor, best_factor)
        best_scale = tl.where(better, factor + factor * d, best_scale)
    if TRIES > 1:
        if spread > 1:
            best_factor = of_first_best(best_error, best_factor, TRIES)
            best_scale = of_first_best(best_error, best_scale, TRIES)

    live = live & (trial == 0)
    slot = tl.load(loc + token, mask=live, other=0).to(tl.int64)
    block, within = block_base(slot, row_bytes // 2), slot % _SLOTS
    most: tl.constexpr = _V_SCALE_MAX if VALUES else _SCALE_MAX
    scale = tl.where(rms > 0, tl.minimum(best_scale * rms, most), 0.0)
    side: tl.constexpr = 1 if VALUES else 0
    to = block + (norm_offset + 4 * head) * (_SLOTS // 2) + within * 2 + side
    if PAGE > 0:
        scale = tl.where(flag, -tl.maximum(scale, _SCALE_MIN), scale)
    tl.store(scales + to, scale.to(tl.float16), mask=live)

    codes = ()
    for t in tl.static_range(len(TILES) // _N):
        _, code = nearest(
            tl.abs(us[t]), best_factor[:, None], lookup, cells, TILES[_N * t], TILES[_N * t + 1], TILES[_N * t + 2],
            PADDED, BOOKS, COUNT, INTERPRET,
        )  # fmt: skip
        if TILES[_N * t + 2] > 0:
            half = (1 << TILES[_N * t + 2]) * 0.5
        else:
            half = tl.load(lookup + 3 * PADDED + TILES[_N * t] + tl.arange(0, TILES[_N * t + 1]))[None, :]
        code = tl.where(us[t] > 0, half + code, half - 1.0 - code)
        codes += ((code + _WHOLE).to(tl.int32, bitcast=True),)
    for b in tl.static_range(len(BINS)):
        _store_bin(
            words + block, codes, pack + head * len(BINS) * PADDED, codes_at + head * code_bytes, within, live, b, BINS,
            TILES, PADDED,
        )  # fmt: skip

    if VALUES:
        if head == 0:
            count = (row_bytes - pad_at) // 2
            word = tl.arange(0, 4)
            padding = (block + pad_at * (_SLOTS // 2) + within * count)[:, None] + word[None, :]
            zero = tl.zeros([ROWS, 4], tl.int16)
            tl.store(words + padding, zero, mask=live[:, None] & (word < count)[None, :])


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
_FREE = ["num_factors", "spread", "num_tokens", "num_queries", "heads", "row_bytes", "norm_offset", "pad_at"]
_FREE += ["k_code_bytes", "k_at", "v_code_bytes", "v_at"]


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["loc", "positions", "places"])
def encode_many_kernel(
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
    cells,
    search,  # [num_factors]
    num_factors,
    spread,
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
    TILES: tl.constexpr,
    BINS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    V_TILES: tl.constexpr,
    V_BINS: tl.constexpr,
    BOOKS: tl.constexpr,
    COUNT: tl.constexpr,
    INTERPRET: tl.constexpr,
    RULE: tl.constexpr,
    TRIES: tl.constexpr,
    GROUP: tl.constexpr,  # 0: no query
    PAGE: tl.constexpr,  # 0: keys have no means
    ROWS: tl.constexpr,
):
    side, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    if layers is not None:
        k, v, words, scales, k_matrix, k_channels, k_pack, v_matrix, v_channels, v_pack, means = of_layer(
            layers, tl.program_id(2), k, v, words, scales, k_matrix, k_channels, k_pack, v_matrix, v_channels, v_pack,
            means,
        )  # fmt: skip
    if side == 0:
        if tl.program_id(0) * ROWS < num_tokens * spread:
            _encode(
                k, words, scales, loc, k_matrix, k_channels, k_pack, cells, search, num_factors, spread, num_tokens,
                places, positions, means, heads, stride_kt, stride_kh, row_bytes, k_at, k_code_bytes, norm_offset,
                pad_at, head, DIM, PADDED, PAGE, TILES, BINS, BOOKS, COUNT, INTERPRET, RULE, TRIES, False, ROWS,
            )  # fmt: skip
    elif side == 1:
        if tl.program_id(0) * ROWS < num_tokens * spread:
            _encode(
                v, words, scales, loc, v_matrix, v_channels, v_pack, cells, search, num_factors, spread, num_tokens,
                places, None, None, heads, stride_vt, stride_vh, row_bytes, v_at, v_code_bytes, norm_offset,
                pad_at, head, V_DIM, V_PADDED, 0, V_TILES, V_BINS, BOOKS, COUNT, INTERPRET, RULE, TRIES, True, ROWS,
            )  # fmt: skip
    elif GROUP > 0:
        project_and_store(
            q, q_matrix, rotated, num_queries, stride_qt, stride_qh, stride_rt, stride_rh, head, tl.program_id(0), 0,
            GROUP, DIM, PADDED, ROWS, PADDED,
        )  # fmt: skip
