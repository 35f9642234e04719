"""What is measured: shapes, lengths, methods, and the row that a measurement becomes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class Shape:
    """The attention of one layer."""

    name: str
    q_heads: int
    kv_heads: int
    dim: int
    sinks: bool = False  # one for each query head

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads


SHAPES = (
    Shape("Qwen2.5-3B", 16, 2, 128),
    Shape("Llama-3.1-8B", 32, 8, 128),
    Shape("Qwen2.5-7B", 28, 4, 128),
    Shape("SmolLM2", 9, 3, 64),
    Shape("Qwen3.5-27B", 24, 4, 256),  # of its full-attention layers
    Shape("gpt-oss-20b", 64, 8, 64, sinks=True),  # of those without a window
)

#: batch x context of decode attention
LENGTHS = ((1, 4096), (1, 32768), (1, 131072), (1, 524288), (8, 32768), (32, 8192), (64, 4096))
QUICK_LENGTHS = ((1, 4096), (1, 131072), (32, 8192))
#: where an experiment or a variant is measured, with a shuffled index only
FEW_LENGTHS = ((1, 131072), (32, 8192))
#: new tokens of an encode: a decode step of 64 requests, and a prefill chunk
ENCODE_TOKENS = (64, 8192)

CONTIGUOUS, SHUFFLED = "contiguous", "shuffled"


@dataclass(frozen=True)
class Method:
    """One way to keep and read a cache.

    allocator: of packed rows; None for dense caches. granularity: what the allocator gives a width of its own.
    """

    name: str
    k_bits: float
    v_bits: float
    allocator: str | None = None
    granularity: str = "segment"

    @property
    def key(self) -> str:
        """The name that ``--only`` matches; packed methods differ by their bits."""
        return f"{self.name}-k{self.k_bits:g}v{self.v_bits:g}" if self.allocator else self.name


#: Dense ones first: a row's ratio needs them, and a run that is cut short should have the main comparison.
DENSE = (
    Method("fa3-bf16", 16, 16),
    Method("flashinfer-bf16", 16, 16),
    Method("fa3-fp8", 8, 8),
    Method("flashinfer-fp8", 8, 8),
)
PACKED = (
    Method("template", 3, 3, "template"),
    Method("template", 2, 2, "template"),
    Method("uniform", 3, 3, "uniform"),
    Method("template", 4, 4, "template"),
    Method("paper", 3, 3, "paper", granularity="block"),
    Method("product", 3, 3, "product", granularity="block"),
    Method("paper-segment", 3, 3, "paper"),
    Method("product-segment", 3, 3, "product"),
)
CACHE_WRITE = Method("bf16", 16, 16)
COPY = Method("copy", 16, 16)
COPY_KERNEL, ENCODE_KERNEL, DECODE_KERNEL = "copy", "encode", "decode"
MULTI_QUERY = {"decode_q2": 2, "decode_q4": 4, "decode_q8": 8}

FIELDS = (
    *("shape", "batch", "context", "kernel", "method", "k_bits", "v_bits"),
    *("us", "bytes", "gbps", "ratio_to_best_bf16"),
    *("index", "page", "timed", "rel_error", "note"),
)


@dataclass
class Row:
    """One line of the CSV. ``us`` is None where nothing was timed; ``note`` then says why.

    batch, context: requests and cached tokens of each; for encode, tokens written and 0.
    us: median time of one call. bytes: what the kernel has to read (and write, for copy and encode), from the
    sizes of the format with its padding, index and query not counted. gbps: bytes / us / 1000.
    ratio_to_best_bf16: time of the fastest bf16 method of the same case / us, so more than 1 is faster.
    index: contiguous, or shuffled (pages of 16 tokens). page: page size the method was given; 1 is a slot per
    token. timed: graph or eager. rel_error: against float32 attention on a small case, before timing.
    """

    shape: str
    batch: int
    context: int
    kernel: str
    method: str
    k_bits: float
    v_bits: float
    us: float | None = None
    bytes: int | None = None
    ratio_to_best_bf16: float | None = None
    index: str = ""
    page: int | None = None
    timed: str = ""
    rel_error: float | None = None
    note: str = ""

    @property
    def gbps(self) -> float | None:
        return self.bytes / self.us / 1e3 if self.us and self.bytes else None

    @property
    def case(self) -> tuple:
        return self.shape, self.batch, self.context, self.kernel, self.index

    def fields(self) -> dict:
        values = {**asdict(self), "gbps": self.gbps}
        return {name: "" if values[name] is None else values[name] for name in FIELDS}


def fill_ratios(rows: Iterable[Row]) -> None:
    """Relate every timed row to the fastest bf16 row of its case; in place."""
    rows = list(rows)
    best: dict[tuple, float] = {}
    for row in rows:
        if row.k_bits == 16 and row.us:
            best[row.case] = min(best.get(row.case, row.us), row.us)
    for row in rows:
        row.ratio_to_best_bf16 = best[row.case] / row.us if row.us and row.case in best else None


@dataclass(frozen=True)
class Case:
    """One measurement to make. ``batch`` of an encode counts its tokens."""

    shape: Shape
    kernel: str
    method: Method
    batch: int
    context: int
    index: str

    @property
    def key(self) -> str:
        return f"{self.shape.name}/{self.kernel}/{self.method.key}"

    @property
    def queries(self) -> int:
        """Query tokens of each request."""
        return MULTI_QUERY.get(self.kernel, 1)

    def row(self, **kw) -> Row:
        m = self.method
        row = Row(self.shape.name, self.batch, self.context, self.kernel, m.name, m.k_bits, m.v_bits, index=self.index)
        for name, value in kw.items():
            setattr(row, name, value)
        return row


def _of_shape(shape: Shape, quick: bool) -> Iterator[Case]:
    lengths = QUICK_LENGTHS if quick else LENGTHS
    orders = (SHUFFLED,) if quick else (SHUFFLED, CONTIGUOUS)
    for method in DENSE:
        for index in orders:
            yield from (Case(shape, DECODE_KERNEL, method, b, n, index) for b, n in lengths)
    few = [(b, n) for b, n in FEW_LENGTHS if (b, n) in lengths]
    # FA3 alone: FlashInfer's decode wrapper takes one query token per request.
    for kernel in MULTI_QUERY:
        yield from (Case(shape, kernel, DENSE[0], b, n, SHUFFLED) for b, n in few)
    yield from (Case(shape, ENCODE_KERNEL, CACHE_WRITE, n, 0, SHUFFLED) for n in ENCODE_TOKENS)
    for i, method in enumerate(PACKED):
        yield from (Case(shape, ENCODE_KERNEL, method, n, 0, SHUFFLED) for n in ENCODE_TOKENS)
        for index in orders:
            yield from (Case(shape, DECODE_KERNEL, method, b, n, index) for b, n in lengths)
        if i == 0:
            for kernel in MULTI_QUERY:
                yield from (Case(shape, kernel, method, b, n, SHUFFLED) for b, n in few)


def cases(only: list[str] | None = None, lengths: list[tuple[int, int]] | None = None, quick: bool = False) -> list:
    """Every case in the order of measuring: shape, then method.

    only: glob patterns over ``SHAPE/KERNEL/METHOD``, case ignored, any of which a case must match.
    lengths: keep these (batch, context) of decode; encode is kept. Raises ValueError if nothing is left.
    """
    every = [case for shape in SHAPES for case in _of_shape(shape, quick)]
    kept = [
        case
        for case in every
        if (not only or any(fnmatch(case.key.lower(), pattern.lower()) for pattern in only))
        and (not lengths or not case.context or (case.batch, case.context) in lengths)
    ]
    if not kept:
        keys = ", ".join(dict.fromkeys(case.key for case in every if case.shape is SHAPES[0]))
        raise ValueError(f"--only {only}, --lengths {lengths}: no such case; there are {keys}, ...")
    return kept
