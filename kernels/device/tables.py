"""A LayerCodec flattened into tensors for the kernels of rows in columns.

Only what decides the shape of the program (padded sizes, pieces of codes) is a compile-time constant: one binary
serves every head, and every layer of the same static structure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from ..encode.plan import Cells, EncodePlan, split_bfloat16
from ..format.codebook import polynomial
from ..format.codec import LayerCodec
from ..format.columns import COLUMNS, WORD_BITS
from ..format.layout import BLOCK_SLOTS, CodeLayout, RowLayout
from .page_mean import MeanTables

MIN_PADDED = 16  # the shortest side of a tensor-core dot
MAX_POSITIONS = 1 << 17  # of a request, where nobody says how many it may have
MAX_TEMPLATES = 4  # layouts that a model's keys may have: the fast kernels have a loop for each


def padded_dim(dim: int) -> int:
    """The power of two that a kernel's channel axis has."""
    return max(MIN_PADDED, 1 << (dim - 1).bit_length())


def _pad_matrix(matrix: torch.Tensor, padded: int) -> torch.Tensor:
    """``[H, out, in]`` to ``[H, P, P]`` indexed (in, out): a kernel then reads rows of outputs."""
    dim = matrix.shape[-1]
    return torch.nn.functional.pad(matrix.mT, (0, padded - dim, 0, padded - dim)).contiguous()


@dataclass(frozen=True)
class Side:
    """Keys or values of one layer. H KV heads, P = ``padded`` channels.

    weight ``[H, P]`` float32: weight in the scale rule, 0 for channels that are not stored.
    into ``[H, P, P]`` float32: channel to stored channel, indexed (in, out): ``k_in`` or ``v_in``.
    back ``[H, P, P]`` float32: the matrix of the reading side, indexed (in, out): ``q_in`` or ``v_out``.
    back_pieces ``[H, 2, P, P]`` bfloat16: of keys the same, (out, in), as a sum of two, for bfloat16 queries.
    """

    weight: torch.Tensor
    into: torch.Tensor
    back: torch.Tensor
    back_pieces: torch.Tensor | None
    dim: int
    padded: int
    code_bytes: int  # per head
    offset: int  # first byte of head 0 within the row

    @classmethod
    def of(
        cls,
        widths: torch.Tensor,
        weight: torch.Tensor,
        into: torch.Tensor,
        back: torch.Tensor,
        code_bytes: int,
        at: int,
        queries: bool,
    ) -> Side:
        """widths ``[H, D]``; weight ``[H, D]``; matrices ``[H, D, D]`` (out, in); at: first byte within the row."""
        dim = widths.shape[1]
        padded = padded_dim(dim)
        into, back = _pad_matrix(into.float().cpu(), padded), _pad_matrix(back.float().cpu(), padded)
        weight = torch.nn.functional.pad(weight.float().cpu() * (widths > 0), (0, padded - dim))
        pieces = split_bfloat16(back) if queries else None
        return cls(weight, into, back, pieces, dim, padded, code_bytes, at)

    @classmethod
    def both(cls, codec: LayerCodec) -> tuple[Side, Side]:
        """Keys and values of a layer."""
        row = codec.layout
        k_widths = torch.tensor([head.widths for head in row.k])
        v_widths = torch.tensor([row.v.widths] * row.heads)
        k = cls.of(k_widths, codec.k_weight, codec.k_in, codec.q_in, row.k_code_bytes, 0, True)
        ones = torch.ones(v_widths.shape)
        return k, cls.of(v_widths, ones, codec.v_in, codec.v_out, row.v_code_bytes, row.v_offset, False)


@dataclass(frozen=True)
class CodeSpec:
    """The static structure of codes in columns, for kernels that are compiled for it. One side: keys or values.

    bins: per bin (byte within a head's codes, words, log2 of the columns per word). repeat: columns per word.
    segments: per segment the pieces, (bin, shift, width, position) after one another. codebook: per segment its
    polynomial. slope: its leading coefficient. poly: the polynomial over that, and empty where it is linear.
    """

    bins: tuple[tuple[int, int, int], ...]
    repeat: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    codebook: tuple[tuple[float, ...], ...]
    poly: tuple[tuple[float, ...], ...]
    slope: tuple[float, ...]

    @property
    def value_poly(self) -> tuple[tuple[float, ...], ...]:
        """poly as decode takes that of values: linear segments beside others are centred, too, since the sum of weights
        that would undo their offset is kept for all segments or for none."""
        return self.poly if not any(self.poly) else tuple(p or (1.0,) for p in self.poly)

    @classmethod
    def of(cls, layout: CodeLayout) -> CodeSpec:
        columns = layout.require_columns()
        polys = [polynomial(bits) for bits in columns.widths]
        return cls(
            bins=tuple((b.offset, b.words, b.repeat.bit_length() - 1) for b in columns.bins),
            repeat=tuple(b.repeat for b in columns.bins),
            segments=tuple(
                tuple(x for p in pieces for x in (p.bin, p.shift, p.width, p.position)) for pieces in columns.segments
            ),
            codebook=tuple(polys),
            poly=tuple(tuple(c / p[-1] for c in p) if len(p) > 1 else () for p in polys),
            slope=tuple(p[-1] for p in polys),
        )


def templates_of(layouts: Iterable[CodeLayout]) -> tuple[CodeLayout, ...]:
    """The distinct ones of ``layouts``, in one order wherever they stand: by falling widths."""
    return tuple(sorted(set(layouts), key=lambda head: (head.widths, head.norm_index), reverse=True))


def column_shifts() -> torch.Tensor:
    """What precedes each column's bits in its word, int32 ``[4, 16]``, for 1, 2, 4 and 8 columns per word."""
    column = torch.arange(COLUMNS, dtype=torch.int32)
    return torch.stack([column // (COLUMNS // r) * (WORD_BITS // r) for r in (1, 2, 4, 8)]).int()


@dataclass(frozen=True)
class Tables:
    """What kernels of any layout need of a layer. search ``[F]`` float32: the factors of the scale search."""

    row: RowLayout
    k: Side
    v: Side
    search: torch.Tensor
    scale_rule: str

    @property
    def heads(self) -> int:
        return self.row.heads

    @property
    def device(self) -> torch.device:
        return self.search.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return nbytes_of(self)

    def check_rows(self, rows: torch.Tensor) -> None:
        """ValueError unless ``rows`` have this layer's shape."""
        if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != self.row.row_bytes:
            raise ValueError(
                f"rows {tuple(rows.shape)} {rows.dtype}: this layer's rows are [slots, {self.row.row_bytes}] uint8"
            )
        if rows.shape[0] % BLOCK_SLOTS:
            raise ValueError(f"rows {tuple(rows.shape)}: {rows.shape[0]} slots are no multiple of {BLOCK_SLOTS}")
        if not rows.is_contiguous():
            raise ValueError(f"rows with strides {rows.stride()}: a contiguous tensor is needed")


@dataclass(frozen=True)
class ColumnTables(Tables):
    """What the kernels of rows in columns need of one layer, on one device.

    k_templates: the layouts that keys of the model have, k_kinds ``[H]`` int32: which of them each head has,
        k_order ``[H]`` int32: the heads by their templates; v_spec: the values' layout.
    column_shifts: see there. cells: the codebooks as encode looks them up. means: of the keys, if they have any.
    """

    k_plan: EncodePlan
    v_plan: EncodePlan
    cells: Cells
    k_templates: tuple[CodeSpec, ...]
    k_kinds: torch.Tensor
    k_order: torch.Tensor
    v_spec: CodeSpec
    column_shifts: torch.Tensor
    means: MeanTables | None

    @classmethod
    def of(
        cls,
        codec: LayerCodec,
        device: torch.device | str = "cpu",
        templates: tuple[CodeLayout, ...] | None = None,
        positions: int = MAX_POSITIONS,
    ) -> ColumnTables:
        """Build the tables of one layer; once, at start-up.

        positions: how many a request may have; only page means ask.
        templates: layouts that heads of the model have (see :func:`templates_of`), the same for all layers so that
        one binary serves them all; None takes those of this layer. ValueError for rows that are not in columns, for
        more than MAX_TEMPLATES, and if a head has another one.
        """
        row = codec.layout
        templates = templates_of(row.k) if templates is None else templates
        if not row.in_columns:
            raise ValueError("rows that are not in columns are read by any_layout")
        if len(templates) > MAX_TEMPLATES:
            raise ValueError(f"{len(templates)} layouts of keys: kernels have loops for up to {MAX_TEMPLATES}")
        if not set(row.k) <= set(templates):
            raise ValueError("templates: a head of this layer has none of them; all layouts of the model are needed")
        k, v = Side.both(codec)
        kinds = torch.tensor([templates.index(head) for head in row.k], dtype=torch.int32)
        tables = cls(
            row=row,
            k=k,
            v=v,
            search=torch.tensor(codec.scale_search, dtype=torch.float32),
            scale_rule=codec.scale_rule,
            k_plan=EncodePlan.of(row.k, k.weight, k.into),
            v_plan=EncodePlan.of((row.v,) * row.heads, v.weight, v.into),
            cells=Cells.own(),
            k_templates=tuple(map(CodeSpec.of, templates)),
            k_kinds=kinds,
            k_order=kinds.argsort(stable=True).int(),
            v_spec=CodeSpec.of(row.v),
            column_shifts=column_shifts(),
            means=MeanTables.of(codec.mean, positions, k.into) if codec.mean else None,
        )
        return moved(tables, torch.device(device))


def moved(tables: Any, device: torch.device) -> Any:
    """A dataclass of tables with its tensors, those of tables in it included, on ``device``."""
    values = {}
    for name, value in ((f.name, getattr(tables, f.name)) for f in fields(tables)):
        if isinstance(value, torch.Tensor):
            values[name] = value.to(device).contiguous()
        elif is_dataclass(value):
            values[name] = moved(value, device)
    return replace(tables, **values)


def nbytes_of(tables: Any) -> int:
    """Bytes of all tensors in a dataclass of tables."""
    total = 0
    for value in vars(tables).values():
        if isinstance(value, torch.Tensor):
            total += value.nbytes
        elif is_dataclass(value):
            total += nbytes_of(value)
    return total


def difference(tables: Any, others: Any) -> str:
    """Where two dataclasses of tables differ by more than the values of tensors: the field's name, "" for nowhere."""
    for name in (f.name for f in fields(tables)):
        a, b = getattr(tables, name), getattr(others, name)
        if type(a) is not type(b):
            return name
        if isinstance(a, torch.Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return name
        elif is_dataclass(a):
            if inner := difference(a, b):
                return f"{name}.{inner}"
        elif a != b:
            return name
    return ""


def overwrite(tables: Any, others: Any) -> None:
    """Give the tensors of ``tables`` the values of ``others``, from which they have no :func:`difference`."""
    for name in (f.name for f in fields(tables)):
        mine, theirs = getattr(tables, name), getattr(others, name)
        if isinstance(mine, torch.Tensor):
            mine.copy_(theirs)
        elif is_dataclass(mine):
            overwrite(mine, theirs)
