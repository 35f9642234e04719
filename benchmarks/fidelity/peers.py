"""Other caches beside this package's on the same tokens: KL of the answer against bytes, what stays exact counted.

``python -m benchmarks.fidelity peers --model-path MODEL --out peers.csv``
Each text is one sequence of ``--length`` tokens, every token reads keys and values as a server would decode it, its own
window included. ``kl_late`` is that of the second half, where windows of a few hundred tokens are a small part of what
is read. ``--append`` goes on with a file, for another model or after an interruption. ``--windows`` measures this
package alone, with other numbers of exact tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.device import device

from . import oscar, perplexity, run
from .exact import Exact, Mixed
from .hadamard import with_hadamard
from .kivi import Kivi
from .kvarn import SINK as KVARN_SINK
from .kvarn import TILE, Kvarn
from .lab import Lab
from .methods import Cast, Method, Packed, ScaledCast
from .model import capture
from .real_models import rows_before
from .record import command_of, commit, machine, sources
from .rows import Job, run_jobs, write_csv
from .saw import SawInt4

FP8 = torch.float8_e4m3fn
KIVI_RESIDUAL = 128  # tokens: of keys coded at once, of values that stay exact (arXiv 2402.02750, section 4)
#: K and V bits of template, by size
OURS = (
    *((2, 2), (2.5, 2), (2.5, 2.5), (3, 2), (3, 2.5), (3, 3), (3.5, 3), (4, 3), (4, 3.5), (4, 4)),
    *((4.5, 4), (5, 4), (5, 4.5), (5, 5), (5.5, 5)),
)
WINDOW = (Exact(oscar.SINK, oscar.RECENT),) * 2
TILES = (Exact(sink=KVARN_SINK, group=TILE),) * 2
RESIDUAL = Exact(group=KIVI_RESIDUAL), Exact(recent=KIVI_RESIDUAL)
#: Peer, its bits, what it keeps exact, and the bits of template that take no more bytes but for that.
WINDOWED = (
    ("oscar", (2, 2), WINDOW, (2, 2)),
    ("oscar-by-head", (2, 2), WINDOW, (2, 2)),
    ("kvarn", (2, 2), TILES, (2.5, 2)),
    ("kvarn", (4, 2), TILES, (3.5, 3)),
    ("kvarn", (4, 4), TILES, (4.5, 4)),
    ("kivi", (2, 2), RESIDUAL, (3, 2.5)),
    ("kivi", (4, 4), RESIDUAL, (5, 4.5)),
)
FIELDS = (
    *("model", "method", "k_bits", "v_bits", "exact_keys", "exact_values", "bytes", "bytes_at_length"),
    *("tokens", "ppl", "ppl_exact", "kl", "kl_late"),
)
SHORTEST = 1024  # tokens of --length: several tiles, and more than the widest window


@dataclass(frozen=True)
class Entry:
    """A cache to measure. exact: which keys and which values stay exact."""

    name: str
    k_bits: float
    v_bits: float
    exact: tuple[Exact, Exact] = (Exact(), Exact())

    @property
    def label(self) -> str:
        window = "" if self.exact == (Exact(), Exact()) else f" [{self.exact[0]}; {self.exact[1]}]"
        return f"{self.name} K{self.k_bits:g}V{self.v_bits:g}{window}"


def entries() -> Iterator[Entry]:
    """This package and casts, peers without a window, those with theirs, and this package with each of these."""
    yield Entry("exact", 32, 32)
    yield Entry("bf16", 16, 16)
    yield from (Entry("template", *pair) for pair in OURS)
    yield from (Entry(name, bits, bits) for name in ("uniform", "uniform-hadamard") for bits in (2, 3, 4))
    yield from (Entry(name, 8, 8) for name in ("fp8", "fp8-scaled"))
    yield from (Entry(name, 4, 4) for name in ("saw-int4", "saw-int4-kv"))
    yield from (Entry(name, *bits, exact) for name, bits, exact, _ in WINDOWED)
    yield from dict.fromkeys(Entry("template", *ours, exact) for *_, exact, ours in WINDOWED)
    yield from (Entry(name, *bits) for name, bits, *_ in WINDOWED if name.startswith("oscar"))


def windowed(windows: list[str]) -> Iterator[Entry]:
    """This package with so many first and last tokens exact, keys and values."""
    exact = [Exact(*map(int, window.split("+"))) for window in windows]
    yield from (Entry("template", *pair, (of, of)) for pair in OURS for of in exact)


def first_and_last(text: str) -> str:
    """FIRST+LAST of the command line."""
    parts = text.split("+")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: FIRST+LAST is needed, as in 4+32")
    return text


class Caches:
    """Methods of one model by their entries; what needs calibration is made when it is first asked for."""

    def __init__(self, lab: Lab):
        self.lab, self.subject = lab, lab.subject

    @cached_property
    def moments(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return oscar.calibrated(self.subject.model, self.subject.calibration_ids)

    @cached_property
    def largest(self) -> torch.Tensor:
        """``[layers, 2]``: largest magnitude of calibration keys and values."""
        got = [capture(self.subject.model, ids, [0]) for ids in self.subject.calibration_ids]
        layers = range(len(self.subject.rope))
        by_text = [[[float(x[i].abs().max()) for x in (part.k, part.v)] for i in layers] for part in got]
        return torch.tensor(by_text).amax(0)

    def _coded(self, entry: Entry) -> Method:
        dim, bits = self.subject.head_dim, entry.k_bits
        if entry.name in ("template", "uniform", "uniform-hadamard"):
            table = self.lab.table(entry.name.split("-")[0], bits, entry.v_bits)
            return Packed(with_hadamard(table) if "-" in entry.name else table, entry.name, self.lab.device)
        make: dict[str, Callable[[], Method]] = {
            "bf16": lambda: Cast("bf16", torch.bfloat16, dim, dim),
            "fp8": lambda: Cast("fp8", FP8, dim, dim),
            "fp8-scaled": lambda: ScaledCast("fp8-scaled", FP8, dim, dim, self.largest),
            "saw-int4": lambda: SawInt4(4, dim, dim),
            "saw-int4-kv": lambda: SawInt4(4, dim, dim, dim, True),
            "oscar": lambda: oscar.Oscar(dim, dim, self.moments, False),
            "oscar-by-head": lambda: oscar.Oscar(dim, dim, self.moments, True),
            "kvarn": lambda: Kvarn(int(bits), int(entry.v_bits), dim, dim),
            "kivi": lambda: Kivi(int(bits), dim, dim),
        }
        return make[entry.name]()

    def method(self, entry: Entry) -> Method | None:
        """None: the model's own cache."""
        if entry.name == "exact":
            return None
        coded, dim = self._coded(entry), self.subject.head_dim
        return coded if entry.exact == (Exact(), Exact()) else Mixed(coded, dim, dim, *entry.exact)


def sequences(lab: Lab, length: int, texts: int) -> list[list[int]]:
    """The first ``length`` tokens of the report and of as many sources as make ``texts``."""
    found = [lab.subject.ids[:length], *(list(t.sequences[0][:length]) for t in lab.texts if t.kind == "source")]
    if texts > len(found) or any(len(ids) < length for ids in found[:texts]):
        raise ValueError(f"--texts {texts} --length {length}: there are {len(found)} texts, some of them shorter")
    return found[:texts]


class Judge:
    """Measures caches on the same sequences."""

    def __init__(self, lab: Lab, name: str, scored: list[list[int]]):
        self.lab, self.name, self.scored, self.caches = lab, name, scored, Caches(lab)

    @cached_property
    def true(self) -> list[torch.Tensor]:
        return [perplexity.hidden_states(self.lab.model, ids, None) for ids in self.scored]

    def halves(self, method: Method | None) -> list[perplexity.Score]:
        """Scores of the first and the second half of the sequences."""
        out = [perplexity.Score(), perplexity.Score()]
        for ids, true in zip(self.scored, self.true, strict=True):
            hidden = true if method is None else perplexity.hidden_states(self.lab.model, ids, method)
            middle = len(ids) // 2
            for score, part in zip(out, (slice(0, middle + 1), slice(middle, None)), strict=True):
                same = true[part] if method is None else hidden[part]
                perplexity.add_score(score, self.lab.model, ids[part], same, same if method is None else true[part])
        return out

    @cached_property
    def exact_ppl(self) -> float:
        return perplexity.together(self.halves(None)).ppl

    def measure(self, entry: Entry) -> run.Row:
        """One line of the CSV."""
        method, length = self.caches.method(entry), len(self.scored[0])
        early, late = self.halves(method)
        score = perplexity.together([early, late])
        endless = 8.0 * self.lab.subject.head_dim if method is None else method.bytes_per_token_head
        row: run.Row = {"model": self.name, "method": entry.name, "k_bits": entry.k_bits, "v_bits": entry.v_bits}
        row |= {"exact_keys": str(entry.exact[0]), "exact_values": str(entry.exact[1]), "bytes": endless}
        row["bytes_at_length"] = endless if method is None else sum(method.sizes(length))
        row |= {"tokens": score.tokens, "ppl": score.ppl, "ppl_exact": self.exact_ppl}
        return row | {"kl": score.kl_final, "kl_late": late.kl_final}


def key(row: run.Row) -> tuple:
    """What tells the rows of a file apart."""
    bits = float(row["k_bits"]), float(row["v_bits"])
    return row["model"], row["method"], *bits, row["exact_keys"], row["exact_values"]


def figures(row: run.Row) -> str:
    return (
        f"{row['bytes']:6.1f} B, {row['bytes_at_length']:6.1f} here  ppl {row['ppl']:9.3f}  KL {row['kl']:.4f}"
        f"  late {row['kl_late']:.4f}"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.fidelity peers", description=__doc__)
    p.add_argument("--model-path", required=True, help="model folder")
    p.add_argument("--name", help="of the model in the CSV; default: its folder's")
    p.add_argument("--out", required=True, type=Path, help="CSV, a row as soon as it is measured; a .json tells how")
    p.add_argument("--append", action="store_true", help="go on with the file of --out")
    p.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--length", type=int, default=4096, help="tokens of a sequence (default 4096)")
    p.add_argument("--texts", type=int, default=2, help="sequences: the report, then Python sources (default 2)")
    p.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="method, bits or both: oscar, K3V3, 'kivi K2V2'"
    )
    p.add_argument(
        "--windows",
        nargs="+",
        type=first_and_last,
        default=[],
        metavar="FIRST+LAST",
        help="this package with so many exact tokens: 0+8 4+32",
    )
    p.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    p.add_argument("--calibration-text", help="calibration text; default: that of the server")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    every = list(windowed(args.windows) if args.windows else entries())
    rows = [e for e in every if not args.only or {e.label.split(" [")[0], *e.label.split()[:2]} & set(args.only)]
    if not rows:
        labels = ", ".join(dict.fromkeys(e.label for e in every))
        parser().error(f"--only {' '.join(args.only)}: no row is called so; there are {labels}")
    if args.length < SHORTEST:
        parser().error(f"--length {args.length}: at least {SHORTEST} tokens are needed")
    head, begun = commit(), time.perf_counter()  # now: the tree may change during a long run
    subject = run.load(args.model_path, args.text, args.calibration_text, args.device)
    lab = Lab(subject, args.model_path, args.text, args.calibration_text)
    name = args.name or Path(args.model_path).resolve().name
    going_on = args.append and args.out.exists()
    try:
        scored = sequences(lab, args.length, args.texts)
        tokens = sum(map(len, scored)) - len(scored)
        have = rows_before(args.out, name, tokens, FIELDS, key) if going_on else set()
    except ValueError as e:
        parser().error(str(e))
    judge = Judge(lab, name, scored)
    log = args.out.with_suffix(".json")
    runs = json.loads(log.read_text())["runs"] if going_on and log.exists() else []
    if not going_on:
        write_csv([], args.out, FIELDS)
    texts = [lab.texts[0], *(t for t in lab.texts if t.kind == "source")][: args.texts]
    record = {
        "name": name,
        "command": command_of(parser(), args),
        "commit": head,
        **sources(args.model_path, args.calibration_text, subject),
        "evaluation": {
            "texts": [{"text": t.name, "sha256": t.sha256, "tokens": args.length} for t in texts],
            "scored": tokens,
            "late": [args.length // 2, args.length],
        },
        **machine(args.device),
    }

    def write(**outcome) -> None:
        log.write_text(json.dumps({"runs": [*runs, record | outcome]}, indent=2) + "\n")

    write()  # what stands in a CSV whose run was cut short
    wanted = [e for e in rows if (name, e.name, float(e.k_bits), float(e.v_bits), *map(str, e.exact)) not in have]
    jobs = [Job(e.label, lambda e=e: judge.measure(e)) for e in wanted]
    outcome = run_jobs(jobs, args.out, FIELDS, figures, begun)
    write(failed=outcome["failed"], seconds=round(time.perf_counter() - begun, 1))
    return 1 if outcome["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
