"""How long a real server takes: decode step, prefill, extension of a cached prefix, start-up.

    python -m benchmarks.server_steps --out benchmarks/results/server_steps_h100.csv \\
        --model qwen2.5-3b --method bf16-fa3 blockgtq-k3v3

Every method is a server of its own, asked one request at a time. Prompts are random token ids, the same for every
method; answers are greedy and of a fixed length. Columns ms and tokens_per_s, by measure:
    decode_step  median time between two tokens of a streamed answer after a prompt of input_tokens, the first 8
                 left out; tokens generated per second
    prefill      median time to the first token of a fresh prompt: two of them, three when the two differ by more
                 than 3 %; prompt tokens per second
    extend       median of three times to the first token of a cached prefix of cached_tokens and new tokens,
                 input_tokens together; new tokens per second
    forward      with --forwards: of those, what the forward pass took the GPU, the median; the rest is the way of the
                 prompt's ids to it, which differs from server to server
    start        launch until the server answered its first request (start_s repeats it on every row)
    table        part of the start that getting the allocation table took: calibration, unless the note says otherwise
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

from .launch import Server, ServerError, Stream, plugin_path, shown, wait_for
from .models import Model, add_models, check_models, with_ready


@dataclass(frozen=True)
class Method:
    k_bits: float
    v_bits: float
    args: tuple[str, ...]


METHODS = {
    "bf16-fa3": Method(16, 16, ("--attention-backend=fa3",)),
    "bf16-flashinfer": Method(16, 16, ("--attention-backend=flashinfer",)),
    "fp8-fa3": Method(8, 8, ("--attention-backend=fa3", "--kv-cache-dtype=fp8_e4m3")),
    "blockgtq-k3v3": Method(3, 3, ("--kv-quant=blockgtq", "--kv-quant-preset=balanced")),
    "blockgtq-k2v2": Method(2, 2, ("--kv-quant=blockgtq", "--kv-quant-k-bits=2", "--kv-quant-v-bits=2")),
    "blockgtq-uniform-k3v3": Method(
        3, 3, ("--kv-quant=blockgtq", "--kv-quant-preset=balanced", "--kv-quant-allocator=uniform")
    ),
}
LENGTHS = (8192, 32768, 131072)
CHUNK = 8192  # prefill tokens of one forward pass; SGLang's default on 80 GB
DECODE_TOKENS, DROPPED = 120, 8
EXTEND_TOKENS, EXTENDS = 512, 3
AGREE = 1.03  # two fresh prompts further apart than this ask for a third
TOKEN_IDS = range(100, 32000)  # every model's vocabulary has them
PACKAGES = ("torch", "triton", "sglang", "sglang-kernel", "flashinfer-python", "transformers", "sglang-blockgtq")
WATCH = Path(__file__).parent / "watch_forwards"
#: name -> pattern over a server's log, seconds as its group
PHASES = {
    "weights": r"Load weight end\. elapsed=([\d.]+) s",
    "prefill_graphs": r"Capture [^\n]*\bend\. elapsed=([\d.]+) s",
    "decode_graphs": r"Capture [^\n]*\bend\. bs=[^\n]*?elapsed=([\d.]+) s",
}

COLUMNS = (
    *("model", "method", "k_bits", "v_bits", "batch", "input_tokens", "cached_tokens"),
    *("measure", "ms", "tokens_per_s", "start_s", "kv_tokens", "note"),
)


@dataclass
class Row:
    """One line of the CSV. kv_tokens: tokens that the server's cache holds."""

    model: str
    method: str
    measure: str
    ms: float
    start_s: float
    batch: int = 1
    input_tokens: int | None = None
    cached_tokens: int | None = None
    tokens_per_s: float | None = None
    kv_tokens: int | None = None
    note: str = ""

    def fields(self) -> dict:
        method = METHODS[self.method]
        values = {**asdict(self), "k_bits": method.k_bits, "v_bits": method.v_bits}
        shown = {name: "" if values[name] is None else values[name] for name in COLUMNS}
        return {name: f"{v:.5g}" if isinstance(v, float) else v for name, v in shown.items()}


class Record:
    """The CSV and the JSON beside it, rewritten after every change, so that a run cut short keeps what it measured."""

    def __init__(self, out: Path, meta: dict, columns: Sequence[str] = COLUMNS):
        self.out, self.meta, self.columns, self.rows = out, meta, columns, []
        out.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        fields = row.fields()
        print(" ".join(str(fields[name]) for name in self.columns if fields[name] != ""), flush=True)
        self.write()

    def write(self) -> None:
        scratch = self.out.with_name(f".{self.out.name}.{os.getpid()}")
        with scratch.open("w", newline="") as f:
            writer = csv.DictWriter(f, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row.fields() for row in self.rows)
        scratch.replace(self.out)
        self.out.with_suffix(".json").write_text(json.dumps(self.meta, indent=1) + "\n")


class Budget:
    """Seconds left of those that the user allowed."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def timeout(self) -> float:
        """What a request may take. TimeoutError when nothing is left."""
        if self.left <= 0:
            raise TimeoutError("the budget is spent")
        return self.left


def prompt(seed: str, tokens: int) -> list[int]:
    return random.Random(seed).choices(TOKEN_IDS, k=tokens)


def samples(seconds: list[float]) -> str:
    return "samples " + " ".join(f"{1e3 * s:.5g}" for s in seconds)


def fresh(server: Server, ids: list[int], new: int, budget: Budget) -> Stream:
    """The answer to a prompt of which nothing is cached."""
    server.flush()
    stream = server.stream(ids, new, budget.timeout())
    if stream.cached_tokens:
        raise ServerError(f"{stream.cached_tokens} tokens of a fresh prompt of {len(ids)} came from the cache")
    return stream


def measure_length(server: Server, tokens: int, args: argparse.Namespace, budget: Budget, add) -> None:
    """Prefill, decode step and extension at one context length; ``add(measure, seconds, ...)`` for each."""
    first = [fresh(server, prompt(f"{tokens} 1", tokens), 1, budget).first]
    ids = prompt(f"{tokens} 0", tokens)
    answer = fresh(server, ids, args.decode_tokens, budget)  # stays cached for the extensions
    first.append(answer.first)
    gaps = answer.gaps(DROPPED)
    step = median(gaps)
    deciles = quantiles(gaps, n=10, method="inclusive")
    spread = f"p10 {1e3 * deciles[0]:.4g} p90 {1e3 * deciles[-1]:.4g} of {len(gaps)}"
    add("decode_step", step, tokens_per_s=1 / step, note=spread, input_tokens=tokens, cached_tokens=0)

    extended = []
    for i in range(EXTENDS):
        stream = server.stream(ids + prompt(f"{tokens} extend {i}", args.extend_tokens), 1, budget.timeout())
        if not 0.9 * tokens <= stream.cached_tokens <= tokens:
            raise ServerError(f"{stream.cached_tokens} of {tokens} tokens of a prefix came from the cache")
        extended.append(stream)
    seconds = median(s.first for s in extended)
    new = tokens + args.extend_tokens - extended[0].cached_tokens
    add(
        "extend",
        seconds,
        tokens_per_s=new / seconds,
        input_tokens=tokens + args.extend_tokens,
        cached_tokens=extended[0].cached_tokens,
        note=samples([s.first for s in extended]),
    )
    if max(first) > AGREE * min(first):
        first.append(fresh(server, prompt(f"{tokens} 2", tokens), 1, budget).first)
    seconds = median(first)
    note = samples(first)
    add("prefill", seconds, tokens_per_s=tokens / seconds, input_tokens=tokens, cached_tokens=0, note=note)
    if args.forwards:
        fresh(server, prompt("later", DROPPED), 1, budget)  # a pass is told of once a later one begins
        passes = forwards(server.output(), new, tokens + args.extend_tokens)[-EXTENDS:]  # the warm-up may have one
        if not passes:
            raise ServerError("--forwards: the server told of no forward pass that extends; it needs a GPU")
        where = {"input_tokens": tokens + args.extend_tokens, "cached_tokens": extended[0].cached_tokens}
        add("forward", median(passes), tokens_per_s=new / median(passes), **where, note=samples(passes))


def warm_up(server: Server, args: argparse.Namespace, budget: Budget) -> None:
    """Two chunks and a bit, then an extension: kernels that start-up did not compile are compiled now."""
    tokens = min(max(args.lengths), 2 * CHUNK + 1024)
    ids = prompt("warm up", tokens)
    fresh(server, ids, DROPPED, budget)
    server.stream(ids + prompt("warm up, extended", args.extend_tokens), 1, budget.timeout())


def phases(log: str) -> dict[str, float]:
    """Seconds of the start-up's parts that the server logs."""
    return {name: float(found[-1]) for name, pattern in PHASES.items() if (found := re.findall(pattern, log))}


def forwards(log: str, new: int, total: int) -> list[float]:
    """Seconds on the GPU of the passes of ``new`` tokens of ``total`` that :mod:`.watch_forwards` has logged."""
    return [float(ms) / 1e3 for ms in re.findall(rf"blockgtq_forwards: {new} tokens of {total} in ([\d.]+) ms", log)]


def measure_server(
    model: Model, method: str, server: Server, args: argparse.Namespace, budget: Budget, record: Record, note: str
) -> None:
    """Every row of a server that answers. TimeoutError, ServerError and OSError leave the rest unmeasured."""
    info = server.info()
    kv_tokens = info.get("max_total_num_tokens")
    packed = info.get("kv_quant")
    record.meta["servers"][f"{model.name}/{method}"] = {
        "args": shown(shlex.join(method_args(model, method, args))),
        "start_s": round(server.start_s, 1),
        "phases_s": phases(server.output()),
        **({"kv_quant": packed} if packed else {}),
    }

    def add(measure: str, seconds: float, **values) -> None:
        record.add(
            Row(model.name, method, measure, 1e3 * seconds, start_s=server.start_s, kv_tokens=kv_tokens, **values)
        )

    add("start", server.start_s, note=note)
    if packed:
        origin = "" if packed["table_origin"] == "calibrated" else f"table from {packed['table_origin']}"
        add("table", packed["table_seconds"], note=origin)
    warm_up(server, args, budget)
    for tokens in args.lengths:
        measure_length(server, tokens, args, budget, add)


def method_args(model: Model, method: str, args: argparse.Namespace) -> list[str]:
    """Server arguments; those of the user come last and win."""
    context = max(args.lengths) + max(args.decode_tokens, args.extend_tokens + 1) + 64
    out = [*model.args, f"--context-length={context}", f"--chunked-prefill-size={CHUNK}", *METHODS[method].args]
    if args.quick_graphs:
        # The sizes that are measured; SGLang's default list has them among many more.
        out += ["--cuda-graph-max-bs-decode=8", "--cuda-graph-bs-prefill", str(args.extend_tokens), str(CHUNK)]
    if args.together:
        # Room for the prefix, its answer and the extensions; the default would take all memory there is.
        out += [f"--max-total-tokens={context + (EXTENDS + 1) * args.extend_tokens + CHUNK}"]
    return [*out, *args.server_args]


def summary(what: str) -> str:
    """An error's first line and the last exception of the server's words below it."""
    first, *rest = what.splitlines()
    raised = [line.strip() for line in rest if re.match(r"\s*[\w.]*(Error|Exception|Interrupt)\b", line)]
    return " ".join([first, *raised[-1:]])


def measure_group(
    model: Model, methods: list[str], args: argparse.Namespace, budget: Budget, record: Record, failed: dict[str, str]
) -> None:
    """Servers that start at the same time and are measured one after another."""
    with ExitStack() as stack:
        servers = {}
        for method in methods:
            log = args.log_dir / f"{model.name}_{method}.log" if args.log_dir else None
            env = plugin_path(WATCH) if args.forwards else {}
            server = Server(model.path, *method_args(model, method, args), log=log, env=env)
            servers[method] = stack.enter_context(server)
        broken = wait_for(servers.values(), budget.left)
        note = f"started together with {len(methods) - 1} more" if len(methods) > 1 else ""
        for method, server in servers.items():
            try:
                if server in broken:
                    raise broken[server]
                measure_server(model, method, server, args, budget, record, note)
            except (ServerError, OSError) as e:  # requests' and socket errors, time-outs included, are OSErrors
                what = str(e) or type(e).__name__
                if budget.left > 0:  # else it was only cut off
                    failed[f"{model.name}/{method}"] = summary(what)
                print(f"{model.name}/{method}: {what}", file=sys.stderr, flush=True)
            server.stop()  # its memory is free for those that follow


def missing(args: argparse.Namespace, rows: list[Row]) -> list[str]:
    """MODEL/METHOD/MEASURE/TOKENS that were asked for and not measured."""
    done = {(r.model, r.method, r.measure, r.input_tokens) for r in rows}
    out = []
    for model in args.model:
        for method in args.method:
            for tokens in args.lengths:
                for measure in ("decode_step", "extend", "prefill", *(["forward"] if args.forwards else [])):
                    shown = tokens + args.extend_tokens if measure in ("extend", "forward") else tokens
                    if (model.name, method, measure, shown) not in done:
                        out.append(f"{model.name}/{method}/{measure}/{shown}")
    return out


def gpu() -> dict[str, str]:
    """Name and driver of the first GPU; empty without one. Asks nvidia-smi: this process takes no GPU memory."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(("name", "driver"), found.stdout.strip().split(", "), strict=False)) if not found.returncode else {}


def provenance(command: str, head: str | None) -> dict:
    """What someone needs to make the same files again. head: the commit, None to ask git."""
    if head is None:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        head = git.stdout.strip()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"command": command, "commit": head, "date": date, "gpu": gpu(), "versions": versions}


def lengths(text: str) -> list[int]:
    """``8192,32768`` to ascending ints. ArgumentTypeError for anything else."""
    try:
        out = sorted({int(part) for part in text.split(",")})
    except ValueError:
        out = [0]
    if out[0] < 1:
        raise argparse.ArgumentTypeError(f"{text}: numbers of tokens are needed, as in 8192,32768")
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="CSV to write; a .json of the same name tells how")
    add_models(parser)
    add("--method", nargs="+", choices=METHODS, required=True)
    add("--lengths", type=lengths, default=list(LENGTHS), metavar="N,N", help="context lengths, default 8K, 32K, 128K")
    add("--decode-tokens", type=int, default=DECODE_TOKENS, help=f"of a streamed answer (default {DECODE_TOKENS})")
    add("--extend-tokens", type=int, default=EXTEND_TOKENS, help=f"on a cached prefix (default {EXTEND_TOKENS})")
    add("--quick-graphs", action="store_true", help="capture graphs only of the sizes that are measured")
    add("--together", action="store_true", help="start a model's servers at once; each then gets a small cache")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='for every server: --server-args="--a --b"')
    add("--forwards", action="store_true", help="time the forward passes of extensions on the GPU, too")
    add("--budget", type=float, default=3600, help="seconds for everything (default 3600)")
    add("--log-dir", type=Path, help="keep the servers' logs here")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if args.decode_tokens < DROPPED + 3:
        parser.error(
            f"--decode-tokens {args.decode_tokens}: the first {DROPPED} are dropped; {DROPPED + 3} is the least"
        )
    if args.extend_tokens < 1:
        parser.error(f"--extend-tokens {args.extend_tokens}: 1 is the least")
    check_models(parser, args.model)
    args.method = list(dict.fromkeys(args.method))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    asked = (arg for method in args.method for arg in METHODS[method].args)
    return with_ready(args, argv, asked, measure)


def measure(args: argparse.Namespace, words: list[str]) -> int:
    """Everything that was asked for, of models that have a path."""
    budget, started = Budget(args.budget), time.monotonic()
    command = "python -m benchmarks.server_steps " + shown(shlex.join(words))
    record = Record(args.out, provenance(command, args.commit) | {"servers": {}})
    record.write()
    failed: dict[str, str] = {}
    try:
        for model in args.model:
            for methods in [args.method] if args.together else [[m] for m in args.method]:
                # No server is started that, as the others went, would be ready only when the time is over.
                if budget.left > min((row.start_s for row in record.rows), default=0):
                    measure_group(model, methods, args, budget, record, failed)
    finally:
        record.meta |= {"failed": failed, "not_measured": missing(args, record.rows)}
        record.meta["seconds"] = round(time.monotonic() - started, 1)
        record.write()
    left_out = record.meta["not_measured"]
    print(f"{len(record.rows)} rows in {args.out}, {len(left_out)} measurements missing, {record.meta['seconds']} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
