"""What real models keep of their answers and their attention, cache by cache, in one file for several models.

``python -m benchmarks.fidelity real-models --model-path MODEL --out real_models.csv --device cuda``
``--append`` goes on with a file, for another model or after an interruption: rows that it has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.build import PAGE, build_table
from sglang_blockgtq.calibrate.device import device
from sglang_blockgtq.calibrate.moments import Moments

from . import attention, run
from .lab import Lab
from .methods import Cast, Method, Packed
from .model import Capture, capture, rotate
from .record import command_of, commit, machine, sources
from .rows import Job, read_csv, run_jobs, write_csv

WHOLE = ((2, 2), (3, 3), (4, 4))
PAIRS = (
    *((2, 2), (2.5, 2), (2.25, 2.25), (2, 2.5), (2.5, 2.5), (3, 2), (3, 3), (3.25, 3), (3, 3.25), (3.5, 3), (3, 3.5)),
    *((3.5, 3.5), (4, 4), (4.25, 4), (4, 4.25), (4.5, 4), (4, 4.5), (8, 8)),
)
IN_COLUMNS = ("template", "product-segment")  # whose widths are only compared where the fast kernels read them
CASTS = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
HALF_PAGE = PAGE // 2
FIELDS = (
    *("model", "method", "k_bits", "v_bits", "bytes", "seed", "ppl", "ppl_exact", "kl"),
    *("attention_kl", "attention_kl_shift", "attention_kl_page", "worst_layer", "worst_layer_kl"),
    *("logit_mae_mean", "layers_better_than_paper", "tokens"),
)
SHORTEST = 64  # tokens of --limit: of four times as many, some queries lie beyond attention.FIRST_QUERY


@dataclass(frozen=True)
class Entry:
    """A cache to measure. seeded: whether it rotates, and is worth other rotations."""

    name: str
    k_bits: float
    v_bits: float
    seeded: bool = True

    @property
    def label(self) -> str:
        return f"{self.name} K{self.k_bits:g}V{self.v_bits:g}"


def entries() -> Iterator[Entry]:
    yield Entry("exact", 32, 32, False)
    yield Entry("bf16", 16, 16, False)
    yield Entry("fp8_e4m3", 8, 8, False)
    for name in ("uniform", "paper"):
        yield from (Entry(name, *pair) for pair in WHOLE)
    for name in IN_COLUMNS:
        yield from (Entry(name, *pair) for pair in PAIRS)


def no_columns(lab: Lab, entry: Entry) -> str | None:
    """Why the rows of ``entry`` cannot lie in columns; None where they do, or where that does not matter."""
    if entry.name not in IN_COLUMNS:
        return None
    own, bits = lab.subject.moments, {"k_bits": entry.k_bits, "v_bits": entry.v_bits}
    first = Moments(own.q[:1], own.k[:1], own.v[:1], own.tokens)  # all layers hold the same budget
    try:
        table = build_table(first, lab.subject.rope[:1], **bits, **run.rule_named(entry.name))
    except ValueError as e:
        return str(e)
    if table.row_layout(0).in_columns:
        return None
    return f"K{entry.k_bits:g}V{entry.v_bits:g} of head_dim {lab.subject.head_dim} does not lie in columns"


def border_queries(tokens: int) -> list[int]:
    """Positions of a text shifted by half a page whose token is the last or the first of a page."""
    borders = range(PAGE - HALF_PAGE, tokens, PAGE)
    return [p for border in borders for p in (border - 1, border) if p >= attention.FIRST_QUERY]


class Judge:
    """Measures caches of one model. Attention is that of queries all over the text, and at the borders of pages."""

    def __init__(self, lab: Lab, name: str):
        self.lab, self.name = lab, name
        self.drawn = [p for bucket in lab.positions.values() for p in bucket]
        self.borders = border_queries(len(lab.attended))
        self._attention: dict[tuple[str, float, int], dict[str, torch.Tensor]] = {}

    @cached_property
    def captured(self) -> Capture:
        return capture(self.lab.model, self.lab.attended, self.drawn + self.borders)

    @cached_property
    def exact_ppl(self) -> float:
        return self.lab.answers(None, self.sequences).ppl

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        return [s for text in self.lab.texts for s in text.sequences]

    def method(self, entry: Entry, seed: int) -> Method | None:
        """None: the model's own cache."""
        dim = self.lab.subject.head_dim
        if entry.name == "exact":
            return None
        if entry.name in CASTS:
            return Cast(entry.name, CASTS[entry.name], dim, dim)
        return Packed(self.lab.table(entry.name, entry.k_bits, entry.v_bits, seed), device=self.lab.device)

    @torch.inference_mode()
    def attention(self, method: Method) -> dict[str, torch.Tensor]:
        """By layer: ``kl`` and ``mae`` of the logits in place, ``shift`` and ``page``: KL where the text starts later.

        shift: by run.SHIFT positions. page: by half a page, queries at borders; left out where the text has none.
        """
        got, subject = self.captured, self.lab.subject
        all_over, borders = slice(len(self.drawn)), slice(len(self.drawn), None)
        places = {"kl": (0, all_over), "shift": (run.SHIFT, all_over)}
        places |= {"page": (HALF_PAGE, borders)} if self.borders else {}
        out: dict[str, list[torch.Tensor]] = {}
        for layer, rope in enumerate(subject.rope):
            for name, (shift, which) in places.items():
                q, k, positions = got.q[layer][which], got.k[layer], got.positions[which]
                true = attention.reference(q, k, positions, self.lab.scale)
                if shift:
                    q, k = (rotate(x, rope, self.lab.inv_freq, shift) for x in (q, k))
                read, _ = method.round_trip(layer, k, got.v[layer], shift)
                found = attention.compare(true, q, read, positions, self.lab.scale)
                out.setdefault(name, []).append(found["softmax_kl"].mean())
                if name == "kl":
                    out.setdefault("mae", []).append(found["mae"].mean())
        return {name: torch.stack(layers).cpu() for name, layers in out.items()}

    def attention_of(self, entry: Entry, seed: int) -> dict[str, torch.Tensor]:
        """As :meth:`attention`, measured once for all widths of values."""
        key = entry.name, entry.k_bits, seed
        if key not in self._attention:
            self._attention[key] = self.attention(self.method(entry, seed))
        return self._attention[key]

    def measure(self, entry: Entry, seed: int) -> run.Row:
        """One line of the CSV. ``paper`` is compared at as many whole bits of K, from 2 to 4."""
        method = self.method(entry, seed)
        score = self.lab.answers(method, self.sequences)
        row: run.Row = {"model": self.name, "method": entry.name, "k_bits": entry.k_bits, "v_bits": entry.v_bits}
        row |= {"bytes": 8.0 * self.lab.subject.head_dim if method is None else method.bytes_per_token_head}
        row |= {"seed": seed, "ppl": score.ppl, "ppl_exact": self.exact_ppl, "kl": score.kl_final}
        row["tokens"] = score.tokens
        if method is None:
            return row
        found = self.attention_of(entry, seed)
        worst = int(found["kl"].argmax())
        row |= {"attention_kl": float(found["kl"].mean()), "attention_kl_shift": float(found["shift"].mean())}
        if "page" in found:
            row["attention_kl_page"] = float(found["page"].mean())
        row |= {"worst_layer": worst, "worst_layer_kl": float(found["kl"][worst])}
        row["logit_mae_mean"] = float(found["mae"].mean())
        whole = int(entry.k_bits)
        if isinstance(method, Packed) and entry.name != "paper" and (whole, whole) in WHOLE:
            paper = self.attention_of(Entry("paper", whole, whole), seed)
            row["layers_better_than_paper"] = int((found["mae"] < paper["mae"]).sum())
        return row


def figures(row: run.Row) -> str:
    """What is printed of a row as soon as it is measured."""
    text = f"{row['bytes']:6.1f} B  ppl {row['ppl']:9.3f}  KL {row['kl']:.4f}"
    return text + (f"  attention {row['attention_kl']:.4f}" if "attention_kl" in row else "")


def _key(row: run.Row) -> tuple:
    return row["model"], row["method"], float(row["k_bits"]), float(row["v_bits"]), int(row["seed"])


def rows_before(
    path: Path,
    model: str,
    tokens: int,
    fields: Sequence[str] = FIELDS,
    key: Callable[[run.Row], tuple] = _key,
) -> set[tuple]:
    """What a file to be continued has. ValueError for other columns, or rows of ``model`` on other texts.

    fields, key: columns of the file and what tells its rows apart.
    """
    with path.open() as file:
        header = tuple(file.readline().rstrip("\n").split(","))
    if header != tuple(fields):
        raise ValueError(f"--append: {path.name} has other columns; name another file with --out")
    rows = read_csv(path)
    if other := {int(r["tokens"]) for r in rows if r["model"] == model} - {tokens}:
        raise ValueError(
            f"--append: {path.name} has rows of {model} on {other.pop()} tokens, this run has {tokens}; give the same "
            "--limit, another --name or another --out"
        )
    return {key(row) for row in rows}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.fidelity real-models", description=__doc__)
    p.add_argument("--model-path", required=True, help="model folder")
    p.add_argument("--name", help="of the model in the CSV; default: its folder's")
    p.add_argument("--out", required=True, type=Path, help="CSV, a row as soon as it is measured; a .json tells how")
    p.add_argument("--append", action="store_true", help="go on with the file of --out")
    p.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--limit", type=int, help="tokens of a scored sequence, one of each text (default: all)")
    p.add_argument("--seeds", type=int, default=3, help="rotations of each cache that has some (default 3)")
    p.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="method, bits or both: template, K3V3, 'template K3V3'"
    )
    p.add_argument("--queries", type=int, default=16, help="query positions of each 2,048 tokens (default 16)")
    p.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    p.add_argument("--calibration-text", help="calibration text; default: that of the server")
    return p


def plan(only: Sequence[str], seeds: int) -> list[tuple[Entry, int]]:
    """The first rotation of everything, then the others."""
    wanted = [e for e in entries() if not only or {e.label, *e.label.split()} & set(only)]
    return [(e, seed) for seed in range(max(seeds, 1)) for e in wanted if e.seeded or not seed]


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    rows = plan(args.only, args.seeds)
    if not rows:
        labels = ", ".join(dict.fromkeys(e.label for e in entries()))
        parser().error(f"--only {' '.join(args.only)}: no row is called so; there are {labels}")
    if args.limit is not None and args.limit < SHORTEST:
        parser().error(f"--limit {args.limit}: at least {SHORTEST} tokens are needed")
    head, begun = commit(), time.perf_counter()  # now: the tree may change during a long run
    subject = run.load(args.model_path, args.text, args.calibration_text, args.device)
    lab = Lab(subject, args.model_path, args.text, args.calibration_text, args.queries, 1, args.limit)
    name = args.name or Path(args.model_path).resolve().name
    judge = Judge(lab, name)
    going_on = args.append and args.out.exists()
    try:
        have = rows_before(args.out, name, lab.record()["scored"]) if going_on else set()
    except ValueError as e:
        parser().error(str(e))
    wanted = dict.fromkeys(e for e, _ in rows)
    skipped = {e.label: why for e in wanted if (why := no_columns(lab, e))}
    for label, why in skipped.items():
        print(f"{label} is left out: {why}", flush=True)
    rows = [(e, s) for e, s in rows if e.label not in skipped and (name, e.name, e.k_bits, e.v_bits, s) not in have]
    print(f"{time.perf_counter() - begun:6.1f} s  calibrated; {len(rows)} rows", flush=True)

    log = args.out.with_suffix(".json")
    runs = json.loads(log.read_text())["runs"] if going_on and log.exists() else []
    if not going_on:
        write_csv([], args.out, FIELDS)
    evaluation = lab.record() | {"layers": len(subject.rope), "borders": len(judge.borders), "page_shift": HALF_PAGE}
    record = {
        "name": name,
        "command": command_of(parser(), args),
        "commit": head,
        **sources(args.model_path, args.calibration_text, subject),
        "evaluation": evaluation,
        "skipped": skipped,
        **machine(args.device),
    }

    def write(**outcome) -> None:
        log.write_text(json.dumps({"runs": [*runs, record | outcome]}, indent=2) + "\n")

    write()  # what stands in a CSV whose run was cut short
    jobs = [Job(f"{e.label}, rotation {s}", lambda e=e, s=s: judge.measure(e, s)) for e, s in rows]
    outcome = run_jobs(jobs, args.out, FIELDS, figures, begun)
    write(failed=outcome["failed"], seconds=round(time.perf_counter() - begun, 1))
    return 1 if outcome["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
