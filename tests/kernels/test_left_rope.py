"""Whether a step turns queries and keys as SGLang's RoPE does on this device, as a server asks at its start."""

from functools import partial

import pytest
import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from sglang_blockgtq.backend.rope import SAME, LeftRope, distance
from sglang_blockgtq.kernels.decode.recent import Recent
from sglang_blockgtq.kernels.device.tables import templates_of
from sglang_blockgtq.kernels.layer import TritonLayer

from .matrix import DEVICE, TEMPLATE, data

pytestmark = pytest.mark.usefixtures(*["rope_on_a_cpu"] * (DEVICE == "cpu"))


@pytest.fixture
def one_layer():
    """A layer of the kernels' matrix, and copies of its requests' tokens, of whom nobody runs."""
    d = data(TEMPLATE)
    layer = TritonLayer(d.codec, DEVICE, templates_of(d.codec.layout.k))
    layer.bind(layer.new_rows(4, DEVICE))
    recent = Recent.of(1, 6, 8, 4, layer.heads, layer.head_dim, layer.v_head_dim, torch.float32, DEVICE)
    recent.bind(6)
    return layer, recent


@pytest.mark.parametrize("rotary", [64, 32])
def test_a_device_that_turns_right_is_told_from_one_that_does_not(one_layer, monkeypatch, rotary):
    """And nothing of a request is written, and no step is left behind."""
    layer, recent = one_layer
    before = recent.k.clone(), recent.step.clone()
    left = LeftRope(RotaryEmbedding(64, rotary, 90, 10000, True, torch.float32).to(DEVICE))
    off = partial(distance, left, layer, recent.layer(0), 6, torch.float32)
    assert off() < 1e-5 < SAME
    assert torch.equal(recent.k[:, :6], before[0][:, :6]) and torch.equal(recent.step, before[1])
    other = RotaryEmbedding(64, rotary, 90, 9000, True, torch.float32).to(DEVICE)
    monkeypatch.setattr(left.rope, "forward", other.forward)
    assert off() > 5 * SAME
