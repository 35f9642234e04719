"""The record as a page to read: targets, tables against bf16, what is missing and why, pictures."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from . import plot
from .record import MEASURED, Record
from .targets import baseline, cases, models, verdicts

HEADINGS = {
    "decode": "Decode, one sequence",
    "batch": "Decode, batches",
    "capacity": "Capacity",
    "pressure": "Throughput under memory pressure",
    "prefixes": "Shared prefixes",
    "prefill": "Prefill",
    "cost": "Start-up and memory",
}
#: no "x bf16" beside these
PLAIN = {
    "hit_rate",
    "retractions",
    "decode_requests",
    "working_set",
    "cache",
    "bytes_per_token",
    "memory_weights",
    "memory_peak",
    "memory_requests",
}


def number(value: float, unit: str) -> tuple[str, str]:
    """Value and unit for a reader."""
    if unit == "bytes" and abs(value) >= 1 << 20:
        return f"{value / 2**30:.3g}", "GiB"
    if unit in ("tokens", "requests") or abs(value) >= 1000:
        return f"{value:,.0f}", unit
    return f"{value:.4g}", unit


def table(record: Record, model: str, scenario: str) -> list[str]:
    """Markdown lines: a row a case and measure, a column a method; in brackets the ratio to bf16."""
    rows = [r for r in record.rows if (r.model, r.scenario) == (model, scenario)]
    methods = list(dict.fromkeys(r.method for r in rows))
    found = {(r.method, r.case, r.measure): r for r in rows}
    out = [f"| case | measure | {' | '.join(methods)} |", f"|---|---|{'---:|' * len(methods)}"]
    for case in cases(record, model, scenario):
        base = baseline(record, model, scenario, case)
        measures = list(dict.fromkeys(r.measure for r in rows if r.case == case and r.measure)) or [""]
        for measure in measures:
            cells, unit = [], ""
            for method in methods:
                row = found.get((method, case, measure))
                if row is None or row.value is None:
                    missing = found.get((method, case, ""))
                    cells.append(missing.state if missing and missing.state != "not measured" else "")
                    continue
                text, unit = number(row.value, row.unit)
                reference = found.get((base, case, measure))
                ratio = reference and reference.value and method != base and measure not in PLAIN
                cells.append(f"{text} ({row.value / reference.value:.2f}x)" if ratio else text)
            if measure or any(cells):
                label = f"{measure}, {unit}" if unit and unit != measure else measure
                out.append(f"| {case} | {label} | {' | '.join(cells)} |")
    return out if len(out) > 2 else []


def missing(record: Record) -> list[str]:
    """Every reason, and the cases that it left without a figure."""
    reasons: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for r in record.rows:
        if r.state != MEASURED:
            reasons[f"{r.model}/{r.method}", r.state, r.note].append(f"{r.scenario} {r.case}")
    return [
        f"* {name}, {state}: {note or 'no reason given'} ({'; '.join(where)})"
        for (name, state, note), where in reasons.items()
    ]


def page(record: Record, pictures: list[str]) -> str:
    meta = record.meta
    runs, settings = meta.get("runs", []), meta.get("settings", {})
    gpu = settings.get("gpu") or "no GPU"
    versions = ", ".join(f"{name} {v}" for name, v in settings.get("versions", {}).items())
    commits = ", ".join(dict.fromkeys(run["commit"][:12] or "unknown" for run in runs))
    out = ["# Serving benchmark", "", f"{gpu}; {versions}. Commit {commits or 'unknown'}.", ""]
    smoke = settings.get("sizes", {}).get("name") == "smoke"
    if smoke:
        out += ["**A smoke run: the loads are far too small for its figures to mean anything.**", ""]
    out += [f"    {run['command']}" for run in runs[-1:]]
    share = settings.get("mem_fraction")
    share, own = settings.get("mem_fraction"), settings.get("server_args")
    out += ["", f"Every server had `--mem-fraction-static={share}`{f', then `{own}`' if own else ''}. In brackets: the"]
    out += ["ratio to bf16, of which less is better for times and memory, more for all else. An empty cell was not"]
    out += ["measured; the end says why.", ""]
    if not smoke:
        out += ["## Targets", "", "| model | scenario | case | measure | method | target | measured | |"]
        out += ["|---|---|---|---|---|---|---:|---|"]
        for v in verdicts(record):
            met = {True: "met", False: "**missed**", None: ""}[v.met]
            cells = (v.model, v.scenario, v.case, v.measure, v.method, v.target, v.shown, met)
            out.append(f"| {' | '.join(cells)} |")
    for model in models(record):
        out += ["", f"## {model}"]
        for scenario, heading in HEADINGS.items():
            if lines := table(record, model, scenario):
                out += ["", f"### {heading}", "", *lines]
        out += ["", *(f"![{name}]({name})" for name in pictures if name.startswith(f"{model}_"))]
    out += ["", "## Checks", "", "| server | |", "|---|---|"]
    for name, check in meta["checks"].items():
        found = (
            f"**refused**: {check['failed']}" if "failed" in check else ", ".join(f"{k} {v}" for k, v in check.items())
        )
        out.append(f"| {name} | {found} |")
    if lines := missing(record):
        out += ["", "## Not measured", "", *lines]
    return "\n".join(out) + "\n"


def write(record: Record, folder: Path) -> None:
    """report.md and its pictures, which are left out where matplotlib is not there."""
    try:
        pictures = plot.write(record, folder)
    except ModuleNotFoundError as e:
        print(f"no pictures ({e}): --report-only makes them where it is installed", file=sys.stderr)
        pictures = []
    (folder / "report.md").write_text(page(record, pictures))
