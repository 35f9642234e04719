"""Runs of several processes put together, and the difficulty that counts."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from benchmarks.tasks import __main__ as program
from benchmarks.tasks import merge
from benchmarks.tasks.record import Answer, Record

EASY, HARD = {"digits": 3}, {"digits": 9}


def part(folder: Path, config: str, passes: dict, trials: int, task: str = "single", **settings) -> Path:
    """A run's files. passes: depth, trial, digits -> bool."""
    out = folder / f"{config}.csv"
    record = Record(out, {"seed": 0, **settings}, {"command": f"run {config}", "commit": "abc", "not_measured": {}})
    for trial in range(trials):
        for depth in (0.0, 1.0):
            for knobs in (EASY, HARD):
                passed = passes(depth, trial, knobs["digits"])
                usage = (512, 480, 3, "stop")
                record.add(Answer(config, "sglang", task, 512, depth, trial, knobs, float(passed), passed, "", *usage))
    record.meta["servers"] = {config: {"engine": "sglang"}}
    record.write()
    return out


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """bf16 was asked trials that K3V3 was not (2 to 9): of them it passes all easy and 80 % of the hard ones; of those
    that both were asked it passes all."""
    bf16 = part(tmp_path, "bf16", lambda depth, trial, digits: digits == 3 or trial < 2 or trial % 5 != 0, 12)
    return [bf16, part(tmp_path, "k3v3", lambda depth, trial, digits: depth == 1, 2)]


def rows(out: Path) -> list[dict]:
    with out.open() as f:
        return list(csv.DictReader(f))


def test_everything_is_kept_without_a_range(parts, tmp_path):
    out = tmp_path / "all" / "results.csv"
    assert program.main(["--out", str(out), "--merge", *map(str, parts)]) == 0
    assert {(r["config"], r["knobs"], r["samples"]) for r in rows(out)} == {
        ("bf16", "digits=3", "12"),
        ("bf16", "digits=9", "12"),
        ("k3v3", "digits=3", "2"),
        ("k3v3", "digits=9", "2"),
    }
    meta = json.loads(out.with_suffix(".json").read_text())
    assert meta["settings"] == {"seed": 0} and set(meta["servers"]) == {"bf16", "k3v3"}
    assert [run["command"] for run in meta["runs"]] == ["run bf16", "run k3v3"]
    for config in ("bf16", "k3v3"):
        assert (out.parent / f"results_{config}.png").read_bytes()[:4] == b"\x89PNG"
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 2 * 2 * (12 + 2)


def test_the_difficulty_is_chosen_by_samples_of_its_own(parts, tmp_path, capsys):
    out = tmp_path / "all" / "results.csv"
    assert program.main(["--out", str(out), "--merge", *map(str, parts), "--within", "bf16"]) == 0
    found = {(r["config"], r["depth"]): (r["knobs"], r["samples"], float(r["pass_rate"])) for r in rows(out)}
    # bf16 counts only where K3V3 was asked, too.
    assert found == {
        ("bf16", "0"): ("digits=9", "2", 1),
        ("bf16", "1"): ("digits=9", "2", 1),
        ("k3v3", "0"): ("digits=9", "2", 0),
        ("k3v3", "1"): ("digits=9", "2", 1),
    }
    (chosen,) = json.loads(out.with_suffix(".json").read_text())["chosen"]
    assert chosen == {"task": "single", "length": 512, "knobs": HARD, "rate": 0.8, "samples": 20, "note": ""}
    assert "80% of 20" in capsys.readouterr().out


def test_says_where_no_difficulty_suits(tmp_path):
    both = [part(tmp_path, config, lambda depth, trial, digits: digits == 3, 2) for config in ("bf16", "k3v3")]
    _, chosen = merge.write(tmp_path / "o.csv", both, "bf16", {})
    assert chosen["single", 512]["knobs"] == EASY
    assert chosen["single", 512]["note"] == "too easy; chosen by the samples that are compared"


@pytest.mark.parametrize(("passes", "knobs", "note"), [(True, HARD, "too easy"), (False, EASY, "too hard")])
def test_the_nearest_of_unsuitable_difficulties(tmp_path, passes, knobs, note):
    out = [part(tmp_path, "bf16", lambda *_: passes, 3), part(tmp_path, "k3v3", lambda *_: passes, 1)]
    _, chosen = merge.write(tmp_path / "o.csv", out, "bf16", {})
    assert (chosen["single", 512]["knobs"], chosen["single", 512]["note"]) == (knobs, note)


def test_refuses_what_does_not_belong_together(parts, tmp_path, capsys):
    other = part(tmp_path / "other", "k2v2", lambda *_: True, 1, seed=1)
    again = part(tmp_path / "again", "k3v3", lambda *_: True, 1)
    out = str(tmp_path / "all.csv")
    for more, says in (
        ([str(other)], "settings differ from bf16.csv's (seed)"),
        ([str(again)], "k3v3 is in k3v3.csv and in k3v3.csv"),
        ([str(tmp_path / "none.csv")], "none.json is not there"),
    ):
        assert program.main(["--out", out, "--merge", *map(str, parts), *more]) == 2
        assert says in capsys.readouterr().err
    assert program.main(["--out", out, "--merge", *map(str, parts), "--within", "fp8"]) == 2
    assert "no part has answers of it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["--out", str(parts[0]), "--merge", *map(str, parts)])


def test_half_a_line_of_a_killed_run_is_left_out(parts, tmp_path):
    lines = parts[1].with_suffix(".jsonl")
    lines.write_text(lines.read_text()[:-20])
    assert len(merge.read(parts[1])[1]) == 7


def test_rates_reach_the_quality_card(parts, tmp_path):
    pytest.importorskip("transformers")
    from benchmarks.fidelity import card

    out = tmp_path / "all.csv"
    merge.write(out, parts, "bf16", {})
    rates = card.pass_rates(out)
    assert rates == {"bf16": {"single": 1.0}, "k3v3": {"single": 0.5}}
    assert {card.bits_of(name) for name in ("bf16", "fp8_e4m3", "balanced")} == {"bf16", "fp8", "k3v3"}
    lines = [{"name": name, "bytes": 1.0} for name in ("bf16", "balanced", "compact")]
    page = card.page("tiny", lines, {}, rates).splitlines()
    assert page[2].endswith("| single |")
    assert page[4].endswith("| 100 % |") and page[5].endswith("| 50 % |") and page[6].endswith("|  |")


def test_no_pictures_without_matplotlib(parts, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "all" / "results.csv"
    assert program.main(["--out", str(out), "--merge", *map(str, parts)]) == 0
    assert rows(out) and not list(out.parent.glob("*.png")) and "matplotlib" in capsys.readouterr().err
