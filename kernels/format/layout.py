"""The byte layout of packed rows: one definition for reference, Triton and docs.

A *row* is what one token stores in one layer:

    | K codes, head 0 .. H-1 | V codes, head 0 .. H-1 | scales, head 0 .. H-1 | pad |

Scales are float16, ``k_norms`` of K then one of V for each head. The row is padded to 8 bytes. A row
depends on its token and position alone, not on request or page, so it can be moved, copied and
shared through the radix cache as it is.

Codes lie in *columns* (see :mod:`.columns`) where widths come in segments of 16 channels, as those of
``uniform``, ``template`` and all by segments do: the layout that the fast kernels read. In any other row the
codes of a head are a string of bits, one after the other (:mod:`..any_layout.bits`). Either way they take
exactly ``ceil(sum(bits) / 8)`` bytes.

On a GPU, rows in columns of 16 neighbouring slots form a *block* and lie interleaved by *sections*: the
first section of all 16 rows, then the second of all 16, and so on. A section is what a kernel reads with
one instruction: a bin of one head, or a head's scales. A warp that reads a section of neighbouring
slots, which is what a request usually has, then reads whole cache lines. Other rows lie one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from .codebook import check_bits
from .columns import COLUMNS, Columns, columns_of

NORM_BYTES = 2  # float16
BLOCK_SLOTS = 16  # rows that are interleaved
ROW_ALIGN = 8  # bytes; keeps 8-byte loads aligned and K3V3 at head_dim 128 within 104 B per head


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
        """How the codes lie in columns, or None where they can not."""
        segments = [set(self.widths[c : c + COLUMNS]) for c in range(0, self.dim, COLUMNS)]
        if self.dim % COLUMNS or self.num_norms > 1 or any(len(segment) > 1 for segment in segments):
            return None
        return columns_of(tuple(segment.pop() for segment in segments))

    def require_columns(self) -> Columns:
        """:attr:`columns`; ValueError where the codes can not lie in columns."""
        if self.columns is None:
            raise ValueError(f"widths {self.widths}: these codes can not lie in columns")
        return self.columns


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
    def pad_offset(self) -> int:
        """First byte of the row's padding, or row_bytes."""
        return self.norm_offset + self.heads * self.norms * NORM_BYTES

    @property
    def head_bytes(self) -> int:
        """Bytes per token and KV head, scales included, row padding not."""
        return self.k_code_bytes + self.v_code_bytes + self.norms * NORM_BYTES

    @property
    def row_bytes(self) -> int:
        """Bytes per token in this layer, padding included: what the pool allocates."""
        return -(-self.pad_offset // ROW_ALIGN) * ROW_ALIGN

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
        if not self.in_columns:
            return ((0, self.row_bytes),)
        out = []
        for head, layout in enumerate(self.k):
            out += [(head * self.k_code_bytes + part.offset, part.num_bytes) for part in layout.require_columns().bins]
        for head in range(self.heads):
            first = self.v_offset + head * self.v_code_bytes
            out += [(first + part.offset, part.num_bytes) for part in self.v.require_columns().bins]
        scales = self.norms * NORM_BYTES
        out += [(self.norm_offset + head * scales, scales) for head in range(self.heads)]
        if self.row_bytes > self.pad_offset:
            out.append((self.pad_offset, self.row_bytes - self.pad_offset))
        return tuple(out)

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
    """Rows ``[n, row_bytes]`` of ``slots [n]`` (int64) out of ``storage [slots, row_bytes]`` uint8."""
    out = storage.new_empty(len(slots), row.row_bytes)
    block, within = slots // BLOCK_SLOTS, slots % BLOCK_SLOTS
    for where, part in _sections(row, storage):
        out[:, where] = part[block, within]
    return out


def scatter_rows(row: RowLayout, storage: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows ``[n, row_bytes]`` at ``slots [n]`` (int64) of storage."""
    block, within = slots // BLOCK_SLOTS, slots % BLOCK_SLOTS
    for where, part in _sections(row, storage):
        part[block, within] = rows[:, where]
