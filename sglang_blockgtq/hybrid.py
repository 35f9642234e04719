"""Hybrid models: some layers attend to keys and values, which are packed; others keep a state for each request, which
stays as SGLang has it.

Which of them are served, and how memory is shared between the two.
"""

from __future__ import annotations

from typing import Any

from .balance import compression, scale_default
from .calibrate.model import has_states
from .calibrate.table import AllocationTable
from .conflicts import refuse_model, type_of
from .options import NAME, KVQuantError

SUPPORTED = "gated delta nets, Mamba and short convolutions are supported"


def check_hybrid(runner: Any, attention: list[int]) -> None:
    """Whether SGLang and we mean the same layers. attention: ids of this rank's layers with keys. Raises KVQuantError.

    runner: a ModelRunner with weights loaded.
    """
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config, mamba2_config, mambaish_config
    from sglang.srt.layers.attention.qsa.config import parse_qsa_profile
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
    from sglang.srt.utils import is_blackwell

    from .states import state_layers

    model, info = runner.model_config, runner.layer_info
    config, name = mambaish_config(model), type_of(model.hf_config)
    if config is None:
        if has_states(model.hf_config):
            raise refuse_model(name, f"SGLang keeps no states for its layers without keys; {SUPPORTED}")
        return
    if not (hybrid_gdn_config(model) or mamba2_config(model)) or not has_states(model.hf_config):
        raise refuse_model(name, f"its linear attention is of another kind; {SUPPORTED}")
    if parse_qsa_profile(model.hf_config) is not None:
        raise refuse_model(name, "its sparse attention keeps an index beside keys and values")
    if hybrid_gdn_config(model) and runner.device.split(":")[0] == "cuda" and is_blackwell():
        raise refuse_model(
            name, "on Blackwell GPUs SGLang serves gated delta nets with its own attention backends alone"
        )
    theirs = [i for i in config.full_attention_layer_ids if info.start_layer <= i < info.end_layer]
    if not theirs:
        raise KVQuantError(
            f"--kv-quant {NAME}: layers {info.start_layer} to {info.end_layer - 1} are those of a pipeline stage, and "
            "none of them has keys; use a smaller --pp-size"
        )
    if attention != theirs:
        raise refuse_model(name, f"layers {attention} have keys, SGLang knows of {theirs}")
    breakable = check_cuda_graph_backend(Phase.PREFILL, Backend.BREAKABLE)
    if breakable and not set(attention).isdisjoint(state_layers(runner)):
        raise prefill_graph(name)


def prefill_graph(name: str) -> KVQuantError:
    """Of a model with states beside keys in one layer. Of other hybrid models SGLang captures no prefill; of these its
    graph holds Mamba's kernels as they were captured, and a replay reads memory that is not its own."""
    return KVQuantError(
        f"--kv-quant {NAME}: {name}: it has Mamba beside attention in one layer, which SGLang's graphs of a prefill do "
        "not survive; add --cuda-graph-backend-prefill disabled"
    )


def balance_memory(runner: Any, table: AllocationTable) -> None:
    """Give states the share of memory at which there are as many tokens for each of them as without packing.

    SGLang's default is made for 16-bit keys and values: with packed ones it would leave room for many more tokens, but
    not for more requests or cached prefixes, each of which needs a state. What the user chose stays.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.runtime_context import get_memory, get_schedule

    schedule, given = get_schedule(), runner.server_args
    if not has_states(runner.model_config.hf_config) or mambaish_config(runner.model_config) is None:
        return
    if given.mamba_full_memory_ratio is not None or schedule.max_mamba_cache_size is not None:
        return
    if get_memory().disable_radix_cache and schedule.max_running_requests is not None:
        return  # then there is one state for each request
    scale_default(
        "mamba_full_memory_ratio",
        compression(table),
        "states take as much of memory beside packed keys and values as they would beside 16-bit ones; give a smaller "
        "one for more tokens and fewer requests",
    )
