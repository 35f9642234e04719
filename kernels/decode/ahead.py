"""What a decode step does before attention over packed rows, in one launch: its queries are rotated to stored channels,
and attend to the exact tokens.

Both need little of the GPU and are a matter of latency, so they take one's time side by side. The exact part is a split
like others, but in the values' own channels: it joins where splits are merged, behind the rotation (:mod:`.merge`).
Definition: :func:`..reference.recent_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..device.dependent import dependent, wait_and_release
from ..device.rotate import project_and_store, tiling
from ..device.tables import Tables
from .recent import RecentRead

_ELEMENTS = tl.constexpr(4096)  # of queries times keys in a tile of a program
_TOKENS = tl.constexpr(8)  # of a tile, at most


@triton.jit
def _attend(
    q,
    k,
    v,
    k_copies,
    v_copies,
    step,
    steps,
    scale,
    out,
    lse,
    token,
    head,
    heads,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP and up, a power of two
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The queries of one token and KV head: zeros and -inf where no token is exact. Keeps the step's token, in the
    place of what has left the window."""
    FIT: tl.constexpr = _ELEMENTS // (ROWS * max(PADDED, V_PADDED))
    TOKENS: tl.constexpr = min(_TOKENS, FIT) if FIT > 0 else 1
    row = tl.load(step + token)
    position = tl.load(step + steps + token)
    count = tl.load(step + 2 * steps + token)
    place = tl.load(step + 3 * steps + token).to(tl.int64)
    wait_and_release(DEPENDENT)
    g, channel, column = tl.arange(0, ROWS), tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    j, inside, inside_v = head * GROUP + g, channel < DIM, column < V_DIM
    token = token.to(tl.int64)
    at = token * stride_qt + (j * stride_qh)[:, None] + channel[None, :]
    query = tl.load(q + at, mask=(g < GROUP)[:, None] & inside[None, :], other=0.0).to(tl.float32) * scale
    own_k = tl.load(k + token * stride_kt + head * stride_kh + channel, mask=inside, other=0.0)
    own_v = tl.load(v + token * stride_vt + head * stride_vh + column, mask=inside_v, other=0.0)

    # The token's own key and value need no copy.
    peak = _capped(tl.sum(query * own_k.to(tl.float32)[None, :], 1), CAP)
    peak = tl.where(count > 0, peak, float("-inf"))
    total = tl.where(count > 0, 1.0, 0.0) + tl.zeros([ROWS], tl.float32)
    summed = tl.where(count > 0, own_v.to(tl.float32), 0.0)[None, :] + tl.zeros([ROWS, V_PADDED], tl.float32)
    for start in range(1, WINDOW, TOKENS):
        back = start + tl.arange(0, TOKENS)
        there = back < count
        copy = ((row.to(tl.int64) * WINDOW + (position - back + WINDOW) % WINDOW) * heads + head)[:, None]
        key = tl.load(k_copies + copy * DIM + channel, mask=there[:, None] & inside[None, :], other=0.0)
        value = tl.load(v_copies + copy * V_DIM + column, mask=there[:, None] & inside_v[None, :], other=0.0)
        logit = _capped(tl.sum(query[:, None, :] * key.to(tl.float32)[None, :, :], 2), CAP)
        logit = tl.where(there[None, :], logit, float("-inf"))
        top = tl.maximum(peak, tl.max(logit, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        keep, share = tl.exp(peak - safe), tl.exp(logit - safe[:, None])
        total = total * keep + tl.sum(share, 1)
        summed = summed * keep[:, None] + tl.sum(share[:, :, None] * value.to(tl.float32)[None, :, :], 1)
        peak = top

    some = tl.where(total > 0, total, 1.0)
    rows = token * heads * GROUP + j
    to, live = out + rows[:, None] * V_DIM + column[None, :], g < GROUP
    tl.store(to, summed / some[:, None], mask=live[:, None] & inside_v[None, :])
    tl.store(lse + rows, tl.where(total > 0, peak + tl.log(some), float("-inf")), mask=live)
    if place >= 0:
        tl.store(k_copies + (place * heads + head) * DIM + channel, own_k, mask=inside)
        tl.store(v_copies + (place * heads + head) * V_DIM + column, own_v, mask=inside_v)


@triton.jit
def _capped(logit, CAP: tl.constexpr):
    if CAP > 0:
        logit = CAP * (2.0 / (1.0 + tl.exp(-2.0 * logit / CAP)) - 1.0)  # tanh
    return logit


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
@triton.jit(do_not_specialize=["steps", "tokens", "heads", "num_rows"])
def ahead_kernel(
    q,  # [B, H * GROUP, DIM]
    k,  # [B, H, DIM]
    v,  # [B, H, V_DIM]
    k_copies,
    v_copies,
    step,  # int32 [4, steps] (recent.Recent)
    steps,
    scale,
    out,  # float32 [B, H * GROUP, V_DIM]
    lse,  # float32 [B, H * GROUP]
    matrix,  # as device.rotate takes it
    rotated,  # float32 [B, H * GROUP, DIM]
    tokens,
    heads,
    num_rows,  # tokens * GROUP
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # of a rotating program's rows, and its columns
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    program = tl.program_id(0)
    if program < tokens * heads:
        _attend(
            q, k, v, k_copies, v_copies, step, steps, scale, out, lse, program // heads, program % heads, heads,
            stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
            GROUP, ROWS, WINDOW, CAP, DIM, PADDED, V_DIM, V_PADDED, DEPENDENT,
        )  # fmt: skip
    else:
        wait_and_release(DEPENDENT)
        part = program // heads - tokens
        project_and_store(
            q, matrix, rotated, num_rows, stride_qt, stride_qh, heads * GROUP * DIM, DIM, program % heads,
            part // (PADDED // COLUMNS), part % (PADDED // COLUMNS) * COLUMNS, GROUP, DIM, PADDED, BLOCK, COLUMNS,
        )  # fmt: skip


def ahead(
    tables: Tables, q: torch.Tensor, recent: RecentRead, sm_scale: float, cap: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Queries ``q [B, Hq, D]`` of a step, a request each, rotated to stored channels, float32; and out ``[B, Hq, Dv]``
    and lse ``[B, Hq]``, float32, of their exact tokens, zeros and -inf of none. The step's own tokens are kept. cap: of
    logits, 0 for none."""
    side, copies, (tokens, num_heads, dim), v_dim = tables.k, recent.copies, q.shape, recent.v.shape[2]
    heads, group, chained = tables.heads, num_heads // tables.heads, dependent(q.device)
    rotated = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    out = torch.empty(tokens, num_heads, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(tokens, num_heads, dtype=torch.float32, device=q.device)
    block, columns = tiling(side, tokens * group)
    rotating = triton.cdiv(tokens * group, block) * (side.padded // columns)
    ahead_kernel[((tokens + rotating) * heads,)](
        q=q,
        k=recent.k,
        v=recent.v,
        k_copies=copies.k,
        v_copies=copies.v,
        step=copies.recent.step,
        steps=copies.recent.step.shape[1],
        scale=sm_scale,
        out=out,
        lse=lse,
        matrix=side.back_pieces if q.dtype == torch.bfloat16 else side.back,
        rotated=rotated,
        tokens=tokens,
        heads=heads,
        num_rows=tokens * group,
        stride_qt=q.stride(0),
        stride_qh=q.stride(1),
        stride_kt=recent.k.stride(0),
        stride_kh=recent.k.stride(1),
        stride_vt=recent.v.stride(0),
        stride_vh=recent.v.stride(1),
        GROUP=group,
        ROWS=triton.next_power_of_2(group),
        WINDOW=copies.recent.window,
        CAP=cap,
        DIM=dim,
        PADDED=side.padded,
        V_DIM=v_dim,
        V_PADDED=tables.v.padded,
        BLOCK=block,
        COLUMNS=columns,
        DEPENDENT=chained,
        launch_pdl=chained,
        num_warps=4,
    )
    return rotated, (out, lse)
