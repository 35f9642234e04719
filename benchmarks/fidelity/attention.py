"""Attention fidelity of one layer: logits, softmax and top keys of true queries against coded keys."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

WINDOWS = (0, 2048, 4096, 6144)  # query positions where a window starts; the last runs to the end of the text
FIRST_QUERY = 128  # an earlier query sees so few keys that a top-10 overlap means little
TOP = 10


def window_names(tokens: int) -> list[str]:
    """Names of the windows that a text of ``tokens`` reaches into, e.g. ``0-2048``."""
    return [f"{a}-{b}" for a, b in _spans(tokens)]


def _spans(tokens: int) -> list[tuple[int, int]]:
    starts = [w for w in WINDOWS if w < tokens]
    return list(zip(starts, [*starts[1:], tokens], strict=True))


def draw_queries(tokens: int, per_window: int, seed: int) -> list[int]:
    """``per_window`` sorted positions from each window, windows in order. A window's draw depends on its bounds alone.

    Raises ValueError if a window has fewer positions.
    """
    out = []
    for start, stop in _spans(tokens):
        choices = range(max(start, FIRST_QUERY), stop)
        if len(choices) < per_window:
            raise ValueError(f"queries = {per_window}: positions {start} to {stop} have only {len(choices)}")
        out += sorted(random.Random(f"{seed}/{start}").sample(choices, per_window))
    return out


@dataclass
class Reference:
    """True attention of N queries to T keys. Shapes ``[H, G, N, T]``; float32, -inf where the key lies ahead."""

    logits: torch.Tensor
    log_prob: torch.Tensor
    top: torch.Tensor  # [H, G, N, TOP] indices
    keys: torch.Tensor  # [N] keys each query sees


def causal_logits(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    """q ``[N, Hq, D]``, k ``[T, H, D]`` to ``[H, G, N, T]``, -inf ahead; query head j reads KV head j // G."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("nhgd,thd->hgnt", grouped, k) * scale
    ahead = torch.arange(k.shape[0], device=k.device) > positions[:, None]
    return logits.masked_fill_(ahead, -torch.inf)


def reference(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, scale: float) -> Reference:
    logits = causal_logits(q, k, positions, scale)
    return Reference(logits, logits.log_softmax(-1), logits.topk(TOP, -1).indices, positions + 1)


def compare(
    true: Reference, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, scale: float
) -> dict[str, torch.Tensor]:
    """Fidelity of queries ``q`` against approximate keys ``k``, per query position ``[N]``, mean over heads.

    mae: mean over the visible keys of ``|logit error|``, logits scaled as in the softmax.
    softmax_kl: KL(true || approximate) of the attention distributions, nats.
    top10_overlap: share of the ten most attended keys that are still among the ten most attended.
    """
    return compare_logits(true, causal_logits(q, k, positions, scale))


def with_exact(
    logits: torch.Tensor, kept: torch.Tensor, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """``logits [H, G, N, T]`` of queries ``q``, but those of exact keys ``k`` in float16 where ``kept [N, T]``."""
    return torch.where(kept, causal_logits(q, k.half().float(), positions, scale), logits)


def compare_logits(true: Reference, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """As :func:`compare`, from approximate logits ``[H, G, N, T]``."""
    error = (logits - true.logits).abs().nan_to_num_(nan=0.0)  # -inf - -inf, keys ahead
    mae = error.sum(-1) / true.keys
    log_prob = logits.log_softmax(-1)
    ratio = (true.log_prob - log_prob).nan_to_num_(nan=0.0)
    kl = (true.log_prob.exp() * ratio).sum(-1)
    top = logits.topk(TOP, -1).indices
    overlap = (true.top[..., :, None] == top[..., None, :]).any(-1).float().mean(-1)
    return {"mae": mae.mean((0, 1)), "softmax_kl": kl.mean((0, 1)), "top10_overlap": overlap.mean((0, 1))}
