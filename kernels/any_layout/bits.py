"""Codes of any widths as a string of bits: code after code, least significant bit first, no gap."""

from __future__ import annotations

from itertools import accumulate

import torch

from ..format.layout import CodeLayout


def bit_offsets(layout: CodeLayout) -> list[int]:
    """First bit of every channel's code within the head's bytes."""
    return [0, *accumulate(layout.widths)][:-1]


def _places(layout: CodeLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Byte and bit within it where every channel's code begins, int64 ``[dim]``. Behind all codes there may be some of
    no bits."""
    bit = torch.tensor(bit_offsets(layout), device=device)
    return bit // 8, bit % 8


def pack(layout: CodeLayout, codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[..., dim]`` int32 to bytes ``[..., code_bytes]`` uint8. A code reaches over two bytes at most."""
    byte, shift = _places(layout, codes.device)
    spread = codes << shift.int()
    out = torch.zeros(*codes.shape[:-1], layout.code_bytes + 2, dtype=torch.int32, device=codes.device)
    out.index_add_(-1, byte, spread & 0xFF)
    out.index_add_(-1, byte + 1, spread >> 8)
    return out[..., : layout.code_bytes].to(torch.uint8)


def unpack(layout: CodeLayout, data: torch.Tensor) -> torch.Tensor:
    """Bytes ``[..., >= code_bytes]`` uint8 to codes ``[..., dim]`` uint8; inverse of :func:`pack`."""
    byte, shift = _places(layout, data.device)
    mask = (1 << torch.tensor(layout.widths, device=data.device)) - 1
    data = torch.nn.functional.pad(data[..., : layout.code_bytes], (0, 2)).to(torch.int32)
    return ((data[..., byte] | data[..., byte + 1] << 8) >> shift & mask).to(torch.uint8)
