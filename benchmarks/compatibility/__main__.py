"""Start a server of every family of models, and say what became of it.

    python -m benchmarks.compatibility --tokenizer FOLDER --out benchmarks/results/compatibility_cpu.csv

Random weights with true head shapes (:mod:`.families`), 8 bits, float32. A model that is served answers a prompt cold
and again on its cached beginning; both are compared with transformers in float32. Columns: family, like, heads,
outcome (served, refused: before the weights load, or failed: later), words (why not), bytes and bf16_bytes of a token,
cold and warm (from transformers, mean difference of log-probability, nats), read (the same between the two, which is
the cache's), hit (tokens from the cache), start_s. ``--append`` keeps the rows that the file has.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from statistics import fmean

from ..launch import Server, ServerError, exit_on_sigterm, missing_plugin, shown
from ..server_steps import provenance
from .families import FAMILIES, Family

PREFIX, LENGTH = 200, 260  # tokens: several windows
COLUMNS = (
    *("family", "like", "heads", "outcome", "words"),
    *("bytes", "bf16_bytes", "cold", "warm", "read", "hit", "start_s"),
)
ARGUMENTS = [
    "--dtype=float32",
    "--max-total-tokens=2000",
    "--mem-fraction-static=0.3",
    "--kv-quant=blockgtq",
    "--kv-quant-k-bits=8",
    "--kv-quant-v-bits=8",
]
START = 400  # seconds


def exact(folder: Path, ids: list[int]) -> list[float]:
    """Log-probabilities of the tokens after PREFIX, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logprobs[PREFIX:-1].gather(1, torch.tensor(ids[PREFIX + 1 :])[:, None])[:, 0].tolist()


def gap(a: list[float], b: list[float]) -> float:
    return round(fmean(abs(x - y) for x, y in zip(a, b, strict=True)), 5)


def why(output: str) -> tuple[str, str]:
    """The outcome of a server that did not start, and its last words."""
    lines = [line for line in output.splitlines() if re.match(r"(error:|[\w.]+(Error|Exception)\b)", line)]
    refused = [line for line in lines if "--kv-quant blockgtq" in line]
    words = (refused or lines or ["no reason found"])[-1]
    return ("refused" if refused and words.startswith("error:") else "failed"), shown(words)[:300]


def measure(family: Family, tokenizer: Path, ids: list[int], folder: Path, user: list[str]) -> dict:
    """One row."""
    row = {"family": family.name, "like": family.like, "heads": "{}/{} of {}".format(*family.heads)}
    family.build(tokenizer, folder)
    log = folder / "log"
    try:
        with Server(str(folder), *ARGUMENTS, *user, log=log) as server:
            server.wait(START)
            row |= {"outcome": "served", "start_s": round(server.start_s or 0, 1)}
            quant = server.info()["kv_quant"]
            row |= {"bytes": quant["bytes_per_token"], "bf16_bytes": quant["bf16_bytes_per_token"]}
            want = exact(folder, ids)
            cold, _ = server.logprobs(ids, PREFIX)
            server.flush()
            server.generate(ids[:PREFIX])
            warm, hit = server.logprobs(ids, PREFIX)
            row |= {"cold": gap(cold, want), "warm": gap(warm, want), "read": gap(cold, warm), "hit": hit}
    except ServerError:
        row["outcome"], row["words"] = why(log.read_text(errors="replace"))
    return row


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compatibility",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="folder of a model whose tokenizer all take")
    add("--out", type=Path, required=True, help="CSV to write; a .json of the same name tells how")
    add("--only", nargs="+", choices=[f.name for f in FAMILIES], help="default: all")
    add("--append", action="store_true", help="keep the rows that the file has")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='for every server: --server-args="--a --b"')
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if not (args.tokenizer / "tokenizer_config.json").exists():
        parser.error(f"--tokenizer {args.tokenizer}: no tokenizer_config.json there; name a model's folder")
    return args


def main(argv: list[str] | None = None) -> int:
    from transformers import AutoTokenizer

    args = parse(argv)
    exit_on_sigterm()
    if wrong := missing_plugin(ARGUMENTS):
        print(wrong, file=sys.stderr)
        return 2
    rows = list(csv.DictReader(args.out.open())) if args.append and args.out.exists() else []
    have = {row["family"] for row in rows}
    text = (files("sglang") / "test" / "long_prompt.txt").read_text()
    ids = AutoTokenizer.from_pretrained(args.tokenizer)(text)["input_ids"][:LENGTH]
    command = "python -m benchmarks.compatibility " + shown(shlex.join(sys.argv[1:] if argv is None else argv))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made = provenance(command, args.commit) | {"server_args": [*ARGUMENTS, *args.server_args]}
    args.out.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    for family in FAMILIES:
        if family.name in have or (args.only and family.name not in args.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(family, args.tokenizer, ids, Path(folder) / family.name, args.server_args)
        rows.append(row)
        print(json.dumps(row), flush=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
