"""The chunk's own keys and values on their way to the workspace, in the launch that unpacks the prefix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_chunk(
    chunk,  # [T, H, DIM]
    out,  # [places, H, DIM]
    dest,  # None: token n goes to place first_place + n
    first_place,
    tile,
    num_tokens,
    head,
    channel,  # the program's
    stride_ct,
    stride_ch,
    stride_t,
    stride_h,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of one head's tokens, bit for bit."""
    n = tile * TOKENS + tl.arange(0, TOKENS)
    live = n < num_tokens
    inside = live[:, None] & (channel < DIM)[None, :]
    if dest is None:
        place = first_place.to(tl.int64) + n
    else:
        place = tl.load(dest + n, mask=live, other=0).to(tl.int64)
    value = tl.load(chunk + (n.to(tl.int64) * stride_ct + head * stride_ch)[:, None] + channel[None, :], mask=inside)
    tl.store(out + (place * stride_t + head * stride_h)[:, None] + channel[None, :], value, mask=inside)
