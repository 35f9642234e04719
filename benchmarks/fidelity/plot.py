"""Softmax KL per layer, one line per allocator."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .targets import Row, by_layer, select

#: Okabe-Ito colours, told apart in greyscale by the markers.
STYLES = {
    "uniform": ("#555555", "s"),
    "paper": ("#E69F00", "^"),
    "product": ("#009E73", "v"),
    "template": ("#0072B2", "o"),
}


def draw(rows: list[Row], path: Path, model: str, bits: int = 3) -> None:
    """Write a PNG: mean softmax KL of each layer at ``bits``, log axis, with bytes per token and head."""
    figure = Figure(figsize=(7.2, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method, (color, marker) in STYLES.items():
        chosen = select(rows, method, bits)
        kl = by_layer(chosen, "softmax_kl")
        size = float(chosen[0]["bytes_per_token_head"])
        label = f"{method}, {size:.3g} B"
        axes.plot(list(kl), list(kl.values()), color=color, marker=marker, markersize=3.5, linewidth=1.3, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("layer")
    axes.set_ylabel("softmax KL (nats)")
    axes.set_title(f"{model}: attention with {bits}-bit keys against exact keys", fontsize=10)
    axes.grid(True, which="both", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(top=axes.get_ylim()[1] * 2)  # room for the legend
    title = "bytes: K and V of one token and head"
    axes.legend(loc="upper center", ncols=4, fontsize=8, frameon=False, title=title, title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
