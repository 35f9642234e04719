"""Every kernel compiles, on a machine without a GPU: the interpreter takes more than the compiler does.

The decode kernel is also held to what makes it fast. None of that changes a result, so no other test would see it go.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import pytest

#: Bytes of shared memory one block can have; what is compiled for 8.0 runs on 8.9, too.
MAX_SHARED = {80: 101_376, 90: 232_448}


def compile_all(dtype_name: str, allocator: str, dim: int, capability: int, page: int, folder: Path) -> None:
    """Compile each launch of encode, decode, unpack and merge instead of making it. No interpreter here.

    page: positions of a page, if keys have page means.

    Prints a line of JSON for each; TTGIR, PTX and cubin of the n-th go to ``folder/n.*``.
    """
    from dataclasses import replace
    from types import SimpleNamespace

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sglang_blockgtq.calibrate.build import build_table
    from sglang_blockgtq.calibrate.moments import Moments
    from sglang_blockgtq.calibrate.rope import RopeBlocks
    from sglang_blockgtq.kernels import checksum, every_layer
    from sglang_blockgtq.kernels.any_layout import attention as any_attention
    from sglang_blockgtq.kernels.any_layout import encode as any_encode
    from sglang_blockgtq.kernels.any_layout import unpack as any_unpack
    from sglang_blockgtq.kernels.any_layout.tables import AnyTables
    from sglang_blockgtq.kernels.decode import ahead, attention, gather, merge, recent, tree
    from sglang_blockgtq.kernels.decode.splits import num_splits
    from sglang_blockgtq.kernels.device import rotate
    from sglang_blockgtq.kernels.device.tables import ColumnTables
    from sglang_blockgtq.kernels.encode import encoder, step
    from sglang_blockgtq.kernels.format.page_mean import PageMean
    from sglang_blockgtq.kernels.unpack import unpacker
    from sglang_blockgtq.kernels.unpack.task import UnpackTask

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

    def kind_of(value) -> str:
        if isinstance(value, torch.Tensor):
            return pointer[value.dtype]
        return "i32" if isinstance(value, int) else "fp32"

    class Compile:
        def __init__(self, kernel):
            self.kernel, self.arg_names = kernel, kernel.arg_names

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
                elif isinstance(value, tuple):
                    signature[param.name] = tuple(map(kind_of, value))
                    for j, part in enumerate(value):
                        if isinstance(part, torch.Tensor) or isinstance(part, int) and part % 16 == 0:
                            attributes[i, j] = [["tt.divisibility", 16]]
                else:
                    signature[param.name] = kind_of(value)
                    aligned = not (param.do_not_specialize_on_alignment or param.do_not_specialize)
                    aligned = aligned and (
                        isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0
                    )
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

    for module in (
        gather,
        encoder,
        attention,
        rotate,
        unpacker,
        merge,
        recent,
        ahead,
        any_encode,
        any_attention,
        any_unpack,
        checksum,
        every_layer,
        tree,
    ):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                setattr(module, name, Compile(value))
    for module in (encoder, attention, rotate, merge, recent, ahead):
        module.dependent = lambda device: capability >= 90

    dtype, heads = getattr(torch, dtype_name), 2
    energy = torch.logspace(-2, 2, dim // 2, dtype=torch.float64).repeat(1, heads, 1)
    name, _, granularity = allocator.partition("-")
    if granularity == "segment":  # four energies, so four templates
        spread = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)[:, None] / 2
        energy, heads = energy[:, :1] ** spread, 4
    moments = Moments(energy, energy, torch.full((1, heads), float(dim), dtype=torch.float64), 2048)
    granularity = granularity or ("block" if name == "product" else "segment")
    rope = RopeBlocks(dim, dim)
    table = build_table(moments, [rope], k_bits=3, v_bits=3, allocator=name, granularity=granularity)
    codec = table.layer_codec(0)
    if page:
        blocks = torch.ones(heads, dim // 2)
        mean = PageMean(page, blocks[..., None].expand(-1, -1, 2), blocks[0].double(), rope.channels())
        codec = replace(codec, mean=mean)
    in_columns = codec.layout.in_columns
    tables = ColumnTables.of(codec) if in_columns else AnyTables.of(codec)
    rows = torch.zeros(64, codec.layout.row_bytes, dtype=torch.uint8)
    indptr, slots = torch.arange(9, dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    q, k, v = torch.zeros(8, 4 * heads, dim, dtype=dtype), *torch.zeros(2, 8, heads, dim, dtype=dtype)
    one_template = in_columns and len(tables.k_templates) == 1
    first = one_template and not page  # what the other sets have no other kernels for

    def scratch(splits: int, q_len: int = 1) -> attention.DecodeScratch:
        found = attention.DecodeScratch.for_splits(tables, splits, q.shape[1], q_len)
        return replace(found, out=found.out.half())  # as on a GPU

    if first:
        gather.gather_slots(torch.zeros(8, 16, dtype=torch.int32), *torch.ones(2, 8, dtype=torch.int64), indptr, slots)
    if one_template:
        spread = encoder.rows_per_token
        # A few tokens; many with a row for each factor, and with a row for each token, which have fewer registers.
        for encoder.FEW_CHANNELS, encoder.rows_per_token in ((8 * heads * dim, spread), (0, spread), (0, lambda *_: 1)):
            queries = (q, torch.zeros(q.shape)) if capability >= 90 else ()
            encoder.Encoder(tables, rows)(k, v, slots.long(), slots.long(), *queries)
    if not in_columns:
        any_encode.AnyEncoder(tables, rows)(k, v, torch.arange(8))
        tables = replace(tables, levels=tables.half_levels)  # as products take them on a GPU
    attention.decode_attention(tables, q, rows, indptr, slots, 0.1, target=32, scratch=scratch(32))
    if first:
        args = indptr[:2], slots, 0.1
        attention.decode_attention(
            tables, q[:4], rows, *args, q_len=4, tree=slots[:4], target=380, scratch=scratch(380, 4)
        )
        merge._ROWS_ALONE = merge._GROUPS_AT_ONCE = 0
        parts, lse = scratch(num_splits(8, 32)), torch.zeros(8, 4 * heads)
        merge.merge_splits(tables.v, parts.out, parts.lse, indptr, 1, 32, q, lse)
        merge.merge_into(q.float(), lse, q, lse)
        exact = recent.Recent.of(1, 4, 8, 32, heads, dim, dim, dtype, "cpu")
        gather.gather_slots(
            torch.zeros(8, 16, dtype=torch.int32), *torch.ones(2, 8, dtype=torch.int64), indptr, slots, recent=exact
        )
        triton.knobs.runtime.interpret = True  # as where there is a GPU: by the kernel
        exact.layer(0).remember(k, v, slots, slots, indptr)
        triton.knobs.runtime.interpret = False
        beside = {"exact": ahead.ahead(tables, q, 1, exact.layer(0).read(k, v), 0.1, 0.0)[1]}
        chains = recent.Recent.of(1, 4, 2, 32, heads, dim, dim, dtype, "cpu", 4)
        ahead.ahead(tables, q, 4, chains.layer(0).read(k, v), 0.1, 0.0)
        ahead.ahead(tables, q, 1, exact.layer(0).read(k, v, torch.zeros(8, dim)), 0.1, 0.0)
        merge.merge_splits(tables.v, parts.out, parts.lse, indptr, 1, 32, q, lse, **beside)
        for merge._ROWS_ALONE, merge._GROUPS_AT_ONCE, target in (
            (1 << 30, 0, 600),
            (1 << 30, 0, 4400),
            (0, 1 << 30, 32),
        ):
            parts = scratch(num_splits(8, target))
            merge.merge_splits(tables.v, parts.out, parts.lse, indptr, 1, target, q, lse, **beside)
    if one_template:  # the encode kernels again, of several layers
        exact = recent.Recent.of(2, 4, 8, 32, heads, dim, dim, dtype, "cpu")
        encode_step = step.StepEncoder([encoder.Encoder(tables, rows)] * 2, exact)
        for step.FEW_TOKENS, step.rows_per_token in ((4, None), (0, lambda *_: 8), (0, lambda *_: 1)):
            encode_step(slots[:4].long(), slots[:4].long())
    unpack = unpacker.Unpacker(tables)
    for side in ("k", "v"):
        setattr(unpack, side, replace(getattr(unpack, side), matrix=getattr(unpack, side).matrix.half()))
    unpack.bind(rows)
    unpack(UnpackTask(slots, *torch.zeros(2, 16, heads, dim, dtype=dtype), slots, slots.long(), 8, slots + 8), k, v)
    if first:
        unpack(UnpackTask(slots, k, v))
        layers = [SimpleNamespace(layout=codec.layout, rows=rows, tables=tables)] * 2
        sums = checksum.Checksums(layers)
        sums.write(slots.long(), slots.long())
        sums.sample(indptr, slots, 4, fresh=1)
        every_layer.RowPlaces(layers).move(slots, slots)
        tree.Tree.of(2, 4, "cpu").read(torch.ones(32, dtype=torch.uint8), slots[:2], 4, full=False, page=64)


TEMPLATE, SEGMENTS = ("bfloat16", "template", 128, 90, 0), ("bfloat16", "product-segment", 128, 90, 0)
TEMPLATE_80, ANY_LAYOUT = ("float16", "template", 128, 80, 0), ("float16", "product", 64, 90, 0)
MEANS = ("bfloat16", "template", 128, 90, 512)
SETS = SEGMENTS, TEMPLATE, MEANS, TEMPLATE_80, ANY_LAYOUT


def compile_set(folder: Path, kind: tuple) -> list[dict]:
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__, *map(str, kind), str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Callable[[tuple], list[dict]]:
    """The launches of a set, in order. All sets are compiled at once, two at a time."""
    folder = tmp_path_factory.mktemp("compiled")
    with ThreadPoolExecutor(2) as threads:
        found = {kind: threads.submit(compile_set, folder / "-".join(map(str, kind)), kind) for kind in SETS}
        yield lambda kind: found[kind].result()


STEP = "encode_few_kernel", "encode_many_kernel", "encode_many_kernel"
FIRST = [
    *("gather_slots_kernel", "encode_few_kernel", "encode_many_kernel", "encode_many_kernel"),
    *("_rotate_kernel", "decode_kernel", "merge_group_kernel"),
    *("_rotate_kernel", "decode_kernel", "merge_row_kernel"),
    *("merge_run_kernel", "merge_tile_kernel", "_merge_into_kernel"),
    *("gather_slots_kernel", "remember_kernel", "ahead_kernel", "ahead_kernel", "ahead_kernel"),
    *("merge_run_kernel", "merge_tile_kernel"),
    *("merge_row_kernel", "merge_row_kernel", "merge_group_kernel"),
    *STEP,
    *["unpack_columns_kernel"] * 2,
    *("write_checksums_kernel", "compare_rows_kernel", "take_rows_kernel", "put_rows_kernel", "read_tree_kernel"),
]
KERNELS = {
    TEMPLATE: FIRST,
    TEMPLATE_80: FIRST,
    MEANS: [*FIRST[1:7], *STEP, "unpack_columns_kernel"],
    SEGMENTS: ["_rotate_kernel", "decode_kernel", "merge_group_kernel", "unpack_columns_kernel"],
    ANY_LAYOUT: [
        *["encode_any_kernel"] * 2,
        *("_rotate_kernel", "decode_any_kernel", "merge_group_kernel", "unpack_any_kernel"),
    ],
}


@pytest.mark.parametrize("kind", SETS, ids=lambda kind: "-".join(map(str, kind)))
def test_every_launch_compiles(compiled, kind):
    launches = compiled(kind)
    assert [launch["name"] for launch in launches] == KERNELS[kind]
    for launch in launches:
        assert launch["shared"] <= MAX_SHARED[kind[3]], launch


@pytest.mark.parametrize("kind", [TEMPLATE, MEANS, TEMPLATE_80], ids=["sm90", "means", "sm80"])
def test_kernels_of_a_step_wait_for_each_other_on_hopper(compiled, kind):
    """A kernel that is launched early and does not wait reads what is not there yet."""
    step = [
        "encode_few_kernel",
        "decode_kernel",
        "merge_run_kernel",
        "merge_group_kernel",
        "merge_row_kernel",
        "merge_tile_kernel",
        "remember_kernel",
        "_rotate_kernel",
        "ahead_kernel",
    ]
    # Keys, values and queries each, of one program or another; no queries at a step's end. Exact tokens and queries.
    several = {"encode_few_kernel": iter((3, 2)), "ahead_kernel": repeat(2)}
    for launch in compiled(kind):
        if launch["name"] in step:
            ptx = Path(launch["file"]).with_suffix(".ptx").read_text()
            waits = ptx.count("griddepcontrol.wait")
            assert waits == ptx.count("griddepcontrol.launch_dependents")
            assert waits == (0 if kind is TEMPLATE_80 else next(several.get(launch["name"], repeat(1))))


@pytest.mark.parametrize("kind", [TEMPLATE, MEANS, TEMPLATE_80], ids=["sm90", "means", "sm80"])
def test_addresses_from_a_table_are_known_to_be_aligned(compiled, kind):
    """What a step's encode reads of a layer comes in 16 bytes at a time, as where the layer is the only one."""
    launches = [launch for launch in compiled(kind) if launch["name"] in STEP]
    ptx = [Path(launch["file"]).with_suffix(".ptx").read_text() for launch in launches]
    narrow = [len(re.findall(r"ld\.global(?!\S*v[24])", text)) for text in ptx]
    assert len(launches) == 6
    for alone, step in zip(narrow[:3], narrow[3:], strict=True):
        assert step - alone <= 30  # the addresses themselves, and the places


def regions_of(ttgir: str, kind: str) -> list[str]:
    """All loops (scf.for) or branches (scf.if), with their bodies."""
    found, lines = [], ttgir.splitlines()
    for i, line in enumerate(lines):
        if f" {kind} " in line:
            end = re.match(r" *", line)[0] + "}"
            stop = next(j for j, x in enumerate(lines) if j > i and x.startswith(end) and "} else" not in x)
            found.append("\n".join(lines[i : stop + 1]))
    return found


def token_loops(file: Path) -> list[str]:
    """The loops over tokens."""
    return [loop for loop in regions_of(file.with_suffix(".ttgir").read_text(), "scf.for") if "tt.dot" in loop]


def of_most_tiles(loop: str) -> str:
    """Without branches."""
    for branch in regions_of(loop, "scf.if"):
        loop = loop.replace(branch, "")
    return loop


def copied(tile: int) -> list[str]:
    """Words of K and V, and scales."""
    return [f"{tile}x16x!tt.ptr<i16>", f"16x{tile}x!tt.ptr<i16>", f"{tile}x!tt.ptr<i32>"]


TILES = 32, 64  # of splits of one tile, and of the others


def decode_of(launches: list[dict]) -> Path:
    """Of decode for one query per request: TTGIR, PTX and cubin."""
    return next(Path(launch["file"]) for launch in launches if launch["name"] == "decode_kernel")


@pytest.fixture(scope="module", params=[TEMPLATE, MEANS, TEMPLATE_80], ids=["sm90", "means", "sm80"])
def decode_file(request, compiled) -> Path:
    return decode_of(compiled(request.param))


@pytest.fixture(scope="module", params=TILES)
def decode(request, decode_file) -> tuple[int, str, str]:
    """Tokens of a tile, the TTGIR of its loop as most tiles go through it, and the PTX of both loops."""
    loops = token_loops(decode_file)
    assert len(loops) == len(TILES)
    loop = of_most_tiles(loops[TILES.index(request.param)])
    return request.param, loop, decode_file.with_suffix(".ptx").read_text()


def assert_operands_stay(loop: str, tile: int) -> None:
    """No level changes its layout in a loop, nor does the query, the same for all tiles: only the weights do."""
    converted = re.findall(r"ttg.convert_layout .*-> tensor<(\w+)xf16, #ttg.dot_op<\{opIdx = (\d)", loop)
    assert converted == [(f"{tile}x8", "1")], converted


def test_decode_makes_levels_where_the_tensor_core_wants_them(decode):
    """Words come from shared memory in the operand's layout; no level is moved between threads or stored."""
    tile, loop, ptx = decode
    dots = re.findall(r"tt\.dot %\w+, ", loop)
    assert len(dots) == 16, "8 segments of K and 8 of V"
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


def machine_loops(cubin: Path, most_tiles: bool = False) -> list[list[str]]:
    """The instructions of each loop with a tile's tensor products in it, from the target of a branch to the branch.

    most_tiles: without those that a branch passes over.
    """
    code, labels, spans = [], {}, []
    for line in tool("nvdisasm", "-c", str(cubin)).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1])
    targets = [re.search(r"BRA.*`\((\.L_x_\d+)\)", x) for x in code]
    targets = [labels.get(found[1], i) if found else i for i, found in enumerate(targets)]
    for i, first in enumerate(targets):
        if sum("HMMA" in x for x in code[first:i]) >= 32:
            spans.append((first, i + 1))
    # What has a loop in it is a branch back from code that was moved to the end.
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    loops = []
    for a, b in inner:
        passed = {j for i in range(a, b) for j in range(i + 1, targets[i])} if most_tiles else ()
        loops.append([code[i] for i in range(a, b) if i not in passed])
    return loops


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


def test_page_means_cost_a_tile_little(compiled):
    """What a query gets of a page's mean is worked out for the page's first tile alone; each tile adds it to the logits
    of flagged keys, which takes so many instructions more."""
    plain, paged = (decode_of(compiled(kind)) for kind in (TEMPLATE, MEANS))
    assert [len(regions_of(loop, "scf.if")) for loop in token_loops(plain)] == [0, 0]
    assert [len(regions_of(loop, "scf.if")) for loop in token_loops(paged)] == [1, 1]
    loops = (machine_loops(file.with_suffix(".cubin"), most_tiles=True) for file in (plain, paged))
    for without, with_means in zip(*loops, strict=True):
        assert 0 < len(with_means) - len(without) <= 45


def test_every_template_has_a_loop_like_the_only_one(compiled):
    """Of heads of four templates: as many copies, dots and conversions in each loop; sixteen programs at a time."""
    file = decode_of(compiled(SEGMENTS))
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
    dtype, allocator, dim, capability, page, folder = sys.argv[1:]
    compile_all(dtype, allocator, int(dim), int(capability), int(page), Path(folder))
