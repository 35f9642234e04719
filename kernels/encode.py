"""Encode new keys and values into packed rows, in one Triton launch.

The definition is :func:`sglang_blockgtq.kernels.naive.encode`. A few tokens, those of a decode step, go to the kernel
in :mod:`.encode_few`. In that of :mod:`.encode_many` a program holds 64 rows of one head, keys or values, and a row's
channels lie within one warp, so that its sums need no barrier. For large batches a row is a token,
whose program tries one factor of the scale search after the other; for small ones it is a token and one of the
factors, so that a handful of tokens keeps the whole GPU busy and takes one try's time.

Within a kernel a token's bytes do not depend on the batch it comes in with: all sums run over one token, and the best
factor is chosen by comparing the same numbers. Between them values on a threshold to float32 rounding may differ.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from .dependent import dependent
from .encode_few import encode_few_kernel
from .encode_many import encode_many_kernel
from .launch import Launch
from .layout import NORM_BYTES
from .tables import DeviceTables, SideTables
from .turn import BLOCK as TURN_BLOCK

ROWS = 64  # of a program of the kernel for many tokens
REGISTERS = 128  # of its threads: four programs on an SM. Wide heads and several scales need more
FEW_REGISTERS = 168  # the same of the kernel for a few tokens, whose programs hold a matrix: three of them
#: Channels of a batch's keys, up to which the kernel for a few tokens takes it: each of its programs reads a matrix.
FEW_CHANNELS = 1 << 14


class Encoder:
    """Encodes into the rows of one layer. What does not change from call to call is prepared once."""

    def __init__(self, tables: DeviceTables, rows: torch.Tensor):
        """rows ``[slots, row_bytes]`` uint8, contiguous and interleaved (:mod:`.layout`); ValueError for others."""
        tables.check_rows(rows)
        self.tables, self.rows = tables, rows
        # Most tokens that the kernel for a few takes: none of rows that it does not write.
        fast = tables.v_columns is not None
        self.few_tokens = FEW_CHANNELS // (tables.heads * tables.k.padded) if fast else 0
        self._launches: dict[tuple, Launch] = {}

    def __call__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        loc: torch.Tensor,
        q: torch.Tensor | None = None,
        turned: torch.Tensor | None = None,
    ) -> None:
        """See :func:`encode`."""
        tables = self.tables
        _check(tables, tables.k, "k", k, loc)
        _check(tables, tables.v, "v", v, loc)
        group = _check_rest(tables, k, v, loc, q, turned)
        tokens = loc.shape[0]
        if not tokens:
            return
        if tokens <= self.few_tokens:
            few, spread = True, {}
            parts = tables.k.padded // _channels(tables)
            programs = (2 * tokens + triton.cdiv(tokens * group, TURN_BLOCK) * parts) * tables.heads
            grid = programs, 1, 1
        else:
            per_token = _rows_per_token(tables, tokens, k.device)
            few, spread = False, {"spread": per_token}
            programs = triton.cdiv(max(tokens * per_token, tokens * group), ROWS)
            grid = programs, tables.heads * (3 if group else 2), 1
        key = few, k.dtype, group
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = (self._few if few else self._many)(k.dtype, group)
        launch(
            grid,
            k=k,
            v=v,
            q=q,
            turned=turned,
            loc=loc,
            num_tokens=tokens,
            num_queries=tokens * group,
            stride_kt=k.stride(0),
            stride_kh=k.stride(1),
            stride_vt=v.stride(0),
            stride_vh=v.stride(1),
            stride_qt=q.stride(0) if group else 0,
            stride_qh=q.stride(1) if group else 0,
            stride_tt=turned.stride(0) if group else 0,
            stride_th=turned.stride(1) if group else 0,
            **spread,
        )

    def _common(self, dtype: torch.dtype, group: int) -> dict[str, Any]:
        """What both kernels are bound to."""
        k, v, row = self.tables.k, self.tables.v, self.tables.row
        return {
            "scales": self.rows.view(torch.float16),
            "q_matrix": k.back_pieces if dtype == torch.bfloat16 else k.back,
            "search": self.tables.search,
            "num_factors": self.tables.search.shape[0],
            "heads": self.tables.heads,
            "row_bytes": row.row_bytes,
            "norm_offset": row.norm_offset,
            "k_at": k.offset,
            "k_code_bytes": k.code_bytes,
            "v_at": v.offset,
            "v_code_bytes": v.code_bytes,
            "DIM": k.dim,
            "PADDED": k.padded,
            "V_DIM": v.dim,
            "V_PADDED": v.padded,
            "BINS": k.plan.columns.bins if k.plan.columns else (),
            "V_BINS": v.plan.columns.bins if v.plan.columns else (),
            "RULE": self.tables.scale_rule,
            "FACTORS": triton.next_power_of_2(self.tables.search.shape[0]),
            "GROUP": group,
            "num_stages": 1,
        }

    def _few(self, dtype: torch.dtype, group: int) -> Launch:
        k, v, row = self.tables.k, self.tables.v, self.tables.row
        chained = dependent(self.rows.device)
        return Launch(
            encode_few_kernel,
            **self._common(dtype, group),
            words=self.rows.view(torch.int16),
            k_matrix=k.into,
            k_fields=k.plan.columns.fields,
            k_pack=k.plan.columns.pack,
            v_matrix=v.into,
            v_fields=v.plan.columns.fields,
            v_pack=v.plan.columns.pack,
            pad_at=row.norm_offset + row.heads * row.norms * NORM_BYTES,
            BITS=k.plan.columns.bits,
            V_BITS=v.plan.columns.bits,
            ROW_NORMS=row.norms,
            ROWS=TURN_BLOCK,
            CHANNELS=_channels(self.tables),
            DEPENDENT=chained,
            launch_pdl=chained,
            num_warps=4,
            maxnreg=FEW_REGISTERS if max(k.padded, v.padded) <= 128 else None,
        )

    def _many(self, dtype: torch.dtype, group: int) -> Launch:
        k, v, row = self.tables.k, self.tables.v, self.tables.row
        a, b, split = k.plan, v.plan, dtype == torch.bfloat16
        k_words, word = _words(k, self.rows)
        v_words, v_word = _words(v, self.rows)
        narrow = split and k.norms == 1 and max(k.padded, v.padded) <= 128
        return Launch(
            encode_many_kernel,
            **self._common(dtype, group),
            rows=self.rows,
            k_words=k_words,
            v_words=v_words,
            k_matrix=a.pieces if split else k.into,
            k_channels=a.channels,
            k_inverse_counts=a.inverse_counts,
            k_place=a.place,
            k_pack=a.columns and a.columns.pack,
            v_matrix=b.pieces if split else v.into,
            v_channels=b.channels,
            v_inverse_counts=b.inverse_counts,
            v_place=b.place,
            v_pack=b.columns and b.columns.pack,
            cells=self.tables.cells.table,
            places=self.tables.places,
            row_norms=row.norms,
            k_first_norm=k.first_norm,
            v_first_norm=v.first_norm,
            NORMS=k.norms,
            TILES=a.flat_tiles,
            PLACE_ROWS=a.place.shape[1],
            PLACE_BYTES=a.place.shape[2],
            CHUNK=a.chunk,
            WORD=word,
            V_TILES=b.flat_tiles,
            V_PLACE_ROWS=b.place.shape[1],
            V_PLACE_BYTES=b.place.shape[2],
            V_CHUNK=b.chunk,
            V_WORD=v_word,
            BOOKS=self.tables.cells.magnitudes,
            COUNT=self.tables.cells.count,
            INTERPRET=triton.knobs.runtime.interpret,
            ROWS=ROWS,
            num_warps=4,
            maxnreg=REGISTERS if narrow else None,
        )


def _channels(tables: DeviceTables) -> int:
    """Of the queries, a program of the kernel for a few tokens: few rows share the reading of their matrix."""
    return min(32, tables.k.padded)


def _check(tables: DeviceTables, side: SideTables, name: str, x: torch.Tensor, loc: torch.Tensor) -> None:
    if x.dim() != 3 or x.shape[1:] != (tables.heads, side.dim) or x.shape[0] != loc.shape[0]:
        raise ValueError(
            f"{name} {tuple(x.shape)}: [{loc.shape[0]}, {tables.heads}, {side.dim}] is needed (tokens as in loc)"
        )
    if x.stride(-1) != 1:
        raise ValueError(f"{name} with strides {x.stride()}: channels must be contiguous")


def _check_rest(
    tables: DeviceTables,
    k: torch.Tensor,
    v: torch.Tensor,
    loc: torch.Tensor,
    q: torch.Tensor | None,
    turned: torch.Tensor | None,
) -> int:
    """Query heads per KV head, 0 without queries."""
    if v.dtype != k.dtype:
        raise ValueError(f"v is {v.dtype}, k is {k.dtype}: one dtype is needed")
    if not loc.is_contiguous():
        raise ValueError(f"loc with strides {loc.stride()}: a contiguous tensor is needed")
    if q is None:
        return 0
    group, dim = q.shape[1] // tables.heads, tables.k.dim
    if q.shape != (len(loc), group * tables.heads, dim) or q.dtype != k.dtype or q.stride(2) != 1:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} with strides {q.stride()}: [{len(loc)}, a multiple of {tables.heads} "
            f"heads, {dim}] {k.dtype} with contiguous channels is needed"
        )
    if turned is None or turned.shape != q.shape or turned.dtype != torch.float32 or turned.stride(2) != 1:
        raise ValueError("turned: a float32 tensor of q's shape with contiguous channels is needed beside q")
    return group


def _rows_per_token(tables: DeviceTables, tokens: int, device: torch.device) -> int:
    """1, or a row for each factor of the scale search as long as all programs still run at once."""
    slots = triton.next_power_of_2(tables.search.shape[0])
    programs = triton.cdiv(tokens * slots, ROWS) * 2 * tables.heads
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return slots if slots <= ROWS and programs <= 2 * count else 1


def _words(side: SideTables, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    if side.plan.columns is not None:
        return rows.view(torch.int16), 2
    for dtype in (torch.int32, torch.int16):
        if not any(n % dtype.itemsize for n in (side.code_bytes, side.offset, rows.shape[1], rows.data_ptr())):
            return rows.view(dtype), dtype.itemsize
    return rows, 1


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
    Encoder(tables, rows)(k, v, loc, q, turned)
