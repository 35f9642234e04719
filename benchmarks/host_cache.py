"""Time to the first token behind a long prefix that is nowhere, in the GPU's cache, or in host memory (HiCache).

    python -m benchmarks.host_cache --out benchmarks/results/host_cache_h200.csv \\
        --model qwen2.5-3b llama-3.1-8b --method bf16-fa3 blockgtq-k3v3 --quick-graphs

Every method is a server of its own with as many bytes of host memory as the others, asked one request at a time: a
prefix of random tokens, the same for every method, and a question behind it, another one each time. Rows, by came:
    cold    a fresh prompt
    device  the prefix is in the GPU's cache
    host    other prompts have pushed it out of there, and it is loaded from host memory
ttft_ms is the median of several, after one that does not count. Every row says what the server's host memory holds, by
its log: host_gb, host_tokens, host_bytes (of a token). apart, of host rows: mean difference of log-probability between
the question's tokens behind the prefix from host memory and from the GPU's cache; the same bytes give 0 but for
noise. A prefix that did not come from where it should is an error.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from .launch import Server, ServerError, Stream, shown, wait_for
from .models import Model, add_models, check_models, with_ready
from .server_steps import CHUNK, Budget, Record, fresh, prompt, provenance, samples, summary
from .serving.configs import SERVERS

TOKENS, QUESTION, REPEATS = 32768, 128, 3
PAGE = 64  # tokens, of HiCache; the default beside a packed cache
HOST_GB = 24
HOST_POOL = r"Allocating \w+ hierarchical KV host pool: (\d+) tokens, ([\d.]+) GB host memory"
COLUMNS = (
    *("model", "method", "k_bits", "v_bits", "came", "tokens", "question", "ttft_ms", "cached_tokens"),
    *("apart", "host_tokens", "host_bytes", "host_gb", "device_tokens", "start_s", "note"),
)


@dataclass
class Row:
    """One line of the CSV."""

    model: str
    method: str
    came: str
    tokens: int
    question: int
    ttft_ms: float
    cached_tokens: int
    host_tokens: int
    host_gb: float
    device_tokens: int
    start_s: float
    apart: float | None = None
    note: str = ""

    def fields(self) -> dict:
        bits = SERVERS[self.method]
        more = {"k_bits": bits.k_bits, "v_bits": bits.v_bits, "host_bytes": 1e9 * self.host_gb / self.host_tokens}
        values = {**asdict(self), **more}
        return {n: "" if values[n] is None else f"{values[n]:.5g}" if isinstance(values[n], float) else values[n]
                for n in COLUMNS}  # fmt: skip


def pool_tokens(args: argparse.Namespace) -> int:
    """Of the GPU's cache: small, so that few prompts push a prefix out."""
    return -(-(2 * (args.tokens + args.question) + CHUNK) // PAGE) * PAGE


def others(args: argparse.Namespace) -> list[list[int]]:
    """Prompts that fill the GPU's cache, and one more."""
    return [prompt(f"other {i}", args.tokens) for i in range(pool_tokens(args) // args.tokens + 1)]


def server_args(model: Model, method: str, args: argparse.Namespace) -> list[str]:
    """Those of the user come last and win."""
    out = [*model.args, f"--context-length={args.tokens + args.question + 64}", f"--chunked-prefill-size={CHUNK}"]
    out += [*SERVERS[method].args, f"--max-total-tokens={pool_tokens(args)}", "--enable-cache-report"]
    out += ["--enable-hierarchical-cache", f"--hicache-size={args.host_gb}", f"--page-size={PAGE}"]
    if args.quick_graphs:
        out += ["--cuda-graph-max-bs-decode=8", "--cuda-graph-bs-prefill", str(args.question), str(CHUNK)]
    return [*out, *args.server_args]


def host_pool(log: str) -> tuple[int, float]:
    """(tokens, GB) of the host memory that a server says it has. ServerError where it says nothing."""
    found = re.findall(HOST_POOL, log)
    if not found:
        raise ServerError("the server's log says nothing of a host pool")
    return int(found[-1][0]), float(found[-1][1])


def expect(stream: Stream, place: str, tokens: int) -> Stream:
    """The same, if nine tenths of the prefix, at least, came from ``place``. ServerError."""
    if stream.came.get(place, 0) < 0.9 * tokens:
        raise ServerError(f"of a prefix of {tokens} tokens in {place} memory came {stream.came or 'none'}")
    return stream


def question_behind(server: Server, ids: list[int], seed: str, args: argparse.Namespace) -> list[float]:
    return server.logprobs(ids + prompt(seed, args.question), len(ids))[0]


def measure_server(model: Model, method: str, server: Server, args: argparse.Namespace, budget: Budget, record) -> None:
    """Three rows of a server that answers. TimeoutError, ServerError and OSError leave the rest unmeasured."""
    info, (host_tokens, host_gb) = server.info(), host_pool(server.output())
    packed = info.get("kv_quant")
    record.meta["servers"][f"{model.name}/{method}"] = {
        "args": shown(shlex.join(server_args(model, method, args))),
        "start_s": round(server.start_s, 1),
        **({"kv_quant": packed} if packed else {}),
    }
    rest = others(args)
    if (needed := (len(rest) + 1) * (args.tokens + args.question * (args.repeats + 2))) > host_tokens:
        raise ServerError(f"host memory holds {host_tokens} tokens, {needed} are needed: use a larger --host-gb")
    ids = prompt("prefix", args.tokens)

    def ask(seed: str) -> Stream:
        return server.stream(ids + prompt(seed, args.question), 1, budget.timeout())

    def push_out() -> None:
        for other in rest:
            server.stream(other, 1, budget.timeout())

    def add(came: str, streams: list[Stream], **values) -> None:
        first = [stream.first for stream in streams[1:]]
        record.add(
            Row(
                model.name,
                method,
                came,
                args.tokens,
                args.question,
                1e3 * median(first),
                streams[-1].cached_tokens,
                host_tokens,
                host_gb,
                info.get("max_total_num_tokens"),
                server.start_s,
                note=samples(first),
                **values,
            )
        )

    counted = range(args.repeats + 1)
    cold = [fresh(server, prompt(f"cold {i}", args.tokens + args.question), 1, budget) for i in counted]
    add("cold", cold)
    fresh(server, ids, 1, budget)
    add("device", [expect(ask(f"device {i}"), "device", args.tokens) for i in counted])
    host = []
    for i in counted:
        push_out()
        host.append(expect(ask(f"host {i}"), "host", args.tokens))
    on_device = question_behind(server, ids, "compared", args)
    push_out()
    expect(ask("another"), "host", args.tokens)
    from_host = question_behind(server, ids, "compared", args)
    add("host", host, apart=fmean(abs(a - b) for a, b in zip(on_device, from_host, strict=True)))


def measure(args: argparse.Namespace, words: list[str]) -> int:
    """Everything that was asked for, of models that have a path."""
    budget, started = Budget(args.budget), time.monotonic()
    command = "python -m benchmarks.host_cache " + shown(shlex.join(words))
    record = Record(args.out, provenance(command, args.commit) | {"servers": {}}, COLUMNS)
    record.write()
    failed: dict[str, str] = {}
    try:
        for model in args.model:
            for method in args.method:
                if budget.left <= min((row.start_s for row in record.rows), default=0):
                    continue
                log = args.log_dir / f"{model.name}_{method}.log" if args.log_dir else None
                with Server(model.path, *server_args(model, method, args), log=log) as server:
                    try:
                        if broken := wait_for([server], budget.left):
                            raise broken[server]
                        measure_server(model, method, server, args, budget, record)
                    except (ServerError, OSError) as e:  # requests' and socket errors, time-outs included, are OSErrors
                        what = str(e) or type(e).__name__
                        if budget.left > 0:  # else it was only cut off
                            failed[f"{model.name}/{method}"] = summary(what)
                        print(f"{model.name}/{method}: {what}", file=sys.stderr, flush=True)
    finally:
        done = {(row.model, row.method, row.came) for row in record.rows}
        asked = [(m.name, method, came) for m in args.model for method in args.method
                 for came in ("cold", "device", "host")]  # fmt: skip
        record.meta |= {"failed": failed, "not_measured": ["/".join(one) for one in asked if one not in done]}
        record.meta["seconds"] = round(time.monotonic() - started, 1)
        record.write()
    print(f"{len(record.rows)} rows in {args.out}, {len(record.meta['not_measured'])} missing")
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="CSV to write; a .json of the same name tells how")
    add_models(parser)
    add("--method", nargs="+", choices=SERVERS, required=True)
    add("--tokens", type=int, default=TOKENS, help=f"of the prefix (default {TOKENS})")
    add("--question", type=int, default=QUESTION, help=f"tokens behind it (default {QUESTION})")
    add("--repeats", type=int, default=REPEATS, help=f"of each that count (default {REPEATS})")
    add("--host-gb", type=int, default=HOST_GB, help=f"host memory of a server, in 10^9 bytes (default {HOST_GB})")
    add("--quick-graphs", action="store_true", help="capture graphs only of the sizes that are measured")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='for every server: --server-args="--a --b"')
    add("--budget", type=float, default=3600, help="seconds for everything (default 3600)")
    add("--log-dir", type=Path, help="keep the servers' logs here")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    for name, least in (("tokens", PAGE), ("question", 2), ("repeats", 1), ("host_gb", 1)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name.replace('_', '-')} {value}: {least} is the least")
    check_models(parser, args.model)
    args.method = list(dict.fromkeys(args.method))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return with_ready(args, argv, (arg for method in args.method for arg in SERVERS[method].args), measure)


if __name__ == "__main__":
    sys.exit(main())
