"""Caches that keep some tokens exact: which ones depends on who asks, so keys and values are mixed query by query.

OSCAR keeps the first and the last tokens, KVarN the first and those of the tile that is still open, KIVI keys of its
open group and the last values. All of them cost 16 bits a number, which :meth:`Mixed.sizes` counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .methods import Method

QUERIES = 256  # whose logits are held at once


@dataclass(frozen=True)
class Exact:
    """The first ``sink`` tokens, the last ``recent`` ones (the query's own included), and the query's own group.

    group: tokens 0 to group - 1, and so on; a group is coded once a token comes after it. 0 for none.
    """

    sink: int = 0
    recent: int = 0
    group: int = 0

    def kept(self, positions: torch.Tensor, tokens: int) -> torch.Tensor:
        """``[N, tokens]`` bool: what queries at ``positions [N]`` read exactly (later tokens included)."""
        token, query = torch.arange(tokens, device=positions.device), positions[:, None]
        out = (token < self.sink) | (token > query - self.recent)
        return out | (token >= query // self.group * self.group) if self.group else out

    def count(self, tokens: int) -> float:
        """Exact tokens of a text of ``tokens``; an open group is half full."""
        return min(tokens, self.sink + self.recent + self.group / 2)

    def __str__(self) -> str:
        parts = {"first": self.sink, "last": self.recent, "open": self.group}
        return " ".join(f"{name} {n}" for name, n in parts.items() if n) or "none"


class Mixed:
    """``method`` with some keys and some values in float16. ``bytes_per_token_head`` is that of a text without end."""

    def __init__(self, method: Method, head_dim: int, v_head_dim: int, keys: Exact, values: Exact):
        self.method, self.keys, self.values = method, keys, values
        self.name, self.k_bits, self.v_bits = method.name, method.k_bits, method.v_bits
        self.bytes_per_token_head = method.bytes_per_token_head
        self._whole = 2.0 * head_dim, 2.0 * v_head_dim

    def sizes(self, tokens: int) -> tuple[float, float]:
        out = []
        for side, (exact, whole) in enumerate(zip((self.keys, self.values), self._whole, strict=True)):
            coded = tokens - exact.count(tokens)
            out.append((exact.count(tokens) * whole + (coded and coded * self.method.sizes(coded)[side])) / tokens)
        return out[0], out[1]

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the last of these tokens reads them."""
        last = torch.tensor([len(k) - 1], device=k.device)
        out = []
        coded = self.method.round_trip(layer, k, v, first)
        for x, y, exact in zip((k, v), coded, (self.keys, self.values), strict=True):
            out.append(torch.where(exact.kept(last, len(k))[0][:, None, None], x.half().float(), y))
        return out[0], out[1]

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Causal attention of all tokens, each reading its own mixture: model.Attend."""
        coded = self.method.round_trip(layer, k, v)
        return attend(q, (k.half().float(), v.half().float()), coded, (self.keys, self.values), scale)


def attend(
    q: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    coded: tuple[torch.Tensor, torch.Tensor],
    rules: tuple[Exact, Exact],
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention ``[T, Hq, Dv]``, float32, of tokens that read some keys and values exactly.

    q ``[T, Hq, D]``; exact, coded: keys ``[T, H, D]`` and values ``[T, H, Dv]``; rules: of keys and of values.
    """
    heads = coded[0].shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v, ck, cv = (x.float().transpose(0, 1)[:, None] for x in (*exact, *coded))  # [H, 1, T, D]
    grouped = q.float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3) * scale  # [H, G, T, D]
    out = []
    for start in range(0, len(q), QUERIES):
        stop = min(start + QUERIES, len(q))
        part, positions = grouped[:, :, start:stop], torch.arange(start, stop, device=q.device)
        logits = part @ ck[:, :, :stop].mT
        kept, v_kept = (rule.kept(positions, stop) for rule in rules)
        near = kept.any(0).nonzero()[:, 0]  # the others are coded for all of these queries
        logits[..., near] = torch.where(kept[:, near], part @ k[:, :, near].mT, logits[..., near])
        ahead = torch.arange(stop, device=q.device) > positions[:, None]
        weights = logits.masked_fill_(ahead, -torch.inf).softmax(-1)
        near = v_kept.any(0).nonzero()[:, 0]
        more = (weights[..., near] * v_kept[:, near]) @ (v - cv)[:, :, near]
        out.append(weights @ cv[:, :, :stop] + more)
    return torch.cat(out, 2).permute(2, 0, 1, 3).flatten(1, 2)
