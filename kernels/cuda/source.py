"""The text of the decode kernel for one structure of rows: constants, and functions that turn codes to operands.

What is written here is what depends on the layout of codes; the rest is in ``decode.cu``, whose beginning says how the
two meet. A template of keys is a class with static functions, values are another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..device.dequant import depressed, float16_pair
from ..device.tables import CodeSpec
from ..format.columns import COLUMNS
from .operands import (
    DIRECT,
    MAX_BITS,
    KeySelector,
    Quad,
    bits_of,
    both_halves,
    code_of,
    direct_per_level,
    integers_per_level,
    key_quads,
    key_selectors,
    register_names,
    shifted,
    signed_bytes,
    value_quads,
    value_selectors,
)

PART = 32  # tokens
ROWS = 4  # query rows that one product serves: the two bytes of each are columns of its eight
_WIDE_BIN = 2 * COLUMNS * PART  # bytes of a part in shared memory
_NARROW_BIN = COLUMNS * PART
_SCALES = 4 * PART


@dataclass(frozen=True)
class Shape:
    """All that a binary is compiled for. row_tiles: of ROWS query rows, in one program. parts: of PART tokens, in a
    tile."""

    row_bytes: int
    k_stride: int
    v_stride: int
    v_offset: int
    norm_offset: int
    heads: int
    group: int
    queries: int
    v_dim: int
    page: int
    padded: int
    window: int
    cap: float
    tree: bool
    row_tiles: int
    parts: int
    stages: int
    programs: int
    indptr64: bool
    slots64: bool
    keys: tuple[CodeSpec, ...]
    values: CodeSpec

    @property
    def part_bytes(self) -> int:
        return part_bytes(self.keys, self.values)

    @property
    def shared_bytes(self) -> int:
        """Of a program: tiles under way."""
        return self.stages * self.parts * self.part_bytes


def _bin_bytes(repeat: int) -> int:
    return _WIDE_BIN if repeat == 1 else _NARROW_BIN


def _code_bytes(spec: CodeSpec) -> int:
    return sum(map(_bin_bytes, spec.repeat))


def part_bytes(keys: tuple[CodeSpec, ...], values: CodeSpec) -> int:
    """Of a part in shared memory."""
    return max(map(_code_bytes, keys)) + _code_bytes(values) + _SCALES


def _bins(spec: CodeSpec) -> list[tuple[int, int, int]]:
    """(byte within a head's codes, columns per word, first byte of a part in shared memory) of each bin."""
    out, at = [], 0
    for (byte, _, _), repeat in zip(spec.bins, spec.repeat, strict=True):
        out.append((byte, repeat, at))
        at += _bin_bytes(repeat)
    return out


def _copies(spec: CodeSpec) -> list[str]:
    """A part's words to shared memory."""
    lines = []
    for byte, repeat, at in _bins(spec):
        if repeat == 1:
            lines += [f"copy_wide(to + {at}, from, {byte * 16}, {i}, lane);" for i in (0, 1)]
        else:
            lines.append(f"copy_narrow<{32 // repeat}>(to + {at}, from, {byte * 16}, lane);")
    return lines


def _prefetches(spec: CodeSpec) -> list[str]:
    return [
        f"prefetch_l2((const void*)(from.block + from.within * {32 // repeat} + {byte * 16}));"
        for byte, repeat, _ in _bins(spec)
    ]


def _tables(widths: set[int]) -> list[str]:
    """Members of Tables and their values."""
    lines = []
    for bits in sorted(widths):
        data = [x & 0xFF for x in signed_bytes(bits)]
        if bits == MAX_BITS:  # see decode.cu: the positive half is read one too low
            data[8:] = [x + 1 for x in data[8:]]
        data += [0] * (-len(data) % 4)
        for i in range(0, len(data), 4):
            word = sum(x << 8 * j for j, x in enumerate(data[i : i + 4]))
            lines.append(f"u32 of_{bits}_{i // 4} = opaque({word:#010x}u);")
    return lines


def _level_text(spec: CodeSpec, segment: int, half: int) -> list[str]:
    """Statements that leave ``t``, levels of a segment of many bits less its slope, two columns' float16.

    As in device/dequant.py: the code is put under the exponent of a float16 and centred, its polynomial follows.
    """
    bits = bits_of(spec.segments[segment])
    at = 1
    top = (15 + 10 - at - (bits - 1)) << 10
    lines = [f"u32 t = {both_halves(top)};"]
    for piece in code_of(spec, segment, half, "k"):
        by, to = piece.shift - at - piece.position, at + piece.position
        lines.append(f"t |= {shifted(piece.register + '[i]', by)} & {both_halves(((1 << piece.width) - 1) << to)};")
    lines.append(f"t = sub_f16x2(t, {both_halves(top | ((1 << bits) - 1) << (at - 1))});")
    h, rest, _ = depressed(spec.poly[segment])
    lines += [f"const u32 s = fma_f16x2(t, t, {float16_pair(h):#010x}u);", "u32 y = s;"]
    lines += [f"y = fma_f16x2(y, s, {float16_pair(r):#010x}u);" for r in rest]
    return [*lines, "t = mul_f16x2(y, t);"]


@dataclass(frozen=True)
class _Keys:
    """How a template's codes are read. pairs: two quads for each product, the last one alone if they are odd. levelled:
    segments of more than MAX_BITS bits."""

    spec: CodeSpec
    selectors: tuple[KeySelector, ...]
    pairs: tuple[tuple[Quad, ...], ...]
    levelled: tuple[int, ...]

    @classmethod
    def of(cls, spec: CodeSpec) -> _Keys:
        quads = key_quads(spec)
        return cls(
            spec,
            key_selectors(spec),
            tuple(quads[i : i + 2] for i in range(0, len(quads), 2)),
            tuple(s for s, pieces in enumerate(spec.segments) if bits_of(pieces) > MAX_BITS),
        )


def _key_class(kind: int, spec: CodeSpec) -> str:
    keys = _Keys.of(spec)
    lines = [
        f"struct Keys{kind} {{",
        f"static constexpr int SELECTORS = {len(keys.selectors)}, PAIRS = {len(keys.pairs)},"
        f" LEVELLED = {len(keys.levelled)};",
        "static MEMBER void copy(u32 to, const From& from, u32 lane) {",
        *_copies(spec),
        "}",
        "static MEMBER void prefetch(const From& from) {",
        *_prefetches(spec),
        "}",
        # The largest number of a lane's channels, as the operands of integers and of levels have them.
        "static MEMBER void sizes(const Pair* q, float& integers, float& levels) {",
        *_sizes(keys),
        "}",
        "template <class Q> static MEMBER void operands(const Pair* q, Q& out, int n, float integers, float levels) {",
        *_operands(keys),
        "}",
        "static MEMBER float dot(const Pair* q, const Pair* mean, u32 part) {",
        "float sum = 0;",
        *(
            f"if (part == {s % 2}) sum += dot2(q[{8 * s}], mean[{8 * s}]) + dot2(q[{8 * s + 4}], mean[{8 * s + 4}]);"
            for s in range(len(spec.segments))
        ),
        "return sum;",
        "}",
        "template <class Q, class L> static MEMBER void multiply(u32 tile, const Lane& at, const Tables& tables,"
        " const Q& q, L& logits) {",
        *_loads(spec, "k", "load_wide_keys", "ldmatrix4", {4: "4 * (at.t >> 1)", 8: "2 * at.t"}),
        *_key_products(keys),
        "}",
        "};",
    ]
    return "\n".join(lines)


def _middle(width: int) -> str:
    """What takes the middle off, four bytes."""
    return f"{(-DIRECT[width][1] & 0xFF) * 0x01010101:#010x}u"


def _sizes(keys: _Keys) -> list[str]:
    """Of the channels of a width, or of a slope, the largest, times what the query is multiplied with."""
    groups: dict[tuple[str, float], set[int]] = {}
    for selector in keys.selectors:
        segments = groups.setdefault(("integers", 1 / integers_per_level(selector.width)), set())
        segments.update(segment for segment, _ in selector.codes)
    for quad in (quad for pair in keys.pairs for quad in pair):
        segments = groups.setdefault(("integers", 1 / direct_per_level(quad.width)), set())
        segments.update(segment for segment, _ in quad.codes)
    for segment in keys.levelled:
        groups.setdefault(("levels", keys.spec.slope[segment]), set()).add(segment)
    lines = []
    for (name, factor), segments in groups.items():
        lines.append("{ float most = 0;")
        lines += [f"most = largest(most, q[{8 * segment + i}]);" for segment in sorted(segments) for i in (0, 4)]
        lines.append(f"{name} = larger({name}, most * {factor:.9e}f); }}")
    return lines


def _operands(keys: _Keys) -> list[str]:
    lines = []
    for j, selector in enumerate(keys.selectors):
        lines.append(f"{{ const float by = integers * {1 / integers_per_level(selector.width):.9e}f;")
        pairs = [f"q[{8 * s + 4 * half}]" for s, half in selector.codes] + ["Pair{0, 0}"] * (4 - len(selector.codes))
        for b, part in (("b0", "x"), ("b1", "y")):
            numbers = ", ".join(f"{pair}.{part} * by" for pair in pairs)
            lines.append(f"out.{b}[{j}][n] = out.bytes({numbers});")
        lines.append("}")
    for j, pair in enumerate(keys.pairs):
        for b, quad in zip(("d0", "d1"), pair, strict=False):
            at = [f"q[{8 * segment + 4 * half}]" for segment, half in quad.codes]
            numbers = ", ".join(f"{name}.{part} * by" for part in "xy" for name in at)
            lines.append(f"{{ const float by = integers * {1 / direct_per_level(quad.width):.9e}f;")
            lines.append(f"out.{b}[{j}][n] = out.bytes({numbers}); }}")
        if len(pair) == 1:
            lines.append(f"out.d1[{j}][n] = 0;")
        low, high = _middle(pair[0].width), _middle(pair[-1].width)
        lines.append(f"imma(out.start[n], {low}, {low}, {high}, {high}, out.d0[{j}][n], out.d1[{j}][n]);")
    for j, segment in enumerate(keys.levelled):
        lines.append(f"{{ const float by = levels * {keys.spec.slope[segment]:.9e}f;")
        for b, i in (("h0", 0), ("h1", 4)):
            lines.append(f"out.{b}[{j}][n] = out.halves(q[{8 * segment + i}].x * by, q[{8 * segment + i}].y * by);")
        lines.append("}")
    return lines


def _loads(spec: CodeSpec, prefix: str, wide: str, narrow: str, before: Mapping[int, str], to: int = 0) -> list[str]:
    """A part's words to registers, as :func:`.operands.register_names` calls them.

    wide, narrow: what loads a bin of 16 bits, and any other. before: by columns per word, the bits ahead of a lane's.
    to: the part's first byte.
    """
    lines = []
    for (_, repeat, at), names in zip(_bins(spec), register_names(spec, prefix), strict=True):
        lines.append(f"u32 {', '.join(f'{name}[4]' for name in names)};")
        if repeat == 1:
            lines.append(f"{wide}({', '.join(names)}, tile + {to + at}, at);")
        else:
            lines.append(f"{narrow}({names[0]}, tile + {to + at} + at.lane * 16);")
        if repeat in before:
            lines.append(f"for (int j = 0; j < 4; j++) {names[0]}[j] >>= {before[repeat]};")
    return lines


def _key_products(keys: _Keys) -> list[str]:
    lines = []
    for j, selector in enumerate(keys.selectors):
        lines.append("for (int m = 0; m < 2; m++) {")
        for name, index in (("z0", "2 * m"), ("z1", "2 * m + 1")):
            lines.append(f"const u32 {name} = {selector.text.replace('{i}', index)};")
        lines.append(f"::multiply<{selector.width}>(logits.integers[m], z0, z1, q.b0[{j}], q.b1[{j}], tables);")
        lines.append("}")
    for j, pair in enumerate(keys.pairs):
        a = [quad.text.replace("{i}", index) for quad in pair for index in ("2 * m", "2 * m + 1")]
        a += ["0"] * (4 - len(a))
        lines.append(f"for (int m = 0; m < 2; m++) products(logits.integers[m], {', '.join(a)}, q.d0[{j}], q.d1[{j}]);")
    for j, segment in enumerate(keys.levelled):
        lines.append("for (int m = 0; m < 2; m++) { u32 a[4];")
        for place, (index, half) in enumerate((("2 * m", 0), ("2 * m + 1", 0), ("2 * m", 1), ("2 * m + 1", 1))):
            lines += ["{", f"const int i = {index};", *_level_text(keys.spec, segment, half), f"a[{place}] = t;", "}"]
        lines.append(
            "for (int n = 0; n < ROW_TILES; n++)"
            f" hmma(logits.levels[m][n], a[0], a[1], a[2], a[3], q.h0[{j}][n], q.h1[{j}][n]);"
        )
        lines.append("}")
    return lines


def _value_class(spec: CodeSpec, parts: int, part_bytes: int) -> str:
    direct = {quad.segment for quad in value_quads(spec)}
    widths = [bits_of(pieces) for pieces in spec.segments]
    per_levels = [(direct_per_level if s in direct else integers_per_level)(w) for s, w in enumerate(widths)]
    lines = [
        "struct Values {",
        f"static constexpr int SEGMENTS = {len(spec.segments)};",
        "static MEMBER void copy(u32 to, const From& from, u32 lane) {",
        *_copies(spec),
        "}",
        "static MEMBER void prefetch(const From& from) {",
        *_prefetches(spec),
        "}",
        "static MEMBER float level(int segment) {",
        *(f"if (segment == {s}) return {1 / per_level:.9e}f;" for s, per_level in enumerate(per_levels)),
        "return 0;",
        "}",
    ]
    for name, count in (("multiply", parts), ("multiply_first", 1)):
        lines += [
            f"template <class S> static MEMBER void {name}(u32 tile, const Lane& at, const Tables& tables,"
            " const u32 (&first)[PARTS][ROW_TILES], const u32 (&second)[PARTS][ROW_TILES], S& sums) {",
            *_value_products(spec, count, part_bytes),
            "}",
        ]
    return "\n".join([*lines, "};"])


def _value_products(spec: CodeSpec, parts: int, part_bytes: int) -> list[str]:
    """Of the first ``parts`` parts of a tile."""
    names = [f"v{part}_" for part in range(parts)]
    quads, selectors = ([of(spec, name) for name in names] for of in (value_quads, value_selectors))
    before = {4: "4 * (at.g >> 2)", 8: "2 * (at.g >> 1)"}
    lines = []
    for part, name in enumerate(names):
        lines += _loads(spec, name, "load_wide_values", "ldmatrix4_trans", before, part * part_bytes)
    if quads[0]:  # the weights' own sum, of which the middle of codes is taken off
        ones = ", ".join(["0x01010101u"] * 4)
        lines.append("{ int c[ROW_TILES][4] = {};")
        lines += [f"products(c, {ones}, first[{part}], second[{part}]);" for part in range(parts)]
        lines.append("for (int n = 0; n < ROW_TILES; n++) sums.weights[n] = c[n][0] * 256 + c[n][1]; }")
    for of_parts in zip(*quads, strict=True):
        lines.append("{ int c[ROW_TILES][4] = {};")
        for part, quad in enumerate(of_parts):
            lines.append(f"products(c, {', '.join(quad.texts)}, first[{part}], second[{part}]);")
        lines.append(f"sums.add({of_parts[0].segment}, {DIRECT[of_parts[0].width][1]}, c); }}")
    if selectors[0]:
        lines.append("u32 b0[PARTS][ROW_TILES], b1[PARTS][ROW_TILES];")
        lines += [f"first_tokens_first(first[{i}], second[{i}], b0[{i}], b1[{i}]);" for i in range(parts)]
    for of_parts in zip(*selectors, strict=True):
        for selector in of_parts:
            lines += selector.statements
        lines.append("{ int c[ROW_TILES][4] = {};")
        for part, selector in enumerate(of_parts):
            low, high = selector.selectors
            lines.append(f"::multiply<{selector.width}>(c, {low}, {high}, b0[{part}], b1[{part}], tables);")
        lines.append(f"sums.add({of_parts[0].segment}, 0, c); }}")
    return lines


@cache
def text_of(name: str) -> str:
    """A file of this folder."""
    return (Path(__file__).parent / name).read_text()


def source(shape: Shape) -> str:
    """The kernel ``decode`` without its primitives, which are ``hopper.cu``'s."""
    kinds = range(len(shape.keys))
    numbers = {
        "ROW_BYTES": shape.row_bytes,
        "K_STRIDE": shape.k_stride,
        "V_STRIDE": shape.v_stride,
        "V_OFFSET": shape.v_offset,
        "NORM_OFFSET": shape.norm_offset,
        "HEADS": shape.heads,
        "GROUP": shape.group,
        "QUERIES": shape.queries,
        "V_DIM": shape.v_dim,
        "PAGE": shape.page,
        "PAGE_OR_ONE": max(shape.page, 1),
        "PADDED": shape.padded,
        "WINDOW": shape.window,
        "CAP": f"{shape.cap:.9e}f",
        "CAP_OR_ONE": f"{shape.cap or 1.0:.9e}f",
        "CAPPED": int(shape.cap > 0),
        "TREE": int(shape.tree),
        "ROW_TILES": shape.row_tiles,
        "PARTS": shape.parts,
        "STAGES": shape.stages,
        "KINDS": len(shape.keys),
        "VALUES_AT": max(map(_code_bytes, shape.keys)),
        "SCALES_AT": shape.part_bytes - _SCALES,
        "PART_BYTES": shape.part_bytes,
        "STAGE_BYTES": shape.parts * shape.part_bytes,
    }
    widths = {bits_of(p) for spec in (*shape.keys, shape.values) for p in spec.segments}
    head = [f"#define {name} {value}" for name, value in numbers.items()]
    head += [
        f"typedef {'i64' if wide else 'int'} {name};"
        for name, wide in (("Indptr", shape.indptr64), ("Slot", shape.slots64))
    ]
    body, _, rest = text_of("decode.cu").partition("// GENERATED\n")
    tables = "\n".join(["struct Tables {", *_tables({w for w in widths if w <= MAX_BITS}), "};"])
    lookups = "\n".join(_lookup(w) for w in sorted(widths) if w <= MAX_BITS)
    kinds_text = "\n".join(_key_class(kind, shape.keys[kind]) for kind in kinds)
    calls = "\n".join(f"if (KINDS == 1 || kind == {kind}) attend<Keys{kind}>(program);" for kind in kinds)
    values = _value_class(shape.values, shape.parts, shape.part_bytes)
    parts = ["\n".join(head), body, tables, lookups, kinds_text, values]
    return "\n\n".join([*parts, rest.replace("// EACH KIND\n", calls + "\n")])


def _lookup(bits: int) -> str:
    """multiply<bits>: what two selectors say, times a query or weights."""
    t = [f"tables.of_{bits}_{i}" for i in range(max((1 << bits) // 4, 1))]
    head = (
        f"template <> MEMBER void multiply<{bits}>(int (&c)[ROW_TILES][4], u32 z0, u32 z1, const u32 (&b0)[ROW_TILES],"
        " const u32 (&b1)[ROW_TILES], const Tables& tables) {"
    )
    if bits < MAX_BITS:  # nibbles without their highest bit are finite as float16
        return f"{head}\nlook_up({t[0]}, {t[-1]}, z0, z1, upper_half(z0), upper_half(z1), c, b0, b1);\n}}"
    flip, upper = "0x88888888u", "z0 >> 16, z1 >> 16"
    return (
        f"{head}\nlook_up({t[0]}, {t[1]}, z0, z1, {upper}, c, b0, b1);\nz0 ^= {flip}, z1 ^= {flip};\n"
        f"look_up({t[2]}, {t[3]}, z0, z1, {upper}, c, b0, b1);\n}}"
    )
