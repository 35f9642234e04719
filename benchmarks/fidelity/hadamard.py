"""Uniform TQ-MSE behind a random-sign Hadamard in place of a Haar rotation, as serving engines build it.

A counter-claim holds that weighting key channels does not help once the head is rotated by a Hadamard matrix. So the
baseline has one, too. Randomised Hadamard: QuIP# (arXiv 2402.04396, section 3), QuaRot (arXiv 2404.00456, section 3).
"""

from __future__ import annotations

import torch

from sglang_blockgtq.calibrate.table import AllocationTable

SEED = 0x6861


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(p: int) -> torch.Tensor:
    """``[p, p]`` float64: 1 where ``i - j`` is a square modulo the prime p, -1 where it is none, 0 if i = j."""
    squares = {x * x % p for x in range(1, p)}
    sign = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, p)], dtype=torch.float64)
    index = torch.arange(p)
    return sign[(index[:, None] - index) % p]


def _bordered(p: int, corner_sign: float) -> torch.Tensor:
    """The Jacobsthal matrix with a row of ones above and a column of ``corner_sign`` beside it, ``[p + 1, p + 1]``."""
    out = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    out[0, 1:], out[1:, 0], out[1:, 1:] = 1.0, corner_sign, _jacobsthal(p)
    return out


def hadamard(n: int) -> torch.Tensor:
    """A matrix of +-1 with orthogonal rows, ``[n, n]`` float64. Every supported head_dim has one.

    Sylvester's for powers of two, else Paley's first or second construction, doubled as often as it takes.
    Raises ValueError where none of these gives one.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n & (n - 1) and n % 4 == 0 and _is_prime(n - 1):
        return torch.eye(n, dtype=torch.float64) + _bordered(n - 1, -1.0)
    if n & (n - 1) and n % 4 == 0 and n // 2 % 4 == 2 and _is_prime(n // 2 - 1):
        conference = _bordered(n // 2 - 1, 1.0)
        eye = torch.eye(n // 2, dtype=torch.float64)
        return torch.kron(conference, two) + torch.kron(eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double())
    if n % 2:
        raise ValueError(f"no Hadamard matrix of {n} rows is known here; head dimensions in steps of 16 have one")
    return torch.kron(two, hadamard(n // 2))


def hadamard_rotation(n: int, seed: int = SEED) -> torch.Tensor:
    """``hadamard(n) diag(signs) / sqrt(n)`` with seeded random signs, ``[n, n]`` float64, orthonormal."""
    generator = torch.Generator().manual_seed(seed * 1000 + n)
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return hadamard(n) * signs / n**0.5


def with_hadamard(table: AllocationTable, seed: int = SEED) -> AllocationTable:
    """The same table with every rotation, that of values included, a randomised Hadamard matrix."""
    tensors = dict(table.tensors)
    for name, matrix in table.tensors.items():
        if name.startswith("rotation."):
            tensors[name] = hadamard_rotation(len(matrix), seed).float()
    tensors["v_rotation"] = hadamard_rotation(table.header.v_head_dim, seed + 1).float()
    return AllocationTable(table.header, tensors).sealed()
