"""Keys and values coded by any linear transform, in any frame of positions: what an ablation puts together.

A :class:`Coder` is the codec of the keys or the values of one layer, a :class:`Side` that of all layers, a
:class:`Cache` both sides. Codes and scales are those of kernels.reference; they are not packed into bytes on the way,
which loses nothing, so bytes are counted by the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.format.codec import LayerCodec
from sglang_blockgtq.kernels.format.layout import NORM_BYTES, CodeLayout
from sglang_blockgtq.kernels.format.page_mean import PageMean, residual

from .model import rotate

EXACT_BYTES = 2  # of a channel that is not coded: it counts as 16 bits


@dataclass(frozen=True)
class Coder:
    """Codec of the keys, or values, of one layer: H heads of D channels.

    layouts: one for each head. enter, leave ``[H, D, D]``: to stored channels and back, ``leave[h].T @ enter[h] = 1``.
    weight ``[H, D]``: of the stored channels in the scale rule, None for equal weights. mean: of keys, which are coded
    less their page's mean where that is better.
    """

    layouts: tuple[CodeLayout, ...]
    enter: torch.Tensor
    leave: torch.Tensor
    weight: torch.Tensor | None
    scale_rule: str
    scale_search: tuple[float, ...]
    mean: PageMean | None = None

    @classmethod
    def of_keys(cls, codec: LayerCodec) -> Coder:
        rules = codec.scale_rule, codec.scale_search
        return cls(tuple(codec.layout.k), codec.k_in, codec.q_in, codec.k_weight, *rules, codec.mean)

    @classmethod
    def of_values(cls, codec: LayerCodec) -> Coder:
        layouts = (codec.layout.v,) * codec.layout.heads
        leave = codec.v_out.transpose(1, 2).contiguous()
        return cls(layouts, codec.v_in, leave, None, codec.scale_rule, codec.scale_search)

    @property
    def size(self) -> int:
        """Bytes of one vector, scales included; the largest head's, as rows have it."""
        return max(l.code_bytes for l in self.layouts) + NORM_BYTES * max(l.num_norms for l in self.layouts)

    def to(self, device: torch.device | str) -> Coder:
        kinds = torch.Tensor, PageMean
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), kinds)}
        return replace(self, **moved)

    def round_trip(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """``x [T, H, D]`` as it is read back, float32. positions ``[T]``: the tokens', which a page's mean needs."""
        y = self._into(x)
        if self.mean is not None:
            mean = self.mean.at(positions)
            y, flags = residual(y, self._into(mean), self.weight)
        if all(layout == self.layouts[0] for layout in self.layouts) and self.layouts[0].num_norms == 1:
            read = self._code(y, self.layouts[0], self.weight)
        else:
            weights = [None] * y.shape[1] if self.weight is None else self.weight
            heads = zip(y.unbind(1), self.layouts, weights, strict=True)
            read = torch.stack([self._code(*head) for head in heads], 1)
        out = torch.einsum("the,hed->thd", read, self.leave)
        return out if self.mean is None else torch.where(flags[..., None], mean - out, out)

    def _into(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thd,hed->the", x.double(), self.enter.double()).float()

    def cost(self, error: torch.Tensor) -> torch.Tensor:
        """``[T, H]``: what errors ``[T, H, D]`` weigh, in stored channels."""
        square = torch.einsum("thd,hed->the", error, self.enter).square()
        return (square if self.weight is None else square * self.weight).sum(-1)

    def _code(self, y: torch.Tensor, layout: CodeLayout, weight: torch.Tensor | None) -> torch.Tensor:
        codes, scales = reference.quantize(y, layout, self.scale_rule, self.scale_search, weight)
        return reference.dequantize(codes, scales, layout)


@dataclass(frozen=True)
class Frame:
    """How far a key is rotated back before it is coded, and on again after it is read.

    page: 1 rotates by the key's own position, which is the frame before RoPE; N by the first position of its page of N
    tokens; 0 not at all. Queries follow with one rotation for each page. rope, inv_freq: of the layers.
    """

    page: int
    rope: Sequence[RopeBlocks]
    inv_freq: torch.Tensor

    def rotate(self, layer: int, x: torch.Tensor, positions: torch.Tensor | int) -> torch.Tensor:
        return rotate(x, self.rope[layer], self.inv_freq, positions)

    def origin(self, positions: torch.Tensor) -> torch.Tensor:
        """By how much keys at ``positions [T]`` are rotated back."""
        return positions - positions % self.page if self.page else torch.zeros_like(positions)


@dataclass(frozen=True)
class Side:
    """Keys or values of all layers.

    bits: nominal, for the record. coders: one for each layer, None where nothing is coded.
    frame: of keys; None for values. mean ``[layers, H, D]``: static, taken off before coding and added again after;
    that of keys is their mean before RoPE, so it is rotated to each key's position first. by_token: whether it is, is
    chosen for each vector and head, which the sign of its scale can tell without a bit more.
    """

    bits: float
    coders: Sequence[Coder | None]
    dim: int
    frame: Frame | None = None
    mean: torch.Tensor | None = None
    by_token: bool = False

    def __post_init__(self) -> None:
        if (self.frame or self.mean is not None) and any(coder and coder.mean for coder in self.coders):
            raise ValueError("coders with page means of their own stay in no other frame and have no other mean")

    @property
    def sizes(self) -> list[int]:
        """Bytes of one vector in each layer."""
        return [EXACT_BYTES * self.dim if coder is None else coder.size for coder in self.coders]

    @property
    def exact(self) -> bool:
        return all(coder is None for coder in self.coders)

    def round_trip(self, layer: int, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        """``x [T, H, D]`` of the tokens at positions ``first, first + 1, ...`` as they are read back."""
        coder = self.coders[layer]
        if coder is None:
            return x
        positions = torch.arange(first, first + len(x), device=x.device)
        mean = None if self.mean is None else self.mean[layer].expand_as(x)
        if self.frame is None:
            return coder.round_trip(x, positions) if mean is None else self._read(coder, x, mean)
        origin = self.frame.origin(positions)
        if mean is not None:
            mean = self.frame.rotate(layer, mean, positions - origin)
        if not self.frame.page:
            return self._read(coder, x, mean)
        return self.frame.rotate(layer, self._read(coder, self.frame.rotate(layer, x, -origin), mean), origin)

    def _read(self, coder: Coder, x: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
        """In the frame's coordinates."""
        if mean is None:
            return coder.round_trip(x)
        less = coder.round_trip(x - mean) + mean
        if not self.by_token:
            return less
        plain = coder.round_trip(x)
        better = coder.cost(plain - x) < coder.cost(less - x)
        return torch.where(better[..., None], plain, less)


def mixed(sides: Sequence[Side]) -> Side:
    """Layer i of the i-th side. All in one frame."""
    first = sides[0]
    coders = [side.coders[layer] for layer, side in enumerate(sides)]
    bits = sum(side.bits for side in sides) / len(sides)
    return replace(first, bits=bits, coders=coders)


class Cache:
    """A method (see methods.Method) made of two sides; the first ``sink`` tokens of a sequence may stay exact."""

    def __init__(self, name: str, keys: Side, values: Side, sink: int = 0):
        self.name, self.keys, self.values, self.sink = name, keys, values, sink
        self.k_bits, self.v_bits = keys.bits, values.bits
        self.bytes_per_token_head = sum(self.sizes(1 << 30))  # of a sequence without end

    def sizes(self, tokens: int) -> tuple[float, float]:
        """Bytes of a key and of a value: codes and scales, mean over layers and over a sequence of ``tokens``."""
        share = min(self.sink, tokens) / tokens
        coded = (sum(side.sizes) / len(side.sizes) for side in (self.keys, self.values))
        exact = (EXACT_BYTES * side.dim for side in (self.keys, self.values))
        key, value = (share * e + (1 - share) * c for e, c in zip(exact, coded, strict=True))
        return key, value

    def read_keys(self, layer: int, k: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Keys of a sequence that starts at position ``first``."""
        return torch.cat([k[: self.sink], self.keys.round_trip(layer, k, first)[self.sink :]])

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        read = self.values.round_trip(layer, v)
        return self.read_keys(layer, k, first), torch.cat([v[: self.sink], read[self.sink :]])
