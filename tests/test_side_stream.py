"""The stream on which a step is encoded: what waits for what, and which models have none."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessor

from sglang_blockgtq.backend import side_stream
from sglang_blockgtq.backend.side_stream import SideStream


class Queue(list):
    """What is queued, in order."""


class Logits(LogitsProcessor):
    def __init__(self, done):
        torch.nn.Module.__init__(self)
        self.done = done

    def forward(self):
        self.done.append("logits")


@pytest.fixture
def done(monkeypatch):
    done, now = Queue(), ["main"]

    def stream(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: done.append(f"{name} waits for {other.name}"))

    @contextmanager
    def on(entered):
        now.append(entered.name)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream(now[-1]))
    monkeypatch.setattr(side_stream, "LogitsProcessor", Logits)
    done.work = lambda *args: done.append((now[-1], *args))
    return done


def runner(done, **other):
    model = SimpleNamespace(logits_processor=Logits(done))
    return SimpleNamespace(**{"model": model, "device": "cuda", "pp_group": SimpleNamespace(world_size=1), **other})


def test_logits_wait_for_what_was_run(done):
    run = runner(done)
    side = SideStream.of(run)
    run.model.logits_processor()
    assert done == ["logits"], "nothing is under way"
    for step in (1, 2):
        del done[:]
        side.run(done.work, "loc", step)
        run.model.logits_processor()
        assert done == ["side waits for main", ("side", "loc", step), "logits", "main waits for side"]


@pytest.mark.parametrize("other", ["cpu", "stages", "no logits", "other logits", "cut"])
def test_a_step_that_nobody_waits_for_has_no_stream(done, monkeypatch, other):
    given = {
        "cpu": {"device": "cpu"},
        "stages": {"pp_group": SimpleNamespace(world_size=2)},
        "no logits": {"model": SimpleNamespace()},
        "other logits": {"model": SimpleNamespace(logits_processor=torch.nn.Identity())},
        "cut": {},
    }[other]
    monkeypatch.setattr(side_stream, "check_cuda_graph_backend", lambda phase, backend: other == "cut")
    assert SideStream.of(runner(done, **given)) is None
