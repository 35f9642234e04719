"""From moments to a table: order, balance, gains and rotations for the widths an allocator chose."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..kernels.format.page_mean import SLOW
from .allocate import Allocator, block_budget
from .moments import Moments
from .rope import RopeBlocks, check_head_dim
from .segments import rule_of
from .table import AllocationTable, TableHeader

ROTATION_SEED = 0x6774
PAGE = 512  # positions: a mean per page and query is next to nothing to compute, and most slow blocks are slow in it
#: In the name of a cached table. Raise it when moments or what is here give another table for the same widths, so that
#: tables of earlier builds are made anew (see allocate.ALLOCATOR_VERSION for the widths).
BUILDER_VERSION = 3
#: Blocks below this share of their head's mean energy count as so much; heads, of the model's (see _floored).
FLOOR, HEAD_FLOOR = 1e-6, 1e-3
V_GAIN_FLOOR = 1e-3  # of the mean over all heads: format.codec.V_SCALE_MAX of it is the mean again


def haar_rotation(n: int, seed: int = ROTATION_SEED) -> torch.Tensor:
    """A seeded Haar-distributed orthogonal matrix ``[n, n]`` float64 (QR of a Gaussian, signs fixed)."""
    generator = torch.Generator().manual_seed(seed * 1000 + n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * torch.sign(torch.diagonal(r))


def check_budget(name: str, bits: float, blocks: int) -> None:
    """ValueError unless 1 <= bits <= 8 and it is a number."""
    if not (isinstance(bits, (int, float)) and 1 <= bits <= 8):  # NaN fails every comparison
        raise ValueError(f"{name} = {bits}: an average between 1 and 8 bits is supported, e.g. 2, 2.5, 3 or 4")
    assert block_budget(blocks, bits) >= blocks


def _floored(energy: torch.Tensor) -> torch.Tensor:
    """Block energies ``[layers, heads, blocks]`` that may be divided by: what calibration hardly saw may come alive.

    Of a live head a block counts as FLOOR of the mean block, of a dead one as FLOOR * HEAD_FLOOR of the model's: as
    loud as that, its keys are 3e4 times their gain, which a float16 scale holds.
    """
    head = energy.mean(-1, keepdim=True)
    return energy.clamp(min=1e-30).maximum(FLOOR * head.maximum(HEAD_FLOOR * energy.mean()))


def page_means(moments: Moments, page: int) -> torch.Tensor:
    """``[layers, heads, blocks, 2]`` float64: the mean key of slow blocks, at the first position of a page.

    Slow is what rotates by at most SLOW within a page, so that one mean serves all of it: the mean key averaged over
    the page's positions. Zero in other blocks, and in layers without frequencies.
    """
    if moments.theta is None or moments.mean is None:
        raise ValueError("moments: taken without frequencies and means")
    steps = torch.arange(page, dtype=torch.float64)[:, None, None] * moments.theta.nan_to_num()
    turn = torch.complex(steps.cos().mean(0), steps.sin().mean(0))[:, None]
    slow = (moments.theta * page <= SLOW)[:, None, :, None]  # False for NaN
    return torch.view_as_real(torch.view_as_complex(moments.mean.contiguous()) * turn) * slow


def poured_as(table: AllocationTable) -> Allocator:
    """The rule of a table for other moments: each head keeps its widths, and with them its row, and its blocks are
    poured into these anew, by falling score."""
    rule = rule_of(table.header.allocator, table.header.granularity)
    if rule.name == "uniform":
        return rule
    t = table.tensors
    kept = t["widths"].gather(-1, t["order"].long())

    def widths(moments: Moments, bits: float) -> torch.Tensor:
        score = moments.q + moments.k if rule.name == "paper" else moments.q * moments.k
        order = score.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(kept).scatter(-1, order, kept)

    return replace(rule, widths=widths)


def build_table(
    moments: Moments,
    rope: list[RopeBlocks],
    *,
    k_bits: float,
    v_bits: float,
    allocator: str = "template",
    granularity: str = "segment",
    v_head_dim: int | None = None,
    model_id: str = "",
    config_hash: str = "",
    weights_hash: str = "",
    text_hash: str = "",
    seed: int = ROTATION_SEED,
    rule: Allocator | None = None,
    page: int = PAGE,
) -> AllocationTable:
    """Allocate bits and build the table. ``rope`` has one entry per layer.

    granularity: "segment", or "block" for ``paper`` and ``product`` (see :mod:`.segments`). rule: in place of the
    allocator's own, for experiments. page: positions of a page of keys' means, where the rule has them and the moments
    know them of any layer. Raises ValueError for an unknown allocator or granularity, a budget outside 1..8
    bits, an unsupported head_dim, or segments that do not fit it.
    """
    rule = rule or rule_of(allocator, granularity)
    layers, heads, blocks = moments.k.shape
    head_dim = check_head_dim(2 * blocks)
    v_head_dim = check_head_dim(v_head_dim or head_dim)
    check_budget("k_bits", k_bits, blocks)
    check_budget("v_bits", v_bits, v_head_dim // 2)

    energy, mean, theta = moments.k, None, moments.theta
    if rule.means and moments.mean is not None and theta is not None and not theta.isnan().all():
        mean = page_means(moments, page)
        energy = energy - mean.square().sum(-1)
    q, k = _floored(moments.q), _floored(energy)
    safe = Moments(q, k, moments.v, moments.tokens)

    widths = rule.widths(safe, k_bits)
    score = q * k
    # Widest first; within a width by falling product score. Uniform keeps the model's own order.
    by_score = score.argsort(dim=-1, descending=True, stable=True)
    rank = widths.gather(-1, by_score).long().argsort(dim=-1, descending=True, stable=True)
    order = by_score.gather(-1, rank)
    if allocator == "uniform":
        order = torch.arange(blocks).expand_as(order).contiguous()
    balance = (q / k) ** 0.25 if rule.balance else torch.ones_like(q)

    # Energy per channel in stored order, key and query, after balancing.
    k_channel = (k * balance**2 / 2).gather(-1, order).repeat_interleave(2, -1)
    q_channel = (q / balance**2 / 2).gather(-1, order).repeat_interleave(2, -1)
    stored = widths.gather(-1, order).repeat_interleave(2, -1)
    gain = torch.ones_like(k_channel)
    weight = torch.ones_like(k_channel)
    norm_index = torch.zeros_like(stored)
    group = torch.zeros_like(stored)
    sizes: set[int] = set()
    for layer in range(layers):
        for head in range(heads):
            row = stored[layer, head]
            starts = [0, *(torch.nonzero(row[1:] != row[:-1])[:, 0] + 1).tolist(), head_dim]
            if allocator == "uniform":
                starts = [0, head_dim]  # one rotation over the head, also when a fraction splits the widths
            for g, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
                gain[layer, head, a:b] = k_channel[layer, head, a:b].mean().sqrt()
                weight[layer, head, a:b] = q_channel[layer, head, a:b].mean() * gain[layer, head, a:b] ** 2
                norm_index[layer, head, a:b] = g if rule.norms == "group" else 0
                group[layer, head, a:b] = g
                sizes.add(b - a)
    weight = weight / weight.mean(-1, keepdim=True)

    v_gain = (moments.v / v_head_dim).clamp(min=1e-30).sqrt()
    v_gain = v_gain.maximum(V_GAIN_FLOOR * v_gain.mean())
    tensors = {
        "widths": widths,
        "order": order.to(torch.int16),
        "norm_index": norm_index,
        "group": group,
        "balance": balance.float(),
        "k_gain": gain.float(),
        "k_weight": weight.float(),
        "v_gain": v_gain.float(),
        "v_rotation": haar_rotation(v_head_dim, seed + 1).float(),
        **{f"rotation.{n}": haar_rotation(n, seed).float() for n in sorted(sizes)},
    }
    if mean is not None and theta is not None:
        tensors |= {"mean": mean.float(), "theta": theta.nan_to_num()}
    header = TableHeader(
        model_id=model_id,
        config_hash=config_hash,
        weights_hash=weights_hash,
        text_hash=text_hash,
        tokens=moments.tokens,
        k_bits=float(k_bits),
        v_bits=float(v_bits),
        allocator=allocator,
        granularity=granularity,
        scale_rule=rule.scale_rule,
        scale_search=rule.scale_search,
        layers=layers,
        kv_heads=heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        rope=tuple((r.rotary_dim, r.neox) for r in rope),
        page=0 if mean is None else page,
    )
    table = AllocationTable(header, tensors)
    if mean is not None and not all(table.row_layout(i).in_columns for i in range(layers)):
        # Rows of any layout have no room for a flag.
        return build_table(
            replace(moments, mean=None),
            rope,
            k_bits=k_bits,
            v_bits=v_bits,
            allocator=allocator,
            granularity=granularity,
            v_head_dim=v_head_dim,
            model_id=model_id,
            config_hash=config_hash,
            weights_hash=weights_hash,
            text_hash=text_hash,
            seed=seed,
            rule=rule,
        )
    return table.sealed()
