"""The quality card: its numbers on a tiny model, its page."""

import json

import pytest

from benchmarks.fidelity import __main__ as program
from benchmarks.fidelity import card, run


def test_every_preset_has_a_line_and_more_bits_cost_less(tiny_subject, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load", lambda *args: tiny_subject)
    monkeypatch.setattr(card, "sources", lambda *args: {"model": {"name": "tiny"}})
    lines = {line["name"]: line for line in card.measure(tiny_subject, 4)}
    assert list(lines) == ["float32", "bf16", "fp8_e4m3", *card.FIXED]
    assert [lines[n]["bytes"] for n in ("float32", "bf16", "fp8_e4m3")] == [512, 256, 128]
    ranked = sorted(card.FIXED, key=lambda name: lines[name]["bytes"], reverse=True)
    for column in ("mae", "softmax_kl", "kl_final"):
        values = [lines[name][column] for name in ("bf16", *ranked)]
        assert 0 < values[0] and values == sorted(values), column
    out = tmp_path / "quality.md"
    assert program.main(["card", "--model-path", "tiny", "--out", str(out), "--queries", "4", "--every", "2"]) == 0
    text = out.read_text()
    assert all(f"| {name} (K" in text for name in card.FIXED) and capsys.readouterr().out.strip() in text
    assert "their last 32 tokens, their own among them, in 16 bits" in text
    assert "--kv-quant-exact-recent 32 does" in text
    record = json.loads(text.split("```json\n")[1].split("```")[0])
    assert record["command"].endswith("--exact-recent 32")
    assert record["model"]["name"] == "tiny" and record["evaluation"]["tokens"] == 400


def test_presets_read_the_last_tokens_as_a_server_does(tiny_subject):
    """And only they; where all are exact, what is left is what 16 bits cost. Attention of a random model is not on its
    last tokens, so its KL need not fall."""
    none, some, every = (
        {line["name"]: line for line in card.measure(tiny_subject, 4, recent=recent)} for recent in (0, 8, 400)
    )
    for column in ("mae", "softmax_kl", "kl_final"):
        for name in card.FIXED:
            assert none[name][column] != some[name][column] > 100 * every[name][column], (name, column)
            assert none[name][column] > some[name][column] or column == "softmax_kl", (name, column)
            assert every[name][column] < none["bf16"][column], (name, column)
        assert none["bf16"][column] == some["bf16"][column] == every["bf16"][column]
    assert all(none[name]["bytes"] == some[name]["bytes"] for name in none)
    assert not any("16 bits" in line for line in card.notes(0)) and "their own token in 16" in " ".join(card.notes(1))


@pytest.mark.parametrize("recent", ["65", "-1", "all"])
def test_exact_tokens_that_no_server_keeps(recent, capsys):
    with pytest.raises(SystemExit):
        card.main(["--model-path", "m", "--out", "o", f"--exact-recent={recent}"])
    assert f"--exact-recent: '{recent}': a whole number up to 64 is needed, e.g. 32" in capsys.readouterr().err


def test_pass_rates_of_tasks_are_weighed_by_their_samples(tmp_path):
    tasks = tmp_path / "tasks.csv"
    tasks.write_text(
        "config,task,samples,pass_rate\nbf16,single,10,1.0\nbf16,single,30,0.8\nk3v3,single,40,0.5\nk3v3,f1,40,\n"
    )
    rates = card.pass_rates(tasks)
    assert rates == {"bf16": {"single": pytest.approx(0.85)}, "k3v3": {"single": 0.5}}
    lines = [
        {"name": "bf16", "bytes": 256, "against_bf16": 1.0},
        {"name": "balanced", "bytes": 52, "against_bf16": 4.92},
    ]
    table = [line for line in card.page("m", lines, {}, rates).splitlines() if line.startswith("|")]
    assert table[0].endswith("| KL of the answer | single |")
    assert table[2].startswith("| bf16 | 256 | 1.00x |") and table[2].endswith("| 85 % |")
    assert table[3].startswith("| balanced (K3V3) | 52 | 4.92x |") and table[3].endswith("| 50 % |")


def test_missing_tasks_are_named(capsys):
    with pytest.raises(SystemExit):
        card.main(["--model-path", "m", "--out", "o", "--tasks", "/nowhere.csv"])
    assert "--tasks /nowhere.csv: no such file" in capsys.readouterr().err
