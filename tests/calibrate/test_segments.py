"""``paper`` and ``product`` by whole segments: budgets, templates, and what choosing them stands on."""

import itertools
import re

import pytest
import torch

from sglang_blockgtq.calibrate.allocate import ALLOCATORS, template_error, template_widths
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.segments import (
    SEGMENT_ALLOCATORS,
    check_segments,
    choose_templates,
    energy_error,
    rule_of,
)
from sglang_blockgtq.calibrate.table import AllocationTable
from sglang_blockgtq.kernels.device.tables import MAX_TEMPLATES
from sglang_blockgtq.kernels.format.columns import columns_of

BOTH = pytest.mark.parametrize("name", SEGMENT_ALLOCATORS)


def score(name: str, moments: Moments) -> torch.Tensor:
    """What blocks are ranked by."""
    return (moments.q + moments.k) / 2 if name == "paper" else moments.q * moments.k


def segments_of(name: str, moments: Moments, bits: float) -> torch.Tensor:
    """Widths of ranked segments ``[layers, heads, segments]``; every block of a segment must have its width."""
    widths = SEGMENT_ALLOCATORS[name].widths(moments, bits)
    assert widths.dtype == torch.uint8 and widths.shape == moments.k.shape
    # Scores as the allocator ranks them: float32 for the paper's.
    ranking = score(name, moments).float() if name == "paper" else score(name, moments).sqrt()
    order = ranking.argsort(dim=-1, descending=True, stable=True)
    ranked = widths.gather(-1, order).unflatten(-1, (-1, 8)).int()
    assert (ranked == ranked[..., :1]).all()
    return ranked[..., 0]


def cost(name: str, moments: Moments, segments: torch.Tensor) -> float:
    """The criterion, from ranked segments: relative to flat widths, the mean over heads and the worst layer's."""
    measure, ranked = energy_error, score("paper", moments).float().double()
    if name == "product":
        measure, ranked = template_error, score("product", moments).sqrt()
    ranked = ranked.sort(-1, descending=True).values
    flat = [int(segments[0, 0].sum()) // segments.shape[-1]] * ranked.shape[-1]
    layers = []
    for layer, widths in zip(ranked, segments, strict=True):
        errors = [
            float(measure(head, [w for w in own for _ in range(8)]) / measure(head, flat))
            for head, own in zip(layer, widths.tolist(), strict=True)
        ]
        layers.append(sum(errors) / len(errors))
    return sum(layers) / len(layers) + max(layers)


@BOTH
@pytest.mark.parametrize("blocks", [32, 40, 64, 80, 128])
@pytest.mark.parametrize("bits", [2, 2.6, 3.2, 4])
def test_every_head_spends_the_budget_in_columns(make_moments, name, blocks, bits):
    """What does not make a bit more for a whole segment is not spent."""
    moments, segments = make_moments(5, 4, blocks, spread=2.0), blocks // 8
    budget = int(segments * bits + 1e-9)
    if budget % 2:
        with pytest.raises(ValueError, match="fill no 16-bit words"):
            SEGMENT_ALLOCATORS[name].widths(moments, bits)
        return
    found = segments_of(name, moments, bits)
    assert (found.sum(-1) == budget).all() and found.min() >= 1 and found.max() <= 8
    templates = {tuple(widths) for widths in found.flatten(0, 1).tolist()}
    assert 1 < len(templates) <= MAX_TEMPLATES
    assert all(columns_of(widths) is not None and list(widths) == sorted(widths)[::-1] for widths in templates)


@BOTH
@pytest.mark.parametrize("bits", [1, 8])
def test_the_ends_of_the_range_leave_no_choice(make_moments, name, bits):
    assert (SEGMENT_ALLOCATORS[name].widths(make_moments(), bits) == bits).all()


@BOTH
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("blocks", [32, 64])
def test_never_worse_than_one_template_for_all(make_moments, name, bits, blocks):
    moments = make_moments(4, 4, blocks, spread=2.5)
    single = torch.tensor(template_widths(moments, bits)[::8]).expand(4, 4, -1)
    several = segments_of(name, moments, bits)
    assert cost(name, moments, several) < cost(name, moments, single)
    # Each head has the one that suits it best of those that occur.
    occurring = several.flatten(0, 1).unique(dim=0)
    for layer, head in itertools.product(range(4), range(4)):
        alone = Moments(*(x[layer, head].view(1, 1, -1) for x in (moments.q, moments.k)), moments.v, 2048)
        costs = [cost(name, alone, widths.view(1, 1, -1)) for widths in occurring]
        assert cost(name, alone, several[layer, head].view(1, 1, -1)) == pytest.approx(min(costs), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_paper_head_alone_gets_the_literal_greedy(make_moments, seed):
    """One segment-bit at a time to the first argmax of s * 4^-b, with s summed over 8 ranked blocks; if in columns."""
    moments = make_moments(1, 1, 64, seed=seed)
    ranked = score("paper", moments)[0, 0].float().sort(descending=True).values.double()
    scores = ranked.view(8, 8).sum(-1).tolist()
    widths = [1] * 8
    for _ in range(3 * 8 - 8):
        gains = [s * 4.0**-b if b < 8 else -1.0 for s, b in zip(scores, widths, strict=True)]
        widths[gains.index(max(gains))] += 1
    assert columns_of(tuple(widths)) is not None
    assert segments_of("paper", moments, 3)[0, 0].tolist() == widths


def test_product_prefers_segments_by_the_square_of_summed_roots():
    """Eight equal blocks cost eight times what one with all of their score does, as rotation spreads it."""
    top, rest = [64.0] * 8, [0.25] * 16

    def widths(second: list[float]) -> list[int]:
        q = torch.tensor(top + second + rest, dtype=torch.float64).view(1, 1, -1)
        return segments_of("product", Moments(q, torch.ones_like(q), torch.ones(1, 1), 2048), 3)[0, 0].tolist()

    even, single = widths([8.0] * 8), widths([62.25] + [0.25] * 7)
    assert even[1] > single[1]


@BOTH
def test_templates_do_not_depend_on_the_order_of_heads(make_moments, name):
    moments = make_moments(4, 4, 64, spread=2.0)
    turned = Moments(moments.q.flip(1), moments.k.flip(1), moments.v.flip(1), 2048)
    assert torch.equal(SEGMENT_ALLOCATORS[name].widths(turned, 3), SEGMENT_ALLOCATORS[name].widths(moments, 3).flip(1))


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_of_one_template_is_better(seed):
    error = torch.rand(9, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def total(chosen):
        layers = [sum(min(float(error[c, i, h]) for c in chosen) for h in range(5)) / 5 for i in range(3)]
        return sum(layers) / 3 + max(layers)

    chosen = choose_templates(error, 4)
    assert len(set(chosen)) == 4 and chosen == choose_templates(error, 4)
    best = total(chosen)
    assert best <= min(total([c]) for c in range(9))
    for i, other in itertools.product(range(4), range(9)):
        assert total([*chosen[:i], *chosen[i + 1 :], other]) >= best - 1e-12


def test_a_template_that_helps_nobody_is_not_taken():
    error = torch.stack([torch.full((2, 3), float(i)) for i in range(5)]).double()
    assert choose_templates(error) == [0]


@pytest.mark.parametrize("name", ALLOCATORS)
def test_segments_are_the_default(make_moments, name):
    assert rule_of(name) is rule_of(name, "segment") is SEGMENT_ALLOCATORS.get(name, ALLOCATORS[name])
    table = build_table(make_moments(), [RopeBlocks(64, 64)] * 2, k_bits=3, v_bits=3, allocator=name)
    assert table.header.granularity == "segment"
    assert table.row_layout(0).in_columns and table.row_layout(0).k_norms == 1


@BOTH
def test_blocks_can_be_had(make_moments, name):
    assert rule_of(name, "block") is ALLOCATORS[name]
    rope = [RopeBlocks(64, 64)] * 2
    table = build_table(make_moments(), rope, k_bits=3, v_bits=3, allocator=name, granularity="block")
    assert table.header.granularity == "block"
    assert torch.equal(table.tensors["widths"], ALLOCATORS[name].widths(make_moments(), 3))


@BOTH
def test_a_table_by_segments(make_moments, name, tmp_path):
    moments, rope = make_moments(3, 4, 64, spread=2.0), [RopeBlocks(128, 128)] * 3
    table = build_table(moments, rope, k_bits=3, v_bits=3, allocator=name, granularity="segment")
    table.save(tmp_path / "t.safetensors")
    table = AllocationTable.load(tmp_path / "t.safetensors")
    assert (table.header.allocator, table.header.granularity) == (name, "segment")
    block = build_table(moments, rope, k_bits=3, v_bits=3, allocator=name, granularity="block")
    assert block.header.table_hash != table.header.table_hash
    kinds = {table.k_layout(i, h) for i in range(3) for h in range(4)}
    assert 1 < len(kinds) <= MAX_TEMPLATES and set(table.k_templates) == kinds
    assert list(table.k_templates) == sorted(kinds, key=lambda head: head.widths, reverse=True)
    for i in range(3):
        row = table.row_layout(i)
        # One scale: the bytes of uniform widths.
        assert row.in_columns and row.k_norms == 1 and row.head_bytes == 48 + 48 + 4
        assert table.row_layout(i, slice(1, 2)).in_columns
        codec = table.layer_codec(i)
        eye = torch.eye(128).expand(4, -1, -1)
        torch.testing.assert_close(codec.q_in.mT @ codec.k_in, eye, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["uniform", "template"])
def test_other_allocators_have_no_choice(make_moments, name):
    with pytest.raises(
        ValueError, match=rf"granularity block: has no effect on the allocator {name}; .*paper, product"
    ):
        build_table(make_moments(), [RopeBlocks(64, 64)] * 2, k_bits=3, v_bits=3, allocator=name, granularity="block")
    with pytest.raises(ValueError, match="granularity = head: choose one of block, segment"):
        rule_of("paper", "head")


@pytest.mark.parametrize(
    "head_dim, bits, says",
    [
        (72, 3, "head_dim 72 is no multiple of a segment's 16 channels; --kv-quant-granularity block takes any"),
        (
            80,
            3,
            "--kv-quant-k-bits 3 gives the 5 segments of head_dim 80 15 bits, which fill no 16-bit words; 2.8 and 3.2",
        ),
        (128, 2.9, "23 bits, which fill no 16-bit words; 2.75 and 3 work"),
        (32, 1.5, "3 bits, which fill no 16-bit words; 1 and 2 work"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(head_dim, bits, says):
    with pytest.raises(ValueError) as e:
        check_segments(head_dim, bits)
    assert says in str(e.value) and str(e.value).startswith("--kv-quant-granularity segment: ")


@pytest.mark.parametrize("head_dim", [32, 48, 64, 80])
def test_the_averages_that_an_error_names_do_work(head_dim):
    """All even sums of widths do here, and no odd one."""
    segments = head_dim // 16
    for budget in range(segments, 8 * segments + 1):
        if budget % 2 == 0:
            assert check_segments(head_dim, budget / segments) == budget
        elif 1 < budget / segments < 8:
            with pytest.raises(ValueError) as e:
                check_segments(head_dim, budget / segments)
            averages = [float(x) for x in re.search(r"; (.*) work, or", str(e.value))[1].split(" and ")]
            near = [b for b in (budget - 1, budget + 1) if segments <= b <= 8 * segments]
            assert [check_segments(head_dim, average) for average in averages] == near
