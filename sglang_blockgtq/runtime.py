"""The allocation table a scheduler process serves with, and where it comes from.

A file the user named, the cache of earlier starts, or a calibration pass. World rank 0 decides
and sends the table to the others, so that no two ranks can differ.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .calibrate.build import build_table
from .calibrate.model import config_hash, weights_hash
from .calibrate.rope import RopeBlocks
from .calibrate.slots import rule_of
from .calibrate.table import FORMAT_VERSION, AllocationTable, TableError, TableHeader
from .calibrate.text import TextError, read_text, text_hash, token_sequences
from .kernels.layout import uniform_layout
from .options import BY_SLOTS, NAME, KVQuantError, KVQuantOptions, flag

logger = logging.getLogger(__name__)

#: What SGLang allocates per token outside the pool and does not count: input buffers sized by the pool
#: (about 48 bytes) and the allocator's free list (8 bytes, twice while it merges).
UNCOUNTED_BYTES_PER_TOKEN = 64


@dataclass(frozen=True)
class Runtime:
    """The table in use on this rank and what start-up measured about it."""

    options: KVQuantOptions
    table: AllocationTable
    heads: slice  # this rank's KV heads
    layer_ids: tuple[int, ...]  # this rank's layers
    origin: str  # "file", "cache" or "calibrated"
    seconds: float  # getting the table
    bf16_bytes_per_token: int  # of this rank

    @cached_property
    def bytes_per_token(self) -> int:
        """Packed bytes per token of this rank's layers and heads, row padding included."""
        return sum(self.table.row_layout(i, self.heads).row_bytes for i in self.layer_ids)

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
            "ratio": round(self.bf16_bytes_per_token / self.bytes_per_token, 3),
            "bytes_per_token_head": round(self.table.bytes_per_token_head(), 3),
            "chunk_attention": self.options.chunk_attention,
            "table_hash": header.table_hash,
            "table_origin": self.origin,
            "table_seconds": round(self.seconds, 3),
            "calibration_tokens": header.tokens,
        }

    def line(self) -> str:
        """The one start-up line."""
        header = self.table.header
        by_slots = " by slots" if header.granularity == "slot" else ""
        return (
            f"{NAME}: K {header.k_bits:g} bits, V {header.v_bits:g} bits ({header.allocator}{by_slots}), "
            f"{self.bytes_per_token} bytes per token, {self.bf16_bytes_per_token} in bf16 "
            f"(x{self.bf16_bytes_per_token / self.bytes_per_token:.2f}), "
            f"table {header.table_hash[:12]} ({self.origin}, {self.seconds:.1f} s)"
        )

    def slow_line(self) -> str | None:
        """What to say on a GPU where the fast kernels cannot read these rows; None where they can."""
        header = self.table.header
        if all(self.table.row_layout(i, self.heads).in_columns for i in self.layer_ids):
            return None
        if header.allocator in BY_SLOTS and header.granularity == "block":
            why = f"{flag('allocator')} {header.allocator} gives the RoPE blocks of each head widths of their own"
            what = f"with {flag('granularity')} slot the fast kernels read them"
        else:
            dims = {header.head_dim, header.v_head_dim}
            works = [b for b in range(1, 9) if all(uniform_layout(dim, b).columns is not None for dim in dims)]
            why = f"K {header.k_bits:g} and V {header.v_bits:g} bits of head_dim {header.head_dim} leave gaps in words"
            what = f"{', '.join(map(str, works)) or 'no'} bits fill them"
        return f"{NAME}: {why}: the generic kernel reads such rows and is far slower; {what}"


_current: Runtime | None = None


def current() -> Runtime:
    """This process's Runtime. RuntimeError before the table is there: then a hook did not run."""
    if _current is None:
        raise RuntimeError(f"{NAME}: no allocation table in this process; the calibration hook did not run")
    return _current


def set_current(runtime: Runtime | None) -> None:
    global _current
    _current = runtime


def check_table(table: AllocationTable, path: str, options: KVQuantOptions, model_config_hash: str) -> None:
    """A table the user named must be for this model and for the bits asked for. Raises KVQuantError."""
    header = table.header
    if header.config_hash != model_config_hash:
        raise KVQuantError(
            f"{flag('table')} {path}: made for another model ({header.model_id or 'unnamed'}); "
            "make one for this model with python -m sglang_blockgtq.calibrate"
        )
    for name in ("k_bits", "v_bits", "allocator", "granularity"):
        wanted = getattr(options, name)
        if wanted is not None and wanted != getattr(header, name):
            raise KVQuantError(
                f"{flag(name)} {wanted}: the table {path} has {getattr(header, name)}; leave {flag(name)} out, "
                "or make a table with it"
            )


def load_named_table(options: KVQuantOptions, model_config_hash: str) -> AllocationTable:
    """The table of --kv-quant-table, checked. Raises KVQuantError."""
    try:
        table = AllocationTable.load(options.table)
    except TableError as e:
        raise KVQuantError(f"{flag('table')} {options.table}: {e}") from None
    check_table(table, options.table, options, model_config_hash)
    return table


def calibration_sequences(tokenizer: Any, options: KVQuantOptions, context_len: int) -> list[list[int]]:
    """Token ids to calibrate on. Raises KVQuantError."""
    try:
        text = read_text(options.calibration_text)
        return token_sequences(tokenizer, text, options.calibration_tokens, context_len)
    except TextError as e:
        raise KVQuantError(str(e)) from None


def cache_path(options: KVQuantOptions, model_config_hash: str, weights: str, text: str) -> Path:
    """File of a computed table. Tensor parallelism is not in the key: the table is the whole model's."""
    rule = rule_of(options.allocator, options.granularity)
    key = "|".join(
        str(x)
        for x in (
            FORMAT_VERSION,
            model_config_hash,
            weights,
            text,
            options.k_bits,
            options.v_bits,
            rule.name,
            *([options.granularity] if options.granularity != "block" else []),  # as tables from before were named
            rule.norms,
            rule.balance,
            rule.scale_rule,
            rule.scale_search,
        )
    )
    return Path(options.cache_dir) / "tables" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _from_cache(path: Path, model_config_hash: str) -> AllocationTable | None:
    if not path.is_file():
        return None
    try:
        table = AllocationTable.load(path)
    except TableError as e:
        # Ours to remake: the cache only saves time.
        logger.warning("%s: cached table is not usable, calibrating again: %s", NAME, e)
        return None
    return table if table.header.config_hash == model_config_hash else None


def _broadcast(value: Any) -> Any:
    """World rank 0's value, on every rank."""
    from sglang.srt.distributed.parallel_state import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
    return box[0]


def _table_bytes(table: AllocationTable | None) -> bytes | None:
    if table is None:
        return None
    buffer = io.BytesIO()
    torch.save((table.header.to_json(), table.tensors), buffer)
    return buffer.getvalue()


def _table_of(data: bytes | None) -> AllocationTable | None:
    if data is None:
        return None
    header, tensors = torch.load(io.BytesIO(data), weights_only=True)
    return AllocationTable(TableHeader.from_json(header), tensors)


def _is_rank_zero() -> bool:
    from sglang.srt.distributed.parallel_state import get_world_group

    return get_world_group().rank_in_group == 0


def effective_rule(rope: list[RopeBlocks], options: KVQuantOptions) -> dict[str, str]:
    """The allocator that runs and its granularity, as build_table takes them.

    A model without RoPE has no blocks to rank and gets uniform bits, with a notice.
    """
    if options.allocator != "uniform" and all(r.rotary_dim == 0 for r in rope):
        logger.warning(
            "%s: no layer of this model has RoPE, so there are no blocks to rank: using %s uniform instead of %s",
            NAME,
            flag("allocator"),
            options.allocator,
        )
        return {"allocator": "uniform", "granularity": "block"}
    return {"allocator": options.allocator, "granularity": options.granularity}


def obtain_table(runner: Any, options: KVQuantOptions) -> tuple[AllocationTable, str]:
    """The table for a loaded ModelRunner and its origin. Raises KVQuantError."""
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    from .capture import collect_moments

    args, config = runner.server_args, runner.model_config
    model_config_hash = config_hash(config.hf_config)
    if options.table is not None:
        # Every rank reads the file; the hash check makes them equal.
        return load_named_table(options, model_config_hash), "file"

    tokenizer = get_tokenizer(args.tokenizer_path or args.model_path, trust_remote_code=args.trust_remote_code)
    sequences = calibration_sequences(tokenizer, options, config.context_len)
    text = text_hash(sequences)
    random_weights = str(getattr(args.load_format, "value", args.load_format)) == "dummy"
    weights = "" if random_weights else weights_hash(args.model_path)
    path, cached = None, None
    if _is_rank_zero():
        if random_weights:
            logger.warning("%s: dummy weights: the table is made from noise and not kept", NAME)
        elif not weights:
            logger.warning("%s: no weight files found under %s: the table is not kept", NAME, args.model_path)
        else:
            path = cache_path(options, model_config_hash, weights, text)
            cached = _from_cache(path, model_config_hash)
    cached = _table_of(_broadcast(_table_bytes(cached)))
    if cached is not None:
        return cached, "cache"

    moments, rope = collect_moments(runner, sequences)
    table = None
    if _is_rank_zero():
        table = build_table(
            moments,
            rope,
            k_bits=options.k_bits,
            v_bits=options.v_bits,
            **effective_rule(rope, options),
            v_head_dim=config.v_head_dim,
            model_id=args.model_path,
            config_hash=model_config_hash,
            weights_hash=weights,
            text_hash=text,
        )
        if path is not None:
            try:
                table.save(path)
            except OSError as e:
                raise KVQuantError(
                    f"{flag('cache_dir')} {options.cache_dir}: table cannot be kept there ({e}); name a writable folder"
                ) from None
    return _table_of(_broadcast(_table_bytes(table))), "calibrated"


def start(runner: Any, options: KVQuantOptions) -> Runtime:
    """Get the table and make it this process's. Called once, between weights and pool."""
    from .capture import attention_layers, local_heads
    from .conflicts import check_granularity, check_layers, check_runner

    check_runner(runner)
    check_granularity(runner.model_config.hf_config, options)
    layers = attention_layers(runner.model)
    check_layers(layers)
    begin = time.perf_counter()
    table, origin = obtain_table(runner, options)
    heads = local_heads(table.header.kv_heads)
    here = [x for x in layers if runner.layer_info.start_layer <= x.layer_id < runner.layer_info.end_layer]
    held = range(table.header.kv_heads)[heads]
    if here[0].tp_k_head_num != len(held):
        raise KVQuantError(
            f"--kv-quant {NAME}: this rank has {here[0].tp_k_head_num} KV heads, the table gives it {len(held)}; "
            "the model spreads its heads in an unsupported way, use another --tp-size"
        )
    bf16 = sum(2 * x.tp_k_head_num * (x.qk_head_dim + x.v_head_dim) for x in here)
    runtime = Runtime(
        options=options,
        table=table,
        heads=heads,
        layer_ids=tuple(x.layer_id for x in here),
        origin=origin,
        seconds=time.perf_counter() - begin,
        bf16_bytes_per_token=bf16,
    )
    set_current(runtime)
    if runner.device.split(":")[0] == "cuda":
        torch.cuda.empty_cache()
    if _is_rank_zero():
        logger.info(runtime.line())
        slow = runtime.slow_line() if runner.device.split(":")[0] == "cuda" else None
        if slow:
            logger.warning(slow)
    return runtime
