"""The panel's pictures, drawn from its CSV rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image

from .lineup import BASELINE, BLOCK_GTQ, CODED, DEFAULT, HADAMARD
from .panel import METRICS
from .report import by_config, mean, size
from .run import Row

#: Okabe-Ito colours, markers, lines: variants of one method share the colour.
STYLES = {
    BASELINE: ("#555555", "s", "-"),
    HADAMARD: ("#555555", "D", ":"),
    "int_per_token": ("#D55E00", "x", "-"),
    "kivi": ("#CC79A7", "P", "-"),
    "kivi-scale-only": ("#CC79A7", "+", ":"),
    "paper": ("#E69F00", "^", "-"),
    "paper-segment": ("#E69F00", "2", ":"),
    "product": ("#009E73", "v", "-"),
    "product-segment": ("#009E73", "1", ":"),
    "template": ("#0072B2", "o", "-"),
    "fp8_e4m3": ("#000000", "", "--"),
}
NAMES = {
    "mae_offsets": "query-key logit MAE over 50 offsets up to 1024, no 1/sqrt(d)",
    "mae": "causal logit MAE at true positions, scaled as in the softmax",
    "softmax_kl": "softmax KL (nats)",
    "top10_overlap": "share of the ten most attended tokens kept",
    "output_error": "squared error of the attention output, relative (K and V coded)",
}


def _figure(rows: int, columns: int, width: float, height: float, title: str, **kw):
    """A figure of ``rows x columns`` axes, each ``width x height`` inches, as an array of them."""
    width = max(width, 8 / columns)  # room for the title
    figure = Figure(figsize=(width * columns, height * rows + 0.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(rows, columns, squeeze=False, **kw)


def _save(figure: Figure, path: Path) -> None:
    """A PNG of 255 colours: a third of the size, and nobody sees it."""
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)


def _tidy(axes) -> None:
    axes.grid(True, which="both", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _bits(rows: Sequence[Row]) -> list[float]:
    """Widths that methods were run at; two of them also have those that make bytes equal."""
    coded = [row for row in rows if row["method"] in CODED]
    nominal = [row for row in coded if row["method"] not in (BASELINE, DEFAULT)] or coded
    return sorted({float(row["k_bits"]) for row in nominal})


def metric(rows: Sequence[Row], column: str, path: Path, title: str, window: str = "") -> None:
    """One line per method over the layers, one axes per bit width; bytes of K and V in the legend."""
    configs = by_config(rows)
    bits = _bits(rows)
    figure, axes = _figure(1, len(bits), 5.2, 4.6, f"{title}: {NAMES[column]}", sharey=True)
    for width, ax in zip(bits, axes[0], strict=True):
        for name, (color, marker, line) in STYLES.items():
            own = (8.0, 8.0) if name == "fp8_e4m3" else (width, width)
            layers = configs.get((name, *own, window, 0))
            if not layers or mean(layers, column) is None:
                continue
            x = sorted(layers)
            y = [float(layers[i][column]) for i in x]
            style = {"color": color, "marker": marker, "linestyle": line, "markersize": 3.5, "linewidth": 1.1}
            ax.plot(x, y, label=f"{name}, {size(layers):.4g} B", **style)
        if not METRICS[column]:
            ax.set_yscale("log")
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(f"{width:g} bits", fontsize=10)
        _tidy(ax)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=7, frameon=False)
    _save(figure, path)


def wins(rows: Sequence[Row], path: Path, title: str) -> None:
    """Layers won by each method, per measure: at equal code bits, and below at equal bytes if that was compared."""
    plain = [row for row in rows if not row.get("window")]
    bits = _bits(plain)
    kinds = [at for at in ("bits", "bytes") if any(row["at"] == at for row in plain)]
    title = f"{title}: layers won against {plain[0]['against']}"
    figure, axes = _figure(len(kinds), len(bits), 3.8, 3.4, title, sharex=True)
    for at, line in zip(kinds, axes, strict=True):
        for width, ax in zip(bits, line, strict=True):
            chosen = [row for row in plain if row["at"] == at and float(row["k_bits"]) == width]
            share = [[_share(row, column) for column in METRICS] for row in chosen]
            _image(ax, np.array(share), vmin=0, vmax=1)
            ax.set_xticks(range(len(METRICS)), METRICS, rotation=30, ha="right", fontsize=8)
            names = [f"{row['method']}, {float(row['bytes']):.4g} B" for row in chosen]
            ax.set_yticks(range(len(chosen)), names, fontsize=7)
            for i, row in enumerate(chosen):
                for j, column in enumerate(METRICS):
                    color = "white" if share[i][j] < 0.6 else "black"
                    ax.text(j, i, f"{row[column]}/{row['layers']}", ha="center", va="center", fontsize=7, color=color)
            ax.set_title(f"{width:g} bits, at equal {at}", fontsize=10)
    _save(figure, path)


def _share(row: Row, column: str) -> float:
    return float(row[column]) / float(row["layers"])


def _image(ax, values: np.ndarray, **kw):
    return ax.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", **kw)


def fingerprint(rows: Sequence[Row], path: Path, title: str) -> None:
    """Mean bits over the heads of every block and layer, one image per method and width."""
    bits = sorted({float(row["k_bits"]) for row in rows})
    blocks = [name for name in rows[0] if name.startswith("block_")]
    figure, axes = _figure(
        len(bits), len(BLOCK_GTQ), 2.7, 2.9, f"{title}: bits of each block", sharex=True, sharey=True
    )
    for i, width in enumerate(bits):
        for name, ax in zip(BLOCK_GTQ, axes[i], strict=True):
            chosen = [row for row in rows if row["method"] == name and float(row["k_bits"]) == width]
            image = np.array([[float(row[block]) for block in blocks] for row in chosen]).T
            shown = _image(ax, image, origin="lower", vmin=1, vmax=8)
            ax.set_title(f"{name}, {width:g} bits", fontsize=9)
        axes[i][0].set_ylabel("RoPE block (0 rotates fastest)")
    for ax in axes[-1]:
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=axes, label="bits per channel, mean over heads", shrink=0.8)
    _save(figure, path)


def entropy(rows: Sequence[Row], path: Path, title: str) -> None:
    """Shannon entropy of the widths of a layer's blocks over depth."""
    bits = sorted({float(row["k_bits"]) for row in rows})
    figure, axes = _figure(1, len(bits), 4.2, 3.2, f"{title}: entropy of widths by depth", sharey=True)
    for width, ax in zip(bits, axes[0], strict=True):
        for name in BLOCK_GTQ:
            color, marker, line = STYLES[name]
            chosen = [row for row in rows if row["method"] == name and float(row["k_bits"]) == width]
            x, y = ([float(row[column]) for row in chosen] for column in ("depth", "entropy"))
            ax.plot(x, y, color=color, marker=marker, linestyle=line, markersize=3.5, linewidth=1.1, label=name)
        ax.set(xlabel="depth (0 first layer, 1 last)", title=f"{width:g} bits")
        _tidy(ax)
    axes[0][0].set_ylabel("bits")
    axes[0][-1].legend(fontsize=8, frameon=False)
    _save(figure, path)


def energy(rows: Sequence[Row], path: Path, title: str) -> None:
    """Energy of queries and keys in each block of each layer and the two scores, logarithmic."""
    columns = {"q_energy": "E|q|²", "k_energy": "E|k|²", "sum_score": "(q + k) / 2", "product_score": "q · k"}
    layers, blocks = (len({int(row[name]) for row in rows}) for name in ("layer", "block"))
    figure, axes = _figure(1, len(columns), 3.2, 3.2, f"{title}: log10 of energy by block, mean over KV heads")
    for (column, name), ax in zip(columns.items(), axes[0], strict=True):
        values = np.array([float(row[column]) for row in rows]).reshape(layers, blocks).T
        shown = _image(ax, np.log10(np.maximum(values, 1e-30)), origin="lower")
        ax.set(xlabel="layer", title=name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(shown, ax=ax, shrink=0.8)
    axes[0][0].set_ylabel("RoPE block (0 rotates fastest)")
    _save(figure, path)


#: Stem of the CSV file to the picture made from it.
TABLES: dict[str, Callable[[Sequence[Row], Path, str], None]] = {
    "wins": wins,
    "fingerprint": fingerprint,
    "entropy": entropy,
    "energy": energy,
}


def draw_all(tables: dict[str, Sequence[Row]], folder: Path, prefix: str, title: str) -> list[Path]:
    """PNGs of everything in ``tables`` (stem of the CSV file to rows), named ``prefix`` + stem."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for stem, draw in TABLES.items():
        if tables.get(stem):
            out.append(folder / f"{prefix}{stem}.png")
            draw(tables[stem], out[-1], title)
    for column in METRICS:
        for window in sorted({str(row.get("window") or "") for row in tables["layers"]}):
            if window and column == "mae_offsets":
                continue
            out.append(folder / f"{prefix}{column}{'_window' if window else ''}.png")
            named = f"{title}, {window} tokens in float16" if window else title
            metric(tables["layers"], column, out[-1], named, window)
    return out
