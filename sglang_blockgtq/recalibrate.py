"""New weights, and a new table for them.

A table is made of weights. Once these are replaced it is as valid as before: rows are written and read by it. What
the cache costs is not known any more, and /server_info says so. With ``--kv-quant-recalibrate flush`` the next
/flush_cache makes a table for the weights that are there now and puts it where the old one is: each head keeps its
widths, and so its row, and its channels are poured into these anew. Captured graphs go on.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.platforms import current_platform

from . import runtime
from .calibrate.table import AllocationTable, layers_of
from .choose import choose
from .kernels.layer import PackedLayer
from .options import NAME, KVQuantError, KVQuantOptions, flag
from .ranks import is_rank_zero, reduce
from .states import release

logger = logging.getLogger(__name__)

_replaced = False  # weights, since the table was made
_failure = ""  # why a table for them could not be made


def live() -> dict[str, Any]:
    """For /server_info: whether the weights are others than those of the table, and why that is still so."""
    return {"weights_replaced": _replaced, "recalibration_failure": _failure}


def weights_replaced(options: KVQuantOptions, says: bool) -> None:
    """says: whether this rank warns."""
    global _replaced
    _replaced = True
    if says:
        if options.recalibrate == "flush":
            remedy = "POST /flush_cache to have one made for these"
        else:
            remedy = f"restart the server to have one made for these, or start it with {flag('recalibrate')} flush"
        logger.warning(
            "%s: weights were replaced, and the allocation table is still that of the weights at start-up; %s",
            NAME,
            remedy,
        )


def after_flush(scheduler: Any) -> str:
    """The cache was emptied because a user asked for it. Why that made no new table where one was asked for, or "".

    Collective over all ranks, which come here in the same step of their schedulers.
    """
    global _replaced, _failure
    runner, updater = scheduler.tp_worker.model_runner, scheduler.weight_updater
    options = KVQuantOptions.required_of(runner.server_args)
    if not _replaced or options.recalibrate != "flush":
        return ""
    try:
        if updater.offload_tags or updater._session is not None:
            what = "while memory is released" if updater.offload_tags else "before /end_weight_update"
            raise KVQuantError(f"/flush_cache {what}: weights are not complete; flush again after that")
        with torch.inference_mode():
            recalibrate(runner, options)
        _replaced, _failure = False, ""
    except Exception as e:  # nothing has changed yet: the server goes on with the table that it has
        _failure = " ".join(str(e).split()) or type(e).__name__
        logger.error("%s: the cache was flushed, but not recalibrated: %s", NAME, _failure)
    current_platform.empty_cache()
    return _failure


def recalibrate(runner: Any, options: KVQuantOptions) -> None:
    """Put a table for the weights that are loaded in the place of the one that is served.

    The cache must be empty. Where kernels and graphs could not follow, KVQuantError on all ranks, and nothing has
    changed.
    """
    served, begin = runtime.current(), time.perf_counter()
    header = served.table.header
    asked = replace(
        options,
        table=None,
        max_kl=None,
        exact_recent=served.options.exact_recent,
        **{name: getattr(header, name) for name in ("k_bits", "v_bits", "allocator", "granularity")},
    )

    def make(table: AllocationTable) -> dict[int, PackedLayer]:
        made = layers_of(table, served.heads, served.rows, runner.device, runner.model_config.context_len)
        return {layer: made[row] for layer, row in zip(served.layers, served.rows, strict=True)}

    current_platform.synchronize()
    try:
        choice = choose(runner, asked, make, like=served.table)
    finally:
        release()
    problems = [why for i, layer in served.layers.items() if (why := layer.differs(choice.layers[i]))]
    if reduce(torch.tensor([len(problems)])).item():
        why = problems[0] if problems else "on another rank"
        raise KVQuantError(
            f"{flag('recalibrate')} flush: kernels and graphs were made for another kind of table ({why}); "
            "restart the server"
        )
    for i, layer in served.layers.items():
        layer.adopt(choice.layers[i])
    current_platform.synchronize()
    fresh = replace(served, table=choice.table, origin="recalibrated", seconds=time.perf_counter() - begin)
    runtime.set_current(fresh)
    if is_rank_zero():
        logger.info(fresh.line())
        kl = choice.table.header.kl
        if options.max_kl is not None and (kl is None or not kl <= options.max_kl):
            logger.warning("%s: the new table is not within %s %g", NAME, flag("max_kl"), options.max_kl)
