"""Capture through transformers, against energies of q and k hooked before RoPE.

RoPE keeps the energy of a true block and mixes any other pair of channels, so the moments of
post-RoPE keys must equal pre-RoPE block energies under the right pairing, and differ under a wrong one.
"""

import logging
from contextlib import contextmanager

import pytest
import torch
import transformers

from sglang_blockgtq.calibrate import hf
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.hf import check_rope, collect, measure, model_frequencies
from sglang_blockgtq.calibrate.model import ModelError, rope_blocks
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.rope_check import probe_positions
from sglang_blockgtq.kernels.terms import PLAIN, Terms

#: Model -> (rotary_dim, neox) of each layer at head_dim 32, as published for the architecture.
ROPE = {
    "llama_gqa1": [(32, True)] * 2,
    "llama_gqa3": [(32, True)] * 2,
    "llama_gqa4": [(32, True)] * 2,
    "llama_gqa7": [(32, True)] * 2,
    "llama_gqa8": [(32, True)] * 2,
    "qwen2_bias": [(32, True)] * 2,
    "qwen3_qk_norm": [(32, True)] * 2,
    "glm4_interleaved_partial": [(16, False)] * 2,
    "ernie_interleaved": [(32, False)] * 2,
    "cohere_interleaved_qk_norm": [(32, False)] * 2,
    "stablelm_quarter": [(8, True)] * 2,
    "phi_half": [(16, True)] * 2,
    "smollm3_nope": [(32, True), (0, True)],
}
SEQUENCES = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (70, 130)]


def block_pairs(rotary_dim: int, neox: bool) -> list[tuple[int, int]]:
    """Written out independently of RopeBlocks."""
    half = rotary_dim // 2
    rotated = [(i, i + half) if neox else (2 * i, 2 * i + 1) for i in range(half)]
    return rotated + [(c, c + 1) for c in range(rotary_dim, 32, 2)]


@contextmanager
def hooked(model):
    """Collects per layer the last pre-RoPE q, k and v: projections, or norms of q and k where there are any."""
    seen, handles = {}, []
    for layer, block in enumerate(model.base_model.layers):
        attention = block.self_attn
        for name in "qkv":
            module = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")

            def hook(_, __, out, key=(layer, name)):
                # QK-norm modules see heads apart, projections see them joined; both end as [T, H * 32] in order.
                seen.setdefault(key, []).append(out.detach().reshape(out.shape[1], -1).view(out.shape[1], -1, 32))

            handles.append(module.register_forward_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def hand_moments(model, pairs_of_layer):
    """E|q_i|^2 over tokens and group, E|k_i|^2, E|v|^2 from hooked tensors, in plain sums."""
    with hooked(model) as seen, torch.no_grad():
        for sequence in SEQUENCES:
            model(torch.tensor([sequence]))
    kv_heads = model.config.num_key_value_heads
    q_all, k_all, v_all = [], [], []
    for layer, pairs in enumerate(pairs_of_layer):
        q, k, v = (torch.cat(seen[layer, name]).double() for name in "qkv")
        group = q.shape[1] // kv_heads
        q_all.append([])
        k_all.append([])
        v_all.append([])
        for h in range(kv_heads):
            mine = q[:, h * group : (h + 1) * group]
            q_all[-1].append([float((mine[..., a] ** 2 + mine[..., b] ** 2).mean()) for a, b in pairs])
            k_all[-1].append([float((k[:, h, a] ** 2 + k[:, h, b] ** 2).mean()) for a, b in pairs])
            v_all[-1].append(float((v[:, h] ** 2).sum(-1).mean()))
    return [torch.tensor(x, dtype=torch.float64) for x in (q_all, k_all, v_all)]


@pytest.mark.parametrize("name", ROPE)
def test_moments_are_the_energies_before_rope(tiny_model, name):
    model = tiny_model(name)
    rope = rope_blocks(model.config)
    assert [(r.rotary_dim, r.neox) for r in rope] == ROPE[name]
    moments = collect(model, SEQUENCES, rope, progress=False)
    assert moments.tokens == 200
    q, k, v = hand_moments(model, [block_pairs(*r) for r in ROPE[name]])
    torch.testing.assert_close(moments.q, q, rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.k, k, rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.v, v, rtol=1e-4, atol=0)

    wrong_q, wrong_k, _ = hand_moments(model, [block_pairs(d, not neox) for d, neox in ROPE[name]])
    assert float(((moments.k[0] - wrong_k[0]) / wrong_k[0]).abs().max()) > 0.2
    assert float(((moments.q[0] - wrong_q[0]) / wrong_q[0]).abs().max()) > 0.2


def theta_by_hand(config, rotary_dim: int) -> torch.Tensor:
    """Of the blocks of 32 channels, without scaling."""
    base = config.rope_parameters["rope_theta"]
    half = rotary_dim // 2
    return torch.tensor([base ** (-i / half) for i in range(half)] + [0.0] * (16 - half), dtype=torch.float64)


@pytest.mark.parametrize("name", ROPE)
def test_frequencies_and_means_of_keys_before_rope(tiny_model, name, caplog):
    model = tiny_model(name)
    moments = collect(model, SEQUENCES, rope_blocks(model.config), progress=False)
    with hooked(model) as seen, torch.no_grad():
        for sequence in SEQUENCES:
            model(torch.tensor([sequence]))
    for layer, pairing in enumerate(ROPE[name]):
        want = theta_by_hand(model.config, pairing[0])
        torch.testing.assert_close(moments.theta[layer], want, rtol=1e-5, atol=1e-9)
        k = torch.cat(seen[layer, "k"]).double().mean(0)[:, torch.tensor(block_pairs(*pairing))]
        torch.testing.assert_close(moments.mean[layer], k, rtol=1e-4, atol=1e-4 * float(k.abs().max()))
    assert "page means" not in caplog.text


LONG = {"factor": 2.0, "original_max_position_embeddings": 256}
SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {**LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": LONG,
    "dynamic": LONG,
    "longrope": {**LONG, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_of_scaled_models(kind, caplog):
    """What changes with the sequence's length has none, and is told."""
    rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0, **SCALINGS[kind]}
    model = tiny("LlamaConfig", num_key_value_heads=1, head_dim=32, rope_parameters=rope_parameters)
    rope = rope_blocks(model.config)
    (theta,) = model_frequencies(model, rope)
    moments = collect(model, SEQUENCES, rope, progress=False)
    if kind in ("dynamic", "longrope"):
        assert theta is None and moments.theta.isnan().all() and not moments.mean.any()
        assert "keys of layers [0] do not rotate by one angle a position" in caplog.text
    else:
        want = model.model.rotary_emb.inv_freq.double()
        torch.testing.assert_close(theta, want, rtol=1e-6, atol=1e-8)
        assert torch.equal(moments.theta[0], theta) and bool(moments.mean.any()) and not caplog.records


def test_frequencies_that_are_not_the_keys_are_not_believed(tiny_model, caplog):
    model = tiny_model("llama_gqa3")
    rope = rope_blocks(model.config)
    theta = model_frequencies(model, rope)
    found = check_rope(model, rope, [theta[0], theta[1] / 4], 5)
    assert torch.equal(found[0], theta[0]) and found[1] is None
    assert "keys of layers [1] do not rotate by one angle a position" in caplog.text


def test_a_rotary_module_of_another_kind_says_no_frequencies(tiny_model, monkeypatch, caplog):
    model = tiny_model("llama_gqa3")

    with monkeypatch.context() as within, caplog.at_level(logging.WARNING):
        within.setattr(type(model.model.rotary_emb), "forward", lambda self, positions: None)
        assert model_frequencies(model, rope_blocks(model.config)) == [None, None]
    assert "LlamaRotaryEmbedding says no frequencies" in caplog.text


@pytest.fixture
def exact(monkeypatch) -> list[hf.HeldOut]:
    """What is read exactly while something is measured."""
    made = []

    class Seen(hf.HeldOut):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(hf, "HeldOut", Seen)
    return made


@pytest.mark.parametrize("name", ["llama_gqa3", "granite_own_scaling", "gpt2_no_rope"])
def test_what_is_measured_is_the_models_own_attention(tiny_model, exact, name):
    """Its logits and its scale; and more bits cost less."""
    model = tiny_model(name)
    rope, ids = rope_blocks(model.config), SEQUENCES[1]
    moments = collect(model, SEQUENCES, rope, progress=False)
    uniform = "uniform" if name == "gpt2_no_rope" else "template"
    tables = [build_table(moments, rope, k_bits=bits, v_bits=bits, allocator=uniform) for bits in (2, 8)]
    low, high = (measure(model, ids, table) for table in tables)
    assert low.kl > 10 * high.kl > 0 and low.attention_kl > 10 * high.attention_kl > 0
    assert low.tokens == high.tokens == len(ids) and 0 <= low.worst_layer < 2
    scale = 0.5 if name == "granite_own_scaling" else 32**-0.5
    assert exact[0].logits_of == {layer: (pytest.approx(scale), PLAIN) for layer in (0, 1)}
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(exact[0].logits, logits, rtol=1e-4, atol=1e-4)


WINDOWED = {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": 16, "layers": 2}


@pytest.mark.parametrize(
    "config, options, terms",
    [
        ("MistralConfig", WINDOWED, (Terms(16), Terms(16))),
        ("Gemma2Config", WINDOWED | {"attn_logit_softcapping": 2.0}, (Terms(16, 2.0), Terms(0, 2.0))),
        ("Gemma3TextConfig", WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}, (Terms(16), PLAIN)),
    ],
    ids=["mistral", "gemma2", "gemma3"],
)
def test_windows_and_caps_are_the_models_own(config, options, terms, exact):
    """Gemma 3 has RoPE of its own in layers with a window, and so its blocks rotate as fast as these do."""
    model = tiny(config, **options)
    model.set_attn_implementation("eager")  # the only one of transformers' that caps
    rope, ids = rope_blocks(model.config), SEQUENCES[1]
    moments = collect(model, SEQUENCES, rope, progress=False)
    assert moments.theta.isfinite().all() and (config == "Gemma3TextConfig") != bool(
        torch.equal(moments.theta[0], moments.theta[1])
    )
    measure(model, ids, build_table(moments, rope, k_bits=8, v_bits=8))
    assert [exact[0].logits_of[layer][1] for layer in (0, 1)] == list(terms)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert len(ids) > 2 * 16
    torch.testing.assert_close(exact[0].logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROPE)
def test_a_wrong_pairing_is_refused(tiny_model, name):
    model = tiny_model(name)
    for layer, (rotary_dim, neox) in enumerate(ROPE[name]):
        if not rotary_dim:
            continue
        for wrong in {(rotary_dim, not neox), (rotary_dim // 2, neox), (min(2 * rotary_dim, 32), neox), (0, neox)}:
            # Unrotated channels are paired as interleaved ones are, so some claims name the same blocks.
            if set(block_pairs(*wrong)) == set(block_pairs(rotary_dim, neox)):
                continue
            rope = [RopeBlocks(32, *pairing) for pairing in ROPE[name]]
            rope[layer] = RopeBlocks(32, *wrong)
            if any(r.rotary_dim for r in rope):
                with pytest.raises(ModelError, match=f"layer {layer}: block energies change with position"):
                    check_rope(model, rope, [None, None], token=5)


def test_the_probe_stays_within_a_short_context(tiny_model, monkeypatch):
    model = tiny_model("llama_gqa3")
    monkeypatch.setattr(model.config, "max_position_embeddings", 100)
    seen = []
    handle = model.base_model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw), with_kwargs=True)
    check_rope(model, rope_blocks(model.config), [None, None], 5)
    handle.remove()
    (positions,) = (kw["position_ids"] for kw in seen)
    assert positions[0].tolist() == probe_positions(100) and positions.max() < 100


def test_a_model_without_rope(tiny_model):
    model = tiny_model("gpt2_no_rope")
    rope = rope_blocks(model.config)
    assert [r.rotary_dim for r in rope] == [0, 0]
    moments = collect(model, SEQUENCES, rope, progress=False)
    assert moments.k.shape == (2, 4, 16)
    assert (moments.k > 0).all()


@pytest.mark.parametrize("name", ["llama_gqa3", "qwen3_qk_norm", "granite_own_scaling", "gpt2_no_rope"])
def test_the_model_is_left_as_it_was(tiny_model, name):
    """Attention under capture is the model's own, or later layers would see other inputs."""
    model = tiny_model(name)
    ids = torch.tensor([SEQUENCES[1]])
    seen = []
    handle = model.base_model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state.detach()))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        before = model(ids).logits
        collect(model, [SEQUENCES[1]], rope_blocks(model.config), progress=False)
        after = model(ids).logits
    handle.remove()
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert torch.equal(before, after)
    own, _probe, captured, _ = seen
    torch.testing.assert_close(captured, own, rtol=1e-4, atol=1e-4)


def test_the_model_is_restored_after_an_error(tiny_model):
    model = tiny_model("llama_gqa3")
    with pytest.raises(ModelError):
        collect(model, SEQUENCES, [RopeBlocks(32, 32, neox=False)] * 2, progress=False)
    assert model.config._attn_implementation == "sdpa"


def test_bfloat16_agrees_within_its_noise(tiny_model):
    model = tiny_model("qwen3_qk_norm")
    rope = rope_blocks(model.config)
    exact = collect(model, SEQUENCES, rope, progress=False)
    model.to(torch.bfloat16)
    rounded = collect(model, SEQUENCES, rope, progress=False)
    model.to(torch.float32)
    for name in "qkv":
        torch.testing.assert_close(getattr(rounded, name), getattr(exact, name), rtol=0.03, atol=0)


def tiny(class_name, layers=1, **kw):
    config = getattr(transformers, class_name)(
        vocab_size=256, hidden_size=64, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=0, eos_token_id=0, **kw,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_sinks_are_no_other_pairing():
    """A sink's share depends on the logits, and so on positions, which then the next layer's keys seem to depend on."""
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "initializer_range": 0.3}
    model = tiny("GptOssConfig", **WINDOWED, **options)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(1.0)
    check_rope(model, [RopeBlocks(32, 32)] * 2, [None] * 2, 5)
    with pytest.raises(ModelError, match="the model pairs its channels otherwise"):
        check_rope(model, [RopeBlocks(32, 32, False)] * 2, [None] * 2, 5)


def test_attention_outside_the_interface_is_refused():
    config = transformers.GPTJConfig(
        vocab_size=256, n_embd=64, n_layer=2, n_head=2, rotary_dim=16, n_positions=512, bos_token_id=0, eos_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ModelError, match=r"gptj: the attention of layers \[0, 1\] does not go through"):
        collect(model, SEQUENCES, rope_blocks(config), progress=False)
    assert model.config._attn_implementation == "eager"
