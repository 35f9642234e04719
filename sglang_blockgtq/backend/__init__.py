"""Attention over packed rows: ``cuda`` in Triton, ``cpu`` in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pool import PackedKVPool


def create(runner: Any):
    """The attention backend for a ModelRunner whose pool is packed, or in part."""
    if runner.device.split(":")[0] == "cuda":
        from .cuda import TritonPackedBackend as Backend
    else:
        from .cpu import TorchPackedBackend as Backend
    if runner.is_hybrid_swa:
        from .split import SplitBackend

        return SplitBackend(runner, Backend)
    return Backend(runner)


def require_packed_pool(runner: Any) -> PackedKVPool:
    """The runner's PackedKVPool. RuntimeError when the pool hook did not run."""
    from ..pool import packed_pool

    pool = packed_pool(runner.token_to_kv_pool)
    if pool is None:
        found = type(runner.token_to_kv_pool).__name__
        raise RuntimeError(f"blockgtq attention over a {found}: the pool hook did not run; not serving")
    return pool
