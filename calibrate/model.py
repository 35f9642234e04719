"""What identifies a model to a table, and what calibration must know of its attention."""

from __future__ import annotations

import hashlib
import json
import sys
from types import ModuleType
from typing import Any

import torch
from transformers import PretrainedConfig

from .rope import RopeBlocks


class ModelError(ValueError):
    """A model that cannot be calibrated; the message says why and what would work."""


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's part of a (possibly multimodal) config."""
    return config.get_text_config()


def kv_heads(config: PretrainedConfig) -> int:
    """KV heads per layer of the whole model."""
    text = text_config(config)
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def head_dim(config: PretrainedConfig) -> int:
    """Channels per head."""
    text = text_config(config)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def v_head_dim(config: PretrainedConfig) -> int:
    """Channels per value head."""
    return getattr(text_config(config), "v_head_dim", None) or head_dim(config)


#: Kinds of layers with keys and values of all tokens and a state beside them (Falcon-H1).
STATE_BESIDE_KEYS = frozenset({"hybrid", "falcon_h1"})
#: Kinds of layers with keys and values of all tokens.
ATTENTION = frozenset({"full_attention", "attention", "sliding_attention"}) | STATE_BESIDE_KEYS
#: Kinds of layers that keep no keys and values: a state for each request, or nothing.
WITHOUT_KEYS = frozenset({"linear_attention", "mamba", "mamba2", "conv", "short_conv", "mlp", "moe"})


#: Model types whose layers with a window SGLang keeps in a pool of their own, in 16 bits.
WINDOWS_APART = frozenset({"gpt_oss", "mellum", "mimo_v2_flash"})
#: Config fields of models whose layers have states.
STATE_KEYS = ("mamba_d_state", "ssm_state_size", "linear_num_value_heads")


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """What each layer is, as the config names it; empty where it does not tell."""
    text = text_config(config)
    return list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())


def has_states(config: PretrainedConfig) -> bool:
    """Whether layers keep a state for each request, in place of keys and values or beside them."""
    text = text_config(config)
    return not WITHOUT_KEYS.isdisjoint(layer_kinds(config)) or any(getattr(text, key, None) for key in STATE_KEYS)


def windows_apart(config: PretrainedConfig) -> bool:
    """Whether SGLang keeps the layers with a window in a pool of their own, which forgets what no query sees."""
    return text_config(config).model_type in WINDOWS_APART and "sliding_attention" in layer_kinds(config)


def packed_layers(config: PretrainedConfig) -> list[int]:
    """Ids of the layers whose keys and values are packed, in order.

    All but those of hybrid models without keys, and those with a window where these are kept apart.
    """
    kinds = layer_kinds(config) or ["full_attention"] * text_config(config).num_hidden_layers
    others = WITHOUT_KEYS | ({"sliding_attention"} if windows_apart(config) else set())
    return [layer for layer, kind in enumerate(kinds) if kind not in others]


def _canonical_rope(rope: dict) -> dict:
    """One spelling for what transformers versions and SGLang write differently."""
    out: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, dict):  # parameters per layer type
            out[key] = _canonical_rope(value)
        elif value is not None and key != "type":  # "type" is the old name of "rope_type"
            out[key] = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    if not any(isinstance(value, dict) for value in rope.values()):
        out["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        out.setdefault("partial_rotary_factor", 1.0)
    return out


def rope_parameters(config: PretrainedConfig) -> dict:
    """RoPE parameters in one canonical form, ``{}`` for a model without RoPE.

    Reads ``rope_parameters`` (transformers 5) or ``rope_theta``, ``rope_scaling`` and the partial
    rotary factor under its several names (transformers 4).
    """
    text = text_config(config)
    rope = dict(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {})
    if "rope_theta" not in rope and getattr(text, "rope_theta", None) is not None:
        rope["rope_theta"] = text.rope_theta
    if not rope:
        return {}
    for name in ("partial_rotary_factor", "rotary_pct"):
        if rope.get("partial_rotary_factor") is None and getattr(text, name, None) is not None:
            rope["partial_rotary_factor"] = getattr(text, name)
    return _canonical_rope(rope)


def has_mrope(config: PretrainedConfig) -> bool:
    """Whether a position has several sides (M-RoPE): an image's tokens, and all that follow it, have others than their
    indices."""
    rope = rope_parameters(config)
    return any("mrope_section" in part for part in (rope, *rope.values()) if isinstance(part, dict))


def config_hash(config: PretrainedConfig) -> str:
    """sha256 (hex) over what decides attention geometry, RoPE and identity of the language model.

    Equal for the config that transformers reads and the one SGLang reads. Architecture names are
    left out, since engines rewrite them; paths, dtypes and version fields do not belong to it.
    """
    text = text_config(config)
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    fields = {name: getattr(text, name, None) for name in names}
    fields["num_key_value_heads"] = kv_heads(config)
    fields["head_dim"] = head_dim(config)
    fields["v_head_dim"] = v_head_dim(config)  # SGLang sets the attribute where transformers leaves it out
    fields["rope"] = rope_parameters(config)
    fields["rotary_dim"] = getattr(text, "rotary_dim", None)
    if len(packed := packed_layers(config)) < text.num_hidden_layers:
        fields["packed_layers"] = packed
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def modeling_module(config: PretrainedConfig) -> ModuleType:
    """The transformers module that defines the causal language model of a config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    for candidate in (text_config(config), config):
        if type(candidate) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(candidate)].__module__]
    raise ModelError(f"model type {config.model_type}: transformers has no causal language model for it")


def is_neox(module: ModuleType) -> bool:
    """Whether a modeling module pairs channels (i, i + rotary_dim / 2); else (2i, 2i + 1). Found by calling it.

    Raises ModelError if the module has no function of a known name that turns channels by 90 degrees.
    """
    quarter = torch.zeros(4), torch.ones(4)  # its cosines and sines, which gpt-oss's function takes
    for name, given in (("rotate_half", ()), ("rotate_every_two", ()), ("_apply_rotary_emb", quarter)):
        turn = getattr(module, name, None)
        if turn is None:
            continue
        turned = turn(torch.arange(1.0, 9.0).view(1, 1, 1, 8), *given).flatten().tolist()
        if turned == [-5, -6, -7, -8, 1, 2, 3, 4]:
            return True
        if turned == [-2, 1, -4, 3, -6, 5, -8, 7]:
            return False
    raise ModelError(
        f"{module.__name__}: cannot tell which channels its RoPE pairs; models with rotate_half, "
        "rotate_every_two or _apply_rotary_emb are supported here, others calibrate inside the server"
    )


def rope_blocks(config: PretrainedConfig, module: ModuleType | None = None) -> list[RopeBlocks]:
    """RoPE pairing of every layer as transformers computes it; rotary_dim 0 where a layer has no RoPE.

    module: the modeling module, where the config does not lead to it (remote code).
    """
    text = text_config(config)
    dim, layers = head_dim(config), text.num_hidden_layers
    rotary_dim = getattr(text, "rotary_dim", None)  # GPT-J, CodeGen
    if rotary_dim is None:
        rope = rope_parameters(config)
        for value in rope.values():
            if isinstance(value, dict):
                rope = value  # per layer type; only theta differs between them
                break
        rotary_dim = int(dim * rope["partial_rotary_factor"]) if rope else 0
    if not rotary_dim:
        return [RopeBlocks(dim, 0)] * layers
    blocks = RopeBlocks(dim, rotary_dim, is_neox(module or modeling_module(config)))
    with_rope = getattr(text, "no_rope_layers", None) or [1] * layers  # 1 where a layer has RoPE, despite its name
    return [blocks if flag else RopeBlocks(dim, 0) for flag in with_rope]
