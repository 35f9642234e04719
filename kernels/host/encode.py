"""Encode a few tokens, all their keys and values together."""

from __future__ import annotations

import torch

from ..encode.plan import word_moves
from ..format.codebook import MAX_LEVELS, boundaries, codebook_table
from ..format.codec import SCALE_MAX, V_SCALE_MAX, LayerCodec
from ..format.columns import COLUMNS
from ..format.layout import CodeLayout
from ..format.page_mean import residual, signed
from ..reference import corrected_scale

MOST_TOKENS = 8  # every threshold of every channel is compared with: of more tokens that is too much memory


class _Vectors:
    """S vectors of D channels, each of a layout, that a token has: their codes and scales."""

    def __init__(self, codec: LayerCodec, layouts: list[CodeLayout], matrix, weight, scale_max: list[float]):
        self.rule, self.factors = codec.scale_rule, torch.tensor(codec.scale_search)[:, None, None]
        self.matrix, self.weight, self.scale_max = matrix.double(), weight, torch.tensor(scale_max)
        widths, books = torch.tensor([layout.widths for layout in layouts]), codebook_table()
        edges = torch.full((len(books), (1 << int(widths.max())) - 1), torch.inf)
        for bits in widths.unique().tolist():
            edges[bits, : (1 << bits) - 1] = boundaries(books[bits, : 1 << bits])
        self.edges, self.first, self.levels = edges[widths], widths * MAX_LEVELS, books.flatten()
        columns = [layout.require_columns() for layout in layouts]
        bins, channel = max(len(c.bins) for c in columns), torch.arange(widths.shape[1])
        self.move = torch.zeros(len(layouts), bins, len(channel), dtype=torch.int32)
        self.word = torch.zeros(len(layouts), bins, len(channel), dtype=torch.int64)
        for s, c in enumerate(columns):
            self.move[s, : len(c.bins)] = word_moves([c], len(channel))[0]
            self.word[s, : len(c.bins)] = torch.stack([b.offset // 2 + channel % COLUMNS % b.words for b in c.bins])
        self.word = self.word.flatten(1)
        self.words = max(layout.code_bytes for layout in layouts) // 2

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[T, S, D]`` to stored channels, float32."""
        return torch.einsum("tsd,sed->tse", x.double(), self.matrix).float()

    def __call__(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """y ``[T, S, D]``, in stored channels, to codes ``[T, S, 2 words]`` uint8 and scales ``[T, S]`` float16."""
        rms = y.double().square().mean(-1).sqrt().float()
        live = rms > 0
        unit = torch.where(live, rms, 1.0) * self.factors
        code = ((y / unit[..., None])[..., None] > self.edges).sum(-1)
        value = self.levels[self.first + code]
        w = self.weight * y
        scale = corrected_scale(self.rule, (w * y).sum(-1), (w * value).sum(-1), (self.weight * value * value).sum(-1))
        residual = y - scale[..., None] * value
        best = (self.weight * residual * residual).sum(-1).argmin(0, keepdim=True)
        code = code.gather(0, best[..., None].expand(1, *y.shape))[0].int()
        scale = torch.where(live, scale.gather(0, best)[0], 0.0).minimum(self.scale_max).half()
        code = code[..., None, :]
        moved = ((code >> (self.move & 15)) & (self.move >> 8)) << (self.move >> 4 & 15)
        words = torch.zeros(*y.shape[:2], self.words, dtype=torch.int32)
        words.scatter_add_(-1, self.word.expand(len(y), -1, -1), moved.flatten(2))
        return words.view(torch.uint8).unflatten(-1, (-1, 4))[..., :2].flatten(-2), scale


class HostEncoder:
    """Encodes into rows of one layer, in columns."""

    def __init__(self, codec: LayerCodec):
        row = self.row = codec.layout
        self.mean, self.k_in, self.k_weight = codec.mean, codec.k_in.double(), codec.k_weight
        k = codec, list(row.k), codec.k_in, codec.k_weight, [SCALE_MAX] * row.heads
        v = codec, [row.v] * row.heads, codec.v_in, torch.ones(row.heads, row.v.dim), [V_SCALE_MAX] * row.heads
        if row.k[0].dim == row.v.dim:
            both = codec, k[1] + v[1], torch.cat([k[2], v[2]]), torch.cat([k[3], v[3]]), k[4] + v[4]
            self.vectors = [_Vectors(*both)]
        else:
            self.vectors = [_Vectors(*k), _Vectors(*v)]

    def __call__(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Keys ``[T, H, D]`` and values ``[T, H, Dv]`` to rows ``[T, row_bytes]`` uint8, as :func:`..reference.encode`.

        T at most MOST_TOKENS.
        """
        row, together = self.row, len(self.vectors) == 1
        inputs = [torch.cat([k, v], 1)] if together else [k, v]
        ys = [vectors.transform(x) for vectors, x in zip(self.vectors, inputs, strict=True)]
        if self.mean is not None:
            mean = torch.einsum("thd,hed->the", self.mean.at(positions).double(), self.k_in).float()
            ys[0][:, : row.heads], flags = residual(ys[0][:, : row.heads], mean, self.k_weight)
        coded = [vectors(y) for vectors, y in zip(self.vectors, ys, strict=True)]
        sides = zip(*(x.split(row.heads, 1) for x in coded[0]), strict=True) if together else coded
        (k_codes, k_scales), (v_codes, v_scales) = sides
        if self.mean is not None:
            k_scales = signed(k_scales, flags)
        parts = [k_codes[..., : row.k_code_bytes].flatten(1), v_codes[..., : row.v_code_bytes].flatten(1)]
        parts.append(torch.stack([k_scales, v_scales], -1).flatten(1).view(torch.uint8))
        parts.append(torch.zeros(len(k), row.row_bytes - row.pad_offset, dtype=torch.uint8))
        return torch.cat(parts, 1)
