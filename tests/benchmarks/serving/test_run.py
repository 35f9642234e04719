"""The whole program against a stand-in for SGLang: checks that refuse, resumption, failures, budget, files."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks import launch
from benchmarks.serving import check, run
from benchmarks.serving.record import COLUMNS

K3 = "blockgtq-k3v3"


def go(tmp_path, *options: str, model: str = "tiny=some/config,some/tokenizer") -> tuple[int, list[dict], dict]:
    out = tmp_path / "out"
    code = run.main(["--out", str(out), "--model", model, "--sizes", "smoke", "--commit", "abc", *options])
    with (out / "serving.csv").open() as f:
        return code, list(csv.DictReader(f)), json.loads((out / "serving.json").read_text())


def values(rows: list[dict], method: str, scenario: str) -> dict:
    return {(r["case"], r["measure"]): r["value"] for r in rows if (r["method"], r["scenario"]) == (method, scenario)}


def test_everything_is_measured_once(standin, tmp_path):
    code, rows, meta = go(tmp_path, "--method", K3, "bf16-fa3")
    assert code == 0 and tuple(rows[0]) == COLUMNS
    assert {r["state"] for r in rows} == {"measured"}
    assert [r["method"] for r in rows][0] == "bf16-fa3"  # the others need its capacity
    assert values(rows, "bf16-fa3", "decode")["64", "step"] == "10"
    assert values(rows, K3, "decode")["128", "step"] == "5"
    assert values(rows, K3, "batch")["2x64", "output_throughput"] == "400"
    assert values(rows, K3, "prefill")["64", "ttft"] == "64"
    assert values(rows, K3, "capacity")["start", "bytes_per_token"] == "100"
    assert values(rows, K3, "cost")["start", "table"] == "2.5"
    assert values(rows, "bf16-fa3", "pressure")["64+8 x2", "retractions"] == "2"
    # 1000 tokens fit bf16: prefixes of 64 tokens are made to take twice that, for every server alike.
    assert {r["case"] for r in rows if r["scenario"] == "prefixes"} == {"32x64 by 1, round 1", "32x64 by 1, round 2"}
    assert meta["runs"][0]["commit"] == "abc" and set(meta["servers"]) == {"tiny/bf16-fa3", f"tiny/{K3}"}
    assert "random weights" in meta["checks"][f"tiny/{K3}"]["note"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "smoke run" in report and "5 (0.50x)" in report and "tiny_decode.png" in report
    assert (tmp_path / "out" / "tiny_decode.png").stat().st_size > 5000

    calls = len(standin())
    code, again, meta = go(tmp_path, "--method", K3, "bf16-fa3")
    assert code == 0 and again == rows and len(standin()) == calls and len(meta["runs"]) == 2


def test_rounds_share_one_cache(standin, tmp_path):
    go(tmp_path, "--method", K3, "--only", "*/prefixes/*")
    first, second = standin()
    assert "--flush-cache" in first and "--flush-cache" not in second
    assert first[first.index("--warmup-requests") + 1] == "1" and second[second.index("--warmup-requests") + 1] == "0"


@pytest.mark.parametrize(
    ("fake", "refused", "says"),
    [("nan", [K3], "not finite"), ("drift", ["bf16-fa3", K3], "the same request twice"), ("off", [K3], "unquantized")],
)
def test_a_wrong_server_is_not_timed(standin, tmp_path, monkeypatch, fake, refused, says):
    monkeypatch.setenv("FAKE", fake)
    # Real weights: no tokenizer is named.
    code, rows, meta = go(tmp_path, "--method", "bf16-fa3", K3, "--only", "*/decode/*", model="tiny=some/model")
    assert code == 1
    assert {r["method"] for r in rows if r["state"] == "not measured"} == set(refused)
    assert not [r for r in rows if r["method"] in refused and r["value"]]
    assert all(says in r["note"] for r in rows if r["method"] == refused[0])
    assert len(standin()) == 2 - len(refused)
    assert says in meta["checks"][f"tiny/{refused[0]}"]["failed"]
    assert says in (tmp_path / "out" / "report.md").read_text()


def test_reference_is_asked_for_where_it_is_missing(standin, tmp_path):
    code, rows, meta = go(tmp_path, "--method", K3, "--only", "*/decode/*", model="tiny=some/model")
    assert code == 0 and len(standin()) == 1 and {r["method"] for r in rows} == {K3}
    assert meta["references"]["tiny"]["method"] == "bf16-fa3"
    assert meta["checks"][f"tiny/{K3}"]["reference_gap"] == 0
    assert check.bound(3) == meta["checks"][f"tiny/{K3}"]["allowed"]


def test_random_weights_need_no_agreement(standin, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "off")
    code, rows, _ = go(tmp_path, "--method", "bf16-fa3", K3, "--only", "*/decode/*")
    assert code == 0 and {r["state"] for r in rows} == {"measured"}


def test_a_server_that_dies_says_why(standin, tmp_path):
    code, rows, _ = go(tmp_path, "--method", "fp8-fa3", K3, "--only", "*/capacity/*", "*/batch/*")
    assert code == 1
    notes = {r["note"] for r in rows if r["method"] == "fp8-fa3"}
    assert len(notes) == 1 and "no fp8 here" in notes.pop()
    assert {r["state"] for r in rows if r["method"] == K3} == {"measured"}


def test_a_broken_load_generator_is_tried_again(standin, tmp_path, monkeypatch):
    monkeypatch.setenv("BROKEN", "serving")
    code, rows, _ = go(tmp_path, "--method", K3, "--only", "*/decode/*", "*/pressure/*")
    assert code == 1
    broken = [r for r in rows if r["scenario"] == "pressure"]
    assert [r["state"] for r in broken] == ["not measured"] and "exit code 1" in broken[0]["note"]
    assert not broken[0]["value"] and values(rows, K3, "decode")["64", "step"] == "5"
    monkeypatch.delenv("BROKEN")
    monkeypatch.setenv("FAILS", "1")
    _, rows, _ = go(tmp_path, "--method", K3, "--only", "*/decode/*", "*/pressure/*")
    assert [r["note"] for r in rows if r["scenario"] == "pressure"] == ["1 of 4 requests failed: Bad gateway"]
    monkeypatch.delenv("FAILS")
    _, rows, _ = go(tmp_path, "--method", K3, "--only", "*/decode/*", "*/pressure/*")
    assert {r["state"] for r in rows} == {"measured"}
    assert [call[0] for call in standin()] == ["one_batch_server", "serving", "serving", "serving"]


def test_without_load_generators_no_second_server_starts(standin, tmp_path, capsys):
    """The first is not waited for either."""
    (tmp_path / "standin" / "sglang" / "benchmark" / "serving.py").write_text("import a_module_that_is_not_there\n")
    server = tmp_path / "standin" / "sglang" / "launch_server.py"
    server.write_text("import time\nprint('starting', flush=True)\ntime.sleep(300)\n")
    code, rows, _ = go(tmp_path, "--method", K3, "bf16-fa3", "--only", "*/decode/*")
    assert code == 2 and rows == []
    said = capsys.readouterr().err
    assert "No module named 'a_module_that_is_not_there'" in said and "pip installs" in said
    assert [p.name for p in (tmp_path / "out" / "logs").iterdir()] == ["tiny_bf16-fa3.log"]


def test_without_a_text_nothing_starts(standin, tmp_path, capsys, monkeypatch):
    def missing(model, tokens):
        raise FileNotFoundError("long_prompt.txt")

    monkeypatch.setattr(run, "check_prompt", missing)
    out = tmp_path / "out"
    assert run.main(["--out", str(out), "--model", "tiny=some/model", "--method", "bf16-fa3", "--sizes", "smoke"]) == 2
    assert "long_prompt.txt" in capsys.readouterr().err and not (out / "serving.csv").exists()


def test_what_does_not_fit_is_a_result(standin, tmp_path):
    sizes = run.NAMED["smoke"]
    big = type(sizes)(**{**vars(sizes), "decode": (64, 2000), "pressure": (5000, 8)})
    try:
        run.NAMED["smoke"] = big
        _, rows, _ = go(tmp_path, "--method", "bf16-fa3", "--only", "*/decode/*", "*/pressure/*")
    finally:
        run.NAMED["smoke"] = sizes
    unfit = {r["scenario"]: r for r in rows if r["state"] == "does not fit"}
    assert unfit["decode"]["case"] == "2000" and "2009 tokens are needed, 1000 fit" == unfit["decode"]["note"]
    assert "5008 tokens" in unfit["pressure"]["note"]
    assert [r["case"] for r in rows if r["state"] == "measured"] == ["64"]


def test_nonsense_is_refused_with_random_weights_too(standin, tmp_path, monkeypatch):
    for fake, says in (("nan", "not finite"), ("positive", "a log-probability of a cold prompt is 0.5")):
        monkeypatch.setenv("FAKE", fake)
        code, rows, _ = go(tmp_path, "--method", K3, "--only", "*/decode/*")
        assert code == 1 and all(says in r["note"] and not r["value"] for r in rows) and standin() == []


def test_no_server_starts_that_would_be_too_late(standin, tmp_path, monkeypatch):
    left = iter([100, 0.01])
    monkeypatch.setattr(run.Budget, "left", property(lambda self: next(left, 0.01)))
    monkeypatch.setattr(run.Budget, "timeout", lambda self: 100)
    _, rows, meta = go(tmp_path, "--method", "bf16-fa3", K3, "--only", "*/decode/*")
    assert set(meta["servers"]) == {"tiny/bf16-fa3"}
    assert {r["note"] for r in rows if r["method"] == K3} == {"the budget was spent"}


def test_a_server_that_was_loaded_is_warm(standin, tmp_path):
    go(tmp_path, "--method", K3, "--only", "*/batch/*", "*/pressure/*")
    go(tmp_path / "alone", "--method", K3, "--only", "*/pressure/*")
    warm = [call[call.index("--warmup-requests") + 1] for call in standin() if call[0] == "serving"]
    assert warm == ["0", "1"]


def test_a_spent_budget_leaves_rows_without_values(standin, tmp_path):
    _, rows, _ = go(tmp_path, "--method", K3, "--budget", "0", "--only", "*/decode/*")
    assert [(r["state"], r["note"], r["value"]) for r in rows] == [("not measured", "the budget was spent", "")] * 2
    assert standin() == []


def test_other_settings_need_another_folder(standin, tmp_path, capsys):
    go(tmp_path, "--method", K3, "--only", "*/capacity/*")
    before = (tmp_path / "out" / "serving.csv").read_text()
    code, *_ = go(tmp_path, "--method", K3, "--mem-fraction", "0.5")
    assert code == 2 and "mem_fraction" in capsys.readouterr().err
    assert (tmp_path / "out" / "serving.csv").read_text() == before


def test_without_the_plugin_nothing_starts(standin, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "entry_points", lambda **names: ())
    out = tmp_path / "out"
    command = ["--out", str(out), "--model", "tiny=a,b", "--sizes", "smoke", "--commit", "abc"]
    assert run.main([*command, "--method", "bf16-fa3", K3]) == 2
    assert "sglang-blockgtq is not installed" in capsys.readouterr().err
    assert not out.exists() and standin() == []
    code, rows, _ = go(tmp_path, "--method", "bf16-fa3", "--only", "*/capacity/*")  # needs none
    assert code == 0 and {r["state"] for r in rows} == {"measured"}
