"""Calibration of models some of whose layers keep a state in place of keys and values: their tables have rows for the
others alone."""

import pytest
import torch
import transformers

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.hf import collect, measure
from sglang_blockgtq.calibrate.model import (
    ModelError,
    config_hash,
    has_states,
    packed_layers,
    rope_blocks,
)
from sglang_blockgtq.calibrate.moments import MomentSums
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.supported import check_model

SEQUENCES = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (70, 130)]
COMMON = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024,
          "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "partial_rotary_factor": 0.25, "head_dim": 64}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_n_groups": 1}
#: Model -> class, config, layers with keys, (rotary_dim, neox) of each of them.
MODELS = {
    "qwen3_next": ("Qwen3Next", {**LINEAR, **EXPERTS, "num_hidden_layers": 4}, [3], (16, True)),
    "qwen3_5": ("Qwen3_5", {**LINEAR, "num_hidden_layers": 4}, [3], (16, True)),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4,
         "block_auto_adjust_ff_dim": False, "hidden_size": 128},
        [1, 3],
        (32, True),
    ),
    "falcon_h1": ("FalconH1", {**MAMBA, "num_hidden_layers": 2, "head_dim": 32}, [0, 1], (32, True)),
}  # fmt: skip


def config_of(name: str) -> transformers.PretrainedConfig:
    family, shape, *_ = MODELS[name]
    text = "TextConfig" if family == "Qwen3_5" else "Config"
    return getattr(transformers, family + text)(**{**COMMON, **shape})


def tiny(name: str):
    torch.manual_seed(0)
    model = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(config_of(name)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_moments_and_tables_have_rows_for_packed_layers(name, caplog):
    *_, layers, pairing = MODELS[name]
    model = tiny(name)
    config, rope = model.config, rope_blocks(model.config)
    assert packed_layers(config) == layers and has_states(config)
    moments = collect(model, SEQUENCES, rope, progress=False)
    assert (moments.layers, moments.heads, moments.tokens) == (len(layers), 2, 200)
    assert {(rope[i].rotary_dim, rope[i].neox) for i in layers} == {pairing}
    # Keys turn by these frequencies, from whatever position the model reads them on.
    half = pairing[0] // 2
    want = config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    torch.testing.assert_close(moments.theta[:, :half], want.expand(len(layers), -1), rtol=1e-4, atol=1e-9)
    assert "page means" not in caplog.text

    table = build_table(moments, [rope[i] for i in layers], k_bits=8, v_bits=8, config_hash=config_hash(config))
    assert table.header.layers == len(table.header.rope) == len(layers)
    good, bad = (
        measure(model, SEQUENCES[1], table if bits == 8 else build_table(moments, [rope[i] for i in layers], **two))
        for bits, two in ((8, {}), (2, {"k_bits": 2, "v_bits": 2}))
    )
    assert good.worst_layer in layers and bad.worst_layer in layers
    assert 0 < good.attention_kl < bad.attention_kl / 20 and good.kl < bad.kl / 20


@pytest.mark.parametrize("name", MODELS)
def test_another_pairing_is_refused(name):
    *_, layers, (rotary_dim, neox) = MODELS[name]
    model = tiny(name)
    dim = rope_blocks(model.config)[0].head_dim
    for wrong in ((rotary_dim, not neox), (rotary_dim // 2, neox)):
        rope = [RopeBlocks(dim, *wrong)] * model.config.num_hidden_layers
        with pytest.raises(ModelError, match=f"layer {layers[0]}: block energies change with position"):
            collect(model, SEQUENCES, rope, progress=False)


def test_other_frequencies_are_not_trusted(monkeypatch, caplog):
    from sglang_blockgtq.calibrate import hf

    model = tiny("qwen3_next")
    true = hf.model_frequencies
    monkeypatch.setattr(hf, "model_frequencies", lambda *args: [theta * 1.5 for theta in true(*args)])
    moments = collect(model, SEQUENCES, rope_blocks(model.config), progress=False)
    assert moments.theta.isnan().all() and "page means" in caplog.text


def test_which_layers_have_keys_is_part_of_a_models_identity():
    base = config_of("lfm2")
    other = config_of("lfm2")
    other.layer_types = ["full_attention", "conv", "conv", "full_attention"]
    assert config_hash(base) != config_hash(other)
    assert config_hash(transformers.LlamaConfig(layer_types=["full_attention"] * 32)) == config_hash(
        transformers.LlamaConfig()
    )


def test_kinds_of_layers():
    granite = transformers.GraniteMoeHybridConfig(num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"])
    nemotron = transformers.NemotronHConfig(hybrid_override_pattern="M-M*-E*M")
    assert packed_layers(granite) == [1] and packed_layers(nemotron) == [3, 6]
    assert has_states(granite) and has_states(nemotron)
    dense = transformers.LlamaConfig(num_hidden_layers=3)
    assert packed_layers(dense) == [0, 1, 2] and not has_states(dense)
    for config in (granite, nemotron, dense):
        check_model(config)


def test_moments_of_chosen_layers():
    """Layers that were not seen count only where they should have keys."""
    blocks = RopeBlocks(32, 32)
    sums = MomentSums(4, 2, [blocks] * 4, [torch.ones(16, dtype=torch.float64)] * 4)
    for layer in (1, 3):
        x = torch.full((5, 2, 32), float(layer))
        sums.add(layer, 0, x, x, x)
    moments = sums.mean(5, [1, 3])
    assert moments.k[:, 0, 0].tolist() == [2, 18] and moments.theta.shape == (2, 16) and moments.mean.shape[0] == 2
    with pytest.raises(ValueError, match=r"no calibration data for \(layer, KV head\) \[\[2, 0\], \[2, 1\]\]"):
        sums.mean(5, [1, 2, 3])
    sums.flat[3, 1, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 3: queries, keys or values are not finite"):
        sums.mean(5, [1, 3])
