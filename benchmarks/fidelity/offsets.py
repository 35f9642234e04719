"""Query-key logit error by the paper's definition: one token against itself, rotated through a window of offsets.

Block-GTQ, arXiv 2606.24033, the diagnostic of its attention tables: for a query and a key of the same token, before
RoPE, ``|q^T R_D k - q^T R_D k^|`` without 1/sqrt(d), averaged over 50 offsets D evenly spaced in -1024 .. 1024.
Rotations commute and keep block products, so vectors after RoPE give the same numbers: nothing has to be rotated back.
"""

from __future__ import annotations

import torch

from sglang_blockgtq.calibrate.rope import RopeBlocks

WINDOW, OFFSETS = 1024, 50


def offset_mae(
    q: torch.Tensor,
    error: torch.Tensor,
    rope: RopeBlocks,
    inv_freq: torch.Tensor,
    window: int = WINDOW,
    offsets: int = OFFSETS,
) -> torch.Tensor:
    """Mean ``|q^T R_D error|`` over heads and offsets, per token ``[N]``.

    q ``[N, Hq, D]``: queries. error ``[N, H, D]``: keys less approximate keys, of the same tokens. inv_freq
    ``[rotary_dim / 2]``: radians per position of each rotated block; channels that are not rotated have angle zero.
    """
    pairs = rope.channels().to(q.device)
    grouped = q.float().unflatten(1, (error.shape[1], -1))[..., pairs]  # [N, H, G, blocks, 2]
    e = error.float()[:, :, None, pairs]
    in_phase = (grouped * e).sum(-1)
    across = grouped[..., 1] * e[..., 0] - grouped[..., 0] * e[..., 1]
    offset = torch.linspace(-window, window, offsets, dtype=torch.float64, device=q.device)
    angle = torch.zeros(len(pairs), offsets, dtype=torch.float64, device=q.device)
    angle[: len(inv_freq)] = inv_freq.to(q.device).double()[:, None] * offset
    logit = in_phase @ angle.cos().float() + across @ angle.sin().float()
    return logit.abs().mean((1, 2, 3))
