"""Which kernel a prefill gets, and that SGLang's Triton kernel computes what FlashAttention-3 is asked for."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from sglang_blockgtq.backend.prefill import choose, triton_attention
from sglang_blockgtq.kernels import reference

HEADS, GROUP = 2, 3


def indptr(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def by_hand(q, k, v, queries, keys, causal, scale):
    """out ``[T, Hq, Dv]`` and lse ``[T, Hq]``; a request's last query sees its last key."""
    outs, lses, q0, k0 = [], [], 0, 0
    for m, n in zip(queries, keys, strict=True):
        part = k[k0 : k0 + n].repeat_interleave(GROUP, 1), v[k0 : k0 + n].repeat_interleave(GROUP, 1)
        logits = torch.einsum("mhd,nhd->hmn", q[q0 : q0 + m], part[0]) * scale
        if causal:
            logits = logits.masked_fill(torch.ones(m, n, dtype=torch.bool).triu(n - m + 1), -torch.inf)
        lse = logits.logsumexp(-1)
        prob = torch.exp(logits - lse.nan_to_num(neginf=0)[..., None])
        outs.append(torch.einsum("hmn,nhd->mhd", prob, part[1]))
        lses.append(lse.T)
        q0, k0 = q0 + m, k0 + n
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("dim, v_dim", [(64, 64), (128, 64)])
@pytest.mark.parametrize(
    "queries, keys, causal",
    [
        ([5, 1, 20], [5, 1, 20], True),  # a chunk alone
        ([5, 1, 20], [9, 70, 20], True),  # with what precedes it
        ([5, 1, 3], [40, 0, 7], False),  # a piece of a prefix, of which one request has none
    ],
    ids=["chunk", "together", "piece"],
)
def test_triton_kernel_is_the_attention_of_the_chunk(queries, keys, causal, dim, v_dim, nan_poison):
    torch.manual_seed(0)
    q = torch.randn(sum(queries), HEADS * GROUP, dim)
    k, v = torch.randn(sum(keys), HEADS, dim), torch.randn(sum(keys), HEADS, v_dim)
    cu_q = indptr(queries)
    cu_k = cu_q if queries == keys else indptr(keys)
    want, want_lse = by_hand(q, k, v, queries, keys, causal, 0.2)
    for out in (None, torch.full((len(q), HEADS * GROUP, v_dim), torch.nan)):
        got, lse = triton_attention(
            q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max(queries), max_seqlen_k=max(keys),
            softmax_scale=0.2, causal=causal, num_splits=0, return_softmax_lse=True, out=out,
        )  # fmt: skip
        assert out is None or got is out
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        if lse is not None:
            torch.testing.assert_close(lse.T, want_lse, rtol=1e-5, atol=1e-5)
    assert (lse is None) == (causal and cu_k is not cu_q)  # which nobody merges


@pytest.fixture
def flash(monkeypatch):
    """SGLang's wrapper of FlashAttention-3, as it answers on a GPU of compute capability ``flash.major``."""
    module = ModuleType("sgl_kernel.flash_attn")
    module.major = 9
    module.is_fa3_supported = lambda device: module.major in (8, 9)
    module.flash_attn_varlen_func = object()
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (module.major, 0))
    return module


@pytest.mark.parametrize("major", [8, 9])
def test_flash_attention_wherever_sglang_has_it(flash, major):
    flash.major = major
    chosen = choose("cuda:0", torch.bfloat16, 128, 128)
    assert chosen.attend is flash.flash_attn_varlen_func and (chosen.name, chosen.why) == ("FlashAttention-3", "")


@pytest.mark.parametrize(
    "major, dtype, dims, why",
    [
        (10, torch.bfloat16, (128, 128), "compute capability 10.0"),
        (7, torch.float16, (128, 128), "compute capability 7.0"),
        (9, torch.float32, (128, 128), "a model in torch.float32"),
        (9, torch.bfloat16, (192, 128), "heads of 192 and 128 channels"),
        (9, torch.bfloat16, (288, 288), "heads of 288 and 288 channels"),
    ],
)
def test_triton_everywhere_else_with_the_reason(flash, major, dtype, dims, why):
    flash.major = major
    chosen = choose("cuda:0", dtype, *dims)
    assert chosen.attend is triton_attention and chosen.why == why and "Triton" in chosen.name


def test_merging_pieces_is_exact():
    """What the two halves of a prefix and the chunk leave is the attention over all of it."""
    torch.manual_seed(1)
    q, k, v = torch.randn(4, HEADS * GROUP, 64), torch.randn(34, HEADS, 64), torch.randn(34, HEADS, 64)
    cu_q, state = indptr([4]), None
    for part, causal in ((slice(30, 34), True), (slice(0, 11), False), (slice(11, 30), False)):
        cu_k = cu_q if causal else indptr([part.stop - part.start])
        out, lse = triton_attention(q, k[part], v[part], cu_q, cu_k, 4, 30, 0.2, causal, True)
        state = (out, lse.T) if state is None else reference.merge_states(*state, out, lse.T)
    want, want_lse = by_hand(q, k, v, [4], [34], True, 0.2)
    torch.testing.assert_close(state[0], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[1], want_lse, rtol=1e-5, atol=1e-5)
