"""Pictures of a record, one file a model and scenario."""

from __future__ import annotations

from pathlib import Path

from .record import Record
from .targets import cases, models

#: scenario -> what is drawn over its cases, and the axis
DRAWN = {
    "decode": ("step", "ms between tokens, one sequence"),
    "batch": ("output_throughput", "output tokens/s while the whole batch decodes"),
    "capacity": ("tokens", "tokens that fit"),
    "pressure": ("output_throughput", "output tokens/s under memory pressure"),
    "prefixes": ("ttft_p50", "median ms to the first token"),
    "prefill": ("speed", "prompt tokens/s"),
}


def write(record: Record, folder: Path) -> list[str]:
    """Names of the files; none for a scenario without figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out = []
    for model in models(record):
        for scenario, (measure, label) in DRAWN.items():
            rows = [r for r in record.rows if (r.model, r.scenario, r.measure) == (model, scenario, measure)]
            if not rows:
                continue
            order = [c for c in cases(record, model, scenario) if any(r.case == c for r in rows)]
            methods = list(dict.fromkeys(r.method for r in rows))
            figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
            if scenario == "decode":
                for method in methods:
                    points = sorted((int(r.case), r.value) for r in rows if r.method == method)
                    axes.plot(*zip(*points, strict=True), marker="o", label=method)
                axes.set_xscale("log", base=2)
                ticks = sorted(map(int, order))
                axes.set_xticks(ticks, [f"{t // 1024}K" if t >= 1024 else str(t) for t in ticks])
                axes.set_xlabel("tokens before")
            else:
                width = 0.8 / len(methods)
                for i, method in enumerate(methods):
                    points = [(order.index(r.case) + i * width, r.value) for r in rows if r.method == method]
                    axes.bar(*zip(*points, strict=True), width, label=method)
                axes.set_xticks([j + 0.4 - width / 2 for j in range(len(order))], order, fontsize=8)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(label)
            axes.set_title(f"{model}: {scenario}")
            axes.legend(fontsize=8)
            name = f"{model}_{scenario}.png"
            figure.savefig(folder / name, dpi=110)
            pyplot.close(figure)
            out.append(name)
    return out
