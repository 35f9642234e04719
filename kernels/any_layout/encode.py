"""Encode new keys and values into packed rows of any layout. Definition: :func:`..reference.encode`.

A program takes one key or value of one token: it rotates it in float32, finds each code by bisection in the codebook,
tries one factor of the scale search after the other, and adds up the bytes of the string of bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..encode.encoder import check_inputs
from ..encode.scale import TINY, correct
from ..format.codec import SCALE_MAX, V_SCALE_MAX
from .tables import CODE_FIELDS, AnyTables

_FIELDS = tl.constexpr(CODE_FIELDS)
_TINY = tl.constexpr(TINY)
_BYTES = tl.constexpr(32)  # of the codes, at a time
_BLOCK = tl.constexpr(32)  # channels of the matrix, at a time


@triton.jit
def _nearest(size, width, levels):
    """Nearest magnitudes of each channel's codebook, and their codes from zero up."""
    half = (1 << width) >> 1
    middle = levels + width * 256 + half
    code = tl.zeros(size.shape, tl.int32)
    for i in tl.static_range(7):
        trial = code + (64 >> i)
        there = trial < half
        edge = tl.load(middle + trial - 1, mask=there, other=0.0) + tl.load(middle + trial, mask=there, other=0.0)
        code = tl.where(there & (size > 0.5 * edge), trial, code)
    return tl.load(middle + code, mask=width > 0, other=0.0), code


@triton.jit(do_not_specialize=["heads", "row_bytes", "codes_at", "code_bytes", "norm_at", "row_norms", "num_factors"])
def encode_any_kernel(
    x,  # [T, H, DIM]
    rows,  # uint8
    scales,  # the same memory as float16
    loc,
    matrix,  # [H, PADDED, PADDED] (in, out)
    codes,
    inverse_counts,
    weight,
    levels,
    search,
    num_factors,
    heads,
    stride_t,
    stride_h,
    row_bytes,
    codes_at,  # first byte of head 0's codes
    code_bytes,
    norm_at,  # first scale of head 0's, in float16 from the row's start
    row_norms,  # scales of a head
    scale_max,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    NORMS: tl.constexpr,
    RULE: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    y = tl.zeros([PADDED], tl.float32)
    x += token.to(tl.int64) * stride_t + head * stride_h
    for start in tl.static_range(0, PADDED, _BLOCK if PADDED > _BLOCK else PADDED):
        part = start + tl.arange(0, _BLOCK if PADDED > _BLOCK else PADDED)
        value = tl.load(x + part, mask=part < DIM, other=0.0).to(tl.float32)
        weights = tl.load(matrix + (head * PADDED + part)[:, None] * PADDED + channel[None, :])
        y += tl.sum(weights * value[:, None], 0)

    codes += head * _FIELDS * PADDED
    width, norm = tl.load(codes + 2 * PADDED + channel), tl.load(codes + 3 * PADDED + channel)
    w = tl.load(weight + head * PADDED + channel)
    slot = tl.load(loc + token).to(tl.int64) * row_bytes
    half = (1 << width) >> 1
    bits = tl.zeros([PADDED], tl.int32)
    for n in tl.static_range(NORMS):
        member = norm == n
        part = tl.where(member, y, 0.0)
        top = tl.maximum(tl.max(tl.abs(part), 0), _TINY)
        part = part / top
        rms = tl.sqrt(tl.sum(part * part, 0) * tl.load(inverse_counts + head * NORMS + n))
        u = part / tl.where(rms > 0, rms, 1.0)
        wn = tl.where(member, w, 0.0)
        total = tl.sum(wn * u * u, 0)
        best_error, best_scale, best_factor = float("inf"), 0.0, 1.0
        for i in range(num_factors):
            factor = tl.load(search + i)
            c, code = _nearest(tl.abs(u) / factor, width, levels)
            c *= factor
            e = tl.abs(u) - c
            d, error = correct(tl.sum(wn * e * e, 0), tl.sum(wn * e * c, 0), total, RULE)
            better = error < best_error
            best_error = tl.where(better, error, best_error)
            best_factor = tl.where(better, factor, best_factor)
            best_scale = tl.where(better, factor + factor * d, best_scale)
        c, code = _nearest(tl.abs(u) / best_factor, width, levels)
        bits += tl.where(member, tl.where(u > 0, half + code, tl.maximum(half - 1 - code, 0)), 0)
        scale = tl.where(rms > 0, tl.minimum(best_scale * rms * top, scale_max), 0.0)
        tl.store(scales + slot // 2 + norm_at + head * row_norms + n, scale.to(tl.float16))

    byte, shift = tl.load(codes + channel), tl.load(codes + PADDED + channel)
    spread = bits << shift
    to = rows + slot + codes_at + head * code_bytes
    for start in range(0, code_bytes, _BYTES):
        here = start + tl.arange(0, _BYTES)
        low = tl.where(byte[:, None] == here[None, :], spread[:, None] & 255, 0)
        high = tl.where(byte[:, None] + 1 == here[None, :], spread[:, None] >> 8, 0)
        tl.store(to + here, tl.sum(low + high, 0).to(tl.uint8), mask=here < code_bytes)


class AnyEncoder:
    """Encodes into the rows of one layer."""

    def __init__(self, tables: AnyTables, rows: torch.Tensor):
        """rows ``[slots, row_bytes]`` uint8, one after another, whose padding is zero; ValueError for others."""
        tables.check_rows(rows)
        self.tables, self.rows = tables, rows

    def __call__(
        self, k: torch.Tensor, v: torch.Tensor, loc: torch.Tensor, positions: torch.Tensor | None = None
    ) -> None:
        """Encode keys and values into ``rows[loc]``, as :meth:`..encode.encoder.Encoder.__call__` does."""
        t, row = self.tables, self.tables.row
        check_inputs(t, k, v, loc, None, None)
        sides = (k, t.k, t.k_codes, 0, SCALE_MAX), (v, t.v, t.v_codes, row.k_norms, V_SCALE_MAX)
        for x, side, codes, first_norm, scale_max in sides if len(loc) else ():
            encode_any_kernel[(len(loc), t.heads)](
                x, self.rows, self.rows.view(torch.float16), loc, side.into, codes.channels, codes.inverse_counts,
                side.weight, t.levels, t.search, t.search.shape[0], t.heads, x.stride(0), x.stride(1), row.row_bytes,
                side.offset, side.code_bytes, row.norm_offset // 2 + first_norm, row.norms, scale_max,
                DIM=side.dim, PADDED=side.padded, NORMS=codes.norms, RULE=t.scale_rule,
            )  # fmt: skip
