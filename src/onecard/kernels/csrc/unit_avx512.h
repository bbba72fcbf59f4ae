// Panels times rows in vector registers (AVX-512 VNNI): 4 rows by three tiles at a time, as one piece of
// assembly, because compilers move the sums about.
//
// Twelve registers hold the integer sums of a block and twelve the float sums of all blocks so far, so that
// nothing but the panel and the rows is loaded, and nothing is stored between the blocks of a chunk. Four columns
// are seven loads and twelve products, which take six cycles where two products begin in each. A block ends with
//
//   sum = fma(float(dots), scale * factor of the row, sum)
//
// three vector operations per sum, two of which compete with products: with blocks of 128 columns 94 % of
// the unit's peak are left, with 64 columns 89 %, with 32 columns 80 %.
#pragma once

#include <cstddef>

#include "panel.h"

namespace {

struct Job {
  const uint8_t *w;     // panel bytes of the chunk
  const int8_t *q;      // the first of 4 rows, in their chunks
  const int32_t *total; // of each block of the first row, its sum, or what its sums begin at
  const float *factor;  // and its scale; rows are `stride` bytes apart
  int64_t stride, blocks;
  const float *scale;   // [blocks][48], and Panel::zero as far behind it as in the panel
  const float *sum;     // [4][48] of the chunks before; NULL: there were none
  float *to;            // where sums go; rows are `to_stride` bytes apart
  int64_t to_stride;
};

#define ROW(m, column, n0, n1, n2)                          \
  "vpbroadcastd 64*" #m "+" #column "(%[q]), %%zmm27\n\t"   \
  "vpdpbusd %%zmm27, %%zmm24, %%zmm" #n0 "\n\t"             \
  "vpdpbusd %%zmm27, %%zmm25, %%zmm" #n1 "\n\t"             \
  "vpdpbusd %%zmm27, %%zmm26, %%zmm" #n2 "\n\t"
#define STEP(column)                                                                       \
  "vmovdqa64 48*" #column "(%[w]), %%zmm24\n\t"                                            \
  "vmovdqa64 48*" #column "+64(%[w]), %%zmm25\n\t"                                         \
  "vmovdqa64 48*" #column "+128(%[w]), %%zmm26\n\t"                                        \
  ROW(0, column, 0, 1, 2) ROW(1, column, 3, 4, 5) ROW(2, column, 6, 7, 8) ROW(3, column, 9, 10, 11)
#define COLUMNS_16                          \
  STEP(0) STEP(4) STEP(8) STEP(12)          \
  "add $16, %[q]\n\t"                       \
  "add $768, %[w]\n\t"
#define COLUMNS_64(label)                   \
  "mov $4, %[left]\n\t"                     \
  label ":\n\t" COLUMNS_16                  \
  "dec %[left]\n\t"                         \
  "jnz " label "b\n\t"                      \
  "add $1024 - 64, %[q]\n\t"

// Sums begin at what the codes count too much of, negated: a number of the row where all codes have the same
// zero, else a product of 16-bit numbers.
#define BEGIN_ONE(at, n0, n1, n2)                                        \
  "vpbroadcastd " at ", %%zmm" #n0 "\n\t"                                \
  "vmovdqa64 %%zmm" #n0 ", %%zmm" #n1 "\n\t"                             \
  "vmovdqa64 %%zmm" #n0 ", %%zmm" #n2 "\n\t"
#define BEGIN_EACH(at, n0, n1, n2)                                       \
  "vpbroadcastd " at ", %%zmm27\n\t"                                     \
  "vpxord %%zmm" #n0 ", %%zmm" #n0 ", %%zmm" #n0 "\n\t"                  \
  "vpxord %%zmm" #n1 ", %%zmm" #n1 ", %%zmm" #n1 "\n\t"                  \
  "vpxord %%zmm" #n2 ", %%zmm" #n2 ", %%zmm" #n2 "\n\t"                  \
  "vpdpwssd %%zmm27, %%zmm29, %%zmm" #n0 "\n\t"                          \
  "vpdpwssd %%zmm27, %%zmm30, %%zmm" #n1 "\n\t"                          \
  "vpdpwssd %%zmm27, %%zmm31, %%zmm" #n2 "\n\t"
#define BEGIN(BEGIN_ROW)                                                 \
  BEGIN_ROW("(%[total])", 0, 1, 2)                                       \
  BEGIN_ROW("(%[total], %[stride])", 3, 4, 5)                            \
  BEGIN_ROW("(%[total], %[stride], 2)", 6, 7, 8)                         \
  BEGIN_ROW("(%[total], %[stride3])", 9, 10, 11)
#define ONE BEGIN(BEGIN_ONE)
#define EACH                                                             \
  "vmovdqa64 %c[zero](%[scale]), %%zmm29\n\t"                            \
  "vmovdqa64 %c[zero]+64(%[scale]), %%zmm30\n\t"                         \
  "vmovdqa64 %c[zero]+128(%[scale]), %%zmm31\n\t" BEGIN(BEGIN_EACH)

#define JOIN(n, scale, sum)                                              \
  "vcvtdq2ps %%zmm" #n ", %%zmm" #n "\n\t"                               \
  "vmulps %%zmm" #scale ", %%zmm27, %%zmm28\n\t"                         \
  "vfmadd231ps %%zmm" #n ", %%zmm28, %%zmm" #sum "\n\t"
#define END_ROW(at, n0, n1, n2, s0, s1, s2)                              \
  "vbroadcastss " at ", %%zmm27\n\t"                                     \
  JOIN(n0, 29, s0) JOIN(n1, 30, s1) JOIN(n2, 31, s2)
#define END                                                              \
  "vmovaps (%[scale]), %%zmm29\n\t"                                      \
  "vmovaps 64(%[scale]), %%zmm30\n\t"                                    \
  "vmovaps 128(%[scale]), %%zmm31\n\t"                                   \
  END_ROW("(%[factor])", 0, 1, 2, 12, 13, 14)                            \
  END_ROW("(%[factor], %[stride])", 3, 4, 5, 15, 16, 17)                 \
  END_ROW("(%[factor], %[stride], 2)", 6, 7, 8, 18, 19, 20)              \
  END_ROW("(%[factor], %[stride3])", 9, 10, 11, 21, 22, 23)              \
  "add $4, %[total]\n\t"                                                 \
  "add $4, %[factor]\n\t"                                                \
  "add $192, %[scale]\n\t"                                               \
  "dec %[blocks]\n\t"

#define CLEAR(n, s) "vpxord %%zmm" #s ", %%zmm" #s ", %%zmm" #s "\n\t"
#define LOAD(n, s) "vmovaps 64*" #n "(%[sum]), %%zmm" #s "\n\t"
#define ALL(DO)                                                                                  \
  DO(0, 12) DO(1, 13) DO(2, 14) DO(3, 15) DO(4, 16) DO(5, 17) DO(6, 18) DO(7, 19) DO(8, 20)      \
  DO(9, 21) DO(10, 22) DO(11, 23)
#define FIRST                                                            \
  "test %[sum], %[sum]\n\t"                                              \
  "jnz 3f\n\t" ALL(CLEAR)                                                \
  "jmp 0f\n\t"                                                           \
  "3:\n\t" ALL(LOAD)
#define STORE(at, s0, s1, s2)                                            \
  "vmovups %%zmm" #s0 ", " at "\n\t"                                     \
  "vmovups %%zmm" #s1 ", 64" at "\n\t"                                   \
  "vmovups %%zmm" #s2 ", 128" at "\n\t"
#define LAST                                                             \
  "mov %[to], %[w]\n\t"                                                  \
  "mov %[to_stride], %[q]\n\t"                                           \
  "lea (%[q], %[q], 2), %[left]\n\t"                                     \
  STORE("(%[w])", 12, 13, 14) STORE("(%[w], %[q])", 15, 16, 17)          \
  STORE("(%[w], %[q], 2)", 18, 19, 20) STORE("(%[w], %[left])", 21, 22, 23)

#define BLOCKS_128(BEGIN) "0:\n\t" BEGIN COLUMNS_64("1") COLUMNS_64("2") END "jnz 0b\n\t"
#define BLOCKS_64(BEGIN) "0:\n\t" BEGIN COLUMNS_64("1") END "jnz 0b\n\t"
#define BLOCKS_32(BEGIN)                                                 \
  "0:\n\t" BEGIN COLUMNS_16 COLUMNS_16 END                               \
  "jz 1f\n\t" BEGIN COLUMNS_16 COLUMNS_16                                \
  "add $1024 - 64, %[q]\n\t" END                                         \
  "jnz 0b\n\t"                                                           \
  "1:\n\t"

#define RUN(BLOCKS)                                                                                          \
  asm volatile(FIRST BLOCKS LAST                                                                             \
               : [w] "+r"(w), [q] "+r"(q), [total] "+r"(total), [factor] "+r"(factor), [scale] "+r"(scale),  \
                 [blocks] "+r"(blocks), [left] "=&r"(left)                                                   \
               : [stride] "r"(job.stride), [stride3] "r"(3 * job.stride), [sum] "r"(job.sum),                \
                 [to] "m"(job.to), [to_stride] "m"(job.to_stride),                                          \
                 [zero] "i"(offsetof(Panel, zero) - offsetof(Panel, scale))                                  \
               : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8",     \
                 "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18",    \
                 "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28",   \
                 "zmm29", "zmm30", "zmm31")

template <bool zeros, int block>
inline void multiply_blocks(const Job &job) {
  const uint8_t *w = job.w;
  const int8_t *q = job.q;
  const int32_t *total = job.total;
  const float *factor = job.factor, *scale = job.scale;
  int64_t blocks = job.blocks, left;
  if constexpr (block == 128 && zeros) RUN(BLOCKS_128(EACH));
  if constexpr (block == 128 && !zeros) RUN(BLOCKS_128(ONE));
  if constexpr (block == 64 && zeros) RUN(BLOCKS_64(EACH));
  if constexpr (block == 64 && !zeros) RUN(BLOCKS_64(ONE));
  if constexpr (block == 32 && zeros) RUN(BLOCKS_32(EACH));
  if constexpr (block == 32 && !zeros) RUN(BLOCKS_32(ONE));
}

struct Unit {
  explicit Unit(const oc_matrix &) {}
  static constexpr int32_t less() { return 0; }

  template <bool zeros, int block>
  static void chunk(const Chunk &c) {
    const Quantized &a = c.a;
    for (int64_t row = 0; row < c.rows; row += step_rows) {
      c.ahead.some();
      const int64_t at = row * a.blocks + c.first;
      float *const sum = c.sum + row * panel_rows;
      const bool direct = c.last && c.tiles == panel_tiles && c.rows - row >= step_rows;
      multiply_blocks<zeros, block>({c.panel.bytes, a.at(row, c.first * block), (zeros ? a.sum : c.start) + at,
                                     a.scale + at, 4 * a.blocks, c.blocks, c.panel.scale[0], c.first ? sum : nullptr,
                                     direct ? c.y + row * c.stride : sum, 4 * (direct ? c.stride : panel_rows)});
      for (int64_t m = 0; c.last && !direct && m < step_rows && row + m < c.rows; m++)
        for (int t = 0; t < c.tiles; t++)
          _mm512_storeu_ps(c.y + (row + m) * c.stride + t * tile_rows,
                           _mm512_load_ps(sum + m * panel_rows + t * tile_rows));
    }
  }

  template <bool zeros>
  static void chunk(const Chunk &c) {
    if (c.a.block == 128) chunk<zeros, 128>(c);
    if (c.a.block == 64) chunk<zeros, 64>(c);
    if (c.a.block == 32) chunk<zeros, 32>(c);
  }
};

#undef ROW
#undef STEP
#undef COLUMNS_16
#undef COLUMNS_64
#undef BEGIN_ONE
#undef BEGIN_EACH
#undef BEGIN
#undef ONE
#undef EACH
#undef JOIN
#undef END_ROW
#undef END
#undef CLEAR
#undef LOAD
#undef STORE
#undef LAST
#undef ALL
#undef FIRST
#undef BLOCKS_128
#undef BLOCKS_64
#undef BLOCKS_32
#undef RUN

}  // namespace
