"""What the packed cache is meant to reach, and whether a record shows that it does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .configs import BASELINES
from .record import MEASURED, UNFIT, Record, natural

HOLDS = 0.95  # of the hit rate that a cache gives in which everything fits


@dataclass(frozen=True)
class Target:
    """``method``'s ``measure`` over ``against``'s, at most or at least ``limit``, in every case that ``cases``
    matches (a regular expression over the whole case). against: "" for bf16."""

    scenario: str
    cases: str
    measure: str
    method: str
    limit: float
    most: bool = False
    against: str = ""
    last: bool = False  # only in the last of these cases

    def text(self) -> str:
        return f"{'at most' if self.most else 'at least'} {self.limit:.3g}x {self.against or 'bf16'}"


K3, K2 = "blockgtq-k3v3", "blockgtq-k2v2"
TARGETS = (
    Target("decode", r"\d+", "step", K3, 1.05, most=True),
    Target("decode", "131072", "step", K3, 0.75, most=True),
    Target("batch", "8x8192", "output_throughput", K3, 1.15),
    Target("batch", "8x32768", "output_throughput", K3, 1.7),
    Target("capacity", "start", "tokens", K3, 4.6),
    Target("capacity", "start", "tokens", K2, 6.4),
    Target("pressure", ".*", "output_throughput", K3, 2.0, last=True),
    Target("pressure", ".*", "output_throughput", K3, 1.3, against="fp8-fa3", last=True),
    Target("prefixes", r".*, round (?!1$)\d+", "ttft_p50", K3, 1 / 3, most=True, last=True),
    Target("prefill", r"\d+", "speed", K3, 0.95),
)


@dataclass(frozen=True)
class Verdict:
    """met is None where something is missing; ``shown`` then says what."""

    model: str
    scenario: str
    case: str
    measure: str
    method: str
    target: str
    shown: str
    met: bool | None


def baseline(record: Record, model: str, scenario: str, case: str) -> str | None:
    """The unquantized server that has this case, with figures if one has them."""
    found = [r for r in record.rows if (r.model, r.scenario, r.case) == (model, scenario, case)]
    for state in (MEASURED, UNFIT):
        for method in BASELINES:
            if any(r.method == method and r.state == state for r in found):
                return method
    return None


def cases(record: Record, model: str, scenario: str) -> list[str]:
    """By their numbers, without repeats."""
    return sorted({r.case for r in record.rows if (r.model, r.scenario) == (model, scenario)}, key=natural)


def models(record: Record) -> list[str]:
    return list(dict.fromkeys(r.model for r in record.rows))


def verdicts(record: Record) -> Iterator[Verdict]:
    for model in models(record):
        for target in TARGETS:
            matching = [c for c in cases(record, model, target.scenario) if re.fullmatch(target.cases, c)]
            for case in matching[-1:] if target.last else matching:
                yield _ratio(record, model, target, case)
        yield from _runs(record, model)
        yield from _hit_rates(record, model)


def _ratio(record: Record, model: str, target: Target, case: str) -> Verdict:
    def verdict(shown: str, met: bool | None) -> Verdict:
        return Verdict(model, target.scenario, case, target.measure, target.method, target.text(), shown, met)

    against = target.against or baseline(record, model, target.scenario, case)
    ours = record.value(model, target.method, target.scenario, case, target.measure)
    if ours is None:
        return verdict(f"{target.method} was not measured", None)
    theirs = record.value(model, against, target.scenario, case, target.measure) if against else None
    if theirs is None:
        where = (model, against, target.scenario, case)
        if any(r.where == where and r.state == UNFIT for r in record.rows):
            return verdict(f"does not fit {against}", None)
        return verdict(f"{against or 'bf16'} was not measured", None)
    if theirs <= 0:
        return verdict(f"{against} measured {theirs:g}", None)
    ratio = ours / theirs
    return verdict(f"{ratio:.3g}x", ratio <= target.limit if target.most else ratio >= target.limit)


def _runs(record: Record, model: str) -> Iterator[Verdict]:
    """512K tokens of one sequence run at all."""
    for case in cases(record, model, "decode"):
        if case != "524288":
            continue
        states = {r.state for r in record.rows if r.where == (model, K3, "decode", case)}
        met = True if MEASURED in states else False if UNFIT in states else None
        shown = ", ".join(sorted(states)) or f"{K3} was not measured"
        yield Verdict(model, "decode", case, "step", K3, "runs", shown, met)


def _hit_rates(record: Record, model: str) -> Iterator[Verdict]:
    """After the first round a cache that holds the working set answers nearly everything from it."""
    rounds = [c for c in cases(record, model, "prefixes") if not c.endswith("round 1")]
    for case in rounds[-1:]:
        rate = record.value(model, K3, "prefixes", case, "hit_rate")
        wanted = record.value(model, K3, "prefixes", case, "working_set")
        tokens = record.value(model, K3, "capacity", "start", "tokens")
        target = f"at least {HOLDS:g}"
        if rate is None or wanted is None or tokens is None:
            shown, met = "not measured", None
        elif wanted > tokens:
            shown, met = f"{rate:.3g}; the prefixes take {wanted:.0f} tokens, {tokens:.0f} fit", None
        else:
            shown, met = f"{rate:.3g}", rate >= HOLDS
        yield Verdict(model, "prefixes", case, "hit_rate", K3, target, shown, met)
