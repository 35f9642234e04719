"""Servers of one model in several forms, and what becomes of their answers and speed.

    python -m benchmarks.variants --model FOLDER --out benchmarks/results/speculation_h200.csv \\
        --cache bf16="--attention-backend=fa3" k3v3="--kv-quant=blockgtq --kv-quant-preset=balanced" \\
        --variant plain ngram="--speculative-algorithm=NGRAM"

A server of each cache and variant, asked one after another; of each cache the first variant is the one that others are
compared with. Prompts are sources of Python's library, cut so that prompt and answer have the length; answers are
greedy. Columns, where they do not say it themselves:
    table          of the packed cache, its hash's beginning; tokens: that fit
    cold, warm     mean |difference of log-probability| from the first variant's cold answer, nats: of a prompt's last
                   tokens, cold and behind their cached beginning
    same           tokens of an answer that are the first variant's, the least of all prompts; of how many
    tie            where they part: how much less likely, for the first variant, the other token is, nats, at most
    accept         tokens of a verification step, the mean of all prompts
    tokens_per_s   behind an answer's first token, the median of all prompts
    first_s        seconds to the first token of a fresh prompt, the median of all prompts

--beside N adds a row to each of the first variants, called after it and N, as in plain+3: its own answers once more,
each while N other requests are being answered. Prompts are read alone as before, so only the batch of the steps is
another; where these answers part is what a server's rounding alone does.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import requests

from .compatibility.measure import ALONE
from .launch import Server, ServerError, exit_on_sigterm, missing_plugin, plugin_path, shown, wait_for
from .server_agreement import gap
from .server_steps import Record, lengths, provenance

COLUMNS = (
    *("cache", "variant", "input_tokens", "prompts", "table", "tokens", "cold", "warm", "same", "of", "tie"),
    *("accept", "tokens_per_s", "first_s", "start_s", "note"),
)
LAST = 64  # tokens of a prompt whose log-probabilities are compared
OTHER = 32  # tokens of a prompt that is answered beside another
TOP = 20  # tokens that are looked through where two answers part
SOURCES = ("argparse", "ast", "inspect", "pickle", "subprocess", "tarfile", "typing", "turtle", "doctest", "zipfile")


@dataclass(frozen=True)
class Named:
    """A name and the server arguments that it stands for."""

    name: str
    args: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Named:
        name, _, args = text.partition("=")
        if not name or name.startswith("-"):
            raise argparse.ArgumentTypeError(f'{text}: a name is needed, or name="--arguments of a server"')
        return cls(name, tuple(shlex.split(args)))


@dataclass(frozen=True)
class Answer:
    """One greedy answer. best: of each token the TOP likeliest in its place, with log-probabilities."""

    tokens: list[int]
    best: list[dict[int, float]]
    accept: float | None
    tokens_per_s: float
    first_s: float


def prompts(tokenizer: Path, tokens: int, count: int) -> list[list[int]]:
    """``count`` texts of so many tokens."""
    import importlib.util

    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(tokenizer)
    out = []
    for i in range(count):
        ids: list[int] = []
        for name in (SOURCES * 9)[i:]:
            spec = importlib.util.find_spec(name)
            ids += read(Path(spec.origin).read_text())["input_ids"]
            if len(ids) >= tokens:
                break
        out.append(ids[:tokens])
    return out


def answer(server: Server, ids: list[int], new: int) -> Answer:
    """Timed as a stream, then once more for what else was likely."""
    server.flush()
    stream = server.stream(ids, new)
    server.flush()
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": TOP,
    }
    response = requests.post(server.url + "/generate", json=body, timeout=1800)
    response.raise_for_status()
    meta = response.json()["meta_info"]
    last, made = stream.arrivals[-1]
    return Answer(
        tokens=[token for _, token, *_ in meta["output_token_logprobs"]],
        best=[{token: lp for lp, token, *_ in place} for place in meta["output_top_logprobs"]],
        accept=meta.get("spec_accept_length"),
        tokens_per_s=(made - stream.arrivals[0][1]) / (last - stream.first) if last > stream.first else float("nan"),
        first_s=stream.first,
    )


def parted(first: Answer, other: list[int]) -> tuple[int, float]:
    """How many tokens two answers begin with, and how much less likely the other's next one is to the first, nats: at
    least so much where it is not among the TOP."""
    same = next((i for i, (a, b) in enumerate(zip(first.tokens, other, strict=True)) if a != b), None)
    if same is None:
        return len(first.tokens), 0.0
    place = first.best[same]
    return same, max(place.values()) - place.get(other[same], min(place.values()))


def where_they_part(first: list[Answer], others: list[list[int]]) -> dict:
    both = [parted(a, b) for a, b in zip(first, others, strict=True)]
    return {"same": min(same for same, _ in both), "of": len(first[0].tokens), "tie": max(tie for _, tie in both)}


@contextmanager
def answering(server: Server, texts: Iterable[list[int]], new: int) -> Iterator[None]:
    """Within the context greedy answers to ``texts`` are being written, of at most ``new`` tokens; then they are given
    up. ServerError if one has ended before."""
    with ExitStack() as stack:
        threads, going = stack.enter_context(ThreadPoolExecutor()), []
        stack.callback(requests.post, server.url + "/abort_request", json={"abort_all": True}, timeout=60)
        for ids in texts:
            sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
            body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
            response = requests.post(server.url + "/generate", json=body, stream=True, timeout=1800)
            response.raise_for_status()
            lines = response.iter_lines()
            next(lines)  # it was read, and its answer begins
            going.append(threads.submit(list, lines))
        yield
        if any(other.done() for other in going):
            raise ServerError("what was to be answered beside a prompt was so before it")


def answered_beside(server: Server, ids: list[int], new: int, others: list[list[int]]) -> list[int]:
    """The tokens of an answer to ``ids`` while others are being answered. ServerError."""
    server.flush()
    with answering(server, others, 4 * new):
        meta = server.generate(ids, new)
    if meta["cached_tokens"]:  # read otherwise than alone
        raise ServerError(f"a prompt beside others shares {meta['cached_tokens']} tokens with them")
    return [token for _, token, *_ in meta["output_token_logprobs"]]


@dataclass(frozen=True)
class Seen:
    """Of a server at one length. cold, warm: log-probabilities of each prompt's last tokens."""

    cold: list[float]
    warm: list[float]
    answers: list[Answer]

    @classmethod
    def of(cls, server: Server, texts: list[list[int]], new: int) -> Seen:
        cold, warm = [], []
        for ids in texts:
            start = len(ids) - LAST
            server.flush()
            cold += server.logprobs(ids, start)[0]
            server.flush()
            server.generate(ids[:start])
            warm += server.logprobs(ids, start)[0]
        return cls(cold, warm, [answer(server, ids, new) for ids in texts])

    def beside(self, first: Seen) -> dict:
        accepts = [a.accept for a in self.answers if a.accept]
        return {
            "cold": gap(self.cold, first.cold),
            "warm": gap(self.warm, first.cold),
            **where_they_part(first.answers, [a.tokens for a in self.answers]),
            "accept": fmean(accepts) if accepts else "",
            "tokens_per_s": median(a.tokens_per_s for a in self.answers),
            "first_s": median(a.first_s for a in self.answers),
        }


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    values: dict

    def fields(self) -> dict:
        cells = {name: self.values.get(name, "") for name in COLUMNS}
        return {name: f"{x:.5g}" if isinstance(x, float) else x for name, x in cells.items()}


@contextmanager
def started(args: argparse.Namespace, servers: list[tuple[Named, Named]]) -> Iterator[dict[tuple[str, str], Server]]:
    """All at once; they share the GPUs, and each sizes its cache as if it were alone there."""
    env = plugin_path(ALONE)
    with ExitStack() as stack:
        out = {}
        for cache, variant in servers:
            name = f"{cache.name}_{variant.name}"
            words = [*args.server_args, *cache.args, *variant.args]
            if args.share:
                words.append(f"--mem-fraction-static={args.share / len(servers):.4f}")
            log = args.logs / f"{name}.log" if args.logs else None
            server = Server(str(args.model), *words, log=log, env=env)
            out[cache.name, variant.name] = stack.enter_context(server)
        yield out


def measure(args: argparse.Namespace, record: Record) -> int:
    """How many servers failed."""
    pairs = [(cache, variant) for cache in args.cache for variant in args.variant]
    texts = {n: prompts(args.model, n, args.prompts) for n in args.lengths}
    others = [ids[::-1] for ids in prompts(args.model, OTHER, args.beside)]  # none begins as a prompt does
    failed = 0
    with started(args, pairs) as servers:
        broken = wait_for(servers.values(), args.start)
        firsts: dict[tuple[str, int], Seen] = {}
        for (cache, variant), server in servers.items():
            row = {"cache": cache, "variant": variant}
            try:
                if server in broken:
                    raise broken[server]
                info = server.info()
                row |= {"table": info.get("kv_quant", {}).get("table_hash", "")[:12], "start_s": server.start_s}
                row |= {"tokens": info["max_total_num_tokens"]}
                for n in args.lengths:
                    seen = Seen.of(server, texts[n], args.new)
                    first = firsts.setdefault((cache, n), seen)
                    row |= {"input_tokens": n, "prompts": args.prompts}
                    record.add(Row({**row, **seen.beside(first)}))
                    if args.beside and first is seen:
                        again = [answered_beside(server, ids, args.new, others) for ids in texts[n]]
                        named = {"variant": f"{variant}+{args.beside}"}
                        record.add(Row({**row, **named, **where_they_part(first.answers, again)}))
            except (ServerError, requests.RequestException, TimeoutError) as e:
                failed += 1
                lines = [line for line in str(e).splitlines() if "Error" in line or line.startswith("error:")]
                record.add(Row({**row, "note": shown((lines or str(e).splitlines())[-1])[:300]}))
            server.stop()
    return failed


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a model with its tokenizer")
    add("--out", type=Path, required=True, help="CSV to write; a .json of the same name tells how")
    add("--cache", type=Named.parse, nargs="+", required=True, metavar='NAME="ARGS"', help="server arguments")
    add("--variant", type=Named.parse, nargs="+", required=True, metavar='NAME="ARGS"', help="more; the first is plain")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='for every server: --server-args="--a --b"')
    add("--share", type=float, metavar="F", help="of a GPU's memory, for all servers together; default: SGLang's own")
    add("--lengths", type=lengths, default=[1000, 8000], metavar="N,N", help="tokens of a prompt; default: 1000,8000")
    add("--prompts", type=int, default=4, help="of each length (default 4)")
    add("--beside", type=int, default=0, metavar="N", help="the first variant's answers beside N others, too")
    add("--new", type=int, default=200, help="tokens of an answer (default 200)")
    add("--start", type=float, default=400, metavar="SECONDS", help="in which servers must start (default 400)")
    add("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs there")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if not (args.model / "tokenizer_config.json").exists():
        parser.error(f"--model {args.model}: no tokenizer_config.json there; name a model's folder")
    if min(args.lengths) <= LAST:
        parser.error(f"--lengths {min(args.lengths)}: more than {LAST} are needed, of which the last are compared")
    for name, value, least in (("--prompts", args.prompts, 1), ("--new", args.new, 2), ("--beside", args.beside, 0)):
        if value < least:
            parser.error(f"{name} {value}: {least} is the least")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    if wrong := missing_plugin([arg for cache in args.cache for arg in cache.args]):
        print(wrong, file=sys.stderr)
        return 2
    words = sys.argv[1:] if argv is None else argv
    command = "python -m benchmarks.variants " + shown(shlex.join(words))
    record = Record(args.out, provenance(command, args.commit), COLUMNS)
    return 1 if measure(args, record) else 0


if __name__ == "__main__":
    sys.exit(main())
