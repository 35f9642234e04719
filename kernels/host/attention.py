"""Causal attention over dense keys and values in PyTorch, a block of queries at a time."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..terms import PLAIN, Terms

QUERY_BLOCK = 256  # queries per mask; bounds the memory of a long prefill


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, terms: Terms = PLAIN
) -> torch.Tensor:
    """The last ``len(q)`` positions ``q [M, Hq, D]`` over ``k [N, H, D]`` and ``v [N, H, Dv]``: ``[M, Hq, Dv]`` in q's
    dtype.

    PyTorch's fused attention, except for caps and sinks, which it does not have: their logits are float32.
    """
    if terms == PLAIN and len(q) == len(k):
        return _fused(q, k, v, None, sm_scale)
    prefix, out = k.shape[0] - q.shape[0], q.new_empty(*q.shape[:2], v.shape[-1])
    positions = torch.arange(k.shape[0], device=q.device)
    for a in range(0, q.shape[0], QUERY_BLOCK):
        b = min(a + QUERY_BLOCK, q.shape[0])
        own = prefix + torch.arange(a, b, device=q.device)[:, None]
        start = max(prefix + a + 1 - terms.window, 0) if terms.window else 0
        seen = slice(start, prefix + b)
        mask = positions[seen] <= own
        if terms.window:
            mask &= positions[seen] > own - terms.window
        part = q[a:b], k[seen], v[seen], mask, sm_scale
        out[a:b] = _fused(*part) if not terms.cap and terms.sinks is None else _explicit(*part, terms)
    return out


def recent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_read: torch.Tensor,
    v_read: torch.Tensor,
    recent: int,
    sm_scale: float,
    terms: Terms = PLAIN,
) -> torch.Tensor:
    """Every position ``q [N, Hq, D]`` over its last ``recent`` keys ``k [N, H, D]`` and values ``v [N, H, Dv]``, its
    own among them, and over ``k_read`` and ``v_read`` before: ``[N, Hq, Dv]`` in q's dtype."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    positions = torch.arange(len(k), device=q.device)
    for a in range(0, len(q), QUERY_BLOCK):
        b = min(a + QUERY_BLOCK, len(q))
        own, before = positions[a:b, None], slice(0, max(b - recent, 0))
        if terms.window:
            before = slice(min(max(a + 1 - terms.window, 0), before.stop), before.stop)
        near = slice(max(a + 1 - recent, 0), b)
        back = own - torch.cat([positions[before], positions[near]])
        exact = torch.zeros_like(back, dtype=torch.bool)
        exact[:, before.stop - before.start :] = True
        mask = (back >= 0) & ((back < recent) == exact)
        if terms.window:
            mask &= back < terms.window
        keys, values = torch.cat([k_read[before], k[near]]), torch.cat([v_read[before], v[near]])
        part = q[a:b], keys, values, mask, sm_scale
        out[a:b] = _fused(*part) if not terms.cap and terms.sinks is None else _explicit(*part, terms)
    return out


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sm_scale: float
) -> torch.Tensor:
    """mask: None for queries and keys of the same positions."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=sm_scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sm_scale: float, terms: Terms
) -> torch.Tensor:
    grouped = q.unflatten(1, (k.shape[1], -1)).float()
    logits = terms.capped(torch.einsum("mhgd,nhd->mhgn", grouped, k.float()) * sm_scale)
    logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    out = torch.einsum("mhgn,nhd->mhgd", logits.softmax(-1), v.float()).flatten(1, 2)
    return terms.with_sinks(out, logits.logsumexp(-1).flatten(1)).to(q.dtype)
