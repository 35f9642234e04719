"""How the CUDA backend calls its extend, and what it makes ready for a decode step; the attention itself is tested
with the kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.eagle_utils import TreeMaskMode

from sglang_blockgtq.backend import cuda, warm_up
from sglang_blockgtq.backend.cuda import TritonPackedBackend
from sglang_blockgtq.backend.extend import ExtendPlan
from sglang_blockgtq.backend.rope import LeftRope
from sglang_blockgtq.kernels.cuda.attention import KernelError
from sglang_blockgtq.kernels.decode.recent import Recent
from sglang_blockgtq.kernels.decode.tree import Tree
from sglang_blockgtq.kernels.terms import PLAIN
from sglang_blockgtq.options import KVQuantError, KVQuantOptions
from sglang_blockgtq.speculation import Verification

HEADS, GROUP, DIM, LAYERS = 2, 3, 16, (4, 9, 5)  # by id, in the order in which the model runs them


class Layer:
    """In a TritonLayer's place: keeps what is written to it."""

    def __init__(self, layer_id):
        self.id, self.saved = layer_id, []

    def encode(self, k, v, loc, positions, q=None):
        self.saved.append((k, v, loc, positions))
        return None if q is None else q + 1

    def decode(self, q, kv_indptr, kv_indices, sm_scale, *, terms, rotated, scratch, out, **drafts):
        self.read = kv_indptr.tolist(), kv_indices, sm_scale, rotated, scratch, terms
        self.drafts = drafts
        out.fill_(self.id)

    def dense(self, slots, positions, dtype):
        assert positions.tolist() == [3, 4, 0, 1, 2, 3]
        return torch.full((2, len(slots), HEADS, DIM), 7.0, dtype=dtype).unbind()


class Recorder:
    """In the Workspace's place: keeps what it is called with and writes which layer it was."""

    def __init__(self):
        self.calls, self.made, self.terms = [], [], []

    def plans(self, prefix_lens, new_lens, qo_indptr, kv_indptr, kv_indices, window):
        self.made.append(window)
        room = torch.empty(100, HEADS, DIM)
        batch = prefix_lens, new_lens, qo_indptr, kv_indptr, kv_indices, room, room
        return list(ExtendPlan.of_window(window, *batch)) if window else [(slice(None), ExtendPlan.of(*batch))]

    def __call__(self, layer, plan, q, k, v, sm_scale, out, terms):
        self.calls.append((layer, plan, q, k, v))
        self.terms.append(terms)
        out.fill_(layer.id)


@pytest.fixture
def backend():
    backend = TritonPackedBackend.__new__(TritonPackedBackend)
    backend._plans, backend.quantized_chunk, backend.first_layer, backend.pages = None, False, LAYERS[0], (0, 0)
    slots = torch.full((4 * 6,), -1, dtype=torch.int32)
    backend.buffers = SimpleNamespace(workspace=Recorder(), graph_slots=slots, verification=None)
    layers = {i: Layer(i) for i in LAYERS}
    backend.recent, backend.copies = None, {}
    backend.encode_step, backend.last_layer, backend.rope, backend.side = None, LAYERS[-1], None, None
    backend.pool = SimpleNamespace(layer=layers.__getitem__, check=None)  # which waits for loads; nothing else does
    backend.forward_metadata = metadata([3, 0], [2, 4])
    return backend


def metadata(prefix, new):
    def indptr(lengths, dtype):
        return torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(dtype)

    return SimpleNamespace(
        swa_out_cache_loc=None,
        qo_indptr=indptr([*new, 0], torch.int64),  # longer than the batch, as a shared buffer may be
        kv_indptr=indptr([*prefix, 0], torch.int32),
        kv_indices=torch.arange(sum(prefix)),
    )


def batch(prefix=(3, 0), new=(2, 4), output=None):
    return SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        extend_prefix_lens_cpu=list(prefix),
        extend_seq_lens_cpu=list(new),
        out_cache_loc=torch.arange(sum(new)) + 20,
        positions=torch.cat([torch.arange(a, a + b) for a, b in zip(prefix, new, strict=True)]),
        _attn_output=output,
    )


def attention(layer_id, window=None, cap=0.0):
    """A RadixAttention's sizes. window: tokens before a query's own that it sees."""
    layer = SimpleNamespace(layer_id=layer_id, tp_q_head_num=HEADS * GROUP, tp_k_head_num=HEADS, tp_v_head_num=HEADS)
    layer.qk_head_dim, layer.v_head_dim, layer.scaling = DIM, DIM, 0.5
    layer.sliding_window_size, layer.logit_cap = window, cap
    return layer


def extend(backend, layer_id, forward_batch, window=None, cap=0.0, **kwargs):
    layer = attention(layer_id, window, cap)
    tokens = sum(forward_batch.extend_seq_lens_cpu)
    q, k = torch.randn(tokens, HEADS * GROUP * DIM), torch.randn(tokens, HEADS, DIM)
    return TritonPackedBackend.forward_extend(backend, q, k, k, layer, forward_batch, **kwargs)


def test_one_plan_for_all_layers_of_a_batch(backend):
    forward_batch = batch()
    for layer_id in LAYERS:
        out = extend(backend, layer_id, forward_batch)
        assert out.shape == (6, HEADS * GROUP * DIM) and bool((out == layer_id).all())
        ((k, v, loc, positions),) = backend.pool.layer(layer_id).saved
        assert k.shape == v.shape == (6, HEADS, DIM)
        assert loc is forward_batch.out_cache_loc and positions is forward_batch.positions
    workspace = backend.buffers.workspace
    assert workspace.made == [0] and [call[0].id for call in workspace.calls] == list(LAYERS)
    plan = workspace.calls[0][1]
    assert (plan.prefix, plan.new) == (3, 6) and plan.cu_k.tolist() == [0, 5, 9]
    assert workspace.terms == [PLAIN] * len(LAYERS)


def test_layers_with_a_window_have_a_plan_of_their_own(backend):
    """Of the prefix what the first new token sees; SGLang counts the tokens before a query's own, and -1 is none."""
    forward_batch, sinks = batch(), torch.zeros(HEADS * GROUP)
    for layer_id, window in zip(LAYERS, (-1, 2, 2), strict=True):
        extend(backend, layer_id, forward_batch, window, 30.0, sinks=sinks)
    workspace = backend.buffers.workspace
    assert workspace.made == [0, 3]
    assert [(t.window, t.cap, t.sinks is sinks) for t in workspace.terms] == [(w, 30.0, True) for w in (0, 3, 3)]
    plan = workspace.calls[1][1]
    assert (plan.prefix, plan.cu_k.tolist()) == (2, [0, 4, 8])
    assert plan.task.tokens == 2 and plan.task.has_positions


def test_the_next_batch_gets_its_own_plan(backend):
    """Even in the same metadata object, refilled; and in another one when the first layer is elsewhere."""
    extend(backend, 4, batch())
    meta = backend.forward_metadata
    vars(meta).update(vars(metadata([1, 1], [5, 5])))
    extend(backend, 4, batch((1, 1), (5, 5)))
    assert backend.buffers.workspace.calls[-1][1].cu_k.tolist() == [0, 6, 12]
    backend.forward_metadata = metadata([0, 0], [1, 2])
    extend(backend, 9, batch((0, 0), (1, 2)))
    assert backend.buffers.workspace.calls[-1][1].cu_q.tolist() == [0, 1, 3]


def test_result_goes_where_the_graph_reads_it(backend):
    output = torch.full((6, HEADS * GROUP * DIM), torch.nan)
    got = extend(backend, 5, batch(output=output))
    assert got.data_ptr() == output.data_ptr() and bool((output == 5).all())


def test_quantized_chunk_is_read_from_its_rows(backend):
    backend.quantized_chunk = True
    extend(backend, 4, batch())
    _, _, _, k, v = backend.buffers.workspace.calls[0]
    assert k.shape == v.shape == (6, HEADS, DIM) and bool((k == 7).all()) and bool((v == 7).all())


def test_saving_is_the_callers_choice(backend):
    extend(backend, 4, batch(), save_kv_cache=False)
    assert backend.pool.layer(4).saved == [] and len(backend.buffers.workspace.calls) == 1


# The metadata of a decode step. SGLang's own backend is in the place of the base, and would be asked for anything else.


@pytest.fixture
def stepping(backend, monkeypatch):
    backend.asked = []
    for name in ("init_forward_metadata", "init_forward_metadata_out_graph", "init_forward_metadata_in_graph"):
        monkeypatch.setattr(
            TritonAttnBackend, name, lambda self, batch, *args, _name=name: self.asked.append((_name, *args))
        )
    backend.device, backend.max_context_len = "cpu", 6
    backend.kv_indptr = torch.full((5,), -1, dtype=torch.int32)
    backend.init_cuda_graph_state(3, 4)
    backend.table = torch.arange(5 * 6, dtype=torch.int32).view(5, 6)
    # SGLang's own, of a pool whose slots are what its table of requests holds.
    translator = KVIndexTranslator.__new__(KVIndexTranslator)
    translator._spaces, translator.req_to_token = {}, backend.table
    backend.kv_index_translator = translator
    return backend


def step(rows, lengths, mode=ForwardMode.DECODE, total=True, spec_info=None):
    """Lengths and rows may be longer than the batch, as a graph's buffers are."""
    return SimpleNamespace(
        forward_mode=mode,
        spec_info=spec_info,
        batch_size=len(lengths),
        seq_lens=torch.tensor([*lengths, 3]),
        seq_lens_sum=sum(lengths) if total else None,
        req_pool_indices=torch.tensor([*rows, 0]),
        kv_loc_plan=None,
    )


@pytest.mark.parametrize("total", [True, False])
def test_a_step_without_a_graph_has_memory_of_its_own(stepping, total):
    stepping.init_forward_metadata(step([4, 1], [2, 3], total=total))
    meta = stepping.forward_metadata
    assert meta.kv_indptr.tolist() == [0, 2, 5] and meta.kv_indices[:5].tolist() == [24, 25, 6, 7, 8]
    assert meta.kv_indices.dtype == torch.int32 and len(meta.kv_indices) == (5 if total else 12)
    assert not stepping.asked and bool((stepping.cuda_graph_kv_indices == -1).all())


def test_a_graph_gathers_its_slots_itself(stepping):
    """The host does nothing before a replay; what the graph does is right for whatever the buffers hold by then."""
    batch = step([4, 1], [2, 3])
    stepping.init_forward_metadata_out_graph(batch, in_capture=True)
    meta = stepping.forward_metadata
    assert (
        meta.kv_indices is stepping.cuda_graph_kv_indices and meta.kv_indptr.data_ptr() == stepping.kv_indptr.data_ptr()
    )
    stepping.init_forward_metadata_in_graph(batch)
    assert (meta.kv_indptr.tolist(), meta.kv_indices[:5].tolist()) == ([0, 2, 5], [24, 25, 6, 7, 8])

    batch.seq_lens[:2] = torch.tensor([3, 1])
    batch.req_pool_indices[:2] = torch.tensor([0, 2])
    stepping.init_forward_metadata_out_graph(batch)
    assert meta.kv_indptr.tolist() == [0, 2, 5] and stepping.forward_metadata is meta
    stepping.init_forward_metadata_in_graph(batch)
    assert (meta.kv_indptr.tolist(), meta.kv_indices[:4].tolist()) == ([0, 3, 4], [0, 1, 2, 12])
    assert not stepping.asked


@pytest.mark.parametrize("save", [True, False])
def test_a_step_writes_its_tokens_at_their_positions(stepping, save):
    """And decodes with the queries that were rotated in the same launch."""
    stepping.init_forward_metadata(step([4, 1], [2, 3]))
    stepping.buffers.scratch = object()
    batch = SimpleNamespace(out_cache_loc=torch.tensor([25, 8]), positions=torch.tensor([1, 2]))
    layer = attention(9, 63, 20.0)
    q, k = torch.randn(2, HEADS * GROUP * DIM), torch.randn(2, HEADS * DIM)
    out = TritonPackedBackend.forward_decode(stepping, q, k, 2 * k, layer, batch, save_kv_cache=save)
    packed, meta = stepping.pool.layer(9), stepping.forward_metadata
    indptr, indices, scale, rotated, scratch, terms = packed.read
    assert (terms.window, terms.cap, terms.sinks) == (64, 20.0, None)
    assert (indptr, scale) == ([0, 2, 5], 0.5) and indices is meta.kv_indices and scratch is stepping.buffers.scratch
    assert out.shape == q.shape and bool((out == 9).all())
    if not save:
        assert packed.saved == [] and rotated is None
        return
    ((key, value, loc, positions),) = packed.saved
    assert loc is batch.out_cache_loc and positions is batch.positions
    assert torch.equal(key.flatten(1), k) and torch.equal(value.flatten(1), 2 * k)
    assert torch.equal(rotated.flatten(1), q + 1)


def test_last_tokens_are_read_exactly(stepping):
    """What a prefill has kept of its requests, a step leaves out of the slots and hands to decode, with its own."""
    recent = Recent.of(1, 3, 4, 2, HEADS, DIM, DIM, torch.float32, "cpu")
    recent.bind(4)
    stepping.recent, stepping.copies, stepping.first_layer = recent, {9: recent.layer(0)}, 9
    forward_batch = batch((3, 0), (2, 4))
    forward_batch.req_pool_indices, forward_batch.extend_prefix_lens = torch.tensor([4, 3, 0]), torch.tensor([3, 0])
    extend(stepping, 9, forward_batch)
    ((k, v, *_),) = stepping.pool.layer(9).saved
    assert recent.first.tolist() == [3, 0, 0]
    assert torch.equal(recent.k[0, 0], k[[1, 0]]) and torch.equal(recent.v[0, 1], v[4:6])  # positions 4 and 3; 2 and 3

    stepping.init_forward_metadata(step([3, 1], [5, 3]))
    meta = stepping.forward_metadata
    assert meta.kv_indptr.tolist() == [0, 3, 5] and meta.kv_indices[:5].tolist() == [18, 19, 20, 6, 7]
    stepping.buffers.scratch = None
    q, k = torch.randn(2, HEADS * GROUP * DIM), torch.randn(2, HEADS * DIM)
    decoded = SimpleNamespace(out_cache_loc=torch.tensor([25, 8]), positions=torch.tensor([4, 2]))
    TritonPackedBackend.forward_decode(stepping, q, k, 2 * k, attention(9), decoded)
    read = stepping.pool.layer(9).drafts["recent"]
    assert read.copies is stepping.copies[9] and recent.step[:, :2].tolist() == [[1, -1], [4, 2], [2, 1], [2, 7]]
    assert torch.equal(read.k.flatten(1), k) and torch.equal(read.v.flatten(1), 2 * k)


@pytest.mark.parametrize(("room", "left"), [(2, True), (1, False)])
@pytest.mark.parametrize("graph", [False, True])
def test_rope_is_left_to_steps_that_are_encoded_at_their_end(stepping, rope_on_a_cpu, room, left, graph):
    """Whose keys nobody else reads; in every layer, and to nobody after the last one."""

    class Encode:
        def takes(self, tokens):
            return tokens <= room

        def __call__(self, loc, positions):
            pass

    rope = RotaryEmbedding(DIM, DIM, 8, 10000, True, torch.float32)
    stepping.rope, stepping.encode_step = LeftRope(rope), Encode()
    stepping.recent = Recent.of(3, 3, 4, 2, HEADS, DIM, DIM, torch.float32, "cpu")
    stepping.recent.bind(4)
    stepping.copies, stepping.buffers.scratch = {i: stepping.recent.layer(n) for n, i in enumerate(LAYERS)}, None
    batch = step([4, 1], [2, 3])
    batch.positions, batch.out_cache_loc = torch.tensor([1, 2]), torch.tensor([25, 8])
    if graph:
        stepping.init_forward_metadata_out_graph(batch, in_capture=True)
        stepping.init_forward_metadata_in_graph(batch)
    else:
        stepping.init_forward_metadata(batch)
    q, k = torch.randn(2, HEADS * GROUP * DIM), torch.randn(2, HEADS * DIM)
    turned = rope(batch.positions, q.clone(), k.clone())
    for i in LAYERS:
        got = stepping.rope(batch.positions, q, k)
        assert all(torch.equal(x, y) for x, y in zip(got, (q, k) if left else turned, strict=True))
        TritonPackedBackend.forward_decode(stepping, *got, k, attention(i), batch)
        angles = stepping.pool.layer(i).drafts["recent"].angles
        assert torch.equal(angles, rope.cos_sin_cache[1:3]) if left else angles is None
    assert torch.equal(stepping.rope(batch.positions, q.clone(), k.clone())[0], turned[0])


@pytest.mark.parametrize("then", [ForwardMode.EXTEND, ForwardMode.IDLE])
def test_a_step_that_broke_off_leaves_no_rope(stepping, rope_on_a_cpu, then):
    """Of whatever comes next the model turns queries and keys."""
    rope = RotaryEmbedding(DIM, DIM, 8, 10000, True, torch.float32)
    stepping.rope, positions = LeftRope(rope), torch.tensor([1, 2])
    q, k = torch.randn(2, HEADS * GROUP * DIM), torch.randn(2, HEADS * DIM)
    stepping.rope.begin(positions)
    stepping.rope(positions, q, k)
    stepping.init_forward_metadata_out_graph(step([], [], mode=then), in_capture=True)
    assert torch.equal(stepping.rope(positions, q.clone(), k.clone())[0], rope(positions, q.clone(), k.clone())[0])


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize(("room", "save"), [(2, True), (1, True), (2, False)])
def test_a_step_is_encoded_at_its_end(stepping, room, save, side):
    """Behind the last layer's attention, and then noted as written; where not all tokens are kept, in the layers."""
    run = []
    if side:
        stepping.side = SimpleNamespace(run=lambda work, *args: (run.append(work), work(*args)))

    class Encode:
        def takes(self, tokens):
            return tokens <= room

        def __call__(self, loc, positions):
            assert stepping.pool.layer(LAYERS[-1]).read
            done.append((loc, positions))

    done, wrote, stepping.encode_step = [], [], Encode()
    stepping.pool.check = SimpleNamespace(poll=lambda: None, sample=lambda *_, **__: None)
    stepping.pool.check.wrote = lambda layer_id, _: wrote.append((layer_id, len(done)))
    stepping.init_forward_metadata(step([4, 1], [2, 3]))
    stepping.buffers.scratch = None
    batch = SimpleNamespace(out_cache_loc=torch.tensor([25, 8]), positions=torch.tensor([1, 2]))
    q, k = torch.randn(2, HEADS * GROUP * DIM), torch.randn(2, HEADS * DIM)
    for i in LAYERS:
        TritonPackedBackend.forward_decode(stepping, q, k, k, attention(i), batch, save_kv_cache=save)
    later = save and room == 2
    assert [len(stepping.pool.layer(i).saved) for i in LAYERS] == [int(save and not later)] * len(LAYERS)
    assert run == [stepping.encode_step] * (side and later)
    assert len(done) == int(later) and all(x is batch.out_cache_loc and y is batch.positions for x, y in done)
    assert wrote == ([(i, int(later and i == LAYERS[-1])) for i in LAYERS] if save else [])


@pytest.mark.parametrize("lengths", [[5], [1, 6, 2], [3, 3, 3, 3]])
def test_metadata_is_what_sglang_would_make(stepping, lengths):
    batch = step(range(len(lengths), 0, -1), lengths)
    stepping.init_forward_metadata_out_graph(batch, in_capture=True)
    stepping.init_forward_metadata_in_graph(batch)
    size, total = len(lengths), sum(lengths)
    want = torch.full((total,), -1, dtype=torch.int64)
    indptr = TritonAttnBackend._fill_kv_indptr_and_indices(
        stepping,
        batch.kv_loc_plan,
        size,
        batch.seq_lens[:size],
        batch.req_pool_indices[:size],
        want,
        torch.zeros(size + 1, dtype=torch.int32),
    )
    assert stepping.forward_metadata.kv_indptr.tolist() == indptr.tolist()
    assert stepping.forward_metadata.kv_indices[:total].tolist() == want.tolist()


def test_a_step_without_requests(stepping):
    stepping.init_forward_metadata(step([], [], ForwardMode.IDLE))
    assert stepping.forward_metadata.kv_indptr.tolist() == [0]


def test_a_prefill_is_the_bases(stepping):
    batch = step([1], [2], ForwardMode.EXTEND)
    stepping.init_forward_metadata(batch)
    stepping.init_forward_metadata_out_graph(batch, in_capture=True)
    stepping.init_forward_metadata_in_graph(batch)
    names = "init_forward_metadata", "init_forward_metadata_out_graph", "init_forward_metadata_in_graph"
    assert stepping.asked == [(names[0],), (names[1], True), (names[2],)]


@pytest.mark.parametrize("table", [{"v2p": torch.zeros(1)}, {"entry_page_size": 16}])
def test_a_table_of_something_else_is_an_error(stepping, table):
    stepping.kv_index_translator.read_source = lambda plan, req_pool_indices, bs: SimpleNamespace(
        **{"ids": stepping.table, "row_ids": req_pool_indices, "entry_page_size": 1, "v2p": None, **table}
    )
    with pytest.raises(RuntimeError, match="table of requests"):
        stepping.init_forward_metadata(step([1], [2]))


def test_graphs_take_the_slots_that_were_counted(stepping, monkeypatch, caplog):
    """Nothing of the base's buffers is made; a larger batch than was foreseen gets memory, and a warning."""
    monkeypatch.setattr(TritonAttnBackend, "init_cuda_graph_state", None)
    stepping.init_cuda_graph_state(4, 4)
    assert stepping.cuda_graph_kv_indices is stepping.buffers.graph_slots and not caplog.records
    stepping.init_cuda_graph_state(5, 5)
    slots = stepping.cuda_graph_kv_indices
    assert (slots.dtype, len(slots)) == (torch.int32, 30) and not slots.any()
    assert "graphs of 5 requests were not foreseen" in caplog.text


def test_a_layer_without_keys_of_its_own_is_refused(backend):
    with pytest.raises(NotImplementedError, match="layer 4 shares another layer's cache"):
        layer = attention(4)
        TritonPackedBackend.forward_extend(backend, torch.zeros(6, 1), None, None, layer, batch())


def test_the_scheduler_writes_when_a_graph_has_gathered(stepping):
    """Later would be a whole step late, earlier a race with the launch that reads the table of requests."""
    assert stepping.shared_read_ends(ForwardMode.DECODE) is SharedReadEnds.IN_REPLAY


# Verification of drafts: two tokens of each request behind those that SGLang counts, along a tree or a chain.

DRAFTS = 2


@pytest.fixture(params=["tree", "chain"])
def verifying(request, stepping):
    tree = Tree.of(4, DRAFTS, "cpu") if request.param == "tree" else None
    stepping.buffers.verification = Verification(DRAFTS, tree, full_mask=False)
    stepping.buffers.verify_scratch = object()
    stepping.buffers.graph_slots = torch.full((3 * (6 + DRAFTS),), -1, dtype=torch.int32)
    stepping.init_cuda_graph_state(3, 3 * DRAFTS)
    assert stepping.cuda_graph_kv_indices is stepping.buffers.graph_slots
    return stepping


def drafts(*seen_by_the_second):
    """Two tokens a request; whether the second sees the first."""
    mask = [[[1, 0], [int(x), 1]] for x in seen_by_the_second]
    count = DRAFTS * len(mask)
    return SimpleNamespace(draft_token=torch.zeros(count), custom_mask=torch.tensor(mask, dtype=torch.uint8).flatten())


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_a_verification_reads_what_is_drafted(verifying, graph):
    batch = step([4, 1], [2, 3], ForwardMode.TARGET_VERIFY, spec_info=drafts(True, False))
    if graph:
        nothing = SimpleNamespace(draft_token=None, custom_mask=None)
        verifying.init_forward_metadata_out_graph(
            step([4, 1], [1, 1], ForwardMode.TARGET_VERIFY, spec_info=nothing), in_capture=True
        )
        meta = verifying.forward_metadata
        verifying.init_forward_metadata_out_graph(batch)
        verifying.init_forward_metadata_in_graph(batch)
        assert verifying.forward_metadata is meta and meta.kv_indices is verifying.cuda_graph_kv_indices
    else:
        verifying.init_forward_metadata(batch)
        meta = verifying.forward_metadata
        assert len(meta.kv_indices) == 9
    assert not verifying.asked and meta.max_extend_len == DRAFTS
    assert meta.kv_indptr.tolist() == [0, 4, 9]
    assert meta.kv_indices[:9].tolist() == [24, 25, 26, 27, 6, 7, 8, 9, 10]
    if tree := verifying.buffers.verification.tree:
        assert tree.bits[:4].tolist() == [1, 3, 1, 2]
        assert tree.positions[:4].tolist() == [2, 3, 3, 3]  # both drafts of the second request follow one token


def test_verification_fills_a_graph(verifying):
    """A request that only fills a graph has no tree."""
    batch = step([4, 1], [2, 1], ForwardMode.TARGET_VERIFY, spec_info=drafts(True))
    verifying.init_forward_metadata_out_graph(batch, in_capture=True)
    if tree := verifying.buffers.verification.tree:
        assert tree.bits[:4].tolist() == [1, 3, 0, 0]


def test_drafts_are_verified_over_their_rows(verifying):
    batch = step([4, 1], [2, 3], ForwardMode.TARGET_VERIFY, spec_info=drafts(True, False))
    verifying.init_forward_metadata(batch)
    batch.out_cache_loc, batch.positions = torch.tensor([26, 27, 9, 10]), torch.tensor([2, 3, 3, 3])
    layer = attention(9, 63, 20.0)
    q, k = torch.randn(4, HEADS * GROUP * DIM), torch.randn(4, HEADS * DIM)
    out = TritonPackedBackend.forward_extend(verifying, q, k, 2 * k, layer, batch)
    packed, buffers = verifying.pool.layer(9), verifying.buffers
    indptr, indices, _, rotated, scratch, terms = packed.read
    assert indptr == [0, 4, 9] and indices is verifying.forward_metadata.kv_indices
    assert scratch is buffers.verify_scratch and (terms.window, terms.cap) == (64, 20.0)
    assert out.shape == q.shape and torch.equal(rotated.flatten(1), q + 1)
    ((_, _, loc, positions),) = packed.saved
    assert loc is batch.out_cache_loc and positions.tolist() == [2, 3, 3, 3]
    assert packed.drafts["q_len"] == DRAFTS
    if tree := buffers.verification.tree:
        assert packed.drafts["tree"].data_ptr() == tree.bits.data_ptr() and len(packed.drafts["tree"]) == 4
        assert positions.data_ptr() == tree.positions.data_ptr()
    else:
        assert "tree" not in packed.drafts and positions is batch.positions
    assert verifying.buffers.workspace.calls == []


def test_workers_write_trees_to_the_backends_mask(verifying):
    runner = SimpleNamespace(req_to_token_pool=SimpleNamespace(size=3))
    mask = verifying._new_verify_mask(runner)
    assert mask.fits(3) and not mask.fits(4) and len(mask.buffer) == 3 * DRAFTS**2
    assert (mask.mode, mask.is_read) == (TreeMaskMode.QLEN_ONLY, True)
    verifying.buffers.verification = None
    assert verifying._new_verify_mask(runner) is None


def test_kernel_that_cannot_be_used_is_told_by_its_option(backend, monkeypatch):
    def fails(todo, device):
        raise KernelError("NVRTC does not compile decode:\nline 7")

    monkeypatch.setattr(warm_up, "jobs", lambda *_: [])
    monkeypatch.setattr(warm_up, "run", fails)
    monkeypatch.setattr(cuda, "current", lambda: SimpleNamespace(options=KVQuantOptions()))
    backend.pool.layers, backend.num_head = {4: SimpleNamespace(rows=torch.empty(0))}, 6
    backend.buffers.scratch = None
    runner = SimpleNamespace(dtype=torch.float16, req_to_token_pool=SimpleNamespace(size=4))
    with pytest.raises(KVQuantError, match="--kv-quant-decode-kernel auto: .* NVRTC does not compile decode:") as told:
        backend._warm_up(runner)
    assert str(told.value).endswith("line 7; triton leaves it out")
