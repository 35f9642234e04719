"""The caches that Block-GTQ is compared with: their definitions on hand-made tensors, and their bytes."""

import pytest
import torch

from benchmarks.fidelity import hadamard, lineup
from benchmarks.fidelity.kivi import Kivi, KiviScaleOnly, key_range
from benchmarks.fidelity.methods import Cast, IntPerToken, Packed
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
