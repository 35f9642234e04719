"""An SGLang plugin for the soak's server: after each flush it says how many of the cache's slots are free."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def say_free(flushed: bool, self: Any, *args: Any, **kwargs: Any) -> None:
    """self: a Scheduler."""
    if flushed:
        free = self.token_to_kv_pool_allocator.available_size()
        logger.info("blockgtq_soak: %d of %d slots are free", free, self.max_total_num_tokens)


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.flush_cache", say_free, HookType.AFTER)
