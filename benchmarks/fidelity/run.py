"""From a model and two texts to rows: calibrate, measure attention layer by layer, score perplexity."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_blockgtq.calibrate.allocate import ALLOCATORS
from sglang_blockgtq.calibrate.build import ROTATION_SEED, build_table
from sglang_blockgtq.calibrate.hf import collect
from sglang_blockgtq.calibrate.model import rope_blocks
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.segments import SEGMENT_ALLOCATORS
from sglang_blockgtq.calibrate.supported import check_model
from sglang_blockgtq.calibrate.table import AllocationTable
from sglang_blockgtq.calibrate.text import DEFAULT_TOKENS, TextError, read_text, text_hash, token_sequences

from . import attention, perplexity
from .exact import Mixed
from .methods import Cast, IntPerToken, Method, Packed
from .model import Capture, capture, rotate

SHIFT = 30_000  # positions
SEED = 1
PPL_LENGTH = 2048  # tokens of a perplexity sequence

FIELDS = (
    *("method", "k_bits", "v_bits", "bytes_per_token_head", "layer", "mae", "softmax_kl", "top10_overlap", "ppl"),
    *("window", "shift", "tokens", "kl_final"),
)
PACKED = (*ALLOCATORS, *(f"{name}-segment" for name in SEGMENT_ALLOCATORS))
Row = dict[str, str | int | float]


def rule_named(name: str) -> dict[str, str]:
    """Allocator and granularity of one of :data:`PACKED`: ``paper`` is by blocks, ``paper-segment`` by segments."""
    allocator, _, segment = name.partition("-")
    by_blocks = allocator in SEGMENT_ALLOCATORS and not segment
    return {"allocator": allocator, "granularity": "block" if by_blocks else "segment"}


@dataclass
class Subject:
    """The model (float32), its moments on the calibration text and the ids of the evaluation text."""

    model: torch.nn.Module
    rope: list[RopeBlocks]
    moments: Moments
    ids: list[int]
    calibration_hash: str
    calibration_ids: list[list[int]]

    @property
    def device(self) -> torch.device:
        """Of the model; everything is measured there."""
        return self.model.device

    @property
    def head_dim(self) -> int:
        return self.rope[0].head_dim

    def allocation(self, name: str, k_bits: float, v_bits: float, seed: int = ROTATION_SEED) -> AllocationTable:
        """``name``: one of :data:`PACKED`. seed: of the rotations."""
        return build_table(self.moments, self.rope, k_bits=k_bits, v_bits=v_bits, seed=seed, **rule_named(name))

    def table(self, name: str, k_bits: float, v_bits: float) -> Packed:
        return Packed(self.allocation(name, k_bits, v_bits), device=self.device)


def default_text() -> Path:
    """A government report that comes with SGLang, some 7,000 tokens."""
    spec = importlib.util.find_spec("sglang")  # found, not imported: that takes seconds
    return Path(spec.submodule_search_locations[0]) / "test" / "long_prompt.txt"


def load(
    model_path: str, text_path: Path | None = None, calibration_path: str | None = None, device: str = "cpu"
) -> Subject:
    """Load a model folder and calibrate it on 2,048 tokens. Float32 on every device: no TF32.

    Raises TextError for a text that cannot be read, and where calibration and evaluation text are the same.
    """
    calibration = read_text(calibration_path)
    text = read_text(str(text_path or default_text()), "--text")
    if calibration == text:
        raise TextError("--text: it is the calibration text; measure on a text that the table has not seen")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    torch.set_float32_matmul_precision("highest")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(device).eval()
    check_model(model.config)
    rope = rope_blocks(model.config)
    sequences = token_sequences(tokenizer, calibration, DEFAULT_TOKENS, model.config.max_position_embeddings)
    moments = collect(model, sequences, rope)
    return Subject(model, rope, moments, tokenizer.encode(text), text_hash(sequences), sequences)


def attention_methods(subject: Subject, bits: Iterable[int]) -> list[Method]:
    """All allocators at each K width, with V at the same width; then what is shown for scale."""
    dim = subject.head_dim
    out: list[Method] = [subject.table(name, b, b) for b in bits for name in PACKED]
    out += [IntPerToken(b, dim, dim) for b in bits]
    return [*out, Cast("fp8_e4m3", torch.float8_e4m3fn, dim, dim)]


def perplexity_methods(subject: Subject) -> list[Method | None]:
    """None is the unquantized cache, the reference."""
    dim = subject.head_dim
    out: list[Method | None] = [None, Cast("bf16", torch.bfloat16, dim, dim)]
    out += [Cast("fp8_e4m3", torch.float8_e4m3fn, dim, dim), subject.table("template", 8, 8)]
    out += [subject.table(name, b, b) for b in (4, 3, 2) for name in PACKED]
    return [*out, IntPerToken(4, dim, dim)]


def _row(method: Method | None, dim: int, **values) -> Row:
    """One CSV row; float32 keys and values are the reference."""
    if method is None:
        return {"method": "fp32", "k_bits": 32, "v_bits": 32, "bytes_per_token_head": 8 * dim, **values}
    fields = ("k_bits", "v_bits", "bytes_per_token_head")
    return {"method": method.name, **{field: getattr(method, field) for field in fields}, **values}


def inv_freq(model) -> torch.Tensor:
    """Radians per position of each rotated block."""
    return model.base_model.rotary_emb.inv_freq


def layer_rows(subject: Subject, methods: Sequence[Method], got: Capture, layer: int, shift: int) -> list[Row]:
    """One row per method and window. ``shift``: keys and queries are rotated on by so many positions before coding."""
    scale = subject.head_dim**-0.5
    q, k, v = got.q[layer], got.k[layer], got.v[layer]
    tokens = k.shape[0]
    true = attention.reference(q, k, got.positions, scale)
    if shift:
        q, k = (rotate(x, subject.rope[layer], inv_freq(subject.model), shift) for x in (q, k))
    rows = []
    for method in methods:
        mixed = method if isinstance(method, Mixed) else None
        k_hat, _ = (mixed.method if mixed else method).round_trip(layer, k, v, shift)
        logits = attention.causal_logits(q, k_hat, got.positions, scale)
        if mixed:
            kept = mixed.keys.kept(got.positions, tokens)
            logits = attention.with_exact(logits, kept, q, k, got.positions, scale)
        result = attention.compare_logits(true, logits)
        names = attention.window_names(tokens)
        windows = {name: value.view(len(names), -1).mean(-1).tolist() for name, value in result.items()}
        for i, window in enumerate(names):
            values = {name: value[i] for name, value in windows.items()}
            values["tokens"] = len(got.positions) // len(names)
            rows.append(_row(method, subject.head_dim, layer=layer, window=window, shift=shift, **values))
    return rows


@torch.inference_mode()
def attention_rows(
    subject: Subject, bits: Sequence[int], shift_bits: Sequence[int], queries: int, layers: Sequence[int] | None = None
) -> list[Row]:
    """Attention fidelity of every layer, unshifted and, for the allocators at ``shift_bits``, shifted."""
    positions = attention.draw_queries(len(subject.ids), queries, SEED)
    got = capture(subject.model, subject.ids, positions)
    methods = attention_methods(subject, bits)
    shifted = [m for m in methods if isinstance(m, Packed) and m.k_bits in shift_bits]
    rows = []
    for layer in tqdm(layers or range(len(subject.rope)), desc="attention", unit="layer"):
        rows += layer_rows(subject, methods, got, layer, 0)
        rows += layer_rows(subject, shifted, got, layer, SHIFT)
    return rows


def perplexity_rows(subject: Subject, methods: Sequence[Method | None], length: int = PPL_LENGTH) -> list[Row]:
    """Perplexity and final KL over the text cut in sequences of ``length`` tokens, a shorter rest left out."""
    ids = subject.ids
    sequences = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    scores = [perplexity.Score() for _ in methods]
    with tqdm(total=len(sequences) * len(methods), desc="perplexity", unit="pass") as bar:
        for sequence in sequences:
            true = perplexity.hidden_states(subject.model, sequence, None)
            for method, score in zip(methods, scores, strict=True):
                hidden = true if method is None else perplexity.hidden_states(subject.model, sequence, method)
                perplexity.add_score(score, subject.model, sequence, hidden, true)
                bar.update()
    return [
        _row(m, subject.head_dim, window=f"0-{length}", shift=0, tokens=s.tokens, ppl=s.ppl, kl_final=s.kl_final)
        for m, s in zip(methods, scores, strict=True)
    ]
