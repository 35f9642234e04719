"""Encode new keys and values into packed rows in columns, in one Triton launch.

The definition is :func:`..reference.encode`. A few tokens, those of a decode step, go to the kernel in :mod:`.few`. In
that of :mod:`.many` a program holds 64 rows of one head, keys or values, and a row's channels lie within one warp, so
that its sums need no barrier. For large batches a row is a token, whose program tries one factor of the scale search
after the other; for small ones it is a token and one of the factors, so that a handful of tokens keeps the whole GPU
busy and takes one try's time.

Within a kernel a token's bytes do not depend on the batch it comes in with: all sums run over one token, and the best
factor is chosen by comparing the same numbers. Between them values on a threshold to float32 rounding may differ.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from ..device.dependent import dependent
from ..device.gpu import multiprocessors
from ..device.launch import Launch
from ..device.rotate import BLOCK as QUERY_BLOCK
from ..device.tables import ColumnTables, Side, Tables
from .few import encode_few_kernel
from .many import encode_many_kernel

ROWS = 64  # of a program of the kernel for many tokens
REGISTERS = 128  # of its threads: four programs on an SM. Wide heads need more, and a batch of few programs has them
FEW_REGISTERS = 168  # the same of the kernel for a few tokens, whose programs hold a matrix: three of them
#: Channels of a batch's keys, up to which the kernel for a few tokens takes it: each of its programs reads a matrix.
FEW_CHANNELS = 1 << 14


class Encoder:
    """Encodes into the rows of one layer. What does not change from call to call is prepared once."""

    def __init__(self, tables: ColumnTables, rows: torch.Tensor):
        """rows ``[slots, row_bytes]`` uint8, contiguous and interleaved (:mod:`..format.layout`); else ValueError."""
        tables.check_rows(rows)
        self.tables, self.rows = tables, rows
        self.few_tokens = few_tokens(tables)
        self._launches: dict[tuple, Launch] = {}

    def __call__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        loc: torch.Tensor,
        positions: torch.Tensor | None = None,
        q: torch.Tensor | None = None,
        rotated: torch.Tensor | None = None,
    ) -> None:
        """Encode post-RoPE keys ``[T, H, D]`` and values ``[T, H, Dv]`` into ``rows[loc]``, every byte of them.

        k, v bfloat16, float16 or float32, any strides with contiguous channels; loc and positions ``[T]`` int32 or
        int64, contiguous; positions only where keys have page means, within the pages of the tables.
        In the same launch, queries ``q [T, G * H, D]`` may be rotated to the stored channels of the keys, as
        :func:`..device.rotate.rotate_queries` does, into ``rotated`` of q's shape in float32. Raises ValueError on
        other shapes.

        Codes may differ from the float64 reference where a value lies on a threshold to float32 rounding.
        """
        tables = self.tables
        group = check_inputs(tables, k, v, loc, q, rotated)
        tokens = loc.shape[0]
        if tables.means is not None and (positions is None or positions.shape != loc.shape or positions.stride(0) != 1):
            found = None if positions is None else tuple(positions.shape)
            raise ValueError(f"positions {found}: [{tokens}] is needed, since keys are less the means of their pages")
        if not tokens:
            return
        per_token = 0 if tokens <= self.few_tokens else rows_per_token(tables, tokens, k.device)
        stride_qt = stride_qh = stride_rt = stride_rh = 0
        if q is not None and rotated is not None:
            (stride_qt, stride_qh, _), (stride_rt, stride_rh, _) = q.stride(), rotated.stride()
        key = k.dtype, group, per_token
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = Launch(**self.bound(*key))
        launch(
            (*grid_of(tables, tokens, group, per_token), 1),
            k=k,
            v=v,
            q=q,
            rotated=rotated,
            loc=loc,
            positions=None if tables.means is None else positions,
            num_tokens=tokens,
            num_queries=tokens * group,
            stride_kt=k.stride(0),
            stride_kh=k.stride(1),
            stride_vt=v.stride(0),
            stride_vh=v.stride(1),
            stride_qt=stride_qt,
            stride_qh=stride_qh,
            stride_rt=stride_rt,
            stride_rh=stride_rh,
            **spread(per_token),
        )

    def bound(self, dtype: torch.dtype, group: int, per_token: int) -> dict[str, Any]:
        """The kernel and what of its arguments is the same in every launch for keys of this dtype, with ``group``
        queries for each of their heads, 0 for none. per_token: of :func:`rows_per_token`, 0 for the kernel for a few.
        """
        own = self._many(dtype, per_token == 1) if per_token else self._few()
        return self._common(dtype, group) | own

    def _common(self, dtype: torch.dtype, group: int) -> dict[str, Any]:
        """What both kernels are bound to."""
        tables, k, v, row, means = self.tables, self.tables.k, self.tables.v, self.tables.row, self.tables.means
        return {
            "layers": None,
            "places": None,
            "means": means and means.stored,
            "PAGE": means.page if means else 0,
            "words": self.rows.view(torch.int16),
            "scales": self.rows.view(torch.float16),
            "k_pack": tables.k_plan.pack,
            "v_pack": tables.v_plan.pack,
            "q_matrix": k.back_pieces if dtype == torch.bfloat16 else k.back,
            "search": tables.search,
            "num_factors": tables.search.shape[0],
            "heads": tables.heads,
            "row_bytes": row.row_bytes,
            "norm_offset": row.norm_offset,
            "pad_at": row.pad_offset,
            "k_at": k.offset,
            "k_code_bytes": k.code_bytes,
            "v_at": v.offset,
            "v_code_bytes": v.code_bytes,
            "DIM": k.dim,
            "PADDED": k.padded,
            "V_DIM": v.dim,
            "V_PADDED": v.padded,
            "BINS": tables.k_plan.bins,
            "V_BINS": tables.v_plan.bins,
            "RULE": tables.scale_rule,
            "TRIES": triton.next_power_of_2(tables.search.shape[0]),
            "GROUP": group,
            "num_warps": 4,
            "num_stages": 1,
        }

    def _few(self) -> dict[str, Any]:
        tables, chained = self.tables, dependent(self.rows.device)
        return {
            "kernel": encode_few_kernel,
            "k_matrix": tables.k.into,
            "k_channels": tables.k_plan.channels,
            "v_matrix": tables.v.into,
            "v_channels": tables.v_plan.channels,
            "BITS": tables.k_plan.bits,
            "V_BITS": tables.v_plan.bits,
            "ROWS": QUERY_BLOCK,
            "CHANNELS": _channels(tables),
            "DEPENDENT": chained,
            "launch_pdl": chained,
            "maxnreg": FEW_REGISTERS if max(tables.k.padded, tables.v.padded) <= 128 else None,
        }

    def _many(self, dtype: torch.dtype, full: bool) -> dict[str, Any]:
        """full: whether the batch has more programs than run at a time."""
        tables, split = self.tables, dtype == torch.bfloat16
        narrow = full and split and max(tables.k.padded, tables.v.padded) <= 128
        return {
            "kernel": encode_many_kernel,
            "k_matrix": tables.k_plan.pieces if split else tables.k.into,
            "k_channels": tables.k_plan.lookup,
            "v_matrix": tables.v_plan.pieces if split else tables.v.into,
            "v_channels": tables.v_plan.lookup,
            "cells": tables.cells.table,
            "TILES": tables.k_plan.flat_tiles,
            "V_TILES": tables.v_plan.flat_tiles,
            "BOOKS": tables.cells.magnitudes,
            "COUNT": tables.cells.count,
            "INTERPRET": triton.knobs.runtime.interpret,
            "ROWS": ROWS,
            "maxnreg": REGISTERS if narrow else None,
        }


def grid_of(tables: ColumnTables, tokens: int, group: int, per_token: int) -> tuple[int, int]:
    """Programs of a launch for a layer, group and per_token as of :meth:`Encoder.bound`."""
    if per_token:
        programs = -(-max(tokens * per_token, tokens * group) // ROWS)
        return programs, tables.heads * (3 if group else 2)
    parts = tables.k.padded // _channels(tables)
    return (2 * tokens + -(-tokens * group // QUERY_BLOCK) * parts) * tables.heads, 1


def spread(per_token: int) -> dict[str, Any]:
    """What only the kernel for many tokens is told."""
    return {"spread": per_token} if per_token else {}


def _channels(tables: ColumnTables) -> int:
    """Of the queries, a program of the kernel for a few tokens: few rows share the reading of their matrix."""
    return min(32, tables.k.padded)


def _check(tables: Tables, side: Side, name: str, x: torch.Tensor, loc: torch.Tensor) -> None:
    if x.dim() != 3 or x.shape[1:] != (tables.heads, side.dim) or x.shape[0] != loc.shape[0]:
        raise ValueError(
            f"{name} {tuple(x.shape)}: [{loc.shape[0]}, {tables.heads}, {side.dim}] is needed (tokens as in loc)"
        )
    if x.stride(-1) != 1:
        raise ValueError(f"{name} with strides {x.stride()}: channels must be contiguous")


def check_inputs(
    tables: Tables,
    k: torch.Tensor,
    v: torch.Tensor,
    loc: torch.Tensor,
    q: torch.Tensor | None,
    rotated: torch.Tensor | None,
) -> int:
    """Query heads per KV head, 0 without queries. ValueError for shapes that are not this layer's."""
    _check(tables, tables.k, "k", k, loc)
    _check(tables, tables.v, "v", v, loc)
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
    if rotated is None or rotated.shape != q.shape or rotated.dtype != torch.float32 or rotated.stride(2) != 1:
        raise ValueError("rotated: a float32 tensor of q's shape with contiguous channels is needed beside q")
    return group


def few_tokens(tables: ColumnTables) -> int:
    """The most that the kernel for a few tokens takes."""
    return FEW_CHANNELS // (tables.heads * tables.k.padded)


def rows_per_token(tables: ColumnTables, tokens: int, device: torch.device, layers: int = 1) -> int:
    """1, or a row for each factor of the scale search as long as all programs still run at once, or of several layers
    twice as many. Asked at each call, so without triton's own arithmetic, which takes microseconds."""
    tries = 1 << (len(tables.search) - 1).bit_length()
    programs = -(-tokens * tries // ROWS) * 2 * tables.heads * layers
    count = multiprocessors(device) if device.type == "cuda" else 132
    return tries if tries <= ROWS and programs <= (4 if layers > 1 else 2) * count else 1
