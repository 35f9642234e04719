"""Bits by layer: what quantizing one layer costs the answer, and how a mean number of bytes is spent by that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .coder import Cache, Side
from .lab import Lab

PROBE_TOKENS = 1024  # of the calibration text


def measured_cost(lab: Lab, side: Side, values: bool = False) -> list[float]:
    """KL of the answer on the start of the calibration text when one layer alone is coded, as ``side`` has it."""
    exact = lab.exact()
    ids = lab.calibration()[0][:PROBE_TOKENS]
    out = []
    for layer in range(len(side.coders)):
        coders = [coder if i == layer else None for i, coder in enumerate(side.coders)]
        alone = replace(side, coders=coders)
        out.append(lab.answers(Cache("", exact, alone) if values else Cache("", alone, exact), [ids]).kl_final)
    return out


def cost_at(probe: Sequence[float], at: float, bits: Sequence[float]) -> list[dict[float, float]]:
    """Cost of each layer at other widths, from that at ``at`` bits: four times less for each bit."""
    return [{b: cost * 4.0 ** (at - b) for b in bits} for cost in probe]


def spend(
    costs: Sequence[Mapping[float, float]],
    sizes: Mapping[float, float],
    total: float,
    fixed: Mapping[int, float] | None = None,
) -> list[float]:
    """Width of each of ``costs``: least sum of costs within ``total`` bytes, by steepest descent from the narrowest.

    costs: of each part at each width; sizes: bytes at each width; fixed: widths that are given. Raises ValueError where
    the narrowest do not fit.
    """
    fixed = fixed or {}
    widths = sorted(sizes)
    chosen = [fixed.get(i, widths[0]) for i in range(len(costs))]
    left = total - sum(sizes[b] for b in chosen)
    if left < -1e-9:
        raise ValueError(f"{total:g} bytes: {total - left:g} are taken at least")
    while True:
        best, gain = None, 0.0
        for i, cost in enumerate(costs):
            if i in fixed:
                continue
            for wide in widths:
                extra = sizes[wide] - sizes[chosen[i]]
                if 0 < extra <= left + 1e-9 and (cost[chosen[i]] - cost[wide]) / extra > gain:
                    best, gain = (i, wide), (cost[chosen[i]] - cost[wide]) / extra
        if best is None:
            return chosen
        left -= sizes[best[1]] - sizes[chosen[best[0]]]
        chosen[best[0]] = best[1]
