"""Which dense attention kernel reads the workspace of a prefill.

FlashAttention-3 where it runs, else SGLang's Triton kernel; both are called as SGLang's ``flash_attn_varlen_func`` is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

MAX_HEAD_DIM = 256  # of FlashAttention-3
FAST = "FlashAttention-3 (compute capability 8 or 9, bfloat16 or float16, equal heads of up to 256 channels) is faster"


@dataclass(frozen=True)
class Prefill:
    """attend: the kernel. name: for logs and /server_info. why: it and not the other; "" where it is the fast one."""

    attend: Callable
    name: str
    why: str = ""


def choose(device: torch.device | str, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> Prefill:
    """The kernel for a model's heads on a CUDA device."""
    reason = _not_flash(torch.device(device), dtype, head_dim, v_head_dim)
    if reason is None:
        try:
            from sgl_kernel.flash_attn import flash_attn_varlen_func

            return Prefill(flash_attn_varlen_func, "FlashAttention-3")
        except ImportError as e:
            reason = f"FlashAttention-3 cannot be imported ({e})"
    return Prefill(triton_attention, "SGLang's Triton kernel", reason)


def _not_flash(device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> str | None:
    """Why FlashAttention-3 cannot be taken; None where it can."""
    from sgl_kernel.flash_attn import is_fa3_supported

    if not is_fa3_supported(device):
        return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    if dtype not in (torch.bfloat16, torch.float16):
        return f"a model in {dtype}"
    if head_dim != v_head_dim or head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} and {v_head_dim} channels"
    return None


def triton_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    return_softmax_lse: bool,
    out: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries ``q [T, Hq, D]`` of each request against its keys ``k [N, H, D]`` and values ``v [N, H, Dv]``.

    causal: a request's last query sees its last key. window_size: tokens before a query's own that it sees; -1: all.
    Returns out ``[T, Hq, Dv]`` and lse ``[Hq, T]`` float32, zeros and
    -inf for queries without keys; the lse is not given for causal attention with keys before the queries.
    """
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd, extend_attention_fwd_unified

    out = q.new_empty(*q.shape[:2], v.shape[-1]) if out is None else out
    terms = {"sliding_window_size": window_size[0], "logit_cap": softcap, "sinks": sinks}
    every = torch.arange(k.shape[0], device=q.device)
    if causal and cu_seqlens_k is not cu_seqlens_q:
        before = (cu_seqlens_k.diff() - cu_seqlens_q.diff()).int()
        extend_attention_fwd_unified(
            q, out, k, v, 1.0, 1.0, cu_seqlens_q, cu_seqlens_k, every, before, max_seqlen_q, sm_scale=softmax_scale,
            **terms,
        )  # fmt: skip
        return out, None
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    keys = torch.zeros_like(cu_seqlens_q) if causal else cu_seqlens_k
    extend_attention_fwd(
        q, k, v, out, k, v, cu_seqlens_q, keys, every, None, True, None, max_seqlen_q, 1.0, 1.0, softmax_scale,
        lse_extend=lse, skip_prefix=causal, skip_extend=not causal, **terms,
    )  # fmt: skip
    return out, lse.T
