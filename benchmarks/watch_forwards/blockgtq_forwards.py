"""An SGLang plugin for a server whose forward passes are timed: it logs how long each of a prefill takes its GPU.

A pass is logged once a later one begins, so that nothing waits for the GPU.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)
_under_way: list[tuple[int, int, torch.cuda.Event, torch.cuda.Event]] = []


def time_forward(forward: Any, runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """runner: a ModelRunner; batch: its ForwardBatch."""
    while _under_way and _under_way[0][-1].query():
        tokens, total, begin, end = _under_way.pop(0)
        logger.info("blockgtq_forwards: %d tokens of %d in %.3f ms", tokens, total, begin.elapsed_time(end))
    timed = runner.device == "cuda" and batch.forward_mode.is_extend() and batch.seq_lens_sum is not None
    if not timed or torch.cuda.is_current_stream_capturing():
        return forward(runner, batch, *args, **kwargs)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    out = forward(runner, batch, *args, **kwargs)
    end.record()
    _under_way.append((len(batch.input_ids), int(batch.seq_lens_sum), begin, end))
    return out


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    name = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
    HookRegistry.register(name, time_forward, HookType.AROUND)
