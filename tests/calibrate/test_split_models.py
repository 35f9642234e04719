"""Calibration of models whose layers with a window SGLang keeps in 16 bits: their tables have rows for the layers with
full attention alone, and what a table costs is measured with windows exact."""

import pytest
import torch
import transformers

from sglang_blockgtq.calibrate import hf
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.hf import calibrate_model, check_rope, collect, measure
from sglang_blockgtq.calibrate.model import (
    ModelError,
    config_hash,
    has_states,
    packed_layers,
    rope_blocks,
    v_head_dim,
    windows_apart,
)
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.supported import check_model

SEQUENCES = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (70, 130)]
COMMON = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "sliding_window": 16,
          "num_attention_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "pad_token_id": None,
          "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
ONE, OTHER = "sliding_attention", "full_attention"
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
#: Model -> class, config, KV heads, (rotary_dim, neox), base of the frequencies in layers with full attention.
MODELS = {
    "mellum": ("Mellum", {"head_dim": 32, "num_key_value_heads": 2, "num_experts": 2,
                          "mlp_layer_types": ["sparse"] * 4}, 2, (32, True), None),
    "gpt_oss": ("GptOss", {"head_dim": 32, "num_key_value_heads": 2, "num_local_experts": 2,
                           "rope_parameters": PLAIN_ROPE}, 2, (32, True), 1e4),
    # Layers with a window have twice the KV heads, and another base.
    "mimo": ("MiMoV2Flash", {"head_dim": 192, "v_head_dim": 128, "num_key_value_heads": 1,
                             "mlp_layer_types": ["dense"] * 4}, 1, (64, True), 5e6),
}  # fmt: skip
FULL = [1, 3]


def config_of(name: str, **changed) -> transformers.PretrainedConfig:
    family, shape, *_ = MODELS[name]
    return getattr(transformers, family + "Config")(**{**COMMON, "layer_types": [ONE, OTHER] * 2, **shape, **changed})


def tiny(name: str):
    torch.manual_seed(0)
    model = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(config_of(name)).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
        elif key.endswith("sinks"):
            parameter.data.fill_(1.0)
    return model


def table_of(model, moments, bits: int):
    rope = rope_blocks(model.config)
    return build_table(moments, [rope[i] for i in FULL], k_bits=bits, v_bits=bits, v_head_dim=v_head_dim(model.config))


@pytest.mark.parametrize("name", MODELS)
def test_moments_and_tables_have_rows_for_layers_with_full_attention(name, caplog):
    _, _, heads, pairing, base = MODELS[name]
    model = tiny(name)
    config, rope = model.config, rope_blocks(model.config)
    check_model(config)
    assert packed_layers(config) == FULL and windows_apart(config) and not has_states(config)
    assert {(r.rotary_dim, r.neox) for r in rope} == {pairing}
    moments = collect(model, SEQUENCES, rope, progress=False)
    assert (moments.layers, moments.heads, moments.tokens) == (2, heads, 200)
    assert moments.theta.isfinite().all() and "page means" not in caplog.text
    if base:
        half = pairing[0] // 2
        want = base ** (-torch.arange(half, dtype=torch.float64) / half)
        torch.testing.assert_close(moments.theta[:, :half], want.expand(2, -1), rtol=1e-4, atol=1e-9)

    energy = torch.zeros(4, heads, dtype=torch.float64)

    def add(layer, q, k, v):
        if layer in FULL:
            energy[layer] += k.double().square().sum((0, 2))

    with hf._captured(model, add):
        for ids in SEQUENCES:
            model(torch.tensor([ids]))
    torch.testing.assert_close(moments.k.sum(2) * 200, energy[FULL], rtol=1e-4, atol=0)
    table = table_of(model, moments, 8)
    assert table.header.layers == len(table.header.rope) == 2


@pytest.mark.parametrize("name", MODELS)
def test_windows_cost_nothing(name):
    model = tiny(name)
    moments = collect(model, SEQUENCES, rope_blocks(model.config), progress=False)
    good, bad = (measure(model, SEQUENCES[1], table_of(model, moments, bits)) for bits in (8, 2))
    assert good.worst_layer in FULL and bad.worst_layer in FULL
    assert 0 < good.attention_kl < bad.attention_kl / 20 and 0 < good.kl < min(bad.kl / 20, 1e-4)
    for layer in FULL:  # what they read does not matter now
        model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        if (bias := model.model.layers[layer].self_attn.o_proj.bias) is not None:
            bias.data.zero_()
    found = measure(model, SEQUENCES[1], table_of(model, moments, 2))
    assert found.kl == 0 and found.attention_kl > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_another_pairing_is_refused(name):
    rotary_dim, neox = MODELS[name][3]
    model = tiny(name)
    dim = model.config.head_dim
    for wrong in ((rotary_dim, not neox), (rotary_dim // 2, neox)):
        with pytest.raises(ModelError, match="block energies change with position"):
            check_rope(model, [RopeBlocks(dim, *wrong)] * 4, [None] * 4, 5)


def test_which_layers_have_windows_is_part_of_a_models_identity():
    for name in MODELS:
        kinds = ([ONE, OTHER] * 2, [OTHER, ONE] * 2, [OTHER] * 4)
        configs = [config_of(name, layer_types=k) for k in kinds]
        assert [packed_layers(c) for c in configs] == [[1, 3], [0, 2], [0, 1, 2, 3]]
        assert len({config_hash(c) for c in configs}) == 3
        with pytest.raises(ModelError, match="no layer has attention to all tokens, so there is no cache to pack"):
            check_model(config_of(name, layer_types=[ONE] * 4))
    gemma = transformers.Gemma2Config(num_hidden_layers=2)  # one pool for all layers
    assert packed_layers(gemma) == [0, 1] and not windows_apart(gemma)


def test_a_checkpoint_whose_values_are_shorter_than_keys(byte_tokenizer, tmp_path):
    tiny("mimo").save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    table = calibrate_model(
        str(tmp_path), k_bits=4, v_bits=4, allocator="template", text_path=None, tokens=2048, device="cpu",
        dtype="float32",
    )  # fmt: skip
    header = table.header
    assert (header.layers, header.kv_heads, header.head_dim, header.v_head_dim) == (2, 1, 192, 128)
    assert header.config_hash == config_hash(config_of("mimo")) and 0 < header.quality["kl"] < 0.1
    assert header.quality["worst_layer"] in FULL
