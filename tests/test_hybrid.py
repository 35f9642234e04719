"""Hybrid models: the packed pool within SGLang's wrapper, which models are served, and how memory is shared."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool
from sglang.srt.runtime_context import get_context, get_schedule

from sglang_blockgtq import balance, compat, hybrid, plugin, runtime
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import layers_of
from sglang_blockgtq.options import KVQuantError, KVQuantOptions
from sglang_blockgtq.pool import packed_pool
from sglang_blockgtq.runtime import Runtime

HEADS, DIM, SIZE = 2, 64, 32
WITH_KEYS = (3, 7)  # of eight layers


@pytest.fixture
def served(monkeypatch) -> Runtime:
    """What start-up leaves behind: a table with two rows, which are those of the layers 3 and 7."""
    torch.manual_seed(0)
    q, k = torch.rand(2, 2, HEADS, DIM // 2, dtype=torch.float64)
    moments = Moments(q, k, torch.full((2, HEADS), float(DIM), dtype=torch.float64), 2048)
    table = build_table(moments, [RopeBlocks(DIM, DIM // 4)] * 2, k_bits=3, v_bits=3)
    rows = layers_of(table, slice(None), (0, 1), "cpu", 512)
    layers = dict(zip(WITH_KEYS, rows.values(), strict=True))
    found = Runtime(KVQuantOptions(), table, slice(None), (0, 1), "file", 0.0, 2 * HEADS * 4 * DIM, layers=layers)
    monkeypatch.setattr(runtime, "_current", found)
    return found


def configurator(**other) -> SimpleNamespace:
    """Of a server with --kv-quant."""
    stock = {"is_draft_worker": False, "post_capture_kv_active": False, "pool_page_size": 1, "device": "cpu"}
    info = SimpleNamespace(start_layer=0, end_layer=8)
    return SimpleNamespace(
        **{"server_args": SimpleNamespace(_kvq=KVQuantOptions()), "layer_info": info, **stock, **other}
    )


def pool_class(stock: type = MHATokenToKVPool, **other):
    classes = {"mha_pool_class": stock, "mla_pool_class": object, "dsa_pool_class": object}
    return plugin._full_attention_pool_class(
        lambda self, **kwargs: kwargs["mha_pool_class"], configurator(**other), **classes
    )


def wrapper(layers=WITH_KEYS, **other) -> HybridLinearKVPool:
    return HybridLinearKVPool(
        size=SIZE,
        dtype=torch.bfloat16,
        page_size=1,
        head_num=HEADS,
        head_dim=DIM,
        full_attention_layer_ids=list(layers),
        device="cpu",
        mamba_pool=None,
        full_kv_pool_class=pool_class(),
        **other,
    )


def test_the_wrapper_holds_a_packed_pool(served):
    pool = wrapper()
    packed = packed_pool(pool)
    assert packed is pool.full_kv_pool and sorted(packed.layers) == [3, 7]
    assert sum(pool.get_kv_size_bytes()) == sum(layer.rows.nbytes for layer in served.layers.values())
    assert pool.mem_usage > 0 and not pool.post_capture_active
    with packed.probing():
        assert pool.get_v_head_dim() == DIM
    with pytest.raises(NotImplementedError, match="no dense value buffer"):
        pool.get_value_buffer(7)
    assert plugin._check_pool(pool, configurator()) is None
    waited = []
    pool.register_layer_transfer_counter(SimpleNamespace(wait_until=waited.append))
    packed.layer(7)
    assert waited == [7 - pool.start_layer]


def test_rows_are_found_by_the_models_layer_ids(served):
    """Whoever writes through the wrapper, which counts its layers, and the backend, which does not, mean the same."""
    pool = wrapper()
    k, v = torch.randn(2, 3, HEADS * DIM)
    slots = torch.tensor([4, 9, 2])
    pool.set_kv_buffer(SimpleNamespace(layer_id=7), slots, k, v)
    packed = packed_pool(pool)
    assert not packed.layer(3).rows.any()
    keys, _ = packed.layer(7).dense(slots)
    assert torch.nn.functional.cosine_similarity(keys.flatten(1), k).min() > 0.95
    rows = packed.layer(7).gather(slots)
    pool.move_kv_cache(torch.tensor([20, 21, 22]), slots)
    assert torch.equal(packed.layer(7).gather(torch.tensor([20, 21, 22])), rows)
    saved, states = pool.get_cpu_copy(slots)
    pool.load_cpu_copy((saved, states), torch.tensor([10, 11, 12]))
    assert states is None and torch.equal(packed.layer(7).gather(torch.tensor([10, 11, 12])), rows)
    with pytest.raises(KVQuantError, match=r"layer 2 is not in the packed pool, \[3, 7\] are"):
        packed.layer(2)


def test_fused_writers_stay_off_though_the_wrapper_says_bfloat16(served):
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    pool = wrapper()
    assert pool.dtype == torch.bfloat16
    with forward_context(ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=pool))):
        assert plugin._fused_set_kv_buffer(lambda batch: True, "batch") is False


def test_another_pool_is_refused(served):
    class MHATokenToKVPoolMXFP8(MHATokenToKVPool):
        pass

    for refused in (lambda: pool_class(MHATokenToKVPoolMXFP8), lambda: pool_class(post_capture_kv_active=True)):
        with pytest.raises(
            KVQuantError, match="asked for a MHATokenToKVPool.* pool for the layers with full attention"
        ):
            refused()
    with pytest.raises(KVQuantError, match="pool of 3 layers with NoneType, the table is for 2 layers"):
        wrapper(layers=(3, 5, 7))
    with pytest.raises(KVQuantError, match="2 layers with object"):
        wrapper(quant_method=object())


def test_the_hook_passes_through_without_the_option():
    for stock in (configurator(server_args=SimpleNamespace()), configurator(is_draft_worker=True)):
        assert plugin._full_attention_pool_class(lambda self, *a, **kw: (a, kw), stock, 1, new=2) == ((1,), {"new": 2})


def test_what_is_hooked_and_called_is_watched(monkeypatch):
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    monkeypatch.setattr(KVCacheConfigurator, "_build_hybrid_linear_kv_pool", lambda self: None)
    monkeypatch.delattr(KVCacheConfigurator, "_hybrid_full_attention_pool_class")
    drift = " ".join(compat.find_drift())
    assert "_hybrid_full_attention_pool_class is gone" in drift
    assert "_build_hybrid_linear_kv_pool no longer calls _hybrid_full_attention_pool_class" in drift


# --- which models --------------------------------------------------------------------------------


def runner(config, start=0, end=8, device="cpu", **args) -> SimpleNamespace:
    model = SimpleNamespace(hf_config=config, linear_attn_registry_result=None, is_draft_model=False)
    info = SimpleNamespace(start_layer=start, end_layer=end)
    given = {"mamba_full_memory_ratio": None, **args}
    return SimpleNamespace(model_config=model, layer_info=info, device=device, server_args=SimpleNamespace(**given))


def qwen3_next(layers=8, **other):
    from sglang.srt.configs import Qwen3NextConfig

    config = Qwen3NextConfig(num_hidden_layers=layers, **other)
    config.full_attention_interval = 4
    return config


def test_hybrid_models_that_are_served():
    hybrid.check_hybrid(runner(qwen3_next()), [3, 7])
    hybrid.check_hybrid(runner(qwen3_next(), start=4), [7])
    hybrid.check_hybrid(runner(transformers.LlamaConfig()), list(range(8)))


def test_hybrid_models_that_are_refused(monkeypatch):
    from sglang.srt import utils
    from sglang.srt.configs import BailingHybridConfig, ZayaConfig

    def said(of, layers) -> str:
        with pytest.raises(KVQuantError) as raised:
            hybrid.check_hybrid(of, layers)
        assert "serve this model without --kv-quant" in str(raised.value)
        return str(raised.value)

    with pytest.raises(KVQuantError, match="layers 0 to 2 are those of a pipeline stage.*use a smaller --pp-size"):
        hybrid.check_hybrid(runner(qwen3_next(), end=3), [])
    assert "layers [3] have keys, SGLang knows of [3, 7]" in said(runner(qwen3_next()), [3])
    assert "keeps no states" in said(runner(transformers.LlamaConfig(mamba_d_state=16)), list(range(8)))
    assert "of another kind" in said(runner(ZayaConfig()), [0])
    assert "of another kind" in said(runner(BailingHybridConfig()), [0])
    assert "sparse attention keeps an index" in said(runner(_with_index(qwen3_next())), [3, 7])
    monkeypatch.setattr(utils, "is_blackwell", lambda: True)
    assert "Blackwell" in said(runner(qwen3_next(), device="cuda:0"), [3, 7])
    hybrid.check_hybrid(runner(qwen3_next()), [3, 7])


def test_mamba_beside_attention_and_graphs_of_a_prefill(monkeypatch):
    from sglang.srt.configs import FalconH1Config
    from sglang.srt.model_executor import cuda_graph_config

    falcon = FalconH1Config(num_hidden_layers=2)
    for config, layers in ((falcon, [0, 1]), (qwen3_next(), [0, 1, 2])):  # those that have states
        monkeypatch.setattr(type(config), "mamba2_cache_params", SimpleNamespace(layers=layers))
    hybrid.check_hybrid(runner(falcon, end=2), [0, 1])
    monkeypatch.setattr(cuda_graph_config, "check_cuda_graph_backend", lambda *given: given == ("prefill", "breakable"))
    with pytest.raises(KVQuantError, match="in one layer.*--cuda-graph-backend-prefill disabled"):
        hybrid.check_hybrid(runner(falcon, end=2), [0, 1])
    hybrid.check_hybrid(runner(qwen3_next()), [3, 7])


def _with_index(config):
    config.indexer_n_heads, config.indexer_kv_heads, config.indexer_head_dim = 4, 1, 64
    config.indexer_compress_ratio, config.indexer_budget = 4, 2048
    return config


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, given, expected",
    [
        ({}, {}, 0.9 * 4 * DIM / 52),
        ({}, {"mamba_full_memory_ratio": 0.9}, 0.9),
        ({"max_mamba_cache_size": 8}, {}, 0.9),
        ({"disable_radix_cache": True, "max_running_requests": 8}, {}, 0.9),
        ({"disable_radix_cache": True}, {}, 0.9 * 4 * DIM / 52),
    ],
)
def test_states_get_more_memory_unless_the_user_says_how_much(served, monkeypatch, caplog, changed, given, expected):
    monkeypatch.setattr(balance, "is_rank_zero", lambda: True)
    with get_context().override_server_args(mamba_full_memory_ratio=0.9, **changed), caplog.at_level(logging.INFO):
        hybrid.balance_memory(runner(qwen3_next(), **given), served.table)
        assert get_schedule().mamba_full_memory_ratio == pytest.approx(expected, abs=1e-3)
        hybrid.balance_memory(runner(transformers.LlamaConfig()), served.table)
        assert get_schedule().mamba_full_memory_ratio == pytest.approx(expected, abs=1e-3)
    assert caplog.text.count("--mamba-full-memory-ratio 4.431 in place of 0.9") == (expected != 0.9)
