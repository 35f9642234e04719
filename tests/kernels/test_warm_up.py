"""What a server has compiled before its first request: nothing is left for later, and an error is not lost."""

import pytest
import torch

from sglang_blockgtq.backend import warm_up
from sglang_blockgtq.kernels.any_layout import attention as any_attention
from sglang_blockgtq.kernels.any_layout import encode as any_encode
from sglang_blockgtq.kernels.decode import ahead, attention
from sglang_blockgtq.kernels.decode.attention import DecodeScratch
from sglang_blockgtq.kernels.decode.recent import Recent
from sglang_blockgtq.kernels.decode.splits import request_block
from sglang_blockgtq.kernels.device import rotate
from sglang_blockgtq.kernels.device.tables import templates_of
from sglang_blockgtq.kernels.encode import encoder, step
from sglang_blockgtq.kernels.encode.step import StepEncoder
from sglang_blockgtq.kernels.layer import TritonLayer

from .matrix import DEVICE, MEANS, PRODUCT, TEMPLATE, data


@pytest.mark.parametrize("most, sizes", [(1, [1]), (8, [1]), (9, [1, 9]), (512, [1, 9, 65]), (4096, [1, 9, 65])])
def test_a_batch_size_for_each_binary(most, sizes):
    assert list(warm_up.batch_sizes(most)) == sizes
    assert {request_block(n) for n in range(1, min(most, 512) + 1)} == {request_block(n) for n in sizes}


def test_a_number_of_tokens_for_each_binary():
    """Of encode: the kernel for a few, that for many with a row for each factor, and with one for each token."""
    layer = TritonLayer(data(TEMPLATE).codec, DEVICE, templates_of(data(TEMPLATE).codec.layout.k))
    layer.bind(layer.new_rows(16, DEVICE))
    one, several, most = sorted(warm_up.encoded_at_once(layer))
    assert one <= layer.encoder.few_tokens < several
    assert [encoder.rows_per_token(layer.tables, n, torch.device(DEVICE)) for n in (several, most)] == [8, 1]
    case = data(PRODUCT)
    layer = TritonLayer(case.codec, DEVICE, templates_of(case.codec.layout.k))
    assert warm_up.encoded_at_once(layer) == {1}


def _kinds(monkeypatch):
    """Which kernels are asked for, with what decides on their binaries."""
    seen = set()

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                which = [constants.get(name) for name in ("REQUESTS", "GROUP", "COLUMNS", "ROTARY", "spread")]
                seen.add((self.kernel.__name__, *which, constants.get("layers") is not None))
                return self.kernel[grid](*args, **constants)

            return launch

    for module, *names in (
        (attention, "decode_kernel"),
        (any_attention, "decode_any_kernel"),
        (encoder, "encode_few_kernel", "encode_many_kernel"),
        (any_encode, "encode_any_kernel"),
        (rotate, "_rotate_kernel"),
        (ahead, "ahead_kernel"),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Watched(getattr(module, name)))
    return seen


@pytest.mark.parametrize("case", [TEMPLATE, MEANS, PRODUCT], ids=str)
def test_requests_need_what_is_prepared(monkeypatch, case):
    d = data(case)
    monkeypatch.setattr(encoder, "FEW_CHANNELS", 4 * case.heads * d.tables.k.padded)
    layer = TritonLayer(d.codec, DEVICE, templates_of(d.codec.layout.k))
    layer.bind(layer.new_rows(len(d.rows), DEVICE))
    scratch = DecodeScratch.of(layer.tables, 12, d.q.shape[1])
    seen = _kinds(monkeypatch)
    for job in warm_up.jobs(layer, scratch, d.q.shape[1], d.k.dtype, 12):
        job()
    prepared = seen.copy()
    assert len(prepared) == (8 if layer.fast else 4)

    for batch in (1, 3, 12):
        k, v, q = (x[:1].expand(batch, -1, -1).contiguous() for x in (d.k, d.v, d.q))
        slots = torch.arange(batch, device=DEVICE) % 4
        kv_indptr = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
        rotated = None
        if layer.fast or batch == 1:  # of any layout the interpreter takes a second for a token
            layer.encode(k, v, slots, slots)
            rotated = layer.encode(k, v, slots, slots, q)
        layer.decode(q, kv_indptr, slots, 0.1, rotated=rotated, scratch=scratch)
    assert seen == prepared


@pytest.mark.parametrize("rotary", [0, 16])
@pytest.mark.parametrize("room", [8, 12])
def test_steps_with_exact_tokens_need_what_is_prepared(monkeypatch, room, rotary):
    """Whose tokens are encoded at the end; of more requests than are kept, in each layer."""
    d, most = data(TEMPLATE), 12
    layer = TritonLayer(d.codec, DEVICE, templates_of(d.codec.layout.k))
    layer.bind(layer.new_rows(len(d.rows), DEVICE))
    monkeypatch.setattr(step, "FEW_TOKENS", 1)
    monkeypatch.setattr(rotate, "FEW_ROWS", 9)
    recent = Recent.of(1, room, most, 4, layer.heads, layer.head_dim, layer.v_head_dim, d.k.dtype, DEVICE)
    recent.bind(most)
    copies, num_heads = recent.layer(0), d.q.shape[1]
    scratch, seen = DecodeScratch.of(layer.tables, most, num_heads), _kinds(monkeypatch)
    encode = StepEncoder([layer.encoder], recent)
    for job in warm_up.jobs(layer, scratch, num_heads, d.k.dtype, most, copies, rotary):
        job()
    for tokens in encode.batch_sizes():
        encode.warm_up(tokens)
    prepared = seen.copy()
    for batch in range(1, most + 1):
        k, v, q = (x[:1].expand(batch, -1, -1).contiguous() for x in (d.k, d.v, d.q))
        slots = torch.arange(batch, device=DEVICE) % 4
        if not encode.takes(batch):
            layer.encode(k, v, slots, slots)
        kv_indptr = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
        angles = torch.zeros(batch, rotary, device=DEVICE) if rotary and encode.takes(batch) else None
        layer.decode(q, kv_indptr, slots, 0.1, scratch=scratch, recent=copies.read(k, v, angles))
        if encode.takes(batch):
            encode(slots, slots)
    assert seen == prepared
    assert not any(kind[0].startswith("encode") and kind[2] for kind in prepared)  # with queries


def test_a_failing_job_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    done = []

    def fail():
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        warm_up.run([fail, lambda: done.append(1)], torch.device("cpu"))
    assert done
