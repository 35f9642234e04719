"""Rows of a CSV: written and read, and measured one after another, where one that fails stops no other."""

from __future__ import annotations

import csv
import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .run import Row


@dataclass(frozen=True)
class Job:
    """One row. measure: gives it, without its label."""

    label: str
    measure: Callable[[], Row]


def write_csv(rows: Iterable[Row], path: Path, fields: Sequence[str]) -> None:
    """A header and one line per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.DictWriter(file, fields, lineterminator="\n").writeheader()
    append(rows, path, fields)


def append(rows: Iterable[Row], path: Path, fields: Sequence[str]) -> None:
    """More lines, six significant digits, empty where a column does not apply."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_jobs(
    jobs: Sequence[Job],
    path: Path,
    fields: Sequence[str],
    figures: Callable[[Row], str],
    begun: float,
    budget: float = math.inf,
) -> dict:
    """Measure and write all jobs; what failed, and what was left out since ``budget`` seconds from ``begun`` are over.

    figures: what of a row is printed.
    """
    failed: dict[str, str] = {}
    for done, job in enumerate(jobs):
        elapsed = time.perf_counter() - begun
        if elapsed > budget:
            left = [job.label for job in jobs[done:]]
            print(f"{elapsed:6.1f} s  --budget {budget:g} is spent, {len(left)} rows are left out", flush=True)
            return {"failed": failed, "left_out": left}
        try:
            row = job.measure()
        except Exception as e:  # a row of many: the others are still wanted
            failed[job.label] = f"{type(e).__name__}: {e}"
            traceback.print_exc()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        append([row], path, fields)
        now = time.perf_counter() - begun
        print(f"{now:6.1f} s  {done + 1}/{len(jobs)}  {job.label:<72}{figures(row)}  {now - elapsed:.1f} s", flush=True)
    return {"failed": failed, "left_out": []}
