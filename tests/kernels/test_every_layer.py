"""Rows of several layers that are moved in one launch."""

import pytest
import torch

from sglang_blockgtq.kernels.device.tables import templates_of
from sglang_blockgtq.kernels.every_layer import RowPlaces
from sglang_blockgtq.kernels.layer import TritonLayer

from .matrix import DEVICE, PRODUCT, TEMPLATE, WIDE, data


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cases", [(TEMPLATE, WIDE), (PRODUCT,)], ids=["columns", "any"])
def test_moved_rows(cases, dtype):
    """Where targets and sources overlap in any order, as those of an accepted branch do; no other row changes."""
    generator, layers = torch.Generator().manual_seed(0), []
    for case in cases:
        codec = data(case).codec
        layer = TritonLayer(codec, DEVICE, templates_of(codec.layout.k))
        rows = torch.randint(256, (64, layer.layout.row_bytes), dtype=torch.uint8, generator=generator)
        layer.bind(rows.to(DEVICE))
        layers.append(layer)
    slots = torch.arange(64, device=DEVICE)
    before = [layer.gather(slots) for layer in layers]
    targets = torch.tensor([20, 21, 40, 17, 0], dtype=dtype, device=DEVICE)
    sources = torch.tensor([21, 40, 20, 63, 0], dtype=dtype, device=DEVICE)
    RowPlaces(layers).move(targets, sources)
    for layer, was in zip(layers, before, strict=True):
        was[targets.long()] = was[sources.long()]
        assert torch.equal(layer.gather(slots), was)
    RowPlaces(layers).move(targets[:0], sources[:0])
