"""Two backends under one: packed rows for layers with full attention, SGLang's own for those with a window."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds

from ..beside import Beside


def windows_backend(runner: Any) -> AttentionBackend:
    """The backend for the layers with a window of a ModelRunner: on a GPU SGLang's own."""
    if runner.device.split(":")[0] == "cpu":
        from .cpu_windows import TorchWindowBackend

        return TorchWindowBackend(runner)
    if torch.cuda.get_device_capability(runner.gpu_id)[0] == 9:
        from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

        return FlashAttentionBackend(runner)
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    return TritonAttnBackend(runner)


class SplitBackend(AttentionBackend):
    """``make(runner)`` gives the backend of packed rows; it sees a model without windows."""

    def __init__(self, runner: Any, make: Any):
        super().__init__()
        pool = runner.token_to_kv_pool
        self.packed = make(Beside(runner, token_to_kv_pool=pool.full_kv_pool, sliding_window_size=None))
        with pool.full_kv_pool.probing():
            self.windows = windows_backend(runner)
        self.attn_backend_list = [self.packed, self.windows]
        self.window_layers = frozenset(runner.layer_info.swa_attention_layer_ids)
        self.token_to_kv_pool, self.req_to_token_pool = pool, runner.req_to_token_pool
        self.kv_index_translator = self.packed.kv_index_translator
        self.max_context_len = runner.model_config.context_len
        self.needs_cpu_seq_lens = any(b.needs_cpu_seq_lens for b in self.attn_backend_list)
        self.extend_dummy_seqs_capped_by_req_pool = any(
            b.extend_dummy_seqs_capped_by_req_pool for b in self.attn_backend_list
        )

    def support_triton(self) -> bool:
        return self.packed.support_triton()

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        return SharedReadEnds.max_of(b.shared_read_ends(fm) for b in self.attn_backend_list)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backend_list:
            backend.init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        for backend in self.attn_backend_list:
            backend.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        for backend in self.attn_backend_list:
            backend.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backend_list:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def on_after_cuda_graph_warmup(self) -> None:
        for backend in self.attn_backend_list:
            backend.on_after_cuda_graph_warmup()

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return self.packed.get_cuda_graph_seq_len_fill_value()

    def _of(self, layer: Any) -> AttentionBackend:
        return self.windows if layer.layer_id in self.window_layers else self.packed

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._of(layer).forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._of(layer).forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
