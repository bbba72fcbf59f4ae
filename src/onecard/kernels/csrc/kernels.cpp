// The kernels of one instruction-set class: this file is compiled once per class, with that class's
// flags and OC_CLASS set to the name of its table.
//
// Everything here has internal linkage; numbers.h says why.
//
// Loops over data are written so that compilers vectorize them without -ffast-math, which would break
// the promise that every class gives the same bits:
//   - the extremes of a group are found on the integer patterns, whose order is that of the magnitudes;
//   - rint(x) for |x| < 2^22 is x + 1.5 * 2^23, whose low bits then hold the integer;
//   - clamping to integers commutes with rint, so it comes first and NaN never reaches an integer.

#include "kernels.h"

#include "numbers.h"
#include "onecard.h"
#include "packing.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

using oc::Pack;
using oc::Peak;
using oc::RoundPack;
using oc::ToDense;

// ------------------------------------------------------------------------------- rounding, packing

template <class T>
int64_t count_not_finite(const typename T::Stored *w, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i++) found += (w[i] & T::infinity) == T::infinity;
  return found;
}

constexpr int64_t some = 64;  // groups of a row at a time: none waits for the scale of the one before it

template <class T>
int64_t round_rows(const RoundPack &job, int64_t begin, int64_t end) {
  const int64_t groups = job.columns / job.group, row_bytes = bytes_of_row(job.columns, job.bits);
  int64_t not_finite = 0;
  Extremes<T> seen[some];
  Grid grids[some];
  for (int64_t row = begin; row < end; row++) {
    const auto *row_weight = static_cast<const typename T::Stored *>(job.weight) + row * job.columns;
    uint8_t *out = reinterpret_cast<uint8_t *>(job.packed) + row * row_bytes;
    memset(out + row_bytes - 4, 0, 4);
    for (int64_t first = 0; first < groups; first += some) {
      const int64_t count = groups - first < some ? groups - first : some;
      const auto *const weight = row_weight + first * job.group;
      for (int64_t i = 0; i < count; i++) seen[i] = extremes<T>(weight + i * job.group, job.group);
      for (int64_t i = 0; i < count; i++) {
        const int64_t index = row * groups + first + i;
        if (!seen[i].finite()) continue;
        grids[i] = fit_grid(T::read(seen[i].below), T::read(seen[i].above), job.bits, job.zero,
                            job.scale_dtype);
        write_scale(job.scale, job.scale_dtype, index, grids[i].scale);
        if (job.zero) job.zero[index] = int8_t(grids[i].zero);
      }
      for (int64_t i = 0; i < count; i++) {
        const int64_t byte = (first + i) * job.group / 8 * job.bits;
        const auto *const w = weight + i * job.group;
        if (!seen[i].finite()) {
          not_finite += count_not_finite<T>(w, job.group);
          continue;
        }
        const uint32_t shift = uint32_t(int32_t(-grids[i].low));
        pack_codes(job.group, job.bits, out + byte, row_bytes - byte,
                   [&](int64_t at, int n, uint8_t *code) { encode<T>(w + at, n, grids[i], shift, code); });
      }
    }
  }
  return not_finite;
}

int64_t round_pack(const RoundPack &job, int64_t begin, int64_t end) {
  if (job.weight_dtype == OC_FP32) return round_rows<Fp32>(job, begin, end);
  if (job.weight_dtype == OC_FP16) return round_rows<Fp16>(job, begin, end);
  return round_rows<Bf16>(job, begin, end);
}

void pack(const Pack &job, int64_t begin, int64_t end) {
  const int64_t row_bytes = bytes_of_row(job.columns, job.bits);
  const uint8_t half = uint8_t(1 << (job.bits - 1));
  for (int64_t row = begin; row < end; row++) {
    const int8_t *const q = job.codes + row * job.columns;
    uint8_t *const out = reinterpret_cast<uint8_t *>(job.packed) + row * row_bytes;
    memset(out + row_bytes - 4, 0, 4);
    pack_codes(job.columns, job.bits, out, row_bytes, [=](int64_t first, int count, uint8_t *code) {
      for (int i = 0; i < count; i++) code[i] = uint8_t(uint8_t(q[first + i]) + half);
    });
  }
}

template <class T>
void dense_rows(const ToDense &job, int64_t begin, int64_t end) {
  const int64_t groups = job.columns / job.group, row_bytes = bytes_of_row(job.columns, job.bits);
  const float half = float(1 << (job.bits - 1));
  for (int64_t row = begin; row < end; row++) {
    const uint8_t *const in = reinterpret_cast<const uint8_t *>(job.packed) + row * row_bytes;
    for (int64_t group = 0; group < groups; group++) {
      const int64_t index = row * groups + group, byte = group * job.group / 8 * job.bits;
      const float scale = read_scale(job.scale, job.scale_dtype, index);
      const float zero = half + (job.zero ? job.zero[index] : 0);
      auto *const out =
          static_cast<typename T::Stored *>(job.dense) + row * job.columns + group * job.group;
      unpack_codes(job.group, job.bits, in + byte, row_bytes - byte,
                   [=](int64_t first, int count, const uint8_t *code) {
        for (int i = 0; i < count; i++) out[first + i] = T::round((code[i] - zero) * scale);
      });
    }
  }
}

void to_dense(const ToDense &job, int64_t begin, int64_t end) {
  if (job.dense_dtype == OC_FP32) return dense_rows<Fp32>(job, begin, end);
  if (job.dense_dtype == OC_FP16) return dense_rows<Fp16>(job, begin, end);
  return dense_rows<Bf16>(job, begin, end);
}

// --------------------------------------------------------------------------------------- bandwidth

uint64_t sum(const uint64_t *words, size_t count) {
  uint64_t lane[64] = {};
  for (size_t i = 0; i < count; i += 64)
    for (size_t j = 0; j < 64; j++) lane[j] += words[i + j];
  uint64_t total = 0;
  for (uint64_t x : lane) total += x;
  return total;
}

// ------------------------------------------------------------------------------------------- peaks

// A unit names a register, the multiply-adds of one step and the step itself. The empty asm makes an
// operand look changed, so that no part of a step is moved out of the loop.
#if defined(__aarch64__)
template <class V>
inline void touch(V &x) { asm volatile("" : "+w"(x)); }
#elif defined(__AVX512F__)
template <class V>
inline void touch(V &x) { asm volatile("" : "+v"(x)); }
#elif defined(__x86_64__)
template <class V>
inline void touch(V &x) { asm volatile("" : "+x"(x)); }
#else
template <class V>
inline void touch(V &x) { asm volatile("" : "+m"(x)); }
#endif

// A byte that makes a usual number in every dtype: 0.75 as a float, 63 as an integer.
constexpr int operand = 0x3f;

template <class Unit>
double run(int64_t turns) {
  typename Unit::Register sums[12] = {}, a, b;
  memset(&a, operand, sizeof a);
  memset(&b, operand, sizeof b);
  touch(a);
  touch(b);
  for (int64_t turn = 0; turn < turns; turn++) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) {
      Unit::step(sums[i], a, b);
      touch(sums[i]);
    }
  }
  return 2.0 * Unit::multiplies * 12 * double(turns);
}

typedef float floats __attribute__((vector_size(16)));
typedef uint32_t ints __attribute__((vector_size(16)));

#if defined(__AVX512F__)
struct Fp32Unit {
  typedef __m512 Register;
  static constexpr int multiplies = 16;
  static constexpr const char *name = "avx512 fma";
  static void step(__m512 &s, __m512 &a, __m512 &b) { s = _mm512_fmadd_ps(s, a, b); }
};
#elif defined(__FMA__)
struct Fp32Unit {
  typedef __m256 Register;
  static constexpr int multiplies = 8;
  static constexpr const char *name = "avx2 fma";
  static void step(__m256 &s, __m256 &a, __m256 &b) { s = _mm256_fmadd_ps(s, a, b); }
};
#elif defined(__ARM_NEON)
struct Fp32Unit {
  typedef float32x4_t Register;
  static constexpr int multiplies = 4;
  static constexpr const char *name = "neon fma";
  static void step(float32x4_t &s, float32x4_t &a, float32x4_t &b) { s = vfmaq_f32(s, a, b); }
};
#else
struct Fp32Unit {
  typedef floats Register;
  static constexpr int multiplies = 4;
  static constexpr const char *name = "multiply, add";
  static void step(floats &s, floats &a, floats &b) { s = s * a + b; }
};
#endif

#if defined(__AVX512VNNI__)
struct Int8Unit {
  typedef __m512i Register;
  static constexpr int multiplies = 64;
  static constexpr const char *name = "avx512 vpdpbusd";
  static void step(__m512i &s, __m512i &a, __m512i &b) { s = _mm512_dpbusd_epi32(s, a, b); }
};
#elif defined(__AVXVNNI__)
struct Int8Unit {
  typedef __m256i Register;
  static constexpr int multiplies = 32;
  static constexpr const char *name = "avx vpdpbusd";
  static void step(__m256i &s, __m256i &a, __m256i &b) { s = _mm256_dpbusd_avx_epi32(s, a, b); }
};
#elif defined(__AVX2__)
struct Int8Unit {
  typedef __m256i Register;
  static constexpr int multiplies = 32;
  static constexpr const char *name = "avx2 vpmaddubsw";
  static void step(__m256i &s, __m256i &a, __m256i &b) {
    touch(a);
    const __m256i pairs = _mm256_maddubs_epi16(a, b);
    s = _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#elif defined(__SSE2__)
struct Int8Unit {
  typedef __m128i Register;
  static constexpr int multiplies = 8;
  static constexpr const char *name = "sse2 pmaddwd";
  static void step(__m128i &s, __m128i &a, __m128i &b) {
    touch(a);
    s = _mm_add_epi32(s, _mm_madd_epi16(a, b));
  }
};
#elif defined(__ARM_FEATURE_DOTPROD)
struct Int8Unit {
  typedef int32x4_t Register;
  static constexpr int multiplies = 16;
  static constexpr const char *name = "neon sdot";
  static void step(int32x4_t &s, int32x4_t &a, int32x4_t &b) {
    s = vdotq_s32(s, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
  }
};
#elif defined(__ARM_NEON)
struct Int8Unit {
  typedef int32x4_t Register;
  static constexpr int multiplies = 8;
  static constexpr const char *name = "neon smull, sadalp";
  static void step(int32x4_t &s, int32x4_t &a, int32x4_t &b) {
    touch(a);
    const int8x16_t x = vreinterpretq_s8_s32(a), y = vreinterpretq_s8_s32(b);
    s = vpadalq_s16(s, vmull_s8(vget_low_s8(x), vget_low_s8(y)));
  }
};
#else
struct Int8Unit {
  typedef ints Register;
  static constexpr int multiplies = 4;
  static constexpr const char *name = "multiply, add";
  static void step(ints &s, ints &a, ints &b) {
    touch(a);
    s += a * b;
  }
};
#endif

// Codes of 4 bits by int8, where sums of pairs have room for more of them (unit_avx2.h).
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512VNNI__)
struct Int4Unit {
  typedef __m256i Register;
  static constexpr int multiplies = 32;
  static constexpr const char *name = "avx2 vpmaddubsw, vpaddw";
  static void step(__m256i &s, __m256i &a, __m256i &b) {
    touch(a);
    s = _mm256_add_epi16(s, _mm256_maddubs_epi16(a, b));
  }
};
#else
typedef Int8Unit Int4Unit;
#endif

#if defined(__AVX512BF16__)
struct Bf16Unit {
  typedef __m512 Register;
  static constexpr int multiplies = 32;
  static constexpr const char *name = "avx512 vdpbf16ps";
  static void step(__m512 &s, __m512 &a, __m512 &b) {
    s = _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b);
  }
};
#else
typedef Fp32Unit Bf16Unit;
#endif

template <class Unit>
constexpr Peak peak_of() {
  return {Unit::name, run<Unit>};
}

#if defined(__AMX_TILE__)
// Six sums, two operands: 16 rows of 64 bytes each, so one step is 16 x 16 x 64 bytes of operands.
struct Tiles {
  alignas(64) uint8_t config[64] = {1};
  alignas(64) uint8_t data[1024];
  Tiles() {
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    memset(data, operand, sizeof data);
    // gcc 12's tile loads do not say how much memory they read: without this the stores above vanish.
    asm volatile("" : : "r"(this) : "memory");
    _tile_loadconfig(config);
    _tile_loadd(6, data, 64);
    _tile_loadd(7, data, 64);
  }
  ~Tiles() { _tile_release(); }
};

double run_amx_int8(int64_t turns) {
  const Tiles tiles;
  for (int64_t turn = 0; turn < turns; turn++) {
    _tile_dpbssd(0, 6, 7);
    _tile_dpbssd(1, 6, 7);
    _tile_dpbssd(2, 6, 7);
    _tile_dpbssd(3, 6, 7);
    _tile_dpbssd(4, 6, 7);
    _tile_dpbssd(5, 6, 7);
  }
  return 2.0 * 16 * 16 * 64 * 6 * double(turns);
}

double run_amx_bf16(int64_t turns) {
  const Tiles tiles;
  for (int64_t turn = 0; turn < turns; turn++) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  return 2.0 * 16 * 16 * 32 * 6 * double(turns);
}

constexpr Peak bf16_peak = {"amx tdpbf16ps", run_amx_bf16}, int8_peak = {"amx tdpbssd", run_amx_int8},
               int4_peak = int8_peak;
#else
constexpr Peak bf16_peak = peak_of<Bf16Unit>(), int8_peak = peak_of<Int8Unit>(), int4_peak = peak_of<Int4Unit>();
#endif

}  // namespace

namespace oc {

const Kernels OC_CLASS = {sum,       peak_of<Fp32Unit>(), bf16_peak, int8_peak,
                          int4_peak, round_pack,          pack,      to_dense};

}  // namespace oc
