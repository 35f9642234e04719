"""Rewrite the generated blocks of docs/format.md and docs/format_example.md from the code that defines the format.

usage: python scripts/format_table.py [--check]

A block lies between ``<!-- NAME: generated ... -->`` and ``<!-- end NAME -->``. With ``--check``
nothing is written and the exit code says whether the files are up to date.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.allocate import block_budget
from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.format.codebook import (
    MAX_BITS,
    MIN_BITS,
    POLYNOMIAL,
    boundaries,
    distortion,
    levels,
    lloyd_max,
)
from sglang_blockgtq.kernels.format.codec import LayerCodec
from sglang_blockgtq.kernels.format.columns import COLUMNS
from sglang_blockgtq.kernels.format.layout import BLOCK_SLOTS, NORM_BYTES, CodeLayout, RowLayout, uniform_layout

DOC = Path(__file__).resolve().parent.parent / "docs" / "format.md"
EXAMPLE = DOC.with_name("format_example.md")
HEAD_DIMS = (64, 80, 96, 128, 256)
PRESETS = ((2, 2), (3, 2), (3, 3), (4, 4))

#: The worked example: head_dim 128, K3V3, two heads, widths that the template allocator may choose at 3 bits.
EXAMPLE_HEADS = 2
EXAMPLE_WIDTHS = tuple(bits for bits in (6, 4, 3, 3, 2, 2, 2, 2) for _ in range(COLUMNS))
EXAMPLE_HEAD, EXAMPLE_CHANNEL = 1, 90  # read by hand, of the keys
CUT_CHANNEL = 123  # the same, of the values


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
    return codec, reference.encode(codec, k[None], v[None])[0]


def bits_of(first: int, width: int) -> str:
    return f"bit {first}" if width == 1 else f"bits {first + width - 1}-{first}"


def columns() -> str:
    """Where each segment of the example lies, keys and values."""
    lines = [
        "| | segment | channels | width | bin | bits of the column's part | bits of the code |",
        "|:---|---:|:---|---:|---:|:---|:---|",
    ]
    for side, layout in (("K", CodeLayout(EXAMPLE_WIDTHS)), ("V", uniform_layout(len(EXAMPLE_WIDTHS), 3))):
        for segment, (bits, pieces) in enumerate(zip(layout.columns.widths, layout.columns.segments, strict=True)):
            for piece in pieces:
                channels = f"{segment * COLUMNS}-{segment * COLUMNS + COLUMNS - 1}"
                part = bits_of(piece.shift, piece.width)
                code = "all" if piece.width == bits else bits_of(piece.position, piece.width)
                lines.append(f"| {side} | {segment} | {channels} | {bits} | {piece.bin} | {part} | {code} |")
    return "\n".join(lines)


def bins() -> str:
    """The bins of the example's keys and values, which are the same."""
    of_k, of_v = CodeLayout(EXAMPLE_WIDTHS).columns.bins, uniform_layout(len(EXAMPLE_WIDTHS), 3).columns.bins
    assert of_k == of_v
    lines = [
        "| bin | bits of a column | bytes of the head's codes | words | columns in a word |",
        "|---:|---:|:---|---:|---:|",
    ]
    for i, part in enumerate(of_k):
        where = f"{part.offset}-{part.offset + part.num_bytes - 1}"
        lines.append(f"| {i} | {part.bits} | {where} | {part.words} | {part.repeat} |")
    return "\n".join(lines)


def read_code(layout: CodeLayout, data: bytes, start: int, channel: int) -> tuple[int, list[str]]:
    """The code of one channel of a head whose codes start at byte ``start``, and the steps to it."""
    segment, column = divmod(channel, COLUMNS)
    steps, code = [f"* Channel {channel} is column {column} of segment {segment}."], 0
    for piece in layout.columns.segments[segment]:
        part = layout.columns.bins[piece.bin]
        word_at = start + part.offset + 2 * (column % part.words)
        word = int.from_bytes(data[word_at : word_at + 2], "little")
        above = column // part.words * part.bits
        mask = (1 << piece.width) - 1
        field = word >> above + piece.shift & mask
        code |= field << piece.position
        in_bin, low, pair = column % part.words, above + piece.shift, data[word_at : word_at + 2].hex(" ")
        steps += [
            f"* Bin {piece.bin}: word {column} % {part.words} = {in_bin}, "
            f"at byte {start} + {part.offset} + 2 * {in_bin} = **{word_at}**: `{pair}`, little-endian `0x{word:04x}`.",
            f"  The column's part starts at bit {column} // {part.words} * {part.bits} = {above}, "
            f"the piece {piece.shift} above:",
            f"  `0x{word:04x} >> {low} & {mask}` = **{field}**, worth {field} << {piece.position}.",
        ]
    return code, steps


def example() -> str:
    """The packed row in hexadecimal, and the steps that read one key channel and one value channel out of it."""
    codec, row = example_row()
    layout, head = codec.layout, EXAMPLE_HEAD
    data = bytes(row.tolist())
    lines = ["```", *(f"{i:3d}  {data[i : i + 16].hex(' ')}" for i in range(0, len(data), 16)), "```"]
    sides = (
        ("K", layout.k[head], head * layout.k_code_bytes, EXAMPLE_CHANNEL),
        ("V", layout.v, layout.v_offset + head * layout.v_code_bytes, CUT_CHANNEL),
    )
    for side, (name, codes, start, channel) in enumerate(sides):
        code, steps = read_code(codes, data, start, channel)
        at = layout.norm_offset + (head * layout.norms + side) * NORM_BYTES
        (scale,) = struct.unpack_from("<e", data, at)
        bits = codes.widths[channel]
        level = float(levels(bits)[code])
        lines += ["", f"{name} of head {head}, channel {channel}:", "", *steps]
        lines += [
            f"* Code = **{code}**; level {code} of the {bits}-bit codebook is {level:.6f}.",
            f"* Scale: bytes {at}-{at + 1}, `{data[at]:02x} {data[at + 1]:02x}`, little-endian float16 "
            f"`0x{data[at + 1]:02x}{data[at]:02x}` = {scale:.6f}.",
            f"* Value = {scale:.6f} * {level:.6f} = **{scale * level:.5f}**.",
        ]
    return "\n".join(lines)


def sections() -> str:
    """Sections of the example's rows, and where they lie in a block."""
    layout = row_layout(EXAMPLE_HEADS, EXAMPLE_WIDTHS, 3)
    names = [f"{side} head {h}, bin {b}" for side in "KV" for h in range(EXAMPLE_HEADS) for b in range(2)]
    names += [f"scales of head {h}" for h in range(EXAMPLE_HEADS)]
    lines = ["| section | bytes of the row | of each | bytes of the block |", "|:---|:---|---:|:---|"]
    for name, (first, size) in zip(names, layout.sections, strict=True):
        block = f"{first * BLOCK_SLOTS}-{(first + size) * BLOCK_SLOTS - 1}"
        lines.append(f"| {name} | {first}-{first + size - 1} | {size} | {block} |")
    return "\n".join(lines)


def codebooks() -> str:
    lines = ["| bits | c_0, c_1, ... of x | squared error | Lloyd-Max |", "|---:|:---|---:|---:|"]
    for bits in range(MIN_BITS, MAX_BITS + 1):
        c = ", ".join(f"{x:.6f}" for x in POLYNOMIAL[bits])
        best, mine = lloyd_max_distortion(bits), distortion(bits)
        lines.append(f"| {bits} | {c} | {mine:.4g} | {best:.4g} |")
    return "\n".join(lines)


def lloyd_max_distortion(bits: int) -> float:
    """``1 - E[c^2]``, as every Lloyd-Max level is the mean of its cell."""
    level = lloyd_max(bits)
    edge = torch.cat([level.new_tensor([-40.0]), boundaries(level), level.new_tensor([40.0])])
    cdf = 0.5 * torch.special.erfc(-edge / 2**0.5)
    return float(1 - ((cdf[1:] - cdf[:-1]) * level**2).sum())


BLOCKS = {
    DOC: {"bins": bins, "columns": columns, "sections": sections, "codebooks": codebooks, "sizes": sizes},
    EXAMPLE: {"example": example},
}


def rewrite(page: Path, text: str) -> str:
    """A page with every block made anew. ValueError if a marker is missing."""
    for name, make in BLOCKS[page].items():
        begin = f"<!-- {name}: generated by scripts/format_table.py -->"
        end = f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page.name} needs '{begin}' and '{end}' once each")
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def main() -> int:
    stale = False
    for page in BLOCKS:
        old = page.read_text()
        if (new := rewrite(page, old)) == old:
            continue
        stale = True
        if "--check" in sys.argv[1:]:
            print(f"{page.name} is out of date: run python scripts/format_table.py", file=sys.stderr)
        else:
            page.write_text(new)
    return int("--check" in sys.argv[1:] and stale)


if __name__ == "__main__":
    sys.exit(main())
