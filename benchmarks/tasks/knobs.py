"""How hard each task is: defaults, the rungs from easy to hard, and the search for the rung that suits a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from . import needles, ruler
from .haystack import Haystack
from .prompts import Sample

Knobs = dict[str, int]
LOW, HIGH = 0.60, 0.95  # a task outside says little about a cache: too hard to lose, or too easy
AIM = 0.80


def _rungs(**values: tuple[int, ...]) -> tuple[Knobs, ...]:
    return tuple(dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))


#: task -> knobs, from easy to hard
RUNGS: dict[str, tuple[Knobs, ...]] = {
    "single": _rungs(digits=(3, 4, 5, 7, 10, 14, 20, 28, 40)),
    "distractor": _rungs(digits=(3, 4, 5, 7, 7, 7, 7, 7, 10), count=(1, 1, 1, 1, 2, 4, 8, 16, 24)),
    "multi": _rungs(digits=(3, 3, 4, 5, 7, 7, 7, 7, 7), count=(2, 3, 3, 3, 3, 4, 6, 10, 16)),
    "multikey": _rungs(digits=(3, 4, 5, 7, 7, 7, 7, 7, 7), count=(2, 2, 2, 2, 4, 8, 16, 32, 64)),
    "multivalue": _rungs(digits=(3, 3, 4, 5, 7, 7, 7, 7, 7), count=(2, 3, 3, 3, 3, 4, 6, 10, 16)),
    "multiquery": _rungs(digits=(3, 3, 4, 5, 7, 7, 7, 7, 7), count=(2, 3, 3, 3, 3, 4, 6, 10, 16)),
    "variables": _rungs(
        digits=(3, 5, 5, 5, 5, 5, 5, 5, 5), chains=(1, 1, 1, 2, 2, 3, 4, 6, 8), hops=(1, 1, 2, 2, 3, 4, 4, 6, 8)
    ),
    "words": _rungs(count=(1, 1, 2, 2, 3, 4, 6, 8, 10), ratio=(40, 20, 20, 15, 12, 10, 8, 6, 4)),
}
DEFAULTS: dict[str, Knobs] = {task: rungs[4] for task, rungs in RUNGS.items()}
NO_DEPTH = ("words",)


def make(
    task: str, haystack: Haystack, length: int, depth: float | None, trial: int, knobs: Knobs, seed: int
) -> Sample:
    """A sample of any task. ``depth`` is None for those in :data:`NO_DEPTH`."""
    if task in NO_DEPTH:
        return ruler.words(haystack, length, trial, knobs, seed)
    if depth is None:
        raise ValueError(f"{task} needs a depth")
    if task == "variables":
        return ruler.variables(haystack, length, depth, trial, knobs, seed)
    return needles.sample(task, haystack, length, depth, trial, knobs, seed)


def search(rungs: int, measure: Callable[[int], float | None]) -> tuple[int, dict[int, float]]:
    """The rung whose pass rate lies in LOW..HIGH, nearest to AIM, by bisection; and every rate that was measured.

    measure: pass rate of a rung, None where the length cannot hold it, which counts as too hard. Where no rung lies
    in the range, the nearest one. ValueError where even the easiest cannot be held.
    """
    rates: dict[int, float] = {}
    low, high = 0, rungs - 1
    while low <= high:
        rung = (low + high) // 2
        rate = measure(rung)
        if rate is not None:
            rates[rung] = rate
            if LOW <= rate <= HIGH:
                break
        if rate is not None and rate > HIGH:
            low = rung + 1
        else:
            high = rung - 1
    if not rates:
        raise ValueError("the length is too short for the easiest rung")
    # Among equals the one next to the range.
    order = {r: (not LOW <= v <= HIGH, abs(v - AIM), -r if v > AIM else r) for r, v in rates.items()}
    return min(order, key=order.__getitem__), rates


def verdict(rates: dict[int, float], chosen: int, rungs: int) -> str:
    """Empty when the chosen rung is in the range; else why none is."""
    rate = rates[chosen]
    if LOW <= rate <= HIGH:
        return ""
    if min(rates.values()) > HIGH:
        return "too easy at the hardest rung" if chosen == rungs - 1 else "too easy at the hardest rung that fits"
    if max(rates.values()) < LOW:
        return "too hard, at the easiest rung too"
    return "no rung between too easy and too hard"


def load(file: Path) -> dict[str, dict[int, list[Knobs]]]:
    """task -> length -> knobs, as :func:`benchmarks.tasks.calibrate.calibrate` wrote them; a cell of a file made by
    hand may have a list of several."""
    content = json.loads(file.read_text())
    listed = {task: {int(n): cell["knobs"] for n, cell in cells.items()} for task, cells in content["tasks"].items()}
    return {
        task: {n: knobs if isinstance(knobs, list) else [knobs] for n, knobs in cells.items()}
        for task, cells in listed.items()
    }


def choose(
    task: str, length: int, loaded: dict[str, dict[int, list[Knobs]]] | None, rungs: Sequence[int] | None = None
) -> list[Knobs]:
    """Knobs of a cell: the file's, those of the rungs, else the default. ValueError where the file has none for it."""
    if rungs is not None:
        return [RUNGS[task][i] for i in rungs]
    if loaded is None:
        return [DEFAULTS[task]]
    try:
        return loaded[task][length]
    except KeyError:
        held = ", ".join(map(str, loaded.get(task, {}))) or "no length"
        raise ValueError(f"--knobs: {task} at {length} tokens was not calibrated ({held} was)") from None
