"""Split-KV flash attention over packed rows: the Triton kernel.

One tile holds all query heads of a KV head (times some queries, for a prefix), so codes are decoded
once for the whole group; in registers, through the tables, without their scales. Those of K go on the
logits, that of V on the probabilities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .address import byte_address
from .splits import find_split

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _codewords(
    rows,
    slot,
    row_bytes,
    places,
    live,
    fields,
    book,
    levels,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    MASKS: tl.constexpr,
):
    """Codewords ``[TOKENS, PADDED]`` of one head, without their scales; ``slot`` is where each token lies."""
    channel = tl.arange(0, PADDED)
    code = tl.zeros([TOKENS, PADDED], tl.int32)
    for p in tl.static_range(len(MASKS)):
        if MASKS[p] > 0:
            field = fields + p * 3 * PADDED + channel
            byte = tl.load(field)
            shift = tl.load(field + PADDED)
            position = tl.load(field + 2 * PADDED)
            mask = live[:, None] & (byte >= 0)[None, :]
            at = byte_address(slot[:, None], row_bytes, places, tl.maximum(byte, 0)[None, :])
            data = tl.load(rows + at, mask=mask, other=0).to(tl.int32)
            code += ((data >> shift[None, :]) & MASKS[p]) << position[None, :]
    start = tl.load(book + channel)
    return tl.load(levels + start[None, :] + code)


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
@triton.jit(
    do_not_specialize=["num_requests", "max_splits", "row_bytes", "norm_offset", "row_norms"],
    do_not_specialize_on_alignment=["qo_indptr", "kv_indptr", "kv_indices", "num_kv_splits"],
)
def attention_kernel(
    q,  # float32 [T, Hq, DIM], turned
    rows,  # uint8
    scales,  # the same memory as float16
    levels,
    k_fields,
    k_book,
    k_norm_index,
    v_fields,
    v_book,
    qo_indptr,  # None: decode, QUERIES queries per request and splits as in .splits
    kv_indptr,
    kv_indices,
    num_requests,
    max_splits,  # of one request; in decode the target of .splits
    partial_out,
    partial_lse,
    sm_scale,
    row_bytes,
    norm_offset,
    row_norms,
    places,
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
    QUERIES: tl.constexpr,
    REQUESTS: tl.constexpr,
    SPLIT_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1)
    if qo_indptr is None:
        split = tl.program_id(2)
        first_row = tl.program_id(0) * BLOCK_M
        request, begin, end = find_split(kv_indptr, num_requests, max_splits, split, REQUESTS)
        if request >= num_requests:
            return
        first_query = request * QUERIES
        num_queries = QUERIES
        first_out = 0
    else:
        split = tl.program_id(0) % max_splits
        first_row = tl.program_id(0) // max_splits * BLOCK_M
        request = tl.program_id(2)
        first_query = tl.load(qo_indptr + request).to(tl.int32)
        num_queries = tl.load(qo_indptr + request + 1).to(tl.int32) - first_query
        first_out = first_query
    if first_row >= num_queries * GROUP:
        return
    r = first_row + tl.arange(0, BLOCK_M)
    live_row = r < num_queries * GROUP
    query = r // GROUP
    token = (first_query + query).to(tl.int64)
    j = head * GROUP + r % GROUP

    kv_start = tl.load(kv_indptr + request).to(tl.int64)
    length = (tl.load(kv_indptr + request + 1) - kv_start).to(tl.int32)
    out_token = (first_out + query).to(tl.int64)
    lse_at = partial_lse + out_token * stride_lt + j * stride_lh + split * stride_ls
    if qo_indptr is None:
        end = tl.minimum(end, length)
        seen = length - (QUERIES - 1 - query)  # a query sees the tokens up to its own
    else:
        per_split = tl.cdiv(tl.cdiv(length, max_splits), SPLIT_UNIT) * SPLIT_UNIT
        begin = split * per_split
        end = tl.minimum(begin + per_split, length)
        seen = tl.zeros([BLOCK_M], tl.int32) + length
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
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        live = n < end
        slot = tl.load(kv_indices + kv_start + n, mask=live, other=0).to(tl.int64)
        scale_byte = norm_offset + head * row_norms * 2

        k = _codewords(
            rows,
            slot,
            row_bytes,
            places,
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
            scale_at = byte_address(slot, row_bytes, places, scale_byte) // 2
            scale = tl.load(scales + scale_at, mask=live, other=0.0).to(tl.float32)
            logits = tl.dot(query, k, input_precision="ieee") * scale[None, :]
        else:
            logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i in tl.static_range(K_NORMS):
                scale_at = byte_address(slot, row_bytes, places, scale_byte + 2 * i) // 2
                scale = tl.load(scales + scale_at, mask=live, other=0.0).to(tl.float32)
                part = tl.where((index == i)[None, :], query, 0.0).to(query.dtype)
                logits += tl.dot(part, k, input_precision="ieee") * scale[None, :]
        visible = live[None, :] & (n[None, :] < seen[:, None])
        logits = tl.where(visible, logits * to_log2[:, None], float("-inf"))

        new_peak = tl.maximum(peak, tl.max(logits, 1))
        keep = tl.exp2(peak - new_peak)
        prob = tl.exp2(logits - new_peak[:, None])
        total = total * keep + tl.sum(prob, 1)
        peak = new_peak

        v = _codewords(
            rows,
            slot,
            row_bytes,
            places,
            live,
            v_fields + head * PLANES * 3 * V_PADDED,
            v_book + head * V_PADDED,
            levels,
            V_PADDED,
            BLOCK_N,
            V_MASKS,
        )
        scale_at = byte_address(slot, row_bytes, places, scale_byte + 2 * K_NORMS) // 2
        scale = tl.load(scales + scale_at, mask=live, other=0.0).to(tl.float32)
        weighted = (prob * scale[None, :]).to(v.dtype)
        acc = acc * keep[:, None]
        acc = tl.dot(weighted, v, acc, input_precision="ieee")

    some = total > 0  # not where a query sees nothing of this split
    total = tl.where(some, total, 1.0)
    out_at = partial_out + (out_token * stride_ot + j * stride_oh + split * stride_os)[:, None] + v_channel[None, :]
    tl.store(out_at, acc / total[:, None], mask=live_row[:, None] & (v_channel < V_DIM)[None, :])
    tl.store(lse_at, tl.where(some, (peak + tl.log2(total)) * _LN2, float("-inf")), mask=live_row)
