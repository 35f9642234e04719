"""Encode new keys and values into packed rows, in one Triton launch.

The definition is :func:`sglang_blockgtq.kernels.naive.encode`. A program holds 64 rows of one head, keys or
values, and a row's channels lie within one warp, so that its sums need no barrier. For large batches a row
is a token, whose program tries one factor of the scale search after the other; for small ones it is a token
and one of the factors, so that a handful of tokens keeps the whole GPU busy and takes one try's time.

A token's bytes do not depend on the batch it comes in with: both ways run the same binary, every sum runs
over one token in the same order, and the best factor is chosen by comparing the same numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dependent import dependent
from .encode_few import encode_few_kernel
from .encode_rows import encode_rows
from .layout import NORM_BYTES
from .tables import DeviceTables, SideTables
from .turn import BLOCK as TURN_BLOCK
from .turn import project_and_store

BLOCK = 64  # rows per program; one number, since a token's bytes must not depend on the batch
WARPS = 4
FEW_VECTORS = 128  # keys of a batch, heads times tokens, up to which the kernel for a few tokens takes it
REGISTERS = 168  # a thread: three programs on an SM. Wide heads and several scales need more


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
_FREE = ["num_factors", "spread", "num_tokens", "row_bytes", "norm_offset", "row_norms", "heads"]
_FREE += ["k_code_bytes", "k_offset", "k_first_norm", "v_code_bytes", "v_offset", "v_first_norm", "turn_rows"]


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["loc"])
def _encode_kernel(
    k,  # [T, H, DIM]
    v,  # [T, H, V_DIM]
    q,  # [T, H * GROUP, DIM], or None
    turned,  # the same, float32
    rows,  # uint8
    scales,  # the same memory as float16
    k_words,  # the same memory in words that a head's codes are whole numbers of
    v_words,
    loc,
    k_matrix,
    k_channels,
    k_inverse_counts,
    k_place,
    k_pack,
    v_matrix,
    v_channels,
    v_inverse_counts,
    v_place,
    v_pack,
    q_matrix,
    cells,
    search,  # [num_factors]
    num_factors,
    spread,  # rows per token: 1, or SLOTS with a factor each
    num_tokens,
    turn_rows,  # num_tokens * GROUP
    heads,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_qt,
    stride_qh,
    stride_tt,
    stride_th,
    row_bytes,
    places,
    norm_offset,
    row_norms,
    k_code_bytes,
    k_offset,
    k_first_norm,
    v_code_bytes,
    v_offset,
    v_first_norm,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    NORMS: tl.constexpr,
    TILES: tl.constexpr,
    PLACE_ROWS: tl.constexpr,
    PLACE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    WORD: tl.constexpr,
    BINS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    V_TILES: tl.constexpr,
    V_PLACE_ROWS: tl.constexpr,
    V_PLACE_BYTES: tl.constexpr,
    V_CHUNK: tl.constexpr,
    V_WORD: tl.constexpr,
    V_BINS: tl.constexpr,
    BOOKS: tl.constexpr,
    COUNT: tl.constexpr,
    INTERPRET: tl.constexpr,
    RULE: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,  # 0: no query
    ROWS: tl.constexpr,
):
    side, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    if side == 0:
        if tl.program_id(0) * ROWS < num_tokens * spread:
            encode_rows(
                k,
                rows,
                scales,
                k_words,
                loc,
                k_matrix,
                k_channels,
                k_inverse_counts,
                k_place,
                k_pack,
                cells,
                search,
                num_factors,
                spread,
                num_tokens,
                stride_kt,
                stride_kh,
                row_bytes,
                places,
                k_code_bytes,
                k_offset,
                norm_offset,
                row_norms,
                k_first_norm,
                head,
                heads,
                DIM,
                PADDED,
                NORMS,
                TILES,
                PLACE_ROWS,
                PLACE_BYTES,
                CHUNK,
                WORD,
                BINS,
                BOOKS,
                COUNT,
                INTERPRET,
                RULE,
                SLOTS,
                False,
                ROWS,
            )
    elif side == 1:
        if tl.program_id(0) * ROWS < num_tokens * spread:
            encode_rows(
                v,
                rows,
                scales,
                v_words,
                loc,
                v_matrix,
                v_channels,
                v_inverse_counts,
                v_place,
                v_pack,
                cells,
                search,
                num_factors,
                spread,
                num_tokens,
                stride_vt,
                stride_vh,
                row_bytes,
                places,
                v_code_bytes,
                v_offset,
                norm_offset,
                row_norms,
                v_first_norm,
                head,
                heads,
                V_DIM,
                V_PADDED,
                1,
                V_TILES,
                V_PLACE_ROWS,
                V_PLACE_BYTES,
                V_CHUNK,
                V_WORD,
                V_BINS,
                BOOKS,
                COUNT,
                INTERPRET,
                RULE,
                SLOTS,
                True,
                ROWS,
            )
    elif GROUP > 0:
        project_and_store(
            q,
            q_matrix,
            turned,
            turn_rows,
            stride_qt,
            stride_qh,
            stride_tt,
            stride_th,
            head,
            tl.program_id(0),
            0,
            GROUP,
            DIM,
            PADDED,
            ROWS,
            PADDED,
        )


def _check(tables: DeviceTables, side: SideTables, name: str, x: torch.Tensor, loc: torch.Tensor) -> None:
    if x.dim() != 3 or x.shape[1:] != (tables.heads, side.dim) or x.shape[0] != loc.shape[0]:
        raise ValueError(
            f"{name} {tuple(x.shape)}: [{loc.shape[0]}, {tables.heads}, {side.dim}] is needed (tokens as in loc)"
        )
    if x.stride(-1) != 1:
        raise ValueError(f"{name} with strides {x.stride()}: channels must be contiguous")


def _rows_per_token(tables: DeviceTables, tokens: int, device: torch.device) -> int:
    """1, or a row for each factor of the scale search as long as all programs still run at once."""
    slots = triton.next_power_of_2(tables.search.shape[0])
    programs = triton.cdiv(tokens * slots, BLOCK) * 2 * tables.heads
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return slots if slots <= BLOCK and programs <= 2 * count else 1


def _words(side: SideTables, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    if side.plan.few is not None:
        return rows.view(torch.int16), 2
    for dtype in (torch.int32, torch.int16):
        if not any(n % dtype.itemsize for n in (side.code_bytes, side.offset, rows.shape[1], rows.data_ptr())):
            return rows.view(dtype), dtype.itemsize
    return rows, 1


def _few(tables: DeviceTables, tokens: int) -> bool:
    """Whether a batch goes to the kernel for a few tokens, each of whose programs reads a matrix of its own."""
    return tables.k_columns is not None and tokens * tables.heads <= FEW_VECTORS


def _encode_few(
    tables: DeviceTables,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    loc: torch.Tensor,
    q: torch.Tensor | None,
    turned: torch.Tensor | None,
    tokens: int,
    group: int,
) -> None:
    row, a, b = tables.row, tables.k.plan.few, tables.v.plan.few
    channels = min(32, tables.k.padded)  # of the queries, a program: few rows share the reading of the matrix
    blocks = 2 * tokens + triton.cdiv(tokens * group, TURN_BLOCK) * (tables.k.padded // channels)
    wide = max(tables.k.padded, tables.v.padded) >= 128
    encode_few_kernel[(blocks * tables.heads,)](
        k,
        v,
        q,
        turned,
        rows.view(torch.int16),
        rows.view(torch.float16),
        loc,
        tables.k.into,
        a.fields,
        a.pack,
        tables.v.into,
        b.fields,
        b.pack,
        tables.k.back_pieces if k.dtype == torch.bfloat16 else tables.k.back,
        tables.search,
        tables.search.shape[0],
        tokens,
        tokens * group,
        tables.heads,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        q.stride(0) if group else 0,
        q.stride(1) if group else 0,
        turned.stride(0) if group else 0,
        turned.stride(1) if group else 0,
        row.row_bytes,
        row.norm_offset,
        row.norm_offset + row.heads * row.norms * NORM_BYTES,
        0,
        row.k_code_bytes,
        row.v_offset,
        row.v_code_bytes,
        DIM=tables.k.dim,
        PADDED=tables.k.padded,
        BITS=a.bits,
        BINS=a.bins,
        V_DIM=tables.v.dim,
        V_PADDED=tables.v.padded,
        V_BITS=b.bits,
        V_BINS=b.bins,
        RULE=tables.scale_rule,
        FACTORS=triton.next_power_of_2(tables.search.shape[0]),
        ROW_NORMS=row.norms,
        GROUP=group,
        ROWS=TURN_BLOCK,
        CHANNELS=channels,
        DEPENDENT=dependent(rows.device),
        launch_pdl=dependent(rows.device),
        num_warps=8 if wide else 4,
        num_stages=1,
        maxnreg=128,
    )


def encode(
    tables: DeviceTables,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    loc: torch.Tensor,
    q: torch.Tensor | None = None,
    turned: torch.Tensor | None = None,
) -> None:
    """Encode post-RoPE keys ``[T, H, D]`` and values ``[T, H, Dv]`` into ``rows[loc]``, every byte of them.

    k, v bfloat16, float16 or float32, any strides with contiguous channels; rows ``[slots, row_bytes]`` uint8,
    contiguous and interleaved (:mod:`.layout`); loc ``[T]`` int32 or int64, contiguous. In the same launch, queries
    ``q [T, G * H, D]`` may be brought to the stored channels of the keys, as :func:`.turn.turn` does, into ``turned``
    of q's shape in float32. Raises ValueError on other shapes.

    Codes may differ from the float64 twin where a value lies on a threshold to float32 rounding.
    """
    side, other = tables.k, tables.v
    tables.check_rows(rows)
    _check(tables, side, "k", k, loc)
    _check(tables, other, "v", v, loc)
    if v.dtype != k.dtype:
        raise ValueError(f"v is {v.dtype}, k is {k.dtype}: one dtype is needed")
    if not loc.is_contiguous():
        raise ValueError(f"loc with strides {loc.stride()}: a contiguous tensor is needed")
    group = 0
    if q is not None:
        group = q.shape[1] // tables.heads
        if q.shape != (len(loc), group * tables.heads, side.dim) or q.dtype != k.dtype or q.stride(2) != 1:
            raise ValueError(
                f"q {tuple(q.shape)} {q.dtype} with strides {q.stride()}: [{len(loc)}, a multiple of {tables.heads} "
                f"heads, {side.dim}] {k.dtype} with contiguous channels is needed"
            )
        if turned is None or turned.shape != q.shape or turned.dtype != torch.float32 or turned.stride(2) != 1:
            raise ValueError("turned: a float32 tensor of q's shape with contiguous channels is needed beside q")
    tokens = loc.shape[0]
    if not tokens:
        return
    if _few(tables, tokens):
        _encode_few(tables, k, v, rows, loc, q, turned, tokens, group)
        return
    row, a, b = tables.row, side.plan, other.plan
    spread = _rows_per_token(tables, tokens, k.device)
    k_words, word = _words(side, rows)
    v_words, v_word = _words(other, rows)
    split = k.dtype == torch.bfloat16
    blocks = triton.cdiv(max(tokens * spread, tokens * group), BLOCK)
    _encode_kernel[(blocks, tables.heads * (3 if group else 2))](
        k,
        v,
        q,
        turned,
        rows,
        rows.view(torch.float16),
        k_words,
        v_words,
        loc,
        a.pieces if split else side.into,
        a.channels,
        a.inverse_counts,
        a.place,
        a.few and a.few.pack,
        b.pieces if split else other.into,
        b.channels,
        b.inverse_counts,
        b.place,
        b.few and b.few.pack,
        side.back_pieces if split else side.back,
        tables.cells.table,
        tables.search,
        tables.search.shape[0],
        spread,
        tokens,
        tokens * group,
        tables.heads,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        q.stride(0) if group else 0,
        q.stride(1) if group else 0,
        turned.stride(0) if group else 0,
        turned.stride(1) if group else 0,
        row.row_bytes,
        tables.places,
        row.norm_offset,
        row.norms,
        side.code_bytes,
        side.offset,
        side.first_norm,
        other.code_bytes,
        other.offset,
        other.first_norm,
        DIM=side.dim,
        PADDED=side.padded,
        NORMS=side.norms,
        TILES=a.flat_tiles,
        PLACE_ROWS=a.place.shape[1],
        PLACE_BYTES=a.place.shape[2],
        CHUNK=a.chunk,
        WORD=word,
        BINS=a.few.bins if a.few else (),
        V_DIM=other.dim,
        V_PADDED=other.padded,
        V_TILES=b.flat_tiles,
        V_PLACE_ROWS=b.place.shape[1],
        V_PLACE_BYTES=b.place.shape[2],
        V_CHUNK=b.chunk,
        V_WORD=v_word,
        V_BINS=b.few.bins if b.few else (),
        BOOKS=tables.cells.magnitudes,
        COUNT=tables.cells.count,
        INTERPRET=triton.knobs.runtime.interpret,
        RULE=tables.scale_rule,
        SLOTS=triton.next_power_of_2(tables.search.shape[0]),
        GROUP=group,
        ROWS=BLOCK,
        num_warps=WARPS,
        num_stages=1,
        maxnreg=REGISTERS if split and side.norms == 1 and max(side.padded, other.padded) <= 128 else None,
    )
