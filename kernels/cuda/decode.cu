// Decode attention over rows in columns on integer tensor cores. Definition: reference.py, decode_attention.
//
// One warp is one program: a split of a request's tokens, for one KV head and 4 or 8 query rows. Lanes are numbered as
// tensor cores have them: lane = 4 g + t. A part is 32 tokens, four octets: a lane has the logits of token g of each
// octet, for query rows t and t + 4. A tile is a part or two, which have one sum.
//
// Queries and weights have 16 bits, as two signed bytes: 256 high + low. A product of eight columns has both of four
// rows, one beside the other, so that a lane finds both parts of its sum.
//
// Weights are probabilities times the scales of values. Each tile's are whole numbers up to 2^15 of a unit of its own,
// by its greatest one, so that the tail of a long softmax has as many bits as its peak. A tile's sums are integers, and
// are added to float32 in units of the greatest tile so far.

typedef unsigned short u16;

#define LN2 0.6931471805599453f
#define LOG2E 1.4426950408889634f
#define SPAN (WINDOW > 0 ? WINDOW + QUERIES - 1 : 0)
#define PROGRAM_ROWS (4 * ROW_TILES)
#define QUERY_ROWS (QUERIES * GROUP)
#define PART 32
#define TILE (PART * PARTS)
#define OCTETS (4 * PARTS)
#define BLOCK_SLOTS 16
#define BITS 14.9f         // of a tile's greatest weight
#define SPLIT_UNIT 32      // as in decode/splits.py, the next two, too
#define SPLIT_TRIES 6
#define SPLIT_ALIGN 64

struct alignas(8) Pair { float x, y; };

struct Lane {
  u32 lane, g, t;
};

struct From {  // addresses of a part's codes, of the head's first byte for tokens of bins by their bytes
  u64 block;    // of the lane's token, its block
  u32 within;   // its number in the block
  u64 wide[2];  // of a wide bin, the half that the lane copies of tokens lane / 2 and 16 + lane / 2
};

union Word {
  float number;
  u32 bits;
};

DEVICE u32 bits_of(float x) { Word w; w.number = x; return w.bits; }
DEVICE float float_of(u32 x) { Word w; w.bits = x; return w.number; }
DEVICE float dot2(Pair a, Pair b) { return a.x * b.x + a.y * b.y; }

// a / b of numbers from 0 to 2^30, b not 0: what a reciprocal leaves is divided again, and then one is right.
DEVICE int divided(int a, int b) {
  const float inverse = rcp((float)b);
  int quotient = (int)((float)a * inverse);
  quotient += (int)((float)(a - quotient * b) * inverse);
  const int rest = a - quotient * b;
  return quotient + (rest >= b) - (rest < 0);
}

DEVICE int ceil_div(int a, int b) { return divided(a + b - 1, b); }

DEVICE float largest(float so_far, Pair x) { return larger(so_far, larger(larger(x.x, -x.x), larger(x.y, -x.y))); }

template <int BY> DEVICE u32 spread_upper(u32 x, u32 low, u32 high) { return (x & low) | ((x >> BY) & high); }

DEVICE void products(int (&c)[ROW_TILES][4], u32 a0, u32 a1, u32 a2, u32 a3, const u32 (&b0)[ROW_TILES],
                     const u32 (&b1)[ROW_TILES]) {
#pragma unroll
  for (int n = 0; n < ROW_TILES; n++) imma(c[n], a0, a1, a2, a3, b0[n], b1[n]);
}

// Eight codes of two selectors looked up in eight bytes, and multiplied. y0, y1: their upper halves.
DEVICE void look_up(u32 low, u32 high, u32 z0, u32 z1, u32 y0, u32 y1, int (&c)[ROW_TILES][4],
                    const u32 (&b0)[ROW_TILES], const u32 (&b1)[ROW_TILES]) {
  products(c, prmt(low, high, z0), prmt(low, high, z1), prmt(low, high, y0), prmt(low, high, y1), b0, b1);
}

// A wide bin's row of 32 bytes is two halves of 16 bytes, which change places every four tokens, so that reads meet no
// bank twice.
DEVICE u32 wide_at(u32 token, u32 half) { return token * 32 + ((half ^ (token >> 2)) & 1) * 16; }

DEVICE void copy_wide(u32 to, const From& from, int byte, int which, u32 lane) {
  copy_async<16>(to + wide_at((lane >> 1) + 16 * which, lane & 1), (const void*)(from.wide[which] + byte));
}

// A narrow bin's row is repeated until it fills 16 bytes.
template <int BYTES> DEVICE void copy_narrow(u32 to, const From& from, int byte, u32 lane) {
#pragma unroll
  for (int i = 0; i < 16 / BYTES; i++)
    copy_async<BYTES>(to + lane * 16 + i * BYTES, (const void*)(from.block + from.within * BYTES + byte));
}

DEVICE void load_wide_keys(u32 (&low)[4], u32 (&high)[4], u32 bin, const Lane& at) {
#pragma unroll
  for (u32 m = 0; m < 2; m++) {
    u32 r[4];
    ldmatrix4(r, bin + wide_at(16 * m + (at.lane & 15), at.lane >> 4));
    low[2 * m] = r[0], low[2 * m + 1] = r[1], high[2 * m] = r[2], high[2 * m + 1] = r[3];
  }
}

DEVICE void load_wide_values(u32 (&low)[4], u32 (&high)[4], u32 bin, const Lane& at) {
  ldmatrix4_trans(low, bin + wide_at(at.lane, 0));
  ldmatrix4_trans(high, bin + wide_at(at.lane, 1));
}

// Weights of two octets in a register each, in the order of transposed bytes, as selectors of four octets have them.
DEVICE void first_tokens_first(const u32 (&first)[ROW_TILES], const u32 (&second)[ROW_TILES], u32 (&b0)[ROW_TILES],
                               u32 (&b1)[ROW_TILES]) {
#pragma unroll
  for (int n = 0; n < ROW_TILES; n++) {
    b0[n] = prmt(first[n], second[n], 0x5410);
    b1[n] = prmt(first[n], second[n], 0x7632);
  }
}

template <int WIDTH> MEMBER void multiply(int (&c)[ROW_TILES][4], u32 z0, u32 z1, const u32 (&b0)[ROW_TILES],
                                          const u32 (&b1)[ROW_TILES], const struct Tables& tables);

// GENERATED

// What a program does: a split of a request for a head.
struct Program {
  const float* q;
  u64 keys, scales;  // addresses of the head's in the first block
  u32 to_values;     // from its keys
  const Slot* slots;
  const float* means;
  const int* tree;
  u16* out;
  float* lse;
  float to_log2;
  int stride_qt, stride_qh, head, first_row, split, request, begin, end, length;
  u32 ahead[STAGES][PARTS];  // the lane's slots of the first tiles
};

template <class Keys> struct Queries {
  u32 b0[Keys::SELECTORS + 1][ROW_TILES], b1[Keys::SELECTORS + 1][ROW_TILES];
  u32 d0[Keys::PAIRS + 1][ROW_TILES], d1[Keys::PAIRS + 1][ROW_TILES];
  u32 h0[Keys::LEVELLED + 1][ROW_TILES], h1[Keys::LEVELLED + 1][ROW_TILES];
  int start[ROW_TILES][4];  // logits of keys in the middle
  u32 part;                 // 0: the high bytes, 1: the low ones

  // Of numbers up to 2^15: a sum with the magic number ends in the bits of the whole number, 2^15 and 128. Each byte of
  // these is 128 more than the part.
  MEMBER u32 bytes(float a, float b, float c, float d) const {
    const float magic = 8388608.0f + 32768.0f + 128.0f;
    const u32 which = part ? 0x40 : 0x51;
    const u32 low = prmt(bits_of(a + magic), bits_of(b + magic), which);
    const u32 high = prmt(bits_of(c + magic), bits_of(d + magic), which);
    return prmt(low, high, 0x5410) ^ 0x80808080u;
  }
  // float16 in place of the high bytes, and what it leaves in place of the low ones.
  MEMBER u32 halves(float a, float b) const {
    const u32 high = pack_f16x2(a, b);
    return part ? pack_f16x2(a - f16(high & 0xFFFF), b - f16(high >> 16)) : high;
  }
};

struct Logits {
  int integers[2][ROW_TILES][4];
  float levels[2][ROW_TILES][4];
};

struct Sums {
  float of[Values::SEGMENTS][ROW_TILES][2];  // of columns g and g + 8 of each segment, for rows t and t + 4
  float scale[ROW_TILES];                    // the tile's unit in that of the sums
  int weights[ROW_TILES];                    // the tile's, for codes that are operands as they are

  // Both parts of a tile's sums. middle: of codes without a table.
  MEMBER void add(int segment, int middle, const int (&c)[ROW_TILES][4]) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        of[segment][n][i] += (float)(c[n][2 * i] * 256 + c[n][2 * i + 1] - middle * weights[n]) * scale[n];
  }
};

DEVICE const float* query_row(const Program& p, int row) {
  const int last = smaller(p.first_row + row, QUERY_ROWS - 1);
  const i64 token = (i64)p.request * QUERIES + last / GROUP;
  return p.q + token * p.stride_qt + (i64)(p.head * GROUP + last % GROUP) * p.stride_qh;
}

// Of what is at base in the first block, in the block of a slot. Products with numbers that no compiler knows are not
// made into sums, of which there are many elsewhere.
DEVICE u64 block_of(u64 base, u32 slot) { return mad_wide(slot >> 4, opaque(ROW_BYTES * BLOCK_SLOTS), base); }

// The same behind a number of bytes for each row before it there.
DEVICE u64 row_at(u64 base, u32 slot, u32 bytes) { return mad_wide(slot & 15, opaque(bytes), block_of(base, slot)); }

template <class Keys> DEVICE void start_part(const Program& p, u32 to, u32 slot, const Lane& at) {
  const u32 low = shfl(slot, at.lane >> 1), high = shfl(slot, 16 + (at.lane >> 1));
  const u64 half = p.keys + (at.lane & 1) * 16;
  const u64 first = row_at(half, low, 32), second = row_at(half, high, 32);
  const u64 block = block_of(p.keys, slot);
  Keys::copy(to, From{block, slot & 15, {first, second}}, at.lane);
  const u32 to_values = p.to_values;
  Values::copy(to + VALUES_AT, From{block + to_values, slot & 15, {first + to_values, second + to_values}}, at.lane);
  copy_async<4>(to + SCALES_AT + at.lane * 4, (const void*)row_at(p.scales, slot, 4));
}

// The parts that a split has.
template <class Keys>
DEVICE void start_tile(const Program& p, u32 to, int from, const u32 (&slot)[PARTS], const Lane& at) {
#pragma unroll
  for (int i = 0; i < PARTS; i++)
    if (from + i * PART < p.end) start_part<Keys>(p, to + i * PART_BYTES, slot[i], at);
}

DEVICE u32 slot_of(const Program& p, int token) { return (u32)p.slots[smaller(token, p.end - 1)]; }

DEVICE void load_slots(const Program& p, int from, u32 (&slot)[PARTS]) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) slot[i] = slot_of(p, from + i * PART + (int)lane());
}

DEVICE const float* mean_of(const Program& p, int token) {
  return p.means + ((i64)(token / PAGE_OR_ONE) * HEADS + p.head) * PADDED;
}

DEVICE void prefetch_mean(const Program& p, int token) {
  if (token < p.end) prefetch_l1(mean_of(p, token) + lane() * PADDED / 32);
}

// What the page's mean gives to the lane's rows, in base 2.
template <class Keys> DEVICE void page_bias(const Program& p, int token, const Lane& at, float (&bias)[ROW_TILES]) {
  const Pair* mean = (const Pair*)mean_of(p, token) + at.t;
#pragma unroll
  for (int n = 0; n < ROW_TILES; n++) {
    float sum = Keys::dot((const Pair*)query_row(p, 4 * n + (at.g >> 1)) + at.t, mean, at.g & 1);
    sum += shfl_xor(sum, 1);
    sum += shfl_xor(sum, 2);
    sum += shfl_xor(sum, 4);
    bias[n] = shfl(sum, 8 * at.t) * p.to_log2;
  }
  prefetch_mean(p, token + PAGE_OR_ONE);
}

template <class Keys> DEVICE void attend(const Program& p) {
  const u32 number = lane();
  const Lane at = {number, number >> 2, number & 3};
  char* shared = shared_memory();
  const u32 tiles = shared_address(shared);
  const Tables tables;

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    start_tile<Keys>(p, tiles + s * STAGE_BYTES, p.begin + s * TILE, p.ahead[s], at);
    copy_commit();
  }
  u32 slot[PARTS];
#pragma unroll
  for (int i = 0; i < PARTS; i++) slot[i] = p.ahead[STAGES - 1][i];

  // Queries as operands: column g of a product is a part of row g / 2. A lane has channels 2 t, 2 t + 1 and 8 more.
  Queries<Keys> q;
  q.part = at.g & 1;
  float by_integers[ROW_TILES], by_levels[ROW_TILES], bias[ROW_TILES];
#pragma unroll
  for (int n = 0; n < ROW_TILES; n++) {
    const Pair* row = (const Pair*)query_row(p, 4 * n + (at.g >> 1)) + at.t;
    float integers = 0, levels = 0;
    Keys::sizes(row, integers, levels);
#pragma unroll
    for (int i = 1; i < 4; i *= 2) {
      integers = larger(integers, shfl_xor(integers, i));
      levels = larger(levels, shfl_xor(levels, i));
    }
    integers = integers > 0 ? integers : 1;
    levels = levels > 0 ? levels : 1;
    for (int i = 0; i < 4; i++) q.start[n][i] = 0;
    Keys::operands(row, q, n, 32512.0f / integers, 1.0f / levels);
    by_integers[n] = shfl(integers, 8 * at.t) * (p.to_log2 / 32512.0f);
    by_levels[n] = shfl(levels, 8 * at.t) * p.to_log2;
    bias[n] = 0;
  }

  Sums sums;
  float unit[ROW_TILES], total[ROW_TILES];
#pragma unroll
  for (int n = 0; n < ROW_TILES; n++) {
    unit[n] = -1e29f, total[n] = 0;
#pragma unroll
    for (int s = 0; s < Values::SEGMENTS; s++) sums.of[s][n][0] = 0, sums.of[s][n][1] = 0;
  }

  const float magic = 8388608.0f + 128.0f;  // a sum with it ends in the bits of the whole number and 128
  int stage = 0;
#pragma unroll 1
  for (int from = p.begin; from < p.end; from += TILE) {
    copy_wait<STAGES - 2>();
    syncwarp();
    {
      const int next = stage == 0 ? STAGES - 1 : stage - 1, ahead = from + (STAGES - 1) * TILE;
      start_tile<Keys>(p, tiles + next * STAGE_BYTES, ahead, slot, at);
      copy_commit();
      load_slots(p, ahead + TILE, slot);
    }
    const u32 tile = tiles + stage * STAGE_BYTES;
    const char* scales = shared + stage * STAGE_BYTES + SCALES_AT;
    stage = stage == STAGES - 1 ? 0 : stage + 1;

    float x[ROW_TILES][OCTETS], v_scale[OCTETS];  // logits in base 2
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const int first = from + i * PART;
      if (i > 0 && first >= p.end) {  // none of it is there
#pragma unroll
        for (int j = 4 * i; j < 4 * i + 4; j++) {
          v_scale[j] = 1;
#pragma unroll
          for (int n = 0; n < ROW_TILES; n++) x[n][j] = -1e30f;
        }
        continue;
      }
      if (PAGE > 0 && (first == p.begin || first % PAGE_OR_ONE == 0)) page_bias<Keys>(p, first, at, bias);
      Logits logits;
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
          for (int k = 0; k < 4; k++) logits.integers[m][n][k] = q.start[n][k & 1], logits.levels[m][n][k] = 0;
      Keys::multiply(tile + i * PART_BYTES, at, tables, q, logits);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int octet = 4 * i + j;
        const u32 word = ((const u32*)(scales + i * PART_BYTES))[8 * j + at.g];
        const float k_scale = f16(word & 0xFFFF);
        const float flag = k_scale < 0 ? 1.0f : 0.0f;
        v_scale[octet] = larger(f16(word >> 16), 5.9604645e-8f);  // so that no probability is out of all proportion
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
          const int* c = &logits.integers[j >> 1][n][2 * (j & 1)];
          float logit = (float)(c[0] * 256 + c[1]) * (k_scale * by_integers[n]);
          if (Keys::LEVELLED > 0) {
            const float* f = &logits.levels[j >> 1][n][2 * (j & 1)];
            logit += (f[0] + f[1]) * (k_scale * by_levels[n]);
          }
          if (PAGE > 0) logit += flag * bias[n];
          if (CAPPED) logit = (1.0f - 2.0f * rcp(exp2f_(logit * (2.0f / CAP_OR_ONE)) + 1.0f)) * (CAP * LOG2E);
          x[n][octet] = logit;
        }
      }
    }
    if (from + TILE > p.end || (QUERIES > 1 && from + TILE > p.length - QUERIES) ||
        (WINDOW > 0 && from < p.length - WINDOW)) {
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++) {
        const int query = smaller(p.first_row + 4 * n + (int)at.t, QUERY_ROWS - 1) / GROUP, first = p.length - QUERIES;
        const u32 bits = TREE ? (u32)p.tree[p.request * QUERIES + query] : 0;
        int seen = first + 1 + query;
        if (TREE) seen = first + bits_set(bits & (~0u >> (32 - QUERIES)));
#pragma unroll
        for (int j = 0; j < OCTETS; j++) {
          const int token = from + 8 * j + (int)at.g;
          bool live = token < p.end;
          if (TREE) live = live && (token < first || (bits >> (token - first) & 1));
          else if (QUERIES > 1) live = live && token < seen;
          if (WINDOW > 0) live = live && token >= seen - WINDOW;
          if (!live) x[n][j] = -1e30f;
        }
      }
    }

    float v_bits[OCTETS];
#pragma unroll
    for (int j = 0; j < OCTETS; j++) v_bits[j] = log2f_(v_scale[j]);

    u32 first[PARTS][ROW_TILES], second[PARTS][ROW_TILES];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
      float most = -1e30f;
#pragma unroll
      for (int j = 0; j < OCTETS; j++) most = larger(most, x[n][j] + v_bits[j]);
#pragma unroll
      for (int i = 4; i < 32; i *= 2) most = larger(most, shfl_xor(most, i));
      const float own = most - BITS, now = larger(unit[n], own);
      if (any(now > unit[n])) {
        const float factor = exp2f_(unit[n] - now);
        total[n] *= factor;
#pragma unroll
        for (int s = 0; s < Values::SEGMENTS; s++) sums.of[s][n][0] *= factor, sums.of[s][n][1] *= factor;
        unit[n] = now;
      }
      sums.scale[n] = exp2f_(own - now);  // 0 where a row sees nothing of the tile
      float share = 0;
      u32 weight[OCTETS];  // the last bits of floats, which a fused operation with the magic number leaves
#pragma unroll
      for (int j = 0; j < OCTETS; j++) {
        const float probability = exp2f_(x[n][j] - own);
        share += probability;
        weight[j] = bits_of(probability * v_scale[j] + magic);
      }
      total[n] += share * sums.scale[n];
      // Bytes of two octets, high ones for an even column and low ones, which are signed, for an odd one.
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        first[i][n] = movmatrix(prmt(weight[4 * i], weight[4 * i + 1], 0x4051) ^ 0x80800000u);
        second[i][n] = movmatrix(prmt(weight[4 * i + 2], weight[4 * i + 3], 0x4051) ^ 0x80800000u);
      }
    }
    if (PARTS == 1 || from + PART < p.end) {
      Values::multiply(tile + VALUES_AT, at, tables, first, second, sums);
    } else {
      Values::multiply_first(tile + VALUES_AT, at, tables, first, second, sums);
    }
  }
  copy_wait<0>();

#pragma unroll
  for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
    for (int i = 4; i < 32; i *= 2) total[n] += shfl_xor(total[n], i);
    const int row = p.first_row + 4 * n + (int)at.t;
    if (row >= QUERY_ROWS) continue;
    const i64 to = ((i64)p.split * QUERIES + row / GROUP) * (HEADS * GROUP) + p.head * GROUP + row % GROUP;
    const float inverse = total[n] > 0 ? 1.0f / total[n] : 0.0f;
#pragma unroll
    for (int s = 0; s < Values::SEGMENTS; s++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        p.out[to * V_DIM + 16 * s + 8 * i + at.g] = (u16)pack_f16x2(sums.of[s][n][i] * inverse * Values::level(s), 0);
      }
    if (at.g == 0) p.lse[to] = total[n] > 0 ? (unit[n] + log2f_(total[n])) * LN2 : float_of(0xFF800000u);
  }
}

// As decode/splits.py, whose request_splits and find_split say what this is.
DEVICE int unit_of(int tokens) { return larger((tokens + SPLIT_UNIT - 1) / SPLIT_UNIT, 1) * SPLIT_UNIT; }
DEVICE int unseen(int length) { return SPAN > 0 ? larger(length - SPAN, 0) / SPLIT_ALIGN * SPLIT_ALIGN : 0; }

// Lengths of requests, 32 at a time, the first of which stay in a register.
struct Lengths {
  const Indptr* kv_indptr;
  int num_requests, first;

  MEMBER int load(int base) const {
    const int request = base + (int)lane();
    if (request >= num_requests) return 0;
    const int length = (int)(kv_indptr[request + 1] - kv_indptr[request]);
    return length - unseen(length);
  }
  MEMBER int from(int base) const { return base ? load(base) : first; }
};

DEVICE int split_size(const Lengths& lengths, int target) {
  int total = 0, most = 0;
#pragma unroll 1
  for (int base = 0; base < lengths.num_requests; base += 32) {
    const int length = lengths.from(base);
    total += length;
    most = larger(most, length);
  }
  total = sum_of_all(total);
  most = largest_of_all(most);
  const int ideal = ceil_div(total, target), requests = lengths.num_requests;
  int size = total;
  if (target > requests) size = smaller(ceil_div(total, target - requests), ceil_div(most, divided(target, requests)));
  size = unit_of(size);
  const int room = size - ideal;
  // Greater sizes never take more splits, so the least that fits is found by halving. The one above is sure to.
  int fits = -1, fails = SPLIT_TRIES;
#pragma unroll 1
  while (fails - fits > 1) {
    const int i = (fits + fails) / 2, trial = unit_of(ideal + room * (SPLIT_TRIES - 1 - i) / SPLIT_TRIES);
    int splits = 0;
#pragma unroll 1
    for (int base = 0; base < requests; base += 32) splits += ceil_div(lengths.from(base), trial);
    if (sum_of_all(splits) <= target) {
      fits = i, size = trial;
    } else {
      fails = i;
    }
  }
  return size;
}

// The number of requests whose splits end up to ``split``, and all their splits. ``all``: those of all requests.
DEVICE int find_request(const Lengths& lengths, int size, int split, int& first, int& all) {
  int request = 0;
  first = 0, all = 0;
#pragma unroll 1
  for (int base = 0; base < lengths.num_requests; base += 32) {
    const int r = base + (int)lane();
    int upto = ceil_div(lengths.from(base), size);
#pragma unroll
    for (u32 i = 1; i < 32; i *= 2) {
      const int before = shfl_up(upto, i);
      if (lane() >= i) upto += before;
    }
    upto += all;
    const u32 ahead = ballot(r < lengths.num_requests && upto <= split);
    const int found = bits_set(ahead);
    if (found) first = (int)shfl((u32)upto, (u32)(found - 1));
    request += found;
    all = (int)shfl((u32)upto, 31);
  }
  return request;
}

// Numbers so that the programs of a multiprocessor get numbers in a row: splits.py, by_multiprocessor.
DEVICE int by_multiprocessor(int program, int total, int count) {
  const int share = total / count, more = total % count, first = program % count;
  return first * share + smaller(first, more) + program / count;
}

KERNEL decode(const float* q,                // [B * QUERIES, Hq, dim], rotated
              const unsigned char* rows,     // [slots, ROW_BYTES]
              const Indptr* kv_indptr,       // [B + 1]
              const Slot* kv_indices,
              const int* k_kinds,            // [H], each head's template
              const int* k_order,            // [H], the heads by their templates
              const float* means,            // [pages, H, PADDED], in stored channels
              const int* tree,               // [B * QUERIES]: decode/tree.py
              u16* partial_out,              // float16 [splits, QUERIES, Hq, V_DIM]
              float* partial_lse,            // [splits, QUERIES, Hq]
              int num_requests, int target, int num_multiprocessors, float to_log2, int stride_qt, int stride_qh) {
  Lengths lengths = {kv_indptr, num_requests, 0};
  lengths.first = lengths.load(0);
  const int size = split_size(lengths, target);
  int head = (int)block_x() % HEADS, row_tile = (int)block_x() / HEADS, split = (int)block_y(), kind = 0, first, all;
  if (KINDS > 1) {
    find_request(lengths, size, 0, first, all);
    const int splits = larger(all, 1), programs = (int)grid_x(), tiles = programs / HEADS;
    const int program = (int)block_y() * programs + (int)block_x(), total = splits * programs;
    const int place = by_multiprocessor(program, total, num_multiprocessors);
    head = k_order[smaller(place / (splits * tiles), HEADS - 1)];
    kind = k_kinds[head];
    row_tile = place / splits % tiles;
    split = program < total ? place % splits : 1 << 30;
  }
  const int request = find_request(lengths, size, split, first, all);
  // What has nothing to do makes room for what waits. One program always waits, and with it the next kernel.
  if (request >= num_requests) {
    if (block_x() + block_y() == 0) {
      wait_ahead();
      release_next();
    }
    return;
  }
  const i64 start = kv_indptr[request];
  const int length = (int)(kv_indptr[request + 1] - start);
  int begin = (split - first) * size, end = begin + size;
  begin += unseen(length), end = smaller(end + unseen(length), length);
  const u64 keys = (u64)rows + (u32)head * (K_STRIDE * BLOCK_SLOTS);
  const u64 scales = (u64)rows + (NORM_OFFSET + 4 * (u32)head) * BLOCK_SLOTS;
  const u32 to_values = (V_OFFSET + (u32)head * V_STRIDE - (u32)head * K_STRIDE) * BLOCK_SLOTS;
  Program program = {q, keys, scales, to_values, kv_indices + start, means, tree, partial_out, partial_lse, to_log2,
                     stride_qt, stride_qh, head, row_tile * PROGRAM_ROWS, split, request, begin, end, length, {}};
  // Slots are as old as lengths, and so are all rows but the newest token's, of which the cache stays true.
#pragma unroll
  for (int s = 0; s < STAGES; s++) {
    load_slots(program, begin + s * TILE, program.ahead[s]);
    if (begin + s * TILE >= end || s == STAGES - 1) continue;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const u32 slot = program.ahead[s][i];
      const u64 block = mad_wide(slot >> 4, ROW_BYTES * BLOCK_SLOTS, keys);
      Keys0::prefetch(From{block, slot & 15, {0, 0}});
      Values::prefetch(From{block + to_values, slot & 15, {0, 0}});
      prefetch_l2((const void*)row_at(scales, slot, 4));
    }
  }
  if (PAGE > 0) prefetch_mean(program, begin);
  wait_ahead();
  release_next();
  // EACH KIND
}
