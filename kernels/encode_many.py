"""The encode kernel of prefill: blocks of rows of one head, keys or values, and of queries beside them."""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_rows import encode_rows
from .turn import project_and_store

# Numbers that differ between calls or layers are not specialised on: one binary serves them all.
_FREE = ["num_factors", "spread", "num_tokens", "row_bytes", "norm_offset", "row_norms", "heads"]
_FREE += ["k_code_bytes", "k_at", "k_first_norm", "v_code_bytes", "v_at", "v_first_norm", "num_queries"]


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["loc"])
def encode_many_kernel(
    k,  # [T, H, DIM]
    v,  # [T, H, V_DIM]
    q,  # [T, H * GROUP, DIM], or None
    turned,  # the same, float32
    rows,  # uint8
    scales,  # the same memory as float16
    k_words,  # the same memory in words that a head's codes are whole numbers of
    v_words,
    loc,
    k_matrix,
    k_channels,
    k_inverse_counts,
    k_place,
    k_pack,
    v_matrix,
    v_channels,
    v_inverse_counts,
    v_place,
    v_pack,
    q_matrix,
    cells,
    search,  # [num_factors]
    num_factors,
    spread,  # rows per token: 1, or FACTORS with a factor each
    num_tokens,
    num_queries,  # num_tokens * GROUP
    heads,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_qt,
    stride_qh,
    stride_tt,
    stride_th,
    row_bytes,
    places,
    norm_offset,
    row_norms,
    k_code_bytes,
    k_at,
    k_first_norm,
    v_code_bytes,
    v_at,
    v_first_norm,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    NORMS: tl.constexpr,
    TILES: tl.constexpr,
    PLACE_ROWS: tl.constexpr,
    PLACE_BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
    WORD: tl.constexpr,
    BINS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    V_TILES: tl.constexpr,
    V_PLACE_ROWS: tl.constexpr,
    V_PLACE_BYTES: tl.constexpr,
    V_CHUNK: tl.constexpr,
    V_WORD: tl.constexpr,
    V_BINS: tl.constexpr,
    BOOKS: tl.constexpr,
    COUNT: tl.constexpr,
    INTERPRET: tl.constexpr,
    RULE: tl.constexpr,
    FACTORS: tl.constexpr,
    GROUP: tl.constexpr,  # 0: no query
    ROWS: tl.constexpr,
):
    side, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    if side == 0:
        if tl.program_id(0) * ROWS < num_tokens * spread:
            encode_rows(
                k,
                rows,
                scales,
                k_words,
                loc,
                k_matrix,
                k_channels,
                k_inverse_counts,
                k_place,
                k_pack,
                cells,
                search,
                num_factors,
                spread,
                num_tokens,
                stride_kt,
                stride_kh,
                row_bytes,
                places,
                k_code_bytes,
                k_at,
                norm_offset,
                row_norms,
                k_first_norm,
                head,
                heads,
                DIM,
                PADDED,
                NORMS,
                TILES,
                PLACE_ROWS,
                PLACE_BYTES,
                CHUNK,
                WORD,
                BINS,
                BOOKS,
                COUNT,
                INTERPRET,
                RULE,
                FACTORS,
                False,
                ROWS,
            )
    elif side == 1:
        if tl.program_id(0) * ROWS < num_tokens * spread:
            encode_rows(
                v,
                rows,
                scales,
                v_words,
                loc,
                v_matrix,
                v_channels,
                v_inverse_counts,
                v_place,
                v_pack,
                cells,
                search,
                num_factors,
                spread,
                num_tokens,
                stride_vt,
                stride_vh,
                row_bytes,
                places,
                v_code_bytes,
                v_at,
                norm_offset,
                row_norms,
                v_first_norm,
                head,
                heads,
                V_DIM,
                V_PADDED,
                1,
                V_TILES,
                V_PLACE_ROWS,
                V_PLACE_BYTES,
                V_CHUNK,
                V_WORD,
                V_BINS,
                BOOKS,
                COUNT,
                INTERPRET,
                RULE,
                FACTORS,
                True,
                ROWS,
            )
    elif GROUP > 0:
        project_and_store(
            q,
            q_matrix,
            turned,
            num_queries,
            stride_qt,
            stride_qh,
            stride_tt,
            stride_th,
            head,
            tl.program_id(0),
            0,
            GROUP,
            DIM,
            PADDED,
            ROWS,
            PADDED,
        )
