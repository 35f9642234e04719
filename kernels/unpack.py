"""Packed rows back to dense keys and values in Triton, for an attention kernel that reads those.

Twin: :func:`.naive.decode`. Each tile of tokens is decoded to stored channels and turned back by the
head's matrix in one tensor-core product. The alternative, to leave keys and values in stored channels
and turn the query, saves that product (69 GFLOP for 128K tokens and 8 KV heads of 128 channels, where 512
queries of 32 heads take 1100 in attention) and costs more than it: the turned query is rounded to 16
bits (2^-9 of each bf16 channel, on top of the key's own rounding); and prefix and chunk, in different
channels, no longer fit one softmax, so every extend would be two attentions, a merge, and a turn at
either end. Turned back here, a prefix is what a bf16 cache would hold, rounded once, and the query
stays as the model made it.

Rows in columns (``uniform``, ``template``, the others by slots) are read by the kernel in :mod:`.unpack_columns`;
any other by the one in :mod:`.unpack_fields`, which takes every layout as data and is slower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .tables import DeviceTables, SideTables
from .unpack_columns import MAX_CHANNELS, unpack_columns_kernel
from .unpack_fields import unpack_fields_kernel

TOKENS = 64  # per tile: the least that a warpgroup's tensor-core product takes
_TOP_EXPONENT = 14  # of a matrix: far above what float16 rounds absolutely, and below what it holds


@dataclass(frozen=True)
class Tuning:
    """Choices to be measured on a GPU; none changes a result."""

    stages: int = 5  # slots four tiles ahead, words two: the compiler shares the distance between both
    registers: int | None = None  # most of a thread
    max_tiles: int = 16  # per program, which reads the head's matrix once
    programs: int = 132 * 12  # enough to fill the device some times over


TUNING = Tuning()


@dataclass(frozen=True)
class UnpackSide:
    """Keys or values of one layer, as unpacking wants them. H KV heads, P padded channels.

    fields ``[H, F, P]`` int32: the F fields that a code has at most, whatever plane they lie in; from bit 0 up the
        byte within the head's codes (16 bits), the shift in it (3), the position in the code (3) and the mask (8),
        which is 0 where there are fewer. One word, as each word costs a trip through shared memory.
    matrix ``[H, P, P]``, indexed (stored channel, channel): undoes the transform up to ``gain [H]`` float32, a
        power of two that brings the largest entry near 2^14. A channel 2^24 below it still has full precision.
    """

    side: SideTables
    fields: torch.Tensor
    matrix: torch.Tensor
    gain: torch.Tensor

    @classmethod
    def of(cls, side: SideTables, widths: tuple[tuple[int, ...], ...], back: torch.Tensor, half: bool) -> UnpackSide:
        most = back.abs().amax((1, 2))
        gain = torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent - _TOP_EXPONENT)
        matrix = back / gain[:, None, None]
        return cls(
            side=side,
            fields=_channel_fields(side, widths).to(back.device),
            matrix=(matrix.half() if half else matrix).contiguous(),
            gain=gain.contiguous(),
        )

    @property
    def num_fields(self) -> int:
        return self.fields.shape[1]


@dataclass(frozen=True)
class UnpackTables:
    """What :func:`unpack` needs of one layer; made once, at start."""

    tables: DeviceTables
    k: UnpackSide
    v: UnpackSide
    levels: torch.Tensor

    @classmethod
    def of(cls, tables: DeviceTables, half: bool | None = None) -> UnpackTables:
        """half: float16 operands; by default on a GPU, while the interpreter works in float32."""
        half = tables.device.type == "cuda" if half is None else half
        row = tables.row
        return cls(
            tables=tables,
            # q_in undoes k_in when it is transposed, and v_out undoes v_in.
            k=UnpackSide.of(tables.k, tuple(head.widths for head in row.k), tables.k.back.mT, half),
            v=UnpackSide.of(tables.v, (row.v.widths,) * row.heads, tables.v.back, half),
            levels=tables.half_levels if half else tables.levels,
        )


def _channel_fields(side: SideTables, widths: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """``[H, F, P]`` from the planes' tables. A field reaches up to the channel's next one, or to its width."""
    heads = []
    for h, (planes, bits) in enumerate(zip(side.fields.tolist(), widths, strict=True)):
        first_byte = side.offset + h * side.code_bytes
        channels = []
        for c in range(side.padded):
            found = sorted((at[c], byte[c] - first_byte, shift[c]) for byte, shift, at in planes if byte[c] >= 0)
            ends = [at for at, _, _ in found[1:]] + [bits[c] if c < side.dim else 0]
            channels.append(
                [
                    byte | shift << 16 | at << 19 | ((1 << (end - at)) - 1) << 22
                    for (at, byte, shift), end in zip(found, ends, strict=False)
                ]
            )
        heads.append(channels)
    most = max(1, max(len(fields) for channels in heads for fields in channels))
    padded = [[fields + [0] * (most - len(fields)) for fields in channels] for channels in heads]
    return torch.tensor(padded, dtype=torch.int32).mT.contiguous()


def unpack(
    layer: UnpackTables,
    rows: torch.Tensor,
    indices: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    dest: torch.Tensor | None = None,
) -> None:
    """Keys and values of the slots ``indices [N]`` into ``k_out [M, H, D]`` and ``v_out [M, H, Dv]``.

    rows ``[slots, row_bytes]`` uint8; indices, dest: int32 or int64, on the device. Token n goes to place
    ``dest[n]``, or n; the other places stay as they are. k_out and v_out in any float type; float16 saturates.
    ValueError for shapes that are not this layer's.
    """
    tables, k, v = layer.tables, layer.k.side, layer.v.side
    scales = tables.check_rows(rows)
    for name, out, side in (("k_out", k_out, k), ("v_out", v_out, v)):
        if out.shape[1:] != (tables.heads, side.dim) or out.stride(2) != 1:
            raise ValueError(
                f"{name} {tuple(out.shape)} with strides {out.stride()}: [places, {tables.heads}, {side.dim}] "
                "with contiguous channels is needed for these rows"
            )
    num_tokens = indices.shape[0]
    if dest is not None and dest.shape != indices.shape:
        raise ValueError(f"dest {tuple(dest.shape)}: one place for each of {num_tokens} indices is needed")
    if dest is None and min(k_out.shape[0], v_out.shape[0]) < num_tokens:
        raise ValueError(f"k_out and v_out have {k_out.shape[0]} and {v_out.shape[0]} places for {num_tokens} tokens")
    if not num_tokens:
        return
    if tables.v_columns is None:
        _unpack_fields(layer, rows, scales, indices, k_out, v_out, dest)
    else:
        _unpack_columns(layer, rows, indices, k_out, v_out, dest)


def _tiles(num_tokens: int, heads: int) -> tuple[int, int]:
    """(tiles of a program, programs) for one side of one head."""
    blocks = triton.cdiv(num_tokens, TOKENS)
    tiles = max(1, min(TUNING.max_tiles, blocks * heads * 2 // TUNING.programs))
    return tiles, triton.cdiv(blocks, tiles)


def _unpack_columns(
    layer: UnpackTables,
    rows: torch.Tensor,
    indices: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    dest: torch.Tensor | None,
) -> None:
    tables, row = layer.tables, layer.tables.row
    k, v, templates, v_columns = tables.k, tables.v, tables.k_templates, tables.v_columns
    tiles, programs = _tiles(indices.shape[0], tables.heads)
    parts = triton.cdiv(max(k.dim, v.dim), MAX_CHANNELS)
    unpack_columns_kernel[(tables.heads, programs, 2 * parts)](
        rows.view(torch.int16),
        rows.view(torch.int32),
        tables.column_shifts,
        tables.k_kinds if len(templates) > 1 else None,
        indices,
        dest,
        indices.shape[0],
        tiles,
        k_out,
        layer.k.matrix,
        layer.k.gain,
        v_out,
        layer.v.matrix,
        layer.v.gain,
        k_out.stride(0),
        k_out.stride(1),
        v_out.stride(0),
        v_out.stride(1),
        ROW_BYTES=row.row_bytes,
        K_STRIDE=row.k_code_bytes,
        V_STRIDE=row.v_code_bytes,
        V_OFFSET=row.v_offset,
        NORM_OFFSET=row.norm_offset,
        K_BINS=tuple(t.bins for t in templates),
        V_BINS=v_columns.bins,
        K_REPEAT=tuple(t.repeat for t in templates),
        V_REPEAT=v_columns.repeat,
        K_SLOTS=tuple(t.slots for t in templates),
        V_SLOTS=v_columns.slots,
        K_POLY=tuple(t.codebook for t in templates),
        V_POLY=v_columns.codebook,
        K_DIM=k.dim,
        K_PADDED=k.padded,
        V_DIM=v.dim,
        V_PADDED=v.padded,
        TOKENS=TOKENS,
        STAGES=TUNING.stages,
        ASM=rows.is_cuda,
        num_warps=4,
        num_stages=TUNING.stages,
        maxnreg=TUNING.registers,
    )


def _unpack_fields(
    layer: UnpackTables,
    rows: torch.Tensor,
    scales: torch.Tensor,
    indices: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    dest: torch.Tensor | None,
) -> None:
    tables, row = layer.tables, layer.tables.row
    k, v, num_tokens = tables.k, tables.v, indices.shape[0]
    tiles, programs = _tiles(num_tokens, tables.heads)
    unpack_fields_kernel[(tables.heads, programs, 2)](
        rows,
        scales,
        layer.levels,
        tables.places,
        indices,
        dest,
        num_tokens,
        tiles,
        k_out,
        layer.k.fields,
        k.book,
        k.norm_index,
        layer.k.matrix,
        layer.k.gain,
        v_out,
        layer.v.fields,
        v.book,
        v.norm_index,
        layer.v.matrix,
        layer.v.gain,
        row.row_bytes,
        k.code_bytes,
        v.code_bytes,
        v.offset,
        row.norm_offset,
        row.norms,
        v.first_norm,
        k_out.stride(0),
        k_out.stride(1),
        v_out.stride(0),
        v_out.stride(1),
        K_DIM=k.dim,
        K_PADDED=k.padded,
        K_FIELDS=layer.k.num_fields,
        K_NORMS=k.norms,
        V_DIM=v.dim,
        V_PADDED=v.padded,
        V_FIELDS=layer.v.num_fields,
        TOKENS=TOKENS,
        num_warps=8,
        num_stages=1,
    )
