"""PackedKVPool by itself: what it stores, moves, copies and refuses; and what a Runtime says of its table."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.platforms import current_platform

from sglang_blockgtq import plugin
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.quality import Quality
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import AllocationTable, layers_of
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.layer import TritonLayer
from sglang_blockgtq.options import KVQuantError, KVQuantOptions
from sglang_blockgtq.pool import PackedKVPool, packed_pool
from sglang_blockgtq.row_check import DamagedRow
from sglang_blockgtq.runtime import Runtime

LAYERS, HEADS, DIM = 8, 4, 64
HELD = (1, 4, 6)  # of the model's layers, as a hybrid model or a pipeline stage has them


def make_runtime(allocator="template", heads=slice(None), k_bits=3.0, granularity="segment", means=False) -> Runtime:
    torch.manual_seed(0)
    energy = torch.logspace(-2, 2, DIM // 2, dtype=torch.float64)
    q = energy * torch.rand(LAYERS, HEADS, DIM // 2, dtype=torch.float64)
    k = energy * torch.rand(LAYERS, HEADS, DIM // 2, dtype=torch.float64)
    moments = Moments(q, k, torch.full((LAYERS, HEADS), float(DIM), dtype=torch.float64), 2048)
    if means:
        moments.theta = 10_000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2)).expand(LAYERS, -1)
        moments.mean = 0.6 * k[..., None].sqrt().expand(-1, -1, -1, 2)
    rope = [RopeBlocks(DIM, DIM)] * LAYERS
    table = build_table(moments, rope, k_bits=k_bits, v_bits=3, allocator=allocator, granularity=granularity)
    bf16 = len(HELD) * len(range(HEADS)[heads]) * 4 * DIM
    layers = layers_of(table, heads, HELD, "cpu", 4096)
    return Runtime(KVQuantOptions(), table, heads, HELD, "file", 0.0, bf16, layers=layers)


def make_pool(runtime, size=32, page=4, device="cpu", check_rows=0) -> PackedKVPool:
    more = {"enable_memory_saver": False, "start_layer": 0, "end_layer": LAYERS, "check_rows": check_rows}
    return PackedKVPool(size, page, layers=runtime.layers, device=device, **more)


@pytest.fixture
def pool():
    return make_pool(make_runtime())


def write(pool, layer, slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(len(slots), HEADS * DIM, generator=generator)
    v = torch.randn(len(slots), HEADS * DIM, generator=generator)
    pool.set_kv_buffer(SimpleNamespace(layer_id=layer), torch.tensor(slots), k, v)
    return k.view(-1, HEADS, DIM), v.view(-1, HEADS, DIM)


def test_sizes(pool):
    slots = 48  # 32 + one page, in whole blocks of 16 rows
    assert [tuple(layer.rows.shape) for layer in pool.layers.values()] == [(slots, 4 * 52)] * len(HELD)
    assert make_runtime().bytes_per_token == len(HELD) * 4 * 52
    assert sum(pool.get_kv_size_bytes()) == slots * len(HELD) * 4 * 52
    assert pool.dtype == torch.uint8 and pool.mem_usage > 0 and pool.layer_num == len(HELD)


def test_layers_are_found_by_their_ids(pool):
    """A rank's layers need not follow one another; one that is not held is an error, not another one's rows."""
    k, v = write(pool, 4, [3, 9, 4])
    for got, want in zip(
        pool.layer(4).dense(torch.tensor([3, 9, 4])), reference.round_trip(pool.layer(4).codec, k, v), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not pool.layer(1).rows.any() and not pool.layer(6).rows.any()
    others = torch.tensor([s for s in range(48) if s not in (3, 9, 4)])
    assert not pool.layer(4).gather(others).any()
    # As a wrapper calls it, by its own count of the layers and with scales that change nothing.
    pool.set_kv_buffer(SimpleNamespace(layer_id=6), torch.tensor([5]), k[:1], v[:1], 1.0, 1.0, layer_id_override=2)
    assert pool.layer(6).gather(torch.tensor([5])).any()
    for layer in (0, 5, 7):
        with pytest.raises(KVQuantError, match=rf"layer {layer} is not in the packed pool, \[1, 4, 6\] are"):
            write(pool, layer, [1])


def test_a_pool_within_a_wrapper(pool):
    assert packed_pool(pool) is pool and packed_pool(SimpleNamespace(full_kv_pool=pool)) is pool
    assert packed_pool(SimpleNamespace(full_kv_pool=object())) is None


def test_move(pool):
    for layer in HELD:
        write(pool, layer, [1, 2, 3], seed=layer)
    every = torch.arange(48)
    before = [layer.gather(every) for layer in pool.layers.values()]
    pool.move_kv_cache(torch.tensor([20, 2, 1]), torch.tensor([1, 3, 2]))  # overlapping source and target
    for layer, old in zip(pool.layers.values(), before, strict=True):
        assert old[1:4].any()
        old[[20, 2, 1]] = old[[1, 3, 2]]
        assert torch.equal(layer.gather(every), old)


def test_cpu_copy(pool, monkeypatch):
    """Rows come back as they were, and both ways wait for the device before and after, as SGLang's own pools do."""
    waits = []
    monkeypatch.setattr(type(current_platform), "synchronize", lambda self: waits.append(1), raising=False)
    for layer in HELD:
        write(pool, layer, [5, 6], seed=layer)
    indices = torch.tensor([6, 5])
    saved = pool.get_cpu_copy(indices, mamba_indices=None, req_pool_index=None)
    assert len(waits) == 2
    kept = [layer.gather(indices) for layer in pool.layers.values()]
    for layer in pool.layers.values():
        layer.rows.fill_(255)
    pool.load_cpu_copy(saved, indices, mamba_indices=None)
    assert len(waits) == 4
    others = torch.tensor([s for s in range(48) if s not in (5, 6)])
    for layer, old in zip(pool.layers.values(), kept, strict=True):
        assert old.any() and torch.equal(layer.gather(indices), old)
        assert bool((layer.gather(others) == 255).all())


def test_checksums_go_with_their_rows(monkeypatch):
    """Wherever rows are moved and copied to; and they are counted as bytes of a token."""
    monkeypatch.setattr(type(current_platform), "synchronize", lambda self: None, raising=False)
    runtime = make_runtime()
    pool = make_pool(runtime, check_rows=4)
    slots, positions = torch.tensor([5, 6, 9]), torch.tensor([0, 1, 2])
    for layer in HELD:
        pool.layer(layer).encode(*torch.randn(2, 3, HEADS, DIM), slots, positions)
        pool.check.wrote(layer, SimpleNamespace(out_cache_loc=slots, positions=positions))
    pool.move_kv_cache(torch.tensor([20, 5]), torch.tensor([5, 6]))
    saved = pool.get_cpu_copy(torch.tensor([9]))
    pool.load_cpu_copy(saved, torch.tensor([21]))
    now = SimpleNamespace(slot_indices=torch.tensor([20, 5, 21]), positions=positions)
    tree = SimpleNamespace(tree_core=SimpleNamespace(walk_for_kv_canary=lambda **_: now))
    pool.check.compare_cached(tree)
    pool.layer(4).rows[5, 1] ^= 4
    with pytest.raises(DamagedRow, match="slot 5 of layer 4 .* at position 1, one of 1 such rows"):
        pool.check.compare_cached(tree)
    pool.check.compare_cached(SimpleNamespace())  # a cache without prefixes
    runner, asked = SimpleNamespace(token_to_kv_pool=pool), []

    def scheduler(idle: bool) -> SimpleNamespace:
        more = {"tree_cache": tree, "tp_worker": SimpleNamespace(model_runner=runner), "_engine_paused": False}
        more["weight_updater"] = SimpleNamespace(offload_tags=set())
        return SimpleNamespace(**more, is_fully_idle=lambda ignore_waiting: asked.append(ignore_waiting) or idle)

    plugin._flush_cache(scheduler(idle=False))  # SGLang will not empty the cache, and requests may be writing to it
    with pytest.raises(DamagedRow):
        plugin._flush_cache(scheduler(idle=True))
    assert asked == [False, False]
    # Sleep gives rows back and then empties the cache: they are compared before.
    manager = SimpleNamespace(scheduler=scheduler(idle=True))
    for tags in (None, ["kv_cache"]):
        with pytest.raises(DamagedRow):
            plugin._before_release(manager, SimpleNamespace(tags=tags))
    plugin._before_release(manager, SimpleNamespace(tags=["weights"]))
    plugin._before_release(SimpleNamespace(scheduler=None), SimpleNamespace(tags=None))
    manager.scheduler.weight_updater.offload_tags.add("kv_cache")
    plugin._flush_cache(manager.scheduler)
    x = torch.zeros(1, HEADS * DIM)
    with pytest.raises(NotImplementedError, match="checksums"):
        pool.set_kv_buffer(SimpleNamespace(layer_id=1), torch.tensor([1]), x, x)
    checked = replace(runtime, options=KVQuantOptions(check_rows=4))
    assert checked.counted_bytes_per_token == runtime.counted_bytes_per_token + 4 * len(HELD)


@pytest.mark.parametrize("getter", ["get_key_buffer", "get_value_buffer", "get_kv_buffer"])
def test_no_dense_view(pool, getter):
    with pytest.raises(NotImplementedError, match="packed pool"):
        getattr(pool, getter)(0)


def test_no_dense_view_for_hicache(pool):
    with pytest.raises(NotImplementedError):
        pool.get_device_pool_infos()
    assert not hasattr(pool, "k_buffer") and not hasattr(pool, "get_contiguous_buf_infos")


def test_scales_are_refused(pool):
    x = torch.zeros(1, HEADS * DIM)
    with pytest.raises(NotImplementedError, match="scales"):
        pool.set_kv_buffer(SimpleNamespace(layer_id=1), torch.tensor([1]), x, x, k_scale=2.0)


def test_keys_with_means_are_not_written_without_positions():
    with pytest.raises(NotImplementedError, match="page's mean are written by the backend, with positions"):
        write(make_pool(make_runtime(means=True)), 4, [1])


@pytest.mark.parametrize(
    "allocator, granularity, means",
    [
        ("uniform", "segment", False),
        ("template", "segment", False),
        ("template", "segment", True),
        ("paper", "block", False),
        ("paper", "segment", False),
        ("product", "segment", True),
    ],
)
def test_tensor_parallel_ranks_hold_the_same_codes(allocator, granularity, means):
    """Two ranks of two heads store what one rank of four stores, and agree on bytes per token."""
    kind = {"allocator": allocator, "granularity": granularity, "means": means}
    whole = make_pool(make_runtime(**kind)).layer(4)
    runtimes = [make_runtime(heads=slice(a, a + 2), **kind) for a in (0, 2)]
    assert runtimes[0].bytes_per_token == runtimes[1].bytes_per_token
    loc, positions = torch.tensor([1, 2]), torch.tensor([3, 2_000])
    k, v = torch.randn(2, 2, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    if means:
        k = whole.codec.mean.at(positions) + 0.1 * k
    whole.encode(k, v, loc, positions)
    flags = reference.scales_of(whole.codec, whole.gather(loc))[..., 0] < 0
    assert bool(flags.all(0).all()) == means == bool(flags.any())
    for rank, half in enumerate(make_pool(runtime).layer(4) for runtime in runtimes):
        mine = slice(2 * rank, 2 * rank + 2)
        half.encode(k[:, mine], v[:, mine], loc, positions)
        for a, b in zip(half.dense(loc, positions), whole.dense(loc, positions), strict=True):
            assert torch.equal(a, b[:, mine])


def test_layers_share_one_list_of_templates():
    """Whatever heads a layer or a rank has: kernels are compiled for the list."""
    table = make_runtime("paper").table
    lists, kinds = set(), set()
    for heads in (slice(None), slice(0, 2), slice(2, 4)):
        for i in HELD:
            tables = TritonLayer(table.layer_codec(i, heads), "cpu", table.k_templates).tables
            lists.add(tables.k_templates)
            kinds.update(tables.k_kinds.tolist())
    (templates,) = lists
    assert 1 < len(templates) <= 4 and kinds <= set(range(len(templates)))


def test_what_is_slow_is_said():
    (line,) = make_runtime("product", granularity="block").slow_lines()
    assert all(part in line for part in ("--kv-quant-allocator product", "slower", "--kv-quant-granularity segment"))
    for quick in (make_runtime(), make_runtime("uniform"), make_runtime("paper")):
        assert quick.slow_lines() == []
    # 2.7 bits of values end in the middle of a segment.
    table = make_runtime().table
    odd = replace(make_runtime(), table=AllocationTable(replace(table.header, v_bits=2.7), table.tensors))
    (line,) = odd.slow_lines()
    assert "V 2.7 bits of head_dim" in line and "1, 2, 3, 4, 5, 6, 7, 8 bits fill them" in line
    prefill = SimpleNamespace(name="SGLang's Triton kernel", why="compute capability 10.0")
    (line,) = replace(make_runtime(), buffers=SimpleNamespace(prefill=prefill)).slow_lines()
    assert "Triton" in line and "compute capability 10.0" in line and "FlashAttention-3" in line


def test_the_line_and_the_summary_name_the_granularity():
    assert "(paper by segments)" in make_runtime("paper").line()
    assert "(paper by blocks)" in make_runtime("paper", granularity="block").line()
    assert "(template)" in make_runtime(means=True).line()
    assert "(template without page means)" in make_runtime().line()
    assert make_runtime("paper").summary()["granularity"] == "segment"


def test_the_line_and_the_summary_say_what_the_cache_costs():
    runtime = make_runtime(means=True)
    assert runtime.line().endswith(", not measured")
    assert (runtime.summary()["quality"], runtime.summary()["page"]) == (None, 512)
    cost = Quality(0.0125, 0.02, 3, 0.05, 256)
    runtime = replace(runtime, table=runtime.table.with_quality(cost))
    assert runtime.summary()["quality"] == cost.to_dict()
    assert runtime.line().endswith(
        "KL of the answer 0.0125 nats a token over 256 held-out tokens, attention 0.0200, worst layer 3 0.0500"
    )
    assert make_runtime("uniform").summary()["page"] == 0


def test_memory_is_listed_by_kind():
    runtime = make_runtime()
    codec = runtime.table.layer_codec(1)
    one = sum(x.nbytes for x in (codec.k_in, codec.q_in, codec.v_in, codec.v_out, codec.k_weight))
    assert runtime.summary()["memory"] == {"tables": len(HELD) * one}
    layer = TritonLayer(codec, "cpu", runtime.table.k_templates)
    tensors = [layer.tables, layer.unpacker.k, layer.unpacker.v]
    assert layer.table_bytes >= sum(t.nbytes for x in tensors for t in vars(x).values() if isinstance(t, torch.Tensor))


def test_capacity_counts_packed_bytes():
    """What SGLang divides its memory by: row bytes of all layers and what it allocates per token itself."""
    from sglang_blockgtq import plugin, runtime

    runtime.set_current(make_runtime())
    try:
        asked = SimpleNamespace(_kvq=KVQuantOptions())
        configurator = SimpleNamespace(server_args=asked, is_draft_worker=False)
        assert plugin._compute_cell_size(None, None, configurator, LAYERS) == len(HELD) * 4 * 52 + 64
    finally:
        runtime.set_current(None)
    with pytest.raises(RuntimeError, match="did not run"):
        plugin._compute_cell_size(None, None, configurator, LAYERS)
