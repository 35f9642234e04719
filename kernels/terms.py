"""What a layer's attention has besides keys, values and a scale: a sliding window, capped logits, sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Terms:
    """window: tokens that a query sees, its own among them; 0: all up to its own. cap: logits become
    ``cap * tanh(logit / cap)`` (Gemma 2); 0: they stay. sinks ``[Hq]``: of each head a logit that has no key and no
    value but its share of the softmax (gpt-oss); None: there is none.
    """

    window: int = 0
    cap: float = 0.0
    sinks: torch.Tensor | None = None

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of any shape, scaled already."""
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def with_sinks(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """``out [..., Hq, Dv]`` whose softmax of ``lse [..., Hq]`` knows no sinks, with them."""
        if self.sinks is None:
            return out
        return (out * torch.sigmoid(lse - self.sinks.float())[..., None]).to(out.dtype)


PLAIN = Terms()
