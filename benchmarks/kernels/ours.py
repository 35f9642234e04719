"""The one place where the benchmark calls this project's kernels.

Each function is what a layer does between its query and its output: the query's turn, attention, the merge
of the splits and the output's turn. What a server keeps for all layers and steps is in :func:`plan`.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_blockgtq.kernels.attention import DecodeScratch, decode_attention
from sglang_blockgtq.kernels.encode import encode
from sglang_blockgtq.kernels.tables import DeviceTables

from .folded import decode_folded as ours_folded

INDEX_DTYPE = torch.int32  # of kv_indices, as the backend gathers them

__all__ = ["INDEX_DTYPE", "encode", "ours", "ours_folded", "ours_multi", "plan"]


def plan(
    tables: DeviceTables, batch: int, max_context: int, device: torch.device, num_heads: int, q_len: int = 1
) -> dict[str, Any]:
    """Keyword arguments of :func:`ours` that hold for all layers and steps: the scratch memory.

    It holds for every context up to ``max_context``: how many splits there are depends on the batch and the device.
    """
    return {"scratch": DecodeScratch.of(tables, batch, num_heads, q_len)}


def ours(
    tables: DeviceTables,
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    **step: Any,
) -> torch.Tensor:
    """One query ``[B, Hq, D]`` per request against its packed rows; ``step`` is from :func:`plan`."""
    return decode_attention(tables, q, rows, kv_indptr, kv_indices, sm_scale, **step)[0]


def ours_multi(
    tables: DeviceTables,
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    queries: int,
    **step: Any,
) -> torch.Tensor:
    """``queries`` tokens per request, causal among themselves, sharing each read. q ``[B * queries, Hq, D]``."""
    return decode_attention(tables, q, rows, kv_indptr, kv_indices, sm_scale, q_len=queries, **step)[0]
