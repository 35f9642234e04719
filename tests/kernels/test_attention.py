"""Decode attention in Triton against the reference, on the reference's rows."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.any_layout import attention as any_layout
from sglang_blockgtq.kernels.decode import attention
from sglang_blockgtq.kernels.decode.attention import DecodeScratch, decode_attention
from sglang_blockgtq.kernels.decode.splits import num_splits, split_lengths
from sglang_blockgtq.kernels.device.rotate import rotate_queries
from sglang_blockgtq.kernels.device.tables import MAX_TEMPLATES, CodeSpec, ColumnTables, templates_of
from sglang_blockgtq.kernels.format.layout import CodeLayout, gather_rows, scatter_rows, uniform_layout
from sglang_blockgtq.kernels.terms import PLAIN, Terms

from .matrix import (
    ANY_LAYOUT,
    DEVICE,
    EVERY,
    HANDMADE,
    LARGE,
    MEAN_CASES,
    MEANS,
    OTHER_HEADS,
    OTHER_VALUES,
    PAGES,
    PRODUCT,
    TEMPLATE,
    TEMPLATES,
    TOLERANCE,
    WIDE,
    Case,
    assert_same,
    data,
    decode_queries,
    encoder_of,
    far_rows,
    over,
    relative_error,
)

LLAMA, LARGE_TEMPLATES, LARGE_MEANS, LARGE_ANY = LARGE[0], LARGE[7], LARGE[8], LARGE[-1]


@cache
def expected(case: Case, q_len: int = 1, terms: Terms = PLAIN, tree: torch.Tensor | None = None):
    d, q = data(case), decode_queries(case, q_len)
    return reference.decode_attention(d.codec, q, d.packed, d.kv_indptr, d.sm_scale, q_len, terms, tree)


def decode(case: Case, q_len: int = 1, **options):
    d, q = data(case), decode_queries(case, q_len)
    return decode_attention(d.tables, q, d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, q_len=q_len, **options)


def scratch_of(case: Case, q_len: int, splits: int, dtype: torch.dtype = torch.float32) -> DecodeScratch:
    """Poisoned."""
    shape = splits, q_len, case.heads * case.group
    out = torch.full((*shape, case.v_dim or case.head_dim), torch.nan, dtype=dtype, device=DEVICE)
    return DecodeScratch(out, torch.full(shape, torch.nan, device=DEVICE))


@over(OTHER_HEADS)
def test_other_heads_and_groups(case):
    assert_same(decode(case, target=8), expected(case), TOLERANCE[DEVICE][case.dtype])


@over(EVERY)
def test_decode_matches_reference(case, monkeypatch):
    d = data(case)
    assert isinstance(d.tables, ColumnTables) == (case not in (*ANY_LAYOUT, LARGE_ANY))
    # One split for each request, or two for the long one; on a GPU also more than there are tokens.
    for target in (1, 8) if case not in LARGE else (None, 1, 9, sum(case.lengths) + 5):
        got = decode(case, target=target)
        assert got[0].dtype == d.q.dtype
        assert_same(got, expected(case), TOLERANCE[DEVICE][case.dtype])


def with_q_len(*pairs: tuple[Case, int]):
    """Pairs of a case and its queries per request; see ``over``."""
    params = [
        pytest.param(case, q_len, id=f"{case}-q{q_len}", marks=[pytest.mark.gpu] if case in LARGE else [])
        for case, q_len in pairs
    ]
    return pytest.mark.parametrize("case, q_len", params)


# 6 to 24 rows for a KV head: one tile of 8, one of 16, and two.
@with_q_len(
    *((TEMPLATE, q_len) for q_len in (2, 5, 8)),
    (OTHER_VALUES, 3),
    (TEMPLATES[1], 3),
    (HANDMADE, 5),
    (MEANS, 4),
    (MEAN_CASES[1], 2),
    *((LLAMA, q_len) for q_len in (2, 8)),
    (LARGE_TEMPLATES, 3),
    (LARGE_MEANS, 3),
    (LARGE_ANY, 4),
)
def test_several_queries_of_a_request(case, q_len):
    """Each sees the tokens up to its own, and none at all if the request is too short."""
    want = expected(case, q_len)
    lse = want[1].view(-1, q_len, case.heads * case.group)
    assert case.lengths[1] == 1 and bool((lse[1, :-1] == -torch.inf).all()) and bool(lse[1, -1].isfinite().all())
    # Tokens 32 and up are a split of their own, of which the first of eight queries sees nothing.
    assert_same(decode(case, q_len, target=8), want, TOLERANCE[DEVICE][case.dtype])


def two_branches(case: Case, q_len: int) -> torch.Tensor:
    """The trees of a case's requests: two branches that follow one token in turn."""
    rows = [1]
    for i in range(1, q_len):
        rows.append(rows[max(i - 2, 0)] | 1 << i)
    signed = [x - (1 << 32) if x >> 31 else x for x in rows]
    return torch.tensor(signed * len(case.lengths), dtype=torch.int32, device=DEVICE)


@with_q_len((TEMPLATE, 12), (TEMPLATES[1], 3), (HANDMADE, 5), (MEANS, 4), (LLAMA, 32), (LARGE_MEANS, 8), (LARGE_ANY, 4))
def test_trees(case, q_len):
    """A query sees of the last tokens its ancestors alone."""
    tree = two_branches(case, q_len)
    for terms in (PLAIN, Terms(20, 2.0)):
        want = expected(case, q_len, terms, tree)
        assert_same(decode(case, q_len, tree=tree, terms=terms, target=8), want, 2 * TOLERANCE[DEVICE][case.dtype])
    with pytest.raises(AssertionError):
        assert_same(decode(case, q_len, terms=terms), want, TOLERANCE[DEVICE][case.dtype])


@with_q_len(
    *((case, 1) for case in (TEMPLATE, WIDE, PRODUCT, TEMPLATES[2], MEANS, MEAN_CASES[1])),
    *((case, 1) for case in (LLAMA, LARGE_MEANS, LARGE_ANY)),
    *((case, 3) for case in (TEMPLATE, HANDMADE, MEANS, LARGE_MEANS)),
)
def test_windows_caps_and_sinks(case, q_len):
    """A window of one token, within a tile, and over several with their first tile left out."""
    sinks = torch.linspace(-2, 3, case.heads * case.group, device=DEVICE)
    for terms in (Terms(1), Terms(20), Terms(70, 2.0, sinks), Terms(cap=0.5), Terms(sinks=sinks)):
        want = expected(case, q_len, terms)
        for target in (1, 8):
            got = decode(case, q_len, terms=terms, target=target)
            # What a sink leaves is small, and its rounding was that of the whole.
            assert_same(got, want, 2 * TOLERANCE[DEVICE][case.dtype])
    with pytest.raises(AssertionError):
        assert_same(got, expected(case, q_len), TOLERANCE[DEVICE][case.dtype])


@over([TEMPLATE, PRODUCT, TEMPLATES[0], MEANS])
def test_a_later_tile_with_greater_logits(case):
    """What was summed up before must shrink by as much: tokens come in the order of their logits, in one split."""
    d, q = data(case), decode_queries(case)
    request = case.lengths.index(max(case.lengths))
    part = slice(int(d.kv_indptr[request]), int(d.kv_indptr[request + 1]))
    k, v, slots = d.k[part], d.v[part], d.kv_indices[part]
    indptr = torch.tensor([0, len(k)], dtype=torch.int32, device=DEVICE)
    q = q[request : request + 1]
    for falling in (False, True):
        order = (k[:, 0].float() @ q[0, 0].float()).argsort(descending=falling)
        packed = reference.encode(d.codec, k[order], v[order], torch.arange(len(k), device=DEVICE))
        rows = d.rows.clone()
        scatter_rows(d.codec.layout, rows, slots.long(), packed)
        want = reference.decode_attention(d.codec, q, packed, indptr, d.sm_scale)
        got = decode_attention(d.tables, q, rows, indptr, slots, d.sm_scale, target=1)
        assert_same(got, want, TOLERANCE[DEVICE][case.dtype])


@over([TEMPLATE, PAGES, LLAMA])
def test_pools_beyond_32_bits(case, monkeypatch):
    """Their words are counted in 64 bits, and nothing else is different."""
    narrow = decode(case, target=9)
    seen = []
    kernel = attention.decode_kernel

    class Watched:
        def __getitem__(self, grid):
            return lambda *args, **constants: (seen.append(constants["NEAR"]), kernel[grid](*args, **constants))

    monkeypatch.setattr(attention, "decode_kernel", Watched())
    monkeypatch.setattr(attention, "_NEAR_WORDS", data(case).rows.numel() // 2)
    wide = decode(case, target=9)
    monkeypatch.setattr(attention, "_NEAR_WORDS", data(case).rows.numel() // 2 + 1)
    assert torch.equal(wide[0], narrow[0]) and torch.equal(decode(case, target=9)[1], wide[1])
    assert seen == [False, True]


@pytest.mark.skipif(DEVICE != "cpu", reason="takes memory that a GPU cannot just reserve")
@pytest.mark.usefixtures("overflow_is_an_error")
def test_slots_beyond_32_bits():
    """Addresses of far slots, of both kinds of rows, written and read."""
    for case in (TEMPLATE, PRODUCT):
        d, tokens = data(case), 3
        rows = far_rows(d.codec.layout.row_bytes)
        slots = torch.arange(len(rows) - tokens, len(rows))
        encoder_of(d.tables, rows)(d.k[:tokens], d.v[:tokens], slots)
        packed = gather_rows(d.codec.layout, rows, slots)
        both = reference.decode(d.codec, packed), reference.decode(d.codec, d.packed[:tokens])
        for got, want in zip(*both, strict=True):
            assert relative_error(got, want) < 1e-2
        q, indptr = decode_queries(case)[:1], torch.tensor([0, tokens])
        want = reference.decode_attention(d.codec, q, packed, indptr, d.sm_scale)
        got = decode_attention(d.tables, q, rows, indptr, slots, d.sm_scale)
        assert_same(got, want, TOLERANCE[DEVICE]["float32"])


@over([TEMPLATE, PRODUCT])
def test_decode_writes_into_given_buffers(case):
    """What a CUDA graph needs; the buffers are poisoned, so reading beyond what was written shows."""
    q = decode_queries(case)
    splits = num_splits(len(case.lengths), 9)
    scratch = scratch_of(case, 1, splits + 3)
    out = torch.full((*q.shape[:2], case.v_dim or case.head_dim), torch.nan, dtype=q.dtype, device=DEVICE)
    got, lse = decode(case, target=9, scratch=scratch, out=out)
    assert got is out
    assert_same((out, lse), expected(case), TOLERANCE[DEVICE][case.dtype])
    with pytest.raises(ValueError, match=rf"at least {splits + 4} splits of"):
        decode(case, target=splits + 4, scratch=scratch)


def test_partial_results_may_be_float16():
    """As they are on a GPU."""
    got = decode(TEMPLATE, target=9, scratch=scratch_of(TEMPLATE, 1, 9, torch.float16))
    assert_same(got, expected(TEMPLATE), 2e-3)


@pytest.mark.parametrize("case, q_len", [(TEMPLATE, 3), (PRODUCT, 1), (MEANS, 3)], ids=str)
def test_splits_are_those_of_the_reference(case, q_len, monkeypatch):
    """What each split leaves is the attention over the tokens that ``split_lengths`` gives it, and nothing more."""
    monkeypatch.setattr(attention, "merge_splits", lambda *_: None)  # which works in place
    d, q = data(case), decode_queries(case, q_len)
    target, tolerance = 9, 1e-4 if DEVICE == "cpu" else 2e-2
    scratch = scratch_of(case, q_len, num_splits(len(case.lengths), target) + 1)
    decode(case, q_len, target=target, scratch=scratch)
    size, counts = split_lengths(torch.tensor(case.lengths), target)
    split = 0
    for b, (length, count) in enumerate(zip(case.lengths, counts.tolist(), strict=True)):
        part = slice(int(d.kv_indptr[b]), int(d.kv_indptr[b + 1]))
        k, _ = reference.decode(d.codec, d.packed[part], d.positions[part])
        k = k.repeat_interleave(case.group, 1)
        for begin in range(0, length, size):
            for i in range(q_len):
                end = min(begin + size, length - (q_len - 1 - i))
                logits = torch.einsum("hd,nhd->hn", q[b * q_len + i].float(), k[begin : max(begin, end)]) * d.sm_scale
                got = scratch.lse[split, i]
                torch.testing.assert_close(got, logits.logsumexp(-1), rtol=tolerance, atol=tolerance)
            split += 1
        assert count == len(range(0, length, size))
    assert max(counts) > 1 and split < scratch.lse.shape[0]
    assert bool(scratch.lse[:split].isnan().logical_not().all()) and bool(scratch.lse[split:].isnan().all())
    assert bool(scratch.out[:split].isfinite().all()) and bool(scratch.out[split:].isnan().all())


def test_scratch_fits_every_batch_up_to_its_own():
    d = data(TEMPLATE)
    for q_len in (1, 2):
        scratch = DecodeScratch.of(d.tables, len(TEMPLATE.lengths), d.q.shape[1], q_len)
        for batch in (2, len(TEMPLATE.lengths)):
            got = decode_attention(
                d.tables,
                decode_queries(TEMPLATE, q_len)[: batch * q_len],
                d.rows,
                d.kv_indptr[: batch + 1],
                d.kv_indices,
                d.sm_scale,
                q_len=q_len,
                scratch=scratch,
            )
            want = (x[: batch * q_len] for x in expected(TEMPLATE, q_len))
            assert_same(got, want, TOLERANCE[DEVICE]["float32"])


@over([TEMPLATE, PRODUCT, MEANS, LLAMA, LARGE_MEANS])
def test_a_rotated_query_is_taken_as_it_is(case):
    """Encode may have rotated it already; then q itself is not read."""
    d, q = data(case), decode_queries(case)
    rotated = rotate_queries(d.tables.k, q, case.group)
    got = decode_attention(
        d.tables, torch.full_like(q, torch.nan), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, rotated=rotated
    )
    assert_same(got, expected(case), TOLERANCE[DEVICE][case.dtype])


def test_a_batch_of_nothing():
    d = data(TEMPLATE)
    out, lse = decode_attention(d.tables, d.q[:0], d.rows, d.kv_indptr[:1], d.kv_indices, d.sm_scale)
    assert out.shape == (0, *d.q.shape[1:]) and lse.shape == (0, d.q.shape[1])
    empty = torch.zeros_like(d.kv_indptr)
    out, lse = decode_attention(
        d.tables, decode_queries(TEMPLATE), d.rows, empty, d.kv_indices[:0], d.sm_scale, target=5
    )
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


def test_wrong_shapes_are_refused():
    case = TEMPLATE
    d, q = data(case), decode_queries(case)
    rest = d.kv_indptr, d.kv_indices, d.sm_scale
    with pytest.raises(ValueError, match=rf"\[tokens, a multiple of {case.heads} heads, {case.head_dim}\]"):
        decode_attention(d.tables, q[..., :-2], d.rows, *rest)
    with pytest.raises(ValueError, match="channels must be contiguous"):
        decode_attention(d.tables, q.mT.contiguous().mT, d.rows, *rest)
    with pytest.raises(ValueError, match=r"2 queries for each of 4 requests"):
        decode_attention(d.tables, q, d.rows, *rest, q_len=2)
    for q_len in (0, 33):
        with pytest.raises(ValueError, match=f"q_len {q_len}: 1 to 32"):
            decode_attention(d.tables, q, d.rows, *rest, q_len=q_len)
    for tree in (torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"int32 \[4\] is needed, of each query"):
            decode_attention(d.tables, q, d.rows, *rest, tree=tree.to(DEVICE))
    with pytest.raises(ValueError, match="no multiple of 16"):
        decode_attention(d.tables, q, d.rows[:-1], *rest)
    with pytest.raises(ValueError, match=rf"\[slots, {d.codec.layout.row_bytes}\] uint8"):
        decode_attention(d.tables, q, d.rows[:, :-8], *rest)
    with pytest.raises(ValueError, match="contiguous tensor"):
        decode_attention(d.tables, q, d.rows.T.contiguous().T, *rest)


@pytest.mark.parametrize("case", [PRODUCT, HANDMADE], ids=str)
def test_half_levels_of_any_layout_are_accurate_enough(case):
    """A GPU's operands, in the interpreter too, with gains far from 1. Those of columns are test_dequant's."""
    d = data(case)
    half = replace(d.tables, levels=d.tables.half_levels)
    for gain in (1.0, 1e4):
        q, sm_scale = decode_queries(case) * gain, d.sm_scale / gain
        got = decode_attention(half, q, d.rows, d.kv_indptr, d.kv_indices, sm_scale)
        assert 0 < relative_error(got[0], expected(case)[0])
        assert_same(got, expected(case), 3e-3)


def test_queries_of_any_layout_fit_shared_memory():
    """A tile of them is kept once for each scale, in float16."""
    for case in ANY_LAYOUT:
        tables = data(case).tables
        for rows in (1, 16, 17, 100, 1000):
            block = any_layout.block_m(tables, rows)
            assert block >= min(16, rows) and block & (block - 1) == 0
            assert block == 16 or block * 2 * tables.k.padded * tables.k_codes.norms <= 1 << 16


def test_heads_of_two_three_and_four_templates():
    """What the other tests stand on: each case has as many, and heads of all of them."""
    for case, count in zip(TEMPLATES, (3, 2, 4), strict=True):
        tables = data(case).tables
        assert len(tables.k_templates) == count and tables.k_kinds.unique().tolist() == list(range(count))
        for kind, layout in zip(tables.k_kinds.tolist(), tables.row.k, strict=True):
            assert tables.k_templates[kind] == CodeSpec.of(layout)
        assert tables.k_kinds[tables.k_order.long()].diff().min() >= 0
        assert sorted(tables.k_order.tolist()) == list(range(case.heads))


def test_templates_of_other_layers():
    """One binary serves all layers of a model: a layer's heads need not have every template."""
    case = TEMPLATES[1]
    d = data(case)
    other = uniform_layout(case.head_dim, case.k_bits)
    assert other.columns is not None and other not in d.codec.layout.k
    tables = ColumnTables.of(d.codec, DEVICE, templates_of([*d.codec.layout.k, other]))
    assert len(tables.k_templates) == len(d.tables.k_templates) + 1
    args = decode_queries(case), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale
    assert_same(decode_attention(tables, *args), expected(case), TOLERANCE[DEVICE][case.dtype])
    with pytest.raises(ValueError, match="a head of this layer has none of them"):
        ColumnTables.of(d.codec, templates=(other,))


def test_programs_are_dealt_to_multiprocessors_by_template(monkeypatch):
    """Fewer programs than multiprocessors, a last round that is not full, and splits that no request needs."""
    case = TEMPLATES[2]
    for count, target in ((3, 7), (200, 2)):
        monkeypatch.setattr(attention, "multiprocessors", lambda device, count=count: count)
        assert_same(decode(case, 2, target=target), expected(case, 2), TOLERANCE[DEVICE][case.dtype])


def test_what_tables_in_columns_refuse():
    """More templates than kernels have loops for, and rows that do not lie in columns."""
    codec = data(TEMPLATES[2]).codec
    templates = templates_of([*codec.layout.k, CodeLayout((5,) * 16 + (4,) * 16 + (2,) * 16 + (1,) * 16)])
    assert len(templates) == MAX_TEMPLATES + 1
    with pytest.raises(ValueError, match=f"{MAX_TEMPLATES + 1} layouts of keys: .* up to {MAX_TEMPLATES}"):
        ColumnTables.of(codec, templates=templates)
    with pytest.raises(ValueError, match="not in columns"):
        ColumnTables.of(data(PRODUCT).codec)


@over([PAGES])
def test_tables_say_how_much_memory_they_take(case):
    tables = data(case).tables
    sides = [tables.k.into, tables.k.back, tables.k.back_pieces, tables.k_plan.pieces]
    sides += [tables.v.into, tables.v.back, tables.v_plan.pieces]
    assert 1 < tables.nbytes / sum(x.nbytes for x in sides) < 1.3


@with_q_len((LLAMA, 1), (LLAMA, 2), (LARGE_TEMPLATES, 1), (LARGE_MEANS, 1), (LARGE_ANY, 4))
def test_decode_in_a_cuda_graph_follows_new_lengths(case, q_len):
    """Captured once with one set of lengths, replayed with another; nothing may ask the device while capturing."""
    d, q = data(case), decode_queries(case, q_len)
    kv_indptr = torch.zeros_like(d.kv_indptr)
    kv_indices = d.kv_indices.clone()
    scratch = DecodeScratch.of(d.tables, len(case.lengths), q.shape[1], q_len)

    def step():
        return decode_attention(d.tables, q, d.rows, kv_indptr, kv_indices, d.sm_scale, q_len=q_len, scratch=scratch)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    kv_indptr.copy_(d.kv_indptr)
    scratch.out.fill_(torch.nan)
    scratch.lse.fill_(torch.nan)
    graph.replay()
    assert_same(got, expected(case, q_len), TOLERANCE["cuda"][case.dtype])
