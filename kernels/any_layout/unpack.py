"""Unpack rows of any layout to dense keys and values. Definition: :func:`..reference.decode`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..device.launch import Launch
from ..unpack.copy_chunk import copy_chunk
from ..unpack.task import TOKENS, UnpackMatrix
from .codewords import codewords
from .tables import CODE_FIELDS, AnyTables

_FIELDS = tl.constexpr(CODE_FIELDS)


@triton.jit
def _unpack_side(
    rows,
    scales,
    levels,
    indices,
    dest,
    out,
    codes,
    matrix,
    gain,
    head,
    first_tile,
    last_tile,
    num_tokens,
    row_bytes,
    first_byte,  # of the head's codes within a row
    first_scale,  # of the head's, in float16 from the row's start
    stride_t,
    stride_h,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    NORMS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One side of one head: look a tile up, rotate it back, scale, scatter."""
    BLOCK: tl.constexpr = PADDED if PADDED <= 64 else 32  # else codes and product would not fit the registers
    channel = tl.arange(0, PADDED)
    codes += head * _FIELDS * PADDED
    head_gain = tl.load(gain + head)
    for tile in range(first_tile, last_tile):
        n = tile * TOKENS + tl.arange(0, TOKENS)
        live = n < num_tokens
        # Beyond the last token slot 0 is read, which always exists, and nothing is written.
        slot = tl.load(indices + n, mask=live, other=0).to(tl.int64) * row_bytes
        scale_at = scales + slot // 2 + first_scale
        scale = tl.zeros([TOKENS], tl.float32)
        for i in tl.static_range(NORMS):
            scale = tl.maximum(scale, tl.load(scale_at + i).to(tl.float32))
        safe = tl.where(scale > 0, scale, 1.0)

        dense = tl.zeros([TOKENS, PADDED], tl.float32)
        for first in range(0, PADDED, BLOCK):
            stored = first + tl.arange(0, BLOCK)
            value = codewords(rows, slot + first_byte, codes, levels, stored, PADDED)
            if NORMS > 1:
                # Several scales meet in one product: their ratios go on the codewords, the largest on the result.
                norm = tl.maximum(tl.load(codes + 3 * PADDED + stored), 0)
                part = tl.load(scale_at[:, None] + norm[None, :]).to(tl.float32) / safe[:, None]
                value = (value * part).to(levels.dtype.element_ty)
            back = tl.load(matrix + (head * PADDED + stored)[:, None] * PADDED + channel[None, :])
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
_FREE = ["num_tokens", "tiles", "programs", "chunk_tokens", "row_bytes", "k_code_bytes", "v_code_bytes", "v_offset"]
_FREE += ["norm_at", "row_norms"]


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["indices", "dest", "chunk_dest"])
def unpack_any_kernel(
    rows,  # uint8
    scales,  # the same memory as float16
    levels,
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
    k_codes,
    k_matrix,
    k_gain,
    v_out,
    v_codes,
    v_matrix,
    v_gain,
    row_bytes,
    k_code_bytes,
    v_code_bytes,
    v_offset,
    norm_at,
    row_norms,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    K_NORMS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(0)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(num_tokens, TOKENS))
    first_scale = norm_at + head * row_norms
    copied = tl.program_id(1) - programs
    if tl.program_id(2) == 0:
        if chunk_k is not None:
            if copied >= 0:
                copy_chunk(
                    chunk_k, k_out, chunk_dest, num_tokens, copied, chunk_tokens, head, tl.arange(0, K_PADDED),
                    stride_ckt, stride_ckh, stride_kt, stride_kh, K_DIM, TOKENS,
                )  # fmt: skip
                return
        _unpack_side(
            rows, scales, levels, indices, dest, k_out, k_codes, k_matrix, k_gain, head, first, last, num_tokens,
            row_bytes, head * k_code_bytes, first_scale, stride_kt, stride_kh, K_DIM, K_PADDED, K_NORMS, TOKENS,
        )  # fmt: skip
    else:
        if chunk_v is not None:
            if copied >= 0:
                copy_chunk(
                    chunk_v, v_out, chunk_dest, num_tokens, copied, chunk_tokens, head, tl.arange(0, V_PADDED),
                    stride_cvt, stride_cvh, stride_vt, stride_vh, V_DIM, TOKENS,
                )  # fmt: skip
                return
        _unpack_side(
            rows, scales, levels, indices, dest, v_out, v_codes, v_matrix, v_gain, head, first, last, num_tokens,
            row_bytes, v_offset + head * v_code_bytes, first_scale + K_NORMS, stride_vt, stride_vh, V_DIM, V_PADDED, 1,
            TOKENS,
        )  # fmt: skip


def launch_any(tables: AnyTables, k: UnpackMatrix, v: UnpackMatrix, rows: torch.Tensor) -> Launch:
    """The kernel with everything of a layer bound to it."""
    row = tables.row
    bound: dict[str, Any] = {
        "rows": rows,
        "scales": rows.view(torch.float16),
        "levels": tables.operand_levels,
        "k_codes": tables.k_codes.channels,
        "k_matrix": k.matrix,
        "k_gain": k.gain,
        "v_codes": tables.v_codes.channels,
        "v_matrix": v.matrix,
        "v_gain": v.gain,
        "row_bytes": row.row_bytes,
        "k_code_bytes": row.k_code_bytes,
        "v_code_bytes": row.v_code_bytes,
        "v_offset": row.v_offset,
        "norm_at": row.norm_offset // 2,
        "row_norms": row.norms,
    }
    return Launch(
        unpack_any_kernel,
        **bound,
        K_DIM=tables.k.dim,
        K_PADDED=tables.k.padded,
        K_NORMS=tables.k_codes.norms,
        V_DIM=tables.v.dim,
        V_PADDED=tables.v.padded,
        TOKENS=TOKENS,
        num_warps=8,
        num_stages=1,
    )
