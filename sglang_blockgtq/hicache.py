"""HiCache over packed rows: host memory that holds them as they are, and storage whose keys name their table.

To SGLang's host pool a packed row is one latent vector of ``row_bytes`` for each token and layer, so its own kernels
move it, byte by byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.mem_cache.device_pool_info import MLABufferInfo
from sglang.srt.mem_cache.pool_host.common import get_allocator_type
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.runtime_context import get_memory

from .conflicts import STORAGE, check_page
from .kernels.layer import PackedLayer
from .options import NAME, KVQuantError
from .pool import PackedKVPool


class PackedHostPool(MLATokenToKVPoolHost):
    """Host memory for the rows of a PackedKVPool: ``--hicache-ratio`` times its tokens, or ``--hicache-size`` GB.

    page_size: tokens. size: GB, 0 for the ratio. table_hash, chunk_attention: of what made the rows.
    KVQuantError for rows that SGLang's kernels could not move whole.
    """

    def __init__(
        self,
        pool: PackedKVPool,
        page_size: int,
        size: float,
        *,
        table_hash: str,
        chunk_attention: str,
        label: str = "kv",
    ):
        layers = list(pool.layers.values())
        interleaved = any(layer.interleaved for layer in layers)
        if interleaved:
            check_page(page_size)
        super().__init__(
            _as_latent(pool, one_width(layers)),
            get_memory().hicache_ratio,
            size,
            page_size,
            get_memory().hicache_mem_layout,
            pin_memory=layers[0].rows.is_cuda,
            allocator_type=get_allocator_type(),
            device_capacity_tokens=pool.size,
            start_layer=pool.start_layer,
            end_layer=pool.end_layer,
            target_layer_num=pool.layer_num,
            pool_label=label,
        )
        # SGLang's keys know the model by its name, and of a page its tokens alone.
        order = f"{self.layout} {interleaved} {chunk_attention}"
        self.storage_format_tag = f"{NAME}-{table_hash[:16]}-{hashlib.sha256(order.encode()).hexdigest()[:8]}"


def one_width(layers: Iterable[PackedLayer]) -> int:
    """Bytes of a row, the same in all layers. KVQuantError for others: host memory has one width."""
    widths = {layer.layout.row_bytes for layer in layers}
    if len(widths) > 1:
        raise KVQuantError(
            f"--enable-hierarchical-cache: not with rows of {sorted(widths)} bytes in different layers, as allocators "
            "by blocks make them: host memory has rows of one width; use --kv-quant-granularity segment"
        )
    return widths.pop()


def _as_latent(pool: PackedKVPool, width: int) -> MLABufferInfo:
    rows = tuple(layer.rows.view(-1, 1, width) for layer in pool.layers.values())
    return MLABufferInfo(
        buffers=rows,
        data_ptrs=torch.tensor([x.data_ptr() for x in rows], dtype=torch.uint64, device=rows[0].device),
        layer_indices=tuple(range(pool.layer_num)),
        device_layer_num=pool.layer_num,
        page_size=pool.page_size,
        kv_lora_rank=width,
        qk_rope_head_dim=0,
        kv_cache_dim=width,
        dtype=pool.dtype,
        device=rows[0].device,
    )


def check_storage(host_pool: Any, backend: str) -> None:
    """Refuse a storage backend that is attached while the server runs, as at start-up. Raises KVQuantError."""
    if isinstance(host_pool, PackedHostPool) and STORAGE.refuses(backend):
        raise KVQuantError(f"storage backend {backend}: not with --kv-quant {NAME}: {STORAGE.reason}; use file")
