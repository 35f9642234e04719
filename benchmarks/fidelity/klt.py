"""Transforms fitted to second moments: the balanced KLT of keys and of values, before RoPE or after.

An error e of a key costs the logit of query q the square ``(q^T e)^2``, so on average ``e^T S_q e``; of a value, it
costs ``e^T M e`` in whatever metric M of the attention output. With ``S`` the moment of what is coded and M its metric,
the balanced transform A has ``A S A^T = A^-T M A^-1 = diag(sigma)``: channels uncorrelated, and as strong on one
side as on the other. A group of n channels that is rotated and coded with b bits then costs
``D(b) (sum of sigma)^2 / n`` (calibrate.allocate.template_error), which is what its widths are chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from sglang_blockgtq.calibrate.build import ROTATION_SEED, haar_rotation
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.segments import rule_of
from sglang_blockgtq.kernels.format.codebook import distortion
from sglang_blockgtq.kernels.format.codec import SCALE_SEARCH
from sglang_blockgtq.kernels.format.layout import CodeLayout

from .coder import Coder
from .model import kv_hook, rotate

RIDGE = 1e-4  # of the mean eigenvalue, added to every moment: directions that calibration hardly saw stay finite
OFFSETS = 8192  # distances between a query and a key over which a query's moment is averaged
SENSITIVITY_LENGTH = 1024  # tokens of a sequence that is differentiated
SAMPLES = 2  # outputs drawn for each token


@dataclass
class Seconds:
    """Uncentred second moments of a text, before RoPE. L layers, H KV heads; all float64 on the CPU.

    k, q ``[L, H, D, D]``, q over all query heads of a group; v ``[L, H, Dv, Dv]``.
    k_mean ``[L, H, D]``, v_mean ``[L, H, Dv]``.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_mean: torch.Tensor
    v_mean: torch.Tensor


def _outer(x: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of ``x x^T``: ``[T, H, D]`` to ``[H, D, D]`` float64."""
    x = x.double()
    return torch.einsum("thd,the->hde", x, x)


def _before_rope(x: torch.Tensor, rope: RopeBlocks, inv_freq: torch.Tensor) -> torch.Tensor:
    """Vectors ``[T, H, D]`` of positions 0, 1, ... rotated back to where RoPE found them."""
    return rotate(x, rope, inv_freq, -torch.arange(len(x), device=x.device))


@torch.inference_mode()
def seconds(model, rope: list[RopeBlocks], inv_freq: torch.Tensor, sequences: Sequence[Sequence[int]]) -> Seconds:
    """One pass over ``sequences``."""
    sums: dict[int, list[torch.Tensor]] = {}

    def take(layer, q, k, v):
        heads = k.shape[1]
        qp, kp = (_before_rope(x.float(), rope[layer], inv_freq) for x in (q, k))
        grouped = qp.unflatten(1, (heads, -1)).transpose(1, 2).flatten(0, 1)  # [T * G, H, D]
        part = [_outer(grouped) / (qp.shape[1] // heads), _outer(kp), _outer(v), kp.double().sum(0), v.double().sum(0)]
        sums[layer] = [a + b for a, b in zip(sums[layer], part, strict=True)] if layer in sums else part
        return k, v

    with kv_hook(model, take):
        for ids in sequences:
            model.base_model(torch.tensor([list(ids)], device=model.device), use_cache=False)
    tokens = sum(map(len, sequences))
    stacked = [torch.stack([sums[i][j] for i in range(len(sums))]).cpu() / tokens for j in range(5)]
    return Seconds(*stacked)


@dataclass
class Sensitivity:
    """Fisher information of keys (before RoPE) and values, per token: ``KL(answer) ~ 1/2 e^T F e`` for an error e.

    k ``[L, H, D, D]``, v ``[L, H, Dv, Dv]``; k_blocks ``[L, H, blocks]``: of RoPE blocks. k_moment, v_moment: second
    moments of keys (before RoPE) and values themselves, tokens weighted by their squared gradient: an error grows with
    its vector, so this is what is coded where it matters, such as at a sink. float64, CPU.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_blocks: torch.Tensor
    k_moment: torch.Tensor
    v_moment: torch.Tensor


def sensitivity(
    model, rope: list[RopeBlocks], inv_freq: torch.Tensor, sequences: Sequence[Sequence[int]], seed: int = 0
) -> Sensitivity:
    """Second moments of the gradient of ``-log p(y)`` with y drawn from the model's own answer at every token.

    Errors of different tokens are independent, and so are the draws: the cross terms vanish on average.
    """
    sums: dict[int, list[torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    pieces = [ids[i : i + SENSITIVITY_LENGTH] for ids in sequences for i in range(0, len(ids), SENSITIVITY_LENGTH)]
    pieces = [list(piece) for piece in pieces if len(piece) > 1]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for ids in pieces:
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(layer, q, k, v, kept=kept):
            k, v = (x if x.requires_grad else x.detach().requires_grad_() for x in (k, v))
            kept[layer] = k, v
            return k, v

        with torch.enable_grad(), kv_hook(model, keep):
            hidden = model.base_model(torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state[0]
        # Through the head by hand, a part at a time: logits of all tokens at once would be the largest tensor of all.
        head = model.get_output_embeddings()
        leaves = [x for layer in sorted(kept) for x in kept[layer]]
        for sample in range(SAMPLES):
            back = torch.empty_like(hidden)
            for start in range(0, len(ids), 256):
                part = hidden.detach()[start : start + 256].requires_grad_()
                with torch.enable_grad():
                    log_prob = head(part).float().log_softmax(-1)
                    # Drawn on the CPU, so that devices agree: the inverse of the distribution function.
                    u = torch.rand(len(part), 1, generator=generator).to(part.device)
                    drawn = (log_prob.detach().exp().cumsum(-1) < u).sum(-1).clamp(max=log_prob.shape[-1] - 1)
                    loss = -log_prob.gather(-1, drawn[:, None]).sum()
                back[start : start + 256] = torch.autograd.grad(loss, part)[0]
            grads = torch.autograd.grad(hidden, leaves, back, retain_graph=sample + 1 < SAMPLES)
            for i, layer in enumerate(sorted(kept)):
                k, gk = (_before_rope(x.detach(), rope[layer], inv_freq) for x in (kept[layer][0], grads[2 * i]))
                v, gv = kept[layer][1].detach(), grads[2 * i + 1]
                part = [
                    _outer(gk),
                    _outer(gv),
                    *(_outer(x * g.norm(dim=-1, keepdim=True)) for x, g in ((k, gk), (v, gv))),
                ]
                sums[layer] = [a + b for a, b in zip(sums[layer], part, strict=True)] if layer in sums else part
    count = SAMPLES * sum(map(len, pieces))
    k, v, k_moment, v_moment = (torch.stack([sums[i][j] for i in range(len(sums))]).cpu() / count for j in range(4))
    k_moment, v_moment = (x / _trace(y)[..., None, None] for x, y in ((k_moment, k), (v_moment, v)))
    diagonal = torch.diagonal(k, dim1=-2, dim2=-1)
    blocks = torch.stack([diagonal[i][:, r.channels()].sum(-1) for i, r in enumerate(rope)])
    return Sensitivity(k, v, blocks, k_moment, v_moment)


def _trace(moment: torch.Tensor) -> torch.Tensor:
    return torch.diagonal(moment, dim1=-2, dim2=-1).sum(-1)


def output_metric(model, layers: int, heads: int, v_dim: int) -> torch.Tensor:
    """``[L, H, Dv, Dv]``: ``sum over query heads of W_o^T W_o``, how value errors reach the layer's output."""
    out = []
    for layer in list(model.base_model.layers)[:layers]:
        weight = layer.self_attn.o_proj.weight.detach().double().cpu()  # [hidden, Hq * Dv]
        by_head = weight.unflatten(1, (heads, -1, v_dim))  # [hidden, H, G, Dv]
        out.append(torch.einsum("ohgd,ohge->hde", by_head, by_head))
    return torch.stack(out)


@cache
def _products(
    rope: RopeBlocks, speeds: tuple[float, ...], positions: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means over positions 0, 1, ... of ``c c^T``, ``c s^T``, ``s s^T``; and each channel's partner.

    A rotated channel is ``c x + s x'``, x' being the other one of its block.
    """
    a, b = rope.channels()[: rope.rotary_dim // 2].unbind(-1)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * torch.tensor(speeds, dtype=torch.float64)
    dim = rope.head_dim
    c, s = torch.ones(positions, dim, dtype=torch.float64), torch.zeros(positions, dim, dtype=torch.float64)
    c[:, a], c[:, b] = angle.cos(), angle.cos()
    s[:, a], s[:, b] = -angle.sin(), angle.sin()
    other = torch.arange(dim)
    other[a], other[b] = b, a
    return c.T @ c / positions, c.T @ s / positions, s.T @ s / positions, other


def rotated_mean(moment: torch.Tensor, rope: RopeBlocks, inv_freq: torch.Tensor, positions: int) -> torch.Tensor:
    """Mean of ``R S R^T`` over positions 0 to ``positions - 1``, for ``moment [..., D, D]`` float64."""
    cc, cs, ss, other = _products(rope, tuple(inv_freq.double().tolist()), positions)
    swapped = moment[..., other]
    return cc * moment + cs * swapped + cs.T * moment[..., other, :] + ss * swapped[..., other, :]


def _ridged(moment: torch.Tensor, ridge: float) -> torch.Tensor:
    dim = moment.shape[-1]
    level = torch.diagonal(moment, dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    return moment + ridge * level[..., None, None] * torch.eye(dim, dtype=moment.dtype)


def balanced(
    moment: torch.Tensor, metric: torch.Tensor, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A ``[..., D, D]``, its inverse transpose, and sigma ``[..., D]``, falling. See this file's docstring."""
    lower = torch.linalg.cholesky(_ridged(moment, ridge))
    square, vectors = torch.linalg.eigh(lower.mT @ _ridged(metric, ridge) @ lower)
    sigma = square.clamp(min=1e-60).sqrt().flip(-1)
    vectors = vectors.flip(-1)
    root = sigma.sqrt()
    # U^T L^-1 = (L^-T U)^T
    forward = root[..., None] * torch.linalg.solve_triangular(lower.mT, vectors, upper=True).mT
    inverse_t = (lower @ vectors).mT / root[..., None]
    return forward, inverse_t, sigma


def segment_widths(sigma: torch.Tensor, bits: float, allocator: str = "template") -> torch.Tensor:
    """Widths ``[L, H, D]`` of channels by falling sigma: whole segments, at ``bits`` a channel, as RoPE blocks get."""
    pairs = sigma.unflatten(-1, (-1, 2)).sum(-1)
    moments = Moments(pairs, pairs, torch.ones_like(pairs[..., 0]), 0)
    widths = rule_of(allocator).widths(moments, bits)
    return widths.sort(-1, descending=True).values.repeat_interleave(2, -1)


def coders(
    transform: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    widths: torch.Tensor,
    device: torch.device,
    seed: int = 0,
    unbiased: bool = False,
    rotation: Callable[[int, int], torch.Tensor] = haar_rotation,
) -> list[Coder]:
    """One for each layer: the transform, a rotation for each run of equal widths, static gains, one norm.

    transform: of :func:`balanced`, ``[L, H, ...]``. widths ``[L, H, D]``. unbiased: codewords of b bits are short of
    the vector by ``1 - D(b)``; the scale makes up for what that is on the whole, and each run is read longer by what it
    still lacks: a sum over many tokens then keeps its length, while norm correction leaves runs of few bits too short.
    """
    forward, inverse_t, sigma = transform
    rotations: dict[int, torch.Tensor] = {}
    out = []
    for layer in range(len(sigma)):
        enter, leave, weight, layouts = [], [], [], []
        for head in range(sigma.shape[1]):
            layout = CodeLayout(tuple(widths[layer, head].tolist()))
            gain = torch.empty_like(sigma[layer, head])
            orthogonal = torch.zeros(len(gain), len(gain), dtype=torch.float64)
            kept = torch.ones_like(gain)
            for start, stop, bits in layout.groups:
                kept[start:stop] = 1 - distortion(bits) if unbiased else 1.0
                gain[start:stop] = sigma[layer, head, start:stop].mean().sqrt()
                n = stop - start
                if n not in rotations:
                    rotations[n] = rotation(n, ROTATION_SEED + seed)
                orthogonal[start:stop, start:stop] = rotations[n]
            own = gain**4 / (gain**4).mean()
            enter.append(orthogonal @ forward[layer, head] / gain[:, None])
            leave.append(orthogonal @ inverse_t[layer, head] * (gain * (own * kept).mean() / kept)[:, None])
            weight.append(own)
            layouts.append(layout)
        tensors = (torch.stack(x).float().to(device) for x in (enter, leave, weight))
        out.append(Coder(tuple(layouts), *tensors, "unbiased" if unbiased else "norm", SCALE_SEARCH))
    return out


def expected_error(sigma: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """``[L]``: what errors cost in the metric, summed over heads."""
    out = torch.zeros(len(sigma), dtype=torch.float64)
    for layer in range(len(sigma)):
        for head in range(sigma.shape[1]):
            for start, stop, bits in CodeLayout(tuple(widths[layer, head].tolist())).groups:
                group = sigma[layer, head, start:stop]
                out[layer] += distortion(bits) * group.sum() ** 2 / (stop - start)
    return out
