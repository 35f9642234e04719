"""Merges of partial attentions against a plain softmax over all of them, and their definition."""

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.decode import merge
from sglang_blockgtq.kernels.decode.attention import DecodeScratch
from sglang_blockgtq.kernels.decode.merge import merge_into, merge_splits
from sglang_blockgtq.kernels.decode.splits import num_splits, split_lengths

from .matrix import DEVICE, LARGE, WIDE, Case, data, over, relative_error


def partial_results(
    case: Case, lengths: list[int], target: int, q_len: int
) -> tuple[DecodeScratch, torch.Tensor, torch.Tensor]:
    """Random partial results, poisoned where no split lies, and out and lse of their merge."""
    d = data(case)
    heads, dim = case.heads * case.group, d.tables.v.dim
    generator = torch.Generator().manual_seed(7)
    _, counts = split_lengths(torch.tensor(lengths), target)
    splits = num_splits(len(lengths), target)
    out = torch.randn(splits, q_len, heads, dim, generator=generator)
    lse = 5 * torch.randn(splits, q_len, heads, generator=generator)
    first = 0
    want, want_lse = [], []
    for length, count in zip(lengths, counts.tolist(), strict=True):
        mine = slice(first, first + count)
        # Of some splits the first query sees nothing, and of a short request nothing at all.
        unseen = slice(first, first + count, 3 if length > 5 else 1) if count > 1 or length <= 5 else slice(0)
        lse[unseen, 0], out[unseen, 0] = -torch.inf, 0
        total = lse[mine].double().logsumexp(0) if count else torch.full((q_len, heads), -torch.inf)
        share = torch.exp(lse[mine].double() - torch.where(total == -torch.inf, 0.0, total))
        want.append((share[..., None] * out[mine]).sum(0))
        want_lse.append(total)
        first += count
    out[first:], lse[first:] = torch.nan, torch.nan
    merged = torch.cat(want).unflatten(1, (case.heads, case.group))
    rotated = torch.einsum("mhge,hde->mhgd", merged, d.codec.v_out.double().cpu()).flatten(1, 2)
    return DecodeScratch(out.to(DEVICE), lse.to(DEVICE)), rotated.float(), torch.cat(want_lse).float()


#: Per way of merging ``_GROUPS_AT_ONCE`` and ``_ROWS_ALONE``, which choose it, and pairs of target and q_len: of few
#: splits, of many, and of more than a program takes at a time.
WAYS = {
    "group": (1 << 30, 0, [(1, 1), (5, 3), (129, 1)]),
    "tile": (0, 0, [(1, 1), (5, 3), (321, 1)]),
    "row": (0, 1 << 30, [(321, 2), (1600, 1)]),
}
#: Two heads, of a group and of channels that fill no tile.
PARTLY = Case("uniform", 3, 3, 64, 2, 3, v_dim=48)


@over([PARTLY, WIDE, LARGE[0], LARGE[2], LARGE[4], LARGE[5]])
def test_splits_are_merged(case, monkeypatch):
    names = "group", "tile", "row"
    kernels = {name: getattr(merge, f"merge_{name}_kernel") for name in names}
    wide = data(case).tables.v.padded > 128  # a group's rows of so many channels are merged in tiles
    for way, (at_once, alone, sizes) in WAYS.items():
        monkeypatch.setattr(merge, "_GROUPS_AT_ONCE", at_once)
        monkeypatch.setattr(merge, "_ROWS_ALONE", alone)
        for name in names:  # none but the one that is meant
            kernel = kernels[name] if name == ("tile" if wide and way == "group" else way) else None
            monkeypatch.setattr(merge, f"merge_{name}_kernel", kernel)
        for target, q_len in sizes if case != WIDE or way == "row" else [(5, 1)]:
            lengths = [0, 100_000 if target > 256 else 5000, 3]
            scratch, want, want_lse = partial_results(case, lengths, target, q_len)
            kv_indptr = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
            out = torch.full((len(lengths) * q_len, *want.shape[1:]), torch.nan, device=DEVICE)
            lse = torch.full(out.shape[:2], torch.nan, device=DEVICE)
            merge_splits(data(case).tables.v, scratch.out, scratch.lse, kv_indptr, q_len, target, out, lse)
            out, lse = out.cpu(), lse.cpu()
            empty = want_lse == -torch.inf
            assert bool(empty.any()) and torch.equal(lse == -torch.inf, empty) and not out[empty].any()
            torch.testing.assert_close(lse[~empty], want_lse[~empty], rtol=1e-5, atol=1e-5)
            # The GPU's dots are in three pieces of TF32.
            for head in range(out.shape[1]):
                assert relative_error(out[:, head], want[:, head]) < (1e-5 if DEVICE == "cpu" else 1e-4)


@pytest.mark.parametrize(
    "dim, dtype", [(64, "float32"), (80, "float16"), pytest.param(256, "bfloat16", marks=pytest.mark.gpu)]
)
def test_merge_into_matches_reference(dim, dtype):
    tokens, heads = 37, 3
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, tokens, heads, dim, generator=generator).to(DEVICE)
    b = b.to(getattr(torch, dtype))
    lse_a, lse_b = 8 * torch.randn(2, heads, tokens, generator=generator).to(DEVICE)  # as FlashAttention lays it out
    lse_a[0, :5], lse_b[0, 3:9], lse_b[1, :4] = -torch.inf, -torch.inf, torch.inf
    lse_a[2, 0], lse_b[2, 0] = 1e4, 1e4 - 1
    clean = lse_b.masked_fill(lse_b == torch.inf, -torch.inf)
    want, want_lse = reference.merge_states(a, lse_a.T, b.float(), clean.T)
    # Parts without keys may hold anything.
    a[(lse_a == -torch.inf).T] = torch.nan
    b[(clean == -torch.inf).T] = torch.nan
    neither = ((lse_a == -torch.inf) & (clean == -torch.inf)).T
    assert bool(neither.any())
    want = torch.where(neither[..., None], 0.0, want)
    merge_into(a, lse_a.T, b, lse_b.T)
    torch.testing.assert_close(a, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse_a.T, want_lse, rtol=1e-6, atol=1e-6)


def test_merge_refuses_other_shapes():
    out, lse = torch.zeros(2, 3, 8, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match="one size"):
        merge_into(out, lse, out[:1], lse)
    with pytest.raises(ValueError, match="float32"):
        merge_into(out.half(), lse, out, lse)
