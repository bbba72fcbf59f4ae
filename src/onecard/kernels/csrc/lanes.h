// Vectors of a class for the rows of a tile of a matrix (onecard.h).
//
// `Lanes` holds the rows of a tile, or a part of them: Bytes has four columns of each, one quad; Ints
// and Floats one number of each. `look` takes bytes of the same 16, `where_same` is 0 where a and b differ.
// `high_bits` adds `value` where a bit is set, `flipped` adds 128 to each byte.
// `signed_bytes`: codes of 8 bits are multiplied as u - 128.
// `by_pairs`: products can be added two and two in 16 bits, `pairs_fit<bits>` quads of them, before they are widened.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "onecard.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

struct Lanes {
  static constexpr int count = 16;
  static constexpr bool signed_bytes = false, by_pairs = false;
  typedef __m512i Bytes;
  typedef __m512i Ints;
  typedef __m512 Floats;

  static Bytes load(const uint8_t *p) { return _mm512_loadu_si512(p); }
  template <int shift, int mask>
  static Bytes field(Bytes v) {
    return _mm512_and_si512(shift ? _mm512_srli_epi16(v, shift) : v, _mm512_set1_epi8(mask));
  }
  template <int value>
  static Bytes high_bits(Bytes low, const uint8_t *bits) {
    uint64_t mask;
    memcpy(&mask, bits, 8);
    return _mm512_mask_add_epi8(low, mask, low, _mm512_set1_epi8(value));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  static Bytes less(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
  static Bytes filled(uint8_t x) { return _mm512_set1_epi8(int8_t(x)); }
  static Bytes look(Bytes table, Bytes code) { return _mm512_shuffle_epi8(table, code); }
  static Bytes where_same(Bytes a, Bytes b, Bytes v) { return _mm512_maskz_mov_epi8(_mm512_cmpeq_epi8_mask(a, b), v); }
  static Bytes flipped(Bytes v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
  static void store(void *p, Bytes x) { _mm512_store_si512(p, x); }
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
  static Ints low_half(Ints x) { return _mm512_and_si512(x, ints(0xffff)); }
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
  template <int value>
  static Bytes high_bits(Bytes low, const uint8_t *bits) {
    int32_t mask;
    memcpy(&mask, bits, 4);
    const __m256i which = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                           2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(mask), which);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(value)));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  static Bytes less(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
  static Bytes filled(uint8_t x) { return _mm256_set1_epi8(int8_t(x)); }
  static Bytes look(Bytes table, Bytes code) { return _mm256_shuffle_epi8(table, code); }
  static Bytes where_same(Bytes a, Bytes b, Bytes v) { return _mm256_and_si256(_mm256_cmpeq_epi8(a, b), v); }
  static Bytes flipped(Bytes v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
  static void store(void *p, Bytes x) { _mm256_store_si256((__m256i *)p, x); }
  static __m256i quad_at(const int8_t *quad) {
    int32_t x;
    memcpy(&x, quad, 4);
    return _mm256_set1_epi32(x);
  }
#if defined(__AVXVNNI__)
  static constexpr bool by_pairs = false;
  template <int bits>
  static Ints dot_code(Ints sum, Bytes w, const int8_t *quad) {
    return _mm256_dpbusd_avx_epi32(sum, w, quad_at(quad));
  }
#else
  // Codes below 16 cannot overflow in 16 bits, those of 8 bits could, so these are taken as u - 128 and their sign
  // is moved to the input: 128 * 127 * 2 fits.
  static constexpr bool by_pairs = true;
  template <int bits>
  static constexpr int pairs_fit = 32767 / (((1 << bits) - 1) * 127 * 2);
  static Ints pairs(Bytes w, const int8_t *quad) { return _mm256_maddubs_epi16(w, quad_at(quad)); }
  static Ints add_pairs(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
  static Ints widened(Ints sum, Ints pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Ints dot_signed(Ints sum, Bytes s, const int8_t *quad) {
    return widened(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(quad_at(quad), s)));
  }
  template <int bits>
  static Ints dot_code(Ints sum, Bytes w, const int8_t *quad) {
    if constexpr (bits == 8) return dot_signed(sum, flipped(w), quad);
    return widened(sum, pairs(w, quad));
  }
#endif
  static Ints ints(int32_t x) { return _mm256_set1_epi32(x); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static Ints mul(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
  static Ints low_half(Ints x) { return _mm256_and_si256(x, ints(0xffff)); }
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
  static constexpr bool signed_bytes = true, by_pairs = false;
  typedef uint8x16_t Bytes;
  typedef int32x4_t Ints;
  typedef float32x4_t Floats;

  static Bytes load(const uint8_t *p) { return vld1q_u8(p); }
  template <int shift, int mask>
  static Bytes field(Bytes v) {
    if constexpr (shift) v = vshrq_n_u8(v, shift);
    return vandq_u8(v, vdupq_n_u8(mask));
  }
  template <int value>
  static Bytes high_bits(Bytes low, const uint8_t *bits) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t spread = vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1]));
    return vorrq_u8(low, vandq_u8(vtstq_u8(spread, bit), vdupq_n_u8(value)));
  }
  static Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
  static Bytes less(Bytes a, Bytes b) { return vsubq_u8(a, b); }
  static Bytes filled(uint8_t x) { return vdupq_n_u8(x); }
  static Bytes look(Bytes table, Bytes code) { return vqtbl1q_u8(table, code); }
  static Bytes where_same(Bytes a, Bytes b, Bytes v) { return vandq_u8(vceqq_u8(a, b), v); }
  static Bytes flipped(Bytes v) { return veorq_u8(v, vdupq_n_u8(128)); }
  static Ints dot_signed(Ints sum, Bytes s, const int8_t *quad) {
    int32_t x;
    memcpy(&x, quad, 4);
    return vdotq_s32(sum, vreinterpretq_s8_u8(s), vreinterpretq_s8_s32(vdupq_n_s32(x)));
  }
  template <int bits>
  static Ints dot_code(Ints sum, Bytes w, const int8_t *quad) {
    return dot_signed(sum, bits == 8 ? flipped(w) : w, quad);
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
  static constexpr bool signed_bytes = false, by_pairs = false;
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
  template <int value>
  static Bytes high_bits(Bytes low, const uint8_t *bits) {
    return each<Bytes>([&](int i) { return uint8_t(low.at[i] | (bits[i / 8] >> i % 8 & 1) * value); });
  }
  static Bytes either(Bytes a, Bytes b) {
    return each<Bytes>([&](int i) { return uint8_t(a.at[i] | b.at[i]); });
  }
  static Bytes less(Bytes a, Bytes b) {
    return each<Bytes>([&](int i) { return uint8_t(a.at[i] - b.at[i]); });
  }
  static Bytes filled(uint8_t x) {
    return each<Bytes>([&](int) { return x; });
  }
  static Bytes look(Bytes table, Bytes code) {
    return each<Bytes>([&](int i) { return table.at[code.at[i] & 15]; });
  }
  static Bytes where_same(Bytes a, Bytes b, Bytes v) {
    return each<Bytes>([&](int i) { return a.at[i] == b.at[i] ? v.at[i] : uint8_t(0); });
  }
  static Bytes flipped(Bytes v) {
    return each<Bytes>([&](int i) { return uint8_t(v.at[i] ^ 128); });
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

}  // namespace
