"""Whether a model pairs its channels as it is thought to: seen from the keys of one token at many positions.

One token repeated gives every position the same hidden state in all layers, so its keys are one vector turned by RoPE,
and the energy of a true block is the same at all positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .model import ModelError
from .rope import RopeBlocks

PROBE_TOKENS = 48
PROBE_STRIDE = 7  # in positions; far enough for most blocks to turn
PROBE_LIMIT = 0.15  # mean swing: bf16 rounding gives 0.02, a wrong pairing about 1


def probe_positions(context: int) -> list[int]:
    """Positions of the repeated token, within a model's context length."""
    stride = max(1, min(PROBE_STRIDE, (context - 1) // (PROBE_TOKENS - 1)))
    return list(range(0, PROBE_TOKENS * stride, stride))


def swing(k: torch.Tensor, blocks: RopeBlocks) -> float:
    """How far a block's energy in keys ``[T, H, D]`` ranges over positions, over its mean; mean of heads and blocks."""
    energy = k.float().square()[..., blocks.channels().to(k.device)].sum(-1)
    return float(((energy.amax(0) - energy.amin(0)) / energy.mean(0).clamp(min=1e-30)).mean())


def check_swings(swings: Sequence[float], rope: Sequence[RopeBlocks]) -> None:
    """ModelError naming the first layer whose :func:`swing` shows another pairing than ``rope`` has for it."""
    for layer, (found, r) in enumerate(zip(swings, rope, strict=True)):
        if found > PROBE_LIMIT:
            raise ModelError(
                f"layer {layer}: block energies change with position under rotary_dim {r.rotary_dim}, "
                f"{'neox' if r.neox else 'interleaved'} pairing: the model pairs its channels otherwise"
            )
