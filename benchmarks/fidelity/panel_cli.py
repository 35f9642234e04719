"""``python -m benchmarks.fidelity panel``: the paper's panel, every method side by side, as CSV and PNG."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.device import device

from . import panel, pictures, report, run, widths
from .lineup import BASELINE, METHODS, line_up
from .record import command_of, commit, machine, sources, text_source
from .rows import read_csv, write_csv
from .run import Row
from .window import RECENT, SINK

FINGERPRINT_BITS = (2.0, 3.0)
QUICK = {"tokens": 640, "queries": 8, "every": 10, "bits": [3.0]}
COLUMNS = {
    "method": "method",
    "k_bits": "K",
    "v_bits": "V",
    "window": "window",
    "bytes": "bytes",
    "mae_offsets_ratio": "MAE, offsets",
    "mae_ratio": "MAE, causal",
    "softmax_kl_ratio": "KL",
    "output_error_ratio": "output",
    "wins_mae": "won, MAE",
    "wins_softmax_kl": "won, KL",
    "layers": "layers",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.fidelity panel", description=__doc__)
    p.add_argument("--out", required=True, type=Path, help="folder for the CSV files and panel.json")
    p.add_argument("--model-path", help="model folder; not needed with --draw")
    p.add_argument("--pictures", type=Path, help="folder for the PNGs (default: that of --out)")
    p.add_argument("--prefix", default="", help="what the PNGs' names begin with, e.g. panel_smollm2_")
    p.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    p.add_argument("--calibration-text", help="calibration text; default: that of the server")
    p.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=f"of {', '.join(METHODS)}")
    p.add_argument("--bits", nargs="+", type=float, default=[2.0, 3.0, 4.0], help="K and V widths (default 2 3 4)")
    p.add_argument("--against", default=BASELINE, metavar="NAME", help=f"for the win counts (default {BASELINE})")
    p.add_argument("--window", action="store_true", help=f"also with {SINK} sink and {RECENT} recent tokens in float16")
    p.add_argument("--seeds", type=int, default=1, help="rotations of those the counter-claim is about (default 1)")
    p.add_argument("--queries", type=int, default=16, help="query positions of each 2,048 tokens (default 16)")
    p.add_argument("--tokens", type=int, help="first tokens of the text to use; default: all")
    p.add_argument("--every", type=int, default=1, help="measure each n-th layer only (default 1: all)")
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    p.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--quick", action="store_true", help=f"to try it out, under a minute on a small model: {QUICK}")
    p.add_argument(
        "--draw", action="store_true", help="only make tables and pictures again, from what was measured in --out"
    )
    return p


def provenance(args: argparse.Namespace, subject: run.Subject, head: str) -> dict:
    """What someone needs to make the same files again."""
    return {
        "command": command_of(parser(), args),
        "commit": head,
        **sources(args.model_path, args.calibration_text, subject),
        "evaluation": {
            **text_source(args.text),
            "tokens": len(subject.ids),
            "queries_per_window": args.queries,
            "layers": list(range(0, len(subject.rope), args.every)),
            "seed": run.SEED,
            "rotations": args.seeds,
        },
        **machine(args.device),
    }


def derived(rows: list[Row], against: str) -> dict[str, list[Row]]:
    """The tables that follow from ``layers.csv``, by stem of their file. Rows as read back: a tie stays a tie."""
    return {
        "summary": report.summary(rows),
        "wins": report.win_rows(rows, against),
        "counter_claim": report.counter_claim(rows),
        "peers": report.peer_rows(rows),
    }


def write_all(tables: dict[str, list[Row]], folder: Path) -> None:
    for stem, rows in tables.items():
        if rows:
            write_csv(rows, folder / f"{stem}.csv", fields(stem, rows))


def measure(subject: run.Subject, args: argparse.Namespace) -> None:
    """Write ``layers.csv`` and what follows from calibration alone."""
    entries = line_up(subject, args.methods, args.bits, args.seeds)
    rows = panel.panel_rows(subject, entries, args.queries, range(0, len(subject.rope), args.every), args.window)
    prints, entropies = widths.allocation_rows(subject, FINGERPRINT_BITS)
    energies = widths.energy_rows(subject)
    write_all({"layers": rows, "fingerprint": prints, "entropy": entropies, "energy": energies}, args.out)


def finish(args: argparse.Namespace) -> None:
    """Tables and pictures from the files that :func:`measure` wrote."""
    measured = {stem: read_csv(args.out / f"{stem}.csv") for stem in ("layers", "fingerprint", "entropy", "energy")}
    tables = derived(measured["layers"], args.against)
    write_all(tables, args.out)
    name = json.loads((args.out / "panel.json").read_text())["model"]["name"]
    pictures.draw_all({**measured, **tables}, args.pictures or args.out, args.prefix, name)
    print(verdict(tables))


def fields(stem: str, rows: list[Row]) -> tuple[str, ...]:
    """Columns of a file."""
    if stem == "fingerprint":
        return widths.fingerprint_fields(sum(name.startswith("block_") for name in rows[0]))
    return {
        "layers": panel.FIELDS,
        "summary": report.SUMMARY_FIELDS,
        "wins": report.WINS_FIELDS,
        "counter_claim": report.COUNTER_FIELDS,
        "peers": report.COUNTER_FIELDS,
        "entropy": widths.ENTROPY_FIELDS,
        "energy": widths.ENERGY_FIELDS,
    }[stem]


def verdict(tables: dict[str, list[Row]]) -> str:
    """The summary at equal bytes and the counter-claim, for a person to read."""
    equal = [row for row in tables["summary"] if "bytes" in str(row.get("at", "bytes"))]
    lines = [f"ratios to {BASELINE} at equal bytes", report.text(equal, COLUMNS)]
    for stem, heading in (("counter_claim", "against uniform-hadamard"), ("peers", "template at the bytes of others")):
        if tables[stem]:
            columns = {"method": "method", "k_bits": "K", "window": "window", "seed": "seed", "bytes": "bytes"}
            columns |= {"against": "against", "against_bytes": "its bytes"}
            columns |= {name: text for name, text in COLUMNS.items() if name not in columns and name != "v_bits"}
            lines += ["", heading, report.text(tables[stem], columns)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.draw:
        finish(args)
        return 0
    if not args.model_path:
        parser().error("--model-path is required, except with --draw")
    head = commit()  # now: the tree may change during a long run
    if args.quick:
        vars(args).update(QUICK)
    if args.threads:
        torch.set_num_threads(args.threads)
    subject = run.load(args.model_path, args.text, args.calibration_text, args.device)
    subject.ids = subject.ids[: args.tokens]
    measure(subject, args)
    record = provenance(args, subject, head)
    (args.out / "panel.json").write_text(json.dumps(record, indent=2) + "\n")
    finish(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
