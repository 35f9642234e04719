"""Whether a model rotates its channels as it is thought to: seen from the keys of one token at many positions.

One token repeated gives every position the same hidden state in all layers, so its keys are one vector rotated by RoPE:
the energy of a true block is the same at all positions, and rotated back by true frequencies so is the block. Layers
with a state (linear attention, convolutions) give each repetition another hidden state. There a few tokens are read
several times, each time from another position on: attention sees distances and states see no positions, so the keys
differ by RoPE alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .model import ModelError
from .rope import RopeBlocks

logger = logging.getLogger(__name__)

PROBE_TOKENS = 48
SHIFTED_TOKENS, SHIFTS = 16, 7  # tokens that are read again; of the positions, each that many is one to read them from
PROBE_STRIDE = 7  # in positions; far enough for most blocks to turn
DRIFT_LIMIT = 0.1  # of keys rotated back; bf16 rounding gives 0.01, a wrong frequency about 1
PROBE_LIMIT = 0.15  # mean swing: bf16 rounding gives 0.02, a wrong pairing about 1


def probe_positions(context: int) -> list[int]:
    """Positions of the repeated token, within a model's context length."""
    stride = max(1, min(PROBE_STRIDE, (context - 1) // (PROBE_TOKENS - 1)))
    near = range(0, PROBE_TOKENS * stride, stride)
    return sorted({*near, *(far for i in range(1, 5) if (far := i * (context - 1) // 4) > near[-1])})


class Probe:
    """passes: token ids and positions of each pass over the model. positions: where the same keys are seen."""

    def __init__(self, token: int, context: int, states: bool):
        """context: a model's length. states: whether it has layers with states."""
        self.states = states
        self.keys: dict[int, list[torch.Tensor]] = {}
        self.positions = probe_positions(context - SHIFTED_TOKENS)[::SHIFTS] if states else probe_positions(context)
        starts = [range(a, a + SHIFTED_TOKENS) for a in self.positions] if states else [self.positions]
        self.passes = [([token] * len(where), list(where)) for where in starts]

    def take(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys ``k [T, H, D]`` of the next pass; a token that is read again counts as a head.

        Returns what attention shall see: no values, or a sink's share, which positions change, would change the next
        layer's keys.
        """
        self.keys.setdefault(layer, []).append(k.flatten(0, 1)[None].clone() if self.states else k.clone())
        return k, torch.zeros_like(v)

    def found(self, layer: int, blocks: RopeBlocks, theta: torch.Tensor | None) -> tuple[float, float]:
        """:func:`swing` and :func:`drift` of one layer; zeros for one that has no keys."""
        if layer not in self.keys:
            return 0.0, 0.0
        k = torch.cat(self.keys[layer])
        return swing(k, blocks), drift(k, blocks, theta, self.positions)


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


def drift(k: torch.Tensor, blocks: RopeBlocks, theta: torch.Tensor | None, positions: Sequence[int]) -> float:
    """How far keys ``[T, H, D]`` at ``positions``, rotated back by theta, are from the first: rms over its size.

    Infinite without theta.
    """
    if theta is None:
        return float("inf")
    pairs = torch.view_as_complex(k.double()[..., blocks.channels().to(k.device)].contiguous())
    where = torch.tensor(positions, dtype=torch.float64, device=k.device)
    angle = where[:, None] * theta.to(k.device)
    back = pairs * torch.polar(torch.ones_like(angle), -angle)[:, None]
    return float(((back - back[0]).abs().square().mean() / back[0].abs().square().mean().clamp(min=1e-30)).sqrt())


def trusted(
    theta: Sequence[torch.Tensor | None],
    drifts: Sequence[float],
    rope: Sequence[RopeBlocks],
    mrope: bool = False,
) -> list[torch.Tensor | None]:
    """The frequencies of layers whose keys do rotate by them, None for others, with a warning that names those.

    mrope: whether the model has M-RoPE, which is why.
    """
    good = [t is not None and d <= DRIFT_LIMIT for t, d in zip(theta, drifts, strict=True)]
    if not all(good) and any(r.rotary_dim for r in rope):
        layers = [i for i, ok in enumerate(good) if not ok]
        logger.warning(
            "keys of layers %s do not rotate by one angle a position%s: they are coded without page means, which costs "
            "quality where keys have a bias",
            str(layers[:8])[:-1] + (", ...]" if len(layers) > 8 else "]"),
            " (M-RoPE)" if mrope else "",
        )
    return [t if ok else None for t, ok in zip(theta, good, strict=True)]
