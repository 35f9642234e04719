"""Calibration through transformers: one pass over the text, moments taken where attention is computed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from ..kernels.terms import Terms
from . import RECENT
from .build import build_table, check_budget
from .frequencies import frequencies, of_blocks
from .model import (
    ModelError,
    config_hash,
    has_mrope,
    has_states,
    head_dim,
    kv_heads,
    layer_kinds,
    packed_layers,
    rope_blocks,
    rope_parameters,
    text_config,
    v_head_dim,
)
from .moments import Moments, MomentSums
from .quality import TOKENS, HeldOut, Hook, Quality, attend
from .rope import RopeBlocks
from .rope_check import Probe, check_swings, trusted
from .segments import SEGMENT_ALLOCATORS, check_segments, rule_of
from .supported import check_model
from .table import AllocationTable, layers_of
from .text import MAX_SEQUENCE, check_text_size, check_tokens, held_out, read_text, text_hash, token_sequences
from .weights import weights_hash

logger = logging.getLogger(__name__)

#: take(layer, q, k, v) may return other keys and values to attend to.
Take = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], Any]

_NAME = "blockgtq_capture"
CHANGING_ROPE = ("dynamic", "longrope")  # their frequencies depend on the sequence's length


def _attention(take: Take, config: PretrainedConfig, logits: dict[int, tuple[float, Terms]] | None = None) -> Callable:
    """An attention function of transformers' interface that shows q, k and v to ``take`` and attends causally."""
    heads, dim, v_dim, packed = kv_heads(config), head_dim(config), v_head_dim(config), set(packed_layers(config))

    def forward(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        layer = getattr(module, "layer_idx", None)
        where = f"{type(module).__name__} (layer {layer})"
        if layer is None:
            raise ModelError(f"{where}: has no layer_idx, so its layer is unknown; calibrate inside the server")
        if kwargs.get("position_bias") is not None:
            raise ModelError(f"{where}: attention with position_bias is not supported")
        terms = Terms(kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0, kwargs.get("s_aux"))
        if not getattr(module, "is_causal", True):
            raise ModelError(f"{where}: attention is not causal; decoder-only models are supported")
        if layer in packed:
            found = (key.shape[1], key.shape[-1], value.shape[-1])
            if found != (heads, dim, v_dim) or query.shape[1] % heads:
                raise ModelError(
                    f"{where}: {query.shape[1]} query heads and {found[0]} KV heads of {found[1]} and {found[2]} "
                    f"channels, the config says {heads} KV heads of {dim} and {v_dim}"
                )
        if logits is not None:
            logits[layer] = scaling, terms
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attend(q, k, v, take(layer, q, k, v), scaling, terms)[None], None

    return forward


@contextmanager
def _captured(
    model: PreTrainedModel, take: Take, logits: dict[int, tuple[float, Terms]] | None = None
) -> Iterator[None]:
    """Within the context, ``take(layer, q, k, v)`` sees every layer's tensors ``[T, heads, channels]``.

    logits: takes the scale and terms of each layer's.
    """
    config = model.config
    attention = _attention(take, config, logits)
    former = config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    try:
        model.set_attn_implementation(_NAME)
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(former)


def _check_all_seen(config: PretrainedConfig, seen: set[int]) -> None:
    if missing := sorted(set(packed_layers(config)) - seen):
        raise ModelError(
            f"model type {config.model_type}: the attention of layers {missing[:8]} does not go through "
            "transformers' attention interface; calibrate inside the server"
        )


def _context(config: PretrainedConfig) -> int:
    return getattr(text_config(config), "max_position_embeddings", None) or MAX_SEQUENCE


def _of_pairs(x: torch.Tensor, pairs: int) -> torch.Tensor:
    """A value for each of ``pairs``, of these or of values for each channel: each twice, in two halves or next to one
    another."""
    if x.shape[-1] == pairs:
        return x
    half = x.shape[-1] // 2
    return x[:, :half] if torch.equal(x[:, :half], x[:, half:]) else x[:, ::2]


def model_frequencies(model: PreTrainedModel, rope: Sequence[RopeBlocks]) -> list[torch.Tensor | None]:
    """How fast each layer's blocks rotate, by the model's own rotary module; None where it does not tell."""
    device, rotary = next(model.parameters()).device, getattr(model.get_decoder(), "rotary_emb", None)
    parameters = rope_parameters(model.config)
    kinds: Sequence[str | None] = layer_kinds(model.config) or [None] * len(rope)
    by_kind = any(kind in parameters for kind in kinds)  # each kind of layer has RoPE of its own
    pairs = max(blocks.rotary_dim for blocks in rope) // 2

    def turn(rotary: torch.nn.Module, kind: str | None, positions: torch.Tensor) -> torch.Tensor:
        sides = rotary(torch.zeros(1, device=device), positions[None].to(device), *([kind] if by_kind else []))
        return torch.stack([_of_pairs(x[0], pairs) for x in sides], 1)

    @cache
    def rotated(kind: str | None) -> torch.Tensor | None:
        mine = parameters.get(kind, {}) if by_kind else parameters
        if rotary is None or "mrope_section" in mine or mine.get("rope_type") in CHANGING_ROPE:
            return None
        try:
            return frequencies(partial(turn, rotary, kind), _context(model.config))
        except (TypeError, ValueError, RuntimeError, IndexError):  # a module of another kind
            logger.warning("%s says no frequencies", type(rotary).__name__)
            return None

    return [of_blocks(rotated(kind if by_kind else None), r) for kind, r in zip(kinds, rope, strict=True)]


def check_rope(
    model: PreTrainedModel, rope: Sequence[RopeBlocks], theta: Sequence[torch.Tensor | None], token: int
) -> list[torch.Tensor | None]:
    """ModelError if the model rotates other channel pairs than ``rope`` says (see :mod:`.rope_check`).

    Returns ``theta`` without the layers whose keys do not rotate by it.
    """
    device = next(model.parameters()).device
    probe = Probe(token, _context(model.config), has_states(model.config))
    with _captured(model, probe.take):
        for read in probe.passes:
            ids, positions = (torch.tensor([x], device=device) for x in read)
            model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
    _check_all_seen(model.config, set(probe.keys))
    swings, drifts = zip(*(probe.found(i, r, theta[i]) for i, r in enumerate(rope)), strict=True)
    if any(r.rotary_dim for r in rope):  # else learned positions, if any, change the keys themselves
        check_swings(swings, rope)
    return trusted(theta, drifts, rope, has_mrope(model.config))


def collect(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], rope: list[RopeBlocks], progress: bool = True
) -> Moments:
    """Moments of a transformers causal language model over token sequences; one pass, batch size 1.

    They have a row for each packed layer. q and k are taken after RoPE and QK-norm. The model's attention
    implementation is restored.
    Raises ModelError if its attention is not reached through transformers' attention interface, is
    latent, or if ``rope`` (one entry per layer) is not how it pairs channels.
    """
    config = model.config
    check_model(config)
    theta = check_rope(model, rope, model_frequencies(model, rope), sequences[0][-1])
    packed = packed_layers(config)
    sums = MomentSums(text_config(config).num_hidden_layers, kv_heads(config), rope, theta)

    def take(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer in packed:
            sums.add(layer, 0, q, k, v)

    device = next(model.parameters()).device
    tokens = sum(len(sequence) for sequence in sequences)
    with _captured(model, take), tqdm(total=tokens, desc="calibrating", unit="tok", disable=not progress) as bar:
        for sequence in sequences:
            # Without the language head: nobody needs the logits.
            model.get_decoder()(input_ids=torch.tensor([list(sequence)], device=device), use_cache=False)
            bar.update(len(sequence))
    return sums.mean(tokens, packed)


def measure(model: PreTrainedModel, ids: Sequence[int], table: AllocationTable, recent: int = 0) -> Quality:
    """What the cache of ``table`` costs on ``ids``, which it was not calibrated on. recent: tokens read exactly."""
    device = next(model.parameters()).device
    tokens = torch.tensor([list(ids)], device=device)
    logits: dict[int, tuple[float, Terms]] = {}

    def run(hook: Hook, answers: torch.Tensor) -> torch.Tensor:
        with _captured(model, hook, logits):
            return model(input_ids=tokens, use_cache=False, logits_to_keep=answers.to(device)).logits[0]

    exact = HeldOut(run, len(ids), logits, text_config(model.config).num_hidden_layers, recent)
    rows = layers_of(table, slice(None), range(table.header.layers), device, len(ids))
    packed = {layer: rows[row] for row, layer in enumerate(packed_layers(model.config))}
    return exact.sums(packed).quality(len(exact.answers), recent)


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


def _auto_class(config: PretrainedConfig) -> type[AutoModelForImageTextToText] | type[AutoModelForCausalLM]:
    """What loads a model: models with images are not among transformers' causal language models."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


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
    recent: int = RECENT,
) -> AllocationTable:
    """Load a model, calibrate it, build its table. What can be checked without the weights is checked first.

    device: "auto" (CUDA if there is one), or a torch device. dtype: "auto" (the checkpoint's) or a torch dtype's name.
    revision: of a hub model; None is main. recent: last tokens read exactly where the cost is measured. A model
    without RoPE gets ``uniform`` widths, with a notice.
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
        loaded: Any = _auto_class(config).from_pretrained(model_path, dtype=dtype, **options)
    except (OSError, ValueError) as e:
        raise ModelError(f"--model-path {model_path}: its weights cannot be loaded ({_first_line(e)})") from e
    model = loaded.to(device).eval()
    rope = rope_blocks(config, sys.modules[type(model.get_decoder()).__module__])
    if allocator != "uniform" and not any(r.rotary_dim for r in rope):
        logger.warning("no layer of %s has RoPE: there are no blocks to rank, so widths are uniform", model_path)
        allocator, granularity = "uniform", "segment"
    moments, ids = collect(model, sequences, rope), held_out(tokenizer, text, tokens, min(TOKENS, _context(config)))
    table = build_table(
        moments,
        [rope[layer] for layer in packed_layers(config)],
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
    if not ids:
        logger.warning("the calibration text has no more tokens: what the cache costs is not measured")
        return table
    return table.with_quality(measure(model, ids, table, recent))
