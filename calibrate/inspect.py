"""A readable summary of an allocation table."""

from __future__ import annotations

from itertools import groupby

import torch

from ..kernels.format.codebook import MAX_BITS
from .segments import SEGMENT_ALLOCATORS
from .table import AllocationTable

LAYER_GROUPS = 4


def width_name(bits: int) -> str:
    """``1 bit``, ``2 bits``, ..."""
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def width_shares(table: AllocationTable) -> torch.Tensor:
    """Share of RoPE blocks at each width, ``[layers, 9]`` float64: column b is the share of b bits."""
    widths = table.tensors["widths"].flatten(1).long()
    counts = torch.nn.functional.one_hot(widths, MAX_BITS + 1).sum(1)
    return counts.double() / widths.shape[1]


def layer_groups(layers: int, groups: int = LAYER_GROUPS) -> list[range]:
    """Consecutive layers in up to ``groups`` parts of equal size (within one)."""
    count = min(groups, layers)
    edges = [layers * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def templates_of(table: AllocationTable) -> list[tuple[list[int], float]]:
    """Block widths, widest first, and the share of heads that have them; none where each head has its own."""
    ranked = table.tensors["widths"].flatten(0, 1).sort(-1, descending=True).values
    kinds, counts = ranked.unique(dim=0, return_counts=True)
    shares = zip(kinds.tolist(), (counts.double() / len(ranked)).tolist(), strict=True)
    return sorted(shares, reverse=True) if len(kinds) == 1 or table.header.granularity == "segment" else []


def _multiset(widths: list[int]) -> str:
    return ", ".join(f"{len(list(run))} blocks at {width_name(bits)}" for bits, run in groupby(widths))


def _rope(table: AllocationTable) -> str:
    kinds = []
    for rotary_dim, neox in dict.fromkeys(table.header.rope):
        count = table.header.rope.count((rotary_dim, neox))
        pairing = "neox" if neox else "interleaved"
        kinds.append(
            f"{pairing} pairs, {rotary_dim} channels ({count} layers)" if rotary_dim else f"none ({count} layers)"
        )
    return "; ".join(kinds)


def _histogram(table: AllocationTable) -> list[str]:
    shares = width_shares(table)
    used = [b for b in range(MAX_BITS + 1) if bool((shares[:, b] > 0).any())]
    rows = [("all layers", shares.mean(0))]
    groups = layer_groups(table.header.layers)
    if len(groups) > 1:
        names = [f"layers {g[0]}-{g[-1]}" if len(g) > 1 else f"layer {g[0]}" for g in groups]
        rows += [(name, shares[g[0] : g[-1] + 1].mean(0)) for name, g in zip(names, groups, strict=True)]
    lines = ["share of RoPE blocks by width", "  " + " " * 14 + "".join(f"{width_name(b):>8}" for b in used)]
    lines += [f"  {name:<14}" + "".join(f"{share[b]:>8.1%}" for b in used) for name, share in rows]
    return lines


def summary(table: AllocationTable) -> str:
    """What a table holds, as aligned plain text."""
    h = table.header
    row = table.row_layout(0)
    dense = h.bf16_bytes_per_token_head
    packed = table.bytes_per_token_head()
    per_token = sum(table.row_layout(i).row_bytes for i in range(h.layers))
    k_norms = sorted({table.row_layout(i).k_norms for i in range(h.layers)})
    templates = templates_of(table)
    named = [(f"{share:.0%} of heads: " if len(templates) > 1 else "") + _multiset(x) for x, share in templates]
    fields = [
        ("model", h.model_id or "unknown"),
        ("attention", f"{h.layers} layers, {h.kv_heads} KV heads, head_dim {h.head_dim} (values {h.v_head_dim})"),
        ("RoPE", _rope(table)),
        ("bits", f"K {h.k_bits:g}, V {h.v_bits:g} on average"),
        ("allocator", h.allocator + (f" by {h.granularity}s" if h.allocator in SEGMENT_ALLOCATORS else "")),
        ("scale rule", f"{h.scale_rule}, search over {', '.join(f'{s:g}' for s in h.scale_search)}"),
        *(("template", name) for name in named or ["none: widths differ from head to head"]),
        ("calibration", f"{h.tokens} tokens"),
        ("per token, head", f"{packed:g} bytes, {packed / dense:.1%} of bf16 ({dense} bytes)"),
        ("of which", f"K codes {row.k_code_bytes}, V codes {row.v_code_bytes}, scales 2 each (layer 0)"),
        ("scales", f"{'-'.join(map(str, dict.fromkeys((k_norms[0], k_norms[-1]))))} for K and 1 for V, float16"),
        ("per token", f"{per_token} bytes in all layers and heads, row padding included"),
        ("table hash", h.table_hash),
        ("config hash", h.config_hash or "none"),
        ("weights hash", h.weights_hash or "none"),
        ("text hash", h.text_hash or "none"),
        ("format", f"version {h.format_version}"),
    ]
    return "\n".join([*(f"{name:<16}  {value}" for name, value in fields), "", *_histogram(table)])
