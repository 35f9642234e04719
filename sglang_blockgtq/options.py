"""The --kv-quant options: flags, parsing and everything that can be checked without a model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .calibrate import MOST_RECENT, RECENT

NAME = "blockgtq"
#: ServerArgs carries the options under this name; underscore attributes survive sealing and pickling.
ATTRIBUTE = "_kvq"
PREFIX = "kv_quant"
ALLOCATORS = ("uniform", "paper", "product", "template")
GRANULARITIES = ("block", "segment")
SPELLINGS = {"slot": "segment"}  # of a granularity
BY_SEGMENTS = ("paper", "product")  # allocators that have a choice
CHUNK_ATTENTION = ("raw", "quantized")
DECODE_KERNELS = ("auto", "triton", "cuda")
RECALIBRATE = ("never", "flush")
#: name -> options that it stands for; those that are given beside it win. What each costs a model: make quality.
PRESETS: dict[str, dict[str, Any]] = {
    "auto": {"k_bits": None, "v_bits": None},
    "quality": {"k_bits": 4, "v_bits": 4},
    "balanced": {"k_bits": 3, "v_bits": 3},
    "compact": {"k_bits": 3, "v_bits": 2},
}
#: (K, V) bits that ``auto`` tries, by falling compression; all fill words (kernels.format.columns).
LADDER = ((2, 2), (2.5, 2), (2.5, 2.5), (3, 2.5), (3, 3), (3.5, 3), (3.5, 3.5), (4, 4), (6, 6), (8, 8))
#: nats a token that ``auto`` allows; docs/method.md says what that means for an answer.
TARGET_KL = 0.03
DEFAULT_RANGE = (3.0, 8.0)
MOST_CHECKED = 65_536  # rows a step
DEFAULT_PRESET = "auto"
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
    """Parsed options. They travel inside ServerArgs, and a process that unpickles them learns that it serves with them.

    k_bits, v_bits: average bits per channel, may be fractional. None with a table: the table's; else they are chosen
        from bits_range as the fewest whose measured KL is at most max_kl, or TARGET_KL.
    decode_kernel: what reads rows in a decode step on a GPU. "triton": the kernel for any GPU; "cuda": that for Hopper;
        "auto": the faster one of those that can.
    max_kl: nats a token above which the server does not start.
    granularity: what ``paper`` and ``product`` give a width of its own. "segment": whole segments of 16 channels,
        at most four kinds of heads in a model, which the fast kernels read. "block": each RoPE block, as in the
        paper. None with a table: the table's.
    table: allocation table file, or None to calibrate at model load.
    calibration_text: text file, or None for the built-in text.
    chunk_attention: what the keys and values of the running chunk look like to the chunk itself.
        "raw": exact, as computed. "quantized": as they will be read back later, so that a cold prompt
        and its repetition from the prefix cache give the same answer.
    exact_recent: the last tokens of a running request that decode reads exactly, its own among them. None: RECENT,
        fewer where copies of all requests would not fit, 0 where the server cannot.
    check_rows: rows that are compared with their checksums at each step; 0 for none, and no checksums.
    recalibrate: what makes a new table once weights were replaced. "never", or "flush": the next /flush_cache.
    """

    k_bits: float | None = DEFAULT_BITS
    v_bits: float | None = DEFAULT_BITS
    allocator: str | None = DEFAULT_ALLOCATOR
    granularity: str | None = "segment"
    table: str | None = None
    calibration_text: str | None = None
    calibration_tokens: int = 2048
    cache_dir: str = ""
    chunk_attention: str = "raw"
    decode_kernel: str = "auto"
    max_kl: float | None = None
    bits_range: tuple[float, float] = DEFAULT_RANGE
    exact_recent: int | None = None
    check_rows: int = 0
    recalibrate: str = "never"

    @property
    def bits(self) -> tuple[float, float] | None:
        """Of keys and values; None where they are to be chosen, or are a table's."""
        return None if self.k_bits is None or self.v_bits is None else (self.k_bits, self.v_bits)

    @property
    def rule(self) -> tuple[str, str]:
        """The allocator and its granularity of a table that is made here. ValueError where a table says them."""
        if self.allocator is None or self.granularity is None:
            raise ValueError("allocator and granularity are those of the named table")
        return self.allocator, self.granularity

    @property
    def target_kl(self) -> float:
        """Nats a token that chosen bits may cost."""
        return TARGET_KL if self.max_kl is None else self.max_kl

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __reduce__(self) -> tuple:
        return _unpickle, (self.to_dict(),)

    @classmethod
    def of(cls, server_args: Any) -> KVQuantOptions | None:
        """The options a ServerArgs carries, or None when --kv-quant was not asked for."""
        return getattr(server_args, ATTRIBUTE, None)

    @classmethod
    def required_of(cls, server_args: Any) -> KVQuantOptions:
        """The options of a ServerArgs that carries some. RuntimeError where it does not."""
        options = cls.of(server_args)
        if options is None:
            raise RuntimeError(f"{NAME}: these server arguments carry no options; --kv-quant was not asked for")
        return options


_arrived = False
_on_arrival: Callable[[], None] | None = None


def _unpickle(values: dict[str, Any]) -> KVQuantOptions:
    global _arrived
    _arrived = True
    if _on_arrival is not None:
        _on_arrival()
    return KVQuantOptions(**values)


def have_arrived() -> bool:
    """Whether options were unpickled in this process: then it was started to serve with them."""
    return _arrived


def on_arrival(action: Callable[[], None]) -> None:
    """Run ``action`` whenever options are unpickled in this process."""
    global _on_arrival
    _on_arrival = action


FLAGS = (PREFIX, f"{PREFIX}_preset", *(f"{PREFIX}_{f.name}" for f in fields(KVQuantOptions)))


def _flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def flag(name: str) -> str:
    """Python name of an option to its flag: ``k_bits`` to ``--kv-quant-k-bits``."""
    return _flag_of(f"{PREFIX}_{name}")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags. Values stay text: :func:`parse` checks them, so that Engine gives the same messages."""
    group = parser.add_argument_group("KV-cache quantization (sglang-blockgtq)")

    def add(name: str, metavar: str, text: str) -> None:
        group.add_argument(flag(name), default=None, metavar=metavar, help=text.replace("%", "%%"))

    group.add_argument(
        "--kv-quant",
        default="none",
        metavar="MODE",
        help=f"'{NAME}' packs the KV cache to mixed 1-8 bit codes; 'none' (default).",
    )
    add("preset", "NAME", f"Bits by name: {', '.join(PRESETS)} (default {DEFAULT_PRESET}: measured at start-up).")
    add("k_bits", "BITS", "Average bits per key channel, 1 to 8, e.g. 2.5 (3 if only those of values are given).")
    add("v_bits", "BITS", "Average bits per value channel, 1 to 8 (3 if only those of keys are given).")
    add(
        "allocator",
        "NAME",
        f"How bits are given to RoPE blocks: {', '.join(ALLOCATORS)} (default {DEFAULT_ALLOCATOR}).",
    )
    add(
        "granularity",
        "NAME",
        "For paper and product: 'segment' (default) gives each 16 channels a width, and decodes at the speed of "
        "uniform; 'block' gives each RoPE block one, as in the paper, and is far slower.",
    )
    add(
        "table",
        "FILE",
        "Allocation table made by python -m sglang_blockgtq.calibrate; without it the server calibrates at load.",
    )
    add("calibration_text", "FILE", "UTF-8 text to calibrate on (default: built in).")
    add("calibration_tokens", "N", "Tokens to calibrate on, at least 2048 (default).")
    add("cache_dir", "DIR", f"Where computed tables are kept (default {default_cache_dir()}).")
    add(
        "chunk_attention",
        "MODE",
        "'raw' (default): a prefill chunk sees its own keys and values exactly. 'quantized': as they are stored.",
    )
    add(
        "decode_kernel",
        "NAME",
        "Decode attention on a GPU: 'triton', 'cuda' (for Hopper), or 'auto' (default), the faster one that serves.",
    )
    add("max_kl", "NATS", "Do not start if the cache costs more than this KL of the answer a token, e.g. 0.05.")
    add("bits_range", "LOW-HIGH", "What --kv-quant-preset auto may choose from (default 3-8).")
    add(
        "exact_recent",
        "N",
        f"Decode reads a running request's last N tokens exactly, up to {MOST_RECENT} (default {RECENT}, fewer where "
        "memory is short; 0: none).",
    )
    add(
        "check_rows",
        "N",
        "Compare N of the rows that each step reads with their checksums, and end the server where one differs "
        "(default 0: none, and no checksums).",
    )
    add(
        "recalibrate",
        "WHEN",
        "'flush': once weights were replaced, the next /flush_cache makes a table for the new ones; 'never' (default).",
    )
    _refuse_abbreviations(parser)


def _refuse_abbreviations(parser: argparse.ArgumentParser) -> None:
    """SGLang's own flags keep argparse's abbreviations; ours have none, or --kv-quant-k would be --kv-quant-k-bits."""
    parse_known_args = parser.parse_known_args
    flags = [_flag_of(field) for field in FLAGS]

    def checked(args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        for token in args[: args.index("--")] if "--" in args else args:
            name = str(token).split("=", 1)[0]
            meant = [x for x in flags if x.startswith(name)]
            if name.startswith(flags[0]) and meant and name not in meant:
                raise SystemExit(f"error: {name}: these options are not abbreviated; write {' or '.join(meant)}")
        return parse_known_args(args, namespace)

    parser.parse_known_args = checked  # type: ignore[method-assign]  # argparse has no other way


def _number(name: str, value: Any) -> float:
    works = "a number from 1 to 8 works, e.g. 2, 2.5, 3 or 4"
    try:
        bits = float(value)
    except (TypeError, ValueError):
        raise KVQuantError(f"{flag(name)} {value}: not a number; {works}") from None
    if not 1 <= bits <= 8:  # also catches NaN
        raise KVQuantError(f"{flag(name)} {value}: outside the supported range; {works}")
    return bits


def _nats(name: str, value: Any) -> float:
    try:
        nats = float(value)
    except (TypeError, ValueError):
        nats = float("nan")
    if not 0 < nats < float("inf"):
        raise KVQuantError(f"{flag(name)} {value}: a number above 0 is needed, in nats a token, e.g. 0.05")
    return nats


def _range(name: str, value: Any) -> tuple[float, float]:
    works = "LOW-HIGH is needed, from 2 to 8, e.g. 2-4"
    try:
        low, high = map(float, str(value).split("-"))
    except ValueError:
        raise KVQuantError(f"{flag(name)} {value}: {works}") from None
    if not any(low <= min(bits) and max(bits) <= high for bits in LADDER):
        tried = ", ".join(f"K {k:g} V {v:g}" for k, v in LADDER)
        raise KVQuantError(f"{flag(name)} {value}: holds none of {tried}; {works}")
    return low, high


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise KVQuantError(f"{flag(name)} {value}: unknown; choose one of {', '.join(choices)}")
    return value


def _file(name: str, value: Any, make: str) -> str:
    """Absolute path of a regular file that can be read; every process opens it again."""
    from .calibrate.files import file_problem

    path = os.path.expanduser(str(value))
    if not path:
        raise KVQuantError(f"{flag(name)} '': empty; {make}")
    if problem := file_problem(path):
        raise KVQuantError(f"{flag(name)} {value}: {problem}; {make}")
    return str(Path(path).resolve())


def _folder(name: str, value: Any) -> str:
    path = os.path.expanduser(str(value))
    if not path:
        raise KVQuantError(f"{flag(name)} '': empty; name a folder that is or can be made, or leave the option out")
    if os.path.exists(path) and not os.path.isdir(path):
        raise KVQuantError(f"{flag(name)} {value}: not a folder; name one that is or can be made")
    return os.path.abspath(path)


def _tokens(name: str, value: Any, text: str | None) -> int:
    """text: file to calibrate on, or None for the built-in text."""
    from .calibrate.text import MIN_TOKENS, TextError, check_text_size

    try:
        tokens = int(str(value))
    except ValueError:
        raise KVQuantError(f"{flag(name)} {value}: not a whole number; {MIN_TOKENS} or more works") from None
    if tokens < MIN_TOKENS:
        raise KVQuantError(f"{flag(name)} {value}: too few to estimate moments; {MIN_TOKENS} or more works")
    try:
        check_text_size(tokens, text)
    except TextError as e:
        raise KVQuantError(str(e)) from None
    return tokens


def _count(name: str, value: Any, most: int, example: int) -> int:
    try:
        count = int(str(value))
    except ValueError:
        count = -1
    if not 0 <= count <= most:
        raise KVQuantError(
            f"{flag(name)} {value}: a whole number up to {most} is needed, e.g. {example}, or 0 for none"
        )
    return count


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

    out: dict[str, Any] = {"cache_dir": default_cache_dir()}
    preset = given.pop("preset", None)
    if preset is None and not given.keys() & {"k_bits", "v_bits", "table"}:
        preset = DEFAULT_PRESET
    if preset is not None:
        _choice("preset", preset, tuple(PRESETS))
        if "table" in given:
            raise KVQuantError(f"{flag('preset')} {preset}: a table has its own bits; leave it or {flag('table')} out")
        out |= PRESETS[preset]
    for name in ("k_bits", "v_bits"):
        if name in given:
            if preset == "auto":
                raise KVQuantError(
                    f"{flag(name)} {given[name]}: {flag('preset')} auto chooses bits; leave one of both out, or bound "
                    f"the choice with {flag('bits_range')}"
                )
            out[name] = _number(name, given[name])
    if "max_kl" in given:
        out["max_kl"] = _nats("max_kl", given["max_kl"])
    if "bits_range" in given:
        if preset != "auto":
            raise KVQuantError(
                f"{flag('bits_range')} {given['bits_range']}: has no effect without {flag('preset')} auto"
            )
        out["bits_range"] = _range("bits_range", given["bits_range"])
    if "allocator" in given:
        out["allocator"] = _choice("allocator", given["allocator"], ALLOCATORS)
    if "granularity" in given:
        typed = given["granularity"]
        allocator = out.get("allocator", None if "table" in given else DEFAULT_ALLOCATOR)
        out["granularity"] = _choice("granularity", SPELLINGS.get(str(typed), typed), GRANULARITIES)
        if allocator not in (None, *BY_SEGMENTS):
            raise KVQuantError(
                f"{flag('granularity')} {typed}: has no effect on {flag('allocator')} {allocator}; leave it out, or "
                f"choose {flag('allocator')} {' or '.join(BY_SEGMENTS)}"
            )
    if "chunk_attention" in given:
        out["chunk_attention"] = _choice("chunk_attention", given["chunk_attention"], CHUNK_ATTENTION)
    if "decode_kernel" in given:
        out["decode_kernel"] = _choice("decode_kernel", given["decode_kernel"], DECODE_KERNELS)
    if "check_rows" in given:
        out["check_rows"] = _count("check_rows", given["check_rows"], MOST_CHECKED, 16)
    if "exact_recent" in given:
        out["exact_recent"] = _count("exact_recent", given["exact_recent"], MOST_RECENT, RECENT)
    if out.get("exact_recent") and out.get("chunk_attention") == "quantized":
        raise KVQuantError(
            f"{flag('exact_recent')} {out['exact_recent']}: {flag('chunk_attention')} quantized reads all tokens as "
            "they are stored; leave one of both out"
        )
    if "recalibrate" in given:
        out["recalibrate"] = _choice("recalibrate", given["recalibrate"], RECALIBRATE)
    if "cache_dir" in given:
        out["cache_dir"] = _folder("cache_dir", given["cache_dir"])
    if "calibration_text" in given:
        out["calibration_text"] = _file(
            "calibration_text", given["calibration_text"], "name a UTF-8 text file, or leave the option out"
        )
    if "calibration_tokens" in given:
        out["calibration_tokens"] = _tokens(
            "calibration_tokens", given["calibration_tokens"], out.get("calibration_text")
        )
    if "table" in given:
        for name in ("calibration_text", "calibration_tokens"):
            if name in given:
                raise KVQuantError(
                    f"{flag(name)} {given[name]}: a table is already calibrated; leave it or {flag('table')} out"
                )
        out["table"] = _file("table", given["table"], "name a file made by python -m sglang_blockgtq.calibrate")
        # Unset here means "what the table has"; set means "and it must be this".
        for name in ("k_bits", "v_bits", "allocator", "granularity"):
            out.setdefault(name, None)
    return KVQuantOptions(**out)
