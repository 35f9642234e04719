"""AIME problems from a local file: an answer is right if its final integer is the true one.

FILE: JSON lines, or one JSON list, of objects with the problem as ``problem`` or ``question`` and an ``answer`` from 0
to 999, as a number or as text ("033").
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path

from .prompts import Sample
from .run import Job

TASK = "\n\nThink step by step. The answer is an integer from 0 to 999; end with it in \\boxed{}."


def boxed(text: str) -> str | None:
    """What the last complete ``\\boxed{...}`` holds; braces may nest."""
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start:i]
    return None


def final_integer(text: str) -> int | None:
    """The answer's integer: of the last box or, without one, of the last "answer is N", "answer: N" or "answer = N".

    Only what comes after a closed ``<think>`` block counts. None where there is no such integer: a number somewhere in
    the working is no answer.
    """
    text = text.rpartition("</think>")[2]
    inside = boxed(text)
    if inside is None:
        found = re.findall(r"answer(?:\s+is|\s*[:=])[\s*$]*(\d[\d,]*)(?![\d.]*\d)", text, re.IGNORECASE)
        inside = found[-1] if found else ""
    plain = re.sub(r"\\text\s*\{\s*\}|\\[,!;: ]|[\s$,]|(?:\\text\{)?\^?\\circ\}?", "", inside)
    return int(plain) if re.fullmatch(r"[+-]?\d+(?:\.0+)?", plain) and "." not in plain else None


def read(file: Path) -> list[tuple[str, int]]:
    """(problem, answer) of every record. ValueError names the record that is not one."""
    text = file.read_text(encoding="utf-8")
    records = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(s) for s in text.splitlines() if s.strip()]
    )
    out = []
    for number, record in enumerate(records, 1):
        problem = record.get("problem", record.get("question"))
        answer = str(record.get("answer", "")).strip()
        if not problem or not re.fullmatch(r"\d{1,3}", answer):
            raise ValueError(f"{file.name} record {number}: a problem and an answer from 0 to 999 are needed")
        out.append((problem, int(answer)))
    if not out:
        raise ValueError(f"--aime {file.name}: no records")
    return out


def sample(problem: str, answer: int, trial: int, new_tokens: int) -> Sample:
    return Sample(
        "aime",
        problem.strip(),
        TASK,
        lambda text: float(final_integer(text) == answer),
        new_tokens,
        trial=trial,
        answers=(str(answer),),
    )


def jobs(file: Path, runs: int, new_tokens: int, samples: int | None = None) -> list[Job]:
    """Every problem ``runs`` times; ``trial`` counts through runs, then problems, and seeds what is drawn."""
    problems = read(file)[:samples]
    about = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:8], "new_tokens": new_tokens}
    return [
        Job(f"aime/{file.stem}", None, None, i * runs + r, about, partial(sample, *problem, i * runs + r, new_tokens))
        for i, problem in enumerate(problems)
        for r in range(runs)
    ]
