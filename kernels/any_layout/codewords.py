"""Codes of any layout to codewords, inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codewords(rows, first, codes, levels, channel, PADDED: tl.constexpr):
    """Codewords ``[T, C]``, without their scales, of channels ``channel [C]``.

    first ``[T]``: address of each token's codes of one head. codes: of the head, see :class:`.tables.Codes`.
    """
    byte = tl.load(codes + channel)
    shift = tl.load(codes + PADDED + channel)
    width = tl.load(codes + 2 * PADDED + channel)
    at = rows + first[:, None] + byte[None, :]
    low = tl.load(at, mask=(width > 0)[None, :], other=0).to(tl.int32)
    high = tl.load(at + 1, mask=(shift + width > 8)[None, :], other=0).to(tl.int32)
    code = ((low | high << 8) >> shift[None, :]) & ((1 << width) - 1)[None, :]
    return tl.load(levels + (width * 256)[None, :] + code)
