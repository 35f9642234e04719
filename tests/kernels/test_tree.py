"""Trees of drafts from SGLang's masks, beside the reference's."""

from __future__ import annotations

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.decode.tree import Tree

from .matrix import DEVICE


def masks(lengths: list[int], q_len: int, full: bool) -> torch.Tensor:
    """Random trees: each token follows one before it. What lies before a tree is seen by all, when it is there."""
    generator = torch.Generator().manual_seed(q_len)
    out = []
    for length in lengths:
        seen = torch.eye(q_len, dtype=torch.bool)
        for i in range(1, q_len):
            seen[i] |= seen[int(torch.randint(i, (), generator=generator))]
        out.append(torch.cat([torch.ones(q_len, length if full else 0, dtype=torch.bool), seen], 1).flatten())
    return torch.cat([*out, torch.zeros(3, dtype=torch.bool)])  # a buffer may be longer


@pytest.mark.parametrize("full", [True, False], ids=["full", "tree-only"])
@pytest.mark.parametrize("q_len, lengths", [(1, [5]), (5, [0, 60, 7]), (12, [61, 1]), (32, [100, 31, 200])])
def test_trees_of_masks(q_len, lengths, full):
    mask, tree = masks(lengths, q_len, full), Tree.of(len(lengths) + 1, q_len, DEVICE)
    tree.bits.fill_(-7)
    for page in (0, 64):
        want = reference.read_tree(mask, torch.tensor(lengths), q_len, full, page, nowhere=999)
        tree.read(mask.to(DEVICE), torch.tensor(lengths, device=DEVICE), q_len, full, page, nowhere=999)
        size = len(want[0])
        assert torch.equal(tree.bits[:size].cpu(), want[0]) and torch.equal(tree.positions[:size].cpu(), want[1])
    assert bool((tree.bits[size:] == -7).all())
    if q_len == 5:  # one tree reaches over the end of its page, and some of its tokens fall behind
        assert 999 in want[1].tolist()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="trees of 1 to 32 tokens"):
        Tree.of(1, 33, DEVICE)
    lengths = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="3 trees of 4 tokens: there is room for 8 tokens"):
        Tree.of(2, 4, DEVICE).read(torch.ones(48, dtype=torch.bool, device=DEVICE), lengths, 4, full=False)
