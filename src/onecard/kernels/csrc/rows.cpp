// What is done to one row at a time, for one instruction-set class: norms, activations, rotations, the
// rounding of inputs, and the heavy loops of the sampler. Compiled once per class like kernels.cpp.
//
// A row is worked on in registers of `width` numbers. Sums have 16 lanes whatever the register is, one
// for each column modulo 16; lanes past the end of a row keep the sum they have, and in the end halves
// are added to halves. So the order of a sum is told by the length of its row alone.
//
// exp, tanh, sin and cos are reductions to a small interval and minimax polynomials there (Remez, the
// largest error beside each). Where a register may hold NaN, `a > b ? b : a` is written so that NaN stays.

#include "engine.h"
#include "numbers.h"
#include "onecard.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using oc::Quantized;
using oc::Rounding;

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
typedef float half_floats __attribute__((vector_size(2 * width)));
typedef double doubles __attribute__((vector_size(4 * width)));
typedef int64_t longs __attribute__((vector_size(4 * width)));

constexpr int lanes = 16, parts = lanes / width;

inline floats load(const float *from) {
  floats x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float *to, floats x) { memcpy(to, &x, sizeof x); }

inline floats all(float x) { return x + floats{}; }

#if defined(__AVX512F__)
inline floats fma(floats a, floats b, floats c) { return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline doubles fma(doubles a, doubles b, doubles c) {
  return (doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
inline floats fma(floats a, floats b, floats c) { return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline doubles fma(doubles a, doubles b, doubles c) {
  return (doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
inline floats fma(floats a, floats b, floats c) {
  return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline doubles fma(doubles a, doubles b, doubles c) {
  return (doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
inline floats fma(floats a, floats b, floats c) { return a * b + c; }
inline doubles fma(doubles a, doubles b, doubles c) { return a * b + c; }
#endif

// c[0] + c[1] x + c[2] x^2 ...
template <class V, class T, int count>
inline V polynomial(V x, const T (&c)[count]) {
  V y = c[count - 1] + V{};
#pragma GCC unroll 16
  for (int i = count - 2; i >= 0; i--) y = fma(y, x, c[i] + V{});
  return y;
}

// --------------------------------------------------------------------------------------- functions

constexpr double log2_e = 1.4426950408889634;

// e^r - 1 - r over r^2 for |r| <= log(2) / 2, to 3.1e-9 of e^r.
constexpr float exp_terms[] = {0.49999993458372f, 0.16666520651580f, 0.041668384385108f, 0.0083687144625919f,
                               0.0013814861008306f};

// x 2^n, rounded once.
inline floats times_power(floats x, floats n) {
#if defined(__AVX512F__)
  return (floats)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
#else
  const ints whole = __builtin_convertvector(n, ints), half = whole >> 1;
  return x * (floats)((half + 127) << 23) * (floats)((whole - half + 127) << 23);
#endif
}

inline floats exp(floats x) {
  x = x > 89.0f ? all(89.0f) : x;
  x = x < -104.0f ? all(-104.0f) : x;
  const floats n = fma(x, all(float(log2_e)), all(magic)) - magic;
  // The first part of log 2 has 10 bits, so that n times it is exact.
  const floats r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
  return times_power(fma(polynomial(r, exp_terms), r * r, r) + 1.0f, n);
}

// tanh(x) / x - 1 over x^2, in powers of x^2 up to 0.625^2, to 4.2e-9.
constexpr float tanh_terms[] = {-0.33333283925000f, 0.13331491276703f, -0.053743497244601f, 0.020650584808500f,
                                -0.0057170425498680f};
constexpr uint32_t sign_bit = 0x80000000;

inline floats magnitude(floats x) { return (floats)((words)x & ~sign_bit); }

inline floats tanh(floats x) {
  const floats size = magnitude(x), square = size * size;
  const floats small = fma(polynomial(square, tanh_terms) * square, size, size);
  const floats large = 1.0f - 2.0f / (exp(2.0f * size) + 1.0f);
  const floats y = size < 0.625f ? small : large;
  return (floats)((words)y | ((words)x & sign_bit));
}

inline floats silu(floats x) { return x / (exp(-x) + 1.0f); }

inline floats relu(floats x) { return x < 0.0f ? floats{} : x; }

// x / 2 (1 + tanh(u)) = x / (1 + e^(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)
inline floats gelu_tanh(floats x) {
  const floats u = fma(x * x, all(-2 * 0.7978845608f * 0.044715f), all(-2 * 0.7978845608f)) * x;
  return x / (exp(u) + 1.0f);
}

// -log(erfc(t / sqrt 2)) / t for t up to 6, so that half of x times erfc is right to 2e-8; a straight line
// goes on from there.
constexpr float tail_terms[] = {0.79788575871980f,    0.31829639658777f,    0.036386769970922f,    -0.0048738435392521f,
                                5.0421458254225e-05f, 1.6849438996457e-04f, -4.5365092256747e-05f, 6.2522001820902e-06f,
                                -4.6618585604729e-07f, 1.4840567988358e-08f};

// x Phi(x), where Phi is a half erfc of -x / sqrt 2.
inline floats gelu(floats x) {
  const floats t = magnitude(x), near = t > 6.0f ? all(6.0f) : t;
  const floats tail = 0.5f * exp(fma(t - near, all(-6.16f), -near * polynomial(near, tail_terms)));
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// For x <= 0. e^r - 1 - r over r^2 to 3.7e-18 of e^r.
constexpr double fine_exp_terms[] = {0.50000000000000106,     0.16666666666666413,     0.041666666666530179,
                                     0.0083333333334939566,   0.0013888888943629300,   1.9841269508284205e-4,
                                     2.4801493097688779e-5,   2.7557584424374026e-6,   2.7630249161690731e-7,
                                     2.5000786674630472e-8};
constexpr double fine_magic = 0x1.8p52;

inline doubles exp(doubles x) {
  x = x < -746.0 ? -746.0 + doubles{} : x;
  const doubles shifted = fma(x, log2_e + doubles{}, fine_magic + doubles{}), n = shifted - fine_magic;
  const doubles r = fma(n, -1.90821492927058770e-10 + doubles{}, fma(n, -6.93147180369123816e-01 + doubles{}, x));
  const doubles y = fma(polynomial(r, fine_exp_terms), r * r, r) + 1.0;
  // 2^(n + 100) is a normal number for every n from -1076 to 0; what is rounded is the product.
  const doubles power = (doubles)((longs)(shifted + 1123.0) << 52);
  return y * power * 0x1p-100;
}

// ----------------------------------------------------------------------------------- loops over rows

// The first `count` < width numbers, then zeros.
inline floats load_some(const float *from, int64_t count) {
  float some[width] = {};
  memcpy(some, from, size_t(count) * 4);
  return load(some);
}

inline void store_some(float *to, floats x, int64_t count) { memcpy(to, &x, size_t(count) * 4); }

// y[i] = f(x[i])
template <class F>
inline void map(const float *x, int64_t count, float *y, F f) {
  const int64_t whole = count - count % width;
  for (int64_t i = 0; i < whole; i += width) store(y + i, f(load(x + i)));
  if (whole < count) store_some(y + whole, f(load_some(x + whole, count - whole)), count - whole);
}

// y[i] = f(a[i], b[i])
template <class F>
inline void map(const float *a, const float *b, int64_t count, float *y, F f) {
  const int64_t whole = count - count % width, rest = count - whole;
  for (int64_t i = 0; i < whole; i += width) store(y + i, f(load(a + i), load(b + i)));
  if (rest) store_some(y + whole, f(load_some(a + whole, rest), load_some(b + whole, rest)), rest);
}

// 16 lanes that begin as `lane`; each takes in the numbers of its columns with f(lane, x).
struct Lanes {
  floats part[parts];

  explicit Lanes(float start) {
    for (floats &lane : part) lane = all(start);
  }

  template <class F>
  inline void take(const float *x, F f) {
    for (int p = 0; p < parts; p++) part[p] = f(part[p], load(x + width * p));
  }

  template <class F>
  inline void take_row(const float *x, int64_t count, F f) {
    const int64_t whole = count - count % lanes;
    for (int64_t i = 0; i < whole; i += lanes) take(x + i, f);
    if (whole == count) return;
    float some[lanes] = {};
    memcpy(some, x + whole, size_t(count - whole) * 4);
    Lanes last = *this;
    last.take(some, f);
    memcpy(part, last.part, size_t(count - whole) * 4);
  }

  template <class F>
  inline float fold(F f) const {
    float lane[lanes];
    memcpy(lane, part, sizeof lane);
    for (int half = lanes / 2; half; half /= 2)
      for (int i = 0; i < half; i++) lane[i] = f(lane[i], lane[i + half]);
    return lane[0];
  }

  float sum() const {
    return fold([](float a, float b) { return a + b; });
  }
};

template <class F>
inline float sum(const float *x, int64_t count, F f) {
  Lanes lane(0);
  lane.take_row(x, count, f);
  return lane.sum();
}

// NaN is passed over.
inline float largest(const float *x, int64_t count) {
  Lanes lane(-__builtin_inff());
  lane.take_row(x, count, [](floats most, floats x) { return x > most ? x : most; });
  return lane.fold([](float a, float b) { return a > b ? a : b; });
}

// ------------------------------------------------------------------------------------------- kernels

template <class T>
void widen(const void *table, int64_t first, int64_t width, float scale, float *out) {
  const auto *const row = static_cast<const typename T::Stored *>(table) + first;
  for (int64_t i = 0; i < width; i++) out[i] = T::read(row[i]) * scale;
}

// Fp16 with its infinities and NaN.
struct WholeFp16 : Fp16 {
  static float read(uint16_t bits) {
    const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 112u << 23 : 0;
    return number(pattern(Fp16::read(bits)) + special);
  }
};

void gather(const void *table, int dtype, int64_t id, int64_t width, float scale, float *out) {
  if (dtype == OC_FP32) widen<Fp32>(table, id * width, width, scale, out);
  if (dtype == OC_FP16) widen<WholeFp16>(table, id * width, width, scale, out);
  if (dtype == OC_BF16) widen<Bf16>(table, id * width, width, scale, out);
}

void norm(const oc_norm &norm, const float *x, int64_t width, float *y) {
  float mean = 0;
  if (norm.kind == OC_LAYER)
    mean = sum(x, width, [](floats sum, floats x) { return sum + x; }) / float(width);
  const float squares = sum(x, width, [mean](floats sum, floats x) { return fma(x - mean, x - mean, sum); });
  const float factor = 1.0f / __builtin_sqrtf(squares / float(width) + norm.eps);
  map(x, norm.weight, width, y, [mean, factor](floats x, floats w) { return (x - mean) * factor * w; });
  if (norm.bias) map(y, norm.bias, width, y, [](floats y, floats bias) { return y + bias; });
}

// Halves of a register, down to one number. Only for what does not depend on the order.
#if defined(__AVX512F__)
typedef int32_t ints8 __attribute__((vector_size(32)));
#endif
typedef int32_t ints4 __attribute__((vector_size(16)));

template <class F>
inline int32_t fold(ints x, F f) {
#if defined(__AVX512F__)
  // With masks, for gcc 12 takes what the plain ones leave undefined for a mistake of ours.
  const ints8 y = f((ints8)_mm512_maskz_extracti64x4_epi64(0xff, (__m512i)x, 0),
                    (ints8)_mm512_maskz_extracti64x4_epi64(0xff, (__m512i)x, 1));
#else
  const ints y = x;
#endif
#if defined(__AVX2__)
  ints4 z = f((ints4)_mm256_castsi256_si128((__m256i)y), (ints4)_mm256_extracti128_si256((__m256i)y, 1));
#else
  ints4 z = y;
#endif
#if defined(__SSE2__)
  z = f(z, (ints4)_mm_shuffle_epi32((__m128i)z, 0x4e));
  z = f(z, (ints4)_mm_shuffle_epi32((__m128i)z, 0xb1));
#elif defined(__aarch64__)
  z = f(z, (ints4)vextq_s32((int32x4_t)z, (int32x4_t)z, 2));
  z = f(z, (ints4)vrev64q_s32((int32x4_t)z));
#else
  z = f(z, ints4{z[2], z[3], z[0], z[1]});
  z = f(z, ints4{z[1], z[0], z[3], z[2]});
#endif
  return z[0];
}

// The patterns of magnitudes are ordered as they are, infinity and NaN above all.
template <int block>
inline int32_t most(const float *x) {
  ints most = {};
  for (int i = 0; i < block; i += width) {
    const ints size = (ints)magnitude(load(x + i));
    most = size > most ? size : most;
  }
  return fold(most, [](auto a, auto b) { return a > b ? a : b; });
}

// q = rint(to_code(x)), and their sum.
template <int block, class F>
inline int32_t round_block(const float *x, int8_t *q, F to_code) {
  words total = {};
  int32_t code[block];
  for (int i = 0; i < block; i += width) {
    const words rounded = (words)(to_code(load(x + i)) + magic) - pattern(magic);
    total += rounded;
    memcpy(code + i, &rounded, sizeof rounded);
  }
  for (int i = 0; i < block; i++) q[i] = int8_t(code[i]);
  return fold((ints)total, [](auto a, auto b) {
    typedef uint32_t Words __attribute__((vector_size(sizeof a)));
    return (decltype(a))((Words)a + (Words)b);
  });
}

// With the largest magnitude, of the block or of its row, whose pattern is `top`.
template <int block>
inline void quantize_block(const float *x, int32_t top, int8_t *q, float *scale, int32_t *sum) {
  // The reciprocal of less would be infinite.
  const float largest = uint32_t(top) < pattern(0x1p-120f) ? 0.0f : number(uint32_t(top));
  const float factor = largest == 0 ? 0.0f : 127.0f / largest;
  *sum = round_block<block>(x, q, [factor](floats x) { return x * factor; });
  *scale = largest / 127.0f;
}

template <int block>
inline void quantize_given(const float *x, float given, int8_t *q, float *scale, int32_t *sum) {
  *sum = round_block<block>(x, q, [given](floats x) {
    const floats y = x / given;
    const floats low = y < -127.0f ? all(-127.0f) : y;
    return low > 127.0f ? all(127.0f) : low;
  });
  *scale = uint32_t(most<block>(x)) < 0x7f800000 ? given : __builtin_nanf("");
}

template <int block>
void quantize_row(const float *x, int64_t columns, const Rounding &how, const Quantized &to, int64_t row) {
  float *const scale = to.scale + row * to.blocks;
  int32_t *const sum = to.sum + row * to.blocks;
  const auto each = [&](auto work) {  // work(block, its number); the last one is filled up with zeros
    for (int64_t b = 0; b < to.blocks; b++) {
      const int64_t begin = b * block, left = columns - begin;
      if (left >= block) {
        work(x + begin, b);
      } else {
        float last[block] = {};
        memcpy(last, x + begin, size_t(left) * 4);
        work(last, b);
      }
    }
  };
  int32_t top = 0;
  const auto look = [&](const float *from, int64_t) {
    const int32_t size = most<block>(from);
    top = size > top ? size : top;
  };
  if (how.kind == OC_BY_ROW) each(look);
  each([&](const float *from, int64_t b) {
    alignas(64) int8_t q[block];
    if (how.kind == OC_BY_SCALE)
      quantize_given<block>(from, how.scale, q, scale + b, sum + b);
    else
      quantize_block<block>(from, how.kind == OC_BY_ROW ? top : most<block>(from), q, scale + b, sum + b);
    constexpr int piece = block < 64 ? block : 64;
    for (int i = 0; i < block; i += piece) memcpy(const_cast<int8_t *>(to.at(row, b * block + i)), q + i, piece);
  });
}

void quantize(const float *x, int64_t columns, const Rounding &how, const Quantized &to, int64_t row) {
  if (to.block == 32) quantize_row<32>(x, columns, how, to, row);
  if (to.block == 64) quantize_row<64>(x, columns, how, to, row);
  if (to.block == 128) quantize_row<128>(x, columns, how, to, row);
}

template <class F>
void activate_with(const float *gate, const float *up, int64_t count, float *y, F f) {
  if (up)
    map(gate, up, count, y, [f](floats gate, floats up) { return f(gate) * up; });
  else
    map(gate, count, y, f);
}

void activate(int activation, const float *gate, const float *up, int64_t count, float *y) {
  const auto with = [=](auto f) { activate_with(gate, up, count, y, f); };
  if (activation == OC_SILU) with([](floats x) { return silu(x); });
  if (activation == OC_RELU) with([](floats x) { return relu(x); });
  if (activation == OC_GELU) with([](floats x) { return gelu(x); });
  if (activation == OC_GELU_TANH) with([](floats x) { return gelu_tanh(x); });
}

// (sin(r) / r - 1) / r^2 to 4.9e-12 and (cos(r) - 1) / r^2 to 6.2e-14, in powers of r^2, |r| <= pi / 4.
constexpr double sine_terms[] = {-0.16666666641607031, 0.0083333293835774863, -1.9839334081054504e-4,
                                 2.7183042129421860e-6};
constexpr double cosine_terms[] = {-0.49999999999544679, 0.041666666562000316, -0.0013888881074357402,
                                   2.4799040085733749e-5, -2.7180029924529853e-7};

// The angle is a float32 number; its reduction is in float64 and good for up to 2^30 quarter turns.
void angles(const oc_rope &rope, int64_t position, float *cos, float *sin) {
  for (int32_t i = 0; i < rope.half; i++) {
    const double angle = float(position) * rope.inverse[i];
    const double shifted = angle * 0.63661977236758134 + fine_magic, n = shifted - fine_magic;
    const double r = angle - n * 1.5707963267341256 - n * 6.0771005065061922e-11, z = r * r;
    const double s = (((sine_terms[3] * z + sine_terms[2]) * z + sine_terms[1]) * z + sine_terms[0]) * z * r + r;
    const double c =
        ((((cosine_terms[4] * z + cosine_terms[3]) * z + cosine_terms[2]) * z + cosine_terms[1]) * z +
         cosine_terms[0]) * z + 1;
    uint64_t quarter;
    memcpy(&quarter, &shifted, 8);
    const double a = quarter & 1 ? s : c, b = quarter & 1 ? c : s;
    cos[i] = float((quarter + 1) & 2 ? -a : a) * rope.scale;
    sin[i] = float(quarter & 2 ? -b : b) * rope.scale;
  }
}

void rotate(float *x, int heads, int head_dim, int half, const float *cos, const float *sin) {
  for (int head = 0; head < heads; head++) {
    float *const a = x + int64_t(head) * head_dim, *const b = a + half;
    for (int i = 0; i < half; i++) {
      const float turned = a[i] * cos[i] - b[i] * sin[i];
      b[i] = b[i] * cos[i] + a[i] * sin[i];
      a[i] = turned;
    }
  }
}

void add(const float *x, float factor, int64_t count, float *y) {
  map(x, y, count, y, [factor](floats x, floats y) { return fma(x, all(factor), y); });
}

void soft_cap(float *x, int64_t count, float cap) {
  map(x, count, x, [cap](floats x) { return cap * tanh(x / cap); });
}

void softmax(float *x, int64_t count) {
  const float most = largest(x, count);
  map(x, count, x, [most](floats x) { return exp(x - most); });
  const float total = sum(x, count, [](floats sum, floats x) { return sum + x; });
  map(x, count, x, [total](floats x) { return x / total; });
}

// ------------------------------------------------------------------------------------------- sampler

bool peaks(const float *x, int64_t count, float *peak) {
  constexpr int block = oc::peak_block, apart = 4 * width;
  ints odd = {};
  const int64_t whole = count / block;
  for (int64_t b = 0; b < whole; b++, x += block) {
    floats most[4];
    for (floats &lane : most) lane = all(-__builtin_inff());
    for (int i = 0; i < block; i += apart)
      for (int j = 0; j < 4; j++) {
        const floats y = load(x + i + j * width);
        odd |= y != y;
        most[j] = y > most[j] ? y : most[j];
      }
    const auto larger = [](floats a, floats b) { return a > b ? a : b; };
    const floats top = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    peak[b] = number(uint32_t(fold((ints)top, [](auto a, auto b) {
      typedef float Floats __attribute__((vector_size(sizeof a)));
      return (decltype(a))((Floats)a > (Floats)b ? (Floats)a : (Floats)b);
    })));
  }
  bool numbers = fold(odd, [](auto a, auto b) { return a | b; }) == 0;
  if (whole * block < count) {
    peak[whole] = largest(x, count - whole * block);
    for (int64_t i = 0; i < count - whole * block; i++) numbers &= x[i] == x[i];
  }
  return numbers;
}

float exp_sum(const float *x, int64_t count, float most) {
  return sum(x, count, [most](floats sum, floats x) { return sum + exp(x - most); });
}

void chances(const float *x, int64_t count, float most, double temperature, double *chance) {
  constexpr int step = width / 2;
  for (int64_t i = 0; i < count; i += step) {
    const int64_t some = count - i < step ? count - i : step;
    half_floats y = {};
    if (some == step)
      memcpy(&y, x + i, sizeof y);
    else
      memcpy(&y, x + i, size_t(some) * 4);
    const doubles of = exp((__builtin_convertvector(y, doubles) - double(most)) / temperature);
    if (some == step)
      memcpy(chance + i, &of, sizeof of);
    else
      memcpy(chance + i, &of, size_t(some) * 8);
  }
}

}  // namespace

namespace oc::rows {

const Rows OC_CLASS = {gather, norm,     quantize, activate, angles,  rotate,
                       add,    soft_cap, softmax,  peaks,    exp_sum, chances};

}  // namespace oc::rows
