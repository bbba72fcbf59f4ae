// Integers of which many are zero (onecard.h, OC_SPARSE): a bit for each, and those that are not zero.
//
// A line of 64 bytes, four columns of sixteen rows, is made of a mask and of as many stored bytes as it has
// bits: one instruction where the processor expands bytes, elsewhere a shuffle for sixteen of them. What is absent becomes the zero point, so that
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
constexpr int own_bytes = 4 * Lanes::count;  // of a line: the rows of a part

// The bits of a part, and how many stored bytes the parts before it have.
struct Share {
  uint64_t mask;
  int before;

  Share(uint64_t line, int part) : mask(line), before(0) {
    if constexpr (own_bytes < 64) {
      const int first = own_bytes * part;
      mask = line >> first;
      before = __builtin_popcountll(line & ((uint64_t(1) << first) - 1));
    }
  }
};

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
// For eight bits of a mask: which stored byte goes to each place, 128 to a place without one.
struct Moves {
  uint8_t at[256][8];
};
constexpr Moves moves = [] {
  Moves m{};
  for (int mask = 0; mask < 256; mask++)
    for (int bit = 0, next = 0; bit < 8; bit++) m.at[mask][bit] = uint8_t(mask >> bit & 1 ? next++ : 128);
  return m;
}();
#endif

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
// Sixteen halves from number `first` on, the first of a byte in its lower half.
inline uint64_t halves_from(const uint8_t *from, int first) {
  uint64_t now, next;
  memcpy(&now, from + first / 2, 8);
  memcpy(&next, from + first / 2 + 1, 8);
  return first % 2 ? next << 4 | (now >> 4 & 15) : now;
}
#endif

#if defined(__AVX2__)
inline __m128i placed(uint32_t mask, __m128i stored, __m128i zero) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(moves.at[mask & 255]));
  const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(moves.at[mask >> 8 & 255]));
  const __m128i behind = _mm_set1_epi8(int8_t(__builtin_popcount(mask & 255)));
  const __m128i move = _mm_unpacklo_epi64(low, _mm_add_epi8(high, behind));
  return _mm_blendv_epi8(_mm_shuffle_epi8(stored, move), zero, move);
}
inline __m128i stored_bytes(const uint8_t *from, int first) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + first));
}
inline __m128i stored_halves(const uint8_t *from, int first) {
  const __m128i pairs = _mm_cvtsi64_si128(int64_t(halves_from(from, first))), low = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
}
template <__m128i (*stored)(const uint8_t *, int)>
inline __m256i thirty_two(uint32_t mask, const uint8_t *from, int first, __m128i zero) {
  const __m128i low = placed(mask, stored(from, first), zero);
  const int behind = first + __builtin_popcount(mask & 0xffff);
  return _mm256_set_m128i(placed(mask >> 16, stored(from, behind), zero), low);
}
template <__m128i (*stored)(const uint8_t *, int)>
inline Bytes spread(uint64_t mask, const uint8_t *from, int first, int zero) {
  const __m128i absent = _mm_set1_epi8(int8_t(zero));
  const __m256i low = thirty_two<stored>(uint32_t(mask), from, first, absent);
#if defined(__AVX512F__)
  const int behind = first + __builtin_popcount(uint32_t(mask));
  const __m256i high = thirty_two<stored>(uint32_t(mask >> 32), from, behind, absent);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
  return low;
#endif
}
#elif defined(__ARM_FEATURE_DOTPROD)
inline uint8x16_t stored_bytes(const uint8_t *from, int first) { return vld1q_u8(from + first); }
inline uint8x16_t stored_halves(const uint8_t *from, int first) {
  const uint8x8_t pairs = vcreate_u8(halves_from(from, first));
  const uint8x8x2_t halves = vzip_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4));
  return vcombine_u8(halves.val[0], halves.val[1]);
}
template <uint8x16_t (*stored)(const uint8_t *, int)>
inline Bytes spread(uint64_t mask, const uint8_t *from, int first, int zero) {
  const uint8x8_t low = vld1_u8(moves.at[mask & 255]), high = vld1_u8(moves.at[mask >> 8 & 255]);
  const uint8x8_t behind = vdup_n_u8(uint8_t(__builtin_popcount(uint32_t(mask & 255))));
  const uint8x16_t move = vcombine_u8(low, vadd_u8(high, behind));
  const uint8x16_t absent = vcgeq_u8(move, vdupq_n_u8(128));
  return vbslq_u8(absent, vdupq_n_u8(uint8_t(zero)), vqtbl1q_u8(stored(from, first), move));
}
#else
inline uint8_t stored_bytes(const uint8_t *from, int at) { return from[at]; }
inline uint8_t stored_halves(const uint8_t *from, int at) { return from[at / 2] >> 4 * (at % 2) & 15; }
template <uint8_t (*stored)(const uint8_t *, int)>
inline Bytes spread(uint64_t mask, const uint8_t *from, int next, int zero) {
  uint8_t line[own_bytes];
  for (int i = 0; i < own_bytes; i++) {
    const int set = int(mask >> i & 1);
    line[i] = set ? stored(from, next) : uint8_t(zero);
    next += set;
  }
  return Lanes::load(line);
}
#endif

inline Bytes expand(uint64_t mask, const uint8_t *from, int zero, int part) {
  const Share share(mask, part);
  return spread<stored_bytes>(share.mask, from, share.before, zero);
}
inline Bytes expand_halves(uint64_t mask, const uint8_t *from, int zero, int part) {
  const Share share(mask, part);
  return spread<stored_halves>(share.mask, from, share.before, zero);
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
