"""What the plugin does in processes of SGLang: one case each, forked from one Python. Run by test_plugin.py."""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
from types import ModuleType, SimpleNamespace

import sglang.srt.plugins as plugins
import sglang.srt.server_args as server_args
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def another_factory(**kwargs):
    """What another plugin gave Engine before."""
    made = server_args.ServerArgs(**kwargs)
    made._theirs = True
    return made


def load_engine() -> ModuleType:
    """A stand-in for sglang.srt.entrypoints.engine, which imports the whole engine."""
    module = sys.modules["sglang.srt.entrypoints.engine"] = ModuleType("sglang.srt.entrypoints.engine")
    module.Engine = type("Engine", (), {"server_args_class": staticmethod(another_factory)})
    module.load_plugins = plugins.load_plugins
    return module


def asked(**values) -> bytes:
    """A ServerArgs that travels to a scheduler."""
    from sglang_blockgtq.options import KVQuantOptions

    args = server_args.ServerArgs(model_path="/nonexistent", attention_backend="blockgtq")
    args._kvq = KVQuantOptions(**values)
    return pickle.dumps(args)


def all_hooks() -> bool:
    from sglang_blockgtq import plugin

    plugin._require_hooks()
    return True


def unused() -> dict:
    engine = load_engine()
    before = set(sys.modules)
    load_plugins()
    args = server_args.prepare_server_args(["--model-path", "/nonexistent"])
    stock = engine.Engine.server_args_class(model_path="/nonexistent")
    new = set(sys.modules) - before
    return {
        "imports": sorted(x for x in new if x.startswith(("sglang.", "sglang_blockgtq.", "kernels", "triton."))),
        "hooks": sorted(HookRegistry._patched),
        "theirs": stock._theirs,
        "backends": [args.attention_backend, stock.attention_backend],
        "marked": [hasattr(args, "_kvq"), hasattr(stock, "_kvq")],
    }


def options_that_arrive_before_plugins_load() -> bool:
    """As in a scheduler: its arguments are unpickled, then it loads plugins."""
    args = pickle.loads(asked(k_bits=2.0))
    load_plugins()
    return all_hooks() and args._kvq.k_bits == 2


def options_that_arrive_after_plugins_loaded() -> bool:
    """As in a scheduler whose main module loads plugins on import."""
    data = asked(k_bits=2.0)
    load_plugins()
    before = set(HookRegistry._patched)
    pickle.loads(data)
    return all_hooks() and before != HookRegistry._patched


def a_process_without_the_plugin() -> str:
    """What a scheduler does that got the options, but not the hooks."""
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup

    args = pickle.loads(asked())
    runner = SimpleNamespace(server_args=args, device="cpu")
    try:
        attention_backend_setup._build_full_attention_backend_from_str(
            model_runner=runner, backend_str=args.attention_backend, init_new_workspace=False
        )
    except ValueError as e:
        return str(e)


def broken_registration() -> list:
    """A drifted SGLang: what a scheduler logs, and that its backend stays unknown."""
    import logging

    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    del KVCacheConfigurator._build_mha_kv_pool
    said = []
    logging.getLogger("sglang_blockgtq.plugin").addFilter(lambda record: said.append(record.getMessage()))
    pickle.loads(asked())
    load_plugins()
    return [*said, "blockgtq" in ATTENTION_BACKENDS]


def beside_another_plugin() -> dict:
    """Another plugin hooks the same function and is applied long before --kv-quant is given."""
    engine = load_engine()

    def theirs(orig, *args, **kwargs):
        return orig(*args, **kwargs)

    target = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
    HookRegistry.register(target, theirs, HookType.AROUND)
    load_plugins()
    made = engine.Engine.server_args_class(model_path="/nonexistent", device="cpu", kv_quant="blockgtq")
    stock = engine.Engine.server_args_class(model_path="/nonexistent")
    return {"hooks": all_hooks(), "theirs": made._theirs, "later": hasattr(stock, "_kvq")}


def an_engine_that_is_loaded_after_plugins() -> list:
    load_plugins()
    engine = load_engine()
    engine.load_plugins()  # as Engine does
    made = engine.Engine.server_args_class(model_path="/nonexistent", device="cpu", kv_quant="blockgtq")
    return [made.attention_backend, made._theirs]


def apart(case) -> object:
    """The result of a case in a process of its own."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            result = case()
        except BaseException:
            result = traceback.format_exc()
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read) as f:
        return json.load(f)


if __name__ == "__main__":
    results = {unused.__name__: apart(unused)}  # before anything is imported that it must not import
    from sglang_blockgtq import compat

    compat.find_drift()  # imports what every case below would import again
    for case in (
        options_that_arrive_before_plugins_load,
        options_that_arrive_after_plugins_loaded,
        a_process_without_the_plugin,
        broken_registration,
        beside_another_plugin,
        an_engine_that_is_loaded_after_plugins,
    ):
        results[case.__name__] = apart(case)
    print(json.dumps(results))
