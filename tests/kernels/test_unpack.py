"""Unpacking in Triton against the reference."""

from dataclasses import replace

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.device.launch import Launch
from sglang_blockgtq.kernels.device.tables import Tables
from sglang_blockgtq.kernels.format.layout import scatter_rows
from sglang_blockgtq.kernels.unpack import task as task_module
from sglang_blockgtq.kernels.unpack.task import TOKENS, UnpackTask
from sglang_blockgtq.kernels.unpack.unpacker import Unpacker

from .matrix import (
    DEVICE,
    EVERY,
    HANDMADE,
    LARGE,
    MEANS,
    OTHER_VALUES,
    PAGES,
    PRODUCT,
    TEMPLATE,
    TOLERANCE,
    WIDE,
    Case,
    data,
    far_rows,
    make_tables,
    over,
    relative_error,
)

LLAMA, LARGE_MEANS, LARGE_ANY = LARGE[0], LARGE[8], LARGE[-1]


def room(case: Case, places: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned memory for keys and values, each with other strides than its shape has."""
    dtype = dtype or getattr(torch, case.dtype)
    k = torch.full((places, case.heads + 1, case.head_dim), torch.nan, dtype=dtype, device=DEVICE)
    v = torch.full((places, case.heads, case.v_dim or case.head_dim), torch.nan, dtype=dtype, device=DEVICE)
    return k[:, 1:], v


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    d = data(case)
    return reference.decode(d.codec, d.packed, d.positions)


def unpacker_of(case: Case, tables: Tables | None = None) -> Unpacker:
    return Unpacker(tables or data(case).tables).bind(data(case).rows)


def task_of(case: Case, k: torch.Tensor, v: torch.Tensor, *chunk) -> UnpackTask:
    """All tokens of a case, and a chunk's dest, size and places."""
    d, (dest, *chunk) = data(case), chunk or (None,)
    return UnpackTask(d.kv_indices, k, v, dest, d.positions, *chunk)


def with_half_operands(unpacker: Unpacker) -> Unpacker:
    """A GPU's: matrices in float16, and of any layout the levels, too."""
    for side in ("k", "v"):
        matrix = getattr(unpacker, side)
        setattr(unpacker, side, replace(matrix, matrix=matrix.matrix.half()))
    if hasattr(unpacker.tables, "half_levels"):
        unpacker.tables = replace(unpacker.tables, levels=unpacker.tables.half_levels)
    return unpacker


def error_of_channels(got: torch.Tensor, want: torch.Tensor) -> float:
    """The greatest of any head's channel: an error in one of little energy is lost in the whole."""
    error = (got.double() - want.double()).square().sum(0) / want.double().square().sum(0)
    return float(error.max().sqrt())


@over(EVERY)
def test_unpack_matches_reference(case):
    k, v = room(case, sum(case.lengths))
    unpacker_of(case)(task_of(case, k, v))
    for got, want in zip((k, v), expected(case), strict=True):
        assert error_of_channels(got, want) < 2 * TOLERANCE[DEVICE][case.dtype]


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


# Where tokens go, and where the chunk's rows begin: one after the other and aligned, or anywhere.
WAYS = [(False, 16), (True, 3)]


@over([TEMPLATE, PAGES, WIDE, OTHER_VALUES, MEANS, PRODUCT, LLAMA, LARGE[4], LARGE_MEANS, LARGE_ANY])
def test_chunk_is_copied_in_the_same_launch(monkeypatch, case):
    """Bit for bit, in more tiles than one, from rows of any stride; nothing else is written or read."""
    d, new = data(case), TOKENS + 7
    old = len(d.k)
    launches = []
    launch = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda *a, **kw: (launches.append(a[0]), launch(*a, **kw)))
    for given, before in WAYS:
        k, v = room(case, old + new + 5)
        both = chunk(case, new, before)
        both[0][1, 0, 2], both[1][new - 1, -1, -1] = torch.nan, torch.inf
        order = torch.randperm(len(k), generator=torch.Generator().manual_seed(2)) if given else torch.arange(len(k))
        order = order.to(DEVICE)
        places = (order[:old], order[old : old + new]) if given else (None, None)
        launches.clear()
        unpacker_of(case)(task_of(case, k, v, places[0], new, places[1]), *both)
        assert len(launches) == 1
        for got, want, copied in zip((k, v), expected(case), both, strict=True):
            assert relative_error(got[order[:old]], want) < TOLERANCE[DEVICE][case.dtype]
            assert torch.equal(got[order[old : old + new]].nan_to_num(7), copied.nan_to_num(7))
            assert bool(got[order[old + new :]].isnan().all())


@over([TEMPLATE, MEANS, PRODUCT])
def test_chunk_without_a_prefix(case):
    d, new = data(case), 5
    k, v = room(case, new + 1)
    both = chunk(case, new, 0)
    unpacker_of(case)(UnpackTask(d.kv_indices[:0], k, v, chunk=new), *both)
    assert torch.equal(k[:new], both[0]) and torch.equal(v[:new], both[1])
    assert bool(k[new:].isnan().all()) and bool(v[new:].isnan().all())


@over([TEMPLATE, PRODUCT, MEANS, LLAMA])
def test_a_chunk_does_not_change_the_prefix(case):
    """Nor does another layer, which takes the same task, nor rows that were bound before."""
    d, new = data(case), 9
    both = chunk(case, new, 0)
    alone, beside = room(case, len(d.k)), room(case, len(d.k) + new)
    unpacker = unpacker_of(case)
    unpacker(task_of(case, *alone))
    task = task_of(case, *beside, None, new)
    for rows in (torch.zeros_like(d.rows), d.rows):
        unpacker.bind(rows)(task, *both)
    for x, y in zip(alone, beside, strict=True):
        assert torch.equal(x, y[: len(x)])


@pytest.mark.usefixtures("placeless_products")
@over([TEMPLATE, PRODUCT, MEANS, LLAMA, LARGE_MEANS])
def test_a_token_does_not_depend_on_its_batch(case):
    """Bit for bit: what a tile holds beside a token, and how many tiles a program takes, must not show."""
    d, unpacker = data(case), unpacker_of(case)
    once, alone = room(case, len(d.k)), room(case, len(d.k))
    unpacker(task_of(case, *once))
    for start in range(0, len(d.k), 1 + len(d.k) // 3):
        part = slice(start, start + 1 + len(d.k) // 3)
        unpacker(UnpackTask(d.kv_indices[part], alone[0][part], alone[1][part], positions=d.positions[part]))
    assert torch.equal(once[0], alone[0]) and torch.equal(once[1], alone[1])


@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_tiles_of_a_program(monkeypatch, programs):
    """A long prefix takes several tiles a program, a short one a program a tile."""
    d, times = data(TEMPLATE), 5
    monkeypatch.setattr(task_module, "PROGRAMS", programs)
    k, v = room(TEMPLATE, times * len(d.k))
    assert len(k) > 3 * TOKENS
    task = UnpackTask(d.kv_indices.repeat(times), k, v)
    assert task.programs == (1 if programs == 1 else 4)
    unpacker_of(TEMPLATE)(task)
    for got, want in zip((k, v), expected(TEMPLATE), strict=True):
        for part in got.split(len(d.k)):
            assert relative_error(part, want) < TOLERANCE[DEVICE]["float32"]


@pytest.mark.parametrize("case", [TEMPLATE, MEANS, PRODUCT, HANDMADE], ids=str)
def test_half_operands_are_accurate_enough(case):
    """The GPU's operand type, in the interpreter too. Codewords and matrix are rounded by 2^-12 of themselves; a GPU
    makes codewords by products in float16."""
    d, most = data(case), 5e-4 if DEVICE == "cpu" else TOLERANCE[DEVICE]["float32"]
    k, v = room(case, len(d.k), torch.float32)
    with_half_operands(Unpacker(d.tables)).bind(d.rows)(task_of(case, k, v))
    for got, want in zip((k, v), expected(case), strict=True):
        assert 0 < relative_error(got, want) < most
        # In each channel, though a token's scales lie far apart: less than the result's rounding to bfloat16.
        assert error_of_channels(got, want) < 2**-9


@pytest.mark.parametrize("gain", [1e-6, 1e6])
def test_half_operands_hold_any_gain(gain):
    """Transforms scale channels as calibration found them; float16 alone would lose these."""
    d = data(TEMPLATE)
    uneven = torch.logspace(-3, 3, TEMPLATE.head_dim, device=DEVICE) * gain
    tables = make_tables(replace(d.codec, k_in=d.codec.k_in / uneven, q_in=d.codec.q_in * uneven))
    k, v = room(TEMPLATE, len(d.k), torch.float32)
    with_half_operands(Unpacker(tables)).bind(d.rows)(task_of(TEMPLATE, k, v))
    assert error_of_channels(k, expected(TEMPLATE)[0] * uneven) < 2**-9


@over([WIDE, PRODUCT, LARGE_ANY])
def test_float16_saturates(case):
    """A key beyond float16 stays finite: one infinity would make NaN of a whole output."""
    d, unpacker = data(case), Unpacker(data(case).tables)
    unpacker.k = replace(unpacker.k, gain=unpacker.k.gain * 1e6)
    k, v = room(case, len(d.k), torch.float16)
    unpacker.bind(d.rows)(task_of(case, k, v))
    assert bool(k.isfinite().all()) and float(k.abs().max()) == 65504


def test_zero_rows_are_zero():
    """What pads a batch reads slot 0, which is zero."""
    for case in (TEMPLATE, PRODUCT):
        d, (k, v) = data(case), room(case, 3)
        Unpacker(d.tables).bind(torch.zeros_like(d.rows))(UnpackTask(torch.arange(3, device=DEVICE), k, v))
        assert not k.any() and not v.any()


@pytest.mark.skipif(DEVICE != "cpu", reason="takes memory that a GPU cannot just reserve")
@pytest.mark.usefixtures("overflow_is_an_error")
def test_slots_beyond_32_bits():
    for case in (TEMPLATE, PRODUCT):
        d, tokens = data(case), sum(case.lengths)
        rows = far_rows(d.codec.layout.row_bytes)
        slots = torch.arange(len(rows) - tokens, len(rows))
        scatter_rows(d.codec.layout, rows, slots, d.packed)
        k, v = room(case, tokens)
        Unpacker(d.tables).bind(rows)(UnpackTask(slots, k, v))
        assert relative_error(k, expected(case)[0]) < TOLERANCE[DEVICE]["float32"]


def test_bad_shapes_are_refused():
    d, unpacker = data(TEMPLATE), unpacker_of(TEMPLATE)
    slots = d.kv_indices
    k, v = room(TEMPLATE, len(d.k))
    with pytest.raises(ValueError, match="k_out .* is needed for these rows"):
        unpacker(UnpackTask(slots, k[..., :-2], v))
    with pytest.raises(ValueError, match="v_out .* contiguous channels"):
        UnpackTask(slots, k, v[..., ::2])
    with pytest.raises(ValueError, match="places for"):
        UnpackTask(slots, k[:-1], v)
    with pytest.raises(ValueError, match="dest .* each of 44"):
        UnpackTask(slots, k, v, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    for tables in (d.tables, data(PRODUCT).tables):
        with pytest.raises(ValueError, match="this layer's rows"):
            Unpacker(tables).bind(d.rows[:, :-8])
    k, v = room(TEMPLATE, len(d.k) + 2)
    both, to = (k[:2], v[:2]), torch.arange(2, device=DEVICE)
    with pytest.raises(ValueError, match=f"places for {len(d.k) + 2} tokens"):
        UnpackTask(slots, k[:-1], v, chunk=2)
    with pytest.raises(ValueError, match="chunk_dest .* each of 2"):
        UnpackTask(slots, k, v, chunk=2, chunk_dest=to[:1])
    task = UnpackTask(slots, k, v, chunk=2, chunk_dest=to)
    for bad in ((both[0], both[1][:1]), (both[0], both[1].half()), (both[0][..., ::2], both[1])):
        with pytest.raises(ValueError, match="of the chunk .* is needed"):
            unpacker(task, *bad)
