"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from sglang_blockgtq.options import default_cache_dir

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    # Kept within this process: servers that tests start must not inherit it.
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {}
    if not torch.cuda.is_available():
        skipped["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    if "long" not in config.option.markexpr:
        skipped["long"] = pytest.mark.skip(reason="takes minutes: -m long")
    for item in items:
        for name, skip in skipped.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(255) if tensor.dtype == torch.uint8 else tensor


@pytest.fixture
def nan_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN (bytes: 0xFF), so that reading what nobody wrote shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _plain=plain, **kw: _poison(_plain(*a, **kw)))


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[[int], LlamaForCausalLM]:
    """head_dim -> a model of two layers, four query heads and two KV heads with random weights, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(head_dim: int) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The small real model: ``$SMOLLM2``, or where ``make serve`` and ``make test`` unpack it."""
    path = os.environ.get("SMOLLM2") or os.path.join(default_cache_dir(), "SmolLM2-135M-Instruct")
    if not os.path.isfile(os.path.join(path, "config.json")):
        pytest.skip(f"no model at {path}: make test unpacks it there, or set SMOLLM2 to its folder")
    return path


@pytest.fixture
def rope_on_a_cpu(monkeypatch):
    """SGLang makes its RoPE modules on a CPU only where it serves there."""
    monkeypatch.setattr("sglang.srt.layers.rotary_embedding.base._is_cpu", True)
