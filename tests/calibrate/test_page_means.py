"""Tables of keys that are coded less their page's mean: which mean, what is left to give bits to, and for whom."""

import math
from dataclasses import replace

import pytest
import torch

from sglang_blockgtq.calibrate.build import FLOOR, PAGE, build_table, page_means
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.segments import SEGMENT_ALLOCATORS
from sglang_blockgtq.calibrate.validate import validate
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.format.page_mean import SLOW

FITTED = ("widths", "order", "norm_index", "group", "balance", "k_gain", "k_weight", "v_gain")


def build(moments, named="template", k_bits=3, v_bits=3, rope=None, **kw):
    """named: an allocator, or one with its granularity."""
    allocator, _, granularity = named.partition("-")
    rope = [rope or RopeBlocks(2 * moments.k.shape[-1], 2 * moments.k.shape[-1])] * moments.layers
    names = {"allocator": allocator, "granularity": granularity or "segment"}
    return build_table(moments, rope, k_bits=k_bits, v_bits=v_bits, **names, **kw)


def plain(moments: Moments, **changes) -> Moments:
    """The same, of which no means are known."""
    return Moments(**{"q": moments.q, "k": moments.k, "v": moments.v, "tokens": moments.tokens, **changes})


@pytest.mark.parametrize("page", [64, 512, 4096])
def test_the_mean_is_averaged_over_the_positions_of_a_page(make_moments, page):
    """As the mean of keys at the page's positions, each rotated back to the first, would come out."""
    moments = make_moments(bias=0.5)
    found = page_means(moments, page)
    slow = moments.theta[0] * page <= SLOW
    assert 4 < int(slow.sum()) < 32
    total = torch.zeros_like(found)
    for n in range(page):
        cos, sin = (n * moments.theta[:, None]).cos(), (n * moments.theta[:, None]).sin()
        a, b = moments.mean.unbind(-1)
        total += torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    torch.testing.assert_close(found[:, :, slow], total[:, :, slow] / page)
    assert not found[:, :, ~slow].any()
    # The slowest of them has its whole mean, one that turns by two radians a little less.
    share = found.square().sum(-1) / moments.mean.square().sum(-1)
    assert float(share[..., -1].min()) > 0.99 and 0.65 < float(share[0, 0, slow][0]) < 0.97


def test_a_block_is_slow_up_to_two_radians_a_page(make_moments):
    moments = make_moments(bias=0.5)
    moments.theta[:] = 3 / PAGE
    moments.theta[:, 3], moments.theta[:, 4] = SLOW / PAGE, 1.001 * SLOW / PAGE
    moments.theta[:, 5] = 0  # channels without RoPE
    found = page_means(moments, PAGE)
    assert found.any(-1).any(0).any(0).nonzero()[:, 0].tolist() == [3, 5]
    torch.testing.assert_close(found[:, :, 5], moments.mean[:, :, 5])


def test_layers_without_frequencies_have_no_mean(make_moments):
    moments = make_moments(layers=3, bias=0.5)
    moments.theta[1] = torch.nan
    found = page_means(moments, PAGE)
    assert found.flatten(1).any(-1).tolist() == [True, False, True] and bool(found.isfinite().all())
    table = build(moments)
    validate(table)
    assert table.header.page == PAGE and not table.tensors["theta"][1].any()


def test_bits_order_and_gains_are_for_what_is_left(make_moments):
    """The table is that of keys whose energy is less by their mean's."""
    moments = make_moments(bias=0.9)
    left = moments.k - page_means(moments, PAGE).square().sum(-1)
    assert float((left / moments.k).min()) < 0.2 and bool((left > 0).all())
    table, want = build(moments), build(plain(moments, k=left))
    for name in FITTED:
        assert torch.equal(table.tensors[name], want.tensors[name]), name
    assert any(not torch.equal(table.tensors[x], build(plain(moments)).tensors[x]) for x in ("widths", "k_gain"))
    assert (table.header.page, want.header.page) == (PAGE, 0)
    torch.testing.assert_close(table.tensors["mean"].double(), page_means(moments, PAGE), rtol=1e-6, atol=1e-9)
    assert torch.equal(table.tensors["theta"], moments.theta)


def test_keys_that_are_their_mean_leave_almost_nothing(make_moments):
    """Nor less than that: what calibration saw none of may come alive."""
    moments = make_moments(bias=0.5)
    moments.theta[:, -4:] = 0
    moments.mean[:, :, -4:] *= math.sqrt(1 / 0.5)
    table = build(moments)
    validate(table)
    least = FLOOR * (moments.k - page_means(moments, PAGE).square().sum(-1)).mean(-1)
    product = (table.tensors["balance"].double() ** 4)[..., -4:]
    want = moments.q[..., -4:] / least[..., None]
    torch.testing.assert_close(product, want, rtol=1e-4, atol=0)
    assert bool((table.tensors["widths"][..., -4:] == table.tensors["widths"].amin()).all())


@pytest.mark.parametrize(
    "rule, page",
    [
        ("template", PAGE),
        ("product", PAGE),
        ("uniform", 0),
        ("paper", 0),
        ("paper-block", 0),
        ("product-block", 0),
    ],
)
def test_which_allocators_take_means_off(make_moments, rule, page):
    moments = make_moments(bias=0.5)
    table = build(moments, rule)
    validate(table)
    assert table.header.page == page
    assert {"mean", "theta"} <= table.tensors.keys() or not page
    assert (table.layer_codec(0).mean is not None) == bool(page)
    if not page:
        assert table.header == build(plain(moments), rule).header


@pytest.mark.parametrize("page", [64, 128, 2048])
def test_the_page_is_a_choice(make_moments, page):
    table = build(make_moments(bias=0.5), page=page)
    validate(table)
    assert table.header.page == page
    mean = table.layer_codec(1).mean
    assert mean.page == page
    slow = mean.mean.any(-1).any(0)
    assert torch.equal(slow, mean.theta * page <= SLOW)


def test_rows_that_are_not_in_columns_are_plain(make_moments):
    """3 bits of 80 channels, be it of values: the same table as if no means were known, and 2 bits have theirs."""
    moments = make_moments(blocks=40, bias=0.9)
    table, want = build(moments), build(plain(moments))
    assert table.header == want.header and table.header.page == 0 and not table.row_layout(0).in_columns
    assert all(torch.equal(table.tensors[name], x) for name, x in want.tensors.items())
    assert table.tensors.keys() == want.tensors.keys()
    assert build(moments, k_bits=2).header.page == 0
    assert build(moments, k_bits=2, v_bits=2).header.page == PAGE


def test_a_page_of_an_experiments_rule(make_moments):
    """Rules that have no means of their own, with them."""
    rule = replace(SEGMENT_ALLOCATORS["paper"], means=True)
    table = build(make_moments(bias=0.5), "paper", rule=rule)
    validate(table)
    assert table.header.page == PAGE


def sample(moments: Moments, positions: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Keys ``[T, H, D]`` of layer 0 at ``positions``, neox: their mean, and noise of the rest of their energy."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(positions), *moments.k.shape[1:], 2
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    rest = (moments.k[0] - moments.mean[0].square().sum(-1)) / 2
    key = torch.view_as_complex(moments.mean[0] + noise * rest.sqrt()[..., None])
    angle = positions.double()[:, None] * moments.theta[0]
    turned = torch.view_as_real(key * torch.polar(torch.ones_like(angle), angle)[:, None])
    return torch.cat(turned.unbind(-1), -1).float()


@pytest.mark.parametrize("start", [0, 500, 30_000])
def test_biased_keys_lose_less(make_moments, start):
    """At equal bytes, wherever they lie; every key of a strong bias is flagged."""
    moments = make_moments(bias=0.97, base=1e8)
    positions = torch.arange(start, start + 300)
    k = sample(moments, positions)
    v = torch.zeros_like(k)
    weight = moments.q[0].repeat(1, 2)
    error = []
    for given in (moments, plain(moments)):
        codec = build(given).layer_codec(0)
        found = reference.round_trip(codec, k, v, positions)[0]
        error.append(float(((found - k).square() * weight).sum(-1).mean()))
        if codec.mean is not None:
            flags = reference.scales_of(codec, reference.encode(codec, k, v, positions))[..., 0] < 0
            assert float(flags.float().mean()) > 0.99
    assert error[0] < 0.25 * error[1]


def test_means_of_nothing_change_no_row(make_moments):
    """As of a model that has no slow blocks."""
    moments = make_moments(bias=0.5)
    moments.theta[:] = 1.0
    table, want = build(moments), build(plain(moments))
    positions = torch.arange(400, 600)
    k = torch.randn(200, 2, 64, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        rows = [reference.encode(t.layer_codec(layer), k, k, positions) for t in (table, want)]
        assert torch.equal(*rows)


def test_a_model_without_frequencies_gets_no_means(make_moments):
    """As one with M-RoPE: the same table as if no means were known."""
    moments = make_moments(bias=0.5)
    moments.theta[:] = torch.nan
    assert build(moments).header == build(plain(moments)).header and build(moments).header.page == 0


def test_a_ranks_heads_have_their_own_means(make_moments):
    table = build(make_moments(heads=4, bias=0.5))
    whole, part = table.page_mean(1), table.page_mean(1, slice(2, 4))
    assert torch.equal(part.mean, whole.mean[2:])
    assert torch.equal(part.theta, whole.theta) and torch.equal(part.pairs, whole.pairs)
    assert torch.equal(table.layer_codec(1, slice(2, 4)).mean.mean, whole.mean[2:])


@pytest.mark.parametrize("rope", [RopeBlocks(64, 64), RopeBlocks(64, 64, False), RopeBlocks(64, 32)], ids=str)
def test_means_are_of_the_channels_that_rope_pairs(make_moments, rope):
    table = build(make_moments(bias=0.5), rope=rope)
    assert torch.equal(table.page_mean(0).pairs, rope.channels())


def test_the_hash_sees_means(make_moments):
    hashes = {build(make_moments(bias=bias)).header.table_hash for bias in (None, 0.5, 0.4)}
    hashes |= {build(make_moments(bias=0.5), page=64).header.table_hash}
    hashes |= {build(make_moments(bias=0.5, base=2e6)).header.table_hash}
    assert len(hashes) == 5 and build(make_moments(bias=0.5)).header.table_hash in hashes
