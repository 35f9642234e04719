"""The quality card of a model: what each preset costs, beside bf16 and fp8, on one page.

``python -m benchmarks.fidelity card --model-path MODEL --out quality.md``, or ``make quality MODEL=MODEL``.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sglang_blockgtq.calibrate import RECENT
from sglang_blockgtq.calibrate.cli import exact_recent
from sglang_blockgtq.calibrate.device import device
from sglang_blockgtq.options import DEFAULT_ALLOCATOR, PRESETS

from . import attention, run
from .exact import Exact, Mixed
from .methods import Cast, Method
from .model import capture
from .record import commit, machine, sources, text_source
from .run import Row, Subject

#: Those that name bits; ``auto`` chooses some for each model.
FIXED = {name: bits for name, bits in PRESETS.items() if bits["k_bits"]}
COLUMNS = (
    ("bytes", "bytes per token and head"),
    ("against_bf16", "against bf16"),
    ("mae", "logit MAE"),
    ("softmax_kl", "attention KL"),
    ("ppl", "perplexity"),
    ("kl_final", "KL of the answer"),
)
NOTES = (
    "Bytes count codes and scales. MAE and KL of attention are means over layers and sampled positions",
    "when only keys are quantized; perplexity and the KL of the answer read keys and values from the",
    "cache, every token its own position included. Calibrated and measured on different texts. All lines",
    "score the same tokens, so they compare far better with each other than with figures from another",
    "text.",
)


def notes(recent: int) -> list[str]:
    """What stands under the table. recent: tokens that presets read exactly."""
    if not recent:
        return [*NOTES]
    last = "their own token" if recent == 1 else f"their last {recent} tokens, their own among them,"
    return [
        *NOTES,
        f"Queries of the presets read {last} in 16 bits, as a server with",
        f"--kv-quant-exact-recent {recent} does.",
    ]


def methods(subject: Subject, recent: int = RECENT) -> dict[str, Method]:
    """Of each line of the card, by its name. recent: last tokens that a query reads exactly in the presets."""
    dim = subject.head_dim
    exact = Exact(recent=recent)
    out: dict[str, Method] = {
        "bf16": Cast("bf16", torch.bfloat16, dim, dim),
        "fp8_e4m3": Cast("fp8_e4m3", torch.float8_e4m3fn, dim, dim),
    }
    for name, options in FIXED.items():
        packed = subject.table(DEFAULT_ALLOCATOR, options["k_bits"], options["v_bits"])
        out[name] = Mixed(packed, dim, dim, exact, exact) if recent else packed
    return out


def _mean(rows: Sequence[Row], column: str) -> float:
    return sum(float(row[column]) for row in rows) / len(rows)


def measure(subject: Subject, queries: int, layers: Sequence[int] | None = None, recent: int = RECENT) -> list[dict]:
    """One dictionary for each line: its name and :data:`COLUMNS`. recent: see :func:`methods`."""
    lines = methods(subject, recent)
    got = capture(subject.model, subject.ids, attention.draw_queries(len(subject.ids), queries, run.SEED))
    by_name: dict[str, list[Row]] = {name: [] for name in lines}
    for layer in layers or range(len(subject.rope)):
        for name, method in lines.items():
            by_name[name] += run.layer_rows(subject, [method], got, layer, 0)
    scored = run.perplexity_rows(subject, [None, *lines.values()], min(run.PPL_LENGTH, len(subject.ids)))
    out = [{"name": "float32", "bytes": 8 * subject.head_dim, "ppl": scored[0]["ppl"], "kl_final": 0.0}]
    for (name, method), score in zip(lines.items(), scored[1:], strict=True):
        rows = by_name[name]
        line = {"name": name, "bytes": method.bytes_per_token_head, "ppl": score["ppl"], "kl_final": score["kl_final"]}
        out.append(line | {"mae": _mean(rows, "mae"), "softmax_kl": _mean(rows, "softmax_kl")})
    for line in out:
        line["against_bf16"] = 4 * subject.head_dim / line["bytes"]
    return out


def pass_rates(tasks: Path) -> dict[str, dict[str, float]]:
    """configuration -> task -> share of samples passed, from the CSV of ``python -m benchmarks.tasks``."""
    sums: dict[str, dict[str, list[tuple[float, int]]]] = {}
    with tasks.open() as f:
        for row in csv.DictReader(f):
            if row["pass_rate"]:
                found = float(row["pass_rate"]), int(row["samples"])
                sums.setdefault(row["config"], {}).setdefault(row["task"], []).append(found)
    return {
        config: {task: sum(rate * n for rate, n in x) / sum(n for _, n in x) for task, x in by.items()}
        for config, by in sums.items()
    }


def bits_of(name: str) -> str:
    """A preset's configuration as ``benchmarks.tasks`` names it, or the name itself."""
    options = FIXED.get(name)
    return f"k{options['k_bits']:g}v{options['v_bits']:g}" if options else name.removesuffix("_e4m3")


def page(
    model: str, lines: Sequence[dict], record: dict, rates: dict[str, dict[str, float]], recent: int = RECENT
) -> str:
    """The card in Markdown."""
    tasks = sorted({task for by in rates.values() for task in by})
    head = ["cache", *(title for _, title in COLUMNS), *tasks]
    rule = "|---" + "|---:" * (len(head) - 1) + "|"
    out = [f"# What a packed KV cache costs {model}", "", f"| {' | '.join(head)} |", rule]
    for line in lines:
        cells = [line["name"] + (f" (K{o['k_bits']:g}V{o['v_bits']:g})" if (o := FIXED.get(line["name"])) else "")]
        for key, _ in COLUMNS:
            value = line.get(key)
            cells.append("" if value is None else f"{value:.2f}x" if key == "against_bf16" else f"{value:.4g}")
        mine = rates.get(bits_of(line["name"]), {})
        cells += ["" if task not in mine else f"{100 * mine[task]:.0f} %" for task in tasks]
        out.append(f"| {' | '.join(cells)} |")
    out += [
        "",
        *notes(recent),
        "",
        "```json",
        json.dumps(record, indent=1),
        "```",
        "",
    ]
    return "\n".join(out)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity card", description=__doc__)
    parser.add_argument("--model-path", required=True, help="model folder")
    parser.add_argument("--out", required=True, type=Path, help="Markdown file to write")
    parser.add_argument("--tasks", type=Path, help="CSV of python -m benchmarks.tasks, whose pass rates are added")
    parser.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    parser.add_argument("--calibration-text", help="calibration text; default: that of the server")
    parser.add_argument("--queries", type=int, default=32, help="query positions per window (default 32)")
    parser.add_argument("--every", type=int, default=1, help="attention of every n-th layer only (default 1)")
    parser.add_argument(
        "--exact-recent",
        type=exact_recent,
        default=RECENT,
        metavar="N",
        help=f"last tokens that a query reads exactly in the presets (default {RECENT}, as a server's)",
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    if args.tasks and not args.tasks.is_file():
        parser.error(f"--tasks {args.tasks}: no such file; make one with python -m benchmarks.tasks")
    head = commit()
    subject = run.load(args.model_path, args.text, args.calibration_text, args.device)
    lines = measure(subject, args.queries, range(0, len(subject.rope), args.every), args.exact_recent)
    record = {
        "command": f"python -m benchmarks.fidelity card --queries {args.queries} --every {args.every} "
        f"--exact-recent {args.exact_recent}",
        "commit": head,
        **sources(args.model_path, args.calibration_text, subject),
        "evaluation": text_source(args.text) | {"tokens": len(subject.ids), "perplexity_length": run.PPL_LENGTH},
        **machine(args.device),
    }
    rates = pass_rates(args.tasks) if args.tasks else {}
    args.out.write_text(page(record["model"]["name"], lines, record, rates, args.exact_recent))
    print(args.out.read_text().split(NOTES[0])[0])
    return 0
