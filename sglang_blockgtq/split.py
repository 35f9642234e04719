"""Models whose layers with a sliding window SGLang keeps in a pool of their own, which forgets what no query sees.

Layers with full attention are packed. A window is small, so its layers stay in 16 bits and go to SGLang's kernels.
"""

from __future__ import annotations

from typing import Any

from .balance import compression, scale_default
from .calibrate.model import WINDOWS_APART, windows_apart
from .calibrate.table import AllocationTable
from .conflicts import refuse_model, type_of
from .options import NAME, KVQuantError


def check_windows(config: Any, apart: bool) -> None:
    """Whether a pool of windows is one that is known here. apart: SGLang would have one. Raises KVQuantError.

    config: of Hugging Face.
    """
    start = f"--kv-quant {NAME}: {type_of(config)}"
    if apart and not windows_apart(config):
        known = ", ".join(sorted(WINDOWS_APART))
        raise KVQuantError(
            f"{start}: SGLang keeps its layers with a window in a pool of their own, which is supported for {known}; "
            "with --disable-hybrid-swa-memory there is one pool, and all layers are packed"
        )
    if windows_apart(config) and not apart:
        raise KVQuantError(
            f"{start}: its layers with a window stay in 16 bits in a pool of their own; leave "
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
        raise refuse_model(type_of(config), f"layers {packed} have full attention, SGLang knows of {theirs}")
    if not packed:
        raise KVQuantError(
            f"--kv-quant {NAME}: no layer of this pipeline stage has full attention; use a smaller --pp-size"
        )


def balance_windows(runner: Any, table: AllocationTable) -> None:
    """Give windows the share of memory that they have beside 16-bit keys and values.

    SGLang's default is a number of tokens for each token of the other layers, which are smaller now: it would leave
    most of the memory to windows. What the user chose stays.
    """
    from sglang.srt.runtime_context import get_schedule

    if not runner.is_hybrid_swa or get_schedule()._swa_full_tokens_ratio_explicitly_set:
        return
    scale_default(
        "swa_full_tokens_ratio",
        1 / compression(table),
        "layers with a window, in 16 bits, take as much of memory beside packed keys and values as they would beside "
        "16-bit ones; give a larger one for more requests",
    )
