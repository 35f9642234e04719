// How many cycles an instruction takes of a scheduler: what bounds decode's loop (docs/kernels.md).
//
//   nvcc -gencode=arch=compute_90a,code=sm_90a -o pipes benchmarks/kernels/pipes.cu && ./pipes
//
// Eight independent chains in each warp, 1 to 4 warps a scheduler. Look at the machine code, too (cuobjdump -sass): beside
// no tensor products the compiler takes a second pipe for half of the paired operations (HFMA2.MMA), so that they come out
// twice as fast as they are in a loop that has products. An addition of a constant stays on the first pipe.
#include <cstdio>
#include <cuda_runtime.h>

constexpr int TURNS = 256, CHAINS = 8, REPEATS = 8;

#define CHAIN(NAME, FIRST, SECOND)                                                                                   \
    __global__ void NAME(unsigned *out, long long *took, unsigned c, unsigned d) {                                   \
        unsigned x[CHAINS];                                                                                          \
        for (int i = 0; i < CHAINS; i++) x[i] = threadIdx.x + i * 77 + c;                                            \
        __syncthreads();                                                                                             \
        long long begin = clock64();                                                                                 \
        for (int turn = 0; turn < TURNS; turn++)                                                                     \
            _Pragma("unroll") for (int r = 0; r < REPEATS; r++)                                                      \
                _Pragma("unroll") for (int i = 0; i < CHAINS; i += 2) {                                              \
                    asm volatile(FIRST : "+r"(x[i]) : "r"(c), "r"(d));                                               \
                    asm volatile(SECOND : "+r"(x[i + 1]) : "r"(c), "r"(d));                                          \
                }                                                                                                    \
        long long end = clock64();                                                                                   \
        unsigned sum = 0;                                                                                            \
        for (int i = 0; i < CHAINS; i++) sum ^= x[i];                                                                \
        out[blockIdx.x * blockDim.x + threadIdx.x] = sum;                                                            \
        if (threadIdx.x == 0) took[blockIdx.x] = end - begin;                                                        \
    }

#define FMA "fma.rn.f16x2 %0, %0, %1, %2;"
#define ADD "add.rn.f16x2 %0, %0, %1;"
#define SUB_CONSTANT "{ .reg .b32 k; mov.b32 k, 0xc4e0c4e0; sub.rn.f16x2 %0, %0, k; }"
#define MUL "mul.rn.f16x2 %0, %0, %1;"
#define LOGIC "lop3.b32 %0, %0, %1, %2, 0x6A;"
#define SHIFT "shf.r.wrap.b32 %0, %0, %1, 5;"
#define PERMUTE "prmt.b32 %0, %0, %1, %2;"
#define INTEGER "mad.lo.u32 %0, %0, %1, %2;"
#define FLOAT(OP) "{ .reg .f32 f, g, h; mov.b32 f, %0; mov.b32 g, %1; mov.b32 h, %2; " OP " mov.b32 %0, f; }"
#define FLOAT_FMA FLOAT("fma.rn.f32 f, f, g, h;")
#define FLOAT_MAX FLOAT("max.f32 f, f, g;")

CHAIN(fma2, FMA, FMA)
CHAIN(add2, ADD, ADD)
CHAIN(sub2_constant, SUB_CONSTANT, SUB_CONSTANT)
CHAIN(mul2, MUL, MUL)
CHAIN(logic, LOGIC, LOGIC)
CHAIN(shift, SHIFT, SHIFT)
CHAIN(permute, PERMUTE, PERMUTE)
CHAIN(integer, INTEGER, INTEGER)
CHAIN(float_fma, FLOAT_FMA, FLOAT_FMA)
CHAIN(float_max, FLOAT_MAX, FLOAT_MAX)
CHAIN(fma2_logic, FMA, LOGIC)
CHAIN(sub2_constant_logic, SUB_CONSTANT, LOGIC)
CHAIN(logic_float_fma, LOGIC, FLOAT_FMA)
CHAIN(logic_permute, LOGIC, PERMUTE)

__global__ void product(unsigned *out, long long *took, unsigned c, unsigned d) {
    float a[CHAINS][4];
    for (int i = 0; i < CHAINS; i++)
        for (int j = 0; j < 4; j++) a[i][j] = threadIdx.x;
    __syncthreads();
    long long begin = clock64();
    for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
        for (int i = 0; i < CHAINS; i++)
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                         "{%0, %1, %2, %3}, {%4, %5, %4, %5}, {%4, %5}, {%0, %1, %2, %3};"
                         : "+f"(a[i][0]), "+f"(a[i][1]), "+f"(a[i][2]), "+f"(a[i][3])
                         : "r"(c), "r"(d));
    long long end = clock64();
    float sum = 0;
    for (int i = 0; i < CHAINS; i++) sum += a[i][0];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    if (threadIdx.x == 0) took[blockIdx.x] = end - begin;
}

struct Case {
    const char *name;
    void (*kernel)(unsigned *, long long *, unsigned, unsigned);
    int count;
};

int main() {
    constexpr int all = TURNS * REPEATS * CHAINS;
    const Case cases[] = {
        {"fma.f16x2", fma2, all}, {"add.f16x2", add2, all}, {"sub.f16x2, constant", sub2_constant, all},
        {"mul.f16x2", mul2, all}, {"lop3", logic, all}, {"shf", shift, all}, {"prmt", permute, all},
        {"mad.u32", integer, all}, {"fma.f32", float_fma, all}, {"max.f32", float_max, all},
        {"fma.f16x2, lop3 in turn", fma2_logic, all}, {"sub.f16x2, lop3 in turn", sub2_constant_logic, all},
        {"lop3, fma.f32 in turn", logic_float_fma, all}, {"lop3, prmt in turn", logic_permute, all},
        {"mma.m16n8k16", product, TURNS * CHAINS},
    };
    unsigned *out;
    long long *took, cycles;
    cudaMalloc(&out, 1 << 22);
    cudaMalloc(&took, 1 << 16);
    for (int warps = 1; warps <= 4; warps *= 2)
        for (const Case &c : cases) {
            for (int run = 0; run < 2; run++) c.kernel<<<132, 128 * warps>>>(out, took, 0x3C013C01u, 0x00010001u);
            if (cudaError_t error = cudaDeviceSynchronize()) {
                fprintf(stderr, "%s: %s\n", c.name, cudaGetErrorString(error));
                return 1;
            }
            cudaMemcpy(&cycles, took + 5, sizeof cycles, cudaMemcpyDeviceToHost);
            printf("%d warps a scheduler, %-24s %.2f cycles\n", warps, c.name, (double)cycles / c.count / warps);
        }
}
