"""The assembly that turns words into levels, run instruction by instruction without a GPU."""

import re
from itertools import combinations_with_replacement

import numpy as np
import pytest

from sglang_blockgtq.kernels.device.dequant import assembly, constraints, depressed, offset_of, place_of
from sglang_blockgtq.kernels.device.tables import CodeSpec, column_shifts
from sglang_blockgtq.kernels.format.codebook import levels, polynomial
from sglang_blockgtq.kernels.format.columns import Columns, columns_of
from sglang_blockgtq.kernels.format.layout import CodeLayout, uniform_layout

#: Error of a level in float16, of the largest level: up to six operations, each rounded by 2^-11 of its result.
ERROR = 1.5 * 2.0**-10
MIXTURES = [
    (6, 4, 3, 3, 2, 2, 2, 2),
    (6, 3, 2, 1),
    (8, 5, 5, 4, 4, 4, 4, 4, 4, 2, 2, 2),
    (3,) * 8,
    (7,) * 8,
    (5,) * 4,
    (6,) * 8,
    (3, 3, 2, 2),
    (2,) * 4 + (2,) * 5,
    (1,) * 2,
]


def halves(x: np.ndarray) -> np.ndarray:
    """The two float16 numbers in each of ``x`` uint32, as float64 ``[..., 2]``."""
    return x.astype("<u4").view("<f2").reshape(*x.shape, 2).astype(np.float64)


def pair(x: np.ndarray) -> np.ndarray:
    """Rounded to float16 and put in pairs."""
    return np.ascontiguousarray(x.astype("<f2")).view("<u4").reshape(x.shape[:-1])


def run(text: str, operands: list[np.ndarray | None]) -> np.ndarray:
    """What ``$0`` holds in the end. Knows just the instructions that are used."""
    register = {f"${i + 1}": x.astype(np.uint32) for i, x in enumerate(operands) if x is not None}

    def value(name: str) -> np.ndarray:
        return register[name] if name in register else np.full_like(operands[0], int(name, 0), dtype=np.uint32)

    body = re.fullmatch(r"\{ \.reg \.b32 [\w, ]+; (.*) \}", text)[1]
    for line in filter(None, map(str.strip, body.split(";"))):
        op, rest = line.split(" ", 1)
        to, *names = (name.strip() for name in rest.split(","))
        args = [value(name) for name in names]
        if op == "mov.b32":
            register[to] = args[0]
        elif op == "shr.u32":
            register[to] = args[0] >> args[1]
        elif op == "shl.b32":
            register[to] = args[0] << args[1]
        elif op == "shf.r.wrap.b32":
            both = args[1].astype(np.uint64) << np.uint64(32) | args[0].astype(np.uint64)
            register[to] = (both >> (args[2] & 31).astype(np.uint64)).astype(np.uint32)
        elif op == "lop3.b32":
            assert names[3] == "0xEA"
            register[to] = args[0] & args[1] | args[2]
        else:
            a, *others = map(halves, args)
            if op == "sub.rn.f16x2":
                register[to] = pair(a - others[0])
            elif op == "mul.rn.f16x2":
                register[to] = pair(a * others[0])
            else:
                assert op == "fma.rn.f16x2", line
                register[to] = pair(a * others[0] + others[1])  # exact in float64 up to its own rounding
    return register["$0"]


def words_of(
    columns: Columns, column: int, codes: list[np.ndarray], generator: np.random.Generator
) -> list[np.ndarray]:
    """The 16-bit words of each bin that carry a column's ``codes [N]`` of every segment; all else is noise."""
    words = [generator.integers(0, 1 << 16, codes[0].shape) for _ in columns.bins]
    for code, pieces in zip(codes, columns.segments, strict=True):
        for p in pieces:
            at = p.shift + column // columns.bins[p.bin].words * columns.bins[p.bin].bits
            mask = (1 << p.width) - 1
            words[p.bin] = words[p.bin] & ~(mask << at) | (code >> p.position & mask) << at
    return words


@pytest.mark.parametrize("kind", ["codebook", "poly", "value_poly"])
@pytest.mark.parametrize("widths", MIXTURES, ids=str)
def test_every_code_becomes_its_level(widths, kind):
    """codebook: as unpacking takes them; poly, value_poly: keys and values in decode, the slope left out, and the
    offset left in where no coefficient remains."""
    columns = columns_of(widths)
    spec = CodeSpec.of(CodeLayout(tuple(w for w in widths for _ in range(16))))
    shifts, generator = column_shifts().numpy(), np.random.default_rng(0)
    for segment, pieces in enumerate(spec.segments):
        repeated = [spec.repeat[b] > 1 for b in pieces[::4]]
        poly = getattr(spec, kind)[segment]
        text, at = assembly.fn(pieces, repeated, poly), place_of.fn(pieces, repeated[0])
        for column in (0, 5, 15):
            # Both elements of a register at once, each with all its codes and other noise beside them.
            codes = [generator.permutation(256) % (1 << w) for w in widths]
            pairs = [np.reshape(w, (-1, 2)) for w in words_of(columns, column, codes, generator)]
            operands = [pairs[b][:, 0] | pairs[b][:, 1] << 16 for b in pieces[::4]]
            for i, b in enumerate(pieces[::4]):
                if repeated[i]:
                    # A 32-bit operand comes once for each element; that of the second is not looked at.
                    shift = int(shifts[spec.bins[b][2], column]) + pieces[4 * i + 1] - pieces[4 * i + 3] - at
                    operands += [np.full(len(operands[0]), shift % 2**32, np.uint32), None]
            assert constraints.fn(pieces, repeated, poly).count("r") == 1 + len(operands)
            got = halves(run(text, operands)).flatten()
            if not poly:
                assert widths[segment] <= 2 and (kind == "poly" or max(widths) <= 2)
                got -= offset_of.fn(pieces, repeated[0])
            if kind != "codebook":
                got *= spec.slope[segment]
            book = levels(widths[segment]).numpy()
            assert set(codes[segment]) == set(range(1 << widths[segment]))
            assert np.abs(got - book[codes[segment]]).max() < ERROR * book[-1]
            order = np.argsort(codes[segment], kind="stable")
            assert (np.diff(got[order]) >= 0).all(), "levels keep their order"


@pytest.mark.parametrize("segments", [4, 8])
def test_every_mixture_has_places_under_the_exponent(segments):
    """Whatever widths a head's segments have, each code fits beside what centres it in the ten bits of a mantissa."""
    found = 0
    for widths in combinations_with_replacement(range(8, 0, -1), segments):
        columns = columns_of(widths)
        if columns is None:
            continue
        found += 1
        spec = CodeSpec.of(CodeLayout(tuple(w for w in widths for _ in range(16))))
        for width, pieces in zip(widths, spec.segments, strict=True):
            place = place_of.fn(pieces, spec.repeat[pieces[0]] > 1)
            assert 1 <= place <= 10 - width
    assert found > 100


@pytest.mark.parametrize("bits", range(1, 9))
def test_depressed_polynomials_are_the_same(bits):
    poly, y = polynomial(bits), np.linspace(-1, 1, 101)
    h, rest, slope = depressed.fn(poly)
    s = y * y + h
    value = s if len(poly) > 1 else np.ones_like(y)
    for c in rest:
        value = value * s + c
    np.testing.assert_allclose(slope * y * value, sum(p * y ** (2 * i + 1) for i, p in enumerate(poly)), rtol=1e-12)


def test_a_code_of_three_bits_takes_three_operations():
    """What remains of the codebook in decode: a subtraction, one fused operation, a product."""
    spec = CodeSpec.of(CodeLayout((3,) * 128))
    for segment, pieces in enumerate(spec.segments):
        text = assembly.fn(pieces, [spec.repeat[b] > 1 for b in pieces[::4]], spec.poly[segment])
        assert re.findall(r"(\w+)\.rn\.f16x2", text) == ["sub", "fma", "mul"]


def test_neighbouring_columns_share_their_shift():
    """Which lets one shift do for both elements of a register."""
    shifts = column_shifts()
    assert bool((shifts[:, ::2] == shifts[:, 1::2]).all()) and shifts[3].unique().numel() == 8


def test_mixtures_have_every_kind_of_piece():
    """Cut codes, narrow bins, and codes that need no shift and that need one either way."""
    kinds = set()
    for widths in MIXTURES:
        spec = CodeSpec.of(CodeLayout(tuple(w for w in widths for _ in range(16))))
        for pieces in spec.segments:
            repeated = [spec.repeat[b] > 1 for b in pieces[::4]]
            kinds.add(("pieces", len(pieces) // 4))
            kinds |= {("repeat", spec.repeat[b]) for b in pieces[::4]}
            text = assembly.fn(pieces, repeated, (1.0,))
            kinds.add("shr" if "shr" in text else "shl" if "shl" in text else "none" if "shf" not in text else "shf")
    assert {("pieces", 1), ("pieces", 2), ("pieces", 3), *(("repeat", r) for r in (1, 2, 4, 8))} <= kinds
    assert {"shr", "shl", "none", "shf"} <= kinds
    assert uniform_layout(128, 3).columns.widths in MIXTURES  # the default for values
