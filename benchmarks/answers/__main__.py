"""Whole answers of real servers, the same questions for an unquantized cache and packed ones.

    python -m benchmarks.answers --model-path MODEL --configs bf16 k4v4 k3v3 k2v2 --out results/answers_NAME.csv

Every configuration is a server of its own, started one after another, or with --url one that runs already. Long answers
are read again, token by token, by the reference, which is therefore started last. Run the same command again to go on
where it ended. docs/answers.md describes the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..launch import exit_on_sigterm, missing_plugin, shown
from ..server_steps import Budget, gpu, provenance
from ..tasks.prompts import Tokens
from ..tasks.reference import Reference
from ..tasks.run import Job, noted, open_jobs, report
from ..tasks.servers import CONFIGURATIONS, engine, serve
from .engines import Engine, Local, Served
from .questions import Test
from .record import Record
from .run import measure, read, rows, unread
from .tests import NAMES, TOOL_PARSER, knows_tools, plan, tests

LONGEST = 2600  # tokens of a prompt and its answer, for the room that a server needs


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model-path", required=True, help="model folder or hub name; its tokenizer and chat template make the prompts"
    )
    add("--out", type=Path, required=True, help="CSV to write; .json and .jsonl lie beside it")
    add("--configs", nargs="+", choices=CONFIGURATIONS, default=["bf16", "k3v3"])
    add("--reference", help="configuration that reads long answers (default: the first of --configs; bf16 for --url)")
    add("--url", help="ask this server instead of starting any; --name says what it is")
    add("--name", help="configuration to record for --url")
    add("--tests", nargs="+", choices=NAMES, default=list(NAMES), help="default: all")
    add("--samples", type=float, default=1.0, metavar="SCALE", help="times as many of every test, e.g. 0.2 (default 1)")
    add("--seed", type=int, default=0)
    add("--tool-call-parser", default=TOOL_PARSER, help=f"SGLang's, for the test tools (default {TOOL_PARSER})")
    add("--concurrency", type=int, default=8, help="requests at a time (default 8)")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='for every server: --server-args="--a --b"')
    add("--budget", type=float, default=3600, help="seconds for everything (default 3600)")
    add("--log-dir", type=Path, help="keep the servers' logs here")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if bool(args.url) != bool(args.name):
        parser.error("--url and --name need each other")
    if not 0 < args.samples < float("inf"):
        parser.error(f"--samples {args.samples:g}: a number above 0 is needed, 1 for as many as usual")
    if args.concurrency < 1:
        parser.error(f"--concurrency {args.concurrency}: 1 is the least")
    args.configs = [args.name] if args.url else list(dict.fromkeys(args.configs))
    args.reference = args.reference or ("bf16" if args.url else args.configs[0])
    if args.reference not in (args.name, *CONFIGURATIONS):
        parser.error(f"--reference {args.reference}: {', '.join(CONFIGURATIONS)} are there, and the --name of a server")
    return args


def settings(args: argparse.Namespace) -> dict:
    """What answers depend on besides their configuration, test and sample."""
    config = Path(args.model_path) / "config.json"
    return {
        "model": Path(args.model_path).name,
        "model_config_sha256": hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.exists() else None,
        "reference": args.reference,
        "seed": args.seed,
        "tool_call_parser": args.tool_call_parser,
        "server_args": shown(shlex.join(args.server_args)),
    }


class Engines:
    """Opens one configuration after another."""

    def __init__(self, args: argparse.Namespace, budget: Budget):
        self.args, self.budget, self.cuda = args, budget, bool(gpu())

    def given(self, config: str) -> bool:
        return bool(self.args.url) and config == self.args.name

    def name(self, config: str) -> str:
        """ValueError for a configuration that this machine cannot serve."""
        return "given" if self.given(config) else engine(config, self.cuda)

    @contextmanager
    def open(self, config: str) -> Iterator[tuple[Engine, dict]]:
        """And a description for the record. ServerError where it does not start."""
        args = self.args
        if self.given(config):
            yield Served(args.url), {"engine": "given"}
        elif self.name(config) == "transformers":
            with Reference.of(args.model_path) as reference:
                yield Local(reference.model, reference.tokenizer), {"engine": "transformers", "dtype": "bfloat16"}
        else:
            parser = [f"--tool-call-parser={args.tool_call_parser}"] if "tools" in args.tests else []
            log = args.log_dir / f"{config}.log" if args.log_dir else None
            room = args.concurrency * LONGEST
            user = [*parser, *args.server_args]
            with serve(config, args.model_path, self.cuda, room, user, log, self.budget.left) as (url, about):
                yield Served(url), about


def left_out(args: argparse.Namespace, tokens: Tokens, chosen: dict[str, Test], engines: Engines) -> dict[str, str]:
    """Tests that cannot be asked, and why; the tests of a template without tools leave ``chosen``."""
    out = {}
    if "tools" in chosen and not knows_tools(tokens):
        del chosen["tools"]
        args.tests = list(chosen)
        out["tools"] = "the model's chat template knows no tools"
    for config in args.configs:
        if engines.name(config) == "transformers":
            out |= {f"{config} {test.name}": "transformers has no chat API" for test in chosen.values() if test.chat}
    return out


def run(args: argparse.Namespace, chosen: dict[str, Test], jobs: list[Job], engines: Engines, record: Record) -> int:
    budget, failed, missing = engines.budget, {}, {}
    for config in [*(c for c in args.configs if c != args.reference), args.reference]:
        name = engines.name(config)
        mine = [j for j in jobs if config in args.configs and not (name == "transformers" and chosen[j.task].chat)]
        reads = config == args.reference
        if budget.left > 0 and (open_jobs(mine, config, name, record) or (reads and unread(chosen, record))):
            with noted(config, budget, failed):
                with engines.open(config) as (opened, about):
                    record.meta.setdefault("servers", {})[config] = about
                    error = measure(mine, config, name, opened, args.concurrency, budget, record)
                    if reads:
                        error = read(chosen, opened, args.concurrency, budget, record) or error
                if error:
                    failed[config] = error
        if left := len(open_jobs(mine, config, name, record)):
            missing[config] = left
        record.write(rows(chosen, record))
    not_read = len(unread(chosen, record))
    record.meta |= {"failed": failed, "not_measured": missing, "not_read": not_read}
    status = report(failed, missing)
    if not_read:
        print(f"not read: {not_read} answers; {args.reference} reads them when this is run again", file=sys.stderr)
    return status


def table(every: list[dict]) -> list[str]:
    """Lines: each measure, by configuration."""
    out = []
    for row in sorted(every, key=lambda row: NAMES.index(row["test"])):
        interval = "" if row["low"] is None else f"  ({row['low']:.3g} to {row['high']:.3g})"
        what = f"{row['test']:<8}{row['measure']:<24}{row['config']:<22}"
        out.append(f"{what}{row['value']:>10.4g} {row['unit']}{interval}")
    return out


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    started, budget = time.monotonic(), Budget(args.budget)
    command = "python -m benchmarks.answers " + shown(shlex.join(sys.argv[1:] if argv is None else argv))
    try:
        tokens, engines = Tokens.of(args.model_path), Engines(args, budget)
        started_here = [c for c in (*args.configs, args.reference) if not engines.given(c)]
        if why := missing_plugin(arg for c in started_here for arg in CONFIGURATIONS[c]):
            raise ValueError(why)
        chosen = tests(args.tests, tokens, args.seed)
        omitted = left_out(args, tokens, chosen, engines)
        jobs, fewer = plan(chosen, args.samples)
        omitted |= fewer
        record = Record(args.out, settings(args), {**provenance(command, args.commit), "left_out": omitted})
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    for what, why in omitted.items():
        print(f"left out: {what}: {why}", file=sys.stderr)
    try:
        return run(args, chosen, jobs, engines, record)
    finally:
        record.meta["seconds"] = round(time.monotonic() - started, 1)
        every = rows(chosen, record)
        record.write(every)
        print("\n".join(table(every)))


if __name__ == "__main__":
    sys.exit(main())
