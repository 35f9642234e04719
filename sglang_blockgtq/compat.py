"""Does the installed SGLang have the seams this plugin hooks?

SGLang logs and swallows whatever a plugin raises, so silence would be the default failure. What
is found here is kept and raised as soon as somebody asks for --kv-quant.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from .conflicts import NEEDS_TABLE, REFUSALS
from .options import NAME

SUPPORTED_SGLANG = "0.5.23"

#: target -> parameters that must be there (more are allowed).
SIGNATURES = {
    "server_args.ServerArgs.add_cli_args": ["parser"],
    "server_args.ServerArgs.from_cli_args": ["args"],
    "server_args.ServerArgs.resolve_once": ["self"],
    "plugins.load_plugins": [],
    "arg_groups.model_hook.handle_model_specific_adjustments": ["server_args"],
    "arg_groups.model_hook.resolved_view": ["server_args"],
    "model_executor.model_runner.ModelRunner.load_model": ["self"],
    "model_executor.model_runner.ModelRunner.alloc_memory_pool": ["self", "memory_pool_config"],
    **{
        f"model_executor.model_runner_components.weight_updater.WeightUpdater.{name}": ["self"]
        for name in (
            "update_weights_from_disk",
            "update_weights_from_tensor",
            "update_weights_from_ipc",
            "load_weights_from_distributed",
        )
    },
    "model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size": ["self", "kvc", "num_layers"],
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool": [
        "self",
        "max_total_num_tokens",
        "mha_pool_class",
        "quant_method",
    ],
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._hybrid_full_attention_pool_class": ["self", "mha_pool_class"],
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool": ["self", "sizes"],
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_hybrid_swa_kv_pool": ["self", "mha_pool_class"],
    "model_executor.pool_configurator.DefaultPoolConfigurator.__init__": ["self", "kvc"],
    "model_executor.pool_configurator.HybridSWAPoolConfigurator.__init__": ["self", "kvc"],
    "model_executor.pool_configurator.HybridSWAPoolConfigurator._recompute_cell_size": ["self"],
    "mem_cache.swa_memory_pool.SWAKVPool.__init__": [
        "token_to_kv_pool_class",
        "swa_attention_layer_ids",
        "full_attention_layer_ids",
    ],
    "mem_cache.memory_pool.HybridLinearKVPool.__init__": ["full_kv_pool_class"],
    "mem_cache.memory_pool.HybridReqToTokenPool.__init__": [
        "size",
        "mamba_size",
        "mamba_spec_state_size",
        "max_context_len",
        "device",
        "enable_memory_saver",
        "cache_params",
        "mamba_layer_ids",
        "enable_mamba_extra_buffer",
        "start_layer",
    ],
    "mem_cache.memory_pool.ReqToTokenPool.free_rows": ["self", "indices"],
    "beam_search.coordinator.BeamCoordinator.validate_and_init": ["self", "req", "recv_req"],
    "mem_cache.memory_pool.KVCache.__init__": [
        "size",
        "page_size",
        "dtype",
        "layer_num",
        "device",
        "enable_memory_saver",
        "start_layer",
        "end_layer",
    ],
    "layers.attention.attention_registry.attn_backend_wrapper": ["runner", "full_attn_backend"],
    "layers.attention.triton_backend.TritonAttnBackend.forward_extend": ["q", "k", "v", "layer", "forward_batch"],
    "layers.attention.triton_backend.TritonAttnBackend.forward_decode": ["q", "k", "v", "layer", "forward_batch"],
    "layers.attention.triton_backend.TritonAttnBackend.init_cuda_graph_state": [
        "max_bs",
        "max_num_tokens",
        "kv_indices_buf",
    ],
    "layers.attention.triton_backend.TritonAttnBackend.init_forward_metadata": ["forward_batch"],
    "layers.attention.triton_backend.TritonAttnBackend.init_forward_metadata_out_graph": [
        "forward_batch",
        "in_capture",
    ],
    "layers.attention.triton_backend.TritonAttnBackend.init_forward_metadata_in_graph": ["forward_batch"],
    "mem_cache.kv_index_translator.KVIndexTranslator.read_source": ["plan", "req_pool_indices", "bs"],
    "layers.attention.verify_mask.VerifyMask": ["buffer", "mode", "max_bs"],
    "speculative.dflash_utils.dflash_draft_cell_size_per_token": [
        "draft_model_config",
        "draft_num_layers",
        "draft_kv_cache_dtype",
        "tp_size",
    ],
    "mem_cache.kv_cache_dtype.configure_kv_cache_dtype": [
        "server_args_kv_cache_dtype",
        "speculative_draft_kv_cache_dtype",
        "model",
        "model_dtype",
        "is_draft_worker",
        "is_dflash",
        "speculative_draft_attention_backend",
    ],
    "layers.radix_attention.RadixAttention.forward": ["q", "k", "v", "forward_batch", "save_kv_cache"],
    **{
        f"configs.hybrid_arch.{name}": ["model_config"]
        for name in ("hybrid_gdn_config", "mamba2_config", "mambaish_config")
    },
    "layers.attention.qsa.config.parse_qsa_profile": ["config"],
    "configs.model_config.is_hybrid_swa_model": ["model_architectures", "hf_text_config"],
    **{
        f"managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.{name}": ["recv_req"]
        for name in ("release_memory_occupation", "resume_memory_occupation")
    },
    "utils.torch_memory_saver_adapter._TorchMemorySaverAdapterReal.pause": ["self", "tag"],
    "managers.scheduler_components.flush_wrapper.SchedulerFlushWrapper.__init__": ["flush_cache"],
    "managers.scheduler_components.flush_wrapper.SchedulerFlushWrapper.handle": ["recv_req"],
    "managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state": ["recv_req"],
    "managers.scheduler.Scheduler.flush_cache": ["self"],
    "managers.scheduler.Scheduler.get_init_info": ["self"],
    "managers.data_parallel_controller.DataParallelController.get_init_info": ["self"],
    "mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface.walk_for_kv_canary": [
        "unlocked_only",
        "swa_resident_only",
    ],
    "observability.metrics_collector.SchedulerMetricsCollector.emit_constants": ["max_total_num_tokens"],
    "models.utils.enable_fused_set_kv_buffer": ["forward_batch"],
    "utils.common.support_triton": ["backend"],
    "mem_cache.hybrid_cache.hybrid_pool_assembler.build_kv_host_pool": [
        "kv_pool",
        "page_size",
        "host_size",
        "pool_label",
    ],
    "mem_cache.hicache_auto_size._estimate_hicache_bytes": ["params"],
    "arg_groups.overrides.supports_mamba_cache_extra_buffer": ["view", "hf_config"],
    "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController.attach_storage_backend": ["storage_backend"],
    "mem_cache.pool_host.mla.MLATokenToKVPoolHost.__init__": [
        "buffer_info",
        "host_to_device_ratio",
        "host_size",
        "page_size",
        "layout",
        "pin_memory",
        "allocator_type",
        "device_capacity_tokens",
        "start_layer",
        "end_layer",
        "target_layer_num",
        "pool_label",
    ],
    "mem_cache.pool_host.common.get_allocator_type": [],
    "managers.cache_controller.LayerDoneCounter.wait_until": ["threshold"],
    "mem_cache.memory_pool.HybridLinearKVPool._wait_for_layer": ["layer_id"],
    "mem_cache.swa_memory_pool.SWAKVPool._wait_for_layer": ["layer_id"],
}

METADATA_FIELDS = {
    "attn_logits",
    "attn_lse",
    "max_extend_len",
    "num_kv_splits",
    "kv_indptr",
    "kv_indices",
    "qo_indptr",
    "custom_mask",
    "swa_out_cache_loc",
}

ABSTRACT_POOL_METHODS = {"__init__", "get_key_buffer", "get_value_buffer", "get_kv_buffer", "set_kv_buffer"}

#: what a host pool is told about rows on the device
LATENT_FIELDS = {
    "buffers",
    "data_ptrs",
    "layer_indices",
    "device_layer_num",
    "page_size",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "dtype",
    "device",
}

#: function whose source must still contain the call through which a hook is reached
CALLS = {
    "model_executor.pool_configurator.DefaultPoolConfigurator.__init__": "_compute_cell_size",
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool": "_build_mha_kv_pool(",
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_hybrid_linear_kv_pool": (
        "_hybrid_full_attention_pool_class("
    ),
    "mem_cache.memory_pool.HybridLinearKVPool.__init__": "self.full_kv_pool = TokenToKVPoolClass(",
    "mem_cache.memory_pool.ReqToTokenPool.__init__": "self.free_slots = list(range(1, self._alloc_size))",
    "mem_cache.memory_pool.ReqToTokenPool.alloc_rows": "self.free_slots[-need_size:]",
    "beam_search.coordinator.BeamCoordinator._spawn_member_rows": "alloc_rows(",
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._handle_max_mamba_cache": "mamba_full_memory_ratio",
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_hybrid_swa_kv_pool": (
        "token_to_kv_pool_class=swa_pool_class"
    ),
    "mem_cache.swa_memory_pool.SWAKVPool.__init__": '"allocation_label": "Full"',
    "model_executor.pool_configurator.HybridSWAPoolConfigurator._recompute_cell_size": "_full_cell_bytes(",
    "model_executor.pool_configurator.HybridSWAPoolConfigurator._full_cell_bytes": "self._full_per_token",
    # Within the graph, before the scheduler may write to the table of requests again.
    "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._run_in_graph_metadata_prep": (
        "init_forward_metadata_in_graph("
    ),
    "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture_one_shape": (
        "_run_in_graph_metadata_prep("
    ),
    "layers.attention.base_attn_backend.AttentionBackend.shared_read_ends": "SharedReadEnds.IN_REPLAY",
    "managers.data_parallel_controller.DataParallelController.get_init_info": "self._scheduler_init_infos",
    "managers.scheduler.Scheduler.flush_cache": "self.is_fully_idle(ignore_waiting=self._engine_paused)",
    "managers.scheduler_components.flush_wrapper.SchedulerFlushWrapper.handle": "self._flush_cache()",
    "managers.scheduler_components.flush_wrapper.SchedulerFlushWrapper.check_pending": "self._flush_cache()",
    "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.update_weights_from_distributed": (
        "load_weights_from_distributed("
    ),
    # All strategies of HiCache build the host pool of keys and values in one place.
    "mem_cache.hybrid_cache.hybrid_pool_assembler.build_kv_only_group": "build_kv_host_pool(",
    "mem_cache.hybrid_cache.hybrid_pool_assembler.build_hybrid_swa_group": "build_kv_host_pool(",
    "mem_cache.hybrid_cache.hybrid_pool_assembler.build_host_pool_group": "build_kv_host_pool(",
    "mem_cache.hicache_auto_size.auto_size_hicache": "_estimate_hicache_bytes(",
    # Storage knows pages of another format by the host pool's tag, and ranks apart by the device pool's class.
    "managers.cache_controller.storage_model_name": "storage_format_tag",
    "managers.cache_controller.HiCacheController._generate_storage_config": "storage_model_name(",
    "mem_cache.hicache_storage.HiCacheFile.__init__": "storage_config.model_name",
    "managers.tp_worker.TpModelWorker.forward_batch_generation": "set_hicache_consumer(",
}


def resolve(target: str):
    """The object at a dotted path below ``sglang.srt``."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module("sglang.srt." + ".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(f"sglang.srt.{target}")


def in_place(target: str, hook: Callable) -> bool:
    """Whether a call of ``target`` goes through ``hook``, also where other plugins wrapped it again."""
    found = resolve(target)
    while found is not None:
        if any(cell.cell_contents is hook for cell in getattr(found, "__closure__", None) or ()):
            return True
        found = getattr(found, "__wrapped__", None)
    return False


def _parameters(function) -> set[str]:
    # A hook applied earlier wraps the function; functools.wraps keeps the original signature.
    return set(inspect.signature(function).parameters)


def find_drift() -> list[str]:
    """Every difference from what the hooks expect, one sentence each; empty when all is well."""
    drift = []
    for target, wanted in SIGNATURES.items():
        try:
            missing = set(wanted) - {"self"} - _parameters(resolve(target))
        except (ImportError, AttributeError, TypeError, ValueError) as e:
            drift.append(f"{target} is gone ({type(e).__name__}: {e})")
            continue
        if missing:
            drift.append(f"{target} lost the parameter(s) {', '.join(sorted(missing))}")
    for target, call in CALLS.items():
        try:
            if call not in inspect.getsource(inspect.unwrap(resolve(target))):
                drift.append(f"{target} no longer calls {call.rstrip('(')}")
        except (ImportError, AttributeError, OSError, TypeError) as e:
            drift.append(f"{target} cannot be inspected ({e})")
    try:
        fields = set(resolve("layers.attention.triton_backend.ForwardMetadata").__dataclass_fields__)
        if missing := METADATA_FIELDS - fields:
            drift.append(f"ForwardMetadata lost the field(s) {', '.join(sorted(missing))}")
        abstract = set(resolve("mem_cache.memory_pool.KVCache").__abstractmethods__)
        if extra := abstract - ABSTRACT_POOL_METHODS:
            drift.append(f"KVCache has new abstract method(s) {', '.join(sorted(extra))}")
        latent = set(resolve("mem_cache.device_pool_info.MLABufferInfo").__struct_fields__)
        if missing := LATENT_FIELDS - latent:
            drift.append(f"MLABufferInfo lost the field(s) {', '.join(sorted(missing))}")
        context = resolve("model_executor.forward_context.ForwardContext")
        if "attn_backend" not in getattr(context, "__dataclass_fields__", ()):
            drift.append("ForwardContext lost the field attn_backend")
        if len(resolve("mem_cache.memory_pool.unwrap_write_loc")(0)) != 3:
            drift.append("unwrap_write_loc no longer returns three locations")
        updater = resolve("model_executor.model_runner_components.weight_updater.WeightUpdater")
        if missing := {"tp_rank", "get_model_runner"} - set(updater.__dataclass_fields__):
            drift.append(f"WeightUpdater lost the field(s) {', '.join(sorted(missing))}")
        # A refusal of an option that was renamed would never be heard.
        known = set(resolve("server_args.ServerArgs").__struct_fields__)
        if missing := {r.option for r in (*REFUSALS, *NEEDS_TABLE) if not r.is_variable} - known:
            drift.append(f"ServerArgs lost the field(s) {', '.join(sorted(missing))}")
        known = set(vars(resolve("environ.Envs")))
        if missing := {r.option for r in REFUSALS if r.is_variable} - known:
            drift.append(f"the environment variable(s) {', '.join(sorted(missing))} are gone")
    except (ImportError, AttributeError) as e:
        drift.append(f"a class the cache builds on is gone ({e})")
    return drift


def installed_sglang() -> str:
    """Version of the installed SGLang."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "without a version"


def other_version() -> str | None:
    """One line that names both versions where the installed SGLang is another one; None where it is not."""
    installed = installed_sglang()
    if installed.split("+")[0] == SUPPORTED_SGLANG:
        return None
    return f"sglang {installed} is installed, this build is for {SUPPORTED_SGLANG}"


def incompatibility(drift: list[str]) -> str:
    """One line: which SGLang is installed and which is wanted, what drifted and what would work."""
    shown = "; ".join(drift[:3]) + (f"; and {len(drift) - 3} more" if len(drift) > 3 else "")
    other = other_version()
    if other is None:
        what = f"the installed sglang {installed_sglang()} is not as it was released: {shown}; reinstall it"
    else:
        what = f"{other}, and they differ: {shown}; install sglang=={SUPPORTED_SGLANG}"
    return f"--kv-quant {NAME}: {what}"
