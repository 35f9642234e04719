"""Moments of post-RoPE queries and keys per RoPE block, gathered in one pass.

A rotation by RoPE keeps the energy of a two-channel block, so second moments taken after RoPE hold at every position,
however long the served context is. The mean is that of keys rotated back to position 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .rope import RopeBlocks


@dataclass
class Moments:
    """Means per layer and KV head.

    q, k ``[layers, heads, blocks]``: ``E|q_i|^2`` over tokens and all query heads of the KV head's
    group, and ``E|k_i|^2``. v ``[layers, heads]``: ``E|v|^2``. All float64.
    tokens: calibration tokens that went in.
    theta ``[layers, blocks]`` float64: how fast blocks rotate (see :mod:`.frequencies`); NaN for layers that do not
    say. mean ``[layers, heads, blocks, 2]`` float64: of keys rotated back to position 0, zero in such layers. None
    where they were not taken.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tokens: int
    theta: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    @property
    def layers(self) -> int:
        return self.k.shape[0]

    @property
    def heads(self) -> int:
        return self.k.shape[1]


class MomentSums:
    """Accumulates sums and counts, so that ranks and batches can be added up (all_reduce) at the end.

    ``flat`` is one float64 tensor holding everything; a rank fills only the layers and heads it has.
    """

    def __init__(
        self, layers: int, heads: int, blocks: list[RopeBlocks], theta: Sequence[torch.Tensor | None] | None = None
    ):
        """theta: frequencies of each layer's blocks, None for a layer that has none; None: no means are taken."""
        self.layers, self.heads, self.blocks = layers, heads, blocks
        self.num_blocks = blocks[0].num_blocks
        # per layer and head: q blocks, k blocks, the mean's two sides, v, number of q samples, number of k samples
        self.flat = torch.zeros(layers, heads, 4 * self.num_blocks + 3, dtype=torch.float64)
        self._pairs = [b.channels() for b in blocks]
        unknown = torch.full((self.num_blocks,), torch.nan, dtype=torch.float64)
        self.theta = None if theta is None else torch.stack([unknown if t is None else t for t in theta])

    def add(self, layer: int, first_head: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """A whole sequence: q ``[T, Hq, D]``, k ``[T, H, D]``, v ``[T, H, Dv]`` of heads ``first_head .. + H``."""
        heads = k.shape[1]
        group = q.shape[1] // heads
        if group * heads != q.shape[1]:
            raise ValueError(f"{q.shape[1]} query heads are not a multiple of {heads} KV heads")
        pairs = self._pairs[layer].to(k.device)
        q_energy = q.double().square()[..., pairs].sum(-1).unflatten(1, (heads, group)).sum((0, 2))
        blocks = k.double()[..., pairs]
        mean = torch.zeros(heads, self.num_blocks, 2, dtype=torch.float64, device=k.device)
        if self.theta is not None and not self.theta[layer].isnan().any():
            positions = torch.arange(len(k), dtype=torch.float64, device=k.device)
            angle = positions[:, None] * self.theta[layer].to(k.device)
            back = torch.polar(torch.ones_like(angle), -angle)
            mean = torch.view_as_real((torch.view_as_complex(blocks.contiguous()) * back[:, None]).sum(0))
        v_energy = v.double().square().sum((0, 2))
        part = torch.cat(
            [
                q_energy,
                blocks.square().sum((0, 3)),
                mean.flatten(1),
                v_energy[:, None],
                torch.full_like(v_energy[:, None], q.shape[0] * group),
                torch.full_like(v_energy[:, None], k.shape[0]),
            ],
            dim=1,
        )
        self.flat[layer, first_head : first_head + heads] += part.to(self.flat.device)

    def mean(self, tokens: int, layers: Sequence[int] | None = None) -> Moments:
        """Divide by the counts. layers: those that have keys, all by default; the moments have a row for each.

        ValueError where a layer or head was not seen, or had values that are not finite.
        """
        n, layers = self.num_blocks, list(range(self.layers) if layers is None else layers)
        flat = self.flat[layers]
        q_count, k_count = flat[..., -2:-1], flat[..., -1:]
        if bool((k_count == 0).any()):
            missing = [[layers[row], head] for row, head in (k_count[..., 0] == 0).nonzero().tolist()]
            raise ValueError(f"no calibration data for (layer, KV head) {missing[:8]}")
        # Not found out in add(): ranks would not agree there, and wait for the one that stopped.
        if bool((broken := ~torch.isfinite(flat).all(-1).all(-1)).any()):
            layer = layers[int(broken.nonzero()[0])]
            raise ValueError(f"layer {layer}: queries, keys or values are not finite during calibration")
        return Moments(
            q=flat[..., :n] / q_count,
            k=flat[..., n : 2 * n] / k_count,
            v=flat[..., 4 * n] / k_count[..., 0],
            tokens=tokens,
            theta=None if self.theta is None else self.theta[layers],
            mean=None if self.theta is None else (flat[..., 2 * n : 4 * n] / k_count).unflatten(-1, (n, 2)),
        )
