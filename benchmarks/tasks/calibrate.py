"""Find, with an unquantized cache, knobs at which the model neither always nor never answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..server_steps import Budget
from .client import Client
from .haystack import Haystack
from .knobs import HIGH, LOW, NO_DEPTH, RUNGS, make, search, verdict
from .record import wilson
from .run import Job, ask_all

#: Samples of a calibration are none of those that are measured later: choosing knobs by them would flatter bf16.
FIRST_TRIAL = 1_000_000
LEAST_PROSE = 0.25


class Interrupted(Exception):
    """An error or a spent budget; the message says which."""


def cell_jobs(
    task: str, haystack: Haystack, length: int, depths: Sequence[float], trials: int, knobs: dict, seed: int, first: int
) -> list[Job]:
    """Samples of one task and length. A task without depth gets as many trials as the others have samples."""
    if task in NO_DEPTH:
        places: list[tuple[float | None, int]] = [(None, first + t) for t in range(trials * len(depths))]
    else:
        places = [(depth, first + t) for depth in depths for t in range(trials)]
    return [Job(task, length, d, t, knobs, partial(make, task, haystack, length, d, t, knobs, seed)) for d, t in places]


def probe(jobs: Sequence[Job]) -> None:
    """ValueError where the first sample cannot be made or is hardly prose: others of the cell might not fit then."""
    sample = jobs[0].make()
    if sample.prose < LEAST_PROSE:
        raise ValueError(
            f"length {sample.length}: {sample.prose:.0%} of it would be prose, with {sample.knobs}; "
            f"{LEAST_PROSE:.0%} is the least"
        )


def calibrate(
    out: Path,
    client: Client,
    haystack: Haystack,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
    concurrency: int,
    budget: Budget,
    meta: dict,
    say: Callable[[str], None] = print,
) -> None:
    """Writes ``out`` after every cell; those that it holds are kept. Interrupted; ValueError for other settings."""
    content = {**meta, "target": [LOW, HIGH], "tasks": {}}
    if out.exists():
        before = json.loads(out.read_text())
        if before["settings"] != meta["settings"]:
            raise ValueError(f"--calibrate {out.name}: it was made with other settings; name another file")
        content["tasks"] = before["tasks"]
    for task in tasks:
        for length in lengths:
            cells = content["tasks"].setdefault(task, {})
            if str(length) in cells:
                continue

            def measure(rung: int, task: str = task, length: int = length) -> float | None:
                jobs = cell_jobs(task, haystack, length, depths, trials, RUNGS[task][rung], seed, FIRST_TRIAL)
                try:
                    probe(jobs)
                except ValueError:
                    return None
                passed: list[bool] = []
                error = ask_all(jobs, client, concurrency, budget, lambda job, sample, s, r: passed.append(s == 1))
                if error:
                    raise Interrupted(error)
                if len(passed) < len(jobs):
                    raise Interrupted("the budget is spent")
                return sum(passed) / len(passed)

            try:
                rung, rates = search(len(RUNGS[task]), measure)
            except ValueError as e:
                say(f"{task} {length}: {e}")
                continue
            n = trials * len(depths)
            low, high = wilson(rates[rung], n)
            note = verdict(rates, rung, len(RUNGS[task]))
            cells[str(length)] = {
                "knobs": RUNGS[task][rung],
                "pass_rate": rates[rung],
                "interval": [round(low, 3), round(high, 3)],
                "samples": n,
                "note": note,
                "rates": {str(r): rate for r, rate in sorted(rates.items())},
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(content, indent=1) + "\n")
            say(
                f"{task} {length}: {RUNGS[task][rung]} passes {rates[rung]:.0%} of {n}" + (f" ({note})" if note else "")
            )
