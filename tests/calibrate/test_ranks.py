"""Two processes: what one rank finds out, both know, and neither waits for the other."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each step of two_ranks.py ended with, on either rank."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "model.bin").write_bytes(b"weights")
    command = [sys.executable, Path(__file__).with_name("two_ranks.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(rank), folder], **pipes) for rank in (0, 1)]
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(err[-3000:] for _, err in ended)
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.mark.parametrize("step", ["equal", "stages"])
def test_ranks_that_agree(ranks, step):
    """Stages of a pipeline have layers of their own, and may take other bytes."""
    assert [rank[step] for rank in ranks] == ["None", "None"]


@pytest.mark.parametrize(
    "step, says",
    [
        ("hash", r"ranks 1 differ: rank 1 has table ab, rank 0 has aab; start all nodes with the same options"),
        ("size", r"ranks 1 differ: rank 1 has 9 bytes per token, rank 0 has 8; start all nodes with the same options"),
        ("pairing", r"layer 1: block energies change with position under rotary_dim 32, neox pairing"),
        ("nan", r"layer 1: queries, keys or values are not finite during calibration"),
        ("no text", r"--kv-quant-calibration-text \S*none: no such file; name a UTF-8 text file"),
        ("no table", r"--kv-quant-table \S*none: table \S*none: no such file; make one with"),
        ("not built", r"--kv-quant blockgtq: MemoryError: no room"),
    ],
)
def test_both_ranks_end_with_the_same_error(ranks, step, says):
    first, second = (rank[step] for rank in ranks)
    assert first == second and re.match(f"KVQuantError: .*{says}", first)


def test_both_ranks_have_the_table_that_rank_zero_made_or_found(ranks):
    """And what both of them measured of it."""
    made, cached = ({rank[step] for rank in ranks} for step in ("made", "cached"))
    (made,), (cached,) = made, cached
    assert re.fullmatch(r'calibrated [0-9a-f]{64} True \{.*"kl": \d\S+, .*\}', made)
    assert cached == made.replace("calibrated", "cache")


def test_moments_add_up_over_ranks(ranks):
    for rank in ranks:
        assert max(rank["moments"].values()) < 1e-6, rank["moments"]


def test_costs_add_up_over_ranks(ranks):
    want = {"kl": 0.5, "attention_kl": 2.5, "worst_layer": 1, "worst_layer_kl": 3.0, "tokens": 2, "recent": 0}
    assert [rank["quality"] for rank in ranks] == [want, want]


def test_ranks_agree_on_frequencies(ranks):
    for rank in ranks:
        assert rank["known"] == [True, False] and rank["drift"] is True
        first, second = rank["stage frequencies"]
        assert first == pytest.approx(rank["true frequencies"], rel=1e-6, abs=1e-9) and second is None
