// Codes as bytes, and the dense words that hold them: shared by kernels.cpp and layout.cpp. Everything
// has internal linkage; numbers.h says why.
#pragma once

#include "numbers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool fused = true;
#else
constexpr bool fused = false;
#endif

// Whether x * (1 / scale), made good once, rounds to the integer that x / scale rounds to, for x of 16 bits.
// With at most 11 significant bits each of x and of the scale, and 9 of an odd number of halves, a quotient
// that is not halfway between two integers is 2^-20 of itself away from there, and one that is comes out
// exactly. Underflow is far off.
inline bool by_inverse(float scale) {
  return fused && !(pattern(scale) & 0x1fff) && scale > 0x1p-100f && scale < 0x1p100f;
}

// Codes as bytes, each `shift` above its integer; divide(x) is about x / scale.
template <class T, class Divide>
void encode(const typename T::Stored *w, int count, const Grid &grid, uint32_t shift, uint8_t *code,
            const Divide &divide) {
  const float low = grid.low, high = grid.high;
  for (int i = 0; i < count; i++) {
    float x = divide(T::read(w[i]));
    x = x > low ? x : low;
    x = x < high ? x : high;
    code[i] = uint8_t(pattern(x + magic) + shift);
  }
}

#if defined(__AVX2__) && defined(__F16C__)
inline __m256 eight(Bf16, const void *w) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(w))), 16));
}

inline __m256 eight(Fp16, const void *w) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(w)));
}

// As many codes of `count` as come in whole 32s: clamped in 16 bits, where 16 of them fit a register.
template <class T>
int encode_by_inverse(const typename T::Stored *w, int count, const Grid &grid, uint32_t shift, uint8_t *code) {
  const __m256 scale = _mm256_set1_ps(grid.scale), inverse = _mm256_set1_ps(1 / grid.scale);
  const __m256i low = _mm256_set1_epi16(int16_t(grid.low)), high = _mm256_set1_epi16(int16_t(grid.high));
  const __m256i up = _mm256_set1_epi16(int16_t(shift));
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const auto integers = [&](int i) {
    const __m256 x = eight(T(), w + i), about = _mm256_mul_ps(x, inverse);
    return _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_fnmadd_ps(about, scale, x), inverse, about));
  };
  const auto clamped = [&](int i) {
    const __m256i x = _mm256_packs_epi32(integers(i), integers(i + 8));
    return _mm256_add_epi16(_mm256_min_epi16(_mm256_max_epi16(x, low), high), up);
  };
  for (int i = 0; i < (count & ~31); i += 32) {
    const __m256i bytes = _mm256_packus_epi16(clamped(i), clamped(i + 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(code + i), _mm256_permutevar8x32_epi32(bytes, in_order));
  }
  return count & ~31;
}
#else
template <class T>
int encode_by_inverse(const typename T::Stored *w, int count, const Grid &grid, uint32_t shift, uint8_t *code) {
  const float scale = grid.scale, inverse = 1 / scale;
  encode<T>(w, count, grid, shift, code, [=](float x) {
    const float about = x * inverse;
    return __builtin_fmaf(__builtin_fmaf(-about, scale, x), inverse, about);
  });
  return count;
}
#endif

template <class T>
void encode(const typename T::Stored *w, int count, const Grid &grid, uint32_t shift, uint8_t *code) {
  int done = 0;
  if constexpr (sizeof(typename T::Stored) == 2)
    if (by_inverse(grid.scale)) done = encode_by_inverse<T>(w, count, grid, shift, code);
  encode<T>(w + done, count - done, grid, shift, code + done, [=](float x) { return x / grid.scale; });
}

// Eight codes of one byte each become `bits` bytes: neighbours are joined, then pairs, then fours.
template <int bits>
uint64_t squeeze(const uint8_t *code) {
  constexpr uint64_t one = (1u << bits) - 1, two = (1u << 2 * bits) - 1, four = (1ull << 4 * bits) - 1;
  uint64_t x;
  memcpy(&x, code, 8);
  x = (x & one * 0x0001000100010001) | (x >> (8 - bits) & (one << bits) * 0x0001000100010001);
  x = (x & two * 0x0000000100000001) | (x >> (16 - 2 * bits) & (two << 2 * bits) * 0x0000000100000001);
  return (x & four) | (x >> (32 - 4 * bits) & four << 4 * bits);
}

// The way back.
template <int bits>
uint64_t spread(uint64_t x) {
  constexpr uint64_t one = (1u << bits) - 1, two = (1u << 2 * bits) - 1, four = (1ull << 4 * bits) - 1;
  x = (x & four) | (x & four << 4 * bits) << (32 - 4 * bits);
  x = (x & two * 0x0000000100000001) | (x & (two << 2 * bits) * 0x0000000100000001) << (16 - 2 * bits);
  return (x & one * 0x0001000100010001) | (x & (one << bits) * 0x0001000100010001) << (8 - bits);
}

// `count` is a multiple of eight.
template <int bits>
void pack_octets(const uint8_t *code, int count, uint8_t *out) {
  for (int i = 0; i < count / 8; i++) {
    const uint64_t x = squeeze<bits>(code + 8 * i);
    memcpy(out + bits * i, &x, bits);
  }
}

template <>
void pack_octets<4>(const uint8_t *code, int count, uint8_t *out) {
  for (int i = 0; i < count / 2; i++) {
    uint16_t pair;
    memcpy(&pair, code + 2 * i, 2);
    out[i] = uint8_t(pair | pair >> 4);
  }
}

template <int bits>
void unpack_octets(const uint8_t *in, int count, uint8_t *code) {
  for (int i = 0; i < count / 8; i++) {
    uint64_t x = 0;
    memcpy(&x, in + bits * i, bits);
    x = spread<bits>(x);
    memcpy(code + 8 * i, &x, 8);
  }
}

typedef void Octets(const uint8_t *in, int count, uint8_t *out);
constexpr Octets *packers[] = {pack_octets<2>, pack_octets<3>, pack_octets<4>, pack_octets<5>,
                               pack_octets<6>, pack_octets<7>, pack_octets<8>};
constexpr Octets *unpackers[] = {unpack_octets<2>, unpack_octets<3>, unpack_octets<4>, unpack_octets<5>,
                                 unpack_octets<6>, unpack_octets<7>, unpack_octets<8>};
constexpr int chunk = 256;

// A row takes whole words, but its last octet may have fewer than `bits` bytes of them.
inline int64_t bytes_of_row(int64_t columns, int bits) { return (columns * bits + 31) / 32 * 4; }

// Packs `count` codes into `out`, which has `room` bytes. make(first, count, code) writes codes as
// bytes that start at 0; only the last octet of a row is not whole.
template <class Make>
void pack_codes(int64_t count, int bits, uint8_t *out, int64_t room, const Make &make) {
  alignas(64) uint8_t code[chunk];
  Octets *const packer = packers[bits - 2];
  const int64_t whole = count & ~int64_t(7);
  for (int64_t i = 0; i < whole; i += chunk) {
    const int size = int(whole - i < chunk ? whole - i : chunk);
    make(i, size, code);
    packer(code, size, out + i / 8 * bits);
  }
  if (count == whole) return;
  uint8_t last[8] = {};
  memset(code, 0, 8);
  make(whole, int(count - whole), code);
  packer(code, 8, last);
  const int64_t left = room - whole / 8 * bits;
  memcpy(out + whole / 8 * bits, last, size_t(left < bits ? left : bits));
}

// Unpacks them again: take(first, count, code) is given codes as bytes that start at 0.
template <class Take>
void unpack_codes(int64_t count, int bits, const uint8_t *in, int64_t room, const Take &take) {
  alignas(64) uint8_t code[chunk];
  Octets *const unpacker = unpackers[bits - 2];
  const int64_t whole = count & ~int64_t(7);
  for (int64_t i = 0; i < whole; i += chunk) {
    const int size = int(whole - i < chunk ? whole - i : chunk);
    unpacker(in + i / 8 * bits, size, code);
    take(i, size, code);
  }
  if (count == whole) return;
  uint8_t last[8] = {};
  const int64_t left = room - whole / 8 * bits;
  memcpy(last, in + whole / 8 * bits, size_t(left < bits ? left : bits));
  unpacker(last, 8, code);
  take(whole, int(count - whole), code);
}

}  // namespace
