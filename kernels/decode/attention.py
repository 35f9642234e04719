"""Decode attention over packed rows. Definition: :func:`..reference.decode_attention`.

Three launches: the query is rotated to the stored channels, and attends to the exact tokens (:mod:`.ahead`); split-KV
flash attention decodes tiles of codes in registers, by the CUDA kernel (:mod:`..cuda`) where it serves a layer and by
Triton elsewhere; the splits are merged and the output rotated back. No dequantized key or value is ever written to
memory, nothing synchronises with the host, and neither a grid nor an allocation depends on a sequence length, so decode
can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton

from ..any_layout import attention as any_layout
from ..any_layout.tables import AnyTables
from ..cuda import attention as cuda
from ..device.dependent import dependent
from ..device.gpu import multiprocessors
from ..device.rotate import rotate_queries
from ..device.tables import ColumnTables, Tables
from ..terms import PLAIN, Terms
from .ahead import ahead
from .kernel import decode_kernel
from .merge import merge_splits
from .recent import RecentRead
from .splits import num_splits, request_block
from .tree import MAX_Q_LEN

_LOG2E = 1.4426950408889634
_NEAR_WORDS = 1 << 31  # 16-bit words of a layer's pool that 32 bits count, the sign left out


@dataclass(frozen=True)
class Tuning:
    """Choices of the decode kernel, measured on an H100 (docs/kernels.md)."""

    block_n: int = 64  # tokens of a tile
    short_n: int = 32  # the same where a split has no more
    stages: int = 2  # of the asynchronous copies: a tile's words are asked for at the end of the one before
    warps_per_sm: int = 8  # programs that are wanted; a program is one warp, and all run at a time
    registers: int = 255  # of a thread, so that 8 programs fit a multiprocessor
    prefetch: int = 64  # tokens of a split that are asked for while the kernel ahead ends


TUNING = Tuning()
#: Where a head's keys may be of several templates: loops of which each has its place in the instruction cache.
TEMPLATES_TUNING = Tuning(block_n=32, warps_per_sm=16, registers=128, prefetch=32)
#: The same with page means, which take registers.
MEANS_TUNING = replace(TEMPLATES_TUNING, warps_per_sm=14, registers=144)
#: Where a tile has 16 query rows or more than 128 channels, for which no number of registers is too many.
WIDE_TUNING = Tuning(block_n=32, warps_per_sm=16, prefetch=32)


def _tuning(tables: ColumnTables, block_m: int) -> Tuning:
    if block_m > 8 or max(tables.k.padded, tables.v.padded) > 128:
        return WIDE_TUNING
    if len(tables.k_templates) == 1:
        return TUNING
    return TEMPLATES_TUNING if tables.means is None else MEANS_TUNING


def _check(tables: Tables, q: torch.Tensor) -> None:
    """ValueError unless q is ``[T, G * H, D]`` with contiguous channels."""
    if q.dim() != 3 or q.shape[2] != tables.k.dim or q.shape[1] % tables.heads:
        raise ValueError(
            f"q {tuple(q.shape)}: [tokens, a multiple of {tables.heads} heads, {tables.k.dim}] is needed for these rows"
        )
    if q.stride(2) != 1:
        raise ValueError(f"q with strides {q.stride()}: channels must be contiguous")


def _block_m(tables: Tables, rows: int) -> int:
    """Rows of a decode tile, for ``rows`` query rows per KV head."""
    if isinstance(tables, AnyTables):
        return any_layout.block_m(tables, rows)
    return 8 if rows <= 8 else 16


def target_splits(tables: Tables, num_heads: int, q_len: int = 1) -> int:
    """How many splits all requests of a batch are cut into together, for ``num_heads`` query heads.

    A constant of the device and the model, so that it can stand in a CUDA graph.
    """
    rows = num_heads // tables.heads * q_len
    if cuda.serves(tables, rows):
        per_sm, programs = cuda.programs(tables, rows)
        return max(1, multiprocessors(tables.device) * per_sm // (tables.heads * programs))
    block_m = _block_m(tables, rows)
    per_sm = any_layout.PROGRAMS_PER_SM
    if isinstance(tables, ColumnTables):
        per_sm = _tuning(tables, block_m).warps_per_sm
    return max(1, multiprocessors(tables.device) * per_sm // (tables.heads * triton.cdiv(rows, block_m)))


@dataclass(frozen=True)
class DecodeScratch:
    """Partial results of the splits, to be kept from call to call: nothing else is allocated in decode.

    out ``[S, q_len, Hq, Dv]``, float16 or float32, and lse ``[S, q_len, Hq]`` float32, for S splits. A partial output
    is a mean of values: float16 loses nothing that the codes have kept, and what is written and read again is half.
    """

    out: torch.Tensor
    lse: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.out.nbytes + self.lse.nbytes

    @classmethod
    def of(cls, tables: Tables, batch: int, num_heads: int, q_len: int = 1) -> DecodeScratch:
        """Room for a batch of up to ``batch`` requests of one layer; layers of one shape may share it."""
        return cls.for_splits(tables, num_splits(batch, target_splits(tables, num_heads, q_len)), num_heads, q_len)

    @classmethod
    def for_splits(cls, tables: Tables, splits: int, num_heads: int, q_len: int = 1) -> DecodeScratch:
        shape, device = (splits, q_len, num_heads), tables.device
        dtype = torch.float16 if device.type == "cuda" else torch.float32  # as the kernels' dots
        out = torch.empty(*shape, tables.v.dim, dtype=dtype, device=device)
        return cls(out, torch.empty(shape, dtype=torch.float32, device=device))


def decode_attention(
    tables: Tables,
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    q_len: int = 1,
    tree: torch.Tensor | None = None,
    terms: Terms = PLAIN,
    rotated: torch.Tensor | None = None,
    recent: RecentRead | None = None,
    target: int | None = None,
    scratch: DecodeScratch | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last ``q_len`` tokens of each request against its packed rows, their own among them.

    q ``[B * q_len, Hq, D]``, queries of a request one after another, each seeing the rows up to its own; q_len 1 to 32
    (more than one is what speculative decoding verifies). tree int32 ``[B * q_len]``: of the last q_len rows, those
    that each query sees, as bits (:mod:`.tree`); it sees all before them. rows ``[slots, row_bytes]`` uint8
    (:mod:`..format.layout`). kv_indptr ``[B + 1]`` and kv_indices (slots), int32 or int64.
    terms: a window, a cap, sinks; the LSE knows no sinks.
    rotated: q in stored channels as float32, where encode has made it already.
    recent: what each request's last tokens are read from instead, the queries' own among them, which kv_indices lacks;
    their own are kept there. Without a tree and a window. None: rows alone.
    target: splits wanted for all requests together, by default what fills the device (see :mod:`.splits`).
    scratch and ``out [B * q_len, Hq, Dv]`` may be given, for CUDA graphs.

    Returns out in q's dtype and the natural-log LSE ``[B * q_len, Hq]`` float32; zeros and -inf for a
    query that sees nothing. Raises ValueError on other shapes.
    """
    _check(tables, q)
    tables.check_rows(rows)
    requests, num_heads = kv_indptr.shape[0] - 1, q.shape[1]
    if not 1 <= q_len <= MAX_Q_LEN:
        raise ValueError(f"q_len {q_len}: 1 to {MAX_Q_LEN} queries per request are supported")
    if q.shape[0] != requests * q_len:
        raise ValueError(f"q {tuple(q.shape)}: {q_len} queries for each of {requests} requests are needed")
    if tree is not None and (tree.shape != q.shape[:1] or tree.dtype != torch.int32):
        raise ValueError(f"tree {tree.dtype} {tuple(tree.shape)}: int32 [{q.shape[0]}] is needed, of each query")
    if recent is not None:
        if tree is not None or terms.window:
            raise ValueError(f"recent: not with {'a tree' if terms.window == 0 else f'a window of {terms.window}'}")
        if rotated is not None:
            raise ValueError("rotated: not with recent, whose launch rotates the queries")
        recent.check(requests, q_len, tables.heads, tables.k.dim, tables.v.dim)
        tree = recent.all_bits if q_len > 1 else None  # every packed row lies before all queries
    if target is None:
        target = target_splits(tables, num_heads, q_len)
    splits = num_splits(requests, target)
    if scratch is None:
        scratch = DecodeScratch.for_splits(tables, splits, num_heads, q_len)
    needed = q_len, num_heads, tables.v.dim
    if scratch.out.shape[0] < splits or scratch.out.shape[1:] != needed or scratch.lse.shape != scratch.out.shape[:3]:
        raise ValueError(
            f"scratch for {tuple(scratch.out.shape)}: at least {splits} splits of {needed} are needed, "
            "and an lse without the last size"
        )
    if out is None:
        out = q.new_empty((*q.shape[:2], tables.v.dim))
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if not requests:
        return out, lse
    exact = None
    if recent is not None:
        rotated, exact = ahead(tables, q, q_len, recent, sm_scale, terms.cap)
    elif rotated is None:
        rotated = rotate_queries(tables.k, q, num_heads // tables.heads)
    attend: Callable[..., None] = _attend if isinstance(tables, ColumnTables) else any_layout.attend
    if cuda.serves(tables, num_heads // tables.heads * q_len):
        attend = cuda.attend
    where = q_len, target, splits, scratch.out, scratch.lse
    attend(tables, rotated, rows, kv_indptr, kv_indices, sm_scale, terms, tree, *where)
    # The tokens that all queries of a request see together.
    span = terms.window + q_len - 1 if terms.window else 0
    merge_splits(
        tables.v,
        scratch.out,
        scratch.lse,
        kv_indptr,
        q_len,
        target,
        out,
        lse,
        span,
        terms.sinks,
        exact,
    )
    return out, lse


def _attend(
    tables: ColumnTables,
    rotated: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    terms: Terms,
    tree: torch.Tensor | None,
    q_len: int,
    target: int,
    splits: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Partial results of all splits into out ``[splits, q_len, Hq, Dv]`` and lse ``[splits, q_len, Hq]``."""
    row, num_heads = tables.row, rotated.shape[1]
    group, requests = num_heads // tables.heads, kv_indptr.shape[0] - 1
    block_m = _block_m(tables, group * q_len)
    ks, v, tuning = tables.k_templates, tables.v_spec, _tuning(tables, block_m)
    decode_kernel[(tables.heads * triton.cdiv(group * q_len, block_m), splits)](
        rotated,
        rows.view(torch.int16),
        rows.view(torch.int32),
        kv_indptr,
        kv_indices,
        tables.column_shifts,
        tables.k_kinds if len(ks) > 1 else None,
        tables.k_order if len(ks) > 1 else None,
        tables.means and tables.means.stored,
        tree,
        out,
        lse,
        requests,
        target,
        multiprocessors(tables.device),
        sm_scale * _LOG2E,
        rotated.stride(0),
        rotated.stride(1),
        ROW_BYTES=row.row_bytes,
        K_STRIDE=row.k_code_bytes,
        V_STRIDE=row.v_code_bytes,
        V_OFFSET=row.v_offset,
        NORM_OFFSET=row.norm_offset,
        HEADS=tables.heads,
        GROUP=group,
        QUERIES=q_len,
        DIM=tables.k.dim,
        V_DIM=tables.v.dim,
        PAGE=tables.means.page if tables.means else 0,
        PADDED=tables.k.padded,
        WINDOW=terms.window,
        CAP=terms.cap,
        K_BINS=tuple(k.bins for k in ks),
        V_BINS=v.bins,
        K_REPEAT=tuple(k.repeat for k in ks),
        V_REPEAT=v.repeat,
        K_SEGMENTS=tuple(k.segments for k in ks),
        V_SEGMENTS=v.segments,
        K_POLY=tuple(k.poly for k in ks),
        V_POLY=v.value_poly,
        K_SLOPE=tuple(k.slope for k in ks),
        V_SLOPE=v.slope,
        REQUESTS=request_block(requests),
        BLOCK_M=block_m,
        TILES=tuple(sorted({min(tuning.short_n, tuning.block_n), tuning.block_n})),
        STAGES=tuning.stages,
        PREFETCH=tuning.prefetch,
        NEAR=rows.numel() // 2 < _NEAR_WORDS,
        ASM=rotated.is_cuda,
        DEPENDENT=dependent(tables.device),
        launch_pdl=dependent(tables.device),
        num_warps=1,
        num_stages=tuning.stages,
        maxnreg=tuning.registers,
    )
