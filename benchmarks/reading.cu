// Rows of a trellis read into the registers of a matrix product, and multiplied: see reading.py, which builds this file
// once for each way of decoding, with these as macros:
//   BITS of a code; KIND of decoding; COPIES of the table, interleaved, of which a lane reads its own; THREADS a block,
//   one a multiprocessor; DEPTH of tiles that a warp has room for in shared memory, one being read, the others asked for;
//   CACHED: the table is read through the L1 cache and not from shared memory; MULTIPLIED: shifts to the left are
//   multiplications; DUMP: the registers are written, to be compared with the definition; DECODE: attention is computed,
//   and not rows read; EARLY: values are looked up before weights are known; TOGETHER: tiles that share a look at the
//   maximum.
//
// A warp takes 16 rows of 128 values at once. Lane 4g + t has 32 values that follow each other of row g and of row g + 8,
// as an operand of m16n8k16 (fp16) or m16n8k32 (int8) is held; which channel such a place is, the query says.

typedef unsigned int u32;

#define MASKS 0    // no trellis: codes of two bits under a mask, two a register, as the decode kernels read int2
#define CURVE 1    // the definition's polynomial in fp16, two values at once
#define VALUES 2   // a table of one fp16 value a window
#define PAIRS 3    // two fp16 values a window
#define TRIPLES 4  // three int8 values a window
#define QUADS 5    // four int8 values a window, multiplied as int8
#define HALVES 6   // four int8 values a window, as fp16

#define WORDS BITS  // of 32 bits, that a lane has of a row
#define WHOLE (KIND == QUADS || KIND == TRIPLES)
#define REGISTERS (WHOLE ? 8 : 16)  // a row's values

#if KIND == PAIRS
#define TAKES 2
#elif KIND == TRIPLES
#define TAKES 3
#elif KIND == QUADS || KIND == HALVES
#define TAKES 4
#else
#define TAKES 1
#endif
#define WINDOW (8 + BITS * (TAKES - 1))
#define ENTRIES (1 << WINDOW)
#define SCALED (COPIES == 32 ? 7 : COPIES == 16 ? 6 : COPIES == 8 ? 5 : COPIES == 4 ? 4 : COPIES == 2 ? 3 : 2)
#define TABLE (KIND != MASKS && KIND != CURVE)

#if CACHED
typedef const char* Table;
#else
typedef u32 Table;  // where a lane's own copy begins, in bytes
#endif
#define BEFORE 1024  // bytes of shared memory that are the system's

extern __shared__ __align__(16) char shared_table[];

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

__device__ __forceinline__ u32 add2(u32 a, u32 b) {
  u32 d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// 32 bits of the string string[0] string[1] ..., those above the last `shift`
template <int SHIFT, int N>
__device__ __forceinline__ u32 above(const u32 (&string)[N]) {
  if constexpr (SHIFT < 0) {
    return string[N - 1] << -SHIFT;
  } else if constexpr (SHIFT % 32 == 0) {
    return string[N - 1 - SHIFT / 32];
  } else {
    return __funnelshift_r(string[N - 1 - SHIFT / 32], string[N - 2 - SHIFT / 32], SHIFT % 32);
  }
}

// what the table has for the window that ends with value LAST of the string
template <int LAST, int N>
__device__ __forceinline__ u32 look(const u32 (&string)[N], Table table) {
  constexpr int end = 32 * (N - 1) - BITS * (LAST + 1);
#if MULTIPLIED
  // from the next whole byte to the left, by a multiplication, which another unit does
  constexpr int byte = end > SCALED ? (end - SCALED + 7) / 8 * 8 : 0;
  u32 at = (above<byte>(string) * (1u << (byte - (end - SCALED)))) & ((ENTRIES - 1) << SCALED);
#else
  u32 at = above<end - SCALED>(string) & ((ENTRIES - 1) << SCALED);
#endif
#if CACHED
  return __ldg((const u32*)(table + at));
#else
  // what lies in front of the table is added by the load itself
  u32 found;
  asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(found) : "r"(at | table), "n"(BEFORE));
  return found;
#endif
}

template <int I>
__device__ __forceinline__ void decode_from(const u32 (&string)[WORDS + 1], Table table, u32 (&out)[REGISTERS]) {
#if KIND == MASKS
  // codes I, I + 8 and so on of both halves of a word
  u32 word = string[1 + I / 8];
  constexpr int place = I % 8 < 5 ? 2 * (I % 8) : 2 * (I % 8) - 6;
  out[I] = (I % 8 < 5 ? word : word >> 6) & (0x00030003u << place);
  if constexpr (I + 1 < 16) decode_from<I + 1>(string, table, out);
#elif KIND == CURVE
  // windows of values I and I + 8 of a word, in its lower half the later one. 275 w is 256 w + 19 w, and below 2^10
  // only two bits of the first count; so neither half runs over into the other
  constexpr int word = I / 8, place = I % 8;
  u32 both = above<32 * (WORDS - 1 - word) + 14 - 2 * place>(string);
  u32 n = (both & 0x00ff00ff) * 19 + (both & 0x00030003) * 256;
  // twice 1 + n / 1024, less 3, and 2^-10 more
  u32 level = add2(fma2((n & 0x03ff03ff) | 0x3c003c00, 0x40004000, 0xc200c200), 0x14001400);
  // the definition's curve with coefficients (45.97 .082 -.0253 33.97) that give its values in fp16; 1536 more rounds
  u32 square = mul2(level, level);
  u32 factor = fma2(square, 0x503f503f, 0xa677a677);
  factor = fma2(fma2(factor, square, 0x2d402d40), square, 0x51bf51bf);
  out[I] = add2(fma2(level, factor, 0x66006600), 0xe600e600);
  if constexpr (I + 1 < 16) decode_from<I + 1>(string, table, out);
#elif KIND == VALUES
  out[I] = permute(look<2 * I>(string, table), look<2 * I + 1>(string, table), 0x5410);
  if constexpr (I + 1 < 16) decode_from<I + 1>(string, table, out);
#elif KIND == PAIRS
  out[I] = look<2 * I + 1>(string, table);
  if constexpr (I + 1 < 16) decode_from<I + 1>(string, table, out);
#elif KIND == QUADS
  out[I] = look<4 * I + 3>(string, table);
  if constexpr (I + 1 < 8) decode_from<I + 1>(string, table, out);
#elif KIND == HALVES
  u32 four = look<4 * I + 3>(string, table);  // 128 more than the values: as the mantissa of 1024.0, 1152 more
  out[2 * I] = add2(permute(four, 0x64646464, 0x4140), 0xe480e480);
  out[2 * I + 1] = add2(permute(four, 0x64646464, 0x4342), 0xe480e480);
  if constexpr (I + 1 < 8) decode_from<I + 1>(string, table, out);
#endif
}

#if KIND == TRIPLES
template <int I>
__device__ __forceinline__ void look_from(const u32 (&string)[WORDS + 1], Table table, u32 (&found)[11]) {
  found[I] = look<(I < 10 ? 3 * I + 2 : 31)>(string, table);
  if constexpr (I + 1 < 11) look_from<I + 1>(string, table, found);
}

// the place of a value among the bytes of the first of the two words that have its four, and the second
__device__ constexpr u32 selector(int first) {
  u32 selected = 0;
  for (int i = 0; i < 4; i++) {
    int value = first + i, word = value < 30 ? value / 3 : 10, byte = value < 30 ? value % 3 : value - 29;
    selected |= (u32)(byte + (word == first / 3 ? 0 : 4)) << 4 * i;
  }
  return selected;
}

template <int I>
__device__ __forceinline__ void four_from(const u32 (&found)[11], u32 (&out)[8]) {
  constexpr int last = 4 * I + 3;
  out[I] = permute(found[4 * I / 3], found[last < 30 ? last / 3 : 10], selector(4 * I));
  if constexpr (I + 1 < 8) four_from<I + 1>(found, out);
}
#endif

__device__ __forceinline__ void decode(const u32 (&string)[WORDS + 1], Table table, u32 (&out)[REGISTERS]) {
#if KIND == TRIPLES
  u32 found[11];
  look_from<0>(string, table, found);
  four_from<0>(found, out);
#else
  decode_from<0>(string, table, out);
#endif
}

// the row's scale, a word of 16 bits, as a float; 8 - BITS of its bits are those before the first code
__device__ __forceinline__ float scale_of(u32 stored) {
  constexpr int start = 8 - BITS, mantissa = 10 - start;
  u32 code = stored >> start;
  float scale = __uint_as_float((code << (23 - mantissa)) + ((127 - 40) << 23));
  scale = code == 0 ? 0.0f : scale;
  return code == (1u << (16 - start)) - 1 ? __uint_as_float(0x7fc00000) : scale;
}

// where a lane's copy of the table begins; written into shared memory first, which __syncthreads() is to follow
__device__ __forceinline__ Table own_table(const u32* table) {
  int lane = threadIdx.x % 32;
#if TABLE && CACHED
  return (const char*)table + lane % COPIES * 4;
#elif TABLE
  // four words at once, of neighbouring copies or entries
  for (int i = threadIdx.x; i < ENTRIES * COPIES / 4; i += THREADS) {
    uint4 four;
    four.x = table[4 * i / COPIES];
    four.y = COPIES >= 4 ? four.x : table[(4 * i + 1) / COPIES];
    four.z = COPIES >= 4 ? four.x : table[(4 * i + 2) / COPIES];
    four.w = COPIES >= 4 ? four.x : table[(4 * i + 3) / COPIES];
    ((uint4*)shared_table)[i] = four;
  }
  if ((u32)__cvta_generic_to_shared(shared_table) != BEFORE) __trap();
  return lane % COPIES * 4;
#else
  return 0;
#endif
}

// ask: 16 or 4 bytes of memory into shared memory; close: what was asked for since; await: all but the last PENDING closed
__device__ __forceinline__ void ask16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void ask4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void close() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void await() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  __syncwarp();
}

__device__ __forceinline__ void mma(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(int (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#if TABLE && !CACHED
#define ROOM (ENTRIES * COPIES * 4)  // of the table, behind which the warps' tiles lie
#else
#define ROOM 0
#endif

#if !DECODE

extern "C" __global__ void __launch_bounds__(THREADS, 1) read_rows(
    const u32* codes,              // [rows, 4 WORDS]
    const unsigned short* scales,  // [rows]
    const u32* query,              // [REGISTERS (of int8: twice, upper bytes first), 32]: of each lane
    const u32* table,              // [ENTRIES, COPIES where it is read through the L1 cache]
    float* sums,                   // [warps, 32, 4]: of products times scales
    u32* values,                   // where DUMP, [rows, 4, REGISTERS]
    int tiles) {
  int lane = threadIdx.x % 32;
  int warp = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, warps = gridDim.x * (THREADS / 32);
  Table own = own_table(table);
  u32 multiplied[WHOLE ? 16 : REGISTERS];
#pragma unroll
  for (int i = 0; i < (WHOLE ? 16 : REGISTERS); i++) multiplied[i] = query[i * 32 + lane];
  __syncthreads();

  // a tile is the words of its rows, then their scales
  constexpr int scales_at = 16 * 16 * WORDS, size = scales_at + 32;
  const char* tile_0 = shared_table + ROOM + threadIdx.x / 32 * (DEPTH * size);
  auto ask = [&](int tile, int slot) {
    if (tile < tiles) {
      u32 to = BEFORE + (u32)(tile_0 - shared_table) + slot * size;
      const char* from = (const char*)(codes + (long long)tile * (64 * WORDS));
#pragma unroll
      for (int i = 0; i < WORDS / 2; i++) ask16(to + 512 * i + 16 * lane, from + 512 * i + 16 * lane);
      if (lane < 8) ask4(to + scales_at + 4 * lane, scales + (long long)tile * 16 + 2 * lane);
    }
    close();
  };
#pragma unroll
  for (int d = 0; d < DEPTH - 1; d++) ask(warp + d * warps, d);
  float sum[4] = {};
  int slot = 0;
  for (int tile = warp; tile < tiles; tile += warps) {
    await<DEPTH - 2>();
    ask(tile + (DEPTH - 1) * warps, slot == 0 ? DEPTH - 1 : slot - 1);
    const char* at = tile_0 + slot * size;
    slot = slot == DEPTH - 1 ? 0 : slot + 1;
    u32 out[2][REGISTERS], scale[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = half * 8 + lane / 4;
      scale[half] = *(const unsigned short*)(at + scales_at + 2 * row);
      u32 string[WORDS + 1];
      // the first word of 16 bits is the lower one
#pragma unroll
      for (int i = 0; i < WORDS; i += 2) {
        uint2 two = *(const uint2*)(at + (row * 4 + lane % 4) * (4 * WORDS) + 4 * i);
        string[1 + i] = permute(two.x, 0, 0x1032), string[2 + i] = permute(two.y, 0, 0x1032);
      }
      string[0] = __shfl_up_sync(~0u, string[WORDS], 1);
      if (lane % 4 == 0) string[0] = scale[half] & ((1 << (8 - BITS)) - 1);
      decode(string, own, out[half]);
    }
#if DUMP
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < REGISTERS; i++)
        values[(((long long)tile * 16 + half * 8 + lane / 4) * 4 + lane % 4) * REGISTERS + i] = out[half][i];
#else
    float product[4];
#if WHOLE
    int parts[2][4] = {};  // of the query's upper and lower bytes
#pragma unroll
    for (int i = 0; i < 16; i += 2)
      mma(parts[i / 8], out[0][i % 8], out[1][i % 8], out[0][i % 8 + 1], out[1][i % 8 + 1], multiplied[i],
          multiplied[i + 1]);
#pragma unroll
    for (int j = 0; j < 4; j++) product[j] = (float)(parts[0][j] * 256 + parts[1][j]);
#else
    float parts[2][4] = {};  // two sums, of which none waits for the other
#pragma unroll
    for (int i = 0; i < 16; i += 2)
      mma(parts[i / 2 % 2], out[0][i], out[1][i], out[0][i + 1], out[1][i + 1], multiplied[i], multiplied[i + 1]);
#pragma unroll
    for (int j = 0; j < 4; j++) product[j] = parts[0][j] + parts[1][j];
#endif
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] += product[j] * scale_of(scale[j / 2]);
#endif
  }
#if !DUMP
#pragma unroll
  for (int j = 0; j < 4; j++) sums[(warp * 32 + lane) * 4 + j] = sum[j];
#endif
}

#else  // DECODE: attention of one query a sequence, of keys and values alike, with KIND == PAIRS and BITS == 2

#define PAGE 64
#define KV_HEADS 8
#define HEADS 4  // query heads a KV head
#define SCALE (0.08838834764831845f * 1.4426950408889634f)  // of scores, whose exponents are base 2
#define STALE 8  // by how many powers of two a weight may be more than 1 before the maximum is looked for again

// a tile of 16 tokens: as keys its row g is token 2 g, row g + 8 token 2 g + 1; as values a lane has tokens 4 t to 4 t + 3.
// In shared memory keys of even tokens lie before those of odd ones, values by their token modulo 4, so that a warp reads
// what follows each other; then the keys' scales and the values'
#define TILE (512 + 512 + 32 + 32)
#define STEP (16 * TOGETHER)
#define SLOT (TILE * TOGETHER)

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// two equal fp16 numbers, as an 8 x 8 matrix of the warp, transposed
__device__ __forceinline__ u32 transposed(float x) {
  u32 both, turned;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(both) : "f"(x));
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(both));
  return turned;
}

template <int I>
__device__ __forceinline__ void eight_pairs(const u32 (&string)[2], Table table, u32 (&out)[8]) {
  out[I] = look<2 * I + 1>(string, table);
  if constexpr (I + 1 < 8) eight_pairs<I + 1>(string, table, out);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_rows(
    const unsigned short* query,   // [B, KV_HEADS, HEADS, 128] fp16, turned as the keys are
    const u32* keys,               // [P, KV_HEADS, PAGE, 8]
    const unsigned short* k_scales,  // [P, KV_HEADS, PAGE]
    const u32* values, const unsigned short* v_scales,
    const int* page_table,         // [B, pages]
    const int* lengths,            // [B]
    const u32* table,              // [ENTRIES]
    float* part_o,                 // [B * KV_HEADS, splits, HEADS, 128]: sums of weights times values
    float* part_m,                 // [B * KV_HEADS, splits, HEADS]: what the weights' exponents are relative to, base 2
    float* part_l,                 // the same: sums of weights
    int pairs, int splits, int pages) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int warp = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, warps = gridDim.x * (THREADS / 32);
  Table own = own_table(table);
  __syncthreads();
  u32 ring = BEFORE + ROOM + threadIdx.x / 32 * (DEPTH * SLOT);
  int own_row = lane / 2;  // of those that are asked for, of 16 bytes each
  int key_to = own_row % 2 * 256 + own_row / 2 * 32 + lane % 2 * 16;
  int value_to = 512 + own_row % 4 * 128 + own_row / 4 * 32 + lane % 2 * 16;
  // column g of a product is head g / 2; of values, of the even steps where g is even and else of the odd ones
  u32 first_of_two = g % 2 ? 0x1044 : 0x4410, second_of_two = g % 2 ? 0x3244 : 0x4432;

  for (int item = warp; item < pairs * splits; item += warps) {
    int pair = item / splits, split = item % splits, b = pair / KV_HEADS, kv_head = pair % KV_HEADS;
    int length = lengths[b], tiles = (length + STEP - 1) / STEP, each = (tiles + splits - 1) / splits;
    int first = split * each, end = min(tiles, first + each);
    // the pages of the next 32 are at hand, one a lane
    int page_0 = first * STEP / PAGE;
    int my_page = page_table[b * pages + min(page_0 + lane, pages - 1)];

    u32 multiplied[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      int step = 32 * t + 2 * i, channel = step % 8 * 16 + step / 8;
      const unsigned short* at = query + (pair * HEADS + g / 2) * 128 + channel;
      multiplied[i] = at[0] | (u32)at[16] << 16;
    }
    float m = -1e30f, l = 0.0f;  // below every score, and finite
    float sums[4][4] = {};

    auto ask = [&](int tile, int slot) {
      if (tile < end) {
        int token = tile * STEP, page = token / PAGE - page_0;
        if (page >= 32) {
          page_0 += 32, page -= 32;
          my_page = page_table[b * pages + min(page_0 + lane, pages - 1)];
        }
        int row = (__shfl_sync(~0u, my_page, page) * KV_HEADS + kv_head) * PAGE + token % PAGE;
        u32 to = ring + slot * SLOT;
        const unsigned short* scales = lane < 8 ? k_scales : v_scales;
#pragma unroll
        for (int i = 0; i < TOGETHER; i++, to += TILE, row += 16) {
          ask16(to + key_to, (const char*)keys + row * 32ll + 16 * lane);
          ask16(to + value_to, (const char*)values + row * 32ll + 16 * lane);
          if (lane < 16) ask4(to + 1024 + 4 * lane, scales + row + lane % 8 * 2);
        }
      }
      close();
    };

    __syncwarp();
#pragma unroll
    for (int d = 0; d < DEPTH - 1; d++) ask(first + d, d);
    int slot = 0;
    for (int tile = first; tile < end; tile++) {
      await<DEPTH - 2>();
      ask(tile + DEPTH - 1, slot == 0 ? DEPTH - 1 : slot - 1);
      const char* at = shared_table + ring - BEFORE + slot * SLOT;
      slot = slot == DEPTH - 1 ? 0 : slot + 1;
      float score[TOGETHER][2][4] = {};  // two sums, of which none waits for the other
      u32 key_scales[TOGETHER], value_scales[TOGETHER];
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        key_scales[k] = *(const u32*)(at + k * TILE + 1024 + 4 * g);
        value_scales[k] = *(const u32*)(at + k * TILE + 1056 + 4 * g);
        u32 out[2][16];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint2 two = *(const uint2*)(at + k * TILE + 256 * half + 8 * lane);
          u32 string[3] = {0, permute(two.x, 0, 0x1032), permute(two.y, 0, 0x1032)};
          string[0] = __shfl_up_sync(~0u, string[2], 1);
          if (t == 0) string[0] = key_scales[k] >> 16 * half & 63;
          decode(string, own, out[half]);
        }
#pragma unroll
        for (int i = 0; i < 16; i += 2)
          mma(score[k][i / 2 % 2], out[0][i], out[1][i], out[0][i + 1], out[1][i + 1], multiplied[i],
              multiplied[i + 1]);
      }

      u32 out[4][8];
      auto look_up_values = [&](const char* of_tile) {
        uint2 starts = *(const uint2*)(of_tile + 1056 + 8 * t);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 string[2] = {0, permute(*(const u32*)(of_tile + 512 + 128 * i + 32 * t + 4 * g), 0, 0x1032)};
          string[0] = __shfl_up_sync(~0u, string[1], 4);
          if (g == 0) string[0] = (i < 2 ? starts.x : starts.y) >> 16 * (i % 2) & 63;
          eight_pairs<0>(string, own, out[i]);
        }
      };
      if (EARLY) look_up_values(at);

      // a lane's two scores of a tile, of head t: columns 2 t and 2 t + 1 are alike
      float scaled[TOGETHER][2], bias[TOGETHER][2], top = -1e30f;
#pragma unroll
      for (int k = 0; k < TOGETHER; k++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float sum = score[k][0][2 * half] + score[k][1][2 * half];
          scaled[k][half] = sum * (SCALE * scale_of(key_scales[k] >> 16 * half & 0xffff));
          bias[k][half] = log2_of(scale_of(value_scales[k] >> 16 * half & 0xffff));
        }
      if (tile == tiles - 1) {
#pragma unroll
        for (int k = 0; k < TOGETHER; k++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            if (tile * STEP + 16 * k + 2 * g + half >= length) scaled[k][half] = __uint_as_float(0xff800000);
      }
#pragma unroll
      for (int k = 0; k < TOGETHER; k++)
        top = fmaxf(top, fmaxf(scaled[k][0] + bias[k][0], scaled[k][1] + bias[k][1]));
      if (__any_sync(~0u, top > m + STALE)) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
        top = fmaxf(fmaxf(top, __shfl_xor_sync(~0u, top, 16)), m);
        float decay = exp2_of(m - top);
        m = top;
        l *= decay;
#pragma unroll
        for (int i = 0; i < 16; i++) sums[i / 4][i % 4] *= decay;
      }
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        u32 weights[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float exponent = scaled[k][half] - m;
          l += exp2_of(exponent);
          weights[half] = transposed(exp2_of(exponent + bias[k][half]));
        }
        if (!EARLY) look_up_values(at + k * TILE);
        // tokens 4 t and 4 t + 2 were even rows, the others odd ones
#pragma unroll
        for (int half = 0; half < 2; half++) {
          u32 b0 = permute(weights[half], 0, first_of_two), b1 = permute(weights[half], 0, second_of_two);
#pragma unroll
          for (int i = 0; i < 4; i++)
            mma(sums[i], out[half][2 * i], out[half][2 * i + 1], out[half + 2][2 * i], out[half + 2][2 * i + 1], b0,
                b1);
        }
      }
    }
    l += __shfl_xor_sync(~0u, l, 4);
    l += __shfl_xor_sync(~0u, l, 8);
    l += __shfl_xor_sync(~0u, l, 16);
    long long part = (long long)item * HEADS + t;
    if (g == 0) part_m[part] = m, part_l[part] = l;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      int step = 16 * g + i;
      part_o[part * 128 + step % 8 * 16 + step / 8] = sums[i / 4][i % 4];
    }
  }
}

#endif
