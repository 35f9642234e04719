"""Codes in columns to levels by table: a column's bits are an index, and levels of several segments come at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..format.codebook import codebook_table
from ..format.codec import LayerCodec
from ..format.columns import COLUMNS, WORD_BITS, Bin, Columns
from ..format.layout import CodeLayout
from ..terms import PLAIN, Terms

#: Columns as the bytes of a narrow bin have them: low and high byte of each word, lowest bits of all bytes first.
_BY_BYTES = torch.arange(COLUMNS).view(2, -1).T.flatten()
_TYPES = {4: torch.complex128, 2: torch.complex64, 1: torch.float32}  # of as many levels, which are copied as one


@dataclass(frozen=True)
class _Lookup:
    """Levels of some segments.

    fields: (bin, shift, bits) of a column, put one above the other: the index. order ``[16]``: which column is where.
    tables: one of each power of two of segments, ``[2^bits]`` of a type that holds as many float32.
    """

    segments: tuple[int, ...]
    fields: tuple[tuple[int, int, int], ...]
    order: torch.Tensor
    tables: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, columns: Columns, segments: tuple[int, ...], fields: tuple[tuple[int, int, int], ...]) -> _Lookup:
        index = torch.arange(1 << sum(bits for _, _, bits in fields))
        parts, at = {}, 0
        for field in fields:
            parts[field], at = index >> at & (1 << field[2]) - 1, at + field[2]
        levels = []
        for s in segments:
            code = torch.zeros_like(index)
            for p in columns.segments[s]:
                (mine,) = (f for f in fields if f[0] == p.bin and f[1] <= p.shift and p.shift + p.width <= f[1] + f[2])
                code |= (parts[mine] >> p.shift - mine[1] & (1 << p.width) - 1) << p.position
            levels.append(codebook_table()[columns.widths[s]][code])
        tables, at = [], 0
        while at < len(segments):
            size = next(n for n in _TYPES if n <= len(segments) - at)
            together = torch.stack(levels[at : at + size], -1).contiguous()
            tables.append(together.view(torch.float32).flatten() if size == 1 else _joined(together, size))
            at += size
        wide = any(columns.bins[b].bits == WORD_BITS for b, _, _ in fields)
        return cls(segments, fields, torch.arange(COLUMNS) if wide else _BY_BYTES, tuple(tables))


def _joined(levels: torch.Tensor, size: int) -> torch.Tensor:
    """float32 ``[n, size]`` as ``[n]`` elements of as many bytes."""
    pairs = levels.view(torch.float64).view(-1, 2) if size == 4 else levels
    return torch.view_as_complex(pairs.contiguous())


def _lookups(columns: Columns) -> list[_Lookup]:
    """As few as may be: narrow bins together, a bin of 16 bits by itself, a code that is cut between these alone."""
    narrow = {b for b, where in enumerate(columns.bins) if where.bits < WORD_BITS}
    groups = [{b} for b in range(len(columns.bins)) if b not in narrow] + ([narrow] if narrow else [])
    used = [{p.bin for p in pieces} for pieces in columns.segments]
    out = []
    for group in groups:
        inside = tuple(s for s, bins in enumerate(used) if bins <= group)
        if inside:
            every = tuple((b, 0, columns.bins[b].bits) for b in sorted(group))
            out.append(_Lookup.of(columns, inside, every))
    for s, pieces in enumerate(columns.segments):
        if not any(used[s] <= group for group in groups):
            out.append(_Lookup.of(columns, (s,), tuple((p.bin, p.shift, p.width) for p in pieces)))
    return out


class Dequantizer:
    """Codes of heads of one layout to levels, in an order of channels of its own.

    order ``[D]``: the stored channel that each of them is.
    """

    def __init__(self, layout: CodeLayout):
        columns = layout.require_columns()
        self.bins, self.lookups = columns.bins, _lookups(columns)
        parts = []
        for lookup in self.lookups:
            left = list(lookup.segments)
            for table in lookup.tables:
                count = table.element_size() // 4
                taken, left = torch.tensor(left[:count]), left[count:]
                parts.append((taken * COLUMNS + lookup.order[:, None]).flatten())
        self.order = torch.cat(parts)

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """codes ``[N, H, code_bytes]`` uint8 to levels ``[N, H, D]`` float32."""
        out = []
        for lookup in self.lookups:
            index = self._index(codes, lookup)
            for table in lookup.tables:
                levels = table.index_select(0, index.flatten()).view(torch.float32)
                out.append(levels.view(*codes.shape[:2], COLUMNS * table.element_size() // 4))
        return out[0] if len(out) == 1 else torch.cat(out, -1)

    def _index(self, codes: torch.Tensor, lookup: _Lookup) -> torch.Tensor:
        """Of every column, in the lookup's order, ``[N, H, 16]`` int32."""
        parts = [self._part(codes, lookup, *field) for field in lookup.fields]
        if len(parts) == 2 and all(part.dtype == torch.uint8 for part in parts) and lookup.fields[0][2] == 8:
            return torch.stack(parts, -1).view(torch.int16).squeeze(-1).int()  # one byte above the other
        index, at = parts[0].int(), lookup.fields[0][2]
        for part, (_, _, bits) in zip(parts[1:], lookup.fields[1:], strict=True):
            index, at = index | part.int() << at, at + bits
        return index

    def _part(self, codes: torch.Tensor, lookup: _Lookup, b: int, shift: int, bits: int) -> torch.Tensor:
        """A field of every column, uint8 or int32."""
        part = _column(codes, self.bins[b])
        if lookup.order is not _BY_BYTES and self.bins[b].bits < WORD_BITS:
            part = part[..., _BY_BYTES.argsort()]
        part = part.int() if self.bins[b].bits == WORD_BITS else part  # words are signed
        part = part >> shift if shift else part
        return part & (1 << bits) - 1 if bits < self.bins[b].bits or bits == WORD_BITS else part


def _column(codes: torch.Tensor, where: Bin) -> torch.Tensor:
    """Each column's bits of a bin ``[N, H, 16]``: int16 in order, or uint8 in that of _BY_BYTES."""
    mine = codes[..., where.offset : where.offset + where.num_bytes].contiguous()
    if where.bits == WORD_BITS:
        return mine.view(torch.int16)
    if where.bits == 8:
        return mine
    mask = (1 << where.bits) - 1
    return torch.cat([mine >> shift & mask for shift in range(0, 8, where.bits)], -1)


class HostReader:
    """Reads the rows of one layer. H KV heads, G query heads for each, D and Dv channels."""

    def __init__(self, codec: LayerCodec):
        row = self.layout = codec.layout
        self.mean = codec.mean
        kinds = {layout: [h for h in range(row.heads) if row.k[h] == layout] for layout in row.k}
        self.k = [(heads, Dequantizer(layout)) for layout, heads in kinds.items()]
        self.v = Dequantizer(row.v)
        self.q_in, self.v_out = torch.empty_like(codec.q_in), codec.v_out[..., self.v.order].contiguous()
        for heads, dequantizer in self.k:
            self.q_in[heads] = codec.q_in[heads][:, dequantizer.order]

    def levels(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows ``[N, row_bytes]`` to levels of K ``[N, H, D]``, V ``[N, H, Dv]`` and scales ``[N, H, 2]``, float32."""
        row = self.layout
        k_codes = rows[:, : row.v_offset].unflatten(1, (row.heads, row.k_code_bytes))
        v_end = row.v_offset + row.heads * row.v_code_bytes
        v = self.v(rows[:, row.v_offset : v_end].unflatten(1, (row.heads, row.v_code_bytes)))
        if len(self.k) == 1:
            k = self.k[0][1](k_codes)
        else:
            k = rows.new_empty(len(rows), row.heads, row.k[0].dim, dtype=torch.float32)
            for heads, dequantizer in self.k:
                k[:, heads] = dequantizer(k_codes[:, heads])
        scales = rows[:, row.norm_offset : row.pad_offset].contiguous().view(torch.float16).float()
        return k, v, scales.unflatten(1, (row.heads, 2))

    def dense(self, rows: torch.Tensor, positions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows to keys ``[N, H, D]`` and values ``[N, H, Dv]`` float32, as :func:`..reference.decode` has them."""
        k, v, scales = self.levels(rows)
        k, v = k * scales[..., :1], v * scales[..., 1:]
        k, v = torch.einsum("the,hed->thd", k, self.q_in), torch.einsum("the,hde->thd", v, self.v_out)
        if self.mean is not None:
            k += torch.where(scales[..., :1] < 0, self.mean.at(positions), 0.0)
        return k, v

    def attend(self, q: torch.Tensor, rows: torch.Tensor, sm_scale: float, terms: Terms = PLAIN) -> torch.Tensor:
        """One query ``q [Hq, D]`` over its rows ``[N, row_bytes]``, from position 0, its own the last: ``[Hq, Dv]``
        float32."""
        out, lse = self.attend_with_lse(q, rows, sm_scale, terms)
        return terms.with_sinks(out, lse) if terms.sinks is not None else out

    def attend_with_lse(
        self, q: torch.Tensor, rows: torch.Tensor, sm_scale: float, terms: Terms = PLAIN
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same without sinks, and the log-sum-exp ``[Hq]``."""
        start = max(len(rows) - terms.window, 0) if terms.window else 0
        k, v, scales = self.levels(rows[start:])
        k_scale, v_scale = scales.permute(2, 1, 0)[:, :, None]  # [H, 1, N]
        q = q.float().unflatten(0, (self.layout.heads, -1)) * sm_scale
        logits = q @ self.q_in.mT @ k.permute(1, 2, 0) * k_scale
        if self.mean is not None:
            means = self.mean.first_pages(-(-len(rows) // self.mean.page)).permute(1, 2, 0)
            bias = (q @ means).repeat_interleave(self.mean.page, -1)[..., start : len(rows)]
            logits += torch.where(k_scale < 0, bias, 0.0)
        logits = terms.capped(logits)
        out = ((logits.softmax(-1) * v_scale) @ v.transpose(0, 1) @ self.v_out.mT).flatten(0, 1)
        return out, logits.logsumexp(-1).flatten()
