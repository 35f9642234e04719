"""``python -m benchmarks.fidelity --model-path PATH --out FILE.csv``: measure, write CSV and JSON, check targets.

``python -m benchmarks.fidelity panel --help``: the paper's panel, all methods side by side.
``python -m benchmarks.fidelity card --help``: what each preset costs a model, on one page.
``python -m benchmarks.fidelity ablation --help``: what each choice is worth at equal bytes.
``python -m benchmarks.fidelity real-models --help``: real models side by side.
``python -m benchmarks.fidelity peers --help``: other caches beside this package's, KL of the answer against bytes.
``python -m benchmarks.fidelity tails --help``: how far off tokens are that a server samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.cli import own_options
from sglang_blockgtq.calibrate.device import device
from sglang_blockgtq.calibrate.text import TextError

from . import ablation, card, panel_cli, peers, real_models, run, tails, targets
from .record import command_of, commit, machine, sources, text_source
from .rows import write_csv

PROGRAMS = {
    "panel": panel_cli.main,
    "card": card.main,
    "ablation": ablation.main,
    "real-models": real_models.main,
    "peers": peers.main,
    "tails": tails.main,
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    p.add_argument("--model-path", required=True, help="model folder")
    p.add_argument("--out", required=True, type=Path, help="CSV to write; a .json of the same name tells how")
    p.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    p.add_argument("--calibration-text", help="calibration text; default: that of the server")
    p.add_argument("--queries", type=int, default=32, help="query positions per window (default 32)")
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    p.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    return p


def provenance(args: argparse.Namespace, subject: run.Subject, head: str) -> dict:
    """What someone needs to make the same file again."""
    return {
        "command": command_of(parser(), args),
        "commit": head,
        **sources(args.model_path, args.calibration_text, subject),
        "evaluation": {
            **text_source(args.text),
            "tokens": len(subject.ids),
            "queries_per_window": args.queries,
            "seed": run.SEED,
            "shift": run.SHIFT,
            "perplexity_length": run.PPL_LENGTH,
        },
        **machine(args.device),
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        return PROGRAMS[argv[0]](argv[1:]) if argv and argv[0] in PROGRAMS else fidelity(argv)
    except TextError as e:
        print(own_options(e), file=sys.stderr)
        return 2


def fidelity(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    head = commit()  # now: the tree may change during a long run
    if args.threads:
        torch.set_num_threads(args.threads)

    subject = run.load(args.model_path, args.text, args.calibration_text, args.device)
    rows = run.attention_rows(subject, bits=(2, 3, 4), shift_bits=(2, 3), queries=args.queries)
    write_csv(rows, args.out, run.FIELDS)  # in case the second half is cut short
    rows += run.perplexity_rows(subject, run.perplexity_methods(subject))
    write_csv(rows, args.out, run.FIELDS)
    record = provenance(args, subject, head)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")

    print(targets.summary(rows), end="\n\n")
    results = targets.check(rows, run.SHIFT)
    for target in results:
        print(f"{'holds' if target.holds else 'FAILS'}  {target.text}: {target.value}")
    return 0 if all(target.holds for target in results) else 1


if __name__ == "__main__":
    sys.exit(main())
