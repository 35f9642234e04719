"""Keys that are coded less their page's mean: the definition, and where kernels must tell pages and positions apart."""

from dataclasses import replace

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.decode.attention import decode_attention
from sglang_blockgtq.kernels.decode.splits import SPLIT_UNIT, split_lengths
from sglang_blockgtq.kernels.device.tables import ColumnTables, templates_of
from sglang_blockgtq.kernels.encode import encoder
from sglang_blockgtq.kernels.encode.encoder import Encoder
from sglang_blockgtq.kernels.format.codebook import codebook_table
from sglang_blockgtq.kernels.format.layout import gather_rows
from sglang_blockgtq.kernels.format.pack import unpack
from sglang_blockgtq.kernels.format.page_mean import SCALE_MIN, PageMean, residual
from sglang_blockgtq.kernels.host.decode import HostReader
from sglang_blockgtq.kernels.host.encode import HostEncoder
from sglang_blockgtq.kernels.layer import TritonLayer
from sglang_blockgtq.kernels.unpack import task as task_module
from sglang_blockgtq.kernels.unpack.task import UnpackTask
from sglang_blockgtq.kernels.unpack.unpacker import Unpacker

from .matrix import (
    DEVICE,
    MEAN_CASES,
    MEANS,
    PRODUCT,
    TOLERANCE,
    Data,
    assert_same,
    data,
    decode_queries,
    over,
    page_mean,
    relative_error,
)

PARTLY_ROTARY = MEAN_CASES[1]
#: One request, of which two splits hold 160 tokens each or four 96: the others begin between the borders of two tiles.
CUT = replace(MEANS, lengths=(310,), queries=(3,))


def flags_of(d: Data) -> torch.Tensor:
    return reference.scales_of(d.codec, d.packed)[..., 0] < 0


def encoded(d: Data, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows as a kernel encodes them."""
    rows, slots = torch.full_like(d.rows, 255), torch.arange(len(k), device=DEVICE)
    Encoder(d.tables, rows)(k, v, slots, positions)
    return gather_rows(d.codec.layout, rows, slots)


def unpacked(d: Data, positions: torch.Tensor) -> torch.Tensor:
    """The case's keys, as if they lay at ``positions``."""
    k, v = torch.empty(d.k.shape, device=DEVICE), torch.empty(d.v.shape, device=DEVICE)
    Unpacker(d.tables).bind(d.rows)(UnpackTask(d.kv_indices, k, v, positions=positions))
    return k


def turned(mean: PageMean, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """``x [T, H, D]`` turned by ``by [T]`` positions, float64."""
    blocks = torch.view_as_complex(x.double()[..., mean.pairs])
    blocks = blocks * torch.polar(torch.ones_like(mean.theta), by[:, None] * mean.theta)[:, None]
    out = torch.empty(blocks.shape[0], *x.shape[1:], dtype=torch.float64, device=x.device)
    out[..., mean.pairs] = torch.view_as_real(blocks)
    return out


@pytest.mark.parametrize("page", [0, 63, 96, 192, -64])
def test_pages_that_tiles_do_not_fit_are_refused(page):
    mean = page_mean(MEANS)
    with pytest.raises(ValueError, match=f"page = {page}: a power of two of at least 64 positions"):
        replace(mean, page=page)


def test_rows_of_any_layout_have_no_means():
    with pytest.raises(ValueError, match="only rows in columns"):
        replace(data(PRODUCT).codec, mean=page_mean(MEANS))


@over(MEAN_CASES)
def test_the_mean_turns_to_each_pages_first_position(case):
    """In the channels of a key, at any distance, and the same through either way to it."""
    mean = data(case).codec.mean
    at_zero = torch.empty(1, case.heads, case.head_dim, device=DEVICE)
    at_zero[..., mean.pairs] = mean.mean
    pages = torch.tensor([0, 1, 2, 468, 2047], device=DEVICE)
    want = turned(mean, at_zero, pages * case.page)
    torch.testing.assert_close(mean.first_pages(2048)[pages].double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean.at(pages.flip(0) * case.page + 63).double(), want.flip(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rotary", [0, 96])
def test_channels_without_rope_have_one_mean(rotary):
    mean = page_mean(replace(PARTLY_ROTARY, rotary=rotary))
    pages = mean.first_pages(300)
    assert not mean.theta[rotary // 2 :].any() and bool((mean.theta[: rotary // 2] > 0).all())
    assert bool(pages[0, :, rotary:].any()) and bool((pages[..., rotary:] == pages[:1, :, rotary:]).all())
    assert bool((pages[0] != pages[1]).any()) == (rotary > 0)


@over(MEAN_CASES)
def test_flags_minimise_the_weighted_energy(case):
    """Of what is coded, weighted as the errors of codes are."""
    d = data(case)
    at, into = d.codec.mean.at(d.positions).double(), d.codec.k_in.double()
    y, mean = (torch.einsum("thd,hed->the", x, into) for x in (d.k.double(), at))

    def energy(x: torch.Tensor) -> torch.Tensor:
        return (x.square() * d.codec.k_weight.double()).sum(-1)

    coded, flags = residual(y.float(), mean.float(), d.codec.k_weight)
    assert torch.equal(flags, energy(mean - y) < energy(y))
    assert torch.equal(flags, flags_of(d)) and bool(flags.any()) and not bool(flags.all())
    assert torch.equal(coded[~flags], y.float()[~flags])
    torch.testing.assert_close(coded[flags], (mean - y).float()[flags], rtol=1e-5, atol=1e-5)


@over(MEAN_CASES)
def test_means_in_stored_channels(case):
    d = data(case)
    stored = d.tables.means.stored[:-1, :, : case.head_dim]
    want = torch.einsum("phd,hed->phe", d.codec.mean.first_pages(len(stored)).double(), d.codec.k_in.double())
    assert relative_error(stored, want) < 1e-6 and not bool(d.tables.means.stored[..., case.head_dim :].any())


@over(MEAN_CASES)
def test_a_flagged_key_is_its_mean_and_scale_times_level(case):
    """The scale with its sign, worked out from codes in float64."""
    d = data(case)
    row, scales = d.codec.layout, reference.scales_of(d.codec, d.packed)[..., 0].double()
    got, means = reference.decode(d.codec, d.packed, d.positions)[0], d.codec.mean.at(d.positions).double()
    for h, layout in enumerate(row.k):
        codes = unpack(layout, d.packed[:, h * row.k_code_bytes :], True).long()
        level = codebook_table(d.k.device).double()[torch.tensor(layout.widths, device=DEVICE), codes]
        want = scales[:, h, None] * level @ d.codec.q_in[h].double()
        want += (scales[:, h, None] < 0) * means[:, h]
        assert relative_error(got[:, h], want) < 1e-6


@over(MEAN_CASES)
def test_a_products_two_parts(case):
    """A query's product with a key is that with the codes and, of flagged keys, its product with the page's mean."""
    d, b = data(case), case.lengths.index(max(case.lengths))
    part = slice(int(d.kv_indptr[b]), int(d.kv_indptr[b + 1]))
    q = decode_queries(case).float().unflatten(1, (case.heads, case.group))
    coded = reference.decode_transformed(d.codec, d.packed[part])[0]
    got = torch.einsum("mhgd,hed,nhe->hgmn", q, d.codec.q_in, coded)
    bias = reference.page_bias(d.codec, q, d.packed[part])
    k = reference.decode(d.codec, d.packed[part], d.positions[part])[0]
    assert relative_error(got + bias, torch.einsum("mhgd,nhd->hgmn", q, k)) < 1e-5
    assert bool((bias != 0).any()) and not bool(bias.permute(3, 0, 1, 2)[~flags_of(d)[part]].any())


def test_keys_without_a_page_have_no_mean():
    """What a draft's tokens are whose place lies in another page than their position."""
    d = data(MEANS)
    nowhere = torch.full((len(d.k),), d.tables.means.nowhere, device=DEVICE)
    packed, plain = encoded(d, d.k, d.v, nowhere), replace(d.codec, mean=None)
    want = reference.decode(plain, reference.encode(plain, d.k, d.v))[0]
    assert bool(flags_of(d).any()) and relative_error(reference.decode(plain, packed)[0], want) < 0.01
    assert not bool((reference.scales_of(d.codec, packed)[..., 0] < 0).any())


def test_a_key_that_is_its_mean(monkeypatch):
    """Of a residual of rounding alone the scale would be zero, and its sign no flag."""
    d = data(MEANS)
    positions = torch.tensor([0, 5, 63], device=DEVICE)
    k, v = d.codec.mean.at(positions), d.v[:3]
    rows = [reference.encode(d.codec, k, v, positions)]
    for few in (0, 1 << 30):
        monkeypatch.setattr(encoder, "FEW_CHANNELS", few)
        rows.append(encoded(d, k, v, positions))
    if DEVICE == "cpu":
        rows.append(HostEncoder(d.codec)(k, v, positions))
    for found in rows:
        scales = reference.scales_of(d.codec, found)[..., 0]
        assert bool(((scales <= -SCALE_MIN) & (scales > -1e-4)).all())
        assert relative_error(reference.decode(d.codec, found, positions)[0], k) < 1e-5


@pytest.mark.parametrize("page, target, size, q_len", [(64, 2, 160, 1), (64, 4, 96, 3), (128, 4, 96, 1)])
def test_splits_that_begin_between_the_borders_of_tiles(page, target, size, q_len):
    """A tile of 64 tokens from there on would lie in two pages."""
    case = replace(CUT, page=page)
    assert split_lengths(torch.tensor(case.lengths), target)[0] == size and size // SPLIT_UNIT % 2
    d, q = data(case), decode_queries(case, q_len)
    want = reference.decode_attention(d.codec, q, d.packed, d.kv_indptr, d.sm_scale, q_len)
    for splits in (1, target):
        got = decode_attention(d.tables, q, d.rows, d.kv_indptr, d.kv_indices, d.sm_scale, q_len=q_len, target=splits)
        assert_same(got, want, TOLERANCE[DEVICE]["float32"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_tiles_of_any_positions_are_unpacked(monkeypatch, dtype, programs):
    """Each token's own, in tiles of many pages and of one, whatever the tile before was of."""
    monkeypatch.setattr(task_module, "PROGRAMS", programs)
    d = data(MEANS)
    positions = torch.randint(0, 1 << 17, (len(d.k),), generator=torch.Generator().manual_seed(1), dtype=dtype)
    positions[64:128] = 10_000 * 64 // 10 + torch.arange(64, dtype=dtype).flip(0)
    positions = positions.to(DEVICE)
    assert (positions // 64).unique().numel() > 100 and (positions[64:128] // 64).unique().numel() == 1
    want = reference.decode(d.codec, d.packed, positions)[0]
    assert relative_error(unpacked(d, positions), want) < TOLERANCE[DEVICE]["float32"]


def test_positions_are_needed():
    """And one for each token: another page's mean would be added."""
    d = data(MEANS)
    encode, some = Encoder(d.tables, d.rows.clone()), (d.k[:4], d.v[:4], d.kv_indices[:4])
    for positions, found in ((None, "None"), (d.positions[:3], r"\(3,\)"), (d.positions[:8:2], r"\(4,\)")):
        with pytest.raises(ValueError, match=rf"positions {found}: \[4\] is needed"):
            encode(*some, positions)
    k, v = torch.empty_like(d.k), torch.empty_like(d.v)
    unpacker, codec, rows = Unpacker(d.tables).bind(d.rows), d.codec.to("cpu"), d.packed[:4].cpu()
    for without in (
        lambda: unpacker(UnpackTask(d.kv_indices, k, v)),
        lambda: reference.encode(d.codec, *some[:2]),
        lambda: reference.decode(d.codec, d.packed),
        lambda: HostEncoder(codec)(d.k[:4].cpu(), d.v[:4].cpu()),
        lambda: HostReader(codec).dense(rows),
    ):
        with pytest.raises(ValueError, match="positions: needed"):
            without()
    with pytest.raises(ValueError, match=rf"positions \(3,\): one for each of {len(k)} tokens"):
        UnpackTask(d.kv_indices, k, v, positions=d.positions[:3])


def test_keys_far_into_a_request_are_coded_as_well_as_its_first():
    """The same keys turned on to later positions, through kernels."""
    d, mean = data(MEANS), data(MEANS).codec.mean
    generator = torch.Generator().manual_seed(8)
    positions = torch.arange(0, len(d.k), 3, device=DEVICE)
    noise = torch.randn(d.k[positions].shape, generator=generator).to(DEVICE) * d.k[~flags_of(d)].std()
    k = turned(mean, mean.at(torch.zeros_like(positions)), positions) + noise  # as RoPE turns a bias
    v, errors, flagged = d.v[positions], [], []
    for later in (0, 30_000):
        there = positions + later
        turned_on = turned(mean, k, torch.full_like(positions, later)).float()
        packed = encoded(d, turned_on, v, there)
        back = reference.decode(d.codec, packed, there)[0]
        assert relative_error(back, reference.round_trip(d.codec, turned_on, v, there)[0]) < 1e-2
        errors.append(relative_error(back, turned_on))
        flagged.append(float((reference.scales_of(d.codec, packed)[..., 0] < 0).double().mean()))
    assert errors[1] == pytest.approx(errors[0], rel=0.03)
    assert min(flagged) > 0.5


def test_a_layer_encodes_decodes_and_unpacks():
    """A prefill of all tokens but each request's last, and a step whose queries are rotated where those are encoded."""
    case = MEANS
    d, indptr = data(case), data(case).kv_indptr[1:]  # without the request of no tokens
    layer = TritonLayer(d.codec, DEVICE, templates_of(d.codec.layout.k), positions=max(case.lengths))
    layer.bind(layer.new_rows(len(d.rows), DEVICE))
    last = indptr[1:].long() - 1
    before = torch.ones(len(d.k), dtype=torch.bool, device=DEVICE)
    before[last] = False
    assert layer.encode(d.k[before], d.v[before], d.kv_indices[before], d.positions[before]) is None
    q = decode_queries(case)[1:]
    rotated = layer.encode(d.k[last], d.v[last], d.kv_indices[last], d.positions[last], q)
    packed = layer.gather(d.kv_indices)
    got = layer.decode(torch.full_like(q, torch.nan), indptr, d.kv_indices, d.sm_scale, rotated=rotated)
    want = reference.decode_attention(d.codec, q, packed, indptr, d.sm_scale)[0]
    assert relative_error(got, want) < TOLERANCE[DEVICE]["float32"]
    both = layer.dense(d.kv_indices, d.positions), reference.decode(d.codec, packed, d.positions)
    for x, y in zip(*both, strict=True):
        assert relative_error(x, y) < TOLERANCE[DEVICE]["float32"]
    assert relative_error(both[0][0], d.k) < 1.01 * relative_error(
        reference.decode(d.codec, d.packed, d.positions)[0], d.k
    )


@pytest.mark.parametrize("positions, pages", [(1, 1), (63, 1), (64, 2), (139, 3)])
def test_tables_have_a_mean_for_each_page_that_a_request_may_have(positions, pages):
    codec = data(MEANS).codec
    tables = ColumnTables.of(codec, DEVICE, positions=positions)
    assert tables.means.stored.shape == (pages + 1, MEANS.heads, MEANS.head_dim)
    assert tables.means.turns.shape == (pages, 2, MEANS.head_dim // 2)
    more = ColumnTables.of(codec, DEVICE, positions=positions + 64)
    assert more.nbytes - tables.nbytes == tables.means.stored[0].nbytes + tables.means.turns[0].nbytes
