"""Exact bytes of a row, and how rows are interleaved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.kernels.format.layout import (
    BLOCK_SLOTS,
    NORM_BYTES,
    CodeLayout,
    RowLayout,
    gather_rows,
    num_slots,
    scatter_rows,
    uniform_layout,
)

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
    allocator, _, granularity = allocator.partition("-")
    table = build_table(
        moments(heads, head_dim),
        rope,
        k_bits=k_bits,
        v_bits=v_bits,
        allocator=allocator,
        granularity=granularity or ("block" if allocator in ("paper", "product") else "segment"),
    )
    return table.row_layout(0)


@pytest.mark.parametrize("shape", EXPECTED, ids=lambda s: "d{}-k{}v{}".format(*s))
def test_bytes_per_token_and_head(shape):
    exact, padded = EXPECTED[shape]
    for heads, allocator in ((1, "template"), (2, "uniform"), (3, "template"), (8, "template")):
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


@pytest.mark.parametrize("shape", EXPECTED, ids=lambda s: "d{}-k{}v{}".format(*s))
def test_rows_that_the_fast_kernels_read(shape):
    """Bytes that a kernel takes with one instruction are a section, at a multiple of their size up to 16."""
    heads = 3
    for allocator in ("template", "uniform", "paper-segment", "product-segment"):
        row = row_of(*shape, heads, allocator)
        assert row.in_columns and all(layout.code_bits == int(shape[0] * shape[1]) for layout in row.k)
        assert row.uniform_heads or allocator.endswith("segment")
        sections = []
        for layouts, start in ((row.k, 0), ((row.v,) * heads, row.v_offset)):
            for head, layout in enumerate(layouts):
                bins = layout.columns.bins
                sections += [(start + head * layout.code_bytes + part.offset, part.num_bytes) for part in bins]
        sections += [(row.norm_offset + 4 * head, 4) for head in range(heads)]
        assert row.sections[: len(sections)] == tuple(sections)
        assert all(first * BLOCK_SLOTS % min(16, size) == 0 for first, size in row.sections)
    for allocator in ("paper", "product"):
        assert not row_of(*shape, heads, allocator).in_columns


def test_fractions_and_odd_sizes_may_not_lie_in_columns():
    assert row_of(128, 2.5, 2.5, 2, "template").in_columns
    assert not row_of(80, 3, 3, 2, "template").in_columns  # 15 bits in each column
    assert not row_of(80, 2.9, 2, 2, "uniform").in_columns


@st.composite
def row_layouts(draw) -> RowLayout:
    """Heads alike in columns or not, unlike in columns, and unlike."""
    units = st.lists(st.integers(1, 8), min_size=1, max_size=8).map(lambda w: sorted(w, reverse=True))
    size = draw(st.sampled_from([2, 16]))
    heads = draw(st.integers(1, 3))
    if draw(st.booleans()):
        same = [(6, 4, 1, 1), (3, 3, 3, 3), (5, 3, 2, 2)]  # bits, of which all lie in columns
        k = tuple(CodeLayout(tuple(w for w in same[h] for _ in range(16))) for h in range(heads))
    elif draw(st.booleans()):
        layout = CodeLayout(tuple(w for w in draw(units) for _ in range(size)))
        k = (layout,) * heads
    else:
        k = tuple(CodeLayout((b,) * 16, (0,) * 7 + (h,) * 9) for h, b in enumerate(range(2, 2 + heads)))
    return RowLayout.of(k, CodeLayout(tuple(w for w in draw(units) for _ in range(size))))


def test_heads_may_differ_in_columns_but_not_in_bytes_or_scales():
    def head(*widths: int) -> CodeLayout:
        return CodeLayout(tuple(w for w in widths for _ in range(16)))

    v = uniform_layout(64, 3)
    assert RowLayout.of((head(6, 4, 1, 1), head(3, 3, 3, 3)), v).in_columns
    assert not RowLayout.of((head(6, 4, 1, 1), head(4, 4, 4, 4)), v).in_columns
    # A rank whose heads have one scale, in a layer where another's have two: there are three for each head.
    assert not RowLayout((head(3, 3, 3, 3),), v, 24, 2).in_columns


@given(row_layouts())
@settings(max_examples=100, deadline=None)
def test_sections_cover_a_row_in_order(row):
    starts = [first for first, _ in row.sections]
    assert starts == [sum(size for _, size in row.sections[:i]) for i in range(len(starts))]
    assert sum(size for _, size in row.sections) == row.row_bytes
    assert row.in_columns or len(row.sections) == 1


@given(row_layouts(), st.data())
@settings(max_examples=100, deadline=None)
def test_gather_undoes_scatter_and_touches_no_other_slot(row, draw):
    slots = torch.tensor(draw.draw(st.lists(st.integers(0, 47), unique=True, max_size=20)), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (len(slots), row.row_bytes), dtype=torch.uint8, generator=generator)
    storage = torch.randint(0, 256, (48, row.row_bytes), dtype=torch.uint8, generator=generator)
    before = storage.clone()
    scatter_rows(row, storage, slots, rows)
    assert torch.equal(gather_rows(row, storage, slots), rows)
    others = torch.tensor([s for s in range(48) if s not in slots.tolist()], dtype=torch.int64)
    assert torch.equal(gather_rows(row, storage, others), gather_rows(row, before, others))
    # And byte by byte, as kernels find them: all rows of a block by sections, other rows one after another.
    for slot, want in zip(slots.tolist(), rows, strict=True):
        block = storage.flatten()[slot // BLOCK_SLOTS * BLOCK_SLOTS * row.row_bytes :]
        if not row.in_columns:
            assert torch.equal(storage[slot], want)
            continue
        for first, size in row.sections:
            at = first * BLOCK_SLOTS + slot % BLOCK_SLOTS * size
            assert torch.equal(block[at : at + size], want[first : first + size])


@pytest.mark.parametrize("wanted, slots", [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_whole_blocks(wanted, slots):
    assert num_slots(wanted) == slots


def test_parts_of_a_row_follow_each_other():
    """Odd code bytes: scales move to an even byte, the row to a multiple of 8."""
    k = (CodeLayout((3,) * 6), CodeLayout((2,) * 6, (0, 0, 0, 1, 1, 1)))  # 3 and 2 bytes
    row = RowLayout.of(k, uniform_layout(6, 1))  # 1 byte
    assert (row.k_code_bytes, row.v_code_bytes, row.norms) == (3, 1, 3)
    assert (row.v_offset, row.norm_offset, row.row_bytes) == (6, 8, 24)
    odd = RowLayout.of(k[:1], uniform_layout(6, 2))
    assert (odd.v_offset, odd.norm_offset, odd.row_bytes) == (3, 6, 16)
    assert not row.uniform_heads


@pytest.mark.parametrize("bits, total", [(2.5, 160), (1, 64), (3.02, 192), (8, 512)])
def test_fractional_bits_go_to_whole_blocks(bits, total):
    layout = uniform_layout(64, bits)
    assert layout.code_bits == total
    assert max(layout.widths) - min(layout.widths) <= 1
    assert layout.widths[::2] == layout.widths[1::2]
