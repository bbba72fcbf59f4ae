// Integers of which many are zero (onecard.h, OC_SPARSE): a bit for each, and those that are not zero.
//
// A line of 64 bytes, four columns of sixteen rows, is made of a mask and of as many stored bytes as it has
// bits: one instruction where the processor expands bytes, elsewhere a shuffle for sixteen of them. What is
// absent becomes the zero point, so that the result has the bits of the same integers stored densely: stored
// bytes differ from the zero point by an exclusive or, and a shuffle gives 0 where nothing is. The stream is read
// once, from its beginning; only the count of bits says where the next line is.

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
// Which stored byte goes to each of sixteen places, from 128 on to one without any: the sum of an entry for the lower
// eight bits of a mask and of one for the upper ones.
struct Moves {
  alignas(16) uint8_t lower[256][16], upper[256][16];
};
constexpr Moves moves = [] {
  Moves m{};
  for (int mask = 0; mask < 256; mask++) {
    int next = 0;
    for (int bit = 0; bit < 8; bit++)
      m.lower[mask][bit] = m.upper[mask][8 + bit] = uint8_t(mask >> bit & 1 ? next++ : 128);
    for (int bit = 8; bit < 16; bit++) m.lower[mask][bit] = uint8_t(next);
  }
  return m;
}();

// Sixteen halves from number `first` on, the first of a byte in its lower half.
inline uint64_t halves_from(const uint8_t *from, int first) {
  uint64_t now, next;
  memcpy(&now, from + first / 2, 8);
  memcpy(&next, from + first / 2 + 1, 8);
  return first % 2 ? next << 4 | (now >> 4 & 15) : now;
}
#endif

#if defined(__AVX2__)
inline __m128i stored_bytes(const uint8_t *from, int first) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + first));
}
inline __m128i stored_halves(const uint8_t *from, int first) {
  const __m128i pairs = _mm_cvtsi64_si128(int64_t(halves_from(from, first))), low = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
}
inline __m256i moves_of(const uint8_t table[256][16], uint32_t mask) {
  const auto entry = [=](uint32_t eight) { return _mm_load_si128(reinterpret_cast<const __m128i *>(table[eight & 255])); };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(entry(mask)), entry(mask >> 16), 1);
}
// u of 32 places without the zero point, by exclusive or.
template <__m128i (*stored)(const uint8_t *, int)>
inline __m256i thirty_two(uint32_t mask, const uint8_t *from, int first, int zero) {
  const __m128i low = stored(from, first), high = stored(from, first + __builtin_popcount(mask & 0xffff));
  const __m256i found = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  const __m256i move = _mm256_add_epi8(moves_of(moves.lower, mask), moves_of(moves.upper, mask >> 8));
  return _mm256_shuffle_epi8(_mm256_xor_si256(found, _mm256_set1_epi8(int8_t(zero))), move);
}
template <__m128i (*stored)(const uint8_t *, int)>
inline Bytes spread(uint64_t mask, const uint8_t *from, int first, int zero) {
  const __m256i low = thirty_two<stored>(uint32_t(mask), from, first, zero);
#if defined(__AVX512F__)
  const int behind = first + __builtin_popcount(uint32_t(mask));
  const __m256i high = thirty_two<stored>(uint32_t(mask >> 32), from, behind, zero);
  return _mm512_xor_si512(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), _mm512_set1_epi8(int8_t(zero)));
#else
  return Lanes::signed_bytes && zero == 128 ? low : _mm256_xor_si256(low, _mm256_set1_epi8(int8_t(zero)));
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
  const uint8x16_t move = vaddq_u8(vld1q_u8(moves.lower[mask & 255]), vld1q_u8(moves.upper[mask >> 8 & 255]));
  const uint8x16_t own = vdupq_n_u8(uint8_t(zero)), found = vqtbl1q_u8(veorq_u8(stored(from, first), own), move);
  return zero == 128 ? found : veorq_u8(found, own);
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
  inline Line quad(int j) {
    uint64_t mask;
    memcpy(&mask, group_ + 8 * j, 8);
    const uint8_t *const from = values_;
    const int count = __builtin_popcountll(mask);
    values_ += bits == 8 ? count : (count + 1) / 2;
    Line u;
#pragma GCC unroll 2
    for (int p = 0; p < wide; p++) {
      const int part = wide == parts ? p : part_ + p;
      u.part[p] = bits == 8 ? expand(mask, from, 128, part) : expand_halves(mask, from, 8, part);
    }
    return u;
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
