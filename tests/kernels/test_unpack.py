"""Unpacking and merging in Triton against their twins."""

from dataclasses import replace

import pytest
import torch

from sglang_blockgtq.kernels import naive
from sglang_blockgtq.kernels import unpack as unpack_module
from sglang_blockgtq.kernels.layout import num_slots, scatter_rows
from sglang_blockgtq.kernels.merge import merge_into
from sglang_blockgtq.kernels.tables import DeviceTables
from sglang_blockgtq.kernels.unpack import Unpacker, UnpackTables, UnpackTask, unpack

from .matrix import DEVICE, EVERY, LARGE, SLOTS, SMALL, TOLERANCE, Case, data, make_codec, over, relative_error

TEMPLATE, TEMPLATE_128, UNIFORM, PRODUCT, HANDMADE = SMALL[0], SMALL[1], SMALL[5], SMALL[7], SMALL[9]


def room(case: Case, places: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned memory for keys and values, each with other strides than its shape has."""
    d = data(case)
    dtype = dtype or d.q.dtype
    k = torch.full((places, case.heads + 1, case.head_dim), torch.nan, dtype=dtype, device=DEVICE)
    v = torch.full((places, case.heads, case.v_dim or case.head_dim), torch.nan, dtype=dtype, device=DEVICE)
    return k[:, 1:], v


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    d = data(case)
    return naive.decode(d.codec, d.packed)


@over(EVERY)
def test_unpack_matches_twin(case):
    d = data(case)
    k, v = room(case, len(d.k))
    unpack(UnpackTables.of(d.tables), d.rows, d.kv_indices, k, v)
    for got, want in zip((k, v), expected(case), strict=True):
        assert relative_error(got, want) < TOLERANCE[DEVICE][case.dtype]


@over([TEMPLATE, PRODUCT, HANDMADE, *SLOTS, *LARGE])
def test_every_head_is_right(case):
    """An error in one head or channel of little energy is lost in the whole; each is compared by itself."""
    d = data(case)
    k, v = room(case, len(d.k))
    unpack(UnpackTables.of(d.tables), d.rows, d.kv_indices, k, v)
    for got, want in zip((k, v), expected(case), strict=True):
        error = (got.double() - want.double()).square().sum(0) / want.double().square().sum(0)
        assert float(error.max().sqrt()) < 2 * TOLERANCE[DEVICE][case.dtype]


@over([TEMPLATE, PRODUCT, SLOTS[0], *LARGE])
def test_unpack_to_given_places(case):
    d = data(case)
    places = torch.randperm(len(d.k) + 5, generator=torch.Generator().manual_seed(2))[: len(d.k)].to(DEVICE)
    k, v = room(case, len(d.k) + 5)
    unpack(UnpackTables.of(d.tables), d.rows, d.kv_indices, k, v, places)
    for got, want in zip((k, v), expected(case), strict=True):
        assert relative_error(got[places], want) < TOLERANCE[DEVICE][case.dtype]
        others = torch.ones(len(got), dtype=torch.bool, device=DEVICE)
        others[places] = False
        assert bool(got[others].isnan().all())


def chunk(case: Case, tokens: int, before: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values within wider rows, ``before`` elements into them; all else there is poison."""
    sizes, generator = (case.head_dim, case.v_dim or case.head_dim), torch.Generator().manual_seed(6)
    found = []
    for size in sizes:
        wide = torch.full((tokens + 1, before + case.heads * size + 16), torch.nan, dtype=dtype or data(case).q.dtype)
        found.append(wide[:tokens, before : before + case.heads * size].unflatten(1, (case.heads, size)))
        found[-1].copy_(torch.randn(found[-1].shape, generator=generator))
    return tuple(x.to(DEVICE) if DEVICE == "cpu" else _like(x) for x in found)


def _like(x: torch.Tensor) -> torch.Tensor:
    """On the GPU with the same strides and offset."""
    memory = torch.full((x.untyped_storage().nbytes() // x.element_size(),), torch.nan, dtype=x.dtype, device=DEVICE)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


@over([TEMPLATE, TEMPLATE_128, SMALL[3], SMALL[5], PRODUCT, HANDMADE, *LARGE])
@pytest.mark.parametrize("given", [False, True], ids=["following", "given"])
@pytest.mark.parametrize("before", [16, 3], ids=["aligned", "odd"])
def test_chunk_is_copied_in_the_same_launch(monkeypatch, case, given, before):
    """Bit for bit, in more tiles than one, from rows of any stride; nothing else is written or read."""
    d, new = data(case), unpack_module.TOKENS + 7
    old = len(d.k)
    k, v = room(case, old + new + 5)
    both = chunk(case, new, before)
    both[0][1, 0, 2], both[1][new - 1, -1, -1] = torch.nan, torch.inf
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(2)) if given else torch.arange(len(k))
    order = order.to(DEVICE)
    places = (order[:old], order[old : old + new]) if given else (None, None)
    launches = []
    launch = unpack_module.Launch.__call__
    monkeypatch.setattr(unpack_module.Launch, "__call__", lambda *a, **kw: (launches.append(a[0]), launch(*a, **kw)))
    unpack(UnpackTables.of(d.tables), d.rows, d.kv_indices, k, v, places[0], both, places[1])
    assert len(launches) == 1
    for got, want, copied in zip((k, v), expected(case), both, strict=True):
        assert relative_error(got[order[:old]], want) < TOLERANCE[DEVICE][case.dtype]
        assert torch.equal(got[order[old : old + new]].nan_to_num(7), copied.nan_to_num(7))
        assert bool(got[order[old + new :]].isnan().all())


@over([TEMPLATE, PRODUCT])
def test_chunk_without_a_prefix(case):
    d, new = data(case), 5
    k, v = room(case, new + 1)
    both = chunk(case, new, 0)
    unpack(UnpackTables.of(d.tables), d.rows, d.kv_indices[:0], k, v, None, both)
    assert torch.equal(k[:new], both[0]) and torch.equal(v[:new], both[1])
    assert bool(k[new:].isnan().all()) and bool(v[new:].isnan().all())


@over([TEMPLATE, PRODUCT, *LARGE])
def test_a_chunk_does_not_change_the_prefix(case):
    """Nor does another layer, which takes the same task."""
    d, new = data(case), 9
    tables, both = UnpackTables.of(d.tables), chunk(case, new, 0)
    alone, beside = room(case, len(d.k)), room(case, len(d.k) + new)
    unpack(tables, d.rows, d.kv_indices, *alone)
    task = UnpackTask(d.kv_indices, *beside, chunk=new)
    for rows in (torch.zeros_like(d.rows), d.rows):
        Unpacker(tables, rows)(task, *both)
    for x, y in zip(alone, beside, strict=True):
        assert torch.equal(x, y[: len(x)])


@over([TEMPLATE, TEMPLATE_128, UNIFORM, *SLOTS])
@pytest.mark.parametrize("columns", [True, False])
def test_either_kernel_reads_rows_in_columns(monkeypatch, case, columns):
    """Whichever kernel is not meant for the tables must not have been asked."""
    d = data(case)
    assert bool(d.tables.k_templates) and not data(PRODUCT).tables.k_templates
    monkeypatch.setattr(unpack_module, "unpack_fields_kernel" if columns else "unpack_columns_kernel", None)
    tables = d.tables if columns else replace(d.tables, k_templates=(), v_columns=None)
    k, v = room(case, len(d.k))
    unpack(UnpackTables.of(tables), d.rows, d.kv_indices, k, v)
    for got, want in zip((k, v), expected(case), strict=True):
        error = (got.double() - want.double()).square().sum(0) / want.double().square().sum(0)
        assert float(error.max().sqrt()) < 2 * TOLERANCE[DEVICE][case.dtype]


@pytest.mark.usefixtures("placeless_products")
@over([TEMPLATE, *LARGE])
def test_a_token_does_not_depend_on_its_batch(case):
    """Bit for bit: what a tile holds beside a token, and how many tiles a program takes, must not show."""
    d = data(case)
    tables = UnpackTables.of(d.tables)
    once, alone = room(case, len(d.k)), room(case, len(d.k))
    unpack(tables, d.rows, d.kv_indices, *once)
    for start in range(0, len(d.k), 1 + len(d.k) // 3):
        part = slice(start, start + 1 + len(d.k) // 3)
        unpack(tables, d.rows, d.kv_indices[part], alone[0][part], alone[1][part])
    assert torch.equal(once[0], alone[0]) and torch.equal(once[1], alone[1])


@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_tiles_of_a_program(monkeypatch, programs):
    """A long prefix takes several tiles a program, a short one a program a tile."""
    d, times = data(TEMPLATE), 5
    monkeypatch.setattr(unpack_module, "TUNING", replace(unpack_module.TUNING, programs=programs))
    k, v = room(TEMPLATE, times * len(d.k))
    assert len(k) > 3 * unpack_module.TOKENS
    unpack(UnpackTables.of(d.tables), d.rows, d.kv_indices.repeat(times), k, v)
    for got, want in zip((k, v), expected(TEMPLATE), strict=True):
        for part in got.split(len(d.k)):
            assert relative_error(part, want) < TOLERANCE[DEVICE]["float32"]


@pytest.mark.parametrize("case", [TEMPLATE, PRODUCT, HANDMADE], ids=str)
def test_half_operands_are_accurate_enough(case):
    """The GPU's operand type, in the interpreter too. Codewords and matrix are rounded by 2^-12 of themselves."""
    d = data(case)
    k, v = room(case, len(d.k), torch.float32)
    unpack(UnpackTables.of(d.tables, half=True), d.rows, d.kv_indices, k, v)
    for got, want in zip((k, v), expected(case), strict=True):
        assert 0 < relative_error(got, want) < 5e-4
        error = (got.double() - want.double()).square().sum(0) / want.double().square().sum(0)
        # In each channel, though a token's scales lie far apart: less than the result's rounding to bfloat16.
        assert float(error.max().sqrt()) < 2**-9


@pytest.mark.parametrize("gain", [1e-6, 1e6])
def test_half_operands_hold_any_gain(gain):
    """Transforms scale channels as calibration found them; float16 alone would lose these."""
    d = data(TEMPLATE)
    uneven = torch.logspace(-3, 3, TEMPLATE.head_dim, device=DEVICE) * gain
    codec = replace(d.codec, k_in=d.codec.k_in / uneven, q_in=d.codec.q_in * uneven)
    k, v = room(TEMPLATE, len(d.k), torch.float32)
    unpack(UnpackTables.of(DeviceTables.of(codec), half=True), d.rows, d.kv_indices, k, v)
    want = expected(TEMPLATE)[0] * uneven
    error = (k.double() - want.double()).square().sum(0) / want.double().square().sum(0)
    assert float(error.max().sqrt()) < 2**-9


def test_float16_saturates():
    """A key beyond float16 stays finite: one infinity would make NaN of a whole output."""
    case = SMALL[3]
    d = data(case)
    tables = UnpackTables.of(d.tables)
    k, v = room(case, len(d.k), torch.float16)
    unpack(replace(tables, k=replace(tables.k, gain=tables.k.gain * 1e6)), d.rows, d.kv_indices, k, v)
    assert bool(k.isfinite().all()) and float(k.abs().max()) == 65504


def test_zero_rows_are_zero():
    d = data(TEMPLATE)
    k, v = room(TEMPLATE, 3)
    unpack(UnpackTables.of(d.tables), torch.zeros_like(d.rows), torch.arange(3, device=DEVICE), k, v)
    assert not k.any() and not v.any()


def test_slots_beyond_two_gib():
    """Byte offsets of far slots do not fit 32 bits. The memory is only reserved: no page but the last is touched."""
    d = data(TEMPLATE)
    row_bytes, tokens = d.codec.layout.row_bytes, len(d.k)
    slots = num_slots((1 << 31) // row_bytes + 2 * tokens)
    rows = torch.zeros(slots, row_bytes, dtype=torch.uint8, device=DEVICE)
    scatter_rows(d.codec.layout, rows, torch.arange(slots - tokens, slots, device=DEVICE), d.packed)
    k, v = room(TEMPLATE, tokens)
    unpack(UnpackTables.of(d.tables), rows, torch.arange(slots - tokens, slots, device=DEVICE), k, v)
    assert relative_error(k, expected(TEMPLATE)[0]) < TOLERANCE[DEVICE]["float32"]


def test_bad_shapes_are_refused():
    d = data(TEMPLATE)
    tables = UnpackTables.of(d.tables)
    k, v = room(TEMPLATE, len(d.k))
    with pytest.raises(ValueError, match="k_out .* is needed for these rows"):
        unpack(tables, d.rows, d.kv_indices, k[..., :-2], v)
    with pytest.raises(ValueError, match="v_out .* contiguous channels"):
        unpack(tables, d.rows, d.kv_indices, k, v[..., ::2])
    with pytest.raises(ValueError, match="places for"):
        unpack(tables, d.rows, d.kv_indices, k[:-1], v)
    with pytest.raises(ValueError, match="one place for each"):
        unpack(tables, d.rows, d.kv_indices, k, v, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="this layer's rows"):
        unpack(tables, d.rows[:, :-8], d.kv_indices, k, v)
    k, v = room(TEMPLATE, len(d.k) + 2)
    both, to = (k[:2], v[:2]), torch.arange(2, device=DEVICE)
    with pytest.raises(ValueError, match=f"places for {len(d.k) + 2} tokens"):
        unpack(tables, d.rows, d.kv_indices, k[:-1], v, None, both)
    with pytest.raises(ValueError, match="chunk_dest .* each of 2"):
        unpack(tables, d.rows, d.kv_indices, k, v, None, both, to[:1])
    for bad in ((both[0], both[1][:1]), (both[0], both[1].half()), (both[0][..., ::2], both[1])):
        with pytest.raises(ValueError, match="of the chunk .* is needed"):
            unpack(tables, d.rows, d.kv_indices, k, v, None, bad, to)


def test_fields_do_not_take_their_width_from_a_plane():
    """All widths 0..8: a code's fields together are its bits, each bit once."""
    case = HANDMADE
    codec = make_codec(case)
    k = UnpackTables.of(DeviceTables.of(codec)).k
    at, mask = k.fields >> 19 & 7, k.fields >> 22 & 0xFF
    widths = torch.tensor([head.widths for head in codec.layout.k])
    assert torch.equal((mask << at).sum(1).cpu(), (1 << widths) - 1)
    assert set(widths.unique().tolist()) == set(range(9))


@pytest.mark.parametrize("dtype", ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_merge_matches_twin(dim, dtype):
    tokens, heads = 37, 3
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, tokens, heads, dim, generator=generator).to(DEVICE)
    b = b.to(getattr(torch, dtype))
    lse_a, lse_b = 8 * torch.randn(2, heads, tokens, generator=generator).to(DEVICE)  # as FlashAttention lays it out
    lse_a[0, :5], lse_b[0, 3:9], lse_b[1, :4] = -torch.inf, -torch.inf, torch.inf
    lse_a[2, 0], lse_b[2, 0] = 1e4, 1e4 - 1
    clean = lse_b.masked_fill(lse_b == torch.inf, -torch.inf)
    want, want_lse = naive.merge_states(a, lse_a.T, b.float(), clean.T)
    # Parts without keys may hold anything.
    a[(lse_a == -torch.inf).T] = torch.nan
    b[(clean == -torch.inf).T] = torch.nan
    neither = ((lse_a == -torch.inf) & (clean == -torch.inf)).T
    assert bool(neither.any())
    want = torch.where(neither[..., None], 0.0, want)
    merge_into(a, lse_a.T, b, lse_b.T)
    torch.testing.assert_close(a, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse_a.T, want_lse, rtol=1e-6, atol=1e-6)


def test_merge_refuses_other_shapes():
    out, lse = torch.zeros(2, 3, 8, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match="one size"):
        merge_into(out, lse, out[:1], lse)
    with pytest.raises(ValueError, match="float32"):
        merge_into(out.half(), lse, out, lse)
