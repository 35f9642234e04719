"""PackedKVPool: SGLang's KV memory pool holding packed rows instead of dense keys and values."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import KVCache, unwrap_write_loc

from .kernels import naive
from .kernels.codec import LayerCodec
from .kernels.layout import gather_rows, num_slots, scatter_rows
from .options import NAME
from .runtime import Runtime


class PackedKVPool(KVCache):
    """One uint8 tensor ``[slots, row_bytes]`` a layer, rows interleaved in blocks of 16 slots (kernels.layout).

    Not a subclass of MHATokenToKVPool: whatever would copy dense K and V finds no such buffer and
    fails loudly. Rows do not depend on position or request, so the radix cache shares slots as ever.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        *,
        runtime: Runtime,
        device: str,
        enable_memory_saver: bool,
        start_layer: int,
        end_layer: int,
    ):
        # uint8 keeps fused kernels away that would write bf16 rows.
        super().__init__(
            size, page_size, torch.uint8, len(runtime.layer_ids), device, enable_memory_saver, start_layer, end_layer
        )
        header = runtime.table.header
        self.runtime = runtime
        self.head_num = len(range(header.kv_heads)[runtime.heads])
        self.head_dim, self.v_head_dim = header.head_dim, header.v_head_dim
        self.codecs: list[LayerCodec] = [
            runtime.table.layer_codec(i, runtime.heads).to(device) for i in runtime.layer_ids
        ]
        self.tables = self._device_tables() if torch.device(device).type == "cuda" else None
        # Zeros, not empty: graph-padded requests read slot 0, and a NaN scale there would spread.
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self.rows = [
                torch.zeros(num_slots(size + page_size), codec.layout.row_bytes, dtype=torch.uint8, device=device)
                for codec in self.codecs
            ]
        self.encoders = self._encoders() if self.tables is not None else None
        self._probing = False
        self._finalize_allocation_log(size)

    def _device_tables(self) -> list[Any]:
        from .kernels.tables import DeviceTables

        # The whole model's, so that one binary of each kernel serves all layers.
        templates = self.runtime.table.k_templates
        return [DeviceTables.of(codec, self.device, templates) for codec in self.codecs]

    def _encoders(self) -> list[Any]:
        from .kernels.encode import Encoder

        return [Encoder(tables, rows) for tables, rows in zip(self.tables, self.rows, strict=True)]

    def local(self, layer_id: int) -> int:
        """Index of a layer in this pool's lists."""
        return layer_id - self.start_layer

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        k_scale: float | None = None,
        v_scale: float | None = None,
        layer_id_override: int | None = None,
        dcp_kv_mask: torch.Tensor | None = None,
        *,
        q: torch.Tensor | None = None,
        turned: torch.Tensor | None = None,
    ) -> None:
        """Encode post-RoPE keys ``[T, H * D]`` and values into the rows at ``loc_info``.

        On a GPU the step's queries ``q [T, Hq, D]`` may be turned into ``turned`` (float32) in the same launch.
        """
        if k_scale is not None or v_scale is not None or dcp_kv_mask is not None:
            raise NotImplementedError(f"{NAME}: cache scales and context-parallel masks do not apply to packed rows")
        loc = unwrap_write_loc(loc_info)[0]
        i = self.local(layer.layer_id if layer_id_override is None else layer_id_override)
        # Usually they are in that shape, and in an eager prefill a view that changes nothing is time of the host.
        k = cache_k if cache_k.dim() == 3 else cache_k.view(-1, self.head_num, self.head_dim)
        v = cache_v if cache_v.dim() == 3 else cache_v.view(-1, self.head_num, self.v_head_dim)
        if self.encoders is not None:
            self.encoders[i](k, v, loc, q, turned)
        else:
            self.scatter(i, loc, naive.encode(self.codecs[i], k, v))

    def gather(self, i: int, slots: torch.Tensor) -> torch.Tensor:
        """Rows ``[n, row_bytes]`` at ``slots [n]`` of the pool's layer i, bytes in a row's own order."""
        return gather_rows(self.codecs[i].layout, self.rows[i], slots.long())

    def scatter(self, i: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Write ``rows [n, row_bytes]`` at ``slots [n]`` of the pool's layer i."""
        scatter_rows(self.codecs[i].layout, self.rows[i], slots.long(), rows)

    def dequant(self, layer_id: int, loc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[T, H, D]`` and values ``[T, H, Dv]`` float32 as the slots ``loc [T]`` hold them."""
        i = self.local(layer_id)
        return naive.decode(self.codecs[i], self.gather(i, loc))

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copy rows between slots in every layer; exact."""
        for i in range(len(self.rows)):
            self.scatter(i, tgt_loc, self.gather(i, src_loc))

    def get_cpu_copy(self, indices: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
        """The rows of ``indices`` in every layer, on the CPU."""
        return [self.gather(i, indices).cpu() for i in range(len(self.rows))]

    def load_cpu_copy(self, kv_cache_cpu: list[torch.Tensor], indices: torch.Tensor, *_: Any, **__: Any) -> None:
        """Put rows from :meth:`get_cpu_copy` back at ``indices``."""
        for i, (rows, saved) in enumerate(zip(self.rows, kv_cache_cpu, strict=True)):
            self.scatter(i, indices, saved.to(rows.device))

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """(K bytes, V bytes) allocated; padding and key scales count as K."""
        total = sum(rows.nbytes for rows in self.rows)
        v = sum(
            rows.shape[0] * c.layout.heads * (c.layout.v_code_bytes + 2)
            for rows, c in zip(self.rows, self.codecs, strict=True)
        )
        return total - v, v

    def get_v_head_dim(self) -> int:
        return self.v_head_dim

    @contextmanager
    def probing(self):
        """While SGLang's Triton backend asks for the value head size, get_value_buffer gives a stub."""
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        if self._probing:
            return torch.empty(1, 1, self.v_head_dim)
        raise self._no_dense_view("value")

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        raise self._no_dense_view("key")

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise self._no_dense_view("KV")

    @staticmethod
    def _no_dense_view(what: str) -> NotImplementedError:
        return NotImplementedError(
            f"{NAME}: a packed pool has no dense {what} buffer; the feature that asked for it is not supported"
        )
