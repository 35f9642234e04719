"""What attention on a GPU needs besides the layers, taken before the cache is sized so that it is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.cuda import attention as cuda
from ..kernels.decode.attention import DecodeScratch
from ..kernels.layer import TritonLayer
from ..speculation import Verification
from .extend import Workspace
from .prefill import Prefill, choose

SLOT = torch.int32  # of a decode step's slots


@dataclass
class Buffers:
    """One for all layers and batch sizes, so that no captured graph keeps its own.

    prefill: the dense kernel that reads the workspace. decode_attention: what reads rows in a decode step. scratch: of
    decode's splits. graph_slots: int32, the slots of the largest captured batch at full context; None without graphs.
    verification: of drafts, with splits of its own; None without speculation.
    """

    prefill: Prefill
    decode_attention: str
    workspace: Workspace
    scratch: DecodeScratch
    graph_slots: torch.Tensor | None
    verification: Verification | None = None
    verify_scratch: DecodeScratch | None = None

    @classmethod
    def of(
        cls, layers: Mapping[int, TritonLayer], runner: Any, num_heads: int, requests: int, window: int = 0
    ) -> Buffers:
        """For a ModelRunner with ``num_heads`` query heads on this rank, whose cache is not yet there, and up to
        ``requests`` requests at a time. window: the largest of its layers; a chunk and the window before it lie in the
        workspace together."""
        from sglang.srt.runtime_context import get_exec, get_schedule

        layer, context = next(iter(layers.values())), runner.model_config.context_len
        tokens = min(get_schedule().max_total_tokens or context, context)
        chunk = get_schedule().chunked_prefill_size or -1
        together = min(window + chunk if chunk > 0 else context, tokens) if window else 0
        prefill = choose(runner.device, runner.dtype, layer.head_dim, layer.v_head_dim)
        graph = get_exec().graph.cuda_graph_config.decode
        captured = min(max(graph.bs), requests) if graph.bs and graph.backend != "disabled" else 0
        verification = Verification.of(runner, requests)
        ahead = verification.q_len if verification else 0
        scratch = DecodeScratch.of(layer.tables, requests, num_heads, ahead) if verification else None
        return cls(
            prefill=prefill,
            decode_attention="CUDA" if cuda.serves(layer.tables, num_heads // layer.tables.heads) else "Triton",
            workspace=Workspace(layer, prefill.attend, runner.dtype, runner.device, tokens, least=together),
            scratch=DecodeScratch.of(layer.tables, requests, num_heads),
            graph_slots=new_graph_slots(captured * (context + ahead), runner.device) if captured else None,
            verification=verification,
            verify_scratch=scratch,
        )

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind."""
        scratch = self.scratch.nbytes + (self.verify_scratch.nbytes if self.verify_scratch else 0)
        return {
            "prefill_workspace": self.workspace.nbytes,
            "decode_scratch": scratch,
            "graph_slots": 0 if self.graph_slots is None else self.graph_slots.nbytes,
        }


def new_graph_slots(count: int, device: torch.device | str) -> torch.Tensor:
    """Zeros: a padded request reads slot 0."""
    return torch.zeros(count, dtype=SLOT, device=device)
