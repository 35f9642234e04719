"""Draw docs/img/row.png: the packed row of SmolLM2-135M at K3V3, to scale, from its RowLayout.

usage: python scripts/draw_row.py [OUTPUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

from sglang_blockgtq.kernels.format.columns import COLUMNS
from sglang_blockgtq.kernels.format.layout import NORM_BYTES, CodeLayout, RowLayout, uniform_layout

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "img" / "row.png"

#: The widths that the template allocator gives SmolLM2-135M (head_dim 64) at 3 bits.
WIDTHS = tuple(bits for bits in (4, 3, 3, 2) for _ in range(COLUMNS))
HEADS = 3

BIN_COLORS = {16: "#4a3aa7", 8: "#2a78d6", 4: "#1baf7a", 2: "#eda100"}
SEGMENT_COLORS = ("#2a78d6", "#1baf7a", "#7fb2ea", "#8ed8bd")
SCALE_COLOR, PAD_COLOR = "#e87ba4", "#d9d8d4"
INK, MUTED, EDGE = "#1f1f1d", "#5f5e58", "#ffffff"


def box(ax: Axes, x: float, y: float, width: float, height: float, color: str, line: float = 0.8) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=EDGE, linewidth=line))


def label(ax: Axes, x: float, y: float, text: str, **style) -> None:
    style = {"ha": "center", "va": "center", "fontsize": 9, "color": INK, **style}
    ax.text(x, y, text, **style)


def bracket(ax: Axes, start: float, stop: float, y: float, text: str) -> None:
    """A span with its name above it."""
    ax.plot([start, start, stop, stop], [y, y + 0.18, y + 0.18, y], color=MUTED, linewidth=0.9, solid_joinstyle="miter")
    label(ax, (start + stop) / 2, y + 0.5, text)


def zoom(ax: Axes, top: tuple[float, float], bottom: tuple[float, float], y_top: float, y_bottom: float) -> None:
    corners = [(top[0], y_top), (top[1], y_top), (bottom[1], y_bottom), (bottom[0], y_bottom)]
    ax.add_patch(Polygon(corners, facecolor="#efeee9", edgecolor="none", zorder=0))


def draw_codes(ax: Axes, layout: CodeLayout, x: float, y: float, height: float) -> None:
    for part in layout.columns.bins:
        box(ax, x + part.offset, y, part.num_bytes, height, BIN_COLORS[part.bits])


def draw_row(ax: Axes, row: RowLayout, y: float, height: float) -> None:
    """The whole row, one unit per byte: bins coloured, heads bracketed, byte offsets below."""
    parts = [("K", h * row.k_code_bytes, layout) for h, layout in enumerate(row.k)]
    parts += [("V", row.v_offset + h * row.v_code_bytes, row.v) for h in range(row.heads)]
    for i, (name, x, layout) in enumerate(parts):
        draw_codes(ax, layout, x, y, height)
        bracket(ax, x + 0.3, x + layout.code_bytes - 0.3, y + height + 0.12, f"{name} head {i % row.heads}")
    for i in range(row.heads * row.norms):
        box(ax, row.norm_offset + i * NORM_BYTES, y, NORM_BYTES, height, SCALE_COLOR)
    end = row.norm_offset + row.heads * row.norms * NORM_BYTES
    box(ax, end, y, row.row_bytes - end, height, PAD_COLOR)
    bracket(ax, row.norm_offset + 0.3, end - 0.3, y + height + 0.12, "scales")
    label(ax, (end + row.row_bytes) / 2, y + height + 0.62, "pad")
    for offset in [*(x for _, x, _ in parts), row.norm_offset, end, row.row_bytes]:
        ax.plot([offset, offset], [y, y - 0.15], color=MUTED, linewidth=0.8)
        nudge = {end: -0.9, row.row_bytes: 0.9}.get(offset, 0.0)
        label(ax, offset + nudge, y - 0.42, str(offset), fontsize=8, color=MUTED)


def draw_head(ax: Axes, layout: CodeLayout, x: float, y: float, unit: float, height: float) -> None:
    """One head's words, with the byte each starts at below and its columns inside."""
    for i, part in enumerate(layout.columns.bins):
        for word in range(part.words):
            left = x + (part.offset + 2 * word) * unit
            box(ax, left, y, 2 * unit, height, BIN_COLORS[part.bits])
            numbers = [str(word + part.words * r) for r in range(part.repeat)]
            columns = "\n".join(", ".join(numbers[i : i + 2]) for i in range(0, len(numbers), 2))
            label(ax, left + unit, y + height / 2, columns, fontsize=7.5, color=EDGE, weight="bold", linespacing=1.1)
            label(ax, left + unit, y - 0.32, str(part.offset + 2 * word), fontsize=8, color=MUTED)
        middle = x + (part.offset + part.num_bytes / 2) * unit
        label(ax, middle, y + height + 0.75, f"bin {i}: {part.bits} bits of each column", weight="bold")
        label(ax, middle, y + height + 0.28, f"{part.words} words of {part.repeat} columns", color=MUTED)


def draw_word(ax: Axes, layout: CodeLayout, index: int, x: float, y: float, unit: float, height: float) -> None:
    """The bits of the first word of a bin, most significant left, with the channel of each code."""
    part = layout.columns.bins[index]
    for repeat in range(part.repeat):
        column = repeat * part.words
        for segment, pieces in enumerate(layout.columns.segments):
            for piece in pieces:
                if piece.bin != index:
                    continue
                low = repeat * part.bits + piece.shift
                left = x + (16 - low - piece.width) * unit
                box(ax, left, y, unit * piece.width, height, SEGMENT_COLORS[segment % len(SEGMENT_COLORS)], line=1.6)
                middle = left + unit * piece.width / 2
                label(ax, middle, y + height / 2, f"channel {segment * COLUMNS + column}", weight="bold", fontsize=7.5)
                bits = f"bits {low + piece.width - 1}-{low}" if piece.width > 1 else f"bit {low}"
                label(ax, middle, y - 0.32, bits, fontsize=8, color=MUTED)


def draw(path: Path) -> None:
    row = RowLayout.of((CodeLayout(WIDTHS),) * HEADS, uniform_layout(len(WIDTHS), 3))
    head = row.k[0]
    figure, ax = plt.subplots(figsize=(9.4, 4.3), dpi=130)
    total = row.row_bytes
    ax.set_xlim(-2, total + 2)
    ax.set_ylim(-0.3, 10.2)
    ax.axis("off")

    row_y, head_y, byte_y = 7.6, 3.9, 0.6
    draw_row(ax, row, row_y, 1.0)
    title = (
        f"One token, one layer: {total} bytes for {HEADS} KV heads of {head.dim} channels, K and V at 3 bits on average"
    )
    label(ax, 0, 9.85, title, ha="left", fontsize=10.5, weight="bold")

    unit = 5.0
    head_x = 0.0
    zoom(ax, (0, head.code_bytes), (head_x, head_x + head.code_bytes * unit), row_y, head_y + 2.25)
    draw_head(ax, head, head_x, head_y, unit, 1.0)
    widths = [f"channels {start}-{stop - 1}: {bits} bit{'s' * (bits > 1)}" for start, stop, bits in head.groups]
    label(
        ax,
        head_x + head.code_bytes * unit + 3,
        head_y + 0.8,
        "K head 0:\n" + "\n".join(widths),
        ha="left",
        linespacing=1.5,
    )

    part = head.columns.bins[0]
    byte_x, bit_unit = 6.0, 6.4
    zoom(ax, (head_x, head_x + 2 * unit), (byte_x, byte_x + 16 * bit_unit), head_y, byte_y + 1.0)
    draw_word(ax, head, 0, byte_x, byte_y, bit_unit, 1.0)
    rule = f"word 0 of bin 0:\ncolumns 0 and {part.words}.\nChannel 16 s + c is\nin column c of segment s"
    label(ax, byte_x + 16 * bit_unit + 3, byte_y + 0.5, rule, ha="left", linespacing=1.5)

    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
