"""Attention over packed rows: ``cuda`` in Triton, ``cpu`` in PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..kernels.decode.recent import Recent, RecentLayer
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


def copies_of(runner: Any, layers: Iterable[int]) -> tuple[Recent | None, dict[int, RecentLayer]]:
    """The exact copies of the last tokens of the runner's requests, and those of each layer by id; None and {} where
    there are none."""
    from ..runtime import current

    recent = current().recent
    if recent is None:
        return None, {}
    recent.bind(runner.req_to_token_pool.size)
    return recent, {layer_id: recent.layer(i) for i, layer_id in enumerate(layers)}
