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
from typing import Any

import torch

from .launch import Arguments, Launch
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


class UnpackTask:
    """Which slots are unpacked to where; the same for all layers of a step.

    Slots ``indices [N]`` to ``k_out [M, H, D]`` and ``v_out [M, H, Dv]``, of any float type; float16 saturates.
    indices, dest, chunk_dest: int32 or int64, on the device. Token n goes to place ``dest[n]``, or n; the other
    places stay as they are. chunk: further tokens, which come with their keys and values and are copied, to places
    ``chunk_dest``, or N and on. ValueError for shapes that do not fit each other.
    """

    def __init__(
        self,
        indices: torch.Tensor,
        k_out: torch.Tensor,
        v_out: torch.Tensor,
        dest: torch.Tensor | None = None,
        chunk: int = 0,
        chunk_dest: torch.Tensor | None = None,
    ):
        tokens = indices.shape[0]
        for name, out in (("k_out", k_out), ("v_out", v_out)):
            if out.dim() != 3 or out.stride(2) != 1 or out.shape[1] != k_out.shape[1]:
                raise ValueError(
                    f"{name} {tuple(out.shape)} with strides {out.stride()}: [places, heads, channels] with "
                    "contiguous channels is needed"
                )
        for name, to, count in (("dest", dest, tokens), ("chunk_dest", chunk_dest, chunk)):
            if to is not None and to.shape != (count,):
                raise ValueError(f"{name} {tuple(to.shape)}: one place for each of {count} tokens is needed")
        needed = max(tokens if dest is None else 0, tokens + chunk if chunk and chunk_dest is None else 0)
        if min(k_out.shape[0], v_out.shape[0]) < needed:
            raise ValueError(f"k_out and v_out have {k_out.shape[0]} and {v_out.shape[0]} places for {needed} tokens")
        self.tokens, self.chunk, self.dtypes = tokens, chunk, (k_out.dtype, v_out.dtype)
        self.shapes = tuple(k_out.shape[1:]), tuple(v_out.shape[1:])
        tiles, programs = _tiles(tokens, k_out.shape[1])
        self.programs = programs + -(-chunk // TOKENS)
        self._values = {
            "indices": indices,
            "dest": dest,
            "num_tokens": tokens,
            "tiles": tiles,
            "programs": programs,
            "chunk_dest": chunk_dest,
            "chunk_tokens": chunk,
            "k_out": k_out,
            "v_out": v_out,
            "stride_kt": k_out.stride(0),
            "stride_kh": k_out.stride(1),
            "stride_vt": v_out.stride(0),
            "stride_vh": v_out.stride(1),
        }
        self._arguments: dict[Any, Arguments] = {}

    def arguments(self, kernel: Any) -> Arguments:
        """For one of the two kernels."""
        found = self._arguments.get(kernel)
        if found is None:
            found = self._arguments[kernel] = Arguments(kernel, **self._values)
        return found


class Unpacker:
    """Unpacks one layer's rows: ``rows [slots, row_bytes]`` uint8, kept. ValueError unless they are this layer's."""

    def __init__(self, layer: UnpackTables, rows: torch.Tensor):
        self.rows = rows
        scales = layer.tables.check_rows(rows)
        if layer.tables.v_columns is None:
            self._parts, self._launch = 1, _launch_fields(layer, rows, scales)
        else:
            widest = max(layer.tables.k.dim, layer.tables.v.dim)
            self._parts, self._launch = -(-widest // MAX_CHANNELS), _launch_columns(layer, rows)
        heads = layer.tables.heads
        self._shapes = (heads, layer.tables.k.dim), (heads, layer.tables.v.dim)

    def __call__(self, task: UnpackTask, k: torch.Tensor | None = None, v: torch.Tensor | None = None) -> None:
        """k ``[T, H, D]``, v ``[T, H, Dv]``: of the task's chunk, in its dtypes, any strides but contiguous channels.

        ValueError for shapes that are not this layer's.
        """
        if task.shapes != self._shapes:
            raise ValueError(f"k_out and v_out of {task.shapes}: {self._shapes} is needed for these rows")
        stride_kt = stride_kh = stride_vt = stride_vh = 0
        if task.chunk:
            stride_kt, stride_kh = self._chunk_strides(task, "k", k, 0)
            stride_vt, stride_vh = self._chunk_strides(task, "v", v, 1)
        elif not task.tokens:
            return
        self._launch(
            (self._shapes[0][0], task.programs, 2 * self._parts),
            task.arguments(self._launch.kernel),
            chunk_k=k,
            chunk_v=v,
            stride_ckt=stride_kt,
            stride_ckh=stride_kh,
            stride_cvt=stride_vt,
            stride_cvh=stride_vh,
        )

    def _chunk_strides(self, task: UnpackTask, name: str, x: torch.Tensor, side: int) -> tuple[int, int]:
        *strides, channel = x.stride()
        if x.shape != (task.chunk, *self._shapes[side]) or channel != 1 or x.dtype != task.dtypes[side]:
            raise ValueError(
                f"{name} of the chunk {tuple(x.shape)} {x.dtype} with strides {x.stride()}: "
                f"{(task.chunk, *self._shapes[side])} {task.dtypes[side]} with contiguous channels is needed"
            )
        return strides


def unpack(
    layer: UnpackTables,
    rows: torch.Tensor,
    indices: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    dest: torch.Tensor | None = None,
    chunk: tuple[torch.Tensor, torch.Tensor] | None = None,
    chunk_dest: torch.Tensor | None = None,
) -> None:
    """A task (see there) for one layer. chunk: its keys and values."""
    task = UnpackTask(indices, k_out, v_out, dest, len(chunk[0]) if chunk else 0, chunk_dest)
    Unpacker(layer, rows)(task, *(chunk or ()))


def _tiles(num_tokens: int, heads: int) -> tuple[int, int]:
    """(tiles of a program, programs) for one side of one head."""
    blocks = -(-num_tokens // TOKENS)
    tiles = max(1, min(TUNING.max_tiles, blocks * heads * 2 // TUNING.programs))
    return tiles, -(-blocks // tiles)


def _launch_columns(layer: UnpackTables, rows: torch.Tensor) -> Launch:
    tables, row = layer.tables, layer.tables.row
    k, v, templates, v_columns = tables.k, tables.v, tables.k_templates, tables.v_columns
    return Launch(
        unpack_columns_kernel,
        rows16=rows.view(torch.int16),
        rows32=rows.view(torch.int32),
        column_shifts=tables.column_shifts,
        k_kinds=tables.k_kinds if len(templates) > 1 else None,
        k_matrix=layer.k.matrix,
        k_gain=layer.k.gain,
        v_matrix=layer.v.matrix,
        v_gain=layer.v.gain,
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


def _launch_fields(layer: UnpackTables, rows: torch.Tensor, scales: torch.Tensor) -> Launch:
    tables, row = layer.tables, layer.tables.row
    k, v = tables.k, tables.v
    return Launch(
        unpack_fields_kernel,
        rows=rows,
        scales=scales,
        levels=layer.levels,
        places=tables.places,
        k_fields=layer.k.fields,
        k_book=k.book,
        k_norm_index=k.norm_index,
        k_matrix=layer.k.matrix,
        k_gain=layer.k.gain,
        v_fields=layer.v.fields,
        v_book=v.book,
        v_norm_index=v.norm_index,
        v_matrix=layer.v.matrix,
        v_gain=layer.v.gain,
        row_bytes=row.row_bytes,
        k_code_bytes=k.code_bytes,
        v_code_bytes=v.code_bytes,
        v_offset=v.offset,
        norm_offset=row.norm_offset,
        row_norms=row.norms,
        v_first_norm=v.first_norm,
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
