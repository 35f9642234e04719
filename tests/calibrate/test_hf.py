"""Capture through transformers, against energies of q and k hooked before RoPE.

RoPE keeps the energy of a true block and mixes any other pair of channels, so the moments of
post-RoPE keys must equal pre-RoPE block energies under the right pairing, and differ under a wrong one.
"""

from contextlib import contextmanager

import pytest
import torch
import transformers

from sglang_blockgtq.calibrate.hf import check_rope, collect
from sglang_blockgtq.calibrate.model import ModelError, rope_blocks
from sglang_blockgtq.calibrate.rope import RopeBlocks

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
                    check_rope(model, rope, token=5)


def test_the_probe_stays_within_a_short_context(tiny_model, monkeypatch):
    model = tiny_model("llama_gqa3")
    monkeypatch.setattr(model.config, "max_position_embeddings", 100)
    seen = []
    handle = model.base_model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw), with_kwargs=True)
    check_rope(model, rope_blocks(model.config), 5)
    handle.remove()
    (positions,) = (kw["position_ids"] for kw in seen)
    assert positions.max() < 100 and len(positions.unique()) == 48


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


def tiny(class_name, **kw):
    config = getattr(transformers, class_name)(
        vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=0, eos_token_id=0, **kw,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_sliding_windows_are_refused():
    model = tiny("MistralConfig", num_key_value_heads=1, head_dim=32, sliding_window=16)
    with pytest.raises(ModelError, match="mistral: has sliding_attention layers; every layer must have full attention"):
        collect(model, SEQUENCES, rope_blocks(model.config), progress=False)


def test_a_window_that_only_the_module_knows_of_is_refused():
    model = tiny("MistralConfig", num_key_value_heads=1, head_dim=32, sliding_window=16)
    rope = rope_blocks(model.config)
    with pytest.raises(ModelError, match=r"MistralAttention \(layer 0\): sliding window of 16"):
        check_rope(model, rope, 5)


def test_attention_outside_the_interface_is_refused():
    config = transformers.GPTJConfig(
        vocab_size=256, n_embd=64, n_layer=2, n_head=2, rotary_dim=16, n_positions=512, bos_token_id=0, eos_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ModelError, match=r"gptj: the attention of layers \[0, 1\] does not go through"):
        collect(model, SEQUENCES, rope_blocks(config), progress=False)
    assert model.config._attn_implementation == "eager"
