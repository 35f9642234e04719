"""What a server has compiled before its first request: nothing is left for later, and an error is not lost."""

import pytest
import torch

from sglang_blockgtq.backend import warm_up
from sglang_blockgtq.kernels import attention, encode
from sglang_blockgtq.kernels.attention import DecodeScratch, decode_attention
from sglang_blockgtq.kernels.encode import Encoder
from sglang_blockgtq.kernels.splits import request_block
from sglang_blockgtq.kernels.tables import DeviceTables

from .matrix import DEVICE, SMALL, data


@pytest.mark.parametrize("most, sizes", [(1, [1]), (8, [1]), (9, [1, 9]), (512, [1, 9, 65]), (4096, [1, 9, 65])])
def test_a_batch_size_for_each_binary(most, sizes):
    assert list(warm_up.batch_sizes(most)) == sizes
    assert {request_block(n) for n in range(1, min(most, 512) + 1)} == {request_block(n) for n in sizes}


def _kinds(monkeypatch):
    """Which kernels are asked for, with what decides on their binaries."""
    seen = set()

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                seen.add((self.kernel.__name__, constants.get("REQUESTS"), constants.get("GROUP")))
                return self.kernel[grid](*args, **constants)

            return launch

    for name in ("decode_kernel", "attention_kernel"):
        monkeypatch.setattr(attention, name, Watched(getattr(attention, name)))
    for name in ("encode_few_kernel", "encode_many_kernel"):
        monkeypatch.setattr(encode, name, Watched(getattr(encode, name)))
    return seen


def test_requests_need_what_is_prepared(monkeypatch):
    d = data(SMALL[0])
    tables = DeviceTables.of(d.codec)
    rows, scratch = d.rows.clone(), DecodeScratch.of(tables, 12, d.q.shape[1])
    monkeypatch.setattr(encode, "FEW_CHANNELS", 4 * tables.heads * tables.k.padded)
    seen = _kinds(monkeypatch)
    for job in warm_up.jobs(Encoder(tables, rows), scratch, d.q.shape[1], d.k.dtype, 12):
        job()
    prepared = seen.copy()
    assert prepared

    for batch in (1, 3, 12):
        k, v, q = (x[:1].expand(batch, -1, -1).contiguous() for x in (d.k, d.v, d.q))
        slots = torch.arange(batch, device=DEVICE) % 4
        for with_queries in (False, True):
            turned = torch.empty_like(q, dtype=torch.float32)
            Encoder(tables, rows)(k, v, slots, *((q, turned) if with_queries else ()))
        kv_indptr = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
        decode_attention(tables, q, rows, kv_indptr, slots, 0.1, turned=turned, scratch=scratch)
    assert seen == prepared


def test_a_failing_job_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    done = []

    def fail():
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        warm_up.run([fail, lambda: done.append(1)], torch.device("cpu"))
    assert done
