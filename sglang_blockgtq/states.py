"""States of layers without keys (linear attention, Mamba, short convolutions) while the model is calibrated.

SGLang's backends of such layers keep them in a pool of the server's, which is not there yet when calibration runs.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from .beside import Beside
from .calibrate.model import has_states

STATE = 1  # of the one request; state 0 is that of padding
_kept: tuple[Any, Any] | None = None  # a runner and its backend, from its first sequence to release()


def state_layers(runner: Any) -> list[int]:
    """Ids of this rank's layers that have a state in SGLang's pool."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    layers, info = mambaish_config(runner.model_config).mamba2_cache_params.layers, runner.layer_info
    return [layer for layer in layers if info.start_layer <= layer < info.end_layer]


def new_states(runner: Any) -> Any:
    """A HybridReqToTokenPool with the states of one request: these, whatever request is asked for."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool

    pool = HybridReqToTokenPool(
        size=1,
        mamba_size=1,
        mamba_spec_state_size=1,
        max_context_len=1,  # nobody asks for the slots of its tokens
        device=runner.device,
        enable_memory_saver=False,
        cache_params=mambaish_config(runner.model_config).mamba2_cache_params,
        mamba_layer_ids=state_layers(runner),
        enable_mamba_extra_buffer=False,
        start_layer=runner.layer_info.start_layer,
    )
    pool.req_index_to_mamba_index_mapping.fill_(STATE)
    return pool


def with_states(runner: Any, attention: AttentionBackend) -> AttentionBackend:
    """``attention`` for the layers with keys, SGLang's own backend for the others, over states that are zero.

    For one sequence. ``attention`` itself for a model without states.
    """
    global _kept
    if not has_states(runner.model_config.hf_config):
        return attention
    if _kept is None or _kept[0] is not runner:
        _kept = runner, _beside_states(runner, attention)
    backend = _kept[1]
    backend.req_to_token_pool.mamba_pool.clear_slots(torch.tensor([STATE], device=runner.device))
    backend.full_attn_backend = backend.attn_backend_list[0] = attention
    return backend


def _beside_states(runner: Any, attention: AttentionBackend) -> Any:
    """As SGLang wraps an attention backend, over :func:`new_states`."""
    from sglang.srt.layers.attention.attention_registry import attn_backend_wrapper

    attention.req_to_token_pool = new_states(runner)
    pools = {"req_to_token_pool": attention.req_to_token_pool, "token_to_kv_pool": attention.token_to_kv_pool}
    return attn_backend_wrapper(Beside(runner, **pools), attention)


def release() -> None:
    """Let go of the states, before the cache is sized."""
    global _kept
    _kept = None
