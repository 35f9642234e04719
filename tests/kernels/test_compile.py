"""Every kernel compiles, on a machine without a GPU: the interpreter takes more than the compiler does.

The decode kernel is also held to what makes it fast. None of that changes a result, so no other test would see it go.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

#: Bytes of shared memory one block can have.
MAX_SHARED = {80: 166_912, 89: 101_376, 90: 232_448}


def compile_all(dtype_name: str, allocator: str, dim: int, capability: int, folder: Path) -> None:
    """Compile each launch of encode, decode, prefix, unpack and merge instead of making it. No interpreter here.

    Prints a line of JSON for each; TTGIR, PTX and cubin of the n-th go to ``folder/n.*``.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sglang_blockgtq.calibrate.build import build_table
    from sglang_blockgtq.calibrate.moments import Moments
    from sglang_blockgtq.calibrate.rope import RopeBlocks
    from sglang_blockgtq.kernels import attention, encode, gather, merge, turn, unpack
    from sglang_blockgtq.kernels.tables import DeviceTables

    pointer = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.uint8: "*u8",
        torch.int16: "*i16",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    count = 0

    class Compile:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, num_warps=4, num_stages=3, maxnreg=None, launch_pdl=False, **constants):
            nonlocal count
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            # What launchers learn from a tensor's device, and a switch for the interpreter.
            values |= {name: value for name, value in (("ASM", True), ("INTERPRET", False)) if name in values}
            signature, constant, attributes = {}, {}, {}
            for i, param in enumerate(self.kernel.params):
                value, aligned = values[param.name], False
                if param.is_constexpr or value is None:
                    signature[param.name], constant[param.name] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[param.name] = pointer[value.dtype]
                    aligned = not param.do_not_specialize_on_alignment
                else:
                    signature[param.name] = "i32" if isinstance(value, int) else "fp32"
                    aligned = isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize
                if aligned:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature, constant, attributes)
            options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "launch_pdl": launch_pdl}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            for kind in ("ttgir", "ptx"):
                (folder / f"{count}.{kind}").write_text(compiled.asm[kind])
            (folder / f"{count}.cubin").write_bytes(compiled.asm["cubin"])
            line = {"name": self.kernel.__name__, "shared": compiled.metadata.shared, "file": str(folder / str(count))}
            print(json.dumps(line), flush=True)
            count += 1

    for module in (gather, encode, attention, turn, unpack, merge):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                setattr(module, name, Compile(value))

    encode.dependent = attention.dependent = turn.dependent = lambda device: capability >= 90
    dtype, heads = getattr(torch, dtype_name), 2
    energy = torch.logspace(-2, 2, dim // 2, dtype=torch.float64).repeat(1, heads, 1)
    moments = Moments(energy, energy, torch.full((1, heads), float(dim), dtype=torch.float64), 2048)
    if allocator == "product-slot":  # four energies, so four templates
        spread = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)[:, None] / 2
        energy, heads = energy[:, :1] ** spread, 4
        moments = Moments(energy, energy, torch.full((1, heads), float(dim), dtype=torch.float64), 2048)
    name, _, granularity = allocator.partition("-")
    table = build_table(
        moments, [RopeBlocks(dim, dim)], k_bits=3, v_bits=3, allocator=name, granularity=granularity or "block"
    )
    codec = table.layer_codec(0)
    tables = DeviceTables.of(codec)
    rows = torch.zeros(64, codec.layout.row_bytes, dtype=torch.uint8)
    indptr, slots = torch.arange(9, dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    q, k, v = torch.zeros(8, 4 * heads, dim, dtype=dtype), *torch.zeros(2, 8, heads, dim, dtype=dtype)
    gather.gather_slots(torch.zeros(8, 16, dtype=torch.int32), *torch.ones(2, 8, dtype=torch.int64), indptr, slots)
    for encode.FEW_CHANNELS in (8 * heads * dim, 0):
        encode.encode(tables, k, v, rows, torch.arange(8), q, torch.zeros_like(q, dtype=torch.float32))
    # The CPU's tables carry float32 operands; a GPU's are float16.
    object.__setattr__(tables, "levels", tables.half_levels)
    attention.decode_attention(tables, q, rows, indptr, slots, 0.1, target=32)
    attention.decode_attention(tables, q, rows, indptr[:3], slots, 0.1, q_len=4, target=200)
    attention._ROWS_ALONE = attention._GROUPS_AT_ONCE = 0
    attention.decode_attention(tables, q, rows, indptr, slots, 0.1, target=32)
    attention.prefix_attention(tables, q, rows, indptr, indptr, slots, 0.1, max_q_len=1000)
    unpack.unpack(unpack.UnpackTables.of(tables, half=True), rows, slots, k, v)
    wider = torch.zeros(2, 16, heads, dim, dtype=dtype)
    unpack.unpack(unpack.UnpackTables.of(tables, half=True), rows, slots, *wider, slots, (k, v), slots + 8)
    lse = torch.zeros(8, 4 * heads)
    merge.merge_into(q.float(), lse, q, lse)


@cache
def compiled(folder: Path, dtype: str, allocator: str, dim: int, capability: int = 90) -> list[dict]:
    """The launches, in order. ``folder`` belongs to the session, so each set is compiled once."""
    folder = folder / f"{dtype}-{allocator}-{dim}-{capability}"
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__, dtype, allocator, str(dim), str(capability), str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


TEMPLATE, PRODUCT = ("bfloat16", "template", 128), ("float16", "product", 64)
SLOTS = "bfloat16", "product-slot", 128


@pytest.mark.parametrize(
    "case, capability", [(TEMPLATE, 90), (PRODUCT, 90), (SLOTS, 90), (TEMPLATE, 80), (TEMPLATE, 89)]
)
def test_every_launch_compiles(folder, case, capability):
    launches = compiled(folder, *case, capability)
    fast = case is not PRODUCT
    decode = "decode_kernel" if fast else "attention_kernel"
    assert [launch["name"] for launch in launches] == [
        "gather_slots_kernel",
        "encode_few_kernel" if fast else "encode_many_kernel",
        "encode_many_kernel",
        *("_turn_kernel", decode, "merge_group_kernel"),
        *("_turn_kernel", decode, "merge_chunk_kernel", "merge_row_kernel"),
        *("_turn_kernel", decode, "merge_chunk_kernel", "merge_tile_kernel"),
        *("_turn_kernel", "attention_kernel", "_merge_kernel"),
        *["unpack_columns_kernel" if fast else "unpack_fields_kernel"] * 2,
        "_merge_kernel",
    ]
    for launch in launches:
        assert launch["shared"] <= MAX_SHARED[capability], launch


@pytest.mark.parametrize("capability", [90, 80])
def test_kernels_of_a_step_wait_for_each_other_on_hopper(folder, capability):
    """A kernel that is launched early and does not wait reads what is not there yet."""
    step = [
        "encode_few_kernel",
        "decode_kernel",
        "merge_chunk_kernel",
        "merge_group_kernel",
        "merge_row_kernel",
        "merge_tile_kernel",
        "_turn_kernel",
    ]
    for launch in compiled(folder, *TEMPLATE, capability):
        if launch["name"] in step:
            ptx = Path(launch["file"]).with_suffix(".ptx").read_text()
            waits = ptx.count("griddepcontrol.wait")
            assert waits == ptx.count("griddepcontrol.launch_dependents")
            # keys, values and queries each, of one program or another
            assert waits == (0 if capability < 90 else 3 if launch["name"] == "encode_few_kernel" else 1)


def loops_of(ttgir: str) -> list[str]:
    """The bodies of all loops."""
    loops, lines = [], ttgir.splitlines()
    for i, line in enumerate(lines):
        if " scf.for " in line:
            indent = re.match(r" *", line)[0]
            stop = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(indent + "}"))
            loops.append("\n".join(lines[i : stop + 1]))
    return loops


def token_loops(file: Path) -> list[str]:
    """The loops over tokens."""
    return [loop for loop in loops_of(file.with_suffix(".ttgir").read_text()) if "tt.dot" in loop]


def copied(tile: int) -> list[str]:
    """Words of K and V, and scales."""
    return [f"{tile}x16x!tt.ptr<i16>", f"16x{tile}x!tt.ptr<i16>", f"{tile}x!tt.ptr<i32>"]


TILES = 32, 64  # of splits of one tile, and of the others


@pytest.fixture(scope="module", params=[90, 80], ids=["sm90", "sm80"])
def decode_file(request, folder) -> Path:
    """Of decode for one query per request: TTGIR, PTX and cubin."""
    launches = compiled(folder, *TEMPLATE, request.param)
    return next(Path(launch["file"]) for launch in launches if launch["name"] == "decode_kernel")


@pytest.fixture(scope="module", params=TILES)
def decode(request, decode_file) -> tuple[int, str, str]:
    """Tokens of a tile, the TTGIR of its loop and the PTX of both."""
    loops = token_loops(decode_file)
    assert len(loops) == len(TILES)
    return request.param, loops[TILES.index(request.param)], decode_file.with_suffix(".ptx").read_text()


def assert_operands_stay(loop: str, tile: int) -> None:
    """No level changes its layout in a loop, nor does the query, the same for all tiles: only the weights do."""
    converted = re.findall(r"ttg.convert_layout .*-> tensor<(\w+)xf16, #ttg.dot_op<\{opIdx = (\d)", loop)
    assert converted == [(f"{tile}x8", "1")], converted


def test_decode_makes_levels_where_the_tensor_core_wants_them(decode):
    """Words come from shared memory in the operand's layout; no level is moved between threads or stored."""
    tile, loop, ptx = decode
    dots = re.findall(r"tt\.dot %\w+, ", loop)
    assert len(dots) == 16, "8 slots of K and 8 of V"
    assert_operands_stay(loop, tile)
    assert not [line for line in loop.splitlines() if re.search(r"ttg.local_(alloc|store)", line)]
    words = [line for line in loop.splitlines() if "ttg.local_load" in line and "xi16" in line.split("->")[1]]
    whole = [line for line in words if f"{tile}x16xi16" in line or f"16x{tile}xi16" in line]
    assert len(whole) == 2 and all("#ttg.dot_op<{opIdx = 0" in line for line in whole)
    assert "mma.sync.aligned.m16n8k16" in ptx
    assert "fma.rn.f16x2" in ptx and "lop3.b32" in ptx


def test_decode_copies_words_asynchronously(decode):
    """Words of both sides' full bins, and scales: they go past the registers, of which there are few."""
    tile, loop, ptx = decode
    copies = [line for line in loop.splitlines() if "ttg.async_copy_global_to_local" in line]
    for kind in copied(tile):
        assert [line for line in copies if f"tensor<{kind}" in line], kind
    assert ptx.count("cp.async.cg.shared.global") + ptx.count("cp.async.ca.shared.global") >= len(copies)
    plain = [re.search(r"tensor<([^>]+>)", line)[1] for line in loop.splitlines() if "tt.load" in line]
    assert sorted(plain) == [f"{tile}x!tt.ptr<i32>", f"8x{tile}x!tt.ptr<i16>"], "slots, and the narrow bin of V"
    assert "contiguity = 8" in loop, "16 bytes at a time"


def tool(name: str, *args: str) -> str:
    """What one of the CUDA tools that come with Triton says."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def machine_loops(cubin: Path) -> list[list[str]]:
    """The instructions of each loop with a tile's tensor products in it, from the target of a branch to the branch."""
    code, labels, spans = [], {}, []
    for line in tool("nvdisasm", "-c", str(cubin)).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1])
    for i, instruction in enumerate(code):
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        first = labels.get(branch[1], i) if branch else i
        if sum("HMMA" in x for x in code[first:i]) >= 32:
            spans.append((first, i + 1))
    # What has a loop in it is a branch back from code that was moved to the end.
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return [code[a:b] for a, b in inner]


def assert_fits_registers(file: Path, most: int, reloads: int, loops: int) -> None:
    """At most so many registers, which decide how many programs share a multiprocessor. What does not fit goes to local
    memory, which is memory: before and behind the loop, where it is little, but not for each tile, save that up to
    ``reloads`` addresses are read again."""
    cubin = file.with_suffix(".cubin")
    usage = tool("cuobjdump", "-res-usage", str(cubin))
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= most, usage
    found = machine_loops(cubin)
    assert len(found) == loops
    for loop in found:
        assert not [x for x in loop if re.search(r"\bSTL\b", x)]
        assert sum(re.search(r"\bLDL\b", x) is not None for x in loop) <= reloads


def test_decode_keeps_its_loops_in_registers(decode_file):
    """Eight programs on a multiprocessor."""
    assert_fits_registers(decode_file, 255, reloads=0, loops=len(TILES))


def test_every_template_has_a_loop_like_the_only_one(folder):
    """Of heads of four templates: as many copies, dots and conversions in each loop; sixteen programs at a time."""
    file = next(Path(x["file"]) for x in compiled(folder, *SLOTS, 90) if x["name"] == "decode_kernel")
    loops = token_loops(file)
    assert len(loops) == 4 and len(set(loops)) == 4
    for loop in loops:
        assert len(re.findall(r"tt\.dot %\w+, ", loop)) == 16
        copies = [line for line in loop.splitlines() if "ttg.async_copy_global_to_local" in line]
        for kind in copied(32):
            assert [line for line in copies if f"tensor<{kind}" in line], kind
        assert_operands_stay(loop, 32)
    assert_fits_registers(file, 128, reloads=2, loops=4)


if __name__ == "__main__":
    dtype, allocator, dim, capability, folder = sys.argv[1:]
    compile_all(dtype, allocator, int(dim), int(capability), Path(folder))
