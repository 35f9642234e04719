"""Extend through the workspace against the twin, with a plain stand-in for FlashAttention-3, or with itself."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sglang_blockgtq.backend import extend
from sglang_blockgtq.backend.extend import ExtendPlan, FlashExtend, flash_attention_3
from sglang_blockgtq.kernels import naive
from sglang_blockgtq.kernels.layout import scatter_rows

from .matrix import DEVICE, LARGE, TOLERANCE, Case, data, over, relative_error

#: Requests without a prefix first, last and in between; without new tokens; longer and shorter than a piece.
MIXED = Case("template", 3, 3, 64, 2, 3, lengths=(0, 5, 39, 0, 7, 1, 20, 0), queries=(2, 0, 3, 1, 1, 4, 0, 2))
ONE = Case("product", 3, 2.5, 32, 1, 4, lengths=(44,), queries=(6,))
NONE = Case("uniform", 3, 3, 32, 2, 1, "float16", lengths=(0, 0, 0), queries=(3, 0, 4))
SAME = replace(MIXED, dtype="float16", order="pages", lengths=(16, 16, 16, 16), queries=(1, 5, 2, 3))


class FlashStandIn:
    """What FlashAttention-3 promises for ragged batches, and what it demands. It reads nothing outside its keys."""

    def __init__(self):
        self.calls = []

    def __call__(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        num_splits,
        return_softmax_lse,
        out,
    ):
        for indptr, x, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
            lengths = indptr.diff()
            assert indptr.dtype == torch.int32 and indptr.is_contiguous() and indptr[0] == 0
            # Equal: for queries FlashAttention asks it, and keys beyond would be what an earlier batch left.
            assert indptr[-1] == len(x) > 0
            assert int(lengths.min()) >= 0 and int(lengths.max()) <= longest
            assert x.stride(2) == 1 and bool(x.isfinite().all())
        assert len(cu_seqlens_q) == len(cu_seqlens_k) and len(k) == len(v) and return_softmax_lse
        self.calls.append(SimpleNamespace(queries=len(q), keys=len(k), requests=len(cu_seqlens_q) - 1, causal=causal))

        group = q.shape[1] // k.shape[1]
        out = torch.empty_like(q) if out is None else out
        assert out.shape == q.shape and out.dtype == q.dtype
        lse = torch.empty(q.shape[1], len(q))
        qo, kv = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for b in range(len(qo) - 1):
            m, n = qo[b + 1] - qo[b], kv[b + 1] - kv[b]
            keys = k[kv[b] : kv[b + 1]].float().repeat_interleave(group, 1)
            values = v[kv[b] : kv[b + 1]].float().repeat_interleave(group, 1)
            logits = torch.einsum("mhd,nhd->hmn", q[qo[b] : qo[b + 1]].float(), keys) * softmax_scale
            if causal:
                logits = logits.masked_fill(torch.ones(m, n, dtype=torch.bool).triu(n - m + 1), -torch.inf)
            total = logits.logsumexp(-1)
            prob = (logits - total.masked_fill(total == -torch.inf, 0)[..., None]).exp()
            out[qo[b] : qo[b + 1]] = torch.einsum("hmn,nhd->mhd", prob, values).to(q.dtype)
            lse[:, qo[b] : qo[b + 1]] = total
        return out, lse


def attention(case: Case):
    if DEVICE == "cpu":
        return FlashStandIn()
    attend, why = flash_attention_3(DEVICE, data(case).q.dtype, case.head_dim, case.v_dim or case.head_dim)
    return attend or pytest.skip(why)


def chunk(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the new tokens, spread as those of the prefix are."""
    d = data(case)
    generator = torch.Generator().manual_seed(3)
    shape = len(d.q), case.heads, case.head_dim
    spread = [float(x.float().std()) if len(x) else 1.0 for x in (d.k, d.v)]
    return tuple((torch.randn(shape, generator=generator) * std).to(d.q) for std in spread)


def sm_scale(case: Case) -> float:
    return data(case).sm_scale if any(case.lengths) else case.head_dim**-0.5


def run(case: Case, attend, workspace: int, padding: int = 0) -> torch.Tensor:
    d = data(case)
    flash = FlashExtend([d.tables], attend, d.q.dtype, workspace)
    assert flash.tokens == workspace
    # SGLang's own types: int64 for new tokens, int32 for the prefix.
    plan = flash.plan(list(case.lengths), list(case.queries), d.qo_indptr.long(), d.kv_indptr, d.kv_indices)
    q, k, v = (torch.cat([x, x.new_full((padding, *x.shape[1:]), torch.nan)]) for x in (d.q, *chunk(case)))
    out = torch.full_like(q, torch.nan)
    flash(0, plan, q, k, v, d.rows, sm_scale(case), out)
    return out


def expected(case: Case) -> torch.Tensor:
    d = data(case)
    return naive.extend_attention(
        d.codec, d.q, *chunk(case), d.rows, d.qo_indptr, d.kv_indptr, d.kv_indices, sm_scale(case)
    )[0]


@pytest.mark.skipif(DEVICE != "cpu", reason="float32 is not for FlashAttention-3; see the gpu tests")
@pytest.mark.parametrize("workspace", [1000, 85, 84, 39, 16, 5, 1])
@pytest.mark.parametrize("case", [MIXED, ONE, NONE, SAME], ids=["mixed", "one", "none", "same"])
def test_extend_matches_twin(case, workspace):
    """All in one call, with and without room to spare, and in ever smaller pieces."""
    attend = FlashStandIn()
    out = run(case, attend, workspace)
    # Each piece's output is rounded once to the queries' type.
    assert relative_error(out, expected(case)) < TOLERANCE["cpu"][case.dtype]
    prefix, new = sum(case.lengths), sum(case.queries)
    if not prefix or prefix + new <= workspace:
        assert [(c.queries, c.keys, c.causal) for c in attend.calls] == [(new, prefix + new, True)]
    else:
        assert attend.calls[0].causal and not any(c.causal for c in attend.calls[1:])
        assert all(c.keys <= workspace for c in attend.calls[1:])


@pytest.mark.skipif(DEVICE != "cpu", reason="float32 is not for FlashAttention-3; see the gpu tests")
def test_pieces_leave_out_requests_without_keys():
    attend = FlashStandIn()
    run(MIXED, attend, 39)
    # Of the 72 prefix tokens, 39 are those of requests 1 and 2 (the latter to its 34th), 33 those of 2 to 6.
    # Requests 0 and 7 have none and are in neither piece; request 1 has no queries.
    assert [(c.requests, c.queries, c.keys) for c in attend.calls[1:]] == [(2, 3, 39), (5, 9, 33)]
    # Pieces that end where requests end hold one each.
    attend = FlashStandIn()
    run(SAME, attend, 16)
    assert [(c.requests, c.queries, c.keys) for c in attend.calls[1:]] == [(1, n, 16) for n in SAME.queries]


@pytest.mark.skipif(DEVICE != "cpu", reason="float32 is not for FlashAttention-3; see the gpu tests")
@pytest.mark.parametrize("workspace", [1000, 16])
def test_padding_is_zero(workspace):
    """Graph padding behind the real tokens: read by nobody, and finite for whoever reads the output."""
    out = run(MIXED, FlashStandIn(), workspace, padding=3)
    assert relative_error(out[:-3], expected(MIXED)) < TOLERANCE["cpu"]["float32"]
    assert not out[-3:].any()


def test_nothing_to_do():
    d = data(ONE)
    flash = FlashExtend([d.tables], FlashStandIn(), d.q.dtype, 8)
    empty = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out = torch.full_like(d.q, torch.nan)
    for plan in (
        flash.plan([], [], empty, empty, d.kv_indices),
        flash.plan([44], [0], d.qo_indptr * 0, d.kv_indptr, d.kv_indices),
    ):
        flash(0, plan, d.q, *chunk(ONE), d.rows, d.sm_scale, out)
        assert not out.any()


def test_chunk_in_the_middle_of_a_wide_row():
    """Keys as a fused projection leaves them: read in place when aligned, copied when not."""
    wide = torch.randn(6, 2 * 32 + 1, device=DEVICE, dtype=torch.float16)
    aligned = torch.randn(6, 3 * 64, device=DEVICE, dtype=torch.float16)[:, 64:128].view(6, 2, 32)
    assert extend._readable(aligned) is aligned
    odd = wide[:, 1:].view(6, 2, 32)
    copied = extend._readable(odd)
    assert copied.is_contiguous() and torch.equal(copied, odd)


def test_workspace_is_bounded():
    d = data(MIXED)
    per_token = 2 * 2 * 64 * 4
    assert FlashExtend([d.tables], None, torch.float32, 10**12, bytes_=10 * per_token + 1).tokens == 10
    small = FlashExtend([d.tables] * 3, None, torch.float32, 7)
    assert small.tokens == 7 and small.nbytes == 7 * per_token


def test_warm_up_reads_one_slot():
    """Rows may be anything but slot 0, which SGLang keeps for padding and the pool keeps zero."""
    d = data(MIXED)
    rows = torch.full_like(d.rows, 255)
    slot = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    scatter_rows(d.codec.layout, rows, slot, torch.zeros_like(rows[:1]))
    flash = FlashExtend([d.tables], None, torch.float32, 4)
    flash.warm_up([rows])
    assert not flash.k[:2].any() and not flash.v[:2].any() and bool(flash.k[2:].isnan().all())


def test_unpacked_is_what_rows_hold():
    d = data(MIXED)
    k, v = FlashExtend([d.tables], None, torch.float32, 4).unpacked(0, d.rows, d.kv_indices)
    for got, want in zip((k, v), naive.decode(d.codec, d.packed), strict=True):
        assert relative_error(got, want) < TOLERANCE[DEVICE]["float32"]


def test_plan_asks_the_device_nothing():
    """On the meta device any question about a value raises."""

    def plan(prefix, new, workspace):
        indptr = torch.empty(len(prefix) + 1, dtype=torch.int32, device="meta")
        slots = torch.empty(sum(prefix) + 3, dtype=torch.int64, device="meta")
        room = torch.empty(workspace, 2, 16, device="meta")
        return ExtendPlan.of(prefix, new, indptr, indptr, slots, room, room)

    whole = plan([5, 0, 9], [1, 2, 3], 20)
    assert (whole.task.tokens, whole.task.chunk, len(whole.keys), len(whole.values)) == (14, 6, 20, 20)
    pieces = plan([5, 0, 9], [1, 2, 3], 8).pieces
    assert [(p.task.tokens, p.task.chunk, len(p.keys), len(p.values)) for p in pieces] == [(8, 0, 8, 8), (6, 0, 6, 6)]


@pytest.mark.parametrize(
    "device, dtype, dims, why",
    [
        ("cpu", torch.bfloat16, (128, 128), "not a Hopper GPU"),
        ("cuda", torch.float32, (128, 128), "float32"),
        ("cuda", torch.bfloat16, (128, 64), "128 and 64 channels"),
        ("cuda", torch.bfloat16, (512, 512), "512 channels"),
        ("cuda", torch.bfloat16, (100, 100), "100 channels"),
    ],
)
def test_when_flash_attention_is_not_used(monkeypatch, device, dtype, dims, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attend, reason = flash_attention_3(device, dtype, *dims)
    assert attend is None and why in reason


def test_ampere_keeps_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert flash_attention_3("cuda", torch.bfloat16, 128, 128)[0] is None


@pytest.mark.gpu
@over([c for c in LARGE if c.dtype != "float32"])
@pytest.mark.parametrize("workspace", [8192, 5963, 2048, 100])
def test_extend_with_flash_attention_3(case, workspace):
    out = run(case, attention(case), workspace)
    assert relative_error(out, expected(case)) < TOLERANCE["cuda"][case.dtype]


@pytest.mark.gpu
def test_flash_attention_3_without_keys():
    """What merging relies on: zeros and -inf for a request whose keys all lie in other pieces."""
    attend = attention(LARGE[0])
    q, k = torch.randn(2, 7, 4, 128, device="cuda", dtype=torch.bfloat16)
    cu_q = torch.tensor([0, 3, 5, 7], dtype=torch.int32, device="cuda")
    cu_k = torch.tensor([0, 4, 4, 7], dtype=torch.int32, device="cuda")
    for num_splits in (0, 1, 3):
        out, lse, *_ = attend(
            q=q,
            k=k,
            v=k,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=3,
            max_seqlen_k=4,
            num_splits=num_splits,
            return_softmax_lse=True,
        )
        assert lse.shape == (4, 7)
        assert not out[3:5].any() and bool((lse[:, 3:5] == -torch.inf).all())
        assert bool(lse[:, :3].isfinite().all()) and bool(lse[:, 5:].isfinite().all())
