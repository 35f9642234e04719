"""Checksums of rows: has anything but its token's encoder written to a row?

A row's sum is that of its bytes, each times an odd number of its own, and of the token's position times another, in 32
bits. A byte that changes changes the sum, and so does a row of another position. Sums are written by one launch for all
layers once a step has encoded its tokens, and compared by another one for a few rows of those that attention is about
to read. Both may stand in a CUDA graph: the host learns of a difference from a number on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .decode.splits import request_block
from .every_layer import RowPlaces, row_bytes_at

if TYPE_CHECKING:
    from .layer import PackedLayer

_BYTE, _POSITION = -1640531535, 668265263  # odd
BYTE, POSITION = tl.constexpr(_BYTE), tl.constexpr(_POSITION)
_AT_ONCE = 1 << 13  # rows that are gathered for a comparison of many: some 20 MB, where a GPU's memory is taken
_SLOT_BITS, _POSITION_BITS = 32, 22


@dataclass(frozen=True)
class Difference:
    """A row that is not what was written for its token. layer: index in the order of :class:`Checksums`."""

    layer: int
    slot: int
    position: int


def checksums(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int32 ``[N]`` of rows ``[N, row_bytes]`` uint8, bytes in a row's own order, of tokens at ``positions [N]``."""
    weights = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device) * _BYTE | 1
    return (rows.int() * weights).sum(1, dtype=torch.int32) + positions.int() * _POSITION


class Checksums:
    """One for each row of some layers, which are bound to rows of one number of slots, on one device.

    sums: int32 ``[layers, slots]``. Slot 0, where SGLang writes what nobody reads, is never compared.
    """

    def __init__(self, layers: Sequence[PackedLayer]):
        self.layers = list(layers)
        rows = self.layers[0].rows
        self.sums = torch.zeros(len(self.layers), rows.shape[0], dtype=torch.int32, device=rows.device)
        self.found = torch.zeros(1, dtype=torch.int64, device=rows.device)
        self._steps = torch.zeros(1, dtype=torch.int32, device=rows.device)
        places = RowPlaces.of(self.layers)
        self._tables = places.tables if places else None
        self._constants = {"BYTES": places.width, "num_warps": 1} if places else {}

    def write(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Of the rows at ``slots [T]``, which hold the tokens at ``positions [T]``."""
        if self._tables is None:
            for sums, layer in zip(self.sums, self.layers, strict=True):
                sums[slots.long()] = checksums(layer.gather(slots), positions)
        elif len(slots):
            grid = len(slots), len(self.layers)
            numbers = self.sums, self.sums.shape[1]
            write_checksums_kernel[grid](*self._tables, slots, positions, *numbers, **self._constants)

    def sample(self, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, count: int, *, fresh: int) -> None:
        """Compare ``count`` rows of those at ``kv_indices``, other ones each time, or all if they are no more.

        kv_indptr ``[B + 1]``: each request's part, which begins at position 0. fresh: of each request's last rows,
        those that are not written yet. A difference goes to ``found``.
        """
        self._steps += 1
        if self._tables is not None:
            requests = len(kv_indptr) - 1
            compare_rows_kernel[(count, len(self.layers))](
                *self._tables, kv_indptr, kv_indices, self.sums, self.found, self._steps, self.sums.shape[1], requests,
                FRESH=fresh, REQUESTS=request_block(requests), **self._constants,
            )  # fmt: skip
            return
        bounds = kv_indptr.tolist()
        if not bounds[-1]:
            return
        at = torch.randint(bounds[-1], (count,)) if bounds[-1] > count else torch.arange(bounds[-1])
        request = torch.searchsorted(kv_indptr, at, right=True) - 1
        positions, written = at - kv_indptr[request], at < kv_indptr[request + 1] - fresh
        self._note(self.differences(kv_indices[at][written], positions[written]))

    def differences(self, slots: torch.Tensor, positions: torch.Tensor) -> list[Difference]:
        """Among the rows at ``slots [N]`` of tokens at ``positions [N]``. It waits for the device."""
        out = []
        for slot, position in zip(slots.split(_AT_ONCE), positions.split(_AT_ONCE), strict=True):
            slot, position = (x[slot > 0].long().to(self.sums.device) for x in (slot, position))
            for i, layer in enumerate(self.layers):
                wrong = checksums(layer.gather(slot), position) != self.sums[i, slot]
                out += [Difference(i, *x) for x in zip(slot[wrong].tolist(), position[wrong].tolist(), strict=True)]
        return out

    def move(self, targets: torch.Tensor, sources: torch.Tensor) -> None:
        """As rows are moved from slots to others."""
        self.sums[:, targets.long()] = self.sums[:, sources.long()]

    def _note(self, differences: list[Difference]) -> None:
        if differences:
            first = differences[0]
            packed = ((first.layer + 1) << _POSITION_BITS | first.position) << _SLOT_BITS | first.slot
            self.found.fill_(packed)

    @staticmethod
    def unpacked(found: int) -> Difference | None:
        """What a value of ``found`` says; None for 0."""
        if not found:
            return None
        layer, position = divmod(found >> _SLOT_BITS, 1 << _POSITION_BITS)
        return Difference(layer - 1, found & (1 << _SLOT_BITS) - 1, position)


@triton.jit
def _row_sum(addresses, sizes, first, step, layer, slot, position, BYTES: tl.constexpr):
    at, mask = row_bytes_at(addresses, sizes, first, step, layer, slot, BYTES)
    byte = tl.load(at, mask=mask, other=0).to(tl.int64)
    # In 64 bits, of which 32 stay: the interpreter does not wrap.
    total = tl.sum(byte * (tl.arange(0, BYTES) * BYTE | 1), 0) + position.to(tl.int64) * POSITION
    return total.to(tl.int32)


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slots", "positions"])
def write_checksums_kernel(addresses, sizes, first, step, slots, positions, sums, num_slots, BYTES: tl.constexpr):
    token, layer = tl.program_id(0), tl.program_id(1)
    slot, position = tl.load(slots + token), tl.load(positions + token)
    total = _row_sum(addresses, sizes, first, step, layer, slot, position, BYTES)
    tl.store(sums + layer.to(tl.int64) * num_slots + slot, total)


@triton.jit(do_not_specialize=["num_slots", "num_requests"], do_not_specialize_on_alignment=["kv_indptr", "kv_indices"])
def compare_rows_kernel(
    addresses, sizes, first, step, kv_indptr, kv_indices, sums, found, steps, num_slots, num_requests,
    FRESH: tl.constexpr, REQUESTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    total = tl.load(kv_indptr + num_requests).to(tl.int64)
    i, layer = tl.program_id(0), tl.program_id(1)
    every = total <= tl.num_programs(0)
    if i < total:
        at = tl.where(every, i, tl.randint(tl.load(steps), i).to(tl.uint32).to(tl.int64) % total)
        r = tl.arange(0, REQUESTS)
        ends = tl.load(kv_indptr + r + 1, mask=r < num_requests, other=total).to(tl.int64)
        begin = tl.max(tl.where(ends <= at, ends, 0), 0)
        end = tl.min(tl.where(ends > at, ends, total), 0)
        slot, position = tl.load(kv_indices + at).to(tl.int64), at - begin
        if (slot > 0) & (at < end - FRESH):
            want = tl.load(sums + layer.to(tl.int64) * num_slots + slot)
            if _row_sum(addresses, sizes, first, step, layer, slot, position, BYTES) != want:
                tl.store(found, ((layer.to(tl.int64) + 1) * (1 << 22) + position) * (1 << 32) + slot)
