"""Agent sessions against a server for some minutes, and every answer read again: nothing may be lost.

    python -m benchmarks.soak --model FOLDER --minutes 10 --out benchmarks/results/soak_cpu.json

Sessions of --turns turns over system prompts that they share, the first ones met on their way; --parallel are asked at
a time: plain answers of random lengths, essays, several answers to one request, grammars, requests that are aborted and
clients that give up. The cache holds 1.3 times the working set (:mod:`.plan`), so prefixes are evicted; in the second
half of each round the shortest sessions write to their end, for which it is too small: requests are retracted. In
pauses it is flushed.

Each text is read again as one cold prompt, and the log-probabilities of its answers compared with those of when they
were generated, but for answers by a grammar, which changes them: those must follow it.

The exit code is 1 if an answer is farther away than --bound (nats a token in the mean over an answer of 8 tokens or
more, and of one token) or more tokens are far off than :class:`.replay.Bound` says, a request fails, the server ends,
complains of a leak or has other than all slots free after a flush, a row that the prefix cache holds when it is flushed
has another checksum than when it was written, or if something of the above never happened.

--minutes begin when the server answers, and contain the reading; what is still being answered then is waited for. A
calm beginning, one session at a time, gives what the cache costs without pressure.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path
from statistics import fmean, quantiles

from ..launch import Server, ServerError, exit_on_sigterm, missing_plugin, plugin_path, shown
from ..server_steps import provenance
from .client import Client
from .load import Load
from .plan import Plan, PlanError
from .replay import FAR, MANY, Bound, Replay

WATCH = Path(__file__).parent / "watch"
EVERY = 30  # seconds between lines
ROUNDS = 6  # of load and reading
SPARE = 1.3  # of the time that reading is expected to take
MUST_HAPPEN = (
    *("turns", "retractions", "aborts", "timeouts", "requests of several answers", "grammars that ended"),
    *("flushes", "answers replayed", "rows compared"),
)
MOST_SHOWN = 40  # tokens far from their cold reading
#: By bits of keys and values. On an H200 K4V4 has 2 tokens of a million beyond 2 nats, 12 without exact tokens.
BOUNDS = {"8": Bound(0.05, 0.3, 1), "4": Bound(0.4, 2.5, 30), "16": Bound(0.05, 0.3, 1)}
STOCK = "16"  # bits of SGLang's own cache, as a control


def bound(text: str) -> Bound:
    try:
        mean, token = map(float, text.split(","))
        if min(mean, token) <= 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: two numbers of nats above 0 are needed, as in 0.1,1") from None
    return Bound(mean, token)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER")
    add("--device", choices=["cuda", "cpu"], help="default: a GPU where there is one")
    add("--minutes", type=float, default=10)
    add("--seed", type=int, default=0)
    add("--bits", choices=BOUNDS, default="8", help="of keys and of values (default 8); 16: the stock cache, a control")
    add("--bound", type=bound, metavar="MEAN,TOKEN", help="nats; default: 0.05,0.3; 0.4,2.5 for 4 bits")
    add("--sessions", type=int, default=24, help="that go on side by side (default 24)")
    add("--parallel", type=int, default=12, help="requests at a time (default 12)")
    add("--turns", type=int, default=30, help="of a session (default 30)")
    add("--context", type=int, default=768, help="tokens of a session at most (default 768)")
    add("--check-rows", type=int, default=64, help="that each step compares with their checksums (default 64)")
    add("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='more of them: --server-args="--a --b"')
    add("--log", type=Path, help="keep the server's log there")
    add(
        "--far", type=Path, metavar="JSONL", help="keep the texts of the farthest tokens there, to be looked at by hand"
    )
    add("--commit", help="commit to record, where there is no git")
    add("--out", type=Path, required=True, metavar="JSON")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes}: a number above 0 is needed")
    try:
        args.plan = Plan.of(args.context, args.turns, args.parallel, args.sessions)
    except PlanError as e:
        parser.error(str(e))
    return args


def server_arguments(args: argparse.Namespace) -> list[str]:
    plan = args.plan
    packed = ["--kv-quant=blockgtq", *(f"--kv-quant-{side}-bits={args.bits}" for side in "kv")]
    packed.append(f"--kv-quant-check-rows={args.check_rows}")
    return [
        f"--device={args.device}",
        f"--dtype={args.dtype or ('bfloat16' if args.device == 'cuda' else 'float32')}",
        f"--random-seed={args.seed}",
        *(packed if args.bits != STOCK else []),
        f"--max-total-tokens={plan.pool}",
        f"--chunked-prefill-size={min(2048, plan.context // 2)}",
        *(["--mem-fraction-static=0.8"] if args.device == "cpu" else []),  # of what is free while others come and go
        *args.server_args,
    ]


class Run:
    """The phases, and what is known so far."""

    def __init__(self, args: argparse.Namespace, server: Server, text: list[int], last: int):
        self.args, self.server = args, server
        self.load = Load(server.url, args.plan, args.seed, text)
        self.replay = Replay(server.url, args.bound or BOUNDS[args.bits], last)
        self.calm: Replay | None = None
        self.flushes = 0
        self._took = {False: 0.0, True: 0.0}  # seconds of load without and with a rush, as seen last
        self.begin = time.monotonic()
        self.end = self.begin + 60 * args.minutes
        self._stop = threading.Event()

    @property
    def errors(self) -> list[str]:
        out = [*self.load.errors, *self.replay.errors]
        return out + [f"the server ended with {code}"] if (code := self.server.process.poll()) is not None else out

    def go(self) -> None:
        """All phases, in time; they end early where something has failed."""
        printer = threading.Thread(target=self._print, daemon=True)
        printer.start()
        try:
            self._calm()
            length = (self.end - time.monotonic()) / ROUNDS
            while not self.errors and self._time_left() > self._took[False]:
                for rush in (False, True):
                    self._play(min(length * 0.35, self._time_left()), rush)
                self._read()
            self.load.close()
            self._read()
        finally:
            self._stop.set()
            printer.join()

    def _calm(self) -> None:
        """What an answer's log-probabilities move by without pressure, and how fast a prompt is read."""
        alone = Plan.of(self.args.context, self.args.turns, 2, 2)
        load = Load(self.server.url, alone, self.args.seed + 1, self.load.text)
        load.play(time.monotonic() + 0.05 * (self.end - self.begin))
        load.close()
        self.load.errors += load.errors
        self.calm = Replay(self.server.url, self.replay.bound, self.replay.last)
        self.calm.read(load.ready, 1)
        self.replay.outliers += [f"without pressure: {text}" for text in self.calm.outliers]
        self.replay.errors += self.calm.errors
        self.replay.prompt_tokens, self.replay.seconds = self.calm.prompt_tokens, self.calm.seconds
        self._flush()

    def _time_left(self) -> float:
        """Seconds of load, if all is to be read again in time."""
        reading = SPARE * self.load.waiting() / self.replay.rate
        return self.end - time.monotonic() - reading - 0.02 * (self.end - self.begin)

    def _play(self, seconds: float, rush: bool) -> None:
        stop = time.monotonic() + seconds
        while not self.errors and (begin := time.monotonic()) < stop and self._time_left() > self._took[rush]:
            self.load.play(min(stop, begin + max(5, seconds / 4)), rush)
            self._took[rush] = time.monotonic() - begin

    def _read(self) -> None:
        if self.errors:
            return
        self._flush()
        ready, self.load.ready = self.load.ready, []
        self.replay.read(ready, self.args.parallel)
        if not self.errors:
            self._flush()

    def _flush(self) -> None:
        if self.errors:
            return
        try:
            Client(self.server.url).flush()
        except Exception as e:
            self.load.errors.append(f"flush: {type(e).__name__}: {e}")
        self.flushes += 1

    def _print(self) -> None:
        while not self._stop.wait(EVERY):
            counts, replay = self.load.counts, self.replay
            said = ", ".join(f"{counts[name]} {name}" for name in ("turns", "retractions", "aborts", "timeouts"))
            read = f"{replay.tokens} tokens read again, {len(replay.outliers)} outliers"
            print(f"{time.monotonic() - self.begin:5.0f} s  {said}; {read}", flush=True)

    def summary(self) -> dict:
        log = self.server.output()
        compared = [int(n) for n in re.findall(r"blockgtq: (\d+) rows of each layer compared: all are", log)]
        names = ("requests", "turns", "sessions", "retractions", "retracted requests", "aborts", "timeouts")
        names += ("requests of several answers", "answers by a grammar", "grammars that ended")
        names += ("answers", "answer tokens", "prompt tokens", "cached tokens")
        return {
            **{name: self.load.counts[name] for name in names},
            "flushes": self.flushes,
            "rows compared": sum(compared) if self.args.check_rows and self.args.bits != STOCK else None,
            "answers replayed": len(self.replay.gaps),
            "tokens replayed": self.replay.tokens,
            "last ids of the vocabulary read": self.replay.renamed,
            "gap, nats": spread(self.replay.gaps),
            "tokens farther off than, nats": {str(nats): self.replay.far[nats] for nats in FAR},
            "likely ones of them": {str(nats): self.replay.likely[nats] for nats in FAR},
            "farthest": self.replay.shown[:MOST_SHOWN],
            "worst token, nats": round(self.replay.worst, 4),
            "its log-probabilities": self.replay.pair,
            "gap without pressure, nats": spread(self.calm.gaps) if self.calm else None,
            "worst token without pressure, nats": round(self.calm.worst, 4) if self.calm else None,
            "seconds": round(time.monotonic() - self.begin, 1),
        }


def spread(gaps: list[float]) -> dict[str, float] | None:
    """Of answers' means."""
    if len(gaps) < 2:
        return None
    hundredths = quantiles(gaps, n=100, method="inclusive")
    found = {"mean": fmean(gaps), "p50": hundredths[49], "p99": hundredths[98], "max": max(gaps)}
    return {name: round(value, 5) for name, value in found.items()}


def failures(run: Run, found: dict) -> list[str]:
    """What the run has against the server; empty if it is well."""
    log, out = run.server.output(), [*run.errors]
    out += [f"farther from its cold reading than {run.replay.bound}: {text}" for text in run.replay.outliers]
    far, tokens = run.replay.far[MANY], run.replay.tokens
    if not run.replay.bound.allows_far(far, tokens):
        out.append(f"{far} of {tokens} tokens are farther than {MANY:g} nats from their cold reading")
    out += [f"{line[:300]}" for line in log.splitlines() if re.search(r"leak detected|DamagedRow", line)]
    free = re.findall(r"blockgtq_soak: (\d+) of (\d+) slots are free", log)
    out += [f"{n} of {size} slots were free after a flush" for n, size in free if n != size]
    if len(free) != run.flushes:
        out.append(f"{run.flushes} flushes, of which the server did {len(free)}")
    return out + [f"nothing is shown of {name}: there were none" for name in MUST_HAPPEN if found[name] == 0]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    if wrong := missing_plugin(["--kv-quant=blockgtq"]):
        print(wrong, file=sys.stderr)
        return 2
    import torch
    from transformers import AutoConfig, AutoTokenizer

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text = AutoTokenizer.from_pretrained(args.model)((files("sglang") / "test" / "long_prompt.txt").read_text())
    ids = text["input_ids"] * (1 + 8 * args.context // len(text["input_ids"]))
    last = AutoConfig.from_pretrained(args.model).get_text_config().vocab_size - 1
    # What SGLang expects an answer to need when it lets a request in: a turn's tokens. Else it would keep a place for
    # each token of an answer that has a fixed length, and never retract one.
    estimate = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": str(args.plan.essay[0])}
    env = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"} | estimate | plugin_path(WATCH)
    arguments = server_arguments(args)
    try:
        with Server(args.model, *arguments, log=args.log, env=env) as server:
            server.wait()
            run = Run(args, server, ids, last)
            run.go()
            found = run.summary()
            wrong = failures(run, found)
            info = None if run.errors else server.info().get("kv_quant")
    except ServerError as e:
        print(e, file=sys.stderr)
        return 1
    command = "python -m benchmarks.soak " + shown(shlex.join(sys.argv[1:] if argv is None else argv))
    made = provenance(command, args.commit) | {"server_args": [shown(x) for x in arguments]}
    made |= {"server_env": estimate, "plan": vars(args.plan)}
    if info:
        made["table"] = {name: info[name] for name in ("k_bits", "v_bits", "allocator", "bytes_per_token")}
    bounds = {name: value for name, value in vars(run.replay.bound).items() if value != math.inf}
    record = made | {"bound, nats": bounds, "found": found, "failures": [shown(x) for x in wrong[:50]]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    if args.far:
        args.far.write_text("".join(json.dumps(text) + "\n" for text in run.replay.texts[:MOST_SHOWN]))
    for name, value in found.items():
        print(f"{name:>36}  {value}")
    for text in wrong[:20]:
        print(f"FAILED: {text}", file=sys.stderr)
    print("failed" if wrong else "passed", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
