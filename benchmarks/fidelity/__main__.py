"""``python -m benchmarks.fidelity --model-path PATH --out FILE.csv``: measure, write CSV and JSON, check targets.

``python -m benchmarks.fidelity panel --help``: the paper's panel, all methods side by side.
``python -m benchmarks.fidelity card --help``: what each preset costs a model, on one page.
``python -m benchmarks.fidelity ablation --help``: what each choice is worth at equal bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.device import device

from . import ablation, card, panel_cli, run, targets
from .record import commit, machine, sources, text_source, write_csv


def provenance(args: argparse.Namespace, subject: run.Subject, head: str) -> dict:
    """What someone needs to make the same file again. Absolute paths are reduced to names."""
    command = ["python -m benchmarks.fidelity"]
    for option in ("model_path", "out", "text", "calibration_text"):
        if path := getattr(args, option):
            path = Path(path)
            command.append(f"--{option.replace('_', '-')} {path.name if path.is_absolute() else path.as_posix()}")
    return {
        "command": " ".join([*command, f"--queries {args.queries}"]),
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
    if argv[:1] == ["panel"]:
        return panel_cli.main(argv[1:])
    if argv[:1] == ["card"]:
        return card.main(argv[1:])
    if argv[:1] == ["ablation"]:
        return ablation.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--model-path", required=True, help="model folder")
    parser.add_argument("--out", required=True, type=Path, help="CSV to write; a .json of the same name tells how")
    parser.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    parser.add_argument("--calibration-text", help="calibration text; default: that of the server")
    parser.add_argument("--queries", type=int, default=32, help="query positions per window (default 32)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    args = parser.parse_args(argv)
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
