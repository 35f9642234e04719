"""The comparison of the emulation with the server: its figures, and what is recorded."""

from __future__ import annotations

from math import exp
from pathlib import Path

import pytest
import torch

from benchmarks.launch import ServerError
from benchmarks.tasks import agreement


def test_figures():
    got = agreement.row([-1.0, -3.0], [-1.5, -3.0], [-1.5, -3.25])
    assert got["tokens"] == 2 and got["ppl"] == pytest.approx(exp(2))
    assert (got["ppl_emulation"], got["ppl_server"]) == pytest.approx((exp(2.25), exp(2.375)))
    assert (got["gap"], got["gap_largest"]) == (0.125, 0.25)
    assert (got["emulation_to_unquantized"], got["server_to_unquantized"]) == (0.25, 0.375)


def test_log_probabilities_of_hidden_states():
    class Model:
        def get_output_embeddings(self):
            return torch.nn.Identity()

    hidden = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 9.0], [5.0, 5.0, 5.0]])
    assert agreement.of_hidden(Model(), [0, 2, 1], hidden) == pytest.approx(
        [hidden[0].log_softmax(0)[2].item(), hidden[1].log_softmax(0)[1].item()]
    )


def test_a_text_from_the_cache_is_refused(monkeypatch):
    started = []

    class Fake:
        def __init__(self, model, *args, log=None):
            started.extend(args)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self):
            return self

        def logprobs(self, ids, start):
            return [-1.0] * (len(ids) - 1), len(started) - 5

    monkeypatch.setattr(agreement, "Server", Fake)
    assert agreement.served("m", Path("t"), [1, 2, 3], ["--a", "--b"]) == [-1, -1]
    assert "--kv-quant-chunk-attention=quantized" in started and "--kv-quant-table=t" in started
    with pytest.raises(ServerError, match="came from the cache"):
        agreement.served("m", Path("t"), [1, 2, 3], ["--a"])


def test_a_text_that_cannot_be_read_is_told(monkeypatch, tmp_path, capsys):
    """Before a model is loaded."""
    monkeypatch.setattr(agreement, "missing_plugin", lambda args: "")
    monkeypatch.setattr(agreement, "exit_on_sigterm", lambda: None)
    gone = tmp_path / "gone"
    with pytest.raises(SystemExit, match="2"):
        agreement.main(["--model-path", "none", "--out", str(tmp_path / "x.csv"), "--text", str(gone)])
    assert f"--text {gone}: no such file; name a UTF-8 text file" in capsys.readouterr().err
