"""Attention over packed rows: ``triton`` for CUDA, ``torch`` for the CPU."""

from __future__ import annotations

from typing import Any


def create(runner: Any):
    """The attention backend for a ModelRunner whose pool is packed."""
    if runner.device.split(":")[0] == "cuda":
        from .cuda import TritonPackedBackend

        return TritonPackedBackend(runner)
    from .cpu import TorchPackedBackend

    return TorchPackedBackend(runner)


def require_packed_pool(runner: Any):
    """The runner's PackedKVPool. RuntimeError when the pool hook did not run."""
    from ..pool import PackedKVPool

    pool = runner.token_to_kv_pool
    if not isinstance(pool, PackedKVPool):
        raise RuntimeError(f"blockgtq attention over a {type(pool).__name__}: the pool hook did not run; not serving")
    return pool
