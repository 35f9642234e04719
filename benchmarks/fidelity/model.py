"""The model under test: attention with a hook between RoPE and the scores, capture, position shift."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sglang_blockgtq.calibrate.rope import RopeBlocks

#: hook(layer, q [T, Hq, D], k [T, H, D], v [T, H, Dv]) -> the keys and values that attention shall see
KVHook = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: attend(layer, q, k, v, scale) -> the output of attention [T, Hq, Dv]; shapes as of KVHook, scale None for 1/sqrt(D)
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]

_NAME = "blockgtq_fidelity"


@contextmanager
def attention_hook(model, attend: Attend) -> Iterator[None]:
    """Run ``model`` (one sequence, no cache) with ``attend`` in place of its causal attention.

    Raises ValueError for a model that asks for a sliding window.
    """

    def attention(module, q, k, v, mask=None, scaling=None, dropout=0.0, sliding_window=None, **kwargs):
        if sliding_window is not None and sliding_window < q.shape[2]:
            raise ValueError(f"sliding_window = {sliding_window}: only full causal attention is measured")
        out = attend(module.layer_idx, *(x[0].transpose(0, 1) for x in (q, k, v)), scaling)
        return out[None].contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def kv_hook(model, hook: KVHook) -> Iterator[None]:
    """Run ``model``'s attention on the keys and values that ``hook`` returns. Errors: as :func:`attention_hook`."""

    def attend(layer, q, k, v, scale):
        k, v = (x.transpose(0, 1)[None].to(q.dtype) for x in hook(layer, q, k, v))
        out = scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    with attention_hook(model, attend):
        yield


@dataclass
class Capture:
    """Post-RoPE vectors of one sequence of T tokens, float32.

    positions ``[N]``: of the queries. Per layer: q ``[N, Hq, D]``, k ``[T, H, D]``, v ``[T, H, Dv]``.
    """

    positions: torch.Tensor
    q: dict[int, torch.Tensor]
    k: dict[int, torch.Tensor]
    v: dict[int, torch.Tensor]


@torch.inference_mode()
def capture(model, ids: list[int], positions: list[int]) -> Capture:
    """One pass over ``ids``; keeps all keys and values, and the queries at ``positions``."""
    got = Capture(torch.tensor(positions, device=model.device), {}, {}, {})

    def keep(layer, q, k, v):
        got.q[layer], got.k[layer], got.v[layer] = q[got.positions].clone(), k.clone(), v.clone()
        return k, v

    with kv_hook(model, keep):
        model.base_model(torch.tensor([ids], device=model.device), use_cache=False)
    return got


def rotate(x: torch.Tensor, rope: RopeBlocks, inv_freq: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    """``x [..., D]`` rotated on by ``positions``, as if its token stood that much later; float32.

    positions: one number for all, or one for each token of ``x [T, H, D]``, ``[T]``.

    inv_freq ``[rotary_dim / 2]``: radians per position of each rotated block. Angles and products
    are in float64. Attention between equally rotated queries and keys does not change.
    """
    first, second = rope.channels()[: rope.rotary_dim // 2].to(x.device).unbind(-1)
    if isinstance(positions, torch.Tensor):
        positions = positions.to(x.device)[:, None, None]
    angle = inv_freq.to(x.device).double() * positions
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., first].double(), x[..., second].double()
    out = x.clone()
    out[..., first] = (a * cos - b * sin).to(x.dtype)
    out[..., second] = (b * cos + a * sin).to(x.dtype)
    return out
