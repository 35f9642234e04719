"""What is compared: the allocators through their packed rows, and three caches people know, for scale.

Every method has ``name``, ``k_bits``, ``v_bits``, ``bytes_per_token_head``, ``sizes(tokens)`` and
``round_trip(layer, k, v, first)``: post-RoPE keys ``[T, H, D]`` and values ``[T, H, Dv]`` of the tokens at positions
``first, first + 1, ...``, float32, as they are read back.
Peers that are only drawn into the panel have files of their own: hadamard, kivi, kvarn, oscar, saw; and so have the
tokens that they keep exact: window, exact.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sglang_blockgtq.calibrate.segments import SEGMENT_ALLOCATORS
from sglang_blockgtq.calibrate.table import AllocationTable
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.format.layout import NORM_BYTES

#: Tokens coded at once: the bytes do not depend on it (reference.encode), speed and memory do.
CHUNK, DEVICE_CHUNK = 1024, 8192


class Method(Protocol):
    name: str
    k_bits: float
    v_bits: float
    bytes_per_token_head: float

    def sizes(self, tokens: int) -> tuple[float, float]:
        """Bytes of a key and of a value: codes and scales, mean over layers and over a sequence of ``tokens``."""
        ...

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class Packed:
    """An allocation table: encode to packed rows, decode them."""

    def __init__(self, table: AllocationTable, name: str | None = None, device: torch.device | str = "cpu"):
        head = table.header
        by_segments = head.allocator in SEGMENT_ALLOCATORS and head.granularity == "segment"
        self.name = name or head.allocator + ("-segment" if by_segments else "")
        self.k_bits, self.v_bits = table.header.k_bits, table.header.v_bits
        self.bytes_per_token_head = table.bytes_per_token_head()
        self.codecs = [table.layer_codec(i).to(device) for i in range(table.header.layers)]

    def sizes(self, tokens: int) -> tuple[float, float]:
        rows = [codec.layout for codec in self.codecs]
        key = sum(row.k_code_bytes + NORM_BYTES * row.k_norms for row in rows) / len(rows)
        return key, rows[0].v_code_bytes + NORM_BYTES

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunk = CHUNK if k.device.type == "cpu" else DEVICE_CHUNK
        positions = torch.arange(first, first + len(k), device=k.device)
        tokens = zip(k.split(chunk), v.split(chunk), positions.split(chunk), strict=True)
        parts = [reference.round_trip(self.codecs[layer], *part) for part in tokens]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class Cast:
    """Keys and values rounded to a narrower floating-point type, no scales: ``bf16`` or ``fp8_e4m3``.

    As SGLang 0.5.23 stores them without calibrated scales (MHATokenToKVPool.set_kv_buffer: a plain cast), except that
    what lies outside the type's range becomes its largest number here.
    """

    def __init__(self, name: str, dtype: torch.dtype, head_dim: int, v_head_dim: int):
        self.name, self.dtype = name, dtype
        self.k_bits = self.v_bits = 8 * dtype.itemsize
        self.bytes_per_token_head = (head_dim + v_head_dim) * dtype.itemsize
        self.max = torch.finfo(dtype).max
        self._sizes = float(head_dim * dtype.itemsize), float(v_head_dim * dtype.itemsize)

    def sizes(self, tokens: int) -> tuple[float, float]:
        return self._sizes

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-self.max, self.max).to(self.dtype).float()

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cast(k), self._cast(v)


class ScaledCast(Cast):
    """A :class:`Cast` with one scale for the keys of a layer and one for its values, as servers take from a file.

    The largest number that calibration saw becomes the largest of the type.
    largest ``[layers, 2]``: magnitudes of keys and values. Two scales a layer weigh nothing.
    """

    def __init__(self, name: str, dtype: torch.dtype, head_dim: int, v_head_dim: int, largest: torch.Tensor):
        super().__init__(name, dtype, head_dim, v_head_dim)
        self.scales = largest / self.max

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_scale, v_scale = self.scales[layer].to(k.device)
        return self._cast(k / k_scale) * k_scale, self._cast(v / v_scale) * v_scale


class IntPerToken:
    """Asymmetric integers between the smallest and largest channel of each token and head; float16 step and offset.

    The plain round-to-nearest cache that peers are compared with, e.g. in KIVI (arXiv 2402.02750, section 3).
    """

    name = "int_per_token"

    def __init__(self, bits: int, head_dim: int, v_head_dim: int):
        self.k_bits = self.v_bits = bits
        self.bytes_per_token_head = (head_dim + v_head_dim) * bits / 8 + 2 * 4
        self._sizes = head_dim * bits / 8 + 4, v_head_dim * bits / 8 + 4

    def sizes(self, tokens: int) -> tuple[float, float]:
        return self._sizes

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        low = x.amin(-1, keepdim=True).half().float()
        top = (1 << int(self.k_bits)) - 1
        step = ((x.amax(-1, keepdim=True) - low) / top).half().float().clamp(min=2.0**-24)
        return low + ((x - low) / step).round().clamp(0, top) * step

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._round(k), self._round(v)
