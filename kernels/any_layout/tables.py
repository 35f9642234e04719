"""A LayerCodec of any layout flattened into tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..device.tables import Side, Tables, moved
from ..format.codebook import codebook_table
from ..format.codec import LayerCodec
from ..format.layout import CodeLayout
from .bits import bit_offsets

CODE_FIELDS = 4


@dataclass(frozen=True)
class Codes:
    """Where the codes of one side lie. H KV heads, P padded channels.

    channels ``[H, 4, P]`` int32: first byte within the head's codes, first bit in it, width (0: not stored), and
        which of the head's scales (-1: none).
    inverse_counts ``[H, norms]`` float32: one over the number of channels of a scale, 0 without any.
    """

    channels: torch.Tensor
    inverse_counts: torch.Tensor
    norms: int

    @classmethod
    def of(cls, layouts: tuple[CodeLayout, ...], norms: int, padded: int) -> Codes:
        channels = torch.zeros(len(layouts), CODE_FIELDS, padded, dtype=torch.int32)
        channels[:, 3] = -1
        for h, layout in enumerate(layouts):
            bit, width = torch.tensor(bit_offsets(layout)), torch.tensor(layout.widths)
            norm = torch.tensor(layout.norm_index).masked_fill(width == 0, -1)
            channels[h, :, : layout.dim] = torch.stack([bit // 8, bit % 8, width, norm])
        counts = torch.stack([(channels[:, 3] == n).sum(-1) for n in range(norms)], -1)
        return cls(channels, torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0), norms)


@dataclass(frozen=True)
class AnyTables(Tables):
    """levels ``[9, 256]`` float32, and in float16 for products on a GPU."""

    k_codes: Codes
    v_codes: Codes
    levels: torch.Tensor
    half_levels: torch.Tensor

    @classmethod
    def of(cls, codec: LayerCodec, device: torch.device | str = "cpu") -> AnyTables:
        """Build the tables of one layer; once, at start-up."""
        row = codec.layout
        k, v = Side.both(codec)
        levels = codebook_table()
        tables = cls(
            row=row,
            k=k,
            v=v,
            search=torch.tensor(codec.scale_search, dtype=torch.float32),
            scale_rule=codec.scale_rule,
            k_codes=Codes.of(row.k, row.k_norms, k.padded),
            v_codes=Codes.of((row.v,) * row.heads, 1, v.padded),
            levels=levels,
            half_levels=levels.half(),
        )
        return moved(tables, torch.device(device))

    @property
    def operand_levels(self) -> torch.Tensor:
        """The levels as products take them."""
        return self.half_levels if self.device.type == "cuda" else self.levels
