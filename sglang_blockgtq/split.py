"""Models whose layers with a sliding window SGLang keeps in a pool of their own, which forgets what no query sees.

Layers with full attention are packed. A window is small, so its layers stay in 16 bits and go to SGLang's kernels.
"""

from __future__ import annotations

import logging
from typing import Any

from .calibrate.model import WINDOWS_APART, windows_apart
from .calibrate.table import AllocationTable
from .conflicts import refuse_model
from .options import NAME, KVQuantError
from .ranks import is_rank_zero

logger = logging.getLogger(__name__)


def check_windows(config: Any, apart: bool) -> None:
    """Whether a pool of windows is one that is known here. apart: SGLang would have one. Raises KVQuantError.

    config: of Hugging Face.
    """
    name = f"model type {getattr(config, 'model_type', 'unknown')}"
    if apart and not windows_apart(config):
        known = ", ".join(sorted(WINDOWS_APART))
        raise KVQuantError(
            f"--kv-quant {NAME}: {name}: SGLang keeps its layers with a window in a pool of their own, which is "
            f"supported for {known}; with --disable-hybrid-swa-memory there is one pool, and all layers are packed"
        )
    if windows_apart(config) and not apart:
        raise KVQuantError(
            f"--kv-quant {NAME}: {name}: its layers with a window stay in 16 bits in a pool of their own; leave "
            "--disable-hybrid-swa-memory out"
        )


def check_split(runner: Any, packed: list[int]) -> None:
    """Whether SGLang and we keep the same layers apart. packed: ids of this rank's layers that would be packed.

    runner: a ModelRunner with weights loaded. Raises KVQuantError.
    """
    config, info = runner.model_config.hf_config, runner.layer_info
    check_windows(config, runner.is_hybrid_swa)
    if not runner.is_hybrid_swa:
        return
    if packed != (theirs := list(info.full_attention_layer_ids)):
        name = f"model type {getattr(config, 'model_type', 'unknown')}"
        raise refuse_model(name, f"layers {packed} have full attention, SGLang knows of {theirs}")
    if not packed:
        raise KVQuantError(
            f"--kv-quant {NAME}: no layer of this pipeline stage has full attention; use a smaller --pp-size"
        )


def balance_windows(runner: Any, table: AllocationTable) -> None:
    """Give windows the share of memory that they have beside 16-bit keys and values.

    SGLang's default is a number of tokens for each token of the other layers, which are smaller now: it would leave
    most of the memory to windows. What the user chose stays.
    """
    from sglang.srt.runtime_context import get_context, get_schedule

    if not runner.is_hybrid_swa or get_schedule()._swa_full_tokens_ratio_explicitly_set:
        return
    header, default = table.header, get_schedule().swa_full_tokens_ratio
    smaller = 2 * (header.head_dim + header.v_head_dim) / table.bytes_per_token_head()
    ratio = round(default / smaller, 4)
    get_context().override(f"{NAME}.balance_windows", swa_full_tokens_ratio=ratio)
    if is_rank_zero():
        logger.info(
            "%s: --swa-full-tokens-ratio %g in place of %g: layers with a window, in 16 bits, take as much of memory "
            "beside packed keys and values as they would beside 16-bit ones; give a larger one for more requests",
            NAME,
            ratio,
            default,
        )


def window_bytes(runner: Any) -> int:
    """Bytes of keys and values of one token in this rank's layers with a window."""
    from .capture import attention_layers

    kept = runner.layer_info.swa_attention_layer_ids if runner.is_hybrid_swa else ()
    layers = [x for x in attention_layers(runner.model) if x.layer_id in kept]
    return sum(x.tp_k_head_num * (x.qk_head_dim + x.v_head_dim) for x in layers) * runner.kv_cache_dtype.itemsize
