"""Extend through the workspace against the reference, with a plain stand-in for FlashAttention-3, or with itself."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sglang_blockgtq.backend import extend
from sglang_blockgtq.backend.extend import ExtendPlan, Workspace
from sglang_blockgtq.backend.prefill import choose, triton_attention
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.device.tables import templates_of
from sglang_blockgtq.kernels.format.layout import scatter_rows
from sglang_blockgtq.kernels.layer import TritonLayer
from sglang_blockgtq.kernels.terms import PLAIN, Terms

from .matrix import DEVICE, LARGE, OTHER_HEADS, TOLERANCE, Case, data, over, relative_error

#: Requests without a prefix first, last and in between; without new tokens; longer and shorter than a piece.
MIXED = Case("template", 3, 3, 64, 2, 3, lengths=(0, 5, 39, 0, 7, 1, 20, 0), queries=(2, 0, 3, 1, 1, 4, 0, 2))
ONE = Case("product", 3, 2.5, 32, 1, 4, lengths=(44,), queries=(6,))
NONE = Case("uniform", 3, 3, 32, 2, 1, "float16", lengths=(0, 0, 0), queries=(3, 0, 4))
PAGED = replace(MIXED, page=64, lengths=(0, 5, 139, 0, 7, 1, 80, 0))  # of three pages
SAME = replace(MIXED, dtype="float16", order="pages", lengths=(16, 16, 16, 16), queries=(1, 5, 2, 3))
float32_on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="float32 is not for FlashAttention-3; see the gpu tests")


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
        window_size=(-1, -1),
        softcap=0.0,
        sinks=None,
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
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            if causal:
                logits = logits.masked_fill(torch.ones(m, n, dtype=torch.bool).triu(n - m + 1), -torch.inf)
            if window_size[0] >= 0:
                before = torch.ones(m, n, dtype=torch.bool).tril(n - m - window_size[0] - 1)
                logits = logits.masked_fill(before, -torch.inf)
            total = logits.logsumexp(-1)
            prob = (logits - total.masked_fill(total == -torch.inf, 0)[..., None]).exp()
            out[qo[b] : qo[b + 1]] = torch.einsum("hmn,nhd->mhd", prob, values).to(q.dtype)
            lse[:, qo[b] : qo[b + 1]] = total
        if sinks is not None:
            out *= torch.sigmoid(lse.T - sinks)[..., None]
        return out, lse


def layer_of(case: Case) -> TritonLayer:
    d = data(case)
    layer = TritonLayer(d.codec, DEVICE, templates_of(d.codec.layout.k))
    layer.bind(d.rows)
    return layer


def chunk(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the new tokens, spread as those of the prefix are."""
    d = data(case)
    generator = torch.Generator().manual_seed(3)
    shape = len(d.q), case.heads, case.head_dim
    spread = [float(x.float().std()) if len(x) else 1.0 for x in (d.k, d.v)]
    return tuple((torch.randn(shape, generator=generator) * std).to(d.q) for std in spread)


def sm_scale(case: Case) -> float:
    return data(case).sm_scale if any(case.lengths) else case.head_dim**-0.5


def run(case: Case, attend, size: int, padding: int = 0, terms: Terms = PLAIN) -> torch.Tensor:
    d, layer = data(case), layer_of(case)
    workspace = Workspace(layer, attend, d.q.dtype, DEVICE, size)
    assert workspace.tokens == size
    # SGLang's own types: int64 for new tokens, int32 for the prefix.
    lengths, queries = list(case.lengths), list(case.queries)
    plans = workspace.plans(lengths, queries, d.qo_indptr.long(), d.kv_indptr, d.kv_indices, terms.window)
    q, k, v = (torch.cat([x, x.new_full((padding, *x.shape[1:]), torch.nan)]) for x in (d.q, *chunk(case)))
    out = torch.full_like(q, torch.nan)
    for new, plan in plans:
        workspace(layer, plan, q[new], k[new], v[new], sm_scale(case), out[new], terms)
    return out


def expected(case: Case, terms: Terms = PLAIN) -> torch.Tensor:
    d = data(case)
    args = d.codec, d.q, *chunk(case), d.packed, d.qo_indptr, d.kv_indptr, sm_scale(case), terms
    return reference.extend_attention(*args)[0]


@float32_on_cpu
@pytest.mark.parametrize("case", [MIXED, PAGED, ONE, NONE, SAME], ids=["mixed", "paged", "one", "none", "same"])
def test_extend_matches_reference(case):
    """All in one call, with and without room to spare, and in ever smaller pieces."""
    prefix, new, want = sum(case.lengths), sum(case.queries), expected(case)
    for size in (1000, 245, 244, 90) if case.page else (1000, 85, 84, 39, 16, 5):
        attend = FlashStandIn()
        out = run(case, attend, size)
        # Each piece's output is rounded once to the queries' type.
        assert relative_error(out, want) < TOLERANCE["cpu"][case.dtype]
        if not prefix or prefix + new <= size:
            assert [(c.queries, c.keys, c.causal) for c in attend.calls] == [(new, prefix + new, True)]
        else:
            assert attend.calls[0].causal and not any(c.causal for c in attend.calls[1:])
            assert all(c.keys <= size for c in attend.calls[1:])


@float32_on_cpu
@over(OTHER_HEADS)
def test_other_heads_and_groups(case):
    assert relative_error(run(case, FlashStandIn(), 60), expected(case)) < TOLERANCE["cpu"][case.dtype]


@float32_on_cpu
@pytest.mark.parametrize("window", [1, 2, 8, 70])
@pytest.mark.parametrize("case", [MIXED, PAGED, NONE], ids=["mixed", "paged", "none"])
def test_windows(case, window):
    """All requests in one call, and as many at a time as a small workspace holds, with padding behind them."""
    terms, want, alone = Terms(window), expected(case, Terms(window)), 74 if window == 70 else 12
    for size, padding in ((1000, 0), (alone, 3)):
        attend = FlashStandIn()
        out = run(case, attend, size, padding, terms)
        assert relative_error(out[: len(want)], want) < TOLERANCE["cpu"][case.dtype]
        assert not out[len(want) :].any()
        assert len(attend.calls) > 1 or size == 1000 or case is NONE


@float32_on_cpu
def test_a_window_that_the_workspace_cannot_hold():
    with pytest.raises(RuntimeError, match="42 tokens of a window and its chunk: the workspace holds 41"):
        run(MIXED, FlashStandIn(), 41, terms=Terms(100))


@float32_on_cpu
@pytest.mark.parametrize("size", [1000, 39])
def test_caps_and_sinks(size):
    """Pieces of a prefix are merged before the sinks take their share."""
    terms = Terms(cap=0.7, sinks=torch.linspace(-2, 3, MIXED.heads * MIXED.group))
    assert relative_error(run(MIXED, FlashStandIn(), size, terms=terms), expected(MIXED, terms)) < 1e-5


@float32_on_cpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # it divides by zero where it masks
@pytest.mark.parametrize(
    "terms", [Terms(8), Terms(cap=0.7), Terms(sinks=torch.linspace(-2, 3, 6))], ids=["window", "cap", "sinks"]
)
def test_terms_with_sglangs_triton_kernel(terms):
    got = run(MIXED, triton_attention, 1000, terms=terms)
    assert relative_error(got, expected(MIXED, terms)) < TOLERANCE["cpu"]["float32"]


@float32_on_cpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # it divides by zero where it masks
@pytest.mark.parametrize("size", [1000, 39])
def test_extend_with_sglangs_triton_kernel(size):
    assert relative_error(run(MIXED, triton_attention, size), expected(MIXED)) < TOLERANCE["cpu"]["float32"]


@float32_on_cpu
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


@float32_on_cpu
@pytest.mark.parametrize("size", [1000, 16])
def test_padding_is_zero(size):
    """Graph padding behind the real tokens: read by nobody, and finite for whoever reads the output."""
    out = run(MIXED, FlashStandIn(), size, padding=3)
    assert relative_error(out[:-3], expected(MIXED)) < TOLERANCE["cpu"]["float32"]
    assert not out[-3:].any()


def test_nothing_to_do():
    d, layer = data(ONE), layer_of(ONE)
    workspace = Workspace(layer, FlashStandIn(), d.q.dtype, DEVICE, 8)
    empty = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out = torch.full_like(d.q, torch.nan)
    for [(_, plan)] in (
        workspace.plans([], [], empty, empty, d.kv_indices),
        workspace.plans([44], [0], d.qo_indptr * 0, d.kv_indptr, d.kv_indices),
    ):
        workspace(layer, plan, d.q, *chunk(ONE), d.sm_scale, out)
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
    layer, per_token = layer_of(MIXED), 2 * 2 * 64 * 4
    assert Workspace(layer, None, torch.float32, DEVICE, 10**12, bytes_=10 * per_token + 1).tokens == 10
    small = Workspace(layer, None, torch.float32, DEVICE, 7)
    assert small.tokens == 7 and small.nbytes == 7 * per_token


@pytest.mark.parametrize("device, gib", [("cpu", 0), ("cuda", 16), ("cuda", 80), ("cuda", 150)])
def test_a_workspace_takes_its_share_of_a_large_device(device, gib, monkeypatch):
    memory = gib << 30
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    want = int(0.004 * memory) if gib >= 80 else extend.WORKSPACE_BYTES
    assert extend.workspace_bytes(device) == want >= 256 << 20


def test_warm_up_reads_one_slot():
    """Rows may be anything but slot 0, which SGLang keeps for padding and the pool keeps zero."""
    d, layer = data(MIXED), layer_of(MIXED)
    rows = torch.full_like(d.rows, 255)
    slot = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    scatter_rows(d.codec.layout, rows, slot, torch.zeros_like(rows[:1]))
    layer.bind(rows)
    workspace = Workspace(layer, None, torch.float32, DEVICE, 4)
    workspace.warm_up([layer])
    assert not workspace.k[:2].any() and not workspace.v[:2].any() and bool(workspace.k[2:].isnan().all())


def test_plan_asks_the_device_nothing():
    """On the meta device any question about a value raises."""

    def plan(prefix, new, size):
        indptr = torch.empty(len(prefix) + 1, dtype=torch.int32, device="meta")
        slots = torch.empty(sum(prefix) + 3, dtype=torch.int64, device="meta")
        room = torch.empty(size, 2, 16, device="meta")
        return ExtendPlan.of(prefix, new, indptr, indptr, slots, room, room)

    whole = plan([5, 0, 9], [1, 2, 3], 20)
    assert (whole.task.tokens, whole.task.chunk, len(whole.keys), len(whole.values)) == (14, 6, 20, 20)
    pieces = plan([5, 0, 9], [1, 2, 3], 8).pieces
    assert [(p.task.tokens, p.task.chunk, len(p.keys), len(p.values)) for p in pieces] == [(8, 0, 8, 8), (6, 0, 6, 6)]


@over([LARGE[0], LARGE[3], LARGE[4], LARGE[8], LARGE[-1]])
def test_extend_on_a_gpu(case):
    """With what the GPU is given, and with SGLang's Triton kernel; at once, and in few and many pieces."""
    chosen = choose(DEVICE, data(case).q.dtype, case.head_dim, case.head_dim).attend
    want = expected(case)
    for attend, sizes in ((chosen, (8192, 5963, 2048, 100)), (triton_attention, (8192, 2048))):
        for size in sizes:
            assert relative_error(run(case, attend, size), want) < TOLERANCE["cuda"][case.dtype], (attend, size)


@pytest.mark.gpu
def test_flash_attention_without_keys():
    """What merging relies on: zeros and -inf for a request whose keys all lie in other pieces."""
    prefill = choose(DEVICE, torch.bfloat16, 128, 128)
    if prefill.why:
        pytest.skip(prefill.why)
    q, k = torch.randn(2, 7, 4, 128, device="cuda", dtype=torch.bfloat16)
    cu_q = torch.tensor([0, 3, 5, 7], dtype=torch.int32, device="cuda")
    cu_k = torch.tensor([0, 4, 4, 7], dtype=torch.int32, device="cuda")
    for num_splits in (0, 1, 3):
        out, lse, *_ = prefill.attend(
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
