"""The one matrix of cases that every kernel runs through, and the data of a case."""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from sglang_blockgtq.calibrate.build import build_table, haar_rotation
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.any_layout.encode import AnyEncoder
from sglang_blockgtq.kernels.any_layout.tables import AnyTables
from sglang_blockgtq.kernels.device.tables import ColumnTables, Tables
from sglang_blockgtq.kernels.encode.encoder import Encoder
from sglang_blockgtq.kernels.format.codec import LayerCodec
from sglang_blockgtq.kernels.format.layout import CodeLayout, RowLayout, num_slots, scatter_rows, uniform_layout
from sglang_blockgtq.kernels.format.page_mean import PageMean

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Largest relative error of an attention output: float32 dots in the interpreter, float16 ones on a GPU.
TOLERANCE = {
    "cpu": {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3},
    "cuda": {"float32": 3e-3, "float16": 4e-3, "bfloat16": 8e-3},
}


@dataclass(frozen=True)
class Case:
    """allocator "handmade" is a codec with every width 0..8, three scales and another layout in each head. One that
    ends in "-segment" gives whole segments a width: heads of up to four kinds, and of four in "handmade-segment".

    order: how a request's tokens lie in the pool. lengths: packed tokens of each request.
    queries: query tokens of each request in an extend.
    """

    allocator: str
    k_bits: float
    v_bits: float
    head_dim: int
    heads: int
    group: int
    dtype: str = "float32"
    order: str = "shuffled"  # or "pages" of 16, or "sorted"
    lengths: tuple[int, ...] = (0, 1, 39, 4)
    queries: tuple[int, ...] = (2, 1, 3, 0)
    v_dim: int | None = None  # None: head_dim
    page: int = 0  # positions; 0: keys have no page means
    rotary: int | None = None  # channels with RoPE, interleaved; None: all, neox

    def __str__(self) -> str:
        bits = f"k{self.k_bits:g}v{self.v_bits:g}"
        dims = f"d{self.head_dim}" if self.v_dim is None else f"d{self.head_dim}v{self.v_dim}"
        page = f"-page{self.page}" if self.page else ""
        return f"{self.allocator}-{bits}-{dims}-h{self.heads}g{self.group}-{self.dtype}-{self.order}{page}"

    @property
    def rope(self) -> RopeBlocks:
        return RopeBlocks(self.head_dim, self.head_dim if self.rotary is None else self.rotary, self.rotary is None)


TEMPLATE = Case("template", 3, 3, 64, 2, 3)
PAGES = Case("template", 2.5, 2, 128, 1, 7, "float16", "pages")
WIDE = Case("template", 3, 3, 256, 1, 4, "float16")
OTHER_VALUES = Case("uniform", 8, 8, 64, 1, 8, v_dim=48)
CUT = Case("uniform", 3, 7, 128, 1, 1)  # codes in two and three pieces
#: Heads of three, two and four templates.
TEMPLATES = [
    Case("product-segment", 2.5, 3, 128, 3, 3, "float16"),
    Case("paper-segment", 3, 2, 64, 2, 6, "float32", "pages"),
    Case("handmade-segment", 3, 1, 64, 4, 1, lengths=(0, 1, 34), queries=(2, 1, 3)),
]
_PAGED = {"lengths": (0, 1, 139, 70), "page": 64}
MEANS = Case("template", 3, 3, 64, 2, 3, **_PAGED)
MEAN_CASES = [
    MEANS,
    Case("product-segment", 2.5, 3, 128, 3, 3, "float16", rotary=96, **_PAGED),
    Case("template", 3, 3, 256, 1, 4, "float16", "pages", **_PAGED),
    Case("template", 4, 3, 192, 1, 1, "bfloat16", lengths=(0, 1, 104), queries=(2, 1, 3), page=64),
]
IN_COLUMNS = [
    TEMPLATE,
    PAGES,
    Case("template", 4, 3, 192, 1, 1, "bfloat16"),
    WIDE,
    OTHER_VALUES,
    Case("uniform", 3, 2.25, 128, 1, 16, "float32", "pages"),  # a bin of 2 bits
    Case("uniform", 2.5, 4, 64, 1, 2, order="sorted"),
    CUT,
    *TEMPLATES,
    *MEAN_CASES,
]
PRODUCT = Case("product", 3, 2.5, 48, 2, 3)  # a scale for each width: six and seven
HANDMADE = Case("handmade", 0, 5, 64, 2, 1)
ANY_LAYOUT = [
    PRODUCT,
    HANDMADE,
    # Segments of 16 channels, but 15 bits in a column; an odd number of bytes, and padding.
    Case("template", 3, 2.7, 80, 1, 7, "bfloat16", "pages"),
    Case("paper", 2, 2, 160, 1, 4, "float16"),
]
SMALL = IN_COLUMNS + ANY_LAYOUT
#: Head sizes and groups that no case above has, for attention alone.
OTHER_HEADS = [
    Case("template", 3, 3, 32, 1, 5),
    Case("template", 4, 4, 96, 1, 12, "float16"),
    Case("uniform", 2, 2, 224, 1, 7, "bfloat16", "pages"),
]

_LONG = {"lengths": (0, 1, 31, 32, 33, 700, 5000), "queries": (5, 1, 40, 0, 1, 130, 17)}
LARGE = [
    Case("template", 3, 3, 128, 8, 4, "bfloat16", **_LONG),
    Case("template", 3, 3, 128, 2, 8, "bfloat16", "sorted", **_LONG),
    Case("template", 2, 2, 128, 4, 7, "bfloat16", "pages", **_LONG),
    Case("template", 4, 4, 64, 3, 3, "float16", **_LONG),
    Case("template", 3, 3, 256, 2, 8, "bfloat16", **_LONG),
    Case("uniform", 8, 8, 128, 2, 16, "bfloat16", **_LONG),
    Case("uniform", 3, 2.25, 128, 3, 1, "float16", "sorted", **_LONG),
    Case("product-segment", 3, 3, 128, 8, 4, "bfloat16", **_LONG),
    Case("template", 3, 3, 128, 8, 4, "bfloat16", page=512, **_LONG),
    Case("product-segment", 2, 2, 128, 2, 7, "bfloat16", "pages", page=64, rotary=64, **_LONG),
    Case("paper", 3, 3, 128, 2, 7, "float16", "pages", **_LONG),
]


def over(cases: list[Case]):
    """Parametrise a test over cases with readable ids; the large ones carry the ``gpu`` mark."""
    params = [pytest.param(c, id=str(c), marks=[pytest.mark.gpu] if c in LARGE else []) for c in cases]
    return pytest.mark.parametrize("case", params)


EVERY = SMALL + LARGE


@dataclass(frozen=True)
class Data:
    """Tensors of a case. k, v belong to slots ``kv_indices``; ``packed`` are their rows by the reference."""

    codec: LayerCodec
    tables: Tables
    q: torch.Tensor  # [sum(queries), Hq, D]
    k: torch.Tensor  # [sum(lengths), H, D]
    v: torch.Tensor
    packed: torch.Tensor  # [sum(lengths), row_bytes]
    rows: torch.Tensor  # [slots, row_bytes], 0xFF where no token lies
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    positions: torch.Tensor  # [sum(lengths)], each token's in its request
    qo_indptr: torch.Tensor
    sm_scale: float


def moments(heads: int, head_dim: int, layers: int = 1, seed: int = 0) -> Moments:
    """Uneven block energies as real heads have them: log-normal, with a few strong blocks."""
    generator = torch.Generator().manual_seed(seed)
    shape = layers, heads, head_dim // 2

    def draw() -> torch.Tensor:
        energy = torch.exp(1.2 * torch.randn(shape, generator=generator, dtype=torch.float64))
        energy[..., -3:] *= 20
        return energy

    v = head_dim * torch.exp(0.5 * torch.randn(layers, heads, generator=generator, dtype=torch.float64))
    return Moments(draw(), draw(), v, tokens=4096)


def make_codec(case: Case) -> LayerCodec:
    if case.allocator.startswith("handmade"):
        make = _segments if case.allocator.endswith("-segment") else _handmade
        return _codec(make(case.head_dim, case.heads), uniform_layout(case.head_dim, case.v_bits))
    allocator, _, granularity = case.allocator.partition("-")
    table = build_table(
        moments(case.heads, case.head_dim),
        [case.rope],
        k_bits=case.k_bits,
        v_bits=case.v_bits,
        allocator=allocator,
        granularity=granularity or ("block" if allocator in ("paper", "product") else "segment"),
        v_head_dim=case.v_dim,
    )
    codec = table.layer_codec(0)
    return replace(codec, mean=page_mean(case)) if case.page else codec


def page_mean(case: Case) -> PageMean:
    """Of slow blocks, several times as large as the rest of a key."""
    generator, energy, blocks = torch.Generator().manual_seed(3), moments(case.heads, case.head_dim), case.head_dim // 2
    turned = case.rope.rotary_dim // 2
    theta = torch.zeros(blocks, dtype=torch.float64)
    theta[:turned] = 1e5 ** -(torch.arange(turned, dtype=torch.float64) / turned)
    mean = torch.randn(case.heads, blocks, 2, generator=generator) * 3 * energy.k[0].sqrt()[..., None].float()
    mean[:, theta * case.page > 1] = 0
    return PageMean(case.page, mean, theta, case.rope.channels())


def _handmade(dim: int, heads: int) -> tuple[CodeLayout, ...]:
    layouts = []
    for h in range(heads):
        # All nine widths in every head, more of one or the other; head 1 leaves the last scale unused.
        widths = list(range(9)) + [(2, 3)[h % 2]] * (dim // 2 - 10) + [7]
        channels = tuple(w for w in sorted(widths, reverse=True) for _ in range(2))
        norms = tuple(min(c * 3 // dim, 2 - h % 2) for c in range(dim))
        layouts.append(CodeLayout(channels, norms))
    return tuple(layouts)


def _segments(dim: int, heads: int) -> tuple[CodeLayout, ...]:
    """Four kinds of heads of four segments, 3 bits each on average."""
    kinds = [(6, 4, 1, 1), (5, 3, 2, 2), (4, 4, 2, 2), (3, 3, 3, 3)]
    return tuple(CodeLayout(tuple(w for w in kinds[(h + 2) % 4] for _ in range(dim // 4))) for h in range(heads))


def _codec(k: tuple[CodeLayout, ...], v: CodeLayout) -> LayerCodec:
    heads, dim = len(k), v.dim
    rotations = torch.stack([haar_rotation(dim, seed=h) for h in range(heads)]).float()
    weight = torch.linspace(3.0, 0.2, dim).repeat(heads, 1)
    return LayerCodec(RowLayout.of(k, v), rotations, rotations, rotations, rotations.mT.contiguous(), weight)


def encoder_of(tables: Tables, rows: torch.Tensor) -> Encoder | AnyEncoder:
    return (Encoder if isinstance(tables, ColumnTables) else AnyEncoder)(tables, rows)


def far_rows(row_bytes: int) -> torch.Tensor:
    """Rows ``[slots, row_bytes]`` of more than 8 GiB on the CPU: their 16-bit words do not fit 32 bits. Only pages that
    are touched take memory."""
    slots = num_slots((9 << 30) // row_bytes)
    with tempfile.TemporaryFile() as file:
        file.truncate(slots * row_bytes)
        memory = mmap.mmap(file.fileno(), slots * row_bytes)
    return torch.frombuffer(memory, dtype=torch.uint8).view(slots, row_bytes)


def make_tables(codec: LayerCodec) -> Tables:
    kind = ColumnTables if codec.layout.in_columns else AnyTables
    return kind.of(codec, DEVICE)


@cache
def data(case: Case) -> Data:
    generator = torch.Generator().manual_seed(1)
    codec = make_codec(case)
    dtype, tokens = getattr(torch, case.dtype), sum(case.lengths)
    energy = moments(case.heads, case.head_dim)
    pairs = case.rope.channels().flatten()

    spread = torch.zeros(2, case.heads, case.head_dim)  # of q, k
    spread[..., pairs] = torch.cat([energy.q, energy.k]).div(2).sqrt().float().repeat_interleave(2, -1)
    v_spread = (energy.v[0] / case.head_dim).sqrt().float()[:, None]

    def draw(count: int, size: int, spread: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(count, len(spread), size, generator=generator)
        return (noise * spread).to(DEVICE, dtype)

    q = draw(sum(case.queries), case.head_dim, spread[0].repeat_interleave(case.group, 0))
    k = draw(tokens, case.head_dim, spread[1])
    v = draw(tokens, case.v_dim or case.head_dim, v_spread)
    codec = codec.to(DEVICE)
    positions = torch.cat([torch.arange(n) for n in case.lengths]).to(DEVICE)
    if codec.mean:  # some keys are like the mean and some are not
        like = (torch.rand(k.shape[:2], generator=generator) < 0.7).to(DEVICE)[..., None]
        k = (k.float() + torch.where(like, codec.mean.at(positions), 0.0)).to(dtype)
    packed = reference.encode(codec, k, v, positions)

    pages = (tokens + 15) // 16 + 2
    if case.order == "sorted":
        slots = torch.arange(tokens)
    elif case.order == "pages":
        slots = (torch.randperm(pages, generator=generator)[:, None] * 16 + torch.arange(16)).flatten()[:tokens]
    else:
        slots = torch.randperm(pages * 16, generator=generator)[:tokens]
    slots = slots.to(DEVICE)
    rows = torch.full((pages * 16, codec.layout.row_bytes), 255, dtype=torch.uint8, device=DEVICE)
    scatter_rows(codec.layout, rows, slots, packed)

    def indptr(lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)

    # SGLang hands over int32 or int64 indices, depending on the backend.
    indices = slots.to(torch.int32 if case.order == "pages" else torch.int64)
    return Data(
        codec,
        make_tables(codec),
        q,
        k,
        v,
        packed,
        rows,
        indptr(case.lengths),
        indices,
        positions.to(indices.dtype),
        indptr(case.queries),
        # Keeps softmax from being one-hot on these wide-spread synthetic heads.
        1.5 / float((q.float().square().mean() * k.float().square().mean() * case.head_dim).sqrt()),
    )


@cache
def decode_queries(case: Case, q_len: int = 1) -> torch.Tensor:
    """``q_len`` queries for each request, ``[B * q_len, Hq, D]``: mixtures of the case's own."""
    d = data(case)
    generator = torch.Generator().manual_seed(5)
    mixture = torch.randn(len(case.lengths) * q_len, len(d.q), generator=generator).to(DEVICE) / len(d.q) ** 0.5
    return torch.einsum("ab,bhd->ahd", mixture, d.q.float()).to(d.q.dtype)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """``|a - b| / |b|`` over everything, NaN if there is one."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_same(got, want, tolerance: float) -> None:
    """out and lse within ``tolerance`` in every query head, since a whole would hide an error in a weak one."""
    (out, lse), (want_out, want_lse) = got, want
    for head in range(out.shape[1]):
        assert relative_error(out[:, head], want_out[:, head]) < tolerance
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert bool((out[empty] == 0).all())
    torch.testing.assert_close(lse[~empty], want_lse[~empty], rtol=tolerance, atol=tolerance)
