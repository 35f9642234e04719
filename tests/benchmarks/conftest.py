"""Tests of what lies in benchmarks/ and scripts/, which are not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sglang_blockgtq.calibrate.hf import collect
from sglang_blockgtq.calibrate.rope import RopeBlocks

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@pytest.fixture(scope="session")
def root() -> Path:
    """Of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """A program of scripts/, by name, as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def _subject(tiny_llama):
    from benchmarks.fidelity.run import Subject

    model, rope = tiny_llama(64), [RopeBlocks(64, 64)] * 2
    draw = torch.Generator().manual_seed(1)
    *texts, ids = (torch.randint(0, 97, (n,), generator=draw).tolist() for n in (256, 200, 400))
    return Subject(model, rope, collect(model, texts, rope, progress=False), ids, "", texts)


@pytest.fixture
def tiny_subject(_subject):
    """What benchmarks.fidelity measures: a tiny model, calibrated on random tokens, and 400 others to measure."""
    return replace(_subject)


@pytest.fixture
def instead_of_sglang(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Have a script take sglang.launch_server's place in processes that are started; returns the file of its
    requests."""

    def take(script: str) -> Path:
        package = tmp_path / "fake" / "sglang"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "launch_server.py").write_text(script)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        monkeypatch.setenv("REQUESTS", str(tmp_path / "requests"))
        monkeypatch.setenv("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "0")  # main sets it: restored afterwards
        monkeypatch.setattr("benchmarks.models.exit_on_sigterm", lambda: None)  # not in the test process
        return tmp_path / "requests"

    return take
