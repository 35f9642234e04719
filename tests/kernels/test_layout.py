"""Exact bytes of a row, the structure of its planes, and how rows are interleaved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.kernels.layout import (
    BLOCK_SLOTS,
    NORM_BYTES,
    PLANES,
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
        granularity=granularity or "block",
    )
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


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("shape", EXPECTED, ids=lambda s: "d{}-k{}v{}".format(*s))
def test_rows_that_the_fast_kernels_read(shape, heads):
    """Bytes that a kernel takes with one instruction lie together, at a multiple of their size up to 16."""
    for allocator in ("template", "uniform", "paper-slot", "product-slot"):
        row = row_of(*shape, heads, allocator)
        assert row.in_columns and all(layout.code_bits == int(shape[0] * shape[1]) for layout in row.k)
        assert row.uniform_heads or allocator.endswith("slot")
        places = row.places()
        for layouts, start in ((row.k, 0), ((row.v,) * heads, row.v_offset)):
            for head, layout in enumerate(layouts):
                for part in layout.columns.bins:
                    first = start + head * layout.code_bytes + part.offset
                    at, stride = places[:, first : first + part.num_bytes]
                    assert bool((stride == part.num_bytes).all())
                    assert torch.equal(at, first * BLOCK_SLOTS + torch.arange(part.num_bytes, dtype=torch.int32))
                    assert int(at[0]) % min(16, part.num_bytes) == 0
        for head in range(heads):
            first = row.norm_offset + 4 * head
            at, stride = places[:, first : first + 4]
            assert at.tolist() == [first * BLOCK_SLOTS + i for i in range(4)] and stride.tolist() == [4] * 4
    for allocator in ("paper", "product"):
        assert not row_of(*shape, heads, allocator).in_columns


def test_fractions_and_odd_sizes_may_lie_in_planes():
    assert row_of(128, 2.5, 2.5, 2, "template").in_columns
    assert not row_of(80, 3, 3, 2, "template").in_columns  # 15 bits in each column
    assert not row_of(80, 2.9, 2, 2, "uniform").in_columns


@st.composite
def row_layouts(draw) -> RowLayout:
    """Heads alike in columns or in planes, unlike in columns, and unlike."""
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
def test_interleaving_gives_every_byte_a_place_of_its_own(row):
    places = row.places().long()
    every = torch.cat([places[0] + slot * places[1] for slot in range(BLOCK_SLOTS)])
    assert every.sort().values.tolist() == list(range(BLOCK_SLOTS * row.row_bytes))
    starts = [first for first, _ in row.sections]
    assert starts == [sum(size for _, size in row.sections[:i]) for i in range(len(starts))]
    assert sum(size for _, size in row.sections) == row.row_bytes


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
    # And byte by byte, as kernels find them.
    places, flat = row.places().long(), storage.flatten()
    for slot, want in zip(slots.tolist(), rows, strict=True):
        at = slot // BLOCK_SLOTS * BLOCK_SLOTS * row.row_bytes + places[0] + slot % BLOCK_SLOTS * places[1]
        assert torch.equal(flat[at], want)


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
