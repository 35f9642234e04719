"""The plugin installed but not asked for changes nothing; and its answers are the yardstick."""

from __future__ import annotations

from statistics import fmean

import pytest

pytestmark = pytest.mark.server


def test_fidelity_of_the_served_cache(launch, token_ids):
    """Teacher-forced log-probabilities over a packed prefix against SGLang's own bf16 cache."""
    prompt = token_ids[:256]

    def suffix_after_hit(server) -> list[float]:
        server.generate(prompt[:192])
        logprobs, hits = server.logprobs(prompt, 192)
        assert hits >= 191
        return logprobs

    gaps, served = {}, {}
    for bits in (None, "8", "3"):
        flags = () if bits is None else (f"--kv-quant-k-bits={bits}", f"--kv-quant-v-bits={bits}")
        server = launch(
            "--dtype=float32",
            "--attention-backend=torch_native" if bits is None else "--page-size=1",
            "--max-total-tokens=2000",
            *flags,
            quantized=bits is not None,
        )
        info = server.info()
        assert ("kv_quant" in info) == (bits is not None)
        served[bits] = suffix_after_hit(server)
        gaps[bits] = fmean(abs(a - b) for a, b in zip(served[bits], served[None], strict=True))
        server.stop()
    assert gaps["8"] < 0.03
    assert gaps["8"] < gaps["3"] < 0.4
