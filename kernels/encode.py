"""Encode new keys and values into packed rows, in one Triton kernel for each of them.

The definition is :func:`sglang_blockgtq.kernels.naive.encode`. A token's bytes do not depend on the
batch it comes in with: a program holds a fixed number of tokens and every sum runs over one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tables import DeviceTables, SideTables
from .turn import transform_tile

BLOCK_T = 16  # tokens per program; a constant, since a row must not depend on the batch
_FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def _nearest(unit, thresholds, book, MAX_BITS: tl.constexpr):
    """Code of every element: how many thresholds of its channel's codebook lie below it (binary search)."""
    code = tl.zeros(unit.shape, tl.int32)
    for i in tl.static_range(MAX_BITS):
        step = 1 << (MAX_BITS - 1 - i)
        threshold = tl.load(thresholds + book[None, :] + (code + (step - 1)))
        code += tl.where(unit > threshold, step, 0)
    return code


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
@triton.jit(
    do_not_specialize=[
        "num_factors",
        "num_tokens",
        "row_bytes",
        "code_bytes",
        "offset",
        "norm_offset",
        "row_norms",
        "first_norm",
    ],
    do_not_specialize_on_alignment=["loc"],
)
def _encode_kernel(
    x,  # [T, H, DIM]
    rows,  # uint8
    scales,  # the same memory as float16
    loc,
    matrix,
    fields,
    book,
    norm_index,
    weight,
    levels,
    thresholds,
    search,  # [num_factors]
    num_factors,
    num_tokens,
    stride_t,
    stride_h,
    row_bytes,
    code_bytes,
    offset,
    norm_offset,
    row_norms,
    first_norm,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    NORMS: tl.constexpr,
    MAX_BITS: tl.constexpr,
    MASKS: tl.constexpr,
    RULE: tl.constexpr,
    LAST: tl.constexpr,  # this launch also clears the row's padding
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = token < num_tokens
    slot = tl.load(loc + token, mask=live, other=0).to(tl.int64)
    channel = tl.arange(0, PADDED)

    at = token.to(tl.int64) * stride_t + head * stride_h
    y = transform_tile(x, at, live, matrix + head * PADDED * PADDED, DIM, PADDED, BLOCK, "ieee")
    index = tl.load(norm_index + head * PADDED + channel)
    w = tl.load(weight + head * PADDED + channel)[None, :]
    start = tl.load(book + head * PADDED + channel)

    # Sums of squares are taken of y / max|y|, so that no input overflows or underflows them.
    top = tl.max(tl.abs(y), 1)
    u = y / tl.where(top > 0, top, 1.0)[:, None]
    rms = tl.full([BLOCK, PADDED], 1.0, tl.float32)
    for n in tl.static_range(NORMS):
        member = (index == n)[None, :]
        count = tl.maximum(tl.sum((index == n).to(tl.float32), 0), 1.0)
        mean_square = tl.sum(tl.where(member, u * u, 0.0), 1) / count
        rms = tl.where(member & (mean_square > 0)[:, None], tl.sqrt(mean_square)[:, None], rms)

    # All groups are searched at once; error and scale of a group stand in each of its channels.
    best_error = tl.full([BLOCK, PADDED], float("inf"), tl.float32)
    best_scale = tl.zeros([BLOCK, PADDED], tl.float32)
    best_code = tl.zeros([BLOCK, PADDED], tl.int32)
    for i in range(num_factors):
        code = _nearest(u / (rms * tl.load(search + i)), thresholds, start, MAX_BITS)
        c = tl.load(levels + start[None, :] + code)
        scale = tl.zeros([BLOCK, PADDED], tl.float32)
        for n in tl.static_range(NORMS):
            wn = tl.where((index == n)[None, :], w, 0.0)
            yc = tl.sum(wn * u * c, 1)
            cc = tl.sum(wn * c * c, 1)
            cc = tl.where(cc > 0, cc, 1.0)  # a scale that this head does not have
            if RULE == "lsq":
                s = yc / cc
            elif RULE == "norm":
                s = tl.sqrt(tl.sum(wn * u * u, 1) / cc)
            else:
                s = tl.sum(wn * u * u, 1) / tl.where(yc > 0, yc, 1.0)
            scale = tl.where((index == n)[None, :], s[:, None], scale)
        # Summed as squares of residuals: the expanded form cancels at high widths.
        residual = u - scale * c
        error = tl.zeros([BLOCK, PADDED], tl.float32)
        for n in tl.static_range(NORMS):
            e = tl.sum(tl.where((index == n)[None, :], w, 0.0) * residual * residual, 1)
            error = tl.where((index == n)[None, :], e[:, None], error)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_code = tl.where(better, code, best_code)

    base = slot * row_bytes
    for n in tl.static_range(NORMS):
        member = (index == n)[None, :]
        # The same number in every channel of the group; -1 where the head has no such group.
        s = tl.max(tl.where(member, best_scale, -1.0), 1)
        empty = tl.max(tl.where(member, tl.abs(u), 0.0), 1) == 0
        s = tl.where(empty, 0.0, tl.minimum(s * top, _FP16_MAX))
        at = (base + norm_offset) // 2 + head * row_norms + first_norm + n
        tl.store(scales + at, s.to(tl.float16), mask=live)

    # bytes = sum over planes of fields @ powers of two: exact in float16, since every sum is below 256.
    BYTES: tl.constexpr = 32
    first = offset + head * code_bytes
    for at in range(0, code_bytes, BYTES):
        byte = at + tl.arange(0, BYTES)
        packed = tl.zeros([BLOCK, BYTES], tl.float32)
        for p in tl.static_range(len(MASKS)):
            if MASKS[p] > 0:
                field = fields + (head * len(MASKS) + p) * 3 * PADDED + channel
                goes_to = tl.load(field)
                power = (1 << tl.load(field + PADDED)).to(tl.float16)
                value = (best_code >> tl.load(field + 2 * PADDED)[None, :]) & MASKS[p]
                place = tl.where(goes_to[:, None] == (first + byte)[None, :], power[:, None], 0.0).to(tl.float16)
                packed = tl.dot(value.to(tl.float16), place, packed)
        mask = live[:, None] & (byte < code_bytes)[None, :]
        tl.store(rows + (base + first)[:, None] + byte[None, :], packed.to(tl.int32).to(tl.uint8), mask=mask)

    if LAST:
        if head == 0:
            pad = tl.arange(0, 8)
            zero = tl.zeros([BLOCK, 8], tl.uint8)
            codes_end = offset + heads * code_bytes
            norms_end = norm_offset + heads * row_norms * 2
            here = codes_end + pad
            tl.store(rows + base[:, None] + here[None, :], zero, mask=live[:, None] & (here < norm_offset)[None, :])
            here = norms_end + pad
            tl.store(rows + base[:, None] + here[None, :], zero, mask=live[:, None] & (here < row_bytes)[None, :])


def _encode_side(
    tables: DeviceTables, side: SideTables, name: str, x: torch.Tensor, rows: torch.Tensor, loc: torch.Tensor
) -> None:
    if x.dim() != 3 or x.shape[1:] != (tables.heads, side.dim) or x.shape[0] != loc.shape[0]:
        raise ValueError(
            f"{name} {tuple(x.shape)}: [{loc.shape[0]}, {tables.heads}, {side.dim}] is needed (tokens as in loc)"
        )
    if x.stride(-1) != 1:
        raise ValueError(f"{name} with strides {x.stride()}: channels must be contiguous")
    row = tables.row
    _encode_kernel[(triton.cdiv(x.shape[0], BLOCK_T), tables.heads)](
        x,
        rows,
        rows.view(torch.float16),
        loc,
        side.into,
        side.fields,
        side.book,
        side.norm_index,
        side.weight,
        tables.levels,
        tables.thresholds,
        tables.search,
        tables.search.shape[0],
        x.shape[0],
        x.stride(0),
        x.stride(1),
        row.row_bytes,
        side.code_bytes,
        side.offset,
        row.norm_offset,
        row.norms,
        side.first_norm,
        DIM=side.dim,
        PADDED=side.padded,
        NORMS=side.norms,
        MAX_BITS=side.max_bits,
        MASKS=side.masks,
        RULE=tables.scale_rule,
        LAST=side is tables.v,
        BLOCK=BLOCK_T,
        num_warps=8,
    )


def encode(tables: DeviceTables, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, loc: torch.Tensor) -> None:
    """Encode post-RoPE keys ``[T, H, D]`` and values ``[T, H, Dv]`` into ``rows[loc]``, every byte of them.

    k, v bfloat16, float16 or float32, any strides with contiguous channels; rows ``[slots, row_bytes]``
    uint8, contiguous; loc ``[T]`` int32 or int64, contiguous. Raises ValueError on other shapes.

    Codes may differ from the float64 twin where a value lies on a threshold to float32 rounding.
    """
    tables.check_rows(rows)
    if not loc.is_contiguous():
        raise ValueError(f"loc with strides {loc.stride()}: a contiguous tensor is needed")
    if not loc.shape[0]:
        return
    _encode_side(tables, tables.k, "k", k, rows, loc)
    _encode_side(tables, tables.v, "v", v, rows, loc)
