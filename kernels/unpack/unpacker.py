"""Packed rows back to dense keys and values in Triton, for an attention kernel that reads those.

Definition: :func:`..reference.decode`. Each tile of tokens is decoded to stored channels and rotated back by the
head's matrix in one tensor-core product. The alternative, to leave keys and values in stored channels
and rotate the query, saves that product (69 GFLOP for 128K tokens and 8 KV heads of 128 channels, where 512
queries of 32 heads take 1100 in attention) and costs more than it: the rotated query is rounded to 16
bits (2^-9 of each bf16 channel, on top of the key's own rounding); and prefix and chunk, in different
channels, no longer fit one softmax, so every extend would be two attentions, a merge, and a rotation at
either end. Rotated back here, a prefix is what a bf16 cache would hold, rounded once, and the query
stays as the model made it.
"""

from __future__ import annotations

import torch

from ..any_layout.tables import AnyTables
from ..any_layout.unpack import launch_any
from ..device.launch import Launch
from ..device.tables import ColumnTables
from .kernel import MAX_CHANNELS, unpack_columns_kernel
from .task import TOKENS, UnpackMatrix, UnpackTask

STAGES = 5  # slots four tiles ahead, words two: the compiler shares the distance between both
REGISTERS = 128  # of a thread, so that four programs fit a multiprocessor


class Unpacker:
    """Unpacks one layer's rows, from when they are bound."""

    def __init__(self, tables: ColumnTables | AnyTables):
        self.tables = tables
        # q_in undoes k_in when it is transposed, and v_out undoes v_in.
        self.k, self.v = UnpackMatrix.of(tables.k.back.mT), UnpackMatrix.of(tables.v.back)
        self._shapes = (tables.heads, tables.k.dim), (tables.heads, tables.v.dim)
        self._needs_positions = isinstance(tables, ColumnTables) and tables.means is not None

    def bind(self, rows: torch.Tensor) -> Unpacker:
        """Unpack ``rows [slots, row_bytes]`` uint8 from now on. ValueError unless they are this layer's."""
        self.tables.check_rows(rows)
        if isinstance(self.tables, AnyTables):
            self._parts, self._launch = 1, launch_any(self.tables, self.k, self.v, rows)
        else:
            widest = max(self.tables.k.dim, self.tables.v.dim)
            self._parts, self._launch = -(-widest // MAX_CHANNELS), _launch_columns(self.tables, self.k, self.v, rows)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        return self.k.matrix.nbytes + self.v.matrix.nbytes

    def unbind(self) -> None:
        """Let go of the rows."""
        del self._launch

    def __call__(self, task: UnpackTask, k: torch.Tensor | None = None, v: torch.Tensor | None = None) -> None:
        """k ``[T, H, D]``, v ``[T, H, Dv]``: of the task's chunk, in its dtypes, any strides but contiguous channels.

        ValueError for shapes that are not this layer's.
        """
        if task.shapes != self._shapes:
            raise ValueError(f"k_out and v_out of {task.shapes}: {self._shapes} is needed for these rows")
        if self._needs_positions and task.tokens and not task.has_positions:
            raise ValueError("positions: needed, since keys are less the means of their pages")
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

    def _chunk_strides(self, task: UnpackTask, name: str, x: torch.Tensor | None, side: int) -> tuple[int, int]:
        shape, dtype = (task.chunk, *self._shapes[side]), task.dtypes[side]
        if x is None or x.shape != shape or x.stride(2) != 1 or x.dtype != dtype:
            found = x if x is None else f"{tuple(x.shape)} {x.dtype} with strides {x.stride()}"
            raise ValueError(f"{name} of the chunk {found}: {shape} {dtype} with contiguous channels is needed")
        return x.stride(0), x.stride(1)


def _launch_columns(tables: ColumnTables, k: UnpackMatrix, v: UnpackMatrix, rows: torch.Tensor) -> Launch:
    row, templates, v_spec, means = tables.row, tables.k_templates, tables.v_spec, tables.means
    return Launch(
        unpack_columns_kernel,
        turns=means and means.turns,
        mean_vectors=means and means.vectors,
        block_of=means and means.block_of,
        PAGE=means.page if means else 0,
        rows16=rows.view(torch.int16),
        rows32=rows.view(torch.int32),
        column_shifts=tables.column_shifts,
        k_kinds=tables.k_kinds if len(templates) > 1 else None,
        k_matrix=k.matrix,
        k_gain=k.gain,
        v_matrix=v.matrix,
        v_gain=v.gain,
        ROW_BYTES=row.row_bytes,
        K_STRIDE=row.k_code_bytes,
        V_STRIDE=row.v_code_bytes,
        V_OFFSET=row.v_offset,
        NORM_OFFSET=row.norm_offset,
        K_BINS=tuple(t.bins for t in templates),
        V_BINS=v_spec.bins,
        K_REPEAT=tuple(t.repeat for t in templates),
        V_REPEAT=v_spec.repeat,
        K_SEGMENTS=tuple(t.segments for t in templates),
        V_SEGMENTS=v_spec.segments,
        K_POLY=tuple(t.codebook for t in templates),
        V_POLY=v_spec.codebook,
        K_DIM=tables.k.dim,
        K_PADDED=tables.k.padded,
        V_DIM=tables.v.dim,
        V_PADDED=tables.v.padded,
        TOKENS=TOKENS,
        STAGES=STAGES,
        ASM=rows.is_cuda,
        num_warps=4,
        num_stages=STAGES,
        maxnreg=REGISTERS,
    )
