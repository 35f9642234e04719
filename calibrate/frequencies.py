"""How fast each RoPE block rotates, read off the cosines and sines that a model multiplies with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .rope import RopeBlocks

TOLERANCE = 0.03  # radians: cosines and sines in bfloat16 are off by 0.004
SAMPLES = 64  # positions at which an angle is compared with its frequency


def _wrap(angle: torch.Tensor) -> torch.Tensor:
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def frequencies(turn: Callable[[torch.Tensor], torch.Tensor], positions: int) -> torch.Tensor | None:
    """Radians a position of each block, float64; None where angles are no multiple of the position.

    turn: positions ``[N]`` int64 to cosines and sines ``[N, 2, blocks]``, of any common length; positions: how many
    there are. From position 1 on, each doubling halves the error, so rounded cosines and sines are good enough.
    """

    def angles(where: list[int]) -> torch.Tensor:
        cos, sin = turn(torch.tensor(where)).double().cpu().unbind(1)
        return torch.atan2(sin, cos)

    doubling = [1 << i for i in range((positions - 1).bit_length()) if 1 << i < positions]
    if not doubling:
        return None
    theta, *further = angles(doubling)
    for position, found in zip(doubling[1:], further, strict=True):
        theta = theta + _wrap(found - position * theta) / position
    where = sorted({i * (positions - 1) // SAMPLES for i in range(SAMPLES + 1)})
    gap = _wrap(angles(where) - torch.tensor(where, dtype=torch.float64)[:, None] * theta)
    return theta if bool((gap.abs() < TOLERANCE).all()) else None  # False for NaN


def of_blocks(rotated: torch.Tensor | None, blocks: RopeBlocks) -> torch.Tensor | None:
    """``[num_blocks]``: frequencies of the rotated blocks, zeros for channels without RoPE."""
    if not blocks.rotary_dim:
        return torch.zeros(blocks.num_blocks, dtype=torch.float64)
    if rotated is None or rotated.shape != (blocks.rotary_dim // 2,):
        return None
    return torch.nn.functional.pad(rotated, (0, blocks.num_blocks - len(rotated)))
