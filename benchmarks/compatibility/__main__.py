"""Start servers of every family of models, and say what became of them.

    python -m benchmarks.compatibility --tokenizer FOLDER --out benchmarks/results/compatibility_cpu.csv
    python -m benchmarks.compatibility --write-docs

Random weights with true head shapes (:mod:`.families`), a cache of 8 bits; a server for each page size. Where it is
served, a prompt is answered cold and again on its cached beginning, and some tokens are generated. On a GPU: bfloat16,
CUDA graphs, and stock SGLang beside it, with its bf16 cache in the same share of memory (--parallel servers share a
GPU, and each sizes its cache as if it were alone there); on a CPU: float32, and transformers beside it.

Columns, where they do not say it themselves: outcome (served; refused, before the weights load; failed, later; not
run), words (why not), graphs (captured ones), bytes and bf16_bytes of a token, tokens and bf16_tokens (that fit; empty
on a CPU). Mean differences of log-probabilities, nats: cold and warm (from stock SGLang's cold ones on a GPU, else from
transformers in float32), read (the same between the two, which is the cache's), decode (tokens as they were generated,
from the same as part of a cold prompt), bf16_cold (stock SGLang's from transformers), bf16_read (stock SGLang's between
cold and cached). hit: tokens from the cache. start_s: until the server answered.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.resources import files
from pathlib import Path
from threading import Lock

from ..launch import exit_on_sigterm, missing_plugin, shown
from ..server_steps import provenance
from . import document
from .families import FAMILIES, Family
from .measure import COLUMNS, LENGTH, NO_TIME, PACKED, OutOfTime, Run, finished, measured

ORDER = [family.name for family in FAMILIES]
GRACE = 60  # seconds for servers that have started when --minutes are over


class Record:
    """The CSV, written anew after each row, in the order of FAMILIES. kept: rows that it begins with."""

    def __init__(self, out: Path, kept: list[dict]):
        self.out, self.rows = out, kept
        self._lock, self._begin = Lock(), time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begin:6.1f} s  {text}", flush=True)

    def add(self, row: dict) -> None:
        with self._lock:
            self.rows.append(row)
            self.rows.sort(key=lambda r: (ORDER.index(r["family"]), int(r.get("page_size") or 0)))
            with self.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)
            self.say(" ".join(f"{name}={row[name]}" for name in COLUMNS if row.get(name, "") != ""))


def measure(run: Run, family: Family, page: int, record: Record) -> bool:
    """Add a row. Whether there is one: of a model that is not served, too."""
    try:
        if row := measured(run, family, page):
            record.add(row)
        return True
    except OutOfTime:
        record.say(f"family={family.name} page_size={page}: no time left")
    except Exception:
        record.say(f"family={family.name} page_size={page}: {traceback.format_exc()}")
    return False


def page_sizes(text: str) -> list[int]:
    try:
        out = [int(part) for part in text.split(",")]
    except ValueError:
        out = [0]
    if min(out) < 1 or len(set(out)) < len(out):
        raise argparse.ArgumentTypeError(f"{text}: different numbers of tokens are needed, as in 1,64")
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compatibility",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--write-docs", action="store_true", help="only write docs/families.md anew from benchmarks/results")
    add("--tokenizer", type=Path, help="folder of a model whose tokenizer all take")
    add("--out", type=Path, help="CSV to write; a .json of the same name tells how")
    add("--device", choices=["cuda", "cpu"], help="default: a GPU where there is one")
    add("--only", nargs="+", choices=[f.name for f in FAMILIES], metavar="FAMILY", help="default: all")
    add("--page-sizes", type=page_sizes, default=[1, 64], metavar="N,N", help="tokens; default: 1,64")
    add("--parallel", type=int, metavar="N", help="servers at a time; default: 10 on a GPU, 1 on a CPU")
    add("--stock", action=argparse.BooleanOptionalAction, help="start stock SGLang, too; default: on a GPU")
    add("--resume", action="store_true", help="keep the rows that the file has, and measure the others")
    add("--minutes", type=float, default=float("inf"), help="start no server after so long")
    add("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs there")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='for every server: --server-args="--a --b"')
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if args.write_docs:
        return args
    if args.tokenizer is None or args.out is None:
        parser.error("--tokenizer and --out are needed, or --write-docs alone")
    if not (args.tokenizer / "tokenizer_config.json").exists():
        parser.error(f"--tokenizer {args.tokenizer}: no tokenizer_config.json there; name a model's folder")
    if args.parallel is not None and args.parallel < 1:
        parser.error(f"--parallel {args.parallel}: at least 1 is needed")
    return args


def prepare(args: argparse.Namespace, work: Path) -> Run:
    """Ends the program where the device is missing."""
    import torch
    from transformers import AutoTokenizer

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: PyTorch finds no GPU; use --device cpu")
    args.parallel = args.parallel or (10 if device == "cuda" else 1)
    text = (files("sglang") / "test" / "long_prompt.txt").read_text()
    return Run(
        device=device,
        name=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        stock=device == "cuda" if args.stock is None else args.stock,
        fraction=round(0.5 / args.parallel, 4),
        tokenizer=args.tokenizer,
        ids=AutoTokenizer.from_pretrained(args.tokenizer)(text)["input_ids"][:LENGTH],
        user_args=args.server_args,
        work=work,
        end=time.monotonic() + 60 * args.minutes,
        logs=args.logs,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.write_docs:
        document.write()
        return 0
    exit_on_sigterm()
    if wrong := missing_plugin(PACKED):
        print(wrong, file=sys.stderr)
        return 2
    command = "python -m benchmarks.compatibility " + shown(shlex.join(sys.argv[1:] if argv is None else argv))
    kept = list(csv.DictReader(args.out.open())) if args.resume and args.out.exists() else []
    kept = [row for row in kept if row["family"] in ORDER and NO_TIME not in row["words"]]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = Record(args.out, kept)
    with tempfile.TemporaryDirectory() as work:
        run = prepare(args, Path(work))
        servers = {"packed": run.arguments(FAMILIES[0], args.page_sizes[0]), "stock": run.arguments(FAMILIES[0], None)}
        made = provenance(command, args.commit) | {"parallel": args.parallel, "server_args": servers}
        text = shown(json.dumps(made, indent=1)).replace(run.work.name, "WORK")
        args.out.with_suffix(".json").write_text(text + "\n")
        chosen = [family for family in FAMILIES if args.only is None or family.name in args.only]
        have = {family.name: finished(family, kept, args.page_sizes) for family in chosen}
        todo = [(family, page) for page in args.page_sizes for family in chosen if page not in have[family.name]]
        with ThreadPoolExecutor(args.parallel) as threads:
            try:
                jobs = [threads.submit(measure, run, *job, record) for job in todo]
                wait(jobs, None if args.minutes == float("inf") else 60 * args.minutes + GRACE)
            finally:
                run.stop()
                threads.shutdown(cancel_futures=True)
        return 0 if all(not job.cancelled() and job.result() for job in jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
