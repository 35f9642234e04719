"""Attention over packed rows in Triton, for CUDA.

SGLang's own Triton backend is the base: its metadata of a prefill stays, and so do its CUDA-graph buffers. Where keys
and values are read or written differs, and the slots of a decode step are gathered by one launch inside the step's
graph. On Hopper, extend reads an unpacked prefix (:mod:`.extend`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.triton_backend import ForwardMetadata, TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from ..capture import refuse_extras
from ..kernels.attention import DecodeScratch, decode_attention, merge_states, prefix_attention
from ..kernels.gather import gather_slots
from ..options import NAME
from . import require_packed_pool, warm_up
from .extend import ExtendPlan, FlashExtend, flash_attention_3

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention

logger = logging.getLogger(__name__)


def _plain_decode(forward_batch: Any) -> bool:
    """A step of one token for each request, with or without requests."""
    return forward_batch.forward_mode.is_decode_or_idle() and forward_batch.spec_info is None


class TritonPackedBackend(TritonAttnBackend):
    """Attention reads only kv_indptr and kv_indices: the overlap scheduler rewrites req_to_token and seq_lens while a
    captured graph runs. A decode graph begins by gathering them (init_forward_metadata_in_graph), and SGLang lets the
    scheduler write as soon as that is done (SharedReadEnds.IN_REPLAY, the base's answer for decode)."""

    def __init__(self, runner: Any, *args: Any, **kwargs: Any):
        pool = require_packed_pool(runner)
        with pool.probing():
            super().__init__(runner, *args, **kwargs)
        self.v_head_dim = pool.v_head_dim
        self.pool = pool
        self.quantized_chunk = pool.runtime.options.chunk_attention == "quantized"
        # One for all layers and batch sizes, so that no captured graph keeps its own.
        self.scratch = DecodeScratch.of(pool.tables[0], runner.req_to_token_pool.size, self.num_head)
        self.flash = self._flash_extend(runner)
        self._warm_up(runner)
        self._plan: tuple[Any, ExtendPlan] | None = None

    def _flash_extend(self, runner: Any) -> FlashExtend | None:
        """Chosen once: FlashAttention-3 over an unpacked prefix where it runs, else Triton over packed rows."""
        pool = self.pool
        attend, why = flash_attention_3(runner.device, runner.dtype, pool.head_dim, pool.v_head_dim)
        if attend is None:
            logger.info("%s: prefill attention in Triton over packed rows: %s", NAME, why)
            return None
        most = min(pool.size, runner.model_config.context_len)
        flash = FlashExtend(pool.tables, attend, runner.dtype, most)
        logger.info(
            "%s: prefill attention in FlashAttention-3 over a workspace of %d tokens (%.0f MiB): %s",
            NAME,
            flash.tokens,
            flash.nbytes / (1 << 20),
            why,
        )
        return flash

    def _warm_up(self, runner: Any) -> None:
        """Have every kernel compiled before a graph is captured or a request waits for it."""
        pool, started = self.pool, time.monotonic()
        most = runner.req_to_token_pool.size
        todo = warm_up.jobs(pool.encoders[0], self.scratch, self.num_head, runner.dtype, most)
        if self.flash is not None:
            todo.append(lambda: self.flash.warm_up(pool.rows))
        warm_up.run(todo, pool.rows[0].device)
        logger.info("%s: kernels ready after %.1f s", NAME, time.monotonic() - started)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, kv_indices_buf=None, *args: Any, **kwargs: Any):
        if kv_indices_buf is None:
            kv_indices_buf = torch.zeros(max_num_tokens * self.max_context_len, dtype=warm_up.SLOT, device=self.device)
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf, *args, **kwargs)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if not _plain_decode(forward_batch):
            super().init_forward_metadata(forward_batch)
            return
        total = forward_batch.seq_lens_sum
        if total is None:  # it is on the device alone; what is not needed is not written either
            total = forward_batch.batch_size * self.max_context_len
        kv_indices = torch.empty(total, dtype=warm_up.SLOT, device=self.device)
        self.forward_metadata = self._decode_metadata(forward_batch.batch_size, kv_indices)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if not _plain_decode(forward_batch):
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
        elif in_capture:  # at a replay there is nothing left to do
            self.forward_metadata = self._decode_metadata(forward_batch.batch_size, self.cuda_graph_kv_indices)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        if not _plain_decode(forward_batch):
            super().init_forward_metadata_in_graph(forward_batch)
            return
        batch, meta = forward_batch.batch_size, self.forward_metadata
        table = self.kv_index_translator.read_source(
            forward_batch.kv_loc_plan, req_pool_indices=forward_batch.req_pool_indices, bs=batch
        )
        if table.v2p is not None or table.entry_page_size != 1:
            raise RuntimeError(f"{NAME}: this pool's table of requests holds no slots ({table.entry_page_size=})")
        requests, lengths = table.row_ids[:batch], forward_batch.seq_lens[:batch]
        gather_slots(table.ids, requests, lengths, meta.kv_indptr, meta.kv_indices)

    def _decode_metadata(self, batch: int, kv_indices: torch.Tensor) -> ForwardMetadata:
        names = {field.name for field in fields(ForwardMetadata)}
        own = {"kv_indptr": self.kv_indptr[: batch + 1], "kv_indices": kv_indices}
        return ForwardMetadata(**{**dict.fromkeys(names), **own})

    def _save(self, layer: RadixAttention, forward_batch: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        swa_loc = self.forward_metadata.swa_out_cache_loc
        self.pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch, swa_loc=swa_loc), k, v)

    def forward_decode(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        refuse_extras(kwargs)
        meta, i = self.forward_metadata, self.pool.local(layer.layer_id)
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        turned = None
        if save_kv_cache:
            turned = torch.empty_like(q3, dtype=torch.float32)
            loc = KVWriteLoc.for_batch(forward_batch, swa_loc=meta.swa_out_cache_loc)
            self.pool.set_kv_buffer(layer, loc, k, v, q=q3, turned=turned)
        out = q3.new_empty(q3.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        decode_attention(
            self.pool.tables[i],
            q3,
            self.pool.rows[i],
            meta.kv_indptr[: q3.shape[0] + 1],
            meta.kv_indices,
            layer.scaling,
            turned=turned,
            scratch=self.scratch,
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
        if self.flash is not None:
            return self._forward_extend_flash(q, k, v, layer, forward_batch)
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

    def _extend_plan(self, layer: RadixAttention, forward_batch: Any) -> ExtendPlan:
        """The batch's plan. The first layer always makes a new one: a metadata object may be refilled."""
        meta = self.forward_metadata
        if self._plan is None or self._plan[0] is not meta or layer.layer_id == self.pool.start_layer:
            new = forward_batch.extend_seq_lens_cpu
            plan = self.flash.plan(
                forward_batch.extend_prefix_lens_cpu,
                new,
                meta.qo_indptr[: len(new) + 1],
                meta.kv_indptr[: len(new) + 1],
                meta.kv_indices,
            )
            self._plan = meta, plan
        return self._plan[1]

    def _forward_extend_flash(self, q, k, v, layer: RadixAttention, forward_batch) -> torch.Tensor:
        i, plan = self.pool.local(layer.layer_id), self._extend_plan(layer, forward_batch)
        rows = self.pool.rows[i]
        q3 = _by_head(q, layer.tp_q_head_num, layer.qk_head_dim)
        if self.quantized_chunk:
            k3, v3 = self.flash.unpacked(i, rows, forward_batch.out_cache_loc)
        else:
            k3 = _by_head(k, layer.tp_k_head_num, layer.qk_head_dim)
            v3 = _by_head(v, layer.tp_v_head_num, layer.v_head_dim)
        # Between the pieces of a prefill graph the result belongs where the next piece reads it.
        target = getattr(forward_batch, "_attn_output", None)
        if target is None:
            target = q.new_empty(q3.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        out = target.view(-1, layer.tp_q_head_num, layer.v_head_dim)
        self.flash(i, plan, q3, k3, v3, rows, layer.scaling, out)
        return target


def _by_head(x: torch.Tensor, heads: int, channels: int) -> torch.Tensor:
    """``[T, heads, channels]``. Asked for a view of what is that already, torch would make another one."""
    return x if x.dim() == 3 and x.shape[2] == channels else x.reshape(-1, heads, channels)
