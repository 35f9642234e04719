"""Exact merge of partial attentions over disjoint keys, in place. Twin: :func:`.naive.merge_states`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Launch

_ELEMENTS = 4096  # of an output tile


# Numbers that differ between calls are not specialised on: one binary serves them all.
@triton.jit(
    do_not_specialize=["num_tokens", "stride_lh", "stride_plh"],
    do_not_specialize_on_alignment=["lse", "part_lse"],
)
def _merge_kernel(
    out,
    lse,
    part,
    part_lse,
    num_tokens,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    stride_pt,
    stride_ph,
    stride_plt,
    stride_plh,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    token = token.to(tl.int64)
    lse_at = lse + token * stride_lt + head * stride_lh
    a = tl.load(lse_at, mask=live, other=float("-inf"))
    b = tl.load(part_lse + token * stride_plt + head * stride_plh, mask=live, other=float("-inf"))
    # FlashAttention calls the LSE of no keys +inf where it leaves the kernel out.
    b = tl.where(b == float("inf"), float("-inf"), b)
    peak = tl.maximum(a, b)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    a = tl.exp(a - peak)
    b = tl.exp(b - peak)
    total = a + b
    safe = tl.where(total > 0, total, 1.0)

    channel = tl.arange(0, PADDED)
    inside = (channel < DIM)[None, :]
    out_at = out + (token * stride_ot + head * stride_oh)[:, None] + channel[None, :]
    part_at = part + (token * stride_pt + head * stride_ph)[:, None] + channel[None, :]
    # A part without keys is not read: its output may be anything.
    x = tl.load(out_at, mask=(live & (a > 0))[:, None] & inside, other=0.0)
    y = tl.load(part_at, mask=(live & (b > 0))[:, None] & inside, other=0.0).to(tl.float32)
    merged = x * (a / safe)[:, None] + y * (b / safe)[:, None]
    tl.store(out_at, merged, mask=live[:, None] & inside)
    tl.store(lse_at, tl.where(total > 0, peak + tl.log(safe), float("-inf")), mask=live)


def merge_into(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge ``part [T, Hq, Dv]`` with ``part_lse [T, Hq]`` into float32 ``out`` and ``lse`` of those shapes.

    LSE is in natural logarithm and -inf where there were no keys; any strides but contiguous channels.
    """
    if out.dtype != torch.float32 or lse.dtype != torch.float32 or part_lse.dtype != torch.float32:
        raise ValueError(f"out {out.dtype}, lse {lse.dtype}, part_lse {part_lse.dtype}: float32 is needed")
    if not (out.shape == part.shape and lse.shape == part_lse.shape == out.shape[:2]):
        raise ValueError(
            f"out {tuple(out.shape)}, lse {tuple(lse.shape)}, part {tuple(part.shape)}, part_lse "
            f"{tuple(part_lse.shape)}: [T, Hq, Dv] and [T, Hq] of one size are needed"
        )
    tokens, heads, dim = out.shape
    if not tokens:
        return
    launch, block = _prepared(_merge_kernel, dim)
    stride_ot, stride_oh, _ = out.stride()
    stride_pt, stride_ph, _ = part.stride()
    stride_lt, stride_lh = lse.stride()
    stride_plt, stride_plh = part_lse.stride()
    launch(
        (-(-tokens // block), heads, 1),
        out=out,
        lse=lse,
        part=part,
        part_lse=part_lse,
        num_tokens=tokens,
        stride_ot=stride_ot,
        stride_oh=stride_oh,
        stride_lt=stride_lt,
        stride_lh=stride_lh,
        stride_pt=stride_pt,
        stride_ph=stride_ph,
        stride_plt=stride_plt,
        stride_plh=stride_plh,
    )


@cache
def _prepared(kernel: Any, dim: int) -> tuple[Launch, int]:
    """The launch for heads of ``dim`` channels, and the tokens of a program."""
    padded = triton.next_power_of_2(dim)
    block = max(1, _ELEMENTS // padded)
    return Launch(kernel, DIM=dim, PADDED=padded, TOKENS=block), block
