"""Where the allocation table of a scheduler process comes from.

A file the user named, the cache of earlier starts, or a calibration pass. World rank 0 reads, decides and builds, and
sends what it has to the others, its errors included, so that no two ranks can differ or wait for each other.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .calibrate.allocate import ALLOCATOR_VERSION
from .calibrate.build import BUILDER_VERSION, build_table
from .calibrate.model import config_hash, head_dim, kv_heads, text_config, v_head_dim
from .calibrate.rope import RopeBlocks
from .calibrate.segments import SEGMENT_ALLOCATORS, rule_of
from .calibrate.table import FORMAT_VERSION, AllocationTable, TableError
from .calibrate.text import TextError, read_text, text_hash, token_sequences
from .calibrate.weights import weights_hash
from .options import NAME, KVQuantError, KVQuantOptions, flag

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What savers leave in the cache folder when they are killed: ours, and safetensors' own.
SCRATCH = (".*.tmp", ".tmp*")
SCRATCH_AGE = 3600  # seconds after which its writer is taken for dead


def check_table(table: AllocationTable, path: str, options: KVQuantOptions, config: Any) -> None:
    """A table the user named must be for this model and for the bits asked for. Raises KVQuantError.

    config: the model's Hugging Face config.
    """
    header, make = table.header, "make one for this model with python -m sglang_blockgtq.calibrate"
    if header.config_hash != config_hash(config):
        raise KVQuantError(f"{flag('table')} {path}: made for another model ({header.model_id or 'unnamed'}); {make}")
    shape = {
        "layers": text_config(config).num_hidden_layers,
        "kv_heads": kv_heads(config),
        "head_dim": head_dim(config),
        "v_head_dim": v_head_dim(config),
    }
    for name, value in shape.items():
        if getattr(header, name) != value:
            raise KVQuantError(f"{flag('table')} {path}: {name} {getattr(header, name)}, the model has {value}; {make}")
    for name in ("k_bits", "v_bits", "allocator", "granularity"):
        wanted = getattr(options, name)
        if wanted is not None and wanted != getattr(header, name):
            raise KVQuantError(
                f"{flag(name)} {wanted}: the table {path} has {getattr(header, name)}; leave {flag(name)} out, "
                "or make a table with it"
            )


def load_named_table(options: KVQuantOptions, config: Any) -> AllocationTable:
    """The table of --kv-quant-table, checked against a model's Hugging Face config. Raises KVQuantError."""
    try:
        table = AllocationTable.load(options.table)
    except TableError as e:
        raise KVQuantError(f"{flag('table')} {options.table}: {e}") from None
    check_table(table, options.table, options, config)
    return table


def calibration_sequences(tokenizer: Any, options: KVQuantOptions, context_len: int) -> list[list[int]]:
    """Token ids to calibrate on. Raises KVQuantError."""
    try:
        text = read_text(options.calibration_text)
        return token_sequences(tokenizer, text, options.calibration_tokens, context_len)
    except TextError as e:
        raise KVQuantError(str(e)) from None


def granularity_of(options: KVQuantOptions) -> str:
    """What gets a width of its own: only some allocators have the choice."""
    return options.granularity if options.allocator in SEGMENT_ALLOCATORS else "segment"


def cache_path(options: KVQuantOptions, model_config_hash: str, weights: str, text: str) -> Path:
    """File of a computed table. Tensor parallelism is not in the key: the table is the whole model's."""
    granularity = granularity_of(options)
    rule = rule_of(options.allocator, granularity)
    key = "|".join(
        str(x)
        for x in (
            FORMAT_VERSION,
            ALLOCATOR_VERSION,
            BUILDER_VERSION,
            model_config_hash,
            weights,
            text,
            options.k_bits,
            options.v_bits,
            rule.name,
            granularity,
            rule.norms,
            rule.balance,
            rule.scale_rule,
            rule.scale_search,
        )
    )
    return Path(options.cache_dir) / "tables" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _from_cache(path: Path, model_config_hash: str) -> AllocationTable | None:
    try:
        if not path.is_file():
            return None
        table = AllocationTable.load(path)
    except (TableError, OSError) as e:
        # Ours to remake: the cache only saves time.
        logger.warning("%s: cached table is not usable, calibrating again: %s", NAME, e)
        return None
    return table if table.header.config_hash == model_config_hash else None


def keep(table: AllocationTable, path: Path, cache_dir: str) -> None:
    """Save to the cache. A table that cannot be kept is served all the same, with a warning."""
    try:
        table.save(path)
    except OSError as e:
        logger.warning(
            "%s: %s %s: the table cannot be kept there, so the next start calibrates again (%s); "
            "name a folder on a disk with room that can be written to",
            NAME,
            flag("cache_dir"),
            cache_dir,
            e,
        )


def sweep(folder: Path) -> None:
    """Remove what savers that were killed have left."""
    with suppress(OSError):  # others may sweep, too, and it can wait for the next save
        for scratch in (file for pattern in SCRATCH for file in folder.glob(pattern)):
            if time.time() - scratch.stat().st_mtime > SCRATCH_AGE:
                scratch.unlink(missing_ok=True)


def from_rank_zero(make: Callable[[], T]) -> T:
    """World rank 0's ``make()`` on every rank; where that fails, KVQuantError with its message on every rank."""
    from sglang.srt.distributed.parallel_state import get_world_group

    group = get_world_group()
    value = message = cause = None
    if group.rank_in_group == 0:
        try:
            value = make()
        except Exception as e:
            said = " ".join(str(e).split()) or "no message"
            message = said if isinstance(e, KVQuantError) else f"--kv-quant {NAME}: {type(e).__name__}: {said}"
            cause = e
    if group.world_size > 1:
        box = [value, message]
        torch.distributed.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
        value, message = box
    if message is not None:
        raise KVQuantError(message) from cause
    return value


def is_rank_zero() -> bool:
    from sglang.srt.distributed.parallel_state import get_world_group

    return get_world_group().rank_in_group == 0


def check_ranks(table_hash: str, cell_size: int) -> None:
    """Every rank must serve one table, and all ranks of a pipeline stage take as many bytes a token.

    A collective of the whole world. Raises KVQuantError on all ranks, naming those that differ.
    """
    from sglang.srt.distributed.parallel_state import get_pp_group, get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return
    found: list = [None] * group.world_size
    mine = (table_hash, get_pp_group().rank_in_group, cell_size)
    torch.distributed.all_gather_object(found, mine, group=group.cpu_group)
    stages = {}
    for rank, (_, stage, size) in enumerate(found):
        stages.setdefault(stage, (rank, size))
    for rank, (table, stage, size) in enumerate(found):
        first, expected = stages[stage]
        if table != found[0][0]:
            ranks = [i for i, (other, *_) in enumerate(found) if other != found[0][0]]
            what = f"table {table[:12]}, rank 0 has {found[0][0][:12]}"
        elif size != expected:
            ranks = [i for i, (_, s, other) in enumerate(found) if s == stage and other != expected]
            what = f"{size} bytes per token, rank {first} has {expected}"
        else:
            continue
        raise KVQuantError(
            f"--kv-quant {NAME}: ranks {', '.join(map(str, ranks))} differ: rank {rank} has {what}; "
            "start all nodes with the same options and versions"
        )


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
        return {"allocator": "uniform", "granularity": "segment"}
    return {"allocator": options.allocator, "granularity": granularity_of(options)}


@dataclass(frozen=True)
class _Plan:
    """What is known before calibration: what to calibrate on, and the table where that is not needed.

    path: where the table goes once it is made; None to keep it nowhere.
    """

    sequences: list[list[int]]
    hashes: dict[str, str]  # as build_table takes them
    path: Path | None
    table: AllocationTable | None


def _plan(runner: Any, options: KVQuantOptions) -> _Plan:
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    args, config = runner.server_args, runner.model_config
    tokenizer = get_tokenizer(
        args.tokenizer_path or args.model_path,
        tokenizer_mode=args.tokenizer_mode,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
    )
    sequences = calibration_sequences(tokenizer, options, config.context_len)
    hashes = {"config_hash": config_hash(config.hf_config), "text_hash": text_hash(sequences)}
    hashes["weights_hash"] = weights = _weights(args)
    if not weights:
        what = f"{args.model_path} (load format {args.load_format})"
        logger.warning("%s: no weight files of %s to know the table by, so it is not kept", NAME, what)
        return _Plan(sequences, hashes, None, None)
    path = cache_path(options, hashes["config_hash"], weights, hashes["text_hash"])
    return _Plan(sequences, hashes, path, _from_cache(path, hashes["config_hash"]))


def _weights(args: Any) -> str:
    """The fingerprint of the served weights; "" if there is none."""
    dummy = str(getattr(args.load_format, "value", args.load_format)) == "dummy"
    return "" if dummy else weights_hash(args.model_path, args.revision, args.download_dir)


def _named(runner: Any, options: KVQuantOptions) -> AllocationTable:
    table, weights = load_named_table(options, runner.model_config.hf_config), _weights(runner.server_args)
    if weights and table.header.weights_hash not in ("", weights):
        logger.warning(
            "%s: %s %s: made from other weight files than those of %s; if these are not a copy of them, make it again",
            NAME,
            flag("table"),
            options.table,
            runner.server_args.model_path,
        )
    return table


def obtain_table(runner: Any, options: KVQuantOptions) -> tuple[AllocationTable, str]:
    """The table for a loaded ModelRunner and its origin. Raises KVQuantError, on every rank."""
    from .capture import collect_moments

    config = runner.model_config
    if options.table is not None:
        return from_rank_zero(lambda: _named(runner, options)), "file"
    plan = from_rank_zero(lambda: _plan(runner, options))
    if plan.table is not None:
        return plan.table, "cache"
    moments, rope = collect_moments(runner, plan.sequences)

    def make() -> AllocationTable:
        table = build_table(
            moments,
            rope,
            k_bits=options.k_bits,
            v_bits=options.v_bits,
            **effective_rule(rope, options),
            v_head_dim=config.v_head_dim,
            model_id=runner.server_args.model_path,
            **plan.hashes,
        )
        if plan.path is not None:
            keep(table, plan.path, options.cache_dir)
            sweep(plan.path.parent)
        return table

    return from_rank_zero(make), "calibrated"
