"""The emulator's primitives do what PTX says of their instructions."""

from ctypes import Structure, c_float, c_int, c_int64, c_uint32, c_void_p

import numpy as np
import pytest
import torch

from .cuda_on_cpu import compile, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

LANE = np.arange(32)
ROW, QUAD = LANE // 4, LANE % 4


def words(array) -> torch.Tensor:
    """The array's bytes as int32."""
    return torch.from_numpy(np.ascontiguousarray(array).view(np.int32))


def random_words(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, shape).astype(np.int32)


PRODUCT = """
KERNEL product(const u32* a, const u32* b, %(type)s* c) {
    %(type)s sum[4];
    for (int i = 0; i < 4; i++) sum[i] = c[4 * lane() + i];
    a += 4 * lane(), b += 2 * lane();
    %(name)s(sum, a[0], a[1], a[2], a[3], b[0], b[1]);
    for (int i = 0; i < 4; i++) c[4 * lane() + i] = sum[i];
}
"""


def fragments(a, b, c):
    """What the lanes hold, [32, values each], of a [16, k], b [k, 8] and c [16, 8], whose words are 4 or 2 values."""
    each = a.shape[1] // 8
    step, half = np.arange(each), a.shape[1] // 2
    k = QUAD[:, None] * each + step
    r = ROW[:, None]
    of_a = np.concatenate([a[r, k], a[r + 8, k], a[r, k + half], a[r + 8, k + half]], 1)
    of_b = np.concatenate([b[k, r], b[k + half, r]], 1)
    column = QUAD[:, None] * 2 + np.arange(2)
    return of_a, of_b, np.concatenate([c[r, column], c[r + 8, column]], 1)


@pytest.mark.parametrize("flags", [(), ("-DEMULATOR_UCONTEXT",)], ids=["own switch", "ucontext"])
def test_imma_is_the_product_of_signed_bytes(flags):
    random = np.random.default_rng(1)
    a, b = (random.integers(-128, 128, shape).astype(np.int8) for shape in [(16, 32), (32, 8)])
    a[3], b[:, 2] = -128, -128
    c = random.integers(-1000, 1000, (16, 8)).astype(np.int32)
    c[3, 2] = 2**31 - 1
    of_a, of_b, of_c = fragments(a, b, c)
    out = torch.from_numpy(of_c.copy())
    compile(PRODUCT % {"type": "int", "name": "imma"}, "product", flags).launch(
        (1, 1), 0, [words(of_a), words(of_b), out]
    )
    expected = (c.astype(np.int64) + a.astype(np.int64) @ b.astype(np.int64)).astype(np.int32)  # it wraps
    np.testing.assert_array_equal(out.numpy(), fragments(a, b, expected)[2])


def test_hmma_is_the_product_of_float16():
    random = np.random.default_rng(2)
    a, b = (random.standard_normal(shape).astype(np.float16) for shape in [(16, 16), (16, 8)])
    a[0, 0], b[0, 0] = 2**-24, 2**-10  # subnormals count
    c = random.standard_normal((16, 8)).astype(np.float32)
    of_a, of_b, of_c = fragments(a, b, c)
    out = torch.from_numpy(of_c.copy())
    compile(PRODUCT % {"type": "float", "name": "hmma"}, "product").launch((1, 1), 0, [words(of_a), words(of_b), out])
    expected = fragments(a, b, c + a.astype(np.float64) @ b.astype(np.float64))[2]
    np.testing.assert_allclose(out.numpy(), expected, atol=16 * 2**-22)  # 16 additions of numbers below 32


def test_ldmatrix_and_its_transposed():
    text = """
    KERNEL load(const u32* x, const u32* rows, u32* out) {
        u32* shared = (u32*)shared_memory();
        for (int i = 0; i < 4; i++) shared[lane() + 32 * i] = x[lane() + 32 * i];
        syncwarp();
        u32 address = shared_address(shared_memory()) + 16 * rows[lane()], r[4];
        ldmatrix4(r, address);
        for (int i = 0; i < 4; i++) out[8 * lane() + i] = r[i];
        ldmatrix4_trans(r, address);
        for (int i = 0; i < 4; i++) out[8 * lane() + 4 + i] = r[i];
    }
    """
    x = np.arange(256, dtype=np.int16).reshape(32, 8)  # rows of 16 bytes
    rows = np.random.default_rng(3).permutation(32).astype(np.int32)
    out = torch.zeros(32, 8, dtype=torch.int32)
    compile(text, "load").launch((1, 1), 512, [words(x), words(rows), out])
    got = out.numpy().view(np.int16).reshape(32, 2, 4, 2)  # lanes, transposed or not, matrices, halves
    matrices = x[rows].reshape(4, 8, 8)
    for half in range(2):
        np.testing.assert_array_equal(got[:, 0, :, half], matrices[:, ROW, 2 * QUAD + half].T)
        np.testing.assert_array_equal(got[:, 1, :, half], matrices[:, 2 * QUAD + half, ROW].T)


def test_movmatrix_transposes():
    x = np.arange(64, dtype=np.int16).reshape(8, 8)
    out = torch.zeros(32, dtype=torch.int32)
    text = "KERNEL move(const u32* x, u32* out) { out[lane()] = movmatrix(x[lane()]); }"
    compile(text, "move").launch((1, 1), 0, [words(x).flatten(), out])
    np.testing.assert_array_equal(out.numpy().view(np.int16).reshape(8, 8), x.T)


def prmt(a: int, b: int, selector: int) -> int:
    from_ = (b << 32 | a).to_bytes(8, "little")
    result = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = from_[nibble & 7]
        result.append((255 if byte >= 128 else 0) if nibble >= 8 else byte)
    return int.from_bytes(bytes(result), "little")


def test_prmt_replicates_signs():
    text = """
    KERNEL permute(const u32* x, u32* out) {
        for (u32 i = lane(); i < 4096; i += 32) {
            out[2 * i] = prmt(x[3 * i], x[3 * i + 1], x[3 * i + 2]);
            out[2 * i + 1] = select_bits(x[3 * i], x[3 * i + 1], x[3 * i + 2]);
        }
    }
    """
    x, out = random_words(4096, 3), torch.zeros(4096, 2, dtype=torch.int32)
    compile(text, "permute").launch((1, 1), 0, [words(x), out])
    got, given = out.numpy().view(np.uint32), x.view(np.uint32)
    assert got[:, 0].tolist() == [prmt(*map(int, one)) for one in given]
    mask, a, b = given.T
    np.testing.assert_array_equal(got[:, 1], (a & mask) | (b & ~mask))


def test_words_go_from_lane_to_lane():
    text = """
    KERNEL hand_on(const u32* x, const u32* from, u32* out) {
        u32 mine = x[lane()], i = from[lane()];
        out += 8 * lane();
        out[0] = shfl(mine, i);
        out[1] = shfl_xor(mine, 5);
        out[2] = shfl_up(mine, 3);
        float f = shfl(float(lane()), i) + shfl_xor(float(lane()), 16);
        out[3] = u32(f);
        out[4] = ballot(mine & 1);
        out[5] = any(lane() == 7) + 2 * any(lane() > 31);
        out[6] = u32(shfl_xor(-int(lane()), 1));
        out[7] = u32(shfl_up(-int(lane()), 31));
    }
    """
    x, of = random_words(32), np.random.default_rng(4).integers(0, 64, 32).astype(np.int32)
    out = torch.zeros(32, 8, dtype=torch.int32)
    compile(text, "hand_on").launch((1, 1), 0, [words(x), words(of), out])
    got, source = out.numpy().T, of % 32  # of a lane's number five bits count
    np.testing.assert_array_equal(got[0], x[source])
    np.testing.assert_array_equal(got[1], x[LANE ^ 5])
    np.testing.assert_array_equal(got[2], x[np.where(LANE < 3, LANE, LANE - 3)])
    np.testing.assert_array_equal(got[3], source + (LANE ^ 16))
    np.testing.assert_array_equal(got[4].view(np.uint32), int(sum((int(x[i]) & 1) << i for i in LANE)))
    np.testing.assert_array_equal(got[5], 1)
    np.testing.assert_array_equal(got[6], -(LANE ^ 1))
    np.testing.assert_array_equal(got[7], -np.where(LANE < 31, LANE, 0))


def test_float16_is_rounded_once():
    text = """
    KERNEL halves(const u32* x, int n, u32* out, float* wide) {
        for (int i = lane(); i < n; i += 32) {
            u32 a = x[3 * i], b = x[3 * i + 1], c = x[3 * i + 2];
            u32* to = out + 4 * i;
            to[0] = sub_f16x2(a, b), to[1] = mul_f16x2(a, b), to[2] = fma_f16x2(a, b, c);
            to[3] = pack_f16x2(f16(a) * 1.0009765f, f16(b));
            wide[i] = f16(a);
        }
    }
    """
    x = random_words(1 << 14, 3).view(np.float16).reshape(-1, 3, 2)
    # 2049 and 2055 lie between two neighbours, and float32 cannot hold what tips the balance.
    x[:4, 0], x[:4, 1, 0] = 3, [683, 683, 685, 685]
    x[:4, 1, 1], x[:4, 2] = x[:4, 1, 0], (2**-24 * np.array([1, -1, 1, -1]))[:, None]
    x[4] = [[2**-24, 2**-14], [0.5, 2**-11], [0, 0]]  # subnormal, and half of the smallest
    out, wide = torch.zeros(len(x), 4, dtype=torch.int32), torch.zeros(len(x))
    compile(text, "halves").launch((1, 1), 0, [words(x.reshape(-1)), c_int(len(x)), out, wide])
    got = out.numpy().view(np.float16).reshape(-1, 4, 2)
    assert got[:4, 2, 0].tolist() == [2050, 2048, 2056, 2054]
    with np.errstate(all="ignore"):
        a, b, c = x.astype(np.float64).transpose(1, 0, 2)  # where each of these is exact
        scaled = x[:, 0, 0].astype(np.float32) * np.float32(1.0009765)
        packed = np.stack([scaled, x[:, 1, 0].astype(np.float32)], 1)
        expected = np.stack([a - b, a * b, a * b + c, packed], 1).astype(np.float16)
    np.testing.assert_array_equal(got, expected)  # a NaN is equal to another here
    np.testing.assert_array_equal(wide.numpy(), x[:, 0, 0].astype(np.float32))
    assert set(out.numpy().view(np.uint16).reshape(got.shape)[np.isnan(got)]) == {0x7FFF}


def test_functions_of_float32():
    text = """
    KERNEL functions(const float* x, float* out) {
        out += 3 * lane();
        out[0] = exp2f_(x[lane()]), out[1] = log2f_(x[lane()]), out[2] = rcp(x[lane()]);
    }
    """
    inf, nan = np.inf, np.nan
    x = [0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, inf, -inf, nan, 2.0**31, -(2.0**31), 0, -0.0, -126, -126.5, -149, -2000]
    x += [float(i) + 0.25 for i in range(32 - len(x))]
    out = torch.zeros(32, 3)
    compile(text, "functions").launch((1, 1), 0, [torch.tensor(x), out])
    x = np.array(x)
    with np.errstate(all="ignore"):
        powers, logarithms, inverses = np.exp2(x), np.log2(x), 1 / x
    powers[powers < 2.0**-126] = 0  # flushed
    expected = np.stack([powers, logarithms, inverses], 1).astype(np.float32)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6)


POISON = -1  # 0xFFFFFFFF


def test_copies_arrive_at_the_wait_for_their_group():
    text = """
    KERNEL copies(const u32* x, u32* out) {
        u32* mine = (u32*)shared_memory() + 8 * lane();
        u32 to = shared_address(mine);
        x += 8 * lane(), out += 12 * lane();
        for (int i = 0; i < 8; i++) mine[i] = 5;
        copy_async<4>(to, x);
        copy_async<8>(to + 8, x + 2);
        copy_commit();
        copy_async<16>(to + 16, x + 4);
        copy_commit();
        for (int round = 0; round < 3; round++) {
            if (round == 1) copy_wait<1>();
            if (round == 2) copy_wait<0>();
            out[4 * round] = mine[0], out[4 * round + 1] = mine[1];
            out[4 * round + 2] = mine[3], out[4 * round + 3] = mine[7];
        }
        copy_async<4>(to, x);  // in no group
        copy_wait<0>();
        if (mine[0] != ~0u) out[0] = 7;
    }
    """
    x = np.arange(256, dtype=np.int32).reshape(32, 8)
    out = torch.zeros(32, 3, 4, dtype=torch.int32)
    compile(text, "copies").launch((1, 1), 1024, [words(x), out])
    expected = np.stack([x[:, [0, 1, 3, 7]]] * 3, 1)
    expected[:, :, 1] = 5  # what no copy goes to stays as it is
    expected[:, 0, [0, 2, 3]] = POISON
    expected[:, 1, 3] = POISON
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("synchronized", [True, False])
def test_other_lanes_see_a_copy_after_syncwarp(synchronized):
    text = """
    KERNEL neighbours(const u32* x, u32* out) {
        u32* shared = (u32*)shared_memory();
        copy_async<4>(shared_address(shared + lane()), x + lane());
        copy_commit();
        copy_wait<0>();
        %s
        out[lane()] = shared[(lane() + 1) %% 32];
    }
    """
    kernel = compile(text % ("syncwarp();" if synchronized else ""), "neighbours")
    x, right = torch.arange(32, dtype=torch.int32), []
    for backwards in (False, True):
        out = torch.zeros(32, dtype=torch.int32)
        kernel.launch((1, 1), 128, [x, out], backwards=backwards)
        right.append(int((out == x.roll(-1)).sum()))
    assert right == ([32, 32] if synchronized else [1, 31])  # else only what lanes before it have copied


def test_blocks_have_numbers_parameters_and_poisoned_memory():
    class Pair(Structure):
        _fields_ = [("at", c_void_p), ("factor", c_float)]

    text = """
    struct Pair { const int* at; float factor; };
    KERNEL blocks(int* out, i64 big, const Pair pair, float half, u32 n, const int* none) {
        u32* shared = (u32*)shared_memory();
        bool poisoned = shared[lane()] == ~0u && none == nullptr && u64(shared) % 128 == 0;
        syncwarp();
        shared[lane()] = 0;
        wait_ahead();
        prefetch_l2(pair.at);
        release_next();
        if (lane() == 31) return;
        out[block_y() * grid_x() + block_x()] = poisoned * int(big >> 40) + int(*pair.at * pair.factor * half) + n;
    }
    """
    out, held = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    args = [out, c_int64(3 << 40), Pair(held.data_ptr(), 3.0), c_float(0.5), c_uint32(100), None]
    calls = compile(text, "blocks").launch((3, 2), 132, args, tensors=[held])
    assert (out == 133).all()
    assert calls == (6 * 32,) * 3
