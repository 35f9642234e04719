"""A method on a pool: its launches, the bytes they move, and their error on a small case.

A case has variants (page sizes, ways to write), of which the fastest counts.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.format.layout import gather_rows, num_slots

from . import ours, peers
from .cases import ENCODE_KERNEL, Case, Method
from .data import FP8, Index, MakeEncoder, Pool, make_codec, windows
from .reference import dense_attention, relative_error, small_lengths
from .timing import Launch

#: Largest relative error of a method that is timed. FlashAttention-3 rounds probabilities to fp8.
TOLERANCE, FP8_TOLERANCE = 1e-2, 8e-2
ENCODE_TOLERANCE = 2e-2  # codes on a threshold may fall to either side
WRITE_SLOTS = 1 << 18  # of the cache that encode writes to
_MOST_WINDOWS = 256


class WrongResult(Exception):
    """A kernel disagrees with its reference; it is not timed."""


#: what a variant is called: a page size, or a name
Variant = int | str


@lru_cache(maxsize=8)
def _index(batch: int, context: int, order: str, device: torch.device) -> Index:
    return Index.of((context,) * batch, order, device)


class Subject:
    """Base of the methods."""

    def __init__(self, method: Method, pool: Pool):
        self.method, self.pool = method, pool
        self._errors: dict[tuple, float] = {}

    def index(self, case: Case) -> Index:
        return _index(case.batch, case.context, case.index, self.pool.device)

    def num_bytes(self, case: Case) -> int:
        raise NotImplementedError

    def windows(self, case: Case) -> int:
        raise NotImplementedError

    def variants(self, case: Case) -> tuple[Variant, ...]:
        """Ways to do it, of which the fastest counts."""
        return ("",)

    def launch(self, case: Case, variant: Variant) -> Launch:
        raise NotImplementedError

    def check(self, case: Case, variant: Variant) -> float:
        """Relative error on a small case."""
        raise NotImplementedError

    def tolerance(self, case: Case) -> float:
        return TOLERANCE

    def error(self, case: Case, variant: Variant) -> float:
        """The relative error of a variant; WrongResult beyond the tolerance."""
        key = case.kernel, case.index, case.method, variant
        if key not in self._errors:
            self._errors[key] = self.check(case, variant)
        error, most = self._errors[key], self.tolerance(case)
        if not error <= most:  # NaN is wrong too
            raise WrongResult(f"not timed: relative error {error:.2g} is above {most:g}")
        return error

    def close(self) -> None:
        """Give back what lies on the device."""


class Attention(Subject):
    """Decode attention of any method, from :meth:`caller`."""

    def caller(self, case: Case, index: Index, page: int, q: torch.Tensor):
        """A function of the window (of ``index.slots`` slots) that attends and returns ``[B * queries, Hq, D]``."""
        raise NotImplementedError

    def reference(self, case: Case, index: Index, q: torch.Tensor) -> torch.Tensor:
        """Float32 result on the first window."""
        raise NotImplementedError

    def variants(self, case: Case) -> tuple[Variant, ...]:
        return self.index(case).page_sizes()

    def windows(self, case: Case) -> int:
        slots = self.index(case).slots
        if slots > self.pool.tokens:
            raise ValueError(f"{slots} slots are needed, the pool has {self.pool.tokens}")
        return min(self.pool.tokens // slots, _MOST_WINDOWS)

    def launch(self, case: Case, variant: Variant) -> Launch:
        q = self.pool.queries(case.batch * case.queries)
        return self.caller(case, self.index(case), int(variant), q)

    def check(self, case: Case, variant: Variant) -> float:
        index = Index.of(small_lengths(case.queries), case.index, self.pool.device)
        q = self.pool.queries(index.batch * case.queries)
        return relative_error(self.caller(case, index, int(variant), q)(0), self.reference(case, index, q))


class Dense(Attention):
    """A bf16 or fp8 cache read by FlashInfer or FlashAttention-3."""

    def __init__(self, method: Method, pool: Pool):
        super().__init__(method, pool)
        engine, kind = method.name.split("-")
        self.engine, self.dtype = peers.PEERS[engine], FP8 if kind == "fp8" else torch.bfloat16

    def tolerance(self, case: Case) -> float:
        return FP8_TOLERANCE if self.method.name == "fa3-fp8" else TOLERANCE

    @property
    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pool.fp8 if self.dtype == FP8 else (self.pool.k, self.pool.v)

    def num_bytes(self, case: Case) -> int:
        return case.batch * case.context * 2 * case.shape.kv_heads * case.shape.dim * self.dtype.itemsize

    def caller(self, case: Case, index: Index, page: int, q: torch.Tensor):
        call = self.engine(case.shape, index, page, self.dtype, self.pool.sm_scale, case.queries, self.pool.terms.sinks)
        out = torch.empty_like(q)  # bf16 whatever the query is cast to
        q = call.query(q)
        k, v = (windows(x, index.slots) for x in self.cache)
        return lambda i: call(q, k[i], v[i], out)

    def reference(self, case: Case, index: Index, q: torch.Tensor) -> torch.Tensor:
        if self.method.name == "fa3-fp8":
            q = q.to(FP8)  # what it is given
        k, v = (windows(x, index.slots)[0] for x in self.cache)
        return dense_attention(q, k, v, index, self.pool.sm_scale, case.queries, self.pool.terms.sinks)


class Packed(Attention):
    """Rows of this project, encoded by its kernel from the pool's own tokens; decode and encode."""

    def __init__(self, method: Method, pool: Pool, encoder: MakeEncoder = ours.encoder):
        super().__init__(method, pool)
        codec = make_codec(pool.shape, method)
        self.encoder = encoder
        self.codec = codec.to(pool.device)
        self.tables = ours.tables_of(codec, pool.device)

    @cached_property
    def rows(self) -> torch.Tensor:
        return self.pool.packed(self.tables, self.encoder)

    def close(self) -> None:
        self.__dict__.pop("rows", None)

    def num_bytes(self, case: Case) -> int:
        row_bytes = self.tables.row.row_bytes
        if case.kernel == ENCODE_KERNEL:
            return case.batch * (row_bytes + 4 * case.shape.kv_heads * case.shape.dim)
        return case.batch * case.context * row_bytes

    def variants(self, case: Case) -> tuple[Variant, ...]:
        return ("",) if case.kernel == ENCODE_KERNEL else (1,)

    def tolerance(self, case: Case) -> float:
        return ENCODE_TOLERANCE if case.kernel == ENCODE_KERNEL else TOLERANCE

    def caller(self, case: Case, index: Index, page: int, q: torch.Tensor):
        indptr, ids = index.flat(1, ours.INDEX_DTYPE)
        rows, scale = windows(self.rows, index.slots), self.pool.sm_scale
        step = ours.plan(self.tables, index.batch, case.shape.q_heads, case.queries) | {"terms": self.pool.terms}
        return lambda i: ours.attend(self.tables, q, rows[i], indptr, ids, scale, **step)

    def reference(self, case: Case, index: Index, q: torch.Tensor) -> torch.Tensor:
        indptr, slots = index.flat(1, torch.int64)
        rows = gather_rows(self.codec.layout, windows(self.rows, index.slots)[0], slots)
        sm_scale, terms = self.pool.sm_scale, self.pool.terms
        return reference.decode_attention(self.codec, q, rows, indptr, sm_scale, case.queries, terms)[0]

    def windows(self, case: Case) -> int:
        return write_windows(self.pool, case.batch) if case.kernel == ENCODE_KERNEL else super().windows(case)

    def launch(self, case: Case, variant: Variant) -> Launch:
        if case.kernel != ENCODE_KERNEL:
            return super().launch(case, variant)
        k, v, loc, slots = write_inputs(self.pool, case.batch)
        shape = WRITE_SLOTS // slots, slots, self.tables.row.row_bytes
        rows = torch.empty(shape, dtype=torch.uint8, device=self.pool.device)
        encoders = [self.encoder(self.tables, window) for window in rows]
        positions = torch.arange(len(loc), device=loc.device) * 7  # of a prefill, or of requests here and there
        return lambda i: encoders[i](k[i % len(k)], v[i % len(v)], loc, positions)

    def check(self, case: Case, variant: Variant) -> float:
        if case.kernel != ENCODE_KERNEL:
            return super().check(case, variant)
        k, v = self.pool.k[:333], self.pool.v[:333]
        loc = torch.randperm(512, generator=torch.Generator().manual_seed(3))[:333].to(self.pool.device)
        rows = torch.full((512, self.tables.row.row_bytes), 255, dtype=torch.uint8, device=self.pool.device)
        positions = torch.arange(len(k), device=k.device) * 7
        self.encoder(self.tables, rows)(k, v, loc, positions)
        wanted = reference.round_trip(self.codec, k, v, positions)
        found = reference.decode(self.codec, gather_rows(self.tables.row, rows, loc), positions)
        return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


def write_slots(tokens: int) -> int:
    """Slots among which the tokens of one write are scattered."""
    return num_slots(max(1024, 2 * tokens))


def write_windows(pool: Pool, tokens: int) -> int:
    return min(WRITE_SLOTS // write_slots(tokens), _MOST_WINDOWS)


def write_inputs(pool: Pool, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """New keys and values ``[windows, T, H, D]``, loc ``[T]`` int64, and the slots of a window."""
    slots = write_slots(tokens)
    if tokens <= 64:  # one token of each request
        loc = torch.randperm(slots, generator=torch.Generator().manual_seed(4))[:tokens].to(pool.device)
    else:
        loc = Index.of((slots,), "shuffled", pool.device).flat(1, torch.int64)[1][:tokens].contiguous()
    return windows(pool.k, tokens), windows(pool.v, tokens), loc, slots


class CacheWrite(Subject):
    """Writing new keys and values to a bf16 cache, the work that encoding replaces."""

    def variants(self, case: Case) -> tuple[Variant, ...]:
        return tuple(peers.cache_writes())

    def tolerance(self, case: Case) -> float:
        return 0.0

    def num_bytes(self, case: Case) -> int:
        return case.batch * 8 * case.shape.kv_heads * case.shape.dim

    def windows(self, case: Case) -> int:
        return write_windows(self.pool, case.batch)

    def _launch(self, tokens: int, variant: Variant, caches: list[torch.Tensor]) -> Launch:
        write = peers.cache_writes()[str(variant)]
        k, v, loc, slots = write_inputs(self.pool, tokens)
        to_k, to_v = (windows(c, slots) for c in caches)
        return lambda i: write(k[i % len(k)], v[i % len(v)], to_k[i], to_v[i], loc)

    def launch(self, case: Case, variant: Variant) -> Launch:
        size = WRITE_SLOTS, case.shape.kv_heads, case.shape.dim
        caches = [torch.empty(size, dtype=torch.bfloat16, device=self.pool.device) for _ in range(2)]
        return self._launch(case.batch, variant, caches)

    def check(self, case: Case, variant: Variant) -> float:
        tokens = 64
        k, v, loc, slots = write_inputs(self.pool, tokens)
        caches = [torch.zeros(slots, *k.shape[2:], dtype=k.dtype, device=k.device) for _ in range(2)]
        self._launch(tokens, variant, caches)(0)
        error = 0.0
        for cache, x in zip(caches, (k[0], v[0]), strict=True):
            wanted = torch.zeros_like(cache)
            wanted[loc] = x
            error = max(error, relative_error(cache, wanted))
        return error


def make_subject(method: Method, pool: Pool) -> Subject:
    """The subject of a method."""
    if method.allocator:
        return Packed(method, pool)
    return CacheWrite(method, pool) if method.name == "bf16" else Dense(method, pool)
