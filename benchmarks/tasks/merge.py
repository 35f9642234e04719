"""Runs of several processes into one result: servers that ran side by side, each asked by a process of its own."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from .knobs import AIM, HIGH, LOW
from .record import Answer, rows, write_rows


def read(out: Path) -> tuple[dict, list[Answer]]:
    """What a run's OUT.json and OUT.jsonl hold. ValueError where they are missing."""
    meta, lines = out.with_suffix(".json"), out.with_suffix(".jsonl")
    if not meta.is_file():
        raise ValueError(f"--merge {out}: {meta.name} is not there")
    text = lines.read_text() if lines.is_file() else ""  # nothing was answered
    whole = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
    return json.loads(meta.read_text()), [Answer(**json.loads(line)) for line in whole.splitlines()]


def together(parts: Sequence[Path]) -> tuple[dict, list[Answer]]:
    """One ``meta`` and all answers. ValueError where settings differ or two runs hold the same configuration."""
    merged: dict = {"runs": [], "servers": {}, "failed": {}, "not_measured": {}}
    answers: list[Answer] = []
    held: dict[str, Path] = {}
    for part in parts:
        meta, mine = read(part)
        settings = merged.setdefault("settings", meta["settings"])
        unlike = [name for name in settings | meta["settings"] if settings.get(name) != meta["settings"].get(name)]
        if unlike:
            raise ValueError(f"--merge {part.name}: its settings differ from {parts[0].name}'s ({', '.join(unlike)})")
        for config in {a.config for a in mine}:
            if config in held:
                raise ValueError(f"--merge: {config} is in {held[config].name} and in {part.name}")
            held[config] = part
        answers += mine
        merged["runs"].append(
            {k: meta[k] for k in ("command", "commit", "date", "gpu", "versions", "seconds") if k in meta}
        )
        for name in ("servers", "failed", "not_measured"):
            merged[name] |= meta.get(name, {})
    return merged, answers


def _cell(answer: Answer) -> tuple:
    return answer.task, answer.length


def _hardness(knobs: dict[str, int]) -> int:
    """Larger numbers are harder, but for a ratio of frequencies."""
    return sum(-value if name == "ratio" else value for name, value in knobs.items())


def choose(answers: Iterable[Answer], reference: str) -> dict[tuple, dict]:
    """(task, length) -> {knobs, rate, samples, note}: of the knobs that were asked at a length those with which
    ``reference`` passes nearest to AIM, in LOW..HIGH if any are.

    Judged by the samples that only the reference was asked, where there are some: knobs chosen by the samples that are
    compared would flatter it.
    """
    others: set[tuple] = set()
    mine: dict[tuple, dict[str, list[Answer]]] = defaultdict(lambda: defaultdict(list))
    for a in answers:
        if a.passed is None:
            continue
        knobs = json.dumps(a.knobs, sort_keys=True)
        if a.config == reference:
            mine[_cell(a)][knobs].append(a)
        else:
            others.add((_cell(a), knobs, a.depth, a.trial))
    out = {}
    for cell, by_knobs in mine.items():
        own = {k: [a for a in v if (cell, k, a.depth, a.trial) not in others] for k, v in by_knobs.items()}
        apart = all(own.values())
        held = own if apart else by_knobs
        rates = {k: fmean(bool(a.passed) for a in v) for k, v in held.items()}
        # Among equals the one next to the range.
        turn = {k: _hardness(by_knobs[k][0].knobs) * (-1 if rates[k] > HIGH else 1) for k in rates}
        best = min(rates, key=lambda k: (not LOW <= rates[k] <= HIGH, abs(rates[k] - AIM), turn[k]))
        note = "" if LOW <= rates[best] <= HIGH else "too easy" if rates[best] > HIGH else "too hard"
        if not apart:
            note = "; ".join(filter(None, (note, "chosen by the samples that are compared")))
        out[cell] = {"knobs": json.loads(best), "rate": rates[best], "samples": len(held[best]), "note": note}
    return out


def compared(answers: Sequence[Answer], chosen: dict[tuple, dict], reference: str) -> list[Answer]:
    """Answers with the chosen knobs; of the reference's, only to samples that another configuration was asked, too."""
    kept = [a for a in answers if _cell(a) in chosen and a.knobs == chosen[_cell(a)]["knobs"]]
    asked = {(_cell(a), a.depth, a.trial) for a in kept if a.config != reference}
    return [a for a in kept if a.config != reference or not asked or (_cell(a), a.depth, a.trial) in asked]


def write(out: Path, parts: Sequence[Path], reference: str | None, meta: dict) -> tuple[list[Answer], dict]:
    """OUT.csv, .json and .jsonl (every answer of the parts). Returns the answers that count, and what was chosen."""
    merged, every = together(parts)
    answers, chosen = list(every), {}
    if reference is not None:
        if not any(a.config == reference for a in every):
            raise ValueError(f"--within {reference}: no part has answers of it")
        chosen = choose(every, reference)
        answers = compared(every, chosen, reference)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".jsonl").write_text("".join(json.dumps(vars(a)) + "\n" for a in every))
    write_rows(out, rows(answers))
    listed = [{"task": t, "length": n, **what} for (t, n), what in chosen.items()]
    content = {**meta, **merged, **({"within": reference, "chosen": listed} if reference else {})}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    return answers, chosen
