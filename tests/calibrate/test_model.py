"""What identifies a model, and what calibration refuses before any weight is loaded."""

import pytest
import torch
import transformers

from sglang_blockgtq.calibrate.model import (
    ModelError,
    config_hash,
    has_mrope,
    is_neox,
    rope_blocks,
    rope_parameters,
)
from sglang_blockgtq.calibrate.rope import RopeBlocks, check_head_dim
from sglang_blockgtq.calibrate.supported import check_model


def llama(**kw) -> transformers.LlamaConfig:
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    return transformers.LlamaConfig(**{**shape, "head_dim": 32, **kw})


SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 3},
        {"num_attention_heads": 16},
        {"num_key_value_heads": 4},
        {"head_dim": 64},
        {"hidden_size": 512},
        {"intermediate_size": 77},
        {"vocab_size": 99},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": SCALED},
        {"rope_parameters": {**SCALED, "factor": 16.0}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_config_hash_sees_geometry_and_rope(change):
    assert config_hash(llama(**change)) != config_hash(llama())


def test_scalings_differ_from_each_other():
    assert config_hash(llama(rope_parameters=SCALED)) != config_hash(llama(rope_parameters={**SCALED, "factor": 16.0}))


def test_config_hash_does_not_see_what_engines_rewrite():
    plain, dressed = llama(), llama(dtype=torch.bfloat16, use_cache=False, name_or_path="x/y", architectures=["Other"])
    dressed.transformers_version = "0.0"
    dressed.v_head_dim = 32
    dressed.rope_parameters["type"] = dressed.rope_parameters["rope_type"]
    dressed.rope_parameters["rope_theta"] = int(dressed.rope_parameters["rope_theta"])
    assert config_hash(dressed) == config_hash(plain)


SIDES = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def test_positions_of_several_sides():
    """Also of a Qwen2.5-VL as it is published, with the language model's fields beside the vision's."""
    published = {"model_type": "qwen2_5_vl", "hidden_size": 256, "num_attention_heads": 2, "rope_theta": 1e6,
                 "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": {}}  # fmt: skip
    models = (
        transformers.Qwen2_5_VLConfig.from_dict(published),
        transformers.Qwen3VLConfig(text_config={"rope_parameters": {**SIDES, "mrope_interleaved": True}}),
        transformers.Qwen3_5TextConfig(rope_parameters=dict(SIDES)),
    )
    assert all(map(has_mrope, models))
    assert not any(map(has_mrope, (llama(), llama(rope_parameters=SCALED), transformers.Gemma3TextConfig())))
    assert not has_mrope(transformers.GPT2Config())
    sections = rope_parameters(models[0])
    assert sections == rope_parameters(transformers.Qwen2_5_VLConfig(text_config={"rope_parameters": dict(SIDES)}))


class OldConfig:
    """RoPE fields as transformers 4 has them."""

    model_type, hidden_size, intermediate_size, vocab_size = "stablelm", 256, 64, 100
    num_hidden_layers, num_attention_heads, num_key_value_heads = 2, 8, 8

    def __init__(self, **kw):
        vars(self).update(kw)

    def get_text_config(self):
        return self


def test_rope_parameters_of_both_generations_agree():
    new = OldConfig(rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25})
    old = OldConfig(rope_theta=10000, rope_scaling=None, partial_rotary_factor=0.25)
    older = OldConfig(rope_theta=10000, rope_scaling=None, rotary_pct=0.25)
    assert rope_parameters(new) == rope_parameters(old) == rope_parameters(older)
    assert config_hash(new) == config_hash(old) == config_hash(older)
    scaled_new = OldConfig(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2})
    scaled_old = OldConfig(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0})
    assert config_hash(scaled_new) == config_hash(scaled_old) != config_hash(new)
    assert rope_parameters(OldConfig()) == {}


def test_config_hash_is_the_same_everywhere_and_always():
    """A changed value would disown every table made so far."""
    assert config_hash(llama()) == "788bcfcd6603f6c480bfb41a55f3d723228ebe59429c27de923858c4bdfa6e4a"


def test_sglang_reads_a_config_of_the_same_hash(model_folder):
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.utils.hf_transformers_utils import get_config

    expected = config_hash(transformers.AutoConfig.from_pretrained(model_folder))
    assert config_hash(get_config(str(model_folder), trust_remote_code=False)) == expected
    served = ModelConfig(str(model_folder))
    assert config_hash(served.hf_config) == config_hash(served.hf_text_config) == expected


@pytest.mark.parametrize(
    "config, reason",
    [
        (transformers.DeepseekV3Config(), "deepseek_v3: MLA keeps one latent vector"),
        (transformers.Llama4TextConfig(), "llama4_text with chunked_attention layers"),
        (transformers.Qwen3NextConfig(num_hidden_layers=3), "qwen3_next: no layer has attention"),
        (transformers.T5Config(), "t5: encoder-decoder attention"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_unsupported_attention(config, reason):
    with pytest.raises(ModelError, match=reason):
        check_model(config)


def test_supported_attention():
    check_model(llama())
    check_model(transformers.MistralConfig(sliding_window=None))
    check_model(transformers.Qwen2Config(sliding_window=4096, use_sliding_window=False))
    check_model(transformers.Glm4Config())
    check_model(transformers.Gemma3TextConfig())
    check_model(transformers.MistralConfig(sliding_window=4096))
    check_model(transformers.Qwen3NextConfig())


def test_unsupported_head_dim():
    with pytest.raises(ValueError, match="head_dim 40 is not supported; multiples of 16 from 32 to 256 are"):
        check_model(llama(head_dim=40))


@pytest.mark.parametrize("head_dim", [0, 16, 31, 33, 40, 72, 264, 272, 512])
def test_head_dims_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim} is not supported"):
        check_head_dim(head_dim)


@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 96, 112, 128, 160, 192, 256])
def test_head_dims_accepted(head_dim):
    assert check_head_dim(head_dim) == head_dim


@pytest.mark.parametrize(
    "config, rotary_dim, neox",
    [
        (transformers.LlamaConfig(), 128, True),
        (transformers.Qwen3Config(), 128, True),
        (transformers.GPTNeoXConfig(), 24, True),
        (transformers.PhiConfig(), 32, True),
        (transformers.StableLmConfig(), 20, True),
        (transformers.GlmConfig(), 64, False),
        (transformers.CohereConfig(), 128, False),
        (transformers.GPTJConfig(), 64, False),
        (transformers.Ernie4_5Config(), 128, False),
        (transformers.GptOssConfig(), 64, True),
        (transformers.BloomConfig(), 0, True),
    ],
    ids=lambda x: getattr(x, "model_type", None),
)
def test_rope_blocks(config, rotary_dim, neox):
    rope = rope_blocks(config)
    assert len(rope) == config.num_hidden_layers
    assert {(r.rotary_dim, r.neox) for r in rope} == {(rotary_dim, neox)}


def test_layers_without_rope_among_layers_with_it():
    rope = rope_blocks(transformers.SmolLM3Config(num_hidden_layers=4, no_rope_layers=[1, 1, 0, 1]))
    assert [r.rotary_dim for r in rope] == [128, 128, 0, 128]


def test_unknown_pairing_is_an_error():
    with pytest.raises(ModelError, match="cannot tell which channels its RoPE pairs"):
        is_neox(torch)


def test_rope_blocks_cover_every_channel_once():
    for rotary_dim in range(0, 65, 2):
        for neox in (True, False):
            channels = RopeBlocks(64, rotary_dim, neox).channels()
            assert channels.shape == (32, 2)
            assert sorted(channels.flatten().tolist()) == list(range(64))


@pytest.mark.parametrize("head_dim, rotary_dim", [(63, 32), (64, 31), (64, 66), (64, -2)])
def test_impossible_blocks(head_dim, rotary_dim):
    with pytest.raises(ValueError, match="rotary_dim"):
        RopeBlocks(head_dim, rotary_dim)
