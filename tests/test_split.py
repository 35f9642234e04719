"""Models with a pool for their windows: which are served, how memory is shared, both pools, the windows' backend."""

from __future__ import annotations

import logging
from inspect import unwrap
from types import SimpleNamespace

import pytest
import torch
import transformers
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.pool_configurator import HybridSWAPoolConfigurator
from sglang.srt.runtime_context import get_context, get_schedule
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_blockgtq import balance, compat, plugin, runtime, split
from sglang_blockgtq.backend.cpu_windows import TorchWindowBackend
from sglang_blockgtq.backend.split import SplitBackend
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import layers_of
from sglang_blockgtq.kernels.host.attention import causal_attention
from sglang_blockgtq.kernels.terms import Terms
from sglang_blockgtq.options import KVQuantError, KVQuantOptions
from sglang_blockgtq.pool import packed_pool
from sglang_blockgtq.runtime import Runtime

HEADS, DIM, V_DIM = 2, 64, 32  # of layers with full attention
WINDOW_HEADS = 4  # of those with a window
FULL, WINDOWS = (1, 3), (0, 2)  # layers
BYTES = 64 * 3 // 8 + 32 * 3 // 8 + 2 * 2  # of a token and head at 3 bits, with the scales of a key and a value
WINDOW_BYTES = 2 * WINDOW_HEADS * (DIM + V_DIM)  # of a token and layer
SIZE, WINDOW_SIZE = 400, 250  # slots
WINDOW, SINKS = 50, torch.linspace(-1, 2, 2 * WINDOW_HEADS)


@pytest.fixture
def served(monkeypatch) -> Runtime:
    """What start-up leaves behind: a table with two rows, which are those of the layers 1 and 3."""
    torch.manual_seed(0)
    q, k = torch.rand(2, 2, HEADS, DIM // 2, dtype=torch.float64)
    moments = Moments(q, k, torch.full((2, HEADS), float(DIM), dtype=torch.float64), 2048)
    table = build_table(moments, [RopeBlocks(DIM, DIM)] * 2, k_bits=3, v_bits=3, v_head_dim=V_DIM)
    layers = dict(zip(FULL, layers_of(table, slice(None), (0, 1), "cpu", 512).values(), strict=True))
    found = Runtime(KVQuantOptions(), table, slice(None), (0, 1), "file", 0.0, 0, layers=layers)
    monkeypatch.setattr(runtime, "_current", found)
    return found


def configurator(full=FULL, **other) -> SimpleNamespace:
    """A KVCacheConfigurator of a server with --kv-quant, for a model whose windows have more KV heads."""
    sizes = {"head_dim": DIM, "v_head_dim": V_DIM, "swa_head_dim": DIM, "swa_v_head_dim": V_DIM}
    model = SimpleNamespace(
        attention_arch=AttentionArch.MHA,
        hf_text_config=SimpleNamespace(swa_num_key_value_heads=WINDOW_HEADS),
        get_num_kv_heads=lambda *ranks: HEADS,
        get_swa_num_kv_heads=lambda *ranks: WINDOW_HEADS,
        **sizes,
    )
    info = {"full_attention_layer_ids": list(full), "swa_attention_layer_ids": list(WINDOWS)}
    stock = {
        "server_args": SimpleNamespace(_kvq=KVQuantOptions()),
        "model_config": model,
        "layer_info": SimpleNamespace(start_layer=0, end_layer=4, **info),
        "kv_cache_dtype": torch.bfloat16,
        "kv_cache_dtype_str": "auto",
        "page_size": 1,
        "pool_page_size": 1,
        "device": "cpu",
        "sliding_window_size": WINDOW - 1,
        "spec_algorithm": SpeculativeAlgorithm.NONE,
        "is_hybrid_swa_compress": True,
        "is_draft_worker": False,
        "draft_swa_full_capacity": False,
        "post_capture_kv_active": False,
        "fused_entry_bytes": lambda name: None,
    }
    return SimpleNamespace(**{**stock, **other})


def build(mha_pool_class: type = MHATokenToKVPool, **other) -> SWAKVPool:
    with get_context().override_server_args():
        return plugin._build_hybrid_swa_kv_pool(
            unwrap(KVCacheConfigurator._build_hybrid_swa_kv_pool),  # other tests may have hooked it
            configurator(**other),
            mha_pool_class=mha_pool_class,
            full_max_total_num_tokens=SIZE,
            swa_max_total_num_tokens=WINDOW_SIZE,
        )


# --- which models --------------------------------------------------------------------------------


def runner(config, hybrid=True, full=FULL, **other) -> SimpleNamespace:
    info = SimpleNamespace(full_attention_layer_ids=list(full), swa_attention_layer_ids=list(WINDOWS))
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config), layer_info=info, is_hybrid_swa=hybrid, **other
    )


def mellum(**other) -> transformers.MellumConfig:
    return transformers.MellumConfig(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, **other
    )


def test_models_that_are_served():
    split.check_split(runner(mellum()), [1, 3])
    split.check_split(runner(transformers.LlamaConfig(), hybrid=False), list(range(32)))
    windows = transformers.Gemma2Config(num_hidden_layers=2)  # packed as well
    split.check_split(runner(windows, hybrid=False), [0, 1])


@pytest.mark.parametrize(
    "of, packed, reason",
    [
        (
            runner(transformers.Gemma2Config(num_hidden_layers=4)),
            [0, 1, 2, 3],
            "model type gemma2: SGLang keeps its layers with a window in a pool of their own, which is supported for "
            "gpt_oss, mellum, mimo_v2_flash; with --disable-hybrid-swa-memory",
        ),
        (runner(mellum(), hybrid=False), [1, 3], "model type mellum: .* leave --disable-hybrid-swa-memory out"),
        (
            runner(mellum(), full=(0, 1, 3)),
            [1, 3],
            r"model type mellum: layers \[1, 3\] have full attention, SGLang knows of \[0, 1, 3\]; serve this model "
            "without --kv-quant",
        ),
        (runner(mellum(), full=()), [], "no layer of this pipeline stage has full attention; use a smaller --pp-size"),
    ],
    ids=["another pool", "no pool", "other layers", "no layers"],
)
def test_models_that_are_refused(of, packed, reason):
    with pytest.raises(KVQuantError, match=reason):
        split.check_split(of, packed)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hybrid, chosen, expected",
    [(True, False, 0.8 * BYTES / (2 * (DIM + V_DIM))), (True, True, 0.8), (False, False, 0.8)],
)
def test_windows_get_a_share_of_memory_unless_the_user_says_which(
    served, monkeypatch, caplog, hybrid, chosen, expected
):
    monkeypatch.setattr(balance, "is_rank_zero", lambda: True)
    fields = {"swa_full_tokens_ratio": 0.8, "_swa_full_tokens_ratio_explicitly_set": chosen}
    with get_context().override_server_args(**fields), caplog.at_level(logging.INFO):
        split.balance_windows(runner(mellum(), hybrid), served.table)
        assert get_schedule().swa_full_tokens_ratio == pytest.approx(expected, abs=1e-4)
    assert ("--swa-full-tokens-ratio 0.1667 in place of 0.8" in caplog.text) == (expected != 0.8)


def sizes_of(kvc) -> HybridSWAPoolConfigurator:
    with get_context().override_server_args(swa_full_tokens_ratio=0.25):
        found = HybridSWAPoolConfigurator(kvc)
        plugin._size_split_pool(None, found, kvc)
    return found


def test_the_pools_are_sized_by_packed_rows_and_16_bit_windows(served):
    found = sizes_of(configurator())
    assert served.bytes_per_token == 2 * HEADS * BYTES
    each = 2 * HEADS * BYTES + runtime.UNCOUNTED_BYTES_PER_TOKEN
    assert found._cell_size == pytest.approx(each + 0.25 * 2 * WINDOW_BYTES)
    sizes = found.calculate_pool_sizes(1 << 24, 1)
    assert sizes.swa_max_total_num_tokens == sizes.full_max_total_num_tokens // 4
    used = sizes.full_max_total_num_tokens * each + sizes.swa_max_total_num_tokens * 2 * WINDOW_BYTES
    assert 0.99 * (1 << 24) < used <= 1 << 24


def test_a_stock_server_sizes_its_pools_itself(served):
    found = sizes_of(configurator(server_args=SimpleNamespace()))
    assert found._cell_size == pytest.approx(2 * 2 * HEADS * (DIM + V_DIM) + 0.25 * 2 * WINDOW_BYTES)


# --- both pools ----------------------------------------------------------------------------------


def with_mapping(pool: SWAKVPool, full: torch.Tensor, windows: torch.Tensor) -> SWAKVPool:
    """The slots ``full`` have slots ``windows`` in the other pool, all others have none."""
    mapping = torch.zeros(SIZE + 2, dtype=torch.int64)
    mapping[full], mapping[-1] = windows, -1
    pool.register_mapping(mapping)
    return pool


def test_only_layers_with_full_attention_are_packed(served):
    pool = build()
    packed = packed_pool(pool)
    assert packed is pool.full_kv_pool and sorted(packed.layers) == list(FULL)
    assert type(pool.swa_kv_pool) is MHATokenToKVPool
    keys, values = pool.get_kv_buffer(2)
    assert (keys.shape, values.shape) == (
        (WINDOW_SIZE + 1, WINDOW_HEADS, DIM),
        (WINDOW_SIZE + 1, WINDOW_HEADS, V_DIM),
    )
    assert keys.dtype == values.dtype == torch.bfloat16
    rows = sum(layer.rows.nbytes for layer in served.layers.values())
    assert sum(pool.get_kv_size_bytes()) == rows + (WINDOW_SIZE + 1) * 2 * WINDOW_BYTES
    with packed.probing():
        assert pool.get_v_head_dim() == V_DIM
    with pytest.raises(NotImplementedError, match="no dense KV buffer"):
        pool.get_kv_buffer(3)
    with pytest.raises(NotImplementedError, match="written by the backend"):
        pool.set_kv_buffer(SimpleNamespace(layer_id=3), KVWriteLoc(torch.tensor([4]), None), None, None)
    assert plugin._check_pool(pool, configurator()) is None
    waited = []
    pool.register_layer_transfer_counter(SimpleNamespace(wait_until=waited.append))
    packed.layer(3)
    assert waited == [3]


def fill(pool: SWAKVPool, slots: torch.Tensor) -> None:
    """Layers 2, by the wrapper, and 3, as the backend does."""
    k, v = torch.randn(len(slots), WINDOW_HEADS, DIM), torch.randn(len(slots), WINDOW_HEADS, V_DIM)
    loc = KVWriteLoc(slots, pool.translate_loc_from_full_to_swa(slots))
    pool.set_kv_buffer(SimpleNamespace(layer_id=2), loc, k, v)
    packed_pool(pool).layer(3).encode(k[:, :HEADS], v[:, :HEADS], slots)
    for read, written in zip(pool.get_kv_buffer(2), (k, v), strict=True):
        assert torch.equal(read[loc.swa_loc], written.bfloat16())


def held(pool: SWAKVPool, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of layer 3, keys and values of layer 2."""
    at = pool.translate_loc_from_full_to_swa(slots)
    return packed_pool(pool).layer(3).gather(slots), *(x[at].clone() for x in pool.get_kv_buffer(2))


def test_moves_are_exact_in_both_pools(served):
    old, new = torch.tensor([4, 9, 390]), torch.tensor([20, 21, 22])
    pool = with_mapping(build(), torch.cat([old, new]), torch.tensor([7, 240, 3, 30, 1, 2]))
    pool.swa_kv_pool.use_native_move_kv_cache = True  # its own kernel needs a GPU
    fill(pool, old)
    before = held(pool, old)
    assert before[0].any()
    pool.move_kv_cache(new, old)
    assert all(torch.equal(a, b) for a, b in zip(held(pool, new), before, strict=True))


def test_a_copy_on_the_host_is_exact_in_both_pools(served):
    """A request's first slots have left the windows' pool; it comes back to other slots, of which the first have none
    either."""
    old, new = torch.tensor([4, 9, 390, 17]), torch.tensor([20, 21, 22, 23])
    pool = with_mapping(build(), old, torch.tensor([7, 240, 3, 11]))
    fill(pool, old)
    pool.full_to_swa_index_mapping[old[:2]] = 0
    before, saved = held(pool, old), pool.get_cpu_copy(old)
    pool = with_mapping(build(), new[2:], torch.tensor([100, 50]))
    pool.load_cpu_copy(saved, new)
    rows, keys, values = held(pool, new)
    assert torch.equal(rows, before[0]) and rows.any()
    assert torch.equal(keys[2:], before[1][2:]) and torch.equal(values[2:], before[2][2:])
    assert not any(x[[0, 1, 2, 3, 7, 11, 240]].any() for x in pool.get_kv_buffer(2))


def test_another_pool_is_refused(served):
    class MHATokenToKVPoolMXFP8(MHATokenToKVPool):
        pass

    for other in ({"mha_pool_class": MHATokenToKVPoolMXFP8}, {"post_capture_kv_active": True}):
        with pytest.raises(
            KVQuantError, match="asked for a MHATokenToKVPool.* pool for the layers with full attention"
        ):
            build(**other)
    with pytest.raises(KVQuantError, match="pool of 1 layers with NoneType, the table is for 2 layers"):
        build(full=(1,))


def test_a_stock_pool_stays(served):
    for stock in ({"server_args": SimpleNamespace()}, {"is_draft_worker": True}):
        pool = build(**stock)
        assert type(pool.full_kv_pool) is type(pool.swa_kv_pool) is MHATokenToKVPool


def test_what_is_hooked_and_called_is_watched(monkeypatch):
    monkeypatch.setattr(KVCacheConfigurator, "_build_hybrid_swa_kv_pool", lambda self, *, mha_pool_class: None)
    monkeypatch.setattr(SWAKVPool, "__init__", lambda self: None)
    monkeypatch.delattr(HybridSWAPoolConfigurator, "_recompute_cell_size")
    drift = " ".join(compat.find_drift())
    assert "_build_hybrid_swa_kv_pool no longer calls token_to_kv_pool_class=swa_pool_class" in drift
    assert "SWAKVPool.__init__ no longer calls" in drift
    assert "HybridSWAPoolConfigurator._recompute_cell_size is gone" in drift


# --- two backends under one ----------------------------------------------------------------------


class Noted(AttentionBackend):
    """A backend that notes what it is called with."""

    def __init__(self, runner, name: str, **known):
        super().__init__()
        self.runner, self.name, self.calls, self.kv_index_translator = runner, name, [], None
        self.__dict__.update(known)

    def note(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.name

    def shared_read_ends(self, fm):
        return SharedReadEnds.POST_REPLAY if self.name == "windows" else SharedReadEnds.IN_REPLAY

    init_forward_metadata = init_forward_metadata_out_graph = init_forward_metadata_in_graph = note
    init_cuda_graph_state = on_after_cuda_graph_warmup = forward_decode = forward_extend = note


def test_each_layer_goes_to_its_backend(served, monkeypatch):
    from sglang_blockgtq.backend import split as backends

    known = {"needs_cpu_seq_lens": True, "extend_dummy_seqs_capped_by_req_pool": True}
    monkeypatch.setattr(backends, "windows_backend", lambda runner: Noted(runner, "windows", **known))
    whole = runner(mellum(), sliding_window_size=WINDOW - 1, req_to_token_pool="requests", token_to_kv_pool=build())
    whole.model_config.context_len = 512
    backend = SplitBackend(whole, lambda seen: Noted(seen, "packed", needs_cpu_seq_lens=False))
    packed, windows = backend.attn_backend_list
    # Ours sees the packed pool and no window, SGLang's the whole model.
    assert packed.runner.token_to_kv_pool is whole.token_to_kv_pool.full_kv_pool
    assert packed.runner.sliding_window_size is None and packed.runner.req_to_token_pool == "requests"
    assert windows.runner is whole and whole.sliding_window_size == WINDOW - 1
    assert backend.token_to_kv_pool is whole.token_to_kv_pool and backend.max_context_len == 512
    assert backend.shared_read_ends(ForwardMode.DECODE) is SharedReadEnds.POST_REPLAY
    assert backend.needs_cpu_seq_lens and backend.extend_dummy_seqs_capped_by_req_pool

    backend.init_forward_metadata("batch")
    backend.init_forward_metadata_out_graph("batch", in_capture=True)
    backend.init_forward_metadata_in_graph("batch")
    backend.init_cuda_graph_state(8, 9)
    backend.on_after_cuda_graph_warmup()
    assert packed.calls == windows.calls and len(packed.calls) == 5
    assert packed.calls[1] == (("batch",), {"in_capture": True}) and packed.calls[3] == ((8, 9), {})
    for forward in (backend.forward_decode, backend.forward_extend):
        went = [forward("q", "k", "v", SimpleNamespace(layer_id=i), "batch", False, sinks=i) for i in range(4)]
        assert went == ["windows", "packed"] * 2
    (*_, batch, save), kwargs = windows.calls[-1]
    assert (batch, save, kwargs) == ("batch", False, {"sinks": 2})


# --- attention over windows on a host ------------------------------------------------------------

LAYER = SimpleNamespace(
    layer_id=2,
    tp_q_head_num=2 * WINDOW_HEADS,
    qk_head_dim=DIM,
    v_head_dim=V_DIM,
    scaling=0.2,
    sliding_window_size=WINDOW - 1,  # as SGLang counts
    logit_cap=0.0,
)


def test_windows_are_read_where_they_lie(served):
    """Prompts in two chunks, then a token each: one text much longer than a window and one shorter. Before each step
    the slots that no query will see are freed, and whatever nobody holds is NaN."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, dim: int) -> list[torch.Tensor]:
        return [torch.randn(n, heads, dim, generator=generator) for n in (131, 26)]

    q, k, v = draw(2 * WINDOW_HEADS, DIM), draw(WINDOW_HEADS, DIM), draw(WINDOW_HEADS, V_DIM)
    table = torch.randperm(SIZE - 1, generator=generator)[:262].view(2, 131).int() + 1
    places = torch.randperm(WINDOW_SIZE - 1, generator=generator)[:157] + 1
    pool = with_mapping(build(), torch.cat([table[0], table[1, :26]]).long(), places)
    for x in pool.get_kv_buffer(2):
        x.fill_(torch.nan)
    backend = TorchWindowBackend(
        SimpleNamespace(token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=table))
    )
    for done, lengths, padding in (((0, 0), (100, 20), 0), ((100, 20), (130, 25), 3), ((130, 25), (131, 26), 0)):
        for row, n in enumerate(done):
            gone = table[row, : max(0, n - WINDOW + 1)].long()
            at = pool.translate_loc_from_full_to_swa(gone)
            for x in pool.get_kv_buffer(2):
                x[at] = torch.nan
            pool.full_to_swa_index_mapping[gone] = 0
        parts = [(row, slice(done[row], lengths[row])) for row in (1, 0)]
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if lengths[0] - done[0] == 1 else ForwardMode.EXTEND,
            seq_lens=torch.tensor([lengths[1], lengths[0]]),
            extend_seq_lens_cpu=[lengths[1] - done[1], lengths[0] - done[0]],
            req_pool_indices=torch.tensor([1, 0]),
            out_cache_loc=torch.cat([*(table[row, new].long() for row, new in parts), torch.zeros(padding).long()]),
        )
        given = [
            torch.cat([*(x[row][new] for row, new in parts), torch.full((padding, *x[0].shape[1:]), torch.nan)])
            for x in (q, k, v)
        ]
        backend.init_forward_metadata(batch)
        out = backend.forward_extend(*given, LAYER, batch, sinks=SINKS).unflatten(1, (-1, V_DIM))
        want = [
            causal_attention(
                q[row][new],
                *(x[row][: new.stop].bfloat16().float() for x in (k, v)),
                LAYER.scaling,
                Terms(WINDOW, sinks=SINKS),
            )
            for row, new in parts
        ]
        torch.testing.assert_close(out[: len(out) - padding], torch.cat(want), rtol=1e-4, atol=1e-5)
        assert not out[len(out) - padding :].any()
