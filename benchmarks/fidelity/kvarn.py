"""KVarN (arXiv 2606.03458): tiles of 128 tokens behind a Hadamard matrix, divided by a scale of each row and column.

The scales are found as Sinkhorn's are: columns and rows are divided by their standard deviations in turn, and the step
with the least imbalance counts. Then each row is rounded between its smallest and its largest number: of keys a row is
a channel, of values a token. Bounds and scales are float16, those of a row with its scale multiplied in. Tokens after
the last whole tile stay exact, and so do the first 128, which :class:`exact.Mixed` adds. Parameters are those of the
authors' vLLM fork; that values are rotated as keys are, without random signs, is a guess.
"""

from __future__ import annotations

import torch

from .hadamard import hadamard

TILE = 128  # tokens
SINK = 128
STEPS = 16
STD = 1e-3, 1e3  # bounds of what is divided by in one step
LOG_SCALE = -0.3, 10.0


def _imbalance(x: torch.Tensor) -> torch.Tensor:
    """``[N]``: largest over smallest standard deviation, of columns plus of rows."""
    deviations = (x.std(dim) for dim in (-2, -1))
    return sum(s.amax(-1) / s.amin(-1).clamp(min=1e-8) for s in deviations)


def scales(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of columns ``[N, 1, C]`` and of rows ``[N, R, 1]`` of ``tiles [N, R, C]``."""
    logs = {-2: torch.zeros_like(tiles[:, :1]), -1: torch.zeros_like(tiles[:, :, :1])}
    best, least = [x.exp() for x in logs.values()], _imbalance(tiles)
    now = tiles
    for _ in range(STEPS):
        for dim in logs:  # columns, then rows
            logs[dim] = (logs[dim] + now.std(dim, keepdim=True).clamp(*STD).log()).clamp(*LOG_SCALE)
            now = tiles / logs[-2].exp() / logs[-1].exp()
        found = _imbalance(now)
        better = (found <= least)[:, None, None]
        best = [torch.where(better, x.exp(), y) for x, y in zip(logs.values(), best, strict=True)]
        least = torch.minimum(found, least)
    return best[0], best[1]


def tile_round_trip(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """``[N, R, C]``, each row between its bounds."""
    column, row = scales(tiles)
    x = tiles / column / row
    low, top = x.amin(-1, keepdim=True), (1 << bits) - 1
    step = ((x.amax(-1, keepdim=True) - low) / top).clamp(min=1e-10)
    codes = ((x - low) / step).round().clamp(0, top)
    step, low, column = ((row * step).half().float(), (row * low).half().float(), column.half().float())
    return (codes * step + low) * column


class Kvarn:
    """No token is exact here but those after the last whole tile, which are float16."""

    name = "kvarn"

    def __init__(self, k_bits: int, v_bits: int, head_dim: int, v_head_dim: int):
        self.k_bits, self.v_bits = k_bits, v_bits
        self._sizes = (
            head_dim * k_bits / 8 + 2 * (2 * head_dim + TILE) / TILE,
            v_head_dim * v_bits / 8 + 2 * (v_head_dim + 2 * TILE) / TILE,
        )
        self.bytes_per_token_head = sum(self._sizes)
        self.k_rotation, self.v_rotation = (hadamard(n).float() / n**0.5 for n in (head_dim, v_head_dim))

    def sizes(self, tokens: int) -> tuple[float, float]:
        """Of whole tiles."""
        return self._sizes

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tiles begin with the first of these tokens."""
        whole, out = len(k) // TILE * TILE, []
        for x, turn, bits, by_channel in (
            (k, self.k_rotation, self.k_bits, True),
            (v, self.v_rotation, self.v_bits, False),
        ):
            turn = turn.to(x.device)
            tiles = (x[:whole].float() @ turn.T).unflatten(0, (-1, TILE)).transpose(1, 2)  # [N, H, TILE, D]
            n, heads = tiles.shape[:2]
            tiles = (tiles.mT if by_channel else tiles).flatten(0, 1)
            read = tile_round_trip(tiles, bits) if whole else tiles
            read = (read.mT if by_channel else read).unflatten(0, (n, heads)).transpose(1, 2).flatten(0, 1)
            out.append(torch.cat([read @ turn, x[whole:].half().float()]))
        return out[0], out[1]
