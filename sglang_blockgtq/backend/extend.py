"""Extend at the speed of a dense cache: the prefix is unpacked to a workspace that a dense kernel reads.

A prefix and chunk that fit the workspace together lie there one after the other, and one causal call sees
them as it would a dense cache. A longer prefix goes through the workspace in pieces, each attended by the
queries that have keys in it; the pieces and the chunk's own causal attention are merged by their LSE.

Between the pieces of a prefill graph this runs eagerly, and a short chunk's attention takes a GPU tens of
microseconds a layer, so the host's time counts: what all layers of a batch share is made once, in the plan.

Definition: :func:`..kernels.reference.extend_attention`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch

from ..kernels.decode.merge import merge_into
from ..kernels.layer import TritonLayer
from ..kernels.terms import PLAIN, Terms
from ..kernels.unpack.task import UnpackTask

#: Bytes of the workspace, keys and values together: 64K tokens of 8 KV heads of 128 channels in 16 bits.
WORKSPACE_BYTES = 256 << 20
#: Or this part of the device's memory, where that is more: 128K tokens of such heads and a chunk on an H200.
WORKSPACE_SHARE = 0.004
_ALIGN = 16  # bytes, of a row that FlashAttention's copy engine reads


@dataclass(frozen=True)
class Piece:
    """Some consecutive tokens of the flattened prefixes, and the requests that have keys among them."""

    keys: torch.Tensor  # the workspace's part that holds them
    values: torch.Tensor
    task: UnpackTask  # to fill it
    queries: slice  # of the new tokens
    cu_q: torch.Tensor  # int32, from the piece's first query
    cu_k: torch.Tensor  # int32, from the piece's first token
    max_q: int
    max_k: int


@dataclass(frozen=True)
class ExtendPlan:
    """Where everything lies in one batch; the same for all layers.

    prefix, new: tokens of all requests. cu_q, cu_k: int32 ``[B + 1]``; cu_k counts prefix and chunk, and is None
    when the workspace does not hold them together. keys, values: the workspace's part for prefix and chunk; task:
    to fill it; None unless there is a prefix that it holds. pieces: empty unless the prefix goes in pieces.
    """

    prefix: int
    new: int
    cu_q: torch.Tensor
    cu_k: torch.Tensor | None
    max_q: int
    max_k: int
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    task: UnpackTask | None = None
    pieces: tuple[Piece, ...] = ()

    @classmethod
    def of(
        cls,
        prefix_lens: Sequence[int],
        new_lens: Sequence[int],
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first: torch.Tensor | None = None,
    ) -> ExtendPlan:
        """prefix_lens, new_lens: per request, on the host; qo_indptr, kv_indptr ``[B + 1]``: their sums, on the device.

        kv_indices: the prefixes' slots, and perhaps more. k, v: the workspace. first ``[B]``: positions at which the
        prefixes begin; None: all at 0. Nothing waits for the device.
        """
        kv, qo = [0, *accumulate(prefix_lens)], [0, *accumulate(new_lens)]
        prefix, new, total = kv[-1], qo[-1], kv[-1] + qo[-1]
        cu_q, cu_kv = qo_indptr.int(), kv_indptr.int()
        max_q = max(new_lens, default=0)
        if not prefix:
            return cls(prefix, new, cu_q, cu_q, max_q, max_q)
        if total > k.shape[0]:
            if first is not None:
                raise RuntimeError(f"{total} tokens of a window and its chunk: the workspace holds {k.shape[0]}")
            pieces = tuple(_pieces(kv, qo, cu_q, cu_kv, kv_indices, k, v))
            return cls(prefix, new, cu_q, None, max_q, max_q, pieces=pieces)
        keys, values = k[:total], v[:total]
        prefix_to = chunk_to = None  # one after the other
        if len(prefix_lens) > 1:
            prefix_to, chunk_to = _places(cu_kv, cu_q[:-1], prefix), _places(cu_q, cu_kv[1:], new)
        return cls(
            prefix,
            new,
            cu_q,
            cu_kv + cu_q,
            max_q,
            max(a + b for a, b in zip(prefix_lens, new_lens, strict=True)),
            keys,
            values,
            UnpackTask(kv_indices[:prefix], keys, values, prefix_to, _positions(cu_kv, prefix, first), new, chunk_to),
        )

    @classmethod
    def of_window(
        cls,
        window: int,
        prefix_lens: Sequence[int],
        new_lens: Sequence[int],
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> Iterator[tuple[slice, ExtendPlan]]:
        """As :meth:`of` for layers whose queries see ``window`` tokens: of each prefix what the first new token sees.
        With the new tokens that each plan is for: as many requests as the workspace holds at a time."""
        held = [min(n, window - 1) for n in prefix_lens]
        start = token = 0
        for stop in _groups([a + b for a, b in zip(held, new_lens, strict=True)], k.shape[0]):
            group = slice(start, stop)
            ends, lens = kv_indptr[start + 1 : stop + 1], kv_indptr[start : stop + 1].diff()
            kept = lens.clamp(max=window - 1)
            indptr = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
            slots = kv_indices[_places(indptr, ends - kept - indptr[:-1], sum(held[group]))]
            cu_q = qo_indptr[start : stop + 1] - token
            plan = cls.of(held[group], new_lens[group], cu_q, indptr, slots, k, v, lens - kept)
            new = plan.new if stop < len(held) else None  # the last has what pads the batch
            yield slice(token, new and token + new), plan
            start, token = stop, token + plan.new


def _groups(tokens: Sequence[int], most: int) -> Iterator[int]:
    """Where groups of requests end that have at most ``most`` tokens together, or are one request."""
    total = 0
    for i, n in enumerate(tokens):
        if i and total + n > most:
            yield i
            total = 0
        total += n
    yield len(tokens)


def _places(indptr: torch.Tensor, shift: torch.Tensor, total: int) -> torch.Tensor:
    """``t + shift[request of t]`` for every t below ``total``, int64."""
    token = torch.arange(total, device=indptr.device)
    return token + shift.long()[torch.searchsorted(indptr[1:].long().contiguous(), token, right=True)]


def _positions(indptr: torch.Tensor, total: int, first: torch.Tensor | None = None) -> torch.Tensor:
    """Of every token of the flattened prefixes in its request, int64. first ``[B]``: of their first tokens; None: 0."""
    if len(indptr) == 2 and first is None:
        return torch.arange(total, device=indptr.device)
    return _places(indptr, -indptr[:-1] if first is None else first - indptr[:-1], total)


def _pieces(
    kv: list[int],
    qo: list[int],
    cu_q: torch.Tensor,
    cu_kv: torch.Tensor,
    kv_indices: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> Iterator[Piece]:
    """Cut the flattened prefix into workspaces. Requests without keys in a piece stay out at either end."""
    size, positions = k.shape[0], _positions(cu_kv, kv[-1])
    for start in range(0, kv[-1], size):
        stop = min(start + size, kv[-1])
        first = bisect_right(kv, start) - 1
        last = bisect_left(kv, stop)
        if qo[first] == qo[last]:
            continue
        held = [min(b, stop) - max(a, start) for a, b in pairwise(kv[first : last + 1])]
        keys, values = k[: stop - start], v[: stop - start]
        yield Piece(
            keys=keys,
            values=values,
            task=UnpackTask(kv_indices[start:stop], keys, values, positions=positions[start:stop]),
            queries=slice(qo[first], qo[last]),
            cu_q=cu_q[first : last + 1] - qo[first],
            cu_k=(cu_kv[first : last + 1] - start).clamp(0, stop - start),
            max_q=max(b - a for a, b in pairwise(qo[first : last + 1])),
            max_k=max(held),
        )


def workspace_bytes(device: torch.device | str) -> int:
    """Most that a workspace on this device takes: a prefix beyond it goes in pieces, of which FlashAttention-3 is 6 to
    13 % slower."""
    device = torch.device(device)
    held = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(WORKSPACE_BYTES, int(WORKSPACE_SHARE * held))


class Workspace:
    """Extend attention of layers of one shape, through one workspace.

    attend: ``flash_attn_varlen_func`` or what behaves like it. max_tokens: most tokens that the workspace is asked to
    hold; it holds no more than ``bytes_`` (:func:`workspace_bytes`), but ``least`` tokens.
    """

    def __init__(
        self, layer: TritonLayer, attend: Callable, dtype: torch.dtype, device: torch.device | str, max_tokens: int,
        bytes_: int = 0, least: int = 0,
    ):  # fmt: skip
        per_token = layer.heads * (layer.head_dim + layer.v_head_dim) * dtype.itemsize
        self.tokens = max(1, min(max_tokens, (bytes_ or workspace_bytes(device)) // per_token), least)
        self.attend = attend
        # Requests share it in stream order. What is not written is not read either: every call sees its part alone.
        self.k = torch.empty(self.tokens, layer.heads, layer.head_dim, dtype=dtype, device=device)
        self.v = torch.empty(self.tokens, layer.heads, layer.v_head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def warm_up(self, layers: Sequence[TritonLayer]) -> None:
        """Have every kernel compiled before the first request waits for it; slot 0 is read."""
        slot = torch.zeros(1, dtype=torch.int64, device=self.k.device)
        chunk = torch.zeros_like(self.k[:1]), torch.zeros_like(self.v[:1])
        of = partial(UnpackTask, slot, self.k, self.v, positions=slot)
        alone, with_chunk = of(), [of(chunk=1), of(dest=slot, chunk=1, chunk_dest=slot + 1)]
        for layer in layers:
            layer.unpacker(alone)
            for task in with_chunk:
                layer.unpacker(task, *chunk)
        out = self.v[:1].float()
        lse = out.new_zeros(out.shape[1], 1)
        merge_into(out, lse.T, self.v[:1], lse.T)

    def plans(
        self,
        prefix_lens: Sequence[int],
        new_lens: Sequence[int],
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        window: int = 0,
    ) -> list[tuple[slice, ExtendPlan]]:
        """With the new tokens that each plan is for. See :meth:`ExtendPlan.of` and :meth:`ExtendPlan.of_window`."""
        batch = prefix_lens, new_lens, qo_indptr, kv_indptr, kv_indices, self.k, self.v
        if window and any(prefix_lens):
            return list(ExtendPlan.of_window(window, *batch))
        return [(slice(None), ExtendPlan.of(*batch))]

    def __call__(
        self,
        layer: TritonLayer,
        plan: ExtendPlan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sm_scale: float,
        out: torch.Tensor,
        terms: Terms = PLAIN,
    ) -> None:
        """New tokens against their packed prefix plus, causally, themselves.

        q ``[T, Hq, D]``, k ``[T, H, D]``, v ``[T, H, Dv]`` in the workspace's dtype, T >= plan.new. Writes all of
        ``out [T, Hq, Dv]``, zeros beyond plan.new.
        """
        new = plan.new
        if new < q.shape[0]:
            out[new:] = 0
            q, k, v, out = q[:new], k[:new], v[:new], out[:new]
        if not new:
            return
        q = _readable(q)
        if plan.task is not None:
            layer.unpacker(plan.task, k, v)
            self.dense(q, plan.keys, plan.values, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, sm_scale, terms, out)
            return
        k, v = _readable(k), _readable(v)
        if not plan.prefix:
            self.dense(q, k, v, plan.cu_q, plan.cu_q, plan.max_q, plan.max_q, sm_scale, terms, out)
            return
        # A softmax of pieces has its sinks in the end.
        capped = Terms(cap=terms.cap)
        part, lse = self.dense(q, k, v, plan.cu_q, plan.cu_q, plan.max_q, plan.max_q, sm_scale, capped, None)
        merged = part.float()  # float32 between the pieces: they shall not be rounded once each
        for piece in plan.pieces:
            mine = piece.queries
            layer.unpacker(piece.task)
            part, part_lse = self.dense(
                q[mine],
                piece.keys,
                piece.values,
                piece.cu_q,
                piece.cu_k,
                piece.max_q,
                piece.max_k,
                sm_scale,
                capped,
                None,
                causal=False,
            )
            merge_into(merged[mine], lse[:, mine].T, part, part_lse.T)
        out.copy_(terms.with_sinks(merged, lse.T))

    def dense(
        self, q, k, v, cu_q, cu_k, max_q, max_k, sm_scale, terms, out, causal=True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries ``q [T, Hq, D]`` over keys ``k [N, H, D]`` and values ``v [N, H, Dv]`` as they are, of the requests
        that cu_q and cu_k ``[B + 1]`` int32 mark. Returns out ``[T, Hq, Dv]``, in ``out`` if that is given, and lse
        ``[Hq, T]``, zeros and -inf for queries without keys.

        num_splits = 0 lets FlashAttention fill the device, as SGLang's own backend does.
        """
        result = self.attend(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=sm_scale,
            causal=causal,
            num_splits=0,
            return_softmax_lse=True,
            out=out,
            **_flash_terms(terms),
        )
        return result[0], result[1]


def _flash_terms(terms: Terms) -> dict:
    """As FlashAttention's options, none where there is nothing to say: a window counts the tokens before a query's."""
    window = {"window_size": (terms.window - 1, 0)} if terms.window else {}
    cap = {"softcap": terms.cap} if terms.cap else {}
    return window | cap | ({} if terms.sinks is None else {"sinks": terms.sinks})


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x [T, H, D]``, copied only if its copy engine could not read it in place."""
    token, head, channel = x.stride()
    size = x.element_size()
    in_place = channel == 1 and not (x.data_ptr() | token * size | head * size) % _ALIGN
    return x if in_place else x.contiguous()
