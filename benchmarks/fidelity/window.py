"""The reference's buffers, emulated: the first tokens and the last ones are read in float16, all others coded.

Block-GTQ's reasoning runs use such a window (arXiv 2606.24033; 4 sink and 128 recent tokens, emulated there, too).
Sinks: StreamingLLM (arXiv 2309.17453, section 3). Which tokens are exact depends on who asks, so no single K and V
holds for all queries of a sequence: the panel mixes per query (:meth:`Window.kept`), :meth:`Window.round_trip` gives
what the last token of the sequence reads.
"""

from __future__ import annotations

import torch

from .exact import Exact, Mixed
from .methods import Method

SINK, RECENT = 4, 128


class Window(Mixed):
    """``method`` with the first ``sink`` tokens and the ``recent`` last ones, the query's own included, in float16."""

    def __init__(self, method: Method, head_dim: int, v_head_dim: int, sink: int = SINK, recent: int = RECENT):
        exact = Exact(sink, recent)
        super().__init__(method, head_dim, v_head_dim, exact, exact)
        self.sink, self.recent = sink, recent

    def kept(self, positions: torch.Tensor, tokens: int) -> torch.Tensor:
        """``[N, tokens]`` bool: the tokens that queries at ``positions [N]`` read exactly (later ones included)."""
        return self.keys.kept(positions, tokens)
