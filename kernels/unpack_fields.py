"""Unpacking rows of any layout, which is data here: each code's fields are gathered byte by byte."""

from __future__ import annotations

import triton
import triton.language as tl

from .address import byte_address
from .unpack_chunk import copy_chunk


@triton.jit
def _unpack_side(
    rows,
    scales,
    levels,
    places,
    indices,
    dest,
    out,
    fields,
    book,
    norm_index,
    matrix,
    gain,
    head,
    first_tile,
    last_tile,
    num_tokens,
    row_bytes,
    first_byte,  # of the head's codes within a row
    first_scale,  # the byte where the head's scales for this side start within a row
    stride_t,
    stride_h,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    FIELDS: tl.constexpr,
    NORMS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One side of one head: decode a tile, turn it back, scale, scatter."""
    BLOCK: tl.constexpr = PADDED if PADDED <= 64 else 32  # else codes and product would not fit the registers
    channel = tl.arange(0, PADDED)
    head_gain = tl.load(gain + head)
    for tile in range(first_tile, last_tile):
        n = tile * TOKENS + tl.arange(0, TOKENS)
        live = n < num_tokens
        # Beyond the last token slot 0 is read, which always exists, and nothing is written.
        slot = tl.load(indices + n, mask=live, other=0).to(tl.int64)
        if NORMS == 1:
            scale = tl.load(scales + byte_address(slot, row_bytes, places, first_scale) // 2).to(tl.float32)
        else:
            scale = tl.zeros([TOKENS], tl.float32)
            for i in tl.static_range(NORMS):
                scale_at = byte_address(slot, row_bytes, places, first_scale + 2 * i) // 2
                scale = tl.maximum(scale, tl.abs(tl.load(scales + scale_at).to(tl.float32)))
            scale = tl.where(scale > 0, scale, 1.0)

        dense = tl.zeros([TOKENS, PADDED], tl.float32)
        for first in range(0, PADDED, BLOCK):
            stored = first + tl.arange(0, BLOCK)
            code = tl.zeros([TOKENS, BLOCK], tl.int32)
            for f in tl.static_range(FIELDS):
                field = tl.load(fields + (head * FIELDS + f) * PADDED + stored)
                byte = first_byte + (field & 0xFFFF)
                data = tl.load(rows + byte_address(slot[:, None], row_bytes, places, byte[None, :])).to(tl.int32)
                bits = (data >> ((field >> 16) & 7)[None, :]) & ((field >> 22) & 0xFF)[None, :]
                code += bits << ((field >> 19) & 7)[None, :]
            start = tl.load(book + head * PADDED + stored)
            value = tl.load(levels + start[None, :] + code)
            if NORMS > 1:
                # Several scales meet in one product: their ratios go on the codewords, the largest on the result.
                index = tl.load(norm_index + head * PADDED + stored)
                known = tl.maximum(index, 0)
                at = byte_address(slot[:, None], row_bytes, places, (first_scale + 2 * known)[None, :]) // 2
                part = tl.load(scales + at).to(tl.float32) / scale[:, None]
                value = (value * part).to(levels.dtype.element_ty)
            back = tl.load(matrix + head * PADDED * PADDED + stored[:, None] * PADDED + channel[None, :])
            dense = tl.dot(value, back, dense, input_precision="ieee")
        dense = dense * (scale * head_gain)[:, None]
        if out.dtype.element_ty == tl.float16:
            dense = tl.minimum(tl.maximum(dense, -65504.0), 65504.0)
        to = n.to(tl.int64)
        if dest is not None:
            to = tl.load(dest + n, mask=live, other=0).to(tl.int64)
        at = out + (to * stride_t + head * stride_h)[:, None] + channel[None, :]
        tl.store(at, dense.to(out.dtype.element_ty), mask=live[:, None] & (channel < DIM)[None, :])


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "tiles",
        "programs",
        "chunk_tokens",
        "row_bytes",
        "k_code_bytes",
        "v_code_bytes",
        "v_offset",
        "norm_offset",
        "row_norms",
        "v_first_norm",
    ],
    do_not_specialize_on_alignment=["indices", "dest", "chunk_dest"],
)
def unpack_fields_kernel(
    rows,  # uint8
    scales,  # the same memory as float16
    levels,
    places,
    indices,
    dest,  # None: token n goes to place n
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
    k_fields,
    k_book,
    k_norm_index,
    k_matrix,
    k_gain,
    v_out,
    v_fields,
    v_book,
    v_norm_index,
    v_matrix,
    v_gain,
    row_bytes,
    k_code_bytes,
    v_code_bytes,
    v_offset,
    norm_offset,
    row_norms,
    v_first_norm,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    K_FIELDS: tl.constexpr,
    K_NORMS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    V_FIELDS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # Heads run fastest: neighbours share the row's memory sectors.
    head = tl.program_id(0)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(num_tokens, TOKENS))
    first_scale = norm_offset + 2 * head * row_norms
    copied = tl.program_id(1) - programs
    if tl.program_id(2) == 0:
        if chunk_k is not None:
            if copied >= 0:
                channel = tl.arange(0, K_PADDED)
                copy_chunk(
                    chunk_k, k_out, chunk_dest, num_tokens, copied, chunk_tokens, head, channel,
                    stride_ckt, stride_ckh, stride_kt, stride_kh, K_DIM, TOKENS,
                )  # fmt: skip
                return
        _unpack_side(
            rows,
            scales,
            levels,
            places,
            indices,
            dest,
            k_out,
            k_fields,
            k_book,
            k_norm_index,
            k_matrix,
            k_gain,
            head,
            first,
            last,
            num_tokens,
            row_bytes,
            head * k_code_bytes,
            first_scale,
            stride_kt,
            stride_kh,
            K_DIM,
            K_PADDED,
            K_FIELDS,
            K_NORMS,
            TOKENS,
        )
    else:
        if chunk_v is not None:
            if copied >= 0:
                channel = tl.arange(0, V_PADDED)
                copy_chunk(
                    chunk_v, v_out, chunk_dest, num_tokens, copied, chunk_tokens, head, channel,
                    stride_cvt, stride_cvh, stride_vt, stride_vh, V_DIM, TOKENS,
                )  # fmt: skip
                return
        _unpack_side(
            rows,
            scales,
            levels,
            places,
            indices,
            dest,
            v_out,
            v_fields,
            v_book,
            v_norm_index,
            v_matrix,
            v_gain,
            head,
            first,
            last,
            num_tokens,
            row_bytes,
            v_offset + head * v_code_bytes,
            first_scale + 2 * v_first_norm,
            stride_vt,
            stride_vh,
            V_DIM,
            V_PADDED,
            V_FIELDS,
            1,
            TOKENS,
        )
