"""Entry point of the ``sglang.srt.plugins`` group: every hook into SGLang, in one file.

SGLang runs ``register`` in each of its processes. Without --kv-quant every hook passes through.
docs/structure.md walks one request through what these hooks put in place.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from . import compat, options
from .options import ATTRIBUTE, FLAGS, NAME, KVQuantError, KVQuantOptions

logger = logging.getLogger(__name__)

_ROOT = "sglang.srt."
_broken: str | None = None  # why the hooks could not be registered; raised once --kv-quant is used


# --- options -------------------------------------------------------------------------------------


def _add_cli_args(result: Any, parser: Any) -> None:
    options.add_cli_args(parser)


def _from_cli_args(orig: Any, cls: type, args: Any) -> Any:
    values = {name: getattr(args, name, None) for name in FLAGS}
    try:
        asked = options.parse(values)
        if asked is None:
            return orig(cls, args)
        _prepare(asked, lambda field: getattr(args, field, None))
    except KVQuantError as e:
        raise SystemExit(f"error: {e}") from None
    args.attention_backend = NAME
    if getattr(args, "device", None) is None:
        args.device = _default_device()
    server_args = orig(cls, args)
    setattr(server_args, ATTRIBUTE, asked.to_dict())
    return server_args


def engine_server_args(**kwargs: Any) -> Any:
    """What ``sgl.Engine(**kwargs)`` builds its ServerArgs with. Raises KVQuantError."""
    from sglang.srt.server_args import ServerArgs

    asked = options.parse({name: kwargs.pop(name, None) for name in FLAGS})
    if asked is None:
        return ServerArgs(**kwargs)
    _prepare(asked, kwargs.get)
    kwargs["attention_backend"] = NAME
    if kwargs.get("device") is None:
        kwargs["device"] = _default_device()
    server_args = ServerArgs(**kwargs)
    setattr(server_args, ATTRIBUTE, asked.to_dict())
    return server_args


def _default_device() -> str | None:
    """None leaves the choice to SGLang; a host without any accelerator gets the CPU, and is told."""
    import torch

    if torch.accelerator.is_available():
        return None
    logger.warning("%s: no accelerator found, serving on the CPU", NAME)
    return "cpu"


def _prepare(asked: KVQuantOptions, get: Any) -> None:
    """Everything that can be refused before a process is spawned or a weight read. Raises KVQuantError."""
    _require_hooks()
    from .conflicts import check_config, check_granularity, check_user_args

    check_user_args(get, has_table=asked.table is not None)
    config = _read_config(get)
    if config is not None:
        check_config(config)
        check_granularity(config, asked)
        if asked.table is not None:
            from .calibrate.model import config_hash
            from .runtime import load_named_table

            load_named_table(asked, config_hash(config))
    if asked.calibration_text is not None:
        _check_text(asked, get)


def _read_config(get: Any) -> Any:
    """The model's Hugging Face config, or None when it cannot be read: SGLang then says why itself."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        return get_config(get("model_path"), trust_remote_code=bool(get("trust_remote_code")), revision=get("revision"))
    except Exception as e:
        logger.debug("%s: config of %s not readable yet: %s", NAME, get("model_path"), e)
        return None


def _check_text(asked: KVQuantOptions, get: Any) -> None:
    """A user's text must hold enough tokens; found out now, not after the weights are loaded."""
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    from .calibrate.text import TextError, read_text
    from .runtime import calibration_sequences

    try:
        read_text(asked.calibration_text)
    except TextError as e:
        raise KVQuantError(str(e)) from None
    try:
        tokenizer = get_tokenizer(
            get("tokenizer_path") or get("model_path"), trust_remote_code=bool(get("trust_remote_code"))
        )
    except Exception as e:
        logger.debug("%s: tokenizer not readable yet: %s", NAME, e)
        return
    calibration_sequences(tokenizer, asked, context_len=asked.calibration_tokens)


# --- model runner --------------------------------------------------------------------------------


def _load_model(orig: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if KVQuantOptions.of(self.server_args) is not None and not self.is_draft_worker:
        _require_hooks()
        from .conflicts import check_config

        check_config(self.model_config.hf_config)
        if self.device.split(":")[0] == "cpu":
            _enable_cpu_host()
    return orig(self, *args, **kwargs)


def _enable_cpu_host() -> None:
    """Let the PyPI wheel of SGLang run on a plain CPU.

    Its rotary embedding otherwise imports a vLLM op for every device it does not know. Layers
    then take their ``forward_native`` path.
    """
    from sglang.srt.layers.rotary_embedding import base

    if not hasattr(base, "_is_cpu"):
        raise RuntimeError(f"{NAME}: sglang.srt.layers.rotary_embedding.base lost _is_cpu; no CPU serving")
    base._is_cpu = True


def _alloc_memory_pool(orig: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    asked = KVQuantOptions.of(self.server_args)
    if asked is not None and not self.is_draft_worker:
        from . import runtime

        # Tables are in memory before free memory is measured, so the pool is sized around them.
        runtime.start(self, asked)
    return orig(self, *args, **kwargs)


def _after_update(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    if KVQuantOptions.of(self.server_args) is not None:
        logger.warning("%s: weights were replaced; the allocation table still describes the old ones", NAME)


# --- capacity and pool ---------------------------------------------------------------------------


def _compute_cell_size(orig: Any, self: Any, kvc: Any, num_layers: int) -> int:
    if KVQuantOptions.of(kvc.server_args) is None or kvc.is_draft_worker:
        return orig(self, kvc, num_layers)
    from .runtime import UNCOUNTED_BYTES_PER_TOKEN, current

    # The same integer on every tensor-parallel rank: rows take the maximum over all heads of a layer.
    return current().bytes_per_token + UNCOUNTED_BYTES_PER_TOKEN


def _build_mha_kv_pool(orig: Any, self: Any, *, max_total_num_tokens: int, mha_pool_class: type, quant_method=None):
    if KVQuantOptions.of(self.server_args) is None or self.is_draft_worker:
        return orig(
            self,
            max_total_num_tokens=max_total_num_tokens,
            mha_pool_class=mha_pool_class,
            quant_method=quant_method,
        )
    if mha_pool_class.__name__ != "MHATokenToKVPool" or quant_method is not None or self.post_capture_kv_active:
        raise KVQuantError(
            f"--kv-quant {NAME}: the engine asked for a {mha_pool_class.__name__} pool; "
            "only the plain one can be packed, leave out options that change the KV pool"
        )
    from sglang.srt.runtime_context import get_exec

    from .pool import PackedKVPool
    from .runtime import current

    return PackedKVPool(
        max_total_num_tokens,
        self.pool_page_size,
        runtime=current(),
        device=self.device,
        enable_memory_saver=get_exec().features.enable_memory_saver,
        start_layer=self.layer_info.start_layer,
        end_layer=self.layer_info.end_layer,
    )


def _check_pool(result: Any, self: Any, **kwargs: Any) -> None:
    if KVQuantOptions.of(self.server_args) is None or self.is_draft_worker:
        return
    from .pool import PackedKVPool

    if not isinstance(result, PackedKVPool):
        raise KVQuantError(
            f"--kv-quant {NAME}: the engine built a {type(result).__name__} for this model, which cannot be packed; "
            "serve it without --kv-quant"
        )


def _fused_set_kv_buffer(orig: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> bool:
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool, has_forward_context

    # Fused kernels write bf16 rows; the uint8 dtype of the pool keeps them off too.
    if has_forward_context() and type(get_token_to_kv_pool()).__name__ == "PackedKVPool":
        return False
    return orig(forward_batch, *args, **kwargs)


# --- observability -------------------------------------------------------------------------------


def _init_info(result: dict, self: Any) -> None:
    from .observability import server_info

    info = server_info(self)
    if info is not None:
        result["kv_quant"] = info


def _emit_constants(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    from . import runtime
    from .observability import emit_gauges

    try:
        served = runtime.current()
    except RuntimeError:
        return  # a stock cache
    emit_gauges(dict(self.labels), served)


def _support_triton(orig: Any, backend: str) -> bool:
    if backend == NAME:
        import torch

        return torch.cuda.is_available()
    return orig(backend)


# --- registration --------------------------------------------------------------------------------

_CLI_HOOKS = {
    "server_args.ServerArgs.add_cli_args": ("AFTER", _add_cli_args),
    "server_args.ServerArgs.from_cli_args": ("AROUND", _from_cli_args),
}
_HOOKS = {
    "model_executor.model_runner.ModelRunner.load_model": ("AROUND", _load_model),
    "model_executor.model_runner.ModelRunner.alloc_memory_pool": ("AROUND", _alloc_memory_pool),
    "model_executor.model_runner.ModelRunner.update_model_fields": ("AFTER", _after_update),
    "model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size": ("AROUND", _compute_cell_size),
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool": ("AROUND", _build_mha_kv_pool),
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool": ("AFTER", _check_pool),
    "models.utils.enable_fused_set_kv_buffer": ("AROUND", _fused_set_kv_buffer),
    "managers.scheduler.Scheduler.get_init_info": ("AFTER", _init_info),
    "observability.metrics_collector.SchedulerMetricsCollector.emit_constants": ("AFTER", _emit_constants),
    "utils.common.support_triton": ("AROUND", _support_triton),
}


def _require_hooks() -> None:
    """KVQuantError unless every hook is in place: a stock cache must never pass for a packed one."""
    if _broken is not None:
        raise KVQuantError(_broken)
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in _HOOKS if _ROOT + target not in HookRegistry._patched]
    if missing:
        raise KVQuantError(compat.incompatibility([f"{target} could not be hooked" for target in missing]))


def register() -> None:
    """Register all hooks. What goes wrong is kept and raised when --kv-quant is used."""
    global _broken
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def hook(table: dict) -> None:
        for target, (kind, function) in table.items():
            HookRegistry.register(_ROOT + target, function, HookType[kind])

    hook(_CLI_HOOKS)
    engine = sys.modules.get("sglang.srt.entrypoints.engine")  # loaded only where somebody builds an Engine
    if engine is not None:
        engine.Engine.server_args_class = staticmethod(engine_server_args)
    try:
        drift = compat.find_drift()
        if drift:
            _broken = compat.incompatibility(drift)
            return
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.server_args import add_attention_backend_choices

        from . import backend

        add_attention_backend_choices([NAME])
        register_attention_backend(NAME)(backend.create)
        hook(_HOOKS)
    except Exception as e:  # SGLang would log and swallow it, and serve bf16
        _broken = compat.incompatibility([f"registration failed with {type(e).__name__}: {e}"])
