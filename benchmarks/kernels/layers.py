"""What a decode step's attention costs among a model's weights: ``python -m benchmarks.kernels.layers --out FILE.csv``.

Between two layers a model's weights pass through the L2 cache, so that neither tables nor instructions nor slots are
in it when a layer's attention begins. :mod:`benchmarks.kernels` calls attention again and again and does not see that.
Here a graph holds the products of some layers, with weights of their own and the model's sizes, and between them what a
layer of the server does: encode with the query's rotation, attention, merge. Columns: shape, batch, context, method,
part (weights: the products alone; encode, attention: with everything up to it; exact: attention that also reads and
keeps each request's last tokens exactly, its launch for them rotating the query; rotate: the query's rotation alone;
step: rotation and exact attention, and encode of all layers in one launch at the end; rope: the same with RoPE in the
rotation's launch, as a server does where it knows the model), us of a layer, more: us over weights.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_blockgtq.calibrate import RECENT
from sglang_blockgtq.kernels.decode.attention import DecodeScratch, decode_attention
from sglang_blockgtq.kernels.decode.recent import Recent
from sglang_blockgtq.kernels.device.rotate import rotate_queries
from sglang_blockgtq.kernels.device.tables import ColumnTables, moved
from sglang_blockgtq.kernels.encode import step
from sglang_blockgtq.kernels.encode.encoder import Encoder
from sglang_blockgtq.kernels.encode.step import StepEncoder

from ..models import SHAPES
from . import cases, record, timing
from .__main__ import lengths, retune, tuning
from .data import Index, make_codec

PARTS = ("weights", "encode", "attention", "exact", "rotate", "step", "rope")
COLUMNS = ("shape", "batch", "context", "method", "part", "us", "more")
SECONDS = 0.5  # of replays
METHODS = {m.key: m for m in cases.PACKED if m.granularity == "segment"}  # whose rows lie in columns

#: as timing.measure
Timer = Callable[[timing.Launch, float, int, float], timing.Timing]


@dataclass(frozen=True)
class Sizes:
    """Of the products of a layer."""

    hidden: int
    inner: int

    @classmethod
    def of(cls, shape: cases.Shape) -> Sizes:
        """ValueError for a shape whose model is not known by name."""
        config = SHAPES.get(shape.name.lower())
        if config is None:
            raise ValueError(f"{shape.name}: only the layers of {', '.join(SHAPES)} are known")
        return cls(config["hidden_size"], config["intermediate_size"])


class Layers:
    """Some layers of a model, and one decode step through them."""

    def __init__(
        self, shape: cases.Shape, sizes: Sizes, method: cases.Method, batch: int, context: int, count: int, device: str
    ):
        self.shape, self.batch, self.count = shape, batch, count
        tables = ColumnTables.of(make_codec(shape, method))
        index = Index.of((context,) * batch, cases.SHUFFLED, device)
        self.kv_indptr, self.kv_indices = index.flat(1, torch.int32)
        self.loc = self.kv_indices[self.kv_indptr[1:].long() - 1].long()
        self.tables, self.sm_scale = [moved(tables, torch.device(device)) for _ in range(count)], shape.dim**-0.5
        shape_of_rows = index.slots, tables.row.row_bytes
        # Any bytes are codes; scales are small numbers.
        rows = [torch.randint(0, 64, shape_of_rows, dtype=torch.uint8, device=device) for _ in range(count)]
        self.rows, self.encoders = rows, [Encoder(*x) for x in zip(self.tables, rows, strict=True)]
        self.scratch = DecodeScratch.of(self.tables[0], batch, shape.q_heads)
        self.recent = Recent.of(
            count, batch, batch, RECENT, shape.kv_heads, shape.dim, shape.dim, torch.bfloat16, device
        )
        self.recent.bind(batch)
        self.recent.begin(torch.arange(batch, 0, -1, device=device), torch.full((batch,), context, device=device))
        self.copies = [self.recent.layer(i) for i in range(count)]
        self.encode_step = StepEncoder(self.encoders, self.recent)
        dtype, heads = torch.bfloat16, shape.q_heads + 2 * shape.kv_heads
        of = (sizes.hidden, heads * shape.dim), (shape.q_heads * shape.dim, sizes.hidden)
        of += (sizes.hidden, 2 * sizes.inner), (sizes.inner, sizes.hidden)
        self.weights = [[torch.randn(n, device=device, dtype=dtype) / 64 for n in of] for _ in range(count)]
        self.inputs = [torch.randn(batch, n[0], device=device, dtype=dtype) for n in of]
        self.rotated = torch.empty(batch, shape.q_heads, shape.dim, device=device)
        self.out = torch.empty(batch, shape.q_heads, shape.dim, device=device, dtype=dtype)
        self.positions = torch.full_like(self.loc, context - 1)
        self.angles = torch.rand(batch, shape.dim, device=device)

    def layer(self, i: int, part: str) -> None:
        project, *rest = [lambda j=j: self.inputs[j] @ self.weights[i][j] for j in range(4)]
        q, k, v = (
            project()
            .view(self.batch, -1, self.shape.dim)
            .split([self.shape.q_heads, self.shape.kv_heads, self.shape.kv_heads], 1)
        )
        if part != "rope":
            q = q * 0.5  # in RoPE's place: a kernel between the product and encode
        if part in ("encode", "attention"):
            self.encoders[i](k, v, self.loc, self.positions, q, self.rotated)
        if part == "exact":
            self.encoders[i](k, v, self.loc, self.positions)
        if part in ("attention", "exact", "step", "rope"):
            read = None
            if part != "attention":
                read = self.copies[i].read(k, v, self.angles if part == "rope" else None)
            decode_attention(
                self.tables[i], q, self.rows[i], self.kv_indptr, self.kv_indices, self.sm_scale,
                rotated=self.rotated if part == "attention" else None, scratch=self.scratch, out=self.out,
                recent=read,
            )  # fmt: skip
        if part == "rotate":
            rotate_queries(self.tables[i].k, q, self.shape.q_heads // self.shape.kv_heads)
        if part in ("step", "rope") and i == self.count - 1:
            self.encode_step(self.loc, self.positions)
        for product in rest:
            product()


def measure(layers: Layers, timer: Timer = timing.measure) -> Iterator[tuple[str, float]]:
    """Microseconds of a layer with each part."""
    for part in PARTS:
        count = layers.count
        took = timer(lambda i, part=part: layers.layer(i, part), timing.COLD_BYTES / count, count, SECONDS)
        yield part, took.us


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    shapes = [s.name.lower() for s in cases.SHAPES]
    add("--out", type=Path, required=True, help="CSV to write; a .json of the same name tells how")
    add("--shape", nargs="+", choices=shapes, default=["qwen2.5-3b"])
    add("--method", nargs="+", choices=METHODS, default=["template-k3v3"])
    add("--lengths", nargs="+", type=lengths, default=[(1, 4096), (1, 131072)], metavar="BxN", help="e.g. 1x128K 8x32K")
    add("--tuning", nargs="+", type=tuning, default=[], metavar="NAME=NUMBER", help="of Triton's decode: stages=3")
    add("--layers", type=int, default=8, metavar="N", help="in a graph (default %(default)s)")
    few = "tokens of a step up to which encode's kernel for a few takes them (default %(default)s)"
    add("--few", type=int, default=step.FEW_TOKENS, metavar="N", help=few)
    add("--commit", help="commit to record, where there is no git")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, timer: Timer = timing.measure, device: str = "cuda") -> int:
    args = parse(argv)
    chosen = [shape for shape in cases.SHAPES if shape.name.lower() in args.shape]
    try:
        sizes = {shape.name: Sizes.of(shape) for shape in chosen}
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.kernels.layers needs a CUDA device", file=sys.stderr)
        return 2
    step.FEW_TOKENS = args.few
    tuned = retune(args.tuning) | {"few": args.few}
    made = record.provenance(sys.argv[1:] if argv is None else argv, args.commit, "benchmarks.kernels.layers") | tuned
    made["timing"] = {"us": f"median over replays of a CUDA graph of {args.layers} layers, per layer"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for shape in chosen:
            for method in (m for key, m in METHODS.items() if key in args.method):
                for batch, context in args.lengths:
                    sized = shape, sizes[shape.name], method, batch, context, args.layers
                    layers, least = Layers(*sized, device), None
                    for part, us in measure(layers, timer):
                        least = us if least is None else least
                        writer.writerow(
                            [shape.name, batch, context, method.key, part, f"{us:.1f}", f"{us - least:.1f}"]
                        )
                        print(f"{shape.name} {batch}x{context} {method.key} {part}: {us:.1f} us a layer", flush=True)
                    file.flush()
    record.write_json(args.out, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
