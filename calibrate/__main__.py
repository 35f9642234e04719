"""Make an allocation table offline, or look at one: ``python -m sglang_blockgtq.calibrate``."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from . import RECENT
from .allocate import ALLOCATORS
from .build import check_budget
from .cli import exact_recent, own_options
from .device import device
from .segments import GRANULARITIES
from .table import AllocationTable
from .text import DEFAULT_TOKENS, TextError, check_tokens

PROGRAM = "python -m sglang_blockgtq.calibrate"
BAD_INPUT = 2  # exit code
GRANULARITY_HELP = "block: for paper and product, a width for each RoPE block; default: segment (of 16 channels)"
RECENT_HELP = "last tokens that a server reads exactly (its --kv-quant-exact-recent), for what the cache costs"
NO_PICTURE = "matplotlib is not installed, which draws it; pip install matplotlib"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}\n")


def _bits(option: str):
    def parse(text: str) -> float:
        try:
            bits = float(text)
            check_budget(option, bits, 16)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r}: an average between 1 and 8 bits is supported, e.g. 2, 2.5, 3 or 4"
            ) from None
        return bits

    return parse


def _tokens(text: str) -> int:
    try:
        tokens = int(text)
        check_tokens(tokens)
    except TextError as e:
        raise argparse.ArgumentTypeError(own_options(e)) from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: not a whole number of tokens") from None
    return tokens


def _granularity(text: str) -> str:
    return "segment" if text == "slot" else text


def _device(text: str) -> str:
    return text if text == "auto" else device(text)


def check_writable(path: Path) -> None:
    """ValueError if ``path`` cannot be written, found out before the work is done."""
    if path.is_dir():
        raise ValueError(f"--out {path}: is a folder; name a file, e.g. {path / 'table.safetensors'}")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"--out {path}: {folder} is not a folder; name a file in a folder you can write to")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--out {path}: no permission to write in {folder}; name a file in a folder you can write to")


def _calibrate_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Calibrate a model and write its allocation table.",
        epilog=f"To look at a table: {PROGRAM} inspect FILE",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", required=True, help="folder or hub id of a Hugging Face causal language model")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub model; default: main")
    add("--out", required=True, type=Path, help="file to write, e.g. table.safetensors")
    add("--k-bits", type=_bits("--k-bits"), default=3.0, help="average bits per key channel, 1 to 8; default: 3")
    add("--v-bits", type=_bits("--v-bits"), default=3.0, help="average bits per value channel; default: 3")
    add("--allocator", choices=tuple(ALLOCATORS), default="template", help="default: template")
    add("--granularity", type=_granularity, choices=GRANULARITIES, default="segment", help=GRANULARITY_HELP)
    add("--calibration-text", metavar="FILE", help="UTF-8 text; default: CPython's documentation")
    add("--calibration-tokens", type=_tokens, default=DEFAULT_TOKENS, metavar="N", help=f"default: {DEFAULT_TOKENS}")
    add("--exact-recent", type=exact_recent, default=RECENT, metavar="N", help=f"{RECENT_HELP}; default: {RECENT}")
    add("--device", type=_device, default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's")
    add("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=f"{PROGRAM} inspect", description="Summarise a table and draw it.", allow_abbrev=False)
    parser.add_argument("table", type=Path, metavar="FILE", help="table to read")
    parser.add_argument("--png", type=Path, metavar="OUT.png", help="picture to write; default: beside the table")
    return parser


def _calibrate(argv: list[str]) -> None:
    args = _calibrate_parser().parse_args(argv)
    check_writable(args.out)
    from .hf import calibrate_model  # transformers takes seconds to import; bad options are told at once

    table = calibrate_model(
        args.model_path,
        k_bits=args.k_bits,
        v_bits=args.v_bits,
        allocator=args.allocator,
        granularity=args.granularity,
        text_path=args.calibration_text,
        tokens=args.calibration_tokens,
        device=args.device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
        recent=args.exact_recent,
    )
    table.save(args.out)
    h, packed = table.header, table.bytes_per_token_head()
    print(
        f"{args.out}: {h.allocator}, K {h.k_bits:g} V {h.v_bits:g} bits, {packed:g} bytes per token and KV head "
        f"({packed / h.bf16_bytes_per_token_head:.1%} of bf16), table {h.table_hash[:12]}"
    )


def _inspect(argv: list[str]) -> None:
    args = _inspect_parser().parse_args(argv)
    drawn = find_spec("matplotlib") is not None
    if args.png and not drawn:
        raise ValueError(f"--png {args.png}: {NO_PICTURE}, or leave --png out")
    table = AllocationTable.load(args.table)
    from .inspect import summary

    png = args.png or args.table.with_suffix(".png")
    if drawn:
        from .fingerprint import draw

        draw(table, png)
    print(summary(table))
    print(f"\nfingerprint: {png if drawn else NO_PICTURE}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Bad input ends with one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["inspect"]:
            _inspect(argv[1:])
        else:
            _calibrate(argv)
    except (ValueError, OSError) as e:
        message = " ".join(own_options(e).split())
        print(f"error: {message}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
