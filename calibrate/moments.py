"""Second moments of post-RoPE queries and keys per RoPE block, gathered in one pass.

A rotation by RoPE keeps the energy of a two-channel block, so moments taken after RoPE hold
at every position, however long the served context is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rope import RopeBlocks


@dataclass
class Moments:
    """Mean energies per layer and KV head.

    q, k ``[layers, heads, blocks]``: ``E|q_i|^2`` over tokens and all query heads of the KV head's
    group, and ``E|k_i|^2``. v ``[layers, heads]``: ``E|v|^2``. All float64.
    tokens: calibration tokens that went in.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tokens: int

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

    def __init__(self, layers: int, heads: int, blocks: list[RopeBlocks]):
        self.layers, self.heads, self.blocks = layers, heads, blocks
        self.num_blocks = blocks[0].num_blocks
        # per layer and head: q blocks, k blocks, v, number of q samples, number of k samples
        self.flat = torch.zeros(layers, heads, 2 * self.num_blocks + 3, dtype=torch.float64)
        self._pairs = [b.channels() for b in blocks]

    def add(self, layer: int, first_head: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """q ``[T, Hq, D]``, k ``[T, H, D]``, v ``[T, H, Dv]`` of heads ``first_head .. first_head + H``."""
        n, heads = self.num_blocks, k.shape[1]
        group = q.shape[1] // heads
        if group * heads != q.shape[1]:
            raise ValueError(f"{q.shape[1]} query heads are not a multiple of {heads} KV heads")
        pairs = self._pairs[layer].to(k.device)
        q_energy = q.double().square()[..., pairs].sum(-1).unflatten(1, (heads, group)).sum((0, 2))
        k_energy = k.double().square()[..., pairs].sum(-1).sum(0)
        v_energy = v.double().square().sum((0, 2))
        part = torch.cat(
            [
                q_energy,
                k_energy,
                v_energy[:, None],
                torch.full_like(v_energy[:, None], q.shape[0] * group),
                torch.full_like(v_energy[:, None], k.shape[0]),
            ],
            dim=1,
        )
        self.flat[layer, first_head : first_head + heads] += part.to(self.flat.device)
        assert part.shape[1] == 2 * n + 3

    def mean(self, tokens: int) -> Moments:
        """Divide by the counts. ValueError where a layer or head was not seen, or had values that are not finite."""
        n = self.num_blocks
        q_count, k_count = self.flat[..., -2:-1], self.flat[..., -1:]
        if bool((k_count == 0).any()):
            missing = (k_count[..., 0] == 0).nonzero().tolist()
            raise ValueError(f"no calibration data for (layer, KV head) {missing[:8]}")
        # Not found out in add(): ranks would not agree there, and wait for the one that stopped.
        if bool((broken := ~torch.isfinite(self.flat).all(-1).all(-1)).any()):
            layer = int(broken.nonzero()[0])
            raise ValueError(f"layer {layer}: queries, keys or values are not finite during calibration")
        return Moments(
            q=self.flat[..., :n] / q_count,
            k=self.flat[..., n : 2 * n] / k_count,
            v=self.flat[..., 2 * n] / k_count[..., 0],
            tokens=tokens,
        )
