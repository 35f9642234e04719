"""Bit packing of codes into the bytes of a CodeLayout, in PyTorch."""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch

from ..any_layout import bits
from .columns import COLUMNS, WORD_BITS, Bin, Columns
from .layout import CodeLayout


def _shifts(part: Bin, device: torch.device) -> torch.Tensor:
    """Where the bits of each repetition start in the bin's words, ``[repeat, 1]``."""
    return torch.arange(0, WORD_BITS, part.bits, dtype=torch.int32, device=device)[:, None]


def _pack_columns(columns: Columns, codes: torch.Tensor) -> torch.Tensor:
    strings = [torch.zeros_like(codes[..., :COLUMNS]) for _ in columns.bins]
    for i, pieces in enumerate(columns.segments):
        code = codes[..., i * COLUMNS : (i + 1) * COLUMNS]
        for p in pieces:
            strings[p.bin] |= (code >> p.position & (1 << p.width) - 1) << p.shift
    words = []
    for part, string in zip(columns.bins, strings, strict=True):
        shifted = string.unflatten(-1, (part.repeat, part.words)) << _shifts(part, codes.device)
        words.append(shifted.sum(-2, dtype=torch.int32))
    word = torch.cat(words, -1)
    return torch.stack([word & 0xFF, word >> 8], -1).flatten(-2).to(torch.uint8)


def _unpack_columns(columns: Columns, data: torch.Tensor) -> torch.Tensor:
    data = data[..., : columns.bins[-1].offset + columns.bins[-1].num_bytes].to(torch.int32)
    word = data[..., ::2] | data[..., 1::2] << 8
    strings = []
    for part in columns.bins:
        words = word[..., None, part.offset // 2 : part.offset // 2 + part.words]
        strings.append((words >> _shifts(part, data.device)).flatten(-2))
    codes = [
        reduce(or_, [(strings[p.bin] >> p.shift & (1 << p.width) - 1) << p.position for p in pieces])
        for pieces in columns.segments
    ]
    return torch.cat(codes, -1).to(torch.uint8)


def pack(layout: CodeLayout, codes: torch.Tensor, in_columns: bool) -> torch.Tensor:
    """Codes ``[..., dim]`` (integers, channel c below 2**widths[c]) to bytes ``[..., code_bytes]`` uint8.

    in_columns: as :attr:`.layout.RowLayout.in_columns` says of the row.
    """
    codes = codes.to(torch.int32)
    return _pack_columns(layout.require_columns(), codes) if in_columns else bits.pack(layout, codes)


def unpack(layout: CodeLayout, data: torch.Tensor, in_columns: bool) -> torch.Tensor:
    """Bytes ``[..., >= code_bytes]`` uint8 to codes ``[..., dim]`` uint8; inverse of :func:`pack`."""
    return _unpack_columns(layout.require_columns(), data) if in_columns else bits.unpack(layout, data)
