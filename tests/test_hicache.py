"""Packed rows in host memory and in storage, by SGLang's own host pool, its kernels replaced by copies of bytes."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig, PoolName, PoolTransfer
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

from sglang_blockgtq import hicache, plugin, runtime
from sglang_blockgtq.hicache import PackedHostPool, check_storage
from sglang_blockgtq.kernels.layer import TritonLayer
from sglang_blockgtq.options import KVQuantError

from .test_pool import DIM, HEADS, HELD, make_pool, make_runtime

PAGE, SIZE = 16, 96  # tokens of a page, and of the pool
KERNELS = (
    ("layer_first", "kernel"),
    ("page_first", "kernel"),
    ("layer_first", "direct"),
    ("page_first_direct", "direct"),
)


@pytest.fixture(autouse=True)
def kernels(request, monkeypatch):
    """Copies of bytes, but for tests that are for a GPU."""
    if request.node.get_closest_marker("gpu"):
        return
    file = Path(__file__).parent / "server" / "hicache_on_cpu" / "blockgtq_hicache_on_cpu.py"
    spec = importlib.util.spec_from_file_location("hicache_on_cpu", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.lend_kernels(partial(monkeypatch.setattr, raising=False))


@pytest.fixture
def host(monkeypatch):
    """host(pool) -> its host pool."""
    monkeypatch.setattr(hicache, "get_allocator_type", lambda: "default")
    made = []

    def make(pool, layout="page_first", ratio=2.0, size=0, table_hash="ab" * 32, chunk="raw", page=PAGE):
        memory = SimpleNamespace(hicache_ratio=ratio, hicache_mem_layout=layout)
        monkeypatch.setattr(hicache, "get_memory", lambda: memory)
        with host_memory_budget_scope(1 << 30):
            made.append(PackedHostPool(pool, page, size, table_hash=table_hash, chunk_attention=chunk))
        return made[-1]

    yield make
    for host_pool in made:
        host_pool.destroy()  # pinned memory that is freed pinned cannot be pinned again


def interleaved_pool(runtime, device="cpu"):
    """As on a GPU."""
    table = runtime.table
    layers = {i: TritonLayer(table.layer_codec(i), device, table.k_templates) for i in HELD}
    return make_pool(SimpleNamespace(layers=layers), SIZE, PAGE, device)


def fill(pool):
    """Other bytes in every row."""
    generator = torch.Generator().manual_seed(0)
    for layer in pool.layers.values():
        layer.rows.copy_(torch.randint(256, layer.rows.shape, dtype=torch.uint8, generator=generator))


def rows(pool, slots):
    return [layer.gather(slots.to(layer.rows.device)).cpu() for layer in pool.layers.values()]


def pages(*numbers):
    return torch.cat([torch.arange(n * PAGE, (n + 1) * PAGE) for n in numbers])


def round_trip(pool, host_pool, io):
    """Three pages to host memory, and back to three others."""
    device = next(iter(pool.layers.values())).rows.device
    fill(pool)
    was, there = pages(1, 4, 2), host_pool.alloc(3 * PAGE)
    before = rows(pool, was)
    kept = rows(pool, pages(2, 4))
    to_kernel = device if io == "kernel" else "cpu"
    # As the controller hands them over: what stages pages on the device itself copies them from the host's side.
    written = there if host_pool.can_use_write_back_jit else there.to(to_kernel)
    host_pool.backup_from_device_all_layer(pool, written, was.to(to_kernel), io)
    if device.type == "cuda":
        torch.cuda.synchronize()
    now = pages(5, 1, 3)
    for layer in range(len(HELD)):
        host_pool.load_to_device_per_layer(pool, there.to(to_kernel), now.to(to_kernel), layer, io)
        if device.type == "cuda":
            torch.cuda.synchronize()
        loaded = [torch.equal(a, b) for a, b in zip(rows(pool, now), before, strict=True)]
        assert loaded == [i <= layer for i in range(len(HELD))]  # a layer alone, none of the next
    assert all(map(torch.equal, rows(pool, pages(2, 4)), kept))


@pytest.mark.parametrize("layout, io", KERNELS)
@pytest.mark.parametrize("make", [lambda r: make_pool(r, SIZE, PAGE), interleaved_pool], ids=["rows", "interleaved"])
def test_rows_go_to_host_memory_and_back(host, make, layout, io):
    pool = make(make_runtime())
    round_trip(pool, host(pool, layout), io)


@pytest.mark.gpu
@pytest.mark.parametrize("layout, io", KERNELS)
@pytest.mark.parametrize("k_bits", [3, 8])
def test_rows_go_to_host_memory_and_back_on_a_gpu(host, k_bits, layout, io):
    pool = interleaved_pool(make_runtime("uniform", k_bits=k_bits), "cuda")
    host_pool = host(pool, layout)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # as the controller: batched copies take no default stream
        round_trip(pool, host_pool, io)


def test_pages_of_less_than_a_block_are_refused(host):
    """Their rows would be mixed with those of other requests."""
    runtime = make_runtime()
    with pytest.raises(KVQuantError, match="--page-size 8: .* blocks of 16 tokens; use --page-size 64"):
        host(interleaved_pool(runtime), page=8)
    assert host(make_pool(runtime, SIZE, PAGE), page=8).page_size == 8


def test_other_storage_is_refused_when_it_is_attached(host):
    packed = host(make_pool(make_runtime(), SIZE, PAGE))
    with pytest.raises(KVQuantError, match="storage backend mooncake: not with .*; use file"):
        check_storage(packed, "mooncake")
    assert check_storage(packed, "file") is None


def test_rows_of_several_widths_are_refused(host):
    runtime = make_runtime("paper", granularity="block")
    assert len({layer.layout.row_bytes for layer in runtime.layers.values()}) > 1
    with pytest.raises(KVQuantError, match="248, 256.* bytes .*--kv-quant-granularity segment"):
        host(make_pool(runtime, SIZE, PAGE))


def bf16_pool(size):
    """What stock SGLang has beside: keys and values of the same heads."""
    rows = tuple(torch.zeros(SIZE + PAGE, HEADS, DIM, dtype=torch.bfloat16) for _ in HELD)
    pointers = torch.tensor([x.data_ptr() for x in rows], dtype=torch.uint64)
    info = MHABufferInfo(
        buffers=KVBuffers(k=rows, v=rows, k_data_ptrs=pointers, v_data_ptrs=pointers, layout=KVBufferLayout.NHD),
        page_size=PAGE, head_num=HEADS, head_dim=DIM, v_head_dim=DIM, dtype=torch.bfloat16, device=rows[0].device,
    )  # fmt: skip
    with host_memory_budget_scope(1 << 30):
        return MHATokenToKVPoolHost(
            info, 2.0, size, PAGE, "page_first", pin_memory=False, device_capacity_tokens=SIZE, start_layer=0,
            end_layer=len(HELD),
        )  # fmt: skip


def test_host_memory_holds_as_many_more_tokens_as_rows_are_smaller(host):
    """By bytes and by ratio, at 3 bits: 52 bytes for each head, 256 in bf16."""
    pool, size = make_pool(make_runtime(), SIZE, PAGE), 0.01  # GB
    packed, stock = host(pool, size=size), bf16_pool(size)
    assert (packed.size_per_token, stock.size_per_token) == (len(HELD) * HEADS * 52, len(HELD) * HEADS * 256)
    assert abs(packed.size / stock.size - 256 / 52) < 0.05  # each rounds to pages
    assert 0 <= packed.kv_buffer.nbytes - size * 1e9 < 2 * PAGE * packed.size_per_token
    by_ratio = host(pool, ratio=3.0)
    assert by_ratio.size == 3 * SIZE + PAGE  # and a page that pads
    assert by_ratio.kv_buffer.nbytes == by_ratio.size * packed.size_per_token


def test_what_sglang_sizes_host_memory_by():
    """Where neither a ratio nor a size is given it fits what it knows of, by the bytes on the device."""
    pool = make_pool(make_runtime(), SIZE, PAGE)
    params = SimpleNamespace(token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool))
    assert plugin._estimate_hicache_bytes(None, params) == (SIZE + PAGE) * len(HELD) * HEADS * 52


def test_the_engine_builds_this_host_pool(monkeypatch):
    """Named after the table in use, and of the size that the engine asks for, if it does."""
    made = []
    monkeypatch.setattr(hicache, "PackedHostPool", lambda *args, **kwargs: made.append((args, kwargs)))
    served = make_runtime()
    monkeypatch.setattr(runtime, "_current", served)
    monkeypatch.setattr(runtime_context, "get_memory", lambda: SimpleNamespace(hicache_size=7))
    pool, named = (
        make_pool(served, SIZE, PAGE),
        {"table_hash": served.table.header.table_hash, "chunk_attention": "raw"},
    )
    plugin._build_kv_host_pool(None, kv_pool=pool, page_size=PAGE, use_mla=False)
    plugin._build_kv_host_pool(None, kv_pool=pool, page_size=PAGE, host_size=0.5, pool_label="full")
    assert made == [((pool, PAGE, 7), {**named, "label": "kv"}), ((pool, PAGE, 0.5), {**named, "label": "full"})]


def storage(folder, host_pool):
    """The file backend as the controller makes it."""
    from sglang.srt.managers.cache_controller import storage_model_name

    config = HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
        enable_storage_metrics=False, is_page_first_layout=host_pool.layout == "page_first",
        model_name=storage_model_name("served/model", host_pool), extra_config={"file_storage_path": str(folder)},
    )  # fmt: skip
    store = HiCacheFile(config)
    store.register_mem_pool_host(host_pool)
    store.register_mem_host_pool_v2(host_pool, PoolName.KV)
    return store


def transfer(host_pool, slots, keys):
    return [PoolTransfer(name=PoolName.KV, host_indices=slots, keys=keys)]


@pytest.mark.parametrize("layout", ["page_first", "layer_first", "page_first_direct"])
def test_pages_in_files_come_back_bit_by_bit(host, tmp_path, layout):
    pool, keys = make_pool(make_runtime(), SIZE, PAGE), ["first", "second"]
    writer, io = host(pool, layout), "direct" if layout == "page_first_direct" else "kernel"
    fill(pool)
    before, there = rows(pool, pages(2, 3)), writer.alloc(2 * PAGE)
    writer.backup_from_device_all_layer(pool, there, pages(2, 3), io)
    assert storage(tmp_path, writer).batch_set_v2(transfer(writer, there, keys)) == {PoolName.KV: [True, True]}
    assert {f.stat().st_size for f in tmp_path.iterdir()} == {PAGE * writer.size_per_token}
    reader = host(pool, layout)
    reader.alloc(PAGE)
    there = reader.alloc(2 * PAGE)  # other pages than the writer's
    store = storage(tmp_path, reader)
    assert store.batch_exists_v2(keys).kv_hit_pages == 2
    assert store.batch_get_v2(transfer(reader, there, keys)) == {PoolName.KV: [True, True]}
    for layer in range(len(HELD)):
        reader.load_to_device_per_layer(pool, there, pages(5, 1), layer, io)
    assert all(map(torch.equal, rows(pool, pages(5, 1)), before))


def test_storage_keys_tell_rows_apart(host, tmp_path):
    """Of other tables, in another order of bytes, of the other way to attend to a chunk; and stock pages."""
    runtime = make_runtime()
    pool = make_pool(runtime, SIZE, PAGE)
    stores = {
        "these": storage(tmp_path, host(pool)),
        "another table": storage(tmp_path, host(pool, table_hash="cd" * 32)),
        "another layout": storage(tmp_path, host(pool, "layer_first")),
        "on a GPU": storage(tmp_path, host(interleaved_pool(runtime))),
        "quantized chunks": storage(tmp_path, host(pool, chunk="quantized")),
        "bf16": storage(tmp_path, bf16_pool(0)),
    }
    assert storage(tmp_path, host(pool)).config_suffix == stores["these"].config_suffix
    assert "ab" * 8 in stores["these"].config_suffix
    for name, store in stores.items():
        assert not store.exists("page"), name
        assert store.set("page", torch.zeros(8))
        assert store.exists("page")
    assert len(list(tmp_path.iterdir())) == len(stores)


def test_bits_are_part_of_a_tables_hash():
    hashes = {make_runtime(k_bits=bits).table.header.table_hash for bits in (3.0, 4.0)}
    assert len(hashes) == 2


def test_every_way_to_a_layer_waits_for_its_load():
    """SGLang's counter by the place of a layer in its stage; a wrapper knows its own."""
    waited = []
    pool = make_pool(make_runtime(), SIZE, PAGE)
    pool.start_layer = 1
    pool.layer(4)
    pool.register_layer_transfer_counter(SimpleNamespace(wait_until=waited.append))
    for layer in HELD:
        pool.layer(layer)
    assert waited == [layer - 1 for layer in HELD]
    pool.wrapper = SimpleNamespace(_wait_for_layer=lambda layer: waited.append(f"wrapper {layer}"))
    pool.layer(6)
    assert waited[len(HELD) :] == ["wrapper 6"]
