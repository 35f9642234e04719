"""What lies in SGLang's region for memory that sleep gives back, and what is made good after it."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache import memory_pool
from sglang.srt.plugins import load_plugins
from sglang.srt.utils import torch_memory_saver_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_blockgtq import plugin
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import layers_of
from sglang_blockgtq.kernels.layer import TritonLayer
from sglang_blockgtq.options import KVQuantOptions
from sglang_blockgtq.pool import PackedKVPool

LAYERS, HEADS, DIM = 2, 2, 64
SPOILED = 0xFF  # every scale NaN


class Saver(TorchDispatchMode):
    """In the place of torch_memory_saver: remembers by tag what was allocated in its regions."""

    enabled = True

    def __init__(self):
        super().__init__()
        self.taken: dict[str, list[torch.Tensor]] = {}
        self._tag = None

    @contextmanager
    def region(self, tag: str, **_):
        self._tag = tag
        with self:
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.taken.setdefault(self._tag, []).append(out)
        return out

    def resume(self, tag: str) -> None:
        """Memory comes back with anything in it."""
        for lost in self.taken.get(tag, ()):
            lost.view(torch.uint8).fill_(SPOILED)


def addresses(tensors) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}


def make_layers(allocator: str, device_layers: bool) -> dict:
    torch.manual_seed(0)
    q, k = torch.rand(2, LAYERS, HEADS, DIM // 2, dtype=torch.float64)
    moments = Moments(q, k, torch.full((LAYERS, HEADS), float(DIM), dtype=torch.float64), 2048)
    granularity = "block" if allocator == "product" else "segment"
    rope = [RopeBlocks(DIM, DIM)] * LAYERS
    table = build_table(moments, rope, k_bits=3, v_bits=3, allocator=allocator, granularity=granularity)
    if device_layers:  # as on a GPU
        return {i: TritonLayer(table.layer_codec(i), "cpu", table.k_templates) for i in range(LAYERS)}
    return layers_of(table, slice(None), range(LAYERS), "cpu", 512)


@pytest.fixture
def saver(monkeypatch) -> Saver:
    load_plugins()
    found = Saver()
    create = SimpleNamespace(create=lambda enable: found if enable else pytest.fail("the saver is not asked for"))
    monkeypatch.setattr(memory_pool, "TorchMemorySaverAdapter", create)
    return found


@pytest.mark.parametrize(("allocator", "device_layers"), [("template", False), ("template", True), ("product", True)])
def test_sleep_gives_back_the_rows_and_waking_makes_them_zero(saver, allocator, device_layers):
    layers = make_layers(allocator, device_layers)
    pool = PackedKVPool(32, 16, layers=layers, device="cpu", enable_memory_saver=True, start_layer=0, end_layer=LAYERS)
    rows = [layer.rows for layer in layers.values()]
    assert addresses(saver.taken[GPU_MEMORY_TYPE_KV_CACHE]) == addresses(rows)
    requests = memory_pool.ReqToTokenPool(size=4, max_context_len=8, device="cpu", enable_memory_saver=True)
    runner = SimpleNamespace(
        server_args=SimpleNamespace(_kvq=KVQuantOptions()),
        is_draft_worker=False,
        token_to_kv_pool=pool,
        req_to_token_pool=requests,
    )
    manager = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner), memory_saver_adapter=saver)
    saver.resume(GPU_MEMORY_TYPE_KV_CACHE)
    assert all((x == SPOILED).all() for x in rows)
    plugin._after_resume(None, manager, SimpleNamespace(tags=["weights"]))
    assert all((x == SPOILED).all() for x in rows), "these rows were not lost"
    plugin._after_resume(None, manager, SimpleNamespace(tags=None))
    assert not any(x.any() for x in rows)
    assert not requests.req_to_token[0].any() and (requests.req_to_token[1:] == -1).all()


def test_rows_are_kept_where_nothing_was_given_back(saver):
    """Without --enable-memory-saver SGLang's calls do nothing, and requests may have run between them."""
    layers = make_layers("template", False)
    pool = PackedKVPool(32, 16, layers=layers, device="cpu", enable_memory_saver=True, start_layer=0, end_layer=LAYERS)
    layers[0].rows.fill_(1)
    saver.enabled = False
    runner = SimpleNamespace(
        server_args=SimpleNamespace(_kvq=KVQuantOptions()), is_draft_worker=False, token_to_kv_pool=pool
    )
    manager = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner), memory_saver_adapter=saver)
    plugin._after_resume(None, manager, SimpleNamespace(tags=None))
    assert layers[0].rows.all()


def test_memory_goes_once_nothing_reads_it(monkeypatch):
    """With all tags SGLang 0.5.23 copies buffers of the model, unmaps them, and waits for the copies last."""
    calls = []
    module = SimpleNamespace(synchronize=lambda: calls.append("wait"))
    monkeypatch.setattr(torch, "get_device_module", lambda: module)
    monkeypatch.setattr(
        torch_memory_saver_adapter, "_memory_saver", SimpleNamespace(pause=lambda tag: calls.append(tag))
    )
    real = torch_memory_saver_adapter._TorchMemorySaverAdapterReal
    target, (kind, function) = next(x for x in plugin._HOOKS.items() if x[0].endswith("AdapterReal.pause"))
    assert (kind, target.rpartition(".")[0]) == (
        "BEFORE",
        f"{real.__module__}.{real.__name__}".removeprefix("sglang.srt."),
    )
    pause = inspect.unwrap(real.pause)  # another test may have had hooks installed
    for tag in ("weights", "cuda_graph"):
        function(real(), tag)
        pause(real(), tag)
    assert calls == ["wait", "weights", "wait", "cuda_graph"]
