"""Hooks: none without --kv-quant; with it they are in place, and what does not fit is said."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.plugins import load_plugins

from sglang_blockgtq import compat, conflicts, plugin, recalibrate
from sglang_blockgtq.conflicts import NEEDS_TABLE, REFUSALS, check_resolved
from sglang_blockgtq.options import DEFAULT_RANGE, PRESETS, TARGET_KL, KVQuantError, KVQuantOptions

ASKED = ("--kv-quant", "blockgtq")


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_plugins()


def server_args(*flags: str):
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(["--model-path", "/nonexistent", "--device", "cpu", *flags])


def options(*flags: str) -> KVQuantOptions:
    return KVQuantOptions.of(server_args(*ASKED, *flags))


@pytest.fixture
def said(caplog):
    """What the plugin logs. SGLang takes all handlers off the root logger when it parses arguments."""
    loggers = plugin.logger, recalibrate.logger
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def processes():
    """What tests/plugin_processes.py saw in processes of their own, by case."""
    script = Path(__file__).with_name("plugin_processes.py")
    env = {**os.environ, "SGLANG_PLUGINS": "blockgtq"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_unused_it_adds_the_options_and_nothing_else(processes):
    saw = processes["unused"]
    names = "calibrate", "compat", "conflicts", "options", "plugin", "preflight"
    ours = {f"sglang_blockgtq.{name}" for name in names}
    assert {name for name in saw["imports"] if not name.startswith("sglang.")} == ours
    assert not [
        x for x in saw["imports"] if x.startswith(("sglang.srt.managers", "sglang.srt.model", "sglang.srt.lay"))
    ]
    assert [target.rpartition(".")[2] for target in saw["hooks"]] == ["load_plugins", "add_cli_args", "from_cli_args"]
    assert saw["backends"] == [None, None] and saw["marked"] == [False, False]


def test_another_plugins_factory_is_kept(processes):
    assert processes["unused"]["theirs"] is True
    assert processes["beside_another_plugin"] == {"hooks": True, "theirs": True, "later": False}


def test_an_engine_that_is_loaded_late_takes_the_options(processes):
    assert processes["an_engine_that_is_loaded_after_plugins"] == ["blockgtq", True]


def test_a_scheduler_learns_of_the_options_from_its_arguments(processes):
    assert processes["options_that_arrive_before_plugins_load"] is True
    assert processes["options_that_arrive_after_plugins_loaded"] is True


def test_a_scheduler_without_hooks_dies(processes):
    assert processes["a_process_without_the_plugin"] == "Invalid attention backend: blockgtq"
    said, known = processes["broken_registration"]
    assert "_build_mha_kv_pool is gone" in said and known is False


def test_installed_sglang_fits():
    assert compat.find_drift() == []
    server_args(*ASKED)
    plugin._require_hooks()


def test_not_asked_for_changes_nothing():
    args = server_args()
    assert KVQuantOptions.of(args) is None
    assert args.attention_backend is None
    assert not hasattr(args, "_kvq")


def test_options_travel_to_spawned_processes():
    args = server_args(*ASKED, "--kv-quant-k-bits", "2.5", "--kv-quant-chunk-attention", "quantized")
    there = pickle.loads(pickle.dumps(args))
    asked = KVQuantOptions.of(there)
    assert asked == KVQuantOptions.of(args)
    assert asked.k_bits == 2.5 and asked.v_bits == 3 and asked.chunk_attention == "quantized"
    assert asked.allocator == "template" and asked.calibration_tokens == 2048
    assert there.attention_backend == "blockgtq"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_it_stands_for(name):
    asked = options("--kv-quant-preset", name)
    assert {key: getattr(asked, key) for key in PRESETS[name]} == PRESETS[name]
    if name == "auto":
        return
    bits = {key: value for key, value in PRESETS[name].items() if key != "k_bits"}
    asked = options(f"--kv-quant-preset={name}", "--kv-quant-k-bits=6")
    assert asked.k_bits == 6 and {key: getattr(asked, key) for key in bits} == bits


def test_bits_that_are_not_given():
    """Nothing: they are chosen by what they cost. One side: the other's default. A table: the table's."""
    asked = options()
    assert asked == options("--kv-quant-preset", "auto")
    assert (asked.k_bits, asked.v_bits, asked.bits_range, asked.max_kl) == (None, None, DEFAULT_RANGE, None)
    assert asked.target_kl == TARGET_KL
    for given, bits in ((("--kv-quant-k-bits=4",), (4, 3)), (("--kv-quant-v-bits=2.5",), (3, 2.5))):
        asked = options(*given)
        assert (asked.k_bits, asked.v_bits) == bits
    asked = options("--kv-quant-table", __file__)
    assert (asked.k_bits, asked.v_bits, asked.allocator, asked.granularity) == (None,) * 4


def test_what_a_cache_may_cost():
    asked = options("--kv-quant-max-kl", "0.05")
    assert (asked.k_bits, asked.max_kl, asked.target_kl) == (None, 0.05, 0.05)
    assert options("--kv-quant-max-kl=1e-3", "--kv-quant-preset=balanced").max_kl == 1e-3
    asked = options("--kv-quant-table", __file__, "--kv-quant-max-kl", "0.05")
    assert (asked.max_kl, asked.k_bits) == (0.05, None)


@pytest.mark.parametrize("given, found", [("2-4", (2, 4)), ("2.5-8", (2.5, 8)), ("3-3", (3, 3)), (" 2 - 4 ", (2, 4))])
def test_a_range_of_bits(given, found):
    assert options("--kv-quant-bits-range", given).bits_range == found
    assert options("--kv-quant-bits-range", given, "--kv-quant-preset=auto").bits_range == found


def test_granularity():
    """Rows that the fast kernels read are the default of the allocators that have a choice."""
    for allocator in ("paper", "product"):
        given = ("--kv-quant-allocator", allocator)
        assert options(*given).granularity == "segment"
        assert options(*given, "--kv-quant-granularity", "slot").granularity == "segment"
        assert options(*given, "--kv-quant-granularity", "segment").granularity == "segment"
        assert options(*given, "--kv-quant-granularity", "block").granularity == "block"
    assert options().granularity == "segment"


def test_yaml_config(tmp_path):
    config = tmp_path / "server.yaml"
    config.write_text("kv-quant: blockgtq\nkv-quant-v-bits: 2\nkv-quant-allocator: paper\nkv-quant-granularity: slot\n")
    asked = KVQuantOptions.of(server_args("--config", str(config)))
    assert asked.v_bits == 2 and (asked.allocator, asked.granularity) == ("paper", "segment")


def test_drift_is_named(monkeypatch):
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    monkeypatch.setattr(DefaultPoolConfigurator, "_compute_cell_size", lambda self, kvc: 0)
    monkeypatch.delattr(KVCacheConfigurator, "_build_mha_kv_pool")
    monkeypatch.setattr(compat, "REFUSALS", [SimpleNamespace(option="enable_hicash", is_variable=False)])
    drift = compat.find_drift()
    assert any("_compute_cell_size lost the parameter(s) num_layers" in line for line in drift)
    assert any("_build_mha_kv_pool is gone" in line for line in drift)
    assert any("ServerArgs lost the field(s) enable_hicash" in line for line in drift)
    message = compat.incompatibility(drift)
    assert message.startswith("--kv-quant blockgtq: the installed sglang 0.5.23 is not as it was released: ")
    assert "\n" not in message


def test_another_sglang_is_said_first(monkeypatch, said):
    monkeypatch.setattr(compat, "version", lambda name: "0.5.17")
    server_args(*ASKED)
    assert "sglang 0.5.17 is installed, this build is for 0.5.23" in said.text
    message = compat.incompatibility(["a is gone"])
    assert message.startswith("--kv-quant blockgtq: sglang 0.5.17 is installed, this build is for 0.5.23")
    assert "a is gone" in message and "install sglang==0.5.23" in message
    said.clear()
    server_args()
    monkeypatch.setattr(compat, "version", lambda name: "0.5.23+cpu")
    server_args(*ASKED)
    assert "is installed" not in said.text


def test_a_broken_plugin_refuses_instead_of_serving_bf16(monkeypatch):
    monkeypatch.setattr(plugin, "_broken", compat.incompatibility(["something is gone"]))
    with pytest.raises(SystemExit) as exit:
        server_args(*ASKED)
    assert "something is gone" in str(exit.value.code)
    assert KVQuantOptions.of(server_args()) is None  # without the flag the server starts as ever


def test_a_hook_that_did_not_land_refuses(monkeypatch):
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    server_args(*ASKED)
    stock = inspect.unwrap(KVCacheConfigurator._build_mha_kv_pool)
    monkeypatch.setattr(KVCacheConfigurator, "_build_mha_kv_pool", stock)
    with pytest.raises(SystemExit, match="_build_mha_kv_pool could not be hooked"):
        server_args(*ASKED)


def test_stock_pool_is_refused():
    configurator = SimpleNamespace(server_args=server_args(*ASKED), is_draft_worker=False)
    with pytest.raises(KVQuantError, match="object"):
        plugin._check_pool(object(), configurator)

    from sglang_blockgtq import backend

    with pytest.raises(RuntimeError, match="not serving"):
        backend.create(SimpleNamespace(device="cpu", token_to_kv_pool=object(), is_hybrid_swa=False))


HICACHE = (*ASKED, "--enable-hierarchical-cache")


def test_hicache_needs_a_gpu():
    with pytest.raises(
        SystemExit, match="--enable-hierarchical-cache: not with .* on --device cpu: .*kernels for cuda"
    ):
        server_args(*HICACHE)


def test_pages_of_hicache(monkeypatch):
    """Whole blocks of rows: 64 tokens where nothing is said, SGLang's own default without HiCache."""
    monkeypatch.setattr(conflicts, "HICACHE_DEVICES", ("cpu",))
    assert server_args(*HICACHE).page_size == 64
    assert server_args(*HICACHE, "--page-size=16").page_size == 16
    assert server_args(*ASKED).page_size == server_args("--enable-hierarchical-cache").page_size is None
    with pytest.raises(SystemExit, match="--page-size 24: not with .* blocks of 16 tokens; use --page-size 64"):
        server_args(*HICACHE, "--page-size=24")


def test_another_name_for_models_that_take_backends_by_name():
    """And for them alone: what SGLang resolves keeps ours."""
    view = SimpleNamespace(attention_backend=plugin.NAME, page_size=1)
    seen = plugin._handle_model(lambda: plugin._resolved_view(view))
    assert (seen.attention_backend, seen.page_size) == ("fa3", 1)
    assert plugin._resolved_view(view) is view
    stock = SimpleNamespace(attention_backend="triton")
    assert plugin._handle_model(lambda: plugin._resolved_view(stock)) is stock


def test_hugging_face_kernels_is_not_shadowed(tmp_path):
    """``import kernels`` is the Hugging Face package, also for a Python started in the clone's root."""
    root = Path(__file__).resolve().parent.parent
    code = "import kernels, sglang_blockgtq.kernels.format as ours; print(kernels.__file__); print(ours.__name__)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    for folder in (root, tmp_path):
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout
        theirs, ours = out.split()
        assert "site-packages" in theirs and ours == "sglang_blockgtq.kernels.format"


def test_hooks_pass_through_without_the_option():
    """A stock server's call is handed over unchanged, with whatever arguments a hook does not know."""
    stock = SimpleNamespace(server_args=server_args(), is_draft_worker=False, device="cpu")
    calls = []

    def original(*args, **kwargs):
        calls.append((args, kwargs))
        return "stock"

    new = {"unheard_of": 1}
    build = {"max_total_num_tokens": 8, "mha_pool_class": object, "quant_method": None}
    assert plugin._load_model(original, stock, **new) == "stock"
    assert plugin._alloc_memory_pool(original, stock, "config", draft_parallel_layout=None, **new) == "stock"
    assert plugin._compute_cell_size(original, "configurator", stock, 4, **new) == "stock"
    assert plugin._build_mha_kv_pool(original, stock, **build, **new) == "stock"
    assert plugin._fused_set_kv_buffer(original, "batch", **new) == "stock"
    assert plugin._support_triton(original, "triton", **new) == "stock"
    params = SimpleNamespace(token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: "pool"))
    controller = SimpleNamespace(storage_host_pool="host pool")
    assert plugin._build_kv_host_pool(original, kv_pool="pool", page_size=1, **new) == "stock"
    assert plugin._estimate_hicache_bytes(original, params, **new) == "stock"
    assert plugin._attach_storage_backend(original, controller, "mooncake", **new) == "stock"
    assert plugin._from_cli_args(original, "class", SimpleNamespace(), **new) == "stock"
    assert calls == [
        ((stock,), new),
        ((stock, "config"), {"draft_parallel_layout": None, **new}),
        (("configurator", stock, 4), new),
        ((stock,), {**build, **new}),
        (("batch",), new),
        (("triton",), new),
        ((), {"kv_pool": "pool", "page_size": 1, **new}),
        ((params,), new),
        ((controller, "mooncake"), new),
        (("class", SimpleNamespace()), new),
    ]
    info: dict = {}
    assert plugin._check_pool(object(), stock, **new) is None
    assert plugin._resolve_once(None, stock.server_args, **new) is None
    plugin._init_info(info, stock, **new)
    assert info == {}


def _updater(monkeypatch, runner):
    """SGLang's WeightUpdater over a model that takes any weights, and how each kind of new weights reaches it."""
    from sglang.srt.model_executor.model_runner_components import weight_updater as module

    class Model(torch.nn.Module):
        def load_weights(self, weights):
            pass

    class Loader:
        restore_weights_before_loading = staticmethod(lambda *args: None)
        load_weights_and_postprocess = staticmethod(lambda *args: None)
        Source = SimpleNamespace(init_new=lambda *args: None)
        _get_weights_iterator = staticmethod(lambda source: iter(()))

    class Worker:
        def __init__(self, runner):
            pass

        def update_weights_from_ipc(self, handles):
            pass

    worker = SimpleNamespace(SGLangCheckpointEngineWorkerExtensionImpl=Worker)
    monkeypatch.setitem(sys.modules, "sglang.srt.checkpoint_engine.checkpoint_engine_worker", worker)
    monkeypatch.setattr(module, "DefaultModelLoader", Loader)
    monkeypatch.setattr(module, "get_model_loader", lambda *args: Loader())
    monkeypatch.setattr(module, "get_pp_stage_load_group", lambda: None)
    monkeypatch.setattr(module, "get_model", lambda: SimpleNamespace(weight_cache_mode="off"))
    monkeypatch.setattr(module, "get_parallel", lambda: SimpleNamespace(tp_rank=0))
    monkeypatch.setattr(module, "_unsupported_derived_weight_cache_error", lambda model: runner.error)
    model = Model()
    updater = module.WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=SimpleNamespace(dtype=torch.float32),
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=lambda *args, **kwargs: None,
        recapture_cuda_graph=lambda: None,
        get_model_runner=lambda: runner,
    )
    return {
        "disk": lambda: updater.update_weights_from_disk("/somewhere", "auto"),
        "tensor": lambda: updater.update_weights_from_tensor([]),
        "distributed": lambda: updater.load_weights_from_distributed([]),
        "ipc": lambda: updater.update_weights_from_ipc(SimpleNamespace(zmq_handles={})),
    }


@pytest.mark.parametrize("way", ["disk", "tensor", "distributed", "ipc"])
def test_new_weights_come_with_a_warning(monkeypatch, said, way):
    monkeypatch.setattr(recalibrate, "_replaced", False)
    runner = SimpleNamespace(server_args=server_args(*ASKED), is_draft_worker=False, error=None)
    update = _updater(monkeypatch, runner)[way]
    warning = "the allocation table is still that of the weights at start-up"
    assert update()[0] is True and said.text.count(warning) == 1
    said.clear()
    runner.error = "refused"
    assert update() == (False, "refused") and warning not in said.text
    runner.error, runner.server_args = None, server_args()
    assert update()[0] is True and warning not in said.text


def resolving(**declared):
    """A ServerArgs with --kv-quant, of which SGLang decides ``declared`` as a model's defaults would."""
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path="dummy", device="cpu", attention_backend="blockgtq")
    args._kvq = options()
    if declared:
        declare_resolution(args, "test", **declared)
    return args


def full_prefill_graph():
    from sglang.srt.model_executor.cuda_graph_config import Phase, default_cuda_graph_config, with_phase

    return with_phase(default_cuda_graph_config(), Phase.PREFILL, backend="full")


def test_what_sglang_resolves_is_refused_before_a_process_starts():
    resolving().resolve_once()
    for declared, hint in (
        ({"cuda_graph_config": full_prefill_graph()}, "--cuda-graph-config prefill.backend=full (as SGLang resolves"),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference (as SGLang resolves"),
        ({"checkpoint_engine_wait_weights_before_ready": True}, "--kv-quant-table"),
    ):
        with pytest.raises(KVQuantError) as raised:
            resolving(**declared).resolve_once()
        assert hint in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_scheduler_runs_with_is_refused():
    """Every refusal reads the published configuration, which a scheduler may override after resolution."""
    from sglang.srt.runtime_context import get_context

    asked = options()
    stock = {"device": "cpu", "attention_backend": "blockgtq", "_kvq": asked}
    with get_context().override_server_args(**stock):
        check_resolved()
        get_context().override("test", speculative_algorithm="DFLASH")
        with pytest.raises(KVQuantError, match=r"--speculative-algorithm DFLASH \(as SGLang resolves"):
            check_resolved()
    with get_context().override_server_args(**{**stock, "device": "npu"}):
        with pytest.raises(KVQuantError, match="--device npu"):
            check_resolved()


def test_a_prebuilt_server_args_is_checked_too(monkeypatch):
    """Engine(server_args=...) leaves out the factory, and whoever made the record may have changed it since."""
    from sglang.srt.entrypoints import engine

    launched = []
    monkeypatch.setattr(engine, "atexit", SimpleNamespace(register=lambda action: None))
    monkeypatch.setattr(engine.Engine, "_launch_scheduler_processes", lambda *args, **kwargs: launched.append(args))
    args = resolving()
    args.enable_torch_compile = True
    with pytest.raises(KVQuantError, match="--enable-torch-compile"):
        engine.Engine(server_args=pickle.loads(pickle.dumps(args)))
    assert not launched


def test_each_refusal_is_told_once():
    listed = [refusal.option for refusal in (*REFUSALS, *NEEDS_TABLE)]
    assert len(listed) == len(set(listed))
