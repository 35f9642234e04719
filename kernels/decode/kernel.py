"""Decode attention over rows in columns: the kernel near the memory's speed.

One warp is one program: it takes a split of a request's tokens for one KV head, and nothing in its loop
waits for another warp. Both products are transposed (``K q^T`` and ``V^T P^T``), so the codes are always
the 16-row operand of the tensor core and the GQA group its short side: eight columns instead of sixteen.
Words go from memory to shared memory asynchronously, from there to registers in the operand's layout,
and are dequantized there, segment by segment (:mod:`..device.dequant`). No level is ever stored.

The loop is compiled for the widths of a head's keys. Heads of a model may have up to four kinds of them
(templates), and so the kernel up to four loops, of which a program runs one. A loop is 16 KB of instructions, so the
programs of a multiprocessor should run the same. Where there is one template, there is a second loop for splits
that a smaller tile holds whole.

K's scales touch the logits, V's the probabilities. What the loop leaves is merged in :mod:`.merge`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.address import block_base
from ..device.dependent import prefetch, wait_and_release
from ..device.dequant import segment_levels, segment_offset
from ..device.page_mean import page_bias, stored_at
from ..format.codec import V_SCALE_MAX
from ..format.columns import COLUMNS
from ..format.layout import BLOCK_SLOTS
from .splits import by_multiprocessor, find_split, request_splits
from .tree import bits_set, in_tree, seen_of_tree

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_COLUMNS = tl.constexpr(COLUMNS)
_SLOTS = tl.constexpr(BLOCK_SLOTS)
#: Probabilities are kept times 2 to this: the tail of a long softmax stays normal in float16, and the largest scale of
#: a value still fits. It costs nothing, since a fused operation takes logits and peak to the exponent.
_LIFT = tl.constexpr(6.0)
assert 2**_LIFT.value * V_SCALE_MAX < 65504
_LINE = tl.constexpr(16)  # float32 numbers that a look-up brings to the cache at least
THREAD_ROWS = tl.constexpr(8)  # of a product, that lie in different threads


@triton.constexpr_function
def pick(templates, i):
    """One of a tuple of constants. Triton 3.6 does not take ``templates[i]`` as an argument if that holds tuples."""
    return templates[i]


@triton.jit
def _load_bin(rows16, slot, byte, WORDS: tl.constexpr, ROW_BYTES: tl.constexpr, AXIS: tl.constexpr, NEAR: tl.constexpr):
    """The words of the bin at byte ``byte`` of each row, 16 columns along AXIS."""
    at = block_base(slot, ROW_BYTES // 2, NEAR) + slot % _SLOTS * WORDS
    word = tl.arange(0, WORDS)
    bins = tl.load(rows16 + byte * (_SLOTS // 2) + (tl.expand_dims(at, AXIS) + tl.expand_dims(word, 1 - AXIS)))
    REPEAT: tl.constexpr = _COLUMNS // WORDS
    if REPEAT > 1:
        # A word of a narrow bin once for every column that it serves: views, which cost nothing in registers.
        bins = tl.expand_dims(bins, AXIS)
        if AXIS == 1:
            TOKENS: tl.constexpr = bins.shape[0]
            bins = tl.reshape(tl.broadcast_to(bins, [TOKENS, REPEAT, WORDS]), [TOKENS, _COLUMNS])
        else:
            TOKENS: tl.constexpr = bins.shape[2]
            bins = tl.reshape(tl.broadcast_to(bins, [REPEAT, WORDS, TOKENS]), [_COLUMNS, TOKENS])
    return bins


@triton.jit
def load_words(
    rows16, slot, codes, BINS: tl.constexpr, ROW_BYTES: tl.constexpr, AXIS: tl.constexpr, NEAR: tl.constexpr = False
):
    """A tile of words for each bin of one head, the columns along AXIS.

    slot: where the tokens lie, uint32 or int64. codes: the head's first byte within the row. NEAR: see
    :func:`.address.block_base`.
    """
    words = ()
    for i in tl.static_range(len(BINS)):
        words += (_load_bin(rows16, slot, codes + BINS[i][0], BINS[i][1], ROW_BYTES, AXIS, NEAR),)
    return words


@triton.jit
def _prefetch_words(rows16, slot, codes, BINS: tl.constexpr, ROW_BYTES: tl.constexpr, NEAR: tl.constexpr):
    """Have what :func:`load_words` will ask for come to the cache."""
    for i in tl.static_range(len(BINS)):
        at = block_base(slot, ROW_BYTES // 2, NEAR) + slot % _SLOTS * BINS[i][1]
        prefetch(rows16 + (codes + BINS[i][0]) * (_SLOTS // 2) + at)


@triton.jit
def _scales_of(rows32, slot, scale_at, ROW_BYTES: tl.constexpr, NEAR: tl.constexpr):
    """Where the two scales of one head lie, as a word of 32 bits. The head's part is added to the slot's and not to the
    pointer, which would be two registers more."""
    return rows32 + (block_base(slot, ROW_BYTES // 4, NEAR) + (slot % _SLOTS + scale_at))


@triton.jit
def load_shifts(column_shifts, BINS: tl.constexpr):
    """Per bin, what precedes each column's bits in its word."""
    shifts = ()
    for i in tl.static_range(len(BINS)):
        # Loaded, not computed: the compiler moves a load's layout conversion out of the loop, and nothing else's.
        shifts += (tl.load(column_shifts + BINS[i][2] * _COLUMNS + tl.arange(0, _COLUMNS)),)
    return shifts


@triton.jit
def _within_threads(x):
    """``[N, M]`` to ``[8, M]``, the sum over what a thread holds of a product's column: no exchange, few registers."""
    return tl.sum(tl.reshape(x, [x.shape[0] // THREAD_ROWS, THREAD_ROWS, x.shape[1]]), 0)


@triton.jit
def cap_logits(logits, to_log2, CAP: tl.constexpr):
    """``CAP * tanh(logit / CAP)`` in base 2, of logits that ``to_log2 [M]`` takes there."""
    double = tl.exp2(logits * (to_log2 * (2.0 / CAP))[None, :])
    return (1.0 - 2.0 / (double + 1.0)) * (CAP * _LOG2E)


@triton.jit
def add_values(
    logits,
    to_log2,
    v_words,
    v_scale,
    v_shifts,
    acc,
    peak,
    total,
    weight,
    V_SEGMENTS: tl.constexpr,
    V_REPEAT: tl.constexpr,
    V_POLY: tl.constexpr,
    ASM: tl.constexpr,
):
    """A tile's values into the running softmax, by its logits ``[N, M]``: acc, peak, total, weight.

    to_log2 ``[M]``, positive: takes logits and the peak to base 2. acc: per segment of V ``[16, M]``. total ``[8, M]``:
    summed over tokens once, behind the loop. weight: of the values, where their codebook is linear.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 0))
    keep = tl.exp2((peak - new_peak) * to_log2)
    prob = tl.exp2(logits * to_log2[None, :] - (new_peak * to_log2 - _LIFT)[None, :])
    total = total * keep[None, :] + _within_threads(prob)
    weighted = (prob * v_scale[:, None]).to(tl.float16 if ASM else tl.float32)
    if len(V_POLY[0]) == 0:
        weight = weight * keep[None, :] + _within_threads(weighted.to(tl.float32))
    sums = ()
    for i in tl.static_range(len(V_SEGMENTS)):
        v = segment_levels(v_words, v_shifts, 0, i, V_SEGMENTS, V_REPEAT, V_POLY, ASM)
        sums += (tl.dot(v, weighted, acc[i] * keep[None, :], input_precision="ieee"),)
    return sums, new_peak, total, weight


@triton.jit
def store_split(
    acc,
    peak,
    total,
    weight,
    to_log2,
    row,
    live_row,
    partial_out,
    partial_lse,
    V_DIM: tl.constexpr,
    V_SEGMENTS: tl.constexpr,
    V_REPEAT: tl.constexpr,
    V_POLY: tl.constexpr,
    V_SLOPE: tl.constexpr,
):
    """What the loop leaves (see :func:`add_values`) to the partial results at ``row [M]``."""
    c = tl.arange(0, _COLUMNS)
    total = tl.sum(total, 0)
    seen_any = total > 0  # not where a query sees nothing of this split
    scale = tl.where(seen_any, 1.0 / tl.where(seen_any, total, 1.0), 0.0)
    weights = tl.sum(weight, 0)
    for i in tl.static_range(len(V_SEGMENTS)):
        to = row[None, :] * V_DIM + (c + i * _COLUMNS)[:, None]
        value = acc[i] - (weights * segment_offset(i, V_SEGMENTS, V_REPEAT, V_POLY))[None, :]
        tl.store(partial_out + to, value * (scale * V_SLOPE[i])[None, :], mask=live_row[None, :])
    lse = tl.where(seen_any, (peak * to_log2 + tl.log2(tl.where(seen_any, total, 1.0)) - _LIFT) * _LN2, float("-inf"))
    tl.store(partial_lse + row, lse, mask=live_row)


@triton.jit
def _slots_from(slots, at, end, BLOCK_N: tl.constexpr, NEAR: tl.constexpr):
    """Of a request's slots those of the tokens from ``at`` on, the last one's for tokens from ``end`` on."""
    slot = tl.load(slots + tl.minimum(at + tl.arange(0, BLOCK_N), end - 1))
    return slot.to(tl.uint32 if NEAR else tl.int64)


@triton.jit
def _attend_split(
    q,
    rows16,
    rows32,
    slots,
    column_shifts,
    means,
    tree,
    partial_out,
    partial_lse,
    to_log2,
    stride_qt,
    stride_qh,
    head,
    first_row,
    split,
    request,
    begin,
    end,
    length,
    ROW_BYTES: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    K_BINS: tl.constexpr,
    V_BINS: tl.constexpr,
    K_REPEAT: tl.constexpr,
    V_REPEAT: tl.constexpr,
    K_SEGMENTS: tl.constexpr,
    V_SEGMENTS: tl.constexpr,
    K_POLY: tl.constexpr,
    V_POLY: tl.constexpr,
    K_SLOPE: tl.constexpr,
    V_SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    NEAR: tl.constexpr,
    ASM: tl.constexpr,
):
    """Tokens ``begin .. end - 1`` of one request for one KV head, whose keys are of the given template."""
    m = first_row + tl.arange(0, BLOCK_M)
    live_row = m < QUERIES * GROUP
    query = m // GROUP
    j = head * GROUP + m % GROUP
    # A query sees the tokens up to its own; the last of the request is that of the last query.
    seen = length - (QUERIES - 1 - query)
    sees = seen_of_tree(tree, request * QUERIES + query, live_row)
    if tree is not None:
        seen = length - QUERIES + bits_set(sees, QUERIES)  # how many, and they are where a chain's would be
    c = tl.arange(0, _COLUMNS)
    q_at = (request * QUERIES + query).to(tl.int64) * stride_qt + j * stride_qh
    operand = tl.float16 if ASM else tl.float32
    # Each query is brought to at most 1 so that float16 holds it whatever the transform's gains.
    size = tl.zeros([_COLUMNS, BLOCK_M], tl.float32)
    raw = ()
    # From a tile's own border, so that a tile lies in one page. It is no tile more: a split that begins between two
    # borders is an odd number of half tiles.
    start_at = begin // BLOCK_N * BLOCK_N if PAGE > 0 else begin
    biases = tl.zeros([_COLUMNS, BLOCK_M], tl.float32)
    for i in tl.static_range(len(K_SEGMENTS)):
        part = tl.load(q + q_at[None, :] + (c + i * _COLUMNS)[:, None], mask=live_row[None, :], other=0.0)
        size = tl.maximum(size, tl.abs(part))
        raw += (part,)
        if PAGE > 0:
            mean_at = stored_at(start_at, head, HEADS, PAGE, PADDED)
            biases += part * tl.load(means + mean_at + i * _COLUMNS + c)[:, None]
    top = tl.max(size, 0)
    top = tl.where(top > 0, top, 1.0)
    qs = ()
    undo = tl.zeros([_COLUMNS, BLOCK_M], tl.float32)
    for i in tl.static_range(len(K_SEGMENTS)):
        part = (raw[i] * (K_SLOPE[i] / top)[None, :]).to(operand)
        # The logits of a key of offsets alone. A sum would do, but a second product of the query is what keeps the
        # compiler from changing the query's layout again for every tile: it moves what has one user to that user.
        offsets = tl.full([_COLUMNS, _COLUMNS], -segment_offset(i, K_SEGMENTS, K_REPEAT, K_POLY), operand)
        undo = tl.dot(offsets, part, undo, input_precision="ieee")
        qs += (part,)
    start = tl.max(undo, 0)  # all rows are the same
    to_log2 = top * to_log2
    # Capped logits are in base 2 already.
    out_log2 = to_log2 * 0.0 + 1.0 if CAP > 0 else to_log2

    k_shifts = load_shifts(column_shifts, K_BINS)
    v_shifts = load_shifts(column_shifts, V_BINS)

    acc = ()
    for _ in tl.static_range(len(V_SEGMENTS)):
        acc += (tl.zeros([_COLUMNS, BLOCK_M], tl.float32),)
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([THREAD_ROWS, BLOCK_M], tl.float32)
    weight = tl.zeros([THREAD_ROWS, BLOCK_M], tl.float32)  # of the values, where their codebook is linear
    inverse_top = 1.0 / top
    bias = tl.sum(biases, 0) * inverse_top  # what the page's mean gives, in units of the query's
    scale_at = (NORM_OFFSET + 4 * head) * (_SLOTS // 4)
    next_page = (start_at // PAGE + 1) * PAGE if PAGE > 0 else 0
    # A tile's slots are asked for a tile ahead of its words, so that nothing waits for an address.
    slot = _slots_from(slots, start_at, end, BLOCK_N, NEAR)
    for at in tl.range(start_at, end, BLOCK_N, num_stages=STAGES):
        n = at + tl.arange(0, BLOCK_N)
        k_words = load_words(rows16, slot, head * K_STRIDE, K_BINS, ROW_BYTES, 1, NEAR)
        scales = tl.load(_scales_of(rows32, slot, scale_at, ROW_BYTES, NEAR))
        v_words = load_words(rows16, slot, V_OFFSET + head * V_STRIDE, V_BINS, ROW_BYTES, 0, NEAR)
        slot = _slots_from(slots, at + BLOCK_N, end, BLOCK_N, NEAR)
        if PAGE > 0:
            if at >= next_page:
                mean_at = stored_at(at, head, HEADS, PAGE, PADDED)
                bias = page_bias(means, mean_at, q, q_at, live_row, DIM, PADDED) * inverse_top
                next_page += PAGE
        k_scale = (scales & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        v_scale = (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

        logits = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) + start[None, :]
        for i in tl.static_range(len(K_SEGMENTS)):
            k = segment_levels(k_words, k_shifts, 1, i, K_SEGMENTS, K_REPEAT, K_POLY, ASM)
            logits = tl.dot(k, qs[i], logits, input_precision="ieee")
        live = n < end
        if PAGE > 0:
            live = (n - begin).to(tl.uint32) < (end - begin).to(tl.uint32)
        if WINDOW > 0 and QUERIES == 1:
            live = live & (n >= length - WINDOW)
        rest = tl.where(live, 0.0, float("-inf"))[:, None]
        if PAGE > 0:
            rest = tl.where((live & (k_scale < 0))[:, None], bias[None, :], rest)
        logits = logits * k_scale[:, None] + rest
        if CAP > 0:
            logits = tl.where(live[:, None], cap_logits(logits, to_log2, CAP), float("-inf"))
        if QUERIES > 1:
            if tree is None:
                logits = tl.where(n[:, None] < seen[None, :], logits, float("-inf"))
            else:
                logits = tl.where(in_tree(n, length - QUERIES, sees), logits, float("-inf"))
            if WINDOW > 0:
                logits = tl.where(n[:, None] >= seen[None, :] - WINDOW, logits, float("-inf"))

        acc, peak, total, weight = add_values(
            logits, out_log2, v_words, v_scale, v_shifts, acc, peak, total, weight, V_SEGMENTS, V_REPEAT, V_POLY, ASM
        )

    row = (split.to(tl.int64) * QUERIES + query) * (HEADS * GROUP) + j
    store_split(
        acc,
        peak,
        total,
        weight,
        out_log2,
        row,
        live_row,
        partial_out,
        partial_lse,
        V_DIM,
        V_SEGMENTS,
        V_REPEAT,
        V_POLY,
        V_SLOPE,
    )


@triton.jit(
    do_not_specialize=["num_requests", "target", "num_multiprocessors"],
    do_not_specialize_on_alignment=["kv_indptr", "kv_indices"],
)
def decode_kernel(
    q,  # float32 [B * QUERIES, Hq, DIM], rotated
    rows16,  # the rows as int16 and int32
    rows32,
    kv_indptr,
    kv_indices,
    column_shifts,  # int32 [4, 16]: for 1, 2, 4 and 8 columns per word
    k_kinds,  # int32 [H], each head's template; None where there is one
    k_order,  # int32 [H], the heads by their templates; None where there is one
    means,  # [pages, H, PADDED], in stored channels (..device.page_mean); None where keys have none
    tree,  # int32 [B * QUERIES], which of the last QUERIES tokens each query sees (.tree); None: those up to its own
    partial_out,  # float16 or float32 [splits, QUERIES, Hq, V_DIM]
    partial_lse,  # float32 [splits, QUERIES, Hq]
    num_requests,
    target,
    num_multiprocessors,
    to_log2,
    stride_qt,
    stride_qh,
    ROW_BYTES: tl.constexpr,
    K_STRIDE: tl.constexpr,  # bytes of a head's codes
    V_STRIDE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAGE: tl.constexpr,  # positions of a page; 0: keys have no means
    PADDED: tl.constexpr,  # channels, a power of two
    WINDOW: tl.constexpr,  # tokens that a query sees; 0: all up to its own
    CAP: tl.constexpr,  # of the logits; 0: none
    # What begins with K_ is a tuple over templates, of what V has once.
    K_BINS: tl.constexpr,
    V_BINS: tl.constexpr,  # (byte, words, log2 of the columns per word)
    K_REPEAT: tl.constexpr,
    V_REPEAT: tl.constexpr,
    K_SEGMENTS: tl.constexpr,  # pieces of each segment, (bin, shift, width, position) after one another
    V_SEGMENTS: tl.constexpr,
    K_POLY: tl.constexpr,  # the codebook of each segment without its slope, empty where it is linear
    V_POLY: tl.constexpr,
    K_SLOPE: tl.constexpr,  # of each segment's codebook
    V_SLOPE: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,  # tokens of a tile, ascending: a split that the first holds whole takes that, others the last
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,  # tokens of a split that are asked for before the wait
    NEAR: tl.constexpr,  # whether 32 bits are enough to count the pool's 16-bit words in
    ASM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    SPAN: tl.constexpr = WINDOW + QUERIES - 1 if WINDOW > 0 else 0
    if len(K_SEGMENTS) == 1:
        kind = 0
        head = tl.program_id(0) % HEADS
        tile = tl.program_id(0) // HEADS
        split = tl.program_id(1)
    else:
        _, count = request_splits(kv_indptr, num_requests, target, REQUESTS, SPAN)
        splits, tiles = tl.maximum(tl.sum(count, 0), 1), tl.num_programs(0) // HEADS
        program, total = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), splits * tl.num_programs(0)
        place = by_multiprocessor(program, total, num_multiprocessors)
        head = tl.load(k_order + tl.minimum(place // (splits * tiles), HEADS - 1))
        kind = tl.load(k_kinds + head)
        tile = place // splits % tiles
        split = tl.where(program < total, place % splits, 1 << 30)
    first_row = tile * BLOCK_M
    request, begin, end = find_split(kv_indptr, num_requests, target, split, REQUESTS, SPAN)
    live = request < num_requests
    kv_start = tl.load(kv_indptr + request, mask=live, other=0).to(tl.int64)
    length = (tl.load(kv_indptr + request + 1, mask=live, other=0) - kv_start).to(tl.int32)
    end = tl.minimum(end, length)
    slots = kv_indices + kv_start
    # What has nothing to do makes room for what waits. One program always waits, and with it the next kernel.
    if not live:
        if tl.program_id(0) + tl.program_id(1) > 0:
            return
    if DEPENDENT:
        # Slots are as old as lengths, and so are all rows but the newest token's, of which the cache stays true.
        for at in tl.static_range(0, PREFETCH, TILES[0]):
            if begin + at < end:
                slot = _slots_from(slots, begin + at, end, TILES[0], NEAR)
                _prefetch_words(rows16, slot, head * K_STRIDE, pick(K_BINS, 0), ROW_BYTES, NEAR)
                _prefetch_words(rows16, slot, V_OFFSET + head * V_STRIDE, V_BINS, ROW_BYTES, NEAR)
                prefetch(_scales_of(rows32, slot, (NORM_OFFSET + 4 * head) * (_SLOTS // 4), ROW_BYTES, NEAR))
        if PAGE > 0 and begin < end:
            lines = tl.arange(0, PADDED // _LINE) * _LINE
            prefetch(means + stored_at(begin, head, HEADS, PAGE, PADDED) + lines)
    wait_and_release(DEPENDENT)
    if not live:
        return

    # A loop for each template and tile: which one runs is known to the whole program before its first tile.
    short = end - begin <= TILES[0]
    for i in tl.static_range(len(K_SEGMENTS)):
        if len(K_SEGMENTS) == 1 or kind == i:
            for t in tl.static_range(len(TILES)):
                if len(TILES) == 1 or short == (t == 0):
                    _attend_split(
                        q, rows16, rows32, slots, column_shifts, means, tree, partial_out, partial_lse, to_log2,
                        stride_qt, stride_qh, head, first_row, split, request, begin, end, length,
                        ROW_BYTES, K_STRIDE, V_STRIDE, V_OFFSET, NORM_OFFSET, HEADS, GROUP, QUERIES, DIM, V_DIM,
                        PAGE, PADDED, WINDOW, CAP, pick(K_BINS, i), V_BINS, pick(K_REPEAT, i), V_REPEAT,
                        pick(K_SEGMENTS, i), V_SEGMENTS, pick(K_POLY, i), V_POLY, pick(K_SLOPE, i), V_SLOPE,
                        BLOCK_M, TILES[t], STAGES, NEAR, ASM,
                    )  # fmt: skip
