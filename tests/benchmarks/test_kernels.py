"""The kernel benchmark without a GPU: its cases, data, page tables, checks and files, with stand-ins for the peers."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.kernels import __main__ as cli
from benchmarks.kernels import cases, data, extend, layers, ours, peers, profile, record, run, subjects, timing
from benchmarks.kernels.reference import dense_attention, relative_error
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.format.layout import gather_rows, scatter_rows

SHAPE = cases.Shape("tiny", 6, 2, 64)
TEMPLATE = cases.PACKED[0]
FA3, FLASHINFER, FA3_FP8, FLASHINFER_FP8 = cases.DENSE


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(subjects, "small_lengths", lambda queries: (queries, 20, 33))
    monkeypatch.setattr(subjects, "WRITE_SLOTS", 2048)


@pytest.fixture(scope="module")
def pool() -> data.Pool:
    return data.Pool(SHAPE, 512, "cpu")


def _case(method, kernel="decode", batch=2, context=40, index=cases.SHUFFLED, shape=SHAPE) -> cases.Case:
    return cases.Case(shape, kernel, method, batch, context, index)


def _reference_encoder(tables, rows, codec=None):
    """As the kernel's, but in no time: for tests of what reads the rows."""
    codec = codec or data.make_codec(SHAPE, TEMPLATE)
    return lambda k, v, loc, at: scatter_rows(tables.row, rows, loc, reference.encode(codec, k, v, at))


@pytest.fixture
def packed(pool) -> subjects.Packed:
    return subjects.Packed(TEMPLATE, pool, _reference_encoder)


def _fake_timer(launch, num_bytes, windows, seconds) -> timing.Timing:
    for i in {0, windows - 1}:
        launch(i)
    return timing.Timing(num_bytes / 1e3, "graph", windows, 20)


# --- cases and arguments -------------------------------------------------------------------------------------------


def test_every_case_of_the_table_is_there():
    every = cases.cases()
    assert len(set(every)) == len(every)
    decode = [c for c in every if c.kernel == "decode" and c.shape.name == "Llama-3.1-8B"]
    for method in cases.DENSE + cases.PACKED:
        wanted = {(b, n, i) for b, n in cases.LENGTHS for i in ("shuffled", "contiguous")}
        assert {(c.batch, c.context, c.index) for c in decode if c.method == method} == wanted
    encode = [c for c in every if c.kernel == "encode" and c.shape.name == "SmolLM2"]
    assert {(c.method.key, c.batch) for c in encode} >= {("bf16", 64), ("template-k3v3", 8192)}
    assert {c.queries for c in every if c.kernel.startswith("decode_q")} == {2, 4, 8}
    # What a ratio is taken to comes before what is related to it.
    assert [c.method.k_bits for c in decode][: 2 * 14] == [16] * 2 * 14


def test_filters():
    only = cases.cases(["qwen2.5-3b/DECODE/template-k3v3"], [(8, 32768)])
    assert {(c.key, c.batch, c.context) for c in only} == {("Qwen2.5-3B/decode/template-k3v3", 8, 32768)}
    assert {c.index for c in only} == {"shuffled", "contiguous"}
    assert {c.index for c in cases.cases(quick=True)} == {"shuffled"}
    assert len(cases.cases(["smollm2/encode/*", "smollm2/*/fa3-bf16"])) == 18 + 14 + 6
    with pytest.raises(ValueError, match="no such case.*Qwen2.5-3B/decode/template-k3v3"):
        cases.cases(["llama/*"])


def test_lengths_argument():
    assert cli.lengths("8x32K") == (8, 32768)
    assert cli.lengths("1X100") == (1, 100)
    for wrong in ("8", "x4K", "0x4K", "2x", "axb", "1x-4K"):
        with pytest.raises(cli.argparse.ArgumentTypeError, match="8x32K"):
            cli.lengths(wrong)


def test_tuning_argument():
    assert cli.tuning("registers=168") == ("registers", 168)
    for wrong in ("registers", "registers=", "registers=0", "registers=a", "colour=3", "=3"):
        with pytest.raises(cli.argparse.ArgumentTypeError, match="NAME one of block_n, short_n, stages"):
            cli.tuning(wrong)


def test_tuning_is_taken_for_every_loop(monkeypatch):
    """Else the rows of some models would be recorded under a tuning that they did not run with."""
    names = "TUNING", "TEMPLATES_TUNING", "WIDE_TUNING"
    before = {name: getattr(cli.attention, name) for name in names}
    for name in names:
        monkeypatch.setattr(cli.attention, name, before[name])
    monkeypatch.setattr(cli.cuda, "CHOICE", "auto")
    cli.retune([])
    assert cli.cuda.CHOICE == "auto"
    recorded = cli.retune([("stages", 3)])
    assert cli.cuda.CHOICE == "triton", "another kernel has no such loop"
    for name in names:
        assert getattr(cli.attention, name) == cli.replace(before[name], stages=3)
        assert recorded[name.lower()]["stages"] == 3


def test_command_line_without_a_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["--out", str(tmp_path / "a.csv")]) == 2
    assert "CUDA" in capsys.readouterr().err
    assert cli.main(["--out", str(tmp_path / "a.csv"), "--only", "nothing/*"]) == 2
    assert "no such case" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--out", str(tmp_path / "a.csv"), "--tuning", "stages=3", "--decode-kernel", "cuda"])
    assert "--tuning is of Triton's decode" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [cases.CONTIGUOUS, cases.SHUFFLED])
def test_page_tables_of_every_size_address_the_same_slots(order):
    lengths = (1, 16, 17, 300)
    index = data.Index.of(lengths, order, "cpu")
    indptr, slots = index.flat(1, torch.int64)
    assert indptr.tolist() == [0, 1, 17, 34, 334]
    assert len(set(slots.tolist())) == 334 and max(slots.tolist()) < index.slots
    if order == cases.CONTIGUOUS:
        assert slots[34:].tolist() == list(range(3 * 128, 3 * 128 + 300))
    else:
        assert (slots[34:50].diff() == 1).all() and not (slots[34:].diff() == 1).all()
    for page in index.page_sizes():
        table, (flat_indptr, flat) = index.table(page), index.flat(page)
        assert table.dtype == flat.dtype == torch.int32
        for b, n in enumerate(lengths):
            count = -(-n // page)
            mine = flat[flat_indptr[b] : flat_indptr[b + 1]]
            assert torch.equal(table[b, :count], mine) and not table[b, count:].any()
            tokens = (mine.long()[:, None] * page + torch.arange(page)).flatten()[:n]
            assert torch.equal(tokens, slots[indptr[b] : indptr[b + 1]])
            assert (count - 1) * page + int(index.last_page_len(page)[b]) == n


def test_windows_are_disjoint_views(pool):
    w = data.windows(pool.k, 100)
    assert w.shape == (5, 100, 2, 64)
    assert w[3].data_ptr() == pool.k[300:].data_ptr() and w[3].is_contiguous()


def test_pool_is_uneven_finite_and_never_zero(pool):
    energy = pool.k.float().square().mean(0)
    assert float(energy.max() / energy.median()) > 10
    # The moments that tables are built from are those of the data.
    wanted = data.moments(SHAPE).k[0]
    found = energy[:, data.RopeBlocks(64, 64).channels()].sum(-1).double()
    torch.testing.assert_close(found, wanted, rtol=0.4, atol=0)
    assert bool((pool.k != 0).any(-1).all()) and bool((pool.v != 0).any(-1).all())
    for x, y in zip(pool.fp8, (pool.k, pool.v), strict=True):
        assert x.dtype == data.FP8 and relative_error(x, y) < 0.05
    again = data.Pool(SHAPE, 512, "cpu")
    assert torch.equal(again.k, pool.k) and torch.equal(again.v, pool.v)
    q = pool.queries(7)
    assert q.shape == (7, 6, 64)
    # Softmax is neither flat nor one-hot.
    logits = pool.sm_scale * torch.einsum("qd,td->qt", q[:, 0].float(), pool.k[:, 0].float())
    assert 0.5 < float(logits.std()) < 4


@pytest.mark.parametrize("tokens", [512, 250])  # 250: the last block is not full
def test_rows_are_the_pools_own_tokens(tokens, monkeypatch):
    monkeypatch.setattr(data, "SLICE", 200)  # several slices, the last one short
    pool = data.Pool(SHAPE, tokens, "cpu")
    packed = subjects.Packed(TEMPLATE, pool, _reference_encoder)
    row, wanted = packed.tables.row, reference.encode(packed.codec, pool.k, pool.v, torch.arange(tokens))
    assert len(packed.rows) == -(-tokens // 16) * 16
    assert torch.equal(gather_rows(row, packed.rows, torch.arange(tokens)), wanted)
    # A window is a pool of its own: its slots hold the tokens that the dense windows have there.
    at = data.Index.of((20, 33), cases.SHUFFLED, "cpu").flat(1, torch.int64)[1]
    assert torch.equal(gather_rows(row, data.windows(packed.rows, 80)[2], at), wanted[160 + at])
    assert packed.num_bytes(_case(TEMPLATE)) == 80 * packed.tables.row.row_bytes
    packed.close()
    assert "rows" not in vars(packed)


# --- references ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("queries", [1, 4])
def test_dense_attention_against_a_loop(pool, queries, sinks):
    index = data.Index.of((queries, 20), cases.SHUFFLED, "cpu")
    q = pool.queries(2 * queries)
    sink = torch.arange(6) / 2.0 if sinks else torch.full((6,), -torch.inf)
    found = dense_attention(q, pool.k, pool.v, index, pool.sm_scale, queries, sink if sinks else None)
    indptr, slots = index.flat(1, torch.int64)
    for b, n in enumerate(index.lengths):
        at = slots[indptr[b] : indptr[b + 1]]
        for i in range(queries):
            seen = at[: n - queries + i + 1]
            for h in range(6):
                k, v = pool.k[seen, h // 3].double(), pool.v[seen, h // 3].double()
                logits = k @ q[b * queries + i, h].double() * pool.sm_scale
                prob = torch.softmax(torch.cat([logits, sink[h : h + 1].double()]), 0)[:-1]
                torch.testing.assert_close(found[b * queries + i, h].double(), prob @ v, rtol=1e-4, atol=1e-4)


def test_packed_decode_is_checked_and_a_wrong_one_is_not_timed(packed, monkeypatch):
    case = _case(TEMPLATE, context=33)
    row = run.measure_case(packed, case, _fake_timer, 0.1)
    assert row.note == "" and row.us == row.bytes / 1e3 and row.timed == "graph" and row.page == 1
    assert 0 < row.rel_error < subjects.TOLERANCE
    for factor in (1.05, math.nan):

        def wrong(tables, q, rows, kv_indptr, slots, sm_scale, factor=factor, **step):
            rows = gather_rows(packed.codec.layout, rows, slots)
            return reference.decode_attention(packed.codec, q, rows, kv_indptr, sm_scale)[0] * factor

        monkeypatch.setattr(ours, "attend", wrong)
        packed._errors.clear()
        row = run.measure_case(packed, case, _fake_timer, 0.1)
        assert row.us is None and row.note.startswith("not timed: relative error")


def test_encode_is_checked_and_a_wrong_one_is_not_timed(pool, monkeypatch):
    monkeypatch.setattr(subjects, "WRITE_SLOTS", 1024)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    monkeypatch.setattr(subjects, "ENCODE_TOLERANCE", 2 * subjects.ENCODE_TOLERANCE)
    packed, case = subjects.Packed(TEMPLATE, pool), _case(TEMPLATE, "encode", 8, 0)
    row = run.measure_case(packed, case, _fake_timer, 0.1)
    assert row.note == "" and row.rel_error < subjects.ENCODE_TOLERANCE
    assert row.bytes == 8 * (packed.tables.row.row_bytes + 2 * 2 * 2 * 64)

    def half(tables, rows):
        def encode(k, v, loc, positions):
            _reference_encoder(tables, rows)(k, v, loc, positions)
            half = len(loc) // 2
            scatter_rows(tables.row, rows, loc[:half], gather_rows(tables.row, rows, loc[half : 2 * half]))

        return encode

    packed = subjects.Packed(TEMPLATE, pool, half)
    row = run.measure_case(packed, case, _fake_timer, 0.1)
    assert row.us is None and row.note.startswith("not timed: relative error")


def test_packed_decode_of_several_queries_is_checked(packed, monkeypatch):
    case = _case(TEMPLATE, "decode_q4")
    row = run.measure_case(packed, case, _fake_timer, 0.1)
    assert row.note == "" and row.us and 0 < row.rel_error < subjects.TOLERANCE
    assert row.bytes == 80 * packed.tables.row.row_bytes  # read once for all queries

    def every_token(tables, q, rows, kv_indptr, slots, sm_scale, q_len, **_):
        """Attention without the causal mask among the queries."""
        rest = gather_rows(packed.codec.layout, rows, slots), kv_indptr, sm_scale
        each = [reference.decode_attention(packed.codec, q[i::q_len], *rest)[0] for i in range(q_len)]
        return torch.stack(each, 1).flatten(0, 1)

    monkeypatch.setattr(ours, "attend", every_token)
    packed._errors.clear()
    row = run.measure_case(packed, case, _fake_timer, 0.1)
    assert row.us is None and row.note.startswith("not timed: relative error")


def test_rows_of_any_layout_are_measured_too(pool):
    paper = cases.PACKED[4]
    codec = data.make_codec(SHAPE, paper)
    assert paper.name == "paper" and not codec.layout.in_columns
    packed = subjects.Packed(paper, pool, lambda tables, rows: _reference_encoder(tables, rows, codec))
    row = run.measure_case(packed, _case(paper), _fake_timer, 0.1)
    assert row.us and row.note == "" and 0 < row.rel_error < subjects.TOLERANCE
    rows = torch.zeros(16, codec.layout.row_bytes, dtype=torch.uint8)
    k, v, loc = pool.k[:3], pool.v[:3], torch.tensor([7, 0, 12])
    ours.encoder(packed.tables, rows)(k, v, loc, loc)
    for found, wanted in zip(reference.decode(codec, rows[loc]), reference.round_trip(codec, k, v), strict=True):
        assert relative_error(found, wanted) < subjects.ENCODE_TOLERANCE


def test_scratch_is_made_once_for_all_windows(packed, monkeypatch):
    seen = []
    monkeypatch.setattr(ours, "attend", lambda *_, **step: seen.append(step["scratch"]))
    launch = packed.launch(_case(TEMPLATE), 1)
    for i in range(3):
        launch(i)
    assert seen[0] is seen[1] is seen[2] and seen[0].out.shape[1:] == (1, 6, 64)


def test_a_kernel_that_is_not_built_leaves_a_note(packed, monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("not built: nothing reads these rows")

    monkeypatch.setattr(ours, "attend", missing)
    row = run.measure_case(packed, _case(TEMPLATE), _fake_timer, 0.1)
    assert row.us is None and row.note.startswith("not built")


def test_bf16_cache_writes(pool, monkeypatch):
    writes = {"scatter": peers.scatter, "index_put": peers.index_put}
    monkeypatch.setattr(peers, "cache_writes", lambda: writes)
    times = iter([5.0, 3.0])
    case = _case(cases.CACHE_WRITE, "encode", 64, 0)

    def timer(launch, num_bytes, windows, seconds):
        assert windows == 2
        launch(windows - 1)
        return timing.Timing(next(times), "graph", 2, 20)

    row = run.measure_case(subjects.CacheWrite(cases.CACHE_WRITE, pool), case, timer, 0.1)
    assert (row.us, row.note, row.rel_error) == (3.0, "index_put; scatter: 5 us", 0)
    assert row.bytes == 64 * 2 * 64 * 2 * 2 * 2
    times = iter([4.0])
    writes["scatter"] = lambda k, v, to_k, to_v, loc: peers.index_put(v, k, to_k, to_v, loc)
    row = run.measure_case(subjects.CacheWrite(cases.CACHE_WRITE, pool), case, timer, 0.1)
    assert row.us == 4.0 and row.note.startswith("index_put; scatter: not timed: relative error")


# --- peers: stand-ins with the real signatures ----------------------------------------------------------------------


def _attend(q, k_cache, v_cache, table, lengths, starts, scale, sinks=None):
    """Paged attention, causal among the queries; the page table says where tokens are."""
    page = k_cache.shape[1]
    out = torch.empty(q.shape, dtype=torch.float32)
    for b, n in enumerate(lengths):
        at = (table[b].long()[:, None] * page + torch.arange(page)).flatten()[:n]
        index = SimpleNamespace(flat=lambda *_, at=at: (torch.tensor([0, len(at)]), at))
        mine = slice(starts[b], starts[b + 1])
        k, v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        out[mine] = dense_attention(q[mine], k, v, index, scale, starts[b + 1] - starts[b], sinks)
    return out


class FakeWrapper:
    def __init__(self, float_workspace_buffer, kv_layout, *, use_cuda_graph, use_tensor_cores, backend, **buffers):
        assert kv_layout == "NHD" and use_cuda_graph and use_tensor_cores and backend == "fa2"
        assert not float_workspace_buffer.any()
        assert sorted(buffers) == [f"paged_kv_{name}_buffer" for name in ("indices", "indptr", "last_page_len")]

    def plan(self, indptr, indices, last_page_len, heads, kv_heads, dim, page, *, q_data_type, kv_data_type, sm_scale):
        assert (heads, kv_heads, dim, q_data_type) == (6, 2, 64, torch.bfloat16)
        bounds = indptr.tolist()
        self.table = [indices[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        self.lengths = [(len(t) - 1) * page + n for t, n in zip(self.table, last_page_len.tolist(), strict=True)]
        self.dtype, self.scale, self.page = kv_data_type, sm_scale, page

    def run(self, q, paged_kv_cache, *, out):
        k, v = paged_kv_cache
        assert k.dtype == v.dtype == self.dtype and k.shape[1] == self.page
        starts = range(len(q) + 1)
        return out.copy_(_attend(q, k, v, self.table, self.lengths, starts, self.scale))


def _fake_fa3(q, k_cache, v_cache, out, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, **options):
    assert q.dtype == k_cache.dtype and out.dtype == torch.bfloat16
    assert options.pop("causal") and options.pop("num_splits") == 0
    assert options.pop("scheduler_metadata") == ("made" if max_seqlen_q == 1 else None)
    starts = cu_seqlens_q.tolist()
    assert max_seqlen_q == starts[1]
    scale, sinks = options.pop("softmax_scale"), options.pop("sinks")
    result = _attend(q, k_cache, v_cache, page_table, cache_seqlens.tolist(), starts, scale, sinks)
    assert not options
    return out.copy_(result)


@pytest.fixture
def fake_peers(monkeypatch):
    flashinfer, fa3 = ModuleType("flashinfer"), ModuleType("sgl_kernel.flash_attn")
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = FakeWrapper
    fa3.flash_attn_with_kvcache = _fake_fa3
    fa3.get_scheduler_metadata = lambda **kw: "made"
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", fa3)
    monkeypatch.setattr(peers, "WORKSPACE_BYTES", 64)
    monkeypatch.setattr(peers, "_workspaces", {})
    return SimpleNamespace(flashinfer=flashinfer, fa3=fa3)


@pytest.mark.parametrize("order", [cases.CONTIGUOUS, cases.SHUFFLED])
@pytest.mark.parametrize("method", cases.DENSE, ids=lambda m: m.name)
def test_peers_are_given_the_right_tokens(fake_peers, pool, method, order):
    subject, case = subjects.Dense(method, pool), _case(method, index=order)
    row = run.measure_case(subject, case, _fake_timer, 0.1)
    assert row.rel_error < subjects.TOLERANCE, row.note
    assert row.bytes == 80 * 2 * 2 * 64 * (1 if "fp8" in method.name else 2)
    pages = {cases.CONTIGUOUS: (128, 16, 1), cases.SHUFFLED: (16, 1)}[order]
    assert row.page == pages[0] and row.note == "; ".join(f"page {p}: {row.us:.4g} us" for p in pages[1:])


def test_sinks_on_both_sides(fake_peers):
    shape = cases.Shape("sinks", 6, 2, 64, sinks=True)
    pool = data.Pool(shape, 512, "cpu")
    assert pool.terms.sinks.shape == (6,)
    for method, made in (
        (FA3, subjects.Dense(FA3, pool)),
        (TEMPLATE, subjects.Packed(TEMPLATE, pool, _reference_encoder)),
    ):
        row = run.measure_case(made, _case(method, context=33, shape=shape), _fake_timer, 0.1)
        assert row.us and row.rel_error < subjects.TOLERANCE, row.note
    row = run.measure_case(subjects.Dense(FLASHINFER, pool), _case(FLASHINFER, shape=shape), _fake_timer, 0.1)
    assert row.us is None and "no sinks" in row.note


def test_several_queries_per_request(fake_peers, pool):
    row = run.measure_case(subjects.Dense(FA3, pool), _case(FA3, "decode_q4"), _fake_timer, 0.1)
    assert row.us and row.rel_error < subjects.TOLERANCE
    row = run.measure_case(subjects.Dense(FLASHINFER, pool), _case(FLASHINFER, "decode_q4"), _fake_timer, 0.1)
    assert row.us is None and "one query token" in row.note


def test_a_wrong_peer_is_not_timed(fake_peers, pool, monkeypatch):
    monkeypatch.setattr(
        fake_peers.fa3,
        "flash_attn_with_kvcache",
        lambda q, page_table, **kw: _fake_fa3(q, page_table=page_table.flip(1), **kw),
    )
    row = run.measure_case(subjects.Dense(FA3, pool), _case(FA3), _fake_timer, 0.1)
    assert row.us is None and row.note.startswith("not timed: relative error")


def test_a_page_size_that_fails_leaves_the_others(fake_peers, pool, monkeypatch):
    def no_small_pages(k_cache, **kw):
        if k_cache.shape[1] == 1:
            raise RuntimeError("pages of 1 are not supported\nand more lines")
        return _fake_fa3(k_cache=k_cache, **kw)

    monkeypatch.setattr(fake_peers.fa3, "flash_attn_with_kvcache", no_small_pages)
    row = run.measure_case(subjects.Dense(FA3, pool), _case(FA3), _fake_timer, 0.1)
    assert row.us and row.page == 16
    assert row.note == "page 1: not measured: RuntimeError: pages of 1 are not supported"


def test_a_peer_that_is_not_installed_leaves_a_note(pool, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    row = run.measure_case(subjects.Dense(FLASHINFER, pool), _case(FLASHINFER), _fake_timer, 0.1)
    assert row.us is None and "flashinfer" in row.note and row.note.startswith("not measured")


def _parameters(package: str, file: str, *path: str) -> set[str]:
    """Parameter names of a function in an installed package, read without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    body = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text()).body
    for name in path:
        node = next(n for n in body if getattr(n, "name", None) == name)
        body = node.body
    return {a.arg for a in node.args.args + node.args.kwonlyargs}


def test_stand_ins_have_the_signatures_of_the_installed_packages():
    wrapper = "BatchDecodeWithPagedKVCacheWrapper"
    assert _parameters("flashinfer", "decode.py", wrapper, "__init__") >= {
        *("use_cuda_graph", "use_tensor_cores", "backend"),
        *("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"),
    }
    assert _parameters("flashinfer", "decode.py", wrapper, "_plan_impl") >= {"q_data_type", "kv_data_type", "sm_scale"}
    assert _parameters("sgl_kernel", "flash_attn.py", "flash_attn_with_kvcache") >= {
        *("q", "k_cache", "v_cache", "out", "page_table", "cache_seqlens", "cu_seqlens_q", "max_seqlen_q"),
        *("softmax_scale", "causal", "num_splits", "scheduler_metadata"),
    }
    assert _parameters("sgl_kernel", "flash_attn.py", "get_scheduler_metadata") >= {
        *("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads", "num_heads_k", "headdim", "cache_seqlens"),
        *("qkv_dtype", "cu_seqlens_q", "page_size", "causal", "num_splits"),
    }


# --- the run and its files -------------------------------------------------------------------------------------------


class FakeSubject:
    """Each method has its own speed; "paper" fails, "product" is wrong."""

    closed: list[str] = []

    def __init__(self, method, pool):
        if method.allocator == "paper":
            raise torch.OutOfMemoryError("too large")
        self.method = method

    def num_bytes(self, case):
        return 1000 * int(self.method.k_bits)

    def variants(self, case):
        return (1,)

    def error(self, case, variant):
        if self.method.name == "product":
            raise subjects.WrongResult("not timed: relative error 1 is above 0.01")
        return 1e-3

    def windows(self, case):
        return 4

    def launch(self, case, variant):
        return lambda i: None

    def close(self):
        self.closed.append(self.method.key)


def _timer(launch, num_bytes, windows, seconds) -> timing.Timing:
    assert windows == 4 and 0 < seconds <= run.MOST_SECONDS
    return timing.Timing(num_bytes / 1000, "graph", 8, 20)


def _read(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _run(chosen, out, timer=_timer, seconds=60.0, **kw) -> bool:
    return run.run(
        chosen,
        record.Table(out),
        "cpu",
        deadline=time.monotonic() + seconds,
        pool_tokens=64,
        timer=timer,
        subject_of=FakeSubject,
        **kw,
    )


METHODS = (FA3, FLASHINFER_FP8, *cases.PACKED)


def test_run_writes_the_columns_in_order_and_relates_to_bf16(tmp_path, capsys):
    out = tmp_path / "new" / "a.csv"
    FakeSubject.closed.clear()
    assert not _run([_case(m) for m in METHODS], out)  # product was wrong
    with out.open() as file:
        header = file.readline().strip().split(",")
    wanted = "shape,batch,context,kernel,method,k_bits,v_bits,us,bytes,gbps,ratio_to_best_bf16"
    assert header[:11] == wanted.split(",") and header[11:13] == ["index", "page"]
    rows = {(r["method"], r["k_bits"]): r for r in _read(out)}
    assert len(rows) == len(METHODS)
    three = rows["template", "3"]
    assert float(three["us"]) == 3 and float(three["gbps"]) == 1 and three["timed"] == "graph" and three["page"] == "1"
    assert math.isclose(float(three["ratio_to_best_bf16"]), 16 / 3, rel_tol=1e-4)
    assert float(rows["fa3-bf16", "16"]["ratio_to_best_bf16"]) == 1
    assert "memory" in rows["paper", "3"]["note"] and rows["paper", "3"]["us"] == ""
    assert rows["product", "3"]["note"].startswith("not timed") and rows["product", "3"]["us"] == ""
    assert FakeSubject.closed.count("template-k3v3") == 1
    assert f"[{len(METHODS)}/{len(METHODS)}" in capsys.readouterr().out


def test_ratios_are_taken_within_a_case():
    def row(method, us, **kw):
        return _case(method, **kw).row(us=us)

    a, b = row(FA3, 10.0), row(FLASHINFER, 8.0)
    packed, elsewhere, untimed = row(TEMPLATE, 4.0), row(TEMPLATE, 4.0, context=99), row(TEMPLATE, None)
    other = row(TEMPLATE, 4.0, index=cases.CONTIGUOUS)
    cases.fill_ratios([packed, b, a, elsewhere, other, untimed])
    assert (a.ratio_to_best_bf16, b.ratio_to_best_bf16, packed.ratio_to_best_bf16) == (0.8, 1.0, 2.0)
    assert elsewhere.ratio_to_best_bf16 is other.ratio_to_best_bf16 is untimed.ratio_to_best_bf16 is None


def test_a_cut_run_leaves_what_it_measured(tmp_path):
    out, count = tmp_path / "a.csv", iter(range(3))

    def timer(*args):
        if next(count) == 2:
            raise KeyboardInterrupt
        return _timer(*args)

    with pytest.raises(KeyboardInterrupt):
        _run([_case(FA3, context=n) for n in (16, 32, 48)], out, timer)
    assert [(r["context"], r["us"]) for r in _read(out)] == [("16", "16"), ("32", "16")]
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_a_spent_budget_is_written_down(tmp_path):
    assert not _run([_case(FA3)], tmp_path / "a.csv", seconds=-1)
    assert [(r["us"], "budget" in r["note"]) for r in _read(tmp_path / "a.csv")] == [("", True)]


def test_check_times_nothing_but_launches(tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(FakeSubject, "variants", lambda self, case: (1, 16))
    monkeypatch.setattr(FakeSubject, "launch", lambda self, case, variant: launched.append)
    assert _run([_case(FA3), _case(TEMPLATE)], tmp_path / "a.csv", None)
    assert launched == [0] * 4
    assert [(r["us"], r["note"]) for r in _read(tmp_path / "a.csv")] == [("", "checked")] * 2


def test_provenance(tmp_path):
    values = record.provenance(["--out", "/somewhere/else/a.csv", "--only", "*/decode/*"], "abc")
    record.write_json(tmp_path / "a.csv", values)
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["command"] == "python -m benchmarks.kernels --out a.csv --only */decode/*"
    assert values["commit"] == "abc" and values["versions"]["torch"] and values["date"]
    assert set(values["versions"]) >= {"triton", "flashinfer-python", "sglang-kernel"}


# --- timing ----------------------------------------------------------------------------------------------------------


def test_replays_touch_more_than_the_cache():
    for num_bytes, windows in ((10**5, 10**4), (4 * 10**6, 256), (54 * 10**6, 4), (10**9, 2)):
        calls = timing.calls_per_replay(num_bytes, windows)
        assert 2 <= calls <= timing.MAX_CALLS
        assert calls == timing.MAX_CALLS or calls * num_bytes >= timing.COLD_BYTES
        assert calls <= max(2, windows)
    assert timing.calls_per_replay(10**6, 3) == 3  # never the same data twice, if there are enough


@pytest.mark.gpu
def test_timing_on_a_device():
    x = torch.randn(8, 1 << 24, device="cuda")
    y = torch.empty_like(x[0])
    graph = timing.measure(lambda i: y.copy_(x[i]), 2 * y.nbytes, 8, 0.05)
    assert graph.timed == "graph" and graph.us > 0 and graph.replays >= timing.MIN_REPLAYS
    eager = timing.measure(lambda i: y.copy_(x[i]).sum().item(), 2 * y.nbytes, 8, 0.05)
    assert eager.timed == "eager" and eager.note.startswith("not captured")
    assert timing.measure(lambda i: y.copy_(x[i]), 2 * y.nbytes, 8, 0.05).timed == "graph"


# --- a layer among weights, and what kernels wait for ---------------------------------------------------------------


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(cases, "SHAPES", (SHAPE, *cases.SHAPES))
    monkeypatch.setitem(layers.SHAPES, SHAPE.name, {"hidden_size": 32, "intermediate_size": 48})


def test_a_layer_is_timed_among_weights(known, tmp_path, monkeypatch):
    """Every part launches what it names, in every layer."""
    seen = []
    encode, decode = layers.Encoder.__call__, layers.decode_attention
    rotate, encode_step = layers.rotate_queries, layers.StepEncoder.__call__

    def named(kind, launch, address=lambda *_: None):
        return lambda *args: (seen.append((kind, address(*args))), launch(*args))

    monkeypatch.setattr(layers.Encoder, "__call__", named("encode", encode, lambda self, *_: self.rows.data_ptr()))
    monkeypatch.setattr(layers, "rotate_queries", named("rotate", rotate))
    monkeypatch.setattr(layers.StepEncoder, "__call__", named("step", encode_step))

    def attend(tables, q, rows, *args, **kwargs):
        recent = kwargs["recent"]
        kind = "attention" if recent is None else "exact" if recent.angles is None else "turned"
        seen.append((kind, rows.data_ptr()))
        got = decode(tables, q, rows, *args, **kwargs)
        assert bool(got[0].isfinite().all())
        return got

    monkeypatch.setattr(layers, "decode_attention", attend)
    times = iter([10.0, 14.5, 21.25, 22.0, 12.0, 19.5, 17.5])

    def timer(launch, num_bytes, windows, seconds):
        seen.clear()
        for i in range(windows):
            launch(i)
        kinds = [kind for kind, _ in seen]
        assert len({address for _, address in seen if address}) in (0, 2)
        took.append(kinds)
        return timing.Timing(next(times), "graph", windows, 20)

    took = []
    monkeypatch.setattr(layers.step, "FEW_TOKENS", 0)
    out = tmp_path / "layers.csv"
    asked = ["--shape", "tiny", "--lengths", "2x40", "--layers", "2", "--few", "1", "--commit", "abc"]
    assert layers.main(["--out", str(out), *asked], timer, "cpu") == 0
    assert layers.step.FEW_TOKENS == 1
    want = [[], ["encode"] * 2, ["encode", "attention"] * 2, ["encode", "exact"] * 2, ["rotate"] * 2]
    assert took == [*want, ["exact", "exact", "step"], ["turned", "turned", "step"]]
    with out.open() as f:
        rows = [(r["part"], r["us"], r["more"]) for r in csv.DictReader(f)]
    assert rows == [
        ("weights", "10.0", "0.0"),
        ("encode", "14.5", "4.5"),
        ("attention", "21.2", "11.2"),
        ("exact", "22.0", "12.0"),
        ("rotate", "12.0", "2.0"),
        ("step", "19.5", "9.5"),
        ("rope", "17.5", "7.5"),
    ]
    made = json.loads(out.with_suffix(".json").read_text())
    assert made["commit"] == "abc" and made["few"] == 1
    assert made["command"].startswith("python -m benchmarks.kernels.layers --out")


def test_layers_of_an_unknown_model_are_refused(tmp_path, capsys):
    assert layers.main(["--out", str(tmp_path / "x.csv"), "--shape", "smollm2"]) == 2
    assert "SmolLM2" in capsys.readouterr().err


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","smsp__issue_active.avg.per_cycle_active","sm__nothing.sum"
"","","ns","inst/cycle",""
"0","decode_kernel(int *, float)","20,512","0.58","3"
"1","merge_row_kernel","5056","0.17","4"
"""


def test_metrics_are_read_by_kernel():
    assert list(profile.read_metrics(NCU)) == [
        ("decode_kernel", "gpu__time_duration.sum", "ns", "20512"),
        ("decode_kernel", "smsp__issue_active.avg.per_cycle_active", "inst/cycle", "0.58"),
        ("merge_row_kernel", "gpu__time_duration.sum", "ns", "5056"),
        ("merge_row_kernel", "smsp__issue_active.avg.per_cycle_active", "inst/cycle", "0.17"),
    ]
    assert not list(profile.read_metrics("==ERROR== no permission"))


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A stand-in that notes its calls, and fails where the case's name says so."""
    (tmp_path / "raw").write_text(NCU)
    tool = tmp_path / "bin" / "ncu"
    tool.parent.mkdir()
    tool.write_text(
        f"""#!{sys.executable}
import pathlib, sys
with open({str(tmp_path / "calls")!r}, "a") as f: print(*sys.argv[1:], file=f)
if "--import" in sys.argv: print(pathlib.Path({str(tmp_path / "raw")!r}).read_text())
elif "1x131072" in sys.argv: sys.exit("==ERROR== no counters for you")
else: pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    return lambda: (tmp_path / "calls").read_text().splitlines()


def test_profile_asks_ncu_for_each_case(ncu, tmp_path, capsys):
    out = tmp_path / "profile.csv"
    only = ["--only", "qwen2.5-3b/decode/template-k3v3", "--commit", "abc"]
    assert profile.main(["--out", str(out), *only, "--lengths", "1x4K", "8x32K", "--source"]) == 0
    with out.open() as f:
        rows = list(csv.DictReader(f))
    assert {(r["shape"], r["batch"], r["context"], r["method"]) for r in rows} == {
        ("Qwen2.5-3B", "1", "4096", "template-k3v3"),
        ("Qwen2.5-3B", "8", "32768", "template-k3v3"),
    }
    assert [r["value"] for r in rows if r["metric"] == "gpu__time_duration.sum"] == ["20512", "5056"] * 2
    assert json.loads(out.with_suffix(".json").read_text())["commit"] == "abc"
    first = ncu()[0]
    assert "--clock-control none" in first and "--child" in first and "--lengths 1x4096" in first
    assert len(list(tmp_path.glob("*.source.csv"))) == 2 and not list(tmp_path.glob("*.ncu-rep"))
    assert profile.main(["--out", str(out), *only, "--lengths", "1x128K"]) == 1
    assert "no counters for you" in capsys.readouterr().err


def test_profile_without_ncu_or_cases(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = ["--out", str(tmp_path / "x.csv")]
    assert profile.main([*out, "--only", "qwen2.5-3b/decode/template-k3v3"]) == 2
    assert "ncu" in capsys.readouterr().err
    assert profile.main([*out, "--only", "nothing"]) == 2


@pytest.mark.parametrize(
    ("room", "parts"), [(1 << 20, ["bf16", "packed", "unpack", "attention"]), (1, ["bf16", "packed"])]
)
def test_an_extension_is_timed_beside_bf16s(tmp_path, monkeypatch, room, parts):
    """Both see the same tokens; unpack and attention alone where the workspace holds them together."""
    monkeypatch.setattr(cases, "SHAPES", (SHAPE, *cases.SHAPES))
    monkeypatch.setattr("sglang_blockgtq.backend.extend.WORKSPACE_BYTES", room)
    seen = []

    def dense(q, k, v, cu_seqlens_k, out=None, **_):
        seen.append(int(cu_seqlens_k[-1]))
        return (torch.zeros_like(q) if out is None else out), torch.zeros(q.shape[1], q.shape[0])

    def paged(page_table, cache_seqlens, cu_seqlens_k_new, **_):
        assert page_table.shape == (1, 37) and page_table.unique().numel() == 37
        seen.append((int(cache_seqlens), int(cu_seqlens_k_new[-1])))

    def timer(launch, num_bytes, windows, seconds):
        launch(0)
        return timing.Timing(2.0, "graph", 1, 20)

    out = tmp_path / "extend.csv"
    asked = ["--out", str(out), "--shape", "tiny", "--prefix", "32", "--new", "5", "--commit", "abc"]
    assert extend.main(asked, timer, lambda: (dense, paged), "cpu") == 0
    with out.open() as f:
        rows = [(r["prefix"], r["new"], r["what"], r["us"], bool(r["gbps"])) for r in csv.DictReader(f)]
    assert rows == [("32", "5", part, "2.0", part == "unpack") for part in parts]
    assert seen[0] == (37, 37) and (seen[1:] == [37, 37]) == (room > 1)
    assert json.loads(out.with_suffix(".json").read_text())["commit"] == "abc"
