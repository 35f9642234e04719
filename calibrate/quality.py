"""What a cache costs a model: a text that calibration has not seen, read once exactly and once through packed rows.

The costs are Kullback-Leibler divergences, nats: of the next token's distribution (the answer), and of each layer's
attention to exact keys, whose worst layer tells where a cache fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..kernels.host.attention import causal_attention, recent_attention
from ..kernels.layer import PackedLayer
from ..kernels.terms import PLAIN, Terms

#: In the name of a cached table. Raise it when what is measured, or on what, changes.
QUALITY_VERSION = 1
TOKENS, CPU_TOKENS = 2048, 256  # held out, and how many of them a host without a GPU reads
ANSWERS = 512  # positions whose next token is compared
QUERIES = 48  # positions whose attention is compared
CHUNK = 64  # positions whose distributions are held in float32 at once

#: hook(layer, q [T, Hq, D], k [T, H, D], v [T, H, Dv]) -> the keys and values that attention shall see, and perhaps how
#: many of its last ones each query sees as they were
Hook = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, read: tuple | None, scale: float, terms: Terms
) -> torch.Tensor:
    """Causal attention ``[T, Hq, Dv]`` to what a :data:`Hook` gave; None: to keys and values as they are."""
    if read is None:
        return causal_attention(q, k, v, scale, terms)
    k_read, v_read, recent = read if len(read) > 2 else (*read, 0)
    if recent:
        return recent_attention(q, k, v, k_read, v_read, recent, scale, terms)
    return causal_attention(q, k_read, v_read, scale, terms)


@dataclass(frozen=True)
class Quality:
    """kl: of the answer, mean over ``tokens`` positions. attention_kl: mean over layers, heads and queries, without
    what earlier layers did to them. worst_layer, worst_layer_kl: where the mean is greatest. recent: the last keys and
    values of each query, its own among them, that were read exactly."""

    kl: float
    attention_kl: float
    worst_layer: int
    worst_layer_kl: float
    tokens: int
    recent: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        return (
            f"KL of the answer {self.kl:.4f} nats a token over {self.tokens} held-out tokens, attention "
            f"{self.attention_kl:.4f}, worst layer {self.worst_layer} {self.worst_layer_kl:.4f}"
            + (f", with the last {self.recent} token{'s' * (self.recent > 1)} exact" if self.recent else "")
        )


class Sums:
    """What one cache's costs are made of, additive over ranks: ``flat`` is one float64 tensor of sums and counts."""

    def __init__(self, layers: int):
        self.flat = torch.zeros(layers + 1, 2, dtype=torch.float64)

    def add_attention(self, layer: int, kl: torch.Tensor) -> None:
        self.flat[layer, 0] += float(kl.double().sum())
        self.flat[layer, 1] += kl.numel()

    def add_answers(self, kl: torch.Tensor) -> None:
        self.flat[-1, 0] += float(kl.double().sum())
        self.flat[-1, 1] += len(kl)

    def quality(self, tokens: int, recent: int = 0) -> Quality:
        """tokens: positions that were compared; the count has them once for each rank. recent: see Quality."""
        mean = self.flat[:, 0] / self.flat[:, 1].clamp(min=1)
        layers = self.flat[:-1, 1].nonzero()[:, 0]  # with keys
        attention = mean[layers]
        worst = int(attention.nan_to_num(nan=torch.inf).argmax())
        means = float(mean[-1]), float(attention.mean())
        return Quality(*means, int(layers[worst]), float(attention[worst]), tokens, recent)


def positions_of(tokens: int, count: int) -> torch.Tensor:
    """``count`` positions, or all, evenly over ``tokens``, the last among them."""
    step = max(tokens // count, 1)
    return torch.arange(tokens - 1, -1, -step).flip(0)


def divergence(true: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(true || other) ``[N]`` of logits ``[N, V]``."""
    out = []
    for a, b in zip(true.split(CHUNK), other.split(CHUNK), strict=True):
        a, b = a.float().log_softmax(-1), b.float().log_softmax(-1)
        out.append(_divergence(a, b))
    return torch.cat(out)


def attention_divergence(
    q: torch.Tensor,
    k: torch.Tensor,
    k_read: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    terms: Terms = PLAIN,
    recent: int = 0,
) -> torch.Tensor:
    """KL ``[N, Hq]`` of causal attention, without sinks, to keys as they are and as they are read: q ``[N, Hq, D]`` at
    ``positions``, k, k_read ``[T, H, D]``. recent: of its last keys a query reads so many as they are."""
    group = q.shape[1] // k.shape[1]
    key, own = torch.arange(len(k), device=k.device), positions.to(k.device)[:, None]
    unseen = key > own if not terms.window else (key > own) | (key <= own - terms.window)
    logits: list[torch.Tensor] = []
    for keys in (k, k_read):
        keys = keys.float().repeat_interleave(group, 1)
        logits.append(terms.capped(torch.einsum("nhd,thd->nht", q.float(), keys) * scale))
    logits[1] = torch.where((key > own - recent)[:, None], logits[0], logits[1])
    return _divergence(*(x.masked_fill(unseen[:, None], -torch.inf).log_softmax(-1) for x in logits))


def _divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of log-probabilities, over the last dimension; what ``a`` never gives counts nothing. Rounding makes nothing less
    than nothing of it."""
    return torch.where(a == -torch.inf, 0.0, a.exp() * (a - b)).sum(-1).clamp(min=0)


class HeldOut:
    """A held-out sequence of ``tokens`` tokens read exactly, with what is needed to compare caches with that.

    run: a pass over the sequence with attention to what a :data:`Hook` returns; gives the logits ``[N, V]`` at
    ``answers [N]``, or None on a rank that has none. logits: of each layer with keys, their scale and terms.
    layers: of the whole model, also those without keys. recent: see :class:`Quality`.
    """

    def __init__(
        self,
        run: Callable[[Hook, torch.Tensor], torch.Tensor | None],
        tokens: int,
        logits: Mapping[int, tuple[float, Terms]],
        layers: int,
        recent: int = 0,
    ):
        self.run, self.logits_of, self.layers, self.recent = run, logits, layers, recent
        self.answers, self.queries = positions_of(tokens, ANSWERS), positions_of(tokens, QUERIES)
        self.exact: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

        def keep(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
            self.exact[layer] = q[self.queries.to(q.device)].clone(), k.clone(), v.clone()
            return k, v

        self.logits = run(keep, self.answers)

    def sums(self, packed: Mapping[int, PackedLayer]) -> Sums:
        """Of a cache: this rank's part. packed: this rank's layers by id, bound to rows of their own here and left
        unbound."""
        sums = Sums(self.layers)

        def read(layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mine, slots = packed[layer], torch.arange(len(k), device=k.device)
            mine.bind(mine.new_rows(len(k), k.device))
            mine.encode(k, v, slots, slots)
            found = mine.dense(slots, slots, k.dtype)
            mine.unbind()
            return found

        for layer in packed:
            q, k, v = self.exact[layer]
            k_read, _ = read(layer, k, v)
            asked = self.queries, *self.logits_of[layer], self.recent
            sums.add_attention(layer, attention_divergence(q, k, k_read, *asked))
        exactly = (self.recent,) if self.recent else ()

        def hook(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
            return (*read(layer, k, v), *exactly) if layer in packed else (k, v)

        logits = self.run(hook, self.answers)
        if self.logits is not None and logits is not None:
            sums.add_answers(divergence(self.logits, logits))
        return sums
