"""Exact tokens beside packed rows, against their definition."""

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.cuda import attention as cuda
from sglang_blockgtq.kernels.decode import merge
from sglang_blockgtq.kernels.decode.attention import decode_attention
from sglang_blockgtq.kernels.decode.gather import gather_slots
from sglang_blockgtq.kernels.decode.recent import Recent, RecentLayer
from sglang_blockgtq.kernels.device.tables import templates_of
from sglang_blockgtq.kernels.encode.step import StepEncoder
from sglang_blockgtq.kernels.format.layout import gather_rows
from sglang_blockgtq.kernels.layer import TorchLayer, TritonLayer
from sglang_blockgtq.kernels.terms import PLAIN, Terms

from .matrix import (
    DEVICE,
    LARGE,
    MEANS,
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
    over,
)

#: Of a case's four requests: exact tokens, of a window of 5, and whether they have a row of copies at all; without one
#: the token itself is exact, or nothing where there is no token.
WINDOW, TOP, ROWS = 5, 9, 6
COUNTS, REQUESTS = (3, 0, 5, 1), (9, 2, 6, 7)  # the second one's row would be the eighth
TERMS = Terms(cap=2.0), Terms(sinks=torch.linspace(-2, 3, 6, device=DEVICE))


def copies(case: Case, window: int = WINDOW, queries: int = 1) -> RecentLayer:
    """NaN where nobody wrote."""
    dtype, v_dim = getattr(torch, case.dtype), case.v_dim or case.head_dim
    recent = Recent.of(1, ROWS, 16, window, case.heads, case.head_dim, v_dim, dtype, DEVICE, queries)
    recent.bind(TOP)
    recent.k.fill_(torch.nan)
    recent.v.fill_(torch.nan)
    recent.step.fill_(99)
    return recent.layer(0)


def new_tokens(case: Case, count: int, seed: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values like a case's own."""
    d, generator = data(case), torch.Generator().manual_seed(seed)
    pick = torch.randint(0, len(d.k), (count,), generator=generator).to(DEVICE)
    return d.k[pick] * 0.8, d.v[pick].flip(0) * 1.1


def step_of(case: Case, window: int = WINDOW, q_len: int = 1) -> tuple[RecentLayer, torch.Tensor, torch.Tensor]:
    """Copies of the case's requests, filled as far as counts say, and the step's own keys and values."""
    layer, batch = copies(case, window, q_len), len(case.lengths)
    ring = layer.recent.ring
    counts = [window if COUNTS[i % 4] == WINDOW else min(COUNTS[i % 4], window) for i in range(batch)]
    rows = [TOP - REQUESTS[i % 4] if i < 4 else -1 for i in range(batch)]
    rows = [row if 0 <= row < ROWS else -1 for row in rows]
    counts = [n if row >= 0 else max(i % 2, q_len > 1) for i, (n, row) in enumerate(zip(counts, rows, strict=True))]
    positions = [length + n - 1 for length, n in zip(case.lengths, counts, strict=True)]
    places = []
    for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
        behind = ROWS * ring + i if i < layer.recent.room else -1
        places.append(-1 if position < 0 else behind if row < 0 else row * ring + position % ring)
    layer.recent.step[:, :batch] = torch.tensor([rows, positions, counts, places])
    for row, position, count in zip(rows, positions, counts, strict=True):
        for back in range(1, count):
            k, v = new_tokens(case, 1, seed=position - back)
            layer.k[row, (position - back) % ring], layer.v[row, (position - back) % ring] = k[0], v[0]
    return layer, *new_tokens(case, batch * q_len)


def expected(case: Case, layer: RecentLayer, q, k, v, terms: Terms = PLAIN, q_len: int = 1):
    """And the copies after the step. All queries of a request see the same packed rows."""
    d = data(case)
    plain = Terms(cap=terms.cap)
    packed = (torch.empty(*q.shape[:2], v.shape[2], device=DEVICE), torch.empty(q.shape[:2], device=DEVICE))
    for i in range(q_len):
        found = reference.decode_attention(d.codec, q[i::q_len], d.packed, d.kv_indptr, d.sm_scale, terms=plain)
        packed[0][i::q_len], packed[1][i::q_len] = found
    after = layer.k.clone(), layer.v.clone()
    step = layer.recent.step[:, : len(case.lengths)]
    exact = reference.recent_attention(q, k, v, *after, step, d.sm_scale, plain, q_len)
    out, lse = reference.merge_states(*packed, *exact)
    return (terms.with_sinks(out, lse), lse), after


#: How splits are merged: what chooses it (see test_merge.WAYS), and a target of splits.
WAYS = {"group": (1 << 30, 0, 8), "tile": (0, 0, 8), "row": (0, 1 << 30, 300)}
ORDINARY = [TEMPLATE, PAGES, WIDE, OTHER_VALUES, TEMPLATES[0], MEANS, PRODUCT]


@pytest.mark.parametrize("way", WAYS)
@over([*ORDINARY, LARGE[0], LARGE[4]])
def test_exact_tokens_join_the_packed_ones(case, way, monkeypatch):
    if way == "row" and case in (OTHER_VALUES, TEMPLATES[0], PRODUCT):
        pytest.skip("as TEMPLATE's")
    monkeypatch.setattr(merge, "_GROUPS_AT_ONCE", WAYS[way][0])
    monkeypatch.setattr(merge, "_ROWS_ALONE", WAYS[way][1])
    check(case, PLAIN, WAYS[way][2] if way == "row" or case not in LARGE else None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("terms", TERMS, ids=["cap", "sinks"])
def test_caps_and_sinks(terms, way, monkeypatch):
    """Sinks stand beside both parts."""
    monkeypatch.setattr(merge, "_GROUPS_AT_ONCE", WAYS[way][0])
    monkeypatch.setattr(merge, "_ROWS_ALONE", WAYS[way][1])
    check(TEMPLATE, terms, WAYS[way][2])


@pytest.mark.parametrize("window", [1, 2, 9, 40])
def test_other_windows(window):
    """Of the step's own token alone, and of more tokens than a program asks for at a time."""
    check(TEMPLATE, PLAIN, 8, window)


@pytest.mark.parametrize("choice", ["triton", "cuda"])
@over([LARGE[0], LARGE[1], LARGE[7]])
def test_both_kernels_of_attention(case, choice, monkeypatch):
    monkeypatch.setattr(cuda, "CHOICE", choice)
    if choice == "cuda" and not cuda.serves(data(case).tables, case.group):
        pytest.skip("no such kernel for these rows or this device")
    check(case, PLAIN, None, slack=2 if choice == "cuda" else 1)  # bytes in the place of levels


@pytest.mark.parametrize("q_len", [2, 5])
@pytest.mark.parametrize("way", WAYS)
@over([TEMPLATE, PAGES, WIDE, PRODUCT, LARGE[0], LARGE[1]])
def test_chains_of_drafts(case, way, q_len, monkeypatch):
    """Each query sees its chain up to itself, and all packed rows; what is kept takes no place of what is read."""
    if way == "row" and case in (WIDE, PRODUCT):
        pytest.skip("as TEMPLATE's")
    monkeypatch.setattr(merge, "_GROUPS_AT_ONCE", WAYS[way][0])
    monkeypatch.setattr(merge, "_ROWS_ALONE", WAYS[way][1])
    check(case, PLAIN, WAYS[way][2] if way == "row" or case not in LARGE else None, q_len=q_len)


@pytest.mark.parametrize("share", [1, 2], ids=["all channels", "half of them"])
@over([TEMPLATE, PAGES, WIDE, OTHER_VALUES, PRODUCT, LARGE[0], LARGE[4]])
def test_rope_that_is_left_to_the_step(case, share):
    """Queries and keys as they are before RoPE give what they would give after it, and such keys are kept."""
    check(case, PLAIN, None, rotary=case.head_dim // share // 2 * 2)


def angles_of(case: Case, rotary: int) -> torch.Tensor:
    """Of a token of each request, in SGLang's order."""
    turns = torch.rand(len(case.lengths), rotary // 2, generator=torch.Generator().manual_seed(3)) * 6
    return torch.cat([turns.cos(), turns.sin()], -1).to(DEVICE)


def left(case: Case, rotary: int, q: torch.Tensor, k: torch.Tensor):
    """Angles by which a step turns so many channels of q and k, or None, and both as they are then."""
    if not rotary:
        return None, q, k
    angles = angles_of(case, rotary)
    return angles, reference.apply_rope(q, angles), reference.apply_rope(k, angles)


def check(
    case: Case,
    terms: Terms,
    target: int | None,
    window: int = WINDOW,
    slack: int = 1,
    q_len: int = 1,
    rotary: int = 0,
) -> None:
    """rotary: channels of which RoPE is left to the step."""
    d, (layer, k, v), q = data(case), step_of(case, window, q_len), decode_queries(case, q_len)
    angles, *turned = left(case, rotary, q, k)
    want, after = expected(case, layer, *turned, v, terms, q_len)
    read = layer.read(k, v, angles)
    got = decode_attention(
        d.tables, q, d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, q_len=q_len, terms=terms, target=target, recent=read
    )
    assert_same(got, want, slack * TOLERANCE[DEVICE][case.dtype])
    # Of two products a GPU rounds one alone.
    off = 4 * torch.finfo(k.dtype).eps if rotary else 0
    torch.testing.assert_close(layer.k, after[0], rtol=off, atol=off, equal_nan=True)
    assert torch.equal(layer.v.nan_to_num(77.0), after[1].nan_to_num(77.0))


@pytest.mark.parametrize(
    ("q_len", "options", "said"),
    [
        (1, {"terms": Terms(window=8)}, "not with a window of 8"),
        (2, {"tree": True}, "not with a tree"),
        (4, {}, "4 tokens of a request, of up to 3, for 4 queries"),
    ],
    ids=["window", "tree", "longer than the places allow"],
)
def test_what_has_no_exact_tokens_is_refused(q_len, options, said):
    d, (layer, k, v) = data(TEMPLATE), step_of(TEMPLATE, q_len=min(q_len, 3))
    q = decode_queries(TEMPLATE, q_len)
    if "tree" in options:
        options = {"tree": torch.zeros(len(q), dtype=torch.int32, device=DEVICE)}
    where = d.rows, d.kv_indptr, d.kv_indices, d.sm_scale
    with pytest.raises(ValueError, match=f"recent: {said}"):
        decode_attention(d.tables, q, *where, q_len=q_len, recent=layer.read(k, v), **options)


def test_queries_that_are_rotated_already_are_refused():
    d, (layer, k, v) = data(TEMPLATE), step_of(TEMPLATE)
    q = decode_queries(TEMPLATE)
    with pytest.raises(ValueError, match="rotated: not with recent"):
        decode_attention(
            d.tables, q, d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, recent=layer.read(k, v), rotated=q.float()
        )


def test_other_shapes_are_refused():
    d, (layer, k, v) = data(TEMPLATE), step_of(TEMPLATE)
    where = decode_queries(TEMPLATE), d.rows, d.kv_indptr, d.kv_indices, d.sm_scale
    for own in ((k[:-1], v), (k, v[:, :1]), (k.mT.contiguous().mT, v)):
        with pytest.raises(ValueError, match="recent: "):
            decode_attention(d.tables, *where, recent=layer.read(*own))
    angles = angles_of(TEMPLATE, 16)
    for wrong in (angles[:-1], angles[:, :-1], angles.double(), torch.cat([angles] * 9, 1)):
        with pytest.raises(ValueError, match="recent: angles torch.float"):
            decode_attention(d.tables, *where, recent=layer.read(k, v, wrong))
    layer, k, v = step_of(TEMPLATE, q_len=2)
    with pytest.raises(ValueError, match="one query of a request, not 2"):
        q = decode_queries(TEMPLATE, 2)
        decode_attention(d.tables, q, *where[1:], q_len=2, recent=layer.read(k, v, angles.repeat(2, 1)))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_a_step_leaves_exact_tokens_out(index):
    """Of requests with a row, as far as their copies reach; of others, as of the one that pads a batch, 0, the token
    itself, if there is one."""
    layer = copies(TEMPLATE)
    recent = layer.recent
    recent.first[:] = torch.tensor([3, 100, 12, 14, 0, 9], device=DEVICE)
    requests = torch.tensor([9, 8, 7, 6, 3, 0, 4, 0], dtype=index, device=DEVICE)
    lengths = torch.tensor([20, 30, 13, 14, 11, 1, 15, 0], dtype=index, device=DEVICE)
    counts = [5, 1, 1, 1, 1, 1, 5, 0]
    table = torch.arange(10 * 40, dtype=torch.int32, device=DEVICE).view(10, 40)
    want_indptr, want = reference.gather_slots(table, requests, lengths - torch.tensor(counts, device=DEVICE))
    kv_indptr = torch.full((9,), -1, dtype=torch.int32, device=DEVICE)
    kv_indices = torch.full((len(want) + 3,), -7, dtype=torch.int32, device=DEVICE)
    gather_slots(table, requests, lengths, kv_indptr, kv_indices, recent=recent)
    assert kv_indptr.tolist() == want_indptr.tolist()
    assert kv_indices.tolist() == [*want.tolist(), -7, -7, -7]
    places = [4, 9, 12, 18, 34, 35, 29, -1]
    step = [[0, 1, 2, 3, -1, -1, 5, -1], [19, 29, 12, 13, 10, 0, 14, -1], counts, places]
    assert recent.step[:, :8].tolist() == step and bool((recent.step[:, 8:] == 99).all())
    recent.step.fill_(99)
    assert recent.begin(requests, lengths).tolist() == counts
    assert recent.step[:, :8].tolist() == step


@over([TEMPLATE, PAGES, OTHER_VALUES, Case("template", 3, 3, 128, 3, 1, "float16")])
def test_a_prefill_leaves_its_last_tokens(case):
    """Of chunks longer than the window, as long, shorter, and none; what pads the batch and who has no row leave
    nothing."""
    new, before = [12, 5, 2, 0, 4, 3], torch.tensor([0, 7, 30, 9, 3, 0], dtype=torch.int32, device=DEVICE)
    requests = torch.tensor([9, 8, 7, 6, 2, 5], device=DEVICE)
    k, v = new_tokens(case, sum(new) + 4)
    indptr = torch.tensor([0, *new]).cumsum(0).to(DEVICE, torch.int32)
    got, want = copies(case), copies(case)
    got.remember(k, v, requests, before, indptr)
    recent = want.recent
    reference.remember(recent.first, TOP, want.k, want.v, k, v, requests, before, indptr)
    assert got.recent.first.tolist() == recent.first.tolist() == [0, 7, 30, 0, 0, 0]
    for mine, theirs in ((got.k, want.k), (got.v, want.v)):
        assert torch.equal(mine.nan_to_num(77.0), theirs.nan_to_num(77.0))
    written = want.k.isfinite().flatten(2).all(-1).sum(1)
    assert written.tolist() == [5, 5, 2, 0, 3, 0, 0, 0]
    assert torch.equal(want.k[0, 11 % WINDOW], k[11]) and torch.equal(want.v[2, 31 % WINDOW], v[18])


def test_more_requests_than_rows():
    """Where fewer requests run than there would be rows for, nobody's has none."""
    recent = Recent.of(2, ROWS, 4, WINDOW, 1, 32, 32, torch.float32, DEVICE)
    held = recent.nbytes
    recent.bind(4)
    assert recent.rows == 4 and recent.layer(1).k.shape == (4 + 2, WINDOW, 1, 32) and recent.nbytes < held
    assert recent.begin(torch.tensor([0, 4], device=DEVICE), torch.tensor([9, 9], device=DEVICE)).tolist() == [1, 5]


@over([TEMPLATE, MEANS])
def test_an_answer_token_by_token(case):
    """A prompt and more steps than the window, of two requests: what each step reads is its last tokens as they are,
    and all before them as they are packed."""
    d, steps, prompts, window = data(case), 7, (6, 9), 3
    k, v = new_tokens(case, sum(prompts) + 2 * steps)
    q = torch.randn(2 * steps, case.heads * case.group, case.head_dim, device=DEVICE, dtype=k.dtype)
    layers = [TritonLayer(d.codec, DEVICE, templates_of(d.codec.layout.k))]
    if DEVICE == "cpu":
        layers.append(TorchLayer(d.codec))
    for layer in layers:
        layer.bind(layer.new_rows(64, DEVICE))
        own = copies(case, window)
        table = torch.arange(64, dtype=torch.int32, device=DEVICE).view(2, 32)
        requests = torch.tensor([9, 8], device=DEVICE)
        before, indptr = torch.zeros(2, dtype=torch.int32, device=DEVICE), [0, prompts[0], sum(prompts)]
        slots = torch.cat([table[i, :n] for i, n in enumerate(prompts)]).long()
        positions = torch.cat([torch.arange(n) for n in prompts]).to(DEVICE)
        layer.encode(k[: indptr[-1]], v[: indptr[-1]], slots, positions)
        own.remember(k, v, requests, before, torch.tensor(indptr, device=DEVICE))
        whole = [[k[a:b], v[a:b]] for a, b in zip(indptr, indptr[1:], strict=False)]
        for step in range(steps):
            at = indptr[-1] + 2 * step
            new = k[at : at + 2], v[at : at + 2]
            lengths = torch.tensor([n + step + 1 for n in prompts], device=DEVICE)
            slots = torch.stack([table[i, n - 1] for i, n in enumerate(lengths.tolist())]).long()
            counts = own.recent.begin(requests, lengths)
            kv_indptr, kv_indices = reference.gather_slots(table, torch.tensor([0, 1], device=DEVICE), lengths - counts)
            layer.encode(*new, slots, lengths - 1)
            mine = q[2 * step : 2 * step + 2]
            got = layer.decode(mine, kv_indptr.int(), kv_indices, d.sm_scale, recent=own.read(*new))
            for i in range(2):
                whole[i] = [torch.cat([whole[i][side], new[side][i : i + 1]]) for side in (0, 1)]
                keys, values = whole[i]
                place = torch.arange(len(keys), device=DEVICE)
                read = reference.round_trip(d.codec, keys, values, place)
                keys, values = (
                    torch.cat([r[:-window], x[-window:].float()]) for r, x in zip(read, (keys, values), strict=True)
                )
                want, _ = reference.chunk_attention(
                    mine[i : i + 1].float().expand(len(keys), -1, -1), keys, values,
                    torch.tensor([0, len(keys)]), d.sm_scale,
                )  # fmt: skip
                error = (got[i].float() - want[-1]).norm() / want[-1].norm()
                assert error < 2 * TOLERANCE[DEVICE][case.dtype]


def beside_packed(case: Case, q: torch.Tensor, packed: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A query ``[Hq, D]`` over packed rows, and exact keys and values beside them by softmax: ``[Hq, Dv]``."""
    d = data(case)
    want = reference.decode_attention(d.codec, q[None], packed, torch.tensor([0, len(packed)]), d.sm_scale)
    k, v = (x.float().repeat_interleave(case.group, 1) for x in (k, v))
    logits = torch.einsum("hd,nhd->hn", q.float(), k) * d.sm_scale
    beside = torch.einsum("hn,nhd->hd", logits.softmax(-1), v)
    return reference.merge_states(*want, beside[None], logits.logsumexp(-1)[None])[0][0]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_chains_of_which_some_are_rejected(index):
    """Longer than the window in all, by the launches of a step: each query reads the window before the chain and the
    chain up to itself as they are, whatever stood in their places, and the rest as it is packed."""
    case, window, q_len, accepted, prompts = TEMPLATE, 3, 4, (1, 4, 2, 1, 3, 4, 1), (5, 9)
    d, dtype = data(case), getattr(torch, case.dtype)
    layer, own = TritonLayer(d.codec, DEVICE, templates_of(d.codec.layout.k)), copies(case, window, q_len)
    layer.bind(layer.new_rows(96, DEVICE))
    table = torch.arange(96, dtype=torch.int32, device=DEVICE).view(2, 48).flip(1)
    table = torch.cat([table.new_full((8, 48), 1 << 29), table])  # requests 8 and 9
    requests = torch.tensor([9, 8], dtype=index, device=DEVICE)
    before, indptr = torch.zeros(2, dtype=torch.int32, device=DEVICE), [0, prompts[0], sum(prompts)]
    k, v = new_tokens(case, sum(prompts))
    whole = [[k[a:b], v[a:b]] for a, b in zip(indptr, indptr[1:], strict=False)]
    slots = torch.cat([table[9 - i, :n] for i, n in enumerate(prompts)]).long()
    layer.encode(k, v, slots, torch.cat([torch.arange(n) for n in prompts]).to(DEVICE))
    own.remember(k, v, requests, before, torch.tensor(indptr, device=DEVICE))
    lengths, group = list(prompts), case.heads * case.group
    for step, taken in enumerate(accepted):
        new = new_tokens(case, 2 * q_len, seed=step)
        q = torch.randn(2 * q_len, group, case.head_dim, device=DEVICE, dtype=dtype)
        positions = torch.tensor([n + i for n in lengths for i in range(q_len)], device=DEVICE)
        loc = table[requests.repeat_interleave(q_len).long(), positions].long()
        kv_indptr = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        kv_indices = torch.zeros(96, dtype=torch.int32, device=DEVICE)
        counted = torch.tensor(lengths, dtype=index, device=DEVICE)
        gather_slots(table, requests, counted, kv_indptr, kv_indices, more=1, recent=own.recent)
        layer.encode(*new, loc, positions)
        got = layer.decode(q, kv_indptr, kv_indices, d.sm_scale, q_len=q_len, recent=own.read(*new))
        for b, n in enumerate(lengths):
            exact = min(n, window - 1)
            packed = gather_rows(d.codec.layout, layer.rows, table[9 - b, : n - exact].long())
            for i in range(q_len):
                at, chain = b * q_len + i, slice(b * q_len, b * q_len + i + 1)
                last = [torch.cat([x[n - exact :], y[chain]]) for x, y in zip(whole[b], new, strict=True)]
                want = beside_packed(case, q[at], packed, *last)
                assert (got[at].float() - want).norm() / want.norm() < 2 * TOLERANCE[DEVICE][case.dtype]
            kept = slice(b * q_len, b * q_len + taken)
            whole[b] = [torch.cat([x, y[kept]]) for x, y in zip(whole[b], new, strict=True)]
            lengths[b] += taken


@pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU's rows")
@pytest.mark.parametrize("rotary", [0, 16], ids=["rope applied", "rope left"])
@pytest.mark.parametrize("terms", [PLAIN, *TERMS], ids=["plain", "cap", "sinks"])
@over([TEMPLATE, PRODUCT])
def test_hosts_without_a_gpu(case, terms, rotary):
    """Of a request without packed rows, of one without copies, and of both."""
    d, (layer, k, v), q = data(case), step_of(case), decode_queries(case)
    angles, *turned = left(case, rotary, q, k)
    (want, _), after = expected(case, layer, *turned, v, terms)
    host = TorchLayer(d.codec)
    host.bind(host.new_rows(int(d.kv_indices.max()) + 1, DEVICE))
    host.scatter(d.kv_indices, d.packed)
    read = layer.read(k, v, angles)
    got = host.decode(q, d.kv_indptr, d.kv_indices, d.sm_scale, terms=terms, recent=read)
    assert (got - want).norm() / want.norm() < 1e-5
    for mine, theirs in zip((layer.k, layer.v), after, strict=True):
        assert torch.equal(mine.nan_to_num(77.0), theirs.nan_to_num(77.0))


def as_a_graph(step):
    """What does a step again: on a GPU a replay of it."""
    step()  # compiles
    if DEVICE == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("later", [False, True], ids=["in the layer", "at the end"])
@pytest.mark.parametrize(
    ("case", "choice"),
    [(TEMPLATE, "triton"), *(pytest.param(LARGE[0], name, marks=pytest.mark.gpu) for name in ("triton", "cuda"))],
    ids=str,
)
def test_a_graph_of_a_step_follows_its_requests(case, choice, later, monkeypatch):
    """Gathered, encoded and attended more often than the window is long, by the same launches: a request that begins
    with less than the window, one with more, and one without copies."""
    monkeypatch.setattr(cuda, "CHOICE", choice)
    d, window, prompts, room = data(case), 3, [1, 12, 6], 24
    group, dtype, steps = case.heads * case.group, getattr(torch, case.dtype), 2 * window + 1
    layer, own = TritonLayer(d.codec, DEVICE, templates_of(d.codec.layout.k)), copies(case, window)
    layer.bind(layer.new_rows(len(prompts) * room, DEVICE))
    table = torch.arange(len(prompts) * room, dtype=torch.int32, device=DEVICE).view(-1, room).flip(1)
    table = torch.cat([table.new_full((7, room), 1 << 29), table])  # requests 7, 8 and 9
    requests, lengths = torch.tensor([9, 8, 7], device=DEVICE), torch.tensor(prompts, device=DEVICE)
    own.recent.first, own.recent.top = own.recent.first[:2], TOP
    k, v = new_tokens(case, sum(prompts))
    whole = [list(both) for both in zip(k.split(prompts), v.split(prompts), strict=True)]
    slots = torch.cat([table[9 - i, :n] for i, n in enumerate(prompts)]).long()
    layer.encode(k, v, slots, torch.cat([torch.arange(n) for n in prompts]).to(DEVICE))
    indptr = torch.tensor([0, *prompts]).cumsum(0).to(DEVICE, torch.int32)
    own.remember(k, v, requests, torch.zeros_like(requests), indptr)
    loc, positions = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    kv_indptr = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    kv_indices = torch.zeros(3 * room, dtype=torch.int32, device=DEVICE)
    q = torch.zeros(3, group, case.head_dim, dtype=dtype, device=DEVICE)
    new_k, new_v = torch.zeros_like(k[:3]), torch.zeros_like(v[:3])
    out = torch.zeros(3, group, v.shape[2], dtype=dtype, device=DEVICE)

    def step():
        gather_slots(table, requests, lengths, kv_indptr, kv_indices, recent=own.recent)
        if not later:
            layer.encode(new_k, new_v, loc, positions)
        read = own.read(new_k, new_v)
        layer.decode(q, kv_indptr, kv_indices, d.sm_scale, recent=read, out=out)
        if later:
            encode(loc, positions)

    again, encode = None, StepEncoder([layer.encoder], own.recent)
    for i in range(steps):
        for mine, new in zip((new_k, new_v), new_tokens(case, 3, seed=i), strict=True):
            mine.copy_(new)
        q.copy_(decode_queries(case, steps)[3 * i : 3 * i + 3])
        lengths += 1
        positions.copy_(lengths - 1)
        loc.copy_(table[requests, positions])
        again = again or as_a_graph(step)
        out.fill_(torch.nan)
        again()
        for b, n in enumerate(lengths.tolist()):
            whole[b] = [torch.cat([x, new[b : b + 1]]) for x, new in zip(whole[b], (new_k, new_v), strict=True)]
            exact = min(n, window) if b < 2 else 1
            packed = gather_rows(d.codec.layout, layer.rows, table[9 - b, : n - exact].long())
            want = beside_packed(case, q[b], packed, *(x[-exact:] for x in whole[b]))
            assert (out[b].float() - want).norm() / want.norm() < 2 * TOLERANCE[DEVICE][case.dtype]
    assert kv_indptr.tolist() == [0, 5, 21, 33]
