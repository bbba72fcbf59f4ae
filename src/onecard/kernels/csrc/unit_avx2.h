// Panels times rows in vector registers (AVX2 without VNNI): 4 rows by a tile at a time, eight quads as one
// piece of assembly, because compilers move the sums about.
//
// vpmaddubsw leaves sums of two products in 16 bits. Codes of 4 bits and less are small enough for eight of
// these to be added there, 8 * 2 * 15 * 127 < 2^15, before they are widened: two instructions for 32 products
// where widening each takes three, two of which compete for the units that multiply. Wider codes have to be
// widened each time, and are taken as u - 128 with their sign moved to the input, because 2 * 255 * 127 > 2^15:
// four instructions for 32 products.
#pragma once

#include "panel.h"

namespace {

static_assert(panel_tiles == 3 && step_rows == 4, "the assembly has them");

typedef __m256i Dots[step_rows][2];

alignas(32) constexpr int16_t ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

#define ROW(DO, i, m, s0, s1)                              \
  "vpbroadcastd 4*" #i "+64*" #m "(%[q]), %%ymm10\n\t"     \
  DO(s0, s1)
#define QUAD(DO, i)                                        \
  "vmovdqa 192*" #i "(%[w]), %%ymm8\n\t"                   \
  "vmovdqa 192*" #i "+32(%[w]), %%ymm9\n\t"                \
  ROW(DO, i, 0, 0, 1) ROW(DO, i, 1, 2, 3) ROW(DO, i, 2, 4, 5) ROW(DO, i, 3, 6, 7)
#define FIRST(s0, s1)                                      \
  "vpmaddubsw %%ymm10, %%ymm8, %%ymm" #s0 "\n\t"           \
  "vpmaddubsw %%ymm10, %%ymm9, %%ymm" #s1 "\n\t"
#define MORE(s0, s1)                                       \
  "vpmaddubsw %%ymm10, %%ymm8, %%ymm11\n\t"                \
  "vpmaddubsw %%ymm10, %%ymm9, %%ymm12\n\t"                \
  "vpaddw %%ymm11, %%ymm" #s0 ", %%ymm" #s0 "\n\t"         \
  "vpaddw %%ymm12, %%ymm" #s1 ", %%ymm" #s1 "\n\t"
#define WIDEN(s)                                           \
  "vpmaddwd %[ones], %%ymm" #s ", %%ymm" #s "\n\t"         \
  "vpaddd 32*" #s "(%[dots]), %%ymm" #s ", %%ymm" #s "\n\t"\
  "vmovdqa %%ymm" #s ", 32*" #s "(%[dots])\n\t"

// Adds the products of eight quads of codes below 16.
inline void add_narrow(const uint8_t *w, const int8_t *q, Dots &dots) {
  asm(QUAD(FIRST, 0) QUAD(MORE, 1) QUAD(MORE, 2) QUAD(MORE, 3) QUAD(MORE, 4) QUAD(MORE, 5) QUAD(MORE, 6) QUAD(MORE, 7)
      WIDEN(0) WIDEN(1) WIDEN(2) WIDEN(3) WIDEN(4) WIDEN(5) WIDEN(6) WIDEN(7)
      : "+m"(dots)
      : [w] "r"(w), [q] "r"(q), [dots] "r"(&dots), [ones] "m"(ones),
        "m"(*reinterpret_cast<const uint8_t (*)[7 * 192 + 64]>(w)),
        "m"(*reinterpret_cast<const int8_t (*)[3 * 64 + 32]>(q))
      : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12");
}

#undef FIRST
#undef MORE
#undef WIDEN
#undef QUAD

#define EACH(s0, s1)                                       \
  "vpsignb %%ymm8, %%ymm10, %%ymm13\n\t"                   \
  "vpsignb %%ymm9, %%ymm10, %%ymm14\n\t"                   \
  "vpmaddubsw %%ymm13, %%ymm11, %%ymm13\n\t"               \
  "vpmaddubsw %%ymm14, %%ymm12, %%ymm14\n\t"               \
  "vpmaddwd %%ymm15, %%ymm13, %%ymm13\n\t"                 \
  "vpmaddwd %%ymm15, %%ymm14, %%ymm14\n\t"                 \
  "vpaddd %%ymm13, %%ymm" #s0 ", %%ymm" #s0 "\n\t"         \
  "vpaddd %%ymm14, %%ymm" #s1 ", %%ymm" #s1 "\n\t"
#define QUAD(i)                                            \
  "vmovdqa 192*" #i "(%[w]), %%ymm8\n\t"                   \
  "vmovdqa 192*" #i "+32(%[w]), %%ymm9\n\t"                \
  "vpxor %[half], %%ymm8, %%ymm8\n\t"                      \
  "vpxor %[half], %%ymm9, %%ymm9\n\t"                      \
  "vpabsb %%ymm8, %%ymm11\n\t"                             \
  "vpabsb %%ymm9, %%ymm12\n\t"                             \
  ROW(EACH, i, 0, 0, 1) ROW(EACH, i, 1, 2, 3) ROW(EACH, i, 2, 4, 5) ROW(EACH, i, 3, 6, 7)
#define TAKE(s) "vmovdqa 32*" #s "(%[dots]), %%ymm" #s "\n\t"
#define GIVE(s) "vmovdqa %%ymm" #s ", 32*" #s "(%[dots])\n\t"

alignas(32) constexpr uint8_t half[32] = {128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
                                          128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
                                          128, 128, 128, 128, 128, 128, 128, 128, 128, 128};

// The products of eight quads of any bytes.
inline void add_wide(const uint8_t *w, const int8_t *q, Dots &dots) {
  asm("vmovdqa %[ones], %%ymm15\n\t"
      TAKE(0) TAKE(1) TAKE(2) TAKE(3) TAKE(4) TAKE(5) TAKE(6) TAKE(7)
      QUAD(0) QUAD(1) QUAD(2) QUAD(3) QUAD(4) QUAD(5) QUAD(6) QUAD(7)
      GIVE(0) GIVE(1) GIVE(2) GIVE(3) GIVE(4) GIVE(5) GIVE(6) GIVE(7)
      : "+m"(dots)
      : [w] "r"(w), [q] "r"(q), [dots] "r"(&dots), [ones] "m"(ones), [half] "m"(half),
        "m"(*reinterpret_cast<const uint8_t (*)[7 * 192 + 64]>(w)),
        "m"(*reinterpret_cast<const int8_t (*)[3 * 64 + 32]>(q))
      : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12",
        "ymm13", "ymm14", "ymm15");
}

#undef EACH
#undef TAKE
#undef GIVE
#undef ROW
#undef QUAD

class Unit {
 public:
  explicit Unit(const oc_matrix &w)
      : wide_(w.bits == 8 || w.kind == OC_TABLE || w.kind == OC_TABLES) {}

  // What the codes of a panel are less here than as they lie there.
  int32_t less() const { return wide_ ? 128 : 0; }

  template <bool zeros>
  void chunk(const Chunk &c) const {
    if (wide_)
      rows<zeros, true>(c);
    else
      rows<zeros, false>(c);
  }

 private:
  // Four rows times a tile of the panel, the blocks of the chunk; `sum` and `to` have 16 numbers of a row.
  template <bool zeros, bool wide, int block>
  static void tile(const Chunk &c, int64_t row, int place, const float *sum, int64_t sum_stride, float *to,
                   int64_t stride) {
    const Quantized &a = c.a;
    __m256 total[step_rows][2];
    for (int m = 0; m < step_rows; m++)
      for (int v = 0; v < 2; v++)
        total[m][v] = sum ? _mm256_loadu_ps(sum + m * sum_stride + 8 * v) : _mm256_setzero_ps();
    for (int b = 0; b < c.blocks; b++) {
      const int64_t at = row * a.blocks + c.first + b;
      Dots dots;
      for (int m = 0; m < step_rows; m++)
        for (int v = 0; v < 2; v++) {
          const auto *const zero = reinterpret_cast<const __m256i *>(&c.panel.zero[b][place * tile_rows + 8 * v]);
          dots[m][v] = zeros ? _mm256_madd_epi16(_mm256_set1_epi32(a.sum[at + m * a.blocks]), _mm256_load_si256(zero))
                             : _mm256_set1_epi32(c.start[at + m * a.blocks]);
        }
      const uint8_t *const panel = c.panel.bytes + place_of(int64_t(b) * (block / 4), place);
      const int8_t *const q = a.at(row, (c.first + b) * block);
#pragma GCC unroll 4
      for (int k = 0; k < block; k += 32) {
        const int8_t *const from = q + k / 64 * Quantized::chunk + k % 64;
        if (wide)
          add_wide(panel + place_of(k / 4, 0), from, dots);
        else
          add_narrow(panel + place_of(k / 4, 0), from, dots);
      }
      for (int m = 0; m < step_rows; m++)
        for (int v = 0; v < 2; v++) {
          const __m256 factor = _mm256_mul_ps(_mm256_load_ps(&c.panel.scale[b][place * tile_rows + 8 * v]),
                                              _mm256_set1_ps(a.scale[at + m * a.blocks]));
          total[m][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[m][v]), factor, total[m][v]);
        }
    }
    for (int m = 0; m < step_rows; m++)
      for (int v = 0; v < 2; v++) _mm256_storeu_ps(to + m * stride + 8 * v, total[m][v]);
  }

  template <bool zeros, bool wide, int block>
  static void rows(const Chunk &c) {
    for (int64_t row = 0; row < c.rows; row += step_rows) {
      c.ahead.some();
      const bool direct = c.last && c.rows - row >= step_rows;
      for (int t = 0; t < c.tiles; t++) {
        float *const sum = c.sum + row * panel_rows + t * tile_rows, *const y = c.y + row * c.stride + t * tile_rows;
        tile<zeros, wide, block>(c, row, t, c.first ? sum : nullptr, panel_rows, direct ? y : sum,
                                 direct ? c.stride : panel_rows);
        for (int64_t m = 0; c.last && !direct && row + m < c.rows; m++)
          memcpy(y + m * c.stride, sum + m * panel_rows, 4 * tile_rows);
      }
    }
  }

  template <bool zeros, bool wide>
  static void rows(const Chunk &c) {
    if (c.a.block == 128) rows<zeros, wide, 128>(c);
    if (c.a.block == 64) rows<zeros, wide, 64>(c);
    if (c.a.block == 32) rows<zeros, wide, 32>(c);
  }

  bool wide_;
};

}  // namespace
