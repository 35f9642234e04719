"""RoPE of decode steps left to the launch that reads their queries and keys anyway: one launch less in each layer.

SGLang's models call their RoPE module between the projections and attention. Of models known to do nothing else there,
that module is replaced by one that hands a decode step's queries and keys on as they are, where attention has said
before that it turns them (:mod:`..kernels.device.rope`). What a prefill or any other caller asks of it is done as ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend

from ..kernels.decode.ahead import ahead
from ..kernels.decode.recent import RecentLayer
from ..kernels.layer import TritonLayer
from ..options import NAME

#: Attention modules of SGLang 0.5.23 that hand on to attention what their RoPE gives them, and nothing else.
KNOWN = ("llama.LlamaAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention")
#: How far what attention makes of what it has turned may be from what it makes of what the model has: |a - b| / |b|.
#: Rounding alone is 1e-3 in bfloat16 where every number falls to another side.
SAME = 4e-3


class LeftRope(torch.nn.Module):
    """In the place of a model's ``rope``, whose attributes it has. What :meth:`begin` says holds until :meth:`end`."""

    def __init__(self, rope: RotaryEmbedding):
        super().__init__()
        self.rope = rope
        self._angles: torch.Tensor | None = None
        self._at = 0  # where the step's positions lie
        self._left: tuple[int, int] | None = None  # where the queries and keys lie that attention takes next

    @classmethod
    def of(cls, model: torch.nn.Module, layer_ids: Iterable[int]) -> LeftRope | None:
        """What these layers of the model call from now on; None, and nothing is changed, where one of them is not
        known, or they do not share a RoPE of halves with angles in float32. Nor where a step's graph is cut at
        attention, which then runs without the model's code before it."""
        if check_cuda_graph_backend(Phase.DECODE, Backend.BREAKABLE):
            return None
        known: list[Any] = [module for module in model.modules() if _name(module) in KNOWN]
        found = {module.attn.layer_id: module for module in known}
        ropes = {id(module.rotary_emb): module.rotary_emb for module in known}
        if found.keys() != set(layer_ids) or len(ropes) != 1 or not _turns_halves(rope := ropes.popitem()[1]):
            return None
        left = cls(rope)
        for module in found.values():
            module.rotary_emb = left
        return left

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("rope"), name)

    def begin(self, positions: torch.Tensor) -> None:
        """A decode step of tokens at ``positions [T]`` whose queries and keys attention turns."""
        self.end()
        self._angles, self._at = self.rope.cos_sin_cache.index_select(0, positions), positions.data_ptr()

    def end(self) -> None:
        """What comes is turned here."""
        self._angles, self._left = None, None

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._left is not None:
            raise RuntimeError(f"{NAME}: attention did not take the queries that RoPE was left to it for")
        if self._angles is None or positions.data_ptr() != self._at or args or kwargs:
            return self.rope(positions, q, k, *args, **kwargs)
        self._left = q.data_ptr(), k.data_ptr()
        return q, k

    def take(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
        """The angles ``[T, rotary]``, float32, by which attention has to turn q and k; None if they are turned."""
        left, self._left = self._left, None
        if left is not None and left != (q.data_ptr(), k.data_ptr()):
            raise RuntimeError(
                f"{NAME}: the model changed queries or keys behind its RoPE, which was left to attention"
            )
        return None if left is None else self._angles


def distance(left: LeftRope, layer: TritonLayer, copies: RecentLayer, num_heads: int, dtype: torch.dtype) -> float:
    """How far a step that turns its queries and keys is from one whose model has done it, on this device: the largest
    |a - b| / |b| of rotated queries, of logits, and of the keys that are kept.

    Of up to 16 tokens of nobody, all over the positions that RoPE knows. copies: nobody's places are written.
    """
    recent, device = copies.recent, layer.rows.device
    tokens = min(16, recent.room, recent.step.shape[1])
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, dim, generator=generator, device=device).to(dtype)
        for heads, dim in ((num_heads, layer.head_dim), (layer.heads, layer.head_dim), (layer.heads, layer.v_head_dim))
    )
    positions = torch.linspace(0, len(left.rope.cos_sin_cache) - 1, tokens, device=device).long()
    turned_q, turned_k = left.rope(positions, q.flatten(1).clone(), k.flatten(1).clone())
    recent.begin(torch.zeros_like(positions), positions + 1)
    places = recent.step[3, :tokens].long()

    def parts(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        rotated, (_, lse) = ahead(layer.tables, q, 1, copies.read(k, v, angles), 1.0, 0.0)
        return rotated, lse, copies.k.flatten(0, 1)[places].float()

    want = parts(turned_q.view_as(q), turned_k.view_as(k))
    got = parts(q, k, left.rope.cos_sin_cache.index_select(0, positions))
    recent.step[:, :tokens] = -1
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in zip(got, want, strict=True)]).max())


def _name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__.removeprefix('sglang.srt.models.')}.{type(module).__qualname__}"


def _turns_halves(rope: Any) -> bool:
    """Whether it does what kernels.device.rope does; on a GPU SGLang's other kernel rounds its angles."""
    return (
        isinstance(rope, RotaryEmbedding)
        and type(rope).forward is RotaryEmbedding.forward
        and type(rope).forward_cuda is RotaryEmbedding.forward_cuda
        and rope.is_neox_style
        and not rope.use_fallback_kernel
        and not rope._force_native
        and rope.cos_sin_cache.dtype == torch.float32
        and rope.cos_sin_cache.shape[1] == rope.rotary_dim <= rope.head_size
    )
