"""Codebooks of the unit Gaussian: Lloyd-Max levels, and the odd polynomials that stand in for them.

After a rotation every channel of a group looks like N(0, 1) times the group's
norm, so one codebook per bit width serves every layer and head (TurboQuant-MSE).

What is stored and read is :func:`levels`: an odd polynomial of the code, fitted to the least
squared error of N(0, 1). A kernel then turns a code into a number with a few float16 operations on two
codes at once, where a table would take a gather for each. At 1 and 2 bits the polynomial is linear, and
a code is a number as it lies. The squared error exceeds that of Lloyd-Max by 1.2 % at 2 bits, 0.2 % at
3 and 4, 1 % at 6, 4 % at 8.
"""

from __future__ import annotations

import math
from functools import cache

import torch

MIN_BITS, MAX_BITS = 1, 8
MAX_LEVELS = 1 << MAX_BITS

#: bits -> c with ``level = sum(c[i] * x ** (2 i + 1))`` and x from -1 (code 0) to 1 (the last code).
POLYNOMIAL: dict[int, tuple[float, ...]] = {
    1: (0.797885,),
    2: (1.493530,),
    3: (1.650093, 0.496700),
    4: (1.969913, 0.054492, 0.702005),
    5: (2.001703, 1.022417, -1.484877, 1.709601),
    6: (2.040773, 1.484847, -2.739932, 2.904981),
    7: (2.061516, 1.875504, -3.874392, 4.006037),
    8: (2.075457, 2.198705, -4.856979, 4.985374),
}


def _pdf(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _upper_tail(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.special.erfc(x / math.sqrt(2))


@cache
def _positive_levels(bits: int) -> torch.Tensor:
    """The 2^(bits-1) positive Lloyd-Max levels, ascending, float64. Newton on ``x_i = E[X | cell i]``.

    Plain Lloyd iteration is far from its fixed point after 100 rounds from 6 bits on; this takes about ten.
    """
    n = 1 << (bits - 1)
    # Panter-Dite: the asymptotically best levels are quantiles of N(0, 3).
    quantile = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x = math.sqrt(3.0) * math.sqrt(2.0) * torch.erfinv(quantile)
    for _ in range(200):
        edges = torch.cat([x.new_zeros(1), (x[1:] + x[:-1]) / 2])
        lo, hi = edges, torch.cat([edges[1:], x.new_full((1,), math.inf)])
        mass = _upper_tail(lo) - _upper_tail(hi)
        pdf_lo, pdf_hi = _pdf(lo), _pdf(hi)
        centroid = (pdf_lo - pdf_hi) / mass
        residual = x - centroid
        d_lo = pdf_lo * (centroid - lo) / mass
        d_hi = torch.where(torch.isinf(hi), 0.0, pdf_hi * (hi.nan_to_num(posinf=0.0) - centroid) / mass)
        d_lo[0] = 0.0  # the edge at zero is fixed by symmetry
        jacobian = torch.diag(1 - (d_lo + d_hi) / 2)
        if n > 1:
            jacobian += torch.diag(-d_lo[1:] / 2, -1) + torch.diag(-d_hi[:-1] / 2, 1)
        step = torch.linalg.solve(jacobian, residual)
        # Damped only while a full step would disorder the levels.
        scale = 1.0
        while True:
            new = x - scale * step
            if new[0] > 0 and bool((new[1:] > new[:-1]).all()):
                break
            scale /= 2
        x = new
        if float(step.abs().max()) < 1e-9:  # cell masses carry rounding noise of about 1e-11
            return x
    raise RuntimeError(f"Lloyd-Max did not converge at {bits} bits")


def check_bits(bits: int) -> int:
    """``bits`` itself if it is a whole number in 1..8, else ValueError."""
    if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits = {bits!r}: a code has a whole number of bits, {MIN_BITS} to {MAX_BITS}")
    return bits


def lloyd_max(bits: int) -> torch.Tensor:
    """The 2^bits Lloyd-Max levels of N(0, 1), ascending, float64 ``[2**bits]``."""
    positive = _positive_levels(check_bits(bits))
    return torch.cat([-positive.flip(0), positive])


def polynomial(bits: int) -> tuple[float, ...]:
    """Coefficients of ``level = sum(p[i] * y ** (2 i + 1))`` in ``y = (code - middle) / 2 ** (bits - 1)``.

    The power of two makes y exact in float16 and all coefficients of order one.
    """
    half = 1 << (check_bits(bits) - 1)
    return tuple(c * (half / (half - 0.5)) ** (2 * i + 1) for i, c in enumerate(POLYNOMIAL[bits]))


def levels(bits: int) -> torch.Tensor:
    """The 2^bits levels that codes stand for, ascending, float64 ``[2**bits]``."""
    n = 1 << check_bits(bits)
    y = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / (n / 2)
    return sum((p * y ** (2 * i + 1) for i, p in enumerate(polynomial(bits))), torch.zeros_like(y))


def boundaries(levels: torch.Tensor) -> torch.Tensor:
    """Decision thresholds of a sorted codebook: the midpoints, ``[n - 1]``."""
    return (levels[1:] + levels[:-1]) / 2


@cache
def distortion(bits: int) -> float:
    """Normalised MSE ``D(bits)`` of :func:`levels` on N(0, 1); ``D(0) = 1``.

    These are what the allocators use in place of the paper's ``4^-b`` (its equation for the greedy gain).
    """
    if bits == 0:
        return 1.0
    x = levels(bits)[1 << (bits - 1) :]
    lo = torch.cat([x.new_zeros(1), boundaries(x)])
    hi = torch.cat([boundaries(x), x.new_full((1,), 40.0)])  # beyond it the density is zero in float64
    mass = _upper_tail(lo) - _upper_tail(hi)
    first = _pdf(lo) - _pdf(hi)
    second = mass + lo * _pdf(lo) - hi * _pdf(hi)
    return float(2 * (second - 2 * x * first + x * x * mass).sum())


@cache
def codebook_table(device: torch.device | str = "cpu") -> torch.Tensor:
    """All codebooks in one table, float32 ``[9, 256]``: row b holds the 2^b levels, then zeros. Not to be changed."""
    table = torch.zeros(MAX_BITS + 1, MAX_LEVELS, dtype=torch.float64)
    for bits in range(MIN_BITS, MAX_BITS + 1):
        table[bits, : 1 << bits] = levels(bits)
    return table.to(device, torch.float32)
