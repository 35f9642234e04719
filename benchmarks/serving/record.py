"""Measurements in long format (CSV), how they were made (JSON). A run cut short keeps them, a later one goes on."""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .configs import DEFAULT, SERVERS

MEASURED = "measured"
UNFIT = "does not fit"  # final, like a measurement: a fact about the server
UNMEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """One measurement, or one case that has none: then ``measure``, ``value`` and ``unit`` are empty and ``note`` says
    why."""

    model: str
    method: str
    scenario: str
    case: str
    measure: str = ""
    value: float | None = None
    unit: str = ""
    state: str = MEASURED
    note: str = ""

    @property
    def where(self) -> tuple[str, str, str, str]:
        return self.model, self.method, self.scenario, self.case


def natural(case: str) -> list[str | int]:
    """Sorts cases by their numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", case)]


#: where a method stands among the others
PLACE = {method: i for i, method in enumerate(dict.fromkeys((*DEFAULT, *SERVERS)))}
COLUMNS = ("model", "method", "k_bits", "v_bits", *(f.name for f in fields(Row) if f.name not in ("model", "method")))


class Record:
    """Rows in memory and in ``folder``. Rewritten after every change through a scratch file."""

    def __init__(self, folder: Path):
        self.csv, self.json = folder / "serving.csv", folder / "serving.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self.meta: dict = {}
        if self.csv.exists():
            with self.csv.open(newline="") as f:
                self.rows = [self._read(line) for line in csv.DictReader(f)]
        if self.json.exists():
            self.meta = json.loads(self.json.read_text())
        for name in ("servers", "references", "checks"):
            self.meta.setdefault(name, {})

    @staticmethod
    def _read(line: dict) -> Row:
        values = {f.name: line[f.name] for f in fields(Row)}
        return Row(**values | {"value": float(line["value"]) if line["value"] else None})

    def finished(self, where: tuple[str, str, str, str]) -> bool:
        return any(row.where == where and row.state != UNMEASURED for row in self.rows)

    def put(self, rows: list[Row]) -> None:
        """Add the rows of one or more cases, in place of what these cases had."""
        new = {row.where for row in rows}
        self.rows = [row for row in self.rows if row.where not in new] + rows
        self._sort()
        self.write()
        for row in rows:
            shown = f"{row.measure} {row.value:.5g} {row.unit}" if row.value is not None else row.state
            print(*row.where, shown, row.note, flush=True)

    def _sort(self) -> None:
        """Models and scenarios as they came, methods and cases in their own order: a case that is measured again
        returns to its place."""
        models = list(dict.fromkeys(row.model for row in self.rows))
        scenarios = list(dict.fromkeys(row.scenario for row in self.rows))
        self.rows.sort(
            key=lambda r: (models.index(r.model), PLACE[r.method], scenarios.index(r.scenario), natural(r.case))
        )

    def value(self, model: str, method: str, scenario: str, case: str, measure: str) -> float | None:
        for row in self.rows:
            if (*row.where, row.measure) == (model, method, scenario, case, measure):
                return row.value
        return None

    def write(self) -> None:
        scratch = self.csv.with_name(f".{self.csv.name}.{os.getpid()}")
        with scratch.open("w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in self.rows:
                bits = SERVERS[row.method]
                value = "" if row.value is None else f"{row.value:.6g}"
                writer.writerow({**asdict(row), "value": value, "k_bits": bits.k_bits, "v_bits": bits.v_bits})
        scratch.replace(self.csv)
        scratch = scratch.with_name(f".{self.json.name}.{os.getpid()}")
        scratch.write_text(json.dumps(self.meta, indent=1) + "\n")
        scratch.replace(self.json)
