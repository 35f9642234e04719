"""Attention over packed rows in Triton: decode, and the packed prefix of an extend.

The definition is in :mod:`.naive`. Three launches: the query is turned to the stored channels; split-KV
flash attention decodes tiles of codes in registers; the splits are merged and the output turned back.
No dequantized key or value is ever written to memory, nothing synchronises with the host, and no
allocation depends on a sequence length, so decode can be captured in a CUDA graph.

One tile holds all query heads of a KV head (times some queries, for a prefix): codes are decoded once
for the whole group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .encode import transform_tile
from .naive import merge_states
from .tables import DeviceTables, SideTables

__all__ = ["decode_attention", "merge_states", "prefix_attention"]

MIN_SPLIT = 32  # tokens; splits are multiples of it, as in SGLang's Triton backend
MAX_PREFIX_SPLITS = 8
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _turn_kernel(
    x,
    matrix,
    y,
    num_rows,
    stride_xt,
    stride_xh,
    stride_yt,
    stride_yh,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``y[t, j] = x[t, j] @ matrix[j // GROUP]``, float32."""
    head = tl.program_id(1)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, j = (r // GROUP).to(tl.int64), r % GROUP
    live = r < num_rows
    # The head's offset rides on the token's: rows of a tile differ in both.
    at = token * stride_xt + (head * GROUP + j) * stride_xh
    tile = transform_tile(x, at, live, 1, matrix + head * PADDED * PADDED, DIM, PADDED, BLOCK, "tf32x3")
    channel = tl.arange(0, PADDED)
    to = token * stride_yt + (head * GROUP + j) * stride_yh
    tl.store(y + to[:, None] + channel[None, :], tile, mask=live[:, None] & (channel < DIM)[None, :])


@triton.jit
def _codewords(rows, base, live, fields, book, levels, PADDED: tl.constexpr, TOKENS: tl.constexpr, MASKS: tl.constexpr):
    """Codewords ``[TOKENS, PADDED]`` of one head, without their scales; ``base`` is where each row starts."""
    channel = tl.arange(0, PADDED)
    code = tl.zeros([TOKENS, PADDED], tl.int32)
    for p in tl.static_range(len(MASKS)):
        if MASKS[p] > 0:
            field = fields + p * 3 * PADDED + channel
            byte = tl.load(field)
            shift = tl.load(field + PADDED)
            position = tl.load(field + 2 * PADDED)
            mask = live[:, None] & (byte >= 0)[None, :]
            data = tl.load(rows + base[:, None] + byte[None, :], mask=mask, other=0).to(tl.int32)
            code += ((data >> shift[None, :]) & MASKS[p]) << position[None, :]
    start = tl.load(book + channel)
    return tl.load(levels + start[None, :] + code)


@triton.jit
def _attention_kernel(
    q,  # float32 [T, Hq, DIM], turned
    rows,  # uint8
    scales,  # the same memory as float16
    levels,
    k_fields,
    k_book,
    k_norm_index,
    v_fields,
    v_book,
    qo_indptr,  # None: one query per request
    kv_indptr,
    kv_indices,
    num_kv_splits,  # None: SPLITS for every request
    partial_out,
    partial_lse,
    sm_scale,
    row_bytes,
    norm_offset,
    row_norms,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_os,
    stride_lt,
    stride_lh,
    stride_ls,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    K_MASKS: tl.constexpr,
    V_MASKS: tl.constexpr,
    K_NORMS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(1)
    request = tl.program_id(2)

    if qo_indptr is None:
        first_query = request
        num_queries = 1
    else:
        first_query = tl.load(qo_indptr + request).to(tl.int32)
        num_queries = tl.load(qo_indptr + request + 1).to(tl.int32) - first_query
    r = (tl.program_id(0) // SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    if (tl.program_id(0) // SPLITS) * BLOCK_M >= num_queries * GROUP:
        return
    live_row = r < num_queries * GROUP
    token = (first_query + r // GROUP).to(tl.int64)
    j = head * GROUP + r % GROUP

    kv_start = tl.load(kv_indptr + request).to(tl.int64)
    length = (tl.load(kv_indptr + request + 1) - kv_start).to(tl.int32)
    splits = SPLITS
    if num_kv_splits is not None:
        splits = tl.minimum(tl.maximum(tl.load(num_kv_splits + request).to(tl.int32), 1), SPLITS)
    per_split = tl.cdiv(tl.cdiv(length, splits), SPLIT_UNIT) * SPLIT_UNIT
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    lse_at = partial_lse + token * stride_lt + j * stride_lh + split * stride_ls
    if begin >= end:
        tl.store(lse_at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=live_row)
        return

    channel = tl.arange(0, PADDED)
    v_channel = tl.arange(0, V_PADDED)
    query = tl.load(
        q + (token * stride_qt + j * stride_qh)[:, None] + channel[None, :],
        mask=live_row[:, None] & (channel < DIM)[None, :],
        other=0.0,
    )
    # Each row is brought to at most 1 so that float16 holds it whatever the transform's gains.
    top = tl.max(tl.abs(query), 1)
    top = tl.where(top > 0, top, 1.0)
    query = (query / top[:, None]).to(levels.dtype.element_ty)
    to_log2 = top * (sm_scale * _LOG2E)
    index = tl.load(k_norm_index + head * PADDED + channel)

    PLANES: tl.constexpr = len(K_MASKS)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        live = n < end
        slot = tl.load(kv_indices + kv_start + n, mask=live, other=0).to(tl.int64)
        base = slot * row_bytes
        scale_at = (base + norm_offset) // 2 + head * row_norms

        k = _codewords(
            rows,
            base,
            live,
            k_fields + head * PLANES * 3 * PADDED,
            k_book + head * PADDED,
            levels,
            PADDED,
            BLOCK_N,
            K_MASKS,
        )
        k = tl.trans(k)
        # Scales touch the logits, not the keys: one dot for each scale.
        if K_NORMS == 1:
            scale = tl.load(scales + scale_at, mask=live, other=0.0).to(tl.float32)
            logits = tl.dot(query, k, input_precision="ieee") * scale[None, :]
        else:
            logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i in tl.static_range(K_NORMS):
                scale = tl.load(scales + scale_at + i, mask=live, other=0.0).to(tl.float32)
                part = tl.where((index == i)[None, :], query, 0.0).to(query.dtype)
                logits += tl.dot(part, k, input_precision="ieee") * scale[None, :]
        logits = tl.where(live[None, :], logits * to_log2[:, None], float("-inf"))

        new_peak = tl.maximum(peak, tl.max(logits, 1))
        keep = tl.exp2(peak - new_peak)
        prob = tl.exp2(logits - new_peak[:, None])
        total = total * keep + tl.sum(prob, 1)
        peak = new_peak

        v = _codewords(
            rows,
            base,
            live,
            v_fields + head * PLANES * 3 * V_PADDED,
            v_book + head * V_PADDED,
            levels,
            V_PADDED,
            BLOCK_N,
            V_MASKS,
        )
        scale = tl.load(scales + scale_at + K_NORMS, mask=live, other=0.0).to(tl.float32)
        weighted = (prob * scale[None, :]).to(v.dtype)
        acc = acc * keep[:, None]
        acc = tl.dot(weighted, v, acc, input_precision="ieee")

    out_at = partial_out + (token * stride_ot + j * stride_oh + split * stride_os)[:, None] + v_channel[None, :]
    tl.store(out_at, acc / total[:, None], mask=live_row[:, None] & (v_channel < V_DIM)[None, :])
    tl.store(lse_at, (peak + tl.log2(total)) * _LN2, mask=live_row)


@triton.jit
def _merge_kernel(
    partial_out,
    partial_lse,
    matrix,
    out,
    lse,
    num_rows,
    stride_pt,
    stride_ph,
    stride_ps,
    stride_lt,
    stride_lh,
    stride_ls,
    stride_ot,
    stride_oh,
    num_heads,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Exact merge of the splits by their log-sum-exp, then ``v_out``, which is linear and so comes last."""
    BLOCK_K: tl.constexpr = 32 if PADDED >= 32 else PADDED
    head = tl.program_id(1)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = r < num_rows
    token, j = (r // GROUP).to(tl.int64), head * GROUP + r % GROUP
    lse_at = partial_lse + token * stride_lt + j * stride_lh
    part_at = partial_out + token * stride_pt + j * stride_ph

    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for s in range(SPLITS):
        peak = tl.maximum(peak, tl.load(lse_at + s * stride_ls, mask=live, other=float("-inf")))
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(SPLITS):
        total += tl.exp(tl.load(lse_at + s * stride_ls, mask=live, other=float("-inf")) - peak)
    safe = tl.where(total > 0, total, 1.0)

    out_channel = tl.arange(0, PADDED)
    tile = tl.zeros([BLOCK, PADDED], tl.float32)
    for start in range(0, DIM, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        merged = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for s in range(SPLITS):
            share = tl.exp(tl.load(lse_at + s * stride_ls, mask=live, other=float("-inf")) - peak) / safe
            # A split without tokens has written nothing.
            mask = (live & (share > 0))[:, None] & (channel < DIM)[None, :]
            part = tl.load(part_at[:, None] + s * stride_ps + channel[None, :], mask=mask, other=0.0)
            merged += part * share[:, None]
        weights = tl.load(
            matrix + head * PADDED * PADDED + channel[:, None] * PADDED + out_channel[None, :],
        )
        tile = tl.dot(merged, weights, tile, input_precision="tf32x3")
    to = out + (token * stride_ot + j * stride_oh)[:, None] + out_channel[None, :]
    tl.store(to, tile.to(out.dtype.element_ty), mask=live[:, None] & (out_channel < DIM)[None, :])
    tl.store(lse + token * num_heads + j, tl.where(total > 0, peak + tl.log(safe), float("-inf")), mask=live)


def _check(tables: DeviceTables, q: torch.Tensor) -> int:
    """Query heads per KV head. ValueError unless q is ``[T, G * H, D]`` with contiguous channels."""
    if q.dim() != 3 or q.shape[2] != tables.k.dim or q.shape[1] % tables.heads:
        raise ValueError(
            f"q {tuple(q.shape)}: [tokens, a multiple of {tables.heads} heads, {tables.k.dim}] is needed for these rows"
        )
    if q.stride(2) != 1:
        raise ValueError(f"q with strides {q.stride()}: channels must be contiguous")
    return q.shape[1] // tables.heads


def _turned_query(tables: DeviceTables, q: torch.Tensor, group: int) -> torch.Tensor:
    side: SideTables = tables.k
    y = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    rows, block = q.shape[0] * group, 16
    _turn_kernel[(triton.cdiv(rows, block), tables.heads)](
        q,
        side.back,
        y,
        rows,
        q.stride(0),
        q.stride(1),
        y.stride(0),
        y.stride(1),
        GROUP=group,
        DIM=side.dim,
        PADDED=side.padded,
        BLOCK=block,
    )
    return y


def _attend(
    tables: DeviceTables,
    q: torch.Tensor,
    rows: torch.Tensor,
    qo_indptr: torch.Tensor | None,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    num_kv_splits: torch.Tensor | None,
    sm_scale: float,
    max_q_len: int,
    block_m: int,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn, attend, merge. partial_out ``[T, Hq, S, Dv]`` and partial_lse ``[T, Hq, S]`` are scratch."""
    k, v, row = tables.k, tables.v, tables.row
    group = _check(tables, q)
    scales = tables.check_rows(rows)
    splits = partial_lse.shape[2]
    requests = kv_indptr.shape[0] - 1
    turned = _turned_query(tables, q, group)
    wide = max(k.padded, v.padded) > 128 or block_m > 64
    grid = (triton.cdiv(max_q_len * group, block_m) * splits, tables.heads, requests)
    _attention_kernel[grid](
        turned,
        rows,
        scales,
        tables.half_levels if q.is_cuda else tables.levels,
        k.fields,
        k.book,
        k.norm_index,
        v.fields,
        v.book,
        qo_indptr,
        kv_indptr,
        kv_indices,
        num_kv_splits,
        partial_out,
        partial_lse,
        sm_scale,
        row.row_bytes,
        row.norm_offset,
        row.norms,
        turned.stride(0),
        turned.stride(1),
        *partial_out.stride()[:3],
        *partial_lse.stride(),
        GROUP=group,
        DIM=k.dim,
        PADDED=k.padded,
        V_DIM=v.dim,
        V_PADDED=v.padded,
        K_MASKS=k.masks,
        V_MASKS=v.masks,
        K_NORMS=k.norms,
        SPLITS=splits,
        SPLIT_UNIT=MIN_SPLIT,
        BLOCK_M=block_m,
        BLOCK_N=32,
        num_warps=8 if wide else 4,
        num_stages=2,
    )
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    num_rows, block = q.shape[0] * group, 16
    _merge_kernel[(triton.cdiv(num_rows, block), tables.heads)](
        partial_out,
        partial_lse,
        v.back,
        out,
        lse,
        num_rows,
        *partial_out.stride()[:3],
        *partial_lse.stride(),
        out.stride(0),
        out.stride(1),
        q.shape[1],
        GROUP=group,
        DIM=v.dim,
        PADDED=v.padded,
        SPLITS=splits,
        BLOCK=block,
    )
    return out, lse


def _pow2_at_least(n: int, low: int) -> int:
    return max(low, 1 << (n - 1).bit_length())


def decode_attention(
    tables: DeviceTables,
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    num_kv_splits: torch.Tensor | None = None,
    max_kv_splits: int = 8,
    partial_out: torch.Tensor | None = None,
    partial_lse: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query ``[B, Hq, D]`` per request against its packed rows.

    rows ``[slots, row_bytes]`` uint8; kv_indptr ``[B + 1]`` and kv_indices (slots), int32 or int64.
    num_kv_splits ``[B]`` int32 on the device, or None for max_kv_splits each. A request of n tokens is cut
    into splits of ``cdiv(cdiv(n, num_kv_splits), 32) * 32`` tokens, at most max_kv_splits of them.
    Scratch and result may be passed in, for CUDA graphs: partial_out ``[B, Hq, max_kv_splits, Dv]`` and
    partial_lse ``[B, Hq, max_kv_splits]`` float32, out ``[B, Hq, Dv]``.

    Returns out in q's dtype and the natural-log LSE ``[B, Hq]`` float32; zeros and -inf without tokens.
    """
    group = _check(tables, q)
    batch, heads = q.shape[:2]
    if partial_out is None:
        partial_out = q.new_empty((batch, heads, max_kv_splits, tables.v.dim), dtype=torch.float32)
    if partial_lse is None:
        partial_lse = q.new_empty((batch, heads, max_kv_splits), dtype=torch.float32)
    if partial_out.shape != (batch, heads, max_kv_splits, tables.v.dim) or partial_lse.shape != partial_out.shape[:3]:
        raise ValueError(
            f"partial_out {tuple(partial_out.shape)}, partial_lse {tuple(partial_lse.shape)}: "
            f"{(batch, heads, max_kv_splits, tables.v.dim)} and that without its last size are needed"
        )
    if out is None:
        out = q.new_empty((batch, heads, tables.v.dim))
    if not batch:
        return out, q.new_empty((0, heads), dtype=torch.float32)
    return _attend(
        tables,
        q,
        rows,
        None,
        kv_indptr,
        kv_indices,
        num_kv_splits,
        sm_scale,
        1,
        _pow2_at_least(group, 16),
        partial_out,
        partial_lse,
        out,
    )


def prefix_attention(
    tables: DeviceTables,
    q: torch.Tensor,
    rows: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    max_q_len: int,
    num_kv_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query of a request against all its packed rows (no causal mask: the prefix lies before them).

    q ``[T, Hq, D]``; qo_indptr, kv_indptr ``[B + 1]``; max_q_len: longest run of queries (host integer; queries
    beyond it are left out). num_kv_splits: splits of the prefix; None takes as many as keep the GPU busy.

    Returns out ``[T, Hq, Dv]`` and lse ``[T, Hq]``, float32: a part still to be merged with the chunk's own
    attention by :func:`merge_states`. Zeros and -inf for queries without a prefix.
    """
    group = _check(tables, q)
    num_tokens, heads = q.shape[:2]
    requests = kv_indptr.shape[0] - 1
    out = q.new_empty((num_tokens, heads, tables.v.dim), dtype=torch.float32)
    if not (num_tokens and requests and max_q_len):
        return out.zero_(), q.new_full((num_tokens, heads), -torch.inf, dtype=torch.float32)
    most = 128 if max(tables.k.padded, tables.v.padded) <= 128 else 64
    block_m = min(most, _pow2_at_least(max_q_len * group, 16))
    if num_kv_splits is None:
        programs = triton.cdiv(max_q_len * group, block_m) * tables.heads * requests
        wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        num_kv_splits = min(MAX_PREFIX_SPLITS, max(1, wanted // programs))
    partial_out = q.new_empty((num_tokens, heads, num_kv_splits, tables.v.dim), dtype=torch.float32)
    # Tokens of no request are visited by no program.
    partial_lse = q.new_full((num_tokens, heads, num_kv_splits), -torch.inf, dtype=torch.float32)
    return _attend(
        tables,
        q,
        rows,
        qo_indptr,
        kv_indptr,
        kv_indices,
        None,
        sm_scale,
        max_q_len,
        block_m,
        partial_out,
        partial_lse,
        out,
    )
