"""Answers and readings as they come (JSON lines), what they add up to (CSV), and how they were made (JSON)."""

from __future__ import annotations

import csv
import json
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..tasks.record import key
from .engines import Reply
from .rows import Row

COLUMNS = ("config", "engine", *(field.name for field in fields(Row)))


@dataclass(frozen=True)
class Answer:
    config: str
    engine: str
    test: str
    sample: int
    figures: dict[str, float]
    reply: Reply

    @property
    def key(self) -> tuple:
        return key(self.config, self.engine, self.test, None, None, self.sample, {})


@dataclass(frozen=True)
class Read:
    """What the reference says of the tokens of an answer, see engines.Reading."""

    config: str
    engine: str
    test: str
    sample: int
    behind: list[float]

    key = Answer.key


class Record:
    """``OUT.csv``, ``OUT.json`` and ``OUT.jsonl``. What the last holds already is taken over.

    settings: what answers depend on besides their configuration, test and sample. ValueError where those of the files
    differ.
    """

    def __init__(self, out: Path, settings: dict, meta: dict):
        self.out, self.lines, self.lock = out, out.with_suffix(".jsonl"), threading.Lock()
        self.meta = {**meta, "settings": settings}
        self.answers: dict[tuple, Answer] = {}
        self.readings: dict[tuple, Read] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.lines.exists():
            self._resume(json.loads(out.with_suffix(".json").read_text()))
        self._write_meta()

    def _resume(self, before: dict) -> None:
        held, now = before["settings"], self.meta["settings"]
        for name in sorted(held.keys() | now.keys()):
            if held.get(name) != now.get(name):
                raise ValueError(
                    f"--out {self.out.name}: {name} of its answers was {held.get(name)!r}, is {now.get(name)!r}; "
                    "name another file"
                )
        earlier = {k: before[k] for k in ("command", "commit") if k in before}
        self.meta["resumed"] = [*before.get("resumed", []), earlier]
        self.meta["servers"] = before.get("servers", {})
        whole = self.lines.read_text()
        kept = whole[: whole.rfind("\n") + 1]  # a run that was killed may have left half a line
        for line in map(json.loads, kept.splitlines()):
            if "behind" in line:
                self._keep(Read(**line))
            else:
                self._keep(Answer(**{**line, "reply": Reply(**line["reply"])}))
        if kept != whole:
            self.lines.write_text(kept)

    def _keep(self, item: Answer | Read) -> None:
        (self.answers if isinstance(item, Answer) else self.readings)[item.key] = item

    def add(self, item: Answer | Read) -> None:
        with self.lock:
            self._keep(item)
            with self.lines.open("a") as f:
                f.write(json.dumps(asdict(item)) + "\n")

    def write(self, rows: Iterable[dict]) -> None:
        """The CSV, through a scratch file, and the JSON."""
        with self.lock:
            scratch = self.out.with_name(f".{self.out.name}.{os.getpid()}")
            with scratch.open("w", newline="") as f:
                writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
            scratch.replace(self.out)
            self._write_meta()

    def _write_meta(self) -> None:
        self.out.with_suffix(".json").write_text(json.dumps(self.meta, indent=1) + "\n")
