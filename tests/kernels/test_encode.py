"""Encode in Triton against the reference."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.device.rotate import rotate_queries
from sglang_blockgtq.kernels.encode import encoder
from sglang_blockgtq.kernels.encode.encoder import Encoder
from sglang_blockgtq.kernels.encode.plan import Cells, EncodePlan, _thresholds, split_bfloat16
from sglang_blockgtq.kernels.format.codebook import boundaries, codebook_table, levels, polynomial
from sglang_blockgtq.kernels.format.codec import NO_SEARCH, SCALE_MAX, V_SCALE_MAX
from sglang_blockgtq.kernels.format.layout import gather_rows
from sglang_blockgtq.kernels.format.pack import pack, unpack

from .matrix import (
    CUT,
    DEVICE,
    EVERY,
    HANDMADE,
    IN_COLUMNS,
    LARGE,
    MEAN_CASES,
    MEANS,
    PRODUCT,
    TEMPLATE,
    TEMPLATES,
    WIDE,
    Case,
    Data,
    data,
    encoder_of,
    make_tables,
    over,
    relative_error,
)

LLAMA, LARGE_HALF, LARGE_MEANS, LARGE_ANY = LARGE[0], LARGE[3], LARGE[8], LARGE[-1]
#: bfloat16 takes a matrix of its own, in two pieces.
BFLOAT16 = replace(TEMPLATE, dtype="bfloat16")
#: Both kernels of rows in columns, and the number of channels up to which the one for a few tokens is chosen.
KERNELS = {"many": 0, "few": 1 << 30}


#: Tokens of a case that a kernel encodes; in the interpreter some are slow.
MOST = {"many": 1 << 30, "few": 12, "any": 8} if DEVICE == "cpu" else dict.fromkeys(("many", "few", "any"), 1 << 30)


def kernels_of(case: Case) -> list[str]:
    return list(KERNELS) if data(case).codec.layout.in_columns else ["any"]


def codes_and_scales(d: Data, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All stored codes ``[T, H * (D + Dv)]`` and scales ``[T, H * norms]`` of rows."""
    row = d.codec.layout
    parts = []
    for h, layout in enumerate(row.k):
        parts.append(unpack(layout, rows[:, h * row.k_code_bytes :], row.in_columns))
        parts.append(unpack(row.v, rows[:, row.v_offset + h * row.v_code_bytes :], row.in_columns))
    return torch.cat(parts, -1), rows[:, row.norm_offset : row.pad_offset].contiguous().view(torch.float16)


def chosen(case: Case, kernel: str) -> torch.Tensor:
    """Which tokens of a case a kernel encodes: all, or some of all of its pages."""
    tokens = sum(case.lengths)
    return torch.arange(0, tokens, -(-tokens // MOST[kernel]), device=DEVICE)


def tokens_of(d: Data, which: torch.Tensor | slice) -> list[torch.Tensor]:
    """Keys, values, slots and positions."""
    return [x[which] for x in (d.k, d.v, d.kv_indices, d.positions)]


def run(d: Data, tokens: list[torch.Tensor], kernel: str = "many", *queries: torch.Tensor) -> torch.Tensor:
    """A pool that held 0xFF in every byte, after the kernel encoded these tokens."""
    storage = torch.full_like(d.rows, 255)
    usual = encoder.FEW_CHANNELS
    encoder.FEW_CHANNELS = KERNELS.get(kernel, usual)
    try:
        encoder_of(d.tables, storage)(*tokens, *queries)
    finally:
        encoder.FEW_CHANNELS = usual
    return storage


def rows_at(d: Data, storage: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return gather_rows(d.codec.layout, storage, slots.long())


@cache
def encoded(case: Case, kernel: str) -> torch.Tensor:
    """The pool after the kernel encoded its tokens of the case."""
    d = data(case)
    return run(d, tokens_of(d, chosen(case, kernel)), kernel)


@over([*MEAN_CASES, *LARGE[8:10]])
def test_every_kernel_encodes_keys_with_and_without_their_mean(case):
    """What the other tests stand on: both kinds, in more pages than one."""
    d = data(case)
    for kernel in KERNELS:
        part = chosen(case, kernel)
        flags = reference.scales_of(d.codec, d.packed[part])[..., 0] < 0
        for page in range(2):
            mine = flags[d.positions[part] // case.page == page]
            assert bool(mine.any()) and not bool(mine.all())


@over([*EVERY, BFLOAT16])
def test_matches_reference(case):
    d = data(case)
    row = d.codec.layout
    for kernel in kernels_of(case):
        storage, part = encoded(case, kernel), chosen(case, kernel)
        slots, packed = d.kv_indices[part], d.packed[part]
        want_codes, want_scales = codes_and_scales(d, packed)
        got = rows_at(d, storage, slots)
        untouched = torch.ones(len(storage), dtype=torch.bool, device=DEVICE)
        untouched[slots.long()] = False
        assert bool(untouched.any())
        assert bool((rows_at(d, storage, untouched.nonzero()[:, 0]) == 255).all())

        codes, scales = codes_and_scales(d, got)
        assert (codes != want_codes).double().mean() < 5e-3
        assert ((scales < 0) != (want_scales < 0)).double().mean() < 1e-4  # flags
        same = (codes == want_codes).all(-1)
        assert bool(same.double().mean() > 0.9)
        torch.testing.assert_close(scales[same].float(), want_scales[same].float(), rtol=2e-3, atol=1e-7)
        if kernel == "any":  # what nobody reads nor writes: of a new pool it is zero
            codes_end = row.v_offset + row.heads * row.v_code_bytes
            for gap in (slice(codes_end, row.norm_offset), slice(row.pad_offset, None)):
                assert bool((got[:, gap] == 255).all())
                got[:, gap] = 0
        # Padding, and the code bytes and scales that a head with fewer of them leaves over, are zero.
        used = reference.encode(d.codec, torch.randn_like(d.k), torch.randn_like(d.v), d.positions) | d.packed
        assert bool((got[:, ~used.bool().any(0)] == 0).all())

        both = (reference.decode(d.codec, rows, d.positions[part]) for rows in (got, packed))
        for a, b, x in zip(*both, (d.k[part], d.v[part]), strict=True):
            assert relative_error(a, b) < 1e-2
            assert relative_error(a, x) == pytest.approx(relative_error(b, x), rel=1e-3)


@over(MEAN_CASES[1:3])
def test_both_kernels_write_the_same_rows(case):
    """A flag or a mean's rounding to the model's type that differed would change every code. On a GPU the products
    differ by rounding, and so do a few codes on thresholds."""
    d, slots = data(case), data(case).kv_indices[chosen(case, "few")]
    few, many = (rows_at(d, encoded(case, kernel), slots) for kernel in KERNELS)
    if DEVICE == "cpu":
        assert torch.equal(few, many)
    (codes, scales), (want, want_scales) = codes_and_scales(d, few), codes_and_scales(d, many)
    assert (codes != want).double().mean() < 1e-3
    assert torch.equal(scales < 0, want_scales < 0)


@over(
    [
        case
        for case in (*IN_COLUMNS, HANDMADE, *LARGE[:4])
        if case.allocator.startswith(("template", "handmade")) and case not in MEAN_CASES[1:]
    ]
)
def test_exact_where_codes_are_well_separated(case):
    """Tokens whose codes survive a disturbance many times that of rounding have the reference's codes exactly.

    Not for free widths: in a group of two channels of equal size every factor of the scale search ties.
    """
    d = data(case)
    want, want_scales = codes_and_scales(d, d.packed)
    generator = torch.Generator(DEVICE).manual_seed(0)
    stable = torch.ones(len(want), dtype=torch.bool, device=DEVICE)
    size = 3e-5 if case.dtype == "bfloat16" else 1e-5  # bfloat16 is multiplied by a matrix in pieces
    for _ in range(4):
        noise = [torch.randn(x.shape, generator=generator, device=DEVICE, dtype=torch.float64) for x in (d.k, d.v)]
        for sign in (1, -1):  # whichever side of the value a threshold lies on
            k, v = (
                x.double() + sign * size * x.double().square().mean((1, 2), keepdim=True).sqrt() * n
                for x, n in zip((d.k, d.v), noise, strict=True)
            )
            stable &= (codes_and_scales(d, reference.encode(d.codec, k, v, d.positions))[0] == want).all(-1)
    assert stable.double().mean() > 0.3
    ulp = torch.finfo(torch.float16).eps
    for kernel in kernels_of(case):
        part = chosen(case, kernel)
        sure = stable[part]
        codes, scales = codes_and_scales(d, rows_at(d, encoded(case, kernel), d.kv_indices[part]))
        assert torch.equal(codes[sure], want[part][sure])
        torch.testing.assert_close(scales[sure].float(), want_scales[part][sure].float(), rtol=ulp, atol=6e-8)


@over([TEMPLATE, HANDMADE, MEANS, LLAMA, LARGE_MEANS, LARGE_ANY])
def test_a_token_does_not_depend_on_its_batch(case):
    d = data(case)
    for kernel in kernels_of(case):
        batch, part = encoded(case, kernel), chosen(case, kernel)
        assert torch.equal(run(d, tokens_of(d, part.flip(0)), kernel), batch)
        for token in part[[0, 7]]:
            alone = run(d, tokens_of(d, token[None]), kernel)
            slots = torch.arange(len(batch), device=DEVICE)
            mine = slots == d.kv_indices[token]
            assert torch.equal(rows_at(d, alone, slots[mine]), rows_at(d, batch, slots[mine]))
            assert bool((rows_at(d, alone, slots[~mine]) == 255).all())


@over([TEMPLATE, CUT, TEMPLATES[1], MEANS])
def test_a_row_for_each_factor_gives_the_same_bytes(case, monkeypatch):
    """Small batches spread a token's scale search over rows of the program, large ones do not."""
    d = data(case)
    part = torch.arange(0, len(d.k), -(-len(d.k) // 20), device=DEVICE)
    want = rows_at(d, encoded(case, "many"), d.kv_indices[part])
    slots = []
    for spread in (False, True):

        def rows_per_token(tables, tokens, device, spread=spread):
            slots.append(1 << (len(tables.search) - 1).bit_length() if spread else 1)
            return slots[-1]

        monkeypatch.setattr(encoder, "rows_per_token", rows_per_token)
        got = run(d, tokens_of(d, part))
        assert torch.equal(rows_at(d, got, d.kv_indices[part]), want)
    assert slots == [1, 1 if d.codec.scale_search == NO_SEARCH else 8]


@over([TEMPLATE, BFLOAT16, *MEAN_CASES[:2], LLAMA, LARGE_HALF, LARGE_MEANS])
def test_rotates_queries_in_the_same_launch(case):
    d = data(case)
    tokens = min(len(d.k), len(d.q))
    some, q = tokens_of(d, slice(tokens)), d.q[:tokens]
    of_head = q.double().unflatten(1, (case.heads, -1))
    want = torch.einsum("thgd,hed->thge", of_head, d.codec.q_in.double()).flatten(1, 2)
    alone = rotate_queries(d.tables.k, q, case.group)
    each = [alone]
    for kernel in KERNELS:
        rotated = torch.full_like(alone, torch.nan)
        assert torch.equal(run(d, some, kernel, q, rotated), run(d, some, kernel))
        each.append(rotated)
    for got in each:
        assert relative_error(got, want) < 1e-5


def packed_by_plan(plan: EncodePlan, h: int, codes: torch.Tensor, code_bytes: int) -> torch.Tensor:
    """``codes [N, P]`` of head h as its plan puts them into bytes, uint8 ``[N, code_bytes]``."""
    out = torch.zeros(len(codes), code_bytes, dtype=torch.uint8)
    for b, (byte, words, repeat) in enumerate(plan.bins):
        move = plan.pack[h, b].cpu().long()
        moved = ((codes >> (move & 15)) & (move >> 8)) << (move >> 4 & 15)
        column = moved.unflatten(1, (-1, 16)).sum(1)
        word = column.unflatten(1, (repeat, words)).sum(1)
        assert bool((word < 1 << 16).all())
        out[:, byte : byte + 2 * words] = torch.stack([word & 255, word >> 8], -1).flatten(1).to(torch.uint8)
        # A tile that is said not to enter a bin has nothing to put there.
        for tile in plan.tiles:
            if not tile.bins >> b & 1:
                assert not bool((move[tile.start : tile.start + tile.size] >> 8).any())
    return out


def test_plan_places_codes_as_pack_does():
    """What a plan adds up of the shifted codes are the packed bytes."""
    for case in IN_COLUMNS:
        tables = data(case).tables
        row = tables.row
        sides = (tables.k, tables.k_plan, row.k), (tables.v, tables.v_plan, (row.v,) * row.heads)
        for side, plan, layouts in sides:
            for h, layout in enumerate(layouts):
                generator = torch.Generator().manual_seed(h)
                codes = torch.zeros(5, side.padded, dtype=torch.int64)
                widths = torch.tensor(layout.widths)
                codes[:, : layout.dim] = torch.randint(0, 256, (5, layout.dim), generator=generator) % (1 << widths)
                want = pack(layout, codes[:, : layout.dim], True)
                assert torch.equal(packed_by_plan(plan, h, codes, layout.code_bytes), want)


@pytest.mark.parametrize("bits", range(1, 9))
def test_thresholds_lie_between_levels(bits):
    """The polynomial that a few tokens' levels are found by, at every threshold of the codebook."""
    half = 1 << (bits - 1)
    edges = boundaries(levels(bits))[half:]
    z = torch.arange(1, half, dtype=torch.float64) / half
    coefficients = _thresholds(polynomial(bits), 0.5 / half)
    torch.testing.assert_close(sum(c * z ** (2 * i + 1) for i, c in enumerate(coefficients)), edges, rtol=1e-12, atol=0)


def test_cells_find_the_nearest_level():
    books, cells = codebook_table(), Cells.own()
    for bits in range(1, 9):
        book = books[bits, : 1 << bits]
        edges = boundaries(book)
        near = torch.stack([edges.nextafter(edges - 1), edges, edges.nextafter(edges + 1)]).abs().flatten()
        a = torch.cat([torch.linspace(0, 20, 10_001), near])
        edge, below, above, code = cells.table[bits, (a * cells.scales[bits]).long().clamp(max=cells.count - 1)].T
        half = len(book) // 2
        want = torch.bucketize(a, edges[half:])
        assert torch.equal((code + (a > edge)).long(), want)
        assert torch.equal(torch.where(a > edge, above, below), book[half + want])


def test_bfloat16_pieces_keep_the_matrix():
    matrix = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    pieces = split_bfloat16(matrix).double()
    error = (pieces.sum(1).mT - matrix).abs()
    assert bool((error <= matrix.abs() * 2.0**-17).all())
    assert not bool((error <= matrix.abs() * 2.0**-20).all())


@over([TEMPLATE, HANDMADE, MEANS])
def test_strided_views_and_int32_numbers(case):
    """Keys and values as slices of a fused projection, as models hand them over."""
    d = data(case)
    heads, dim = d.k.shape[1:]
    fused = torch.full((len(d.k), 4 * heads * dim), torch.nan, device=DEVICE)
    k = fused[:, heads * dim : 2 * heads * dim].unflatten(1, (heads, dim))
    v = fused[:, 3 * heads * dim :].unflatten(1, (heads, dim))
    k.copy_(d.k)
    v.copy_(d.v)
    part = chosen(case, kernels_of(case)[-1])
    every, slots = slice(0, None, int(part[1] - part[0])), d.kv_indices[part]
    for kernel in kernels_of(case):
        got = run(d, [k[every], v[every], slots.int(), d.positions[part].int()], kernel)
        assert torch.equal(rows_at(d, got, slots), rows_at(d, encoded(case, kernel), slots))


@over([TEMPLATE, HANDMADE, BFLOAT16, MEANS, LLAMA, LARGE_MEANS, LARGE_ANY])
def test_zero_and_huge_vectors(case):
    d = data(case)
    k, v = d.k[:4].clone(), d.v[:4].clone()
    k[0], v[0] = 0, 0
    huge = 1e25 if case.dtype != "float16" else 1e3  # float16 inputs cannot hold more
    k[1], v[1] = k[1] * huge, v[1] * huge
    k[2], v[2] = k[2] * 1e-12, v[2] * 1e-12
    loc = torch.arange(4, device=DEVICE)
    want = reference.encode(d.codec, k, v, loc)
    for kernel in kernels_of(case):
        rows = rows_at(d, run(d, [k, v, loc, loc], kernel), loc)
        codes, scales = codes_and_scales(d, rows)
        assert bool(torch.isfinite(scales).all())
        assert torch.equal(codes[0], codes_and_scales(d, want)[0][0])
        assert bool((scales[0] == 0).all())
        if case.dtype != "float16":
            of_head = scales[1].abs().view(case.heads, -1)
            assert float(of_head[:, 0].max()) == SCALE_MAX and bool((of_head[:, -1] == V_SCALE_MAX).all())
        for x in reference.decode(d.codec, rows, loc):
            assert bool((x[0] == 0).all())
            assert bool(torch.isfinite(x).all())


def test_no_tokens():
    for case in (TEMPLATE, PRODUCT, MEANS):
        d = data(case)
        assert bool((run(d, tokens_of(d, slice(0))) == 255).all())


def test_rejects_other_shapes():
    for case in (TEMPLATE, PRODUCT):
        d, loc = data(case), data(case).kv_indices
        encode = encoder_of(d.tables, d.rows.clone())
        heads, dim = d.k.shape[1:]
        with pytest.raises(ValueError, match=rf"k \(44, {heads}, 32\): \[44, {heads}, {dim}\]"):
            encode(d.k[..., :32], d.v, loc)
        with pytest.raises(ValueError, match="channels must be contiguous"):
            encode(d.k.mT.contiguous().mT, d.v, loc)
        with pytest.raises(ValueError, match="v is torch.float16, k is torch.float32"):
            encode(d.k, d.v.half(), loc)
        with pytest.raises(ValueError, match="contiguous tensor"):
            encode(d.k, d.v, loc.repeat_interleave(2)[::2])
        with pytest.raises(ValueError, match=rf"rows are \[slots, {d.rows.shape[1]}\] uint8"):
            encoder_of(d.tables, d.rows[:, :-8])
        with pytest.raises(ValueError, match="contiguous"):
            encoder_of(d.tables, d.rows.repeat(1, 2)[:, : d.rows.shape[1]])
    d = data(TEMPLATE)
    encode, q = Encoder(d.tables, d.rows.clone()), d.q[:4]
    some = tokens_of(d, slice(4))
    with pytest.raises(ValueError, match="rotated: a float32 tensor"):
        encode(*some, q)
    with pytest.raises(ValueError, match=r"q \(4, 6, 64\) torch.float16"):
        encode(*some, q.half(), torch.empty_like(q))


def test_a_wide_head_does_not_take_registers_that_it_needs():
    """The limit stands for heads whose matrix fits; that of 256 channels would spill."""
    for case, limited in ((TEMPLATE, True), (WIDE, False)):
        encode = Encoder(make_tables(data(case).codec), data(case).rows)
        found = [encode.bound(torch.bfloat16, 0, per_token)["maxnreg"] is not None for per_token in (0, 1)]
        assert found == [limited, limited]
        assert encode.bound(torch.bfloat16, 0, 8)["maxnreg"] is None
