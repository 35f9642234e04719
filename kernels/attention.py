"""Attention over packed rows in Triton: decode, and the packed prefix of an extend.

The definition is in :mod:`.naive`. Three launches: the query is turned to the stored channels; split-KV
flash attention decodes tiles of codes in registers; the splits are merged and the output turned back.
No dequantized key or value is ever written to memory, nothing synchronises with the host, and no
allocation depends on a sequence length, so decode can be captured in a CUDA graph.

The kernel is in :mod:`.flash`.
"""

from __future__ import annotations

import torch
import triton

from .flash import attention_kernel
from .naive import merge_states
from .tables import DeviceTables
from .turn import merge_and_turn, turn

__all__ = ["decode_attention", "merge_states", "prefix_attention"]

MIN_SPLIT = 32  # tokens; splits are multiples of it, as in SGLang's Triton backend
MAX_PREFIX_SPLITS = 8
_QUERY_BYTES = 1 << 16  # of shared memory


def _check(tables: DeviceTables, q: torch.Tensor) -> int:
    """Query heads per KV head. ValueError unless q is ``[T, G * H, D]`` with contiguous channels."""
    if q.dim() != 3 or q.shape[2] != tables.k.dim or q.shape[1] % tables.heads:
        raise ValueError(
            f"q {tuple(q.shape)}: [tokens, a multiple of {tables.heads} heads, {tables.k.dim}] is needed for these rows"
        )
    if q.stride(2) != 1:
        raise ValueError(f"q with strides {q.stride()}: channels must be contiguous")
    return q.shape[1] // tables.heads


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
    turned = turn(k, q, group)
    wide = max(k.padded, v.padded) > 128 or block_m > 64
    grid = (triton.cdiv(max_q_len * group, block_m) * splits, tables.heads, requests)
    attention_kernel[grid](
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
        splits,
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
        SPLIT_UNIT=MIN_SPLIT,
        BLOCK_M=block_m,
        BLOCK_N=32,
        num_warps=8 if wide else 4,
        num_stages=2,
    )
    return out, merge_and_turn(v, partial_out, partial_lse, group, out)


def _block_m(tables: DeviceTables) -> int:
    """Most rows of a query tile. It is kept in shared memory once for each scale of a key."""
    k = tables.k
    fits = _QUERY_BYTES // (2 * k.norms * k.padded)
    most = 128 if max(k.padded, tables.v.padded) <= 128 else 64
    return max(16, min(most, 1 << (fits.bit_length() - 1)))


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
        min(_block_m(tables), max(16, triton.next_power_of_2(group))),
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
    block_m = 16 if max_q_len * group <= 16 else _block_m(tables)  # two binaries, not one for each length
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
