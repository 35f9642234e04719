"""A LayerCodec flattened into tensors, so that Triton kernels take its layout as data.

Only what decides the shape of the program (padded sizes, which planes exist, number of scales,
widest code) is a compile-time constant: one binary serves every head, and every layer of the
same static structure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

from .codebook import MAX_LEVELS, codebook_table, polynomial
from .codec import LayerCodec
from .columns import COLUMNS, WORD_BITS
from .layout import BLOCK_SLOTS, NORM_BYTES, PLANES, CodeLayout, RowLayout
from .plan import Cells, EncodePlan, split_bfloat16

MIN_PADDED = 16  # the shortest side of a tensor-core dot
MAX_TEMPLATES = 4  # layouts in columns that a model's keys may have: the fast kernels have a loop for each


def padded_dim(dim: int) -> int:
    """The power of two that a kernel's channel axis has."""
    return max(MIN_PADDED, 1 << (dim - 1).bit_length())


def _pad_channels(x: torch.Tensor, padded: int, value: float = 0) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, padded - x.shape[-1]), value=value)


def _pad_matrix(matrix: torch.Tensor, padded: int) -> torch.Tensor:
    """``[H, out, in]`` to ``[H, P, P]`` indexed (in, out): a kernel then reads rows of outputs."""
    dim = matrix.shape[-1]
    return torch.nn.functional.pad(matrix.mT, (0, padded - dim, 0, padded - dim)).contiguous()


@dataclass(frozen=True)
class SideTables:
    """Keys or values of one layer. H KV heads, P = ``padded`` channels.

    fields ``[H, 4, 3, P]`` int32: per plane (layout.PLANES) each channel's byte within the row, shift
        in that byte and position in the code; byte -1 where the channel has no field.
    book ``[H, P]`` int32: start of the channel's codebook in the flattened levels, ``256 * width``.
    norm_index ``[H, P]`` int32: which of the head's scales; -1 for channels that are not stored.
    weight ``[H, P]`` float32: weight in the scale rule, 0 for channels that are not stored.
    into ``[H, P, P]`` float32: channel to stored channel, indexed (in, out): ``k_in`` or ``v_in``.
    back ``[H, P, P]`` float32: the matrix of the reading side, indexed (in, out): ``q_in`` or ``v_out``.
    back_pieces ``[H, 2, P, P]`` bfloat16: the same, (out, in), as a sum of two, for bfloat16 queries.
    plan: what encode needs besides.
    """

    fields: torch.Tensor
    book: torch.Tensor
    norm_index: torch.Tensor
    weight: torch.Tensor
    into: torch.Tensor
    back: torch.Tensor
    back_pieces: torch.Tensor
    plan: EncodePlan
    dim: int
    padded: int
    norms: int  # scales per head on this side
    first_norm: int  # index of the side's first scale among the head's
    code_bytes: int  # per head
    offset: int  # first byte of head 0 within the row
    masks: tuple[int, ...]  # per plane the mask of its field, 0 where no channel has one

    @classmethod
    def of(
        cls,
        layouts: tuple[CodeLayout, ...],
        weight: torch.Tensor,
        into: torch.Tensor,
        back: torch.Tensor,
        *,
        norms: int,
        first_norm: int,
        code_bytes: int,
        offset: int,
        cells: Cells,
        in_columns: bool,
    ) -> SideTables:
        dim = layouts[0].dim
        padded = padded_dim(dim)
        absent = torch.tensor([-1, 0, 0], dtype=torch.int32)
        fields = absent[:, None].repeat(len(layouts), len(PLANES), 1, padded)
        for h, layout in enumerate(layouts):
            for p, (name, _) in enumerate(PLANES):
                table = torch.tensor(layout.field_table[name], dtype=torch.int32).T
                table[0] += torch.where(table[0] >= 0, offset + h * code_bytes, 0).int()
                fields[h, p, :, :dim] = table
        widths = torch.tensor([layout.widths for layout in layouts], dtype=torch.int32)
        index = torch.tensor([layout.norm_index for layout in layouts], dtype=torch.int32)
        used = {name for p, (name, _) in enumerate(PLANES) if bool((fields[:, p, 0] >= 0).any())}
        index = _pad_channels(index.masked_fill(widths == 0, -1), padded, -1)
        weight = _pad_channels(weight.float().cpu() * (widths > 0), padded)
        into, back = _pad_matrix(into.cpu(), padded), _pad_matrix(back.cpu(), padded)
        return cls(
            fields=fields,
            book=_pad_channels(widths * MAX_LEVELS, padded),
            norm_index=index,
            weight=weight,
            into=into,
            back=back,
            back_pieces=split_bfloat16(back),
            plan=EncodePlan.of(
                layouts, weight, index, into, norms=norms, code_bytes=code_bytes, cells=cells, in_columns=in_columns
            ),
            dim=dim,
            padded=padded,
            norms=norms,
            first_norm=first_norm,
            code_bytes=code_bytes,
            offset=offset,
            masks=tuple((1 << width) - 1 if name in used else 0 for name, width in PLANES),
        )


@dataclass(frozen=True)
class ColumnTables:
    """The static structure of rows in columns, for kernels that are compiled for it. One side: keys or values.

    bins: per bin (byte within a head's codes, words, log2 of the columns per word). repeat: columns per word.
    slots: per slot the pieces, (bin, shift, width, position) after one another. codebook: per slot its polynomial.
    slope: per slot its leading coefficient. poly: the polynomial over that, and empty where it is linear.
    """

    bins: tuple[tuple[int, int, int], ...]
    repeat: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]
    codebook: tuple[tuple[float, ...], ...]
    poly: tuple[tuple[float, ...], ...]
    slope: tuple[float, ...]

    @property
    def value_poly(self) -> tuple[tuple[float, ...], ...]:
        """poly as decode takes that of values: linear slots beside others are centred, too, since the sum of weights
        that would undo their offset is kept for all slots or for none."""
        return self.poly if not any(self.poly) else tuple(p or (1.0,) for p in self.poly)

    @classmethod
    def of(cls, layout: CodeLayout) -> ColumnTables:
        columns = layout.columns
        polys = [polynomial(bits) for bits in columns.widths]
        return cls(
            bins=tuple((b.offset, b.words, b.repeat.bit_length() - 1) for b in columns.bins),
            repeat=tuple(b.repeat for b in columns.bins),
            slots=tuple(
                tuple(x for p in pieces for x in (p.bin, p.shift, p.width, p.position)) for pieces in columns.slots
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
class DeviceTables:
    """What the Triton kernels need to encode and read one layer, on one device.

    levels ``[9, 256]`` float32; half_levels the levels in float16, for tensor-core dots.
    k_templates: the templates that keys of the model have, k_kinds ``[H]`` int32: which of them each head has,
        k_order ``[H]`` int32: the heads by their templates;
        v_columns: the values'. For rows in columns with the project's own codebooks, else () and None.
    column_shifts: see there.
    places ``[2, row_bytes]`` int32: RowLayout.places().
    search ``[F]`` float32: the factors of the scale search. cells: the codebooks as encode looks them up.
    """

    row: RowLayout
    k: SideTables
    v: SideTables
    levels: torch.Tensor
    half_levels: torch.Tensor
    search: torch.Tensor
    cells: Cells
    scale_rule: str
    k_templates: tuple[ColumnTables, ...]
    k_kinds: torch.Tensor
    k_order: torch.Tensor
    v_columns: ColumnTables | None
    column_shifts: torch.Tensor
    places: torch.Tensor

    @property
    def heads(self) -> int:
        return self.row.heads

    @property
    def device(self) -> torch.device:
        return self.levels.device

    @classmethod
    def of(
        cls,
        codec: LayerCodec,
        device: torch.device | str | None = None,
        templates: tuple[CodeLayout, ...] | None = None,
    ) -> DeviceTables:
        """Build the tables of one layer; once, at start-up. ``device`` defaults to the codec's.

        templates: layouts that heads of the model have (see :func:`templates_of`), the same for all layers so that
        one binary serves them all; None takes those of this layer. ValueError if a head has another one.
        """
        row, device = codec.layout, codec.levels.device if device is None else torch.device(device)
        heads = row.heads
        cells = Cells.of(codec.levels)
        own_book = torch.allclose(codec.levels.float().cpu(), codebook_table(), rtol=0, atol=1e-5)
        templates = templates_of(row.k) if templates is None else templates
        fits = len(templates) <= MAX_TEMPLATES and all(head.columns is not None for head in templates)
        regular = own_book and row.in_columns and fits
        if regular and not set(row.k) <= set(templates):
            raise ValueError("templates: a head of this layer has none of them; all layouts of the model are needed")
        k = SideTables.of(
            row.k,
            codec.k_weight,
            codec.k_in,
            codec.q_in,
            norms=row.k_norms,
            first_norm=0,
            code_bytes=row.k_code_bytes,
            offset=0,
            cells=cells,
            in_columns=row.in_columns,
        )
        v = SideTables.of(
            (row.v,) * heads,
            torch.ones(heads, row.v.dim),
            codec.v_in,
            codec.v_out,
            norms=1,
            first_norm=row.k_norms,
            code_bytes=row.v_code_bytes,
            offset=row.v_offset,
            cells=cells,
            in_columns=row.in_columns,
        )
        kinds = torch.tensor([templates.index(head) if regular else 0 for head in row.k], dtype=torch.int32)
        return cls(
            row=row,
            k=_moved(k, device),
            v=_moved(v, device),
            levels=codec.levels.float().to(device).contiguous(),
            half_levels=codec.levels.to(device, torch.float16).contiguous(),
            search=torch.tensor(codec.scale_search, dtype=torch.float32, device=device),
            cells=_moved(cells, device),
            scale_rule=codec.scale_rule,
            k_templates=tuple(map(ColumnTables.of, templates)) if regular else (),
            k_kinds=kinds.to(device),
            k_order=kinds.argsort(stable=True).int().to(device),
            v_columns=ColumnTables.of(row.v) if regular else None,
            column_shifts=column_shifts().to(device),
            places=row.places().to(device),
        )

    def check_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` seen as float16 ``[slots, row_bytes / 2]``. ValueError unless they have this layer's shape."""
        if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != self.row.row_bytes:
            raise ValueError(
                f"rows {tuple(rows.shape)} {rows.dtype}: this layer's rows are [slots, {self.row.row_bytes}] uint8"
            )
        if rows.shape[0] % BLOCK_SLOTS:
            raise ValueError(f"rows {tuple(rows.shape)}: {rows.shape[0]} slots are no multiple of {BLOCK_SLOTS}")
        if not rows.is_contiguous():
            raise ValueError(f"rows with strides {rows.stride()}: a contiguous tensor is needed")
        assert self.row.row_bytes % NORM_BYTES == 0 and self.row.norm_offset % NORM_BYTES == 0
        return rows.view(torch.float16)


def _moved(tables: Any, device: torch.device) -> Any:
    """A dataclass of tables with its tensors, those of tables in it included, on ``device``."""
    values = dict(vars(tables))
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = value.to(device).contiguous()
        elif is_dataclass(value):
            values[name] = _moved(value, device)
    return type(tables)(**values)
