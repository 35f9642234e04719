"""RoPE of a step's queries and keys where they are read, so that no launch of its own writes them.

Channel i below ROTARY / 2 turns with channel i + ROTARY / 2 ("neox"); those from ROTARY on do not. Sums are float32 and
rounded to the input's type once, as SGLang's own kernel does. Definition: :func:`..reference.apply_rope`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def partner_of(channel, ROTARY: tl.constexpr):
    """The channel that each one turns with; itself for one that does not turn."""
    other = tl.where(channel < ROTARY // 2, channel + ROTARY // 2, channel - ROTARY // 2)
    return tl.where(channel < ROTARY, other, channel)


@triton.jit
def turn(x, partner, angles, channel, ROTARY: tl.constexpr):
    """Rows ``x`` and their partners' ``partner``, both of ``channel``, by the angles of their tokens: pointers to
    float32 ``[ROTARY]`` each, cosines and then sines, that broadcast with ``channel``."""
    HALF: tl.constexpr = ROTARY // 2
    turns = channel < ROTARY
    cos = tl.load(angles + channel % HALF, mask=turns, other=1.0)
    sin = tl.load(angles + HALF + channel % HALF, mask=turns, other=0.0)
    sin = tl.where(channel < HALF, -sin, sin)
    return (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def load_turned(x, at, channel, mask, angles, ROTARY: tl.constexpr):
    """``x[at + channel]``, 0 where the mask is not, turned as :func:`turn` does; as it is where ROTARY is 0."""
    value = tl.load(x + at + channel, mask=mask, other=0.0)
    if ROTARY:
        partner = tl.load(x + at + partner_of(channel, ROTARY), mask=mask, other=0.0)
        value = turn(value, partner, angles, channel, ROTARY)
    return value
