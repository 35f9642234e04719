"""Rows of every layer in one launch: where their bytes lie, and how they are moved between slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .format.layout import BLOCK_SLOTS, RowLayout

if TYPE_CHECKING:
    from .layer import PackedLayer

BLOCK = tl.constexpr(BLOCK_SLOTS)


class RowPlaces:
    """Of layers that are bound to rows of one number of slots, on one device, and stay there.

    tables: addresses int64 ``[L]``, row_bytes int32 ``[L]``, and int32 ``[L, BYTES]`` of the first row of a block and
    from one row to the next, in a row's own order of bytes.
    """

    def __init__(self, layers: Sequence[PackedLayer]):
        device, self.width = layers[0].rows.device, triton.next_power_of_2(max(x.layout.row_bytes for x in layers))
        first, step = torch.zeros(2, len(layers), self.width, dtype=torch.int32)
        for i, layer in enumerate(layers):
            first[i, : layer.layout.row_bytes], step[i, : layer.layout.row_bytes] = _places(layer.layout)
        addresses = torch.tensor([layer.rows.data_ptr() for layer in layers], device=device)
        sizes = torch.tensor([layer.layout.row_bytes for layer in layers], dtype=torch.int32, device=device)
        self.tables = addresses, sizes, first.to(device), step.to(device)

    @classmethod
    def of(cls, layers: Sequence[PackedLayer]) -> RowPlaces | None:
        """None for layers on the host, whose rows no kernel reads."""
        return cls(layers) if hasattr(layers[0], "tables") else None

    def move(self, targets: torch.Tensor, sources: torch.Tensor) -> None:
        """The rows at ``sources [N]`` to ``targets [N]`` in every layer, all read before one is written."""
        if not len(sources):
            return
        grid, device = (len(sources), len(self.tables[0])), sources.device
        held = torch.empty(*grid, self.width, dtype=torch.uint8, device=device)
        take_rows_kernel[grid](*self.tables, sources, held, BYTES=self.width, num_warps=1)
        put_rows_kernel[grid](*self.tables, targets, held, BYTES=self.width, num_warps=1)


def _places(layout: RowLayout) -> torch.Tensor:
    """Where a row's bytes, in its own order, lie in a block of rows: int32 ``[2, row_bytes]``, those of the block's
    first row and the way from one row to the next."""
    out = []
    for begin, size in layout.sections:
        # Rows that are not interleaved are one section.
        out += [(begin * BLOCK_SLOTS + i, size) for i in range(size)]
    return torch.tensor(out, dtype=torch.int32).T


@triton.jit
def row_bytes_at(addresses, sizes, first, step, layer, slot, BYTES: tl.constexpr):
    """Pointers to the bytes of a row, in its own order, and which of them are there."""
    b = tl.arange(0, BYTES)
    size = tl.load(sizes + layer)
    rows = tl.load(addresses + layer).to(tl.pointer_type(tl.uint8))
    block, within = slot // BLOCK, slot % BLOCK
    place = tl.load(first + layer * BYTES + b) + within.to(tl.int32) * tl.load(step + layer * BYTES + b)
    return rows + block.to(tl.int64) * BLOCK * size + place, b < size


@triton.jit(do_not_specialize_on_alignment=["slots"])
def take_rows_kernel(addresses, sizes, first, step, slots, held, BYTES: tl.constexpr):
    token, layer = tl.program_id(0), tl.program_id(1)
    at, mask = row_bytes_at(addresses, sizes, first, step, layer, tl.load(slots + token), BYTES)
    to = held + (token * tl.num_programs(1) + layer).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    tl.store(to, tl.load(at, mask=mask, other=0))


@triton.jit(do_not_specialize_on_alignment=["slots"])
def put_rows_kernel(addresses, sizes, first, step, slots, held, BYTES: tl.constexpr):
    token, layer = tl.program_id(0), tl.program_id(1)
    at, mask = row_bytes_at(addresses, sizes, first, step, layer, tl.load(slots + token), BYTES)
    of = held + (token * tl.num_programs(1) + layer).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    tl.store(at, tl.load(of), mask=mask)
