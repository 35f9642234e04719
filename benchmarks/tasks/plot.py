"""Pass rate over length and depth, one panel a task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path


def heat_map(rows: Sequence[dict], config: str, out: Path) -> bool:
    """A PNG of one configuration's rows; False, and no file, where none has a pass rate and a length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[tuple, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["config"] == config and row.get("pass_rate") is not None and isinstance(row["length"], int):
            panels[row["task"]][row["length"], row["depth"]].append(row)
    if not panels:
        return False
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns + 0.8, 2.8 * lines + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (task, cells) in zip(axes.flat, panels.items(), strict=False):
        lengths = sorted({length for length, _ in cells})
        depths = sorted({depth for _, depth in cells}, key=lambda d: -1 if d is None else d)
        grid = [[float("nan")] * len(lengths) for _ in depths]
        for (length, depth), held in cells.items():
            samples = sum(row["samples"] for row in held)
            rate = sum(row["pass_rate"] * row["samples"] for row in held) / samples
            x, y = lengths.index(length), depths.index(depth)
            grid[y][x] = rate
            axis.text(x, y, f"{100 * rate:.0f}", ha="center", va="center", color="k" if rate > 0.5 else "w", fontsize=8)
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(task, fontsize=10)
        axis.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        axis.set_yticks(range(len(depths)), ["all" if d is None else f"{100 * d:.0f}" for d in depths])
        axis.tick_params(labelsize=8)
        axis.set_xlabel("prompt tokens", fontsize=8)
        axis.set_ylabel("depth, % of the text", fontsize=8)
    figure.colorbar(image, ax=axes, label="pass rate", shrink=0.8)
    figure.suptitle(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return True
