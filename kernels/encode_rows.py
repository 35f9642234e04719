"""Encode a block of rows of one head: the body of the encode kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .address import block_base, byte_address
from .columns import COLUMNS
from .layout import BLOCK_SLOTS
from .nearest import nearest
from .scale import FP16_MAX, TINY, add, correct, of_first_best, sums_of_squares, to_channels, try_factor
from .turn import project

_COLUMNS = tl.constexpr(COLUMNS)
_SLOTS = tl.constexpr(BLOCK_SLOTS)
_FP16_MAX = tl.constexpr(FP16_MAX)
_TINY = tl.constexpr(TINY)
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

    first: the head's first byte. pack: of the head, see :class:`.plan.ColumnPlan`.
    """
    WORDS: tl.constexpr = BINS[BIN][1]
    ROWS: tl.constexpr = within.shape[0]
    word = tl.zeros([ROWS, _COLUMNS], tl.int32)
    for t in tl.static_range(len(TILES) // 7):
        if TILES[7 * t + 6] >> BIN & 1:
            move = tl.load(pack + BIN * PADDED + TILES[7 * t] + tl.arange(0, TILES[7 * t + 1]))[None, :]
            moved = ((codes[t] >> (move & 15)) & (move >> 8)) << (move >> 4 & 15)
            word += tl.sum(tl.reshape(moved, [ROWS, TILES[7 * t + 1] // _COLUMNS, _COLUMNS]), 1)
    if WORDS < _COLUMNS:
        word = tl.sum(tl.reshape(word, [ROWS, _COLUMNS // WORDS, WORDS]), 1)
    to = block + (first + BINS[BIN][0]) * (_SLOTS // 2) + within * WORDS
    tl.store(to[:, None] + tl.arange(0, WORDS)[None, :], word.to(tl.int16), mask=live[:, None])


@triton.jit
def _store_bytes(
    words,
    codes,
    place,
    first,
    slot,
    live,
    row_bytes,
    places,
    code_bytes,
    TILES: tl.constexpr,
    PLACE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    WORD: tl.constexpr,
):
    """The codes of a head in planes. They become bytes by dots with powers of two, exact in float16.

    0x6400 + code is the float16 number 1024 + code, whose 1024 falls out of the byte like everything else above it.
    """
    ROWS: tl.constexpr = slot.shape[0]
    for chunk in range(0, PLACE_BYTES, CHUNK):
        byte = chunk + tl.arange(0, CHUNK)
        packed = tl.zeros([ROWS, CHUNK], tl.float32)
        for t in tl.static_range(len(TILES) // 7):
            for p in tl.static_range(8):
                if TILES[7 * t + 5] >> p & 1:
                    value = ((codes[t] >> p).to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
                    line = TILES[7 * t + 4] + p * TILES[7 * t + 1] + tl.arange(0, TILES[7 * t + 1])
                    powers = tl.load(place + line[:, None] * PLACE_BYTES + byte[None, :])
                    packed = tl.dot(value, powers, packed)
        bits = packed.to(tl.int32) & 255
        if WORD > 1:
            lane = tl.arange(0, WORD)
            bits = tl.sum(tl.reshape(bits, [ROWS, CHUNK // WORD, WORD]) << (8 * lane)[None, None, :], 2)
        word = chunk // WORD + tl.arange(0, CHUNK // WORD)
        mask = live[:, None] & (word * WORD < code_bytes)[None, :]
        byte = first + tl.minimum(word * WORD, code_bytes - WORD)
        to_word = byte_address(slot[:, None], row_bytes, places, byte[None, :]) // WORD
        tl.store(words + to_word, bits.to(words.dtype.element_ty), mask=mask)


@triton.jit
def encode_rows(
    x,
    rows,
    scales,
    words,
    loc,
    matrix,
    channels,
    inverse_counts,
    place,
    pack,
    cells,
    search,
    num_factors,
    spread,
    num_tokens,
    stride_t,
    stride_h,
    row_bytes,
    places,
    code_bytes,
    offset,
    norm_offset,
    row_norms,
    first_norm,
    head,
    heads,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    NORMS: tl.constexpr,
    TILES: tl.constexpr,
    PLACE_ROWS: tl.constexpr,
    PLACE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    WORD: tl.constexpr,
    BINS: tl.constexpr,
    BOOKS: tl.constexpr,
    COUNT: tl.constexpr,
    INTERPRET: tl.constexpr,
    RULE: tl.constexpr,
    SLOTS: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, slot = row // spread, row % spread
    live = token < num_tokens
    at = token.to(tl.int64) * stride_t + head * stride_h
    channels += head * 5 * PADDED
    ys = project(x, at, live, matrix, head, 0, TILES, DIM, PADDED)

    # Sums of squares are taken of y / max|y|, so that no input overflows or underflows them.
    top = tl.full([ROWS], _TINY, tl.float32)
    for t in tl.static_range(len(TILES) // 7):
        top = tl.maximum(top, tl.max(tl.abs(ys[t]), 1))
    inverse_top = 1.0 / top
    squares = (tl.zeros([ROWS], tl.float32),) * NORMS
    weighted = (tl.zeros([ROWS], tl.float32),) * NORMS
    for t in tl.static_range(len(TILES) // 7):
        part, weighted_part = sums_of_squares(
            ys[t] * inverse_top[:, None], channels, TILES[7 * t], TILES[7 * t + 1], TILES[7 * t + 3], PADDED, NORMS
        )
        squares, weighted = add(squares, part, NORMS), add(weighted, weighted_part, NORMS)

    # From here on y is in units of its group's rms.
    rms, inverse, total = (), (), ()
    for n in tl.static_range(NORMS):
        mean_square = squares[n] * tl.load(inverse_counts + head * NORMS + n)
        r = tl.sqrt(mean_square)
        i = tl.where(r > 0, 1.0 / tl.where(r > 0, r, 1.0), 0.0)
        rms += (r * top,)
        inverse += (i * inverse_top,)
        total += (weighted[n] * i * i,)
    us = ()
    for t in tl.static_range(len(TILES) // 7):
        norm = tl.load(channels + PADDED + TILES[7 * t] + tl.arange(0, TILES[7 * t + 1]))
        us += (ys[t] * to_channels(inverse, norm, NORMS),)

    best_error = (tl.full([ROWS], float("inf"), tl.float32),) * NORMS
    best_factor = (tl.full([ROWS], 1.0, tl.float32),) * NORMS
    best_scale = (tl.zeros([ROWS], tl.float32),) * NORMS
    tries = tl.where(spread > 1, 1, num_factors)
    for i in range(tries):
        listed = slot + i < num_factors
        factor = tl.load(search + slot + i, mask=listed, other=1.0)
        ees, ecs = try_factor(us, factor, channels, cells, TILES, PADDED, NORMS, BOOKS, COUNT, INTERPRET)
        errors, factors, found = (), (), ()
        for n in tl.static_range(NORMS):
            d, error = correct(ees[n], ecs[n], total[n], RULE)
            better = listed & (error < best_error[n])
            errors += (tl.where(better, error, best_error[n]),)
            factors += (tl.where(better, factor, best_factor[n]),)
            found += (tl.where(better, factor + factor * d, best_scale[n]),)
        best_error, best_factor, best_scale = errors, factors, found

    if SLOTS > 1:
        if spread > 1:
            shared_factor, shared_scale = (), ()
            for n in tl.static_range(NORMS):
                shared_factor += (of_first_best(best_error[n], best_factor[n], SLOTS),)
                shared_scale += (of_first_best(best_error[n], best_scale[n], SLOTS),)
            best_factor, best_scale = shared_factor, shared_scale

    live = live & (slot == 0)
    slot = tl.load(loc + token, mask=live, other=0).to(tl.int64)
    block, within = block_base(slot, row_bytes // 2), slot % _SLOTS
    for n in tl.static_range(NORMS):
        s = tl.where(rms[n] > 0, tl.minimum(best_scale[n] * rms[n], _FP16_MAX), 0.0)
        to = block + (norm_offset + 2 * head * row_norms) * (_SLOTS // 2) + within * row_norms + first_norm + n
        tl.store(scales + to, s.to(tl.float16), mask=live)

    codes = ()
    for t in tl.static_range(len(TILES) // 7):
        channel = TILES[7 * t] + tl.arange(0, TILES[7 * t + 1])
        factor = to_channels(best_factor, tl.load(channels + PADDED + channel), NORMS)
        _, code = nearest(
            tl.abs(us[t]),
            factor,
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
        if TILES[7 * t + 2] > 0:
            half = (1 << TILES[7 * t + 2]) * 0.5
            code = tl.where(us[t] > 0, half + code, half - 1.0 - code)
        else:
            half = tl.load(channels + 4 * PADDED + channel)[None, :]
            code = tl.where(us[t] > 0, half + code, tl.maximum(half - 1.0 - code, 0.0))  # 0 where nothing is stored
        codes += ((code + _WHOLE).to(tl.int32, bitcast=True),)

    first = offset + head * code_bytes
    if len(BINS) > 0:
        pack += head * len(BINS) * PADDED
        for b in tl.static_range(len(BINS)):
            _store_bin(words + block, codes, pack, first, within, live, b, BINS, TILES, PADDED)
    else:
        _store_bytes(
            words, codes, place + head * PLACE_ROWS * PLACE_BYTES, first, slot, live, row_bytes, places, code_bytes,
            TILES, PLACE_BYTES, CHUNK, WORD,
        )  # fmt: skip

    if LAST:
        if head == 0:
            pad = tl.arange(0, 8)
            zero = tl.zeros([ROWS, 8], tl.uint8)
            here = offset + heads * code_bytes + pad
            pad_at = byte_address(slot[:, None], row_bytes, places, tl.minimum(here, row_bytes - 1)[None, :])
            tl.store(rows + pad_at, zero, mask=live[:, None] & (here < norm_offset)[None, :])
            here = norm_offset + heads * row_norms * 2 + pad
            pad_at = byte_address(slot[:, None], row_bytes, places, tl.minimum(here, row_bytes - 1)[None, :])
            tl.store(rows + pad_at, zero, mask=live[:, None] & (here < row_bytes)[None, :])
