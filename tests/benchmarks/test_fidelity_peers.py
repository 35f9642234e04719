"""The caches that Block-GTQ is compared with: their definitions on hand-made tensors, and their bytes."""

import pytest
import torch

from benchmarks.fidelity import hadamard, kvarn, lineup, oscar, saw
from benchmarks.fidelity.exact import Exact, Mixed, attend
from benchmarks.fidelity.kivi import Kivi, KiviScaleOnly, key_range
from benchmarks.fidelity.methods import Cast, IntPerToken, Packed, ScaledCast
from benchmarks.fidelity.window import Window
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.rope import HEAD_DIMS, RopeBlocks
from sglang_blockgtq.kernels.format.layout import NORM_BYTES, uniform_layout

DIM = 64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def moments() -> Moments:
    """Two layers of two heads, energies falling over a thousandfold."""
    fall = torch.logspace(2, -1, DIM // 2, dtype=torch.float64)
    q, k = (fall * (0.5 + draw(2, 2, DIM // 2, seed=s).double().abs()) for s in (1, 2))
    return Moments(q, k, torch.full((2, 2), float(DIM), dtype=torch.float64), 2048)


def table(moments, allocator="uniform", k_bits=3, v_bits=3, **kw):
    rope = [RopeBlocks(DIM, DIM)] * 2
    return build_table(moments, rope, k_bits=k_bits, v_bits=v_bits, allocator=allocator, **kw)


class TestKivi:
    def test_keys_by_channel_are_exact_where_they_lie_on_the_steps(self):
        """Each channel has its own low and step: 32 tokens on four levels, channels a thousand times apart."""
        codes = torch.arange(32) % 4
        step = 2.0 ** (torch.arange(DIM) % 11 - 5)
        low = -3.0 * step
        k = (low + codes[:, None] * step)[:, None]
        got, _ = Kivi(2, DIM, DIM).round_trip(0, k, torch.zeros(32, 1, DIM))
        torch.testing.assert_close(got, k, atol=0, rtol=0)
        by_token, _ = IntPerToken(2, DIM, DIM).round_trip(0, k, k)
        assert (by_token - k).abs().max() > 1  # which one range for all channels cannot do

    def test_a_channel_is_rounded_to_the_nearest_of_its_levels(self):
        k = torch.zeros(32, 1, DIM)
        k[:4, 0, 5] = torch.tensor([0.0, 3.0, 1.4, 1.6])
        got, _ = Kivi(2, DIM, DIM).round_trip(0, k, torch.zeros(32, 1, DIM))
        assert got[:4, 0, 5].tolist() == [0.0, 3.0, 1.0, 2.0]
        assert not got[..., :5].any() and not got[..., 6:].any()

    def test_groups_of_32_tokens_do_not_touch(self):
        k = torch.cat([draw(32, 2, DIM), 100 * draw(32, 2, DIM, seed=1), draw(7, 2, DIM, seed=2)])
        kivi, v = Kivi(3, DIM, DIM), torch.zeros(71, 2, DIM)
        got, _ = kivi.round_trip(0, k, v)
        for part in (slice(0, 32), slice(32, 64), slice(64, 71)):
            alone, _ = kivi.round_trip(0, k[part], v[part])
            torch.testing.assert_close(got[part], alone, atol=0, rtol=0)
            half_step = (k[part].amax(0) - k[part].amin(0)) / 7 / 2
            assert bool(((got[part] - k[part]).abs() <= 1.01 * half_step + 1e-3 * k[part].abs().amax()).all())

    def test_values_by_token_in_groups_of_32_channels(self):
        v = torch.cat([torch.arange(32) % 4 * 0.25, torch.arange(32) % 4 * 16.0 - 7])[None, None]
        _, got = Kivi(2, DIM, DIM).round_trip(0, torch.zeros(1, 1, DIM), v)
        torch.testing.assert_close(got, v, atol=0, rtol=0)

    def test_scale_only_takes_the_bounds_of_the_group_before(self):
        """Against a loop over tokens and channels."""
        k, bits = draw(80, 2, DIM, seed=3), 2
        first = torch.stack([torch.full((2, DIM), -1.5), torch.full((2, DIM), 1.5)])
        got, _ = KiviScaleOnly(bits, DIM, DIM, first[None]).round_trip(0, k, torch.zeros(80, 2, DIM))
        for start in range(0, 80, 32):
            seen = first if start == 0 else k[start - 32 : start]
            low = seen.amin(0).half().float()
            step = ((seen.amax(0) - low) / 3).half().float()
            for token in range(start, min(start + 32, 80)):
                for head in range(2):
                    levels = low[head] + step[head] * torch.arange(4)[:, None]
                    nearest = (levels - k[token, head]).abs().argmin(0)
                    want = levels.gather(0, nearest[None])[0]
                    torch.testing.assert_close(got[token, head], want, atol=1e-6, rtol=1e-6)
        assert got[:32].abs().max() == 1.5 < k[:32].abs().max()  # clamped to what calibration had seen

    def test_key_range(self):
        keys = {0: draw(50, 2, 4), 1: draw(50, 2, 4, seed=1)}
        got = key_range(keys)
        assert got.shape == (2, 2, 2, 4)
        assert float(got[1, 0, 1, 3]) == min(keys[1][:, 1, 3].tolist())
        assert float(got[0, 1, 0, 2]) == max(keys[0][:, 0, 2].tolist())

    def test_constant_channel(self):
        k = torch.full((32, 1, DIM), 0.3)
        got, _ = Kivi(2, DIM, DIM).round_trip(0, k, k)
        torch.testing.assert_close(got, k, atol=2e-4, rtol=0)  # float16 low

    def test_values_in_groups_need_whole_groups(self):
        with pytest.raises(ValueError, match="v_head_dim 80.*leave kivi out"):
            Kivi(2, 80, 80)


class TestInt:
    def test_asymmetric_two_bits(self):
        """The smallest and the largest channel are levels, whatever their signs, and there are two between them."""
        x = torch.tensor([[[-1.0, 5.0, 0.9, 1.1, 3.9, 2.9, -1.0, 4.1]]])
        k, _ = IntPerToken(2, 8, 8).round_trip(0, x, x)
        assert k[0, 0].tolist() == [-1.0, 5.0, 1.0, 1.0, 3.0, 3.0, -1.0, 5.0]

    def test_every_token_and_head_has_its_own_range(self):
        x = draw(5, 3, DIM) * torch.tensor([0.01, 1.0, 100.0])[:, None]
        _, v = IntPerToken(3, DIM, DIM).round_trip(0, x, x)
        half_step = (x.amax(-1) - x.amin(-1)) / 7 / 2
        error = (v - x).abs().amax(-1)
        assert bool((error <= 1.02 * half_step).all()) and bool((error > 0.5 * half_step).all())
        assert all(len(head.unique()) <= 8 for token in v for head in token)


class TestCast:
    def test_fp8_is_torchs_cast_with_scale_one(self):
        x = torch.cat([draw(4000) * 10 ** (4 * draw(4000, seed=1)), torch.tensor([0.0, 448.0, -448.0, 2.0**-9])])
        x = x[x.abs() <= 448][None, None]
        method = Cast("fp8_e4m3", torch.float8_e4m3fn, x.shape[-1], x.shape[-1])
        k, v = method.round_trip(0, x, x)
        want = x.to(torch.float8_e4m3fn).float()
        torch.testing.assert_close(k, want, atol=0, rtol=0)
        torch.testing.assert_close(v, want, atol=0, rtol=0)
        assert (k - x).abs().max() > 0

    def test_fp8_saturates(self):
        x = torch.tensor([[[500.0, -1e6, 448.0]]])
        assert Cast("fp8_e4m3", torch.float8_e4m3fn, 3, 3).round_trip(0, x, x)[0].tolist() == [[[448.0, -448.0, 448.0]]]

    def test_scaled_fp8_reaches_what_was_seen_and_no_further(self):
        """Powers of two as scales: the cast alone, moved; keys and values of a layer have one each."""
        largest = torch.tensor([[1.0, 1.0], [448 * 64.0, 448 / 16.0]])
        method = ScaledCast("fp8-scaled", torch.float8_e4m3fn, 4, 4, largest)
        x = torch.tensor([[[300.0, -28672.0, 30000.0, 0.1]]])
        k, v = method.round_trip(1, x, x / 1024)
        plain = (x / 64).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        torch.testing.assert_close(k, plain * 64, atol=0, rtol=0)
        torch.testing.assert_close(v, plain / 16, atol=0, rtol=0)
        assert k[0, 0, 2] == 28672 and Cast("fp8", torch.float8_e4m3fn, 4, 4).round_trip(1, x, x)[0].max() == 448


class TestSaw:
    def test_blocks_of_channels_do_not_touch(self):
        """Against sums and differences written out, for blocks of two."""
        x = draw(6, 2, 8)
        turn = saw.block_hadamard(8, 2)
        even, odd = x[..., ::2], x[..., 1::2]
        want = torch.stack([even + odd, even - odd], -1).flatten(-2) / 2**0.5
        torch.testing.assert_close(x @ turn.T, want)

    def test_keys_are_coded_in_the_rotated_channels_and_values_as_they_are(self):
        k, v = draw(9, 2, DIM), draw(9, 2, DIM, seed=1)
        got_k, got_v = saw.SawInt4(4, DIM, DIM).round_trip(0, k, v)
        inner = IntPerToken(4, DIM, DIM)
        torch.testing.assert_close(got_v, inner.round_trip(0, v, v)[0], atol=0, rtol=0)
        h = torch.block_diag(*[hadamard.hadamard(16).float() / 4] * 4)
        want = torch.stack([h.T @ t for t in inner.round_trip(0, k @ h.T, v)[0].flatten(0, 1)]).view_as(k)
        torch.testing.assert_close(got_k, want, atol=1e-5, rtol=1e-5)
        assert (saw.SawInt4(4, DIM, DIM, DIM, True).round_trip(0, k, v)[1] - got_v).abs().max() > 0.01

    def test_an_outlier_spreads_over_its_block(self):
        """One channel of 16 times the others: a block of Hadamard makes the range, and so the error, smaller."""
        k = draw(500, 1, DIM, seed=2)
        k[..., 5] *= 16
        plain, turned = (m.round_trip(0, k, k)[0] for m in (IntPerToken(4, DIM, DIM), saw.SawInt4(4, DIM, DIM)))
        assert (turned - k).square().mean() < 0.5 * (plain - k).square().mean()

    def test_blocks_have_to_fit(self):
        with pytest.raises(ValueError, match="block = 48"):
            saw.SawInt4(4, DIM, DIM, 48)


class TestOscar:
    def test_covariances_against_loops(self):
        q, k, v = draw(5, 4, 8), draw(5, 2, 8, seed=1), draw(5, 2, 4, seed=2)
        of_q, of_v = oscar.covariances(q, k, v)
        for head in range(2):
            mine = q[:, 2 * head : 2 * head + 2].double().flatten(0, 1)
            second = sum(torch.outer(x, x) for x in mine) / len(mine)
            torch.testing.assert_close(of_q[head], second)
            weight = torch.stack([x @ second @ x for x in k[:, head].double()])
            weight = weight / weight.sum()
            want = sum(w * torch.outer(x, x) for w, x in zip(weight, v[:, head].double(), strict=True))
            torch.testing.assert_close(of_v[head], want)

    def test_rotation_spreads_each_eigenvector_evenly(self):
        """A direction that queries like best is as large in all stored channels, and nothing is lost."""
        basis = torch.linalg.qr(draw(DIM, DIM).double())[0]
        moment = ((basis * torch.logspace(3, 0, DIM, dtype=torch.float64)) @ basis.T).expand(2, -1, -1)
        for turn in oscar.rotation(moment, True):
            torch.testing.assert_close(turn @ turn.T, torch.eye(DIM), atol=1e-5, rtol=0)
            stored = basis[:, 0].float() @ turn
            torch.testing.assert_close(stored.abs(), torch.full((DIM,), DIM**-0.5), atol=1e-4, rtol=0)

    def test_one_rotation_a_layer_or_one_a_head(self):
        moment = torch.stack([torch.diag(draw(DIM, seed=s).double().abs()) for s in (1, 2)])
        layer, head = (oscar.rotation(moment, per_head) for per_head in (False, True))
        assert torch.equal(layer[0], layer[1]) and not torch.equal(head[0], head[1])

    def test_clipping_keeps_what_lies_below_the_quantile(self):
        x = torch.arange(1.0, 65.0) * torch.tensor([1, -1]).repeat(32)
        got = oscar.clipped(x, 0.96)  # the 61st of 0 to 63 is 62
        assert (
            got.abs().max() == 62 and torch.equal(got[:62], x[:62]) and torch.equal(got[62:], torch.tensor([62.0, -62]))
        )

    def test_four_levels_in_the_rotated_channels(self):
        moments = [(torch.stack([torch.diag(draw(DIM, seed=s).double().abs())] * 2),) * 2 for s in (1, 2)]
        method = oscar.Oscar(DIM, DIM, moments, False)
        k, v = draw(7, 2, DIM), draw(7, 2, DIM, seed=1)
        got = method.round_trip(1, k, v)
        for x, read, turn, ratio in zip((k, v), got, method.rotations[1], (0.96, 0.92), strict=True):
            stored = x @ turn[0]
            want = IntPerToken(2, DIM, DIM).round_trip(1, oscar.clipped(stored, ratio), v)[0]
            torch.testing.assert_close(read @ turn[0], want, atol=1e-5, rtol=1e-4)

    def test_vectors_of_two_groups_are_refused(self):
        with pytest.raises(ValueError, match="head_dim 256"):
            oscar.Oscar(256, 256, [], False)


class TestKvarn:
    def test_scales_even_out_rows_and_columns(self):
        """What was multiplied onto rows and columns is found again; factors are within what a scale may be."""
        rows, columns = (2.0 ** (0.15 * x) for x in (draw(3, 64, 1, seed=1), draw(3, 1, 128, seed=2)))
        tiles = 8 * draw(3, 64, 128) * rows * columns
        column, row = kvarn.scales(tiles)
        even = tiles / column / row
        for dim in (-1, -2):
            torch.testing.assert_close(even.std(dim), torch.ones_like(even.std(dim)), atol=0.05, rtol=0)
        found = (row / rows).log()
        assert (found - found.mean((1, 2), keepdim=True)).abs().max() < 0.25  # noise of a row of 128 numbers

    def test_the_step_of_least_imbalance_counts(self):
        """Tile by tile against all 16 steps; unlike factors, so that it is the last one for some tiles only."""
        tiles = draw(20, 16, 8) * 2.0 ** draw(20, 16, 1, seed=1) * 2.0 ** draw(20, 1, 8, seed=2)
        column, row = kvarn.scales(tiles)
        assert min(column.min(), row.min()) >= 0.74  # exp(-0.3)
        found = []
        for n, tile in enumerate(tiles):
            logs, steps = [torch.zeros(8), torch.zeros(16, 1)], [(torch.ones(8), torch.ones(16, 1))]
            for _ in range(16):
                for i, dim in enumerate((0, 1)):
                    now = tile / logs[0].exp() / logs[1].exp()
                    logs[i] = (logs[i] + now.std(dim, keepdim=dim == 1).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
                steps.append((logs[0].exp(), logs[1].exp()))
            even = [tile / c / r for c, r in steps]
            imbalance = [float(max(x.std(0)) / min(x.std(0)) + max(x.std(1)) / min(x.std(1))) for x in even]
            found.append(imbalance.index(min(imbalance)))
            torch.testing.assert_close((column[n, 0], row[n]), steps[found[-1]], atol=1e-5, rtol=1e-4)
        assert 0 < found.count(16) < 20

    def test_an_even_tile_keeps_its_scales(self):
        """Nothing is divided where that would only make the deviations less even; small tiles are not blown up."""
        column, row = kvarn.scales(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 4, 4) * 1e-6)
        assert bool((column == column[0, 0, 0]).all()) and bool((row == row[0, 0, 0]).all())

    def test_a_row_is_rounded_between_its_bounds(self):
        """Against a loop over rows, with the scales that were found."""
        tiles = draw(2, 8, 16)
        column, row = kvarn.scales(tiles)
        got = kvarn.tile_round_trip(tiles, 2)
        for n in range(2):
            for r in range(8):
                x = tiles[n, r] / column[n, 0] / row[n, r]
                levels = x.min() + (x.max() - x.min()) / 3 * torch.arange(4)
                nearest = levels[(levels[:, None] - x).abs().argmin(0)] * column[n, 0] * row[n, r]
                torch.testing.assert_close(got[n, r], nearest, atol=5e-3, rtol=2e-3)  # float16 scales

    def test_keys_by_channel_values_by_token_in_whole_tiles(self):
        k, v = 2 * draw(300, 2, DIM), 2 * draw(300, 2, DIM, seed=1)
        got = kvarn.Kvarn(4, 2, DIM, DIM).round_trip(0, k, v)
        h = hadamard.hadamard(DIM).float() / DIM**0.5
        for x, read, bits, by_channel in ((k, got[0], 4, True), (v, got[1], 2, False)):
            torch.testing.assert_close(read[256:], x[256:].half().float(), atol=0, rtol=0)  # the open tile
            for start in (0, 128):
                tile = x[start : start + 128, 1] @ h.T
                want = kvarn.tile_round_trip((tile.T if by_channel else tile)[None], bits)[0]
                want = (want.T if by_channel else want) @ h
                torch.testing.assert_close(read[start : start + 128, 1], want, atol=1e-4, rtol=1e-4)

    def test_less_than_a_tile_is_exact(self):
        k = draw(5, 2, DIM)
        assert torch.equal(kvarn.Kvarn(2, 2, DIM, DIM).round_trip(0, k, k)[0], k.half().float())


class TestExact:
    def test_kept(self):
        positions = torch.tensor([0, 5, 7, 9])
        causal = torch.arange(10) <= positions[:, None]

        def kept(rule):
            return [row.nonzero()[:, 0].tolist() for row in rule.kept(positions, 10) & causal]

        assert kept(Exact()) == [[], [], [], []]
        assert kept(Exact(sink=2)) == [[0], [0, 1], [0, 1], [0, 1]]
        assert kept(Exact(recent=3)) == [[0], [3, 4, 5], [5, 6, 7], [7, 8, 9]]
        assert kept(Exact(group=4)) == [[0], [4, 5], [4, 5, 6, 7], [8, 9]]
        assert kept(Exact(1, 1, 4)) == [[0], [0, 4, 5], [0, 4, 5, 6, 7], [0, 8, 9]]

    def test_names(self):
        assert [str(Exact()), str(Exact(64, 256)), str(Exact(0, 0, 8))] == ["none", "first 64 last 256", "open 8"]

    def test_attention_against_one_query_at_a_time(self, monkeypatch):
        """Keys and values with rules of their own, three queries of each part, two query heads a KV head."""
        monkeypatch.setattr("benchmarks.fidelity.exact.QUERIES", 3)
        q, k, v = draw(11, 4, 8), draw(11, 2, 8, seed=1), draw(11, 2, 6, seed=2)
        coded = draw(11, 2, 8, seed=3), draw(11, 2, 6, seed=4)
        rules = Exact(sink=2, group=4), Exact(recent=3)
        got = attend(q, (k, v), coded, rules)
        for p in range(11):
            for head in range(4):
                mine = []
                for exact, other, rule in zip((k, v), coded, rules, strict=True):
                    kept = rule.kept(torch.tensor([p]), p + 1)[0]
                    mine.append(torch.where(kept[:, None], exact[: p + 1, head // 2], other[: p + 1, head // 2]))
                weights = (mine[0] @ q[p, head] / 8**0.5).softmax(0)
                torch.testing.assert_close(got[p, head], weights @ mine[1], atol=1e-5, rtol=1e-5)

    def test_bytes(self):
        """Half an open group is counted; what is exact cannot be more than there is."""
        coded = IntPerToken(2, DIM, 32)
        mixed = Mixed(coded, DIM, 32, Exact(sink=100, group=128), Exact(recent=50))
        assert mixed.sizes(1000) == ((164 * 128 + 836 * 20) / 1000, (50 * 64 + 950 * 12) / 1000)
        assert mixed.sizes(40) == (128, 64) and mixed.bytes_per_token_head == 32


class TestHadamard:
    def test_rows_of_plus_and_minus_one_are_orthogonal(self):
        for n in HEAD_DIMS:
            h = hadamard.hadamard(n)
            assert bool((h.abs() == 1).all())
            torch.testing.assert_close(h @ h.T, n * torch.eye(n, dtype=torch.float64), atol=1e-9, rtol=0)

    def test_rotation_is_orthonormal_and_seeded(self):
        for n in (48, 64, 112):
            a, b = hadamard.hadamard_rotation(n, 1), hadamard.hadamard_rotation(n, 2)
            torch.testing.assert_close(a @ a.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
            torch.testing.assert_close(a, hadamard.hadamard_rotation(n, 1), atol=0, rtol=0)
            assert 0 < int((a != b).any(0).sum()) < n  # signs of some channels differ

    def test_sizes_without_one_are_refused(self):
        with pytest.raises(ValueError, match="23"):
            hadamard.hadamard(46)

    def test_table_with_hadamard(self, moments):
        haar = table(moments)
        other = hadamard.with_hadamard(haar)
        assert other.header.table_hash == other.computed_hash() != haar.header.table_hash
        rotation = other.tensors[f"rotation.{DIM}"]
        torch.testing.assert_close(rotation.abs(), torch.full((DIM, DIM), DIM**-0.5))
        k, v = draw(200, 2, DIM), draw(200, 2, DIM, seed=1)
        fine = Packed(hadamard.with_hadamard(table(moments, k_bits=8, v_bits=8)))
        for x, y in zip((k, v), fine.round_trip(1, k, v), strict=True):
            torch.testing.assert_close(y, x, atol=0.05, rtol=0.02)
        a, b = (Packed(t).round_trip(1, k, v) for t in (haar, other))
        assert (a[0] - b[0]).abs().max() > 0.1 and (a[1] - b[1]).abs().max() > 0.1


class TestWindow:
    def test_kept(self):
        window = Window(IntPerToken(2, DIM, DIM), DIM, DIM, sink=2, recent=3)
        kept = window.kept(torch.tensor([0, 4, 9]), 10)
        assert [row.nonzero()[:, 0].tolist() for row in kept] == [
            list(range(10)),
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
            [0, 1, 7, 8, 9],
        ]
        causal = torch.arange(10) <= torch.tensor([0, 4, 9])[:, None]
        assert (kept & causal).sum(-1).tolist() == [1, 5, 5]

    def test_kept_tokens_are_float16_and_the_others_coded(self):
        k, v = draw(200, 2, DIM), draw(200, 2, DIM, seed=1)
        inner = IntPerToken(2, DIM, DIM)
        got = Window(inner, DIM, DIM).round_trip(0, k, v)
        for x, y, coded in zip((k, v), got, inner.round_trip(0, k, v), strict=True):
            for part in (slice(0, 4), slice(72, 200)):
                torch.testing.assert_close(y[part], x[part].half().float(), atol=0, rtol=0)
                assert (y[part] - coded[part]).abs().max() > 0.1
            torch.testing.assert_close(y[4:72], coded[4:72], atol=0, rtol=0)

    def test_what_is_coded_keeps_its_positions(self):
        class Positions:
            name, k_bits, v_bits, bytes_per_token_head = "", 0, 0, 0

            def round_trip(self, layer, k, v, first=0):
                positions = torch.arange(first, first + len(k)).float()[:, None, None]
                return positions.expand_as(k), v

        k, _ = Window(Positions(), DIM, DIM, 2, 3).round_trip(0, torch.zeros(9, 1, DIM), torch.zeros(9, 1, DIM), 700)
        assert k[:, 0, 0].tolist() == [0, 0, 702, 703, 704, 705, 0, 0, 0]

    def test_bytes(self):
        window = Window(IntPerToken(2, DIM, 32), DIM, 32)
        assert window.sizes(100) == (128, 64)  # all tokens are exact
        assert window.sizes(1132) == ((132 * 128 + 1000 * 20) / 1132, (132 * 64 + 1000 * 12) / 1132)


class TestBytes:
    def test_every_method(self, moments):
        """head_dim 64: 8 bytes of codes a bit, and what each stores beside them."""
        bits, codes = 3, 24
        uniform = Packed(table(moments, k_bits=bits, v_bits=bits))
        sized = {
            "uniform": (uniform, codes + 2, codes + 2),
            "hadamard": (
                Packed(hadamard.with_hadamard(table(moments, k_bits=bits, v_bits=bits))),
                codes + 2,
                codes + 2,
            ),
            "template": (Packed(table(moments, "template", bits, bits)), codes + 2, codes + 2),
            "product-segment": (Packed(table(moments, "product", bits, bits)), codes + 2, codes + 2),
            "int": (IntPerToken(bits, DIM, DIM), codes + 4, codes + 4),
            "kivi": (Kivi(bits, DIM, DIM), codes + 8, codes + 8),
            "saw": (saw.SawInt4(bits, DIM, DIM), codes + 4, codes + 4),
            "oscar": (oscar.Oscar(DIM, DIM, [], False), 16 + 4, 16 + 4),
            # float16 in a tile of 128 tokens: bounds of 64 channels and scales of 128 tokens; and the other way round
            "kvarn": (kvarn.Kvarn(bits, bits, DIM, DIM), codes + 4, codes + 5),
        }
        for name, (method, key, value) in sized.items():
            assert method.sizes(4096) == (key, value), name
            assert method.bytes_per_token_head == key + value, name

    def test_a_group_cut_short_costs_as_much_as_a_whole_one(self):
        assert Kivi(2, DIM, DIM).sizes(33)[0] == 16 + 2 * 64 * 4 / 33

    def test_scales_of_width_groups_are_counted(self, moments):
        method = Packed(table(moments, "paper", granularity="block"))
        groups = [max(layout.num_norms for layout in codec.layout.k) for codec in method.codecs]
        assert min(groups) > 2
        key, value = method.sizes(4096)
        assert key == pytest.approx(24 + 2 * sum(groups) / 2) and value == 26
        assert key + value == pytest.approx(method.bytes_per_token_head)

    def test_equal_bits_is_the_least_that_takes_the_bytes(self):
        for dim in (32, 48, 64, 80, 128, 256):
            for bits in (1, 2, 3, 4, 8):
                assert lineup.equal_bits(dim * bits / 8 + 2, dim) == bits
            for size in (dim / 8 + 3.2, dim / 3 + 2, dim * 0.7):
                bits = lineup.equal_bits(size, dim)
                assert size <= uniform_layout(dim, bits).code_bytes + NORM_BYTES < size + 1
                assert bits * dim / 2 == int(bits * dim / 2)
            assert lineup.equal_bits(dim + 2.5, dim) is None  # above 8 bits
