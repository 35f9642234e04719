"""Calibration inside the server: what it measures, and that it does not believe what modules tell of their RoPE."""

import pytest
import torch
from transformers import GPT2Config

from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.rope_check import PROBE_TOKENS
from sglang_blockgtq.capture import collect_moments
from sglang_blockgtq.options import KVQuantError

SEQUENCES = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (70, 130)]
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
    assert runner.model.seen == [PROBE_TOKENS, 70, 130]


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
    assert runner.model.seen == [PROBE_TOKENS]  # before anything is measured


def test_rope_that_no_module_tells_of_is_noticed(alone, loaded):
    """The config says that there is some."""
    with pytest.raises(KVQuantError, match="layer 0: block energies change with position under rotary_dim 0"):
        collect_moments(loaded.runner([(32, True)] * 2, [None, None]), SEQUENCES)


def test_a_model_without_rope_is_not_probed(alone, loaded):
    """Its positions may be in its keys."""
    runner = loaded.runner([(32, True)] * 2, [None, None], config=GPT2Config(n_layer=2))
    assert [r.rotary_dim for r in collect_moments(runner, SEQUENCES)[1]] == [0, 0]
    assert runner.model.seen == [70, 130]


def test_the_probe_stays_within_a_short_context(alone, loaded, monkeypatch):
    runner = loaded.runner([(32, True)], [(32, True)], context=100)
    seen = []
    monkeypatch.setattr(runner.model, "forward", lambda ids, positions, batch: seen.append(positions) or _stop())

    def _stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        collect_moments(runner, SEQUENCES)
    assert len(seen[0]) == PROBE_TOKENS and seen[0].max() < 100 and len(seen[0].unique()) == PROBE_TOKENS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(alone, loaded, value):
    runner = loaded.runner([(32, True)] * 2, [(32, True)] * 2)
    runner.model.layers[1].qkv.weight.data[200] = value
    with pytest.raises(KVQuantError, match="--kv-quant blockgtq: layer 1: queries, keys or values are not finite"):
        collect_moments(runner, SEQUENCES)
