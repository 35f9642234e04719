"""What an ablation scores: a report and Python sources, cut into sequences; none of it is calibration text."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPORT_LENGTH, SOURCE_LENGTH = 2048, 4096  # tokens of a sequence
#: Of the standard library, half prose and half code: their first SOURCE_LENGTH tokens.
SOURCES = ("difflib", "doctest", "pickletools", "statistics")
#: Python source to calibrate on, and what of it is not scored.
OTHER_SOURCE = "argparse"


@dataclass(frozen=True)
class Scored:
    """A text's sequences. kind: ``report`` or ``source``; sha256: of the whole file."""

    name: str
    kind: str
    sha256: str
    sequences: tuple[tuple[int, ...], ...]

    def record(self) -> dict:
        tokens = [len(s) for s in self.sequences]
        scored = sum(tokens) - len(tokens)
        return {"text": self.name, "kind": self.kind, "sha256": self.sha256, "sequences": tokens, "scored": scored}


def source_path(module: str) -> Path:
    """File of a standard library module."""
    return Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def evaluation_set(tokenizer, report: Path, report_ids: Sequence[int], limit: int | None = None) -> list[Scored]:
    """The report in sequences of :data:`REPORT_LENGTH`, a shorter rest left out, and the start of each of SOURCES.

    limit: tokens of a sequence at most, and then one sequence of each text.
    """
    length = min(REPORT_LENGTH, limit or REPORT_LENGTH, len(report_ids))
    starts = range(0, len(report_ids) - length + 1, length) if limit is None else (0,)
    sequences = tuple(tuple(report_ids[i : i + length]) for i in starts)
    out = [Scored(report.name, "report", _hash(report.read_bytes()), sequences)]
    for module in SOURCES:
        data = source_path(module).read_bytes()
        length = min(SOURCE_LENGTH, limit or SOURCE_LENGTH)
        ids = tokenizer.encode(data.decode()[: 16 * length], add_special_tokens=False)[:length]
        out.append(Scored(f"{module}.py", "source", _hash(data), (tuple(ids),)))
    return out
