"""What a GPU would stop with, hang on or answer with garbage is a fault in the emulator, and so are wrong arguments."""

from ctypes import c_float, c_int, c_int64

import pytest
import torch

from .cuda_on_cpu import KernelFault, compile, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# Each with what its message must say.
FAULTS = {
    "u += lane() < 7 ? ballot(true) : \n shfl(u, 0);": "lane 7, line 6: shfl, but lane 0 is at ballot in line 5",
    "if (lane() < 7) u += ballot(true);\n else u += ballot(true);": "ballot, but lane 0 is at ballot in line 5",
    "if (lane() == 5) return; syncwarp();": "lane 5, line 0: returns, but lane 0 is at syncwarp in line 5",
    "if (lane() == 0) return; syncwarp();": "lane 1, line 5: syncwarp, but 1 lanes have returned",
    "copy_async<8>(to + 4, x);": "copy_async at 4 of shared memory, which is not a multiple of 8",
    "copy_async<8>(to, x + 1);": "which is not a multiple of 8",
    "copy_async<16>(to, x + 64);": "copy_async of 16 bytes from .*, which no buffer holds",
    "copy_async<16>(to, x - 4);": "which no buffer holds",
    "copy_async<16>(to + 256, x);": "copy_async of 16 bytes at 256 of 260 bytes of shared memory",
    "copy_async<4>(to - 4, x);": "copy_async of 4 bytes at -4 of 260",
    "ldmatrix4(r, to + 8);": "ldmatrix4 at 8 of shared memory, which is not a multiple of 16",
    "ldmatrix4_trans(r, to + 16 * lane());": "lane 16, line 5: ldmatrix4_trans of 16 bytes at 256 of 260",
    "u += shared_address(x);": "which is not in shared memory",
    "prefetch_l2(x + 64);": "which no buffer holds",
    "release_next();": "release_next before wait_ahead",
    "syncwarp();\n u += ((volatile u32*)nullptr)[lane()];": "line 5: after it, a read or write at .*, where there",
    "((u32*)shared_memory())[96] = 5;": "a read or write at 384 of 260 bytes of shared memory",
    "((u32*)shared_memory())[65] = 5;": "the block wrote behind its shared memory",
    "u += *(const u64*)(x + 1);": "a pointer that its type does not allow",
    "r[n] = 5;": "an index outside its array",
    "u += deep(1000000);": "bytes of stack",
}
FAULTY = """
static u32 __attribute__((noinline)) deep(u32 n) {
    volatile u32 x[16];
    x[0] = n;
    return n ? deep(n - 1) + x[0] : x[0];
}
KERNEL faulty(int which, const u32* x, u32* out, int n) {
    u32 u = 0, r[4] = {}, to = 1024;
    switch (which) { %s }
    out[lane()] = u + r[0];
}
"""


@pytest.fixture(scope="module")
def faulty():
    """One kernel for all, by their places in FAULTS."""
    cases = (f"case {i}: {{\n#line 5\n{body}\n}} break;\n" for i, body in enumerate(FAULTS))
    return compile(FAULTY % "".join(cases), "faulty")


@pytest.mark.parametrize("body", FAULTS)
def test_faults(faulty, body):
    x, out = torch.zeros(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    with pytest.raises(KernelFault, match=FAULTS[body]):
        faulty.launch((1, 1), 260, [c_int(list(FAULTS).index(body)), x, out, c_int(4)])
    faulty.launch((1, 1), 260, [c_int(-1), x, out, c_int(4)])  # the next launch is none the worse for it


@pytest.mark.parametrize("flags", [(), ("-DEMULATOR_UCONTEXT",)], ids=["own switch", "ucontext"])
def test_a_fault_in_a_later_block_names_it(flags):
    text = "KERNEL later(const u32* x) { if (block_x() == 2 && block_y() == 1 && lane() == 9) prefetch_l2(x + 1); }"
    with pytest.raises(KernelFault, match=r"later, block \(2, 1\), lane 9, line 1: prefetch_l2"):
        compile(text, "later", flags).launch((4, 2), 0, [torch.zeros(1, dtype=torch.int32)])


def test_arguments_are_of_the_parameters_kind_and_size():
    kernel = compile("KERNEL takes(const float* x, i64 n, float f) {}", "takes")
    x, n, f = torch.zeros(1), c_int64(1), c_float(1)
    kernel.launch((1, 1), 0, [x, n, f])
    wrong = [[x, n], [x, c_int(1), f], [x, n, c_int(1)], [n, n, f], [x, None, f], [x, 1, f], [x, n, 1.0]]
    for args in [*wrong, [x.to("meta"), n, f]]:
        with pytest.raises(TypeError):
            kernel.launch((1, 1), 0, args)
    for grid, shared in [((0, 1), 0), ((1, 65536), 0), ((1, 1), 232449)]:
        with pytest.raises(ValueError, match="no GPU launches"):
            kernel.launch(grid, shared, [x, n, f])


def test_the_compiler_is_heard():
    with pytest.raises(RuntimeError, match="broken:2"):
        compile("KERNEL broken() {\nnonsense; }", "broken")
