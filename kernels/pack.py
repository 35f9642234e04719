"""Bit packing of codes into the planes of a CodeLayout: the naive PyTorch twin."""

from __future__ import annotations

import torch

from .layout import CodeLayout, Plane


def _elements(plane: Plane, codes: torch.Tensor) -> torch.Tensor:
    """The plane's fields ``[..., num_elements]`` cut out of codes ``[..., dim]``."""
    mask = (1 << plane.width) - 1
    parts = [(codes[..., run.start : run.stop] >> run.position) & mask for run in plane.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def pack(layout: CodeLayout, codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[..., dim]`` (integers, channel c below 2**widths[c]) to bytes ``[..., code_bytes]`` uint8."""
    codes = codes.to(torch.int32)
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
