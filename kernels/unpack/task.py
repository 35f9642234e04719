"""What is unpacked, and the matrices that undo a layer's transform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..device.launch import Arguments

TOKENS = 64  # per tile: the least that a warpgroup's tensor-core product takes
MAX_TILES = 16  # per program, which reads the head's matrix once
PROGRAMS = 132 * 12  # enough to fill the device some times over
_TOP_EXPONENT = 14  # of a matrix: far above what float16 rounds absolutely, and below what it holds


@dataclass(frozen=True)
class UnpackMatrix:
    """Keys or values of one layer. H KV heads, P padded channels.

    matrix ``[H, P, P]``, indexed (stored channel, channel): undoes the transform up to ``gain [H]`` float32, a
        power of two that brings the largest entry near 2^14. A channel 2^24 below it still has full precision.
    """

    matrix: torch.Tensor
    gain: torch.Tensor

    @classmethod
    def of(cls, back: torch.Tensor) -> UnpackMatrix:
        """Of a matrix ``[H, P, P]`` float32; in float16 on a GPU, while the interpreter works in float32."""
        most = back.abs().amax((1, 2))
        gain = torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent - _TOP_EXPONENT)
        matrix = back / gain[:, None, None]
        return cls((matrix.half() if back.is_cuda else matrix).contiguous(), gain.contiguous())


class UnpackTask:
    """Which slots are unpacked to where; the same for all layers of a step.

    Slots ``indices [N]`` to ``k_out [M, H, D]`` and ``v_out [M, H, Dv]``, of any float type; float16 saturates.
    indices, dest, positions, chunk_dest: int32 or int64, on the device. Token n goes to place ``dest[n]``, or n; the
    other places stay as they are. positions ``[N]``: the tokens', where keys have page means. chunk: further tokens,
    which come with their keys and values and are copied, to places ``chunk_dest``, or N and on. ValueError for shapes
    that do not fit each other.
    """

    def __init__(
        self,
        indices: torch.Tensor,
        k_out: torch.Tensor,
        v_out: torch.Tensor,
        dest: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
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
        given = ("dest", dest, tokens), ("positions", positions, tokens), ("chunk_dest", chunk_dest, chunk)
        for name, to, count in given:
            if to is not None and to.shape != (count,):
                raise ValueError(f"{name} {tuple(to.shape)}: one for each of {count} tokens is needed")
        needed = max(tokens if dest is None else 0, tokens + chunk if chunk and chunk_dest is None else 0)
        if min(k_out.shape[0], v_out.shape[0]) < needed:
            raise ValueError(f"k_out and v_out have {k_out.shape[0]} and {v_out.shape[0]} places for {needed} tokens")
        self.tokens, self.chunk, self.dtypes = tokens, chunk, (k_out.dtype, v_out.dtype)
        self.has_positions = positions is not None
        self.shapes = tuple(k_out.shape[1:]), tuple(v_out.shape[1:])
        tiles, programs = _tiles(tokens, k_out.shape[1])
        self.programs = programs + -(-chunk // TOKENS)
        self._values = {
            "indices": indices,
            "dest": dest,
            "positions": positions,
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
        """For the kernel of some layers."""
        found = self._arguments.get(kernel)
        if found is None:
            taken = {name: value for name, value in self._values.items() if name in kernel.arg_names}
            found = self._arguments[kernel] = Arguments(kernel, **taken)
        return found


def _tiles(num_tokens: int, heads: int) -> tuple[int, int]:
    """(tiles of a program, programs) for one side of one head."""
    blocks = -(-num_tokens // TOKENS)
    tiles = max(1, min(MAX_TILES, blocks * heads * 2 // PROGRAMS))
    return tiles, -(-blocks // tiles)
