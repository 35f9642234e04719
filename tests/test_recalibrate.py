"""A table that takes the place of another one under what was made for that."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.io_struct import FlushCacheReqInput
from sglang.srt.managers.scheduler_components.flush_wrapper import SchedulerFlushWrapper

from sglang_blockgtq import plugin, recalibrate, runtime
from sglang_blockgtq.calibrate.build import build_table, poured_as
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import AllocationTable, layers_of
from sglang_blockgtq.choose import Choice
from sglang_blockgtq.kernels.layer import PackedLayer, TorchLayer, TritonLayer
from sglang_blockgtq.options import KVQuantError, KVQuantOptions
from sglang_blockgtq.runtime import Runtime

LAYERS, HEADS, DIM, SLOTS = 2, 2, 64, 32


def make_table(seed: int, means: bool = True, like: AllocationTable | None = None, **asked) -> AllocationTable:
    asked = {"k_bits": 3.0, "v_bits": 3.0} | asked
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.logspace(-2, 2, DIM // 2, dtype=torch.float64) * torch.rand(
        2, LAYERS, HEADS, DIM // 2, dtype=torch.float64, generator=generator
    )
    moments = Moments(q, k, torch.full((LAYERS, HEADS), DIM * (1 + seed), dtype=torch.float64), 2048)
    if means:
        moments.theta = 10_000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2)).expand(LAYERS, -1)
        moments.mean = 0.6 * k[..., None].sqrt().expand(-1, -1, -1, 2)
    rule = poured_as(like) if like else None
    return build_table(moments, [RopeBlocks(DIM, DIM)] * LAYERS, rule=rule, **asked)


def make_layer(table: AllocationTable, kind: type[PackedLayer]) -> PackedLayer:
    codec = table.layer_codec(1)
    return TorchLayer(codec) if kind is TorchLayer else TritonLayer(codec, "cpu", table.k_templates, 1024)


def addresses(layer: TritonLayer) -> list[int]:
    flat, todo = [], list(layer._parts())
    for part in todo:
        for value in vars(part).values():
            if isinstance(value, torch.Tensor):
                flat.append(value.data_ptr())
            elif hasattr(value, "__dataclass_fields__"):
                todo.append(value)
    return flat


def served_by(layer: PackedLayer, tokens: int) -> list[torch.Tensor]:
    """Its rows, what they hold, and what a query reads of them."""
    generator = torch.Generator().manual_seed(9)
    k, v, q = torch.randn(3, tokens, HEADS, DIM, generator=generator)
    slots = torch.arange(tokens)
    layer.encode(k, v, slots, slots + 600)
    ends = torch.tensor([0, tokens])
    read = layer.decode(q[:1], ends, slots.int() if isinstance(layer, TritonLayer) else slots, 0.1)
    return [layer.gather(slots), *layer.dense(slots, slots + 600), read]


KINDS = [{}, {"allocator": "uniform", "k_bits": 2.5}, {"allocator": "product"}, {"allocator": "paper"}]


@pytest.mark.parametrize("asked", [*KINDS, {"allocator": "product", "granularity": "block"}])
def test_a_new_table_has_the_old_ones_rows(asked):
    old = make_table(0, **asked)
    new, free = make_table(1, like=old, **asked), make_table(1, **asked)
    assert [new.row_layout(i) for i in range(LAYERS)] == [old.row_layout(i) for i in range(LAYERS)]
    assert asked.get("allocator") == "uniform" or not torch.equal(new.tensors["widths"], old.tensors["widths"])
    # Where the rule gives the same rows by itself, it gives the same table.
    again = make_table(1, like=free, **asked)
    assert all(torch.equal(again.tensors[name], free.tensors[name]) for name in free.tensors)


@pytest.mark.parametrize(("kind", "asked"), [(TorchLayer, {}), (TritonLayer, {}), (TritonLayer, KINDS[2])])
def test_a_layer_that_adopts_another_ones_tables_serves_as_that_one(kind, asked):
    old = make_table(0, **asked)
    layer, other = make_layer(old, kind), make_layer(make_table(1, like=old, **asked), kind)
    for x in (layer, other):
        x.bind(x.new_rows(SLOTS, "cpu"))
    before = served_by(layer, 5)  # whatever is prepared at a first call is
    where = addresses(layer) if kind is TritonLayer else None
    assert layer.differs(other) == ""
    layer.adopt(other)
    after, wanted = served_by(layer, 5), served_by(other, 5)
    assert all(torch.equal(a, b) for a, b in zip(after, wanted, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert where is None or addresses(layer) == where


@pytest.mark.parametrize("more", [{"k_bits": 4}, {"means": False}, {"allocator": "paper"}])
def test_what_graphs_could_not_follow_is_told(more):
    layer = make_layer(make_table(0), TritonLayer)
    assert layer.differs(make_layer(make_table(1, **more), TritonLayer))
    if "k_bits" in more:
        wider = make_layer(make_table(1, **more), TorchLayer)
        assert make_layer(make_table(0), TorchLayer).differs(wider) == "120 bytes, not 104"


@pytest.fixture
def scheduler(monkeypatch):
    """One that serves table 0 and whose weights are now those of another one, which ``found`` takes as it likes."""
    table = make_table(0)
    layers = layers_of(table, slice(None), range(LAYERS), "cpu", 1024)
    options = KVQuantOptions(recalibrate="flush", table="named", k_bits=None, v_bits=None, max_kl=0.5)
    monkeypatch.setattr(
        runtime, "_current", Runtime(options, table, slice(None), (0, 1), "file", 0.0, 0, layers=layers)
    )
    monkeypatch.setattr(recalibrate, "_replaced", False)
    monkeypatch.setattr(recalibrate, "_failure", "")
    monkeypatch.setattr(recalibrate, "reduce", lambda x: x)
    monkeypatch.setattr(recalibrate, "is_rank_zero", lambda: True)
    found = SimpleNamespace(table=make_table(1, like=table), asked=[])

    def choose(runner, options, make, like):
        found.asked.append((options, like))
        if found.table is None:
            raise KVQuantError("no table")
        return Choice(found.table, "calibrated", make(found.table))

    monkeypatch.setattr(recalibrate, "choose", choose)
    runner = SimpleNamespace(
        server_args=SimpleNamespace(_kvq=options), device="cpu", model_config=SimpleNamespace(context_len=1024)
    )
    updater = SimpleNamespace(offload_tags=set(), _session=None)
    return SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=runner), weight_updater=updater, found=found, options=options
    )


def test_a_flush_after_new_weights_makes_a_table(scheduler):
    first = runtime.current()
    assert recalibrate.after_flush(scheduler) == "" and runtime.current() is first, "the weights are those of the table"
    recalibrate.weights_replaced(scheduler.options, says=True)
    assert recalibrate.live()["weights_replaced"] is True
    assert recalibrate.after_flush(scheduler) == ""
    ((asked, like),) = scheduler.found.asked
    assert (asked.table, asked.k_bits, asked.v_bits, asked.allocator, asked.max_kl) == (None, 3, 3, "template", None)
    assert like is first.table
    now, new = runtime.current(), scheduler.found.table
    assert (now.table, now.origin, now.layers) == (new, "recalibrated", first.layers)
    assert torch.equal(now.layers[1].codec.k_in, new.layer_codec(1).k_in)
    assert recalibrate.live() == {"weights_replaced": False, "recalibration_failure": ""}
    assert recalibrate.after_flush(scheduler) == "" and len(scheduler.found.asked) == 1


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda s: s.weight_updater.offload_tags.add("weights"), "while memory is released"),
        (lambda s: setattr(s.weight_updater, "_session", object()), "before /end_weight_update"),
        (lambda s: setattr(s.found, "table", None), "no table"),
        (lambda s: setattr(s.found, "table", make_table(1, k_bits=4)), r"another kind of table \(120 bytes, not 104\)"),
    ],
)
def test_where_no_table_can_be_made_the_old_one_goes_on(scheduler, spoil, why):
    first = runtime.current()
    codecs = [layer.codec for layer in first.layers.values()]
    recalibrate.weights_replaced(scheduler.options, says=False)
    spoil(scheduler)
    said = recalibrate.after_flush(scheduler)
    assert re.search(why, said)
    assert runtime.current() is first and [layer.codec for layer in first.layers.values()] == codecs
    assert recalibrate.live() == {"weights_replaced": True, "recalibration_failure": said}


def test_what_a_users_flush_answers(scheduler):
    """Refused by SGLang, done, and done without the table that was asked for."""

    class Scheduler(SimpleNamespace):
        idle = False

        def flush_cache(self) -> bool:
            return self.idle

    scheduler = Scheduler(**vars(scheduler))
    scheduler.tp_worker.model_runner.is_draft_worker = False
    wrapper = SchedulerFlushWrapper(
        flush_cache=scheduler.flush_cache, is_fully_idle=lambda: scheduler.idle, send_output=None
    )
    if not hasattr(wrapper, "not_recalibrated"):  # hooks are in place in a process where an option was parsed
        plugin._watch_flush(None, wrapper)

    def flush():
        answer = wrapper.handle(FlushCacheReqInput())
        plugin._answer_flush(answer, wrapper)
        return answer.success, answer.message

    recalibrate.weights_replaced(scheduler.options, says=False)
    table, scheduler.found.table = scheduler.found.table, None
    assert flush() == (False, "") and not scheduler.found.asked
    scheduler.idle = True
    assert flush() == (False, "The cache was flushed, but not recalibrated: no table\n")
    scheduler.idle = False
    assert flush() == (False, ""), "what was once the reason is none for a flush that was refused"
    scheduler.idle, scheduler.found.table = True, table
    assert flush() == (True, "") and runtime.current().table is table


def test_without_the_option_a_flush_is_a_flush(scheduler):
    scheduler.tp_worker.model_runner.server_args._kvq = KVQuantOptions()
    recalibrate.weights_replaced(KVQuantOptions(), says=False)
    assert recalibrate.after_flush(scheduler) == ""
    assert recalibrate.live()["weights_replaced"] is True and not scheduler.found.asked
