"""Lloyd-Max codebooks against their defining conditions, and the polynomials that stand in for them."""

import math

import pytest
import torch

from sglang_blockgtq.kernels.format.codebook import (
    boundaries,
    codebook_table,
    distortion,
    levels,
    lloyd_max,
    polynomial,
)

#: Lloyd-Max distortion of N(0, 1) as the literature prints it (Max 1960), to three or four digits.
KNOWN = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.00950, 5: 0.00250}
BITS = range(1, 9)


def cell(edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass and mean of N(0, 1) between neighbouring edges, from the closed forms."""
    cdf = 0.5 * torch.special.erfc(-edges / math.sqrt(2))
    pdf = torch.exp(-edges * edges / 2) / math.sqrt(2 * math.pi)
    mass = cdf[1:] - cdf[:-1]
    return mass, (pdf[:-1] - pdf[1:]) / mass


def edges_of(levels: torch.Tensor) -> torch.Tensor:
    infinity = levels.new_tensor([math.inf])
    return torch.cat([-infinity, boundaries(levels), infinity])


def mean_squared_error(levels: torch.Tensor) -> float:
    """E[(X - c)^2] for the nearest level c by quadrature, not by the identity that the code uses."""
    x = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    pdf = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    error = (x - levels[torch.bucketize(x, boundaries(levels))]) ** 2
    return float((error * pdf).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("bits", KNOWN)
def test_lloyd_max_has_the_known_distortion(bits):
    assert mean_squared_error(lloyd_max(bits)) == pytest.approx(KNOWN[bits], rel=2e-3)


@pytest.mark.parametrize("bits", BITS)
def test_distortion_is_that_of_the_levels(bits):
    assert mean_squared_error(levels(bits)) == pytest.approx(distortion(bits), rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_polynomials_cost_little(bits):
    """Against Lloyd-Max, which nothing of so many levels can beat."""
    most = 1.0025 if bits <= 4 else 1.012 if bits <= 6 else 1.05
    if bits == 2:
        most = 1.012  # linear: a code is a number as it lies
    assert 1 - 1e-6 <= distortion(bits) / mean_squared_error(lloyd_max(bits)) < most


@pytest.mark.parametrize("bits", BITS)
def test_coefficients_are_the_best(bits):
    """A hundredth more or less of any of them makes the error greater."""
    best = mean_squared_error(levels(bits))
    y = (2 * torch.arange(1 << bits, dtype=torch.float64) - ((1 << bits) - 1)) / (1 << bits)
    for i, c in enumerate(polynomial(bits)):
        for factor in (0.99, 1.01):
            assert mean_squared_error(levels(bits) + (factor - 1) * c * y ** (2 * i + 1)) > best


def test_no_bits_keep_nothing():
    assert distortion(0) == 1.0


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_the_polynomial(bits):
    """Of y from -1 + 1/n to 1 - 1/n, so that all y are exact in float16, which has 11 significant bits."""
    n = 1 << bits
    y = (2 * torch.arange(n, dtype=torch.float64) - (n - 1)) / n
    assert torch.equal(y.half().double(), y)
    want = torch.zeros_like(y)
    for i, c in enumerate(polynomial(bits)):
        want += c * y ** (2 * i + 1)
    torch.testing.assert_close(levels(bits), want)


@pytest.mark.parametrize("bits", BITS)
def test_lloyd_max_levels_are_the_centroids_of_their_cells(bits):
    best = lloyd_max(bits)
    upper = len(best) // 2  # closed forms lose digits in the lower tail
    _, centroid = cell(edges_of(best)[upper:])
    # 1 - cdf cancels in the outermost cells, whose mass is down to 1e-6.
    torch.testing.assert_close(centroid, best[upper:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("codebook", [levels, lloyd_max])
@pytest.mark.parametrize("bits", BITS)
def test_levels_are_sorted_and_symmetric(codebook, bits):
    book = codebook(bits)
    assert book.shape == (1 << bits,) and book.dtype == torch.float64
    assert bool((book[1:] > book[:-1]).all())
    torch.testing.assert_close(book, -book.flip(0), rtol=1e-15, atol=0)


def test_each_bit_brings_between_2_7_and_4_times_less_distortion():
    ratios = [distortion(b) / distortion(b + 1) for b in range(8)]
    assert all(2.7 < r < 4.0 for r in ratios)
    assert ratios == sorted(ratios)  # towards the 4 of high-rate theory


def test_the_table_holds_all_levels():
    table = codebook_table()
    assert table.shape == (9, 256) and table.dtype == torch.float32
    assert bool((table[0] == 0).all())
    for bits in BITS:
        n = 1 << bits
        torch.testing.assert_close(table[bits, :n], levels(bits).float())
        assert bool((table[bits, n:] == 0).all())


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, None, "3"])
def test_rejects_other_widths(bits):
    for make in (levels, lloyd_max, polynomial):
        with pytest.raises(ValueError, match=f"bits = {bits!r}"):
            make(bits)
