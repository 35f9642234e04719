"""Where the bytes of a row lie in interleaved storage (see :mod:`.layout`), inside kernels.

``places`` is RowLayout.places() on the device, ``[2, row_bytes]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import BLOCK_SLOTS

_SLOTS = tl.constexpr(BLOCK_SLOTS)


@triton.jit
def block_base(slot, row_bytes, NEAR: tl.constexpr = False):
    """Address of a slot's block, int64, in the units of row_bytes.

    slot: int64, or uint32, of which a block's number is one shift and its address one instruction. NEAR: slot and
    address are uint32, which the caller knows to be enough.
    """
    block = slot // _SLOTS
    return (block if NEAR else block.to(tl.int64)) * (row_bytes * _SLOTS)


@triton.jit
def byte_address(slot, row_bytes, places, byte):
    """Addresses of byte ``byte`` of the rows at ``slot``; the two must broadcast against each other."""
    at = tl.load(places + byte)
    stride = tl.load(places + row_bytes + byte)
    return block_base(slot, row_bytes) + at + slot % _SLOTS * stride
