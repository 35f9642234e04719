"""What a layer needs to encode and read its rows: layout and transforms as data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .layout import RowLayout
from .page_mean import PageMean

#: How the stored scale follows from the normalised vector y and its codewords c
#: (weights w, see LayerCodec.k_weight):
#:   norm       s = |y|_w / |c|_w           keeps the length (the TurboQuant demo's "norm correction")
#:   unbiased   s = |y|_w^2 / <y, c>_w      keeps <y, s c>_w = |y|_w^2
SCALE_RULES = ("norm", "unbiased")

#: Multiples of the group's rms tried as the codebook's unit; the one with the least weighted
#: error is kept. Widths mixed under one scale need it: a token whose top blocks stand out from
#: their static gain would clip them. Costs nothing at read time.
SCALE_SEARCH = (0.8, 0.9, 1.0, 1.12, 1.25, 1.4)
NO_SEARCH = (1.0,)

SCALE_MAX = 65504.0  # of a key: what float16 holds
#: Of a value: decode multiplies it by probabilities of up to 64 in float16 (decode.kernel). In units of v_gain, the
#: value's rms during calibration; what exceeds it saturates.
V_SCALE_MAX = 1000.0


@dataclass(frozen=True)
class LayerCodec:
    """Codec of one layer on this rank. H = KV heads, D = head_dim, Dv = v_head_dim.

    layout: the row.
    k_in ``[H, D, D]``: post-RoPE key (column) to stored channels: block order, balancing,
        static gains and group rotation in one matrix.
    q_in ``[H, D, D]``: the inverse transpose, so that ``(q_in q) . (k_in k) = q . k``.
    v_in, v_out ``[H, Dv, Dv]``: the same for values; ``v_out`` turns the attention output back.
    k_weight ``[H, D]``: weights of the scale rule, the mean energy of each transformed query channel.
    mean: of the keys, which are coded less it; None where they are coded as they are.
    All tensors float32.
    """

    layout: RowLayout
    k_in: torch.Tensor
    q_in: torch.Tensor
    v_in: torch.Tensor
    v_out: torch.Tensor
    k_weight: torch.Tensor
    scale_rule: str = "norm"
    scale_search: tuple[float, ...] = SCALE_SEARCH
    mean: PageMean | None = None

    def __post_init__(self) -> None:
        if self.scale_rule not in SCALE_RULES:
            raise ValueError(f"scale rule {self.scale_rule!r} is not one of {', '.join(SCALE_RULES)}")
        if self.mean is not None and not self.layout.in_columns:
            raise ValueError("only rows in columns hold keys less their page's mean")

    @property
    def head_dim(self) -> int:
        return self.k_in.shape[-1]

    @property
    def v_head_dim(self) -> int:
        return self.v_in.shape[-1]

    def to(self, device: torch.device | str) -> LayerCodec:
        kinds = torch.Tensor, PageMean
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), kinds)
        }
        return replace(self, **moved)

    @classmethod
    def identity(cls, layout: RowLayout, **kw) -> LayerCodec:
        """Codec without any transform: what tests of layout and kernels start from."""
        eye = torch.eye(layout.k[0].dim).expand(layout.heads, -1, -1).contiguous()
        v_eye = torch.eye(layout.v.dim).expand(layout.heads, -1, -1).contiguous()
        weight = torch.ones(layout.heads, layout.k[0].dim)
        return cls(layout, eye, eye, v_eye, v_eye, weight, **kw)
