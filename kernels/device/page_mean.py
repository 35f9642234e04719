"""Page means on a device: a key's mean where it is encoded, the query's part in it where it is read.

Definition: :mod:`..format.page_mean`. A mean is turned by a look-up of its page's cosines and sines, so its angle is as
exact as float64 made it, at any position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..format.page_mean import PageMean


@dataclass(frozen=True)
class MeanTables:
    """Of one layer, for up to ``pages`` pages. H KV heads, P padded channels, b = P / 2 blocks.

    turns ``[pages, 2, b]`` float32: cosine and sine.
    vectors ``[H, 3, P]`` float32: what cosine and sine are multiplied with, and the weight, of each channel.
    block_of ``[P]`` int32: each channel's block.
    pairs ``[2, b]`` int32: each block's channels. fold ``[H, 2, b]`` float32: the mean, as they are.
    """

    turns: torch.Tensor
    vectors: torch.Tensor
    block_of: torch.Tensor
    pairs: torch.Tensor
    fold: torch.Tensor
    page: int

    @classmethod
    def of(cls, mean: PageMean, pages: int, padded: int) -> MeanTables:
        heads, blocks = mean.weight.shape
        room = padded // 2 - blocks
        x, y = mean.pairs.unbind(-1)
        vectors = torch.zeros(heads, 3, padded)
        vectors[:, 0, x], vectors[:, 1, x] = mean.mean[..., 0], -mean.mean[..., 1]
        vectors[:, 0, y], vectors[:, 1, y] = mean.mean[..., 1], mean.mean[..., 0]
        vectors[:, 2, x] = vectors[:, 2, y] = mean.weight
        block_of = torch.zeros(padded, dtype=torch.int32)
        block_of[x] = block_of[y] = torch.arange(blocks, dtype=torch.int32)
        turns = torch.nn.functional.pad(mean.turns(pages), (0, room))
        pairs = torch.nn.functional.pad(mean.pairs.T, (0, room)).int()
        fold = torch.nn.functional.pad(mean.mean.mT, (0, room))
        return cls(turns, vectors, block_of, pairs, fold.contiguous(), mean.page)

    @property
    def blocks(self) -> int:
        return self.block_of.shape[0] // 2


@triton.jit
def load_mean(means, head, page, channel, BLOCKS: tl.constexpr):
    """The mean of ``page`` in ``channel``, float32; both of shapes that broadcast. means: turns, vectors, block_of."""
    turns, vectors, block_of = means
    vectors += head * 6 * BLOCKS
    at = turns + (page * 2 * BLOCKS + tl.load(block_of + channel))
    return tl.load(vectors + channel) * tl.load(at) + tl.load(vectors + 2 * BLOCKS + channel) * tl.load(at + BLOCKS)


@triton.jit
def flag_gain(means, head, channel, key, mean, BLOCKS: tl.constexpr):
    """What of weighted energy each channel's mean takes away; a key is flagged where their sum is positive."""
    return tl.load(means[1] + head * 6 * BLOCKS + 4 * BLOCKS + channel) * mean * (2 * key - mean)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 to a key's type, which it may be beyond."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@triton.jit
def fold_and_store(
    x,
    pairs,
    fold,
    y,
    num_rows,
    stride_xt,
    stride_xh,
    stride_yt,
    stride_yh,
    head,
    block,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A query's part in the page means, behind the DIM rotated channels at ``y``: factors of cosines, then of sines."""
    r = block * ROWS + tl.arange(0, ROWS)
    token, j = (r // GROUP).to(tl.int64), head * GROUP + r % GROUP
    live = (r < num_rows)[:, None]
    b = tl.arange(0, BLOCKS)
    first, second = tl.load(pairs + b), tl.load(pairs + BLOCKS + b)
    fold += head * 2 * BLOCKS
    mean_first, mean_second = tl.load(fold + b)[None, :], tl.load(fold + BLOCKS + b)[None, :]
    at = (token * stride_xt + j * stride_xh)[:, None]
    a = tl.load(x + at + first[None, :], mask=live, other=0.0).to(tl.float32)
    c = tl.load(x + at + second[None, :], mask=live, other=0.0).to(tl.float32)
    to = y + (token * stride_yt + j * stride_yh)[:, None] + DIM + b[None, :]
    tl.store(to, a * mean_first + c * mean_second, mask=live)
    tl.store(to + BLOCKS, c * mean_first - a * mean_second, mask=live)


@triton.jit
def page_bias(turns, page, q, q_at, live_row, DIM: tl.constexpr, BLOCKS: tl.constexpr):
    """What the rotated queries at ``q + q_at [M]`` get of the mean of a page: ``[M]`` float32."""
    b = tl.arange(0, BLOCKS)
    cos, sin = tl.load(turns + page * 2 * BLOCKS + b), tl.load(turns + page * 2 * BLOCKS + BLOCKS + b)
    at = q + q_at[None, :] + DIM + b[:, None]
    of_cos = tl.load(at, mask=live_row[None, :], other=0.0)
    of_sin = tl.load(at + BLOCKS, mask=live_row[None, :], other=0.0)
    return tl.sum(of_cos * cos[:, None] + of_sin * sin[:, None], 0)
