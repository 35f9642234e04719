"""What the float32 check of a method compares with."""

from __future__ import annotations

import torch

from .data import Index


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """``|a - b| / |b|`` over everything, NaN if there is one."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: Index,
    sm_scale: float,
    queries: int = 1,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float32 attention of the last ``queries`` tokens of each request, causal among themselves.

    q ``[B * queries, Hq, D]``; k, v ``[slots, H, D]``; sinks ``[Hq]``. Returns ``[B * queries, Hq, D]``.
    """
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    heads, k, v = k.shape[1], k.float(), v.float()
    indptr, slots = index.flat(1, torch.int64)
    bounds = indptr.tolist()
    for b, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        at, n = slots[start:stop], stop - start
        mine = slice(b * queries, (b + 1) * queries)
        qb = q[mine].float().unflatten(1, (heads, -1))
        logits = torch.einsum("mhgd,nhd->hgmn", qb, k[at]) * sm_scale
        last = torch.arange(n - queries, n, device=q.device)[:, None]
        future = torch.arange(n, device=q.device)[None, :] > last
        logits = logits.masked_fill(future, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], -1)
        prob = logits.softmax(-1)[..., :n]
        out[mine] = torch.einsum("hgmn,nhd->mhgd", prob, v[at]).flatten(1, 2)
    return out


def small_lengths(queries: int) -> tuple[int, ...]:
    """Requests of the check: the shortest there can be, one that ends within a page, and one of several splits."""
    return queries, 700, 5120
