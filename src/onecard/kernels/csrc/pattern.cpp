// Integers of which at most two of four neighbouring columns are not zero in a row (onecard.h, OC_PATTERN).
//
// Nothing is expanded: each stored integer stands beside the place of its column, and the inputs are shuffled to the
// integers. Four bytes of a register hold what a row has in eight columns, so a line meets twice as many
// columns as one of dense integers does, for three instructions more.

#include "coded.h"

namespace {

struct Constant {
  alignas(64) uint8_t at[64];
};
template <class Make>
constexpr Constant constant(Make make) {
  Constant c{};
  for (int i = 0; i < 64; i++) c.at[i] = uint8_t(make(i));
  return c;
}
constexpr Constant second_four = constant([](int i) { return i & 2 ? 4 : 0; });
constexpr Constant columns_of_quad = constant([](int i) { return i & 3; });
template <int slot>
constexpr Constant all_slot = constant([](int i) { return i % 16 / 4 * 4 + slot; });

// The sum of (u - zero) * x over the slots of each row: add(u, x) for shuffled inputs x.
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
inline Bytes eight_inputs(const int8_t *q) {
  int64_t x;
  memcpy(&x, q, 8);
  return _mm512_set1_epi64(x);
}
inline Ints dot(Ints sum, Bytes u, Bytes x) { return _mm512_dpbusd_epi32(sum, u, x); }
#elif defined(__AVX2__)
inline Bytes eight_inputs(const int8_t *q) {
  int64_t x;
  memcpy(&x, q, 8);
  return _mm256_set1_epi64x(x);
}
#if defined(__AVXVNNI__)
inline Ints dot(Ints sum, Bytes u, Bytes x) { return _mm256_dpbusd_avx_epi32(sum, u, x); }
#endif
#endif

#if defined(__AVXVNNI__) || (defined(__AVX512BW__) && defined(__AVX512VNNI__))
template <int bits>
struct Slots {
  Ints sum = Lanes::ints(0), zeros = Lanes::ints(0);
  void add(Bytes u, Bytes x) {
    sum = dot(sum, u, x);
    zeros = dot(zeros, Lanes::filled(1 << (bits - 1)), x);
  }
  Ints total() const { return Lanes::sub(sum, zeros); }
};
#elif defined(__AVX2__)
template <int bits>
struct Slots {
  Ints sum = Lanes::ints(0);
  void add(Bytes u, Bytes x) {
    const __m256i s = Lanes::flipped(u);
    sum = Lanes::widened(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s)));
  }
  Ints total() const { return sum; }
};
// Sums of two fit in 16 bits for the 128 columns of a block: 16 * 2 * 8 * 127 < 2^15.
template <>
struct Slots<4> {
  Ints pairs = Lanes::ints(0);
  void add(Bytes u, Bytes x) {
    pairs = Lanes::add_pairs(pairs, _mm256_maddubs_epi16(u, x));
    pairs = _mm256_sub_epi16(pairs, _mm256_maddubs_epi16(_mm256_set1_epi8(8), x));
  }
  Ints total() const { return Lanes::widened(Lanes::ints(0), pairs); }
};
#elif defined(__ARM_FEATURE_DOTPROD)
inline Bytes eight_inputs(const int8_t *q) { return vreinterpretq_u8_s8(vcombine_s8(vld1_s8(q), vld1_s8(q))); }
template <int bits>
struct Slots {
  Ints sum = Lanes::ints(0);
  void add(Bytes u, Bytes x) {
    const uint8x16_t s = vsubq_u8(u, vdupq_n_u8(1 << (bits - 1)));
    sum = vdotq_s32(sum, vreinterpretq_s8_u8(s), vreinterpretq_s8_u8(x));
  }
  Ints total() const { return sum; }
};
#else
inline Bytes eight_inputs(const int8_t *q) {
  return Lanes::each<Bytes>([&](int i) { return uint8_t(q[i % 8]); });
}
template <int bits>
struct Slots {
  Ints sum = Lanes::ints(0);
  void add(const Bytes &u, const Bytes &x) {
    for (int i = 0; i < 16; i++) sum.at[i / 4] += (u.at[i] - (1 << (bits - 1))) * int8_t(x.at[i]);
  }
  Ints total() const { return sum; }
};
#endif

// A group of 32 columns: a line of places, then one of bytes for each eight columns, or one of halves for sixteen.
template <int bits>
struct Group {
  static constexpr int count = 1 + bits / 2;
  const uint8_t *lines;

  template <int i>
  static Bytes place_of(Bytes line) { return Lanes::field<2 * i, 3>(line); }
  inline Bytes place(int i, int part) const {
    const Bytes line = Lanes::load(lines + 4 * Lanes::count * part);
    return i == 0 ? place_of<0>(line) : i == 1 ? place_of<1>(line) : i == 2 ? place_of<2>(line) : place_of<3>(line);
  }
  inline Bytes value(int i, int part) const { return quad_of<bits>(lines + 64, i, part); }
  inline void call_ahead() const {
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
      __builtin_prefetch(lines + oc::reach.near + 64 * i);
      __builtin_prefetch(lines + oc::reach.far + 64 * i);
    }
  }
};

template <int bits, int rows>
void few_slots(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Quantized &a, int64_t first, float *y,
               int64_t stride) {
  const Bytes later = Lanes::load(second_four.at);
  for (int from = 0; from < parts; from += wide) {
    Floats sum[wide][rows];
    for (auto &part : sum)
      for (auto &s : part) s = Lanes::floats(0.0f);
    Group<bits> group{tile + g.codes};
    for (int64_t b = 0; b < g.blocks; b++) {
      const int8_t *const q = a.at(first, b * w.block);
      Slots<bits> slots[wide][rows];
      for (int k = 0; k < w.block; k += 32, group.lines += 64 * Group<bits>::count) {
        group.call_ahead();
        const int8_t *const inputs = q + k / 64 * Quantized::chunk + k % 64;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const int8_t *const eight = inputs + 8 * i;
          for (int p = 0; p < wide; p++) {
            const Bytes u = group.value(i, from + p), place = Lanes::either(group.place(i, from + p), later);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++)
              slots[p][m].add(u, Lanes::look(eight_inputs(eight + 64 * m), place));
          }
        }
      }
#pragma GCC unroll 2
      for (int p = 0; p < wide; p++) {
        const Floats scale = scale_of(w, g, tile, b, from + p);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
          const Floats factor = Lanes::mul(scale, Lanes::floats(a.scale[(first + m) * a.blocks + b]));
          sum[p][m] = Lanes::fma(Lanes::floats(slots[p][m].total()), factor, sum[p][m]);
        }
      }
    }
    for (int p = 0; p < wide; p++)
      for (int m = 0; m < rows; m++) Lanes::store(y + m * stride + (from + p) * Lanes::count, sum[p][m]);
  }
}

// For inputs that stay float32 and for panels, all four columns of each row (coded.h).
template <int bits>
class Paired {
 public:
  static constexpr int width = bits;

  Paired(const oc_matrix &, const Geometry &g, const uint8_t *tile, int part)
      : start_(tile + g.codes), next_(start_), step_(g.block_codes), part_(part) {}
  void seek(int64_t first) { next_ = start_ + first * step_; }
  inline void block() {
    block_ = next_;
    next_ += step_;
  }
  inline void group(int k) { group_.lines = block_ + k / 32 * 64 * Group<bits>::count; }
  inline Line quad(int j) const {
    Line u;
#pragma GCC unroll 2
    for (int p = 0; p < wide; p++)
      u.part[p] = j & 1 ? spread<2>(j / 2, part_ + p) : spread<0>(j / 2, part_ + p);
    return u;
  }

 private:
  // The integers of two slots in their columns, as far as they differ from zero.
  template <int slot>
  inline Bytes spread(int i, int part) const {
    const Bytes zero = Lanes::filled(1 << (bits - 1)), less = Lanes::filled(256 - (1 << (bits - 1)));
    const Bytes place = group_.place(i, part), u = Lanes::less(group_.value(i, part), zero);
    const Bytes columns = Lanes::load(columns_of_quad.at);
    const Bytes one = Lanes::load(all_slot<slot>.at), other = Lanes::load(all_slot<slot + 1>.at);
    const Bytes found = Lanes::either(Lanes::where_same(Lanes::look(place, one), columns, Lanes::look(u, one)),
                                      Lanes::where_same(Lanes::look(place, other), columns, Lanes::look(u, other)));
    return bits == 8 && Lanes::signed_bytes ? found : Lanes::less(found, less);
  }

  const uint8_t *start_, *next_, *block_ = nullptr;
  Group<bits> group_{nullptr};
  int64_t step_;
  int part_;
};

template <int bits>
void few_pairs(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Quantized &a, int64_t rows, float *y,
               int64_t stride) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) few_slots<bits, 4>(w, g, tile, a, m, y + m * stride, stride);
  for (; m + 2 <= rows; m += 2) few_slots<bits, 2>(w, g, tile, a, m, y + m * stride, stride);
  for (; m < rows; m++) few_slots<bits, 1>(w, g, tile, a, m, y + m * stride, stride);
}

}  // namespace

namespace oc::pattern {

void OC_CLASS(const oc_matrix &w, const Input &input, int64_t begin, int64_t end, float *y, int64_t stride,
              void *scratch) {
  Multiply *const multiply =
      w.bits == 8 ? multiply_coded<Paired<8>, few_pairs<8>> : multiply_coded<Paired<4>, few_pairs<4>>;
  multiply(w, input, begin, end, y, stride, scratch);
}

}  // namespace oc::pattern
