"""CUDA C compiles, through the cache on disk, and arguments lie where C puts them. What is launched needs a device."""

import ctypes
import re
from typing import Any

import pytest
import torch

from sglang_blockgtq.kernels.cuda import compile as cuda
from sglang_blockgtq.kernels.cuda import launch
from sglang_blockgtq.kernels.cuda.source import text_of

from . import cuda_on_cpu

#: Every primitive, with what it gives to each lane in a row of its own: out [ROWS, 32].
TEXT = """
DEVICE u32 bits(float x) { union { float f; u32 u; } b; b.f = x; return b.u; }

KERNEL every(u32* out, const char* in, i64 rows, int seven, float half) {
  char* shared = shared_memory();
  const u32 at = shared_address(shared), l = lane(), pick = l * 0x01010101u;
  int row = 0;
  auto put = [&](u32 x) { out[(block_x() + grid_x() * block_y()) * rows * 32 + row++ * 32 + l] = x; };
  prefetch_l1(in);
  prefetch_l2(in);
  wait_ahead();
  release_next();
  copy_async<16>(at + 16 * l, in + 16 * l);
  copy_commit();
  copy_async<8>(at + 512 + 8 * l, in + 8 * l);
  copy_async<4>(at + 768 + 4 * l, in + 4 * l);
  copy_commit();
  copy_wait<1>();
  copy_wait<0>();
  syncwarp();
  u32 m[4], t[4];
  ldmatrix4(m, at + 16 * l);
  ldmatrix4_trans(t, at + 16 * l);
  put(m[0]), put(m[3]), put(t[0]), put(movmatrix(m[0]));
  put(*(const u32*)(shared + 512 + 8 * l)), put(*(const u32*)(shared + 768 + 4 * l));
  int products[4] = {1, 2, 3, 4};
  imma(products, m[0], m[1], m[2], m[3], t[0], t[1]);
  put(products[0]), put(products[3]);
  float sums[4] = {1, 2, 3, 4};
  hmma(sums, 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00);
  put(bits(sums[0])), put(bits(sums[3]));
  put(prmt(pick, 0x80, 0xc480)), put(select_bits(0xff00ff00, pick, 7));
  put(shfl(l, 31 - l)), put(bits(shfl(half * (float)l, 3))), put(shfl((int)l - 9, 2));
  put(shfl_xor(l, 1)), put(bits(shfl_xor(half * (float)l, 2))), put(shfl_xor((int)l - 9, 4));
  put(shfl_up(l, 4)), put(shfl_up((int)l - 9, 1)), put(bits(shfl_up(half * (float)l, 1)));
  put(ballot(l & 1)), put(any(l == 31)), put(any(l == 32));
  put(bits(exp2f_((float)l))), put(bits(log2f_(exp2f_((float)l)))), put(bits(rcp(exp2f_((float)l))));
  put(pack_f16x2((float)l, half)), put(bits(f16(pack_f16x2((float)l, half))));
  const u32 a = pack_f16x2((float)l, half), b = pack_f16x2(2, (float)seven);
  put(sub_f16x2(a, b)), put(mul_f16x2(a, b)), put(fma_f16x2(a, b, b));
  const u64 wide = mad_wide(l, 1u << 31, 5);
  put(opaque(l)), put((u32)wide), put((u32)(wide >> 32)), put(bits_set(l));
  put(bits(larger(half, (float)l))), put(bits(smaller(half, (float)l)));
  put(larger((int)l - 9, 2)), put(smaller((int)l - 9, 2));
  put(upper_half(a) & 0xffff);
  put(sum_of_all((int)l - 9)), put(largest_of_all((int)l - 9));
  put(block_x()), put(block_y()), put(grid_x()), put(grid_y()), put(seven);
}
"""
ROWS = 48
TYPES = "PPqif"

needs_nvrtc = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))


@pytest.fixture(autouse=True)
def cubins(tmp_path, monkeypatch):
    """The cache folder, empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path / "blockgtq"


def whole(text: str = TEXT) -> str:
    return cuda.joined({"hopper.cu": text_of("hopper.cu"), "every.cu": text})


def compiled(text: str = TEXT, **options: Any) -> bytes:
    return cuda.compile(whole(text), "every", capability=(9, 0), **options)


def test_text_uses_every_primitive():
    text = text_of("hopper.cu")
    names = set(re.findall(r"^DEVICE [\w* ]*?(\w+)\(", text, re.M)) | set(re.findall(r"^SHUFFLES\((\w+)", text, re.M))
    assert {"lane", "shared_memory", "copy_async", "shfl", "hmma"} <= names
    assert {name for name in names if not re.search(rf"\b{name}\b[(<]", TEXT)} == set()
    assert TEXT.count("put(") == ROWS


@needs_nvrtc
def test_every_primitive_compiles():
    cubin = compiled(defines={"MIN_BLOCKS": 16})
    assert cubin.startswith(b"\x7fELF") and b"every" in cubin


@needs_nvrtc
def test_launch_bounds_and_cap_are_options_of_their_own():
    one, many = compiled(defines={"MIN_BLOCKS": 1}), compiled(defines={"MIN_BLOCKS": 32})
    assert len({one, many, compiled(registers=32)}) == 3


@needs_nvrtc
def test_fault_names_text_and_line():
    with pytest.raises(RuntimeError, match=r"does not compile every:\nevery.cu\(3\): error: .*missing.* is undefined"):
        compiled("\nKERNEL every(int* out) {\n  *out = missing;\n}\n")


@needs_nvrtc
def test_log_is_cut():
    with pytest.raises(RuntimeError) as caught:
        compiled("".join(f"int a{n} = missing{n};\n" for n in range(50)))
    assert len(str(caught.value).splitlines()) == 21


@needs_nvrtc
def test_cache_is_used(cubins, monkeypatch):
    cubin = compiled()
    (file,) = cubins.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(cuda, "_build", lambda *_: pytest.fail("compiled again"))
        assert compiled() == cubin
    changed = []
    monkeypatch.setattr(cuda, "_build", lambda *_: changed.append(0) or b"other")
    compiled(TEXT + " "), compiled(defines={"MIN_BLOCKS": 2}), compiled(registers=40), compiled(options=["-lineinfo"])
    cuda.compile(whole(), "every", capability=(10, 0))
    monkeypatch.setattr(cuda, "_nvrtc_version", lambda: (99, 0))
    compiled()
    assert len(changed) == 6 and len(list(cubins.iterdir())) == 7 and file in cubins.iterdir()


@needs_nvrtc
@pytest.mark.parametrize(
    "spoil", [lambda data: b"", lambda data: data[:-100], lambda data: data[:80] + b"?" + data[81:]]
)
def test_broken_cache_file_is_replaced(cubins, spoil):
    cubin = compiled()
    (file,) = cubins.iterdir()
    good = file.read_bytes()
    file.write_bytes(spoil(good))
    assert compiled() == cubin
    assert list(cubins.iterdir()) == [file] and file.read_bytes() == good


@needs_nvrtc
def test_folder_that_cannot_be_written_is_no_error(cubins):
    cubins.write_text("a file where the folder would be")
    assert compiled().startswith(b"\x7fELF")


def test_no_nvrtc_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    cuda._nvrtc.cache_clear()
    try:
        assert "libnvrtc.so.99 of the package nvidia-cuda-nvrtc, is not available" in str(cuda.unavailable())
        with pytest.raises(RuntimeError, match="libnvrtc.so.99"):
            compiled()
    finally:
        cuda._nvrtc.cache_clear()


def test_arguments_lie_where_c_puts_them():
    class Mixed(ctypes.Structure):
        _fields_ = [
            ("a", ctypes.c_int),
            ("b", ctypes.c_void_p),
            ("c", ctypes.c_float),
            ("d", ctypes.c_uint),
            ("e", ctypes.c_int),
            ("f", ctypes.c_longlong),
            ("g", ctypes.c_ulonglong),
        ]

    arguments = launch.Arguments("iPfIiqQ")
    assert arguments.offsets == [getattr(Mixed, name).offset for name in "abcdefg"] == [0, 8, 16, 20, 24, 32, 40]
    assert arguments.sizes == [4, 8, 4, 4, 4, 8, 8]
    values = [-5, 2**63 + 8, 0.25, 2**32 - 1, 7, -(2**40), 2**64 - 1]
    arguments.write(values)
    assert len(arguments.values) == ctypes.sizeof(Mixed)
    seen = Mixed.from_buffer_copy(arguments.values)
    assert [getattr(seen, name) for name in "abcdefg"] == values
    base = ctypes.addressof(arguments.values)
    assert [address - base for address in arguments.addresses] == arguments.offsets


@pytest.mark.parametrize("args", [(1,), (1, 2, 3), (1, 2**31), (1, 0.5), (None, 1)])
def test_arguments_that_do_not_fit(args):
    with pytest.raises(TypeError, match="arguments of the types 'Pi'"):
        launch.Arguments("Pi").write(args)


def test_unknown_types():
    with pytest.raises(ValueError, match="'d' is none of"):
        launch.Arguments("Pd")


class Attribute(ctypes.Structure):
    """CUlaunchAttribute; its value is a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((f"{what}{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    ]


class Driver:
    """In place of libcuda.so.1: remembers launches and what was allowed."""

    def __init__(self, parameters):
        self.parameters, self.result, self.launches, self.allowed = parameters, 0, [], []

        def info(function, n, offset, size):  # as a function, which takes argtypes
            if n >= len(self.parameters):
                return 1
            offset._obj.value, size._obj.value = self.parameters[n]
            return 0

        self.cuFuncGetParamInfo = info

    def __getattr__(self, name):
        return lambda *_: 0  # everything else succeeds

    def cuFuncGetAttribute(self, value, attribute, function):
        value._obj.value = {1: 1024, 3: 8, 4: 96}[attribute]
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        self.allowed.append((attribute, value))
        return 0

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, blocks, function, threads, shared):
        blocks._obj.value = 200_000 // shared.value
        return 0

    def cuGetErrorName(self, result, name):
        name._obj.value = b"CUDA_ERROR_LAUNCH_FAILED" if result == 719 else None
        return 0

    def cuLaunchKernelEx(self, config, function, addresses, extra):
        seen = Config.from_buffer_copy(config._obj)
        flags = [(seen.attributes[n].id, list(seen.attributes[n].value)) for n in range(seen.count)]
        args = ctypes.c_void_p.from_address(addresses[0]).value, ctypes.c_int.from_address(addresses[1]).value
        self.launches.append((seen, flags, args))
        return self.result


@pytest.fixture
def driver(monkeypatch):
    driver = Driver([(0, 8), (8, 4)])
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    monkeypatch.setattr(launch, "_primary", lambda index: ctypes.c_void_p(1))
    monkeypatch.setattr(launch, "_raw_stream", lambda index: 0x7000 + index)
    return driver


def test_launch_fills_the_configuration(driver):
    kernel = launch.Kernel(b"cubin", "every", "Pi", 3)
    kernel.launch((5, 6), 4096, (2**40, -7), dependent=False)
    kernel.launch((1, 2), 60_000, (8, 9), dependent=True)
    kernel.launch((1, 2), 50_000, (8, 9), dependent=True)
    (seen, flags, args), (_, dependent, _), _ = driver.launches
    assert [seen.gridx, seen.gridy, seen.gridz, seen.blockx, seen.blocky, seen.blockz] == [5, 6, 1, 32, 1, 1]
    assert (seen.shared, seen.stream, flags, args) == (4096, 0x7003, [], (2**40, -7))
    assert dependent == [(6, [1] + [0] * 15)]  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert driver.allowed == [(8, 60_000)]  # once, above 48 KB


def test_attributes_and_occupancy(driver):
    kernel = launch.Kernel(b"cubin", "every", "Pi", 0)
    assert kernel.attributes() == launch.Attributes(registers=96, local_bytes=8, shared_bytes=1024)
    assert kernel.occupancy(10_000) == 20 and driver.allowed == []
    assert kernel.occupancy(100_000) == 2 and driver.allowed == [(8, 100_000)]


def test_driver_errors_are_named(driver):
    kernel = launch.Kernel(b"cubin", "every", "Pi", 0)
    driver.result = 719
    with pytest.raises(RuntimeError, match="launch of every, grid 5 x 6, .*: CUDA_ERROR_LAUNCH_FAILED"):
        kernel.launch((5, 6), 0, (0, 0), dependent=False)
    driver.result = 9999
    with pytest.raises(RuntimeError, match="CUDA error 9999"):
        kernel.launch((5, 6), 0, (0, 0), dependent=False)


def test_parameters_elsewhere_are_refused(driver):
    driver.parameters = [(0, 8), (8, 8)]
    with pytest.raises(RuntimeError, match=r"every has parameters at .*\(8, 8\).*types='Pi'"):
        launch.Kernel(b"cubin", "every", "Pi", 0)


def expected(words: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """What TEXT's first block puts, int32 [ROWS, 32]. words: int32 [128], the bytes in order."""
    lanes = torch.arange(32, dtype=torch.int32)
    x = lanes.float()
    halves = words.view(torch.int16).view(4, 8, 8)  # matrices of 8 rows

    def fragment(matrix):
        return matrix.contiguous().view(torch.int32).reshape(32)

    def bits(values):
        return values.float().contiguous().view(torch.int32).expand(32)

    def pair(low, high):
        both = torch.stack([torch.as_tensor(v, dtype=torch.float32).expand(32) for v in (low, high)], 1)
        return both.half().contiguous().view(torch.int32).reshape(32)

    def same(value):
        return torch.full((32,), value, dtype=torch.int32)

    a8 = fragment(halves[0]), fragment(halves[1]), fragment(halves[2]), fragment(halves[3])
    b8 = fragment(halves[0].T), fragment(halves[1].T)

    def bytes_of(registers):  # [8 rows, 16 bytes] of each register
        return [r.view(torch.int8).view(8, 16).int() for r in registers]

    a, b = bytes_of(a8), bytes_of(b8)
    upper, lower, right = (torch.cat(m, 1) for m in ((a[0], a[2]), (a[1], a[3]), (b[0], b[1])))
    c = [(rows.double() @ right.double().T).int() for rows in (upper, lower)]
    group, column = lanes // 4, lanes % 4 * 2
    up = (lanes - 1).clamp(min=0)
    rows = [a8[0], a8[3], fragment(halves[0].T), fragment(halves[0].T), words[::2][:32], words[:32]]
    rows += [c[0][group, column] + 1, c[1][group, column + 1] + 4, bits(torch.tensor(17.0)), bits(torch.tensor(20.0))]
    # Selector 0xc480: byte 0, sign of byte 0, byte 0 of b, sign of byte 0 of b.
    rows += [lanes | same(0xFF80 - 2**16) << 16, lanes * 0x01000100 | same(7)]
    rows += [31 - lanes, bits(torch.tensor(1.5)), same(-7)]
    rows += [lanes ^ 1, bits(0.5 * (lanes ^ 2)), (lanes ^ 4) - 9]
    rows += [torch.where(lanes < 4, lanes, lanes - 4), up - 9, bits(0.5 * up)]
    rows += [same(0xAAAAAAAA - 2**32), same(1), same(0)]
    rows += [bits(2.0**x), bits(x), bits(2.0**-x), pair(x, 0.5), bits(x)]
    rows += [pair(x - 2, -6.5), pair(2 * x, 3.5), pair(2 * x + 2, 10.5)]
    rows += [lanes, (lanes % 2) * -(2**31) + 5, lanes // 2, torch.tensor([n.bit_count() for n in range(32)])]
    rows += [bits(x.clamp(min=0.5)), bits(x.clamp(max=0.5)), (lanes - 9).clamp(min=2), (lanes - 9).clamp(max=2)]
    rows += [same(0x3800), same(int(lanes.sum()) - 9 * 32), same(22)]
    rows += [same(0), same(0), same(grid[0]), same(grid[1]), same(7)]
    return torch.stack([row.int() for row in rows])


def random_words() -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (128,), generator=torch.Generator().manual_seed(0)).int()


@pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing()))
def test_emulator_gives_the_same():
    """So the expectation of the next test holds before there is a device."""
    words, out = random_words(), torch.zeros(6, ROWS, 32, dtype=torch.int32)
    args = [out, words, ctypes.c_longlong(ROWS), ctypes.c_int(7), ctypes.c_float(0.5)]
    cuda_on_cpu.compile(TEXT, "every").launch((3, 2), 1024, args)
    want = expected(words, (3, 2))
    assert [row for row in range(ROWS) if not torch.equal(out[0, row], want[row])] == []


@pytest.mark.gpu
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("shared_bytes", [1024, 100_000])
def test_every_primitive_on_a_device(dependent, shared_bytes):
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := launch.unavailable(device):
        pytest.skip(reason)
    kernel = launch.Kernel(cuda.compile(whole(), "every"), "every", TYPES, device)
    words = random_words()
    there, out = words.to(device), torch.zeros(6, ROWS, 32, dtype=torch.int32, device=device)
    args = out.data_ptr(), there.data_ptr(), ROWS, 7, 0.5
    want = expected(words, (3, 2))
    kernel.launch((3, 2), shared_bytes, args, dependent=dependent)
    assert [row for row in range(ROWS) if not torch.equal(out[0, row].cpu(), want[row])] == []
    assert (out[5, -5:-3, 0].cpu() == torch.tensor([2, 1])).all()
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch((3, 2), shared_bytes, args, dependent=dependent)
    assert not out.any()
    graph.replay()
    assert torch.equal(out[0].cpu(), want)
    assert kernel.attributes().local_bytes == 0 and kernel.occupancy(shared_bytes) >= 2
