"""Random tokens with the uneven energies of real heads, in dense and packed pools, and the indices to read them.

A pool holds many times the tokens of a small case. Disjoint windows of it are what different layers
of a model are: other data behind the same index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.kernels.device.tables import Tables
from sglang_blockgtq.kernels.format.codec import LayerCodec
from sglang_blockgtq.kernels.format.layout import num_slots
from sglang_blockgtq.kernels.terms import PLAIN, Terms

from .cases import CONTIGUOUS, Method, Shape

PAGE = 16  # tokens; what a shuffled index keeps together
LARGE_PAGE = 128  # a contiguous index allows it
SLICE = 16384  # tokens made or encoded at once
FP8 = torch.float8_e4m3fn
THETA = 1e6  # of RoPE

#: (k, v, loc, positions): into the rows it was made for
Encode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
MakeEncoder = Callable[[Tables, torch.Tensor], Encode]  # (tables, rows), as ours.encoder


def moments(shape: Shape) -> Moments:
    """Uneven block energies as real heads have them: log-normal, with a few strong blocks."""
    generator = torch.Generator().manual_seed(shape.dim + shape.kv_heads)
    size = 1, shape.kv_heads, shape.dim // 2

    def draw() -> torch.Tensor:
        energy = torch.exp(1.2 * torch.randn(size, generator=generator, dtype=torch.float64))
        energy[..., -3:] *= 20
        return energy

    q, k = draw(), draw()
    v = shape.dim * torch.exp(0.5 * torch.randn(size[:2], generator=generator, dtype=torch.float64))
    # Keys with a mean in every block, of which slow ones keep theirs.
    theta = THETA ** (-2 * torch.arange(shape.dim // 2, dtype=torch.float64) / shape.dim)
    mean = torch.randn(*size, 2, generator=generator, dtype=torch.float64) * (k / 4).sqrt()[..., None]
    return Moments(q, k, v, tokens=4096, theta=theta[None], mean=mean)


def make_codec(shape: Shape, method: Method) -> LayerCodec:
    rope = [RopeBlocks(shape.dim, shape.dim)]
    table = build_table(
        moments(shape),
        rope,
        k_bits=method.k_bits,
        v_bits=method.v_bits,
        allocator=str(method.allocator),
        granularity=method.granularity,
    )
    return table.layer_codec(0)


class Pool:
    """Keys and values ``[tokens, H, D]`` bfloat16 of one shape, and their fp8 copies. Never zeros."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device | str, seed: int = 1):
        self.shape, self.tokens, self.device = shape, tokens, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        energy = moments(shape)
        pairs = RopeBlocks(shape.dim, shape.dim).channels().flatten()
        spread = torch.zeros(2, shape.kv_heads, shape.dim)  # of q, k
        spread[..., pairs] = torch.cat([energy.q, energy.k]).div(2).sqrt().float().repeat_interleave(2, -1)
        self._q_spread, k_spread = spread.to(self.device)
        v_spread = (energy.v[0] / shape.dim).sqrt().float()[:, None].to(self.device)
        self.k = self._filled(k_spread)
        self.v = self._filled(v_spread.expand_as(k_spread))
        self.terms = PLAIN
        if shape.sinks:
            self.terms = Terms(
                sinks=torch.randn(shape.q_heads, generator=self.generator, device=self.device).bfloat16()
            )
        # Keeps softmax from being one-hot on these wide-spread heads.
        self.sm_scale = 1.5 / float((self._q_spread.square() * k_spread.square()).sum(-1).mean().sqrt())

    def _draw(self, count: int, spread: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(count, *spread.shape, generator=self.generator, device=self.device)
        return (noise * spread).to(torch.bfloat16)

    def _filled(self, spread: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self.tokens, *spread.shape, dtype=torch.bfloat16, device=self.device)
        for a in range(0, self.tokens, SLICE):
            out[a : a + SLICE] = self._draw(min(SLICE, self.tokens - a), spread)
        return out

    def queries(self, count: int) -> torch.Tensor:
        """``[count, Hq, D]`` bfloat16."""
        return self._draw(count, self._q_spread.repeat_interleave(self.shape.group, 0))

    @cached_property
    def fp8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as float8_e4m3fn, without scales: their range fits."""
        out = []
        for x in (self.k, self.v):
            y = torch.empty(x.shape, dtype=FP8, device=self.device)
            for a in range(0, self.tokens, SLICE):
                y[a : a + SLICE] = x[a : a + SLICE].clamp(-448, 448).to(FP8)
            out.append(y)
        return out[0], out[1]

    def drop_fp8(self) -> None:
        self.__dict__.pop("fp8", None)

    def packed(self, tables: Tables, encoder: MakeEncoder) -> torch.Tensor:
        """The pool's tokens in order, encoded in slices: ``[slots, row_bytes]``, in whole blocks of slots."""
        rows = torch.zeros(num_slots(self.tokens), tables.row.row_bytes, dtype=torch.uint8, device=self.device)
        encode = encoder(tables, rows)
        for a in range(0, self.tokens, SLICE):
            b = min(a + SLICE, self.tokens)
            # A row's own position, whichever request reads it: what a reader does depends on the flags alone.
            slots = torch.arange(a, b, device=self.device)
            encode(self.k[a:b], self.v[a:b], slots, slots)
        return rows


@dataclass(frozen=True)
class Index:
    """Where the tokens of a batch lie within a window of ``slots`` slots.

    Every request starts on a page of ``granule`` tokens and has whole pages; which pages, ``order`` says. A window
    is thus whole blocks of interleaved rows.
    pages ``[B][n]``: page numbers of each request, in units of ``granule``.
    """

    lengths: tuple[int, ...]
    granule: int
    pages: tuple[torch.Tensor, ...]
    device: torch.device

    @classmethod
    def of(cls, lengths: tuple[int, ...], order: str, device: torch.device | str, seed: int = 2) -> Index:
        granule = LARGE_PAGE if order == CONTIGUOUS else PAGE
        counts = [-(-n // granule) for n in lengths]
        total = sum(counts)
        ids = torch.arange(total)
        if order != CONTIGUOUS:
            ids = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        return cls(lengths, granule, ids.split(counts), torch.device(device))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def slots(self) -> int:
        return sum(len(p) for p in self.pages) * self.granule

    def page_sizes(self) -> tuple[int, ...]:
        return (PAGE, 1) if self.granule == PAGE else (LARGE_PAGE, PAGE, 1)

    def _ids(self, page: int) -> list[torch.Tensor]:
        """Page numbers of each request in units of ``page`` tokens, no more than its length needs."""
        per = self.granule // page
        fine = [(p[:, None] * per + torch.arange(per)).flatten() for p in self.pages]
        return [ids[: -(-n // page)] for ids, n in zip(fine, self.lengths, strict=True)]

    def flat(self, page: int, dtype: torch.dtype = torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
        """indptr ``[B + 1]`` int32 and page numbers of all requests."""
        ids = self._ids(page)
        indptr = torch.tensor([0, *(len(i) for i in ids)]).cumsum(0).to(self.device, torch.int32)
        return indptr, torch.cat(ids).to(self.device, dtype)

    def table(self, page: int) -> torch.Tensor:
        """Page table ``[B, most pages]`` int32, zero behind a request's last page."""
        rows = torch.nn.utils.rnn.pad_sequence(self._ids(page), batch_first=True)
        return rows.to(self.device, torch.int32).contiguous()

    def last_page_len(self, page: int) -> torch.Tensor:
        return torch.tensor([(n - 1) % page + 1 for n in self.lengths], dtype=torch.int32, device=self.device)

    def seqlens(self) -> torch.Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.device)


def windows(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    """``[windows, slots, ...]``: the pool cut into as many disjoint windows as there are."""
    count = tensor.shape[0] // slots
    return tensor[: count * slots].unflatten(0, (count, slots))
