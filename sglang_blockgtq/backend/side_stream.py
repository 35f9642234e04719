"""What a decode step does at the end of its attention, on a stream of its own beside the rest of the model.

The last layer's MLP and the logits read weights, while encode is bound by its arithmetic and does not fill the GPU.
Whoever reads rows next comes behind the logits, which wait for the stream: so does the end of a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend


class SideStream:
    """Tensors that :meth:`run` is given must live until the model's logits are there, as a batch's do."""

    def __init__(self, device: torch.device | str):
        self.stream = torch.cuda.Stream(device)
        self._under_way = False

    @classmethod
    def of(cls, runner: Any) -> SideStream | None:
        """None where the model's forward ends without logits, which would wait, or a graph is cut at attention: a
        graph cannot wait for what runs outside of it."""
        logits: Any = getattr(runner.model, "logits_processor", None)
        cut = check_cuda_graph_backend(Phase.DECODE, Backend.BREAKABLE)
        if (
            torch.device(runner.device).type != "cuda"
            or runner.pp_group.world_size > 1
            or cut
            or type(logits) is not LogitsProcessor
        ):
            return None
        side = cls(runner.device)
        logits.register_forward_hook(lambda *_: side.join())
        return side

    def run(self, work: Callable[..., None], *args: Any) -> None:
        """Once all that is queued is done."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work(*args)
        self._under_way = True

    def join(self) -> None:
        """What is queued from now on comes after what was run."""
        if self._under_way:
            torch.cuda.current_stream().wait_stream(self.stream)
        self._under_way = False
