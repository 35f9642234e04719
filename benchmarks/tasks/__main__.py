"""Downstream tasks through the OpenAI API of real servers, an unquantized and packed caches side by side.

    python -m benchmarks.tasks --model-path MODEL --out results.csv --configs bf16 k4v4 k3v3 --lengths 4096,16384
    python -m benchmarks.tasks --model-path MODEL --calibrate knobs.json --lengths 4096,16384
    python -m benchmarks.tasks --model-path MODEL --out results.csv --knobs knobs.json ...
    python -m benchmarks.tasks --model-path MODEL --out longbench.csv --longbench DIR
    python -m benchmarks.tasks --model-path MODEL --out aime.csv --aime FILE --temperature 0.6 --top-p 0.95 --runs 8

Every configuration is a server of its own, started one after another, or with --url one that runs already. Processes
with one configuration each may run side by side; --merge puts their files together. Run the
same command again to go on where it ended. docs/tasks.md describes the tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ..launch import ServerError, exit_on_sigterm, missing_plugin, shown
from ..server_steps import Budget, gpu, lengths, provenance
from . import aime, longbench, merge, plot
from .calibrate import Interrupted, calibrate, cell_jobs, probe
from .client import Client, Sampling
from .haystack import Haystack
from .knobs import RUNGS, choose, load
from .prompts import Tokens
from .record import Record, rows
from .record import summary as table
from .run import Job, in_turn, measure, noted, open_jobs, report
from .servers import CONFIGURATIONS, engine, serve

HARDEST = min(map(len, RUNGS.values())) - 1
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWER_TOKENS = 1024  # the longest answer of a generated task, for the room that a server needs


def depths(text: str) -> list[float]:
    """``0,50,100`` (per cent) to ascending shares. ArgumentTypeError for anything else."""
    try:
        out = sorted({float(part) / 100 for part in text.split(",")})
    except ValueError:
        out = [-1.0]
    if not 0 <= out[0] <= out[-1] <= 1:
        raise argparse.ArgumentTypeError(f"{text}: per cents are needed, as in 0,50,100")
    return out


def rungs(text: str) -> list[int]:
    """``0,2,4`` to ascending places in :data:`RUNGS`. ArgumentTypeError for anything else."""
    try:
        out = sorted({int(part) for part in text.split(",")})
    except ValueError:
        out = [-1]
    if not 0 <= out[0] <= out[-1] <= HARDEST:
        raise argparse.ArgumentTypeError(f"{text}: numbers from 0 to {HARDEST} are needed, as in 0,2,4")
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-path", help="model folder or hub name; its tokenizer counts the tokens")
    add("--out", type=Path, help="CSV to write; .json, .jsonl and _CONFIG.png lie beside it")
    add("--calibrate", type=Path, metavar="JSON", help="find knobs with the first configuration, and write them here")
    add("--knobs", type=Path, metavar="JSON", help="what --calibrate wrote")
    add("--rungs", type=rungs, metavar="N,N", help=f"difficulties of every task, from 0, the easiest, to {HARDEST}")
    add("--merge", type=Path, nargs="+", metavar="CSV", help="ask nobody: put the results of these runs into --out")
    add("--within", metavar="CONFIG", help="--merge: keep the difficulty at which CONFIG passes 60 to 95 %%")
    add("--longbench", type=Path, metavar="DIR", help="score this copy of LongBench's data")
    add("--longbench-prompts", type=Path, metavar="FILE", help="dataset2prompt.json, for the published words")
    add("--max-length", type=int, help="LongBench: tokens beyond which a prompt loses its middle")
    add("--aime", type=Path, metavar="FILE", help="score these problems")
    add("--runs", type=int, default=1, help="answers to each AIME problem (default 1)")
    add("--new-tokens", type=int, default=16384, help="of an AIME answer (default 16384)")
    add("--samples", type=int, help="LongBench, AIME: at most so many records of a file")
    add("--temperature", type=float, default=0.0, help="default 0, greedy")
    add("--top-p", type=float, default=1.0)
    add("--configs", nargs="+", choices=CONFIGURATIONS, default=["bf16", "k3v3"])
    add("--url", help="ask this server instead of starting any; --name says what it is")
    add("--name", help="configuration to record for --url")
    add("--tasks", nargs="+", help=f"default: all of {', '.join(RUNGS)}; with --longbench all that there are")
    add("--lengths", type=lengths, default=[4096], metavar="N,N", help="prompt tokens (default 4096)")
    add("--depths", type=depths, default=list(DEPTHS), metavar="P,P", help="per cent (default 0,25,50,75,100)")
    add("--trials", type=int, default=4, help="samples of each depth (default 4)")
    add("--seed", type=int, default=0)
    add("--text", type=Path, help="haystack; default: docstrings of the standard library")
    add("--api", choices=("completions", "chat"), default="completions")
    add("--context", choices=("cached", "fresh"), help="default: cached, with --api chat fresh")
    add("--plain", action="store_true", help="no chat template, as for a base model")
    add("--concurrency", type=int, default=4, help="requests at a time (default 4)")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='for every server: --server-args="--a --b"')
    add("--budget", type=float, default=3600, help="seconds for everything (default 3600)")
    add("--log-dir", type=Path, help="keep the servers' logs here")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if bool(args.out) == bool(args.calibrate):
        parser.error("either --out or --calibrate is needed")
    if args.within and not args.merge:
        parser.error("--within needs --merge")
    if args.merge:
        if not args.out or args.out.resolve() in {part.resolve() for part in args.merge}:
            parser.error("--merge needs an --out of its own")
        return args
    if not args.model_path:
        parser.error("--model-path is needed")
    if args.knobs and args.rungs:
        parser.error("--knobs and --rungs exclude each other")
    if sum(map(bool, (args.calibrate or args.knobs or args.rungs, args.longbench, args.aime))) > 1:
        parser.error("--calibrate, --knobs and --rungs, --longbench and --aime exclude each other")
    if bool(args.url) != bool(args.name):
        parser.error("--url and --name need each other")
    if args.longbench and not args.max_length:
        parser.error(
            "--longbench needs --max-length: the model's context less 512 for the answer and some for the template"
        )
    if not args.longbench and not args.aime:
        args.tasks = args.tasks or list(RUNGS)
        if unknown := [task for task in args.tasks if task not in RUNGS]:
            parser.error(f"--tasks {unknown[0]}: there are {', '.join(RUNGS)}")
    for name in ("trials", "concurrency", "runs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: 1 is the least")
    args.context = args.context or ("fresh" if args.api == "chat" else "cached")
    if args.api == "chat" and (args.context == "cached" or args.plain):
        parser.error("--context cached and --plain need --api completions")
    return args


def settings(args: argparse.Namespace, haystack: Haystack | None) -> dict:
    """What answers depend on besides the task, its knobs and the configuration."""
    config = Path(args.model_path) / "config.json"
    return {
        "model": Path(args.model_path).name,
        "model_config_sha256": hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.exists() else None,
        "text_sha256": hashlib.sha256(haystack.text.encode()).hexdigest()[:16] if haystack else None,
        "seed": args.seed,
        "api": args.api,
        "context": args.context,
        "plain": args.plain,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "server_args": shown(shlex.join(args.server_args)),
    }


def plan(args: argparse.Namespace, tokens: Tokens, haystack: Haystack | None) -> list[Job]:
    """Every job of a configuration. ValueError where a length cannot hold a task, before any server starts."""
    if args.longbench:
        return longbench.jobs(
            args.longbench, tokens, args.max_length, args.tasks, args.longbench_prompts, args.samples, args.seed
        )
    if args.aime:
        return aime.jobs(args.aime, args.runs, args.new_tokens, args.samples)
    loaded = load(args.knobs) if args.knobs else None
    out: list[Job] = []
    for task in args.tasks:
        for length in args.lengths:
            for knobs in choose(task, length, loaded, args.rungs):
                jobs = cell_jobs(task, haystack, length, args.depths, args.trials, knobs, args.seed, 0)
                try:
                    probe(jobs)
                except ValueError as e:
                    if args.rungs:
                        print(f"left out: {task} {knobs}: {e}", file=sys.stderr)
                        continue
                    raise ValueError(f"{task} {knobs}: {e}") from None
                out += jobs
    return in_turn(out)


class Servers:
    """Opens one configuration after another."""

    def __init__(self, args: argparse.Namespace, tokens: Tokens, budget: Budget, longest: int):
        self.args, self.tokens, self.budget = args, tokens, budget
        self.cuda = bool(gpu())
        # Contexts, their prompts and answers may all lie in the cache at once.
        self.room = args.concurrency * (longest + 64) + 1024
        self.configs = [args.name] if args.url else list(dict.fromkeys(args.configs))

    def engine(self, config: str) -> str:
        return "given" if self.args.url else engine(config, self.cuda)

    def open(self, stack: ExitStack, config: str) -> tuple[Client, dict]:
        """ServerError where it does not start."""
        args = self.args
        url, about = args.url, {"engine": "given"}
        if not url:
            log = args.log_dir / f"{config}.log" if args.log_dir else None
            url, about = stack.enter_context(
                serve(config, args.model_path, self.cuda, self.room, args.server_args, log, self.budget.left)
            )
        sampling = Sampling(args.temperature, args.top_p)
        return Client(url.rstrip("/"), self.tokens, args.api, args.context, sampling=sampling), about


def run_calibration(args: argparse.Namespace, servers: Servers, haystack: Haystack, budget: Budget, meta: dict) -> int:
    config = servers.configs[0]
    meta |= {"configuration": f"{config} ({servers.engine(config)})", "settings": settings(args, haystack)}
    try:
        with ExitStack() as stack:
            client, meta["server"] = servers.open(stack, config)
            calibrate(
                args.calibrate,
                client,
                haystack,
                args.tasks,
                args.lengths,
                args.depths,
                args.trials,
                args.seed,
                args.concurrency,
                budget,
                meta,
            )
    except (Interrupted, ServerError) as e:
        print(f"not finished: {e}", file=sys.stderr)
        return 1
    return 0


def run_tasks(args: argparse.Namespace, servers: Servers, jobs: list[Job], record: Record, budget: Budget) -> int:
    failed: dict[str, str] = {}
    missing: dict[str, int] = {}
    for config in servers.configs:
        name = servers.engine(config)
        if open_jobs(jobs, config, name, record) and budget.left > 0:
            with noted(config, budget, failed):
                with ExitStack() as stack:
                    client, about = servers.open(stack, config)
                    record.meta.setdefault("servers", {})[config] = about
                    error = measure(jobs, config, name, client, args.concurrency, budget, record)
                if error:
                    failed[config] = error
        if left := len(open_jobs(jobs, config, name, record)):
            missing[config] = left
    record.meta |= {"failed": failed, "not_measured": missing}
    record.write()
    pictures(args.out, record.rows())
    print("\n".join(record.summary()))
    return report(failed, missing)


def run_merge(args: argparse.Namespace) -> int:
    meta = {"command": "python -m benchmarks.tasks " + shown(shlex.join(sys.argv[1:]))}
    try:
        answers, chosen = merge.write(args.out, args.merge, args.within, meta)
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    pictures(args.out, rows(answers))
    for (task, length), what in sorted(chosen.items()):
        print(f"{task} {length}: {what['knobs']} {args.within} {what['rate']:.0%} of {what['samples']} {what['note']}")
    print("\n".join(table(answers)))
    return 0


def pictures(out: Path, every: list[dict]) -> None:
    """A heat map of each configuration beside OUT; none where matplotlib is not there."""
    try:
        for config in dict.fromkeys(row["config"] for row in every):
            plot.heat_map(every, config, out.with_name(f"{out.stem}_{config}.png"))
    except ModuleNotFoundError as e:
        print(f"no pictures ({e}): --merge {out.name} draws them where it is installed", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.merge:
        return run_merge(args)
    exit_on_sigterm()
    started, budget = time.monotonic(), Budget(args.budget)
    meta = provenance([], args.commit)
    meta["command"] = "python -m benchmarks.tasks " + shown(shlex.join(sys.argv[1:] if argv is None else argv))
    try:
        tokens = Tokens.of(args.model_path, chat=not args.plain, prefix=args.api == "completions")
        haystack = None if args.longbench or args.aime else Haystack.of(tokens, args.text)
        longest = max(args.lengths) + ANSWER_TOKENS
        if args.longbench:
            longest = args.max_length + ANSWER_TOKENS
        elif args.aime:
            longest = args.new_tokens + ANSWER_TOKENS
        servers = Servers(args, tokens, budget, longest)
        mine = [] if args.url else servers.configs
        if why := missing_plugin(arg for config in mine for arg in CONFIGURATIONS[config]):
            raise ValueError(why)
        for config in servers.configs:
            if servers.engine(config) == "transformers" and args.temperature:
                raise ValueError(f"--temperature {args.temperature}: bf16 without a GPU is transformers, greedy only")
        if args.calibrate:
            return run_calibration(args, servers, haystack, budget, meta)
        jobs = plan(args, tokens, haystack)
        record = Record(args.out, settings(args, haystack), meta)
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    try:
        return run_tasks(args, servers, jobs, record, budget)
    finally:
        record.meta["seconds"] = round(time.monotonic() - started, 1)
        record.write()


if __name__ == "__main__":
    sys.exit(main())
