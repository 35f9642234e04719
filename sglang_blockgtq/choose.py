"""Which table a server serves with: the one that was named, a kept one, or one made here of the bits that do.

Every table that is made here is measured on text it was not calibrated on (calibrate.quality), as is a named one that
says nothing about its cost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .calibrate.quality import HeldOut, Quality
from .calibrate.table import AllocationTable
from .kernels.format.layout import uniform_layout
from .kernels.layer import PackedLayer
from .obtain import Plan, build, held_out_text, keep, named, plan
from .options import LADDER, NAME, KVQuantError, KVQuantOptions, flag
from .ranks import from_rank_zero, is_rank_zero, reduce

logger = logging.getLogger(__name__)

Make = Callable[[AllocationTable], dict[int, PackedLayer]]


@dataclass(frozen=True)
class Choice:
    """table, with its quality where that could be measured. origin: "file", "cache" or "calibrated". layers: this
    rank's by id, all but their rows."""

    table: AllocationTable
    origin: str
    layers: dict[int, PackedLayer]


def choose(runner: Any, options: KVQuantOptions, make: Make, like: AllocationTable | None = None) -> Choice:
    """For a loaded ModelRunner. Collective over all ranks. Raises KVQuantError.

    like: the table of weights that were replaced. The new one has the same rows, and is not kept for a next start.
    """
    if options.table is not None:
        table = from_rank_zero(lambda: named(runner, options))
        layers = make(table)
        quality, recent = table.header.quality, options.exact_recent or 0
        if quality is None or Quality(**quality).recent != recent:
            ids = from_rank_zero(lambda: held_out_text(runner))
            if (found := _measure(_read_exactly(runner, ids, recent), layers, table)) is not None:
                table = table.with_quality(found)  # else what the table says of others is all there is
        _check(table, options, "make a table of more bits")
        return Choice(table, "file", layers)
    given = from_rank_zero(lambda: plan(runner, options, kept=like is None))
    if given.table is not None and _within(given.table, options.max_kl):
        return Choice(given.table, "cache", make(given.table))
    return _calibrated(runner, options, given, make, like)


def _calibrated(runner: Any, options: KVQuantOptions, given: Plan, make: Make, like: AllocationTable | None) -> Choice:
    from .capture import collect_moments

    moments, rope = collect_moments(runner, given.sequences)
    exact = _read_exactly(runner, given.held_out, options.exact_recent or 0)

    def attempt(bits: tuple[float, float]) -> Choice:
        table = from_rank_zero(lambda: build(runner, options, given, moments, rope, bits, like))
        layers = make(table)
        return Choice(table.with_quality(_measure(exact, layers, table)), "calibrated", layers)

    if (wanted := options.bits) is not None:
        first = attempt(wanted)
        if not _within(first.table, options.max_kl):
            better = (b for b in LADDER if sum(b) > sum(wanted))
            tried = (attempt(bits).table for bits in better)
            enough = next((table for table in tried if _within(table, options.max_kl)), None)
            does = "no bits do" if enough is None else f"{_bits(enough)} do"
            _check(first.table, options, does)
        return _kept(first, given, options)
    low, high = options.bits_range
    every = rungs(runner.model_config.head_dim, runner.model_config.v_head_dim, low, high)
    if exact is None:  # nothing says that fewer will do
        every = [next((bits for bits in every if min(bits) >= 4), every[-1])]
    for bits in every:
        choice = attempt(bits)
        if _within(choice.table, options.target_kl):
            break
    else:
        cost = f"KL {choice.table.header.kl:.4f} is above {options.target_kl:g}"
        said = f"{flag('preset')} auto: {cost} with {bits[0]:g} bits, too"
        if options.max_kl is not None:
            raise KVQuantError(f"{said}; allow more, or a wider {flag('bits_range')} than {low:g}-{high:g}")
        if is_rank_zero():
            logger.warning("%s: %s, the most of %s %g-%g", NAME, said, flag("bits_range"), low, high)
    return _kept(choice, given, options)


def rungs(head_dim: int, v_head_dim: int, low: float, high: float) -> list[tuple[float, float]]:
    """Of LADDER what is within ``low`` to ``high`` and fills words, which the fast kernels need; else all within."""
    within = [bits for bits in LADDER if low <= min(bits) and max(bits) <= high]
    fast = [
        (k, v)
        for k, v in within
        if uniform_layout(head_dim, k).columns is not None and uniform_layout(v_head_dim, v).columns is not None
    ]
    return fast or within


def _bits(table: AllocationTable) -> str:
    return f"K {table.header.k_bits:g} and V {table.header.v_bits:g} bits"


def _kept(choice: Choice, given: Plan, options: KVQuantOptions) -> Choice:
    from_rank_zero(lambda: keep(choice.table, given.path, options.cache_dir))
    return choice


def _within(table: AllocationTable, most: float | None) -> bool:
    """Whether the measured KL is at most ``most``, which NaN is not; true where it was not measured, of which there
    is a warning."""
    kl = table.header.kl
    return most is None or kl is None or kl <= most


def _check(table: AllocationTable, options: KVQuantOptions, remedy: str) -> None:
    if not _within(table, options.max_kl):
        cost = f"{_bits(table)} cost {table.header.kl:.4f} nats a token"
        raise KVQuantError(f"{flag('max_kl')} {options.max_kl:g}: {cost}; {remedy}")


def _read_exactly(runner: Any, ids: list[int], recent: int = 0) -> HeldOut | None:
    """None where nothing can be measured, with a warning."""
    from .capture import attention_layers, forward
    from .terms import terms_of

    if not ids or not runner.model_config.is_generation:
        why = "the calibration text has no more tokens" if not ids else "this model gives no answers"
        if is_rank_zero():
            logger.warning("%s: what the cache costs is not measured: %s", NAME, why)
        return None
    logits = {x.layer_id: (x.scaling, terms_of(x, {})) for x in attention_layers(runner.model)}

    def run(hook: Callable, answers: torch.Tensor) -> torch.Tensor | None:
        out = forward(runner, hook, ids, range(len(ids)), answers)
        return None if out is None else out.next_token_logits[: len(answers)]

    return HeldOut(run, len(ids), logits, runner.model_config.num_hidden_layers, recent)


def _compile(exact: HeldOut, layers: Mapping[int, PackedLayer]) -> None:
    """On a GPU, the kernels that write and read the held-out sequence, both at a time: at a first start their
    compilation is nearly all of the measuring. The server needs them afterwards."""
    first = next(iter(layers), None)
    if first is None or not exact.exact[first][1].is_cuda:
        return
    from .backend import warm_up

    layer, (_, k, v) = layers[first], exact.exact[first]
    slots = torch.arange(len(k), device=k.device)
    layer.bind(layer.new_rows(len(k), k.device))
    warm_up.run([partial(layer.encode, k, v, slots, slots), partial(layer.dense, slots, slots, k.dtype)], k.device)
    layer.unbind()


def _measure(exact: HeldOut | None, layers: Mapping[int, PackedLayer], table: AllocationTable) -> Quality | None:
    if exact is None:
        return None
    started = time.perf_counter()
    _compile(exact, layers)
    sums = exact.sums(layers)
    reduce(sums.flat)
    quality = from_rank_zero(lambda: sums.quality(len(exact.answers), exact.recent))
    if is_rank_zero():
        logger.info("%s: %s (%.1f s)", NAME, f"{_bits(table)}: {quality.line()}", time.perf_counter() - started)
    return quality
