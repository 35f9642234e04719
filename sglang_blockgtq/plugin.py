"""Entry point of the ``sglang.srt.plugins`` group: every hook into SGLang, in one file.

SGLang runs ``register`` in each of its processes. It adds the --kv-quant options and nothing else: the hooks below
are imported and installed once a process knows that it serves with them, because they were given there or came out
of a pickled ServerArgs. docs/structure.md walks one request through what these hooks put in place.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from . import compat, options, preflight
from .conflicts import check_checksums, check_config, check_resolved, check_user_args
from .options import ATTRIBUTE, FLAGS, NAME, KVQuantError, KVQuantOptions

logger = logging.getLogger(__name__)

_ROOT = "sglang.srt."
_installed = False
_broken: str | None = None  # why the hooks could not be installed; raised once --kv-quant is used
_passes_for_fa3 = False
_make_server_args: Callable[..., Any] | None = None  # what Engine builds its ServerArgs with, but for us


# --- options -------------------------------------------------------------------------------------


def _add_cli_args(result: Any, parser: Any, *args: Any, **kwargs: Any) -> None:
    options.add_cli_args(parser)


def _from_cli_args(orig: Any, cls: type, args: Any, *more: Any, **kwargs: Any) -> Any:
    try:
        asked = options.parse({name: getattr(args, name, None) for name in FLAGS})
        if asked is None:
            return orig(cls, args, *more, **kwargs)
        _check(asked, lambda field: getattr(args, field, None))
    except KVQuantError as e:
        raise SystemExit(f"error: {e}") from None
    for field, value in preflight.defaults(lambda field: getattr(args, field, None)).items():
        setattr(args, field, value)
    server_args = orig(cls, args, *more, **kwargs)
    setattr(server_args, ATTRIBUTE, asked)
    return server_args


def engine_server_args(*args: Any, **kwargs: Any) -> Any:
    """What ``sgl.Engine(**kwargs)`` builds its ServerArgs with. Raises KVQuantError."""
    if _make_server_args is None:
        raise RuntimeError(f"{NAME}: Engine's own way to make its ServerArgs is not known: it was not loaded")
    asked = options.parse({name: kwargs.pop(name, None) for name in FLAGS})
    if asked is None:
        return _make_server_args(*args, **kwargs)
    _check(asked, kwargs.get)
    kwargs |= preflight.defaults(kwargs.get)
    server_args = _make_server_args(*args, **kwargs)
    setattr(server_args, ATTRIBUTE, asked)
    return server_args


def _give_engine_our_factory(*args: Any, **kwargs: Any) -> None:
    """Engine takes the options once it is loaded: it loads plugins, again or not, before it makes its ServerArgs."""
    global _make_server_args
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None and engine.Engine.server_args_class is not engine_server_args:
        _make_server_args = engine.Engine.server_args_class
        engine.Engine.server_args_class = staticmethod(engine_server_args)


def _check(asked: KVQuantOptions, get: Callable[[str], Any]) -> None:
    """Everything that can be refused where --kv-quant is given, the quick ones first. Raises KVQuantError."""
    if other := compat.other_version():
        logger.warning("%s: %s: nothing was tested with it", NAME, other)
    check_checksums(asked, get)
    check_user_args(get, asked)
    _install_now()
    _require_hooks()
    preflight.check(asked, get)


def _handle_model(orig: Any, *args: Any, **kwargs: Any) -> Any:
    """Some models take SGLang's backends by name, gpt-oss and EXAONE among them: ours passes for FlashAttention-3."""
    global _passes_for_fa3
    _passes_for_fa3 = True
    try:
        return orig(*args, **kwargs)
    finally:
        _passes_for_fa3 = False


def _resolved_view(result: Any, *args: Any, **kwargs: Any) -> Any:
    if not _passes_for_fa3 or result.attention_backend != NAME:
        return result
    from .beside import Beside

    return Beside(result, attention_backend="fa3")


def _resolve_once(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    if KVQuantOptions.of(self) is not None:
        check_resolved(self)


# --- model runner --------------------------------------------------------------------------------


def _packs(runner: Any) -> bool:
    """Whether a ModelRunner, or what configures its cache, serves with --kv-quant."""
    return KVQuantOptions.of(runner.server_args) is not None and not runner.is_draft_worker


def _load_model(orig: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if _packs(self):
        _require_hooks()
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
    if _packs(self):
        from . import runtime

        # Tables are in memory before free memory is measured, so the pool is sized around them.
        runtime.start(self, KVQuantOptions.required_of(self.server_args))
    return orig(self, *args, **kwargs)


def _after_update(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """self: a WeightUpdater; result: (success, message)."""
    runner = self.get_model_runner()
    if not _packs(runner):
        return
    if result[0]:
        from .recalibrate import weights_replaced

        weights_replaced(KVQuantOptions.required_of(runner.server_args), says=self.tp_rank == 0)


def _watch_flush(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """self: a SchedulerFlushWrapper, through which a user's flush goes, but not that of an update of weights."""
    flush, scheduler = self._flush_cache, self._flush_cache.__self__
    self.not_recalibrated = ""
    if not _packs(scheduler.tp_worker.model_runner):
        return
    from .recalibrate import after_flush

    def flush_and_recalibrate() -> bool:
        self.not_recalibrated = ""
        if not flush():
            return False
        self.not_recalibrated = after_flush(scheduler)
        return not self.not_recalibrated

    self._flush_cache = flush_and_recalibrate


def _answer_flush(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    if result is not None and not (result.success or result.message) and self.not_recalibrated:
        result.message = f"The cache was flushed, but not recalibrated: {self.not_recalibrated}\n"


def _of_cache(recv_req: Any) -> bool:
    """Whether it gives back the KV cache's memory, or takes it again."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_KV_CACHE

    return GPU_MEMORY_TYPE_KV_CACHE in (recv_req.tags or GPU_MEMORY_ALL_TYPES)


def _before_pause(*args: Any, **kwargs: Any) -> None:
    """SGLang unmaps memory that kernels may still read, weights right behind the copies of its buffers, and waits for
    them afterwards (sglang#31073)."""
    import torch

    torch.get_device_module().synchronize()


def _after_resume(result: Any, self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> None:
    """self: a SchedulerWeightUpdaterManager. What padded requests of a graph read was lost with the cache."""
    runner = self.tp_worker.model_runner
    if _packs(runner) and _of_cache(recv_req) and self.memory_saver_adapter.enabled:
        from .backend import require_packed_pool

        require_packed_pool(runner).clear()
        runner.req_to_token_pool.req_to_token[0] = 0  # their row, of slots


# --- capacity and pool ---------------------------------------------------------------------------


def _compute_cell_size(orig: Any, self: Any, kvc: Any, *args: Any, **kwargs: Any) -> int:
    if not _packs(kvc):
        return orig(self, kvc, *args, **kwargs)
    from .runtime import current

    return current().counted_bytes_per_token


def _add_draft_cache(result: Any, self: Any, kvc: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang takes a draft's layers to have rows of the target's size, which are not packed."""
    if not _packs(kvc) or not kvc.spec_algorithm.is_speculative():
        return
    from .runtime import current
    from .speculation import draft_bytes_per_token

    self._cell_size = current().counted_bytes_per_token + draft_bytes_per_token(kvc)


def _size_split_pool(result: Any, self: Any, kvc: Any, *args: Any, **kwargs: Any) -> None:
    if not _packs(kvc):
        return
    from .runtime import current

    # What all layers with full attention take, which SGLang multiplies by their number.
    self._full_per_token = current().counted_bytes_per_token / self._full_layers_num
    self._recompute_cell_size()


def _build_mha_kv_pool(
    orig: Any, self: Any, *, max_total_num_tokens: int, mha_pool_class: type, quant_method: Any = None, **kwargs: Any
) -> Any:
    if not _packs(self):
        return orig(
            self,
            max_total_num_tokens=max_total_num_tokens,
            mha_pool_class=mha_pool_class,
            quant_method=quant_method,
            **kwargs,
        )
    _require_plain(self, mha_pool_class, quant_method=quant_method)
    from sglang.srt.runtime_context import get_exec

    return _packed_pool(self, max_total_num_tokens, get_exec().features.enable_memory_saver)


def _require_plain(configurator: Any, stock: type, where: str = "", quant_method: Any = None) -> None:
    """KVQuantError unless SGLang would build its plain pool, of which a packed one takes the place."""
    if stock.__name__ != "MHATokenToKVPool" or quant_method is not None or configurator.post_capture_kv_active:
        raise KVQuantError(
            f"--kv-quant {NAME}: the engine asked for a {stock.__name__} pool{where}; "
            "only the plain one can be packed, leave out options that change the KV pool"
        )


def _packed_pool(configurator: Any, size: int, enable_memory_saver: bool) -> Any:
    from .pool import PackedKVPool
    from .runtime import current

    return PackedKVPool(
        size,
        configurator.pool_page_size,
        layers=current().layers,
        device=configurator.device,
        enable_memory_saver=enable_memory_saver,
        start_layer=configurator.layer_info.start_layer,
        end_layer=configurator.layer_info.end_layer,
        check_rows=current().options.check_rows,
    )


def _full_attention_pool_class(orig: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """What a hybrid model's wrapper builds, by keyword, for its layers with keys."""
    stock = orig(self, *args, **kwargs)
    return _packed_class(self, stock) if _packs(self) else stock


def _build_hybrid_swa_kv_pool(orig: Any, self: Any, *, mha_pool_class: type, **kwargs: Any) -> Any:
    """The wrapper builds one pool for the layers with full attention and one for those with a window, by keyword."""
    if not _packs(self):
        return orig(self, mha_pool_class=mha_pool_class, **kwargs)
    packed = _packed_class(self, mha_pool_class)

    def of_kind(*, allocation_label: str, **more: Any) -> Any:
        return (packed if allocation_label == "Full" else mha_pool_class)(allocation_label=allocation_label, **more)

    return orig(self, mha_pool_class=of_kind, **kwargs)


def _packed_class(configurator: Any, stock: type) -> Callable[..., Any]:
    """In the place of ``stock``, for the layers with full attention. KVQuantError unless that is the plain pool."""
    _require_plain(configurator, stock, " for the layers with full attention")

    def packed(*, size: int, layer_num: int, enable_memory_saver: bool, quant_method: Any = None, **_: Any) -> Any:
        pool = _packed_pool(configurator, size, enable_memory_saver)
        if quant_method is not None or layer_num != pool.layer_num:
            raise KVQuantError(
                f"--kv-quant {NAME}: the engine asked for a {stock.__name__} pool of {layer_num} layers with "
                f"{type(quant_method).__name__}, the table is for {pool.layer_num} layers without one; leave out "
                "options that change the KV pool"
            )
        return pool

    return packed


def _check_pool(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    if not _packs(self):
        return
    from .pool import packed_pool

    packed = packed_pool(result)
    if packed is None:
        raise KVQuantError(
            f"--kv-quant {NAME}: the engine built a {type(result).__name__} for this model, which cannot be packed; "
            "serve it without --kv-quant"
        )
    if packed is not result:
        packed.wrapper = result


def _fused_set_kv_buffer(orig: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> bool:
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool, has_forward_context

    from .pool import packed_pool

    # Fused kernels write bf16 rows. The uint8 dtype of the pool keeps them off too, but not that of a wrapper.
    if has_forward_context() and packed_pool(get_token_to_kv_pool()) is not None:
        return False
    return orig(forward_batch, *args, **kwargs)


# --- host memory and storage ---------------------------------------------------------------------


def _build_kv_host_pool(orig: Any, *, kv_pool: Any, page_size: int, **kwargs: Any) -> Any:
    from .pool import PackedKVPool

    if not isinstance(kv_pool, PackedKVPool):  # the windows of a split pool
        return orig(kv_pool=kv_pool, page_size=page_size, **kwargs)
    from sglang.srt.runtime_context import get_memory

    from .hicache import PackedHostPool
    from .runtime import current

    size, served = kwargs.get("host_size"), current()
    return PackedHostPool(
        kv_pool,
        page_size,
        get_memory().hicache_size if size is None else size,
        table_hash=served.table.header.table_hash,
        chunk_attention=served.options.chunk_attention,
        label=kwargs.get("pool_label", "kv"),
    )


def _estimate_hicache_bytes(orig: Any, params: Any, *args: Any, **kwargs: Any) -> int:
    """SGLang knows the pools whose bytes it may ask for by their classes."""
    from .pool import PackedKVPool

    pool = params.token_to_kv_pool_allocator.get_kvcache()
    if isinstance(pool, PackedKVPool):
        return sum(pool.get_kv_size_bytes())
    return orig(params, *args, **kwargs)


def _attach_storage_backend(orig: Any, self: Any, storage_backend: str, *args: Any, **kwargs: Any) -> Any:
    from .hicache import check_storage

    check_storage(self.storage_host_pool, storage_backend)
    return orig(self, storage_backend, *args, **kwargs)


def _free_rows(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Exact copies are of the requests with the highest indices, which are handed out from the end of this list."""
    from . import runtime

    if (recent := runtime.copies()) is not None and recent.rows < self.size:
        self.free_slots.sort()


def _validate_beams(orig: Any, self: Any, *args: Any, **kwargs: Any) -> str | None:
    from . import runtime
    from .recent import refuse_beams

    if (recent := runtime.copies()) is not None:
        return refuse_beams(recent)
    return orig(self, *args, **kwargs)


def _flush_cache(self: Any, *args: Any, **kwargs: Any) -> None:
    """self: a Scheduler. Before its prefix cache is emptied, which it is only where nothing runs. Rows that sleep has
    given back are not there to be read."""
    from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE

    if GPU_MEMORY_TYPE_KV_CACHE not in self.weight_updater.offload_tags:
        _compare_cached(self)


def _before_release(self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> None:
    """self: a SchedulerWeightUpdaterManager. SGLang gives the rows back and empties the prefix cache then."""
    if self.scheduler is not None and _of_cache(recv_req):
        _compare_cached(self.scheduler)


def _compare_cached(scheduler: Any) -> None:
    """Rows that the prefix cache holds with their checksums, where these are kept and nothing runs."""
    from .pool import packed_pool

    pool = packed_pool(scheduler.tp_worker.model_runner.token_to_kv_pool)
    if pool is not None and pool.check is not None and scheduler.is_fully_idle(ignore_waiting=scheduler._engine_paused):
        pool.check.compare_cached(scheduler.tree_cache)


# --- observability -------------------------------------------------------------------------------


def _init_info(result: dict, self: Any, *args: Any, **kwargs: Any) -> None:
    from .observability import server_info

    info = server_info(self)
    if info is not None:
        result["kv_quant"] = info


def _replicas_info(result: dict, self: Any, *args: Any, **kwargs: Any) -> None:
    """self: a DataParallelController. Replicas have one table; each one's own entry is among the internal states."""
    info = next((info["kv_quant"] for info in self._scheduler_init_infos if "kv_quant" in info), None)
    if info is not None:
        result["kv_quant"] = info


def _internal_state(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """What a scheduler says of itself now, where the rest of /server_info is of its start."""
    from .observability import server_info

    info = server_info(self.scheduler)
    if info is not None:
        from .recalibrate import live

        result.internal_state["kv_quant"] = {**info, **live()}


def _emit_constants(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    from . import runtime
    from .observability import emit_gauges

    try:
        served = runtime.current()
    except RuntimeError:
        return  # a stock cache
    emit_gauges(dict(self.labels), served)


def _support_triton(orig: Any, backend: str, *args: Any, **kwargs: Any) -> bool:
    if backend == NAME:
        import torch

        return torch.cuda.is_available()
    return orig(backend, *args, **kwargs)


# --- registration --------------------------------------------------------------------------------

_MANAGER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_FLUSH = "managers.scheduler_components.flush_wrapper.SchedulerFlushWrapper."
Hooks = dict[str, tuple[str, Callable[..., Any]]]  # by target: when, and what is called
_UPDATER = "model_executor.model_runner_components.weight_updater.WeightUpdater."
_OPTION_HOOKS: Hooks = {
    "server_args.ServerArgs.add_cli_args": ("AFTER", _add_cli_args),
    "server_args.ServerArgs.from_cli_args": ("AROUND", _from_cli_args),
    "plugins.load_plugins": ("AFTER", _give_engine_our_factory),
}
_HOOKS: Hooks = {
    "arg_groups.model_hook.handle_model_specific_adjustments": ("AROUND", _handle_model),
    "arg_groups.model_hook.resolved_view": ("AFTER", _resolved_view),
    "server_args.ServerArgs.resolve_once": ("AFTER", _resolve_once),
    "model_executor.model_runner.ModelRunner.load_model": ("AROUND", _load_model),
    "model_executor.model_runner.ModelRunner.alloc_memory_pool": ("AROUND", _alloc_memory_pool),
    _UPDATER + "update_weights_from_disk": ("AFTER", _after_update),
    _UPDATER + "update_weights_from_tensor": ("AFTER", _after_update),
    _UPDATER + "update_weights_from_ipc": ("AFTER", _after_update),
    _UPDATER + "load_weights_from_distributed": ("AFTER", _after_update),
    _MANAGER + "release_memory_occupation": ("BEFORE", _before_release),
    _MANAGER + "resume_memory_occupation": ("AFTER", _after_resume),
    "utils.torch_memory_saver_adapter._TorchMemorySaverAdapterReal.pause": ("BEFORE", _before_pause),
    _FLUSH + "__init__": ("AFTER", _watch_flush),
    _FLUSH + "handle": ("AFTER", _answer_flush),
    "managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state": (
        "AFTER",
        _internal_state,
    ),
    "model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size": ("AROUND", _compute_cell_size),
    "model_executor.pool_configurator.DefaultPoolConfigurator.__init__": ("AFTER", _add_draft_cache),
    "model_executor.pool_configurator.HybridSWAPoolConfigurator.__init__": ("AFTER", _size_split_pool),
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool": ("AROUND", _build_mha_kv_pool),
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._hybrid_full_attention_pool_class": (
        "AROUND",
        _full_attention_pool_class,
    ),
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_hybrid_swa_kv_pool": (
        "AROUND",
        _build_hybrid_swa_kv_pool,
    ),
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool": ("AFTER", _check_pool),
    "models.utils.enable_fused_set_kv_buffer": ("AROUND", _fused_set_kv_buffer),
    "mem_cache.hybrid_cache.hybrid_pool_assembler.build_kv_host_pool": ("AROUND", _build_kv_host_pool),
    "mem_cache.hicache_auto_size._estimate_hicache_bytes": ("AROUND", _estimate_hicache_bytes),
    "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController.attach_storage_backend": (
        "AROUND",
        _attach_storage_backend,
    ),
    "mem_cache.memory_pool.ReqToTokenPool.free_rows": ("AFTER", _free_rows),
    "beam_search.coordinator.BeamCoordinator.validate_and_init": ("AROUND", _validate_beams),
    "managers.scheduler.Scheduler.flush_cache": ("BEFORE", _flush_cache),
    "managers.scheduler.Scheduler.get_init_info": ("AFTER", _init_info),
    "managers.data_parallel_controller.DataParallelController.get_init_info": ("AFTER", _replicas_info),
    "observability.metrics_collector.SchedulerMetricsCollector.emit_constants": ("AFTER", _emit_constants),
    "utils.common.support_triton": ("AROUND", _support_triton),
}


def _hook(table: Hooks) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    for target, (kind, function) in table.items():
        HookRegistry.register(_ROOT + target, function, HookType[kind], source=HookSource(NAME, "sglang-blockgtq"))


def _require_hooks() -> None:
    """KVQuantError unless every hook is in place: a stock cache must never pass for a packed one."""
    if _broken is not None:
        raise KVQuantError(_broken)
    missing = [target for target, (_, function) in _HOOKS.items() if not compat.in_place(target, function)]
    if missing:
        raise KVQuantError(compat.incompatibility([f"{target} could not be hooked" for target in missing]))


def _install() -> None:
    """Register the backend and the hooks of a process that serves with --kv-quant. What goes wrong is kept."""
    global _installed, _broken
    if _installed:
        return
    _installed = True
    try:
        if drift := compat.find_drift():
            _broken = compat.incompatibility(drift)
        else:
            from sglang.srt.layers.attention.attention_registry import register_attention_backend
            from sglang.srt.server_args import add_attention_backend_choices

            from . import backend

            add_attention_backend_choices([NAME])
            register_attention_backend(NAME)(backend.create)
            _hook(_HOOKS)
    except Exception as e:  # SGLang would log and swallow it, and serve bf16
        _broken = compat.incompatibility([f"installing the hooks failed with {type(e).__name__}: {e}"])
    if _broken is not None and options.have_arrived():
        # Nobody asks a scheduler's hooks: it dies of the attention backend blockgtq, which it does not know.
        logger.error(_broken)


def _install_now() -> None:
    """:func:`_install` after SGLang has applied what plugins registered when it loaded them."""
    if _installed:
        return
    _install()
    if _broken is not None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    for target, (_, function) in _HOOKS.items():
        if not compat.in_place(target, function):  # another plugin hooks it too, and a target is applied once
            hooks = HookRegistry._hooks[_ROOT + target]
            HookRegistry._apply_target(_ROOT + target, [hook for hook in hooks if hook[1] is function])


def register() -> None:
    """Add the options. Install the hooks if options came with this process, else when they come."""
    _hook(_OPTION_HOOKS)
    _give_engine_our_factory()
    options.on_arrival(_install_now)
    if options.have_arrived():
        _install()
