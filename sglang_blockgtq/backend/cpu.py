"""Attention over packed rows in PyTorch, for hosts without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from ..kernels.host.attention import causal_attention
from ..kernels.reference import read_tree
from ..runtime import current
from ..terms import terms_of
from . import copies_of, require_packed_pool

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from ..kernels.layer import TorchLayer
    from ..pool import PackedKVPool


class TorchPackedBackend(AttentionBackend):
    """forward_decode reads codes; forward_extend rotates a prefix back once a layer.

    Of a step: kv_indices, the slots that are read, read, the same as a slice where they lie together, and their
    positions; kv_indptr, each request's part.
    """

    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    read: torch.Tensor | slice
    positions: torch.Tensor

    def __init__(self, runner: Any):
        super().__init__()
        self.pool: PackedKVPool[TorchLayer] = require_packed_pool(runner)
        self.token_to_kv_pool = self.pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.quantized_chunk = current().options.chunk_attention == "quantized"
        self.verification: dict[str, Any] = {}  # how the queries of a step that verifies drafts are read
        self.recent, self.copies = copies_of(runner, self.pool.layers)

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Slots that are read: in decode all tokens with the new one, or with the drafts that are verified; in extend
        the prefix alone."""
        if forward_batch.forward_mode.is_idle():
            return
        self.verification = {}
        fresh = 0
        if forward_batch.forward_mode.is_decode():
            fresh = 1
            lengths = forward_batch.seq_lens.tolist()
            if self.recent is not None:
                counts = self.recent.begin(forward_batch.req_pool_indices, forward_batch.seq_lens)
                lengths = [n - exact for n, exact in zip(lengths, counts.tolist(), strict=True)]
        elif forward_batch.forward_mode.is_target_verify():
            spec, before = forward_batch.spec_info, forward_batch.seq_lens
            q_len = fresh = spec.draft_token_num
            lengths = (before + q_len).tolist()
            full = spec.custom_mask.numel() >= q_len * sum(lengths)  # or of the trees alone
            self.verification = {"q_len": q_len}
            if self.recent is None:
                self.verification["tree"], _ = read_tree(spec.custom_mask, before, q_len, full)
            else:  # of a chain, whose tokens are exact
                counts = self.recent.begin(forward_batch.req_pool_indices, before + 1)
                lengths = (before + 1 - counts).tolist()
        else:
            lengths = list(forward_batch.extend_prefix_lens_cpu)
        table = self.req_to_token_pool.req_to_token
        slots = [table[r, :n] for r, n in zip(forward_batch.req_pool_indices.tolist(), lengths, strict=True)]
        self.kv_indices = torch.cat(slots).long()
        self.kv_indptr = torch.tensor([0, *lengths]).cumsum(0)
        self.positions = torch.cat([torch.arange(n) for n in lengths])  # of the slots
        self.read = _neighbours(self.kv_indices)
        if self.pool.check:
            self.pool.check.sample(self.kv_indptr, self.kv_indices, fresh=fresh)
            self.pool.check.poll()

    def _encode(self, k, v, layer: RadixAttention, forward_batch, save_kv_cache: bool) -> TorchLayer:
        packed = self.pool.layer(layer.layer_id)
        if save_kv_cache:
            packed.encode(*_by_head(k, v, packed), forward_batch.out_cache_loc, forward_batch.positions)
            if self.pool.check:
                self.pool.check.wrote(layer.layer_id, forward_batch)
        return packed

    def _remember(self, k, v, layer: RadixAttention, forward_batch: ForwardBatch) -> None:
        new = forward_batch.extend_seq_lens_cpu
        requests, before = forward_batch.req_pool_indices[: len(new)], forward_batch.extend_prefix_lens[: len(new)]
        self.copies[layer.layer_id].remember(k, v, requests, before, torch.tensor([0, *new]).cumsum(0))

    def forward_decode(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        terms = terms_of(layer, kwargs)
        packed = self._encode(k, v, layer, forward_batch, save_kv_cache)
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        options = dict(self.verification)
        if self.recent is not None:
            options["recent"] = self.copies[layer.layer_id].read(*_by_head(k, v, packed))
        out = packed.decode(q3, self.kv_indptr, self.read, layer.scaling, terms=terms, **options)
        return out.flatten(1)

    def forward_extend(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        if forward_batch.forward_mode.is_target_verify():
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        terms = terms_of(layer, kwargs)
        packed = self._encode(k, v, layer, forward_batch, save_kv_cache)
        if self.recent is not None and save_kv_cache:
            self._remember(*_by_head(k, v, packed), layer, forward_batch)
        if self.quantized_chunk:
            k, v = packed.dense(forward_batch.out_cache_loc, forward_batch.positions)
        heads = layer.tp_q_head_num
        q3 = q.reshape(-1, heads, layer.qk_head_dim).float()
        k3 = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim).float()
        v3 = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim).float()
        out = torch.empty(q3.shape[0], heads, layer.v_head_dim)
        start, indptr = 0, self.kv_indptr.tolist()
        for b, length in enumerate(forward_batch.extend_seq_lens_cpu):
            new = slice(start, start + length)
            keys, values = k3[new], v3[new]
            if indptr[b] < indptr[b + 1]:
                part = slice(indptr[b], indptr[b + 1])
                prefix = packed.dense(self.kv_indices[part], self.positions[part])
                keys, values = torch.cat([prefix[0], keys]), torch.cat([prefix[1], values])
            out[new] = causal_attention(q3[new], keys, values, layer.scaling, terms)
            start += length
        # Rows beyond the real tokens (padding) are not anybody's; keep them finite.
        out[start:] = 0
        return out.to(q.dtype).flatten(1)


def _by_head(k: torch.Tensor, v: torch.Tensor, packed: TorchLayer) -> tuple[torch.Tensor, torch.Tensor]:
    return k.view(-1, packed.heads, packed.head_dim), v.view(-1, packed.heads, packed.v_head_dim)


def _neighbours(slots: torch.Tensor) -> torch.Tensor | slice:
    """Slots one after another as a slice, whose rows need no copy; other slots as they are."""
    if not len(slots) or not bool((slots.diff() == 1).all()):
        return slots
    return slice(int(slots[0]), int(slots[-1]) + 1)
