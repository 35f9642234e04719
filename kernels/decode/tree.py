"""Trees of speculative decoding: which of a request's last tokens each of its queries sees.

A draft proposes ``q_len`` tokens at a time. In a chain each follows the one before it; in a tree several follow one,
and a query sees its ancestors and itself. SGLang describes a tree by a mask; here it is an int32 for each query, whose
bit i says whether it sees the i-th of the tokens. Definition: :func:`..reference.read_tree`.

A token's position is that of its depth, not that of its place among the request's slots. Decode finds a key's page
mean by its place, so a token whose place lies in another page is written without a mean: see :attr:`Tree.positions`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .splits import request_block

MAX_Q_LEN = 32  # bits


@triton.jit
def seen_of_tree(tree, query, live):
    """The bits of queries; 0 without a tree."""
    return 0 if tree is None else tl.load(tree + query, mask=live, other=0)


@triton.jit
def bits_set(bits, COUNT: tl.constexpr):
    """How many of the lowest COUNT."""
    total = bits * 0
    for i in tl.static_range(COUNT):
        total += (bits >> i) & 1
    return total


@triton.jit
def in_tree(n, first, bits):
    """Whether queries of ``bits [M]`` see the tokens ``n [N]`` of their request, ``[N, M]``. first: of its tree."""
    ahead = (n - first)[:, None]
    bit = (bits[None, :] >> tl.minimum(tl.maximum(ahead, 0), 31)) & 1
    return (ahead < 0) | (bit != 0)


@triton.jit(
    do_not_specialize=["num_requests", "nowhere"],
    do_not_specialize_on_alignment=["mask", "lengths"],
)
def read_tree_kernel(
    mask,  # uint8
    lengths,  # [B], tokens before the tree
    bits,  # int32 [B * QUERIES]
    positions,  # int64 [B * QUERIES]
    num_requests,
    nowhere,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    FULL: tl.constexpr,
    PAGE: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    request = tl.program_id(0)
    row, column = tl.arange(0, PADDED), tl.arange(0, PADDED)
    length = tl.load(lengths + request).to(tl.int64)
    if FULL:
        r = tl.arange(0, REQUESTS)
        before = tl.load(lengths + r, mask=(r < num_requests) & (r < request), other=-QUERIES).to(tl.int64)
        at = tl.sum(before + QUERIES, 0) * QUERIES + row * (length + QUERIES) + length
    else:
        at = (request * QUERIES + row).to(tl.int64) * QUERIES
    live = (row < QUERIES)[:, None] & (column < QUERIES)[None, :]
    seen = tl.load(mask + at[:, None] + column[None, :], mask=live, other=0) != 0
    found = tl.sum(tl.where(seen, 1 << column[None, :], 0), 1)
    position = tl.maximum(length + tl.sum(seen.to(tl.int64), 1) - 1, 0)
    if PAGE > 0:
        position = tl.where(position // PAGE == (length + row) // PAGE, position, nowhere)
    tl.store(bits + request * QUERIES + row, found, mask=row < QUERIES)
    tl.store(positions + request * QUERIES + row, position, mask=row < QUERIES)


@dataclass(frozen=True)
class Tree:
    """Of up to B requests, to be kept from step to step.

    bits int32 ``[B * q_len]``. positions int64 ``[B * q_len]``: what keys are encoded with, each token's own; where its
    page is not that of its place among the slots, ``nowhere``, a position without a mean.
    """

    bits: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, batch: int, q_len: int, device: torch.device | str) -> Tree:
        if not 1 <= q_len <= MAX_Q_LEN:
            raise ValueError(f"q_len {q_len}: trees of 1 to {MAX_Q_LEN} tokens are supported")
        size = batch * q_len
        return cls(
            torch.zeros(size, dtype=torch.int32, device=device), torch.zeros(size, dtype=torch.int64, device=device)
        )

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.positions.nbytes

    def first(self, tokens: int) -> Tree:
        return Tree(self.bits[:tokens], self.positions[:tokens])

    def read(
        self, mask: torch.Tensor, lengths: torch.Tensor, q_len: int, full: bool, page: int = 0, nowhere: int = 0
    ) -> None:
        """Of requests with ``lengths [B]`` tokens before their trees of q_len. page: of key means, 0 without.

        mask: of bytes that are 0 or not, query by query: ``[B, q_len, q_len]``, or where it is ``full`` the requests'
        ``[q_len, length + q_len]`` one after another. It may be longer. One launch, whose grid depends on B alone.
        """
        requests = lengths.shape[0]
        if requests * q_len > len(self.bits):
            raise ValueError(f"{requests} trees of {q_len} tokens: there is room for {len(self.bits)} tokens")
        if not requests:
            return
        read_tree_kernel[(requests,)](
            mask.view(torch.uint8),
            lengths,
            self.bits,
            self.positions,
            requests,
            nowhere,
            QUERIES=q_len,
            PADDED=triton.next_power_of_2(q_len),
            FULL=full,
            PAGE=page,
            REQUESTS=request_block(requests),
            num_warps=1,
        )
