"""Where the allocation table of a scheduler process comes from: a file the user named, the cache of earlier starts, or
a calibration pass. Rank 0 reads, builds and keeps."""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from .calibrate.allocate import ALLOCATOR_VERSION
from .calibrate.build import BUILDER_VERSION, build_table, poured_as
from .calibrate.model import config_hash, has_mrope, head_dim, kv_heads, packed_layers, v_head_dim
from .calibrate.moments import Moments
from .calibrate.quality import CPU_TOKENS, QUALITY_VERSION, TOKENS
from .calibrate.rope import RopeBlocks
from .calibrate.segments import SEGMENT_ALLOCATORS, rule_of
from .calibrate.table import FORMAT_VERSION, AllocationTable, TableError
from .calibrate.text import TextError, held_out, read_text, text_hash, token_sequences
from .calibrate.weights import weights_hash
from .options import NAME, KVQuantError, KVQuantOptions, flag

logger = logging.getLogger(__name__)

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
        "layers": len(packed_layers(config)),
        "kv_heads": kv_heads(config),
        "head_dim": head_dim(config),
        "v_head_dim": v_head_dim(config),
    }
    for name, value in shape.items():
        if getattr(header, name) != value:
            raise KVQuantError(f"{flag('table')} {path}: {name} {getattr(header, name)}, the model has {value}; {make}")
    if header.page and has_mrope(config):
        raise KVQuantError(
            f"{flag('table')} {path}: has means for pages of {header.page} positions, which this model's M-RoPE does "
            "not allow; make it again with python -m sglang_blockgtq.calibrate"
        )
    for name in ("k_bits", "v_bits", "allocator", "granularity"):
        wanted = getattr(options, name)
        if wanted is not None and wanted != getattr(header, name):
            raise KVQuantError(
                f"{flag(name)} {wanted}: the table {path} has {getattr(header, name)}; leave {flag(name)} out, "
                "or make a table with it"
            )


def load_named_table(options: KVQuantOptions, config: Any) -> AllocationTable:
    """The table of --kv-quant-table, checked against a model's Hugging Face config. Raises KVQuantError."""
    path = options.table
    if path is None:
        raise ValueError("these options name no table")
    try:
        table = AllocationTable.load(path)
    except TableError as e:
        raise KVQuantError(f"{flag('table')} {path}: {e}") from None
    check_table(table, path, options, config)
    return table


def calibration_text(
    tokenizer: Any, options: KVQuantOptions, context_len: int, device: str
) -> tuple[list[list[int]], list[int]]:
    """Token ids to calibrate on, and further ones to measure on. Raises KVQuantError."""
    try:
        text = read_text(options.calibration_text)
        sequences = token_sequences(tokenizer, text, options.calibration_tokens, context_len)
    except TextError as e:
        raise KVQuantError(str(e)) from None
    count = CPU_TOKENS if device.startswith("cpu") else TOKENS
    return sequences, held_out(tokenizer, text, options.calibration_tokens, min(count, context_len))


def granularity_of(options: KVQuantOptions) -> str:
    """What gets a width of its own: only some allocators have the choice."""
    allocator, granularity = options.rule
    return granularity if allocator in SEGMENT_ALLOCATORS else "segment"


def cache_path(options: KVQuantOptions, model_config_hash: str, weights: str, text: str) -> Path:
    """File of a computed table. Tensor parallelism is not in the key: the table is the whole model's."""
    granularity = granularity_of(options)
    rule = rule_of(options.rule[0], granularity)
    key = "|".join(
        str(x)
        for x in (
            FORMAT_VERSION,
            ALLOCATOR_VERSION,
            BUILDER_VERSION,
            model_config_hash,
            weights,
            text,
            QUALITY_VERSION,
            options.k_bits,
            options.v_bits,
            options.max_kl if options.k_bits is None else None,
            options.bits_range if options.k_bits is None else None,
            options.exact_recent,
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


def sweep(folder: Path) -> None:
    """Remove what savers that were killed have left."""
    with suppress(OSError):  # others may sweep, too, and it can wait for the next save
        for scratch in (file for pattern in SCRATCH for file in folder.glob(pattern)):
            if time.time() - scratch.stat().st_mtime > SCRATCH_AGE:
                scratch.unlink(missing_ok=True)


class Rule(TypedDict):
    """An allocator and its granularity, as build_table takes them."""

    allocator: str
    granularity: str


class Hashes(TypedDict):
    """What a table was made of, as build_table takes them."""

    config_hash: str
    text_hash: str
    weights_hash: str


def effective_rule(rope: list[RopeBlocks], options: KVQuantOptions) -> Rule:
    """The allocator that runs and its granularity.

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
    return {"allocator": options.rule[0], "granularity": granularity_of(options)}


@dataclass(frozen=True)
class Plan:
    """What is known before calibration.

    sequences: token ids to calibrate on; held_out: others, to measure on, perhaps none. path: where the table goes once
    it is made; None to keep it nowhere. table: an earlier one, found there.
    """

    sequences: list[list[int]]
    held_out: list[int]
    hashes: Hashes
    path: Path | None = None
    table: AllocationTable | None = None


def plan(runner: Any, options: KVQuantOptions, kept: bool = True) -> Plan:
    """For a loaded ModelRunner. kept: the weights are those of the files it was started with. Raises KVQuantError."""
    args, config = runner.server_args, runner.model_config
    sequences, held_out = calibration_text(_tokenizer(args), options, config.context_len, runner.device)
    weights = _weights(args) if kept else ""
    hashes = Hashes(config_hash=config_hash(config.hf_config), text_hash=text_hash(sequences), weights_hash=weights)
    if not kept:
        return Plan(sequences, held_out, hashes)
    if not weights:
        what = f"{args.model_path} (load format {args.load_format})"
        logger.warning("%s: no weight files of %s to know the table by, so it is not kept", NAME, what)
        return Plan(sequences, held_out, hashes)
    path = cache_path(options, hashes["config_hash"], weights, text_hash([*sequences, held_out]))
    return Plan(sequences, held_out, hashes, path, _from_cache(path, hashes["config_hash"]))


def held_out_text(runner: Any) -> list[int]:
    """Token ids of the built-in text to measure a named table on."""
    options = KVQuantOptions()
    return calibration_text(_tokenizer(runner.server_args), options, runner.model_config.context_len, runner.device)[1]


def _tokenizer(args: Any) -> Any:
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    return get_tokenizer(
        args.tokenizer_path or args.model_path,
        tokenizer_mode=args.tokenizer_mode,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
    )


def _weights(args: Any) -> str:
    """The fingerprint of the served weights; "" if there is none."""
    dummy = str(getattr(args.load_format, "value", args.load_format)) == "dummy"
    return "" if dummy else weights_hash(args.model_path, args.revision, args.download_dir)


def named(runner: Any, options: KVQuantOptions) -> AllocationTable:
    """The table of --kv-quant-table for a loaded ModelRunner. Raises KVQuantError."""
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


def build(
    runner: Any,
    options: KVQuantOptions,
    given: Plan,
    moments: Moments,
    rope: list[RopeBlocks],
    bits: tuple[float, float],
    like: AllocationTable | None = None,
) -> AllocationTable:
    """The table of some bits of keys and values. like: one whose rows it must have."""
    return build_table(
        moments,
        rope,
        k_bits=bits[0],
        v_bits=bits[1],
        **effective_rule(rope, options),
        rule=None if like is None else poured_as(like),
        v_head_dim=runner.model_config.v_head_dim,
        model_id=runner.server_args.model_path,
        **given.hashes,
    )


def keep(table: AllocationTable, path: Path | None, cache_dir: str) -> None:
    """Save to the cache. A table that cannot be kept is served all the same, with a warning."""
    if path is None:
        return
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
    else:
        sweep(path.parent)
