"""What the server says about its cache: /server_info, Prometheus."""

from __future__ import annotations

from typing import Any

from . import __version__
from .backend import require_packed_pool
from .options import KVQuantOptions
from .runtime import Runtime, current


def server_info(scheduler: Any) -> dict[str, Any] | None:
    """The ``kv_quant`` entry of /server_info, or None when the scheduler serves a stock cache."""
    if KVQuantOptions.of(scheduler.server_args) is None:
        return None
    runner = scheduler.tp_worker.model_runner
    pool, info = require_packed_pool(runner), current().summary()
    rows = sum(pool.get_kv_size_bytes())
    return {
        **info,
        "memory": {"rows": rows, **info["memory"]},
        "pool": type(pool).__name__,
        "pool_bytes": rows,
        "page_size": pool.page_size,
        "max_total_num_tokens": int(runner.max_total_num_tokens),
        "version": __version__,
    }


def emit_gauges(labels: dict[str, str], runtime: Runtime) -> None:
    """Set the constant gauges once the pool exists (only with --enable-metrics)."""
    # Imported late: the multiprocess folder must be set before prometheus_client is.
    from prometheus_client import Gauge

    header = runtime.table.header
    values = {
        "bytes_per_token": ("Packed KV bytes per token on this rank.", runtime.bytes_per_token),
        "bf16_bytes_per_token": ("What bf16 would take per token on this rank.", runtime.bf16_bytes_per_token),
        "compression_ratio": ("bf16 bytes over packed bytes.", runtime.bf16_bytes_per_token / runtime.bytes_per_token),
        "k_bits": ("Average bits per key channel.", header.k_bits),
        "v_bits": ("Average bits per value channel.", header.v_bits),
        "table_seconds": ("Seconds start-up spent on the allocation table.", runtime.seconds),
    }
    if header.quality is not None:
        values |= {
            "kl": ("KL of the answer on held-out text, nats a token.", header.quality["kl"]),
            "attention_kl": ("KL of attention on held-out text, mean over layers.", header.quality["attention_kl"]),
            "worst_layer_kl": ("The same of the worst layer.", header.quality["worst_layer_kl"]),
        }
    for name, (text, value) in values.items():
        gauge = Gauge(f"sglang:kv_quant_{name}", text, labelnames=list(labels), multiprocess_mode="mostrecent")
        gauge.labels(**labels).set(value)
    info = Gauge(
        "sglang:kv_quant_info",
        "Always 1; the labels say which table is served.",
        labelnames=[*labels, "allocator", "table_hash", "origin"],
        multiprocess_mode="mostrecent",
    )
    info.labels(**labels, allocator=header.allocator, table_hash=header.table_hash, origin=runtime.origin).set(1)
