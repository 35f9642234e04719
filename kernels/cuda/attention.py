"""Launches of the CUDA kernel. Definition: :func:`..reference.decode_attention`; caller: ``decode/attention.py``."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeGuard

import torch

from ..device.gpu import multiprocessors
from ..device.tables import CodeSpec, ColumnTables, Tables
from ..format.columns import COLUMNS
from ..terms import Terms
from . import compile as nvrtc
from . import launch
from .operands import MAX_BITS, most_bits
from .source import ROWS, Shape, part_bytes, source, text_of

#: What reads rows in decode: "triton"; "cuda", where it serves a layer; "auto", where it is the faster one, too.
CHOICE = "auto"
MAX_ROW_TILES = 2  # of ROWS query rows, that a program serves
MOST_PROGRAMS = 16  # of a multiprocessor
_LOG2E = 1.4426950408889634
_SHARED_BYTES = 227 * 1024  # of a multiprocessor
_TYPES = "P" * 10 + "iiifii"


class KernelError(RuntimeError):
    """The kernel does not compile, or the driver does not take it."""


@dataclass(frozen=True)
class Tuning:
    """programs: of a multiprocessor, at a time; they leave each thread 65,536 / 32 / programs registers. stages: tiles
    in shared memory, of which one is read. parts: of a tile."""

    programs: int
    stages: int = 2
    parts: int = 1


def _tuning(tables: ColumnTables, row_tiles: int) -> Tuning:
    """As measured on an H200. Two parts where they fit for the most programs, since more bytes take more registers,
    too; with the most programs keys of many bits have taken those already."""
    tuning = Tuning(MOST_PROGRAMS if len(tables.v_spec.segments) * row_tiles <= 8 else MOST_PROGRAMS // 2)
    fit = 2 * tuning.stages * MOST_PROGRAMS * part_bytes(tables.k_templates, tables.v_spec) <= _SHARED_BYTES
    levelled = any(most_bits(keys) > MAX_BITS for keys in tables.k_templates)
    return replace(tuning, parts=2) if fit and (row_tiles > 1 or not levelled) else tuning


@cache
def _values_lack(spec: CodeSpec) -> str | None:
    return f"values of more than {MAX_BITS} bits" if most_bits(spec) > MAX_BITS else None


@cache
def device_lacks(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "the CUDA kernel is written for compute capability 9.0"
    return nvrtc.unavailable() or launch.unavailable(device)


def lacks(tables: Tables) -> str | None:
    """Why this kernel cannot serve a layer, or None."""
    if not isinstance(tables, ColumnTables):
        return "rows that are not in columns"
    return _values_lack(tables.v_spec) or device_lacks(tables.device)


def serves(tables: Tables, rows: int) -> TypeGuard[ColumnTables]:
    """Whether decode reads a layer's rows by this kernel, for ``rows`` query rows of a KV head."""
    if CHOICE == "triton" or not isinstance(tables, ColumnTables) or lacks(tables):
        return False
    return CHOICE == "cuda" or _faster(tables.v_spec, rows)


@cache
def _faster(values: CodeSpec, rows: int) -> bool:
    """Than Triton's, where that was measured on an H200 (docs/kernels.md): heads of 128 channels with up to four query
    rows, heads of more with up to eight, and values of three bits or four."""
    segments = len(values.segments)
    most = ROWS if segments <= 128 // COLUMNS else 2 * ROWS
    return segments >= 128 // COLUMNS and rows <= most and most_bits(values) > 2


def row_tiles(rows: int) -> int:
    """Tiles of ROWS that a program has, for ``rows`` query rows of a KV head."""
    return min(-(-rows // ROWS), MAX_ROW_TILES)


def programs(tables: ColumnTables, rows: int) -> tuple[int, int]:
    """Programs that a multiprocessor runs at a time, and how many serve a split of a KV head."""
    tiles = row_tiles(rows)
    return _tuning(tables, tiles).programs, -(-rows // (ROWS * tiles))


def shape_of(
    tables: ColumnTables,
    group: int,
    q_len: int,
    terms: Terms,
    tree: bool,
    indptr64: bool,
    slots64: bool,
    tuning: Tuning | None = None,
) -> Shape:
    """What a binary is compiled for."""
    row, tiles = tables.row, row_tiles(group * q_len)
    tuning = tuning or _tuning(tables, tiles)
    return Shape(
        row_bytes=row.row_bytes,
        k_stride=row.k_code_bytes,
        v_stride=row.v_code_bytes,
        v_offset=row.v_offset,
        norm_offset=row.norm_offset,
        heads=tables.heads,
        group=group,
        queries=q_len,
        v_dim=tables.v.dim,
        page=tables.means.page if tables.means else 0,
        padded=tables.k.padded,
        window=terms.window,
        cap=terms.cap,
        tree=tree,
        row_tiles=tiles,
        parts=tuning.parts,
        stages=tuning.stages,
        programs=tuning.programs,
        indptr64=indptr64,
        slots64=slots64,
        keys=tables.k_templates,
        values=tables.v_spec,
    )


@cache
def kernel_of(shape: Shape, device: torch.device) -> launch.Kernel:
    """Compiled, or from the cache on disk. KernelError."""
    text = nvrtc.joined({"hopper.cu": text_of("hopper.cu"), "decode.cu": source(shape)})
    with torch.cuda.device(device):
        try:
            cubin = nvrtc.compile(text, "decode", defines={"MIN_BLOCKS": shape.programs})
            return launch.Kernel(cubin, "decode", _TYPES, device)
        except RuntimeError as error:
            raise KernelError(str(error)) from error


@dataclass(frozen=True)
class _Launch:
    """What stays the same from call to call."""

    tables: weakref.ref[ColumnTables]
    shape: Shape
    kernel: launch.Kernel
    fixed: tuple[int, int, int]  # addresses of kinds, order and means


_launches: dict[tuple, _Launch] = {}


def _launch_of(
    tables: ColumnTables, group: int, q_len: int, terms: Terms, tree: bool, wide: tuple[bool, bool]
) -> _Launch:
    key = id(tables), group, q_len, terms.window, terms.cap, tree, wide
    found = _launches.get(key)
    if found is None or found.tables() is not tables:
        shape = shape_of(tables, group, q_len, terms, tree, *wide)
        several = len(tables.k_templates) > 1
        fixed = (
            tables.k_kinds.data_ptr() if several else 0,
            tables.k_order.data_ptr() if several else 0,
            tables.means.stored.data_ptr() if tables.means else 0,
        )
        found = _Launch(weakref.ref(tables), shape, kernel_of(shape, tables.device), fixed)
        _launches[key] = found
    return found


def grid_of(shape: Shape, splits: int) -> tuple[int, int]:
    rows = shape.group * shape.queries
    return shape.heads * -(-rows // (ROWS * shape.row_tiles)), splits


def attend(
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
    """Partial results of all splits.

    out ``[splits, q_len, Hq, Dv]`` float16, lse ``[splits, q_len, Hq]`` and rotated ``[B * q_len, Hq, D]`` float32; the
    others as decode_attention has them.
    """
    group = rotated.shape[1] // tables.heads
    wide = kv_indptr.dtype == torch.int64, kv_indices.dtype == torch.int64
    found = _launch_of(tables, group, q_len, terms, tree is not None, wide)
    kinds, order, means = found.fixed
    args = (
        rotated.data_ptr(),
        rows.data_ptr(),
        kv_indptr.data_ptr(),
        kv_indices.data_ptr(),
        kinds,
        order,
        means,
        0 if tree is None else tree.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        kv_indptr.shape[0] - 1,
        target,
        multiprocessors(tables.device),
        sm_scale * _LOG2E,
        rotated.stride(0),
        rotated.stride(1),
    )
    found.kernel.launch(grid_of(found.shape, splits), found.shape.shared_bytes, args, dependent=True)
