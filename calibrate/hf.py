"""Calibration through transformers: one pass over the text, moments taken where attention is computed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from .build import build_table, check_budget
from .model import (
    ModelError,
    check_model,
    config_hash,
    head_dim,
    kv_heads,
    rope_blocks,
    text_config,
    v_head_dim,
)
from .moments import Moments, MomentSums
from .rope import RopeBlocks
from .rope_check import check_swings, probe_positions, swing
from .segments import SEGMENT_ALLOCATORS, check_segments, rule_of
from .table import AllocationTable
from .text import MAX_SEQUENCE, check_text_size, check_tokens, read_text, text_hash, token_sequences
from .weights import weights_hash

logger = logging.getLogger(__name__)

Take = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]

_NAME = "blockgtq_capture"


def _attention(take: Take, heads: int, dim: int, v_dim: int) -> Callable:
    """An attention function of transformers' interface that shows q, k and v to ``take`` and attends causally."""

    def forward(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        layer = getattr(module, "layer_idx", None)
        where = f"{type(module).__name__} (layer {layer})"
        if layer is None:
            raise ModelError(f"{where}: has no layer_idx, so its layer is unknown; calibrate inside the server")
        if kwargs.get("sliding_window") is not None:
            raise ModelError(f"{where}: sliding window of {kwargs['sliding_window']}; full attention is supported")
        for option in ("softcap", "s_aux", "position_bias"):
            if kwargs.get(option) is not None:
                raise ModelError(f"{where}: attention with {option} is not supported; calibrate inside the server")
        if not getattr(module, "is_causal", True):
            raise ModelError(f"{where}: attention is not causal; decoder-only models are supported")
        found = (key.shape[1], key.shape[-1], value.shape[-1])
        if found != (heads, dim, v_dim) or query.shape[1] % heads:
            raise ModelError(
                f"{where}: {query.shape[1]} query heads and {found[0]} KV heads of {found[1]} and {found[2]} channels, "
                f"the config says {heads} KV heads of {dim} and {v_dim}"
            )
        take(layer, *(x[0].transpose(0, 1) for x in (query, key, value)))
        out = scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=query.shape[1] != heads
        )
        return out.transpose(1, 2).contiguous(), None

    return forward


@contextmanager
def _captured(model: torch.nn.Module, take: Take) -> Iterator[None]:
    """Within the context, ``take(layer, q, k, v)`` sees every layer's tensors ``[T, heads, channels]``."""
    config = model.config
    attention = _attention(take, kv_heads(config), head_dim(config), v_head_dim(config))
    former = config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    try:
        model.set_attn_implementation(_NAME)
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(former)


def _check_all_seen(config: PretrainedConfig, seen: set[int]) -> None:
    if missing := sorted(set(range(text_config(config).num_hidden_layers)) - seen):
        raise ModelError(
            f"model type {config.model_type}: the attention of layers {missing[:8]} does not go through "
            "transformers' attention interface; calibrate inside the server"
        )


def _context(config: PretrainedConfig) -> int:
    return getattr(text_config(config), "max_position_embeddings", None) or MAX_SEQUENCE


def check_rope(model: torch.nn.Module, rope: Sequence[RopeBlocks], token: int) -> None:
    """ModelError if the model turns other channel pairs than ``rope`` says (see :mod:`.rope_check`)."""
    swings: dict[int, float] = {}

    def take(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        swings[layer] = swing(k, rope[layer])

    device = next(model.parameters()).device
    positions = probe_positions(_context(model.config))
    ids = torch.full((1, len(positions)), token, device=device)
    with _captured(model, take):
        model.base_model(input_ids=ids, position_ids=torch.tensor([positions], device=device), use_cache=False)
    _check_all_seen(model.config, set(swings))
    if any(r.rotary_dim for r in rope):  # else learned positions, if any, change the keys themselves
        check_swings([swings[layer] for layer in range(len(rope))], rope)


def collect(
    model: torch.nn.Module, sequences: Sequence[Sequence[int]], rope: list[RopeBlocks], progress: bool = True
) -> Moments:
    """Moments of a transformers causal language model over token sequences; one pass, batch size 1.

    q and k are taken after RoPE and QK-norm. The model's attention implementation is restored.
    Raises ModelError if its attention is not reached through transformers' attention interface, has
    a sliding window or is latent, or if ``rope`` (one entry per layer) is not how it pairs channels.
    """
    config = model.config
    check_model(config)
    check_rope(model, rope, sequences[0][-1])
    sums = MomentSums(text_config(config).num_hidden_layers, kv_heads(config), rope)

    def take(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        sums.add(layer, 0, q, k, v)

    device = next(model.parameters()).device
    tokens = sum(len(sequence) for sequence in sequences)
    with _captured(model, take), tqdm(total=tokens, desc="calibrating", unit="tok", disable=not progress) as bar:
        for sequence in sequences:
            # Without the language head: nobody needs the logits.
            model.base_model(input_ids=torch.tensor([list(sequence)], device=device), use_cache=False)
            bar.update(len(sequence))
    return sums.mean(tokens)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def load_config(model_path: str, **options: Any) -> PretrainedConfig:
    """A model's config, checked to be one that can be calibrated. options: of from_pretrained. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(model_path, **options)
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(f"--model-path {model_path}: no model config can be read there ({_first_line(e)})") from e
    check_model(config)
    return config


def calibrate_model(
    model_path: str,
    *,
    k_bits: float,
    v_bits: float,
    allocator: str,
    granularity: str = "segment",
    text_path: str | None,
    tokens: int,
    device: str,
    dtype: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> AllocationTable:
    """Load a model, calibrate it, build its table. What can be checked without the weights is checked first.

    device: "auto" (CUDA if there is one), or a torch device. dtype: "auto" (the checkpoint's) or a torch dtype's name.
    revision: of a hub model; None is main. A model without RoPE gets ``uniform`` widths, with a notice.
    """
    check_tokens(tokens)
    text = read_text(text_path)
    check_text_size(tokens, text_path)
    options = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    config = load_config(model_path, **options)
    check_budget("k_bits", k_bits, head_dim(config) // 2)
    check_budget("v_bits", v_bits, v_head_dim(config) // 2)
    if rule_of(allocator, granularity) in SEGMENT_ALLOCATORS.values():
        check_segments(head_dim(config), k_bits)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, **options)
    except (OSError, ValueError) as e:
        raise ModelError(f"--model-path {model_path}: no tokenizer can be read there ({_first_line(e)})") from e
    sequences = token_sequences(tokenizer, text, tokens, _context(config))

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, **options)
    except (OSError, ValueError) as e:
        raise ModelError(f"--model-path {model_path}: its weights cannot be loaded ({_first_line(e)})") from e
    model = model.to(device).eval()
    rope = rope_blocks(config, sys.modules[type(model).__module__])
    if allocator != "uniform" and not any(r.rotary_dim for r in rope):
        logger.warning("no layer of %s has RoPE: there are no blocks to rank, so widths are uniform", model_path)
        allocator, granularity = "uniform", "segment"
    return build_table(
        collect(model, sequences, rope),
        rope,
        k_bits=k_bits,
        v_bits=v_bits,
        allocator=allocator,
        granularity=granularity,
        v_head_dim=v_head_dim(config),
        model_id=str(model_path),
        config_hash=config_hash(config),
        weights_hash=weights_hash(model_path, revision),
        text_hash=text_hash(sequences),
    )
