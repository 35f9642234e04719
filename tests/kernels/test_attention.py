"""Decode and prefix attention in Triton against the naive twin, on the twin's rows."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from sglang_blockgtq.kernels import naive
from sglang_blockgtq.kernels.attention import decode_attention, merge_states, prefix_attention
from sglang_blockgtq.kernels.encode import encode

from .matrix import DEVICE, EVERY, LARGE, SMALL, TOLERANCE, Case, data, over, relative_error

TEMPLATE, PRODUCT, HANDMADE = SMALL[0], SMALL[7], SMALL[9]


def assert_same(got, want, tolerance: float) -> None:
    (out, lse), (want_out, want_lse) = got, want
    assert relative_error(out, want_out) < tolerance
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert bool((out[empty] == 0).all())
    torch.testing.assert_close(lse[~empty], want_lse[~empty], rtol=tolerance, atol=tolerance)


def queries(case: Case) -> torch.Tensor:
    """One query per request."""
    d = data(case)
    return d.q[: len(case.lengths)].contiguous()


@cache
def decoded_by_twin(case: Case):
    d = data(case)
    return naive.decode_attention(d.codec, queries(case), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale)


def decode(case: Case, **options):
    d = data(case)
    return decode_attention(d.tables, queries(case), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, **options)


@over(EVERY)
def test_decode_matches_twin(case):
    want = decoded_by_twin(case)
    # Requests of one split, of splits that get no tokens, and of more splits than the grid has.
    splits = (torch.arange(len(case.lengths), device=DEVICE) % 3 * 2 + 1).int()
    got = decode(case, num_kv_splits=splits, max_kv_splits=3)
    assert got[0].dtype == data(case).q.dtype
    assert_same(got, want, TOLERANCE[DEVICE][case.dtype])


@over([TEMPLATE, *LARGE])
def test_number_of_splits_does_not_matter(case):
    want = decoded_by_twin(case)
    asked = torch.full((len(case.lengths),), 9, dtype=torch.int32, device=DEVICE)  # more than the grid has
    for most in (1, 2, 8):
        assert_same(decode(case, max_kv_splits=most), want, TOLERANCE[DEVICE][case.dtype])
        assert_same(decode(case, num_kv_splits=asked, max_kv_splits=most), want, TOLERANCE[DEVICE][case.dtype])


@over([TEMPLATE, *LARGE])
def test_decode_writes_into_given_buffers(case):
    """What a CUDA graph needs; the buffers are poisoned, so reading beyond what was written shows."""
    d, q = data(case), queries(case)
    batch, heads = q.shape[:2]
    partial_out = torch.full((batch, heads, 4, case.head_dim), torch.nan, device=DEVICE)
    partial_lse = torch.full((batch, heads, 4), torch.nan, device=DEVICE)
    out = torch.full_like(q, torch.nan)
    got, lse = decode(case, max_kv_splits=4, partial_out=partial_out, partial_lse=partial_lse, out=out)
    assert got is out
    assert_same((out, lse), decoded_by_twin(case), TOLERANCE[DEVICE][case.dtype])
    with pytest.raises(ValueError, match=r"partial_out .* are needed"):
        decode(case, max_kv_splits=5, partial_out=partial_out, partial_lse=partial_lse)
    with pytest.raises(ValueError, match=rf"\[tokens, a multiple of {case.heads} heads, {case.head_dim}\]"):
        decode_attention(d.tables, q[..., :-2], d.rows, d.kv_indptr, d.kv_indices, d.sm_scale)


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


@pytest.mark.parametrize("case", [TEMPLATE, PRODUCT], ids=str)
def test_float16_operands_are_accurate_enough(case):
    """The GPU's operand type, in the interpreter too: within 1 % of the twin, with gains far from 1."""
    d = data(case)
    half = replace(d.tables, levels=d.tables.half_levels)
    for gain in (1.0, 1e4):
        q, sm_scale = queries(case) * gain, d.sm_scale / gain
        got = decode_attention(half, q, d.rows, d.kv_indptr, d.kv_indices, sm_scale)
        assert 0 < relative_error(got[0], decoded_by_twin(case)[0])
        assert_same(got, decoded_by_twin(case), 3e-3)


def test_slots_beyond_two_gib():
    """Byte offsets of far slots do not fit 32 bits. The memory is only reserved: no page but the last is touched."""
    d = data(TEMPLATE)
    row_bytes, tokens = d.codec.layout.row_bytes, len(d.k)
    slots = (1 << 31) // row_bytes + 2 * tokens
    rows = torch.zeros(slots, row_bytes, dtype=torch.uint8, device=DEVICE)
    loc = torch.arange(slots - tokens, slots, device=DEVICE)
    encode(d.tables, d.k, d.v, rows, loc)
    assert torch.equal(rows[slots - tokens :], d.packed)
    got = decode_attention(d.tables, queries(TEMPLATE), rows, d.kv_indptr, loc, d.sm_scale)
    assert_same(got, decoded_by_twin(TEMPLATE), TOLERANCE[DEVICE]["float32"])


@pytest.mark.gpu
@over(LARGE)
def test_decode_in_a_cuda_graph_follows_new_lengths(case):
    """Captured once with one set of lengths, replayed with another; nothing may ask the device while capturing."""
    d, q = data(case), queries(case)
    splits = torch.full((len(case.lengths),), 4, dtype=torch.int32, device="cuda")
    kv_indptr = torch.zeros_like(d.kv_indptr)
    kv_indices = d.kv_indices.clone()

    def step():
        return decode_attention(d.tables, q, d.rows, kv_indptr, kv_indices, d.sm_scale, splits, 8)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    kv_indptr.copy_(d.kv_indptr)
    graph.replay()
    assert_same(got, decoded_by_twin(case), TOLERANCE["cuda"][case.dtype])
