"""What each choice is worth: frames, transforms, scores, scales, protection, calibration, at equal bytes.

``python -m benchmarks.fidelity ablation --model-path MODEL --out ablation.csv --device cuda``
``python -m benchmarks.fidelity ablation --table ablation.csv`` prints the tables of a CSV again, as Markdown;
``--into docs/notes/ablation.md`` writes them between that page's marks, ``--only best frame`` selects rows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch

from sglang_blockgtq.calibrate.device import device

from . import run
from .ablation_rows import GROUPS, Recipe, recipes
from .coder import Cache
from .lab import BUCKETS, Lab
from .record import command_of, commit, machine, sources
from .rows import Job, read_csv, run_jobs, write_csv

KINDS = ("all", "report", "source")
ATTENTION = (*BUCKETS, "all", "shift")
MEASURED = (
    *(f"{what}_{kind}" for kind in KINDS for what in ("ppl", "kl")),
    *(f"attention_kl_{name}" for name in ATTENTION),
)
FIELDS = ("group", "name", "k_bits", "v_bits", "bytes", "seed", *MEASURED, "tokens", "seconds")
QUICK = {"limit": 256, "queries": 6, "every": 10, "seeds": 1}
AGAIN = ("baseline", "best", "frame", "values", *GROUPS)  # whose rotations are repeated first
LATER = ("uniform-hadamard", "paper", "paper-segment", "product-segment")  # of the baseline, and 4 bits: repeated last
#: What --quick runs: one row or two of each group.
QUICK_ROWS = (
    *("reference: float32 K32V32", "baseline: uniform-haar K3V3", "baseline: template K3V3"),
    *("frame: KLT before RoPE K3V3", "frame: KLT, page of 16 K3V3", "values: length kept K16V2"),
    *("scale: unbiased K3V3", "protect: first 4 exact K3V3"),
    *("values: unbiased K16V2", "protect: first layer at 8 bits K3V3", "calibration: template, no text K3V3"),
)


def measure(lab: Lab, recipe: Recipe, seed: int) -> run.Row:
    """One line of the CSV."""
    start = time.perf_counter()
    method = recipe.make(lab, seed)
    lengths = [len(s) for text in lab.texts for s in text.sequences]
    size = 4.0 * lab.subject.head_dim if method is None else method.bytes_per_token_head
    if isinstance(method, Cache):  # exact first tokens weigh by the length of the sequences scored
        size = sum(n * sum(method.sizes(n)) for n in lengths) / sum(lengths)
    row: run.Row = {"group": recipe.group, "name": recipe.name, "k_bits": recipe.k_bits, "v_bits": recipe.v_bits}
    row |= {"bytes": size, "seed": seed}
    scores = lab.text_scores(method)
    for kind in KINDS:
        mine = [scores[text.name] for text in lab.texts if kind in ("all", text.kind)]
        tokens = sum(s.tokens for s in mine)
        row[f"ppl_{kind}"] = math.exp(sum(s.nll for s in mine) / tokens)
        row[f"kl_{kind}"] = sum(s.kl for s in mine) / tokens
    row["tokens"] = sum(s.tokens for s in scores.values())
    if isinstance(method, Cache):
        row |= {f"attention_kl_{name}": value for name, value in lab.attention_kl(method).items()}
    row["seconds"] = time.perf_counter() - start
    return row


def plan(only: Sequence[str], seeds: int, quick: bool) -> list[tuple[Recipe, int]]:
    """Rows and rotations in the order they are run: the first rotation of everything, then the others.

    only: parts of the rows' labels, e.g. ``frame`` or ``K3V3``; a row is run if it has one of them.
    """
    wanted = [r for r in recipes() if not only or any(part in r.label for part in only)]
    if quick and not only:
        wanted = [r for r in wanted if r.label in QUICK_ROWS]
    again = [r for r in wanted if r.seeded]
    again.sort(key=lambda r: (r.k_bits == 4 or r.name in LATER, AGAIN.index(r.group)))
    return [(r, 0) for r in wanted] + [(r, seed) for r in again for seed in range(1, seeds)]


def figures(row: run.Row) -> str:
    """What is printed of a row as soon as it is measured."""
    attention = row.get("attention_kl_all")
    out = f"{row['bytes']:6.1f} B  ppl {row['ppl_all']:8.3f}  KL {row['kl_all']:.4f}"
    return out + ("" if attention is None else f"  attention {attention:.4f}")


def jobs(lab: Lab, rows: Sequence[tuple[Recipe, int]]) -> list[Job]:
    return [Job(f"{r.label}, rotation {seed}", lambda r=r, seed=seed: measure(lab, r, seed)) for r, seed in rows]


# -- tables ------------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("ppl_all", "PPL"),
    ("kl_all", "KL of the answer"),
    ("kl_report", "report"),
    ("kl_source", "source"),
    ("attention_kl_0_2k", "attention KL, 0-2K"),
    ("attention_kl_2_4k", "2-4K"),
    ("attention_kl_4k_on", "4K+"),
    ("attention_kl_shift", "shifted"),
)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = fmean(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    return f"{mean:.4g} ± {stdev(values):.2g}"


MARKS = "<!-- ablation: begin -->", "<!-- ablation: end -->"


def insert(page: str, tables: str) -> str:
    """``page`` with ``tables`` between its marks. Raises ValueError where it has none."""
    begin, end = MARKS
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"no place for tables: a line {begin} and after it a line {end} are wanted")
    return f"{page[: page.index(begin) + len(begin)]}\n{tables}\n{page[page.index(end) :]}"


def label(row: run.Row) -> str:
    """As Recipe.label, of a line of the CSV."""
    return f"{row['group']}: {row['name']} K{float(row['k_bits']):g}V{float(row['v_bits']):g}"


def markdown(rows: Sequence[run.Row]) -> str:
    """One table for each group: mean and standard deviation over rotations."""
    out: list[str] = []
    for group in GROUPS:
        lines: dict[tuple, list[run.Row]] = {}
        for row in rows:
            if row["group"] == group:
                key = (float(row["k_bits"]), float(row["v_bits"]), row["name"])
                lines.setdefault(key, []).append(row)
        if not lines:
            continue
        out += ["", f"### {group}", "", "| K, V | | bytes | " + " | ".join(t for _, t in COLUMNS) + " |"]
        out.append("|---|---|---:|" + "---:|" * len(COLUMNS))
        for (k, v, name), same in lines.items():
            cells = [_cell([float(r[c]) for r in same if r.get(c) not in ("", None)]) for c, _ in COLUMNS]
            out.append(f"| K{k:g}V{v:g} | {name} | {float(same[0]['bytes']):.4g} | " + " | ".join(cells) + " |")
    return "\n".join(out[1:])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.fidelity ablation", description=__doc__)
    p.add_argument("--model-path", help="model folder; not needed with --table")
    p.add_argument("--out", type=Path, help="CSV to write, a row as soon as it is measured; a .json tells how")
    p.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--seeds", type=int, default=3, help="rotations of each row (default 3)")
    p.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help=f"rows with this in their label: {GROUPS}, ..."
    )
    p.add_argument("--budget", type=float, default=math.inf, metavar="S", help="start no row after so many seconds")
    p.add_argument("--queries", type=int, default=16, help="query positions of each bucket (default 16)")
    p.add_argument("--every", type=int, default=1, help="attention of every n-th layer only (default 1)")
    p.add_argument("--limit", type=int, help="tokens of a scored sequence, one of each text (default: all)")
    p.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    p.add_argument("--calibration-text", help="calibration text; default: that of the server")
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    p.add_argument("--quick", action="store_true", help=f"to try it out, a minute or two on a CPU: {QUICK}")
    p.add_argument("--table", type=Path, metavar="CSV", help="only print the tables of a CSV, as Markdown")
    p.add_argument("--into", type=Path, metavar="PAGE", help="with --table: write them between the marks of this page")
    p.add_argument("--list", action="store_true", help="only print the labels of the rows")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.table:
        rows = [r for r in read_csv(args.table) if not args.only or any(part in label(r) for part in args.only)]
        tables = markdown(rows)
        if args.into:
            args.into.write_text(insert(args.into.read_text(), tables))
        print(tables)
        return 0
    command = command_of(parser(), args)
    if args.quick:
        vars(args).update(QUICK)
    rows = plan(args.only, args.seeds, args.quick)
    if args.list:
        print("\n".join(dict.fromkeys(recipe.label for recipe, _ in rows)))
        return 0
    if not (args.model_path and args.out):
        parser().error("--model-path and --out are required, except with --table and --list")
    if not rows:
        parser().error(f"--only {' '.join(args.only)}: no row has this in its label; --list prints them")
    head, begun = commit(), time.perf_counter()  # now: the tree may change during a long run
    if args.threads:
        torch.set_num_threads(args.threads)
    subject = run.load(args.model_path, args.text, args.calibration_text, args.device)
    lab = Lab(subject, args.model_path, args.text, args.calibration_text, args.queries, args.every, args.limit)
    print(f"{time.perf_counter() - begun:6.1f} s  calibrated; {len(rows)} rows", flush=True)
    write_csv([], args.out, FIELDS)
    outcome = run_jobs(jobs(lab, rows), args.out, FIELDS, figures, begun, args.budget)
    record = {
        "command": command,
        "commit": head,
        **sources(args.model_path, args.calibration_text, subject),
        "evaluation": lab.record(),
        **outcome,
        "seconds": round(time.perf_counter() - begun, 1),
        **machine(args.device),
    }
    if lab.device.type == "cuda":
        record["peak_gib"] = round(torch.cuda.max_memory_allocated(lab.device) / 2**30, 2)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(markdown(read_csv(args.out)))
    return 1 if outcome["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
