"""Attention over packed rows in Triton, for CUDA.

SGLang's own Triton backend is the base: its metadata of a prefill stays. Where keys and values are read or written
differs, and the slots of a decode step are gathered by one launch inside the step's graph.
"""

from __future__ import annotations

import logging
import time
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.triton_backend import ForwardMetadata, TritonAttnBackend
from sglang.srt.layers.attention.verify_mask import VerifyMask
from sglang.srt.speculative.eagle_utils import TreeMaskMode

from ..kernels.cuda.attention import KernelError
from ..kernels.decode.gather import gather_slots
from ..kernels.encode.encoder import Encoder
from ..kernels.encode.step import StepEncoder
from ..options import NAME, KVQuantError, flag
from ..runtime import current
from ..terms import terms_of
from . import copies_of, require_packed_pool, warm_up
from .buffers import SLOT, Buffers, new_graph_slots
from .extend import ExtendPlan
from .rope import SAME, LeftRope, distance
from .side_stream import SideStream

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention

    from ..kernels.decode.attention import DecodeScratch
    from ..kernels.layer import TritonLayer
    from ..pool import PackedKVPool
    from ..speculation import Verification

logger = logging.getLogger(__name__)


class TritonPackedBackend(TritonAttnBackend):
    """Attention reads only kv_indptr and kv_indices: the overlap scheduler rewrites req_to_token and seq_lens while a
    captured graph runs. A decode graph begins by gathering them (init_forward_metadata_in_graph), and SGLang lets the
    scheduler write as soon as that is done (SharedReadEnds.IN_REPLAY, the base's answer for decode)."""

    def __init__(self, runner: Any, *args: Any, **kwargs: Any):
        pool = require_packed_pool(runner)
        with pool.probing():
            super().__init__(runner, *args, **kwargs)
        self.v_head_dim = pool.v_head_dim
        self.pool: PackedKVPool[TritonLayer] = pool
        self.first_layer = next(iter(pool.layers))
        first = pool.layers[self.first_layer]
        self.pages = (first.tables.means.page, first.tables.means.nowhere) if first.has_means else (0, 0)
        self.quantized_chunk = current().options.chunk_attention == "quantized"
        self.recent, self.copies = copies_of(runner, pool.layers)
        self.encode_step, self.last_layer = self._step_encoder(), next(reversed(pool.layers))
        # Where a step's keys are encoded at its end, nobody else reads them.
        self.rope = LeftRope.of(runner.model, pool.layers) if self.encode_step else None
        # Checksums of a step's rows are taken in its last layer.
        self.side = SideStream.of(runner) if self.encode_step and not pool.check else None
        self.buffers = self._buffers(runner)
        self._warm_up(runner)
        self._verify_mask = self._new_verify_mask(runner)
        self._extended: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # requests, tokens before, indptr of a prefill
        self._plans: tuple[Any, dict[int, list[tuple[slice, ExtendPlan]]]] | None = None  # by window

    def _step_encoder(self) -> StepEncoder | None:
        """Where exact tokens are read, a decode step's are encoded for all layers at its end."""
        encoders = [layer.encoder for layer in self.pool.layers.values()]
        in_columns = [encoder for encoder in encoders if isinstance(encoder, Encoder)]
        if self.recent is None or self.recent.queries > 1 or in_columns != encoders:
            return None
        return StepEncoder(in_columns, self.recent)

    def _later(self, tokens: int) -> StepEncoder | None:
        """What encodes a step of so many tokens at its end; None: its layers do."""
        return self.encode_step if self.encode_step and self.encode_step.takes(tokens) else None

    def _buffers(self, runner: Any) -> Buffers:
        """Those that were taken before the cache was sized."""
        buffers = current().buffers
        if buffers is None:
            raise RuntimeError(f"{NAME}: no buffers were taken before the cache was sized")
        return buffers

    def _new_verify_mask(self, runner: Any) -> VerifyMask | None:
        """What a draft's workers write their trees to: without what lies before them, which every query sees."""
        verification = self.buffers.verification
        if verification is None:
            return None
        requests, q_len = runner.req_to_token_pool.size, verification.q_len
        buffer = torch.zeros(requests * q_len * q_len, dtype=torch.uint8, device=self.device)
        return VerifyMask(buffer=buffer, mode=TreeMaskMode.QLEN_ONLY, max_bs=requests)

    def _warm_up(self, runner: Any) -> None:
        """Have every kernel compiled before a graph is captured or a request waits for it. KVQuantError."""
        started, layers = time.monotonic(), list(self.pool.layers.values())
        most = runner.req_to_token_pool.size
        copies, rotary = self.copies.get(self.first_layer), self.rope.rotary_dim if self.rope else 0
        todo = warm_up.jobs(layers[0], self.buffers.scratch, self.num_head, runner.dtype, most, copies, rotary)
        if self.buffers.verification:
            verification, scratch = self._verifying()
            q_len, tree = verification.q_len, verification.tree
            todo += warm_up.verify_jobs(layers[0], scratch, self.num_head, runner.dtype, most, q_len, tree, copies)
            if tree is not None:  # it is read, and the rows of an accepted branch are moved
                todo += [partial(verification.warm_up, n, *self.pages) for n in warm_up.batch_sizes(most)]
                todo.append(partial(self.pool.move_kv_cache, *torch.zeros(2, 1, dtype=torch.int64, device=self.device)))
        if self.encode_step:
            todo += [partial(self.encode_step.warm_up, n) for n in self.encode_step.batch_sizes()]
        todo.append(lambda: self.buffers.workspace.warm_up(layers))
        if self.pool.check:
            todo += [partial(self.pool.check.warm_up, n, self._ahead) for n in warm_up.batch_sizes(most)]
        try:
            warm_up.run(todo, layers[0].rows.device)
        except KernelError as error:
            asked = f"{flag('decode_kernel')} {current().options.decode_kernel}"
            raise KVQuantError(f"{asked}: the CUDA kernel cannot be used: {error}; triton leaves it out") from error
        self.rope = self._checked_rope(runner)
        logger.info(
            "%s: decode attention%s in %s, prefill attention in %s over %d tokens at a time; "
            "kernels ready after %.1f s",
            NAME,
            " with RoPE" if self.rope else "",
            current().decode_attention,
            self.buffers.prefill.name,
            self.buffers.workspace.tokens,
            time.monotonic() - started,
        )

    def _checked_rope(self, runner: Any) -> LeftRope | None:
        """``self.rope`` if this device turns queries and keys as the model does. Without it nothing is left, and the
        model goes on as ever."""
        if self.rope is None:
            return None
        first, copies = self.pool.layers[self.first_layer], self.copies[self.first_layer]
        off = distance(self.rope, first, copies, self.num_head, runner.dtype)
        if off < SAME:
            return self.rope
        logger.warning(
            "%s: RoPE stays a launch of its own: in attention's it is off by %.2g on this device, a fault of ours; "
            "please report it",
            NAME,
            off,
        )
        return None

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Of the base's buffers none is read: decode has its own scratch, and other graphs are refused."""
        slots, needed = self.buffers.graph_slots, max_bs * (self.max_context_len + self._ahead)
        if slots is None or len(slots) < needed:
            logger.warning("%s: graphs of %d requests were not foreseen when the cache was sized", NAME, max_bs)
            slots = new_graph_slots(needed, self.device)
        self.cuda_graph_kv_indices = slots

    @property
    def _ahead(self) -> int:
        """Tokens of a request behind those that SGLang counts, of a verification."""
        return self.buffers.verification.q_len if self.buffers.verification else 0

    def _queries(self, forward_batch: Any) -> int:
        """Of each request in a step that reads packed rows alone: a decode step or a verification. 0: a prefill."""
        if forward_batch.forward_mode.is_target_verify():
            return self._ahead
        return int(forward_batch.forward_mode.is_decode_or_idle())

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if self.rope:
            self.rope.end()
        if self.pool.check:
            self.pool.check.poll()
        if not self._queries(forward_batch):
            super().init_forward_metadata(forward_batch)
            self._check_prefixes(forward_batch)
            return
        total, batch = forward_batch.seq_lens_sum, forward_batch.batch_size
        if total is None:  # it is on the device alone; what is not needed is not written either
            total = batch * self.max_context_len
        kv_indices = torch.empty(total + batch * self._ahead, dtype=SLOT, device=self.device)
        self.forward_metadata = self._step_metadata(forward_batch, kv_indices)
        self._read_tree(forward_batch)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if self.rope:
            self.rope.end()
        if self.pool.check and not in_capture:
            self.pool.check.poll()
        if not self._queries(forward_batch):
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
            return
        if in_capture:  # at a replay there is nothing left to do but to read the drafts' trees
            self.forward_metadata = self._step_metadata(forward_batch, self.cuda_graph_kv_indices)
        self._read_tree(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        queries = self._queries(forward_batch)
        if not queries:
            super().init_forward_metadata_in_graph(forward_batch)
            return
        batch, meta = forward_batch.batch_size, self.forward_metadata
        table = self.kv_index_translator.read_source(
            forward_batch.kv_loc_plan, req_pool_indices=forward_batch.req_pool_indices, bs=batch
        )
        if table.v2p is not None or table.entry_page_size != 1:
            raise RuntimeError(f"{NAME}: this pool's table of requests holds no slots ({table.entry_page_size=})")
        requests, lengths = table.row_ids[:batch], forward_batch.seq_lens[:batch]
        # Of a verification SGLang counts the tokens before it. Those that are exact are not gathered.
        more = (1 if self.recent else queries) if forward_batch.forward_mode.is_target_verify() else 0
        gather_slots(table.ids, requests, lengths, meta.kv_indptr, meta.kv_indices, more, self.recent)
        if self.rope and self._later(batch):
            self.rope.begin(forward_batch.positions)
        if self.pool.check:
            self.pool.check.sample(meta.kv_indptr, meta.kv_indices, fresh=queries)

    def _check_prefixes(self, forward_batch: Any) -> None:
        meta, batch = self.forward_metadata, forward_batch.batch_size
        if self.pool.check and meta.kv_indptr is not None:
            self.pool.check.sample(meta.kv_indptr[: batch + 1], meta.kv_indices, fresh=0)

    def _step_metadata(self, forward_batch: Any, kv_indices: torch.Tensor) -> ForwardMetadata:
        names = {field.name for field in fields(ForwardMetadata)}
        indptr = self.kv_indptr[: forward_batch.batch_size + 1]
        own = {"kv_indptr": indptr, "kv_indices": kv_indices, "max_extend_len": self._queries(forward_batch)}
        return ForwardMetadata(**{**dict.fromkeys(names), **own})

    def _verifying(self) -> tuple[Verification, DecodeScratch]:
        verification, scratch = self.buffers.verification, self.buffers.verify_scratch
        if verification is None or scratch is None:
            raise RuntimeError(f"{NAME}: drafts are to be verified, but the server was started without speculation")
        return verification, scratch

    def _read_tree(self, forward_batch: Any) -> None:
        if forward_batch.forward_mode.is_target_verify():
            self._verifying()[0].read(forward_batch, *self.pages)

    def forward_decode(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        terms, scratch = terms_of(layer, kwargs), self.buffers.scratch
        return self._step(q, k, v, layer, forward_batch, forward_batch.positions, save_kv_cache, scratch, terms=terms)

    def _verify(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache, terms):
        (verification, scratch), positions = self._verifying(), forward_batch.positions
        options = {"q_len": verification.q_len, "terms": terms}
        if verification.tree is not None:
            tree = verification.tree.first(len(q))
            positions, options["tree"] = tree.positions, tree.bits
        return self._step(q, k, v, layer, forward_batch, positions, save_kv_cache, scratch, **options)

    def _step(self, q, k, v, layer: RadixAttention, forward_batch, positions, save_kv_cache, scratch, **options):
        meta, packed = self.forward_metadata, self.pool.layer(layer.layer_id)
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        rotated, later = None, self._later(len(q3))
        if self.recent is not None:
            angles = self.rope.take(q, k) if self.rope else None
            options["recent"] = self.copies[layer.layer_id].read(*_by_head(k, v, layer), angles)
        if save_kv_cache and later is None:
            query = q3 if self.recent is None else None  # which is rotated where exact tokens are read
            rotated = packed.encode(*_by_head(k, v, layer), forward_batch.out_cache_loc, positions, query)
        out = q3.new_empty(q3.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        kv_indptr = meta.kv_indptr[: q3.shape[0] // meta.max_extend_len + 1]
        options |= {"rotated": rotated, "scratch": scratch, "out": out}
        packed.decode(q3, kv_indptr, meta.kv_indices, layer.scaling, **options)
        if self.rope and layer.layer_id == self.last_layer:
            self.rope.end()
        if save_kv_cache:
            if later is not None and layer.layer_id == self.last_layer:
                at = forward_batch.out_cache_loc, positions
                self.side.run(later, *at) if self.side else later(*at)
            self._wrote(layer, forward_batch)
        return out.flatten(1)

    def forward_extend(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **kwargs):
        terms = terms_of(layer, kwargs)
        if forward_batch.forward_mode.is_target_verify():
            return self._verify(q, k, v, layer, forward_batch, save_kv_cache, terms)
        packed = self.pool.layer(layer.layer_id)
        k3, v3 = _by_head(k, v, layer)
        if save_kv_cache:
            packed.encode(k3, v3, forward_batch.out_cache_loc, forward_batch.positions)
            self._wrote(layer, forward_batch)
            self._remember(k3, v3, layer, forward_batch)
        if self.quantized_chunk:
            k3, v3 = packed.dense(forward_batch.out_cache_loc, forward_batch.positions, q.dtype)
        q3 = _heads(q, layer.tp_q_head_num, layer.qk_head_dim)
        # Between the pieces of a prefill graph the result belongs where the next piece reads it.
        target = getattr(forward_batch, "_attn_output", None)
        if target is None:
            target = q.new_empty(q3.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        out = target.view(-1, layer.tp_q_head_num, layer.v_head_dim)
        for new, plan in self._extend_plans(layer, forward_batch, terms.window):
            self.buffers.workspace(packed, plan, q3[new], k3[new], v3[new], layer.scaling, out[new], terms)
        return target

    def _remember(self, k3, v3, layer: RadixAttention, forward_batch: Any) -> None:
        if self.recent is None:
            return
        if layer.layer_id == self.first_layer:  # the same for all layers, and the host's time counts
            n, qo_indptr = len(forward_batch.extend_seq_lens_cpu), self.forward_metadata.qo_indptr
            self._extended = (
                forward_batch.req_pool_indices[:n],
                forward_batch.extend_prefix_lens[:n],
                qo_indptr[: n + 1],
            )
        self.copies[layer.layer_id].remember(k3, v3, *self._extended)

    def _wrote(self, layer: RadixAttention, forward_batch: Any) -> None:
        if self.pool.check:
            self.pool.check.wrote(layer.layer_id, forward_batch)

    def _extend_plans(self, layer: RadixAttention, forward_batch: Any, window: int) -> list[tuple[slice, ExtendPlan]]:
        """The batch's plans for layers of a window. The first layer always makes new ones: a metadata object may be
        refilled."""
        meta = self.forward_metadata
        if self._plans is None or self._plans[0] is not meta or layer.layer_id == self.first_layer:
            self._plans = meta, {}
        plans = self._plans[1]
        if window not in plans:
            new = forward_batch.extend_seq_lens_cpu
            plans[window] = self.buffers.workspace.plans(
                forward_batch.extend_prefix_lens_cpu,
                new,
                meta.qo_indptr[: len(new) + 1],
                meta.kv_indptr[: len(new) + 1],
                meta.kv_indices,
                window,
            )
        return plans[window]


def _heads(x: torch.Tensor, heads: int, channels: int) -> torch.Tensor:
    """``[T, heads, channels]``. Asked for a view of what is that already, torch would make another one."""
    return x if x.dim() == 3 and x.shape[2] == channels else x.reshape(-1, heads, channels)


def _by_head(k: torch.Tensor, v: torch.Tensor, layer: RadixAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values by head, as the model made them."""
    if k is None:
        raise NotImplementedError(f"{NAME}: layer {layer.layer_id} shares another layer's cache; not supported")
    return (
        _heads(k, layer.tp_k_head_num, layer.qk_head_dim),
        _heads(v, layer.tp_v_head_num, layer.v_head_dim),
    )
