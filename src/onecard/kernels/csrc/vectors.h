// Vectors of float32 as wide as the registers of a class, and the functions of them that attention needs.
// Like everything that is compiled once per class, with internal linkage (numbers.h says why).
#pragma once

#include "numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// clang before 16 spells it without the second underscore.
#if defined(__AMX_BF16__) || defined(__AMXBF16__)
#define OC_TILES
#endif

namespace {

constexpr float log2_e = 0x1.715476p0f;

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif
typedef float floats __attribute__((vector_size(4 * width)));
typedef int32_t ints __attribute__((vector_size(4 * width)));
typedef uint32_t words __attribute__((vector_size(4 * width)));
typedef int16_t shorts __attribute__((vector_size(2 * width)));
typedef uint16_t halves __attribute__((vector_size(2 * width)));
typedef uint8_t bytes __attribute__((vector_size(width)));

template <class V>
inline V take(const void *from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline floats load(const float *from) { return take<floats>(from); }
inline void give(float *to, floats x) { memcpy(to, &x, sizeof x); }
inline floats splat(float x) { return x - floats{}; }
inline floats floats_of(words x) { return (floats)x; }

#if defined(__AVX512F__)
inline floats fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
inline floats widen_fp16(halves x) { return _mm512_maskz_cvtph_ps(0xffff, (__m256i)x); }
#elif defined(__AVX2__)
inline floats fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
inline floats widen_fp16(halves x) { return _mm256_cvtph_ps((__m128i)x); }
#elif defined(__ARM_NEON)
inline floats fma(floats a, floats b, floats c) {
  return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline floats widen_fp16(halves x) { return (floats)vcvt_f32_f16((float16x4_t)x); }
#else
inline floats fma(floats a, floats b, floats c) { return a * b + c; }
inline floats widen_fp16(halves x) {  // NaN included, unlike Fp16::read
  const words bits = __builtin_convertvector(x, words);
  const words sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  const words special = (words)(rest >= 0x7c00) & (112u << 23);
  const floats tiny = __builtin_convertvector((ints)rest, floats) * 0x1p-24f;
  const words normal = (rest << 13) + (112u << 23) + special;
  const words is_tiny = (words)(rest < 0x0400);
  return floats_of(sign | (is_tiny & (words)tiny) | (~is_tiny & normal));
}
#endif

inline ints iota() {
  ints x;
  for (int i = 0; i < width; i++) x[i] = i;
  return x;
}

// The other half of a vector's lanes, and the other halves of those: folding takes log2(width) steps.
#if defined(__AVX512F__)
template <int half>
inline floats other(floats x) {
  if (half == 8) return _mm512_maskz_shuffle_f32x4(0xffff, x, x, 0x4e);
  if (half == 4) return _mm512_maskz_shuffle_f32x4(0xffff, x, x, 0xb1);
  if (half == 2) return _mm512_maskz_permute_ps(0xffff, x, 0x4e);
  return _mm512_maskz_permute_ps(0xffff, x, 0xb1);
}
#else
template <int half>
inline floats other(floats x) {
  floats y = x;
  for (int i = 0; i < half; i++) y[i] = x[i + half];
  return y;
}
#endif

template <int half = width / 2>
inline float fold_sum(floats x) {
  x += other<half>(x);
  if constexpr (half > 1) return fold_sum<half / 2>(x);
  return x[0];
}

template <int half = width / 2>
inline float fold_max(floats x) {
  const floats y = other<half>(x);
  x = y > x ? y : x;
  if constexpr (half > 1) return fold_max<half / 2>(x);
  return x[0];
}

// 2^t for t <= 1 within 2 ulp; 0 below 2^-100, where no sum can tell, and for -infinity; NaN for NaN.
inline floats exp2(floats t) {
  constexpr float least = -100;
#if defined(__AVX512F__)
  const floats part = t - _mm512_roundscale_ps(t, 0x01);  // (vreduceps rounds in its own way)
#else
  const floats low = t < least ? splat(least) : t;
  const floats near = (low + magic) - magic;
  const floats down = near - floats_of((words)(near > low) & (words)splat(1));
  const floats part = low - down;
#endif
  floats y = splat(0x1.e974fcp-10f);
  y = fma(y, part, splat(0x1.277854p-7f));
  y = fma(y, part, splat(0x1.c91ce6p-5f));
  y = fma(y, part, splat(0x1.ebdb56p-3f));
  y = fma(y, part, splat(0x1.62e4bap-1f));
  y = fma(y, part, splat(1));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, splat(least), _CMP_NLT_UQ), y, t);
#else
  const words scaled = (words)y + ((words)(down + magic) << 23);
  return floats_of((scaled & ~(words)(t < least)) | (words)(t != t));
#endif
}

#if defined(OC_TILES)
// 2^t for what is rounded to bf16 next: within 2^-13.
inline floats exp2_coarse(floats t) {
  const floats part = _mm512_reduce_ps(t, 0x01);
  floats y = splat(0x1.3baaaap-4f);
  y = fma(y, part, splat(0x1.d23788p-3f));
  y = fma(y, part, splat(0x1.63e65ap-1f));
  y = fma(y, part, splat(1));
  return _mm512_maskz_scalef_ps(0xffff, y, t);
}
#endif

// Within a few ulp; NaN for NaN.
inline floats tanh(floats x) {
  const words sign = (words)x & 0x80000000;
  const floats a = floats_of((words)x & 0x7fffffff), square = a * a;
  const floats e = exp2(a * (-2 * log2_e)), large = (1 - e) / (1 + e);
  floats p = splat(-0x1.b3a652p-8f);
  p = fma(p, square, splat(0x1.5cf24p-6f));
  p = fma(p, square, splat(-0x1.b98accp-5f));
  p = fma(p, square, splat(0x1.110f22p-3f));
  p = fma(p, square, splat(-0x1.555552p-2f));
  const floats small = fma(a * square, p, a);
  const floats y = a < 0.5f ? small : large;
  return floats_of((words)y | sign);
}

}  // namespace
