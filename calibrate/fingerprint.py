"""The allocation fingerprint of a table as a picture."""

from __future__ import annotations

import os
from pathlib import PurePath

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..kernels.format.codebook import MAX_BITS
from .inspect import width_name, width_shares
from .table import AllocationTable


def fingerprint(table: AllocationTable) -> Figure:
    """Share of widths in each layer (stacked bars), and mean bits of each RoPE block by layer (image).

    The second panel shows what the first cannot when all heads share one multiset of widths:
    where along the frequencies the bits went.
    """
    h = table.header
    shares = width_shares(table).numpy()
    used = [b for b in range(MAX_BITS + 1) if shares[:, b].any()]
    palette = colormaps["viridis"].resampled(MAX_BITS)

    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{PurePath(h.model_id).name or 'model'}  ·  {h.allocator}, K {h.k_bits:g} bits on average", fontsize=11
    )

    layers = range(h.layers)
    bottom = 0 * shares[:, 0]
    for bits in used:
        color = palette(max(bits - 1, 0))
        left.bar(layers, shares[:, bits], bottom=bottom, width=1.0, color=color, label=width_name(bits), linewidth=0)
        bottom = bottom + shares[:, bits]
    left.set(xlim=(-0.5, h.layers - 0.5), ylim=(0, 1), xlabel="layer", ylabel="share of RoPE blocks")
    left.set_title("bit widths by layer", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)

    mean_bits = table.tensors["widths"].float().mean(1).numpy()
    image = right.imshow(mean_bits.T, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
    right.set(xlabel="layer", ylabel="RoPE block (0 turns fastest)")
    right.set_title("mean bits of each block over the heads", fontsize=10)
    figure.colorbar(image, ax=right, label="bits per channel")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw(table: AllocationTable, path: str | os.PathLike) -> None:
    """Write the fingerprint as a PNG."""
    fingerprint(table).savefig(path, format="png")
