"""Attention over packed rows in Triton: decode, and the packed prefix of an extend.

The definition is in :mod:`.naive`. Three launches: the query is turned to the stored channels; split-KV
flash attention decodes tiles of codes in registers; the splits are merged and the output turned back.
No dequantized key or value is ever written to memory, nothing synchronises with the host, and neither a
grid nor an allocation depends on a sequence length, so decode can be captured in a CUDA graph.

Rows in columns (``uniform``, ``template``, the others by slots) are read by the kernel in :mod:`.decode`; any
other, and a prefix, by the one in :mod:`.flash`, which takes every layout as data and is far slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

from .decode import decode_kernel
from .dependent import dependent
from .flash import attention_kernel
from .merge_splits import CHUNK, merge_chunk_kernel, merge_group_kernel, merge_row_kernel, merge_tile_kernel
from .naive import merge_states
from .splits import SPLIT_UNIT, num_splits, request_block
from .tables import DeviceTables
from .turn import merge_and_turn, turn

__all__ = ["DecodeScratch", "decode_attention", "merge_states", "prefix_attention", "target_splits"]

MAX_PREFIX_SPLITS = 8
MAX_Q_LEN = 8
_QUERY_BYTES = 1 << 16  # of shared memory
_LOG2E = 1.4426950408889634
_GROUPS_AT_ONCE = 128  # tokens times KV heads up to which one launch merges and turns
_GROUP_PARTS = 256  # rows of splits that such a launch takes at a time: what 8 warps hold in registers
_NEAR_WORDS = 1 << 31  # 16-bit words of a layer's pool that 32 bits count, the sign left out
_ROWS_ALONE = 128  # output rows up to which each gets a merging program of its own


@dataclass(frozen=True)
class Tuning:
    """Choices of the decode kernel, measured on an H100 (docs/kernels.md)."""

    block_n: int = 64  # tokens of a tile
    short_n: int = 32  # the same where a split has no more
    stages: int = 2  # of the asynchronous copies: a tile's words are asked for at the end of the one before
    warps_per_sm: int = 8  # programs that are wanted; a program is one warp, and all run at a time
    generic_per_sm: int = 4  # the same of the generic kernel, whose programs have 4 or 8 warps
    registers: int = 255  # of a thread, so that 8 programs fit a multiprocessor
    prefetch: int = 64  # tokens of a split that are asked for while the kernel ahead ends


TUNING = Tuning()
#: Where a head's keys may be of several templates: loops of which each has its place in the instruction cache.
TEMPLATES_TUNING = Tuning(block_n=32, warps_per_sm=16, registers=128, prefetch=32)
#: Where a tile has 16 query rows or more than 128 channels, for which no number of registers is too many.
WIDE_TUNING = Tuning(block_n=32, warps_per_sm=16, prefetch=32)


def _tuning(tables: DeviceTables, block_m: int) -> Tuning:
    if block_m > 8 or max(tables.k.padded, tables.v.padded) > 128:
        return WIDE_TUNING
    return TUNING if len(tables.k_templates) == 1 else TEMPLATES_TUNING


@cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter has one; a few splits make its tests worth something.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _check(tables: DeviceTables, q: torch.Tensor) -> int:
    """Query heads per KV head. ValueError unless q is ``[T, G * H, D]`` with contiguous channels."""
    if q.dim() != 3 or q.shape[2] != tables.k.dim or q.shape[1] % tables.heads:
        raise ValueError(
            f"q {tuple(q.shape)}: [tokens, a multiple of {tables.heads} heads, {tables.k.dim}] is needed for these rows"
        )
    if q.stride(2) != 1:
        raise ValueError(f"q with strides {q.stride()}: channels must be contiguous")
    return q.shape[1] // tables.heads


def _attend(
    tables: DeviceTables,
    turned: torch.Tensor,
    rows: torch.Tensor,
    qo_indptr: torch.Tensor | None,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    max_splits: int,
    q_len: int,
    block_m: int,
    grid: tuple[int, int, int],
    partial_out: torch.Tensor,
    out_strides: tuple[int, int, int],
    partial_lse: torch.Tensor,
    lse_strides: tuple[int, int, int],
) -> None:
    """The generic kernel. Strides of the partial results: token, query head, split."""
    k, v, row = tables.k, tables.v, tables.row
    group = turned.shape[1] // tables.heads
    scales = tables.check_rows(rows)
    requests = kv_indptr.shape[0] - 1
    wide = max(k.padded, v.padded) > 128 or block_m > 64
    attention_kernel[grid](
        turned,
        rows,
        scales,
        tables.half_levels if turned.is_cuda else tables.levels,
        k.fields,
        k.book,
        k.norm_index,
        v.fields,
        v.book,
        qo_indptr,
        kv_indptr,
        kv_indices,
        requests,
        max_splits,
        partial_out,
        partial_lse,
        sm_scale,
        row.row_bytes,
        row.norm_offset,
        row.norms,
        tables.places,
        turned.stride(0),
        turned.stride(1),
        *out_strides,
        *lse_strides,
        GROUP=group,
        DIM=k.dim,
        PADDED=k.padded,
        V_DIM=v.dim,
        V_PADDED=v.padded,
        K_MASKS=k.masks,
        V_MASKS=v.masks,
        K_NORMS=k.norms,
        QUERIES=q_len,
        REQUESTS=request_block(requests),
        SPLIT_UNIT=SPLIT_UNIT,
        BLOCK_M=block_m,
        BLOCK_N=32,
        num_warps=8 if wide else 4,
        num_stages=2,
    )


def _block_m(tables: DeviceTables) -> int:
    """Most rows of a query tile. It is kept in shared memory once for each scale of a key."""
    k = tables.k
    fits = _QUERY_BYTES // (2 * k.norms * k.padded)
    most = 128 if max(k.padded, tables.v.padded) <= 128 else 64
    return max(16, min(most, 1 << (fits.bit_length() - 1)))


def _decode_rows(tables: DeviceTables, rows: int) -> tuple[int, int]:
    """(rows of a decode tile, tiles) for ``rows`` query rows per KV head."""
    if tables.v_columns is not None:
        block = 8 if rows <= 8 else 16
    else:
        block = min(_block_m(tables), max(16, triton.next_power_of_2(rows)))
    return block, triton.cdiv(rows, block)


def target_splits(tables: DeviceTables, num_heads: int, q_len: int = 1) -> int:
    """How many splits all requests of a batch are cut into together, for ``num_heads`` query heads.

    A constant of the device and the model, so that it can stand in a CUDA graph.
    """
    block_m, tiles = _decode_rows(tables, num_heads // tables.heads * q_len)
    per_sm = TUNING.generic_per_sm if tables.v_columns is None else _tuning(tables, block_m).warps_per_sm
    return max(1, _multiprocessors(tables.device) * per_sm // (tables.heads * tiles))


@dataclass(frozen=True)
class DecodeScratch:
    """Partial results of the splits, to be kept from call to call: nothing else is allocated in decode.

    out ``[S, q_len, Hq, Dv]``, float16 or float32, and lse ``[S, q_len, Hq]`` float32, for S splits. A partial output
    is a mean of values: float16 loses nothing that the codes have kept, and what is written and read again is half.
    """

    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, tables: DeviceTables, batch: int, num_heads: int, q_len: int = 1) -> DecodeScratch:
        """Room for a batch of up to ``batch`` requests of one layer; layers of one shape may share it."""
        return cls.for_splits(tables, num_splits(batch, target_splits(tables, num_heads, q_len)), num_heads, q_len)

    @classmethod
    def for_splits(cls, tables: DeviceTables, splits: int, num_heads: int, q_len: int = 1) -> DecodeScratch:
        shape, device = (splits, q_len, num_heads), tables.device
        dtype = torch.float16 if device.type == "cuda" else torch.float32  # as the kernels' dots
        out = torch.empty(*shape, tables.v.dim, dtype=dtype, device=device)
        return cls(out, torch.empty(shape, dtype=torch.float32, device=device))


def decode_attention(
    tables: DeviceTables,
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    *,
    q_len: int = 1,
    turned: torch.Tensor | None = None,
    target: int | None = None,
    scratch: DecodeScratch | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last ``q_len`` tokens of each request against its packed rows, their own among them.

    q ``[B * q_len, Hq, D]``, queries of a request one after another, each seeing the rows up to its own;
    q_len 1 to 8 (more than one is what speculative decoding verifies). rows ``[slots, row_bytes]`` uint8,
    interleaved (:mod:`.layout`). kv_indptr ``[B + 1]`` and kv_indices (slots), int32 or int64.
    turned: q in stored channels as float32, where :func:`.encode.encode` has made it already.
    target: splits wanted for all requests together, by default what fills the device (see :mod:`.splits`).
    scratch and ``out [B * q_len, Hq, Dv]`` may be given, for CUDA graphs.

    Returns out in q's dtype and the natural-log LSE ``[B * q_len, Hq]`` float32; zeros and -inf for a
    query that sees nothing. Raises ValueError on other shapes.
    """
    group = _check(tables, q)
    requests, num_heads = kv_indptr.shape[0] - 1, q.shape[1]
    if not 1 <= q_len <= MAX_Q_LEN:
        raise ValueError(f"q_len {q_len}: 1 to {MAX_Q_LEN} queries per request are supported")
    if q.shape[0] != requests * q_len:
        raise ValueError(f"q {tuple(q.shape)}: {q_len} queries for each of {requests} requests are needed")
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
    if turned is None:
        turned = turn(tables.k, q, group)
    _decode(tables, turned, rows, kv_indptr, kv_indices, sm_scale, q_len, target, splits, scratch)
    _merge(tables, scratch, kv_indptr, q_len, target, out, lse)
    return out, lse


def _decode(
    tables: DeviceTables,
    turned: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    q_len: int,
    target: int,
    splits: int,
    scratch: DecodeScratch,
) -> None:
    row, num_heads = tables.row, turned.shape[1]
    group, requests = num_heads // tables.heads, kv_indptr.shape[0] - 1
    block_m, tiles = _decode_rows(tables, group * q_len)
    if tables.v_columns is None:
        out, lse = scratch.out, scratch.lse
        _attend(
            tables,
            turned,
            rows,
            None,
            kv_indptr,
            kv_indices,
            sm_scale,
            target,
            q_len,
            block_m,
            (tiles, tables.heads, splits),
            out,
            (out.stride(1), out.stride(2), out.stride(0)),
            lse,
            (lse.stride(1), lse.stride(2), lse.stride(0)),
        )
        return
    tables.check_rows(rows)
    ks, v, tuning = tables.k_templates, tables.v_columns, _tuning(tables, block_m)
    decode_kernel[(tables.heads * tiles, splits)](
        turned,
        rows.view(torch.int16),
        rows.view(torch.int32),
        kv_indptr,
        kv_indices,
        tables.column_shifts,
        tables.k_kinds if len(ks) > 1 else None,
        tables.k_order if len(ks) > 1 else None,
        scratch.out,
        scratch.lse,
        requests,
        target,
        _multiprocessors(tables.device),
        sm_scale * _LOG2E,
        turned.stride(0),
        turned.stride(1),
        ROW_BYTES=row.row_bytes,
        K_STRIDE=row.k_code_bytes,
        V_STRIDE=row.v_code_bytes,
        V_OFFSET=row.v_offset,
        NORM_OFFSET=row.norm_offset,
        HEADS=tables.heads,
        GROUP=group,
        QUERIES=q_len,
        V_DIM=tables.v.dim,
        K_BINS=tuple(k.bins for k in ks),
        V_BINS=v.bins,
        K_REPEAT=tuple(k.repeat for k in ks),
        V_REPEAT=v.repeat,
        K_SLOTS=tuple(k.slots for k in ks),
        V_SLOTS=v.slots,
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
        ASM=turned.is_cuda,
        DEPENDENT=dependent(tables.device),
        launch_pdl=dependent(tables.device),
        num_warps=1,
        num_stages=tuning.stages,
        maxnreg=tuning.registers,
    )


def _merge(
    tables: DeviceTables,
    scratch: DecodeScratch,
    kv_indptr: torch.Tensor,
    q_len: int,
    target: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    side, (tokens, num_heads) = tables.v, lse.shape
    group, requests = num_heads // tables.heads, kv_indptr.shape[0] - 1
    shared = {
        "GROUP": group,
        "QUERIES": q_len,
        "DIM": side.dim,
        "PADDED": side.padded,
        "REQUESTS": request_block(requests),
        "DEPENDENT": dependent(tables.device),
        "launch_pdl": dependent(tables.device),
    }
    per_request, narrow = target // requests, side.padded <= 128
    spread = narrow and tokens * num_heads <= _ROWS_ALONE and target > CHUNK * requests
    if narrow and not spread and tokens * tables.heads <= _GROUPS_AT_ONCE:
        columns, rows = min(64, side.padded), max(8, triton.next_power_of_2(group))
        merge_group_kernel[(tables.heads, tokens, side.padded // columns)](
            scratch.out, scratch.lse, side.back, kv_indptr, out, lse, requests, target, num_heads,
            out.stride(0), out.stride(1), **shared, COLUMNS=columns, ROWS=rows,
            BLOCK=max(4, min(_GROUP_PARTS // rows, triton.next_power_of_2(per_request))), num_warps=8,
        )  # fmt: skip
        return
    # With few requests a row has many splits, which 64 at a time spread over the device; with many, one program
    # goes through them. The row that has more than its share, a long request among short ones, is slower then.
    # Twice the share of each: a program too many costs as much to start as one that is needed.
    chunks = triton.cdiv(min(target, 2 * per_request), CHUNK) if spread else 1
    block = max(4, min(CHUNK, triton.next_power_of_2(2 * per_request)))
    merge_chunk_kernel[(num_heads, tokens, chunks)](
        scratch.out, scratch.lse, kv_indptr, requests, target, num_heads,
        **{name: value for name, value in shared.items() if name != "GROUP"},
        BLOCK=block, WHOLE=not spread, num_warps=4 if block > 8 else 1,
    )  # fmt: skip
    if spread:
        columns = min(32, side.padded)  # few rows share the matrix' columns out, to fill the device
        merge_row_kernel[(num_heads, tokens, side.padded // columns)](
            scratch.out, scratch.lse, side.back, kv_indptr, out, lse, requests, target, num_heads,
            out.stride(0), out.stride(1), **shared, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    else:
        columns = min(64, side.padded)
        merge_tile_kernel[(triton.cdiv(tokens * group, 16), tables.heads, side.padded // columns)](
            scratch.out, scratch.lse, side.back, kv_indptr, out, lse, tokens * group, requests, target, num_heads,
            out.stride(0), out.stride(1), **shared, COLUMNS=columns, ROWS=16, num_warps=4,
        )  # fmt: skip


def prefix_attention(
    tables: DeviceTables,
    q: torch.Tensor,
    rows: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    max_q_len: int,
    num_kv_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query of a request against all its packed rows (no causal mask: the prefix lies before them).

    q ``[T, Hq, D]``; qo_indptr, kv_indptr ``[B + 1]``; max_q_len: longest run of queries (host integer; queries
    beyond it are left out). num_kv_splits: splits of the prefix; None takes as many as keep the GPU busy.

    Returns out ``[T, Hq, Dv]`` and lse ``[T, Hq]``, float32: a part still to be merged with the chunk's own
    attention by :func:`merge_states`. Zeros and -inf for queries without a prefix.
    """
    group = _check(tables, q)
    num_tokens, heads = q.shape[:2]
    requests = kv_indptr.shape[0] - 1
    out = q.new_empty((num_tokens, heads, tables.v.dim), dtype=torch.float32)
    if not (num_tokens and requests and max_q_len):
        return out.zero_(), q.new_full((num_tokens, heads), -torch.inf, dtype=torch.float32)
    block_m = 16 if max_q_len * group <= 16 else _block_m(tables)  # two binaries, not one for each length
    if num_kv_splits is None:
        programs = triton.cdiv(max_q_len * group, block_m) * tables.heads * requests
        wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        num_kv_splits = min(MAX_PREFIX_SPLITS, max(1, wanted // programs))
    partial_out = q.new_empty((num_tokens, heads, num_kv_splits, tables.v.dim), dtype=torch.float32)
    # Tokens of no request are visited by no program.
    partial_lse = q.new_full((num_tokens, heads, num_kv_splits), -torch.inf, dtype=torch.float32)
    _attend(
        tables,
        turn(tables.k, q, group),
        rows,
        qo_indptr,
        kv_indptr,
        kv_indices,
        sm_scale,
        num_kv_splits,
        1,
        block_m,
        (triton.cdiv(max_q_len * group, block_m) * num_kv_splits, tables.heads, requests),
        partial_out,
        partial_out.stride()[:3],
        partial_lse,
        partial_lse.stride(),
    )
    return out, merge_and_turn(tables.v, partial_out, partial_lse, group, out)
