"""An experiment: what decode costs when every page of tokens wants a query of its own.

Keys kept relative to the first position of their page lose far less to quantization than keys at their own positions.
The rotation that is then missing depends on the page alone, so it can be folded into the query: ``q^T R(p) k`` is
``(R(-p) q)^T k``. Here a first launch makes the folded queries of all pages, turned to the stored channels, and
attention reads them beside the codes. The rows are the ordinary ones: only the cost is of interest, and that the
result is what :func:`reference` says.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from sglang_blockgtq.kernels import attention, naive
from sglang_blockgtq.kernels.address import block_base
from sglang_blockgtq.kernels.attention import DecodeScratch, target_splits
from sglang_blockgtq.kernels.codec import LayerCodec
from sglang_blockgtq.kernels.columns import COLUMNS
from sglang_blockgtq.kernels.decode import THREAD_ROWS, add_values, load_shifts, load_words, store_split
from sglang_blockgtq.kernels.fields import offset_of, slot_levels
from sglang_blockgtq.kernels.layout import BLOCK_SLOTS, gather_rows
from sglang_blockgtq.kernels.splits import find_split, num_splits, request_block
from sglang_blockgtq.kernels.tables import ColumnTables, DeviceTables

THETA = 1e6  # of RoPE; any would do
PAGES = 8  # folded by one program
TILE = 32  # tokens
_COLUMNS = tl.constexpr(COLUMNS)
_SLOTS = tl.constexpr(BLOCK_SLOTS)
_LOG2E = 1.4426950408889634


def angles(pages: int, page: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin ``[pages, dim / 2]`` float32 of the rotation to each page's first position."""
    frequency = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turn = (torch.arange(pages, dtype=torch.float64) * page)[:, None] * frequency
    return turn.cos().float().to(device), turn.sin().float().to(device)


def fold(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``q [..., D]`` turned back by angles ``[..., D / 2]``; a pair is a channel and the one half a head further."""
    low, high = q.float().chunk(2, -1)
    return torch.cat([low * cos + high * sin, high * cos - low * sin], -1)


def reference(
    codec: LayerCodec,
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    page: int,
) -> torch.Tensor:
    """``[B, Hq, Dv]`` float32, one query ``[B, Hq, D]`` per request."""
    out = q.new_zeros((*q.shape[:2], codec.layout.v.dim), dtype=torch.float32)
    for b in range(len(q)):
        slots = kv_indices[kv_indptr[b] : kv_indptr[b + 1]].long()
        if not len(slots):
            continue
        k, v = naive.decode(codec, gather_rows(codec.layout, rows, slots))
        group = q.shape[1] // k.shape[1]
        cos, sin = angles(-(-len(slots) // page), page, q.shape[2], q.device)
        at = torch.arange(len(slots), device=q.device) // page
        folded = fold(q[b][None], cos[at][:, None], sin[at][:, None])
        logits = (folded * k.float().repeat_interleave(group, 1)).sum(-1) * sm_scale
        out[b] = torch.einsum("th,thd->hd", logits.softmax(0), v.float().repeat_interleave(group, 1))
    return out


@triton.jit
def _first_page(kv_indptr, request, PAGE: tl.constexpr):
    """Where a request's folded queries begin: pages of those before it, and one for each of them that is not full."""
    return tl.load(kv_indptr + request).to(tl.int64) // PAGE + request


@triton.jit
def fold_kernel(
    q,  # [B, H * GROUP, DIM]
    matrix,  # float32 [H, DIM, DIM] (in, out)
    slope,  # float32 [DIM], of the codebooks
    offset,  # float32 [DIM], what those leave in every number, else 0
    cos,
    sin,
    kv_indptr,
    folded,  # float16 [pages, H * GROUP, DIM]
    start,  # float32 [pages, H * GROUP]
    sizes,  # float32 [B, H * GROUP], each query's length
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
):
    first, head, request = tl.program_id(0) * PAGES, tl.program_id(1), tl.program_id(2)
    length = (tl.load(kv_indptr + request + 1) - tl.load(kv_indptr + request)).to(tl.int32)
    if first * PAGE >= length:
        return
    HALF: tl.constexpr = DIM // 2
    ROWS: tl.constexpr = PAGES * BLOCK_M
    r = tl.arange(0, ROWS)
    page, m = first + r // BLOCK_M, r % BLOCK_M
    live = (m < GROUP) & (page * PAGE < length)
    j = head * GROUP + m
    c = tl.arange(0, HALF)
    at = (request.to(tl.int64) * HEADS * GROUP + j)[:, None] * DIM + c[None, :]
    low = tl.load(q + at, mask=live[:, None], other=0.0).to(tl.float32)
    high = tl.load(q + at + HALF, mask=live[:, None], other=0.0).to(tl.float32)
    size = tl.sqrt(tl.sum(low * low + high * high, 1))
    size = tl.where(size > 0, size, 1.0)
    low, high = low / size[:, None], high / size[:, None]
    turn = tl.where(live, page, 0)[:, None] * HALF + c[None, :]
    cosine, sine = tl.load(cos + turn), tl.load(sin + turn)
    x = (low * cosine + high * sine).to(tl.float16)
    y = (high * cosine - low * sine).to(tl.float16)
    out = tl.arange(0, DIM)
    weights = matrix + head * DIM * DIM + c[:, None] * DIM + out[None, :]
    turned = tl.dot(x, tl.load(weights).to(tl.float16))
    turned = tl.dot(y, tl.load(weights + HALF * DIM).to(tl.float16), turned)
    turned = (turned * tl.load(slope + out)[None, :]).to(tl.float16)
    to = (_first_page(kv_indptr, request, PAGE) + page) * (HEADS * GROUP) + j
    tl.store(folded + to[:, None] * DIM + out[None, :], turned, mask=live[:, None])
    tl.store(start + to, -tl.sum(turned.to(tl.float32) * tl.load(offset + out)[None, :], 1), mask=live)
    if first == 0:
        tl.store(sizes + request * HEADS * GROUP + j, size, mask=live & (page == 0))


@triton.jit
def attend_kernel(
    folded,
    starts,
    sizes,
    rows16,
    rows32,
    kv_indptr,
    kv_indices,
    column_shifts,
    partial_out,
    partial_lse,
    num_requests,
    target,
    to_log2,
    ROW_BYTES: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BINS: tl.constexpr,
    V_BINS: tl.constexpr,
    K_REPEAT: tl.constexpr,
    V_REPEAT: tl.constexpr,
    K_SLOTS: tl.constexpr,
    V_SLOTS: tl.constexpr,
    K_POLY: tl.constexpr,
    V_POLY: tl.constexpr,
    V_SLOPE: tl.constexpr,
    REQUESTS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """The decode kernel for one query per request, which here is another one in every tile."""
    head, split = tl.program_id(0), tl.program_id(1)
    request, begin, end = find_split(kv_indptr, num_requests, target, split, REQUESTS)
    if request >= num_requests:
        return
    kv_start = tl.load(kv_indptr + request).to(tl.int64)
    end = tl.minimum(end, (tl.load(kv_indptr + request + 1) - kv_start).to(tl.int32))
    first_page = _first_page(kv_indptr, request, PAGE)
    m = tl.arange(0, BLOCK_M)
    live_row = m < GROUP
    j = head * GROUP + m
    c = tl.arange(0, _COLUMNS)
    operand = tl.float16 if ASM else tl.float32
    to_log2 = tl.load(sizes + request * HEADS * GROUP + j, mask=live_row, other=1.0) * to_log2
    k_shifts = load_shifts(column_shifts, K_BINS)
    v_shifts = load_shifts(column_shifts, V_BINS)

    acc = ()
    for _ in tl.static_range(len(V_SLOTS)):
        acc += (tl.zeros([_COLUMNS, BLOCK_M], tl.float32),)
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([THREAD_ROWS, BLOCK_M], tl.float32)
    weight = tl.zeros([THREAD_ROWS, BLOCK_M], tl.float32)
    scale_at = (NORM_OFFSET + 4 * head) * (_SLOTS // 4)
    for at in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = at + tl.arange(0, BLOCK_N)
        slot = tl.load(kv_indices + kv_start + tl.minimum(n, end - 1)).to(tl.uint32)
        k_words = load_words(rows16, slot, head * K_STRIDE, K_BINS, ROW_BYTES, 1)
        scales = tl.load(rows32 + scale_at + (block_base(slot, ROW_BYTES // 4) + slot % _SLOTS))
        v_words = load_words(rows16, slot, V_OFFSET + head * V_STRIDE, V_BINS, ROW_BYTES, 0)
        k_scale = (scales & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        v_scale = (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

        mine = (first_page + at // PAGE) * (HEADS * GROUP) + j
        logits = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        logits += tl.load(starts + mine, mask=live_row, other=0.0)[None, :]
        for i in tl.static_range(len(K_SLOTS)):
            part = mine[None, :] * (len(K_SLOTS) * _COLUMNS) + (c + i * _COLUMNS)[:, None]
            query = tl.load(folded + part, mask=live_row[None, :], other=0.0).to(operand)
            k = slot_levels(k_words, k_shifts, 1, i, K_SLOTS, K_REPEAT, K_POLY, ASM)
            logits = tl.dot(k, query, logits, input_precision="ieee")
        logits = logits * k_scale[:, None] + tl.where(n < end, 0.0, float("-inf"))[:, None]

        acc, peak, total, weight = add_values(
            logits, to_log2, v_words, v_scale, v_shifts, acc, peak, total, weight, V_SLOTS, V_REPEAT, V_POLY, ASM
        )

    row = split.to(tl.int64) * (HEADS * GROUP) + j
    store_split(
        acc,
        peak,
        total,
        weight,
        to_log2,
        row,
        live_row,
        partial_out,
        partial_lse,
        V_DIM,
        V_SLOTS,
        V_REPEAT,
        V_POLY,
        V_SLOPE,
    )


def _of_slots(k: ColumnTables, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """slope, offset ``[DIM]`` float32 of the stored channels."""
    offsets = [
        0.0 if poly else float(offset_of(pieces, k.repeat[pieces[0]] > 1))
        for pieces, poly in zip(k.slots, k.poly, strict=True)
    ]
    both = torch.tensor([k.slope, offsets], device=device).repeat_interleave(COLUMNS, 1)
    return both[0].contiguous(), both[1].contiguous()


@cache
def _tables(k: ColumnTables, pages: int, page: int, dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What is the same in every step: slope, offset, cos, sin."""
    return *_of_slots(k, device), *angles(pages, page, dim, device)


def decode_folded(
    tables: DeviceTables,
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    page: int,
    longest: int,
    scratch: DecodeScratch | None = None,
) -> torch.Tensor:
    """Attention of one query ``[B, Hq, D]`` per request, folded for each page of ``page`` tokens, a multiple of 16.

    longest: most tokens of a request. Rows of one template in columns. Returns ``[B, Hq, Dv]`` in q's dtype.
    """
    (k,), v, row = tables.k_templates, tables.v_columns, tables.row
    requests, num_heads, dim = q.shape
    group, pages = num_heads // tables.heads, -(-longest // page)
    block_m, device = 8 if group <= 8 else 16, q.device
    slope, offset, cos, sin = _tables(k, pages, page, dim, device)
    room = kv_indices.shape[0] // page + requests + 1
    folded = torch.empty(room, num_heads, dim, dtype=torch.float16, device=device)
    start = torch.empty(room, num_heads, dtype=torch.float32, device=device)
    sizes = torch.empty(requests, num_heads, dtype=torch.float32, device=device)
    fold_kernel[(triton.cdiv(pages, PAGES), tables.heads, requests)](
        q, tables.k.back, slope, offset, cos, sin, kv_indptr, folded, start, sizes,
        HEADS=tables.heads, GROUP=group, DIM=dim, BLOCK_M=block_m, PAGE=page, PAGES=PAGES, num_warps=4,
    )  # fmt: skip
    target = target_splits(tables, num_heads)
    splits = num_splits(requests, target)
    scratch = scratch or DecodeScratch.for_splits(tables, splits, num_heads)
    attend_kernel[(tables.heads, splits)](
        folded, start, sizes, rows.view(torch.int16), rows.view(torch.int32), kv_indptr, kv_indices,
        tables.column_shifts, scratch.out, scratch.lse, requests, target, sm_scale * _LOG2E,
        ROW_BYTES=row.row_bytes, K_STRIDE=row.k_code_bytes, V_STRIDE=row.v_code_bytes, V_OFFSET=row.v_offset,
        NORM_OFFSET=row.norm_offset, HEADS=tables.heads, GROUP=group, V_DIM=tables.v.dim,
        K_BINS=k.bins, V_BINS=v.bins, K_REPEAT=k.repeat, V_REPEAT=v.repeat, K_SLOTS=k.slots, V_SLOTS=v.slots,
        K_POLY=k.poly, V_POLY=v.value_poly, V_SLOPE=v.slope,
        REQUESTS=request_block(requests), PAGE=page, BLOCK_M=block_m, BLOCK_N=min(page, TILE),
        STAGES=attention.TUNING.stages, ASM=q.is_cuda, num_warps=1, num_stages=attention.TUNING.stages,
    )  # fmt: skip
    out = q.new_empty(requests, num_heads, tables.v.dim)
    lse = torch.empty(requests, num_heads, dtype=torch.float32, device=device)
    attention._merge(tables, scratch, kv_indptr, 1, target, out, lse)
    return out
