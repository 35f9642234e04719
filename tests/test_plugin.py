"""Hooks: they are in place, pass through when not asked for, and say what drifted."""

from __future__ import annotations

import pickle

import pytest
from sglang.srt.plugins import load_plugins

from sglang_blockgtq import compat, plugin
from sglang_blockgtq.options import PRESETS, KVQuantError, KVQuantOptions


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_plugins()


def server_args(*flags: str):
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(["--model-path", "/nonexistent", "--device", "cpu", *flags])


def test_installed_sglang_fits():
    assert compat.find_drift() == []
    plugin._require_hooks()


def test_not_asked_for_changes_nothing():
    args = server_args()
    assert KVQuantOptions.of(args) is None
    assert args.attention_backend is None
    assert not hasattr(args, "_kvq")


def test_options_travel_to_spawned_processes():
    args = server_args("--kv-quant", "blockgtq", "--kv-quant-k-bits", "2.5", "--kv-quant-chunk-attention", "quantized")
    there = pickle.loads(pickle.dumps(args))
    options = KVQuantOptions.of(there)
    assert options.k_bits == 2.5 and options.v_bits == 3 and options.chunk_attention == "quantized"
    assert options.allocator == "template" and options.calibration_tokens == 2048
    assert options.granularity == "block"
    assert there.attention_backend == "blockgtq"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_it_stands_for(name):
    options = KVQuantOptions.of(server_args("--kv-quant", "blockgtq", "--kv-quant-preset", name))
    assert {key: getattr(options, key) for key in PRESETS[name]} == PRESETS[name]
    bits = {key: value for key, value in PRESETS[name].items() if key != "k_bits"}
    options = KVQuantOptions.of(server_args("--kv-quant=blockgtq", f"--kv-quant-preset={name}", "--kv-quant-k-bits=6"))
    assert options.k_bits == 6 and {key: getattr(options, key) for key in bits} == bits


def test_balanced_is_the_default():
    plain = KVQuantOptions.of(server_args("--kv-quant", "blockgtq"))
    assert KVQuantOptions.of(server_args("--kv-quant", "blockgtq", "--kv-quant-preset", "balanced")) == plain


def test_yaml_config(tmp_path):
    config = tmp_path / "server.yaml"
    config.write_text("kv-quant: blockgtq\nkv-quant-v-bits: 2\nkv-quant-allocator: paper\nkv-quant-granularity: slot\n")
    options = KVQuantOptions.of(server_args("--config", str(config)))
    assert options.v_bits == 2 and (options.allocator, options.granularity) == ("paper", "slot")


def test_drift_is_named(monkeypatch):
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    monkeypatch.setattr(DefaultPoolConfigurator, "_compute_cell_size", lambda self, kvc: 0)
    monkeypatch.delattr(KVCacheConfigurator, "_build_mha_kv_pool")
    drift = compat.find_drift()
    assert any("_compute_cell_size lost the parameter(s) num_layers" in line for line in drift)
    assert any("_build_mha_kv_pool is gone" in line for line in drift)
    message = compat.incompatibility(drift)
    assert "0.5.23" in message and "\n" not in message


def test_a_broken_plugin_refuses_instead_of_serving_bf16(monkeypatch):
    monkeypatch.setattr(plugin, "_broken", compat.incompatibility(["something is gone"]))
    with pytest.raises(SystemExit) as exit:
        server_args("--kv-quant", "blockgtq")
    assert "something is gone" in str(exit.value.code)
    assert KVQuantOptions.of(server_args()) is None  # without the flag the server starts as ever


def test_a_hook_that_did_not_land_refuses(monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    left = {t for t in HookRegistry._patched if "_build_mha_kv_pool" not in t}
    monkeypatch.setattr(HookRegistry, "_patched", left)
    with pytest.raises(SystemExit, match="_build_mha_kv_pool could not be hooked"):
        server_args("--kv-quant", "blockgtq")


def test_stock_pool_is_refused():
    class Configurator:
        server_args = server_args("--kv-quant", "blockgtq")
        is_draft_worker = False

    with pytest.raises(KVQuantError, match="object"):
        plugin._check_pool(object(), Configurator())

    class Runner:
        device = "cpu"
        token_to_kv_pool = object()

    from sglang_blockgtq import backend

    with pytest.raises(RuntimeError, match="not serving"):
        backend.create(Runner())


def test_hugging_face_kernels_is_not_shadowed(tmp_path):
    """``import kernels`` is the Hugging Face package, also for a Python started in the clone's root."""
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    code = "import kernels, sglang_blockgtq.kernels.layout as ours; print(kernels.__file__); print(ours.__name__)"
    for folder in (root, tmp_path):
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
        theirs, ours = out.split()
        assert "site-packages" in theirs and ours == "sglang_blockgtq.kernels.layout"


def test_hooks_pass_through_without_the_option():
    """Every hook that wraps an SGLang function hands a stock server's call over unchanged."""
    from types import SimpleNamespace

    stock = SimpleNamespace(server_args=server_args(), is_draft_worker=False, device="cpu")
    calls = []

    def original(*args, **kwargs):
        calls.append((args, kwargs))
        return "stock"

    assert plugin._load_model(original, stock) == "stock"
    assert plugin._alloc_memory_pool(original, stock, "config", draft_parallel_layout=None) == "stock"
    assert plugin._compute_cell_size(original, "configurator", stock, 4) == "stock"
    build = {"max_total_num_tokens": 8, "mha_pool_class": object, "quant_method": None}
    assert plugin._build_mha_kv_pool(original, stock, **build) == "stock"
    assert plugin._fused_set_kv_buffer(original, "batch") == "stock"
    assert plugin._support_triton(original, "triton") == "stock"
    assert plugin._check_pool(object(), stock) is None
    info: dict = {}
    plugin._init_info(info, stock)
    assert info == {}
    assert calls == [
        ((stock,), {}),
        ((stock, "config"), {"draft_parallel_layout": None}),
        (("configurator", stock, 4), {}),
        ((stock,), build),
        (("batch",), {}),
        (("triton",), {}),
    ]
