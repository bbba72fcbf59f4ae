// Rows times a matrix in the kernel layout (onecard.h), compiled once per instruction-set class.
//
// Integer matrices multiply rows that were rounded to int8 in the same blocks. Within a block the sum is
// an integer and exact in any order; blocks are then added in rising order, as in
//
//   y = fma(float(sum of (u - zero) * q), weight scale * input scale, y)
//
// so the bits of a result do not depend on how many rows there are, on the unit that multiplies, nor on
// the class. Two ways to get them:
//
//   few rows   a tile's codes are read once, straight from memory, in one sequential stream: the speed of
//              decoding is that of memory.
//   many rows  a few tiles are unpacked, a chunk of columns at a time, to a panel of bytes that lies in the
//              first cache while all rows pass over it; codes are unpacked once per panel, not per row.
//              The panel meets the rows in tiles (AMX) or in register blocks of 8 x 48 (AVX-512).
//
// Dense matrices, and integer ones whose inputs stay float32, add columns in rising order, one fused
// multiply-add each; integer ones first within a block.

#include "engine.h"

#include "numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

using oc::Input;
using oc::Quantized;

// ------------------------------------------------------------------------------- vectors of a class
//
// `Lanes` holds the rows of a tile, or a part of them: Bytes has four columns of each, one quad; Ints
// and Floats one number of each. `signed_bytes`: codes of 8 bits are read as u - 128.

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

struct Lanes {
  static constexpr int count = 16;
  static constexpr bool signed_bytes = false;
  typedef __m512i Bytes;
  typedef __m512i Ints;
  typedef __m512 Floats;

  static Bytes load(const uint8_t *p) { return _mm512_loadu_si512(p); }
  template <int shift, int mask>
  static Bytes field(Bytes v) {
    return _mm512_and_si512(shift ? _mm512_srli_epi16(v, shift) : v, _mm512_set1_epi8(mask));
  }
  static Bytes high_bits(Bytes low, const uint8_t *bits) {
    uint64_t mask;
    memcpy(&mask, bits, 8);
    return _mm512_mask_add_epi8(low, mask, low, _mm512_set1_epi8(4));
  }
  static Ints dot(Ints sum, Bytes w, const int8_t *quad) {
    int32_t x;
    memcpy(&x, quad, 4);
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x));
  }
  template <int bits>
  static Ints dot_code(Ints sum, Bytes w, const int8_t *quad) { return dot(sum, w, quad); }

  static Ints ints(int32_t x) { return _mm512_set1_epi32(x); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
  static Ints bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
  template <int column>
  static Ints column_of(Bytes v) {
    return _mm512_and_si512(_mm512_srli_epi32(v, 8 * column), _mm512_set1_epi32(255));
  }
  static Floats floats(float x) { return _mm512_set1_ps(x); }
  static Floats floats(Ints x) { return _mm512_cvtepi32_ps(x); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, Floats x) { _mm512_storeu_ps(p, x); }
  static Floats read(const uint8_t *p, int dtype) {
    if (dtype == OC_FP32) return _mm512_loadu_ps(p);
    const __m256i half = _mm256_loadu_si256((const __m256i *)p);
    if (dtype == OC_FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
};

#elif defined(__AVX2__)

struct Lanes {
  static constexpr int count = 8;
#if defined(__AVXVNNI__)
  static constexpr bool signed_bytes = false;
#else
  static constexpr bool signed_bytes = true;
#endif
  typedef __m256i Bytes;
  typedef __m256i Ints;
  typedef __m256 Floats;

  static Bytes load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
  template <int shift, int mask>
  static Bytes field(Bytes v) {
    return _mm256_and_si256(shift ? _mm256_srli_epi16(v, shift) : v, _mm256_set1_epi8(mask));
  }
  static Bytes high_bits(Bytes low, const uint8_t *bits) {
    int32_t mask;
    memcpy(&mask, bits, 4);
    const __m256i which = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                           2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(mask), which);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(4)));
  }
  template <int bits>
  static Ints dot_code(Ints sum, Bytes w, const int8_t *quad) {
    int32_t x;
    memcpy(&x, quad, 4);
    const __m256i q = _mm256_set1_epi32(x);
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, w, q);
#else
    // Pairs are added in 16 bits: codes below 16 cannot overflow, those of 8 bits could, so these
    // are taken as u - 128 and their sign is moved to the input: 128 * 127 * 2 fits.
    __m256i pairs;
    if constexpr (bits < 8) {
      pairs = _mm256_maddubs_epi16(w, q);
    } else {
      const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
      pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(q, s));
    }
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
  static Ints ints(int32_t x) { return _mm256_set1_epi32(x); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static Ints mul(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
  static Ints bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
  template <int column>
  static Ints column_of(Bytes v) {
    return _mm256_and_si256(_mm256_srli_epi32(v, 8 * column), _mm256_set1_epi32(255));
  }
  static Floats floats(float x) { return _mm256_set1_ps(x); }
  static Floats floats(Ints x) { return _mm256_cvtepi32_ps(x); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats load(const float *p) { return _mm256_loadu_ps(p); }
  static void store(float *p, Floats x) { _mm256_storeu_ps(p, x); }
  static Floats read(const uint8_t *p, int dtype) {
    if (dtype == OC_FP32) return _mm256_loadu_ps((const float *)p);
    const __m128i half = _mm_loadu_si128((const __m128i *)p);
    if (dtype == OC_FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
};

#elif defined(__ARM_FEATURE_DOTPROD)

struct Lanes {
  static constexpr int count = 4;
  static constexpr bool signed_bytes = true;
  typedef uint8x16_t Bytes;
  typedef int32x4_t Ints;
  typedef float32x4_t Floats;

  static Bytes load(const uint8_t *p) { return vld1q_u8(p); }
  template <int shift, int mask>
  static Bytes field(Bytes v) {
    if constexpr (shift) v = vshrq_n_u8(v, shift);
    return vandq_u8(v, vdupq_n_u8(mask));
  }
  static Bytes high_bits(Bytes low, const uint8_t *bits) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t spread = vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1]));
    return vorrq_u8(low, vandq_u8(vtstq_u8(spread, bit), vdupq_n_u8(4)));
  }
  template <int bits>
  static Ints dot_code(Ints sum, Bytes w, const int8_t *quad) {
    int32_t x;
    memcpy(&x, quad, 4);
    if constexpr (bits == 8) w = veorq_u8(w, vdupq_n_u8(128));
    return vdotq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_s32(vdupq_n_s32(x)));
  }
  static Ints ints(int32_t x) { return vdupq_n_s32(x); }
  static Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
  static Ints sub(Ints a, Ints b) { return vsubq_s32(a, b); }
  static Ints mul(Ints a, Ints b) { return vmulq_s32(a, b); }
  static Ints bytes(const uint8_t *p) { return Ints{p[0], p[1], p[2], p[3]}; }
  template <int column>
  static Ints column_of(Bytes v) {
    uint32x4_t x = vreinterpretq_u32_u8(v);
    if constexpr (column) x = vshrq_n_u32(x, 8 * column);
    return vreinterpretq_s32_u32(vandq_u32(x, vdupq_n_u32(255)));
  }
  static Floats floats(float x) { return vdupq_n_f32(x); }
  static Floats floats(Ints x) { return vcvtq_f32_s32(x); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats load(const float *p) { return vld1q_f32(p); }
  static void store(float *p, Floats x) { vst1q_f32(p, x); }
  static Floats read(const uint8_t *p, int dtype) {
    if (dtype == OC_FP32) return vreinterpretq_f32_u8(vld1q_u8(p));
    const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(p));
    if (dtype == OC_FP16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 15) << 1);
  }
};

#else

struct Lanes {
  static constexpr int count = 4;
  static constexpr bool signed_bytes = false;
  struct Bytes { uint8_t at[16]; };
  struct Ints { int32_t at[4]; };
  struct Floats { float at[4]; };

  template <class Out, class Make>
  static Out each(const Make &make) {
    Out out;
    for (int i = 0; i < int(sizeof out.at / sizeof out.at[0]); i++) out.at[i] = make(i);
    return out;
  }
  static Bytes load(const uint8_t *p) {
    return each<Bytes>([&](int i) { return p[i]; });
  }
  template <int shift, int mask>
  static Bytes field(Bytes v) {
    return each<Bytes>([&](int i) { return uint8_t(v.at[i] >> shift & mask); });
  }
  static Bytes high_bits(Bytes low, const uint8_t *bits) {
    return each<Bytes>([&](int i) { return uint8_t(low.at[i] | (bits[i / 8] >> i % 8 & 1) << 2); });
  }
  template <int bits>
  static Ints dot_code(Ints sum, Bytes w, const int8_t *q) {
    return each<Ints>([&](int i) {
      const uint8_t *const u = w.at + 4 * i;
      return sum.at[i] + u[0] * q[0] + u[1] * q[1] + u[2] * q[2] + u[3] * q[3];
    });
  }
  static Ints ints(int32_t x) {
    return each<Ints>([&](int) { return x; });
  }
  // Without a sign: the codes of a row with NaN, and their sum, may be anything.
  static Ints add(Ints a, Ints b) {
    return each<Ints>([&](int i) { return int32_t(uint32_t(a.at[i]) + uint32_t(b.at[i])); });
  }
  static Ints sub(Ints a, Ints b) {
    return each<Ints>([&](int i) { return int32_t(uint32_t(a.at[i]) - uint32_t(b.at[i])); });
  }
  static Ints mul(Ints a, Ints b) {
    return each<Ints>([&](int i) { return int32_t(uint32_t(a.at[i]) * uint32_t(b.at[i])); });
  }
  static Ints bytes(const uint8_t *p) {
    return each<Ints>([&](int i) { return int32_t(p[i]); });
  }
  template <int column>
  static Ints column_of(Bytes v) {
    return each<Ints>([&](int i) { return int32_t(v.at[4 * i + column]); });
  }
  static Floats floats(float x) {
    return each<Floats>([&](int) { return x; });
  }
  static Floats floats(Ints x) {
    return each<Floats>([&](int i) { return float(x.at[i]); });
  }
  static Floats mul(Floats a, Floats b) {
    return each<Floats>([&](int i) { return a.at[i] * b.at[i]; });
  }
  static Floats fma(Floats a, Floats b, Floats c) {
    return each<Floats>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static Floats load(const float *p) {
    return each<Floats>([&](int i) { return p[i]; });
  }
  static void store(float *p, Floats x) { memcpy(p, x.at, sizeof x.at); }
  static Floats read(const uint8_t *p, int dtype) {
    return each<Floats>([&](int i) { return read_scale(p, dtype, i); });
  }
};

#endif

typedef Lanes::Bytes Bytes;
typedef Lanes::Ints Ints;
typedef Lanes::Floats Floats;

constexpr int tile_rows = 16, parts = tile_rows / Lanes::count;

// ------------------------------------------------------------------------------- a tile of integers

constexpr int64_t to_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t width_of(int dtype) { return dtype == OC_FP32 ? 4 : 2; }

struct Geometry {
  int64_t blocks, zeros, codes, tile;  // where the zeros and codes of a tile begin, and its bytes
  int64_t block_codes;                 // bytes of one block's codes
  int64_t scale_line;                  // bytes of one block's scales

  explicit Geometry(const oc_matrix &w) {
    blocks = (w.columns + w.block - 1) / w.block;
    scale_line = tile_rows * width_of(w.dtype);
    zeros = to_lines(blocks * scale_line);
    codes = zeros + (w.zero_point ? to_lines(blocks * tile_rows) : 0);
    block_codes = int64_t(w.block) * w.bits * 2;
    tile = codes + blocks * block_codes;
  }
};

// The codes of the columns 4 i .. 4 i + 3 of a block, in the rows of one part of the tile.
template <int bits>
Bytes quad_of(const uint8_t *codes, int block, int i, int part) {
  constexpr int per_line = 8 / (bits == 3 ? 2 : bits);
  const Bytes line = Lanes::load(codes + 64 * (i / per_line) + 4 * Lanes::count * part);
  if constexpr (bits == 8) return line;
  if constexpr (bits == 4) return i & 1 ? Lanes::field<4, 15>(line) : Lanes::field<0, 15>(line);
  if constexpr (bits <= 3) {
    const Bytes low = i % 4 == 0   ? Lanes::field<0, 3>(line)
                      : i % 4 == 1 ? Lanes::field<2, 3>(line)
                      : i % 4 == 2 ? Lanes::field<4, 3>(line)
                                   : Lanes::field<6, 3>(line);
    if constexpr (bits == 2) return low;
    return Lanes::high_bits(low, codes + 4 * block + 8 * i + Lanes::count / 2 * part);
  }
}

// What the products above count too much of: the zero, or what of it is not in the codes as read.
template <int bits>
Ints zero_of(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int64_t b, int part) {
  constexpr int32_t read = bits == 8 && Lanes::signed_bytes ? 128 : 0;
  if (!w.zero_point) return Lanes::ints((1 << (bits - 1)) - read);
  const Ints zero = Lanes::bytes(tile + g.zeros + b * tile_rows + part * Lanes::count);
  return Lanes::sub(zero, Lanes::ints(read));
}

Floats scale_of(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int64_t b, int part) {
  return Lanes::read(tile + b * g.scale_line + part * (g.scale_line / parts), w.dtype);
}

// ---------------------------------------------------------------------------------------- few rows

constexpr int few_most = Lanes::count == 16 ? 8 : 4;
constexpr int64_t ahead = 2048;  // bytes that are called for: the processor's own looking ahead ends with a page

// `rows` rows from `first` on, times one tile, into y[row][16]. Products of neighbouring quads go to
// sums of their own, so that none waits for the one before it.
template <int bits, int rows>
void few_rows(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Quantized &a,
              int64_t first, float *y, int64_t stride) {
  constexpr int chains = rows == 1 ? 4 : rows == 2 ? 2 : 1;
  for (int part = 0; part < parts; part++) {
    Floats sum[rows];
    for (int m = 0; m < rows; m++) sum[m] = Lanes::floats(0.0f);
    for (int64_t b = 0; b < g.blocks; b++) {
      const uint8_t *const codes = tile + g.codes + b * g.block_codes;
      const int8_t *const q = a.at(first, b * w.block);
      Ints dots[chains][rows];
      for (auto &chain : dots)
        for (auto &dot : chain) dot = Lanes::ints(0);
      for (int64_t i = 0; i < g.block_codes; i += 64) __builtin_prefetch(codes + ahead + i);
      for (int k = 0; k < w.block; k += 16)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const Bytes u = quad_of<bits>(codes, w.block, k / 4 + j, part);
          const int8_t *const quad = q + k / 64 * oc::Quantized::chunk + k % 64 + 4 * j;
#pragma GCC unroll 8
          for (int m = 0; m < rows; m++) {
            Ints &dot = dots[j % chains][m];
            dot = Lanes::template dot_code<bits>(dot, u, quad + 64 * m);
          }
        }
      const Ints zero = zero_of<bits>(w, g, tile, b, part);
      const Floats scale = scale_of(w, g, tile, b, part);
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) {
        Ints dot = dots[0][m];
        for (int c = 1; c < chains; c++) dot = Lanes::add(dot, dots[c][m]);
        const int64_t at = (first + m) * a.blocks + b;
        dot = Lanes::sub(dot, Lanes::mul(zero, Lanes::ints(a.sum[at])));
        const Floats factor = Lanes::mul(scale, Lanes::floats(a.scale[at]));
        sum[m] = Lanes::fma(Lanes::floats(dot), factor, sum[m]);
      }
    }
    for (int m = 0; m < rows; m++) Lanes::store(y + m * stride + part * Lanes::count, sum[m]);
  }
}

typedef void FewRows(const oc_matrix &, const Geometry &, const uint8_t *, const Quantized &, int64_t,
                     float *, int64_t);

template <int bits>
void few(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Quantized &a, int64_t rows,
         float *y, int64_t stride) {
  static constexpr FewRows *kernels[] = {
      few_rows<bits, 1>, few_rows<bits, 2>, few_rows<bits, 3>, few_rows<bits, 4>,
#if defined(__AVX512BW__)
      few_rows<bits, 5>, few_rows<bits, 6>, few_rows<bits, 7>, few_rows<bits, 8>,
#endif
  };
  for (int64_t first = 0; first < rows; first += few_most) {
    const int64_t count = rows - first < few_most ? rows - first : few_most;
    kernels[count - 1](w, g, tile, a, first, y + first * stride, stride);
  }
}

// --------------------------------------------------------------------------------------- float rows

constexpr int float_rows = 4;

// Calls each(column, weights of a part of the tile), a block at a time: block(b) begins it, end(b) ends it.
template <int bits, class Each>
void columns_of_block(const oc_matrix &w, const uint8_t *codes, int part, Ints zero, const Each &each) {
  for (int i = 0; i < w.block / 4; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const Bytes u = quad_of<bits>(codes, w.block, i + j, part);
      const int k = 4 * (i + j);
      each(k, Lanes::floats(Lanes::sub(Lanes::template column_of<0>(u), zero)));
      each(k + 1, Lanes::floats(Lanes::sub(Lanes::template column_of<1>(u), zero)));
      each(k + 2, Lanes::floats(Lanes::sub(Lanes::template column_of<2>(u), zero)));
      each(k + 3, Lanes::floats(Lanes::sub(Lanes::template column_of<3>(u), zero)));
    }
}

template <int bits, int rows>
void exact_rows(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const float *x,
                int64_t x_stride, float *y, int64_t stride) {
  for (int part = 0; part < parts; part++) {
    Floats sum[rows];
    for (auto &s : sum) s = Lanes::floats(0.0f);
    for (int64_t b = 0; b < g.blocks; b++) {
      Ints zero = w.zero_point ? Lanes::bytes(tile + g.zeros + b * tile_rows + part * Lanes::count)
                               : Lanes::ints(1 << (bits - 1));
      const int64_t left = w.columns - b * w.block;
      Floats dots[rows];
      for (auto &dot : dots) dot = Lanes::floats(0.0f);
      columns_of_block<bits>(w, tile + g.codes + b * g.block_codes, part, zero, [&](int k, Floats u) {
        if (k >= left) return;
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
          dots[m] = Lanes::fma(u, Lanes::floats(x[m * x_stride + b * w.block + k]), dots[m]);
      });
      const Floats scale = scale_of(w, g, tile, b, part);
      for (int m = 0; m < rows; m++) sum[m] = Lanes::fma(dots[m], scale, sum[m]);
    }
    for (int m = 0; m < rows; m++) Lanes::store(y + m * stride + part * Lanes::count, sum[m]);
  }
}

template <int bits>
void exact(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Input &in, float *y,
           int64_t stride) {
  int64_t m = 0;
  for (; m + float_rows <= in.rows; m += float_rows)
    exact_rows<bits, float_rows>(w, g, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
  for (; m < in.rows; m++)
    exact_rows<bits, 1>(w, g, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
}

// ------------------------------------------------------------------------------------------- dense

template <int rows>
void dense_rows(const oc_matrix &w, const uint8_t *tile, const float *x, int64_t x_stride, float *y,
                int64_t stride) {
  const int64_t line = tile_rows * width_of(w.dtype), part_bytes = line / parts;
  for (int part = 0; part < parts; part++) {
    Floats sum[rows];
    for (auto &s : sum) s = Lanes::floats(0.0f);
    for (int64_t k = 0; k < w.columns; k++) {
      const Floats column = Lanes::read(tile + k * line + part * part_bytes, w.dtype);
#pragma GCC unroll 12
      for (int m = 0; m < rows; m++) sum[m] = Lanes::fma(column, Lanes::floats(x[m * x_stride + k]), sum[m]);
    }
    for (int m = 0; m < rows; m++) Lanes::store(y + m * stride + part * Lanes::count, sum[m]);
  }
}

void dense(const oc_matrix &w, const uint8_t *tile, const Input &in, float *y, int64_t stride) {
  constexpr int most = Lanes::count == 16 ? 12 : 8;
  int64_t m = 0;
  for (; m + most <= in.rows; m += most)
    dense_rows<most>(w, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
  for (; m + 4 <= in.rows; m += 4)
    dense_rows<4>(w, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
  for (; m < in.rows; m++)
    dense_rows<1>(w, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
}

// --------------------------------------------------------------------------------------- many rows

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

#if defined(__AMX_INT8__)
constexpr int panel_tiles = 2, step_rows = 32;
constexpr bool signed_panel = true;
#else
constexpr int panel_tiles = 3, step_rows = 8;
constexpr bool signed_panel = false;
#endif
constexpr int panel_rows = panel_tiles * tile_rows;
constexpr int many_from = 9;
constexpr int chunk_columns = signed_panel ? 256 : 512, chunk_blocks = chunk_columns / 32;

// Where the bytes of a tile of the panel lie that belong to the columns 4 quad .. 4 quad + 3: sixteen quads
// of one tile after another for the tile unit, else the tiles side by side.
constexpr int64_t place_of(int64_t quad, int tile) {
  return signed_panel ? ((quad / 16 * panel_tiles + tile) * 16 + quad % 16) * 64 : (quad * panel_tiles + tile) * 64;
}

// A few tiles, a chunk of columns, and what goes with each block.
struct Panel {
  alignas(64) uint8_t bytes[chunk_columns * panel_rows];
  alignas(64) float scale[chunk_blocks][panel_rows];
  alignas(64) int32_t zero[chunk_blocks][panel_rows];  // what the bytes still count too much of
};

// Codes of 4 bits and less become u - zero where the panel is signed.
template <int bits>
void unpack(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int place, int64_t first, int blocks,
            Panel &panel) {
  const int quads = w.block / 4;
  for (int b = 0; b < blocks; b++) {
    const uint8_t *const codes = tile + g.codes + (first + b) * g.block_codes;
    const Ints zero = zero_of<bits>(w, g, tile, first + b, 0);
    Ints left = zero;
    Bytes shift = _mm512_setzero_si512();
    if constexpr (signed_panel) {
      shift = bits == 8 ? _mm512_set1_epi8(-128) : _mm512_mullo_epi32(zero, _mm512_set1_epi32(0x01010101));
      left = bits == 8 ? Lanes::sub(zero, Lanes::ints(128)) : Lanes::ints(0);
    }
    _mm512_store_si512(&panel.zero[b][place * tile_rows], left);
    _mm512_store_ps(&panel.scale[b][place * tile_rows], scale_of(w, g, tile, first + b, 0));
    for (int i = 0; i < quads; i += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Bytes u = quad_of<bits>(codes, w.block, i + j, 0);
        uint8_t *const out = panel.bytes + place_of(int64_t(b) * quads + i + j, place);
        _mm512_store_si512(out, signed_panel ? _mm512_sub_epi8(u, shift) : u);
      }
  }
}

// The codes of the next chunk are called for while this one is multiplied.
struct Ahead {
  const uint8_t *tile[panel_tiles];
  int64_t at, end, each;  // bytes of a tile's chunk, and how many of them at a time

  void some() {
    for (const int64_t stop = at + each < end ? at + each : end; at < stop; at += 64)
      for (const uint8_t *codes : tile) _mm_prefetch(reinterpret_cast<const char *>(codes + at), _MM_HINT_T1);
  }
};

typedef void Unpack(const oc_matrix &, const Geometry &, const uint8_t *, int, int64_t, int, Panel &);

#if defined(__AMX_INT8__)

// Tiles: 0..3 sums, 4 and 5 rows, 6 and 7 the panel.
struct TileConfig {
  alignas(64) uint8_t bytes[64] = {1};
  explicit TileConfig(int columns) {
    for (int tile = 0; tile < 8; tile++) {
      const bool input = tile == 4 || tile == 5, weights = tile >= 6;
      bytes[16 + 2 * tile] = uint8_t(input ? columns : 64);
      bytes[48 + tile] = uint8_t(weights ? columns / 4 : 16);
    }
  }
};

// Integer sums [blocks][tile][16][16] of 32 rows, on their way to the float sums [tile][16][16]; the tiles
// are those of rows 0..15 and 16..31 times those of the panel. At most two blocks, from `b` of the panel on.
struct Ready {
  const int32_t *dots;
  int blocks, b;
  const float *factor;  // of the first row and block; rows are a.blocks apart
  const int32_t *total;
  float *sum;
  __mmask16 begun;  // 0 where these are the first blocks
};

// Adds the rows [begin, end) of the 32, which two tiles each share.
template <bool zeros, int blocks, int begin, int end>
inline __attribute__((always_inline)) void rescale(const Ready &ready, const Panel &panel, int64_t stride) {
  Floats scale[blocks][2];
#pragma GCC unroll 4
  for (int n = 0; n < 2 * blocks; n++) scale[n / 2][n % 2] = _mm512_load_ps(panel.scale[ready.b + n / 2] + n % 2 * 16);
#pragma GCC unroll 32
  for (int m = begin; m < end; m++) {
    constexpr int tile = 256;
    const int at = m / 16 * 2 * tile + m % 16 * 16;
    Floats left = _mm512_maskz_load_ps(ready.begun, ready.sum + at);
    Floats right = _mm512_maskz_load_ps(ready.begun, ready.sum + at + tile);
#pragma GCC unroll 2
    for (int n = 0; n < blocks; n++) {
      Ints x = _mm512_load_si512(ready.dots + n * 1024 + at), y = _mm512_load_si512(ready.dots + n * 1024 + at + tile);
      if constexpr (zeros) {
        const Ints total = Lanes::ints(ready.total[m * stride + n]);
        x = Lanes::sub(x, Lanes::mul(_mm512_load_si512(panel.zero[ready.b + n]), total));
        y = Lanes::sub(y, Lanes::mul(_mm512_load_si512(panel.zero[ready.b + n] + 16), total));
      }
      const Floats factor = Lanes::floats(ready.factor[m * stride + n]);
      left = Lanes::fma(Lanes::floats(x), Lanes::mul(scale[n][0], factor), left);
      right = Lanes::fma(Lanes::floats(y), Lanes::mul(scale[n][1], factor), right);
    }
    _mm512_store_ps(ready.sum + at, left);
    _mm512_store_ps(ready.sum + at + tile, right);
  }
}

template <bool zeros, int begin, int end>
inline __attribute__((always_inline)) void rescale(const Ready &ready, const Panel &panel, int64_t stride) {
  if constexpr (begin < end) {
    if (ready.blocks == 2) rescale<zeros, 2, begin, end>(ready, panel, stride);
    if (ready.blocks == 1) rescale<zeros, 1, begin, end>(ready, panel, stride);
  }
}

// A product of tiles takes 16 cycles, and so does a store, which blocks what follows while it waits. So sums
// leave one tile at a time, just before its next use, and between the products the vector units add a
// few rows of sums that left before. Rows past the last mean nothing.
struct Unit {
  explicit Unit(const oc_matrix &w) {
    const TileConfig config(w.block < 64 ? w.block : 64);
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(config.bytes);
  }
  ~Unit() { _tile_release(); }

  // Products of `blocks` blocks of `steps` steps each, while the sums of the tiles go to `leaving`, and then
  // to `out`; the last block's sums stay.
  template <bool zeros, int blocks, int steps>
  static inline __attribute__((always_inline)) void pair(const Quantized &a, int64_t row, int64_t column, int width,
                                                         const Panel &panel, int64_t quad, int32_t *leaving,
                                                         int32_t *out, const Ready &ready) {
    constexpr int slots = blocks * steps * 4, free = slots > 4 ? slots - 4 : 1;
#define MEANWHILE(slot)                                                               \
  if constexpr ((slot) >= 4 && (slot) < slots)                                        \
  rescale<zeros, ((slot) - 4) * 32 / free, ((slot) - 3) * 32 / free>(ready, panel, a.blocks)
#define STEP(n)                                                                       \
  if constexpr ((n) < blocks * steps) {                                               \
    constexpr bool first = (n) % steps == 0;                                          \
    int32_t *const gone = (n) == 0 ? leaving : out;                                   \
    const int8_t *const q = a.at(row, column + (n) * width);                          \
    const uint8_t *const bytes = panel.bytes + place_of(quad + (n) * width / 4, 0);   \
    _tile_loadd(6, bytes, 64);                                                        \
    _tile_loadd(4, q, 64);                                                            \
    if (first) { _tile_stored(0, gone, 64); _tile_zero(0); }                          \
    _tile_dpbssd(0, 4, 6);                                                            \
    MEANWHILE(4 * (n));                                                               \
    _tile_loadd(7, bytes + 1024, 64);                                                 \
    if (first) { _tile_stored(1, gone + 256, 64); _tile_zero(1); }                    \
    _tile_dpbssd(1, 4, 7);                                                            \
    MEANWHILE(4 * (n) + 1);                                                           \
    _tile_loadd(5, q + a.stride, 64);                                                 \
    if (first) { _tile_stored(2, gone + 512, 64); _tile_zero(2); }                    \
    _tile_dpbssd(2, 5, 6);                                                            \
    MEANWHILE(4 * (n) + 2);                                                           \
    if (first) { _tile_stored(3, gone + 768, 64); _tile_zero(3); }                    \
    _tile_dpbssd(3, 5, 7);                                                            \
    MEANWHILE(4 * (n) + 3);                                                           \
    asm volatile("" : : : "memory");                                                  \
  }
    STEP(0) STEP(1) STEP(2) STEP(3)
#undef STEP
#undef MEANWHILE
    if constexpr (slots <= 4) rescale<zeros, 0, 32>(ready, panel, a.blocks);
  }

  template <bool zeros, int steps>
  static void chunk(const oc_matrix &w, const Panel &panel, const Quantized &a, int64_t rows, int64_t first,
                    int blocks, float *sum, Ahead &ahead) {
    alignas(64) int32_t buffers[2][2 * 1024];
    const int width = w.block / steps;
    int32_t *leaving = buffers[0];
    Ready ready = {buffers[0], 0, 0, nullptr, nullptr, sum, 0};
    int turn = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t row = 0; row < rows; row += step_rows) {
      ahead.some();
      for (int b = 0; b < blocks; b += 2) {
        int32_t *const out = buffers[turn ^= 1];
        const int64_t column = (first + b) * w.block, quad = int64_t(b) * w.block / 4;
        if (blocks - b >= 2)
          pair<zeros, 2, steps>(a, row, column, width, panel, quad, leaving, out, ready);
        else
          pair<zeros, 1, steps>(a, row, column, width, panel, quad, leaving, out, ready);
        const int count = blocks - b >= 2 ? 2 : 1;
        const int64_t at = row * a.blocks + first + b;
        ready = {out, count, b, a.scale + at, a.sum + at, sum + row * panel_rows, __mmask16(first + b ? -1 : 0)};
        leaving = out + (count - 1) * 1024;
      }
    }
    _tile_stored(0, leaving, 64);
    _tile_stored(1, leaving + 256, 64);
    _tile_stored(2, leaving + 512, 64);
    _tile_stored(3, leaving + 768, 64);
    asm volatile("" : : : "memory");
    rescale<zeros, 0, 32>(ready, panel, a.blocks);
  }

  template <bool zeros>
  static void chunk(const oc_matrix &w, const Panel &panel, const Quantized &a, int64_t rows, int64_t first,
                    int blocks, float *sum, Ahead &ahead) {
    if (w.block == 128)
      chunk<zeros, 2>(w, panel, a, rows, first, blocks, sum, ahead);
    else
      chunk<zeros, 1>(w, panel, a, rows, first, blocks, sum, ahead);
  }

  // Where the sum of a row and a tile lies.
  static int64_t place(int64_t row, int tile) {
    return row / 32 * 1024 + (row % 32 / 16 * 2 + tile) * 256 + row % 16 * 16;
  }
};

#else

// One block of 8 rows x 48 weights as a single piece of assembly, because compilers move the 24 sums about.
// They begin at `start` (what the codes count too much of, negated), grow by four columns a step, and
// at the end join the float sums: sum = fma(float(dots), scale * factor of the row, sum). Rows past the last
// mean nothing.
struct Job {
  const uint8_t *w;      // panel bytes of the block
  const int8_t *q;       // the first of 8 rows, in their chunks
  int64_t chunks, turns; // of 64 columns, and of 16 in each
  const int32_t *start;  // [8][48]
  const float *scale;    // [48]
  const float *factor;   // [8]
  float *sum;            // [8][48]
};

#define START(n) "vmovdqa64 64*" #n "(%[start]), %%zmm" #n "\n\t"
#define ROW(m, column, n0, n1, n2)                          \
  "vpbroadcastd 64*" #m "+" #column "(%[q]), %%zmm27\n\t"   \
  "vpdpbusd %%zmm27, %%zmm24, %%zmm" #n0 "\n\t"             \
  "vpdpbusd %%zmm27, %%zmm25, %%zmm" #n1 "\n\t"             \
  "vpdpbusd %%zmm27, %%zmm26, %%zmm" #n2 "\n\t"
#define STEP(column)                                                                                \
  "vmovdqa64 48*" #column "(%[w]), %%zmm24\n\t"                                                     \
  "vmovdqa64 48*" #column "+64(%[w]), %%zmm25\n\t"                                                  \
  "vmovdqa64 48*" #column "+128(%[w]), %%zmm26\n\t"                                                 \
  ROW(0, column, 0, 1, 2) ROW(1, column, 3, 4, 5) ROW(2, column, 6, 7, 8) ROW(3, column, 9, 10, 11) \
  ROW(4, column, 12, 13, 14) ROW(5, column, 15, 16, 17) ROW(6, column, 18, 19, 20)                  \
  ROW(7, column, 21, 22, 23)
#define JOIN(scale, n)                                        \
  "vmulps %%zmm" #scale ", %%zmm27, %%zmm28\n\t"              \
  "vcvtdq2ps %%zmm" #n ", %%zmm" #n "\n\t"                    \
  "vfmadd213ps 64*" #n "(%[sum]), %%zmm28, %%zmm" #n "\n\t"   \
  "vmovaps %%zmm" #n ", 64*" #n "(%[sum])\n\t"
#define JOIN_ROW(m, n0, n1, n2) \
  "vbroadcastss 4*" #m "(%[factor]), %%zmm27\n\t" JOIN(24, n0) JOIN(25, n1) JOIN(26, n2)
#define ALL(DO)                                                                                     \
  DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14)    \
  DO(15) DO(16) DO(17) DO(18) DO(19) DO(20) DO(21) DO(22) DO(23)
inline void multiply_block(const Job &job) {
  const uint8_t *w = job.w;
  const int8_t *q = job.q;
  int64_t chunks = job.chunks, left;
  asm volatile(ALL(START)
               "1:\n\t"
               "mov %[turns], %[left]\n\t"
               "2:\n\t"
               STEP(0) STEP(4) STEP(8) STEP(12)
               "add $16, %[q]\n\t"
               "add $768, %[w]\n\t"
               "dec %[left]\n\t"
               "jnz 2b\n\t"
               "add $1024 - 64, %[q]\n\t"
               "dec %[chunks]\n\t"
               "jnz 1b\n\t"
               "vmovaps (%[scale]), %%zmm24\n\t"
               "vmovaps 64(%[scale]), %%zmm25\n\t"
               "vmovaps 128(%[scale]), %%zmm26\n\t"
               JOIN_ROW(0, 0, 1, 2) JOIN_ROW(1, 3, 4, 5) JOIN_ROW(2, 6, 7, 8) JOIN_ROW(3, 9, 10, 11)
               JOIN_ROW(4, 12, 13, 14) JOIN_ROW(5, 15, 16, 17) JOIN_ROW(6, 18, 19, 20) JOIN_ROW(7, 21, 22, 23)
               : [w] "+r"(w), [q] "+r"(q), [chunks] "+r"(chunks), [left] "=&r"(left)
               : [turns] "r"(job.turns), [start] "r"(job.start), [scale] "r"(job.scale),
                 [factor] "r"(job.factor), [sum] "r"(job.sum)
               : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8",
                 "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18",
                 "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28");
}

struct Unit {
  explicit Unit(const oc_matrix &) {}

  template <bool vectors>
  static void chunk(const oc_matrix &w, const Panel &panel, const Quantized &a, int64_t rows, int64_t first,
                    int blocks, float *sum, Ahead &ahead) {
    alignas(64) int32_t start[step_rows][panel_rows];
    alignas(64) float factor[step_rows];
    const int64_t chunks = w.block < 64 ? 1 : w.block / 64, turns = w.block < 64 ? w.block / 16 : 4;
    for (int64_t row = 0; row < rows; row += step_rows) {
      ahead.some();
      for (int b = 0; b < blocks; b++) {
        for (int m = 0; m < step_rows; m++) {
          const int64_t at = (row + m) * a.blocks + first + b;
          factor[m] = a.scale[at];
          const Ints total = Lanes::ints(vectors ? -a.sum[at] : -a.sum[at] * panel.zero[b][0]);
          for (int t = 0; t < panel_tiles; t++) {
            const Ints zero = _mm512_load_si512(panel.zero[b] + t * tile_rows);
            _mm512_store_si512(start[m] + t * tile_rows, vectors ? Lanes::mul(zero, total) : total);
          }
        }
        multiply_block({panel.bytes + int64_t(b) * w.block * panel_rows, a.at(row, (first + b) * w.block), chunks,
                        turns, start[0], panel.scale[b], factor, sum + row * panel_rows});
      }
    }
  }

  // Where the sum of a row and a tile lies.
  static int64_t place(int64_t row, int tile) { return row * panel_rows + tile * tile_rows; }
};

#endif

// All rows times one panel; it comes a chunk at a time, so the sums wait in `sum` [rows][panel_rows].
void many(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int tiles, bool last, const Quantized &a,
          int64_t rows, float *y, int64_t stride, Panel &panel, float *sum) {
  Unpack *const unpack_tile = w.bits == 8   ? unpack<8>
                              : w.bits == 4 ? unpack<4>
                              : w.bits == 3 ? unpack<3>
                                            : unpack<2>;
  const int64_t per_chunk = chunk_columns / w.block, turns = (rows + step_rows - 1) / step_rows;
  if (!signed_panel) memset(sum, 0, size_t(turns * step_rows) * panel_rows * 4);
  for (int64_t first = 0; first < g.blocks; first += per_chunk) {
    const int blocks = int(g.blocks - first < per_chunk ? g.blocks - first : per_chunk);
    for (int t = 0; t < panel_tiles; t++)
      unpack_tile(w, g, tile + (t < tiles ? t * g.tile : 0), t, first, blocks, panel);
    // Behind the last chunk of a panel comes the first of the next one, if there is one.
    const bool same = first + per_chunk < g.blocks;
    const int64_t begin = same ? 0 : panel_tiles * g.tile;
    const int64_t bytes = per_chunk * g.block_codes, next = g.codes + (same ? first + per_chunk : 0) * g.block_codes;
    Ahead ahead = {{}, 0, last && !same ? 0 : bytes, to_lines((bytes + turns - 1) / turns)};
    for (int t = 0; t < panel_tiles; t++) ahead.tile[t] = tile + begin + (t < tiles ? t * g.tile : 0) + next;
    if (w.zero_point && (w.bits == 8 || !signed_panel))
      Unit::chunk<true>(w, panel, a, rows, first, blocks, sum, ahead);
    else
      Unit::chunk<false>(w, panel, a, rows, first, blocks, sum, ahead);
  }
  for (int64_t m = 0; m < rows; m++)
    for (int t = 0; t < tiles; t++)
      _mm512_storeu_ps(y + m * stride + t * 16, _mm512_load_ps(sum + Unit::place(m, t)));
}

#endif

// ------------------------------------------------------------------------------------------- table

int64_t tile_bytes(const oc_matrix &w) {
  return w.bits ? Geometry(w).tile : to_lines(w.columns * tile_rows * width_of(w.dtype));
}

template <int bits>
void multiply_tile(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Input &in, float *y,
                   int64_t stride) {
  if (w.exact) return exact<bits>(w, g, tile, in, y, stride);
  few<bits>(w, g, tile, *in.quantized, in.rows, y, stride);
}

void multiply(const oc_matrix &w, const Input &in, int64_t begin, int64_t end, float *y, int64_t stride,
              void *scratch) {
  const auto *const data = static_cast<const uint8_t *>(w.data);
  const int64_t bytes = tile_bytes(w);
  (void)scratch;
  if (!w.bits) {
    for (int64_t t = begin; t < end; t++) dense(w, data + t * bytes, in, y + t * tile_rows, stride);
    return;
  }
  const Geometry g(w);
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
  if (!w.exact && in.rows >= many_from) {
    auto &panel = *static_cast<Panel *>(scratch);
    auto *const sum = reinterpret_cast<float *>(&panel + 1);
    const Unit unit(w);
    for (int64_t t = begin; t < end; t += panel_tiles)
      many(w, g, data + t * bytes, int(end - t < panel_tiles ? end - t : panel_tiles), t + panel_tiles >= end, *in.quantized, in.rows, y + t * tile_rows, stride,
           panel, sum);
    return;
  }
#endif
  for (int64_t t = begin; t < end; t++) {
    const uint8_t *const tile = data + t * bytes;
    float *const out = y + t * tile_rows;
    if (w.bits == 8) multiply_tile<8>(w, g, tile, in, out, stride);
    if (w.bits == 4) multiply_tile<4>(w, g, tile, in, out, stride);
    if (w.bits == 3) multiply_tile<3>(w, g, tile, in, out, stride);
    if (w.bits == 2) multiply_tile<2>(w, g, tile, in, out, stride);
  }
}

int64_t scratch_bytes(const oc_matrix &w, int64_t rows) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
  if (w.bits && !w.exact && rows >= many_from)
    return int64_t(sizeof(Panel)) + to_lines((rows + step_rows) * panel_rows * 4);
#endif
  (void)w, (void)rows;
  return 0;
}

}  // namespace

namespace oc::matmul {

const Matmul OC_CLASS = {multiply, scratch_bytes};

}  // namespace oc::matmul
