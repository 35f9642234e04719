"""The CPU's way to rows and back: the very bytes of the reference, and its answers."""

from dataclasses import replace

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.host.encode import MOST_TOKENS
from sglang_blockgtq.kernels.layer import TorchLayer

from .matrix import SMALL, data, decode_queries, relative_error

#: float32, whatever the case has: a CPU server's bf16 is made float32 before the cache sees it.
CASES = [replace(case, dtype="float32") for case in SMALL]
over = pytest.mark.parametrize("case", CASES, ids=str)


def layer_of(case) -> TorchLayer:
    d = data(case)
    layer = TorchLayer(d.codec.to("cpu"))
    layer.bind(layer.new_rows(len(d.rows), "cpu"))
    return layer


@over
def test_rows_are_those_of_the_reference(case):
    """All at once and a few at a time, to the last bit; huge, tiny and zero vectors among them."""
    d, layer = data(case), layer_of(case)
    k, v = d.k.float().cpu().clone(), d.v.float().cpu().clone()
    k[0], v[1] = 0, 0
    k[2], v[3] = k[2] * 1e15, v[3] * 1e-15
    loc, positions = d.kv_indices.cpu(), d.positions.cpu()
    want = reference.encode(layer.codec, k, v, positions)
    layer.encode(k, v, loc, positions)
    assert torch.equal(layer.gather(loc), want)
    layer.rows.zero_()
    parts = torch.arange(len(k)).split(MOST_TOKENS)
    for part in parts[:: -(-len(parts) // 6)]:  # of all requests
        layer.encode(k[part], v[part], loc[part], positions[part])
        assert torch.equal(layer.gather(loc[part]), want[part])
    assert (layer.encoder is not None) == d.codec.layout.in_columns


@over
def test_dense_keys_and_values(case):
    d, layer = data(case), layer_of(case)
    loc, positions = d.kv_indices.cpu(), d.positions.cpu()
    layer.scatter(loc, d.packed.cpu())
    none = layer.dense(loc[:0], positions[:0])
    assert [tuple(x.shape) for x in none] == [(0, *d.k.shape[1:]), (0, *d.v.shape[1:])]
    both = layer.dense(loc, positions), reference.decode(layer.codec, d.packed.cpu(), positions)
    for got, want in zip(*both, strict=True):
        error = (got - want).square().sum(0) / want.square().sum(0)
        assert float(error.max().sqrt()) < 1e-5


@over
def test_decode(case):
    """Requests of several lengths, one of them empty."""
    d, layer, q = data(case), layer_of(case), decode_queries(case).float().cpu()
    loc, indptr = d.kv_indices.cpu(), d.kv_indptr.cpu()
    layer.scatter(loc, d.packed.cpu())
    want = reference.decode_attention(layer.codec, q, d.packed.cpu(), indptr, d.sm_scale)[0]
    got = layer.decode(q, indptr, loc, d.sm_scale)
    assert got.dtype == q.dtype and relative_error(got, want) < 1e-5
    assert bool((got[case.lengths.index(0)] == 0).all())
