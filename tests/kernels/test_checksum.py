"""Checksums of rows: those of the kernels are the definition's, and a row that is not what was written is found."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sglang_blockgtq.backend.warm_up import batch_sizes
from sglang_blockgtq.kernels import checksum
from sglang_blockgtq.kernels.checksum import Checksums, Difference, checksums
from sglang_blockgtq.kernels.device.tables import templates_of
from sglang_blockgtq.kernels.layer import TorchLayer, TritonLayer
from sglang_blockgtq.row_check import RowCheck

from .matrix import DEVICE, MEANS, PRODUCT, TEMPLATE, data

#: Rows in columns, interleaved, of two layers; others, one after another; on the host.
KINDS = {"columns": (TEMPLATE, MEANS), "any": (PRODUCT,), "host": (TEMPLATE, PRODUCT)}
LENGTHS = (5, 0, 9)


@pytest.fixture(params=KINDS)
def written(request):
    """Layers of random rows, checksums of tokens at shuffled slots, and where these are."""
    generator, layers = torch.Generator().manual_seed(0), []
    device = "cpu" if request.param == "host" else DEVICE
    for case in KINDS[request.param]:
        codec = data(case).codec if device == DEVICE else data(case).codec.to("cpu")
        codec = replace(codec, mean=None)
        layer = (
            TorchLayer(codec) if request.param == "host" else TritonLayer(codec, device, templates_of(codec.layout.k))
        )
        rows = torch.randint(0, 256, (64, layer.layout.row_bytes), dtype=torch.uint8, generator=generator)
        layer.bind(rows.to(device))
        layers.append(layer)
    slots = (torch.randperm(63, generator=generator)[: sum(LENGTHS)] + 1).to(device)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(device)
    sums = Checksums(layers)
    sums.write(slots, positions)
    return sums, slots, positions, torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)


def sampled(written, fresh=0, count=20) -> Difference | None:
    """With room for all rows at once; for fewer after several steps."""
    sums, slots, _, indptr = written
    for _ in range(1 if count > len(slots) else 40):
        sums.sample(indptr, slots.int(), count, fresh=fresh)
    return sums.unpacked(int(sums.found))


def test_sums_are_the_definitions(written):
    sums, slots, positions, _ = written
    for i, layer in enumerate(sums.layers):
        assert torch.equal(sums.sums[i, slots], checksums(layer.gather(slots), positions))
    assert not sums.differences(slots, positions)
    assert sampled(written) is None and sampled(written, fresh=1, count=3) is None


def test_any_byte_changes_a_sum(written):
    layer, slots, positions = written[0].layers[-1], written[1], written[2]
    row = layer.gather(slots[:1]).repeat(layer.layout.row_bytes, 1)
    before = checksums(row, positions[:1])
    row[torch.arange(len(row)), torch.arange(len(row))] ^= 0x80
    assert (checksums(row, positions[:1]) != before).all()


@pytest.mark.parametrize("count", [20, 4])
def test_a_changed_byte_is_found(written, count):
    sums, slots, positions, _ = written
    row = sums.layers[-1].gather(slots[7:8])
    row[0, 3] ^= 1
    sums.layers[-1].scatter(slots[7:8], row)
    found = Difference(len(sums.layers) - 1, int(slots[7]), 2)
    assert sums.differences(slots, positions) == [found] and sampled(written, count=count) == found


def test_the_row_of_another_position_is_found(written):
    """As where two tokens were given one slot."""
    sums, slots, positions, _ = written
    sums.write(slots[6:7], positions[6:7] + 4)
    assert {x.slot for x in sums.differences(slots, positions)} == {int(slots[6])}
    assert sampled(written).position == 1


def test_what_a_step_has_not_written_yet_is_left_out(written):
    """A decode step's own tokens, those that are verified, and slot 0."""
    sums, slots, positions, _ = written
    changed = slots[[3, 4, 12, 13]]
    for layer in sums.layers:
        layer.scatter(changed, layer.gather(changed) ^ 1)
    assert sampled(written, fresh=2) is None and sampled(written, fresh=1).position in (3, 7)
    assert not sums.differences(torch.zeros_like(slots), positions)


def test_sums_move_with_rows(written):
    sums, slots, positions, _ = written
    free = torch.tensor([x for x in range(1, 64) if x not in slots.tolist()][: len(slots)], device=slots.device)
    for layer in sums.layers:
        layer.scatter(free, layer.gather(slots))
    assert len(sums.differences(free, positions)) == len(free) * len(sums.layers)
    sums.move(free, slots)
    assert not sums.differences(free, positions)


def test_a_step_finds_its_kernels_compiled(monkeypatch):
    """What tells binaries apart: dtypes of slots, and room for requests."""
    layer = TritonLayer(data(TEMPLATE).codec, DEVICE, templates_of(data(TEMPLATE).codec.layout.k))
    layer.bind(layer.new_rows(16, DEVICE))
    check, seen = RowCheck({0: layer}, 2), set()

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                tensors = [x.dtype for x in args if isinstance(x, torch.Tensor)]
                seen.add((self.kernel.__name__, *tensors, *sorted(constants.items())))

            return launch

    for name in ("write_checksums_kernel", "compare_rows_kernel"):
        monkeypatch.setattr(checksum, name, Watched(getattr(checksum, name)))
    for requests in batch_sizes(20):
        check.warm_up(requests, 3)
    ready, none = seen.copy(), torch.zeros(20, dtype=torch.int64, device=DEVICE)
    for requests in (1, 9, 20):
        indptr = torch.zeros(requests + 1, dtype=torch.int32, device=DEVICE)
        check.wrote(0, SimpleNamespace(out_cache_loc=none, positions=none))
        check.sample(indptr, none.int(), fresh=1)
        check.sample(indptr, none.int(), fresh=3)
        check.sample(indptr, none, fresh=0)
    assert seen == ready and len(ready) == 7


def test_nothing_to_compare(written):
    sums, slots, _, _ = written
    sums.sample(torch.zeros(3, dtype=torch.int32, device=slots.device), slots, 4, fresh=1)
    sums.write(slots[:0], slots[:0])
    assert sums.unpacked(int(sums.found)) is None
