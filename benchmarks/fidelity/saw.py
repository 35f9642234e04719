"""SAW-INT4 (arXiv 2604.19157): integers by token behind a Hadamard rotation of blocks of channels.

The published recipe rotates keys only, in blocks of 16 channels, and keeps a scale and an offset for each token and
head. That these two take 16 bits each is a guess in its favour.
"""

from __future__ import annotations

import torch

from .hadamard import hadamard
from .methods import IntPerToken

BLOCK = 16  # channels of a block; the authors' scripts offer 64 and 128, too


def block_hadamard(dim: int, block: int) -> torch.Tensor:
    """``[dim, dim]`` float32, orthonormal: a Hadamard matrix for each run of ``block`` channels, no random signs.

    Raises ValueError where ``block`` does not divide ``dim``.
    """
    if dim % block:
        raise ValueError(f"block = {block}: it has to divide the {dim} channels of a head")
    eye = torch.eye(dim // block, dtype=torch.float64)
    return torch.kron(eye, hadamard(block) / block**0.5).float()


class SawInt4(IntPerToken):
    """block: channels of a block. values: whether they are rotated, too, in blocks as large."""

    def __init__(self, bits: int, head_dim: int, v_head_dim: int, block: int = BLOCK, values: bool = False):
        super().__init__(bits, head_dim, v_head_dim)
        self.name = "saw-int4-kv" if values else "saw-int4"
        self.k_rotation = block_hadamard(head_dim, block)
        self.v_rotation = block_hadamard(v_head_dim, block) if values else torch.eye(v_head_dim)

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turns = (self.k_rotation.to(k.device), self.v_rotation.to(v.device))
        key, value = (self._round(x @ turn.T) @ turn for x, turn in zip((k, v), turns, strict=True))
        return key, value
