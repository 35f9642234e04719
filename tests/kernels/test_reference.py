"""The reference: distortion on Gaussian data, edge cases, and attention against a dense softmax."""

from functools import cache

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.format.codebook import codebook_table
from sglang_blockgtq.kernels.format.codec import (
    NO_SEARCH,
    SCALE_MAX,
    SCALE_RULES,
    SCALE_SEARCH,
    V_SCALE_MAX,
    LayerCodec,
)
from sglang_blockgtq.kernels.format.layout import RowLayout, uniform_layout

from .matrix import HANDMADE, MEANS, PRODUCT, SMALL, TEMPLATE, data, decode_queries, over, relative_error

GAUSSIAN_MSE = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.00950, 5: 0.00250}


@cache
def normalised_mse(bits: int, rule: str, search: tuple[float, ...]) -> float:
    y = torch.randn(5_000, 128, generator=torch.Generator().manual_seed(bits))
    layout = uniform_layout(128, bits)
    back = reference.dequantize(*reference.quantize(y, layout, rule, search), layout)
    return float((y - back).double().square().sum() / y.double().square().sum())


@pytest.mark.parametrize("bits", GAUSSIAN_MSE)
def test_scale_rules_cost_what_they_must(bits):
    """With the least-squares scale, <y, c> / |c|^2, the error is 1 - cos^2 of the angle between y and c, D of it.

    norm keeps the length, |y| / |c|: 2 (1 - cos). unbiased, |y|^2 / <y, c>, makes that 1 / cos^2 - 1.
    """
    cosine = (1 - GAUSSIAN_MSE[bits]) ** 0.5
    assert normalised_mse(bits, "norm", NO_SEARCH) == pytest.approx(2 * (1 - cosine), rel=0.05)
    assert normalised_mse(bits, "unbiased", NO_SEARCH) == pytest.approx(1 / cosine**2 - 1, rel=0.05)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_the_search_finds_no_worse_units(rule):
    for bits in GAUSSIAN_MSE:
        assert normalised_mse(bits, rule, SCALE_SEARCH) <= normalised_mse(bits, rule, NO_SEARCH) * (1 + 1e-6)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_scale_rules_keep_what_they_promise(rule):
    y = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 2, 64)
    layout = uniform_layout(64, 2)
    codes, scales = reference.quantize(y, layout, rule, NO_SEARCH, weight)
    back = reference.dequantize(codes, scales, layout)
    yy, yb, bb = ((weight * a * b).sum(-1) for a, b in ((y, y), (y, back), (back, back)))
    kept = {"norm": (yy, bb), "unbiased": (yb, yy)}[rule]
    torch.testing.assert_close(*kept, rtol=2e-3, atol=0)


def test_unknown_scale_rule():
    row = RowLayout.of((uniform_layout(16, 2),), uniform_layout(16, 2))
    with pytest.raises(ValueError, match="scale rule 'l2' is not one of norm, unbiased"):
        LayerCodec.identity(row, scale_rule="l2")


def test_nearest_code_is_nearest():
    y = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    for bits in range(1, 9):
        layout = uniform_layout(32, bits)
        codes, _ = reference.quantize(y, layout)
        unit = y / y.square().mean(-1, keepdim=True).sqrt()
        distance = (unit[..., None] - codebook_table()[bits, : 1 << bits]).abs()
        chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
        torch.testing.assert_close(chosen, distance.min(-1).values, rtol=0, atol=1e-6)


@over([TEMPLATE, PRODUCT, HANDMADE])
def test_zero_and_huge_vectors(case):
    """A scale is cut at its limit; the direction is kept."""
    d = data(case)
    k, v = d.k[:3].clone(), d.v[:3].clone()
    k[0], v[0] = 0, 0
    k[1], v[1] = k[1] * 1e12, v[1] * 1e12
    back_k, back_v = reference.round_trip(d.codec, k, v)
    assert bool((back_k[0] == 0).all()) and bool((back_v[0] == 0).all())
    assert bool(torch.isfinite(back_k).all()) and bool(torch.isfinite(back_v).all())
    assert float(torch.cosine_similarity(back_v[1].flatten(), v[1].flatten(), dim=0)) > 0.9
    row = d.codec.layout
    packed = reference.encode(d.codec, k, v)[1, row.norm_offset : row.pad_offset]
    scales = packed.view(torch.float16).view(case.heads, -1)
    assert float(scales[:, :-1].max()) == SCALE_MAX and bool((scales[:, -1] == V_SCALE_MAX).all())


@over([TEMPLATE, PRODUCT, MEANS])
def test_a_token_does_not_depend_on_its_batch(case):
    d = data(case)
    for part in (slice(0, 1), slice(17, 18), slice(5, 36)):
        assert torch.equal(reference.encode(d.codec, d.k[part], d.v[part], d.positions[part]), d.packed[part])
    flipped = reference.encode(d.codec, d.k.flip(0), d.v.flip(0), d.positions.flip(0))
    assert torch.equal(flipped.flip(0), d.packed)


@over(SMALL)
def test_decode_undoes_the_transforms(case):
    """More bits, less error; and keys come back in their own channels."""
    d = data(case)
    k, v = reference.decode(d.codec, d.packed, d.positions)
    bound = {1: 0.7, 2: 0.4, 2.25: 0.37, 2.5: 0.35, 2.7: 0.33, 3: 0.25, 4: 0.15, 5: 0.1, 7: 0.03, 8: 0.02}
    assert relative_error(v, d.v) < bound[case.v_bits]
    # A codec by hand knows nothing of the keys' energies.
    assert relative_error(k, d.k) < (0.5 if case.allocator.startswith("handmade") else bound[case.k_bits])
    inner = torch.einsum("hed,hef->hdf", d.codec.q_in.double(), d.codec.k_in.double())
    eye = torch.eye(case.head_dim, dtype=torch.float64, device=inner.device)
    torch.testing.assert_close(inner, eye.expand_as(inner), rtol=0, atol=1e-4)


def dense(q, k, v, sm_scale):
    """q [M, Hq, D] over k, v [N, H, *]: out and lse."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("mhd,nhd->mhn", q.float(), k) * sm_scale
    return torch.einsum("mhn,nhd->mhd", logits.softmax(-1), v), logits.logsumexp(-1)


@over(SMALL)
def test_prefix_attention_is_softmax_over_decoded_tokens(case):
    d = data(case)
    out, lse = reference.prefix_attention(d.codec, d.q, d.packed, d.qo_indptr, d.kv_indptr, d.sm_scale)
    k, v = reference.decode(d.codec, d.packed, d.positions)
    qo, kv = d.qo_indptr.tolist(), d.kv_indptr.tolist()
    for b in range(len(qo) - 1):
        mine, theirs = slice(qo[b], qo[b + 1]), slice(kv[b], kv[b + 1])
        if kv[b] == kv[b + 1]:
            assert bool((out[mine] == 0).all()) and bool((lse[mine] == -torch.inf).all())
            continue
        want_out, want_lse = dense(d.q[mine], k[theirs], v[theirs], d.sm_scale)
        torch.testing.assert_close(out[mine], want_out, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(lse[mine], want_lse, rtol=1e-4, atol=1e-4)


def test_decode_attention_is_prefix_attention_of_one_query():
    d = data(TEMPLATE)
    q = d.q[: len(TEMPLATE.lengths)]
    one = torch.arange(len(q) + 1, device=q.device)
    got = reference.decode_attention(d.codec, q, d.packed, d.kv_indptr, d.sm_scale)
    want = reference.prefix_attention(d.codec, q, d.packed, one, d.kv_indptr, d.sm_scale)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("q_len", [2, 5])
@over([TEMPLATE, HANDMADE, MEANS])
def test_each_of_several_queries_sees_the_tokens_up_to_its_own(case, q_len):
    """Query i of a request of n tokens sees the first n - (q_len - 1 - i); where there are none, nothing."""
    d, q = data(case), decode_queries(case, q_len)
    out, lse = reference.decode_attention(d.codec, q, d.packed, d.kv_indptr, d.sm_scale, q_len)
    k, v = reference.decode(d.codec, d.packed, d.positions)
    for b, length in enumerate(case.lengths):
        first = int(d.kv_indptr[b])
        for i in range(q_len):
            t, seen = b * q_len + i, length - (q_len - 1 - i)
            if seen <= 0:
                assert not out[t].any() and bool((lse[t] == -torch.inf).all())
                continue
            part = slice(first, first + seen)
            want_out, want_lse = dense(q[t : t + 1], k[part], v[part], d.sm_scale)
            torch.testing.assert_close(out[t], want_out[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(lse[t], want_lse[0], rtol=1e-4, atol=1e-4)


def test_extend_is_causal_in_the_chunk_and_complete_in_the_prefix():
    """Token by token: each query against its prefix and the chunk up to itself, by one dense softmax."""
    d = data(TEMPLATE)
    generator = torch.Generator().manual_seed(2)
    k, v = (torch.randn(len(d.q), TEMPLATE.heads, 64, generator=generator).to(d.q) for _ in range(2))
    out, lse = reference.extend_attention(d.codec, d.q, k, v, d.packed, d.qo_indptr, d.kv_indptr, d.sm_scale)
    old_k, old_v = reference.decode(d.codec, d.packed)
    qo, kv = d.qo_indptr.tolist(), d.kv_indptr.tolist()
    for b in range(len(qo) - 1):
        for i in range(qo[b], qo[b + 1]):
            keys = torch.cat([old_k[kv[b] : kv[b + 1]], k[qo[b] : i + 1].float()])
            values = torch.cat([old_v[kv[b] : kv[b + 1]], v[qo[b] : i + 1].float()])
            want_out, want_lse = dense(d.q[i : i + 1], keys, values, d.sm_scale)
            torch.testing.assert_close(out[i : i + 1], want_out, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(lse[i : i + 1], want_lse, rtol=1e-4, atol=1e-4)


def test_merge_states_is_exact_over_disjoint_keys():
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(5, 2, 8, generator=generator) for _ in range(3))
    parts = [dense(q, k[a:b], v[a:b], 3.0) for a, b in ((0, 1), (1, 5))]
    merged = reference.merge_states(*parts[0], *parts[1])
    want = dense(q, k, v, 3.0)
    torch.testing.assert_close(merged[0], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged[1], want[1], rtol=1e-5, atol=1e-6)


def test_merge_states_with_an_empty_part():
    out, lse = torch.randn(3, 2, 4), torch.randn(3, 2) * 100
    none = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged in (reference.merge_states(out, lse, *none), reference.merge_states(*none, out, lse)):
        torch.testing.assert_close(merged[0], out)
        torch.testing.assert_close(merged[1], lse)
    both = reference.merge_states(*none, *none)
    assert torch.equal(both[0], none[0]) and torch.equal(both[1], none[1])
