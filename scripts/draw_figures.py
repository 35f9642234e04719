"""Draw docs/img/quality.png, peers.png and speed.png from the files in benchmarks/results.

usage: python scripts/draw_figures.py [FOLDER]

quality.png: KL of attention against the bytes of a token and KV head, each method of a panel at 2, 3 and 4 bits.
peers.png: KL of the answer against bytes, what a cache keeps exact counted, each model on its own.
speed.png: a server's decode step, and attention of one layer, against the tokens of one request, on one kind of GPU.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PANEL = "panel_smollm2"
STEPS = ("serving_h100_long/serving", "qwen2.5-3b")  # record of servers, model
LAYER = ("kernels_h200", "Llama-3.1-8B")  # record of kernels, shape
#: method of the panel -> (what the reader sees, color); another method of the record is drawn in grey, by its name
METHODS = {
    "template": ("template (this package)", "#4a3aa7"),
    "paper": ("Block-GTQ, the paper's allocator", "#2a78d6"),
    "kivi": ("KIVI", "#1baf7a"),
    "uniform-hadamard": ("uniform, Hadamard", "#e87ba4"),
    "uniform-haar": ("TurboQuant-MSE, uniform", "#eda100"),
    "int_per_token": ("integers by token", "#9c9a92"),
    "fp8_e4m3": ("fp8, scale 1", "#1f1f1d"),
}
#: method of peers.csv -> (what the reader sees, color)
PEERS = {
    "template": ("this package", "#4a3aa7"),
    "uniform": ("TurboQuant-MSE, uniform", "#eda100"),
    "kivi": ("KIVI", "#1baf7a"),
    "kvarn": ("KVarN", "#2a78d6"),
    "oscar": ("OSCAR", "#d6452a"),
    "saw-int4-kv": ("SAW-INT4, keys and values", "#e87ba4"),
    "fp8-scaled": ("fp8, calibrated scale", "#1f1f1d"),
}
WINDOWED = ("kivi", "kvarn", "oscar")  # drawn with what they keep exact, as published
LEFT_OUT = ("bf16", "kivi-scale-only", "paper-segment", "product", "product-segment")
LINES = {
    "bf16": ("bf16", "#9c9a92"),
    "fp8": ("fp8", "#1f1f1d"),
    "K3V3": ("K3V3", "#4a3aa7"),
    "K2V2": ("K2V2", "#2a78d6"),
}
SERVED = {"bf16-fa3": "bf16", "fp8-fa3": "fp8", "blockgtq-k3v3": "K3V3", "blockgtq-k2v2": "K2V2"}
PACKED = {("template", "3"): "K3V3", ("template", "2"): "K2V2"}
Curves = dict[str, list[tuple[float, float]]]


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def about(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def quality() -> Curves:
    """Method -> (bytes, KL of attention), without a window, at whole bits."""
    curves: Curves = {}
    for r in read(f"{PANEL}/summary"):
        whole = r["k_bits"] == r["v_bits"] and "." not in r["k_bits"]
        if r["window"] or not whole or r["method"] in LEFT_OUT:
            continue
        point = float(r["bytes"]), float(r["softmax_kl"])
        if point not in curves.setdefault(r["method"], []):  # a line at equal bits and one at equal bytes
            curves[r["method"]].append(point)
    return {method: sorted(points) for method, points in curves.items()}


def peers(model: str) -> tuple[Curves, Curves]:
    """Method -> (bytes at the length measured, KL of the answer in its second half): peers as published, and this
    package with windows of theirs, by the window."""
    curves: Curves = {}
    windows: Curves = {}
    for r in read("peers"):
        if r["model"] != model or r["method"] not in PEERS:
            continue
        window = (r["exact_keys"], r["exact_values"]) != ("none", "none")
        point = float(r["bytes_at_length"]), float(r["kl_late"])
        if window == (r["method"] in WINDOWED):
            curves.setdefault(r["method"], []).append(point)
        elif window:
            windows.setdefault(r["exact_keys"], []).append(point)
    return ({method: sorted(points) for method, points in curves.items()}, windows)


def steps() -> Curves:
    """Cache -> (tokens, ms of a server's decode step)."""
    name, model = STEPS
    curves: Curves = {}
    for r in read(name):
        if (
            (r["model"], r["scenario"], r["measure"]) == (model, "decode", "step")
            and r["value"]
            and r["method"] in SERVED
        ):
            curves.setdefault(SERVED[r["method"]], []).append((int(r["case"]), float(r["value"])))
    return {cache: sorted(points) for cache, points in curves.items()}


def layer() -> Curves:
    """Cache -> (tokens, us of attention of one layer); of bf16 and fp8 the fastest kernel."""
    name, shape = LAYER
    best: dict[tuple[str, int], float] = {}
    for r in read(name):
        if (r["kernel"], r["index"], r["shape"], r["batch"]) != ("decode", "shuffled", shape, "1") or not r["us"]:
            continue
        stock = r["method"].split("-")[1] if r["method"].endswith(("bf16", "fp8")) else None
        cache = stock or PACKED.get((r["method"], r["k_bits"]))
        if cache:
            at = cache, int(r["context"])
            best[at] = min(float(r["us"]), best.get(at, float("inf")))
    curves: Curves = {}
    for (cache, tokens), us in sorted(best.items()):
        curves.setdefault(cache, []).append((tokens, us))
    return curves


def plot(ax: Axes, curves: Curves, names: dict[str, tuple[str, str]]) -> None:
    for key in [*(k for k in names if k in curves), *(k for k in curves if k not in names)]:
        label, color = names.get(key, (key, "#c9c7bf"))
        ax.plot(*zip(*curves[key], strict=True), marker="o", markersize=4, linewidth=1.6, color=color, label=label)
    ax.grid(color="#efeee9")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)


def draw_quality(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    plot(ax, quality(), METHODS)
    model, commit = about(f"{PANEL}/panel")["model"]["name"], about(f"{PANEL}/panel")["commit"][:7]
    ax.set(
        yscale="log",
        xlabel="bytes of a token and KV head, scales included",
        ylabel="KL of attention (keys coded), nats",
    )
    ax.set_title(f"{model}, mean over layers ({commit})", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_peers(path: Path) -> None:
    runs: dict[str, dict] = {}
    for run in about("peers")["runs"]:
        runs.setdefault(run["name"], run)  # the first one has most of the rows
    figure, axes = plt.subplots(1, len(runs), figsize=(8.6, 3.8), layout="constrained", squeeze=False)
    for ax, (model, run) in zip(axes[0], runs.items(), strict=True):
        curves, windows = peers(model)
        plot(ax, curves, PEERS)
        points = [p for of in windows.values() for p in of]
        if points:
            label, color = "this package, windows of peers", PEERS["template"][1]
            ax.plot(*zip(*points, strict=True), "o", markersize=5, fillstyle="none", color=color, label=label)
        ax.set(yscale="log", xlabel="bytes at 4,096 tokens, exact ones counted")
        ax.set_title(f"{model} ({run['commit'][:7]})", fontsize=9)
        ax.legend(frameon=False, fontsize=7)
    axes[0][0].set_ylabel("KL of the answer, second half, nats")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_speed(path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
    plot(left, steps(), LINES)
    plot(right, layer(), LINES)
    left.set_title(f"decode step of a server, {STEPS[1]}\n{about(STEPS[0])['settings']['gpu']}", fontsize=9)
    run = about(LAYER[0])["runs"][-1]
    right.set_title(f"attention of a layer, {LAYER[1]}\n{run['gpu']} ({run['commit'][:7]})", fontsize=9)
    left.set(ylabel="ms", ylim=(0, None))
    right.set(ylabel="us", yscale="log")
    for ax in (left, right):
        ax.set(xscale="log", xlabel="tokens of one request")
        ticks = [4096, 16384, 65536, 262144]
        ax.set_xticks(ticks, [f"{n // 1024}K" for n in ticks])
        ax.minorticks_off()
    right.set_yticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder: Path) -> int:
    draw_quality(folder / "quality.png")
    draw_peers(folder / "peers.png")
    draw_speed(folder / "speed.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "img"))
