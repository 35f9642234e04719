"""How far sampled tokens are expected to be off: against places taken one by one, and the whole program."""

import json
from types import SimpleNamespace

import pytest
import torch
from characters import Characters

from benchmarks.fidelity import __main__ as program
from benchmarks.fidelity import lab as lab_module
from benchmarks.fidelity import perplexity, run, tails
from benchmarks.fidelity.methods import IntPerToken
from benchmarks.fidelity.rows import read_csv


def test_expectations_are_those_of_each_place(tiny_subject, monkeypatch):
    """Of the places behind the prompt and before the last token, in parts or not."""
    model, ids, coarse = tiny_subject.model, tiny_subject.ids[:40], IntPerToken(2, 64, 64)
    monkeypatch.setattr(tails, "BEYOND", (0.05, 100))
    monkeypatch.setattr(tails, "PLACES", 7)
    exactly = [perplexity.hidden_states(model, ids, None)]
    found = tails.tail(model, [ids], exactly, 10, coarse)
    with torch.inference_mode():
        head = model.get_output_embeddings()
        true, read = (head(perplexity.hidden_states(model, ids, x)).log_softmax(-1) for x in (None, coarse))
    expected, most = 0.0, 0.0
    for place in range(9, 39):  # which say what tokens 10 to 39 are
        for token in range(true.shape[1]):
            gap = abs(float(read[place, token] - true[place, token]))
            expected += float(read[place, token].exp()) * (gap > 0.05)
            most = max(most, gap)
    assert found["tokens"] == 30 and 0 < expected < 30
    assert found["beyond_0.05"] == pytest.approx(1e6 * expected / 30, rel=1e-3) and found["beyond_100"] == 0
    assert found["largest"] == pytest.approx(most, rel=1e-3) and found["kl"] > 0
    same = tails.tail(model, [ids], exactly, 10, None)
    assert same["largest"] == same["beyond_0.05"] == 0


def test_texts_go_on_as_the_model_does(tiny_subject, monkeypatch):
    """By its own probabilities, and past its end; the same again with the same seed."""
    model, texts = tiny_subject.model, [tiny_subject.ids[:20], tiny_subject.ids[20:40]]
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(50)))
    once, again = (tails.sampled(model, texts, 8) for _ in range(2))
    assert once == again and once != texts
    assert [ids[:8] for ids in once] == [ids[:8] for ids in texts] and {len(ids) for ids in once} == {20}


def test_the_program_writes_every_row(tiny_subject, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", lambda *args: tiny_subject)
    monkeypatch.setattr(lab_module, "AutoTokenizer", Characters)
    monkeypatch.setattr(tails, "sources", lambda *args: {"model": {"name": "tiny"}})
    monkeypatch.setattr(tails, "sequences", lambda lab, length, texts: [lab.subject.ids[:length]] * texts)
    monkeypatch.setattr(tails, "Caches", lambda lab: SimpleNamespace(method=lambda e: IntPerToken(e.k_bits, 64, 64)))
    out = tmp_path / "tails.csv"
    asked = "--model-path", "some/tiny", "--out", str(out), "--length", "24", "--prompt", "8", "--texts", "1"
    assert program.main(["tails", *asked]) == 0
    rows = read_csv(out)
    assert [(r["text"], r["k_bits"], r["exact_recent"]) for r in rows[:4]] == [
        *(("sampled", "4", "32"), ("sampled", "4", "0"), ("sampled", "3", "32"), ("sampled", "3", "0"))
    ]
    assert len(rows) == 8 and {r["tokens"] for r in rows} == {"16"}
    assert all(float(r["beyond_0.5"]) >= float(r["beyond_1"]) > 0 for r in rows)
    (record,) = json.loads(out.with_suffix(".json").read_text())["runs"]
    assert record["command"].startswith("python -m benchmarks.fidelity tails") and record["model"] == {"name": "tiny"}


def test_a_prompt_of_the_whole_text_is_refused(capsys):
    with pytest.raises(SystemExit):
        tails.main(["--model-path", "x", "--out", "x.csv", "--prompt", "9", "--length", "9"])
    assert "--prompt 9 --length 9" in capsys.readouterr().err
