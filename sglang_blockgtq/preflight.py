"""What is found out where --kv-quant is given, before a process is spawned or a weight read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from .conflicts import HICACHE_PAGE, chosen_device
from .options import NAME, KVQuantError, KVQuantOptions

logger = logging.getLogger(__name__)


def defaults(get: Callable[[str], Any]) -> dict[str, Any]:
    """Fields of ServerArgs that --kv-quant sets, for those the user gave: ``get(field)`` is a value or None.

    A host without any accelerator gets the CPU, and is told.
    """
    found: dict[str, Any] = {"attention_backend": NAME}
    if get("device") is None and _on_cpu(get):
        logger.warning("%s: no accelerator found, serving on the CPU", NAME)
        found["device"] = "cpu"
    if get("enable_hierarchical_cache") and get("page_size") is None:
        logger.info("%s: --page-size %d by default with --enable-hierarchical-cache", NAME, HICACHE_PAGE)
        found["page_size"] = HICACHE_PAGE
    if get("speculative_algorithm") is not None and get("speculative_draft_attention_backend") is None:
        from .speculation import draft_backend

        found["speculative_draft_attention_backend"] = draft_backend(found.get("device") or get("device"))
    return found


def check(asked: KVQuantOptions, get: Callable[[str], Any]) -> None:
    """What the model's config, a named table and the calibration text tell. Raises KVQuantError."""
    from .conflicts import check_config, check_granularity
    from .speculation import check_speculation

    config = _read_config(get)
    if config is not None:
        check_config(config)
        _check_states(config, get)
        _check_windows(config, get)
        _check_pages(config, get)
        check_speculation(config, get("speculative_algorithm"))
        _check_drafts(get)
        check_granularity(config, asked)
        if asked.table is not None:
            from .obtain import load_named_table

            load_named_table(asked, config)
    if asked.table is None and (asked.calibration_text or asked.calibration_tokens > KVQuantOptions.calibration_tokens):
        _check_text(asked, get)


def _read_config(get: Callable[[str], Any]) -> Any:
    """The model's Hugging Face config, or None when it cannot be read: SGLang then says why itself."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        return get_config(
            get("model_path"),
            trust_remote_code=bool(get("trust_remote_code")),
            revision=get("revision"),
            model_override_args=json.loads(get("json_model_override_args") or "{}"),
        )
    except Exception as e:
        logger.debug("%s: config of %s not readable yet: %s", NAME, get("model_path"), e)
        return None


def _check_states(config: Any, get: Callable[[str], Any]) -> None:
    """Layers with states are SGLang's kernels, which a plain CPU has in Triton's interpreter at most."""
    from sglang.srt.utils import cpu_has_amx_support
    from triton import knobs

    from .calibrate.model import STATE_BESIDE_KEYS, has_states, layer_kinds
    from .conflicts import type_of
    from .hybrid import prefill_graph

    on_cpu = _on_cpu(get)
    if has_states(config) and on_cpu and not (knobs.runtime.interpret or cpu_has_amx_support()):
        raise KVQuantError(
            f"--device cpu: not with --kv-quant {NAME} for {type_of(config)}: its layers without keys are "
            "Triton kernels of SGLang's; use a GPU, or set TRITON_INTERPRET=1 to try a small model, slowly"
        )
    off = get("disable_cuda_graph") or get("cuda_graph_backend_prefill") == "disabled"
    unknown = get("cuda_graph_config")  # check_hybrid knows what it becomes
    if not (on_cpu or off or unknown or STATE_BESIDE_KEYS.isdisjoint(layer_kinds(config))):
        raise prefill_graph(type_of(config))


def _check_drafts(get: Callable[[str], Any]) -> None:
    """SGLang's kernels for drafts come with a GPU, or with its engine for CPUs; some are Triton's."""
    from sglang.srt.utils import is_cpu
    from triton import knobs

    algorithm = get("speculative_algorithm")
    if algorithm is not None and _on_cpu(get) and not (knobs.runtime.interpret or is_cpu()):
        raise KVQuantError(
            f"--speculative-algorithm {algorithm}: not with --kv-quant {NAME} on a CPU without SGLang's engine for "
            "CPUs (SGLANG_USE_CPU_ENGINE=1); serve without speculation, or use a GPU"
        )
    if algorithm not in (None, "NGRAM") and get("enable_hierarchical_cache"):
        raise KVQuantError(
            f"--speculative-algorithm {algorithm}: not with --kv-quant {NAME} and --enable-hierarchical-cache: host "
            "memory for a draft's cache beside packed rows is not tested; leave one of the two out"
        )


def _on_cpu(get: Callable[[str], Any]) -> bool:
    return chosen_device(get("device"))[1] == "cpu"


def _check_windows(config: Any, get: Callable[[str], Any]) -> None:
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    from .split import check_windows

    apart = is_hybrid_swa_model(config.architectures or [], config.get_text_config())
    check_windows(config, apart and not get("disable_hybrid_swa_memory"))


def _check_pages(config: Any, get: Callable[[str], Any]) -> None:
    """Without its extra buffer SGLang keeps states for pages of one token, and HiCache moves blocks of rows."""
    from sglang.srt.arg_groups.overrides import supports_mamba_cache_extra_buffer

    from .calibrate.model import has_states

    if not get("enable_hierarchical_cache") or not has_states(config):
        return
    given = get("mamba_radix_cache_strategy") or "auto"
    view = SimpleNamespace(linear_attn_backend=get("linear_attn_backend") or "triton")
    extra = not get("disable_overlap_schedule") and supports_mamba_cache_extra_buffer(view, config)
    if given == "no_buffer" or given == "auto" and not extra:
        raise KVQuantError(
            f"--enable-hierarchical-cache: not with --kv-quant {NAME} for model type {config.model_type} with "
            f"--mamba-radix-cache-strategy {given}: SGLang then keeps its states for pages of one token, and packed "
            "rows are moved in whole blocks; use extra_buffer where SGLang has it for the model, else leave the option "
            "out"
        )


def _check_text(asked: KVQuantOptions, get: Callable[[str], Any]) -> None:
    """The text must hold enough tokens; found out now, not after the weights are loaded."""
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    from .calibrate.text import TextError, read_text
    from .obtain import calibration_text

    try:
        read_text(asked.calibration_text)
    except TextError as e:
        raise KVQuantError(str(e)) from None
    try:
        tokenizer = get_tokenizer(
            get("tokenizer_path") or get("model_path"),
            tokenizer_mode=get("tokenizer_mode") or "auto",
            trust_remote_code=bool(get("trust_remote_code")),
            revision=get("revision"),
        )
    except Exception as e:
        logger.debug("%s: tokenizer not readable yet: %s", NAME, e)
        return
    calibration_text(tokenizer, asked, asked.calibration_tokens, "cpu")
