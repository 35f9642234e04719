"""How words of codes in columns become operands of an integer tensor core: what to select, and which number a code is.

A permutation of bytes (PRMT) takes four numbers of four bits from a register and looks them up in a table of eight
bytes. So a *selector* of 32 bits, with codes at its eight nibbles, becomes two registers of four signed bytes each,
of its low and of its high half, which are operands of ``mma.m16n8k32`` as they are. The words of two neighbouring
columns (keys) or tokens (values) lie in the halves of a register; this module says by which shifts and masks the codes
of four such registers come to the nibbles of one. Both halves are treated alike.

Codes of 1 and 2 bits have levels in equal steps and need no table: where four of them lie at one place of a register's
bytes, a shift and a mask make an operand of them (:class:`Quad`), and a second product takes the middle off.

The order of a product's terms is free as long as both operands have the same: keys put two segments into a selector,
in the order that costs least, and the query follows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..device.tables import CodeSpec
from ..format.codebook import levels

MAX_BITS = 4  # of a code that is looked up
#: Positive levels as signed bytes: at 1 and 2 bits exact, at 3 bits to 0.14 %, at 4 bits to 0.31 % of a level's RMS.
INTEGERS = {1: (50,), 2: (25, 75), 3: (12, 38, 69, 109), 4: (6, 18, 30, 43, 57, 74, 95, 124)}
#: Of a code that is an operand as it is: the bit of a byte at which it lies, and what the middle of its numbers is.
DIRECT = {1: (6, 32), 2: (5, 48)}
_HALVES = 0x10001


def integers_per_level(bits: int) -> float:
    """The bytes of :data:`INTEGERS` over the levels they stand for, by the least squared error of N(0, 1)."""
    positive = [float(x) for x in levels(bits)[1 << (bits - 1) :]]
    edges = [0.0, *((a + b) / 2 for a, b in zip(positive, positive[1:], strict=False)), math.inf]
    mass = [math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2)) for a, b in zip(edges, edges[1:], strict=False)]
    weighted = list(zip(mass, positive, INTEGERS[bits], strict=True))
    return sum(p * i * i for p, _, i in weighted) / sum(p * x * i for p, x, i in weighted)


def direct_per_level(bits: int) -> float:
    """The same of :data:`DIRECT`."""
    return (1 << DIRECT[bits][0]) / 2 / float(levels(bits)[1 << (bits - 1)])


def signed_bytes(bits: int) -> tuple[int, ...]:
    """The byte of each code."""
    return (*(-x for x in reversed(INTEGERS[bits])), *INTEGERS[bits])


@dataclass(frozen=True)
class Piece:
    """``width`` bits of a code from its bit ``position`` on, at bit ``shift`` of each half of ``register``."""

    register: str
    shift: int
    width: int
    position: int


Code = tuple[Piece, ...]


def register_names(spec: CodeSpec, prefix: str) -> list[list[str]]:
    """Registers of each bin: two of a bin of 16 bits, of columns up to 7 and from 8 on, else one of both."""
    return [
        [f"{prefix}{i}_0", f"{prefix}{i}_1"] if repeat == 1 else [f"{prefix}{i}"]
        for i, repeat in enumerate(spec.repeat)
    ]


def bits_of(pieces: tuple[int, ...]) -> int:
    """Of a segment as CodeSpec has it."""
    return sum(pieces[2::4])


def most_bits(spec: CodeSpec) -> int:
    """Of a segment."""
    return max(map(bits_of, spec.segments))


def code_of(spec: CodeSpec, segment: int, half: int, prefix: str) -> Code:
    """Where a code of a segment lies, for a column below 8 (half 0) or the one 8 further.

    A register of a narrow bin has the latter's bits 8 above the former's, once it is shifted by what precedes them.
    """
    pieces, names = spec.segments[segment], register_names(spec, prefix)
    out = []
    for bin_, shift, width, position in zip(*(pieces[i::4] for i in range(4)), strict=True):
        found = names[bin_]
        out.append(Piece(found[half % len(found)], shift + (8 * half if len(found) == 1 else 0), width, position))
    return tuple(out)


def shifted(register: str, right: int) -> str:
    """The text of a shift, to the left where ``right`` is negative."""
    if right == 0:
        return register
    return f"({register} >> {right})" if right > 0 else f"({register} << {-right})"


def both_halves(bits: int) -> str:
    """The text of 16 bits in both halves."""
    return f"{bits * _HALVES:#010x}u"


def _nibbles(width: int, which: int = 0xF) -> int:
    """``width`` ones in each nibble that ``which`` names, of 16 bits."""
    return sum(((1 << width) - 1) << 4 * i for i in range(4) if which >> i & 1)


def _gathered(codes: list[tuple[Code, str]]) -> tuple[str, int]:
    """Up to four codes, each with an index for its registers, to nibbles 0, 1, ...: the text, and what it costs."""
    text, cost = "", 0
    for nibble, (code, index) in enumerate(codes):
        for piece in code:
            to = 4 * nibble + piece.position
            source = shifted(piece.register + index, piece.shift - to)
            part = f"({source} & {both_halves(((1 << piece.width) - 1) << to)})"
            text += f" | {part}" if text else part
            cost += 1 + (piece.shift != to)
    return text, cost


def _woven(first: tuple[str, str], low: int, high: int | None, width: int) -> tuple[str, int]:
    """Fields at bits ``low`` and ``high`` of two registers, side by side: at bits 0 and 4 the lower fields of both, and
    ``high - low`` further up the others. The text and what it costs."""
    a, b = first
    ones = (1 << width) - 1
    mask = ones | (0 if high is None else ones << (high - low))
    cost = 1 + (low != 0) + (low != 4)
    return f"select_bits({both_halves(mask)}, {shifted(a, low)}, {shifted(b, low - 4)})", cost


def _fits(low: int, high: int, width: int) -> bool:
    """Whether two fields of a register can be woven with those of another: see :func:`_woven`."""
    apart = high - low
    return 8 <= apart <= 12 - width and apart - 8 + 4 + width <= 8


@dataclass(frozen=True)
class Quad:
    """Four codes at the same place of a register's bytes. text: of an octet of tokens, whose index is ``{i}`` in it.

    codes: the (segment, half) of a half's lower and upper byte.
    """

    text: str
    width: int
    codes: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class KeySelector:
    """text: of an octet of tokens, whose index is ``{i}`` in it. codes: the (segment, half) at each nibble."""

    text: str
    width: int
    codes: tuple[tuple[int, int], ...]


def _quad(register: str, shift: int, width: int) -> str:
    """The codes at bits ``shift`` of all bytes."""
    to = DIRECT[width][0]
    return f"{shifted(register, shift - to)} & {both_halves(((1 << width) - 1 << to) * 0x101)}"


def key_quads(spec: CodeSpec, prefix: str = "k") -> tuple[Quad, ...]:
    """All that there are; of a wide bin both halves' one after another."""
    out, fields = [], {}
    for segment, pieces in enumerate(spec.segments):
        width = bits_of(pieces)
        codes = [code_of(spec, segment, half, prefix) for half in (0, 1)]
        if width not in DIRECT or len(codes[0]) > 1:
            continue
        (low,), (high,) = codes
        if low.register == high.register:
            text = _quad(low.register + "[{i}]", low.shift, width)
            out.append(Quad(text, width, ((segment, 0), (segment, 1))))
        else:
            fields[low.register, low.shift, width] = segment, high.register
    for (register, shift, width), (segment, upper) in fields.items():
        partner = fields.get((register, shift + 8, width))
        if shift + width <= 8 and partner:
            for half, name in ((0, register), (1, upper)):
                out.append(Quad(_quad(name + "[{i}]", shift, width), width, ((segment, half), (partner[0], half))))
    return tuple(out)


def key_selectors(spec: CodeSpec, prefix: str = "k") -> tuple[KeySelector, ...]:
    """For all segments of up to MAX_BITS bits that are in no quad, two a selector, by the pairs that cost least."""
    direct = {segment for quad in key_quads(spec, prefix) for segment, _ in quad.codes}
    by_width: dict[int, list[int]] = {}
    for segment, pieces in enumerate(spec.segments):
        if bits_of(pieces) <= MAX_BITS and segment not in direct:
            by_width.setdefault(bits_of(pieces), []).append(segment)
    out = []
    for width, segments in sorted(by_width.items()):
        offers = sorted(
            (_key_pair(spec, a, b, width, prefix) for a in segments for b in segments if a != b),
            key=lambda offer: offer[0],
        )
        left = set(segments)
        for _, selector in offers:
            pair = {segment for segment, _ in selector.codes}
            if pair <= left:
                left -= pair
                out.append(selector)
        for segment in left:
            codes = [(segment, 0), (segment, 1)]
            text, _ = _gathered([(code_of(spec, *code, prefix), "[{i}]") for code in codes])
            out.append(KeySelector(text, width, tuple(codes)))
    return tuple(out)


def _key_pair(spec: CodeSpec, a: int, b: int, width: int, prefix: str) -> tuple[int, KeySelector]:
    """What a selector of two segments costs, and the selector."""
    whole, low, high = _nibbles(width), _nibbles(width, 0b0101), _nibbles(width, 0b1010)
    first, second = ([code_of(spec, segment, half, prefix) for half in (0, 1)] for segment in (a, b))
    if max(map(len, (*first, *second))) == 1:
        (pa,), (pb,) = first[0], second[0]
        narrow = [first[1][0].register == pa.register, second[1][0].register == pb.register]
        if all(narrow):
            text = f"({shifted(pa.register + '[{i}]', pa.shift)} & {both_halves(low)})"
            text += f" | ({shifted(pb.register + '[{i}]', pb.shift - 4)} & {both_halves(high)})"
            cost = 2 + (pa.shift != 0) + (pb.shift != 4)
            return cost, KeySelector(text, width, ((a, 0), (b, 0), (a, 1), (b, 1)))
        if not any(narrow) and pa.register == pb.register and _fits(pa.shift, pb.shift, width):
            registers = pa.register + "[{i}]", first[1][0].register + "[{i}]"
            text, cost = _woven(registers, pa.shift, pb.shift, width)
            by = pb.shift - pa.shift - 8
            if by:
                text = f"spread_upper<{by}>({text}, {both_halves(whole & 0xFF)}, {both_halves(whole & 0xFF00)})"
            elif width < 4:
                text = f"({text} & {both_halves(whole)})"
            cost += 3 if by else int(width < 4)
            return cost, KeySelector(text, width, ((a, 0), (a, 1), (b, 0), (b, 1)))
    codes = [(a, 0), (b, 0), (a, 1), (b, 1)]
    text, cost = _gathered([(code_of(spec, *code, prefix), "[{i}]") for code in codes])
    return cost, KeySelector(text, width, tuple(codes))


@dataclass(frozen=True)
class ValueSelector:
    """Of a segment: statements that its selectors need, and the texts of both, for columns 0 to 7 and 8 to 15.

    Statements stand where they are needed first: selectors are used in the order that :func:`value_selectors` gives.
    """

    segment: int
    width: int
    statements: tuple[str, ...]
    selectors: tuple[str, str]


@dataclass(frozen=True)
class ValueQuads:
    """Of a segment whose codes are operands as they are: the texts of four registers.

    For columns 0 to 7 and 8 to 15 of the first two octets of tokens, then of the others. Within a register tokens have
    the order of a transposed weight's bytes.
    """

    segment: int
    width: int
    texts: tuple[str, str, str, str]


def value_quads(spec: CodeSpec, prefix: str = "v") -> tuple[ValueQuads, ...]:
    """All that there are. Bytes of two octets come together by permutations that segments share."""
    out = []
    for segment, pieces in enumerate(spec.segments):
        width = bits_of(pieces)
        codes = [code_of(spec, segment, half, prefix) for half in (0, 1)]
        if width not in DIRECT or len(codes[0]) > 1 or any(code[0].shift % 8 + width > 8 for code in codes):
            continue
        texts = []
        for j in (0, 2):
            for (piece,) in codes:
                pair = f"{piece.register}[{j}], {piece.register}[{j + 1}]"
                selector = "0x7351" if piece.shift >= 8 else "0x6240"
                texts.append(_quad(f"prmt({pair}, {selector})", piece.shift % 8, width))
        out.append(ValueQuads(segment, width, (texts[0], texts[1], texts[2], texts[3])))
    return tuple(out)


def value_selectors(spec: CodeSpec, prefix: str = "v") -> tuple[ValueSelector, ...]:
    """Selectors of four octets of tokens, one at each nibble, for every segment without quads.

    Those that share statements stand together.
    """
    direct = {quads.segment for quads in value_quads(spec, prefix)}
    texts: dict[tuple[int, int], str] = {}
    statements: dict[int, list[str]] = {}
    place = list(range(len(spec.segments)))
    fields: dict[str, list[tuple[int, int, int]]] = {}  # by register: (shift, segment, half)
    for segment in range(len(spec.segments)):
        if segment in direct:
            continue
        for half in (0, 1):
            code = code_of(spec, segment, half, prefix)
            if len(code) > 1:
                texts[segment, half] = _gathered([(code, f"[{j}]") for j in range(4)])[0]
            else:
                fields.setdefault(code[0].register, []).append((code[0].shift, segment, half))
    for register, found in fields.items():
        left = sorted(found)
        while left:
            low, segment, half = left.pop(0)
            width = bits_of(spec.segments[segment])
            fitting = [f for f in left if bits_of(spec.segments[f[1]]) == width and _fits(low, f[0], width)]
            # Of one segment first, which is a narrow bin's; of others what needs no shift.
            fitting.sort(key=lambda f: (f[1] != segment, f[0] - low))
            other = fitting[0] if fitting else None
            if other:
                left.remove(other)
            names = [f"{register}_{low}_{j}" for j in (0, 2)]
            where = min(segment, other[1]) if other else segment
            if other:
                place[max(segment, other[1])] = min(place[max(segment, other[1])], where)
            for name, j in zip(names, (0, 2), strict=True):
                pair = f"{register}[{j}]", f"{register}[{j + 1}]"
                text = _woven(pair, low, other[0] if other else None, width)[0]
                statements.setdefault(where, []).append(f"const u32 {name} = {text};")
            texts[segment, half] = _merged(names, "0x6240", 0, width)
            if other:
                texts[other[1], other[2]] = _merged(names, "0x7351", other[0] - low - 8, width)
    return tuple(
        ValueSelector(s, bits_of(pieces), tuple(statements.get(s, ())), (texts[s, 0], texts[s, 1]))
        for s, pieces in sorted(enumerate(spec.segments), key=lambda item: (place[item[0]], item[0]))
        if s not in direct
    )


def _merged(names: list[str], selector: str, right: int, width: int) -> str:
    text = shifted(f"prmt({names[0]}, {names[1]}, {selector})", right)
    return f"({text} & {both_halves(_nibbles(width))})" if width < 4 else text
