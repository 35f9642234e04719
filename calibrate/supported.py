"""Which models a packed cache does not hold, by their configs: one list, for offline calibration and for the server."""

from __future__ import annotations

from transformers import PretrainedConfig

from .model import ATTENTION, WITHOUT_KEYS, ModelError, head_dim, layer_kinds, packed_layers, text_config
from .rope import HeadDimError, check_head_dim

IMAGES_BOTH_WAYS = {"Gemma3ForConditionalGeneration"}


def unsupported(config: PretrainedConfig) -> str | None:
    """What the config tells of a model that is not supported, as "model: reason"; None of one that may be."""
    text = text_config(config)
    name = f"model type {getattr(text, 'model_type', 'unknown')}"
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return f"{name}: encoder-decoder attention is not supported"
    if getattr(text, "kv_lora_rank", None):
        return f"{name}: MLA keeps one latent vector, not keys and values"
    if others := sorted(set(layer_kinds(text)) - ATTENTION - WITHOUT_KEYS):
        kinds = ", ".join(others)
        return f"{name} with {kinds} layers: every layer with keys must have full or sliding-window attention"
    if layer_kinds(text) and not packed_layers(text):
        return f"{name}: no layer has attention to all tokens, so there is no cache to pack"
    if getattr(text, "global_head_dim", None):
        return f"{name}: its layers have heads of different sizes"
    if images := IMAGES_BOTH_WAYS.intersection(getattr(config, "architectures", None) or ()):
        return f"{min(images)}: the tokens of an image attend in both directions"
    if getattr(text, "attention_chunk_size", None):
        return f"{name}: attention in chunks is not supported"
    if getattr(text, "num_attention_heads", None):
        try:
            check_head_dim(head_dim(config))
        except HeadDimError as e:
            return str(e)
    return None


def check_model(config: PretrainedConfig) -> None:
    """ModelError for a model that is :func:`unsupported`."""
    if what := unsupported(config):
        raise ModelError(what)
