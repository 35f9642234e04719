"""How bits are best split between keys and values: perplexity and KL of the answer at equal bytes.

``python -m benchmarks.fidelity split --model-path MODEL --out split.csv``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sglang_blockgtq.calibrate.device import device

from . import run
from .record import commit, machine, sources, text_source, write_csv

#: (allocator, K bits, V bits); those of one sum of bits take the same bytes
SPLITS = (
    *(("template", k, v) for k, v in ((4.5, 4), (4, 4), (4.5, 3.5), (5, 3), (4, 3), (3, 4), (3.5, 3))),
    *(("template", k, v) for k, v in ((3, 3), (4, 2), (2, 4), (3.5, 2.5), (2.5, 3.5))),
    *(("template", k, v) for k, v in ((3, 2), (2, 3), (2, 2))),
    *(("product-slot", b, b) for b in (4, 3, 2)),
)
FIELDS = ("method", "k_bits", "v_bits", "bytes_per_token_head", "tokens", "ppl", "kl_final")


def rows_of(subject: run.Subject) -> list[run.Row]:
    """One row for each of :data:`SPLITS`, behind the unquantized cache's."""
    methods = [None, *(subject.table(*split) for split in SPLITS)]
    rows = run.perplexity_rows(subject, methods, min(run.PPL_LENGTH, len(subject.ids)))
    return [{name: row[name] for name in FIELDS} for row in rows]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity split", description=__doc__)
    parser.add_argument("--model-path", required=True, help="model folder")
    parser.add_argument("--out", required=True, type=Path, help="CSV to write; a .json of the same name tells how")
    parser.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    parser.add_argument("--calibration-text", help="calibration text; default: that of the server")
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    head = commit()
    subject = run.load(args.model_path, args.text, args.calibration_text, args.device)
    rows = rows_of(subject)
    write_csv(rows, args.out, FIELDS)
    options = f"--model-path {Path(args.model_path).name} --out {args.out.name}"
    record = {
        "command": f"python -m benchmarks.fidelity split {options}",
        "commit": head,
        **sources(args.model_path, args.calibration_text, subject),
        "evaluation": text_source(args.text) | {"tokens": len(subject.ids), "perplexity_length": run.PPL_LENGTH},
        **machine(args.device),
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    for row in rows:
        print(*(f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in FIELDS))
    return 0
