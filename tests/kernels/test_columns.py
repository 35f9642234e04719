"""Columns fill 16-bit words without a gap, each code in as few pieces as may be, and say where every bit is."""

from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_blockgtq.kernels.format.columns import BIN_BITS, COLUMNS, MAX_CUT_SEGMENTS, Columns, columns_of
from sglang_blockgtq.kernels.format.layout import CodeLayout, uniform_layout
from sglang_blockgtq.kernels.format.pack import pack

MIXTURES = st.lists(st.integers(1, 8), min_size=1, max_size=16).map(lambda w: tuple(sorted(w, reverse=True)))


def segments(*widths: int) -> CodeLayout:
    return CodeLayout(tuple(w for w in widths for _ in range(COLUMNS)))


def assert_full(columns: Columns) -> None:
    """Every bit of every bin belongs to one piece, every bit of every code lies in one."""
    used = [0] * len(columns.bins)
    for bits, pieces in zip(columns.widths, columns.segments, strict=True):
        code = 0
        for piece in pieces:
            mask = (1 << piece.width) - 1
            assert not used[piece.bin] & mask << piece.shift and not code & mask << piece.position
            used[piece.bin] |= mask << piece.shift
            code |= mask << piece.position
        assert code == (1 << bits) - 1
    assert used == [(1 << where.bits) - 1 for where in columns.bins]


@given(MIXTURES)
@settings(max_examples=200, deadline=None)
def test_columns_fill_words_without_a_gap(widths):
    columns = columns_of(widths)
    if columns is None:
        return
    assert columns.widths == widths
    assert_full(columns)
    end = 0
    for where in columns.bins:
        assert where.bits in BIN_BITS and where.offset == end
        assert where.words * where.repeat == COLUMNS
        end += where.num_bytes
    assert end == 2 * sum(widths)
    assert [where.bits for where in columns.bins] == sorted((where.bits for where in columns.bins), reverse=True)
    assert sum(len(pieces) > 1 for pieces in columns.segments) <= MAX_CUT_SEGMENTS
    assert all(len(pieces) <= 3 for pieces in columns.segments)
    for b in range(len(columns.bins)):  # the widest from bit 0 up
        held = sorted((p.shift, p.width) for pieces in columns.segments for p in pieces if p.bin == b)
        assert [width for _, width in held] == sorted((width for _, width in held), reverse=True)


@given(MIXTURES)
@settings(max_examples=100, deadline=None)
def test_no_code_is_cut_without_need(widths):
    """Where whole codes can be put into the bins in plain first-fit order, none is cut."""
    columns = columns_of(widths)
    if columns is None or sum(widths) % 2:
        return
    room = [where.bits for where in columns.bins]
    for width in widths:
        fitting = next((b for b, left in enumerate(room) if left >= width), None)
        if fitting is None:
            return
        room[fitting] -= width
    assert all(len(pieces) == 1 for pieces in columns.segments)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_whole_bits_lie_in_columns(dim, bits):
    layout = uniform_layout(dim, bits)
    assert layout.columns is not None and layout.code_bytes == dim * bits // 8


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_most_mixtures_of_eight_segments_lie_in_columns(bits):
    """So that ``template`` has a choice at head_dim 128."""
    every = [w for w in combinations_with_replacement(range(1, 9), 8) if sum(w) == 8 * bits and len(set(w)) <= 4]
    assert sum(columns_of(tuple(reversed(w))) is not None for w in every) > 0.9 * len(every)


@pytest.mark.parametrize(
    "layout",
    [
        segments(3, 2, 2, 2),  # 9 bits: there is no bin of one
        segments(3, 0),
        CodeLayout((3,) * 24 + (2,) * 24),  # a segment of two widths
        CodeLayout((4,) * 24),  # a segment and a half
        CodeLayout((4,) * 32, (0,) * 16 + (1,) * 16),  # two scales
    ],
    ids=["odd", "not stored", "mixed", "half", "scales"],
)
def test_what_does_not_lie_in_columns(layout):
    assert layout.columns is None


def test_bits_of_the_worked_example():
    """6, 4, 3, 3, 2, 2, 2, 2 bits: the page's rules by hand."""
    layout = segments(6, 4, 3, 3, 2, 2, 2, 2)
    bins = layout.columns.bins
    assert [(b.bits, b.offset, b.words) for b in bins] == [(16, 0, 16), (8, 32, 8)]
    first = sorted((p.shift, p.width) for (p,) in layout.columns.segments if p.bin == 0)
    assert first == [(0, 6), (6, 4), (10, 3), (13, 3)]
    for segment, (piece,) in enumerate(layout.columns.segments):
        for column in (0, 7, 8, 15):
            codes = torch.zeros(layout.dim, dtype=torch.int32)
            codes[16 * segment + column] = (1 << piece.width) - 1
            data = pack(layout, codes, True).int()
            where = bins[piece.bin]
            word = where.offset // 2 + column % where.words
            shift = piece.shift + (8 if where.bits == 8 and column > 7 else 0)
            words = data[::2] | data[1::2] << 8
            expected = torch.zeros_like(words)
            expected[word] = ((1 << piece.width) - 1) << shift
            assert torch.equal(words, expected)
