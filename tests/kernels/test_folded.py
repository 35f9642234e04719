"""The experiment of a query for each page, against its definition."""

import sys
from pathlib import Path

import pytest
import torch

from sglang_blockgtq.kernels import naive
from sglang_blockgtq.kernels.encode import encode
from sglang_blockgtq.kernels.tables import DeviceTables

from .matrix import DEVICE, relative_error

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks/ is not installed

from benchmarks.kernels import cases, data, folded  # noqa: E402


@pytest.mark.parametrize("shape, page", [((6, 2, 64), 16), ((6, 2, 64), 64), ((16, 1, 128), 64)], ids=str)
def test_folded_decode_matches_its_reference(shape, page):
    shape = cases.Shape("small", *shape)
    pool = data.Pool(shape, 144, DEVICE)
    method = cases.Method("template", 3, 3, "template")
    codec = data.make_codec(shape, method).to(DEVICE)
    tables = DeviceTables.of(codec)
    rows = pool.packed(tables, encode)
    lengths = [0, 33, 5, 100]
    indptr = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    ids = torch.randperm(144, generator=torch.Generator().manual_seed(0))[: sum(lengths)].to(DEVICE)
    q = pool.queries(4)
    got = folded.decode_folded(tables, q.float(), rows, indptr, ids, pool.sm_scale, page, max(lengths))
    want = folded.reference(codec, q, rows, indptr, ids, pool.sm_scale, page)
    assert relative_error(got, want) < 5e-3
    plain = naive.decode_attention(codec, q, rows, indptr, ids, pool.sm_scale)[0]
    assert relative_error(plain, want) > 0.02, "the pages' angles change nothing"
    one_page = folded.reference(codec, q, rows, indptr, ids, pool.sm_scale, 128)
    assert relative_error(one_page, plain) < 1e-5


def test_folding_a_query_turns_the_key():
    q, k = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    cos, sin = folded.angles(5, 16, 64, torch.device("cpu"))
    low, high = k.chunk(2, -1)
    turned = torch.cat([low * cos[4] - high * sin[4], low * sin[4] + high * cos[4]], -1)  # RoPE at position 64
    torch.testing.assert_close((folded.fold(q, cos[4], sin[4]) * k).sum(-1), (q * turned).sum(-1), rtol=1e-4, atol=1e-4)
