"""Bit allocators: how many bits each RoPE block of each KV head gets.

All return widths ``[layers, heads, blocks]`` uint8 (bits per channel of the block) that spend
``floor(blocks * bits)`` block-bits in every head, so all heads of a layer take the same code bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels.format.codebook import MAX_BITS, MIN_BITS, distortion
from ..kernels.format.codec import NO_SEARCH, SCALE_SEARCH
from ..kernels.format.columns import COLUMNS, columns_of
from .moments import Moments

#: In the name of a cached table. Raise it when a rule, here or in segments.py, gives other widths for the same moments.
ALLOCATOR_VERSION = 1
TEMPLATE_UNITS = 8  # a template divides the head in at most so many equal parts, of whole segments of 16 channels
TEMPLATE_WIDTHS = 4  # and uses at most so many different widths
#: The paper's distortion at each width. 4^-b - 4^-(b+1) = 3/4 * 4^-b: the same argmax.
PAPER_RATE = [4.0**-b for b in range(MAX_BITS + 1)]


@dataclass(frozen=True)
class Allocator:
    """A rule for widths, and the codec that belongs to it.

    norms: "one" scale per key, or one per width "group".
    balance: scale each block so that query and key have equal energy (the logit does not change).
    means: code keys less their page's mean (kernels.format.page_mean), and give out bits by what is left.
    """

    name: str
    widths: Callable[[Moments, float], torch.Tensor]
    norms: str
    balance: bool
    scale_rule: str
    scale_search: tuple[float, ...]
    means: bool = False


def block_budget(blocks: int, bits: float) -> int:
    """``floor(blocks * bits)``, the block-bits of one head."""
    return int(blocks * bits + 1e-9)


def _uniform(moments: Moments, bits: float) -> torch.Tensor:
    blocks = moments.k.shape[-1]
    low, wide = divmod(block_budget(blocks, bits), blocks)
    widths = torch.full(moments.k.shape, low, dtype=torch.uint8)
    widths[..., :wide] += 1  # fractional budgets: which blocks does not matter, all are rotated together
    return widths


def greedy(score: torch.Tensor, budget: int, rate: list[float]) -> torch.Tensor:
    """Give out one block-bit at a time to ``argmax score * (rate[b] - rate[b + 1])``, lowest index on ties.

    score ``[heads, blocks]``; rate[b] is the distortion at b bits, ``inf`` gain excluded by width limits.
    """
    heads, blocks = score.shape
    gain_of = torch.tensor([rate[b] - rate[b + 1] for b in range(MAX_BITS)] + [-torch.inf], dtype=torch.float64)
    widths = torch.full((heads, blocks), MIN_BITS, dtype=torch.int64)
    score = score.double()
    rows = torch.arange(heads)
    for _ in range(budget - MIN_BITS * blocks):
        gain = torch.where(widths < MAX_BITS, score * gain_of[widths].clamp(min=0), -torch.inf)
        best = gain.max(-1, keepdim=True).values
        first = (gain == best).to(torch.uint8).argmax(-1)  # argmax of a 0/1 row: its lowest index
        widths[rows, first] += 1
    return widths.to(torch.uint8)


def per_head(moments: Moments, bits: float, score: torch.Tensor, rate: list[float]) -> torch.Tensor:
    """:func:`greedy` for all layers and heads, at ``bits`` on average."""
    layers, heads, blocks = score.shape
    return greedy(score.flatten(0, 1), block_budget(blocks, bits), rate).view(layers, heads, blocks)


def _paper(moments: Moments, bits: float) -> torch.Tensor:
    """The paper's rule: score ``(E|q|^2 + E|k|^2) / 2``, greedy on ``score * 4^-b``."""
    # float32 scores, as the reference has.
    return per_head(moments, bits, ((moments.q + moments.k) / 2).float(), PAPER_RATE)


def _product(moments: Moments, bits: float) -> torch.Tensor:
    """Score ``E|q|^2 * E|k|^2``, the variance a block's error has in the logit, with the measured D(b)."""
    rate = [distortion(b) for b in range(MAX_BITS + 1)]
    return per_head(moments, bits, moments.q * moments.k, rate)


def template_candidates(budget: int, units: int = TEMPLATE_UNITS, segments: int = 1) -> list[tuple[int, ...]]:
    """Non-increasing widths of ``units`` equal parts of ``segments`` segments of 16 channels that spend ``budget``.

    Only those that fill 16-bit words without a gap (see kernels.format.columns), which the fast kernels read; all of
    them if ``segments`` is 0.
    """
    out: list[tuple[int, ...]] = []

    def extend(prefix: tuple[int, ...], left: int) -> None:
        room = units - len(prefix)
        if room == 0:
            if left == 0 and (
                segments == 0 or columns_of(tuple(w for w in prefix for _ in range(segments))) is not None
            ):
                out.append(prefix)
            return
        top = min(prefix[-1] if prefix else MAX_BITS, left - MIN_BITS * (room - 1))
        for width in range(top, MIN_BITS - 1, -1):
            if width * room < left or len(set(prefix + (width,))) > TEMPLATE_WIDTHS:
                break
            extend(prefix + (width,), left - width)

    extend((), budget)
    return out


def template_error(ranked: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Expected logit error variance of ranked blocks ``[..., blocks]`` (sqrt of the product score, falling).

    A group's rotation spreads its key energy and its error evenly over its channels, so with
    balanced q and k the variance is ``D(b) * (sum of roots)^2 / channels`` for each group.
    """
    total = torch.zeros_like(ranked[..., 0])
    start = 0
    for stop in range(1, len(widths) + 1):
        if stop == len(widths) or widths[stop] != widths[start]:
            roots = ranked[..., start:stop].sum(-1)
            total = total + distortion(widths[start]) * roots * roots / (2 * (stop - start))
            start = stop
    return total


def _spread_rest(widths: list[int], rest: int, ranked: torch.Tensor, base: torch.Tensor) -> list[int]:
    """Give ``rest`` more blocks one bit each, at the head of the group where that helps most."""
    for _ in range(rest):
        starts = [i for i, w in enumerate(widths) if (i == 0 or widths[i - 1] > w) and w < MAX_BITS]
        trials = [widths[:i] + [widths[i] + 1] + widths[i + 1 :] for i in starts]
        widths = min(trials, key=lambda t: float((template_error(ranked, t) / base).mean()))
    return widths


def template_widths(moments: Moments, bits: float) -> list[int]:
    """The multiset of block widths that fits the model best under the budget, widest first.

    Judged by the expected error relative to uniform widths: its mean over all heads and layers, and as much
    by the worst layer's, since one layer that loses more than uniform widths do is not made up for by the
    others. One template for all layers: one kernel binary.
    """
    blocks = moments.k.shape[-1]
    budget = block_budget(blocks, bits)
    ranked = (moments.q * moments.k).sqrt().sort(-1, descending=True).values
    floor_width = max(budget // blocks, MIN_BITS)
    base = template_error(ranked, [floor_width] * blocks).clamp(min=1e-300)
    segment = COLUMNS // 2
    if blocks % segment:
        return _spread_rest([MIN_BITS] * blocks, budget - MIN_BITS * blocks, ranked, base)
    segments = blocks // segment
    units = max(n for n in range(1, TEMPLATE_UNITS + 1) if segments % n == 0)
    # What does not make a bit more for a whole unit is not spent: it would cost the rows their columns.
    unit = blocks // units
    candidates = template_candidates(budget // unit, units, segments // units)
    if (
        not candidates
    ):  # 15 bits a column, as 80 channels at 3 bits have, fill no words: any widths then, in rows of any layout
        candidates = template_candidates(budget // unit, units, segments=0)

    def cost(widths: list[int]) -> float:
        layers = (template_error(ranked, widths) / base).mean(-1)
        return float(layers.mean() + layers.max())

    return min(([w for w in candidate for _ in range(unit)] for candidate in candidates), key=cost)


def _template(moments: Moments, bits: float) -> torch.Tensor:
    """Blocks ranked by the product score, poured into the fixed widths of the budget."""
    widths = torch.tensor(template_widths(moments, bits), dtype=torch.uint8)
    order = (moments.q * moments.k).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.uint8).scatter(-1, order, widths.expand(order.shape))


ALLOCATORS = {
    a.name: a
    for a in (
        Allocator("uniform", _uniform, norms="one", balance=False, scale_rule="norm", scale_search=NO_SEARCH),
        Allocator("paper", _paper, norms="group", balance=False, scale_rule="norm", scale_search=NO_SEARCH),
        Allocator("product", _product, norms="group", balance=True, scale_rule="norm", scale_search=SCALE_SEARCH),
        Allocator("template", _template, "one", True, "unbiased", SCALE_SEARCH, means=True),
    )
}
