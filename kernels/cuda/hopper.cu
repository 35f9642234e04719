// The primitives of decode.cu for sm_90, in PTX. One warp is one block. Put in front of the text that uses them;
// nothing is included, so NVRTC needs no headers. tests/kernels/cuda_on_cpu/ has the same names for a CPU.
//
// volatile and "memory" keep what NVVM sees in order: copies, waits and ldmatrix among loads and stores, and exchanges
// between lanes out of branches. Arithmetic has neither and may move.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif
#define DEVICE __device__ __forceinline__
#define MEMBER __device__ __forceinline__  // of a class, and of a template that is specialised
#define KERNEL extern "C" __global__ void __launch_bounds__(32, MIN_BLOCKS)

extern __shared__ __align__(128) char dynamic_shared_memory[];

// Where it runs.

DEVICE u32 lane() { return threadIdx.x; }
DEVICE u32 block_x() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 grid_x() { return gridDim.x; }
DEVICE u32 grid_y() { return gridDim.y; }
DEVICE char* shared_memory() { return dynamic_shared_memory; }

// The 32-bit address of what lies in shared memory.
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Bits.

// Not __byte_perm, which ignores bit 3 of the selector's nibbles, by which a byte's sign is replicated.
DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Its upper 16 bits, and anything above. A sum of float16 in place of a shift: another pipe than that of integers. Bits
// that are infinite or no number as float16 are not for it.
DEVICE u32 upper_half(u32 x) {
  u32 d;
  asm("{ .reg .b16 l, h; .reg .b32 t; mov.b32 {l, h}, %1; mov.b32 t, {h, h}; add.rn.f16x2 %0, t, %2; }"
      : "=r"(d)
      : "r"(x), "r"(0x80008000u));
  return d;
}

// (a & mask) | (b & ~mask), one instruction with a constant mask, too.
DEVICE u32 select_bits(u32 mask, u32 a, u32 b) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

// x, which no compiler knows to be a constant, so that it stays in a register: blocks have one row.
DEVICE u32 opaque(u32 x) { return x ^ (blockDim.y - 1); }

DEVICE int bits_set(u32 x) { return __popc(x); }

// a b + c, one instruction.
DEVICE u64 mad_wide(u32 a, u32 b, u64 c) {
  u64 d;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(d) : "r"(a), "r"(b), "l"(c));
  return d;
}

DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller(float a, float b) { return fminf(a, b); }
DEVICE int larger(int a, int b) { return a > b ? a : b; }
DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Products of tiles: c += a b.

DEVICE void imma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE void hmma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Each lane passes the shared address of its row of 16 bytes.

DEVICE void ldmatrix4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

DEVICE void ldmatrix4_trans(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

DEVICE u32 movmatrix(u32 x) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
  return d;
}

// Copies from global to shared memory while the warp goes on. Both addresses are multiples of BYTES.

template <int BYTES>
DEVICE void copy_async(u32 shared, const void* global) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(BYTES) : "memory");
}

DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N groups are on their way. Only this lane's copies: syncwarp() before another lane's are read.
template <int N>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Between lanes. All 32 take part.

#define SHUFFLE(NAME, MODE, CLAMP, TYPE, REGISTER)                               \
  DEVICE TYPE NAME(TYPE x, u32 by) {                                             \
    TYPE d;                                                                      \
    asm volatile("shfl.sync." MODE ".b32 %0, %1, %2, " CLAMP ", 0xffffffff;"     \
                 : "=" REGISTER(d)                                               \
                 : REGISTER(x), "r"(by));                                        \
    return d;                                                                    \
  }
#define SHUFFLES(NAME, MODE, CLAMP)        \
  SHUFFLE(NAME, MODE, CLAMP, u32, "r")     \
  SHUFFLE(NAME, MODE, CLAMP, int, "r")     \
  SHUFFLE(NAME, MODE, CLAMP, float, "f")
SHUFFLES(shfl, "idx", "0x1f")
SHUFFLES(shfl_xor, "bfly", "0x1f")
SHUFFLES(shfl_up, "up", "0x0")  // lanes below by keep theirs
#undef SHUFFLES
#undef SHUFFLE

DEVICE int sum_of_all(int x) {
  int d;
  asm volatile("redux.sync.add.s32 %0, %1, 0xffffffff;" : "=r"(d) : "r"(x));
  return d;
}

DEVICE int largest_of_all(int x) {
  int d;
  asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(d) : "r"(x));
  return d;
}

DEVICE u32 ballot(bool p) {
  u32 d;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff; }"
               : "=r"(d)
               : "r"((u32)p));
  return d;
}

DEVICE bool any(bool p) {
  u32 d;
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
      : "=r"(d)
      : "r"((u32)p));
  return d != 0;
}

DEVICE void syncwarp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// Numbers.

DEVICE float exp2f_(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

DEVICE float log2f_(float x) {
  float d;
  asm("lg2.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

DEVICE float rcp(float x) {
  float d;
  asm("rcp.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

DEVICE u32 pack_f16x2(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Of the low 16 bits.
DEVICE float f16(u32 bits) {
  float d;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(d) : "r"(bits));
  return d;
}

// .rn: a product and a sum are not made one operation.

DEVICE u32 sub_f16x2(u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

DEVICE u32 mul_f16x2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Beside the kernels ahead and behind (programmatic dependent launch).

DEVICE void prefetch_l1(const void* global) { asm volatile("prefetch.global.L1 [%0];" ::"l"(global) : "memory"); }
DEVICE void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory"); }

// Until the kernel ahead is complete and its writes are seen. Loads through const __restrict__ are moved before it:
// what that kernel writes is read through other pointers.
DEVICE void wait_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// From now on the next kernel may start.
DEVICE void release_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
