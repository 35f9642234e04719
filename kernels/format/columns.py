"""Codes in columns: how a head whose widths come in segments of 16 channels packs them into 16-bit words.

A *segment* is 16 consecutive stored channels of one width, one channel in each of 16 *columns*. What a
column holds of all segments is a string of bits, which is cut into *bins* of 16, 8, 4 or 2 bits. A bin
of 16 bits is one little-endian word for every column; in a bin of ``b`` bits, word j carries columns
j, j + 16b/16, ... one above the other. So one shift and one mask of a bin's words give a whole segment
in the very registers in which a tensor-core dot wants it: no gather, no shuffle.

Every code lies in one bin where that is possible without a gap, else in two or three *pieces*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, product

COLUMNS = 16  # a tensor-core dot multiplies 16 float16 channels at a time
WORD_BITS = 16
BIN_BITS = (16, 8, 4, 2)
MAX_CUT_SEGMENTS = 2
_MAX_TRIES = 400  # ways of cutting that are tried, each with so many steps
_MAX_STEPS = 400


@dataclass(frozen=True)
class Bin:
    """``bits`` of each column in ``words`` 16-bit words from byte ``offset`` of the head's codes."""

    bits: int
    offset: int

    @property
    def words(self) -> int:
        return COLUMNS * self.bits // WORD_BITS

    @property
    def repeat(self) -> int:
        """Columns that share a word."""
        return WORD_BITS // self.bits

    @property
    def num_bytes(self) -> int:
        return 2 * self.words


@dataclass(frozen=True)
class Piece:
    """``width`` bits of a code, from its bit ``position``, at bit ``shift`` of the column's part of a bin."""

    bin: int
    shift: int
    width: int
    position: int


@dataclass(frozen=True)
class Columns:
    """bins in storage order; segments[s] the pieces of channels ``16 s .. 16 s + 15``, least significant first."""

    widths: tuple[int, ...]  # of each segment
    bins: tuple[Bin, ...]
    segments: tuple[tuple[Piece, ...], ...]


def _bin_sizes(bits: int) -> list[int] | None:
    """``bits`` as a sum of bins, largest first."""
    sizes = [WORD_BITS] * (bits // WORD_BITS)
    for size in BIN_BITS[1:]:
        if bits % WORD_BITS & size:
            sizes.append(size)
    return sizes if sum(sizes) == bits else None


def _assign(widths: list[int], sizes: list[int]) -> list[int] | None:
    """Bin of each width so that every bin is full; widths must be sorted, widest first."""
    room, out, steps = list(sizes), [], 0

    def go(i: int) -> bool:
        nonlocal steps
        steps += 1
        if i == len(widths):
            return True
        if steps > _MAX_STEPS:
            return False
        tried = set()
        for b in range(len(room)):
            if room[b] >= widths[i] and room[b] not in tried:
                tried.add(room[b])
                room[b] -= widths[i]
                out.append(b)
                if go(i + 1):
                    return True
                out.pop()
                room[b] += widths[i]
        return False

    return out if go(0) else None


def _cuts(width: int) -> Iterator[tuple[int, ...]]:
    for a in range(1, width):
        yield a, width - a
    for a in range(1, width - 1):
        for b in range(1, width - a):
            yield a, b, width - a - b


def _place(parts: list[tuple[int, int, int]], sizes: list[int], segments: int) -> list[list[Piece]] | None:
    """Pieces of every segment, from its parts (segment, position, width): in each bin the widest from bit 0 up."""
    parts = sorted(parts, key=lambda p: -p[2])
    bins = _assign([width for _, _, width in parts], sizes)
    if bins is None:
        return None
    out: list[list[Piece]] = [[] for _ in range(segments)]
    shift = [0] * len(sizes)
    for (segment, position, width), b in zip(parts, bins, strict=True):
        out[segment].append(Piece(b, shift[b], width, position))
        shift[b] += width
    return [sorted(pieces, key=lambda p: p.position) for pieces in out]


@cache
def columns_of(widths: tuple[int, ...]) -> Columns | None:
    """Pack segments of these widths without a gap, with as few cut codes as possible; None where that fails."""
    sizes = _bin_sizes(sum(widths))
    if sizes is None or not all(widths):
        return None
    count, tries = Counter(widths), 0
    for num_cut in range(MAX_CUT_SEGMENTS + 1):
        for cut in combinations_with_replacement(sorted(count), num_cut):
            if Counter(cut) - count:
                continue
            for cuts in product(*map(_cuts, cut)):
                tries += 1
                if tries > _MAX_TRIES:
                    return None
                left, parts = Counter(cut), []
                ways = list(zip(cut, cuts, strict=True))
                # The last segments of a width are the ones that are cut.
                for i in reversed(range(len(widths))):
                    if left[widths[i]]:
                        left[widths[i]] -= 1
                        way = next(w for w in ways if w[0] == widths[i])
                        ways.remove(way)
                        starts = [sum(way[1][:j]) for j in range(len(way[1]))]
                        parts += [(i, at, w) for at, w in zip(starts, way[1], strict=True)]
                    else:
                        parts.append((i, 0, widths[i]))
                segments = _place(parts, sizes, len(widths))
                if segments is not None:
                    starts = [sum(sizes[:b]) * COLUMNS // 8 for b in range(len(sizes))]
                    bins = tuple(Bin(size, start) for size, start in zip(sizes, starts, strict=True))
                    return Columns(widths, bins, tuple(map(tuple, segments)))
    return None
