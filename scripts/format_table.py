"""Rewrite the generated blocks of docs/format.md from the code that defines the format.

usage: python scripts/format_table.py [--check]

A block lies between ``<!-- NAME: generated ... -->`` and ``<!-- end NAME -->``. With ``--check``
nothing is written and the exit code says whether the file is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.allocate import block_budget
from sglang_blockgtq.kernels import naive
from sglang_blockgtq.kernels.codebook import MAX_BITS, MIN_BITS
from sglang_blockgtq.kernels.codec import LayerCodec
from sglang_blockgtq.kernels.layout import NORM_BYTES, CodeLayout, RowLayout, uniform_layout

DOC = Path(__file__).resolve().parent.parent / "docs" / "format.md"
HEAD_DIMS = (64, 80, 96, 128, 256)
PRESETS = ((2, 2), (3, 2), (3, 3), (4, 4))

#: The worked example: head_dim 128, K3V3, two heads, the widths the template allocator chose for
#: SmolLM2-135M at 3 bits (an eighth of the channels at 6, half at 3, the rest at 2 bits).
EXAMPLE_HEADS = 2
EXAMPLE_WIDTHS = (6,) * 16 + (3,) * 64 + (2,) * 48
EXAMPLE_HEAD, EXAMPLE_CHANNEL = 1, 70


def row_layout(heads: int, widths: tuple[int, ...], v_bits: float) -> RowLayout:
    """A row whose heads all have the same key widths and as many value channels."""
    return RowLayout.of((CodeLayout(widths),) * heads, uniform_layout(len(widths), v_bits))


def max_scales(blocks: int, budget: int) -> int:
    """Most different widths, hence scales, that one head can get under a budget of block-bits."""
    most = 1
    for count in range(1, min(MAX_BITS, blocks) + 1):
        cheapest = sum(range(MIN_BITS, MIN_BITS + count)) + MIN_BITS * (blocks - count)
        if cheapest <= budget:
            most = count
    return most


def sizes() -> str:
    """Bytes per token and KV head: code, scales, no row padding."""
    lines = [
        "| head_dim | bits | bf16 | `uniform`, `template` | ratio | `paper`, `product` |",
        "|---:|:---|---:|---:|---:|---:|",
    ]
    for dim in HEAD_DIMS:
        for k_bits, v_bits in PRESETS:
            row = RowLayout.of((uniform_layout(dim, k_bits),), uniform_layout(dim, v_bits))
            one, dense = row.head_bytes, 4 * dim
            most = one + NORM_BYTES * (max_scales(dim // 2, block_budget(dim // 2, k_bits)) - 1)
            lines.append(f"| {dim} | K{k_bits}V{v_bits} | {dense} | {one} | {dense / one:.2f} | {one} to {most} |")
    return "\n".join(lines)


def example_row() -> tuple[LayerCodec, torch.Tensor]:
    """The worked example's codec (no transforms) and its one packed row ``[row_bytes]``.

    Keys and values are multiples of 1/16, so the bytes are the same on every machine.
    """
    codec = LayerCodec.identity(row_layout(EXAMPLE_HEADS, EXAMPLE_WIDTHS, 3))
    dim = len(EXAMPLE_WIDTHS)
    channel = torch.arange(dim)
    head = torch.arange(EXAMPLE_HEADS)[:, None]
    k = ((37 * channel + 11 * head) % 64 - 31.5) / 16
    v = ((29 * channel + 5 * head) % 64 - 31.5) / 32
    return codec, naive.encode(codec, k[None], v[None])[0]


def planes() -> str:
    layout = CodeLayout(EXAMPLE_WIDTHS)
    lines = [
        "| plane | bytes of the head's codes | W | elements | channels, and which bits of their code |",
        "|:---|:---|---:|---:|:---|",
    ]
    for plane in layout.planes:
        runs = []
        for run in plane.runs:
            top = run.position + plane.width - 1
            bits = f"bit {top}" if plane.width == 1 else f"bits {top}-{run.position}"
            runs.append(f"{run.start}-{run.stop - 1}: {bits}")
        where = f"{plane.offset}-{plane.offset + plane.num_bytes - 1}"
        lines.append(f"| {plane.name} | {where} | {plane.num_bytes} | {plane.num_elements} | {'; '.join(runs)} |")
    return "\n".join(lines)


def example() -> str:
    """The packed row in hexadecimal, and the steps that read one channel out of it."""
    codec, row = example_row()
    layout, head, channel = codec.layout, EXAMPLE_HEAD, EXAMPLE_CHANNEL
    code_layout = layout.k[head]
    data = bytes(row.tolist())
    dump = [f"{i:3d}  {data[i : i + 16].hex(' ')}" for i in range(0, len(data), 16)]
    steps, code = [], 0
    start = head * layout.k_code_bytes
    for plane in code_layout.planes:
        byte, shift, position = code_layout.field_table[plane.name][channel]
        if byte < 0:
            continue
        mask = (1 << plane.width) - 1
        field = data[start + byte] >> shift & mask
        code |= field << position
        low = next(run for run in plane.runs if run.start <= channel < run.stop)
        element = channel - low.start + sum(r.stop - r.start for r in plane.runs if r.stop <= low.start)
        steps.append(
            f"* `{plane.name}`: element {element}; byte {start} + {plane.offset} + {element} % {plane.num_bytes} = "
            f"**{start + byte}**, shift {element} // {plane.num_bytes} * {plane.width} = {shift}. "
            f"`0x{data[start + byte]:02x} >> {shift} & {mask}` = **{field}**, worth {field} << {position}."
        )
    at = layout.norm_offset + head * layout.norms * NORM_BYTES
    scale = float(naive._norms(codec, row[None])[0, head, 0])
    level = float(codec.levels[code_layout.widths[channel], code])
    steps += [
        f"* Code = **{code}**; level {code} of the {code_layout.widths[channel]}-bit codebook is {level:.6f}.",
        f"* Scale: bytes {at}-{at + 1}, `0x{data[at]:02x} 0x{data[at + 1]:02x}`, little-endian float16 "
        f"`0x{data[at + 1]:02x}{data[at]:02x}` = {scale:.6f}.",
        f"* Value = {scale:.6f} * {level:.6f} = **{scale * level:.5f}**.",
    ]
    return "\n".join(["```", *dump, "```", "", *steps])


BLOCKS = {"sizes": sizes, "planes": planes, "example": example}


def rewrite(text: str) -> str:
    """The document with every block made anew. ValueError if a marker is missing."""
    for name, make in BLOCKS.items():
        begin = f"<!-- {name}: generated by scripts/format_table.py -->"
        end = f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{DOC.name} needs '{begin}' and '{end}' once each")
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def main() -> int:
    old = DOC.read_text()
    new = rewrite(old)
    if "--check" in sys.argv[1:]:
        if new != old:
            print(f"{DOC.name} is out of date: run python scripts/format_table.py", file=sys.stderr)
        return int(new != old)
    DOC.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
