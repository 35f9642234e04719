"""RoPE that a decode step leaves to attention: by whom, when, and that nothing is turned twice or not at all."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from sglang_blockgtq.backend.rope import KNOWN, LeftRope
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.capture import frequencies_of
from sglang_blockgtq.capture import rope_of as rope_of_layers
from sglang_blockgtq.kernels.reference import apply_rope

pytestmark = pytest.mark.usefixtures("rope_on_a_cpu")

HEADS, KV_HEADS, DIM = 4, 2, 16


class Attention(torch.nn.Module):
    """In a model's place."""

    def __init__(self, layer_id, rope):
        super().__init__()
        self.attn, self.rotary_emb = RadixAttention(HEADS, DIM, 1.0, KV_HEADS, layer_id), rope


Attention.__module__, Attention.__qualname__ = "sglang.srt.models.llama", "LlamaAttention"


def rope_of(rotary=DIM, neox=True, base=10000, dtype=torch.float32):
    return RotaryEmbedding(DIM, rotary, 64, base, neox, dtype)


def model_of(*ropes):
    return torch.nn.ModuleList(Attention(i, rope) for i, rope in enumerate(ropes))


def tokens(count=3):
    return torch.randn(count, HEADS * DIM), torch.randn(count, KV_HEADS * DIM)


@pytest.fixture
def left():
    rope = rope_of()
    model = model_of(rope, rope)
    left = LeftRope.of(model, [0, 1])
    assert all(module.rotary_emb is left for module in model)
    return left


def test_whoever_asks_finds_the_models_rope():
    """As a new table does, for new weights."""
    rope = rope_of(DIM // 2)
    model = model_of(rope)
    before = rope_of_layers(model, DIM), frequencies_of(model, DIM)
    left = LeftRope.of(model, [0])
    assert model[0].rotary_emb is left and left.cos_sin_cache is rope.cos_sin_cache
    after = rope_of_layers(model, DIM), frequencies_of(model, DIM)
    assert after[0] == before[0] == {0: RopeBlocks(DIM, DIM // 2)}
    assert torch.equal(after[1][0], before[1][0])
    with pytest.raises(AttributeError, match="'RotaryEmbedding' object has no attribute 'nothing'"):
        _ = left.nothing


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_hand_on_what_their_rope_gives(name):
    """To attention, with nothing in between."""
    module, cls = name.split(".")
    source = inspect.getsource(getattr(importlib.import_module(f"sglang.srt.models.{module}"), cls))
    calls = re.findall(r"q, k = self\.rotary_emb\(positions, q, k\)\n\s+(.*)\n", source)
    assert len(calls) == source.count("self.rotary_emb(") == 1
    assert calls[0] == "return q, k, v" or calls[0].startswith("attn_output = self.attn(q, k, v, forward_batch")


@pytest.mark.parametrize("rotary", [DIM, DIM // 2])
def test_what_is_left_is_what_the_model_would_have_done(rotary):
    left, positions, (q, k) = LeftRope.of(model_of(rope_of(rotary)), [0]), torch.tensor([0, 40, 7]), tokens()
    left.begin(positions)
    assert all(x is y for x, y in zip(left(positions, q, k), (q, k), strict=True))
    angles = left.take(q, k)
    want = rope_of(rotary)(positions, q.clone(), k.clone())
    for x, turned in zip((q, k), want, strict=True):
        assert torch.allclose(apply_rope(x.unflatten(1, (-1, DIM)), angles).flatten(1), turned, atol=1e-6)


def test_what_is_not_of_the_step_is_turned_as_ever(left):
    positions, (q, k) = torch.tensor([5, 6, 7]), tokens()
    want = left.rope(positions, q.clone(), k.clone())

    def turned(at=positions):
        got = left(at, q.clone(), k.clone())
        return all(torch.equal(x, y) for x, y in zip(got, want, strict=True)) and left.take(*got) is None

    assert turned()
    left.begin(positions)
    assert turned(positions.clone())  # a draft's, or another model's
    left.end()
    assert turned()


def test_each_layer_is_left_once(left):
    positions, (q, k) = torch.tensor([5, 6, 7]), tokens()
    left.begin(positions)
    for _ in range(2):
        left(positions, q, k)
        assert left.take(q, k).shape == (3, DIM)
    left(positions, q, k)
    with pytest.raises(RuntimeError, match="attention did not take the queries"):
        left(positions, q, k)


@pytest.mark.parametrize("changed", [0, 1])
def test_a_model_that_does_more_is_an_error(left, changed):
    positions, own = torch.tensor([5, 6, 7]), list(tokens())
    left.begin(positions)
    left(positions, *own)
    own[changed] = own[changed] * 0.5
    with pytest.raises(RuntimeError, match="changed queries or keys behind its RoPE"):
        left.take(*own)


def test_a_graph_that_is_cut_at_attention_holds_the_models_rope(monkeypatch):
    """At its replays nobody calls the module that would leave it."""
    asked = []
    monkeypatch.setattr("sglang_blockgtq.backend.rope.check_cuda_graph_backend", lambda *of: asked.append(of) or True)
    rope = rope_of()
    model = model_of(rope)
    assert LeftRope.of(model, [0]) is None and model[0].rotary_emb is rope
    assert asked == [("decode", "breakable")]


class OtherRope(RotaryEmbedding):
    def forward(self, positions, q, k):
        return q, k


def test_others_keep_their_rope():
    rope = rope_of()
    for model, layers in (
        (model_of(rope, rope), [0, 2]),  # one that is not a model's known attention
        (model_of(rope, rope_of(base=500)), [0, 1]),
        (model_of(rope_of(neox=False)), [0]),
        (model_of(OtherRope(DIM, DIM, 64, 10000, True, torch.float32)), [0]),
        (model_of(LeftRope(rope)), [0]),  # another backend's already
    ):
        before = [module.rotary_emb for module in model]
        assert LeftRope.of(model, layers) is None
        assert [module.rotary_emb for module in model] == before
