"""Bit packing of codes into the bytes of a CodeLayout: the naive PyTorch twin."""

from __future__ import annotations

import torch

from .columns import COLUMNS, WORD_BITS, Bin, Columns
from .layout import CodeLayout, Plane


def _elements(plane: Plane, codes: torch.Tensor) -> torch.Tensor:
    """The plane's fields ``[..., num_elements]`` cut out of codes ``[..., dim]``."""
    mask = (1 << plane.width) - 1
    parts = [(codes[..., run.start : run.stop] >> run.position) & mask for run in plane.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _shifts(part: Bin, device: torch.device) -> torch.Tensor:
    """Where the bits of each repetition start in the bin's words, ``[repeat, 1]``."""
    return torch.arange(0, WORD_BITS, part.bits, dtype=torch.int32, device=device)[:, None]


def _pack_columns(columns: Columns, codes: torch.Tensor) -> torch.Tensor:
    strings = [torch.zeros_like(codes[..., :COLUMNS]) for _ in columns.bins]
    for slot, pieces in enumerate(columns.slots):
        code = codes[..., slot * COLUMNS : (slot + 1) * COLUMNS]
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
    slots = [
        sum((strings[p.bin] >> p.shift & (1 << p.width) - 1) << p.position for p in pieces) for pieces in columns.slots
    ]
    return torch.cat(slots, -1).to(torch.uint8)


def pack(layout: CodeLayout, codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[..., dim]`` (integers, channel c below 2**widths[c]) to bytes ``[..., code_bytes]`` uint8."""
    codes = codes.to(torch.int32)
    if layout.columns is not None:
        return _pack_columns(layout.columns, codes)
    out = torch.zeros(*codes.shape[:-1], layout.code_bytes, dtype=torch.int32, device=codes.device)
    for plane in layout.planes:
        elements = _elements(plane, codes)
        if plane.num_bytes:
            planar = elements[..., : plane.num_planar].unflatten(-1, (plane.slots, plane.num_bytes))
            shifts = torch.arange(plane.slots, device=codes.device, dtype=torch.int32)[:, None] * plane.width
            out[..., plane.offset : plane.offset + plane.num_bytes] = (planar << shifts).sum(-2, dtype=torch.int32)
        for i in range(plane.num_planar, plane.num_elements):
            bit = plane.tail_bit + (i - plane.num_planar) * plane.width
            out[..., layout.tail_offset + bit // 8] |= elements[..., i] << (bit % 8)
    return out.to(torch.uint8)


def unpack(layout: CodeLayout, data: torch.Tensor) -> torch.Tensor:
    """Bytes ``[..., >= code_bytes]`` uint8 to codes ``[..., dim]`` uint8; inverse of :func:`pack`."""
    if layout.columns is not None:
        return _unpack_columns(layout.columns, data)
    codes = torch.zeros(*data.shape[:-1], layout.dim, dtype=torch.uint8, device=data.device)
    for plane in layout.planes:
        mask = (1 << plane.width) - 1
        parts = []
        if plane.num_bytes:
            planar = data[..., plane.offset : plane.offset + plane.num_bytes]
            shifts = torch.arange(plane.slots, device=data.device, dtype=torch.uint8)[:, None] * plane.width
            parts.append(((planar[..., None, :] >> shifts) & mask).flatten(-2))
        for i in range(plane.num_planar, plane.num_elements):
            bit = plane.tail_bit + (i - plane.num_planar) * plane.width
            parts.append((data[..., layout.tail_offset + bit // 8, None] >> (bit % 8)) & mask)
        elements = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        first = 0
        for run in plane.runs:
            n = run.stop - run.start
            codes[..., run.start : run.stop] |= elements[..., first : first + n] << run.position
            first += n
    return codes
