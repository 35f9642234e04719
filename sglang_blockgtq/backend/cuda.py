"""Attention over packed rows in Triton, for CUDA.

Metadata, CUDA-graph buffers and split counts are SGLang's own Triton backend's; only where keys
and values are read or written differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from ..capture import refuse_extras
from ..kernels.attention import decode_attention, merge_states, prefix_attention
from ..options import NAME
from . import require_packed_pool

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


class TritonPackedBackend(TritonAttnBackend):
    """Reads only the metadata snapshot (kv_indptr, kv_indices, num_kv_splits): the overlap scheduler
    rewrites req_to_token and seq_lens while a captured graph runs."""

    def __init__(self, runner: Any, *args: Any, **kwargs: Any):
        pool = require_packed_pool(runner)
        with pool.probing():
            super().__init__(runner, *args, **kwargs)
        self.v_head_dim = pool.v_head_dim
        self.pool = pool
        self.quantized_chunk = pool.runtime.options.chunk_attention == "quantized"

    def _save(self, layer: RadixAttention, forward_batch: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        swa_loc = self.forward_metadata.swa_out_cache_loc
        self.pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch, swa_loc=swa_loc), k, v)

    def forward_decode(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        refuse_extras(kwargs)
        if save_kv_cache:
            self._save(layer, forward_batch, k, v)
        meta, i = self.forward_metadata, self.pool.local(layer.layer_id)
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q3.new_empty(q3.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        n = q3.shape[0]
        decode_attention(
            self.pool.tables[i],
            q3,
            self.pool.rows[i],
            meta.kv_indptr[: n + 1],
            meta.kv_indices,
            layer.scaling,
            num_kv_splits=meta.num_kv_splits,
            max_kv_splits=self.max_kv_splits,
            partial_out=meta.attn_logits[:n],
            partial_lse=meta.attn_lse[:n],
            out=out,
        )
        return out.flatten(1)

    def forward_extend(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        refuse_extras(kwargs)
        meta, i = self.forward_metadata, self.pool.local(layer.layer_id)
        if meta.custom_mask is not None:
            raise NotImplementedError(f"{NAME}: attention masks of speculative decoding are not supported")
        if save_kv_cache:
            self._save(layer, forward_batch, k, v)
        if self.quantized_chunk:
            k, v = (x.to(q.dtype) for x in self.pool.dequant(layer.layer_id, forward_batch.out_cache_loc))
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k3 = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim).contiguous()
        v3 = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim).contiguous()
        has_prefix = any(forward_batch.extend_prefix_lens_cpu)

        # The chunk's own causal part: SGLang's extend kernel with the cached part skipped. The cache
        # arguments then only lend their strides.
        target = getattr(forward_batch, "_attn_output", None)
        out = q3.new_empty(q3.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        lse = torch.full(q3.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        self.extend_attention_fwd(
            q3,
            k3,
            v3,
            out,
            k3[:1],
            v3[:1],
            meta.qo_indptr,
            meta.kv_indptr,
            meta.kv_indices,
            None,
            True,
            None,
            meta.max_extend_len,
            1.0,
            1.0,
            layer.scaling,
            lse_extend=lse,
            skip_prefix=True,
            extend_seq_lens_cpu=forward_batch.extend_seq_lens_cpu,
        )
        if has_prefix:
            prefix_out, prefix_lse = prefix_attention(
                self.pool.tables[i],
                q3,
                self.pool.rows[i],
                meta.qo_indptr,
                meta.kv_indptr,
                meta.kv_indices,
                layer.scaling,
                max_q_len=meta.max_extend_len,
            )
            out = merge_states(prefix_out.float(), prefix_lse, out.float(), lse)[0].to(q.dtype)
        out = out.flatten(1)
        if target is None:
            return out
        target.copy_(out.view_as(target))
        return target
