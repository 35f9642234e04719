"""Page means on a device: of keys where they are encoded and unpacked, of queries where they are read.

Definition: :mod:`..format.page_mean`. Encode and decode work in stored channels, and there a page's mean is looked up.
Unpack works in the model's, and turns the mean to the page by a look-up of cosines and sines. Either way an angle is
as exact as float64 made it, at any position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..format.page_mean import PageMean


@dataclass(frozen=True)
class MeanTables:
    """Of one layer, for a number of pages. H KV heads, P padded channels.

    stored ``[pages + 1, H, P]`` float32: the means in stored channels, and zeros of a page that no token has.
    turns ``[pages, 2, P / 2]`` float32: cosine and sine of each block.
    vectors ``[H, 2, P]`` float32: what they are multiplied with for each channel of a key.
    block_of ``[P]`` int32: each channel's block.
    """

    stored: torch.Tensor
    turns: torch.Tensor
    vectors: torch.Tensor
    block_of: torch.Tensor
    page: int

    @property
    def nowhere(self) -> int:
        """A position at which a key is encoded without a mean."""
        return (len(self.stored) - 1) * self.page

    @classmethod
    def of(cls, mean: PageMean, positions: int, matrix: torch.Tensor) -> MeanTables:
        """For ``positions`` of a request. matrix ``[H, P, P]`` (in, out): from a key's channels to the stored ones."""
        mean, matrix, pages = mean.to("cpu"), matrix.cpu(), torch.arange(positions // mean.page + 1)
        heads, padded, _ = matrix.shape
        blocks = len(mean.theta)
        room = padded // 2 - blocks
        x, y = mean.pairs.unbind(-1)
        vectors = torch.zeros(heads, 2, padded)
        vectors[:, 0, x], vectors[:, 1, x] = mean.mean[..., 0], -mean.mean[..., 1]
        vectors[:, 0, y], vectors[:, 1, y] = mean.mean[..., 1], mean.mean[..., 0]
        block_of = torch.zeros(padded, dtype=torch.int32)
        block_of[x] = block_of[y] = torch.arange(blocks, dtype=torch.int32)
        stored = torch.einsum("phi,hio->pho", mean.of_pages(pages).double(), matrix[:, : 2 * blocks].double())
        turns = torch.nn.functional.pad(mean.turns(pages), (0, room))
        stored = torch.nn.functional.pad(stored.float(), (0, 0, 0, 0, 0, 1))
        return cls(stored, turns, vectors, block_of, mean.page)


@triton.jit
def load_vectors(means, head, channel, BLOCKS: tl.constexpr):
    """What the means of all pages have in common in ``channel [N]`` of a head's keys: block, and both vectors. means:
    turns, vectors, block_of."""
    _, vectors, block_of = means
    vectors += head * 4 * BLOCKS
    return tl.load(block_of + channel), tl.load(vectors + channel), tl.load(vectors + 2 * BLOCKS + channel)


@triton.jit
def turned(means, vectors, page, BLOCKS: tl.constexpr):
    """The mean of ``page`` in the channels of ``vectors``: ``[N]`` float32."""
    turns, _, _ = means
    block, x, y = vectors
    at = turns + (page * 2 * BLOCKS + block)
    return x * tl.load(at) + y * tl.load(at + BLOCKS)


@triton.jit
def stored_at(position, head, heads, PAGE: tl.constexpr, PADDED: tl.constexpr):
    """Where in ``stored`` the mean of a position's page begins."""
    return (position // PAGE * heads + head) * PADDED


@triton.jit
def page_bias(stored, at, q, q_at, live_row, DIM: tl.constexpr, PADDED: tl.constexpr):
    """What the rotated queries at ``q + q_at [M]`` get of the page mean at ``stored + at``: ``[M]`` float32."""
    channel = tl.arange(0, PADDED)
    mean = tl.load(stored + at + channel)
    live = (channel < DIM)[:, None] & live_row[None, :]
    return tl.sum(tl.load(q + q_at[None, :] + channel[:, None], mask=live, other=0.0) * mean[:, None], 0)
