"""The program that starts a server of every family: what it makes of a server's end, and its files."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks.compatibility import __main__ as program
from benchmarks.compatibility.families import FAMILIES


@pytest.mark.parametrize(
    ("output", "outcome", "words"),
    [
        ("loading\nerror: --kv-quant blockgtq: model type x: no; serve\n", "refused", "model type x: no"),
        ("sglang_blockgtq.options.KVQuantError: --kv-quant blockgtq: late\n", "failed", "late"),
        ("RuntimeError: --kv-quant blockgtq: ours\nBrokenPipeError: [Errno 32] Broken pipe\n", "failed", "ours"),
        ("  File '/a/b.py'\nIndexError: index 18\n", "failed", "IndexError: index 18"),
        ("nothing\n", "failed", "no reason found"),
    ],
)
def test_why_a_server_did_not_start(output, outcome, words):
    found = program.why(output)
    assert found[0] == outcome and words in found[1]


@pytest.fixture
def model_folder(monkeypatch, tmp_path):
    """With a tokenizer of one token for each number."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: lambda _: {"input_ids": [*range(999)]})
    return folder


@pytest.fixture
def asked(monkeypatch, model_folder):
    """Measures nothing, and keeps which families were asked for."""
    names = []

    def measure(family, tokenizer, ids, folder, user):
        names.append(family.name)
        assert tokenizer == model_folder and len(ids) == program.LENGTH and user == ["--page-size=16"]
        return {"family": family.name, "outcome": "served"}

    monkeypatch.setattr(program, "measure", measure)
    monkeypatch.setattr(program, "missing_plugin", lambda args: None)
    return names


def test_files(asked, model_folder, tmp_path):
    out, first, second = tmp_path / "deep" / "c.csv", FAMILIES[0].name, FAMILIES[1].name
    args = ["--tokenizer", str(model_folder), "--out", str(out), "--server-args=--page-size=16", "--commit", "abc"]
    assert program.main([*args, "--only", first]) == 0
    assert program.main([*args, "--append", "--only", first, second]) == 0
    assert asked == [first, second]
    with out.open() as file:
        assert [(row["family"], row["outcome"]) for row in csv.DictReader(file)] == [
            (first, "served"),
            (second, "served"),
        ]
    made = json.loads(out.with_suffix(".json").read_text())
    assert made["commit"] == "abc" and made["server_args"][-1] == "--page-size=16" and "/" not in made["command"]


def test_a_folder_without_a_tokenizer(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["--tokenizer", str(tmp_path), "--out", str(tmp_path / "c.csv")])
    assert "no tokenizer_config.json there; name a model's folder" in capsys.readouterr().err
