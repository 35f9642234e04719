"""Exact bytes of a row, and the structure of its planes."""

import pytest

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.kernels.layout import NORM_BYTES, PLANES, CodeLayout, RowLayout, uniform_layout

from .matrix import moments

#: (head_dim, k_bits, v_bits) -> bytes per token and KV head: without row padding, and the most with it.
EXPECTED = {
    (128, 2, 2): (68, 72),
    (128, 3, 2): (84, 88),
    (128, 3, 3): (100, 104),
    (128, 4, 4): (132, 136),
    (64, 2, 2): (36, 40),
    (64, 3, 2): (44, 48),
    (64, 3, 3): (52, 56),
    (64, 4, 4): (68, 72),
}


def row_of(head_dim, k_bits, v_bits, heads, allocator) -> RowLayout:
    rope = [RopeBlocks(head_dim, head_dim)]
    table = build_table(moments(heads, head_dim), rope, k_bits=k_bits, v_bits=v_bits, allocator=allocator)
    return table.row_layout(0)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", EXPECTED, ids=lambda s: "d{}-k{}v{}".format(*s))
def test_bytes_per_token_and_head(shape, heads):
    exact, padded = EXPECTED[shape]
    for allocator in ("template", "uniform"):
        row = row_of(*shape, heads, allocator)
        assert row.head_bytes == exact
        assert row.row_bytes <= heads * padded
        assert row.row_bytes % 8 == 0
        assert 0 <= row.row_bytes - heads * exact < 8


@pytest.mark.parametrize("allocator", ["paper", "product"])
def test_free_widths_pay_for_their_scales(allocator):
    row = row_of(128, 3, 3, 2, allocator)
    assert row.k_norms == max(len(set(k.widths)) for k in row.k) > 1
    assert row.head_bytes == 48 + 48 + NORM_BYTES * (row.k_norms + 1)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 3.25, 4, 5.5, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_template_planes_are_powers_of_two(head_dim, bits):
    """What a tensor-core dot takes without padding; fractions may add single blocks."""
    row = row_of(head_dim, bits, 2, 2, "template")
    assert row.uniform_heads
    if head_dim * bits % 8 == 0 and (head_dim // 2 * bits) % (head_dim // 16) == 0:
        for plane in row.k[0].planes:
            assert plane.num_elements & (plane.num_elements - 1) == 0
            assert plane.num_planar == plane.num_elements  # no tail


def test_parts_of_a_row_follow_each_other():
    """Odd code bytes: scales move to an even byte, the row to a multiple of 8."""
    k = (CodeLayout((3,) * 6), CodeLayout((2,) * 6, (0, 0, 0, 1, 1, 1)))  # 3 and 2 bytes
    row = RowLayout.of(k, uniform_layout(6, 1))  # 1 byte
    assert (row.k_code_bytes, row.v_code_bytes, row.norms) == (3, 1, 3)
    assert (row.v_offset, row.norm_offset, row.row_bytes) == (6, 8, 24)
    odd = RowLayout.of(k[:1], uniform_layout(6, 2))
    assert (odd.v_offset, odd.norm_offset, odd.row_bytes) == (3, 6, 16)
    assert not row.uniform_heads


def test_planes_of_a_mixed_head():
    layout = CodeLayout((6,) * 4 + (3,) * 8 + (1,) * 4)
    planes = {p.name: p for p in layout.planes}
    assert [name for name, _ in PLANES if name in planes] == ["hi", "two", "one"]
    assert (planes["hi"].offset, planes["hi"].num_bytes) == (0, 2)
    assert (planes["two"].offset, planes["two"].num_bytes) == (2, 3)  # 4 of the 6-bit codes, 8 of the 3-bit ones
    assert (planes["one"].offset, planes["one"].num_bytes) == (5, 1)
    assert [(r.start, r.stop, r.position) for r in planes["two"].runs] == [(0, 4, 0), (4, 12, 1)]
    # 12 one-bit fields: 8 in the plane's byte, 4 left over in the tail.
    assert layout.tail_offset == 6 and layout.code_bytes == 7
    assert layout.field_table["one"][-1] == (6, 3, 0)


@pytest.mark.parametrize("bits, total", [(2.5, 160), (1, 64), (3.02, 192), (8, 512)])
def test_fractional_bits_go_to_whole_blocks(bits, total):
    layout = uniform_layout(64, bits)
    assert layout.code_bits == total
    assert max(layout.widths) - min(layout.widths) <= 1
    assert layout.widths[::2] == layout.widths[1::2]
