"""Every kernel in plain PyTorch. Slow and plain: what is computed here is the definition.

Shapes: T tokens, H KV heads, Hq = G * H query heads, D head_dim, Dv v_head_dim.
Query head j belongs to KV head ``j // G``. Source: TurboQuant-MSE as used by Block-GTQ
(arXiv 2606.24033), with one transform per head and scales per norm group.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from .format.codebook import boundaries, codebook_table
from .format.codec import NO_SEARCH, SCALE_MAX, V_SCALE_MAX, LayerCodec
from .format.layout import CodeLayout
from .format.pack import pack, unpack
from .format.page_mean import residual, signed
from .terms import PLAIN, Terms


def _count_below(x: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Number of thresholds below each element, uint8: the index of the nearest level."""
    if len(thresholds) > 15:
        return torch.bucketize(x.contiguous(), thresholds, out_int32=True).to(torch.uint8)
    count = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)  # far faster than a search per element
    for threshold in thresholds:
        count += x > threshold
    return count


def _nearest(unit: torch.Tensor, layout: CodeLayout, member: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) and codewords of ``unit [..., D]`` in the channels of ``member [D]``; zero elsewhere."""
    codes = torch.zeros(unit.shape, dtype=torch.uint8, device=unit.device)
    value = torch.zeros_like(unit)
    for start, stop, bits in layout.groups:
        if bits and bool(member[start:stop].any()):
            book = codebook_table(unit.device)[bits, : 1 << bits]
            code = _count_below(unit[..., start:stop], boundaries(book))
            codes[..., start:stop] = code
            value[..., start:stop] = book.index_select(0, code.flatten().int()).view(code.shape)
    return codes * member, value * member


def corrected_scale(rule: str, yy: torch.Tensor, yc: torch.Tensor, cc: torch.Tensor) -> torch.Tensor:
    """The corrected scale from weighted sums of y*y, y*c and c*c; see codec.SCALE_RULES."""
    return (yy / cc).sqrt() if rule == "norm" else yy / yc


def quantize(
    y: torch.Tensor,
    layout: CodeLayout,
    scale_rule: str = "norm",
    scale_search: tuple[float, ...] = NO_SEARCH,
    weight: torch.Tensor | None = None,
    scale_max: float = SCALE_MAX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes and corrected scales of transformed vectors.

    y ``[..., D]`` float32; weight broadcastable to y, or None (ones).
    Returns codes ``[..., D]`` uint8 and scales ``[..., num_norms]`` float16, with
    ``y ~ scale[norm_index] * level[code]``. A zero vector gives scale zero.
    """
    y = y.float()
    weight = torch.ones_like(y) if weight is None else weight
    index = torch.tensor(layout.norm_index, device=y.device)
    stored = torch.tensor(layout.widths, device=y.device) > 0
    factors = torch.tensor(scale_search, device=y.device).view(-1, *[1] * (y.dim() - 1))
    codes = torch.zeros(y.shape, dtype=torch.uint8, device=y.device)
    scales = []
    for n in range(layout.num_norms):
        member = (index == n) & stored
        # float64: the packed bytes must not depend on the batch a token came in with.
        square = (y * member).double().square().sum(-1)
        rms = (square / member.sum().clamp(min=1)).sqrt().float()
        live = rms > 0
        unit = torch.where(live, rms, 1.0) * factors
        trial, value = _nearest(y / unit[..., None], layout, member)
        w = weight * member
        yy, yc, cc = (w * y * y).sum(-1), (w * y * value).sum(-1), (w * value * value).sum(-1)
        scale = corrected_scale(scale_rule, yy, yc, cc)
        # As squared residuals: the expanded square cancels in float32 from 6 bits on and picks a worse factor.
        residual = y - scale[..., None] * value
        best = (w * residual * residual).sum(-1).argmin(0, keepdim=True)
        codes |= trial.gather(0, best[..., None].expand(1, *y.shape))[0]
        scales.append(torch.where(live, scale.gather(0, best)[0], 0.0))
    return codes, torch.stack(scales, -1).clamp(max=scale_max).to(torch.float16)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, layout: CodeLayout) -> torch.Tensor:
    """Codes ``[..., D]`` and scales ``[..., num_norms]`` back to transformed vectors ``[..., D]`` float32."""
    levels, value = codebook_table(codes.device), torch.zeros(codes.shape, device=codes.device)
    for start, stop, bits in layout.groups:
        if bits:
            part = codes[..., start:stop].int()
            value[..., start:stop] = levels[bits].index_select(0, part.flatten()).view(part.shape)
    if layout.num_norms == 1:
        return value * scales[..., :1].float()
    index = torch.tensor(layout.norm_index, device=codes.device)
    return value * scales.float()[..., index]


def _transform(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``[T, H, D]`` by per-head ``[H, D', D]`` in float64: independent of T to the last float32 bit."""
    return torch.einsum("thd,hed->the", x.double(), matrix.double()).float()


def encode(codec: LayerCodec, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Post-RoPE keys ``[T, H, D]`` and values ``[T, H, Dv]`` to packed rows ``[T, row_bytes]`` uint8.

    positions ``[T]``: the tokens', which a codec with a page mean needs.
    """
    row = codec.layout
    out = torch.zeros(k.shape[0], row.row_bytes, dtype=torch.uint8, device=k.device)
    k_codes = out[:, : row.v_offset].view(-1, row.heads, row.k_code_bytes)
    v_end = row.v_offset + row.heads * row.v_code_bytes
    v_codes = out[:, row.v_offset : v_end].view(-1, row.heads, row.v_code_bytes)
    norms = torch.zeros(k.shape[0], row.heads, row.norms, dtype=torch.float16, device=k.device)

    y = _transform(k, codec.k_in)
    if codec.mean is not None:
        y, flags = residual(y, _transform(codec.mean.at(positions), codec.k_in), codec.k_weight)
    if row.uniform_heads and row.k[0].num_norms == 1:
        heads = [(slice(None), row.k[0])]
    else:
        heads = [(slice(h, h + 1), layout) for h, layout in enumerate(row.k)]
    for h, layout in heads:
        codes, scales = quantize(y[:, h], layout, codec.scale_rule, codec.scale_search, codec.k_weight[h])
        k_codes[:, h, : layout.code_bytes] = pack(layout, codes, row.in_columns)
        norms[:, h, : layout.num_norms] = scales
    if codec.mean is not None:
        norms[..., 0] = signed(norms[..., 0], flags)

    y = _transform(v, codec.v_in)
    codes, scales = quantize(y, row.v, codec.scale_rule, codec.scale_search, scale_max=V_SCALE_MAX)
    v_codes[:] = pack(row.v, codes, row.in_columns)
    norms[:, :, row.k_norms :] = scales
    out[:, row.norm_offset : row.pad_offset] = norms.flatten(1).view(torch.uint8)
    return out


def scales_of(codec: LayerCodec, rows: torch.Tensor) -> torch.Tensor:
    """Scales ``[T, H, norms]`` float16 of packed rows. A key's is negative where it is flagged (format.page_mean)."""
    row = codec.layout
    data = rows[:, row.norm_offset : row.pad_offset].contiguous().view(torch.float16)
    return data.view(-1, row.heads, row.norms)


def decode_transformed(codec: LayerCodec, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[T, row_bytes]`` to K ``[T, H, D]`` and V ``[T, H, Dv]`` in stored channels, float32.

    This is what attention reads: the query comes to the codes, not the codes to the query. Flagged keys are less their
    page's mean.
    """
    row = codec.layout
    norms = scales_of(codec, rows)
    k_bytes = rows[:, : row.v_offset].view(-1, row.heads, row.k_code_bytes)
    v_end = row.v_offset + row.heads * row.v_code_bytes
    v_bytes = rows[:, row.v_offset : v_end].view(-1, row.heads, row.v_code_bytes)
    if row.uniform_heads:
        layout = row.k[0]
        k = dequantize(unpack(layout, k_bytes, row.in_columns), norms[..., : layout.num_norms], layout)
    else:
        k = torch.stack(
            [
                dequantize(unpack(layout, k_bytes[:, h], row.in_columns), norms[:, h, : layout.num_norms], layout)
                for h, layout in enumerate(row.k)
            ],
            dim=1,
        )
    v = dequantize(unpack(row.v, v_bytes, row.in_columns), norms[..., row.k_norms :], row.v)
    return k, v


def decode(
    codec: LayerCodec, rows: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[T, row_bytes]`` to approximate keys ``[T, H, D]`` and values ``[T, H, Dv]``, float32.

    positions ``[T]``: as :func:`encode` takes them.
    """
    k, v = decode_transformed(codec, rows)
    # q_in is the inverse transpose of k_in, so its transpose undoes k_in.
    k, v = torch.einsum("the,hed->thd", k, codec.q_in), torch.einsum("the,hde->thd", v, codec.v_out)
    if codec.mean is not None:
        flags = scales_of(codec, rows)[..., :1] < 0
        k = k + torch.where(flags, codec.mean.at(positions), 0.0)
    return k, v


def round_trip(
    codec: LayerCodec, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as they will be read back."""
    return decode(codec, encode(codec, k, v, positions), positions)


def page_bias(codec: LayerCodec, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What queries ``[M, H, G, D]`` get of the page means of one request's ``rows [N, row_bytes]``: ``[H, G, M, N]``.

    A row's position is its place in the request.
    """
    if codec.mean is None:
        raise ValueError("codec: its keys have no page means")
    flags = scales_of(codec, rows)[..., 0] < 0
    pages = torch.arange(len(rows), device=rows.device) // codec.mean.page
    means = codec.mean.first_pages(int(pages.max()) + 1)
    of_page = torch.einsum("mhgd,phd->hgmp", q.float(), means)
    return of_page[..., pages] * flags.T[:, None, None]


def gather_slots(
    req_to_token: torch.Tensor, requests: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kv_indptr [B + 1]`` and ``kv_indices``: the first ``lengths [B]`` slots of the rows ``requests [B]``."""
    slots = [req_to_token[row, :n] for row, n in zip(requests.tolist(), lengths.tolist(), strict=True)]
    indptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return indptr, torch.cat(slots) if slots else req_to_token.new_empty(0)


def recent_step(
    first: torch.Tensor, top: int, window: int, ring: int, room: int, requests: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The row of copies of each request ``[B]`` or -1, the position of its token, and how many tokens are exact: the
    last ``window`` of its ``lengths [B]``, but none before ``first [R]`` (:class:`.decode.recent.Recent`); its own
    token is, with copies or without. And the place where that token is kept: of its row of ``ring`` places, or behind
    all rows for the first ``room`` requests, or -1."""
    rows = top - requests
    rows = torch.where((rows >= 0) & (rows < len(first)), rows, -1)
    exact = torch.where(rows >= 0, lengths - first[rows.clamp(min=0)], 1).clamp(1, window)
    behind = torch.arange(len(rows), device=rows.device)
    behind = torch.where(behind < room, len(first) * ring + behind, -1)
    place = torch.where(rows >= 0, rows * ring + (lengths - 1) % ring, behind)
    return rows, lengths - 1, torch.minimum(exact, lengths), torch.where(lengths > 0, place, -1)


def remember(
    first: torch.Tensor,
    top: int,
    k_copies: torch.Tensor,
    v_copies: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    requests: torch.Tensor,
    prefix_lens: torch.Tensor,
    qo_indptr: torch.Tensor,
) -> None:
    """See :meth:`.decode.recent.RecentLayer.remember`; k_copies ``[R, P, H, D]``, v_copies ``[R, P, H, Dv]``."""
    ring, indptr = k_copies.shape[1], qo_indptr.tolist()
    for b, (request, before) in enumerate(zip(requests.tolist(), prefix_lens.tolist(), strict=True)):
        row, begin, end = top - request, indptr[b], indptr[b + 1]
        if not 0 <= row < len(first) or begin == end:
            continue
        first[row] = before
        last = slice(max(begin, end - ring), end)
        places = (before + torch.arange(last.start - begin, end - begin, device=k.device)) % ring
        k_copies[row, places], v_copies[row, places] = k[last], v[last]


def apply_rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """``x [T, H, D]`` with its first R channels turned by ``angles [T, R]``, cosines and then sines: channel i with
    i + R / 2; in x's dtype."""
    rotary = angles.shape[1]
    cos, sin = angles.float()[:, None].chunk(2, -1)
    a, b = x[..., :rotary].float().chunk(2, -1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., rotary:]], -1)


def recent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_copies: torch.Tensor,
    v_copies: torch.Tensor,
    step: torch.Tensor,
    sm_scale: float,
    terms: Terms = PLAIN,
    q_len: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``q [B * q_len, Hq, D]`` of a step, ``q_len`` of each request, against their exact tokens: of those of
    the queries, k ``[B * q_len, H, D]`` and v ``[B * q_len, H, Dv]``, the request's own up to itself, and the copies
    before the first. step ``[4, B]``: as :func:`recent_step` gives it, of the first.

    Returns out ``[B * q_len, Hq, Dv]`` and lse ``[B * q_len, Hq]`` float32, without sinks; zeros and -inf where none is
    exact. The step's tokens are copied; several of a request only where it has a row.
    """
    heads, ring = k.shape[1], k_copies.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2], device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    for b, (row, position, count, place) in enumerate(step.T.tolist()):
        before = torch.arange(position + 1 - max(count, 1), position, device=q.device) % ring
        own = range(b * q_len, (b + 1) * q_len)
        for i in own if count else ():
            keys = torch.cat([k_copies[row, before], k[own[0] : i + 1]])
            values = torch.cat([v_copies[row, before], v[own[0] : i + 1]])
            grouped = q[i].float().unflatten(0, (heads, -1))
            logits = torch.einsum("hgd,nhd->hgn", grouped, keys.float()) * sm_scale
            o, l = _softmax_attend(terms.capped(logits)[:, :, None], values.float())
            out[i], lse[i] = o[0].flatten(0, 1), l[0].flatten()
        for i in own:
            if q_len > 1:
                place = row * ring + (position + i - own[0]) % ring if row >= 0 else -1
            if place >= 0:
                k_copies.flatten(0, 1)[place], v_copies.flatten(0, 1)[place] = k[i], v[i]
    return out, lse


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact merge of two partial attentions over disjoint keys. out ``[..., Dv]``, lse ``[...]`` (natural log)."""
    top = torch.maximum(lse_a, lse_b)
    safe = torch.where(top == -torch.inf, 0.0, top)
    a, b = torch.exp(lse_a - safe), torch.exp(lse_b - safe)
    total = a + b
    out = (out_a * a[..., None] + out_b * b[..., None]) / torch.where(total > 0, total, 1.0)[..., None]
    return out, safe + torch.log(total)


def _softmax_attend(logits: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits ``[H, G, M, N]`` (-inf = masked), v ``[N, H, Dv]`` to out ``[M, H, G, Dv]`` and lse ``[M, H, G]``."""
    lse = torch.logsumexp(logits, -1)
    prob = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return torch.einsum("hgmn,nhd->mhgd", prob, v), lse.permute(2, 0, 1)


def prefix_attention(
    codec: LayerCodec,
    q: torch.Tensor,
    rows: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    sm_scale: float,
    terms: Terms = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query of a request against its packed rows (no causal mask: the prefix lies before the queries).

    q ``[T, Hq, D]``; rows ``[kv_indptr[-1], row_bytes]`` uint8, request after request, each from its position 0;
    qo_indptr, kv_indptr ``[B + 1]``. Returns out ``[T, Hq, Dv]`` float32 and lse ``[T, Hq]`` float32 (natural log; -inf
    and zeros for an empty prefix), without the sinks of ``terms``. Its window begins at the first query's place behind
    the prefix.
    """
    heads = codec.layout.heads
    group = q.shape[1] // heads
    out = torch.zeros(q.shape[0], q.shape[1], codec.v_head_dim, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    qo, kv = qo_indptr.tolist(), kv_indptr.tolist()
    for b in range(len(qo) - 1):
        if qo[b] == qo[b + 1] or kv[b] == kv[b + 1]:
            continue
        k, v = decode_transformed(codec, rows[kv[b] : kv[b + 1]])
        qb = q[qo[b] : qo[b + 1]].float().unflatten(1, (heads, group))
        q_in = torch.einsum("mhgd,hed->mhge", qb, codec.q_in)
        logits = torch.einsum("mhge,nhe->hgmn", q_in, k)
        if codec.mean is not None:
            logits = logits + page_bias(codec, qb, rows[kv[b] : kv[b + 1]])
        logits = terms.capped(logits * sm_scale)
        if terms.window:
            own = kv[b + 1] - kv[b] + torch.arange(len(qb), device=q.device)
            before = torch.arange(kv[b + 1] - kv[b], device=q.device) <= own[:, None] - terms.window
            logits = logits.masked_fill(before, -torch.inf)
        o, l = _softmax_attend(logits, v)
        o = torch.einsum("mhge,hde->mhgd", o, codec.v_out)
        out[qo[b] : qo[b + 1]] = o.flatten(1, 2)
        lse[qo[b] : qo[b + 1]] = l.flatten(1, 2)
    return out, lse


def seen_rows(kv_indptr: torch.Tensor, q_len: int, tree: torch.Tensor | None) -> list[slice | list[int]]:
    """Which rows each of the ``B * q_len`` queries sees: see :func:`decode_attention`."""
    out: list[slice | list[int]] = []
    for r, (a, b) in enumerate(pairwise(kv_indptr.tolist())):
        if tree is None:
            out += [slice(a, max(a, b - later)) for later in reversed(range(q_len))]
            continue
        first = b - q_len
        for bits in tree[r * q_len : (r + 1) * q_len].tolist():
            out.append([*range(a, first), *(i for i in range(max(a, first), b) if bits >> i - first & 1)])
    return out


def decode_attention(
    codec: LayerCodec,
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_indptr: torch.Tensor,
    sm_scale: float,
    q_len: int = 1,
    terms: Terms = PLAIN,
    tree: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q_len`` queries ``[B * q_len, Hq, D]`` of each request against its packed rows.

    The queries are the request's last tokens: each sees the rows up to its own, or of a tree those of its bits
    (:func:`read_tree`) behind all before the tree. See :func:`prefix_attention`, but out has the sinks of ``terms``.
    """
    seen = [rows[which] for which in seen_rows(kv_indptr, q_len, tree)]
    indptr = torch.tensor([0, *accumulate(map(len, seen))])
    qo_indptr = torch.arange(q.shape[0] + 1)
    # A query's own row is the last of its prefix.
    before = replace(terms, window=terms.window and terms.window + 1)
    out, lse = prefix_attention(codec, q, torch.cat(seen), qo_indptr, indptr, sm_scale, before)
    return terms.with_sinks(out, lse), lse


def read_tree(
    mask: torch.Tensor, lengths: torch.Tensor, q_len: int, full: bool, page: int = 0, nowhere: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits int32 and positions int64 ``[B * q_len]`` of trees: see :class:`.decode.tree.Tree`."""
    bits, positions, at = [], [], 0
    for length in lengths.tolist():
        width = length + q_len if full else q_len
        block = mask[at : at + q_len * width].view(q_len, width)[:, width - q_len :].bool()
        at += q_len * width
        for i, row in enumerate(block.tolist()):
            bits.append(sum(1 << j for j, seen in enumerate(row) if seen))
            position = length + sum(row) - 1
            positions.append(nowhere if page and position // page != (length + i) // page else position)
    signed = [x - (1 << 32) if x >> 31 else x for x in bits]
    return torch.tensor(signed, dtype=torch.int32), torch.tensor(positions)


def chunk_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qo_indptr: torch.Tensor, sm_scale: float, terms: Terms = PLAIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of each request's new tokens to themselves, dense.

    q ``[T, Hq, D]``, k ``[T, H, D]``, v ``[T, H, Dv]``, qo_indptr ``[B + 1]``.
    Returns out ``[T, Hq, Dv]`` and lse ``[T, Hq]`` as :func:`prefix_attention` does.
    """
    heads = k.shape[1]
    group = q.shape[1] // heads
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    qo = qo_indptr.tolist()
    for a, b in zip(qo, qo[1:], strict=False):
        if a == b:
            continue
        qb = q[a:b].float().unflatten(1, (heads, group))
        logits = terms.capped(torch.einsum("mhgd,nhd->hgmn", qb, k[a:b].float()) * sm_scale)
        ones = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device)
        unseen = ones.triu(1) | ones.tril(-terms.window) if terms.window else ones.triu(1)
        o, l = _softmax_attend(logits.masked_fill(unseen, -torch.inf), v[a:b].float())
        out[a:b], lse[a:b] = o.flatten(1, 2), l.flatten(1, 2)
    return out, lse


def extend_attention(
    codec: LayerCodec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    sm_scale: float,
    terms: Terms = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens against their packed prefix ``rows`` plus, causally, themselves.

    k, v are the chunk's own keys and values as it shall see them: raw, or after
    :func:`round_trip` for answers that do not depend on how a prompt was cut.
    """
    prefix = prefix_attention(codec, q, rows, qo_indptr, kv_indptr, sm_scale, terms)
    chunk = chunk_attention(q, k, v, qo_indptr, sm_scale, terms)
    out, lse = merge_states(*prefix, *chunk)
    return terms.with_sinks(out, lse), lse
