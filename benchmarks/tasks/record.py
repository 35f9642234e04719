"""Answers as they come (JSON lines), what they add up to (CSV), and how they were made (JSON)."""

from __future__ import annotations

import csv
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from statistics import fmean

COLUMNS = (
    *("config", "engine", "task", "length", "depth", "samples", "pass_rate", "pass_low", "pass_high"),
    *("score", "score_low", "score_high", "prompt_tokens", "cached_tokens", "knobs"),
)


@dataclass(frozen=True)
class Answer:
    """One answered sample. ``passed`` is None where a task has only a score."""

    config: str
    engine: str
    task: str
    length: int | str | None
    depth: float | None
    trial: int
    knobs: dict = field(hash=False)
    score: float
    passed: bool | None
    text: str
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    finish: str

    @property
    def key(self) -> tuple:
        return key(self.config, self.engine, self.task, self.length, self.depth, self.trial, self.knobs)


def key(config: str, engine: str, task: str, length, depth, trial: int, knobs: dict) -> tuple:
    """What makes a sample the same one in a later run."""
    return config, engine, task, length, depth, trial, json.dumps(knobs, sort_keys=True)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate (Wilson's score interval). For a mean of values in [0, 1] it is a wide one, since a rate
    has the largest variance that these can have."""
    if n < 1:
        raise ValueError("an interval needs at least one sample")
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def rows(answers: Iterable[Answer]) -> list[dict]:
    """One row per configuration, task, length, depth and knobs; in the order of first appearance."""
    groups: dict[tuple, list[Answer]] = defaultdict(list)
    for a in answers:
        groups[key(a.config, a.engine, a.task, a.length, a.depth, 0, a.knobs)].append(a)
    out = []
    for group in groups.values():
        first, n = group[0], len(group)
        score = fmean(a.score for a in group)
        row = {"config": first.config, "engine": first.engine, "task": first.task, "length": first.length}
        row |= {"depth": first.depth, "samples": n, "score": score}
        row["score_low"], row["score_high"] = wilson(score, n)
        if first.passed is not None:
            row["pass_rate"] = fmean(bool(a.passed) for a in group)
            row["pass_low"], row["pass_high"] = wilson(row["pass_rate"], n)
        row["prompt_tokens"] = round(fmean(a.prompt_tokens for a in group))
        if all(a.cached_tokens is not None for a in group):
            row["cached_tokens"] = round(fmean(a.cached_tokens for a in group))
        row["knobs"] = " ".join(f"{k}={v}" for k, v in first.knobs.items())
        out.append(row)
    return out


def write_rows(out: Path, every: Iterable[dict]) -> None:
    """The CSV, through a scratch file."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    with scratch.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in every)
    scratch.replace(out)


def summary(answers: Iterable[Answer]) -> list[str]:
    """Lines: each task's pass rate, or score, over all lengths and depths, by configuration."""
    groups: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for a in answers:
        groups[a.task, f"{a.config} ({a.engine})"].append(a)
    out = [f"{'task':<28}{'configuration':<28}{'samples':>8}{'rate %':>8}  95 % interval"]
    for (task, config), group in sorted(groups.items()):
        rate = fmean(a.score if a.passed is None else bool(a.passed) for a in group)
        low, high = wilson(rate, len(group))
        out.append(f"{task:<28}{config:<28}{len(group):>8}{100 * rate:>8.1f}  {100 * low:.1f} to {100 * high:.1f}")
    return out


class Record:
    """``OUT.csv``, ``OUT.json`` and ``OUT.jsonl``. Answers that the last holds already are taken over.

    settings: what the answers depend on besides the fields of their key. ValueError where those of the files differ.
    """

    def __init__(self, out: Path, settings: dict, meta: dict):
        self.out, self.lock = out, threading.Lock()
        self.lines = out.with_suffix(".jsonl")
        self.meta = {**meta, "settings": settings}
        out.parent.mkdir(parents=True, exist_ok=True)
        self.answers: dict[tuple, Answer] = {}
        if self.lines.exists():
            self._resume(settings)
        self.write()

    def _resume(self, settings: dict) -> None:
        before = json.loads(self.out.with_suffix(".json").read_text())
        held = before["settings"]
        unlike = [name for name in sorted(held.keys() | settings.keys()) if held.get(name) != settings.get(name)]
        if unlike:
            what = ", ".join(f"{name} was {held.get(name)!r}, is {settings.get(name)!r}" for name in unlike)
            raise ValueError(
                f"--out {self.out.name}: its answers are those of other settings ({what}); name another file"
            )
        self.meta["resumed"] = [
            *before.get("resumed", []),
            {k: before[k] for k in ("command", "commit") if k in before},
        ]
        self.meta["servers"] = before.get("servers", {}) | self.meta.get("servers", {})
        whole = self.lines.read_text()
        kept = whole[: whole.rfind("\n") + 1]  # a run that was killed may have left half a line
        for line in kept.splitlines():
            answer = Answer(**json.loads(line))
            self.answers[answer.key] = answer
        if kept != whole:
            self.lines.write_text(kept)

    def add(self, answer: Answer) -> None:
        with self.lock:
            self.answers[answer.key] = answer
            with self.lines.open("a") as f:
                f.write(json.dumps(asdict(answer)) + "\n")

    def write(self) -> None:
        with self.lock:
            write_rows(self.out, rows(self.answers.values()))
            self.out.with_suffix(".json").write_text(json.dumps(self.meta, indent=1) + "\n")

    def rows(self) -> list[dict]:
        return rows(self.answers.values())

    def summary(self) -> list[str]:
        return summary(self.answers.values())
