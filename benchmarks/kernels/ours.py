"""The one place where the benchmark calls this project's kernels.

Attention is what a layer does between its query and its output: the query's rotation, attention, the merge of the
splits and the output's rotation. What a server keeps for all layers and steps is in :func:`plan`.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_blockgtq.kernels.any_layout.encode import AnyEncoder
from sglang_blockgtq.kernels.any_layout.tables import AnyTables
from sglang_blockgtq.kernels.decode.attention import DecodeScratch, decode_attention
from sglang_blockgtq.kernels.device.tables import ColumnTables, Tables
from sglang_blockgtq.kernels.encode.encoder import Encoder
from sglang_blockgtq.kernels.format.codec import LayerCodec

CONTEXT = 1 << 20  # positions that page means are turned to
INDEX_DTYPE = torch.int32  # of kv_indices, as the backend gathers them


def tables_of(codec: LayerCodec, device: torch.device | str) -> Tables:
    if codec.layout.in_columns:
        return ColumnTables.of(codec, device, positions=CONTEXT)
    return AnyTables.of(codec, device)


def encoder(tables: Tables, rows: torch.Tensor) -> Encoder | AnyEncoder:
    """Called with k, v ``[T, H, D]``, loc and positions ``[T]``, it encodes into ``rows [slots, row_bytes]``."""
    return Encoder(tables, rows) if isinstance(tables, ColumnTables) else AnyEncoder(tables, rows)


def plan(tables: Tables, batch: int, num_heads: int, q_len: int = 1) -> dict[str, Any]:
    """Keyword arguments of :func:`attend` that hold for all layers, steps and contexts: the scratch memory."""
    return {"scratch": DecodeScratch.of(tables, batch, num_heads, q_len), "q_len": q_len}


def attend(
    tables: Tables,
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    **step: Any,
) -> torch.Tensor:
    """The last tokens ``q [B * q_len, Hq, D]`` of each request, causal among themselves, against its packed rows."""
    return decode_attention(tables, q, rows, kv_indptr, kv_indices, sm_scale, **step)[0]
