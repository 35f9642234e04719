"""Unpacking rows in columns: words become levels in the registers in which the tensor core wants them.

A tile's words are dequantized segment by segment (:mod:`..device.dequant`), each segment is multiplied by its 16 rows
of the head's matrix, and the sum is scaled and stored. The matrix stays in shared memory for all tiles of a
program; no level is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode.kernel import load_shifts, load_words, pick
from ..device.address import block_base
from ..device.dequant import segment_levels
from ..device.page_mean import load_vectors, turned
from ..format.columns import COLUMNS
from ..format.layout import BLOCK_SLOTS
from .copy_chunk import copy_chunk

MAX_CHANNELS = 128  # of a program: a tile's products and the matrix leave room for a second program then
_BLOCK = tl.constexpr(MAX_CHANNELS)
_COLUMNS = tl.constexpr(COLUMNS)
_SLOTS = tl.constexpr(BLOCK_SLOTS)


@triton.jit
def _channels(part, PADDED: tl.constexpr):
    BLOCK: tl.constexpr = PADDED if PADDED < _BLOCK else _BLOCK
    return part * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _unpack_side(
    rows16,
    rows32,
    column_shifts,
    indices,
    dest,
    positions,
    means,  # None: of values, and of keys without page means
    out,
    matrix,
    gain,
    head,
    part,  # of the channels
    first_tile,
    last_tile,
    num_tokens,
    first_byte,  # of the head's codes within a row
    stride_t,
    stride_h,
    ROW_BYTES: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    SCALE_BIT: tl.constexpr,
    PAGE: tl.constexpr,
    BINS: tl.constexpr,
    REPEAT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    POLYS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    BLOCK: tl.constexpr = PADDED if PADDED < _BLOCK else _BLOCK
    channel = _channels(part, PADDED)
    stored = tl.arange(0, _COLUMNS)
    back = ()
    for i in tl.static_range(len(SEGMENTS)):
        entry = head * PADDED * PADDED + (stored[:, None] + i * _COLUMNS) * PADDED + channel[None, :]
        back += (tl.load(matrix + entry),)
    shifts = load_shifts(column_shifts, BINS)
    head_gain = tl.load(gain + head)
    scale_at = (4 * head + NORM_OFFSET) // 4 * _SLOTS
    token = tl.arange(0, TOKENS)
    if means is not None:
        vectors = load_vectors(means, head, channel, PADDED // 2)
    # Within a tile 32 bits are enough, and are worked out once for all tiles.
    inside = token[:, None] * stride_t + channel[None, :]
    out += head * stride_h
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        n = tile * TOKENS + token
        live = n < num_tokens
        known = tl.minimum(n, num_tokens - 1)
        slot = tl.load(indices + known).to(tl.uint32)
        words = load_words(rows16, slot, first_byte, BINS, ROW_BYTES, 1)
        pair = tl.load(rows32 + scale_at + (block_base(slot, ROW_BYTES // 4) + slot % _SLOTS))
        scale = (pair >> SCALE_BIT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * head_gain

        dense = tl.zeros([TOKENS, BLOCK], tl.float32)
        for i in tl.static_range(len(SEGMENTS)):
            value = segment_levels(words, shifts, 1, i, SEGMENTS, REPEAT, POLYS, ASM)
            if not ASM:
                value = value.to(matrix.dtype.element_ty)
            dense = tl.dot(value, back[i], dense, input_precision="ieee")
        dense = dense * scale[:, None]
        if means is not None:
            flag = tl.where(scale < 0, 1.0, 0.0)[:, None]
            page = tl.load(positions + known).to(tl.int32) // PAGE
            first, top = tl.min(page, 0), tl.max(page, 0)
            if first == top:
                dense += flag * turned(means, vectors, top, PADDED // 2)[None, :]
            else:  # page by page: a mean for each token takes as many registers as the tile
                while first <= top:
                    own = tl.where((page == first)[:, None], flag, 0.0)
                    dense += own * turned(means, vectors, first, PADDED // 2)[None, :]
                    first = tl.min(tl.where(page > first, page, top + 1), 0)
        if out.dtype.element_ty == tl.float16:
            dense = tl.minimum(tl.maximum(dense, -65504.0), 65504.0)
        if dest is None:
            at = out + stride_t.to(tl.int64) * (tile * TOKENS) + inside
        else:
            at = out + (tl.load(dest + known).to(tl.int64) * stride_t)[:, None] + channel[None, :]
        tl.store(at, dense.to(out.dtype.element_ty), mask=live[:, None] & (channel < DIM)[None, :])


@triton.jit(
    do_not_specialize=["num_tokens", "tiles", "programs", "chunk_tokens"],
    do_not_specialize_on_alignment=["indices", "dest", "positions", "chunk_dest"],
)
def unpack_columns_kernel(
    rows16,  # the rows as int16 and int32
    rows32,
    column_shifts,  # int32 [4, 16]: for 1, 2, 4 and 8 columns per word
    k_kinds,  # int32 [H], each head's template; None where there is one
    indices,
    dest,  # None: token n goes to place n
    positions,  # [N]; this and what the means are of (..device.page_mean) None without them
    turns,
    mean_vectors,
    block_of,
    num_tokens,
    tiles,  # per program
    programs,  # of a side of a head that unpack; further ones copy a tile of the chunk each
    chunk_k,  # None: no chunk
    chunk_v,
    chunk_dest,  # None: the chunk follows the other tokens
    chunk_tokens,
    stride_ckt,
    stride_ckh,
    stride_cvt,
    stride_cvh,
    k_out,
    k_matrix,
    k_gain,
    v_out,
    v_matrix,
    v_gain,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    ROW_BYTES: tl.constexpr,
    K_STRIDE: tl.constexpr,  # bytes of a head's codes
    V_STRIDE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    PAGE: tl.constexpr,  # positions of a page; 0: keys have no means
    # What begins with K_ is a tuple over templates, of what V has once.
    K_BINS: tl.constexpr,
    V_BINS: tl.constexpr,
    K_REPEAT: tl.constexpr,
    V_REPEAT: tl.constexpr,
    K_SEGMENTS: tl.constexpr,
    V_SEGMENTS: tl.constexpr,
    K_POLY: tl.constexpr,
    V_POLY: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    # Heads run fastest: neighbours share the row's memory sectors.
    head = tl.program_id(0)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(num_tokens, TOKENS))
    part = tl.program_id(2) // 2
    copied = tl.program_id(1) - programs
    if tl.program_id(2) % 2 == 0:
        if part * _BLOCK >= K_DIM:
            return
        if chunk_k is not None:
            if copied >= 0:
                channel = _channels(part, K_PADDED)
                copy_chunk(
                    chunk_k, k_out, chunk_dest, num_tokens, copied, chunk_tokens, head, channel,
                    stride_ckt, stride_ckh, stride_kt, stride_kh, K_DIM, TOKENS,
                )  # fmt: skip
                return
        kind = 0 if k_kinds is None else tl.load(k_kinds + head)
        for i in tl.static_range(len(K_SEGMENTS)):
            if len(K_SEGMENTS) == 1 or kind == i:
                # Without tokens there are no positions.
                means = None if PAGE == 0 or positions is None else (turns, mean_vectors, block_of)
                _unpack_side(
                    rows16, rows32, column_shifts, indices, dest, positions, means, k_out, k_matrix, k_gain, head, part,
                    first, last, num_tokens, head * K_STRIDE, stride_kt, stride_kh, ROW_BYTES, NORM_OFFSET, 0, PAGE,
                    pick(K_BINS, i), pick(K_REPEAT, i), pick(K_SEGMENTS, i), pick(K_POLY, i),
                    K_DIM, K_PADDED, TOKENS, STAGES, ASM,
                )  # fmt: skip
    else:
        if part * _BLOCK >= V_DIM:
            return
        if chunk_v is not None:
            if copied >= 0:
                channel = _channels(part, V_PADDED)
                copy_chunk(
                    chunk_v, v_out, chunk_dest, num_tokens, copied, chunk_tokens, head, channel,
                    stride_cvt, stride_cvh, stride_vt, stride_vh, V_DIM, TOKENS,
                )  # fmt: skip
                return
        _unpack_side(
            rows16, rows32, column_shifts, indices, dest, None, None, v_out, v_matrix, v_gain, head, part, first, last,
            num_tokens, V_OFFSET + head * V_STRIDE, stride_vt, stride_vh, ROW_BYTES, NORM_OFFSET, 16, 0,
            V_BINS, V_REPEAT, V_SEGMENTS, V_POLY, V_DIM, V_PADDED, TOKENS, STAGES, ASM,
        )  # fmt: skip
