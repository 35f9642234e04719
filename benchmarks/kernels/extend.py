"""A layer's attention of some new tokens on a cached prefix: ``python -m benchmarks.kernels.extend --out FILE.csv``.

Beside each other, of one request: bf16, FlashAttention-3 reading the pages of a cache as SGLang's backend has it do;
packed, which unpacks the prefix into a workspace and has FlashAttention-3 read that; and of the latter, unpack and
attention alone, where the prefix fits the workspace. Columns: shape, prefix, new (tokens), what, us, gbps (of unpack:
bytes of keys and values written).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sglang_blockgtq.backend.extend import ExtendPlan, Workspace
from sglang_blockgtq.kernels.device.tables import templates_of
from sglang_blockgtq.kernels.layer import TritonLayer
from sglang_blockgtq.kernels.terms import PLAIN

from . import cases, record, timing
from .data import PAGE, Index, make_codec
from .layers import METHODS, Timer

COLUMNS = ("shape", "prefix", "new", "what", "us", "gbps")
SECONDS = 0.2  # of replays
PREFIXES = (4096, 8192, 32768, 65024, 131072)
#: ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache``, or what behaves like them
Attend = tuple[Callable, Callable]


class Extension:
    """A layer, a request's prefix in its rows and in bf16's cache, and new tokens. ``of`` is timed."""

    def __init__(self, shape: cases.Shape, method: cases.Method, prefix: int, new: int, attend: Attend, device: str):
        codec, self.shape, self.scale = make_codec(shape, method), shape, shape.dim**-0.5
        self.layer = TritonLayer(codec, device, templates_of(codec.layout.k))
        index = Index.of((prefix + new,), cases.SHUFFLED, device)
        self.layer.bind(self.layer.new_rows(index.slots, device))
        # Any bytes are codes; scales are small numbers.
        self.layer.rows.random_(0, 64)
        self.slots, self.lengths = index.flat(1)[1], index.seqlens()
        dtype, self.total = torch.bfloat16, prefix + new

        def made(*size: int) -> torch.Tensor:
            return torch.randn(*size, shape.dim, device=device, dtype=dtype)

        self.q, self.k, self.v = (made(new, heads) for heads in (shape.q_heads, shape.kv_heads, shape.kv_heads))
        self.caches = [made(index.slots, 1, shape.kv_heads) for _ in range(2)]
        self.out, self.paged = torch.empty_like(self.q), attend[1]
        self.workspace = Workspace(self.layer, attend[0], dtype, device, self.total)
        self.cu_q, self.cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (new, self.total))
        ((_, self.plan),) = self.workspace.plans([prefix], [new], self.cu_q, self.cu_k - self.cu_q, self.slots[:prefix])

    @property
    def of(self) -> dict[str, Callable[[], object]]:
        """What is timed."""
        parts = {"bf16": self._bf16, "packed": self._packed}
        return parts if self.plan.task is None else parts | {"unpack": self._unpack, "attention": self._attention}

    def _bf16(self) -> None:
        self.paged(
            q=self.q, k_cache=self.caches[0], v_cache=self.caches[1], page_table=self.slots[None],
            cache_seqlens=self.lengths, cu_seqlens_q=self.cu_q, cu_seqlens_k_new=self.cu_k,
            max_seqlen_q=len(self.q), softmax_scale=self.scale, causal=True, num_splits=0, out=self.out,
        )  # fmt: skip

    def _packed(self) -> None:
        self.workspace(self.layer, self.plan, self.q, self.k, self.v, self.scale, self.out)

    def _unpack(self) -> None:
        self.layer.unpacker(self.plan.task, self.k, self.v)

    def _attention(self) -> None:
        plan: ExtendPlan = self.plan
        where = plan.cu_q, plan.cu_k, plan.max_q, plan.max_k
        self.workspace.dense(self.q, plan.keys, plan.values, *where, self.scale, PLAIN, self.out)


def measure(extension: Extension, timer: Timer = timing.measure) -> Iterator[tuple[str, float, float]]:
    """Of each part microseconds, and of unpack GB/s of what it writes."""
    written = 2 * 2 * extension.total * extension.shape.kv_heads * extension.shape.dim
    for name, launch in extension.of.items():
        us = timer(lambda _, launch=launch: launch(), timing.COLD_BYTES / 4, 1, SECONDS).us
        yield name, us, written / us / 1e3 if name == "unpack" else 0


def flash() -> Attend:
    from sgl_kernel.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    return flash_attn_varlen_func, flash_attn_with_kvcache


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.extend",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    shapes = [s.name.lower() for s in cases.SHAPES]
    add("--out", type=Path, required=True, help="CSV to write; a .json of the same name tells how")
    add("--shape", nargs="+", choices=shapes, default=["llama-3.1-8b", "qwen2.5-3b"])
    add("--method", choices=METHODS, default="template-k3v3")
    add("--prefix", nargs="+", type=int, default=PREFIXES, metavar="N", help="cached tokens (default %(default)s)")
    add("--new", type=int, default=512, metavar="N", help="new tokens (default %(default)s)")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if args.new < 1 or min(args.prefix) < PAGE:
        parser.error(f"--new {args.new} --prefix {min(args.prefix)}: at least 1 and {PAGE} tokens are needed")
    return args


def main(
    argv: list[str] | None = None,
    timer: Timer = timing.measure,
    attend: Callable[[], Attend] = flash,
    device: str = "cuda",
) -> int:
    args = parse(argv)
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.kernels.extend needs a CUDA device", file=sys.stderr)
        return 2
    made = record.provenance(sys.argv[1:] if argv is None else argv, args.commit, "benchmarks.kernels.extend")
    made["timing"] = {"us": "median over replays of a CUDA graph, per call; the prefix is new to no call"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for shape in (shape for shape in cases.SHAPES if shape.name.lower() in args.shape):
            for prefix in args.prefix:
                extension = Extension(shape, METHODS[args.method], prefix, args.new, attend(), device)
                for what, us, gbps in measure(extension, timer):
                    writer.writerow([shape.name, prefix, args.new, what, f"{us:.1f}", f"{gbps:.0f}" if gbps else ""])
                    print(f"{shape.name}, {args.new} on {prefix}, {what}: {us:.1f} us", flush=True)
                file.flush()
    record.write_json(args.out, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
