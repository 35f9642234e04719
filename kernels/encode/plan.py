"""What one side of a layer needs to be encoded: tiles of channels, and how codes become words.

A kernel is compiled for the tiles (a static structure, the same in every head) and reads the rest as data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import comb
from typing import NamedTuple

import torch

from ..format.codebook import MAX_BITS, boundaries, codebook_table, polynomial
from ..format.columns import COLUMNS, Columns
from ..format.layout import CodeLayout

MAX_TILE = 64  # channels; a wider one needs more registers at once when codes are made of it
MAX_CHAIN_BITS = 4  # up to here the nearest level is found by comparing with every threshold
COEFFICIENTS = 4  # of a codebook's polynomial, zeros included


class Tile(NamedTuple):
    """Channels ``start .. start + size - 1`` of every head, which a kernel holds in one tensor."""

    start: int
    size: int  # a power of two
    bits: int  # their width, 1 to 4; 0 where it is larger or mixed: such channels look their levels up in Cells
    flat: bool  # they all share one weight
    bins: int  # bit b is set where some code enters bin b


TILE_FIELDS = len(Tile._fields)


@dataclass(frozen=True)
class EncodePlan:
    """H KV heads, P padded channels.

    tiles: of the kernel for many tokens.
    pieces ``[H, 2, P, P]`` bfloat16: the matrix, (out, in), as a sum of two.
    lookup ``[H, 4, P]`` float32, for that kernel: weight, start and scale of the cells, half the number of levels.
    channels ``[H, 12, P]`` float32, for the kernel for a few tokens: weight; part in the mean of squares; half the
        number of levels; its inverse; the coefficients of the thresholds' polynomial, which has threshold j at
        ``j / half``; those of the levels'.
    pack: :func:`word_moves`.
    bins: (byte within the head's codes, words, columns per word) of each. bits: of the widest code.
    """

    tiles: tuple[Tile, ...]
    pieces: torch.Tensor
    lookup: torch.Tensor
    channels: torch.Tensor
    pack: torch.Tensor
    bins: tuple[tuple[int, int, int], ...]
    bits: int

    @property
    def flat_tiles(self) -> tuple[int, ...]:
        """The tiles as one tuple of integers: a constant that every Triton takes."""
        return tuple(int(n) for tile in self.tiles for n in tile)

    @classmethod
    def of(cls, layouts: tuple[CodeLayout, ...], weight: torch.Tensor, matrix: torch.Tensor) -> EncodePlan:
        """layouts: of a row in columns; its heads have the same bins, as these depend on the sum of bits alone.

        weight ``[H, P]`` and matrix ``[H, P, P]`` (in, out), as Side has them.
        """
        columns = [layout.require_columns() for layout in layouts]
        assert all(c.bins == columns[0].bins for c in columns)
        heads, padded = weight.shape
        bins = tuple((b.offset, b.words, b.repeat) for b in columns[0].bins)
        widths = torch.zeros(heads, padded, dtype=torch.int64)
        widths[:, : layouts[0].dim] = torch.tensor([layout.widths for layout in layouts])
        cells = Cells.own()
        half = ((1 << widths) // 2).clamp(min=1)

        channels = torch.zeros(heads, 4 + 2 * COEFFICIENTS, padded, dtype=torch.float64)
        channels[:, 0] = weight
        channels[:, 1] = (widths > 0) / layouts[0].dim
        channels[:, 2], channels[:, 3] = half, 1 / half
        for h, head in enumerate(columns):
            for i, bits in enumerate(head.widths):
                level = (*polynomial(bits), *[0.0] * COEFFICIENTS)[:COEFFICIENTS]
                both = torch.tensor([*_thresholds(level, 0.5 / (1 << (bits - 1))), *level])
                channels[h, 4:, i * COLUMNS : (i + 1) * COLUMNS] = both[:, None]
        pack = word_moves(columns, padded)

        tiles = []
        for start, size, bits in _tiles(widths[:, : layouts[0].dim]):
            part = slice(start, start + size)
            flat = bool((weight[:, part] == weight[:, start : start + 1]).all()) and bits > 0
            used = sum(1 << b for b in range(len(bins)) if bool((pack[:, b, part] >> 8).any()))
            tiles.append(Tile(start, size, bits, flat, used))
        lookup = [weight, widths * cells.count, cells.scales[widths], half]
        return cls(
            tiles=tuple(tiles),
            pieces=split_bfloat16(matrix),
            lookup=torch.stack([x.float() for x in lookup], 1),
            channels=channels.float(),
            pack=pack,
            bins=bins,
            bits=max(max(c.widths) for c in columns),
        )


def word_moves(columns: list[Columns], padded: int) -> torch.Tensor:
    """What of each channel's code enters its column's part of each bin, int32 ``[H, bins, P]``.

    ``position + 16 shift + 256 mask``: ``((code >> position) & mask) << shift`` is added to the column's word.
    """
    pack = torch.zeros(len(columns), len(columns[0].bins), padded, dtype=torch.int32)
    column = torch.arange(COLUMNS, dtype=torch.int32)
    for h, head in enumerate(columns):
        for i, pieces in enumerate(head.segments):
            for piece in pieces:
                where = head.bins[piece.bin]
                shift = piece.shift + column // where.words * where.bits
                move = piece.position | shift << 4 | ((1 << piece.width) - 1) << 8
                pack[h, piece.bin, i * COLUMNS : (i + 1) * COLUMNS] = move
    return pack


def _thresholds(level: tuple[float, ...], delta: float) -> list[float]:
    """Coefficients of the odd polynomial ``(L(z - delta) + L(z + delta)) / 2``: midpoints of neighbouring levels."""
    out = [0.0] * len(level)
    for i, c in enumerate(level):
        n = 2 * i + 1
        for k in range(0, n, 2):
            out[(n - k) // 2] += c * comb(n, k) * delta**k
    return out


def _tiles(widths: torch.Tensor) -> list[tuple[int, int, int]]:
    """(first channel, channels, bits) over all channels of ``[H, D]`` widths; sizes are powers of two."""
    runs: list[list[int]] = []  # first channel, channels, bits
    for start in range(0, widths.shape[1], COLUMNS):
        here = widths[:, start : start + COLUMNS].unique().tolist()
        bits = here[0] if len(here) == 1 and here[0] <= MAX_CHAIN_BITS else 0
        if runs and runs[-1][2] == bits:
            runs[-1][1] += COLUMNS
        else:
            runs.append([start, COLUMNS, bits])
    tiles = []
    for start, size, bits in runs:
        while size:
            part = min(MAX_TILE, 1 << (size.bit_length() - 1))
            tiles.append((start, part, bits))
            start, size = start + part, size - part
    return tiles


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
    @cache
    def own(cls) -> Cells:
        """Of the project's codebooks, which are symmetric: that is what magnitudes stand on."""
        levels = codebook_table()
        halves, scales = [], torch.ones(MAX_BITS + 1)
        for bits in range(1, MAX_BITS + 1):
            book = levels[bits, : 1 << bits]
            assert torch.equal(book, -book.flip(0))
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
