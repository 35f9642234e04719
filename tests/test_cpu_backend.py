"""The PyTorch backend by itself: what two requests of different lengths attend to, over pages of means."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_blockgtq import runtime
from sglang_blockgtq.backend.cpu import TorchPackedBackend
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import layers_of
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.terms import PLAIN, Terms
from sglang_blockgtq.options import KVQuantOptions
from sglang_blockgtq.pool import PackedKVPool

HEADS, GROUP, DIM, PAGE, SCALE = 2, 3, 64, 64, 0.2
CACHED, NEW = (100, 61), (30, 5)  # tokens of each request, in steps that cross from page to page
LAYER = SimpleNamespace(
    layer_id=0,
    tp_q_head_num=HEADS * GROUP,
    tp_k_head_num=HEADS,
    tp_v_head_num=HEADS,
    qk_head_dim=DIM,
    v_head_dim=DIM,
    scaling=SCALE,
    sliding_window_size=None,
    logit_cap=0.0,
)
WINDOW, CAP, SINKS = 50, 4.0, torch.linspace(-1, 2, HEADS * GROUP)


@pytest.fixture(params=["raw", "quantized"])
def backend(request, monkeypatch):
    """Of one layer, whose keys have strong means, and a table of requests whose slots are shuffled."""
    energy = torch.logspace(-1, 1, DIM // 2, dtype=torch.float64).expand(1, HEADS, -1)
    theta = 1e4 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))[None]
    mean = 0.9 * energy.sqrt()[..., None] * torch.tensor([0.6, 0.8], dtype=torch.float64)
    moments = Moments(energy, energy, torch.full((1, HEADS), 64.0, dtype=torch.float64), 2048, theta, mean)
    table = build_table(moments, [RopeBlocks(DIM, DIM)], k_bits=3, v_bits=3, page=PAGE)
    layers = layers_of(table, slice(None), (0,), "cpu", 512)
    served = runtime.Runtime(
        KVQuantOptions(chunk_attention=request.param), table, slice(None), (0,), "file", 0.0, 0, layers=layers
    )
    monkeypatch.setattr(runtime, "_current", served)
    sizes = {"enable_memory_saver": False, "start_layer": 0, "end_layer": 1}
    pool = PackedKVPool(400, 1, layers=layers, device="cpu", **sizes)
    slots = torch.randperm(380, generator=torch.Generator().manual_seed(0)).view(2, 190).int() + 1
    return TorchPackedBackend(
        SimpleNamespace(token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=slots))
    )


def tokens(backend, seed: int) -> list[tuple[torch.Tensor, ...]]:
    """q, k, v of each request's whole text: keys near their means, as they rotate."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for n in (190, 190):
        q, k, v = (torch.randn(n, h, DIM, generator=generator) for h in (HEADS * GROUP, HEADS, HEADS))
        out.append((q, 0.5 * k + backend.pool.layer(0).codec.mean.at(torch.arange(n)), v))
    return out


def run(backend, texts, starts, stops, layer=LAYER, **kwargs):
    """One step of both requests; decode where each has one token."""
    decode = all(b - a == 1 for a, b in zip(starts, stops, strict=True))
    spans = [slice(a, b) for a, b in zip(starts, stops, strict=True)]
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        seq_lens=torch.tensor(stops),
        req_pool_indices=torch.tensor([1, 0]),  # rows of the table are not in the batch's order
        extend_prefix_lens_cpu=list(starts),
        extend_seq_lens_cpu=[b - a for a, b in zip(starts, stops, strict=True)],
        positions=torch.cat([torch.arange(span.start, span.stop) for span in spans]),
    )
    table = backend.req_to_token_pool.req_to_token
    batch.out_cache_loc = torch.cat([table[row, span] for row, span in zip((1, 0), spans, strict=True)]).long()
    q, k, v = (torch.cat([text[i][span] for text, span in zip(texts, spans, strict=True)]).flatten(1) for i in range(3))
    backend.init_forward_metadata(batch)
    out = (backend.forward_decode if decode else backend.forward_extend)(q, k, v, layer, batch, **kwargs)
    return out.view(-1, HEADS * GROUP, DIM).split([span.stop - span.start for span in spans])


def expected(backend, text, start: int, stop: int, exact_from: int, terms: Terms = PLAIN) -> torch.Tensor:
    """Of queries ``start .. stop``: packed keys and values up to ``exact_from``, the model's own from there on."""
    q, k, v = (x[:stop] for x in text)
    packed = reference.round_trip(backend.pool.layer(0).codec, k, v, torch.arange(stop))
    k, v = (torch.cat([a[:exact_from], b[exact_from:]]) for a, b in zip(packed, (k, v), strict=True))
    logits = torch.einsum("mhd,nhd->hmn", q[start:], k.repeat_interleave(GROUP, 1)) * SCALE
    if terms.cap:
        logits = terms.cap * (logits / terms.cap).tanh()
    key, own = torch.arange(stop)[None], torch.arange(start, stop)[:, None]
    unseen = (key > own) | (key <= own - (terms.window or stop))
    logits = logits.masked_fill(unseen, -torch.inf)
    if terms.sinks is not None:
        logits = torch.cat([logits, terms.sinks[:, None, None].expand(-1, stop - start, 1)], -1)
    weights = logits.softmax(-1)[..., :stop]
    return torch.einsum("hmn,nhd->mhd", weights, v.repeat_interleave(GROUP, 1))


@pytest.mark.parametrize(
    "terms", [PLAIN, Terms(WINDOW), Terms(WINDOW, CAP, SINKS)], ids=["plain", "window", "window-cap-sinks"]
)
def test_every_step_reads_keys_where_they_lie(backend, terms):
    """A prompt, more of it on top of what is cached, and tokens one by one."""
    options = {} if terms.sinks is None else {"sinks": terms.sinks}
    layer = SimpleNamespace(**vars(LAYER) | {"sliding_window_size": terms.window - 1, "logit_cap": terms.cap})
    texts = tokens(backend, 1)
    flags = reference.scales_of(
        backend.pool.layer(0).codec,
        reference.encode(backend.pool.layer(0).codec, texts[0][1], texts[0][2], torch.arange(190)),
    )[..., 0]
    assert float((flags < 0).float().mean()) > 0.9  # or their positions would not matter
    at = [CACHED, *(tuple(a + b + i for a, b in zip(CACHED, NEW, strict=True)) for i in range(4))]
    starts = (0, 0)
    for stops in at:
        found = run(backend, texts, starts, stops, layer, **options)
        for text, start, stop, out in zip(texts, starts, stops, found, strict=True):
            exact_from = stop if stop - start == 1 or backend.quantized_chunk else start
            want = expected(backend, text, start, stop, exact_from, terms)
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
        starts = stops


def test_rows_are_read_once_they_are_loaded(backend):
    """HiCache loads a layer while the one before it runs; here it is done only when it is waited for."""
    texts, more = tokens(backend, 2), tuple(a + b for a, b in zip(CACHED, NEW, strict=True))
    run(backend, texts, (0, 0), CACHED)
    rows = backend.pool.layer(0).rows
    for starts, stops in ((CACHED, more), (more, tuple(n + 1 for n in more))):
        want, loaded = run(backend, texts, starts, stops), rows.clone()
        rows.zero_()
        backend.pool.register_layer_transfer_counter(
            SimpleNamespace(wait_until=lambda _, loaded=loaded: rows.copy_(loaded))
        )
        found = run(backend, texts, starts, stops)
        backend.pool.register_layer_transfer_counter(None)
        assert all(map(torch.equal, found, want))
