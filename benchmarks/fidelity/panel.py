"""The paper's panel: every method's attention against the exact one, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from . import attention
from .lineup import CASTS, Entry
from .methods import Method
from .model import Capture, capture
from .offsets import offset_mae
from .run import SEED, Row, Subject, inv_freq
from .window import Window

#: What is measured of a layer, and whether more is better.
METRICS = {"mae_offsets": False, "mae": False, "softmax_kl": False, "top10_overlap": True, "output_error": False}
FIELDS = (
    *("method", "k_bits", "v_bits", "window", "seed", "layer", "k_bytes", "v_bytes", "equal_k_bits", "equal_v_bits"),
    *METRICS,
    *("queries", "tokens"),
)


@dataclass
class Truth:
    """Exact attention of a layer's queries, and what every method is compared with."""

    q: torch.Tensor  # [N, Hq, D]
    k: torch.Tensor  # [T, H, D]
    v: torch.Tensor  # [T, H, Dv]
    positions: torch.Tensor  # [N]
    scale: float
    reference: attention.Reference
    output: torch.Tensor  # [H, G, N, Dv]

    @classmethod
    def of(cls, got: Capture, layer: int, scale: float) -> Truth:
        q, k, v = got.q[layer], got.k[layer], got.v[layer]
        reference = attention.reference(q, k, got.positions, scale)
        return cls(q, k, v, got.positions, scale, reference, _attend(reference.log_prob.exp(), v))


def _attend(prob: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """prob ``[H, G, N, T]``, v ``[T, H, Dv]`` to ``[H, G, N, Dv]``."""
    return torch.einsum("hgnt,thd->hgnd", prob, v)


def measure(true: Truth, k_hat: torch.Tensor, v_hat: torch.Tensor, window: Window | None = None) -> dict[str, float]:
    """Mean over queries and heads of one layer, for keys and values as a method reads them.

    mae, softmax_kl, top10_overlap: see attention.compare. output_error: squared error of the attention output over its
    squared length, summed over all queries, heads and channels; the one figure that the values have a part in.
    window: what it keeps is read in float16 instead, for each query what is near it.
    """
    logits = attention.causal_logits(true.q, k_hat, true.positions, true.scale)
    kept = None
    if window:
        kept = window.kept(true.positions, len(true.k))
        logits = attention.with_exact(logits, kept, true.q, true.k, true.positions, true.scale)
    result = attention.compare_logits(true.reference, logits)
    prob = logits.softmax(-1)
    output = _attend(prob, v_hat)
    if kept is not None:
        output += _attend(prob * kept, true.v.half().float() - v_hat)
    error = (output - true.output).square().sum() / true.output.square().sum()
    return {**{name: float(value.mean()) for name, value in result.items()}, "output_error": float(error)}


def _labels(method: Method, entry: Entry, tokens: int) -> Row:
    """The columns that say what was measured; what does not apply is left out."""
    k_bytes, v_bytes = method.sizes(tokens)
    row: Row = {"method": method.name, "k_bits": method.k_bits, "v_bits": method.v_bits, "seed": entry.seed}
    row |= {"k_bytes": k_bytes, "v_bytes": v_bytes}
    if isinstance(method, Window):
        row["window"] = f"{method.sink}+{method.recent}"
    if entry.equal:
        row["equal_k_bits"], row["equal_v_bits"] = entry.equal
    return row


def layer_rows(subject: Subject, entries: Sequence[Entry], got: Capture, layer: int, window: bool) -> list[Row]:
    """One row per method, and one more with the float16 window if asked."""
    true = Truth.of(got, layer, subject.head_dim**-0.5)
    tokens = len(true.k)
    shared = {"layer": layer, "queries": len(true.positions), "tokens": tokens}
    rows = []
    for entry in entries:
        k_hat, v_hat = entry.method.round_trip(layer, true.k, true.v)
        error = (true.k - k_hat)[true.positions]
        by_offsets = offset_mae(true.q, error, subject.rope[layer], inv_freq(subject.model)).mean()
        values = {"mae_offsets": float(by_offsets), **measure(true, k_hat, v_hat)}
        rows.append({**_labels(entry.method, entry, tokens), **shared, **values})
        if window and entry.method.name not in CASTS:
            windowed = Window(entry.method, true.k.shape[-1], true.v.shape[-1])
            # No offset MAE: one token against itself knows nothing of near and far.
            values = measure(true, k_hat, v_hat, windowed)
            rows.append({**_labels(windowed, entry, tokens), **shared, **values})
    return rows


@torch.inference_mode()
def panel_rows(
    subject: Subject, entries: Sequence[Entry], queries: int, layers: Sequence[int], window: bool = False
) -> list[Row]:
    """Rows of all ``layers``; ``queries`` positions are drawn from each 2,048 tokens of the text."""
    positions = attention.draw_queries(len(subject.ids), queries, SEED)
    got = capture(subject.model, subject.ids, positions)
    rows = []
    for layer in tqdm(layers, desc="panel", unit="layer"):
        rows += layer_rows(subject, entries, got, layer, window)
    return rows
