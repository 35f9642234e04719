"""The allocation table a scheduler process serves with, and what stands on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch

from .calibrate.model import packed_layers
from .calibrate.quality import Quality
from .calibrate.segments import rule_of
from .calibrate.table import AllocationTable, layers_of
from .choose import choose
from .kernels.cuda import attention as cuda_kernel
from .kernels.format.layout import uniform_layout
from .kernels.layer import PackedLayer
from .options import BY_SEGMENTS, NAME, KVQuantError, KVQuantOptions, flag
from .ranks import check_ranks, is_rank_zero
from .row_check import SUM_BYTES
from .terms import terms_of

if TYPE_CHECKING:
    from .backend.buffers import Buffers
    from .kernels.decode.recent import Recent
    from .kernels.layer import TritonLayer

logger = logging.getLogger(__name__)

MAX_REQUESTS = 4096  # that SGLang runs at a time where nothing else is said
#: What SGLang allocates per token outside the pool and does not count: input buffers sized by the pool
#: (about 48 bytes) and the allocator's free list (8 bytes, twice while it merges).
UNCOUNTED_BYTES_PER_TOKEN = 64


@dataclass(frozen=True)
class Runtime:
    """The table in use on this rank, the layers made of it, and what start-up measured about it."""

    options: KVQuantOptions
    table: AllocationTable
    heads: slice  # this rank's KV heads
    rows: tuple[int, ...]  # of the table, one for each of this rank's layers with keys
    origin: str  # "file", "cache" or "calibrated"
    seconds: float  # getting the table
    bf16_bytes_per_token: int  # of this rank's packed layers
    window_bytes_per_token: int = 0  # of its layers with a window, where they stay in 16 bits
    layers: dict[int, PackedLayer] = field(default_factory=dict)  # by layer id
    buffers: Buffers | None = None  # on a GPU
    recent: Recent | None = None  # exact copies of the last tokens

    @property
    def counted_bytes_per_token(self) -> int:
        """What SGLang sizes the cache by. The same integer on every tensor-parallel rank: rows take the maximum over
        all heads of a layer."""
        sums = SUM_BYTES * len(self.rows) if self.options.check_rows else 0
        return self.bytes_per_token + sums + UNCOUNTED_BYTES_PER_TOKEN

    @cached_property
    def bytes_per_token(self) -> int:
        """Packed bytes per token of this rank's layers and heads, row padding included."""
        return sum(self.table.row_layout(i, self.heads).row_bytes for i in self.rows)

    def summary(self) -> dict[str, Any]:
        """Plain values for /server_info."""
        header = self.table.header
        return {
            "mode": NAME,
            "allocator": header.allocator,
            "granularity": header.granularity,
            "k_bits": header.k_bits,
            "v_bits": header.v_bits,
            "bytes_per_token": self.bytes_per_token,
            "bf16_bytes_per_token": self.bf16_bytes_per_token,
            "window_bytes_per_token": self.window_bytes_per_token,
            "ratio": round(self.bf16_bytes_per_token / self.bytes_per_token, 3),
            "bytes_per_token_head": round(self.table.bytes_per_token_head(), 3),
            "chunk_attention": self.options.chunk_attention,
            "exact_recent": self.options.exact_recent,
            "check_rows": self.options.check_rows,
            "table_hash": header.table_hash,
            "table_origin": self.origin,
            "table_seconds": round(self.seconds, 3),
            "calibration_tokens": header.tokens,
            "quality": header.quality,
            "page": header.page,
            "decode_attention": self.decode_attention,
            "prefill_attention": self.buffers.prefill.name if self.buffers else "PyTorch",
            "memory": self.memory(),
        }

    @property
    def decode_attention(self) -> str:
        """What reads rows in a decode step."""
        if self.buffers is None:
            return "PyTorch"
        return self.buffers.decode_attention

    def memory(self) -> dict[str, int]:
        """Bytes on this rank by kind, without the rows: all of it is there before the cache is sized."""
        tables = sum(layer.table_bytes for layer in self.layers.values())
        recent = {"exact_recent": self.recent.nbytes} if self.recent else {}
        return {"tables": tables, **recent, **(self.buffers.nbytes() if self.buffers else {})}

    def line(self) -> str:
        """The one start-up line."""
        header = self.table.header
        by = f" by {header.granularity}s" if header.allocator in BY_SEGMENTS else ""
        if rule_of(header.allocator, header.granularity).means and not header.page:
            by += " without page means"
        return (
            f"{NAME}: K {header.k_bits:g} bits, V {header.v_bits:g} bits ({header.allocator}{by}), "
            f"{self.bytes_per_token} bytes per token, {self.bf16_bytes_per_token} in bf16 "
            f"(x{self.bf16_bytes_per_token / self.bytes_per_token:.2f}), "
            f"table {header.table_hash[:12]} ({self.origin}, {self.seconds:.1f} s), "
            + ("not measured" if header.quality is None else Quality(**header.quality).line())
        )

    def slow_lines(self) -> list[str]:
        """What is slow on this GPU, and what would be fast; empty where nothing is."""
        header, out = self.table.header, []
        if not all(self.table.row_layout(i, self.heads).in_columns for i in self.rows):
            if header.allocator in BY_SEGMENTS and header.granularity == "block":
                why = f"{flag('allocator')} {header.allocator} by blocks gives the heads widths of their own"
                what = f"with {flag('granularity')} segment the fast kernels read them"
            else:
                dims = {header.head_dim, header.v_head_dim}
                works = [b for b in range(1, 9) if all(uniform_layout(dim, b).columns is not None for dim in dims)]
                bits = f"K {header.k_bits:g} and V {header.v_bits:g} bits"
                why = f"{bits} of head_dim {header.head_dim} leave gaps in words"
                what = f"{', '.join(map(str, works)) or 'no'} bits fill them"
            out.append(f"{NAME}: {why}: decode attention is 30 to 130 times slower for such rows; {what}")
        if self.buffers is not None and self.buffers.prefill.why:
            from .backend.prefill import FAST

            prefill = self.buffers.prefill
            out.append(f"{NAME}: prefill attention in {prefill.name}, because of {prefill.why}; {FAST}")
        return out


_current: Runtime | None = None


def current() -> Runtime:
    """This process's Runtime. RuntimeError before the table is there: then a hook did not run."""
    if _current is None:
        raise RuntimeError(f"{NAME}: no allocation table in this process; the calibration hook did not run")
    return _current


def copies() -> Recent | None:
    """The exact copies of the last tokens in this process; None also where nothing is packed."""
    return None if _current is None else _current.recent


def set_current(runtime: Runtime | None) -> None:
    global _current
    _current = runtime


def elements(layers: Iterable[Any]) -> int:
    """Of a token's keys and values in some RadixAttention modules."""
    return sum(x.tp_k_head_num * (x.qk_head_dim + x.v_head_dim) for x in layers)


def start(runner: Any, options: KVQuantOptions) -> Runtime:
    """Get the table, make the layers and buffers, and make all that this process's. Between weights and pool.

    Whatever is allocated here lowers the free memory that SGLang sizes the cache by.
    """
    from sglang.srt.runtime_context import get_memory, get_schedule

    from .capture import attention_layers, local_heads
    from .conflicts import check_granularity, check_layers, check_resolved, check_runner
    from .hybrid import balance_memory, check_hybrid
    from .recent import new_copies, resolve
    from .split import balance_windows, check_split
    from .states import release

    check_resolved()
    check_runner(runner)
    check_granularity(runner.model_config.hf_config, options)
    row_of = {layer: row for row, layer in enumerate(packed_layers(runner.model_config.hf_config))}
    every = attention_layers(runner.model)
    check_hybrid(runner, [x.layer_id for x in every])
    attention = [x for x in every if x.layer_id in row_of]
    check_split(runner, [x.layer_id for x in attention])
    check_layers(attention, runner.model_config.head_dim)
    kv_heads = runner.model_config.get_total_num_kv_heads()
    heads = local_heads(kv_heads)
    here = [x for x in attention if runner.layer_info.start_layer <= x.layer_id < runner.layer_info.end_layer]
    held = range(kv_heads)[heads]
    if here[0].tp_k_head_num != len(held):
        raise KVQuantError(
            f"--kv-quant {NAME}: this rank has {here[0].tp_k_head_num} KV heads, the table gives it {len(held)}; "
            "the model spreads its heads in an unsupported way, use another --tp-size"
        )
    ids = {x.layer_id: row_of[x.layer_id] for x in here}
    requests = get_schedule().max_running_requests or MAX_REQUESTS
    options = resolve(options, runner, attention, requests)

    def make(table: AllocationTable) -> dict[int, PackedLayer]:
        made = layers_of(table, heads, ids.values(), runner.device, runner.model_config.context_len)
        return {layer: made[row] for layer, row in ids.items()}

    cuda_kernel.CHOICE = options.decode_kernel
    begin = time.perf_counter()
    try:
        choice = choose(runner, options, make)
    finally:
        release()
    seconds = time.perf_counter() - begin
    table, layers, buffers = choice.table, choice.layers, None
    recent = new_copies(options, runner, list(layers.values()), requests)
    if get_memory().enable_hierarchical_cache:
        from .hicache import one_width

        one_width(layers.values())
    if runner.device.split(":")[0] == "cuda":
        from .backend.buffers import Buffers

        window = max(terms_of(x, {}).window for x in here)
        of_kernels = cast("dict[int, TritonLayer]", layers)  # as all are on a GPU
        if options.decode_kernel == "cuda" and (lacks := cuda_kernel.lacks(next(iter(of_kernels.values())).tables)):
            raise KVQuantError(f"{flag('decode_kernel')} cuda: it does not read these rows: {lacks}; triton works")
        buffers = Buffers.of(of_kernels, runner, here[0].tp_q_head_num, requests, window)
        torch.cuda.empty_cache()
    runtime = Runtime(
        options=options,
        table=table,
        heads=heads,
        rows=tuple(ids.values()),
        origin=choice.origin,
        seconds=seconds,
        bf16_bytes_per_token=2 * elements(here),
        window_bytes_per_token=runner.kv_cache_dtype.itemsize * elements(x for x in every if x not in attention),
        layers=layers,
        buffers=buffers,
        recent=recent,
    )
    check_ranks(table.header.table_hash, runtime.bytes_per_token)
    set_current(runtime)
    balance_memory(runner, table)
    balance_windows(runner, table)
    if is_rank_zero():
        logger.info(runtime.line())
        memory = ", ".join(f"{kind.replace('_', ' ')} {n / (1 << 20):.0f} MiB" for kind, n in runtime.memory().items())
        logger.info("%s: before the cache is sized: %s", NAME, memory)
        for line in runtime.slow_lines():
            logger.warning(line)
    return runtime
