"""PackedKVPool by itself: what it stores, moves, copies and refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.kernels import naive
from sglang_blockgtq.options import KVQuantOptions
from sglang_blockgtq.pool import PackedKVPool
from sglang_blockgtq.runtime import Runtime

LAYERS, HEADS, DIM = 3, 4, 64


def make_runtime(allocator="template", heads=slice(None), k_bits=3.0, granularity="block") -> Runtime:
    torch.manual_seed(0)
    energy = torch.logspace(-2, 2, DIM // 2, dtype=torch.float64)
    q = energy * torch.rand(LAYERS, HEADS, DIM // 2, dtype=torch.float64)
    k = energy * torch.rand(LAYERS, HEADS, DIM // 2, dtype=torch.float64)
    moments = Moments(q, k, torch.full((LAYERS, HEADS), float(DIM), dtype=torch.float64), 2048)
    rope = [RopeBlocks(DIM, DIM)] * LAYERS
    table = build_table(moments, rope, k_bits=k_bits, v_bits=3, allocator=allocator, granularity=granularity)
    held = len(range(HEADS)[heads])
    return Runtime(KVQuantOptions(), table, heads, tuple(range(LAYERS)), "file", 0.0, LAYERS * held * 4 * DIM)


def make_pool(runtime, size=32, page=4) -> PackedKVPool:
    return PackedKVPool(
        size, page, runtime=runtime, device="cpu", enable_memory_saver=False, start_layer=0, end_layer=LAYERS
    )


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
    assert [tuple(r.shape) for r in pool.rows] == [(slots, 4 * 52)] * LAYERS
    assert pool.runtime.bytes_per_token == LAYERS * 4 * 52
    assert sum(pool.get_kv_size_bytes()) == slots * LAYERS * 4 * 52
    assert pool.dtype == torch.uint8 and pool.mem_usage > 0


def test_write_then_read(pool):
    k, v = write(pool, 1, [3, 9, 4])
    got_k, got_v = pool.dequant(1, torch.tensor([3, 9, 4]))
    want_k, want_v = naive.round_trip(pool.codecs[1], k, v)
    assert torch.equal(got_k, want_k) and torch.equal(got_v, want_v)
    assert ((got_v - v).square().sum() / v.square().sum()) < 0.05
    assert not pool.rows[0].any() and not pool.rows[2].any()
    others = torch.tensor([s for s in range(len(pool.rows[1])) if s not in (3, 9, 4)])
    assert not pool.gather(1, others).any()


def test_move(pool):
    for layer in range(LAYERS):
        write(pool, layer, [1, 2, 3], seed=layer)
    every = torch.arange(len(pool.rows[0]))
    before = [pool.gather(i, every) for i in range(LAYERS)]
    pool.move_kv_cache(torch.tensor([20, 2, 1]), torch.tensor([1, 3, 2]))  # overlapping source and target
    for i, old in enumerate(before):
        assert old[1:4].any()
        old[[20, 2, 1]] = old[[1, 3, 2]]
        assert torch.equal(pool.gather(i, every), old)


def test_cpu_copy(pool):
    for layer in range(LAYERS):
        write(pool, layer, [5, 6], seed=layer)
    indices = torch.tensor([6, 5])
    saved = pool.get_cpu_copy(indices, mamba_indices=None, req_pool_index=None)
    kept = [pool.gather(i, indices) for i in range(LAYERS)]
    for rows in pool.rows:
        rows.fill_(255)
    pool.load_cpu_copy(saved, indices, mamba_indices=None)
    others = torch.tensor([s for s in range(len(pool.rows[0])) if s not in (5, 6)])
    for i, old in enumerate(kept):
        assert old.any() and torch.equal(pool.gather(i, indices), old)
        assert bool((pool.gather(i, others) == 255).all())


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
        pool.set_kv_buffer(SimpleNamespace(layer_id=0), torch.tensor([1]), x, x, k_scale=1.0)


@pytest.mark.parametrize(
    "allocator, granularity",
    [
        *((name, "block") for name in ("uniform", "paper", "product", "template")),
        ("paper", "slot"),
        ("product", "slot"),
    ],
)
def test_tensor_parallel_ranks_hold_the_same_codes(allocator, granularity):
    """Two ranks of two heads store what one rank of four stores, and agree on bytes per token."""
    whole = make_pool(make_runtime(allocator, granularity=granularity))
    halves = [make_pool(make_runtime(allocator, slice(a, a + 2), granularity=granularity)) for a in (0, 2)]
    assert halves[0].runtime.bytes_per_token == halves[1].runtime.bytes_per_token
    k, v = write(whole, 2, [1, 2])
    for rank, half in enumerate(halves):
        mine = slice(2 * rank, 2 * rank + 2)
        half.set_kv_buffer(
            SimpleNamespace(layer_id=2), torch.tensor([1, 2]), k[:, mine].flatten(1), v[:, mine].flatten(1)
        )
        for a, b in zip(half.dequant(2, torch.tensor([1, 2])), whole.dequant(2, torch.tensor([1, 2])), strict=True):
            assert torch.equal(a, b[:, mine])


def test_layers_share_one_list_of_templates():
    """Whatever heads a layer or a rank has: kernels are compiled for the list."""
    runtime = make_runtime("paper", granularity="slot")
    lists, kinds = set(), set()
    for heads in (slice(None), slice(0, 2), slice(2, 4)):
        rank = replace(runtime, heads=heads)
        for tables in make_pool(rank)._device_tables():
            assert tables.row.in_columns
            lists.add(tables.k_templates)
            kinds.update(tables.k_kinds.tolist())
    (templates,) = lists
    assert 1 < len(templates) <= 4 and kinds == set(range(len(templates)))


def test_what_the_generic_kernel_reads_is_said():
    from sglang_blockgtq.calibrate.table import AllocationTable

    line = make_runtime("product").slow_line()
    assert "--kv-quant-allocator product" in line and "far slower; with --kv-quant-granularity slot" in line
    for quick in (make_runtime(), make_runtime("uniform"), make_runtime("paper", granularity="slot")):
        assert quick.slow_line() is None
    # 2.75 bits of values end in the middle of a slot.
    table = make_runtime().table
    odd = replace(make_runtime(), table=AllocationTable(replace(table.header, v_bits=2.7), table.tensors))
    assert "V 2.7 bits of head_dim" in odd.slow_line() and "1, 2, 3, 4, 5, 6, 7, 8 bits fill them" in odd.slow_line()


def test_the_line_and_the_summary_name_slots():
    runtime = make_runtime("paper", granularity="slot")
    assert "(paper by slots)" in runtime.line() and runtime.summary()["granularity"] == "slot"
    assert "(paper)" in make_runtime("paper").line() and make_runtime("paper").summary()["granularity"] == "block"


def test_a_cached_table_is_of_its_granularity():
    from sglang_blockgtq.runtime import cache_path

    def path(allocator, granularity):
        options = KVQuantOptions(cache_dir="/c", allocator=allocator, granularity=granularity)
        return cache_path(options, "config", "weights", "text")

    paths = [path(a, g) for a in ("paper", "product") for g in ("block", "slot")]
    assert len(set(paths)) == 4


def test_capacity_counts_packed_bytes():
    """What SGLang divides its memory by: row bytes of all layers and what it allocates per token itself."""
    from sglang_blockgtq import plugin, runtime

    served = make_runtime()
    runtime.set_current(served)
    try:
        asked = SimpleNamespace(_kvq=KVQuantOptions().to_dict())
        configurator = SimpleNamespace(server_args=asked, is_draft_worker=False)
        assert plugin._compute_cell_size(None, None, configurator, LAYERS) == LAYERS * 4 * 52 + 64
    finally:
        runtime.set_current(None)
    with pytest.raises(RuntimeError, match="did not run"):
        plugin._compute_cell_size(None, None, configurator, LAYERS)


def test_cache_file_is_the_same_in_every_process(tmp_path):
    """A table kept by one start must be found by the next."""
    import subprocess
    import sys

    code = (
        "from sglang_blockgtq.options import KVQuantOptions; from sglang_blockgtq.runtime import cache_path;"
        "print(cache_path(KVQuantOptions(cache_dir='/cache'), 'config', 'weights', 'text'))"
    )
    paths = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        for _ in range(2)
    }
    assert len(paths) == 1 and paths.pop().startswith("/cache/tables/")
