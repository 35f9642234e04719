"""The script that trains a small model with wide heads, at a size that a CPU takes seconds for."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = "--layers 1 --hidden 32 --heads 2 --kv-heads 1 --head-dim 32 --context 32 --batch 2 --held-out 4".split()


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("train_model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        body = "\n".join(f"def function_{i}_{j}(x):\n    return x + {i * j}" for j in range(20))
        (folder / f"file{i}.py").write_text(body)
    (folder / "copy.py").write_text((folder / "file3.py").read_text())
    (folder / "short.py").write_text("x = 1")
    (folder / "table.bin").write_bytes(bytes(1000))
    return folder


def test_a_model_with_its_tokenizer_and_held_out_text_is_written(script, corpus, tmp_path, capsys):
    torch.set_num_threads(1)
    assert script.main(["--out", str(tmp_path), "--minutes", "0.02", "--text", str(corpus), *TINY]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.head_dim == 32 and model.config.num_key_value_heads == 1
    assert model.dtype == torch.bfloat16
    text = "def function_7_3(x):\n    return x + 21"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["tokens_seen"] >= 64 and 0 < record["held_out_loss"] < 9.5
    unseen = (tmp_path / "heldout.txt").read_text()
    seen = [text for text, out in script.text_files([corpus], 4) if not out]
    assert record["files"] == len(seen) and unseen
    assert not any(text in unseen for text in seen)


def test_text_is_prepared_for_a_training_elsewhere(script, corpus, tmp_path):
    here = ["--out", str(tmp_path / "a"), "--minutes", "0.01", "--text", str(corpus), *TINY]
    assert script.main([*here, "--prepare"]) == 0
    assert not (tmp_path / "a" / "config.json").exists()
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    there = ["--out", str(tmp_path / "b"), "--minutes", "0.01", "--text", str(tmp_path / "empty"), *TINY]
    assert script.main(there) == 0
    record = json.loads((tmp_path / "b" / "training.json").read_text())
    assert record["files"] == len([text for text, out in script.text_files([corpus], 4) if not out])
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_files_are_taken_once_and_in_one_order(script, corpus, tmp_path):
    found = list(script.text_files([corpus], 4))
    assert len(found) == 40 and 0 < sum(out for _, out in found) < 20
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for i, file in enumerate(sorted(corpus.glob("file*.py"), reverse=True)):
        (moved / f"{i}.py").write_text(file.read_text())
    assert list(script.text_files([moved], 4)) == found


def test_windows_lie_within_the_text(script):
    args = script.parse(["--out", "x", "--text", str(SCRIPTS), "--context", "8", "--batch", "50"])
    tokens = torch.arange(10)
    batch = script.batch_of(tokens, args, torch.Generator().manual_seed(0))
    assert batch.shape == (50, 8) and set(batch[:, 0].tolist()) == {0, 1}
    assert bool((batch.diff(dim=1) == 1).all())


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--text", "/nowhere"], "--text /nowhere: no such folder"),
        (["--text", str(SCRIPTS), "--heads", "4", "--kv-heads", "3"], "--kv-heads 3: 4 heads are no multiple"),
    ],
)
def test_bad_arguments_are_named(script, argv, words, capsys):
    with pytest.raises(SystemExit):
        script.parse(["--out", "x", *argv])
    assert words in capsys.readouterr().err


def test_too_little_text_is_refused(script, tmp_path, capsys):
    (tmp_path / "one.py").write_text("x = 1\n" * 100)
    assert script.main(["--out", str(tmp_path / "out"), "--text", str(tmp_path), *TINY]) == 2
    assert "too few" in capsys.readouterr().err and not (tmp_path / "out").exists()
