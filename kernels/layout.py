"""The byte layout of packed rows: one definition for reference, Triton and docs.

A *row* is what one token stores in one layer:

    | K codes, head 0 .. H-1 | V codes, head 0 .. H-1 | scales, head 0 .. H-1 | pad |

Scales are float16, ``k_norms`` of K then one of V for each head. The row is
padded to 8 bytes. Nothing in it depends on the position, the request or the
page, so a row can be moved, copied and shared through the radix cache as it is.

Codes lie in *columns* (see :mod:`.columns`) where a head's widths come in slots of 16
channels, as those of ``uniform`` and ``template`` do, and all by slots: the layout that the fast kernels read.
Any other mixture of widths lies in *planes*: a code of b bits is cut into *fields* of 4, 2 and
1 bits, most significant first (3 = 2 + 1, 6 = 4 + 2, 8 = 4 + 4), and equal fields of all
channels lie together. In a plane of W bytes, element e sits in byte ``e % W`` at bit
``(e // W) * width``. What does not fill whole bytes of a plane goes bit after bit into the
tail. Either way the codes of a head take exactly ``ceil(sum(bits) / 8)`` bytes.

In the pool, the rows of 16 neighbouring slots form a *block* and lie interleaved by *sections*: the first
section of all 16 rows, then the second of all 16, and so on. A section is what a kernel reads with one
instruction: a bin of one head, or a head's scales. A warp that reads a section of neighbouring slots, which is
what a request usually has, then reads whole cache lines; with rows one after another, each read would be
a request to the L2 cache of its own, and those were the limit (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from .codebook import check_bits
from .columns import COLUMNS, Columns, columns_of, fields_of

NORM_BYTES = 2  # float16
BLOCK_SLOTS = 16  # rows that are interleaved
ROW_ALIGN = 8  # bytes; keeps 8-byte loads aligned and K3V3 at head_dim 128 within 104 B per head

#: Planes in storage order: (name, field width). "hi" holds the top nibble of every
#: code of 4 bits and more, "lo" the low nibble of 8-bit codes.
PLANES = (("hi", 4), ("lo", 4), ("two", 2), ("one", 1))

#: bits -> {plane: position of the field in the code}
FIELDS: dict[int, dict[str, int]] = {
    0: {},
    1: {"one": 0},
    2: {"two": 0},
    3: {"two": 1, "one": 0},
    4: {"hi": 0},
    5: {"hi": 1, "one": 0},
    6: {"hi": 2, "two": 0},
    7: {"hi": 3, "two": 1, "one": 0},
    8: {"hi": 4, "lo": 0},
}


@dataclass(frozen=True)
class Run:
    """Consecutive channels whose field in one plane has the same position in the code."""

    start: int  # first channel
    stop: int
    position: int  # bit position of the field in the code


@dataclass(frozen=True)
class Plane:
    """One plane of a head's code bytes."""

    name: str
    width: int  # bits per element: 4, 2 or 1
    offset: int  # first byte, within the head's codes
    num_bytes: int  # W
    num_elements: int  # all elements, those in the tail included
    tail_bit: int  # where this plane's leftover elements start in the tail, in bits
    runs: tuple[Run, ...]

    @property
    def slots(self) -> int:
        """Elements per byte."""
        return 8 // self.width

    @property
    def num_planar(self) -> int:
        """Elements in whole bytes; the rest lies in the tail."""
        return self.num_bytes * self.slots

    def place(self, element: int) -> tuple[int, int]:
        """(byte within the plane, bit shift) of a planar element."""
        return element % self.num_bytes, element // self.num_bytes * self.width


@dataclass(frozen=True)
class CodeLayout:
    """How the codes of one head are laid out.

    widths: bits of every channel in stored order, non-increasing (0 = not stored).
    norm_index: which of the head's scales each channel uses; ``()`` means one scale for all.
    """

    widths: tuple[int, ...]
    norm_index: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("widths is empty")
        for bits in set(self.widths) - {0}:
            check_bits(bits)
        if any(a < b for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"widths {self.widths} must not increase: channels are stored widest first")
        if not self.norm_index:
            object.__setattr__(self, "norm_index", (0,) * len(self.widths))
        if len(self.norm_index) != len(self.widths):
            raise ValueError(f"{len(self.norm_index)} norm indices for {len(self.widths)} channels")

    @property
    def dim(self) -> int:
        return len(self.widths)

    @property
    def num_norms(self) -> int:
        return max(self.norm_index) + 1

    @property
    def code_bits(self) -> int:
        return sum(self.widths)

    @property
    def code_bytes(self) -> int:
        return (self.code_bits + 7) // 8

    @cached_property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """Equal-width channel ranges as (start, stop, bits), widest first."""
        out, start = [], 0
        for c in range(1, self.dim + 1):
            if c == self.dim or self.widths[c] != self.widths[start]:
                out.append((start, c, self.widths[start]))
                start = c
        return tuple(out)

    @cached_property
    def columns(self) -> Columns | None:
        """The codes in columns, or None: they lie in planes then."""
        slots = [set(self.widths[c : c + COLUMNS]) for c in range(0, self.dim, COLUMNS)]
        if self.dim % COLUMNS or self.num_norms > 1 or any(len(slot) > 1 for slot in slots):
            return None
        return columns_of(tuple(slot.pop() for slot in slots))

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """The planes that hold something, in storage order. Meaningless for codes in columns."""
        out, offset, tail_bit = [], 0, 0
        for name, width in PLANES:
            runs = tuple(Run(a, b, FIELDS[bits][name]) for a, b, bits in self.groups if name in FIELDS[bits])
            elements = sum(run.stop - run.start for run in runs)
            if not elements:
                continue
            num_bytes = elements * width // 8
            out.append(Plane(name, width, offset, num_bytes, elements, tail_bit, runs))
            offset += num_bytes
            tail_bit += elements * width - num_bytes * 8
        return tuple(out)

    @cached_property
    def tail_offset(self) -> int:
        return sum(plane.num_bytes for plane in self.planes)

    @cached_property
    def field_table(self) -> dict[str, list[tuple[int, int, int]]]:
        """Per plane name, for every channel (byte within the head's codes, shift, position in the code).

        The byte is -1 where the channel has no field of that name. No field straddles two
        bytes: a plane's leftover is a whole number of its elements and the tail starts with
        the 2-bit ones; in columns, fields are cut where bytes end.
        """
        table = {name: [(-1, 0, 0)] * self.dim for name, _ in PLANES}
        if self.columns is not None:
            self._fill_from_columns(self.columns, table)
            return table
        for plane in self.planes:
            element = 0
            for run in plane.runs:
                for channel in range(run.start, run.stop):
                    if element < plane.num_planar:
                        byte, shift = plane.place(element)
                        byte += plane.offset
                    else:
                        bit = plane.tail_bit + (element - plane.num_planar) * plane.width
                        byte, shift = self.tail_offset + bit // 8, bit % 8
                    table[plane.name][channel] = (byte, shift, run.position)
                    element += 1
        return table

    @staticmethod
    def _fill_from_columns(columns: Columns, table: dict[str, list[tuple[int, int, int]]]) -> None:
        for slot, pieces in enumerate(columns.slots):
            names = {width: [name for name, w in PLANES if w == width] for _, width in PLANES}
            for index, shift, width, position in fields_of(pieces):
                name, where = names[width].pop(0), columns.bins[index]
                for column in range(COLUMNS):
                    bit = column // where.words * where.bits + shift
                    byte = where.offset + 2 * (column % where.words) + bit // 8
                    table[name][slot * COLUMNS + column] = byte, bit % 8, position


@dataclass(frozen=True)
class RowLayout:
    """The packed row of one layer for all KV heads held by this rank.

    k: one CodeLayout per KV head. v: one for all heads. k_code_bytes and k_norms are
    the maxima over *all* heads of the layer, so that the row does not depend on how
    heads are spread over tensor-parallel ranks.
    """

    k: tuple[CodeLayout, ...]
    v: CodeLayout
    k_code_bytes: int
    k_norms: int

    @classmethod
    def of(cls, k: tuple[CodeLayout, ...], v: CodeLayout) -> RowLayout:
        return cls(k, v, max(h.code_bytes for h in k), max(h.num_norms for h in k))

    @property
    def heads(self) -> int:
        return len(self.k)

    @property
    def v_code_bytes(self) -> int:
        return self.v.code_bytes

    @property
    def norms(self) -> int:
        """Scales per head: those of K, then one of V."""
        return self.k_norms + 1

    @property
    def v_offset(self) -> int:
        return self.heads * self.k_code_bytes

    @property
    def norm_offset(self) -> int:
        """First scale; even, so that float16 loads are aligned."""
        end = self.v_offset + self.heads * self.v_code_bytes
        return end + end % NORM_BYTES

    @property
    def head_bytes(self) -> int:
        """Bytes per token and KV head, scales included, row padding not."""
        return self.k_code_bytes + self.v_code_bytes + self.norms * NORM_BYTES

    @property
    def row_bytes(self) -> int:
        """Bytes per token in this layer, padding included: what the pool allocates."""
        end = self.norm_offset + self.heads * self.norms * NORM_BYTES
        return -(-end // ROW_ALIGN) * ROW_ALIGN

    @cached_property
    def in_columns(self) -> bool:
        """True when the fast kernels can read these rows: all heads in columns, as many bytes each, scales in pairs."""
        if any(head.columns is None or head.code_bytes != self.k_code_bytes for head in self.k):
            return False
        if self.v.columns is None or self.k_norms > 1:  # of the layer: another rank's head may have more
            return False
        return self.norm_offset % (2 * NORM_BYTES) == 0

    @cached_property
    def sections(self) -> tuple[tuple[int, int], ...]:
        """(first byte, bytes) of what stays together when rows are interleaved; they cover the row in order."""
        out, at = [], 0
        sides = (self.k, self.k_code_bytes), ((self.v,) * self.heads, self.v_code_bytes)
        for layouts, code_bytes in sides:
            for head, layout in enumerate(layouts):
                bins = layout.columns.bins if self.in_columns else ()
                out += [(at + head * code_bytes + part.offset, part.num_bytes) for part in bins] or [
                    (at + head * code_bytes, code_bytes)
                ]
            at += self.heads * code_bytes
        scales = self.norms * NORM_BYTES
        if self.norm_offset > at:
            out.append((at, self.norm_offset - at))
        out += [(self.norm_offset + head * scales, scales) for head in range(self.heads)]
        end = self.norm_offset + self.heads * scales
        if self.row_bytes > end:
            out.append((end, self.row_bytes - end))
        return tuple(out)

    def places(self) -> torch.Tensor:
        """Where each byte of a row lies in its block, int32 ``[2, row_bytes]``.

        Byte x of slot s is byte ``p[0, x] + s % 16 * p[1, x]`` of block ``s // 16``.
        """
        places = torch.empty(2, self.row_bytes, dtype=torch.int32)
        for first, size in self.sections:
            places[0, first : first + size] = first * BLOCK_SLOTS + torch.arange(size, dtype=torch.int32)
            places[1, first : first + size] = size
        return places

    @property
    def uniform_heads(self) -> bool:
        """True when all heads share one K code layout (``uniform`` and ``template``)."""
        return all(h == self.k[0] for h in self.k)


@cache
def uniform_layout(dim: int, bits: float) -> CodeLayout:
    """``dim`` channels at an average of ``bits``, one scale.

    A fractional budget gives the first channels one bit more than the rest; the total is
    ``2 * floor(dim / 2 * bits)``, the budget of whole RoPE blocks.
    """
    blocks = dim // 2
    total = int(blocks * bits + 1e-9)
    low, wide = divmod(total, blocks)
    return CodeLayout((low + 1,) * (2 * wide) + (low,) * (dim - 2 * wide))


def num_slots(wanted: int) -> int:
    """``wanted`` rounded up to whole blocks."""
    return -(-wanted // BLOCK_SLOTS) * BLOCK_SLOTS


def _sections(row: RowLayout, storage: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Per section its bytes within a row, and a view ``[blocks, 16, bytes]`` of it."""
    blocks = storage.view(-1, BLOCK_SLOTS * row.row_bytes)
    for first, size in row.sections:
        part = blocks[:, first * BLOCK_SLOTS : (first + size) * BLOCK_SLOTS]
        yield slice(first, first + size), part.unflatten(1, (BLOCK_SLOTS, size))


def gather_rows(row: RowLayout, storage: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows ``[n, row_bytes]`` of ``slots [n]`` (int64) out of interleaved ``storage [slots, row_bytes]`` uint8."""
    out = storage.new_empty(len(slots), row.row_bytes)
    block, within = slots // BLOCK_SLOTS, slots % BLOCK_SLOTS
    for where, part in _sections(row, storage):
        out[:, where] = part[block, within]
    return out


def scatter_rows(row: RowLayout, storage: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows ``[n, row_bytes]`` at ``slots [n]`` (int64) of interleaved storage."""
    block, within = slots // BLOCK_SLOTS, slots % BLOCK_SLOTS
    for where, part in _sections(row, storage):
        part[block, within] = rows[:, where]
