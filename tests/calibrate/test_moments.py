"""Moments of keys and queries, and the mean of keys that RoPE is taken off again."""

import pytest
import torch

from sglang_blockgtq.calibrate.moments import MomentSums
from sglang_blockgtq.calibrate.rope import RopeBlocks

DIM, HEADS, GROUP = 32, 2, 3
KINDS = {
    "neox": RopeBlocks(DIM, DIM),
    "interleaved": RopeBlocks(DIM, DIM, neox=False),
    "partial": RopeBlocks(DIM, 16),
    "none": RopeBlocks(DIM, 0),
}


def theta_of(blocks: RopeBlocks) -> torch.Tensor:
    half = blocks.rotary_dim // 2
    return torch.tensor([100.0 ** (-i / half) for i in range(half)] + [0.0] * (DIM // 2 - half), dtype=torch.float64)


def rotated(x: torch.Tensor, blocks: RopeBlocks) -> torch.Tensor:
    """RoPE of a sequence ``[T, heads, DIM]`` from position 0 on, a channel pair at a time."""
    out = x.clone()
    for i, (a, b) in enumerate(blocks.channels().tolist()):
        angle = (torch.arange(len(x), dtype=torch.float64) * theta_of(blocks)[i])[:, None]
        out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., b] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
    return out


def texts(seed: int = 0, lengths=(70, 130)):
    """q, k, v of sequences before RoPE, of keys with a bias, float64."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(HEADS, DIM, generator=generator, dtype=torch.float64)
    for n in lengths:
        q, k, v = (
            torch.randn(n, heads, DIM, generator=generator, dtype=torch.float64)
            for heads in (HEADS * GROUP, HEADS, HEADS)
        )
        yield q, k + bias, v


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_keys_before_rope(kind, dtype, tolerance):
    """Of every sequence from its own position 0 on; energies are those of post-RoPE keys, which are the same."""
    blocks = KINDS[kind]
    sums, plain = MomentSums(1, HEADS, [blocks], [theta_of(blocks)]), MomentSums(1, HEADS, [blocks])
    for q, k, v in texts():
        given = [x.to(dtype) for x in (rotated(q, blocks), rotated(k, blocks), v)]
        sums.add(0, 0, *given)
        plain.add(0, 0, *given)
    moments, without = sums.mean(200), plain.mean(200)
    k = torch.cat([k for _, k, _ in texts()])[..., blocks.channels()]
    torch.testing.assert_close(moments.mean[0], k.mean(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments.k[0], k.square().sum(-1).mean(0), rtol=tolerance, atol=tolerance)
    assert torch.equal(moments.theta, theta_of(blocks)[None]) and moments.tokens == 200
    assert without.mean is None and without.theta is None
    for name in "qkv":
        assert torch.equal(getattr(moments, name), getattr(without, name))


def test_a_layer_without_frequencies_has_no_mean():
    blocks = KINDS["neox"]
    sums = MomentSums(3, HEADS, [blocks] * 3, [theta_of(blocks), None, theta_of(blocks)])
    for layer in range(3):
        for q, k, v in texts(layer):
            sums.add(layer, 0, q, k, v)
    moments = sums.mean(200)
    assert moments.theta.isnan().all(-1).tolist() == [False, True, False]
    assert moments.mean.flatten(1).any(-1).tolist() == [True, False, True] and not moments.mean.isnan().any()
    assert bool((moments.k > 0).all())


def test_sums_of_ranks_add_up():
    """Heads of two ranks, layers of two stages, and a head that both hold."""
    blocks = [KINDS["neox"], KINDS["interleaved"]]
    theta = [theta_of(b) for b in blocks]
    whole, *ranks = (MomentSums(2, HEADS, blocks, theta) for _ in range(4))
    for layer in range(2):
        for q, k, v in texts(layer):
            whole.add(layer, 0, q, k, v)
            if layer == 1:
                ranks[2].add(layer, 0, q, k, v)
                continue
            for head in range(HEADS):
                mine = slice(head * GROUP, (head + 1) * GROUP), slice(head, head + 1)
                ranks[head].add(layer, head, q[:, mine[0]], k[:, mine[1]], v[:, mine[1]])
            ranks[2].add(layer, 1, q[:, mine[0]], k[:, mine[1]], v[:, mine[1]])
    ranks[0].flat += ranks[1].flat + ranks[2].flat
    for name in ("q", "k", "v", "mean"):
        torch.testing.assert_close(getattr(ranks[0].mean(200), name), getattr(whole.mean(200), name))


def test_what_was_not_seen_and_what_is_not_finite():
    sums = MomentSums(2, HEADS, [KINDS["neox"]] * 2, [theta_of(KINDS["neox"])] * 2)
    q, k, v = next(texts())
    sums.add(0, 0, q, k, v)
    sums.add(1, 0, q[:, :GROUP], k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match=r"no calibration data for \(layer, KV head\) \[\[1, 1\]\]"):
        sums.mean(70)
    k[3, 0, 0] = torch.inf
    sums.add(1, 0, q, k, v)
    with pytest.raises(ValueError, match="layer 1: queries, keys or values are not finite during calibration"):
        sums.mean(70)
    with pytest.raises(ValueError, match="5 query heads are not a multiple of 2 KV heads"):
        sums.add(0, 0, q[:, :5], k, v)
