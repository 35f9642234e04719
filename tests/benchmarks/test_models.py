"""The models that the server benchmarks know by name."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import models
from benchmarks.models import KNOWN, REAL, Model

#: parameters that the published models have
PARAMETERS = {"qwen2.5-3b": 3_085_938_688, "llama-3.1-8b": 8_030_261_248, "qwen2.5-7b": 7_615_616_512}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(models, "small_model", lambda: "small")
    return "small"


@pytest.mark.parametrize("text", ["name", "=path", "name=", "name=path,", REAL + "="])
def test_bad_model(text):
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=PATH.*qwen2.5-3b"):
        Model.of(text)


def test_models_by_folder():
    assert Model.of("a=b") == Model("a", "b") and Model.of("a=b").args == []
    assert Model.of("a=b,c").args == ["--load-format=dummy", "--tokenizer-path", "c"]
    # A known name may stand for something of the user's.
    assert Model.of(f"{REAL}=b") == Model(REAL, "b")


def test_folders_need_nothing_else(monkeypatch):
    monkeypatch.setattr(models, "small_model", lambda: pytest.fail("asked for"))
    given = [Model("a", "b")]
    with models.ready(given) as found:
        assert found == given


@pytest.mark.parametrize("name", models.SHAPES)
def test_shapes_are_the_published_ones(name, small):
    with models.ready([Model.of(name)]) as (model,):
        assert model.tokenizer == small and model.args[0] == "--load-format=dummy"
        config = AutoConfig.from_pretrained(model.path)
    assert not Path(model.path).exists()
    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(config)
    assert loaded.num_parameters() == PARAMETERS[name]
    assert [type(loaded).__name__] == config.architectures
    assert config.dtype == torch.bfloat16


def test_the_rotation_of_long_contexts_is_read(small):
    with models.ready([Model.of("llama-3.1-8b")]) as (model,):
        rope = AutoConfig.from_pretrained(model.path).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 5e5)


def test_all_known_ones_at_once(small):
    parser = argparse.ArgumentParser()
    models.add_models(parser, KNOWN)
    with models.ready([*parser.parse_args([]).model, Model("a", "b")]) as found:
        layers = {
            m.name: json.loads((Path(m.path) / "config.json").read_text())["num_hidden_layers"]
            for m in found
            if m.tokenizer
        }
    assert [m.name for m in found] == [*KNOWN, "a"]
    assert layers == {"qwen2.5-3b": 36, "llama-3.1-8b": 32, "qwen2.5-7b": 28}
    assert next(m for m in found if m.name == REAL).path == small


def test_without_the_small_model(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("SMOLLM2", str(tmp_path / "nowhere"))
    with pytest.raises(models.ModelError, match="CONFIG_FOLDER,TOKENIZER_FOLDER"), models.ready([Model.of(REAL)]):
        pytest.fail("without a model")
    assert "not a model folder" in capfd.readouterr().err


@pytest.mark.parametrize("program", ["serving.run", "server_steps"])
def test_programs_say_so(program, monkeypatch, tmp_path, capfd):
    module = importlib.import_module(f"benchmarks.{program}")
    monkeypatch.setenv("SMOLLM2", str(tmp_path / "nowhere"))
    monkeypatch.setattr(models, "exit_on_sigterm", lambda: None)
    out = tmp_path / "out"
    assert module.main(["--out", str(out), "--model", "qwen2.5-3b", "--method", "bf16-fa3"]) == 2
    assert "--model: the small real model" in capfd.readouterr().err and not out.exists()
