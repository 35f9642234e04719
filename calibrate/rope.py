"""RoPE blocks: which two channels rotate together (method: Block-GTQ, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_DIMS = range(32, 257, 16)


class HeadDimError(ValueError):
    """A head dimension the codec does not support."""


def check_head_dim(head_dim: int) -> int:
    """``head_dim`` itself if the codec supports it, else HeadDimError."""
    if head_dim not in HEAD_DIMS:
        raise HeadDimError(f"head_dim {head_dim} is not supported; multiples of 16 from 32 to 256 are")
    return head_dim


@dataclass(frozen=True)
class RopeBlocks:
    """Pairing of the channels of a head.

    rotary_dim: how many leading channels are rotated; 0 for a model without RoPE.
    neox: True pairs (i, i + rotary_dim / 2), False (interleaved, GPT-J style) pairs (2i, 2i + 1).
    Channels from rotary_dim on are not rotated; they are taken in neighbouring pairs, so
    that allocation treats them as blocks too.
    """

    head_dim: int
    rotary_dim: int
    neox: bool = True

    def __post_init__(self) -> None:
        if self.head_dim % 2 or self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim {self.rotary_dim} of head_dim {self.head_dim}: both even, the first not larger"
            )

    @property
    def num_blocks(self) -> int:
        return self.head_dim // 2

    def channels(self) -> torch.Tensor:
        """Channel pairs ``[num_blocks, 2]`` int64, slowest-turning rotated block last, then the unrotated."""
        half = self.rotary_dim // 2
        if self.neox:
            first = torch.arange(half)
            rotated = torch.stack([first, first + half], -1)
        else:
            rotated = torch.arange(self.rotary_dim).view(-1, 2)
        rest = torch.arange(self.rotary_dim, self.head_dim).view(-1, 2)
        return torch.cat([rotated, rest])
