"""Decode and prefix attention in Triton against the naive twin, on the twin's rows."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from sglang_blockgtq.kernels import attention, naive
from sglang_blockgtq.kernels.attention import DecodeScratch, decode_attention, merge_states, prefix_attention
from sglang_blockgtq.kernels.encode import encode
from sglang_blockgtq.kernels.layout import gather_rows, num_slots, uniform_layout
from sglang_blockgtq.kernels.splits import num_splits, split_lengths
from sglang_blockgtq.kernels.tables import MAX_TEMPLATES, ColumnTables, DeviceTables, templates_of

from .matrix import DEVICE, EVERY, LARGE, SLOTS, SMALL, TOLERANCE, Case, data, decode_queries, over, relative_error

TEMPLATE, PRODUCT, HANDMADE, CUT = SMALL[0], SMALL[7], SMALL[9], SMALL[13]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter merges in tiles: a program for every output row takes it minutes. Other tests have those."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "_ROWS_ALONE", 0)


def assert_same(got, want, tolerance: float) -> None:
    """Within ``tolerance`` in every query head, since a whole would hide an error in a weak one."""
    (out, lse), (want_out, want_lse) = got, want
    for head in range(out.shape[1]):
        assert relative_error(out[:, head], want_out[:, head]) < tolerance
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert bool((out[empty] == 0).all())
    torch.testing.assert_close(lse[~empty], want_lse[~empty], rtol=tolerance, atol=tolerance)


@cache
def decoded_by_twin(case: Case, q_len: int = 1):
    d, q = data(case), decode_queries(case, q_len)
    return naive.decode_attention(d.codec, q, d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, q_len)


def decode(case: Case, q_len: int = 1, **options):
    d, q = data(case), decode_queries(case, q_len)
    return decode_attention(d.tables, q, d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, q_len=q_len, **options)


TARGETS = 1, 8  # one split for each request, or two for the long one


def scratch_of(case: Case, q_len: int, splits: int, dtype: torch.dtype = torch.float32) -> DecodeScratch:
    """Poisoned."""
    shape = splits, q_len, case.heads * case.group
    out = torch.full((*shape, case.v_dim or case.head_dim), torch.nan, dtype=dtype, device=DEVICE)
    return DecodeScratch(out, torch.full(shape, torch.nan, device=DEVICE))


@over(EVERY)
def test_decode_matches_twin(case, monkeypatch):
    d = data(case)
    assert (bool(d.tables.k_templates)) == (d.tables.v_columns is not None) == case.fast
    # The other kernel is not there.
    monkeypatch.setattr(attention, "attention_kernel" if case.fast else "decode_kernel", None)
    for target in (None, *TARGETS):
        got = decode(case, target=target)
        assert got[0].dtype == d.q.dtype
        assert_same(got, decoded_by_twin(case), TOLERANCE[DEVICE][case.dtype])


def with_q_len(*pairs: tuple[Case, int]):
    """Some pairs of a case and its queries per request for the interpreter, which is slow, and all on a GPU."""
    params = [pytest.param(case, q_len, id=f"{case}-q{q_len}") for case, q_len in pairs]
    large = [(case, q_len) for case in LARGE for q_len in (2, 5, 8)]
    params += [pytest.param(case, q_len, id=f"{case}-q{q_len}", marks=pytest.mark.gpu) for case, q_len in large]
    return pytest.mark.parametrize("case, q_len", params)


# 6 to 24 rows for a KV head: one tile of 8, one of 16, and two.
@with_q_len(
    (TEMPLATE, 2),
    (TEMPLATE, 5),
    (TEMPLATE, 8),
    (PRODUCT, 8),
    (HANDMADE, 5),
    (SMALL[1], 2),
    (SMALL[5], 3),
    (SLOTS[0], 2),
    (SLOTS[1], 3),
)
def test_several_queries_of_a_request(case, q_len):
    """Each sees the tokens up to its own, and none at all if the request is too short."""
    want = decoded_by_twin(case, q_len)
    lse = want[1].view(-1, q_len, case.heads * case.group)
    assert case.lengths[1] == 1 and bool((lse[1, :-1] == -torch.inf).all()) and bool(lse[1, -1].isfinite().all())
    # Tokens 32 and up are a split of their own, of which the first of eight queries sees nothing.
    assert_same(decode(case, q_len, target=8), want, TOLERANCE[DEVICE][case.dtype])


@pytest.mark.parametrize("kind", ["tile", "row", "group"])
@over([TEMPLATE, SMALL[3], SMALL[5], PRODUCT, *LARGE])
def test_merging_kernels(case, kind, monkeypatch):
    if kind != "tile" and data(case).tables.v.padded > 128:
        pytest.skip("rows of so many channels are merged in tiles")
    monkeypatch.setattr(attention, "CHUNK", 1 if kind == "row" else 1 << 20)  # whether a row has many splits
    monkeypatch.setattr(attention, "_ROWS_ALONE", 1 << 30)
    monkeypatch.setattr(attention, "_GROUPS_AT_ONCE", 1 << 30 if kind == "group" else 0)
    for other in {"tile", "row", "group"} - {kind}:
        monkeypatch.setattr(attention, f"merge_{other}_kernel", None)
    for q_len in (1, 2) if case in LARGE else (2,):
        assert_same(decode(case, q_len, target=8), decoded_by_twin(case, q_len), TOLERANCE[DEVICE][case.dtype])


@pytest.mark.parametrize("rising", [True, False])
@over([SMALL[1], TEMPLATE, PRODUCT, SLOTS[0]])
def test_a_later_tile_with_greater_logits(case, rising):
    """What was summed up before must shrink by as much: tokens lie in the order of their logits, in one split."""
    d, q = data(case), decode_queries(case)
    request = case.lengths.index(max(case.lengths))
    part = slice(int(d.kv_indptr[request]), int(d.kv_indptr[request + 1]))
    k, _ = naive.decode(d.codec, d.packed[part])
    order = (k[:, 0] @ q[request, 0].float()).argsort(descending=not rising)
    slots, indptr = d.kv_indices[part][order], torch.tensor([0, len(order)], dtype=torch.int32, device=DEVICE)
    args = q[request : request + 1], d.rows, indptr, slots, d.sm_scale
    want = naive.decode_attention(d.codec, *args)
    assert_same(decode_attention(d.tables, *args, target=1), want, TOLERANCE[DEVICE][case.dtype])


@over([TEMPLATE, PRODUCT, *LARGE])
def test_more_splits_wanted_than_tokens(case):
    assert_same(decode(case, target=sum(case.lengths) + 5), decoded_by_twin(case), TOLERANCE[DEVICE][case.dtype])


@over([TEMPLATE, SMALL[1], SLOTS[0], *LARGE])
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


@pytest.mark.parametrize("q_len", [1, 8])
@over([TEMPLATE, PRODUCT, *LARGE])
def test_decode_writes_into_given_buffers(case, q_len):
    """What a CUDA graph needs; the buffers are poisoned, so reading beyond what was written shows."""
    q = decode_queries(case, q_len)
    splits = num_splits(len(case.lengths), 9)
    scratch = scratch_of(case, q_len, splits + 3)
    out = torch.full((*q.shape[:2], case.v_dim or case.head_dim), torch.nan, dtype=q.dtype, device=DEVICE)
    got, lse = decode(case, q_len, target=9, scratch=scratch, out=out)
    assert got is out
    assert_same((out, lse), decoded_by_twin(case, q_len), TOLERANCE[DEVICE][case.dtype])
    with pytest.raises(ValueError, match=rf"at least {splits + 4} splits of"):
        decode(case, q_len, target=splits + 4, scratch=scratch)


@over([TEMPLATE, SMALL[3], *LARGE])
def test_partial_results_may_be_float16(case):
    splits = num_splits(len(case.lengths), 9)
    got = decode(case, target=9, scratch=scratch_of(case, 1, splits, torch.float16))
    assert_same(got, decoded_by_twin(case), max(2e-3, TOLERANCE[DEVICE][case.dtype]))


@pytest.mark.parametrize("q_len", [1, 3])
@over([TEMPLATE, PRODUCT, *LARGE])
def test_splits_are_those_of_their_twin(case, q_len, monkeypatch):
    """What each split leaves is the attention over the tokens that ``split_lengths`` gives it, and nothing more."""
    monkeypatch.setattr(attention, "_merge", lambda *_: None)  # which works in place
    d, q = data(case), decode_queries(case, q_len)
    target, tolerance = 9, 1e-4 if DEVICE == "cpu" else 2e-2
    scratch = scratch_of(case, q_len, num_splits(len(case.lengths), target) + 1)
    decode(case, q_len, target=target, scratch=scratch)
    size, counts = split_lengths(torch.tensor(case.lengths), target)
    rows = gather_rows(d.codec.layout, d.rows, d.kv_indices.long())
    split = 0
    for b, (length, count) in enumerate(zip(case.lengths, counts.tolist(), strict=True)):
        k, _ = naive.decode(d.codec, rows[d.kv_indptr[b] : d.kv_indptr[b + 1]])
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
        got = decode(TEMPLATE, q_len, scratch=scratch)
        assert_same(got, decoded_by_twin(TEMPLATE, q_len), TOLERANCE[DEVICE]["float32"])
        got = decode_attention(
            d.tables,
            decode_queries(TEMPLATE, q_len)[: 2 * q_len],
            d.rows,
            d.kv_indptr[:3],
            d.kv_indices,
            d.sm_scale,
            q_len=q_len,
            scratch=scratch,
        )
        want = (x[: 2 * q_len] for x in decoded_by_twin(TEMPLATE, q_len))
        assert_same(got, want, TOLERANCE[DEVICE]["float32"])


@over([TEMPLATE, PRODUCT, *LARGE])
def test_a_turned_query_is_taken_as_it_is(case):
    """Encode may have turned it already; then q itself is not read."""
    d, q = data(case), decode_queries(case)
    turned = torch.einsum("thgd,hed->thge", q.float().unflatten(1, (case.heads, -1)), d.codec.q_in).flatten(1, 2)
    got = decode_attention(
        d.tables, torch.full_like(q, torch.nan), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, turned=turned
    )
    assert_same(got, decoded_by_twin(case), TOLERANCE[DEVICE][case.dtype])


def test_a_batch_of_nothing():
    d = data(TEMPLATE)
    out, lse = decode_attention(d.tables, d.q[:0], d.rows, d.kv_indptr[:1], d.kv_indices, d.sm_scale)
    assert out.shape == (0, *d.q.shape[1:]) and lse.shape == (0, d.q.shape[1])
    empty = torch.zeros_like(d.kv_indptr)
    out, lse = decode_attention(
        d.tables, decode_queries(TEMPLATE), d.rows, empty, d.kv_indices[:0], d.sm_scale, target=5
    )
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("case", [TEMPLATE, CUT], ids=str)
def test_wrong_shapes_are_refused(case):
    d, q = data(case), decode_queries(case)
    rest = d.kv_indptr, d.kv_indices, d.sm_scale
    with pytest.raises(ValueError, match=rf"\[tokens, a multiple of {case.heads} heads, {case.head_dim}\]"):
        decode_attention(d.tables, q[..., :-2], d.rows, *rest)
    with pytest.raises(ValueError, match="channels must be contiguous"):
        decode_attention(d.tables, q.mT.contiguous().mT, d.rows, *rest)
    with pytest.raises(ValueError, match=r"2 queries for each of 4 requests"):
        decode_attention(d.tables, q, d.rows, *rest, q_len=2)
    for q_len in (0, 9):
        with pytest.raises(ValueError, match=f"q_len {q_len}: 1 to 8"):
            decode_attention(d.tables, q, d.rows, *rest, q_len=q_len)
    with pytest.raises(ValueError, match="no multiple of 16"):
        decode_attention(d.tables, q, d.rows[:-1], *rest)
    with pytest.raises(ValueError, match=rf"\[slots, {d.codec.layout.row_bytes}\] uint8"):
        decode_attention(d.tables, q, d.rows[:, :-8], *rest)
    with pytest.raises(ValueError, match="contiguous tensor"):
        decode_attention(d.tables, q, d.rows.T.contiguous().T, *rest)


@over(EVERY)
def test_prefix_matches_twin(case):
    d = data(case)
    args = d.rows, d.qo_indptr, d.kv_indptr, d.kv_indices, d.sm_scale
    want = naive.prefix_attention(d.codec, d.q, *args)
    got = prefix_attention(d.tables, d.q, *args, max_q_len=max(case.queries))
    assert_same(got, want, TOLERANCE[DEVICE][case.dtype])


@over([TEMPLATE])
def test_prefix_in_splits_and_queries_of_no_request(case):
    d = data(case)
    args = d.rows, d.qo_indptr, d.kv_indptr, d.kv_indices, d.sm_scale
    q = torch.cat([d.q, d.q])  # what lies beyond qo_indptr belongs to nobody
    got = prefix_attention(d.tables, q, *args, max_q_len=max(case.queries), num_kv_splits=3)
    assert_same(got, naive.prefix_attention(d.codec, q, *args), TOLERANCE[DEVICE][case.dtype])
    assert bool((got[1][len(d.q) :] == -torch.inf).all())


@over([TEMPLATE, HANDMADE, *LARGE])
def test_extend_is_dense_attention_over_decoded_keys(case):
    """Prefix from the kernel, chunk from torch, merged: against one softmax over everything."""
    d = data(case)
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(len(d.q), case.heads, case.head_dim, generator=generator).to(d.q)
    v = torch.randn(len(d.q), case.heads, case.head_dim, generator=generator).to(d.q)
    prefix = prefix_attention(
        d.tables, d.q, d.rows, d.qo_indptr, d.kv_indptr, d.kv_indices, d.sm_scale, max(case.queries)
    )
    out, _ = merge_states(*prefix, *naive.chunk_attention(d.q, k, v, d.qo_indptr, d.sm_scale))
    old_k, old_v = naive.decode(d.codec, d.packed)
    qo, kv = d.qo_indptr.tolist(), d.kv_indptr.tolist()
    for b in range(len(qo) - 1):
        n, m = kv[b + 1] - kv[b], qo[b + 1] - qo[b]
        if not m:
            continue
        keys = torch.cat([old_k[kv[b] : kv[b + 1]], k[qo[b] : qo[b + 1]].float()]).repeat_interleave(case.group, 1)
        values = torch.cat([old_v[kv[b] : kv[b + 1]], v[qo[b] : qo[b + 1]].float()]).repeat_interleave(case.group, 1)
        logits = torch.einsum("mhd,nhd->hmn", d.q[qo[b] : qo[b + 1]].float(), keys) * d.sm_scale
        hidden = torch.ones(m, n + m, dtype=torch.bool, device=DEVICE).triu(n + 1)
        dense = torch.einsum("hmn,nhd->mhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values)
        assert relative_error(out[qo[b] : qo[b + 1]], dense) < TOLERANCE[DEVICE][case.dtype]


@pytest.mark.parametrize("case", [PRODUCT, HANDMADE], ids=str)
def test_float16_operands_are_accurate_enough(case):
    """The generic kernel's operands on a GPU, in the interpreter too, with gains far from 1. See test_fields."""
    d = data(case)
    half = replace(d.tables, levels=d.tables.half_levels)
    for gain in (1.0, 1e4):
        q, sm_scale = decode_queries(case) * gain, d.sm_scale / gain
        got = decode_attention(half, q, d.rows, d.kv_indptr, d.kv_indices, sm_scale)
        assert 0 < relative_error(got[0], decoded_by_twin(case)[0])
        assert_same(got, decoded_by_twin(case), 3e-3)


def test_slots_beyond_two_gib():
    """Byte offsets of far slots do not fit 32 bits. The memory is only reserved: no page but the last is touched."""
    d = data(TEMPLATE)
    row_bytes, tokens = d.codec.layout.row_bytes, len(d.k)
    slots = num_slots((1 << 31) // row_bytes + 2 * tokens)
    rows = torch.zeros(slots, row_bytes, dtype=torch.uint8, device=DEVICE)
    loc = torch.arange(slots - tokens, slots, device=DEVICE)
    encode(d.tables, d.k, d.v, rows, loc)
    assert torch.equal(gather_rows(d.codec.layout, rows, loc), d.packed)
    for kernel in (d.tables, replace(d.tables, k_templates=(), v_columns=None)):
        got = decode_attention(kernel, decode_queries(TEMPLATE), rows, d.kv_indptr, loc, d.sm_scale)
        assert_same(got, decoded_by_twin(TEMPLATE), TOLERANCE[DEVICE]["float32"])


@over([TEMPLATE, SMALL[3], *SLOTS, *(case for case in LARGE if case.fast)])
def test_the_generic_kernel_reads_columns_too(case):
    """As it does for a prefix."""
    d = data(case)
    tables = replace(d.tables, k_templates=(), v_columns=None)
    got = decode_attention(
        tables, decode_queries(case, 2), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, q_len=2, target=8
    )
    assert_same(got, decoded_by_twin(case, 2), TOLERANCE[DEVICE][case.dtype])


def test_heads_of_two_three_and_four_templates():
    """What the other tests stand on: each case has as many, and heads of all of them."""
    for case, count in zip(SLOTS, (3, 2, 4), strict=True):
        tables = data(case).tables
        assert len(tables.k_templates) == count and tables.k_kinds.unique().tolist() == list(range(count))
        for kind, layout in zip(tables.k_kinds.tolist(), tables.row.k, strict=True):
            assert tables.k_templates[kind] == ColumnTables.of(layout)


@over(SLOTS[:2])
def test_templates_of_other_layers(case):
    """One binary serves all layers of a model: a layer's heads need not have every template."""
    d = data(case)
    other = uniform_layout(case.head_dim, case.k_bits)
    assert other.columns is not None and other not in d.codec.layout.k
    tables = DeviceTables.of(d.codec, templates=templates_of([*d.codec.layout.k, other]))
    assert len(tables.k_templates) == len(d.tables.k_templates) + 1
    args = decode_queries(case), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale
    assert_same(decode_attention(tables, *args), decoded_by_twin(case), TOLERANCE[DEVICE][case.dtype])
    with pytest.raises(ValueError, match="a head of this layer has none of them"):
        DeviceTables.of(d.codec, templates=(other,))


@over(SLOTS)
def test_programs_are_dealt_to_multiprocessors_by_template(case, monkeypatch):
    """Fewer programs than multiprocessors, a last round that is not full, and splits that no request needs."""
    d = data(case)
    for count, target in ((3, 7), (200, 2)):
        monkeypatch.setattr(attention, "_multiprocessors", lambda device, count=count: count)
        got = decode_attention(
            d.tables, decode_queries(case, 4), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, q_len=4, target=target
        )
        assert_same(got, decoded_by_twin(case, 4), TOLERANCE[DEVICE][case.dtype])


def test_more_templates_than_kernels_have_loops_for():
    """Such rows lie in columns all the same, and the generic kernel reads them."""
    case = SLOTS[2]
    d = data(case)
    other = uniform_layout(case.head_dim, 3)
    assert other.columns is not None and d.codec.layout.in_columns
    templates = templates_of([*d.codec.layout.k, other])
    assert len(templates) == MAX_TEMPLATES + 1
    tables = DeviceTables.of(d.codec, templates=templates)
    assert not tables.k_templates and tables.v_columns is None
    args = decode_queries(case), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale
    assert_same(decode_attention(tables, *args), decoded_by_twin(case), TOLERANCE[DEVICE][case.dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("q_len", [1, 4])
@over(LARGE)
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
    assert_same(got, decoded_by_twin(case, q_len), TOLERANCE["cuda"][case.dtype])
