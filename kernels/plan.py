"""What one side of a layer needs to be encoded: tiles of channels, and matrices that put codes into bytes.

A kernel is compiled for the tiles (a static structure, the same in every head) and reads the rest as data.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import torch

from .codebook import MAX_BITS, MAX_LEVELS, boundaries, polynomial
from .columns import COLUMNS, WORD_BITS
from .layout import CodeLayout

TILE = 16  # channels; the shortest inner side of a float16 dot
MAX_TILE = 64  # a wider one needs more registers at once when codes are made of it
MAX_CHAIN_BITS = 4  # up to here the nearest level is found by comparing with every threshold
COEFFICIENTS = 4  # of a codebook's polynomial, zeros included


class Tile(NamedTuple):
    """Channels ``start .. start + size - 1`` of every head, which a kernel holds in one tensor."""

    start: int
    size: int  # a power of two
    bits: int  # their width, 1 to 4; 0 where it is larger or mixed: such channels look their levels up in Cells
    flat: bool  # they all share one weight
    line: int  # first row in ``place``: ``size`` rows for each bit position
    positions: int  # bit p is set where some code is shifted by p
    bins: int = 0  # bit b is set where some code enters bin b, of rows in columns


@dataclass(frozen=True)
class EncodePlan:
    """H KV heads, P padded channels.

    pieces ``[H, 2, P, P]`` bfloat16: the matrix, (out, in), as a sum of two.
    channels ``[H, 5, P]`` float32: weight, norm index (-1: not stored), start and scale of the cells, half the
        number of levels.
    inverse_counts ``[H, norms]`` float32: one over the number of channels of a scale, 0 without any.
    columns: what is beside it for rows in columns, else None.
    place ``[H, rows, bytes]`` float16: per tile and bit position p, what ``code >> p`` of each channel adds to
        each byte of the head's codes, modulo 256. ``bytes`` is a multiple of ``chunk``.
    """

    tiles: tuple[Tile, ...]
    pieces: torch.Tensor
    channels: torch.Tensor
    inverse_counts: torch.Tensor
    place: torch.Tensor
    chunk: int
    columns: ColumnPlan | None

    @property
    def flat_tiles(self) -> tuple[int, ...]:
        """The tiles as one tuple of integers, seven for each: a constant that every Triton takes."""
        return tuple(int(n) for tile in self.tiles for n in tile)

    @classmethod
    def of(
        cls,
        layouts: tuple[CodeLayout, ...],
        weight: torch.Tensor,
        norm_index: torch.Tensor,
        matrix: torch.Tensor,
        *,
        norms: int,
        code_bytes: int,
        cells: Cells,
        in_columns: bool,
    ) -> EncodePlan:
        """weight, norm_index ``[H, P]`` and matrix ``[H, P, P]`` (in, out), as SideTables has them."""
        heads, padded = norm_index.shape
        widths = torch.zeros(heads, padded, dtype=torch.int64)
        widths[:, : layouts[0].dim] = torch.tensor([layout.widths for layout in layouts])
        # A warpgroup's product wants 64 columns: with fewer, Triton 3.6 reads this operand wrongly from shared memory.
        chunk = 64
        columns = ColumnPlan.of(layouts, weight, norm_index) if in_columns else None
        moves = [] if columns else [_moves(layout) for layout in layouts]
        tiles, blocks, lines = [], [torch.zeros(heads, 1, chunk)] if columns else [], 0
        for start, size, bits in _tiles(widths):
            part = slice(start, start + size)
            flat = bool((weight[:, part] == weight[:, start : start + 1]).all()) and bits > 0
            if columns:
                bins = sum(1 << b for b in range(len(columns.bins)) if bool((columns.pack[:, b, part] >> 8).any()))
                tiles.append(Tile(start, size, bits, flat, 0, 0, bins))
                continue
            block = torch.zeros(MAX_BITS, heads, size, -(-code_bytes // chunk) * chunk)
            for h, move in enumerate(moves):
                for c, p, byte, amount in move:
                    if start <= c < start + size:
                        block[p, h, c - start, byte] += amount
            used = [p for p in range(MAX_BITS) if bool(block[p].any())]
            tiles.append(Tile(start, size, bits, flat, lines, sum(1 << p for p in used)))
            blocks.extend(block[: used[-1] + 1])
            lines += size * (used[-1] + 1)
        counts = torch.stack([(norm_index == n).sum(-1) for n in range(norms)], -1)
        channels = [weight, norm_index, widths * cells.count, cells.scales[widths], (1 << widths) // 2]
        return cls(
            tiles=tuple(tiles),
            pieces=split_bfloat16(matrix),
            channels=torch.stack([c.float() for c in channels], 1),
            inverse_counts=torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0),
            place=torch.cat(blocks, 1).half(),
            chunk=chunk,
            columns=columns,
        )


@dataclass(frozen=True)
class ColumnPlan:
    """How rows in columns are encoded, all of it per channel. H KV heads, P padded channels.

    fields ``[H, 12, P]`` float32: weight; part in the mean of squares; half the number of levels; its inverse; the
        coefficients of the thresholds' polynomial, which has threshold j at ``j / half``; those of the levels'.
    pack ``[H, bins, P]`` int32: what of a code enters its column's part of a bin: ``position + 16 shift + 256 mask``.
    bins: (byte within the head's codes, words, columns per word) of each. bits: of the widest code.
    """

    fields: torch.Tensor
    pack: torch.Tensor
    bins: tuple[tuple[int, int, int], ...]
    bits: int

    @classmethod
    def of(cls, layouts: tuple[CodeLayout, ...], weight: torch.Tensor, norm_index: torch.Tensor) -> ColumnPlan:
        """layouts: of a row in columns. Its heads have the same bins, as these depend on the sum of bits alone."""
        columns = [layout.columns for layout in layouts]
        assert all(c.bins == columns[0].bins for c in columns) and int(norm_index.max()) == 0
        heads, padded = norm_index.shape
        bins = tuple((b.offset, b.words, b.repeat) for b in columns[0].bins)
        fields = torch.zeros(heads, 4 + 2 * COEFFICIENTS, padded, dtype=torch.float64)
        fields[:, 0] = weight
        fields[:, 1] = (norm_index == 0) / (norm_index == 0).sum(-1, keepdim=True)
        fields[:, 2:4] = 1
        pack = torch.zeros(heads, len(bins), padded, dtype=torch.int32)
        for h, head in enumerate(columns):
            for slot, (width, pieces) in enumerate(zip(head.widths, head.slots, strict=True)):
                where, half = slice(slot * COLUMNS, (slot + 1) * COLUMNS), 1 << (width - 1)
                level = polynomial(width)
                fields[h, 2, where], fields[h, 3, where] = half, 1 / half
                for i, (edge, middle) in enumerate(zip(_thresholds(level, 0.5 / half), level, strict=True)):
                    fields[h, 4 + i, where], fields[h, 4 + COEFFICIENTS + i, where] = edge, middle
                for piece in pieces:
                    _, _, repeat = bins[piece.bin]
                    column = torch.arange(COLUMNS, dtype=torch.int32)
                    shift = piece.shift + column // (COLUMNS // repeat) * (WORD_BITS // repeat)
                    pack[h, piece.bin, where] = piece.position | shift << 4 | ((1 << piece.width) - 1) << 8
        return cls(fields.float(), pack, bins, max(max(c.widths) for c in columns))


def _thresholds(level: tuple[float, ...], delta: float) -> list[float]:
    """Coefficients of the odd polynomial ``(L(z - delta) + L(z + delta)) / 2``: midpoints of neighbouring levels."""
    out = [0.0] * len(level)
    for i, c in enumerate(level):
        n = 2 * i + 1
        for k in range(0, n, 2):
            out[(n - k) // 2] += c * comb(n, k) * delta**k
    return out


def _tiles(widths: torch.Tensor) -> list[tuple[int, int, int]]:
    """(first channel, channels, bits) over all stored channels of ``[H, P]`` widths; sizes are powers of two."""
    stored = int((widths > 0).any(0).nonzero().max()) + 1
    runs: list[list[int]] = []  # first channel, channels, bits
    for start in range(0, stored, TILE):
        here = widths[:, start : start + TILE].unique().tolist()
        bits = here[0] if len(here) == 1 and here[0] <= MAX_CHAIN_BITS else 0
        if runs and runs[-1][2] == bits:
            runs[-1][1] += TILE
        else:
            runs.append([start, TILE, bits])
    tiles = []
    for start, size, bits in runs:
        while size:
            part = min(MAX_TILE, 1 << (size.bit_length() - 1))
            tiles.append((start, part, bits))
            start, size = start + part, size - part
    return tiles


def _moves(layout: CodeLayout) -> list[tuple[int, int, int, int]]:
    """(channel, p, byte, amount): the byte grows by ``amount * (code >> p)``, modulo 256 in total.

    A field of bits p .. n-1 is ``(code >> p) - ((code >> n) << (n - p))``: no masks that differ between channels.
    """
    out = []
    for channel, bits in enumerate(layout.widths):
        fields = sorted(
            (p, byte, shift) for table in layout.field_table.values() for byte, shift, p in [table[channel]]
        )
        fields = [field for field in fields if field[1] >= 0]
        for i, (position, byte, shift) in enumerate(fields):
            out.append((channel, position, byte, 1 << shift))
            upper = fields[i + 1][0] if i + 1 < len(fields) else bits
            if upper < bits:
                out.append((channel, upper, byte, -(1 << (shift + upper - position))))
    return out


def split_bfloat16(matrix: torch.Tensor) -> torch.Tensor:
    """``[H, P, P]`` float32 (in, out) as ``[H, 2, P, P]`` bfloat16 (out, in) whose sum is it to 2^-18 of each entry.

    Transposed, since narrow tiles of outputs are then read with their inner side contiguous; the other way
    round Triton 3.6 gets a warpgroup's product wrong for fewer than 64 of them.
    """
    high = matrix.bfloat16()
    return torch.stack([high, (matrix - high.float()).bfloat16()], 1).mT.contiguous()


@dataclass(frozen=True)
class Cells:
    """Nearest levels by one look-up: the magnitudes of each codebook cut into equal cells with at most one threshold.

    table ``[9, count, 4]`` float32: per width and cell its threshold (inf without one), the level below and
        above it, and the code of the level below, counted from zero up.
    scales ``[9]`` float32: cells per unit, a power of two, so that the cell of a number is exact.
    magnitudes: per width 0..4 eight positive levels, then eight where the j-th is the threshold below the j-th
        level; zeros beyond, and where the level is the first.
    """

    table: torch.Tensor
    scales: torch.Tensor
    magnitudes: tuple[float, ...]

    @property
    def count(self) -> int:
        return self.table.shape[1]

    @classmethod
    def of(cls, levels: torch.Tensor) -> Cells:
        """Of codebooks ``[9, 256]``. ValueError unless they are symmetric, which is what magnitudes stand on."""
        levels = levels.float().cpu()
        assert levels.shape == (MAX_BITS + 1, MAX_LEVELS)
        halves, scales = [], torch.ones(MAX_BITS + 1)
        for bits in range(1, MAX_BITS + 1):
            book = levels[bits, : 1 << bits]
            if not torch.equal(book, -book.flip(0)):
                raise ValueError(f"the codebook of {bits} bits is not symmetric about zero")
            half = len(book) // 2
            edges = boundaries(book)[half:]
            while len((edges * scales[bits]).floor().unique()) < len(edges):
                scales[bits] *= 2
            halves.append((book[half:], edges))
        last = max(float(edges[-1] * scales[b]) if len(edges) else 0.0 for b, (_, edges) in enumerate(halves, 1))
        count = 1 << (int(last) + 2 - 1).bit_length()
        table = torch.zeros(4, MAX_BITS + 1, count)
        table[0] = torch.inf
        for bits, (book, edges) in enumerate(halves, 1):
            cell = (edges * scales[bits]).long()
            table[0, bits, cell] = edges
            below = (cell < torch.arange(count)[:, None]).sum(-1)  # thresholds in earlier cells
            table[1, bits], table[3, bits] = book[below], below.float()
            table[2, bits] = book[(below + 1).clamp(max=len(book) - 1)]
        magnitudes = torch.zeros(MAX_CHAIN_BITS + 1, 2, 1 << (MAX_CHAIN_BITS - 1))
        for bits, (book, edges) in enumerate(halves[:MAX_CHAIN_BITS], 1):
            magnitudes[bits, 0, : len(book)], magnitudes[bits, 1, 1 : len(book)] = book, edges
        return cls(table.permute(1, 2, 0).contiguous(), scales, tuple(magnitudes.flatten().tolist()))
