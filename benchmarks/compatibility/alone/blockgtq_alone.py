"""An SGLang plugin for servers that share a GPU: each sizes its cache as if it were alone there.

SGLang takes the memory that is free when it starts and when its weights are loaded. Servers that start side by side
move both, so two caches would not be given the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_TARGET = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes"
GIB = 1 << 30


def size_alone(orig: Callable[..., int], self: Any, pre_model_load_memory: float, *args: Any, **kwargs: Any) -> int:
    """Bytes for the cache: the GPU's memory was free before the weights, now it is but for what this process holds."""
    import torch

    if not torch.cuda.is_available():
        return orig(self, pre_model_load_memory, *args, **kwargs)
    from sglang.srt.mem_cache import kv_cache_configurator as module

    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory

    def free(*_: Any, **__: Any) -> float:
        torch.cuda.empty_cache()
        return (total - torch.cuda.memory_reserved()) / GIB

    measured, module.get_available_gpu_memory = module.get_available_gpu_memory, free
    try:
        size = orig(self, total / GIB, *args, **kwargs)
    finally:
        module.get_available_gpu_memory = measured
    logger.info("blockgtq_alone: sized as if alone on the GPU: %.2f GiB of %.2f for the cache", size / GIB, total / GIB)
    return size


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_TARGET, size_alone, HookType.AROUND)
