"""Packing is exact for every mix of widths, and takes not a bit more than it must."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_blockgtq.kernels.any_layout.bits import bit_offsets
from sglang_blockgtq.kernels.format.columns import COLUMNS
from sglang_blockgtq.kernels.format.layout import CodeLayout
from sglang_blockgtq.kernels.format.pack import pack, unpack


@st.composite
def layouts(draw) -> CodeLayout:
    """Any non-increasing widths 0..8 of an even number of channels, or of segments of 16 channels, as columns have."""
    most, together = draw(st.sampled_from([(40, 2), (16, COLUMNS)]))
    widths = draw(st.lists(st.integers(together == COLUMNS, 8), min_size=1, max_size=most))
    return CodeLayout(tuple(w for w in sorted(widths, reverse=True) for _ in range(together)))


def test_both_layouts_are_drawn():
    kinds = set()

    @given(layouts())
    @settings(max_examples=100, deadline=None, database=None)
    def draw(layout):
        kinds.add(layout.columns is None)

    draw()
    assert kinds == {True, False}


def random_codes(layout: CodeLayout, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (tokens, layout.dim), generator=generator)
    return (noise & torch.tensor([(1 << w) - 1 for w in layout.widths])).to(torch.uint8)


@given(layouts(), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_round_trip_is_exact(layout, seed):
    """As a string of bits whatever the widths, and in columns where they can lie so."""
    codes = random_codes(layout, 3, seed)
    assert layout.code_bytes == -(-sum(layout.widths) // 8)
    for in_columns in (False, True) if layout.columns else (False,):
        data = pack(layout, codes, in_columns)
        assert data.shape == (3, layout.code_bytes) and data.dtype == torch.uint8
        assert torch.equal(unpack(layout, data, in_columns), codes)
        longer = torch.cat([data, torch.full((3, 2), 255, dtype=torch.uint8)], -1)
        assert torch.equal(unpack(layout, longer, in_columns), codes)


@given(layouts(), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_a_string_of_bits_is_code_after_code(layout, seed):
    """The lowest bit of the first code is the lowest of the first byte; behind the last one there are zeros."""
    (codes,) = random_codes(layout, 1, seed)
    string = 0
    for code, width, first in zip(codes.tolist(), layout.widths, bit_offsets(layout), strict=True):
        assert first >> 3 < layout.code_bytes or not width
        string |= code << first
    want = string.to_bytes(layout.code_bytes, "little")
    assert bytes(pack(layout, codes, False).tolist()) == want
    assert bit_offsets(layout)[0] == 0 and bit_offsets(layout)[-1] + layout.widths[-1] == layout.code_bits


@pytest.mark.parametrize(
    "widths, norms, message",
    [
        ((), (), "empty"),
        ((2, 3), (), "must not increase"),
        ((9, 1), (), "bits = 9"),
        ((2, 2), (0,), "1 norm indices for 2 channels"),
    ],
)
def test_rejects_impossible_layouts(widths, norms, message):
    with pytest.raises(ValueError, match=message):
        CodeLayout(widths, norms)
