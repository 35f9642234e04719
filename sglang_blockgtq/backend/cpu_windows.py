"""Attention of layers with a window over SGLang's pool for them, in PyTorch, for hosts without a GPU.

SGLang's PyTorch backend reads that pool at the slots of the other one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from ..kernels.host.attention import causal_attention
from ..terms import terms_of

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class TorchWindowBackend(AttentionBackend):
    """A window's keys and values are read after those of its last tokens are written."""

    def __init__(self, runner: Any):
        super().__init__()
        self.pool, self.req_to_token_pool = runner.token_to_kv_pool, runner.req_to_token_pool
        self.written = None  # slots of the window's pool
        self.requests: list[tuple[torch.Tensor, int]] = []  # slots of all tokens there, and how many are new

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.forward_mode.is_idle():
            return
        lengths = forward_batch.seq_lens.tolist()
        decode = forward_batch.forward_mode.is_decode()
        new = [1] * len(lengths) if decode else forward_batch.extend_seq_lens_cpu
        table, translate = self.req_to_token_pool.req_to_token, self.pool.translate_loc_from_full_to_swa
        rows = forward_batch.req_pool_indices.tolist()
        slots = [translate(table[row, :length].long()) for row, length in zip(rows, lengths, strict=True)]
        self.requests = list(zip(slots, new, strict=True))
        self.written = translate(forward_batch.out_cache_loc)

    def _forward(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        terms = terms_of(layer, kwargs)
        if save_kv_cache:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.written), k, v)
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out, start = torch.zeros(q3.shape[0], layer.tp_q_head_num, layer.v_head_dim), 0  # zeros for padding
        for slots, new in self.requests:
            at = slots[max(0, len(slots) - new - terms.window + 1) :]
            mine = slice(start, start + new)
            out[mine] = causal_attention(q3[mine].float(), keys[at].float(), values[at].float(), layer.scaling, terms)
            start += new
        return out.to(q.dtype).flatten(1)

    forward_decode = forward_extend = _forward
