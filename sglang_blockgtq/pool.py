"""PackedKVPool: SGLang's KV memory pool holding packed rows instead of dense keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import KVCache, unwrap_write_loc
from sglang.srt.platforms import current_platform

from .kernels.every_layer import RowPlaces
from .kernels.layer import PackedLayer
from .options import NAME, KVQuantError
from .row_check import RowCheck

Layer = TypeVar("Layer", bound=PackedLayer)


class PackedKVPool(KVCache, Generic[Layer]):
    """The rows of some layers. Not a subclass of MHATokenToKVPool: whatever would copy dense K and V finds no such
    buffer and fails loudly. Rows do not depend on the request, so the radix cache shares slots as ever.

    layers: by layer id; any ids, any shapes, of the one kind that the backend reads. check_rows: as the option.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        *,
        layers: Mapping[int, Layer],
        device: str,
        enable_memory_saver: bool,
        start_layer: int,
        end_layer: int,
        check_rows: int = 0,
    ):
        # uint8 keeps fused kernels away that would write bf16 rows.
        super().__init__(size, page_size, torch.uint8, len(layers), device, enable_memory_saver, start_layer, end_layer)
        self.layers: dict[int, Layer] = dict(layers)
        first = next(iter(self.layers.values()))
        self.head_num, self.head_dim, self.v_head_dim = first.heads, first.head_dim, first.v_head_dim
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):  # what sleep gives back: rows and no more
            rows = [layer.new_rows(size + page_size, device) for layer in self.layers.values()]
        for layer, own in zip(self.layers.values(), rows, strict=True):
            layer.bind(own)
        self._places = RowPlaces.of(list(self.layers.values()))
        self.check = RowCheck(self.layers, check_rows) if check_rows else None
        self.wrapper: Any = None  # of SGLang's, that holds this pool
        self._probing = False
        self._finalize_allocation_log(size)

    def layer(self, layer_id: int) -> Layer:
        """To write or read: the device waits until HiCache has loaded the layer's rows, as in SGLang's own getters.
        KVQuantError for a layer that this pool does not hold."""
        if layer_id not in self.layers:
            held = sorted(self.layers)
            raise KVQuantError(f"--kv-quant {NAME}: layer {layer_id} is not in the packed pool, {held} are")
        if self.wrapper is not None:
            self.wrapper._wait_for_layer(layer_id)
        elif self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(layer_id - self.start_layer)
        return self.layers[layer_id]

    def clear(self) -> None:
        """Make all rows zero again, as they were made: what padding reads of memory that was lost is anything."""
        for layer in self.layers.values():
            layer.rows.zero_()

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
    ) -> None:
        """Encode post-RoPE keys ``[T, H * D]`` and values into the rows at ``loc_info``.

        layer_id_override: a wrapper's own count of its layers; they are found by ``layer`` all the same.
        For those who know no positions, of whom SGLang has none here: with page means it is NotImplementedError.
        """
        if {k_scale, v_scale} - {None, 1.0} or dcp_kv_mask is not None:
            raise NotImplementedError(f"{NAME}: cache scales and context-parallel masks do not apply to packed rows")
        if layer is None:  # a wrapper with two pools
            raise NotImplementedError(f"{NAME}: the rows of packed layers are written by the backend, not by a wrapper")
        packed = self.layer(layer.layer_id)
        if packed.has_means:
            raise NotImplementedError(f"{NAME}: keys less their page's mean are written by the backend, with positions")
        if self.check:
            raise NotImplementedError(f"{NAME}: rows with checksums are written by the backend, with positions")
        k = cache_k.view(-1, packed.heads, packed.head_dim)
        v = cache_v.view(-1, packed.heads, packed.v_head_dim)
        packed.encode(k, v, unwrap_write_loc(loc_info)[0])

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copy rows between slots in every layer; exact."""
        if self._places:
            self._places.move(tgt_loc, src_loc)
        else:
            for layer in self.layers.values():
                layer.scatter(tgt_loc, layer.gather(src_loc))
        if self.check:
            self.check.sums.move(tgt_loc, src_loc)

    def get_cpu_copy(self, indices: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
        """The rows of ``indices`` in every layer, and then their checksums if there are any, on the CPU; complete when
        this returns, as the stock pool's are."""
        current_platform.synchronize()
        rows = [layer.gather(indices).to("cpu", non_blocking=True) for layer in self.layers.values()]
        if self.check:
            rows.append(self.check.sums.sums[:, indices.long()].to("cpu", non_blocking=True))
        current_platform.synchronize()
        return rows

    def load_cpu_copy(self, kv_cache_cpu: list[torch.Tensor], indices: torch.Tensor, *_: Any, **__: Any) -> None:
        """Put rows from :meth:`get_cpu_copy` back at ``indices``."""
        current_platform.synchronize()
        rows, sums = kv_cache_cpu[: len(self.layers)], kv_cache_cpu[len(self.layers) :]
        for layer, saved in zip(self.layers.values(), rows, strict=True):
            layer.scatter(indices, saved.to(layer.rows.device, non_blocking=True))
        if self.check:
            self.check.sums.sums[:, indices.long()] = sums[0].to(self.device, non_blocking=True)
        current_platform.synchronize()

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """(K bytes, V bytes) allocated; padding and key scales count as K."""
        total = sum(layer.rows.nbytes for layer in self.layers.values())
        v = sum(layer.rows.shape[0] * layer.heads * (layer.layout.v_code_bytes + 2) for layer in self.layers.values())
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


def packed_pool(pool: Any) -> PackedKVPool | None:
    """``pool`` if it is packed, or the packed pool that a wrapper of SGLang's holds for its full-attention layers."""
    for found in (pool, getattr(pool, "full_kv_pool", None)):
        if isinstance(found, PackedKVPool):
            return found
    return None
