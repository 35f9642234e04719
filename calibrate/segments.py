"""``paper`` and ``product`` by segments: the same scores and the same greedy rule, for whole segments of 16 channels.

A width for each RoPE block, as the paper has it, leaves every head with a layout of its own, which only kernels that
take the layout as data can read. Here the blocks of a head are ranked by score, cut into runs of 8 (a segment), and
bits are given to runs. The widths that come out are then mapped to at most four templates for the whole model that lie
in columns (kernels.format.columns): the fast kernels have a loop for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..kernels.device.tables import MAX_TEMPLATES
from ..kernels.format.codebook import MAX_BITS, MIN_BITS, distortion
from ..kernels.format.codec import SCALE_SEARCH
from ..kernels.format.columns import COLUMNS, columns_of
from .allocate import (
    ALLOCATORS,
    PAPER_RATE,
    TEMPLATE_UNITS,
    Allocator,
    block_budget,
    greedy,
    template_candidates,
    template_error,
)
from .moments import Moments

GRANULARITIES = ("block", "segment")
SEGMENT_BLOCKS = COLUMNS // 2


def _flat(segments: int, budget: int) -> list[tuple[int, ...]]:
    """The flattest widths, if they lie in columns."""
    low, wide = divmod(budget, segments)
    flat = (low + 1,) * wide + (low,) * (segments - wide)
    return [flat] if columns_of(flat) is not None else []


def _shaped(segments: int, budget: int) -> list[tuple[int, ...]]:
    """Those that ``template`` chooses from."""
    units = max(n for n in range(1, TEMPLATE_UNITS + 1) if segments % n == 0)
    size = segments // units
    if budget % size:
        return []
    return [tuple(w for w in c for _ in range(size)) for c in template_candidates(budget // size, units, size)]


def _fits(segments: int, budget: int) -> bool:
    """Whether there are widths in columns."""
    return bool(_flat(segments, budget) or _shaped(segments, budget))


def check_segments(head_dim: int, bits: float) -> int:
    """Bits in each column of a key of ``head_dim`` channels at an average of ``bits``.

    Raises ValueError, with what works, where there are no whole segments or no widths of segments that lie in columns.
    """
    option, instead = "--kv-quant-granularity segment", "--kv-quant-granularity block takes any"
    if head_dim % COLUMNS:
        raise ValueError(f"{option}: head_dim {head_dim} is no multiple of a segment's {COLUMNS} channels; {instead}")
    segments = head_dim // COLUMNS
    budget = block_budget(segments, bits)
    if not _fits(segments, budget):
        below, above = range(budget - 1, MIN_BITS * segments - 1, -1), range(budget + 1, MAX_BITS * segments + 1)
        near = [next((b for b in side if _fits(segments, b)), None) for side in (below, above)]
        # Rounded up: a third of a bit less would be a whole one less to spend.
        averages = " and ".join(f"{math.ceil(1e4 * b / segments) / 1e4:g}" for b in near if b is not None)
        raise ValueError(
            f"{option}: --kv-quant-k-bits {bits:g} gives the {segments} segments of head_dim {head_dim} {budget} bits, "
            f"which fill no 16-bit words; {averages} work, or {instead}"
        )
    return budget


def energy_error(ranked: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """The paper's surrogate ``sum(score * 4^-b)`` over ranked blocks ``[..., blocks]``."""
    return (ranked * 4.0 ** -torch.tensor(widths, dtype=ranked.dtype)).sum(-1)


def choose_templates(error: torch.Tensor, most: int = MAX_TEMPLATES) -> list[int]:
    """Indices of at most ``most`` candidates, given the error ``[candidates, layers, heads]`` each makes in each head.

    A head takes whichever of them suits it best; judged as ``template`` is, by the mean of that over all heads plus the
    worst layer's. Added one after another, then exchanged one for one while that helps. Deterministic.
    """

    def costs(best: torch.Tensor) -> torch.Tensor:  # of each candidate beside those whose least error is ``best``
        layers = torch.minimum(error, best).mean(-1)
        return layers.mean(-1) + layers.amax(-1)

    def least(chosen: list[int]) -> torch.Tensor:
        return error[chosen].amin(0) if chosen else torch.full_like(error[0], torch.inf)

    def first_least(cost: torch.Tensor) -> tuple[int, float]:
        return int((cost == cost.min()).nonzero()[0]), float(cost.min())

    chosen: list[int] = []
    cost = float("inf")
    while len(chosen) < most:
        index, new = first_least(costs(least(chosen)))
        if not new < cost:
            break
        chosen, cost = [*chosen, index], new
    improved = True
    while improved:
        improved = False
        for i in range(len(chosen)):
            others = chosen[:i] + chosen[i + 1 :]
            index, new = first_least(costs(least(others)))
            if new < cost * (1 - 1e-12):
                chosen, cost, improved = [*others[:i], index, *others[i:]], new, True
    return sorted(chosen)


def _by_segments(
    moments: Moments,
    bits: float,
    score: torch.Tensor,
    segment_score: Callable[[torch.Tensor], torch.Tensor],
    rate: list[float],
    expected_error: Callable[[torch.Tensor, list[int]], torch.Tensor],
) -> torch.Tensor:
    """Widths ``[layers, heads, blocks]``. segment_score: of ranked blocks ``[..., segments, 8]``, for each segment."""
    blocks = score.shape[-1]
    budget, segments = check_segments(2 * blocks, bits), blocks // SEGMENT_BLOCKS
    order = score.argsort(dim=-1, descending=True, stable=True)
    ranked = score.gather(-1, order).double()
    wanted = greedy(segment_score(ranked.unflatten(-1, (segments, SEGMENT_BLOCKS))).flatten(0, 1), budget, rate)
    occurring = [w for w in map(tuple, wanted.unique(dim=0).tolist()) if columns_of(w) is not None]
    candidates = sorted({*occurring, *_flat(segments, budget), *_shaped(segments, budget)}, reverse=True)
    expanded = [[w for w in candidate for _ in range(SEGMENT_BLOCKS)] for candidate in candidates]
    base = expected_error(ranked, [budget // segments] * blocks).clamp(min=1e-300)
    error = torch.stack([expected_error(ranked, widths) / base for widths in expanded])
    chosen = choose_templates(error)
    templates = torch.tensor([expanded[i] for i in chosen], dtype=torch.uint8)
    best = error[chosen]
    kind = (best == best.amin(0)).to(torch.uint8).argmax(0)  # the first of equals
    return torch.zeros_like(order, dtype=torch.uint8).scatter(-1, order, templates[kind])


def _paper(moments: Moments, bits: float) -> torch.Tensor:
    """Score ``(E|q|^2 + E|k|^2) / 2``, a segment's the sum over its blocks, greedy on ``score * 4^-b``."""
    energy = ((moments.q + moments.k) / 2).float()
    return _by_segments(moments, bits, energy, lambda ranked: ranked.sum(-1), PAPER_RATE, energy_error)


def _product(moments: Moments, bits: float) -> torch.Tensor:
    """Score ``E|q|^2 * E|k|^2``. A segment is rotated as a whole: it costs the square of its blocks' summed roots."""
    rate = [distortion(b) for b in range(MAX_BITS + 1)]
    root = (moments.q * moments.k).sqrt()
    return _by_segments(moments, bits, root, lambda ranked: ranked.sum(-1).square(), rate, template_error)


#: One scale for all widths, as rows in columns have it; a token whose top blocks stand out would clip them unless
#: scales are searched.
SEGMENT_ALLOCATORS = {
    a.name: a
    for a in (
        Allocator("paper", _paper, norms="one", balance=False, scale_rule="norm", scale_search=SCALE_SEARCH),
        Allocator("product", _product, "one", True, "norm", SCALE_SEARCH, means=True),
    )
}


def rule_of(allocator: str, granularity: str = "segment") -> Allocator:
    """The rule of an allocator. ValueError for unknown names, and for blocks where only segments are given out."""
    if allocator not in ALLOCATORS:
        raise ValueError(f"allocator = {allocator}: choose one of {', '.join(ALLOCATORS)}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity = {granularity}: choose one of {', '.join(GRANULARITIES)}")
    if granularity == "segment":
        return SEGMENT_ALLOCATORS.get(allocator, ALLOCATORS[allocator])
    if allocator not in SEGMENT_ALLOCATORS:
        raise ValueError(
            f"--kv-quant-granularity block: has no effect on the allocator {allocator}; leave it out, "
            f"or choose one of {', '.join(SEGMENT_ALLOCATORS)}"
        )
    return ALLOCATORS[allocator]
