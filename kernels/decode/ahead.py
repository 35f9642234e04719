"""What a decode step does before attention over packed rows, in one launch: its queries are rotated to stored channels,
and attend to the exact tokens. Where the model has left RoPE to it, queries and the step's keys are turned as they are
read (:mod:`..device.rope`).

Both need little of the GPU and are a matter of latency, so they take one's time side by side. The exact part is a split
like others, but in the values' own channels: it joins where splits are merged, behind the rotation (:mod:`.merge`).
Definition: :func:`..reference.recent_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..device.dependent import dependent, wait_and_release
from ..device.rope import load_turned
from ..device.rotate import project_and_store, tiling
from ..device.tables import Tables
from .recent import RecentRead


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
@triton.jit(do_not_specialize=["steps", "tokens", "heads", "num_rows"])
def ahead_kernel(
    q,  # [T, H * GROUP, DIM], QUERIES tokens of each request
    k,  # [T, H, DIM]
    v,  # [T, H, V_DIM]
    k_copies,
    v_copies,
    step,  # int32 [4, steps] (recent.Recent)
    steps,
    scale,
    out,  # float32 [T, H * GROUP, V_DIM]
    lse,  # float32 [T, H * GROUP]
    matrix,  # as device.rotate takes it
    rotated,  # float32 [T, H * GROUP, DIM]
    angles,  # float32 [T, ROTARY], or None
    tokens,
    heads,
    num_rows,  # tokens * GROUP
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    QUERIES: tl.constexpr,  # of a request
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP and up; this and TOKENS a power of two, 16 at least
    TOKENS: tl.constexpr,  # RING and up
    RING: tl.constexpr,
    CAP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # of a rotating program's rows, and its columns
    COLUMNS: tl.constexpr,
    ROTARY: tl.constexpr,  # channels of q and k that are still to be turned; 0: RoPE is applied already
    DEPENDENT: tl.constexpr,
):
    """The first programs take the queries of a token and KV head each, and keep the token in the place of what has left
    the window; the others rotate."""
    program = tl.program_id(0)
    if program >= tokens * heads:
        wait_and_release(DEPENDENT)
        part = program // heads - tokens
        project_and_store(
            q, matrix, rotated, num_rows, stride_qt, stride_qh, heads * GROUP * DIM, DIM, program % heads,
            part // (PADDED // COLUMNS), part % (PADDED // COLUMNS) * COLUMNS, GROUP, DIM, PADDED, BLOCK, COLUMNS,
            angles, ROTARY,
        )  # fmt: skip
        return
    token, head = program // heads, program % heads
    request, query_at = token // QUERIES, token % QUERIES
    row = tl.load(step + request)
    position = tl.load(step + steps + request) + query_at
    count = tl.load(step + 2 * steps + request) + query_at
    if QUERIES == 1:
        place = tl.load(step + 3 * steps + request).to(tl.int64)
    else:
        place = tl.where(row >= 0, row * RING + position % RING, -1).to(tl.int64)
    wait_and_release(DEPENDENT)
    g, back, channel, column = tl.arange(0, ROWS), tl.arange(0, TOKENS), tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    j, inside, inside_v = head * GROUP + g, channel < DIM, column < V_DIM
    token = token.to(tl.int64)
    own = None
    if ROTARY:
        own = angles + token * ROTARY
    at, mask = token * stride_qt + (j * stride_qh)[:, None], (g < GROUP)[:, None] & inside[None, :]
    query = load_turned(q, at, channel[None, :], mask, own, ROTARY)
    own_k = load_turned(k, token * stride_kt + head * stride_kh, channel, inside, own, ROTARY)
    own_v = tl.load(v + token * stride_vt + head * stride_vh + column, mask=inside_v, other=0.0)

    # The step's own keys and values need no copy.
    copied = ((back > query_at) & (back < count))[:, None]
    copy = ((row.to(tl.int64) * RING + (position + (TOKENS * RING - back)) % RING) * heads + head)[:, None]
    key = tl.load(k_copies + copy * DIM + channel[None, :], mask=copied & inside[None, :], other=0.0)
    value = tl.load(v_copies + copy * V_DIM + column[None, :], mask=copied & inside_v[None, :], other=0.0)
    if QUERIES == 1:
        key = tl.where((back == 0)[:, None], own_k[None, :], key)
        value = tl.where((back == 0)[:, None], own_v[None, :], value)
    else:
        fresh = (back <= query_at)[:, None]
        at = (token - back)[:, None]
        fresh_k = tl.load(k + at * stride_kt + head * stride_kh + channel[None, :], mask=fresh & inside[None, :])
        fresh_v = tl.load(v + at * stride_vt + head * stride_vh + column[None, :], mask=fresh & inside_v[None, :])
        key = tl.where(fresh & inside[None, :], fresh_k, key)
        value = tl.where(fresh & inside_v[None, :], fresh_v, value)

    logit = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
    if CAP > 0:
        logit = CAP * (2.0 / (1.0 + tl.exp(-2.0 * logit / CAP)) - 1.0)  # tanh
    logit = tl.where((back < count)[None, :], logit, float("-inf"))
    peak = tl.max(logit, 1)
    share = tl.exp(logit - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    total = tl.sum(share, 1)
    some = tl.where(total > 0, total, 1.0)
    # In two pieces of the values' type, which in float32 is all there is in the first.
    high = share.to(value.dtype)
    low = (share - high.to(tl.float32)).to(value.dtype)
    mean = tl.dot(low, value, tl.dot(high, value, input_precision="tf32x3"), input_precision="tf32x3") / some[:, None]
    rows, live = token * heads * GROUP + j, g < GROUP
    tl.store(out + rows[:, None] * V_DIM + column[None, :], mean, mask=live[:, None] & inside_v[None, :])
    tl.store(lse + rows, tl.where(total > 0, peak + tl.log(some), float("-inf")), mask=live)
    if place >= 0:
        tl.store(k_copies + (place * heads + head) * DIM + channel, own_k, mask=inside)
        tl.store(v_copies + (place * heads + head) * V_DIM + column, own_v, mask=inside_v)


def ahead(
    tables: Tables, q: torch.Tensor, q_len: int, recent: RecentRead, sm_scale: float, cap: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Queries ``q [B * q_len, Hq, D]`` of a step, q_len of each request, rotated to stored channels, float32; and out
    ``[B * q_len, Hq, Dv]`` and lse ``[B * q_len, Hq]``, float32, of their exact tokens, zeros and -inf of none. The
    step's own tokens are kept. cap: of logits, 0 for none. RoPE comes first where ``recent.angles`` are given."""
    side, copies, (tokens, num_heads, dim), v_dim = tables.k, recent.copies, q.shape, recent.v.shape[2]
    heads, group, ring = tables.heads, num_heads // tables.heads, copies.recent.ring
    chained = dependent(q.device)
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
        angles=recent.angles,
        tokens=tokens,
        heads=heads,
        num_rows=tokens * group,
        stride_qt=q.stride(0),
        stride_qh=q.stride(1),
        stride_kt=recent.k.stride(0),
        stride_kh=recent.k.stride(1),
        stride_vt=recent.v.stride(0),
        stride_vh=recent.v.stride(1),
        QUERIES=q_len,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        TOKENS=max(16, triton.next_power_of_2(ring)),
        RING=ring,
        CAP=cap,
        DIM=dim,
        PADDED=side.padded,
        V_DIM=v_dim,
        V_PADDED=tables.v.padded,
        BLOCK=block,
        COLUMNS=columns,
        ROTARY=0 if recent.angles is None else recent.angles.shape[1],
        DEPENDENT=chained,
        launch_pdl=chained,
        num_warps=4,
    )
    return rotated, (out, lse)
