"""Perplexity of a text when every token, its own position included, is read from a quantized cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .exact import Mixed
from .methods import Method
from .model import attention_hook, kv_hook

CHUNK = 256  # positions whose logits over the vocabulary are held at once


@dataclass
class Score:
    """Sums over the scored tokens: negative log-likelihood, and KL(reference || method) of the output distributions."""

    nll: float = 0.0
    kl: float = 0.0
    tokens: int = 0

    @property
    def ppl(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def kl_final(self) -> float:
        """Mean KL of the final distributions, nats per token."""
        return self.kl / self.tokens


def together(scores: Iterable[Score]) -> Score:
    """One score of all their tokens."""
    out = Score()
    for score in scores:
        out.nll, out.kl, out.tokens = out.nll + score.nll, out.kl + score.kl, out.tokens + score.tokens
    return out


@torch.inference_mode()
def hidden_states(model, ids: list[int], method: Method | None) -> torch.Tensor:
    """Last hidden states ``[T, hidden]`` with K and V of all layers replaced by what each token reads of them."""
    tokens = torch.tensor([ids], device=model.device)
    if method is None:
        return model.base_model(tokens, use_cache=False).last_hidden_state[0]
    if isinstance(method, Mixed):
        hooked = attention_hook(model, method.attend)
    else:
        hooked = kv_hook(model, lambda layer, q, k, v: method.round_trip(layer, k, v))
    with hooked:
        return model.base_model(tokens, use_cache=False).last_hidden_state[0]


@torch.inference_mode()
def add_score(score: Score, model, ids: list[int], hidden: torch.Tensor, true_hidden: torch.Tensor) -> None:
    """Add one sequence of T tokens: T - 1 are scored."""
    head = model.get_output_embeddings()
    targets = torch.tensor(ids[1:], device=hidden.device)
    for start in range(0, len(targets), CHUNK):
        part = slice(start, min(start + CHUNK, len(targets)))
        log_prob = head(hidden[part]).float().log_softmax(-1)
        true = log_prob if hidden is true_hidden else head(true_hidden[part]).float().log_softmax(-1)
        score.nll -= float(log_prob.gather(-1, targets[part, None]).double().sum())
        score.kl += float((true.exp() * (true - log_prob)).sum(-1).double().sum())
        score.tokens += part.stop - part.start
