"""The served cache against transformers, and a table made offline served as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

from sglang_blockgtq.calibrate.table import AllocationTable

pytestmark = pytest.mark.server

PREFIX, LENGTH = 560, 624  # beyond the first page of 512 positions


@pytest.fixture(scope="module")
def exact(smollm2, token_ids) -> list[float]:
    """Log-probabilities of the tokens after PREFIX, by transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.tensor([token_ids[:LENGTH]])
    with torch.inference_mode():
        logprobs = model(ids).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[PREFIX:, 0].tolist()


def gap_after_hit(server, token_ids, exact) -> float:
    """Mean |difference of log-probability| of a suffix computed on top of a packed, shared prefix."""
    server.generate(token_ids[:PREFIX])
    logprobs, hits = server.logprobs(token_ids[:LENGTH], PREFIX)
    assert hits == PREFIX
    return fmean(abs(a - b) for a, b in zip(logprobs[-len(exact) :], exact, strict=True))


def test_offline_table_and_eight_bits(launch, smollm2, token_ids, exact, table_cache, tmp_path):
    made = tmp_path / "table.safetensors"
    offline = [sys.executable, "-m", "sglang_blockgtq.calibrate", "--model-path", smollm2, "--out", str(made)]
    subprocess.run([*offline, "--k-bits=8", "--v-bits=8"], check=True, timeout=600)
    eight = launch("--dtype=float32", "--max-total-tokens=1000", f"--kv-quant-table={made}")
    info = eight.info()["kv_quant"]
    assert info["table_origin"] == "file" and info["k_bits"] == 8
    assert info["table_hash"] == AllocationTable.load(made).header.table_hash
    gap_eight = gap_after_hit(eight, token_ids, exact)
    eight.stop()

    three = launch("--dtype=float32", "--max-total-tokens=1000")
    gap_three = gap_after_hit(three, token_ids, exact)
    three.stop()
    assert gap_eight < 0.03
    assert gap_eight < gap_three < 0.4

    # The server's own calibration and the offline one see the same model: nearly the same bits.
    subprocess.run(offline, check=True, timeout=600)
    here = AllocationTable.load(made)
    file, *_ = [
        path
        for path in Path(table_cache, "tables").iterdir()
        if (header := AllocationTable.load(path).header).k_bits == 3 and header.allocator == "template"
    ]
    there = AllocationTable.load(file)
    assert here.header.config_hash == there.header.config_hash
    assert here.header.text_hash == there.header.text_hash
    assert here.header.weights_hash == there.header.weights_hash != ""
    assert (here.tensors["widths"] == there.tensors["widths"]).float().mean() > 0.98
