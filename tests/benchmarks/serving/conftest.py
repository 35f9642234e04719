"""A stand-in for SGLang where a test starts processes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"


def _standin():
    spec = importlib.util.spec_from_file_location("serving_standin", HERE / "standin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def data() -> Path:
    """Files that SGLang 0.5.23's load generators and server wrote, shortened."""
    return DATA


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """Returns a function that gives the load generators' arguments of all calls so far."""
    from benchmarks import models
    from benchmarks.serving import run

    monkeypatch.setenv("PYTHONPATH", str(_standin().write(tmp_path / "standin")))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SAMPLE", str(DATA / "bench_serving.jsonl"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "0")  # main sets it: restored afterwards
    for name in ("FAKE", "BROKEN", "FAILS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(models, "exit_on_sigterm", lambda: None)  # not in the test process
    monkeypatch.setattr(run, "plain_token", lambda tokenizer: 123)
    monkeypatch.setattr(run, "check_prompt", lambda model, tokens: list(range(200, 200 + tokens)))
    calls = tmp_path / "calls"
    return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
