"""``python -m benchmarks.fidelity --model-path PATH --out FILE.csv``: measure, write CSV and JSON, check targets."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.model import config_hash, weights_hash

from . import plot, run, targets


def write_csv(rows: list[run.Row], path: Path) -> None:
    """One line per row, six significant digits, empty where a column does not apply."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, run.FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def commit() -> str:
    """Commit of the working tree, with ``-dirty`` where tracked or new files differ; "" outside git."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", "kernels", "calibrate", "benchmarks/fidelity"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("-dirty" if changes.strip() else "")


def provenance(args: argparse.Namespace, subject: run.Subject, head: str) -> dict:
    """What someone needs to make the same file again. Absolute paths are reduced to names."""
    text = args.text or run.default_text()
    command = ["python -m benchmarks.fidelity"]
    for option in ("model_path", "out", "text", "calibration_text", "picture"):
        if path := getattr(args, option):
            path = Path(path)
            command.append(f"--{option.replace('_', '-')} {path.name if path.is_absolute() else path.as_posix()}")
    return {
        "command": " ".join([*command, f"--queries {args.queries}"]),
        "commit": head,
        "model": {
            "name": Path(args.model_path).name,
            "config_hash": config_hash(subject.model.config),
            "weights_hash": weights_hash(args.model_path),
            "dtype": "float32",
        },
        "calibration": {
            "text": Path(args.calibration_text).name if args.calibration_text else "pydoc_data.topics",
            "tokens": subject.moments.tokens,
            "ids_sha256": subject.calibration_hash,
        },
        "evaluation": {
            "text": text.name if args.text else "sglang/test/long_prompt.txt",
            "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
            "tokens": len(subject.ids),
            "queries_per_window": args.queries,
            "seed": run.SEED,
            "shift": run.SHIFT,
            "perplexity_length": run.PPL_LENGTH,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "sglang")},
        },
        "machine": platform.machine(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--model-path", required=True, help="model folder")
    parser.add_argument("--out", required=True, type=Path, help="CSV to write; a .json of the same name tells how")
    parser.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    parser.add_argument("--calibration-text", help="calibration text; default: that of the server")
    parser.add_argument("--queries", type=int, default=32, help="query positions per window (default 32)")
    parser.add_argument("--picture", type=Path, help="PNG of softmax KL per layer")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    args = parser.parse_args(argv)
    head = commit()  # now: the tree may change during a long run
    if args.threads:
        torch.set_num_threads(args.threads)

    subject = run.load(args.model_path, args.text, args.calibration_text)
    rows = run.attention_rows(subject, bits=(2, 3, 4), shift_bits=(2, 3), queries=args.queries)
    write_csv(rows, args.out)  # in case the second half is cut short
    rows += run.perplexity_rows(subject, run.perplexity_methods(subject))
    write_csv(rows, args.out)
    record = provenance(args, subject, head)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    if args.picture:
        plot.draw(rows, args.picture, record["model"]["name"])

    print(targets.summary(rows), end="\n\n")
    results = targets.check(rows, run.SHIFT)
    for target in results:
        print(f"{'holds' if target.holds else 'FAILS'}  {target.text}: {target.value}")
    return 0 if all(target.holds for target in results) else 1


if __name__ == "__main__":
    sys.exit(main())
