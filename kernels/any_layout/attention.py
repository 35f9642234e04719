"""Decode attention over packed rows of any layout, split-KV. Definition: :func:`..reference.decode_attention`.

A tile holds all query heads of a KV head, so codes are looked up once for the whole group, without their scales.
Those of K go on the logits, that of V on the probabilities.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..decode.kernel import cap_logits
from ..decode.splits import find_split, request_block
from ..decode.tree import bits_set, in_tree, seen_of_tree
from ..format.codec import V_SCALE_MAX
from ..terms import Terms
from .codewords import codewords
from .tables import CODE_FIELDS, AnyTables

PROGRAMS_PER_SM = 4  # that are wanted
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = 1.4426950408889634
_FIELDS = tl.constexpr(CODE_FIELDS)
#: Probabilities times 2 to this times a value's scale fit float16.
_LIFT = tl.constexpr(6.0)
assert 2**_LIFT.value * V_SCALE_MAX < 65504
_QUERY_BYTES = 1 << 16  # of shared memory


# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
@triton.jit(
    do_not_specialize=["num_requests", "target", "row_bytes", "norm_at", "row_norms", "k_bytes", "v_bytes", "v_at"],
    do_not_specialize_on_alignment=["kv_indptr", "kv_indices"],
)
def decode_any_kernel(
    q,  # float32 [B * QUERIES, Hq, DIM], rotated
    rows,  # uint8
    scales,  # the same memory as float16
    levels,
    k_codes,
    v_codes,
    kv_indptr,
    kv_indices,
    tree,  # see decode_kernel
    num_requests,
    target,
    partial_out,  # [splits, QUERIES, Hq, V_DIM]
    partial_lse,  # float32 [splits, QUERIES, Hq]
    to_log2,
    row_bytes,
    norm_at,  # first scale of head 0's, in float16 from the row's start
    row_norms,
    k_bytes,  # of a head's codes
    v_bytes,
    v_at,  # first byte of head 0's values
    stride_qt,
    stride_qh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    K_NORMS: tl.constexpr,
    QUERIES: tl.constexpr,
    WINDOW: tl.constexpr,  # tokens that a query sees; 0: all up to its own
    CAP: tl.constexpr,  # of the logits; 0: none
    REQUESTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, split = tl.program_id(1), tl.program_id(2)
    SPAN: tl.constexpr = WINDOW + QUERIES - 1 if WINDOW > 0 else 0
    request, begin, end = find_split(kv_indptr, num_requests, target, split, REQUESTS, SPAN)
    if request >= num_requests:
        return
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live_row = m < QUERIES * GROUP
    query = m // GROUP
    j = head * GROUP + m % GROUP
    kv_start = tl.load(kv_indptr + request).to(tl.int64)
    length = (tl.load(kv_indptr + request + 1) - kv_start).to(tl.int32)
    end = tl.minimum(end, length)
    seen = length - (QUERIES - 1 - query)  # a query sees the tokens up to its own
    sees = seen_of_tree(tree, request * QUERIES + query, live_row)
    if tree is not None:
        seen = length - QUERIES + bits_set(sees, QUERIES)

    channel, v_channel = tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    q_at = (request * QUERIES + query).to(tl.int64) * stride_qt + j * stride_qh
    x = tl.load(q + q_at[:, None] + channel[None, :], mask=live_row[:, None] & (channel < DIM)[None, :], other=0.0)
    # Each query is brought to at most 1 so that float16 holds it whatever the transform's gains.
    top = tl.max(tl.abs(x), 1)
    top = tl.where(top > 0, top, 1.0)
    x = (x / top[:, None]).to(levels.dtype.element_ty)
    to_log2 = top * to_log2
    k_codes += head * _FIELDS * PADDED
    v_codes += head * _FIELDS * V_PADDED
    norm = tl.load(k_codes + 3 * PADDED + channel)

    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        slot = tl.load(kv_indices + kv_start + tl.minimum(n, end - 1)).to(tl.int64) * row_bytes
        scale_at = scales + slot // 2 + norm_at + head * row_norms
        k = tl.trans(codewords(rows, slot + head * k_bytes, k_codes, levels, channel, PADDED))
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in tl.static_range(K_NORMS):
            part = tl.where((norm == i)[None, :], x, 0.0).to(x.dtype)
            scale = tl.load(scale_at + i).to(tl.float32)
            logits += tl.dot(part, k, input_precision="ieee") * scale[None, :]
        if tree is None:
            visible = (n < end)[None, :] & (n[None, :] < seen[:, None])
        else:
            visible = (n < end)[None, :] & tl.trans(in_tree(n, length - QUERIES, sees))
        if WINDOW > 0:
            visible = visible & (n[None, :] >= seen[:, None] - WINDOW)
        if CAP > 0:
            logits = tl.trans(cap_logits(tl.trans(logits), to_log2, CAP))
        else:
            logits = logits * to_log2[:, None]
        logits = tl.where(visible, logits, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(logits, 1))
        keep = tl.exp2(peak - new_peak)
        prob = tl.exp2(logits - new_peak[:, None] + _LIFT)
        total = total * keep + tl.sum(prob, 1)
        peak = new_peak
        v = codewords(rows, slot + v_at + head * v_bytes, v_codes, levels, v_channel, V_PADDED)
        weighted = prob * tl.load(scale_at + K_NORMS).to(tl.float32)[None, :]
        acc = tl.dot(weighted.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")

    some = total > 0  # not where a query sees nothing of this split
    total = tl.where(some, total, 1.0)
    row = (split.to(tl.int64) * QUERIES + query) * (HEADS * GROUP) + j
    to = partial_out + row[:, None] * V_DIM + v_channel[None, :]
    tl.store(to, acc / total[:, None], mask=live_row[:, None] & (v_channel < V_DIM)[None, :])
    lse = tl.where(some, (peak + tl.log2(total) - _LIFT) * _LN2, float("-inf"))
    tl.store(partial_lse + row, lse, mask=live_row)


def block_m(tables: AnyTables, rows: int) -> int:
    """Rows of a query tile, for ``rows`` of them per KV head. It is kept in shared memory once for each scale."""
    fits = _QUERY_BYTES // (2 * tables.k_codes.norms * tables.k.padded)
    most = 128 if max(tables.k.padded, tables.v.padded) <= 128 else 64
    return max(16, min(most, 1 << (fits.bit_length() - 1), triton.next_power_of_2(rows)))


def attend(
    tables: AnyTables,
    rotated: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    terms: Terms,
    tree: torch.Tensor | None,
    q_len: int,
    target: int,
    splits: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Partial results of all splits into out ``[splits, q_len, Hq, Dv]`` and lse ``[splits, q_len, Hq]``."""
    t, row, num_heads = tables, tables.row, rotated.shape[1]
    group, requests = num_heads // t.heads, kv_indptr.shape[0] - 1
    block = block_m(t, group * q_len)
    wide = max(t.k.padded, t.v.padded) > 128 or block > 64
    decode_any_kernel[(triton.cdiv(group * q_len, block), t.heads, splits)](
        rotated, rows, rows.view(torch.float16), t.operand_levels, t.k_codes.channels, t.v_codes.channels, kv_indptr,
        kv_indices, tree, requests, target, out, lse, sm_scale * _LOG2E, row.row_bytes, row.norm_offset // 2, row.norms,
        row.k_code_bytes, row.v_code_bytes, row.v_offset, rotated.stride(0), rotated.stride(1),
        HEADS=t.heads, GROUP=group, DIM=t.k.dim, PADDED=t.k.padded, V_DIM=t.v.dim, V_PADDED=t.v.padded,
        K_NORMS=t.k_codes.norms, QUERIES=q_len, WINDOW=terms.window, CAP=terms.cap, REQUESTS=request_block(requests),
        BLOCK_M=block, BLOCK_N=32, num_warps=8 if wide else 4, num_stages=2,
    )  # fmt: skip
