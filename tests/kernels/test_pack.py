"""Packing is exact for every mix of widths, and takes not a bit more than it must."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_blockgtq.kernels.columns import COLUMNS
from sglang_blockgtq.kernels.layout import PLANES, CodeLayout
from sglang_blockgtq.kernels.pack import pack, unpack


@st.composite
def layouts(draw) -> CodeLayout:
    """Any non-increasing widths 0..8 of an even number of channels, or of slots of 16 channels, as columns have."""
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
    codes = random_codes(layout, 3, seed)
    data = pack(layout, codes)
    assert layout.code_bytes == -(-sum(layout.widths) // 8)
    assert data.shape == (3, layout.code_bytes)
    assert torch.equal(unpack(layout, data), codes)
    longer = torch.cat([data, torch.full((3, 2), 255, dtype=torch.uint8)], -1)
    assert torch.equal(unpack(layout, longer), codes)


@given(layouts(), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_field_table_says_where_every_bit_is(layout, seed):
    """Unpacking byte by byte through the table gives the codes, and no two fields share a bit."""
    codes = random_codes(layout, 2, seed)
    data = pack(layout, codes).int()
    seen = torch.zeros(layout.code_bytes, dtype=torch.int32)
    found = torch.zeros(2, layout.dim, dtype=torch.int32)
    for name, width in PLANES:
        for channel, (byte, shift, position) in enumerate(layout.field_table[name]):
            if byte < 0:
                continue
            mask = (1 << width) - 1
            assert shift + width <= 8
            assert not int(seen[byte]) & mask << shift
            seen[byte] |= mask << shift
            found[:, channel] |= (data[:, byte] >> shift & mask) << position
    assert torch.equal(found, codes.int())
    assert sum(int(byte).bit_count() for byte in seen) == sum(layout.widths)


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
