"""Frequencies read off tables of cosines and sines, and whether keys do rotate by them."""

import math
from functools import partial

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sglang_blockgtq.calibrate.frequencies import TOLERANCE, frequencies, of_blocks
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.rope_check import (
    DRIFT_LIMIT,
    PROBE_STRIDE,
    PROBE_TOKENS,
    drift,
    probe_positions,
    trusted,
)

BASE = {"rope_theta": 10_000.0}
LONG = {"original_max_position_embeddings": 4096, "factor": 8.0}
#: rope_type -> parameters of transformers' own formula.
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {**LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": LONG,
}


def scaled(kind: str, partial_factor: float = 1.0, theta: float = 10_000.0) -> tuple[torch.Tensor, float]:
    """Frequencies float64 of heads of 64 channels by transformers, and what cosines and sines are multiplied with."""
    parameters = {"rope_theta": theta, "rope_type": kind, "partial_rotary_factor": partial_factor, **SCALINGS[kind]}
    config = LlamaConfig(head_dim=64, max_position_embeddings=32_768, rope_parameters=parameters)
    if kind == "default":
        dim = int(64 * partial_factor)
        return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0
    found, factor = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    return found.double(), factor


def turning(theta: torch.Tensor, dtype: torch.dtype = torch.float32, factor: float = 1.0):
    """Cosines and sines as a model computes them: angles in float32, then rounded."""

    def turn(positions: torch.Tensor) -> torch.Tensor:
        angle = positions.float()[:, None] * theta.float()
        return (torch.stack([angle.cos(), angle.sin()], 1) * factor).to(dtype)

    return turn


@pytest.mark.parametrize("base", [1e4, 1e6])
@pytest.mark.parametrize("positions", [2, 100, 4096, 32_768, 131_072])
@pytest.mark.parametrize("kind", SCALINGS)
def test_tables_that_are_linear_in_the_position(kind, positions, base):
    theta, factor = scaled(kind, theta=base)
    assert (kind == "yarn") == (factor > 1.2)
    found = frequencies(turning(theta, factor=factor), positions)
    # The rounding of float32 cosines, over the positions, is what the slowest blocks are off by.
    torch.testing.assert_close(found, theta, rtol=1e-6, atol=4e-7 / positions)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_tables(kind, dtype):
    """At the last position an angle is as good as what it was rounded to."""
    theta, factor = scaled(kind)
    found = frequencies(turning(theta, dtype, factor), 32_768)
    assert float((found - theta).abs().max()) * 32_768 < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("sign", [1, -1])
def test_the_fastest_turn_there_is(sign):
    theta = sign * torch.tensor([0.0, 1e-9, 1.0, 3.0, 3.14], dtype=torch.float64)
    torch.testing.assert_close(frequencies(turning(theta), 1000), theta, rtol=1e-6, atol=1e-9)


def switched(positions: torch.Tensor) -> torch.Tensor:
    """As longrope does: other factors from the original context on."""
    theta = scaled("default")[0]
    longer = theta / torch.linspace(1, 16, 32)
    angle = positions.double()[:, None] * torch.where(positions[:, None] < 4096, theta, longer)
    return torch.stack([angle.cos(), angle.sin()], 1)


def growing(positions: torch.Tensor) -> torch.Tensor:
    """As dynamic NTK does: a base that grows with the position."""
    base = 1e4 * (positions.double() / 4096).clamp(min=1)
    angle = positions.double()[:, None] * base[:, None] ** (-torch.arange(32) / 32)
    return torch.stack([angle.cos(), angle.sin()], 1)


def broken(positions: torch.Tensor) -> torch.Tensor:
    return turning(scaled("default")[0])(positions).masked_fill(positions[:, None, None] == 0, torch.nan)


@pytest.mark.parametrize("turn", [switched, growing, broken])
def test_tables_that_are_not_linear(turn):
    assert frequencies(turn, 32_768) is None
    if turn is not broken:
        assert frequencies(turn, 4096) is not None  # what it does further on is not this model's


def test_an_offset_is_no_frequency():
    theta = scaled("default")[0]
    turn = turning(theta)
    assert frequencies(lambda n: turn(n + 1), 4096) is None


def test_a_wobble_is_noticed():
    theta = scaled("default")[0]

    def turn(n, size):
        angle = n.double()[:, None] * theta + size * (n % 3 == 0)[:, None]
        return torch.stack([angle.cos(), angle.sin()], 1)

    assert frequencies(partial(turn, size=TOLERANCE / 4), 4096) is not None
    assert frequencies(partial(turn, size=TOLERANCE * 4), 4096) is None


@pytest.mark.parametrize("positions", [0, 1])
def test_a_context_without_a_second_position(positions):
    assert frequencies(turning(scaled("default")[0]), positions) is None


def test_channels_without_rope_do_not_rotate():
    theta = scaled("default", 0.25)[0]
    assert len(theta) == 8
    found = of_blocks(frequencies(turning(theta), 4096), RopeBlocks(64, 16))
    torch.testing.assert_close(found[:8], theta, rtol=1e-6, atol=1e-10)
    assert found.shape == (32,) and not found[8:].any()
    assert torch.equal(of_blocks(None, RopeBlocks(64, 0)), torch.zeros(32, dtype=torch.float64))
    assert of_blocks(None, RopeBlocks(64, 16)) is None
    assert of_blocks(theta, RopeBlocks(64, 64)) is None  # of other blocks than the layer has


NEOX, INTERLEAVED, QUARTER = RopeBlocks(64, 64), RopeBlocks(64, 64, neox=False), RopeBlocks(64, 16)


def probe(blocks: RopeBlocks, theta: torch.Tensor, positions: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Keys of one token ``[T, 2, 64]``, rotated in ``dtype`` as models do it."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 64, generator=generator).to(dtype)[..., blocks.channels()]
    angle = torch.tensor(positions, dtype=torch.float32)[:, None] * theta.float()
    cos, sin = angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]
    out = torch.empty(len(positions), 2, 64, dtype=dtype)
    out[..., blocks.channels()] = torch.stack(
        [key[..., 0] * cos - key[..., 1] * sin, key[..., 1] * cos + key[..., 0] * sin], -1
    )
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [NEOX, INTERLEAVED, QUARTER], ids=["neox", "interleaved", "quarter"])
def test_right_and_wrong_frequencies_are_far_apart(blocks, dtype):
    """Everywhere that calibration would notice it: another base, another scaling, none, another direction."""
    theta = of_blocks(scaled("default", blocks.rotary_dim / 64)[0], blocks)
    positions = probe_positions(32_768)
    k = probe(blocks, theta, positions, dtype)
    assert drift(k, blocks, theta, positions) < DRIFT_LIMIT / 4
    wrong = [theta / 8, theta * 1.05, -theta, torch.zeros_like(theta), theta.flip(0)]
    assert min(drift(k, blocks, other, positions) for other in wrong) > 3 * DRIFT_LIMIT
    assert drift(k, blocks, None, positions) == math.inf


def test_a_scaling_that_only_slow_blocks_have_is_noticed():
    """llama3's leaves fast blocks alone: few positions of the probe are far enough to tell."""
    plain, other = scaled("default")[0], scaled("llama3")[0]
    positions = probe_positions(32_768)
    k = probe(NEOX, other, positions, torch.bfloat16)
    assert drift(k, NEOX, other, positions) < DRIFT_LIMIT / 4
    assert drift(k, NEOX, plain, positions) > 2 * DRIFT_LIMIT


def test_probe_positions():
    for context in (48, 64, 100, 330, 1024, 2048, 131_072):
        positions = probe_positions(context)
        assert positions == sorted(set(positions)) and positions[0] == 0 and positions[-1] < context
        assert PROBE_TOKENS <= len(positions) <= PROBE_TOKENS + 4
        near = (PROBE_TOKENS - 1) * PROBE_STRIDE
        assert positions[-1] == context - 1 if context - 1 > near else positions[-1] <= near
    assert probe_positions(131_072)[-4:] == [32_767, 65_535, 98_303, 131_071]


def test_layers_that_cannot_be_trusted_are_named(caplog):
    theta, rope = torch.ones(32, dtype=torch.float64), [NEOX] * 12
    found = trusted([theta] * 12, [DRIFT_LIMIT] * 12, rope)
    assert all(x is theta for x in found) and not caplog.records
    found = trusted([theta, None, *[theta] * 10], [0.0, 0.0, math.nan, 2 * DRIFT_LIMIT, *[0.0] * 8], rope)
    assert [x is None for x in found] == [False, True, True, True, *[False] * 8]
    assert "keys of layers [1, 2, 3] do not rotate by one angle a position" in caplog.text
    caplog.clear()
    assert trusted([None] * 12, [math.inf] * 12, rope) == [None] * 12
    assert "keys of layers [0, 1, 2, 3, 4, 5, 6, 7, ...] do not" in caplog.text
    caplog.clear()
    assert trusted([theta], [math.inf], [RopeBlocks(64, 0)]) == [None]  # learned positions: nothing is lost
    assert not caplog.records
