// Weights that are entries of a table (onecard.h, OC_TABLE and OC_TABLES): codebooks, NF4, FP4, binary.
//
// A table of 16 bytes fits into a quarter of a register, and one shuffle looks up a register full of
// codes; that is all a codebook costs over plain integers of as many bits. Rows with tables of their own: 128
// bits of a line belong to four rows, so for four entries a shuffle serves them all, for eight it takes two and
// for sixteen four.

#include "coded.h"

namespace {

// Looks up where a mask of 16 bytes says so, elsewhere `other`.
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
template <int mask>
inline Bytes look_in(Bytes other, Bytes table, Bytes code) {
  return _mm512_mask_shuffle_epi8(other, uint64_t(mask) * 0x0001000100010001, table, code);
}
#elif defined(__AVX2__)
template <int mask>
inline Bytes look_in(Bytes other, Bytes table, Bytes code) {
  alignas(32) static constexpr auto where = [] {
    struct { uint8_t at[32]; } made = {};
    for (int i = 0; i < 32; i++) made.at[i] = mask >> i % 16 & 1 ? 255 : 0;
    return made;
  }();
  return _mm256_blendv_epi8(other, Lanes::look(table, code), Lanes::load(where.at));
}
#elif defined(__ARM_FEATURE_DOTPROD)
template <int mask>
inline Bytes look_in(Bytes other, Bytes table, Bytes code) {
  uint8x16_t where;
  for (int i = 0; i < 16; i++) where[i] = mask >> i & 1 ? 255 : 0;
  return vbslq_u8(where, Lanes::look(table, code), other);
}
#else
template <int mask>
inline Bytes look_in(const Bytes &other, const Bytes &table, const Bytes &code) {
  return Lanes::each<Bytes>([&](int i) { return mask >> i & 1 ? table.at[code.at[i] & 15] : other.at[i]; });
}
#endif

// Bits of a code that lie together; the others follow in planes, 2 bytes per column each.
template <int bits>
constexpr int low_bits = bits == 1 ? 0 : bits >= 5 ? 4 : bits;

// The codes of the columns 4 j .. 4 j + 3 of a group.
template <int bits>
inline Bytes codes_of(const uint8_t *low, const uint8_t *planes, int block, int j, int part) {
  constexpr int own = Lanes::count / 2;
  const uint8_t *const plane = planes + 8 * j + own * part;
  if constexpr (bits == 1) return Lanes::high_bits<1>(Lanes::field<0, 0>(Lanes::load(low)), plane);
  if constexpr (bits >= 2 && bits <= 4) return quad_of<bits>(low, j, part);
  if constexpr (bits >= 5) {
    const Bytes codes = Lanes::high_bits<16>(quad_of<4>(low, j, part), plane);
    if constexpr (bits == 5) return codes;
    return Lanes::high_bits<32>(codes, plane + 2 * block);
  }
}

// Where the entries of a byte's row begin among the 16 that a shuffle sees, with 4 and with 8 entries per row.
constexpr uint8_t first_entry[2][16] = {{0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12},
                                        {0, 0, 0, 0, 8, 8, 8, 8, 0, 0, 0, 0, 8, 8, 8, 8}};

template <int bits, bool own>
class Looked {
 public:
  static constexpr int width = 8, tables = own && bits > 2 ? 1 << (bits - 2) : 1;

  Looked(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int part)
      : start_(tile + g.codes), next_(start_), entries_(tile + g.zeros), step_(g.block_codes), block_(w.block),
        part_(part) {
    for (int p = 0; p < wide; p++)
      for (int t = 0; t < tables; t++) table_[p][t] = shown(entries_ + 64 * t + 4 * Lanes::count * (part + p));
    if constexpr (own && bits <= 3) {
      alignas(64) uint8_t line[64];
      for (int i = 0; i < 64; i++) line[i] = first_entry[bits == 3][i % 16];
      base_ = Lanes::load(line);
    }
  }
  void seek(int64_t first) { next_ = start_ + first * step_; }
  inline void block() {
    codes_ = next_;
    next_ += step_;
  }
  inline void group(int k) {
    ahead_ = codes_ + 2 * bits * k;
    low_ = codes_ + 2 * low_bits<bits> * k;
    planes_ = codes_ + 2 * low_bits<bits> * block_ + 2 * k;
  }
  inline void call_ahead() const {
#pragma GCC unroll 8
    for (int i = 0; i < bits; i++) {
      __builtin_prefetch(ahead_ + oc::reach.near + 64 * i);
      __builtin_prefetch(ahead_ + oc::reach.far + 64 * i);
    }
  }
  inline Line quad(int j) const {
    Line u;
#pragma GCC unroll 2
    for (int p = 0; p < wide; p++) u.part[p] = looked(codes_of<bits>(low_, planes_, block_, j, part_ + p), table_[p]);
    return u;
  }

 private:
  static Bytes shown(const uint8_t *entries) {
    const Bytes u = Lanes::load(entries);
    return Lanes::signed_bytes ? Lanes::flipped(u) : u;
  }
  inline Bytes looked(Bytes code, const Bytes *table) const {
    if constexpr (bits >= 5) return Lanes::signed_bytes ? Lanes::flipped(look_far(code)) : look_far(code);
    if constexpr (own && bits <= 3) code = Lanes::either(code, base_);
    Bytes u = Lanes::look(table[0], code);
    if constexpr (tables == 2) u = look_in<0xff00>(u, table[1], code);
    if constexpr (tables == 4) {
      u = look_in<0x00f0>(u, table[1], code);
      u = look_in<0x0f00>(u, table[2], code);
      u = look_in<0xf000>(u, table[3], code);
    }
    return u;
  }
#if defined(__AVX512BW__)
  inline __m512i sixteen_entries(int t) const {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(entries_ + 16 * t)));
  }
#elif defined(__AVX2__)
  inline __m256i sixteen_entries(int t) const {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(entries_ + 16 * t)));
  }
#endif
  // In all 64 bytes of the table.
  inline Bytes look_far(Bytes code) const {
#if defined(__AVX512VBMI__)
    return _mm512_permutexvar_epi8(code, table_[0][0]);
#elif defined(__AVX512BW__)
    const __m512i sixteenth = _mm512_and_si512(_mm512_srli_epi16(code, 4), _mm512_set1_epi8(3));
    __m512i u = _mm512_shuffle_epi8(sixteen_entries(0), code);
    for (int t = 1; t < 1 << (bits - 4); t++)
      u = _mm512_mask_shuffle_epi8(u, _mm512_cmpeq_epi8_mask(sixteenth, _mm512_set1_epi8(int8_t(t))), sixteen_entries(t),
                                   code);
    return u;
#elif defined(__AVX2__)
    const auto either = [=](int t) {  // of two sixteenths, by the highest bit of a byte: bit 4 moved there
      return _mm256_blendv_epi8(_mm256_shuffle_epi8(sixteen_entries(t), code),
                                _mm256_shuffle_epi8(sixteen_entries(t + 1), code), _mm256_slli_epi16(code, 3));
    };
    if constexpr (bits == 5) return either(0);
    return _mm256_blendv_epi8(either(0), either(2), _mm256_slli_epi16(code, 2));
#elif defined(__ARM_FEATURE_DOTPROD)
    return vqtbl4q_u8(vld1q_u8_x4(entries_), code);
#else
    alignas(64) uint8_t c[64];
    memcpy(c, &code, sizeof code);
    for (int i = 0; i < 4 * Lanes::count; i++) c[i] = entries_[c[i]];
    return Lanes::load(c);
#endif
  }

  const uint8_t *start_, *next_, *codes_ = nullptr, *ahead_ = nullptr, *low_ = nullptr, *planes_ = nullptr;
  const uint8_t *entries_;
  int64_t step_;
  int block_, part_;
  Bytes table_[wide][tables], base_;
};

}  // namespace

namespace oc::table {

void OC_CLASS(const oc_matrix &w, const Input &input, int64_t begin, int64_t end, float *y, int64_t stride,
              void *scratch) {
  const bool own = w.kind == OC_TABLES;
  Multiply *const multiply = w.bits == 1   ? own ? multiply_coded<Looked<1, true>> : multiply_coded<Looked<1, false>>
                             : w.bits == 2 ? own ? multiply_coded<Looked<2, true>> : multiply_coded<Looked<2, false>>
                             : w.bits == 3 ? own ? multiply_coded<Looked<3, true>> : multiply_coded<Looked<3, false>>
                             : w.bits == 4 ? own ? multiply_coded<Looked<4, true>> : multiply_coded<Looked<4, false>>
                             : w.bits == 5 ? multiply_coded<Looked<5, false>>
                                           : multiply_coded<Looked<6, false>>;
  multiply(w, input, begin, end, y, stride, scratch);
}

}  // namespace oc::table
