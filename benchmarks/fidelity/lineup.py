"""Who takes part in the panel: every method at every width, and for each the uniform cache that takes its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_blockgtq.calibrate.build import ROTATION_SEED
from sglang_blockgtq.kernels.format.codebook import MAX_BITS, MIN_BITS
from sglang_blockgtq.kernels.format.layout import NORM_BYTES

from .hadamard import SEED as HADAMARD_SEED
from .hadamard import with_hadamard
from .kivi import Kivi, KiviScaleOnly, key_range
from .methods import Cast, IntPerToken, Method, Packed
from .model import capture
from .run import Subject

BASELINE = "uniform-haar"
HADAMARD = "uniform-hadamard"
BLOCK_GTQ = ("paper", "paper-segment", "product", "product-segment", "template")
CODED = (BASELINE, HADAMARD, "int_per_token", "kivi", "kivi-scale-only", *BLOCK_GTQ)
CASTS = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
METHODS = (*CASTS, *CODED)
PEERS = ("fp8_e4m3", "int_per_token", "kivi", "kivi-scale-only")  # of other sizes than whole bits and one scale
DEFAULT = "template"  # so run at the peers' bytes, too
SEEDED = (BASELINE, HADAMARD, "product-segment", "template")  # run with further rotations if asked


@dataclass(frozen=True)
class Entry:
    """One cache of the panel. ``equal``: K and V bits of the uniform cache with as many bytes, None if none has."""

    method: Method
    seed: int
    equal: tuple[float, float] | None


def equal_bits(size: float, dim: int) -> float | None:
    """Average bits at which uniform widths and one scale take ``size`` bytes, or the next whole number of bytes.

    None above 8 bits. A method of a fractional mean size so has a baseline of up to a byte more.
    """
    blocks = dim // 2
    budget = 4 * math.ceil(size - NORM_BYTES - 1e-9)  # a bit for each channel of a block is a quarter of a byte
    return max(budget, MIN_BITS * blocks) / blocks if budget <= MAX_BITS * blocks else None


def calibration_range(subject: Subject) -> torch.Tensor:
    """Bounds ``[layers, 2, H, D]`` of the calibration text's keys."""
    bounds = torch.stack([key_range(capture(subject.model, ids, [0]).k) for ids in subject.calibration_ids])
    return torch.stack([bounds[:, :, 0].amin(0), bounds[:, :, 1].amax(0)], 1)


def _uniform(subject: Subject, name: str, k_bits: float, v_bits: float, seed: int) -> Packed:
    table = subject.allocation("uniform", k_bits, v_bits, ROTATION_SEED + seed)
    table = with_hadamard(table, HADAMARD_SEED + seed) if name == HADAMARD else table
    return Packed(table, name, subject.device)


def _method(subject: Subject, name: str, bits: float, seed: int, first: torch.Tensor | None) -> Method:
    dim = subject.head_dim
    if name in CASTS:
        return Cast(name, CASTS[name], dim, dim)
    if name in (BASELINE, HADAMARD):
        return _uniform(subject, name, bits, bits, seed)
    if name in BLOCK_GTQ:
        return Packed(subject.allocation(name, bits, bits, ROTATION_SEED + seed), device=subject.device)
    if name not in CODED:
        raise ValueError(f"--methods {name}: choose from {', '.join(METHODS)}")
    if bits != int(bits):
        raise ValueError(f"--bits {bits:g}: {name} takes whole bits; choose others with --methods")
    if name == "kivi-scale-only":
        return KiviScaleOnly(int(bits), dim, dim, first)
    return {"kivi": Kivi, "int_per_token": IntPerToken}[name](int(bits), dim, dim)


def line_up(subject: Subject, names: Sequence[str], bits: Sequence[float], seeds: int = 1) -> list[Entry]:
    """All methods with K and V of one width, then what a comparison at equal bytes still wants.

    That is the uniform cache at everybody's bytes and, if asked for, ``template`` at the peers'.
    seeds: rotations of those in :data:`SEEDED`; everything else is there once, as seed 0.
    """
    tokens, dim = len(subject.ids), subject.head_dim
    first = calibration_range(subject) if "kivi-scale-only" in names else None
    methods = [(0, _method(subject, name, 0, 0, None)) for name in names if name in CASTS]
    for name in names:
        for width in bits if name not in CASTS else ():
            for seed in range(seeds if name in SEEDED else 1):
                methods.append((seed, _method(subject, name, width, seed, first)))
    out = []
    for seed, method in methods:
        equal = [equal_bits(size, dim) for size in method.sizes(tokens)]
        out.append(Entry(method, seed, None if None in equal else tuple(equal)))

    def at_bytes(name: str, of: Sequence[str], make: Callable[[float, float], Packed]) -> list[Entry]:
        have = {(e.method.k_bits, e.method.v_bits) for e in out if e.method.name == name and e.seed == 0}
        wanted = {e.equal for e in out if e.equal and e.seed == 0 and e.method.name in of}
        return [Entry(make(*pair), 0, pair) for pair in sorted(wanted - have)]

    if DEFAULT in names:
        out += at_bytes(DEFAULT, PEERS, lambda k, v: subject.table(DEFAULT, k, v))
    return out + at_bytes(BASELINE, METHODS, lambda k, v: _uniform(subject, BASELINE, k, v, 0))
