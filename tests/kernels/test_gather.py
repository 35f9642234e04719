"""The slots of a decode step, against their definition."""

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.decode import gather
from sglang_blockgtq.kernels.decode.gather import gather_slots

from .matrix import DEVICE

SPARE = 3  # numbers behind what is written
BATCHES = [
    (1,),
    (0, 0),
    (5, 0, 1100, 1, 0, 17),
    (1,) * 9,
    (2048, *(3,) * 64),
    pytest.param((131072, 1, 0, *(4096,) * 30), marks=pytest.mark.gpu),
    pytest.param((33, 0) * 256, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("lengths", BATCHES, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
def test_slots_are_those_of_the_table(lengths):
    """In the requests' order, whatever their rows are; a row may serve two requests. Nothing else is written."""
    generator = torch.Generator().manual_seed(sum(lengths))
    batch, most = len(lengths), max(max(lengths), 1) + 2
    table = torch.randint(0, 1 << 30, (batch + 4, most), dtype=torch.int32, generator=generator).to(DEVICE)
    requests = torch.randint(0, batch + 4, (batch,), generator=generator).to(DEVICE)
    of = torch.tensor(lengths, device=DEVICE)
    want_indptr, want = reference.gather_slots(table, requests, of)
    for slot in (torch.int32, torch.int64):
        kv_indptr = torch.full((batch + 1,), -1, dtype=torch.int32, device=DEVICE)
        kv_indices = torch.full((sum(lengths) + SPARE,), -7, dtype=slot, device=DEVICE)
        gather_slots(table, requests, of, kv_indptr, kv_indices)
        assert kv_indptr.tolist() == want_indptr.tolist()
        assert torch.equal(kv_indices, torch.cat([want.to(slot), want.new_full((SPARE,), -7).to(slot)]))


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_any_number_of_programs_copies_all(monkeypatch, programs):
    monkeypatch.setattr(gather, "_programs", lambda device: programs)
    lengths = torch.tensor([2500, 0, 1025], device=DEVICE)
    table = torch.arange(3 * 2500, dtype=torch.int32, device=DEVICE).view(3, 2500)
    kv_indptr = torch.empty(4, dtype=torch.int32, device=DEVICE)
    kv_indices = torch.full((3525,), -1, dtype=torch.int32, device=DEVICE)
    gather_slots(table, torch.tensor([2, 1, 0], device=DEVICE), lengths, kv_indptr, kv_indices)
    assert kv_indptr.tolist() == [0, 2500, 2500, 3525]
    assert kv_indices.tolist() == [*range(5000, 7500), *range(1025)]


def test_slots_behind_the_lengths():
    """Of drafts that are verified, even of a request that has nothing else."""
    table = torch.arange(60, dtype=torch.int32, device=DEVICE).view(3, 20)
    kv_indptr = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    kv_indices = torch.full((11,), -1, dtype=torch.int32, device=DEVICE)
    lengths, requests = torch.tensor([2, 0, 1], device=DEVICE), torch.tensor([2, 0, 1], device=DEVICE)
    gather_slots(table, requests, lengths, kv_indptr, kv_indices, more=2)
    assert kv_indptr.tolist() == [0, 4, 6, 9]
    assert kv_indices.tolist() == [40, 41, 42, 43, 0, 1, 20, 21, 22, -1, -1]


def test_rows_of_a_wider_table():
    """Rows are found by their stride, and an empty batch has an empty stream."""
    table = torch.arange(60, dtype=torch.int32, device=DEVICE).view(3, 20)[:, :5]
    kv_indptr = torch.full((3,), -1, dtype=torch.int32, device=DEVICE)
    kv_indices = torch.full((7,), -1, dtype=torch.int32, device=DEVICE)
    gather_slots(table, torch.tensor([2, 0], device=DEVICE), torch.tensor([4, 3], device=DEVICE), kv_indptr, kv_indices)
    assert (kv_indptr.tolist(), kv_indices.tolist()) == ([0, 4, 7], [40, 41, 42, 43, 0, 1, 2])
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    gather_slots(table, none, none, kv_indptr[:1].fill_(9), kv_indices)
    assert kv_indptr[0] == 0


@pytest.mark.parametrize(
    "bad, word", [({"lengths": 3}, "lengths"), ({"indptr": 2}, "kv_indptr"), ({"columns": True}, "contiguous")]
)
def test_other_shapes_are_errors(bad, word):
    table = torch.zeros(4, 4, dtype=torch.int32, device=DEVICE)
    table = table[:, ::2] if bad.get("columns") else table
    requests, lengths = (torch.zeros(n, dtype=torch.int64, device=DEVICE) for n in (2, bad.get("lengths", 2)))
    kv_indptr = torch.zeros(bad.get("indptr", 3), dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=word):
        gather_slots(table, requests, lengths, kv_indptr, kv_indptr)
