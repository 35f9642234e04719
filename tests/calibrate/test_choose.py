"""Which bits a server takes, by what they cost; the costs are given here, and measured in test_quality.py."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sglang_blockgtq import choose as module
from sglang_blockgtq.backend import warm_up
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.quality import Quality
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import AllocationTable, layers_of
from sglang_blockgtq.choose import choose, rungs
from sglang_blockgtq.kernels.layer import TritonLayer
from sglang_blockgtq.kernels.terms import PLAIN
from sglang_blockgtq.options import LADDER, TARGET_KL, KVQuantError, KVQuantOptions

ROPE = [(32, True)] * 2
AUTO = {"k_bits": None, "v_bits": None}
#: (K, V) bits -> KL, of the ladder's rungs that heads of 32 channels take.
COSTS = {(2, 2): 0.5, (3, 3): 0.04, (4, 4): 0.01, (6, 6): 0.002, (8, 8): 0.0001}


def quality(kl: float) -> Quality:
    return Quality(kl, 2 * kl, 1, 3 * kl, 256)


class Bytes:
    """One token per byte."""

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())


@pytest.fixture
def start(loaded, make_moments, monkeypatch, tmp_path, caplog):
    """Chooses on one rank, of drawn moments; ``tried`` are bits that were measured, ``costs`` what that gives."""
    caplog.set_level("INFO")
    loaded.install(monkeypatch, loaded.group(), loaded.group(), loaded.group())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"weights")

    def collect(runner, sequences):
        start.collected += 1
        return make_moments(blocks=16), [RopeBlocks(32, 32)] * 2

    def measure(exact, layers, table):
        assert exact == "read" and sorted(layers) == [0, 1]
        bits = table.header.k_bits, table.header.v_bits
        start.tried.append(bits)
        return quality(start.costs[bits])

    monkeypatch.setattr("sglang_blockgtq.capture.collect_moments", collect)
    monkeypatch.setattr("sglang.srt.utils.hf_transformers_utils.get_tokenizer", lambda *_, **__: Bytes())
    monkeypatch.setattr(module, "_read_exactly", lambda runner, ids, recent: "read" if ids else None)
    monkeypatch.setattr(module, "_measure", measure)

    def start(**options):
        start.tried, start.collected = [], 0
        caplog.clear()
        options = KVQuantOptions(**{"cache_dir": str(tmp_path / "cache"), **options})
        runner = loaded.runner(ROPE, ROPE, model_path=str(folder))
        choice = choose(runner, options, lambda table: layers_of(table, slice(None), (0, 1), "cpu", 1024))
        header = choice.table.header
        assert sorted(choice.layers) == [0, 1] and choice.table.computed_hash() == header.table_hash
        assert choice.layers[0].layout == choice.table.row_layout(0)  # those of this table
        return (header.k_bits, header.v_bits), choice

    start.costs, start.tables = dict(COSTS), tmp_path / "cache" / "tables"
    return start


def said(caplog, level="WARNING") -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == level]


def test_the_ladder_rises():
    """In bytes; every rung fills words in heads of 64 and 128 channels."""
    assert [sum(bits) for bits in LADDER] == sorted({sum(bits) for bits in LADDER})
    assert all(k >= v for k, v in LADDER)
    for dim in (64, 128):
        assert rungs(dim, dim, 2, 8) == list(LADDER)


def test_rungs():
    assert rungs(128, 128, 3, 4) == [(3, 3), (3.5, 3), (3.5, 3.5), (4, 4)]
    assert rungs(128, 128, 2.5, 3) == [(2.5, 2.5), (3, 2.5), (3, 3)]
    # 3 bits of 80 channels fill no 16-bit words, nor do 2.5 of values of 48.
    assert rungs(80, 80, 2, 8) == [(2, 2), (4, 4), (6, 6), (8, 8)]
    assert rungs(64, 48, 2, 4) == [(2, 2), (2.5, 2), (4, 4)]
    assert rungs(80, 80, 3, 3.5) == [(3, 3), (3.5, 3), (3.5, 3.5)]  # nothing does: slow rows are better than none


def test_auto_takes_the_first_that_is_good_enough(start, caplog):
    bits, choice = start(**AUTO)
    assert bits == (4, 4) and start.tried == [(3, 3), (4, 4)]
    assert choice.origin == "calibrated" and choice.table.header.quality == quality(0.01).to_dict()
    assert start.collected == 1 and not said(caplog)


def test_exactly_the_target_is_good_enough(start):
    start.costs[3, 3] = TARGET_KL
    assert start(**AUTO)[0] == (3, 3)
    start.costs[4, 4] = 0.009
    assert start(**AUTO, max_kl=0.009)[0] == (4, 4) and start.tried == [(3, 3), (4, 4)]


def test_auto_stays_within_its_range(start):
    assert start(**AUTO, bits_range=(2, 8))[0] == (4, 4) and start.tried == [(2, 2), (3, 3), (4, 4)]
    assert start(**AUTO, bits_range=(6, 8))[0] == (6, 6) and start.tried == [(6, 6)]
    start.costs[2, 2] = 0.001
    assert start(**AUTO, bits_range=(2, 4))[0] == (2, 2) and start.tried == [(2, 2)]


def test_auto_warns_where_nothing_is_good_enough(start, caplog):
    bits, choice = start(**AUTO, bits_range=(2, 3))
    assert bits == (3, 3) and start.tried == [(2, 2), (3, 3)]
    (line,) = said(caplog)
    assert "--kv-quant-preset auto: KL 0.0400 is above 0.03 with 3 bits, too" in line
    assert "the most of --kv-quant-bits-range 2-3" in line and "\n" not in line
    assert start(**AUTO, bits_range=(2, 3))[1].origin == "cache"


def test_a_cost_that_is_no_number_is_none_of_the_good_ones(start):
    start.costs = dict.fromkeys(COSTS, math.nan) | {(4, 4): 0.02}
    assert start(**AUTO)[0] == (4, 4)


def test_auto_raises_under_a_limit(start):
    with pytest.raises(KVQuantError) as e:
        start(**AUTO, bits_range=(2, 4), max_kl=0.005)
    assert str(e.value) == (
        "--kv-quant-preset auto: KL 0.0100 is above 0.005 with 4 bits, too; allow more, or a wider "
        "--kv-quant-bits-range than 2-4"
    )
    assert not start.tables.exists()


def test_a_limit_lowers_and_raises_the_target(start):
    assert start(**AUTO, max_kl=0.05)[0] == (3, 3)
    assert start(**AUTO, max_kl=0.005)[0] == (6, 6)


def test_fixed_bits_are_measured_and_kept(start, caplog):
    bits, choice = start(k_bits=3.0, v_bits=3.0)
    assert bits == (3, 3) and choice.table.header.quality == quality(0.04).to_dict() and not said(caplog)
    again = start(k_bits=3.0, v_bits=3.0)[1]
    assert (again.origin, start.collected, start.tried) == ("cache", 0, [])
    assert again.table.header == choice.table.header


def test_fixed_bits_above_the_limit_are_refused_with_the_bits_that_do(start):
    limit = {"k_bits": 3.0, "v_bits": 3.0, "max_kl": 0.005}
    start.costs |= {bits: 0.02 for bits in LADDER if sum(bits) > 6 and bits not in COSTS}
    with pytest.raises(KVQuantError) as e:
        start(**limit)
    assert str(e.value) == ("--kv-quant-max-kl 0.005: K 3 and V 3 bits cost 0.0400 nats a token; K 6 and V 6 bits do")
    assert start.tried[0] == (3, 3) and start.tried[-1] == (6, 6) and not start.tables.exists()
    start.costs |= dict.fromkeys(LADDER, 1.0)
    with pytest.raises(KVQuantError, match="K 3 and V 3 bits cost 1.0000 nats a token; no bits do"):
        start(**limit)


def test_a_cost_of_fixed_bits_that_is_no_number_is_refused(start):
    start.costs |= dict.fromkeys(LADDER, 1.0) | {(3, 3): math.nan}
    with pytest.raises(KVQuantError, match="K 3 and V 3 bits cost nan nats a token"):
        start(k_bits=3.0, v_bits=3.0, max_kl=0.1)


def test_a_kept_table_is_used_only_under_the_limit(start):
    fixed = {"k_bits": 3.0, "v_bits": 3.0}
    start(**fixed)
    assert start(**fixed, max_kl=0.04)[1].origin == "cache"
    start.costs |= dict.fromkeys(LADDER, 1.0)
    with pytest.raises(KVQuantError, match="--kv-quant-max-kl 0.03: K 3 and V 3 bits cost 1.0000"):
        start(**fixed, max_kl=0.03)
    assert start.collected == 1
    assert start(**fixed)[1].origin == "cache"


def test_auto_is_kept_by_what_it_may_choose_from(start):
    assert [start(**AUTO)[1].origin for _ in range(2)] == ["calibrated", "cache"]
    assert start(**AUTO, bits_range=(2, 8))[1].origin == "calibrated"
    assert start(**AUTO, max_kl=0.05)[0] == (3, 3)


def test_without_text_to_measure_on_auto_takes_four_bits(start, monkeypatch):
    monkeypatch.setattr(module, "_measure", lambda exact, layers, table: None if exact is None else 1 / 0)
    monkeypatch.setattr(module, "_read_exactly", lambda runner, ids, recent: None)
    bits, choice = start(**AUTO)
    assert bits == (4, 4) and choice.table.header.quality is None
    assert start(**AUTO, bits_range=(2, 3))[0] == (3, 3)  # the most there is
    assert start(**AUTO, bits_range=(6, 8))[0] == (6, 6)


@pytest.fixture
def named(start, tmp_path):
    """Options that name a table of 4 bits, with or without its cost."""
    table = start(k_bits=4.0, v_bits=4.0)[1].table
    path = tmp_path / "named.safetensors"

    def named(kl: float | None, **options) -> dict:
        table.with_quality(None if kl is None else quality(kl)).save(path)
        nothing = dict.fromkeys(("k_bits", "v_bits", "allocator", "granularity"))
        return {"table": str(path), **nothing, **options}

    return named


def test_a_named_table_says_what_it_costs_or_is_measured(start, named):
    bits, choice = start(**named(0.7))
    assert (bits, choice.origin, start.tried) == ((4, 4), "file", [])
    assert choice.table.header.quality == quality(0.7).to_dict()
    bits, choice = start(**named(None))
    assert (bits, choice.origin, start.tried, start.collected) == ((4, 4), "file", [(4, 4)], 0)
    assert choice.table.header.quality == quality(0.01).to_dict()


def test_a_named_table_is_measured_with_the_servers_exact_tokens(start, named):
    """Where its own cost is that of others."""
    for recent, tried in ((8, [(4, 4)]), (0, [])):
        assert start(**named(0.7, exact_recent=recent))[1].origin == "file"
        assert start.tried == tried


def test_a_named_table_that_cannot_be_measured_keeps_its_cost(start, named, monkeypatch):
    """That of other exact tokens, which a limit is held against."""
    monkeypatch.setattr(module, "_measure", lambda exact, layers, table: None if exact is None else 1 / 0)
    monkeypatch.setattr(module, "_read_exactly", lambda runner, ids, recent: None)
    assert start(**named(0.7, exact_recent=8))[1].table.header.quality == quality(0.7).to_dict()
    with pytest.raises(KVQuantError, match="--kv-quant-max-kl 0.1: K 4 and V 4 bits cost 0.7000"):
        start(**named(0.7, exact_recent=8, max_kl=0.1))
    assert start(**named(None, exact_recent=8))[1].table.header.quality is None


@pytest.mark.parametrize("said", [0.7, None])
def test_a_named_table_above_the_limit(start, named, said):
    start.costs[4, 4] = 0.7
    with pytest.raises(KVQuantError) as e:
        start(**named(said, max_kl=0.1))
    assert str(e.value) == (
        "--kv-quant-max-kl 0.1: K 4 and V 4 bits cost 0.7000 nats a token; make a table of more bits"
    )
    assert start(**named(said, max_kl=0.7))[1].origin == "file"


def test_what_measures_is_there_for_models_that_answer(loaded, monkeypatch, caplog):
    """One real pass: the scale of logits and the places that are compared reach the measurement."""
    loaded.install(monkeypatch, loaded.group(), loaded.group(), loaded.group())
    runner, ids = loaded.runner(ROPE, ROPE), [(11 * i) % 256 for i in range(200)]
    exact = module._read_exactly(runner, ids)
    assert (
        exact.logits_of == dict.fromkeys((0, 1), (32**-0.5, PLAIN))
        and exact.logits.shape == (200, 256)
        and not caplog.records
    )
    runner.model_config.is_generation = False
    assert module._read_exactly(runner, ids) is None and "this model gives no answers" in caplog.text
    caplog.clear()
    runner.model_config.is_generation = True
    assert module._read_exactly(runner, []) is None
    assert re.search("what the cache costs is not measured: the calibration text has no more tokens", caplog.text)


def test_more_bits_cost_less(loaded, make_moments, monkeypatch, caplog):
    """Measured, not given: on the stand-in's own attention."""
    caplog.set_level("INFO")
    loaded.install(monkeypatch, loaded.group(), loaded.group(), loaded.group())
    runner, ids = loaded.runner(ROPE, ROPE), [(11 * i * i) % 256 for i in range(200)]
    exact, moments = module._read_exactly(runner, ids), make_moments(blocks=16, spread=0)
    costs = []
    for bits in (2, 4, 8):
        table = build_table(moments, [RopeBlocks(32, 32)] * 2, k_bits=bits, v_bits=bits)
        layers = layers_of(table, slice(None), (0, 1), "cpu", 1024)
        costs.append(module._measure(exact, layers, table))
    assert [cost.tokens for cost in costs] == [200] * 3
    for bits, cost, line in zip((2, 4, 8), costs, said(caplog, "INFO"), strict=True):
        assert f"K {bits} and V {bits} bits: {cost.line()}" in line
    assert costs[0].kl > 4 * costs[1].kl > 16 * costs[2].kl > 0
    assert costs[0].attention_kl > 4 * costs[1].attention_kl > 16 * costs[2].attention_kl > 0
    assert module._measure(None, layers, table) is None


def test_kernels_that_measure_are_compiled_at_the_same_time(monkeypatch):
    """On a GPU, by one layer that has rows of its own meanwhile; nothing is done elsewhere."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    class Layer:
        def new_rows(self, slots, device):
            return slots

        def bind(self, rows):
            self.rows = rows

        def unbind(self):
            del self.rows

        def encode(self, *args):
            done.append(("encode", self.rows, *map(len, args)))

        def dense(self, slots, positions, dtype):
            done.append(("dense", self.rows, len(slots), len(positions), dtype))

    def run(jobs, device):
        assert device.type == "cpu"
        for job in jobs:
            job()

    done, layer = [], Layer()
    monkeypatch.setattr(warm_up, "run", run)
    k = torch.zeros(7, 2, 32)
    module._compile(SimpleNamespace(exact={3: (k, k, k)}), {3: layer})
    module._compile(SimpleNamespace(exact={}), {})
    assert not done
    module._compile(SimpleNamespace(exact={3: (k, k.as_subclass(OnGPU), k)}), {3: layer, 4: None})
    assert done == [("encode", 7, 7, 7, 7, 7), ("dense", 7, 7, 7, torch.float32)] and not hasattr(layer, "rows")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is on the CPU, where kernels need the interpreter")
def test_kernels_cost_what_pytorch_costs(loaded, make_moments, monkeypatch):
    """The layers of a GPU, bound to rows of their own for as long as they are measured."""
    loaded.install(monkeypatch, loaded.group(), loaded.group(), loaded.group())
    runner, ids = loaded.runner(ROPE[:1], ROPE[:1]), [(11 * i * i) % 256 for i in range(64)]
    moments = make_moments(layers=1, blocks=16, spread=0, bias=0.5, base=1e4)
    table = build_table(moments, [RopeBlocks(32, 32)], k_bits=3, v_bits=3, page=64)
    kernels = {0: TritonLayer(table.layer_codec(0), "cpu", table.k_templates, 1024)}
    exact, pytorch = module._read_exactly(runner, ids), layers_of(table, slice(None), (0,), "cpu", 1024)
    ours, theirs = (module._measure(exact, layers, table) for layers in (pytorch, kernels))
    assert ours.to_dict() == pytest.approx(theirs.to_dict(), rel=1e-3)
    assert ours.kl > 0 and not hasattr(kernels[0], "rows") and not hasattr(kernels[0], "encoder")


def test_a_table_keeps_its_contents_when_its_cost_is_noted(start):
    table = start(k_bits=4.0, v_bits=4.0)[1].table
    bare = table.with_quality(None)
    assert bare.header.quality is None and bare.tensors is table.tensors
    assert replace(bare.header, quality=table.header.quality, table_hash=table.header.table_hash) == table.header
    assert isinstance(bare, AllocationTable) and bare.header.table_hash != table.header.table_hash
