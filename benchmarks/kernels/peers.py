"""The dense caches that packed rows are compared with, called as SGLang calls them.

FlashInfer: ``BatchDecodeWithPagedKVCacheWrapper`` with tensor cores and CUDA graphs, planned once. FlashAttention-3:
``flash_attn_with_kvcache`` of sgl_kernel with a page table, its own choice of splits, and scheduler metadata made
once, since a server makes them once per step. An fp8 query that FlashAttention-3 asks for is cast beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .cases import Shape
from .data import FP8, Index

WORKSPACE_BYTES = 384 << 20  # as in SGLang
_workspaces: dict[torch.device, torch.Tensor] = {}


def _workspace(device: torch.device) -> torch.Tensor:
    """FlashInfer's scratch for partial results; zeros before its first use, shared by all wrappers."""
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return _workspaces[device]


class FlashInfer:
    """One planned batch. Call with q ``[B, Hq, D]`` and a window ``[slots, H, D]`` of keys and of values."""

    def __init__(
        self,
        shape: Shape,
        index: Index,
        page: int,
        kv_dtype: torch.dtype,
        sm_scale: float,
        queries: int = 1,
        sinks: torch.Tensor | None = None,
    ):
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        if queries != 1:
            raise NotImplementedError("FlashInfer's decode wrapper takes one query token per request")
        if sinks is not None:
            raise NotImplementedError("FlashInfer's decode wrapper has no sinks")
        self.page = page
        indptr, ids = index.flat(page)
        last = index.last_page_len(page)
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(
            _workspace(index.device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr.clone(),
            paged_kv_indices_buffer=ids.clone(),
            paged_kv_last_page_len_buffer=last.clone(),
            backend="fa2",  # what "auto" chooses for a bf16 query
        )
        self.wrapper.plan(
            indptr,
            ids,
            last,
            shape.q_heads,
            shape.kv_heads,
            shape.dim,
            page,
            q_data_type=torch.bfloat16,
            kv_data_type=kv_dtype,
            sm_scale=sm_scale,
        )

    def query(self, q: torch.Tensor) -> torch.Tensor:
        return q

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        paged = tuple(x.unflatten(0, (-1, self.page)) for x in (k, v))
        return self.wrapper.run(q, paged, out=out)


class FlashAttention3:
    """One batch. Call with q ``[B * queries, Hq, D]`` and a window ``[slots, H, D]`` of keys and of values."""

    def __init__(
        self,
        shape: Shape,
        index: Index,
        page: int,
        kv_dtype: torch.dtype,
        sm_scale: float,
        queries: int = 1,
        sinks: torch.Tensor | None = None,
    ):
        from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

        self.run, self.page, self.kv_dtype = flash_attn_with_kvcache, page, kv_dtype
        seqlens = index.seqlens()
        starts = torch.arange(index.batch + 1, dtype=torch.int32, device=index.device) * queries
        metadata = None
        if queries == 1:  # SGLang has none for other lengths
            metadata = get_scheduler_metadata(
                batch_size=index.batch,
                max_seqlen_q=queries,
                max_seqlen_k=max(index.lengths),
                num_heads=shape.q_heads,
                num_heads_k=shape.kv_heads,
                headdim=shape.dim,
                cache_seqlens=seqlens,
                qkv_dtype=kv_dtype,
                cu_seqlens_q=starts,
                page_size=page,
                causal=True,
                num_splits=0,
            )
        self.options: dict[str, Any] = {
            "page_table": index.table(page),
            "cache_seqlens": seqlens,
            "cu_seqlens_q": starts,
            "max_seqlen_q": queries,
            "softmax_scale": sm_scale,
            "causal": True,
            "num_splits": 0,
            "scheduler_metadata": metadata,
            "sinks": sinks,
        }

    def query(self, q: torch.Tensor) -> torch.Tensor:
        return q.to(self.kv_dtype) if self.kv_dtype == FP8 else q

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        k, v = (x.unflatten(0, (-1, self.page)) for x in (k, v))
        return self.run(q=q, k_cache=k, v_cache=v, out=out, **self.options)


PEERS = {"flashinfer": FlashInfer, "fa3": FlashAttention3}


@triton.jit
def _write_kernel(k, v, k_cache, v_cache, loc, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(loc + token).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < SIZE
    new_k = tl.load(k + token * SIZE + at, mask=mask)
    new_v = tl.load(v + token * SIZE + at, mask=mask)
    tl.store(k_cache + slot * SIZE + at, new_k, mask=mask)
    tl.store(v_cache + slot * SIZE + at, new_v, mask=mask)


def scatter(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, loc: torch.Tensor) -> None:
    """Keys and values ``[T, H, D]`` to ``cache[loc]`` in one launch, one program a token; all contiguous."""
    size = k.shape[1] * k.shape[2]
    block = triton.next_power_of_2(size)
    _write_kernel[(k.shape[0],)](k, v, k_cache, v_cache, loc, SIZE=size, BLOCK=block, num_warps=max(1, block // 256))


def index_put(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, loc: torch.Tensor
) -> None:
    """The same as SGLang's fallback does it."""
    k_cache[loc] = k
    v_cache[loc] = v


def _sglang_store(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, loc: torch.Tensor
) -> None:
    from sglang.kernels.ops.kvcache.kvcache import store_cache

    store_cache(*(x.flatten(1) for x in (k, v, k_cache, v_cache)), loc)


def cache_writes() -> dict[str, Any]:
    """Ways to write a bf16 cache, by name; SGLang's own where it is installed."""
    writes = {"scatter": scatter, "index_put": index_put}
    try:
        from sglang.kernels.ops.kvcache.kvcache import can_use_store_cache
    except ImportError:
        return writes
    if can_use_store_cache(256):
        writes["sglang"] = _sglang_store
    return writes
