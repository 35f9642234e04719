"""Every kernel compiles for Hopper, on a machine without a GPU: the interpreter takes more than the compiler does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Bytes of shared memory one block can have on sm_90.
MAX_SHARED = 232_448


def compile_all(dtype_name: str, allocator: str) -> None:
    """Compile each launch of encode, decode and prefix instead of making it. Runs without the interpreter."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sglang_blockgtq.calibrate.build import build_table
    from sglang_blockgtq.calibrate.moments import Moments
    from sglang_blockgtq.calibrate.rope import RopeBlocks
    from sglang_blockgtq.kernels import attention, encode, turn
    from sglang_blockgtq.kernels.tables import DeviceTables

    pointer = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.uint8: "*u8",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }

    class Compile:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, num_warps=4, num_stages=3, **constants):
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            signature, constant = {}, {}
            for param in self.kernel.params:
                value = values[param.name]
                if param.is_constexpr or value is None:
                    signature[param.name], constant[param.name] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[param.name] = pointer[value.dtype]
                else:
                    signature[param.name] = "i32" if isinstance(value, int) else "fp32"
            source = ASTSource(self.kernel, signature, constant)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert compiled.metadata.shared <= MAX_SHARED, (self.kernel.__name__, compiled.metadata.shared)
            print("compiled", self.kernel.__name__, flush=True)

    for module, name in (
        (encode, "_encode_kernel"),
        (attention, "attention_kernel"),
        (turn, "_turn_kernel"),
        (turn, "_merge_kernel"),
    ):
        setattr(module, name, Compile(getattr(module, name)))

    dtype, heads, dim = getattr(torch, dtype_name), 2, 64
    energy = torch.logspace(-2, 2, dim // 2, dtype=torch.float64).repeat(1, heads, 1)
    moments = Moments(energy, energy, torch.full((1, heads), float(dim), dtype=torch.float64), 2048)
    table = build_table(moments, [RopeBlocks(dim, dim)], k_bits=3, v_bits=3, allocator=allocator)
    codec = table.layer_codec(0)
    tables = DeviceTables.of(codec)
    rows = torch.zeros(64, codec.layout.row_bytes, dtype=torch.uint8)
    q, k, v = torch.zeros(8, 3 * heads, dim, dtype=dtype), *torch.zeros(2, 8, heads, dim, dtype=dtype)
    encode.encode(tables, k, v, rows, torch.arange(8))
    # The CPU's tables carry float32 operands; a GPU's are float16.
    object.__setattr__(tables, "levels", tables.half_levels)
    indptr = torch.arange(9, dtype=torch.int32)
    splits = torch.ones(8, dtype=torch.int32)
    attention.decode_attention(tables, q, rows, indptr, torch.arange(8), 0.1, splits)
    attention.prefix_attention(tables, q, rows, indptr, indptr, torch.arange(8), 0.1, max_q_len=1000)


@pytest.mark.parametrize("dtype, allocator", [("bfloat16", "template"), ("float16", "product")])
def test_compiles_for_hopper(dtype, allocator):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__, dtype, allocator]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    names = done.stdout.split()[1::2]
    assert names == ["_encode_kernel"] * 2 + ["_turn_kernel", "attention_kernel", "_merge_kernel"] * 2


if __name__ == "__main__":
    compile_all(*sys.argv[1:])
