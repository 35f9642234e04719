"""``python -m benchmarks.kernels --out FILE.csv``: check, time, write CSV and JSON. Needs a CUDA device."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from sglang_blockgtq.kernels.cuda import attention as cuda
from sglang_blockgtq.kernels.decode import attention
from sglang_blockgtq.options import DECODE_KERNELS

from . import cases, record, run, timing


def lengths(text: str) -> tuple[int, int]:
    """``8x32K`` to (8, 32768). ArgumentTypeError for anything else."""
    batch, x, context = text.lower().partition("x")
    try:
        tokens = int(context[:-1]) * 1024 if context.endswith("k") else int(context)
        if x and int(batch) > 0 and tokens > 0:
            return int(batch), tokens
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: BATCHxCONTEXT is needed, as in 8x32K")


def tuning(text: str) -> tuple[str, int]:
    """``registers=168`` to ("registers", 168). ArgumentTypeError for anything else."""
    names = [f.name for f in fields(attention.Tuning)]
    name, _, value = text.partition("=")
    if name in names and value.isdecimal() and int(value) > 0:
        return name, int(value)
    raise argparse.ArgumentTypeError(f"{text}: NAME=NUMBER is needed, NAME one of {', '.join(names)}")


def retune(changes: list[tuple[str, int]]) -> dict[str, dict]:
    """Take the changes of ``--tuning`` for every loop of Triton's decode, which then reads all rows. What each has, for
    the record."""
    if changes:
        cuda.CHOICE = "triton"
    names = "TUNING", "TEMPLATES_TUNING", "WIDE_TUNING"
    for name in names:
        setattr(attention, name, replace(getattr(attention, name), **dict(changes)))
    return {name.lower(): asdict(getattr(attention, name)) for name in names}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write; a .json of the same name tells how")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="GLOB",
        help="cases whose SHAPE/KERNEL/METHOD matches one of these, e.g. 'qwen2.5-3b/decode/*' '*/template-k3v3'; "
        "packed methods are named with their bits",
    )
    parser.add_argument("--lengths", nargs="+", type=lengths, metavar="BxN", help="e.g. 1x128K 32x8K; default: all")
    parser.add_argument(
        "--tuning",
        nargs="+",
        type=tuning,
        default=[],
        metavar="NAME=NUMBER",
        help="of Triton's decode, as in registers=168 stages=3",
    )
    parser.add_argument(
        "--decode-kernel",
        choices=DECODE_KERNELS,
        default="auto",
        help="what reads packed rows, as a server's --kv-quant-decode-kernel (default auto)",
    )
    parser.add_argument("--quick", action="store_true", help="three lengths, shuffled index")
    parser.add_argument("--check", action="store_true", help="check results and compile kernels, time nothing")
    parser.add_argument("--budget", type=float, default=285, help="seconds for everything (default 285)")
    parser.add_argument("--pool-tokens", type=int, default=1 << 20, help="tokens of the pools (default 1048576)")
    parser.add_argument("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if args.tuning and args.decode_kernel == "cuda":
        parser.error("--tuning is of Triton's decode: leave it or --decode-kernel cuda out")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    started = time.monotonic()
    try:
        chosen = cases.cases(args.only, args.lengths, args.quick)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA device", file=sys.stderr)
        return 2
    cuda.CHOICE = args.decode_kernel
    tuned = retune(args.tuning)
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is float32
    gc.freeze()  # a collection before each capture is then quick
    provenance = record.provenance(sys.argv[1:] if argv is None else argv, args.commit)
    provenance |= tuned
    table = record.Table(args.out)
    if not args.check:
        copy, num_bytes = timing.copy_gbps()
        table.add(run.copy_row(copy, num_bytes))
        provenance["copy_gbps"] = round(table.rows[0].gbps, 1)
        torch.cuda.empty_cache()
    record.write_json(args.out, provenance)
    ok = run.run(
        chosen,
        table,
        "cuda",
        deadline=started + args.budget,
        pool_tokens=args.pool_tokens,
        timer=None if args.check else timing.measure,
    )
    provenance["seconds"] = round(time.monotonic() - started, 1)
    record.write_json(args.out, provenance)
    print(f"{len(table.rows)} rows in {args.out}, {provenance['seconds']} s", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
