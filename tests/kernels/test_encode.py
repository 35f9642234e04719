"""The Triton encode against the naive twin."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch

from sglang_blockgtq.kernels import encode as encode_module
from sglang_blockgtq.kernels import naive
from sglang_blockgtq.kernels.codebook import boundaries, codebook_table, levels, polynomial
from sglang_blockgtq.kernels.encode import encode
from sglang_blockgtq.kernels.layout import NORM_BYTES, gather_rows
from sglang_blockgtq.kernels.pack import pack, unpack
from sglang_blockgtq.kernels.plan import Cells, _thresholds, split_bfloat16
from sglang_blockgtq.kernels.tables import SideTables
from sglang_blockgtq.kernels.turn import turn

from .matrix import DEVICE, EVERY, LARGE, SMALL, Case, Data, data, over, relative_error

TEMPLATE, HANDMADE = SMALL[0], SMALL[9]
#: bfloat16 takes a matrix of its own, in two pieces.
BFLOAT16 = [replace(case, dtype="bfloat16") for case in (TEMPLATE, SMALL[2], SMALL[7])]
#: Both kernels, and the number of channels up to which the one for a few tokens is chosen.
KERNELS = {"rows": 0, "few": 1 << 30}
both_kernels = pytest.mark.parametrize("kernel", KERNELS)


@contextmanager
def chosen(kernel: str):
    usual = encode_module.FEW_CHANNELS
    encode_module.FEW_CHANNELS = KERNELS[kernel]
    try:
        yield
    finally:
        encode_module.FEW_CHANNELS = usual


def skip_unless_read(d: Data, kernel: str) -> None:
    if kernel == "few" and d.tables.v_columns is None:
        pytest.skip("the kernel for a few tokens takes rows in columns alone")


def codes_and_scales(d: Data, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All stored codes ``[T, H * (D + Dv)]`` and scales ``[T, H * norms]`` of rows."""
    row = d.codec.layout
    parts = []
    for h, layout in enumerate(row.k):
        parts.append(unpack(layout, rows[:, h * row.k_code_bytes :]))
        parts.append(unpack(row.v, rows[:, row.v_offset + h * row.v_code_bytes :]))
    end = row.norm_offset + row.heads * row.norms * NORM_BYTES
    return torch.cat(parts, -1), rows[:, row.norm_offset : end].contiguous().view(torch.float16)


def run(d: Data, k: torch.Tensor, v: torch.Tensor, loc: torch.Tensor, kernel: str = "rows") -> torch.Tensor:
    """A pool that held 0xFF in every byte, after the kernel encoded these tokens."""
    storage = torch.full_like(d.rows, 255)
    with chosen(kernel):
        encode(d.tables, k, v, storage, loc)
    return storage


def rows_at(d: Data, storage: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return gather_rows(d.codec.layout, storage, slots.long())


@cache
def encoded(case: Case, kernel: str) -> torch.Tensor:
    """The pool after all tokens of the case were encoded by the kernel."""
    d = data(case)
    return run(d, d.k, d.v, d.kv_indices, kernel)


@both_kernels
@over([*EVERY, *BFLOAT16])
def test_matches_twin(case, kernel):
    d = data(case)
    skip_unless_read(d, kernel)
    storage = encoded(case, kernel)
    got = rows_at(d, storage, d.kv_indices)
    untouched = torch.ones(len(storage), dtype=torch.bool, device=DEVICE)
    untouched[d.kv_indices.long()] = False
    assert bool(untouched.any())
    assert bool((rows_at(d, storage, untouched.nonzero()[:, 0]) == 255).all())

    codes, scales = codes_and_scales(d, got)
    want_codes, want_scales = codes_and_scales(d, d.packed)
    assert (codes != want_codes).double().mean() < 5e-3
    same = (codes == want_codes).all(-1)
    torch.testing.assert_close(scales[same].float(), want_scales[same].float(), rtol=2e-3, atol=1e-7)
    # Padding, and the code bytes and scales that a head with fewer of them leaves over, are zero as in the twin.
    assert bool(same.double().mean() > 0.9)
    used = naive.encode(d.codec, torch.randn_like(d.k), torch.randn_like(d.v)) | d.packed
    padding = ~(used.bool().any(0))
    assert bool((got[:, padding] == 0).all())

    for a, b, x in zip(naive.decode(d.codec, got), naive.decode(d.codec, d.packed), (d.k, d.v), strict=True):
        assert relative_error(a, b) < 1e-2
        assert relative_error(a, x) == pytest.approx(relative_error(b, x), rel=1e-3)


@both_kernels
@over([c for c in EVERY if c.allocator in ("template", "handmade")])
def test_exact_where_codes_are_well_separated(case, kernel):
    """Tokens whose codes survive a disturbance 100 times float32 rounding have the twin's codes exactly.

    Not for free widths: in a group of two channels of equal size every factor of the scale search ties.
    """
    d = data(case)
    skip_unless_read(d, kernel)
    want, want_scales = codes_and_scales(d, d.packed)
    generator = torch.Generator(DEVICE).manual_seed(0)
    stable = torch.ones(len(want), dtype=torch.bool, device=DEVICE)
    for _ in range(4):
        k, v = (
            x.double() + 1e-5 * x.double().square().mean((1, 2), keepdim=True).sqrt() * noise
            for x in (d.k, d.v)
            for noise in [torch.randn(x.shape, generator=generator, device=DEVICE, dtype=torch.float64)]
        )
        stable &= (codes_and_scales(d, naive.encode(d.codec, k, v))[0] == want).all(-1)
    assert stable.double().mean() > 0.7
    codes, scales = codes_and_scales(d, rows_at(d, encoded(case, kernel), d.kv_indices))
    assert torch.equal(codes[stable], want[stable])
    ulp = torch.finfo(torch.float16).eps
    torch.testing.assert_close(scales[stable].float(), want_scales[stable].float(), rtol=ulp, atol=6e-8)


@both_kernels
@over([TEMPLATE, *LARGE])
def test_a_token_does_not_depend_on_its_batch(case, kernel):
    d = data(case)
    skip_unless_read(d, kernel)
    batch = encoded(case, kernel)
    assert torch.equal(run(d, d.k.flip(0), d.v.flip(0), d.kv_indices.flip(0), kernel), batch)
    for token in (0, 17, 43):
        alone = run(d, d.k[token : token + 1], d.v[token : token + 1], d.kv_indices[token : token + 1], kernel)
        slots = torch.arange(len(batch), device=DEVICE)
        mine = slots == d.kv_indices[token]
        assert torch.equal(rows_at(d, alone, slots[mine]), rows_at(d, batch, slots[mine]))
        assert bool((rows_at(d, alone, slots[~mine]) == 255).all())


@over([c for c in SMALL if c.allocator != "uniform"])
def test_a_row_for_each_factor_gives_the_same_bytes(case, monkeypatch):
    """Small batches spread a token's scale search over rows of the program, large ones do not."""
    d = data(case)
    encoded(case, "rows")
    slots = []
    for spread in (False, True):

        def rows_per_token(tables, tokens, device, spread=spread):
            slots.append(1 << (len(tables.search) - 1).bit_length() if spread else 1)
            return slots[-1]

        monkeypatch.setattr(encode_module, "_rows_per_token", rows_per_token)
        assert torch.equal(run(d, d.k, d.v, d.kv_indices), encoded(case, "rows"))
    assert slots == [1, 1 if case.allocator == "paper" else 8]


@both_kernels
@over([TEMPLATE, *BFLOAT16, *LARGE])
def test_turns_queries_in_the_same_launch(case, kernel):
    d = data(case)
    skip_unless_read(d, kernel)
    tokens = min(len(d.k), len(d.q))
    k, v, q, loc = d.k[:tokens], d.v[:tokens], d.q[:tokens], d.kv_indices[:tokens]
    rows, turned = torch.full_like(d.rows, 255), torch.empty(q.shape, device=DEVICE)
    with chosen(kernel):
        encode(d.tables, k, v, rows, loc, q, turned)
    assert torch.equal(rows, run(d, k, v, loc, kernel))
    heads = d.codec.q_in.shape[0]
    want = torch.einsum("thgd,hed->thge", q.double().unflatten(1, (heads, -1)), d.codec.q_in.double()).flatten(1, 2)
    assert relative_error(turned, want) < 1e-5
    assert relative_error(turn(d.tables.k, q, case.group), want) < 1e-5
    with pytest.raises(ValueError, match="turned: a float32 tensor"):
        encode(d.tables, k, v, rows, loc, q)


def packed_by_plan(side: SideTables, h: int, codes: torch.Tensor, code_bytes: int) -> torch.Tensor:
    """``codes [N, P]`` of head h as its plan puts them into bytes, uint8 ``[N, code_bytes]``."""
    plan = side.plan
    if plan.columns is None:
        total = torch.zeros(len(codes), plan.place.shape[2], dtype=torch.int64)
        for tile in plan.tiles:
            part = codes[:, tile.start : tile.start + tile.size]
            for p in range(tile.positions.bit_length()):
                line = tile.line + p * tile.size
                total += (part >> p) @ plan.place[h, line : line + tile.size].cpu().long()
        assert not (total & 255)[:, code_bytes:].any()
        return (total & 255)[:, :code_bytes].to(torch.uint8)
    out = torch.zeros(len(codes), code_bytes, dtype=torch.uint8)
    for b, (byte, words, repeat) in enumerate(plan.columns.bins):
        move = plan.columns.pack[h, b].cpu().long()
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


@over(SMALL)
def test_plan_places_codes_as_pack_does(case):
    """What a plan adds up of the shifted codes are the packed bytes, in planes and in columns."""
    d = data(case)
    row = d.codec.layout
    assert (d.tables.k.plan.columns is None) != row.in_columns
    for side, layouts in ((d.tables.k, row.k), (d.tables.v, (row.v,) * row.heads)):
        for h, layout in enumerate(layouts):
            generator = torch.Generator().manual_seed(h)
            codes = torch.zeros(5, side.padded, dtype=torch.int64)
            widths = torch.tensor(layout.widths)
            codes[:, : layout.dim] = torch.randint(0, 256, (5, layout.dim), generator=generator) % (1 << widths)
            want = pack(layout, codes[:, : layout.dim])
            assert torch.equal(packed_by_plan(side, h, codes, layout.code_bytes), want)


@pytest.mark.parametrize("bits", range(1, 9))
def test_thresholds_lie_between_levels(bits):
    """The polynomial that a few tokens' levels are found by, at every threshold of the codebook."""
    half = 1 << (bits - 1)
    edges = boundaries(levels(bits))[half:]
    z = torch.arange(1, half, dtype=torch.float64) / half
    coefficients = _thresholds(polynomial(bits), 0.5 / half)
    torch.testing.assert_close(sum(c * z ** (2 * i + 1) for i, c in enumerate(coefficients)), edges, rtol=1e-12, atol=0)


def test_cells_find_the_nearest_level():
    books = codebook_table().float()
    cells = Cells.of(books)
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
    books[3, 0] -= 1
    with pytest.raises(ValueError, match="3 bits is not symmetric"):
        Cells.of(books)


def test_bfloat16_pieces_keep_the_matrix():
    matrix = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    pieces = split_bfloat16(matrix).double()
    error = (pieces.sum(1).mT - matrix).abs()
    assert bool((error <= matrix.abs() * 2.0**-17).all())
    assert not bool((error <= matrix.abs() * 2.0**-20).all())


def test_strided_views_and_int32_loc():
    """Keys and values as slices of a fused projection, as models hand them over."""
    d = data(TEMPLATE)
    heads, dim = d.k.shape[1:]
    fused = torch.randn(len(d.k), 4 * heads * dim, device=DEVICE)
    k = fused[:, heads * dim : 2 * heads * dim].unflatten(1, (heads, dim))
    v = fused[:, 3 * heads * dim :].unflatten(1, (heads, dim))
    k.copy_(d.k)
    v.copy_(d.v)
    loc = d.kv_indices.to(torch.int32)
    for kernel in KERNELS:
        assert torch.equal(run(d, k, v, loc, kernel), encoded(TEMPLATE, kernel))


@both_kernels
@over([TEMPLATE, HANDMADE, BFLOAT16[0], *LARGE])
def test_zero_and_huge_vectors(case, kernel):
    d = data(case)
    skip_unless_read(d, kernel)
    k, v = d.k[:4].clone(), d.v[:4].clone()
    k[0], v[0] = 0, 0
    huge = 1e25 if case.dtype != "float16" else 1e3  # float16 inputs cannot hold more
    k[1], v[1] = k[1] * huge, v[1] * huge
    k[2], v[2] = k[2] * 1e-12, v[2] * 1e-12
    loc = torch.arange(4, device=DEVICE)
    rows = rows_at(d, run(d, k, v, loc, kernel), loc)
    scales = codes_and_scales(d, rows)[1].float()
    assert bool((scales[0] == 0).all())
    assert bool(torch.isfinite(scales).all())
    if case.dtype != "float16":
        assert float(scales[1].max()) == torch.finfo(torch.float16).max
    assert torch.equal(rows[0], naive.encode(d.codec, k, v)[0])
    for x in naive.decode(d.codec, rows):
        assert bool((x[0] == 0).all())
        assert bool(torch.isfinite(x).all())


def test_no_tokens():
    d = data(TEMPLATE)
    rows = run(d, d.k[:0], d.v[:0], d.kv_indices[:0])
    assert bool((rows == 255).all())


def test_rejects_other_shapes():
    d = data(TEMPLATE)
    loc = d.kv_indices
    with pytest.raises(ValueError, match=r"k \(44, 2, 32\): \[44, 2, 64\]"):
        encode(d.tables, d.k[..., :32], d.v, d.rows.clone(), loc)
    with pytest.raises(ValueError, match="channels must be contiguous"):
        encode(d.tables, d.k.mT.contiguous().mT, d.v, d.rows.clone(), loc)
    with pytest.raises(ValueError, match=rf"rows are \[slots, {d.rows.shape[1]}\] uint8"):
        encode(d.tables, d.k, d.v, d.rows[:, :-8], loc)
    with pytest.raises(ValueError, match="contiguous"):
        encode(d.tables, d.k, d.v, d.rows.repeat(1, 2)[:, : d.rows.shape[1]], loc)
