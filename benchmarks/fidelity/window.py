"""The reference's buffers, emulated: the first tokens and the last ones are read in float16, all others coded.

Block-GTQ's reasoning runs use such a window (arXiv 2606.24033; 4 sink and 128 recent tokens, emulated there, too).
Sinks: StreamingLLM (arXiv 2309.17453, section 3). Which tokens are exact depends on who asks, so no single K and V
holds for all queries of a sequence: the panel mixes per query (:meth:`Window.kept`), :meth:`Window.round_trip` gives
what the last token of the sequence reads.
"""

from __future__ import annotations

import torch

from .methods import Method

SINK, RECENT = 4, 128


class Window:
    """``method`` with the first ``sink`` tokens and the ``recent`` last ones, the query's own included, in float16."""

    def __init__(self, method: Method, head_dim: int, v_head_dim: int, sink: int = SINK, recent: int = RECENT):
        self.method, self.sink, self.recent = method, sink, recent
        self.name, self.k_bits, self.v_bits = method.name, method.k_bits, method.v_bits
        self.bytes_per_token_head = method.bytes_per_token_head  # of a sequence without end
        self._exact = 2.0 * head_dim, 2.0 * v_head_dim

    def sizes(self, tokens: int) -> tuple[float, float]:
        exact = min(tokens, self.sink + self.recent)
        coded = tokens - exact
        inner = self.method.sizes(coded) if coded else (0.0, 0.0)
        key, value = ((e * exact + i * coded) / tokens for e, i in zip(self._exact, inner, strict=True))
        return key, value

    def kept(self, positions: torch.Tensor, tokens: int) -> torch.Tensor:
        """``[N, tokens]`` bool: the tokens that queries at ``positions [N]`` read exactly (later ones included)."""
        token = torch.arange(tokens, device=positions.device)
        return (token < self.sink) | (token > positions[:, None] - self.recent)

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the last of these tokens reads them."""
        kept = self.kept(torch.tensor([len(k) - 1], device=k.device), len(k))[0][:, None, None]
        coded = self.method.round_trip(layer, k, v, first)
        k, v = (torch.where(kept, x.half().float(), y) for x, y in zip((k, v), coded, strict=True))
        return k, v
