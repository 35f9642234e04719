"""Calibration inside the server: what it measures, and that it does not believe what modules tell of their RoPE."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import MomentSums
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.rope_check import probe_positions
from sglang_blockgtq.capture import (
    CaptureBackend,
    collect_moments,
    forward,
    frequencies_of,
    local_heads,
    model_frequencies,
)
from sglang_blockgtq.options import KVQuantError

SEQUENCES = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (70, 130)]
PROBE = probe_positions(1024)
PAIRINGS = [(32, True), (32, False), (16, True), (16, False), (8, True)]


@pytest.fixture
def alone(loaded, monkeypatch):
    """One rank."""
    loaded.install(monkeypatch, loaded.group(), loaded.group(), loaded.group())


@pytest.mark.parametrize("pairing", [*PAIRINGS, (0, True)])
def test_moments_are_the_energies_before_rope(alone, loaded, pairing):
    """Of the true blocks, which RoPE leaves as they are."""
    runner = loaded.runner([pairing, (32, True)], [pairing, (32, True)])
    moments, rope = collect_moments(runner, SEQUENCES)
    assert rope == [RopeBlocks(32, *pairing), RopeBlocks(32, 32)] and moments.tokens == 200
    x = runner.model.embed(torch.tensor(sum(SEQUENCES, [])))
    q, k, v = runner.model.layers[0].qkv(x).detach().double().split([128, 64, 64], -1)
    pairs = RopeBlocks(32, *pairing).channels()
    q = q.view(-1, 2, 2, 32)[..., pairs].square().sum(-1).mean((0, 2))
    k = k.view(-1, 2, 32)[..., pairs].square().sum(-1).mean(0)
    torch.testing.assert_close(moments.q[0], q, rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.k[0], k, rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.v[0], v.view(-1, 2, 32).square().sum(-1).mean(0), rtol=1e-4, atol=0)
    assert runner.model.seen == [len(PROBE), 70, 130]


def same_blocks(a: tuple[int, bool], b: tuple[int, bool]) -> bool:
    """Channels that are not rotated are paired as interleaved ones are."""
    return all(dim == 0 or not neox for dim, neox in (a, b)) or a == b


WRONG = [(true, said) for true in PAIRINGS for said in [*PAIRINGS, (0, True)] if not same_blocks(true, said)]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("true, wrong", [*WRONG, ((32, True), None)])
def test_a_pairing_that_is_not_the_models_is_refused(alone, loaded, true, wrong, layer):
    said = [true, true]
    said[layer] = wrong
    runner = loaded.runner([true, true], said)
    dim, neox = wrong or (0, True)
    with pytest.raises(KVQuantError) as e:
        collect_moments(runner, SEQUENCES)
    pairing = f"rotary_dim {dim}, {'neox' if neox else 'interleaved'} pairing"
    assert f"layer {layer}: block energies change with position under {pairing}" in str(e.value)
    assert "--kv-quant blockgtq" in str(e.value) and "serve this model without --kv-quant" in str(e.value)
    assert runner.model.seen == [len(PROBE)]  # before anything is measured


def test_rope_that_no_module_tells_of_is_noticed(alone, loaded):
    """The config says that there is some."""
    with pytest.raises(KVQuantError, match="layer 0: block energies change with position under rotary_dim 0"):
        collect_moments(loaded.runner([(32, True)] * 2, [None, None]), SEQUENCES)


def test_positions_in_the_keys_of_a_model_without_rope(alone, loaded, caplog):
    """As learned ones are: no error, nothing to warn of, but no means either."""
    runner = loaded.runner([(32, True)] * 2, [None, None], config=GPT2Config(n_layer=2))
    moments, rope = collect_moments(runner, SEQUENCES)
    assert [r.rotary_dim for r in rope] == [0, 0] and not caplog.records
    assert moments.theta.isnan().all() and not moments.mean.any()


def test_the_probe_stays_within_a_short_context(alone, loaded, monkeypatch):
    runner = loaded.runner([(32, True)], [(32, True)], context=100)
    seen = []
    monkeypatch.setattr(runner.model, "forward", lambda ids, positions, batch: seen.append(positions) or _stop())

    def _stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        collect_moments(runner, SEQUENCES)
    assert seen[0].tolist() == probe_positions(100) and seen[0].max() < 100


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(alone, loaded, value):
    runner = loaded.runner([(32, True)] * 2, [(32, True)] * 2)
    runner.model.layers[1].qkv.weight.data[200] = value
    with pytest.raises(KVQuantError, match="--kv-quant blockgtq: layer 1: queries, keys or values are not finite"):
        collect_moments(runner, SEQUENCES)


LONG = {"factor": 8.0, "original_max_position_embeddings": 1024}
SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {**LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": LONG,
}


@pytest.fixture
def sglang_rope(monkeypatch):
    """SGLang's own rotary modules for heads of 32 channels, as a server on the CPU makes them."""
    from sglang.srt.layers.rotary_embedding import base, factory

    monkeypatch.setattr(base, "_is_cpu", True)
    monkeypatch.setattr(factory, "_ROPE_DICT", {})

    def make(dtype=torch.float32, rotary_dim=32, neox=True, **scaling):
        return factory.get_rope(32, rotary_dim, 8192, 10_000, neox, scaling or None, dtype)

    return make


def with_rotary(loaded, *rotaries):
    """The stand-in's model with these modules in its layers."""
    model = loaded.Model([(32, True)] * len(rotaries), [(32, True)] * len(rotaries))
    for layer, rotary in zip(model.layers, rotaries, strict=True):
        del layer.rotary_emb
        if rotary is not None:
            layer.rotary_emb = rotary
    return model


@pytest.mark.parametrize("kind", ["default", *SCALINGS])
def test_frequencies_of_sglangs_modules(loaded, sglang_rope, kind):
    """Are those of transformers for the same parameters."""
    scaling = {"rope_type": kind, **SCALINGS.get(kind, {})}
    if kind == "default":
        want = loaded.theta_of(32)
    else:
        rope = {"rope_theta": 10_000.0, **scaling}
        config = LlamaConfig(head_dim=32, max_position_embeddings=8192, rope_parameters=rope)
        want = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")[0].double()
    exact, rounded = (
        frequencies_of(with_rotary(loaded, sglang_rope(dtype, **scaling)), 32)[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(exact, want, rtol=1e-6, atol=1e-10)
    assert float((rounded - want).abs().max()) * 8192 < 2 * torch.finfo(torch.bfloat16).eps


def test_frequencies_of_layers_of_several_kinds(loaded, sglang_rope):
    whole = sglang_rope()
    found = frequencies_of(with_rotary(loaded, whole, None, sglang_rope(rotary_dim=8, neox=False), whole), 32)
    assert list(found) == [0, 1, 2, 3] and torch.equal(found[0], found[3])
    assert found[1].shape == (16,) and not found[1].any()
    torch.testing.assert_close(found[2][:4], loaded.theta_of(8), rtol=1e-6, atol=1e-10)
    assert not found[2][4:].any()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "mrope_section": [4, 6, 6]},
        {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, **LONG},
    ],
    ids=lambda x: "mrope" if "mrope_section" in x else x["rope_type"],
)
def test_positions_of_several_sides_and_switches_have_no_frequencies(loaded, sglang_rope, scaling):
    assert frequencies_of(with_rotary(loaded, sglang_rope(**scaling)), 32) == {0: None}


def test_a_model_with_mrope_gets_a_table_without_means(alone, loaded, sglang_rope, monkeypatch, caplog):
    """Its calibration sees the same position on each side, as of text."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
    config = LlamaConfig(num_hidden_layers=2, head_dim=32, num_key_value_heads=2, rope_parameters=rope)
    runner = loaded.runner([(32, True)] * 2, [(32, True)] * 2, config=config)
    runner.model = with_rotary(loaded, *[sglang_rope(**rope)] * 2)
    plain, sides = runner.model.forward, []

    def on_three_sides(ids, positions, batch):
        sides.append(batch.mrope_positions)
        return plain(ids, positions, batch)

    monkeypatch.setattr(runner.model, "forward", on_three_sides)
    moments, blocks = collect_moments(runner, SEQUENCES)
    assert "keys of layers [0, 1] do not rotate by one angle a position (M-RoPE)" in caplog.text
    assert torch.equal(sides[1], torch.arange(70).expand(3, 70))
    table = build_table(moments, blocks, k_bits=3, v_bits=3)
    assert table.header.page == 0 and not {"mean", "theta"} & table.tensors.keys()


def test_a_table_of_cosines_that_is_not_linear(loaded):
    rotary = loaded.rotary(32, True)
    rotary.cos_sin_cache[512:] = rotary.cos_sin_cache[:512].clone()
    assert frequencies_of(with_rotary(loaded, rotary), 32) == {0: None}


def test_the_mean_is_that_of_keys_before_rope(alone, loaded, caplog):
    pairing = (16, False)
    runner = loaded.runner([pairing, (32, True)], [pairing, (32, True)])
    first, second = model_frequencies(runner)
    torch.testing.assert_close(first[:8], loaded.theta_of(16), rtol=1e-6, atol=1e-9)
    assert not first[8:].any() and bool((second > 0).all())
    moments, _ = collect_moments(runner, SEQUENCES)
    assert torch.equal(moments.theta, torch.stack([first, second])) and not caplog.records
    x = runner.model.embed(torch.tensor(sum(SEQUENCES, [])))
    k = runner.model.layers[0].qkv(x).detach().double()[:, 128:192].view(-1, 2, 32)
    want = k.mean(0)[:, RopeBlocks(32, *pairing).channels()]
    torch.testing.assert_close(moments.mean[0], want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert float(moments.mean[1].abs().max()) > 0


def test_keys_that_do_not_rotate_by_their_table_have_no_mean(alone, loaded, caplog):
    """What modules tell of their frequencies is not believed either."""
    runner = loaded.runner([(32, True)] * 2, [(32, True)] * 2)
    runner.model.layers[1].rotary_emb.cos_sin_cache = loaded.rotary(32, True).cos_sin_cache[::4].contiguous()
    moments, _ = collect_moments(runner, SEQUENCES)
    assert "keys of layers [1] do not rotate by one angle a position" in caplog.text
    assert moments.theta[1].isnan().all() and not moments.mean[1].any()
    assert not moments.theta[0].isnan().any() and moments.mean[0].any()


def test_logits_of_the_places_that_are_asked_for(alone, loaded):
    runner, ids = loaded.runner([(32, True)] * 2, [(32, True)] * 2), SEQUENCES[0]

    def logits(answers=None, take=lambda *_: None):
        return forward(runner, take, ids, range(len(ids)), answers).next_token_logits

    every = logits(torch.arange(len(ids)))
    assert every.shape == (len(ids), 256)
    places = torch.tensor([0, 3, 4, 69])
    torch.testing.assert_close(logits(places), every[places])
    torch.testing.assert_close(logits(), every[-1:])
    assert not torch.allclose(logits(places, lambda layer, q, k, v: (k, 2 * v)), every[places], rtol=0.01)


def test_attention_sees_what_take_returns(alone, loaded):
    layer = loaded.Attention(0, (32, True), (32, True)).attn
    q, (k, v, other_k, other_v) = torch.randn(5, 4 * 32), torch.randn(4, 5, 2 * 32)
    batch = SimpleNamespace(extend_seq_lens_cpu=[2, 3])

    def attend(take, k, v):
        return CaptureBackend(take).forward_extend(q, k, v, layer, batch)

    seen = []
    replaced = attend(lambda *x: seen.append(x) or (other_k.view(5, 2, 32), other_v.view(5, 2, 32)), k, v)
    plain = attend(lambda *_: None, other_k, other_v)
    assert torch.equal(replaced, plain) and not torch.allclose(plain, attend(lambda *_: None, k, v))
    ((index, *found),) = seen
    assert index == 0 and all(torch.equal(a.flatten(1), b) for a, b in zip(found, (q, k, v), strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_heads_that_several_ranks_hold_count_as_if_one_did(loaded, monkeypatch, ranks):
    """With more ranks than KV heads each rank has one, and its share of the query heads that read it."""
    q, k, v = (torch.randn(9, heads, 32, generator=torch.Generator().manual_seed(heads)) for heads in (8, 2, 2))
    blocks, held = [RopeBlocks(32, 32)], []
    alone, added = MomentSums(1, 2, blocks), MomentSums(1, 2, blocks)
    alone.add(0, 0, q, k, v)
    for rank in range(ranks):
        parallel = SimpleNamespace(attn_tp_rank=rank, attn_tp_size=ranks)
        monkeypatch.setattr("sglang_blockgtq.capture.get_parallel", lambda parallel=parallel: parallel)
        heads, mine = local_heads(2), slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        held += range(2)[heads]
        added.add(0, heads.start, q[:, mine], k[:, heads], v[:, heads])
    assert held == sorted(held) and len(held) == max(2, ranks)
    got, wanted = added.mean(9), alone.mean(9)
    for name in ("q", "k", "v"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name))
