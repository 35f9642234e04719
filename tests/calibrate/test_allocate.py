"""Allocators: budgets, rules, invariances."""

import hashlib
import itertools
import math
from fractions import Fraction

import pytest
import torch

from sglang_blockgtq.calibrate.allocate import (
    ALLOCATOR_VERSION,
    ALLOCATORS,
    TEMPLATE_WIDTHS,
    block_budget,
    template_candidates,
    template_error,
    template_widths,
)
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.segments import SEGMENT_ALLOCATORS, rule_of
from sglang_blockgtq.kernels.format.codebook import distortion
from sglang_blockgtq.kernels.format.columns import columns_of
from sglang_blockgtq.kernels.format.layout import CodeLayout

BITS = ["1", "1.3", "2", "2.3", "2.5", "3", "3.7", "4", "6.25", "8"]
BLOCKS = [16, 24, 32, 40, 64, 120, 128]


def floor_budget(blocks: int, bits: str) -> int:
    return math.floor(Fraction(bits) * blocks)


def unit_of(blocks: int) -> int:
    """Blocks that a template gives one width: 8, or an eighth of 256 channels; 1 where those don't fit."""
    if blocks % 8:
        return 1
    return blocks // 8 if blocks % 64 == 0 else 8


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("bits", [*BITS, "4.1"])  # 120 * 4.1 is just below 492 in floating point
def test_block_budget_is_the_exact_floor(blocks, bits):
    assert block_budget(blocks, float(bits)) == floor_budget(blocks, bits)


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("blocks", [16, 20, 40, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_every_head_spends_exactly_the_budget(make_moments, name, blocks, bits):
    widths = ALLOCATORS[name].widths(make_moments(blocks=blocks), float(bits))
    assert widths.dtype == torch.uint8
    assert widths.shape == (2, 2, blocks)
    unit = unit_of(blocks) if name == "template" else 1
    assert (widths.sum(-1) == floor_budget(blocks, bits) // unit * unit).all()
    assert widths.min() >= 1
    assert widths.max() <= 8


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("bits", [1.0, 8.0])
def test_the_ends_of_the_range_leave_no_choice(make_moments, name, bits):
    assert (ALLOCATORS[name].widths(make_moments(), bits) == bits).all()


def literal_paper(q: list[float], k: list[float], bits: float) -> list[int]:
    """The paper's greedy as written: one block-bit at a time to the first argmax of s * 4^-b."""
    score = [float(torch.tensor((a + b) / 2, dtype=torch.float32)) for a, b in zip(q, k, strict=True)]
    widths = [1] * len(score)
    for _ in range(math.floor(len(score) * bits) - len(score)):
        gains = [s * 4.0**-b if b < 8 else -1.0 for s, b in zip(score, widths, strict=True)]
        widths[gains.index(max(gains))] += 1
    return widths


@pytest.mark.parametrize("bits", [1.5, 2, 3, 4, 5.5, 7])
@pytest.mark.parametrize("spread", [0.3, 2.0, 5.0])
def test_paper_is_the_literal_greedy(make_moments, bits, spread):
    moments = make_moments(blocks=32, seed=int(bits * 10), spread=spread)
    widths = ALLOCATORS["paper"].widths(moments, bits)
    for layer, head in itertools.product(range(2), range(2)):
        expected = literal_paper(moments.q[layer, head].tolist(), moments.k[layer, head].tolist(), bits)
        assert widths[layer, head].tolist() == expected


@pytest.mark.parametrize("name", ["paper", "product"])
def test_ties_go_to_the_lowest_index(name):
    equal = torch.ones(1, 1, 16, dtype=torch.float64)
    widths = ALLOCATORS[name].widths(Moments(equal, equal, equal[..., 0], 2048), 2.25)
    assert widths[0, 0].tolist() == [3] * 4 + [2] * 12


def test_template_breaks_ties_by_index_too():
    equal = torch.ones(1, 1, 16, dtype=torch.float64)
    widths = ALLOCATORS["template"].widths(Moments(equal, equal, equal[..., 0], 2048), 2.25)
    assert widths[0, 0].tolist() == sorted(widths[0, 0].tolist(), reverse=True)


@pytest.mark.parametrize("name", ["paper", "product", "template"])
@pytest.mark.parametrize("bits", [2, 2.7, 3, 4])
def test_more_score_never_means_fewer_bits(make_moments, name, bits):
    moments = make_moments(blocks=64, spread=2.5)
    score = moments.q + moments.k if name == "paper" else moments.q * moments.k
    widths = ALLOCATORS[name].widths(moments, bits)
    ranked = widths.gather(-1, score.argsort(-1, descending=True)).int()
    assert (ranked[..., 1:] <= ranked[..., :-1]).all()
    assert (ranked[..., 0] > ranked[..., -1]).all()


def rescaled(moments: Moments) -> Moments:
    """q * c and k / c per block leave every logit as it was. Powers of two, so that products are exact."""
    factor = 2.0 ** torch.arange(-8, 8, dtype=torch.float64).repeat(moments.k.shape[-1] // 16)
    return Moments(moments.q * factor**2, moments.k / factor**2, moments.v, moments.tokens)


@pytest.mark.parametrize("name", ["product", "template"])
def test_product_scores_do_not_see_a_rescaling_of_q_against_k(make_moments, name):
    moments = make_moments(blocks=32)
    allocate = ALLOCATORS[name].widths
    assert torch.equal(allocate(moments, 3), allocate(rescaled(moments), 3))


def test_the_paper_score_does_see_it(make_moments):
    moments = make_moments(blocks=32)
    allocate = ALLOCATORS["paper"].widths
    assert not torch.equal(allocate(moments, 3), allocate(rescaled(moments), 3))


@pytest.mark.parametrize("seed", range(4))
def test_product_is_optimal_for_its_own_measure(make_moments, seed):
    """Against every allocation of four blocks."""
    moments = make_moments(1, 1, 4, seed=seed, spread=2.0)
    score = (moments.q * moments.k)[0, 0].tolist()

    def error(widths):
        return sum(s * distortion(b) for s, b in zip(score, widths, strict=True))

    every = (w for w in itertools.product(range(1, 9), repeat=4) if sum(w) == 12)
    found = ALLOCATORS["product"].widths(moments, 3)[0, 0].tolist()
    assert error(found) == pytest.approx(min(map(error, every)), rel=1e-12)


@pytest.mark.parametrize("bits", [2, 2.5, 2.9, 3, 3.3, 4, 5.5])
@pytest.mark.parametrize("blocks", [16, 40, 64])
def test_template_gives_every_head_the_same_multiset(make_moments, blocks, bits):
    widths = ALLOCATORS["template"].widths(make_moments(3, 4, blocks, spread=3.0), bits)
    ranked = widths.sort(-1, descending=True).values
    assert (ranked == ranked[0, 0]).all()
    assert ranked[0, 0].unique().numel() > 1


@pytest.mark.parametrize("blocks", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_template_lies_in_columns(make_moments, blocks, bits):
    """So that the fast kernels read it; segments of 16 channels, of which each has one width."""
    widths = template_widths(make_moments(blocks=blocks, spread=3.0), bits)
    assert 1 < len(set(widths)) <= TEMPLATE_WIDTHS
    layout = CodeLayout(tuple(w for w in widths for _ in range(2)))
    assert layout.columns is not None
    assert all(len(set(widths[i : i + unit_of(blocks)])) == 1 for i in range(0, blocks, unit_of(blocks)))


@pytest.mark.parametrize("blocks, bits, columns", [(32, 2.5, True), (64, 2.5, True), (40, 2, True), (40, 3, False)])
def test_where_no_widths_fill_words_any_will_do(make_moments, blocks, bits, columns):
    """80 channels of 3 bits: 15 bits in each column. The budget is spent all the same, in planes."""
    widths = template_widths(make_moments(blocks=blocks, spread=3.0), bits)
    assert sum(widths) == blocks * bits and len(set(widths)) > 1
    layout = CodeLayout(tuple(w for w in widths for _ in range(2)))
    assert (layout.columns is not None) == columns


@pytest.mark.parametrize("units, segments", [(8, 1), (8, 2), (4, 1), (8, 0)])
def test_template_candidates(units, segments):
    """All width multisets of a budget that fill words: compared with a search through all there are."""
    every = [w[::-1] for w in itertools.combinations_with_replacement(range(1, 9), units)]
    for budget in (units, 2 * units + 1, 3 * units, 4 * units + 2, 8 * units):
        candidates = template_candidates(budget, units, segments)
        want = {
            w
            for w in every
            if sum(w) == budget
            and len(set(w)) <= TEMPLATE_WIDTHS
            and (segments == 0 or columns_of(tuple(x for x in w for _ in range(segments))) is not None)
        }
        assert len(candidates) == len(want) and set(candidates) == want


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_whole_bits_always_have_a_template(bits):
    """That of even widths at the least, or one near it."""
    for units in (4, 8):
        assert template_candidates(units * bits, units)


@pytest.mark.parametrize("eighths", range(8, 64, 3))
def test_what_makes_no_whole_unit_is_not_spent(make_moments, eighths):
    """A few blocks more would tear their segment in two."""
    widths = template_widths(make_moments(blocks=64, spread=3.0), eighths / 8 + 0.1)
    assert sum(widths) == 8 * eighths
    assert widths == sorted(widths, reverse=True)
    assert 1 <= widths[-1] <= widths[0] <= 8


@pytest.mark.parametrize("eighths", range(8, 65, 5))
def test_heads_that_are_no_segments_spend_all(make_moments, eighths):
    """20 blocks, 40 channels: no segments of 16, and no templates either."""
    widths = template_widths(make_moments(blocks=20, spread=3.0), eighths / 8)
    assert sum(widths) == int(20 * eighths / 8)
    assert widths == sorted(widths, reverse=True) and 1 <= widths[-1] <= widths[0] <= 8


@pytest.mark.parametrize("blocks", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_template_is_the_best_candidate(make_moments, blocks, bits):
    moments = make_moments(blocks=blocks, spread=2.0)
    ranked = (moments.q * moments.k).sqrt().sort(-1, descending=True).values
    uniform = template_error(ranked, [bits] * blocks)

    def relative(widths):
        """Mean over all heads and layers, and the worst layer's."""
        layers = (template_error(ranked, widths) / uniform).mean(1)
        return float(layers.mean() + layers.max())

    chosen = template_widths(moments, bits)
    units = blocks // 8
    others = [[w for w in c for _ in range(8)] for c in template_candidates(units * bits, units)]
    assert len(others) > 3 and relative(chosen) == pytest.approx(min(map(relative, others)))
    assert relative(chosen) < 2 * 0.8


def test_even_energies_get_even_widths():
    equal = torch.ones(2, 2, 32, dtype=torch.float64)
    assert template_widths(Moments(equal, equal, equal[..., 0], 2048), 3) == [3] * 32


#: sha256 of the widths of the moments below; who changes a rule raises ALLOCATOR_VERSION, by which cached tables are
#: told from those of another rule, and puts the new value here.
WIDTHS = {1: "0875a22ddbce01d6"}


def test_rules_that_change_have_another_version(make_moments):
    digest = hashlib.sha256()
    for allocator in ALLOCATORS:
        for granularity in ("segment", "block") if allocator in SEGMENT_ALLOCATORS else ("segment",):
            for bits in (2, 3, 4):
                widths = rule_of(allocator, granularity).widths(make_moments(4, 4, 64, spread=2.0), bits)
                digest.update(widths.numpy().tobytes())
    assert WIDTHS[ALLOCATOR_VERSION] == digest.hexdigest()[:16]
