// What a lane computes on its own.
#pragma once

namespace emulator {

inline float widen(u32 bits) {
    _Float16 x;
    uint16_t low = uint16_t(bits);
    memcpy(&x, &low, 2);
    return float(x);
}

// Rounded once, to nearest even. A GPU has one NaN.
template <class Wide>
inline u32 narrow(Wide x) {
    if (x != x) return 0x7FFF;
    _Float16 half = static_cast<_Float16>(x);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

// float32 has more than twice the bits of float16, so a sum or a product that is rounded to it first comes out the
// same. With a product and a summand float64 is exact wherever float16 does not overflow.
template <class Function>
inline u32 for_both(Function function) {
    return narrow(function(0)) | narrow(function(16)) << 16;
}

}  // namespace emulator

DEVICE u32 opaque(u32 x) { return x; }
DEVICE int bits_set(u32 x) { return __builtin_popcount(x); }
DEVICE u64 mad_wide(u32 a, u32 b, u64 c) { return u64(a) * b + c; }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller(float a, float b) { return fminf(a, b); }
DEVICE int larger(int a, int b) { return a > b ? a : b; }
DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// PTX prmt.b32 without a mode: a nibble of the selector names a byte of b:a, or with its bit 3 that byte's sign.
DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
    u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        u32 nibble = selector >> 4 * i & 15, byte = u32(bytes >> 8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

DEVICE u32 upper_half(u32 x) {
    if ((x >> 26 & 31) == 31) emulator::fault("upper_half of %08x, which is no number of float16", x);
    return (x >> 16) * 0x10001u;
}

DEVICE u32 select_bits(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }

DEVICE float exp2f_(float x) {  // ex2.approx.ftz
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
DEVICE float log2f_(float x) { return log2f(x); }
DEVICE float rcp(float x) { return 1.0f / x; }

DEVICE float f16(u32 bits) { return emulator::widen(bits); }
DEVICE u32 pack_f16x2(float low, float high) { return emulator::narrow(low) | emulator::narrow(high) << 16; }

DEVICE u32 sub_f16x2(u32 a, u32 b) {
    return emulator::for_both([=](int shift) { return f16(a >> shift) - f16(b >> shift); });
}
DEVICE u32 mul_f16x2(u32 a, u32 b) {
    return emulator::for_both([=](int shift) { return f16(a >> shift) * f16(b >> shift); });
}
DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    return emulator::for_both(
        [=](int shift) { return double(f16(a >> shift)) * double(f16(b >> shift)) + double(f16(c >> shift)); });
}
