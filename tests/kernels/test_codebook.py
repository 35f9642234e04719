"""Lloyd-Max codebooks against their known distortions and their defining conditions."""

import math

import pytest
import torch

from sglang_blockgtq.kernels.codebook import boundaries, boundary_table, codebook_table, distortion, lloyd_max

#: Lloyd-Max distortion of N(0, 1) as the literature prints it (Max 1960), to three or four digits.
KNOWN = {0: 1.0, 1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.00950, 5: 0.00250}
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


@pytest.mark.parametrize("bits", KNOWN)
def test_distortion_is_the_known_constant(bits):
    assert distortion(bits) == pytest.approx(KNOWN[bits], rel=2e-3)


@pytest.mark.parametrize("bits", BITS)
def test_distortion_is_that_of_the_levels(bits):
    """E[(X - c)^2] summed over cells by quadrature, not by the identity the code uses."""
    levels = lloyd_max(bits)
    x = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    pdf = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    error = (x - levels[torch.bucketize(x, boundaries(levels))]) ** 2
    assert float((error * pdf).sum() * (x[1] - x[0])) == pytest.approx(distortion(bits), rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_the_centroids_of_their_cells(bits):
    levels = lloyd_max(bits)
    upper = len(levels) // 2  # closed forms lose digits in the lower tail
    _, centroid = cell(edges_of(levels)[upper:])
    # 1 - cdf cancels in the outermost cells, whose mass is down to 1e-6.
    torch.testing.assert_close(centroid, levels[upper:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_sorted_and_symmetric(bits):
    levels = lloyd_max(bits)
    assert levels.shape == (1 << bits,)
    assert bool((levels[1:] > levels[:-1]).all())
    assert torch.equal(levels, -levels.flip(0))


def test_each_bit_brings_between_2_7_and_4_times_less_distortion():
    ratios = [distortion(b) / distortion(b + 1) for b in range(8)]
    assert all(2.7 < r < 4.0 for r in ratios)
    assert ratios == sorted(ratios)  # towards the 4 of high-rate theory


def test_tables_hold_levels_and_padded_thresholds():
    table = codebook_table()
    thresholds = boundary_table(table)
    assert table.shape == thresholds.shape == (9, 256)
    assert bool((table[0] == 0).all())
    for bits in BITS:
        n = 1 << bits
        torch.testing.assert_close(table[bits, :n], lloyd_max(bits).float())
        assert bool((table[bits, n:] == 0).all())
        torch.testing.assert_close(thresholds[bits, : n - 1], boundaries(lloyd_max(bits)).float())
        assert bool((thresholds[bits, n - 1 :] == math.inf).all())


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, None, "3"])
def test_rejects_other_widths(bits):
    with pytest.raises(ValueError, match=f"bits = {bits!r}"):
        lloyd_max(bits)
