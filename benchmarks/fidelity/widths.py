"""What calibration found and what the allocators made of it: energies, fingerprints, entropy by depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_blockgtq.calibrate.inspect import width_shares
from sglang_blockgtq.calibrate.table import AllocationTable
from sglang_blockgtq.kernels.format.codebook import MAX_BITS

from .lineup import BLOCK_GTQ
from .run import Row, Subject, inv_freq

WIDTHS = range(1, MAX_BITS + 1)
ENERGY_FIELDS = ("layer", "block", "radians_per_token", "q_energy", "k_energy", "sum_score", "product_score")
ENTROPY_FIELDS = ("method", "k_bits", "layer", "depth", "entropy", *(f"share_{b}" for b in WIDTHS))


def fingerprint_fields(blocks: int) -> tuple[str, ...]:
    return ("method", "k_bits", "layer", *(f"block_{i}" for i in range(blocks)))


def energy_rows(subject: Subject) -> list[Row]:
    """Mean over KV heads of ``q = E|q_i|^2`` and ``k = E|k_i|^2`` of each block and of the scores.

    sum_score: the paper's ``(q + k) / 2``; product_score: ``q k``; both taken before the mean.
    radians_per_token: how fast the block rotates, 0 where it does not.
    """
    q, k = subject.moments.q, subject.moments.k
    values = torch.stack([q, k, (q + k) / 2, q * k], -1).mean(1)
    speed = inv_freq(subject.model).double().tolist()
    speed += [0.0] * (values.shape[1] - len(speed))
    return [
        dict(zip(ENERGY_FIELDS, (layer, block, speed[block], *values[layer, block].tolist()), strict=True))
        for layer in range(values.shape[0])
        for block in range(values.shape[1])
    ]


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in bits of each distribution ``[..., widths]``."""
    return -torch.special.xlogy(shares, shares).sum(-1) / torch.log(torch.tensor(2.0, dtype=shares.dtype))


def _fingerprint(table: AllocationTable, label: Row) -> list[Row]:
    mean = table.tensors["widths"].double().mean(1)
    return [
        {**label, "layer": layer, **{f"block_{i}": bits for i, bits in enumerate(row.tolist())}}
        for layer, row in enumerate(mean)
    ]


def _entropy(table: AllocationTable, label: Row) -> list[Row]:
    shares = width_shares(table)
    last = max(len(shares) - 1, 1)
    return [
        {
            **label,
            "layer": layer,
            "depth": layer / last,
            "entropy": float(entropy(row)),
            **{f"share_{b}": float(row[b]) for b in WIDTHS},
        }
        for layer, row in enumerate(shares)
    ]


def allocation_rows(subject: Subject, bits: Sequence[float]) -> tuple[list[Row], list[Row]]:
    """Fingerprints (bits of each block of each layer, mean over heads); shares of widths and their entropy by layer."""
    prints: list[Row] = []
    entropies: list[Row] = []
    for name in BLOCK_GTQ:
        for width in bits:
            table = subject.allocation(name, width, width)
            label: Row = {"method": name, "k_bits": width}
            prints += _fingerprint(table, label)
            entropies += _entropy(table, label)
    return prints, entropies
