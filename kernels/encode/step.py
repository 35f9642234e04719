"""Encode a decode step's tokens into the rows of every layer, in one launch at the step's end.

Within a step nobody reads its own tokens' rows: they are among the exact tokens (:mod:`..decode.recent`), where a
layer's attention has left its keys and values. So a layer has nothing to encode, and what all of them have fills the
GPU. The kernels are those of :mod:`.encoder`, each program of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from ..decode.recent import Recent
from ..device.launch import Launch
from .encoder import Encoder, grid_of, rows_per_token, spread
from .layers import FIELDS

#: Tokens up to which the kernel for a few takes a step: beyond, its programs read too many matrices.
FEW_TOKENS = 4


class StepEncoder:
    """Of the layers' encoders, and the copies of their tokens in the same order."""

    def __init__(self, encoders: Sequence[Encoder], recent: Recent):
        self.recent, self.tables, self.layers = recent, encoders[0].tables, len(encoders)
        tries = triton.next_power_of_2(len(self.tables.search))
        self._launches = {per_token: self._prepared(encoders, per_token) for per_token in (0, 1, tries)}

    def __call__(self, loc: torch.Tensor, positions: torch.Tensor) -> None:
        """Into the rows ``loc [B]`` of each layer, its tokens at ``positions [B]`` of a step of up to ``recent.room``
        requests, after the attention of all layers. loc, positions: int32 or int64, contiguous. ValueError for more.

        The bytes are those that :class:`.encoder.Encoder` writes, but for values on a threshold to rounding.
        """
        tokens = len(loc)
        if not self.takes(tokens):
            raise ValueError(f"{tokens} tokens: {self.recent.room} are kept of a step, of each request one")
        if not tokens:
            return
        per_token = self.rows_per_token(tokens)
        grid = grid_of(self.tables, tokens, 0, per_token)
        for launch, layers in self._launches[per_token]:
            mean_at = positions if launch.bound["PAGE"] else None
            launch((*grid, layers), loc=loc, positions=mean_at, num_tokens=tokens, **spread(per_token))

    def takes(self, tokens: int) -> bool:
        """Whether so many are kept of a step."""
        return tokens <= self.recent.room

    def rows_per_token(self, tokens: int) -> int:
        """Of the kernel for many tokens; 0: that for a few takes them."""
        return 0 if tokens <= FEW_TOKENS else rows_per_token(self.tables, tokens, self.tables.device, self.layers)

    def batch_sizes(self) -> list[int]:
        """A number of tokens for each binary."""
        sizes = {self.rows_per_token(n): n for n in range(self.recent.room, 0, -1)}
        return sorted(sizes.values())

    def warm_up(self, tokens: int) -> None:
        """Compile what a step of so many tokens needs. Slot 0 is written, which no request has."""
        none = torch.zeros(tokens, dtype=torch.int64, device=self.tables.device)
        self(none, none)

    def _prepared(self, encoders: Sequence[Encoder], per_token: int) -> list[tuple[Launch, int]]:
        """A launch for all layers of a structure, which those of most models have in common, and how many they are."""
        k, v = (x.flatten(1, 2) for x in (self.recent.k, self.recent.v))
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for i, encoder in enumerate(encoders):
            bound = encoder.bound(k.dtype, 0, per_token) | {"k": k[i], "v": v[i]}
            same = tuple((name, x) for name, x in bound.items() if not isinstance(x, torch.Tensor))
            groups.setdefault((same, *encoder.tables.search.tolist()), []).append(bound)
        launches = []
        for group in groups.values():
            own = [[0 if of[name] is None else of[name].data_ptr() for name in FIELDS] for of in group]
            common = group[0] | {
                "layers": torch.tensor(own, device=k.device),
                "places": self.recent.step[3],
                "q": None,
                "rotated": None,
                "num_queries": 0,
                **dict(zip(("stride_kt", "stride_kh"), k.stride()[1:3], strict=True)),
                **dict(zip(("stride_vt", "stride_vh"), v.stride()[1:3], strict=True)),
                **dict.fromkeys(("stride_qt", "stride_qh", "stride_rt", "stride_rh"), 0),
            }
            launches.append((Launch(**common), len(group)))
        return launches
