// Collectives on small matrices. In all of their fragments lane 4 r + q holds something of row r and of the q-th
// group of columns; PTX's chapters on mma and ldmatrix have the figures.
#pragma once

// The compiler's vectors, and none of the checks, where most of the time goes.
#define SWIFT __attribute__((optimize("O3"), no_sanitize("undefined"), noinline))

namespace emulator {

SWIFT static void imma_of_all() {
    int a[16][8], b[8][8];  // words of 4 bytes: a by rows, b by columns
    for (int i = 0; i < LANES; i++) {
        const u32* in = warp.lanes[i].in;
        int r = i / 4, q = i % 4;
        a[r][q] = in[0], a[r + 8][q] = in[1], a[r][q + 4] = in[2], a[r + 8][q + 4] = in[3];
        b[r][q] = in[4], b[r][q + 4] = in[5];
    }
    int16_t wide_a[16][32], wide_b[8][32];
    const int8_t *bytes_a = reinterpret_cast<int8_t*>(a), *bytes_b = reinterpret_cast<int8_t*>(b);
    for (int i = 0; i < 16 * 32; i++) wide_a[0][i] = bytes_a[i];
    for (int i = 0; i < 8 * 32; i++) wide_b[0][i] = bytes_b[i];
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            int sum = 0;
            for (int k = 0; k < 32; k++) sum += wide_a[row][k] * wide_b[column][k];
            warp.lanes[row % 8 * 4 + column / 2].out[row / 8 * 2 + column % 2] = sum;
        }
}

// float32 sums from the smallest k on. A GPU's order is its own.
SWIFT static void hmma_of_all() {
    float a[16][16], b[16][8], c[16][8];
    for (int i = 0; i < LANES; i++) {
        const u32* in = warp.lanes[i].in;
        int r = i / 4, q = i % 4 * 2;
        for (int high = 0; high < 2; high++) {
            int s = 16 * high;
            a[r][q + high] = widen(in[0] >> s), a[r + 8][q + high] = widen(in[1] >> s);
            a[r][q + 8 + high] = widen(in[2] >> s), a[r + 8][q + 8 + high] = widen(in[3] >> s);
            b[q + high][r] = widen(in[4] >> s), b[q + 8 + high][r] = widen(in[5] >> s);
            memcpy(&c[r][q + high], &in[6 + high], 4), memcpy(&c[r + 8][q + high], &in[8 + high], 4);
        }
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++)
            memcpy(&warp.lanes[row % 8 * 4 + column / 2].out[row / 8 * 2 + column % 2], &c[row][column], 4);
}

// What a lane holds of an 8 x 8 matrix of 16 bits: two of row r, or, of the transposed one, of column r.
inline u32 fragment(const uint16_t (&matrix)[8][8], int lane, bool transposed) {
    int r = lane / 4, q = lane % 4 * 2;
    return transposed ? matrix[q][r] | u32(matrix[q + 1][r]) << 16 : matrix[r][q] | u32(matrix[r][q + 1]) << 16;
}

char* in_shared(u32 address, u32 bytes, u32 alignment, const char* kind);

inline void load_matrices(const char* kind, u32 (&r)[4], u32 address, bool transposed, int line) {
    Lane& me = self(line);
    const char* row = in_shared(address, 16, 16, kind);
    memcpy(&me.in, &row, sizeof row);
    if (last_to_arrive(kind, line))
        for (int m = 0; m < 4; m++) {
            uint16_t matrix[8][8];
            for (int i = 0; i < 8; i++) {
                memcpy(&row, &warp.lanes[8 * m + i].in, sizeof row);
                memcpy(matrix[i], row, 16);
            }
            for (int i = 0; i < LANES; i++) warp.lanes[i].out[m] = fragment(matrix, i, transposed);
        }
    memcpy(r, me.out, sizeof r);
}

}  // namespace emulator

// mma.sync.m16n8k32.row.col.s32.s8.s8.s32
DEVICE void imma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, LINE) {
    emulator::Lane& me = emulator::self(line);
    u32 in[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(me.in, in, sizeof in);
    if (emulator::last_to_arrive("imma", line)) emulator::imma_of_all();
    for (int i = 0; i < 4; i++) c[i] = int(u32(c[i]) + me.out[i]);
}

// mma.sync.m16n8k16.row.col.f32.f16.f16.f32
DEVICE void hmma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, LINE) {
    emulator::Lane& me = emulator::self(line);
    u32 in[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(me.in, in, sizeof in);
    memcpy(me.in + 6, c, sizeof c);
    if (emulator::last_to_arrive("hmma", line)) emulator::hmma_of_all();
    memcpy(c, me.out, sizeof c);
}

DEVICE void ldmatrix4(u32 (&r)[4], u32 address, LINE) {
    emulator::load_matrices("ldmatrix4", r, address, false, line);
}
DEVICE void ldmatrix4_trans(u32 (&r)[4], u32 address, LINE) {
    emulator::load_matrices("ldmatrix4_trans", r, address, true, line);
}

DEVICE u32 movmatrix(u32 x, LINE) {
    emulator::Lane& me = emulator::self(line);
    me.in[0] = x;
    if (emulator::last_to_arrive("movmatrix", line)) {
        uint16_t matrix[8][8];
        for (int i = 0; i < emulator::LANES; i++) memcpy(&matrix[i / 4][i % 4 * 2], emulator::warp.lanes[i].in, 4);
        for (int i = 0; i < emulator::LANES; i++) emulator::warp.lanes[i].out[0] = emulator::fragment(matrix, i, true);
    }
    return me.out[0];
}

#undef SWIFT
