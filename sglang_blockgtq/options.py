"""The --kv-quant options: flags, parsing and everything that can be checked without a model."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

NAME = "blockgtq"
#: ServerArgs carries the options under this name; underscore attributes survive sealing and pickling.
ATTRIBUTE = "_kvq"
PREFIX = "kv_quant"
ALLOCATORS = ("uniform", "paper", "product", "template")
GRANULARITIES = ("block", "slot")
BY_SLOTS = ("paper", "product")  # allocators that have a choice
CHUNK_ATTENTION = ("raw", "quantized")
#: name -> options that it stands for; those that are given beside it win. What each costs a model: make quality.
#: Keys need a bit more than values do: K3V2 loses a third of what K2V2 does (benchmarks/results/split_smollm2.csv).
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"k_bits": 4, "v_bits": 4},
    "balanced": {"k_bits": 3, "v_bits": 3},
    "compact": {"k_bits": 3, "v_bits": 2},
}
DEFAULT_BITS = 3.0
DEFAULT_ALLOCATOR = "template"


class KVQuantError(ValueError):
    """Start-up must stop. The message is one line: option, value, and what would work."""


def default_cache_dir() -> str:
    """Where tables computed at model load are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, then sglang-blockgtq."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "sglang-blockgtq")


@dataclass(frozen=True)
class KVQuantOptions:
    """Parsed options. Plain values only: they travel to the scheduler processes inside ServerArgs.

    k_bits, v_bits: average bits per channel, may be fractional. None with a table: the table's.
    granularity: what ``paper`` and ``product`` give a width of its own. "block": each RoPE block, as in the paper.
        "slot": whole slots of 16 channels, at most four kinds of heads in a model, which the fast kernels read.
        None with a table: the table's.
    table: allocation table file, or None to calibrate at model load.
    calibration_text: text file, or None for the built-in text.
    chunk_attention: what the keys and values of the running chunk look like to the chunk itself.
        "raw": exact, as computed. "quantized": as they will be read back later, so that a cold prompt
        and its repetition from the prefix cache give the same answer.
    """

    k_bits: float | None = DEFAULT_BITS
    v_bits: float | None = DEFAULT_BITS
    allocator: str | None = DEFAULT_ALLOCATOR
    granularity: str | None = "block"
    table: str | None = None
    calibration_text: str | None = None
    calibration_tokens: int = 2048
    cache_dir: str = ""
    chunk_attention: str = "raw"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, server_args: Any) -> KVQuantOptions | None:
        """The options a ServerArgs carries, or None when --kv-quant was not asked for."""
        values = getattr(server_args, ATTRIBUTE, None)
        return None if values is None else cls(**values)


FLAGS = (PREFIX, f"{PREFIX}_preset", *(f"{PREFIX}_{f.name}" for f in fields(KVQuantOptions)))


def flag(name: str) -> str:
    """Python name of an option to its flag: ``k_bits`` to ``--kv-quant-k-bits``."""
    return f"--{PREFIX}_{name}".replace("_", "-")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags. Values stay text: :func:`parse` checks them, so that Engine gives the same messages."""
    group = parser.add_argument_group("KV-cache quantization (sglang-blockgtq)")
    add = group.add_argument
    add("--kv-quant", default="none", help="'blockgtq' packs the KV cache to mixed 1-8 bit codes; 'none' (default).")
    add(
        flag("preset"),
        default=None,
        metavar="NAME",
        help=f"Bits by name: {', '.join(PRESETS)} (balanced is the default).",
    )
    add(
        flag("k_bits"), default=None, metavar="BITS", help="Average bits per key channel, 1 to 8, e.g. 2.5 (default 3)."
    )
    add(flag("v_bits"), default=None, metavar="BITS", help="Average bits per value channel, 1 to 8 (default 3).")
    add(
        flag("allocator"),
        default=None,
        metavar="NAME",
        help=f"How bits are given to RoPE blocks: {', '.join(ALLOCATORS)} (default {DEFAULT_ALLOCATOR}).",
    )
    add(
        flag("granularity"),
        default=None,
        metavar="NAME",
        help="For paper and product: 'block' (default) gives each RoPE block a width, 'slot' each 16 channels, which "
        "decodes at the speed of uniform.",
    )
    add(
        flag("table"),
        default=None,
        metavar="FILE",
        help="Allocation table made by python -m sglang_blockgtq.calibrate; without it the server calibrates at load.",
    )
    add(flag("calibration_text"), default=None, metavar="FILE", help="UTF-8 text to calibrate on (default: built in).")
    add(flag("calibration_tokens"), default=None, metavar="N", help="Tokens to calibrate on, at least 2048 (default).")
    add(
        flag("cache_dir"),
        default=None,
        metavar="DIR",
        help=f"Where computed tables are kept (default {default_cache_dir()}).",
    )
    add(
        flag("chunk_attention"),
        default=None,
        metavar="MODE",
        help="'raw' (default): a prefill chunk sees its own keys and values exactly. 'quantized': as they are stored, "
        "so that a cold prompt and its repetition from the cache agree.",
    )


def _number(name: str, value: Any) -> float:
    works = "a number from 1 to 8 works, e.g. 2, 2.5, 3 or 4"
    try:
        bits = float(value)
    except (TypeError, ValueError):
        raise KVQuantError(f"{flag(name)} {value}: not a number; {works}") from None
    if not 1 <= bits <= 8:  # also catches NaN
        raise KVQuantError(f"{flag(name)} {value}: outside the supported range; {works}")
    return bits


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise KVQuantError(f"{flag(name)} {value}: unknown; choose one of {', '.join(choices)}")
    return value


def _file(name: str, value: Any, make: str) -> str:
    path = Path(os.path.expanduser(str(value)))
    if not path.is_file():
        raise KVQuantError(f"{flag(name)} {value}: no such file; {make}")
    if not os.access(path, os.R_OK):
        raise KVQuantError(f"{flag(name)} {value}: not readable by this user; {make}")
    return str(path.resolve())


def parse(values: dict[str, Any]) -> KVQuantOptions | None:
    """Check raw values (by :data:`FLAGS` name; missing and None mean default). None when not asked for.

    Raises KVQuantError.
    """
    mode = values.get(PREFIX)
    given = {name: values.get(f"{PREFIX}_{name}") for name in ("preset", *(f.name for f in fields(KVQuantOptions)))}
    given = {name: value for name, value in given.items() if value is not None}
    if mode in (None, "none", False):
        if given:
            name = next(iter(given))
            raise KVQuantError(f"{flag(name)} {given[name]}: has no effect without --kv-quant {NAME}; add that")
        return None
    if mode != NAME:
        raise KVQuantError(f"--kv-quant {mode}: unknown; choose {NAME} or none")

    if "preset" in given:
        name = _choice("preset", given.pop("preset"), tuple(PRESETS))
        if "table" in given:
            raise KVQuantError(f"{flag('preset')} {name}: a table has its own bits; leave it or {flag('table')} out")
        given = PRESETS[name] | given
    out: dict[str, Any] = {"cache_dir": default_cache_dir()}
    for name in ("k_bits", "v_bits"):
        if name in given:
            out[name] = _number(name, given[name])
    if "allocator" in given:
        out["allocator"] = _choice("allocator", given["allocator"], ALLOCATORS)
    if "granularity" in given:
        out["granularity"] = _choice("granularity", given["granularity"], GRANULARITIES)
        allocator = out.get("allocator", None if "table" in given else DEFAULT_ALLOCATOR)
        if out["granularity"] == "slot" and allocator not in (None, *BY_SLOTS):
            raise KVQuantError(
                f"{flag('granularity')} slot: has no effect on {flag('allocator')} {allocator}; leave it out, or "
                f"choose {flag('allocator')} {' or '.join(BY_SLOTS)}"
            )
    if "chunk_attention" in given:
        out["chunk_attention"] = _choice("chunk_attention", given["chunk_attention"], CHUNK_ATTENTION)
    if "cache_dir" in given:
        out["cache_dir"] = os.path.abspath(os.path.expanduser(str(given["cache_dir"])))
        if os.path.exists(out["cache_dir"]) and not os.path.isdir(out["cache_dir"]):
            raise KVQuantError(
                f"{flag('cache_dir')} {given['cache_dir']}: not a folder; name one that is or can be made"
            )
    if "calibration_tokens" in given:
        try:
            out["calibration_tokens"] = int(str(given["calibration_tokens"]))
        except ValueError:
            value = given["calibration_tokens"]
            raise KVQuantError(
                f"{flag('calibration_tokens')} {value}: not a whole number; 2048 or more works"
            ) from None
        if out["calibration_tokens"] < 2048:
            value = given["calibration_tokens"]
            raise KVQuantError(f"{flag('calibration_tokens')} {value}: too few to estimate moments; 2048 or more works")
    if "calibration_text" in given:
        out["calibration_text"] = _file(
            "calibration_text", given["calibration_text"], "name a UTF-8 text file, or leave the option out"
        )
    if "table" in given:
        for name in ("calibration_text", "calibration_tokens"):
            if name in given:
                raise KVQuantError(
                    f"{flag(name)} {given[name]}: a table is already calibrated; leave it or {flag('table')} out"
                )
        out["table"] = _file("table", given["table"], "make one with python -m sglang_blockgtq.calibrate")
        # Unset here means "what the table has"; set means "and it must be this".
        for name in ("k_bits", "v_bits", "allocator", "granularity"):
            out.setdefault(name, None)
    return KVQuantOptions(**out)
