"""Where rows of the pool lie (see :mod:`..format.layout`), inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from ..format.layout import BLOCK_SLOTS

_SLOTS = tl.constexpr(BLOCK_SLOTS)


@triton.jit
def block_base(slot, row_bytes, NEAR: tl.constexpr = False):
    """Address of a slot's block, int64, in the units of row_bytes.

    slot: int64, or uint32, of which a block's number is one shift and its address one instruction. NEAR: slot and
    address are uint32, which the caller knows to be enough.
    """
    block = slot // _SLOTS
    return (block if NEAR else block.to(tl.int64)) * (row_bytes * _SLOTS)
