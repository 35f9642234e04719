"""One segment of codes in columns, dequantized to float16 levels in registers.

A word holds codes of many segments for two neighbouring elements of a tile at a time (32 bits). The
field is put under the exponent of a float16 by one logic operation, so that it *is* a number, ``2^e +
code * 2^s``; a subtraction centres it and the codebook's polynomial follows, all two at a time. This
needs inline assembly, since the compiler does not pair 16-bit operations by itself.

A product takes the polynomial without its leading coefficient, which leaves a sum like any slope does: then the rest
is one fused operation for each further coefficient and a last product (:func:`depressed`).
"""

from __future__ import annotations

import triton
import triton.language as tl

_MANTISSA = tl.constexpr(10)
_BIAS = tl.constexpr(15)


@triton.constexpr_function
def float16_pair(x):
    """Twice the bits of ``x`` as a float16, rounded to nearest."""
    sign = 0x8000 if x < 0 else 0
    x = abs(x)
    if x == 0:
        return 0
    e = 15
    while x >= 2:
        x /= 2
        e += 1
    while x < 1:
        x *= 2
        e -= 1
    return (sign | ((e << 10) + int((x - 1) * 1024 + 0.5))) * 0x10001


#: Right shifts that fields are looked for under, the same for all fields of a word, so that few shifts are made.
_SHIFTS = tl.constexpr((0, 6, -1, 5, 7))


@triton.constexpr_function
def place_of(pieces, repeated):
    """Bit at which the code is put under the exponent: 1 to 10 - bits, so that its half steps are numbers, too."""
    shift, width = pieces[1], pieces[2]
    if len(pieces) > 4:
        return 1
    # In a repeated bin every word is rotated by its column's bits less one or five; else shifted as little as will do.
    choices = (-1, -5, 0, 1, 2, 3, 4, 5, 6, 7) if repeated else _SHIFTS.value
    places = [shift - by for by in choices if 1 <= shift - by and shift - by + width <= 10]
    # A linear codebook leaves 2^(11 - place - bits) in each number: the less, the better for sums.
    return max(places[:2]) if width <= 2 else places[0]


@triton.constexpr_function
def offset_of(pieces, repeated):
    """What is left to subtract from numbers of a segment of 1 or 2 bits: they are not centred, see segment_levels."""
    bits = sum(pieces[2::4])
    return 2.0 ** (11 - place_of(pieces, repeated) - bits) + (2**bits - 1) / 2**bits


@triton.constexpr_function
def depressed(poly):
    """``(h, rest, slope)`` with ``sum(poly[i] y^(2i + 1)) = slope * y * q(y^2 + h)``, for up to four coefficients.

    q is the identity, or ``s^2 + rest[0]``, or ``(s^2 + rest[0]) s + rest[1]``: moving the argument by h takes the
    second highest power out of a polynomial, and with it one operation.
    """
    slope = poly[len(poly) - 1]
    c = [p / slope for p in poly]
    if len(c) == 1:
        return 0.0, (), slope
    if len(c) == 2:
        return c[0], (), slope
    if len(c) == 3:
        h = c[1] / 2
        return h, (c[0] - h * h,), slope
    h = c[2] / 3
    return h, (c[1] - 3 * h * h, c[0] - c[1] * h + 2 * h * h * h), slope


@triton.constexpr_function
def _polynomial(poly):
    """Instructions that take the centred ``t`` to its level."""
    h, rest, slope = depressed(poly)
    text = ""
    if len(poly) > 1:
        text += f"mov.b32 c, {float16_pair(h):#x}; fma.rn.f16x2 s, t, t, c; mov.b32 y, s; "
        for i in range(len(rest)):
            text += f"mov.b32 c, {float16_pair(rest[i]):#x}; fma.rn.f16x2 y, y, s, c; "
        text += "mul.rn.f16x2 t, y, t; "
    if slope != 1:
        text += f"mov.b32 c, {float16_pair(slope):#x}; mul.rn.f16x2 t, t, c; "
    return text


@triton.constexpr_function
def _assembly(pieces, repeated, poly):
    """Text and constraints. Inputs: a word for each piece, then the shift of each piece in a repeated bin."""
    count = len(pieces) // 4
    bits = sum(pieces[2::4])
    at = place_of(pieces, repeated[0])
    text, taken = "", 1 + count
    constraints = "=r" + ",r" * count
    spread = bits - 1  # y = (code - middle) / 2^(bits - 1)
    top = (15 + 10 - at - spread) << 10
    for i in range(count):
        shift, width, position = pieces[4 * i + 1], pieces[4 * i + 2], pieces[4 * i + 3]
        source = f"${i + 1}"
        if repeated[i]:
            text += f"shf.r.wrap.b32 w, {source}, {source}, ${taken}; "
            source = "w"
            taken += 2  # a 32-bit operand comes once for each of the two elements
            constraints += ",r,r"
        elif shift > at + position:
            text += f"shr.u32 w, {source}, {shift - at - position}; "
            source = "w"
        elif shift < at + position:
            text += f"shl.b32 w, {source}, {at + position - shift}; "
            source = "w"
        mask = (((1 << width) - 1) << (at + position)) * 0x10001
        other = f"{top * 0x10001:#x}" if i == 0 else "t"
        target = "$0" if len(poly) == 0 and i == count - 1 else "t"
        text += f"lop3.b32 {target}, {source}, {mask:#x}, {other}, 0xEA; "  # (source & mask) | other
    if len(poly) == 0:
        return "{ .reg .b32 w, t; " + text + "}", constraints
    middle = (top | (((1 << bits) - 1) << (at - 1))) * 0x10001
    text += f"mov.b32 c, {middle:#x}; sub.rn.f16x2 t, t, c; " + _polynomial(poly)
    return "{ .reg .b32 w, t, s, c, y; " + text + "mov.b32 $0, t; }", constraints


@triton.constexpr_function
def assembly(pieces, repeated, poly):
    return _assembly(pieces, repeated, poly)[0]


@triton.constexpr_function
def constraints(pieces, repeated, poly):
    return _assembly(pieces, repeated, poly)[1]


@triton.constexpr_function
def _bits(pieces):
    return sum(pieces[2::4])


@triton.constexpr_function
def _repeated(pieces, repeat):
    return [repeat[b] > 1 for b in pieces[::4]]


@triton.jit
def segment_levels(
    words,
    column_shifts,
    AXIS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    REPEAT: tl.constexpr,
    POLYS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Levels of one segment, the shape of a tile of words; with an empty polynomial, numbers ``y + offset``.

    POLYS of a leading coefficient of 1 leave the codebook's slope out, and an empty one the offset in
    (:func:`offset_of`): both leave a sum of products as they are linear in it, once for all its terms.

    words: a tile of 16-bit words for each bin, 16 columns along AXIS, repeated where a bin is narrow.
    column_shifts: ``[16]`` int32 for each bin, what precedes a column's bits in its word.
    SEGMENTS: per segment (bin, shift, width, position) of each piece, after one another. POLYS: its polynomial.
    REPEAT: columns per word of each bin.
    ASM: float16 by paired instructions; else the same in float32 and plain arithmetic, for the interpreter.
    """
    PIECES: tl.constexpr = SEGMENTS[SEGMENT]
    POLY: tl.constexpr = POLYS[SEGMENT]
    first = words[PIECES[0]]
    repeated: tl.constexpr = _repeated(PIECES, REPEAT)
    if ASM:
        text: tl.constexpr = assembly(PIECES, repeated, POLY)
        registers: tl.constexpr = constraints(PIECES, repeated, POLY)
        at: tl.constexpr = place_of(PIECES, repeated[0])
        args = ()
        for i in tl.static_range(len(PIECES) // 4):
            args += (words[PIECES[4 * i]],)
        for i in tl.static_range(len(PIECES) // 4):
            if repeated[i]:
                shift = column_shifts[PIECES[4 * i]] + (PIECES[4 * i + 1] - PIECES[4 * i + 3] - at)
                args += (tl.broadcast_to(tl.expand_dims(shift, 1 - AXIS), first.shape),)
        return tl.inline_asm_elementwise(text, registers, args, dtype=tl.float16, is_pure=True, pack=2)
    else:
        code = tl.zeros(first.shape, tl.int32)
        for i in tl.static_range(len(PIECES) // 4):
            word = words[PIECES[4 * i]].to(tl.int32) & 0xFFFF
            if repeated[i]:
                word = word >> tl.expand_dims(column_shifts[PIECES[4 * i]], 1 - AXIS)
            code += ((word >> PIECES[4 * i + 1]) & ((1 << PIECES[4 * i + 2]) - 1)) << PIECES[4 * i + 3]
        bits: tl.constexpr = _bits(PIECES)
        y = (code.to(tl.float32) - ((1 << bits) - 1) / 2) / (1 << (bits - 1))
        if len(POLY) == 0:
            return y + offset_of(PIECES, repeated[0])
        else:
            x = tl.full(first.shape, POLY[len(POLY) - 1], tl.float32)
            for i in tl.static_range(len(POLY) - 2, -1, -1):
                x = x * (y * y) + POLY[i]
            return x * y


@triton.jit
def segment_offset(SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, REPEAT: tl.constexpr, POLYS: tl.constexpr):
    """What :func:`segment_levels` leaves in the numbers of a segment."""
    PIECES: tl.constexpr = SEGMENTS[SEGMENT]
    repeated: tl.constexpr = _repeated(PIECES, REPEAT)
    offset: tl.constexpr = 0.0 if len(POLYS[SEGMENT]) > 0 else offset_of(PIECES, repeated[0])
    return offset
