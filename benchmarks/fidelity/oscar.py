"""OSCAR (arXiv 2605.17757): two-bit integers by token behind the eigenvectors of queries and a Hadamard matrix.

Keys are rotated by the eigenvectors of the queries' second moment, values by those of their own, each token weighted by
``k^T E[q q^T] k``; then by a Hadamard matrix. What exceeds a quantile of a vector's own magnitudes is clipped (0.96 for
keys, 0.92 for values) and the rest rounded between the smallest and the largest channel. As published there is one
rotation a layer, for all its heads; ``per_head`` is the authors' variant for some models. Their bit-reversed order of
channels changes nothing where a vector is one group, as those of up to 128 channels are. Sinks and the recent window
are added by :class:`exact.Mixed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .hadamard import hadamard
from .methods import IntPerToken
from .model import capture

BITS = 2
K_CLIP, V_CLIP = 0.96, 0.92
SINK, RECENT = 64, 256
LARGEST = 128  # channels of a group


def _moment(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of ``x x^T`` over tokens: ``[T, H, D]`` to ``[H, D, D]`` float64; weight ``[T, H]``: of each token."""
    x = x.double()
    return torch.einsum("thd,th,the->hde", x, torch.ones_like(x[..., 0]) if weight is None else weight, x) / len(x)


def covariances(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What keys and values are rotated by: ``[H, D, D]`` and ``[H, Dv, Dv]``, float64.

    q ``[T, Hq, D]``, k ``[T, H, D]``, v ``[T, H, Dv]`` of one layer, after RoPE.
    """
    group = q.shape[1] // k.shape[1]
    of_queries = _moment(q).unflatten(0, (-1, group)).mean(1)
    weight = torch.einsum("thd,hde,the->th", k.double(), of_queries, k.double())
    return of_queries, _moment(v, weight / weight.mean(0).clamp(min=1e-30))


def rotation(moment: torch.Tensor, per_head: bool) -> torch.Tensor:
    """``eigenvectors @ hadamard / sqrt(D)``, ``[H, D, D]`` float32 orthonormal; a vector x is stored as ``x @ it``."""
    moment = moment if per_head else moment.mean(0, keepdim=True).expand_as(moment)
    dim = moment.shape[-1]
    return (torch.linalg.eigh(moment)[1] @ (hadamard(dim).to(moment.device) / dim**0.5)).float()


def clipped(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """Each vector ``[..., D]`` clamped to its own ``int(ratio * D)``-th smallest magnitude, counted from 0."""
    bound = x.abs().sort(-1).values[..., int(ratio * x.shape[-1])][..., None]
    return x.clamp(-bound, bound)


class Oscar(IntPerToken):
    """moments: of each layer, from :func:`covariances`. Raises ValueError for vectors of more than one group."""

    def __init__(
        self, head_dim: int, v_head_dim: int, moments: Sequence[tuple[torch.Tensor, torch.Tensor]], per_head: bool
    ):
        super().__init__(BITS, head_dim, v_head_dim)
        if max(head_dim, v_head_dim) > LARGEST:
            raise ValueError(f"head_dim {head_dim}, {v_head_dim}: only vectors of one group of {LARGEST} are emulated")
        self.name = "oscar-by-head" if per_head else "oscar"
        self.rotations = [tuple(rotation(m, per_head) for m in pair) for pair in moments]

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = []
        for x, turn, ratio in zip((k, v), self.rotations[layer], (K_CLIP, V_CLIP), strict=True):
            stored = torch.einsum("thd,hde->the", x, turn)
            out.append(torch.einsum("the,hde->thd", self._round(clipped(stored, ratio)), turn))
        return out[0], out[1]


def calibrated(model, sequences: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """:func:`covariances` of each layer over calibration tokens."""
    parts = [capture(model, list(ids), list(range(len(ids)))) for ids in sequences]
    layers = range(len(parts[0].k))
    return [covariances(*(torch.cat([getattr(p, x)[i] for p in parts]) for x in "qkv")) for i in layers]
