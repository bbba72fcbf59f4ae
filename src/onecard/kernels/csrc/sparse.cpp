// Integers of which many are zero (onecard.h, OC_SPARSE): a bit for each, and those that are not zero.
//
// A line of 64 bytes, four columns of sixteen rows, is made of a mask and of as many stored bytes as it has
// bits: one instruction where the processor expands bytes. What is absent becomes the zero point, so that
// the result has the bits of the same integers stored densely. The stream is read once, from its beginning;
// only the count of bits says where the next line is.

#include "coded.h"

namespace {

#if defined(__AVX512VBMI2__)
inline Bytes expand(uint64_t mask, const uint8_t *from, int zero, int) {
  return _mm512_mask_expand_epi8(_mm512_set1_epi8(int8_t(zero)), mask, _mm512_loadu_si512(from));
}
inline Bytes expand_halves(uint64_t mask, const uint8_t *from, int zero, int) {
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
  const __m512i halves = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
  return _mm512_mask_expand_epi8(_mm512_set1_epi8(int8_t(zero)), mask, halves);
}
#else
// Byte after byte, and then the part of the line that is asked for.
inline Bytes expand(uint64_t mask, const uint8_t *from, int zero, int part) {
  alignas(64) uint8_t line[64];
  for (int i = 0; i < 64; i++) {
    const int set = int(mask >> i & 1);
    line[i] = set ? *from : uint8_t(zero);
    from += set;
  }
  return Lanes::load(line + 4 * Lanes::count * part);
}
inline Bytes expand_halves(uint64_t mask, const uint8_t *from, int zero, int part) {
  uint8_t halves[64];
  for (int i = 0; i < (__builtin_popcountll(mask) + 1) / 2; i++) {
    halves[2 * i] = from[i] & 15;
    halves[2 * i + 1] = from[i] >> 4;
  }
  return expand(mask, halves, zero, part);
}
#endif

template <int bits>
class Expanded {
 public:
  static constexpr int width = bits;

  Expanded(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int part)
      : marks_(tile + g.zeros), stream_(tile + g.codes), values_(stream_), masks_bytes_(2 * w.block),
        per_mark_(256 / w.block), part_(part) {}
  void seek(int64_t first) {
    uint32_t mark;
    memcpy(&mark, marks_ + first / per_mark_ * 4, 4);
    values_ = stream_ + mark;
  }
  inline void block() {
    masks_ = values_;
    values_ += masks_bytes_;
  }
  inline void group(int k) { group_ = masks_ + 2 * k; }
  inline void call_ahead() const {
#pragma GCC unroll 8
    for (int i = 0; i < bits / 2 + 1; i++) {
      __builtin_prefetch(values_ + oc::reach.near + 64 * i);
      __builtin_prefetch(values_ + oc::reach.far + 64 * i);
    }
  }
  inline Bytes quad(int j) {
    uint64_t mask;
    memcpy(&mask, group_ + 8 * j, 8);
    const uint8_t *const from = values_;
    const int count = __builtin_popcountll(mask);
    if constexpr (bits == 8) {
      values_ += count;
      return expand(mask, from, 128, part_);
    }
    values_ += (count + 1) / 2;
    return expand_halves(mask, from, 8, part_);
  }

 private:
  const uint8_t *marks_, *stream_, *values_, *masks_ = nullptr, *group_ = nullptr;
  int masks_bytes_, per_mark_, part_;
};

}  // namespace

namespace oc::sparse {

void OC_CLASS(const oc_matrix &w, const Input &input, int64_t begin, int64_t end, float *y, int64_t stride,
              void *scratch) {
  Multiply *const multiply = w.bits == 8 ? multiply_coded<Expanded<8>> : multiply_coded<Expanded<4>>;
  multiply(w, input, begin, end, y, stride, scratch);
}

}  // namespace oc::sparse
