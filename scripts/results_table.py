"""Rewrite the generated blocks of README.md from the files in benchmarks/results.

usage: python scripts/results_table.py [--check]
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
#: (scenario, measure, what the reader sees, whether less is better); of the shared prefixes the last round
SERVING = (
    ("capacity", "tokens", "tokens that fit", False),
    ("batch", "output_throughput", "decode of {case}, tokens/s", False),
    ("decode", "step", "decode step after {case} tokens, ms", True),
    ("pressure", "output_throughput", "under pressure ({case} under way), answers' tokens/s", False),
    ("pressure", "ttft_p50", "the same, time to the first token (p50), ms", True),
    ("pressure", "tpot_p50", "the same, time per token (p50), ms", True),
    ("prefixes", "ttft_p50", "shared prefixes ({case}), time to the first token (p50), ms", True),
    ("prefixes", "hit_rate", "the same, prompt tokens from the cache", False),
    ("prefill", "speed", "prefill of {case}, tokens/s", False),
    ("cost", "start", "start, s", True),
    ("cost", "table", "calibration in it, s", True),
)
UNFIT = "does not fit"  # a case's state, in serving.csv
SERVED = {
    "bf16-fa3": "bf16, FlashAttention-3",
    "bf16-flashinfer": "bf16, FlashInfer",
    "fp8-fa3": "fp8",
    "blockgtq-k4v4": "**K4V4**",
    "blockgtq-k3v3": "**K3V3**",
    "blockgtq-k2v2": "**K2V2**",
    "blockgtq-uniform-k3v3": "uniform K3V3",
}
#: (method, bits of keys, bits of values, what the reader sees)
CACHES = (
    ("exact", 32, 32, "float32"),
    ("bf16", 16, 16, "bf16"),
    ("fp8_e4m3", 8, 8, "fp8_e4m3, scale 1"),
    ("template", 4.5, 4, "**K4.5V4**"),
    ("template", 4, 4, "**K4V4** (`quality`)"),
    ("template", 3.5, 3, "**K3.5V3**"),
    ("template", 3.25, 3, "**K3.25V3**"),
    ("template", 3, 3, "**K3V3** (`balanced`)"),
    ("template", 2.5, 2, "**K2.5V2**"),
    ("template", 2, 2, "**K2V2**"),
    ("paper", 4, 4, "paper's allocator by blocks K4V4"),
    ("paper", 3, 3, "paper's allocator by blocks K3V3"),
    ("paper", 2, 2, "paper's allocator by blocks K2V2"),
    ("uniform", 4, 4, "uniform TQ-MSE K4V4"),
    ("uniform", 3, 3, "uniform TQ-MSE K3V3"),
    ("uniform", 2, 2, "uniform TQ-MSE K2V2"),
)


def read(name: str) -> list[dict]:
    with (ROOT / "benchmarks" / "results" / name).open() as f:
        return list(csv.DictReader(f))


def real_models() -> str:
    """Bytes, perplexity and KL of the answer of each cache, the models side by side, means over rotations."""
    rows = read("real_models.csv")
    models = list(dict.fromkeys(r["model"] for r in rows))
    lines = [
        "| cache | " + " | ".join(f"{m}: bytes | perplexity | KL" for m in models) + " |",
        "|---|" + "---:|" * 3 * len(models),
    ]
    for method, k_bits, v_bits, name in CACHES:
        cells = []
        for model in models:
            which = model, method, k_bits, v_bits
            of = [r for r in rows if (r["model"], r["method"], float(r["k_bits"]), float(r["v_bits"])) == which]
            size, ppl, kl = (fmean(float(r[x]) for r in of) if of else None for x in ("bytes", "ppl", "kl"))
            cells += [f"{size:.4g}", f"{ppl:.4g}", f"{kl:.4f}"] if of else [""] * 3
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed() -> str:
    """Decode attention of one layer on the GPU, and steps of the real server."""
    best: dict[tuple, dict[str, float]] = {}
    for r in read("kernels_h100.csv"):
        if r["kernel"] != "decode" or r["index"] != "shuffled" or not r["us"]:
            continue
        method = r["method"].split("-")[1] if r["method"].endswith(("bf16", "fp8")) else f"{r['method']} {r['k_bits']}"
        at = best.setdefault((r["shape"], int(r["batch"]), int(r["context"])), {})
        at[method] = min(float(r["us"]), at.get(method, float("inf")))
    lines = [
        "| decode attention, us per layer | bf16 | fp8 | uniform K3V3 | **K3V3** | **K2V2** | K3V3 against bf16 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (shape, batch, context), us in best.items():
        cells = [us.get(name) for name in ("bf16", "fp8", "uniform 3", "template 3", "template 2")]
        name, shown = f"{shape}, {batch} x {context // 1024}K", (f"{x:.1f}" if x else "" for x in cells)
        lines.append(f"| {name} | {' | '.join(shown)} | {cells[0] / cells[3]:.2f}x |")
    steps: dict[tuple, dict[str, float]] = {}
    names = {"decode_step": "decode step", "prefill": "prefill", "extend": "512 new tokens on a cached prefix"}
    for r in read("server_steps_h100.csv"):
        if r["measure"] in names:
            tokens = int(r["cached_tokens"] or 0) if r["measure"] == "extend" else int(r["input_tokens"])
            steps.setdefault((r["model"], r["measure"], tokens), {})[r["method"]] = float(r["ms"])
    lines += ["", "| server, one request, ms | bf16, FlashAttention-3 | **K3V3** | speed |", "|---|---:|---:|---:|"]
    for (model, measure, tokens), ms in sorted(steps.items()):
        dense, packed = ms["bf16-fa3"], ms["blockgtq-k3v3"]
        lines.append(
            f"| {model}, {names[measure]}, {tokens // 1024}K | {dense:.1f} | {packed:.1f} | {dense / packed:.2f}x |"
        )
    return "\n".join(lines)


def whole(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def serving(folder: Path | None = None) -> str:
    """Servers under load, by record and model; empty without benchmarks/results/serving*/serving.csv. In brackets: how
    many times better than bf16 it is."""
    tables = []
    for file in sorted((folder or ROOT / "benchmarks" / "results").glob("serving*/serving.csv")):
        share = json.loads(file.with_suffix(".json").read_text()).get("settings", {}).get("mem_fraction")
        with file.open() as f:
            rows = [r for r in csv.DictReader(f) if (r["value"] or r["state"] == UNFIT) and r["method"] in SERVED]
        for model in dict.fromkeys(r["model"] for r in rows):
            title = f"{model}, {share:g} of the memory" if share else model
            tables.append(servers(title, [r for r in rows if r["model"] == model]))
    return "\n\n".join(tables)


def servers(title: str, rows: list[dict]) -> str:
    """One model's servers beside one another."""
    methods = [m for m in SERVED if any(r["method"] == m for r in rows)]
    lines = [f"| {title} | {' | '.join(SERVED[m] for m in methods)} |", f"|---|{'---:|' * len(methods)}"]
    for scenario in dict.fromkeys(scenario for scenario, *_ in SERVING):
        found = [r for r in rows if r["scenario"] == scenario]
        # All of them have the same words around their numbers.
        cases = sorted({r["case"] for r in found}, key=lambda case: [int(n) for n in re.findall(r"\d+", case)])
        for case in cases[-1:] if scenario == "prefixes" else cases:
            mine = [r for r in found if r["case"] == case]
            for _, measure, name, less in (row for row in SERVING if row[0] == scenario):
                cells = [cell(mine, method, measure, less, scenario == "cost") for method in methods]
                if any(re.match(r"\d", text) for text in cells):
                    lines.append(f"| {name.format(case=case)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(rows: list[dict], method: str, measure: str, less: bool, cost: bool) -> str:
    """A figure of one case, and how many times better than bf16 it is; or that the case does not fit."""
    if any(r["method"] == method and r["state"] == UNFIT for r in rows):
        return UNFIT
    values = {r["method"]: float(r["value"]) for r in rows if r["measure"] == measure}
    value, base = values.get(method), values.get("bf16-fa3")
    if value is None:
        return ""
    if not value or not base or method == "bf16-fa3" or cost or measure == "hit_rate":
        return whole(value)
    return f"{whole(value)} ({base / value if less else value / base:.2f}x)"


def updated(text: str) -> str:
    """README with its generated blocks. ValueError where it has no place for one that is not empty."""
    blocks = {"results": real_models(), "speed": speed(), "serving": serving()}
    for name in blocks:
        start, end = f"<!-- {name}: generated by scripts/results_table.py -->", f"<!-- end {name} -->"
        if start not in text:
            if blocks[name]:
                raise ValueError(f"README.md has no place for the table {name}: add the lines {start} and {end}")
            continue
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}\n{blocks[name]}\n{end}{after}"
    return text


def main() -> int:
    text = README.read_text()
    new = updated(text)
    if "--check" in sys.argv:
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
