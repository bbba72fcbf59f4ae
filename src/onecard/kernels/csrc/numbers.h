// Number formats and integer grids, shared by the files that are compiled once per instruction-set
// class. Everything has internal linkage: a function shared between classes would be merged by the
// linker, which could put AVX-512 code into the plain class. For the same reason no header with
// inline code of its own is included.
#pragma once

#include <cstdint>
#include <cstring>

#include "onecard.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed words are little-endian");

namespace {

// ---------------------------------------------------------------------------------- number formats

typedef uint16_t unaligned16 __attribute__((aligned(1), may_alias));
typedef uint32_t unaligned32 __attribute__((aligned(1), may_alias));

inline uint32_t pattern(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float number(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

constexpr float magic = 0x1.8p23f;  // added to |x| < 2^22, it leaves rint(x) in the low bits

struct Fp32 {
  typedef unaligned32 Stored;
  typedef int32_t Signed;
  static constexpr Signed infinity = 0x7f800000, sign = INT32_MIN;
  static float read(uint32_t bits) { return number(bits); }
  static uint32_t round(float x) { return pattern(x); }
};

struct Bf16 {
  typedef unaligned16 Stored;
  typedef int16_t Signed;
  static constexpr Signed infinity = 0x7f80, sign = INT16_MIN;
  static float read(uint16_t bits) { return number(uint32_t(bits) << 16); }
  static uint16_t round(float x) {
    const uint32_t bits = pattern(x);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

// Infinity and NaN are not read or rounded faithfully: what needs them looks for them first.
struct Fp16 {
  typedef unaligned16 Stored;
  typedef int16_t Signed;
  static constexpr Signed infinity = 0x7c00, sign = INT16_MIN;
  static float read(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    const uint32_t normal = (rest << 13) + (112u << 23);
    const uint32_t tiny = pattern(float(int32_t(rest)) * 0x1p-24f);
    return number(sign | (rest < 0x0400 ? tiny : normal));
  }
  static uint16_t round(float x) {
    const uint32_t sign = pattern(x) >> 16 & 0x8000, bits = pattern(x) & 0x7fffffff;
    const uint32_t tiny = pattern(number(bits) + 0.5f) - pattern(0.5f);
    const uint32_t normal = (bits - (112u << 23) + 0x0fff + (bits >> 13 & 1)) >> 13;
    const uint32_t finite = bits < pattern(0x1p-14f) ? tiny : normal;
    return uint16_t(sign | (bits < pattern(0x1p16f) ? finite : uint32_t(infinity)));
  }
};

// ------------------------------------------------------------------------------------------- grids

// Scales are read and written one at a time, and may be infinite.
template <class T>
float scale_of(uint16_t bits) {
  return bits == uint16_t(T::infinity) ? __builtin_inff() : T::read(bits);
}

inline float read_scale(const void *scale, int dtype, int64_t index) {
  const auto *const narrow = static_cast<const unaligned16 *>(scale);
  if (dtype == OC_BF16) return scale_of<Bf16>(narrow[index]);
  if (dtype == OC_FP16) return scale_of<Fp16>(narrow[index]);
  return number(static_cast<const unaligned32 *>(scale)[index]);
}

inline void write_scale(void *scale, int dtype, int64_t index, float x) {
  auto *const narrow = static_cast<unaligned16 *>(scale);
  if (dtype == OC_BF16) narrow[index] = Bf16::round(x);
  if (dtype == OC_FP16) narrow[index] = Fp16::round(x);
  if (dtype == OC_FP32) static_cast<unaligned32 *>(scale)[index] = pattern(x);
}

// The value that is read back of a scale x >= 0 once its dtype has held it; 1 if nothing is left.
inline float stored_scale(int dtype, float x) {
  const float kept = dtype == OC_BF16   ? scale_of<Bf16>(Bf16::round(x))
                     : dtype == OC_FP16 ? scale_of<Fp16>(Fp16::round(x))
                                        : x;
  return kept < 0x1p-126f ? 1.0f : kept;
}

// An integer x in [low, high] stands for x * scale; its code is x + zero.
struct Grid {
  float scale, zero, low, high;
};

// The grid over [-below, above], both >= 0.
inline Grid fit_grid(float below, float above, int bits, bool zero_point, int scale_dtype) {
  const float top = float((1 << bits) - 1), half = float(1 << (bits - 1));
  if (!zero_point) {
    const float scale = stored_scale(scale_dtype, (above > below ? above : below) / (top * 0.5f));
    return {scale, 0, -half, half - 1};
  }
  const float scale = stored_scale(scale_dtype, (above + below) / top);
  float zero = below / scale - half;
  zero = zero > -half ? zero : -half;
  zero = zero < half - 1 ? zero : half - 1;
  zero = (zero + magic) - magic;
  return {scale, zero, -half - zero, half - 1 - zero};
}


// The patterns of the largest magnitudes above and below zero (0 where there are none).
template <class T>
struct Extremes {
  typename T::Signed above = 0, below = 0;

  void see(const typename T::Stored *w, int64_t count) {
    typedef typename T::Signed Signed;
    Signed up = above, down = below;
    for (int64_t i = 0; i < count; i++) {
      const Signed plus = Signed(w[i]), minus = Signed(w[i] ^ T::sign);
      up = plus > up ? plus : up;
      down = minus > down ? minus : down;
    }
    above = up;
    below = down;
  }

  bool finite() const { return above < T::infinity && below < T::infinity; }
};

template <class T>
Extremes<T> extremes(const typename T::Stored *w, int64_t count) {
  Extremes<T> seen;
  seen.see(w, count);
  return seen;
}

}  // namespace
