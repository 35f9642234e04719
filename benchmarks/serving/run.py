"""What serving costs and gains: SGLang's own load generators against every kind of KV cache.

    python -m benchmarks.serving --out benchmarks/results/serving_h100

Starts one server after another with the same share of the GPU's memory, checks its answers, and measures: decode by
context, batches, capacity, throughput under memory pressure, shared prefixes, prefill, start-up. Writes serving.csv,
serving.json, report.md and pictures; the same command again measures what is still missing. docs/measuring.md says
what each scenario is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path

from ..launch import Server, ServerError, shown
from ..models import KNOWN, Model, add_models, check_models, with_ready
from ..server_steps import Budget, provenance, summary
from . import check, memory
from .bench import BenchError, NoGenerators, Target, Worker
from .configs import BASELINES, DEFAULT, NAMED, SERVERS, Sizes, arguments
from .prompts import check_prompt, plain_token
from .record import UNFIT, UNMEASURED, Record, Row
from .report import write as write_report
from .scenarios import Context, Failed, Outcome, Plan, Unfit, batch, capacity, cost, decode, prefill, prefixes, pressure

#: in the order in which they are measured: what takes no time first, what takes most of it last
SCENARIOS = {module.NAME: module for module in (capacity, cost, decode, batch, prefill, pressure, prefixes)}
SPENT = "the budget was spent"
_WHOLE = "sglang as pip installs it has what is missing"
ERRORS = (ServerError, BenchError, OSError)  # requests' and socket errors, time-outs included, are OSErrors


class Run:
    """One call of the program."""

    def __init__(self, args: argparse.Namespace, record: Record, worker: Worker):
        self.args, self.record, self.worker = args, record, worker
        self.sizes: Sizes = NAMED[args.sizes]
        self.budget = Budget(args.budget)
        self.handled: set[tuple[str, str, str, str]] = set()  # cases that were tried
        self.why: dict[tuple[str, str], str] = {}  # why a server's cases were not measured
        self.started: list[float] = []  # seconds that servers took to start

    def plan(self, model: Model) -> Plan:
        for method in BASELINES:
            found = self.record.value(model.name, method, capacity.NAME, capacity.CASE, "tokens")
            if found:
                return Plan(self.sizes, int(found))
        return Plan(self.sizes)

    def pending(self, model: Model, method: str) -> dict[str, list[str]]:
        """Scenario -> cases that are wanted and not yet there."""
        out = {}
        for name, scenario in SCENARIOS.items():
            wanted = [
                case
                for case in scenario.cases(self.plan(model))
                if any(fnmatch(f"{model.name}/{method}/{name}/{case}", glob) for glob in self.args.only)
            ]
            if left := [c for c in wanted if not self.record.finished((model.name, method, name, c))]:
                out[name] = left
        return out

    def all(self) -> None:
        for model in self.args.model:
            methods = [m for m in self.args.method if self.pending(model, m)]
            if self._reference_missing(model, methods):
                self.refer(model)
            for method in methods:
                # No server is started that, as the others went, would be ready only when the time is over.
                if self.budget.left <= min(self.started, default=0):
                    break
                self.serve(model, method)
        for model in self.args.model:
            for method in self.args.method:
                self.leave(model, method)

    def leave(self, model: Model, method: str) -> None:
        """Rows without a value for what was not measured; a reason that is already there stays, unless it is newer."""
        why = self.why.get((model.name, method))
        known = {row.where for row in self.record.rows}
        for name, cases in self.pending(model, method).items():
            rows = [Row(model.name, method, name, case, state=UNMEASURED) for case in cases]
            rows = [r for r in rows if r.where not in self.handled and (why or r.where not in known)]
            self.record.put([replace(r, note=why or SPENT) for r in rows])

    def _reference_missing(self, model: Model, methods: list[str]) -> bool:
        """Whether a server must be asked that is not itself to be measured."""
        if model.tokenizer or self.args.no_reference or self._reference(model) is not None:
            return False
        return bool(methods) and not any(method in BASELINES for method in methods)

    def _reference(self, model: Model) -> list[float] | None:
        found = self.record.meta["references"].get(model.name)
        return found["logprobs"] if found and found["prompt"] == self.sizes.check_prompt else None

    def refer(self, model: Model) -> None:
        """Ask an unquantized server that is not itself to be measured for its answers."""
        for method in BASELINES:
            self.serve(model, method, timed=False)
            self.why.pop((model.name, method), None)
            if self._reference(model) is not None:
                return

    def serve(self, model: Model, method: str, timed: bool = True) -> None:
        """Start a server, check it, measure what is pending."""
        name, args = f"{model.name}/{method}", self.args
        wanted = self.pending(model, method) if timed else ()
        given = arguments(model, method, self.sizes, args.mem_fraction, args.quick_graphs, args.server_args, wanted)
        log = args.out / "logs" / f"{model.name}_{method}.log"
        self.why.pop((model.name, method), None)
        try:
            with Server(model.path, *given, log=log) as server:
                if timed and self.pending(model, method).keys() - {capacity.NAME, cost.NAME}:
                    self.worker.start()  # imports while the server starts
                with ThreadPoolExecutor(1) as aside:
                    word = aside.submit(plain_token, model.tokenizer) if model.tokenizer else None
                    server.wait(self.budget.timeout(), self.worker.check)
                self.started.append(server.start_s)
                held, held_by = memory.used(server.process.pid)
                info = server.info()
                self.record.meta["servers"][name] = {
                    "args": shown(shlex.join(given)),
                    "start_s": round(server.start_s or 0, 1),
                    **({"kv_quant": info["kv_quant"]} if info.get("kv_quant") else {}),
                }
                self.check(model, method, server)
                if not timed:
                    return
                raw = args.out / "raw" / f"{model.name}_{method}"
                raw.mkdir(parents=True, exist_ok=True)
                target = Target(server.url, model.path, model.tokenizer or model.path, word and word.result())
                ctx = Context(
                    Plan(self.sizes), server, self.worker, target, info, self.budget, raw, args.limit, held, held_by
                )
                self.measure(model, method, ctx)
                # It has nothing left to do in order: SGLang looks for SIGTERM every 5 s only.
                server.process.kill()
        except NoGenerators:
            raise  # it would be the same with every other server
        except TimeoutError as e:
            self.why[model.name, method] = str(e)
        except (check.CheckError, *ERRORS) as e:
            cut = self.budget.left <= 0
            what = SPENT if cut else summary(str(e) or type(e).__name__)
            self.why[model.name, method] = shown(what)
            print(f"{name}: {e}", file=sys.stderr, flush=True)
        finally:
            self.worker.stop()  # what it may hold of a GPU would be missing to the next server
        self.record.write()

    def check(self, model: Model, method: str, server: Server) -> None:
        """CheckError, noted in the record, for a server that is not to be timed."""
        checks, bits = self.record.meta["checks"], SERVERS[method]
        ids = check_prompt(model, self.sizes.check_prompt)
        try:
            answers = check.ask(server, ids, self.sizes.check_new)
            reference = self._reference(model)
            missing = reference is None and not (model.tokenizer or self.args.no_reference)
            if missing and method not in BASELINES:
                raise check.CheckError("no unquantized server answered, to compare with (--no-reference does without)")
            least = min(bits.k_bits, bits.v_bits)
            found = check.judge(answers, least, not model.tokenizer, reference)
        except check.CheckError as e:
            checks[f"{model.name}/{method}"] = {"failed": str(e)}
            raise
        checks[f"{model.name}/{method}"] = found
        if method in BASELINES and reference is None and not model.tokenizer:
            answer = {"method": method, "prompt": self.sizes.check_prompt, "logprobs": answers.tail}
            self.record.meta["references"][model.name] = answer

    def measure(self, model: Model, method: str, ctx: Context) -> None:
        """Every pending case. Errors of a scenario are its own as long as the server lives."""
        for name, scenario in SCENARIOS.items():
            ctx.plan = self.plan(model)  # the capacity, measured first, decides on later loads
            cases = self.pending(model, method).get(name, [])
            if not cases:
                continue
            left = list(cases)

            def keep(case: str, outcome: Outcome, name: str = name, left: list[str] = left) -> None:
                left.remove(case)
                self.handled.add((model.name, method, name, case))
                self.record.put(rows_of((model.name, method, name, case), outcome))

            try:
                for case, outcome in scenario.measure(ctx, cases):
                    keep(case, outcome)
                why = "the load generator gave no result"
            except TimeoutError:
                ctx.budget.timeout()  # a spent budget ends it all
                why = f"took longer than --limit {self.args.limit:.0f} s"
            except ERRORS as e:
                ctx.budget.timeout()
                if ctx.server.process.poll() is not None:
                    raise ctx.server.error("died under load") from e
                why = shown(summary(str(e) or type(e).__name__))
                print(f"{model.name}/{method}/{name}: {e}", file=sys.stderr, flush=True)
            for case in list(left):
                keep(case, Failed(why))


def rows_of(where: tuple[str, str, str, str], outcome: Outcome) -> list[Row]:
    if isinstance(outcome, Unfit):
        return [Row(*where, state=UNFIT, note=outcome.note)]
    if isinstance(outcome, Failed):
        return [Row(*where, state=UNMEASURED, note=outcome.note)]
    return [Row(*where, v.measure, v.value, v.unit, note=v.note) for v in outcome]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write, or to go on with")
    add_models(parser, KNOWN)
    add("--method", nargs="+", choices=SERVERS, default=list(DEFAULT), help=f"default: {' '.join(DEFAULT)}")
    add("--only", nargs="+", default=["*"], metavar="GLOB", help="of MODEL/METHOD/SCENARIO/CASE, as in '*/decode/*'")
    add("--sizes", choices=NAMED, default="full", help="of the loads; smoke only shows that everything runs")
    add("--quick", dest="sizes", action="store_const", const="quick", help="--sizes quick")
    add("--quick-graphs", action="store_true", help="capture graphs only of the sizes that are measured")
    add("--mem-fraction", type=float, default=0.85, help="--mem-fraction-static of every server (default 0.85)")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='for every server: --server-args="--a --b"')
    add("--budget", type=float, default=12 * 3600, help="seconds for everything (default 12 hours)")
    add("--limit", type=float, default=1800, help="seconds for one load generator (default 1800)")
    add("--no-reference", action="store_true", help="check servers without comparing them with an unquantized one")
    add("--report-only", action="store_true", help="write report and pictures again from the CSV")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    check_models(parser, args.model)
    if any("/" in model.name for model in args.model):
        parser.error("--model: a NAME has no slash")
    if not 0 < args.mem_fraction < 1:
        parser.error(f"--mem-fraction {args.mem_fraction}: a share between 0 and 1 is needed")
    chosen = dict.fromkeys(args.method)
    args.method = [m for m in BASELINES if m in chosen] + [m for m in chosen if m not in BASELINES]
    return args


def settings(args: argparse.Namespace, made: dict) -> dict:
    """What must be equal for rows to stand in one file."""
    return {
        "gpu": made["gpu"].get("name", ""),
        "versions": {k: v for k, v in made["versions"].items() if k != "sglang-blockgtq"},
        "sizes": {"name": args.sizes, **asdict(NAMED[args.sizes])},
        "mem_fraction": args.mem_fraction,
        "server_args": shown(shlex.join(args.server_args)),
        "quick_graphs": args.quick_graphs,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.report_only:
        write_report(Record(args.out), args.out)
        return 0
    asked = (arg for method in args.method for arg in SERVERS[method].args)
    return with_ready(args, argv, asked, measure)


def measure(args: argparse.Namespace, words: list[str]) -> int:
    """Whatever is still missing in ``--out``, of models that have a path."""
    record = Record(args.out)
    made = provenance("python -m benchmarks.serving " + shown(shlex.join(words)), args.commit)
    now = json.loads(json.dumps(settings(args, made)))  # with lists for tuples, as in the file
    before = record.meta.get("settings")
    if before and before != now:
        other = [name for name in now if before.get(name) != now[name]]
        print(f"--out {args.out} holds results of other settings ({', '.join(other)}): name another", file=sys.stderr)
        return 2
    try:
        for model in args.model:
            check_prompt(model, NAMED[args.sizes].check_prompt)
    except FileNotFoundError as e:
        print(f"no text to check servers with: {e}; {_WHOLE}", file=sys.stderr)
        return 2
    record.meta["settings"] = now
    record.meta.setdefault("runs", []).append(made)
    record.write()
    started = time.monotonic()
    try:
        with Worker() as worker:
            run = Run(args, record, worker)
            run.all()
    except NoGenerators as e:
        print(f"{e}; {_WHOLE}", file=sys.stderr)
        return 2
    finally:
        made["seconds"] = round(time.monotonic() - started, 1)
        record.write()
        write_report(record, args.out)
    left = [row for row in record.rows if row.where in run.handled and row.state == UNMEASURED]
    failed = {f"{model}/{method}": why for (model, method), why in run.why.items()}
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    print(f"{len(record.rows)} rows, {args.out / 'report.md'}, {made['seconds']} s")
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
