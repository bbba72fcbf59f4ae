// Attention over a paged cache of keys and values for one instruction-set class, compiled once per class
// like kernels.cpp.
//
//   y = sum_j 2^(t_j - m) v_j / sum_j 2^(t_j - m),    t_j = log2(e) cap(scale q . k_j),   m = max t_j
//
// Exactness. A result's bits depend on its query, on what it sees and on its position, however prompts
// are cut, batched or shared out. Positions are walked in segments of 256, aligned at position 0. Each
// gives (m, sum, acc) with every sum in a fixed order: a score over the head's numbers in rising order, acc
// over positions in rising order, the sum of weights in lanes (position modulo `width`) folded by halves.
// Segments are merged in rising order. What a query may not see has weight +0, and stored values are
// finite (`store` sees to it), so it adds zero: how far beyond its own positions a query's tile is
// computed changes at most the sign of a zero, which the last step takes away.
//
// Layout. A page holds, for each key/value head, K, V and for int8 their scales [2][32]. K is a matrix
// [head_dim][32 positions] and V a matrix [32 positions][head_dim], so that the sum runs down the rows of
// both and lanes are columns. Either is stored as panels of 32 columns (the last may be 16), each
// contiguous. fp16 panels are row-major; in bf16 and int8 panels two rows are interleaved, number by
// number, which is what dot products of pairs and AMX tiles read.
//
// Work. A task takes up to `most_rows` rows (a row is a query and a head) that share a key/value head. For
// many rows the panels of a segment are expanded to float32 once and stay in the second-level cache; few
// rows read them as they are stored. Both multiply in the same order.

#include "engine.h"
#include "numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

using oc::Attend;
using oc::Pages;
using oc::Span;
using oc::Work;

constexpr int page = oc::page_tokens, segment = oc::segment_tokens, pages_of_segment = segment / page;
constexpr int line = 288;         // floats from row to row of all scratch matrices
constexpr int panel_columns = 32;
constexpr int most_rows = 256;    // of a task, unless one query has more heads
constexpr int few_rows = 16;      // up to here panels are read as they are stored
constexpr float log2_e = 0x1.715476p0f;
static_assert(line >= segment && line >= oc::most_head_dim, "a row must fit");

// ----------------------------------------------------------------------------------------- vectors

// tall x wide vectors of sums fit into the registers beside their operands.
#if defined(__AVX512F__)
constexpr int width = 16, wide = 2, tall = 12;
#elif defined(__AVX2__)
constexpr int width = 8, wide = 2, tall = 6;
#elif defined(__ARM_NEON)
constexpr int width = 4, wide = 4, tall = 6;
#else
constexpr int width = 4, wide = 2, tall = 4;
#endif
typedef float floats __attribute__((vector_size(4 * width)));
typedef int32_t ints __attribute__((vector_size(4 * width)));
typedef uint32_t words __attribute__((vector_size(4 * width)));
typedef int16_t shorts __attribute__((vector_size(2 * width)));
typedef uint16_t halves __attribute__((vector_size(2 * width)));

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

inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

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
  const floats part = _mm512_reduce_ps(t, 0x01);  // t - floor(t)
#else
  const floats low = t < least ? splat(least) : t;
  const floats shifted = (low - 0.5f) + magic;
  const floats part = low - (shifted - magic);
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
  const words scaled = (words)y + ((words)shifted << 23);
  return floats_of((scaled & ~(words)(t < least)) | (words)(t != t));
#endif
}

#if defined(__AMX_BF16__)
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

// ------------------------------------------------------------------------------------------ panels

// How the numbers of a panel are stored. `load` reads `pair` rows of `width` columns as float32.
struct Float {
  static constexpr bool stored = false;
  typedef float Stored;
  static constexpr int pair = 1;
  static inline void load(const float *from, floats *x) { x[0] = ::load(from); }
};

struct Half {
  static constexpr bool stored = true;
  typedef uint16_t Stored;
  static constexpr int pair = 1;
  static inline void load(const uint16_t *from, floats *x) { x[0] = widen_fp16(take<halves>(from)); }
};

struct Brain {
  static constexpr bool stored = true;
  typedef uint16_t Stored;
  static constexpr int pair = 2;
  static inline void load(const uint16_t *from, floats *x) {
    const words both = take<words>(from);
    x[0] = floats_of(both << 16);
    x[1] = floats_of(both & 0xffff0000);
  }
};

struct Int8 {
  static constexpr bool stored = true;
  typedef int8_t Stored;
  static constexpr int pair = 2;
  static inline void load(const int8_t *from, floats *x) {
    const ints both = __builtin_convertvector(take<shorts>(from), ints);
    x[0] = __builtin_convertvector((ints)((words)both << 24) >> 24, floats);
    x[1] = __builtin_convertvector(both >> 8, floats);
  }
};

// Where a matrix [rows][columns] has an element.
inline int64_t offset(int pair, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  const int64_t first = column / panel_columns * panel_columns;
  const int64_t across = least_of(columns - first, panel_columns);
  return first * rows + row / pair * pair * across + (column - first) * pair + row % pair;
}

// One head of a page. Sizes in numbers.
struct Head {
  int64_t k_rows, v_columns;

  explicit Head(int head_dim) : k_rows((head_dim + 1) & ~1), v_columns((head_dim + 15) & ~15) {}
  int64_t keys() const { return k_rows * page; }
  int64_t values() const { return v_columns * page; }
  int64_t bytes(int dtype) const {
    const int64_t numbers = keys() + values();
    return dtype == OC_INT8 ? numbers + 2 * page * 4 : 2 * numbers;
  }
};

int64_t page_bytes(int dtype, int kv_heads, int head_dim) {
  return kv_heads * Head(head_dim).bytes(dtype);
}

// ------------------------------------------------------------------------------------------ storing

template <class T>
inline bool round_to(const float *x, int count, uint16_t *out) {
  uint32_t bad = 0;
  for (int i = 0; i < count; i++) {
    out[i] = T::round(x[i]);
    bad |= (pattern(x[i]) & 0x7f800000) == 0x7f800000;
    bad |= (out[i] & T::infinity) == T::infinity;
  }
  return !bad;
}

template <class T>
void store_float(const Head &head, int head_dim, int pair, uint8_t *to, int at, const float *k,
                 const float *v) {
  constexpr uint16_t nan = uint16_t(T::infinity | T::infinity >> 1);
  uint16_t key[oc::most_head_dim], value[oc::most_head_dim];
  const bool good = round_to<T>(k, head_dim, key) & round_to<T>(v, head_dim, value);
  for (int i = 0; !good && i < head_dim; i++) {
    key[i] = nan;
    value[i] = 0;
  }
  uint16_t *const keys = reinterpret_cast<uint16_t *>(to), *const values = keys + head.keys();
  for (int i = 0; i < head_dim; i++) keys[offset(pair, head.k_rows, page, i, at)] = key[i];
  for (int i = 0; i < head_dim; i++) values[offset(pair, page, head.v_columns, at, i)] = value[i];
}

// q and scale with x = q * scale; scale = max|x| / 127. Returns whether all is finite.
inline bool quantize(const float *x, int count, int8_t *q, float *scale) {
  uint32_t most = 0;
  for (int i = 0; i < count; i++) {
    const uint32_t bits = pattern(x[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const float top = number(most), up = most >= pattern(0x1p-100f) ? 127 / top : 0;
  if (most >= 0x7f800000) return false;
  for (int i = 0; i < count; i++) q[i] = int8_t(pattern(x[i] * up + magic));
  *scale = up ? top / 127 : 0;
  return true;
}

void store_int8(const Head &head, int head_dim, uint8_t *to, int at, const float *k, const float *v) {
  int8_t key[oc::most_head_dim], value[oc::most_head_dim];
  float k_scale, v_scale;
  if (!quantize(k, head_dim, key, &k_scale) || !quantize(v, head_dim, value, &v_scale)) {
    memset(key, 0, sizeof key);
    memset(value, 0, sizeof value);
    k_scale = __builtin_nanf("");
    v_scale = 0;
  }
  int8_t *const keys = reinterpret_cast<int8_t *>(to), *const values = keys + head.keys();
  for (int i = 0; i < head_dim; i++) keys[offset(2, head.k_rows, page, i, at)] = key[i];
  for (int i = 0; i < head_dim; i++) values[offset(2, page, head.v_columns, at, i)] = value[i];
  float *const scale = reinterpret_cast<float *>(to + head.keys() + head.values());
  scale[at] = k_scale;
  scale[page + at] = v_scale;
}

void store(const Pages &pages, const int32_t *table, int64_t position, const float *k, const float *v) {
  const Head head(pages.head_dim);
  uint8_t *const to = pages.data + table[position / page] * pages.page_bytes;
  const int at = int(position % page), head_dim = pages.head_dim;
  for (int i = 0; i < pages.kv_heads; i++, k += head_dim, v += head_dim) {
    uint8_t *const place = to + i * head.bytes(pages.dtype);
    if (pages.dtype == OC_FP16) store_float<Fp16>(head, head_dim, 1, place, at, k, v);
    if (pages.dtype == OC_BF16) store_float<Bf16>(head, head_dim, 2, place, at, k, v);
    if (pages.dtype == OC_INT8) store_int8(head, head_dim, place, at, k, v);
  }
}

// ------------------------------------------------------------------------------------- multiplying

// c[rows][vectors * width] = a[rows][count] b[count][...], or added to c; b's columns are `across` apart. Where
// b is as it was stored, what lies `ahead` bytes behind it is fetched meanwhile.
template <class T, int rows, int vectors>
inline void multiply(const float *a, const typename T::Stored *b, int64_t across, int64_t count, bool more,
                     int64_t ahead, float *c) {
  constexpr int step_bytes = vectors * width * T::pair * int(sizeof(typename T::Stored));
  floats sum[rows][vectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) sum[r][v] = more ? load(c + r * line + v * width) : floats{};
  for (int64_t k = 0; k < count; k += T::pair, a += T::pair, b += T::pair * across) {
    floats x[vectors][T::pair];
    for (int i = 0; T::stored && i < step_bytes; i += 64)
      __builtin_prefetch(reinterpret_cast<const uint8_t *>(b) + ahead + i);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) T::load(b + v * width * T::pair, x[v]);
#pragma GCC unroll 2
    for (int p = 0; p < T::pair; p++)
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        const floats factor = splat(a[r * line + p]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = fma(factor, x[v][p], sum[r][v]);
      }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) give(c + r * line + v * width, sum[r][v]);
}

template <class T, int vectors>
void multiply_rows(int rows, const float *a, const typename T::Stored *b, int64_t across, int64_t count,
                   bool more, int64_t ahead, float *c) {
  constexpr int most = T::pair == 2 && tall > 8 ? 8 : tall;
  int r = 0;
  for (; rows - r >= most; r += most)
    multiply<T, most, vectors>(a + r * line, b, across, count, more, ahead, c + r * line);
  if (most > 8 && rows - r >= 8) {
    multiply<T, 8, vectors>(a + r * line, b, across, count, more, ahead, c + r * line);
    r += 8;
  }
  if (most > 4 && rows - r >= 4) {
    multiply<T, 4, vectors>(a + r * line, b, across, count, more, ahead, c + r * line);
    r += 4;
  }
  if (rows - r >= 2) {
    multiply<T, 2, vectors>(a + r * line, b, across, count, more, ahead, c + r * line);
    r += 2;
  }
  if (rows - r >= 1) multiply<T, 1, vectors>(a + r * line, b, across, count, more, ahead, c + r * line);
}

// A stored matrix [rows_stored][columns], of which `count` rows from `first` on are multiplied.
template <class T>
void multiply_panels(int rows, const float *a, const typename T::Stored *b, int64_t stored, int64_t columns,
                     int64_t first, int64_t count, bool more, int64_t ahead, float *c) {
  for (int64_t column = 0; column < columns; column += panel_columns) {
    const int64_t across = least_of(columns - column, panel_columns);
    const auto *const panel = b + column * stored + first * across;
    for (int64_t v = 0; v < across; v += wide * width)
      if (across < wide * width)
        multiply_rows<T, 1>(rows, a, panel, across, count, more, ahead, c + column);
      else
        multiply_rows<T, wide>(rows, a, panel + v * T::pair, across, count, more, ahead, c + column + v);
  }
}

// The same rows in float32.
template <class T>
void expand(const typename T::Stored *from, int64_t stored, int64_t columns, float *to, int64_t to_stored,
            int64_t to_first) {
  for (int64_t column = 0; column < columns; column += panel_columns) {
    const int64_t across = least_of(columns - column, panel_columns);
    const auto *b = from + column * stored;
    float *out = to + column * to_stored + to_first * across;
    for (int64_t row = 0; row < stored; row += T::pair, b += T::pair * across, out += T::pair * across)
      for (int64_t v = 0; v < across; v += width) {
        floats x[T::pair];
        T::load(b + v * T::pair, x);
        for (int p = 0; p < T::pair; p++) give(out + p * across + v, x[p]);
      }
  }
}

// ------------------------------------------------------------------------------------------- tiles

// With tile registers, bf16 and int8 caches are multiplied in bf16 (exact for int8), 16 rows at a time; the
// queries and the weights are rounded. A row of a tile knows nothing of the others.
#if defined(__AMX_BF16__)
constexpr bool has_tiles = true;
constexpr int unit_tiles = 2;  // of 16 rows, that are worked on together

// gcc 12's tile loads do not say that they read memory.
inline void fence() { asm volatile("" : : : "memory"); }

struct Tiles {
  alignas(64) uint8_t config[64] = {1};
  Tiles() {
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    fence();
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// Tiles 0 to 3 hold sums: 16 columns in 0, the next 16 in 1, and the same of the next 16 rows in 2 and 3.
// One step of 32: a's rows are `a_line` bytes apart, b is a panel of `across` columns.
template <int tall_tiles>
inline void tile_step(const uint16_t *a, int64_t a_line, const uint16_t *b, int64_t across) {
  _tile_loadd(4, a, a_line);
  _tile_loadd(6, b, 4 * across);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (tall_tiles == 2) {
    _tile_loadd(5, a + 8 * a_line, a_line);
    _tile_dpbf16ps(2, 5, 6);
  }
  if (across < panel_columns) return;
  _tile_loadd(7, b + 32, 4 * across);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (tall_tiles == 2) _tile_dpbf16ps(3, 5, 7);
}

template <int tall_tiles>
inline void tile_clear() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (tall_tiles == 1) return;
  _tile_zero(2);
  _tile_zero(3);
}

template <int tall_tiles>
inline void tile_store(float *c, int64_t across) {
  _tile_stored(0, c, 4 * line);
  if constexpr (tall_tiles == 2) _tile_stored(2, c + 16 * line, 4 * line);
  if (across < panel_columns) return;
  _tile_stored(1, c + 16, 4 * line);
  if constexpr (tall_tiles == 2) _tile_stored(3, c + 16 * line + 16, 4 * line);
}

// s[rows][16] = q[rows][k_rows] keys, of one half of a page; q is zero up to whole steps.
template <int tall_tiles>
void tile_scores(const uint16_t *q, const uint16_t *keys, int64_t k_rows, int half, float *s) {
  constexpr int step = 32;
  alignas(64) uint16_t last[step * page];
  const int64_t rest = k_rows % step;
  if (rest) {
    memset(last, 0, sizeof last);
    memcpy(last, keys + (k_rows - rest) * page, size_t(2 * rest * page));
    fence();
  }
  _tile_zero(0);
  if constexpr (tall_tiles == 2) _tile_zero(2);
  for (int64_t k = 0; k < k_rows; k += step) {
    const uint16_t *const b = (k_rows - k < step ? last : keys + k * page) + 32 * half;
    _tile_loadd(6, b, 4 * page);
    _tile_loadd(4, q + k, 2 * line);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (tall_tiles == 2) {
      _tile_loadd(5, q + 16 * line + k, 2 * line);
      _tile_dpbf16ps(2, 5, 6);
    }
  }
  _tile_stored(0, s + 16 * half, 4 * line);
  if constexpr (tall_tiles == 2) _tile_stored(2, s + 16 * line + 16 * half, 4 * line);
}

// A row of q, zero up to whole steps of 32.
inline void round_row(const float *q, int count, float factor, uint16_t *to) {
  for (int i = 0; i < count; i += 2 * width) {
    const int left = count - i;
    const __mmask32 lanes = left < 2 * width ? (1u << left) - 1 : ~0u;
    const floats low = _mm512_maskz_loadu_ps(__mmask16(lanes), q + i);
    const floats high = _mm512_maskz_loadu_ps(__mmask16(lanes >> width), q + i + width);
    const __m512bh both = _mm512_cvtne2ps_pbh(high * factor, low * factor);
    memcpy(to + i, &both, sizeof both);
  }
}

// A stored matrix in bf16, panels as they are.
inline void expand_to_bf16(const int8_t *from, int64_t count, uint16_t *to) {
  for (int64_t i = 0; i < count; i += 2 * width) {
    const __m512i low = _mm512_maskz_cvtepi8_epi32(0xffff, take<__m128i>(from + i));
    const __m512i high = _mm512_maskz_cvtepi8_epi32(0xffff, take<__m128i>(from + i + width));
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_maskz_cvtepi32_ps(0xffff, high),
                                              _mm512_maskz_cvtepi32_ps(0xffff, low));
    memcpy(to + i, &both, sizeof both);
  }
}
#else
constexpr bool has_tiles = false;
constexpr int unit_tiles = 0;
struct Tiles {};
#endif

// ----------------------------------------------------------------------------------------- softmax

// What turns products into scores, and weights into factors of values.
struct Scales {
  float cap;  // 0: none
  const float *of_page[pages_of_segment];  // [2][page], of keys and of values; int8 only
};

// Positions of one page that are not among [from, to) get a score that weighs nothing.
inline void hide(float *s, int from, int to) {
  for (int i = 0; i < page; i += width) {
    const ints at = iota() + i;
    give(s + i, (at >= from) & (at < to) ? load(s + i) : splat(-__builtin_inff()));
  }
}

// The products s of one row, of which the positions [from, to) are seen, become scores; returns the largest.
template <class T>
inline float peak(float *s, const Scales &scales, int from, int to) {
  constexpr bool scaled = sizeof(typename T::Stored) == 1;
  constexpr int parts = page / width;
  const int first = from / page, last = (to - 1) / page;
  for (int p = first; scaled && p <= last; p++)
    for (int i = 0; i < page; i += width)
      give(s + p * page + i, load(s + p * page + i) * load(scales.of_page[p] + i));
  for (int i = first * page; scales.cap > 0 && i < (last + 1) * page; i += width)
    give(s + i, tanh(load(s + i)) * scales.cap);
  if (from > first * page) hide(s + first * page, from - first * page, page);
  if (to < (last + 1) * page) hide(s + last * page, 0, to - last * page);
  floats most[parts];
  for (int i = 0; i < parts; i++) most[i] = load(s + first * page + i * width);
  for (int p = first + 1; p <= last; p++)
    for (int i = 0; i < parts; i++) {
      const floats score = load(s + p * page + i * width);
      most[i] = score > most[i] ? score : most[i];
    }
  for (int i = 1; i < parts; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
  return fold_max(most[0]);
}

// The scores s of one row over the pages [begin, end), of which the positions [from, to) are seen, become
// weights 2^(s - m), else 0: float32 in place or, for tiles, bf16 from s on. Returns their sum. For int8 they
// are then multiplied by the scales of the values.
template <class T, bool tiles>
inline float weigh(float *s, const Scales &scales, int begin, int end, int from, int to, float m) {
  constexpr bool scaled = sizeof(typename T::Stored) == 1;
  const int first = from / page, last = (to - 1) / page;
  floats sum = {};
#if defined(__AMX_BF16__)
  if constexpr (tiles) {
    uint16_t *const out = reinterpret_cast<uint16_t *>(s);
    for (int p = begin; p < first; p++) memset(out + p * page, 0, 2 * page);
    for (int p = first; p <= last; p++) {
      floats low = exp2_coarse(load(s + p * page) - m), high = exp2_coarse(load(s + p * page + width) - m);
      if (scaled) {
        sum += low + high;
        low *= load(scales.of_page[p] + page);
        high *= load(scales.of_page[p] + page + width);
      }
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      if (!scaled) sum = _mm512_dpbf16_ps(sum, both, (__m512bh)_mm512_set1_epi16(0x3f80));
      memcpy(out + p * page, &both, sizeof both);
    }
    for (int p = last + 1; p < end; p++) memset(out + p * page, 0, 2 * page);
    return fold_sum(sum);
  }
#endif
  for (int p = begin; p < first; p++) memset(s + p * page, 0, 4 * page);
  for (int p = first; p <= last; p++)
    for (int i = 0; i < page; i += width) {
      float *const x = s + p * page + i;
      const floats weight = exp2(load(x) - m);
      sum += weight;
      give(x, scaled ? weight * load(scales.of_page[p] + page + i) : weight);
    }
  for (int p = last + 1; p < end; p++) memset(s + p * page, 0, 4 * page);
  return fold_sum(sum);
}

// What some rows have seen so far, or in one segment: sum and acc stand for sum 2^m and acc 2^m. The arrays
// m and sum may be read up to whole vectors.
struct Sums {
  float *m, *sum, *acc;
  int64_t stride;  // of acc
};

// Adds a later segment to what came before; -infinity, 0 and zeros if nothing did.
inline void add_segment(int rows, const Sums &all, const Sums &one, int64_t columns) {
  for (int r = 0; r < rows; r += width) {
    const floats m = load(all.m + r), later = load(one.m + r), top = m > later ? m : later;
    const floats before = exp2(m - top), now = exp2(later - top);
    const floats sum = load(all.sum + r) * before + load(one.sum + r) * now;
    memcpy(all.m + r, &top, size_t(least_of(width, rows - r)) * 4);
    memcpy(all.sum + r, &sum, size_t(least_of(width, rows - r)) * 4);
    for (int i = 0; i < width && r + i < rows; i++) {
      float *const acc = all.acc + (r + i) * all.stride;
      const float *const add = one.acc + (r + i) * one.stride;
      const floats old_factor = splat(before[i]), factor = splat(now[i]);
      for (int64_t c = 0; c < columns; c += width)
        give(acc + c, fma(load(add + c), factor, load(acc + c) * old_factor));
    }
  }
}

inline void clear(int row, const Sums &all, int64_t columns) {
  all.m[row] = -__builtin_inff();
  all.sum[row] = 0;
  memset(all.acc + row * all.stride, 0, size_t(columns) * 4);
}

inline void finish(float sum, const float *acc, int head_dim, float *y) {
  const floats inverse = splat(1 / sum);
  int i = 0;
  for (; i + width <= head_dim; i += width) give(y + i, load(acc + i) * inverse + 0.0f);  // -0 becomes +0
  const floats last = load(acc + i) * inverse + 0.0f;
  if (i < head_dim) memcpy(y + i, &last, size_t(head_dim - i) * 4);
}

// ------------------------------------------------------------------------------------------- tasks

// The first position that is seen from one.
inline int64_t first_seen(const oc_layer &layer, int64_t position) {
  return layer.window > 0 ? most_of(0, position - layer.window + 1) : 0;
}

inline int64_t first_segment(const oc_layer &layer, int64_t position) {
  return first_seen(layer, position) / segment;
}

// How a request is shared out, for each of its key/value heads.
struct Share {
  int64_t queries;   // of a task
  int64_t segments;  // that are tasks of their own; 0: none is
  int64_t tasks;
};

Share share(const oc_layer &layer, const Span &span, int64_t whole) {
  if (span.count == 1) {
    const int64_t seen = span.past / segment + 1 - first_segment(layer, span.past);
    if (seen > whole) return {1, seen, seen};
  }
  const int64_t group = layer.heads / layer.kv_heads, queries = most_of(1, most_rows / group);
  return {queries, 0, (span.count + queries - 1) / queries};
}

inline int64_t up16(int64_t x) { return (x + 15) & ~int64_t(15); }

// What one segment of a split query leaves in `partial` for one key/value head: m and sum of its rows,
// then acc.
inline int64_t partial_size(const oc_layer &layer) {
  const int64_t group = layer.heads / layer.kv_heads;
  return 2 * up16(group) + group * Head(layer.head_dim).v_columns;
}

inline Sums partial_sums(const oc_layer &layer, float *at) {
  const int64_t group = up16(layer.heads / layer.kv_heads);
  return {at, at + group, at + 2 * group, Head(layer.head_dim).v_columns};
}

Work work(const oc_layer &layer, const Span *spans, int64_t count, int threads) {
  constexpr int64_t never = INT64_MAX, short_enough = 4;
  Work all{};
  for (int64_t i = 0; i < count; i++) all.tasks += share(layer, spans[i], never).tasks * layer.kv_heads;
  all.whole = all.tasks < 2 * threads ? 1 : short_enough;
  all.tasks = 0;
  for (int64_t i = 0; i < count; i++) {
    const Share mine = share(layer, spans[i], all.whole);
    all.tasks += mine.tasks * layer.kv_heads;
    all.merges += mine.segments ? layer.kv_heads : 0;
    all.partial_floats += mine.segments * layer.kv_heads * partial_size(layer);
  }
  return all;
}

// Rows are worked on in units. Those of tiles are in three stages at once, each with its scores.
constexpr int unit_rows = has_tiles ? 16 * unit_tiles : few_rows;  // the most
constexpr int buffers = has_tiles ? 3 : 1;
static_assert(unit_rows % 16 == 0 && unit_rows >= tall && unit_rows >= few_rows, "");

// A thread's own memory; rows are `line` apart.
struct Scratch {
  float *q;       // [rows]
  Sums sums;      // [rows]
  int *query;     // [rows]: the query of a row
  float *scores;  // [buffers][unit_rows]
  float *part;    // [unit_rows]: acc of one segment
  float *keys;    // [pages of a segment][k_rows][page], expanded
  float *values;  // a matrix [segment][v_columns], expanded
};

// Tiles may write beyond the last row.
inline int64_t scratch_rows(const oc_layer &layer) {
  return up16(most_of(most_rows, layer.heads / layer.kv_heads)) + unit_rows;
}

int64_t scratch_bytes(const oc_layer &layer) {
  const Head head(layer.head_dim);
  const int64_t rows = scratch_rows(layer);
  return 4 * (2 * rows * line + 3 * rows + (buffers + 1) * unit_rows * line +
              pages_of_segment * (head.keys() + head.values()));
}

Scratch cut(const oc_layer &layer, void *memory) {
  const Head head(layer.head_dim);
  const int64_t rows = scratch_rows(layer);
  Scratch all;
  all.q = static_cast<float *>(memory);
  all.sums = {all.q + 2 * rows * line, all.q + 2 * rows * line + rows, all.q + rows * line, line};
  all.query = reinterpret_cast<int *>(all.sums.sum + rows);
  all.scores = all.sums.sum + 2 * rows;
  all.part = all.scores + buffers * unit_rows * line;
  all.keys = all.part + unit_rows * line;
  all.values = all.keys + pages_of_segment * head.keys();
  return all;
}

// Some queries of one request and all heads that share a key/value head; row r is query r / group.
struct Task {
  const Span *span;
  int64_t kv_head, query, queries;
  int64_t begin, end;  // segments
  float *partial;      // where a split query's sums go, or NULL
};

Task find_task(const Attend &job, int64_t index) {
  const oc_layer &layer = *job.layer;
  float *partial = job.partial;
  const Span *span = job.spans;
  Share mine = share(layer, *span, job.work.whole);
  while (index >= mine.tasks * layer.kv_heads) {
    index -= mine.tasks * layer.kv_heads;
    partial += mine.segments * layer.kv_heads * partial_size(layer);
    mine = share(layer, *++span, job.work.whole);
  }
  Task task{span, index / mine.tasks, 0, 1, 0, 0, nullptr};
  const int64_t part = index % mine.tasks;
  if (mine.segments) {
    task.begin = first_segment(layer, span->past) + part;
    task.end = task.begin + 1;
    task.partial = partial + (task.kv_head * mine.segments + part) * partial_size(layer);
    return task;
  }
  task.query = (mine.tasks - 1 - part) * mine.queries;  // the longest first
  task.queries = least_of(mine.queries, span->count - task.query);
  task.begin = first_segment(layer, span->past + task.query);
  task.end = (span->past + task.query + task.queries - 1) / segment + 1;
  return task;
}

// Rows that are worked on together, over the pages [begin, end) of a segment that any of them sees.
struct Unit {
  int64_t row;
  int rows, begin, end;
  bool fresh;     // the first segment that its rows see: acc goes where it belongs
  float *scores;
  float *part;    // acc
  float m[unit_rows], sum[unit_rows];
};

// A task at one of its segments.
template <class T>
struct View {
  typedef typename T::Stored Stored;
  static constexpr bool tiles = has_tiles && T::pair == 2;
  static constexpr bool narrow = sizeof(Stored) == 1;

  const Attend &job;
  const Task &task;
  const Scratch &scratch;
  const oc_layer &layer;
  const Head head;
  const int64_t group, rows;
  const float factor;  // of q
  int64_t taken = 0;   // rows of q that are in scratch
  int64_t number = 0, base = 0;
  bool expanded = false;
  Scales scales;
  const void *keys[pages_of_segment], *values[pages_of_segment];

  View(const Attend &a, const Task &t, const Scratch &s)
      : job(a), task(t), scratch(s), layer(*a.layer), head(layer.head_dim),
        group(layer.heads / layer.kv_heads), rows(t.queries * group),
        factor(layer.soft_cap > 0 ? layer.scale / layer.soft_cap : layer.scale * log2_e) {
    scales.cap = layer.soft_cap * log2_e;
    for (int64_t r = 0, query = 0; r < rows; query++)
      for (int64_t end = r + group; r < end; r++) scratch.query[r] = int(query);
  }

  int64_t position(int64_t row) const { return task.span->past + task.query + scratch.query[row]; }
  // The positions of the segment that a row sees: [from, to).
  int from(int64_t row) const { return int(most_of(0, first_seen(layer, position(row)) - base)); }
  int to(int64_t row) const { return int(least_of(segment, position(row) + 1 - base)); }

  // Where a row begins in q or y.
  int64_t start(int64_t row, int64_t stride) const {
    const int64_t query = scratch.query[row], head_of_group = row - query * group;
    return (task.span->row + task.query + query) * stride +
           (task.kv_head * group + head_of_group) * layer.head_dim;
  }

  void take_queries(int64_t end) {
    for (; taken < end; taken++) {
      const float *const q = job.q + start(taken, job.q_stride);
#if defined(__AMX_BF16__)
      if constexpr (tiles) {
        round_row(q, layer.head_dim, factor, reinterpret_cast<uint16_t *>(scratch.q) + taken * line);
        continue;
      }
#endif
      float *const to = scratch.q + taken * line;
      for (int i = 0; i < layer.head_dim; i++) to[i] = q[i] * factor;
      if (layer.head_dim % 2) to[layer.head_dim] = 0;
    }
  }

  // Has the caches fetch what is read and written soon, a little for each row of work.
  void look_ahead(int64_t row) const {
    const int64_t later = row + 2 * unit_rows;
    for (int i = 0; later >= taken && later < rows && i < layer.head_dim; i += 16)
      __builtin_prefetch(job.q + start(later, job.q_stride) + i);
    for (int i = 0; number == task.end - 1 && i < layer.head_dim; i += 16)
      __builtin_prefetch(job.y + start(row, job.y_stride) + i, 1);
  }

  // The pages of a segment that the rows [first, last) see.
  void open(int64_t first, int64_t last) {
    const int begin = from(first) / page, end = (to(last - 1) + page - 1) / page;
    expanded = tiles ? narrow : last - first > few_rows;
    for (int p = begin; p < end; p++) {
      const auto *const stored = reinterpret_cast<const Stored *>(
          job.pages.data + task.span->table[number * pages_of_segment + p] * job.pages.page_bytes +
          task.kv_head * head.bytes(job.pages.dtype));
      keys[p] = stored;
      values[p] = stored + head.keys();
      scales.of_page[p] = reinterpret_cast<const float *>(stored + head.keys() + head.values());
      if (!expanded) continue;
#if defined(__AMX_BF16__)
      if constexpr (tiles && narrow) {
        auto *const to = reinterpret_cast<uint16_t *>(scratch.keys) + p * (head.keys() + head.values());
        expand_to_bf16(stored, head.keys() + head.values(), to);
        keys[p] = to;
        values[p] = to + head.keys();
        continue;
      }
#endif
      expand<T>(stored, head.k_rows, page, scratch.keys + p * head.keys(), head.k_rows, 0);
      expand<T>(stored + head.keys(), page, head.v_columns, scratch.values, segment, p * page);
    }
  }

  // The unit that begins at a row; without rows if there are none left.
  Unit unit(int64_t row, int64_t last, int64_t most, int buffer) {
    Unit u;
    u.row = row;
    u.rows = int(most_of(0, least_of(most, last - row)));
    u.begin = u.end = 0;
    u.fresh = false;
    u.part = scratch.part;
    u.scores = scratch.scores + buffer * unit_rows * line;
    if (!u.rows) return u;
    u.begin = from(row) / page;
    u.end = (to(row + u.rows - 1) + page - 1) / page;
    u.fresh = !task.partial && first_segment(layer, position(row)) == number;
    if (u.fresh) u.part = scratch.sums.acc + row * line;
    take_queries(row + u.rows);
    return u;
  }

  void find_peaks(Unit &u) const {
    for (int r = 0; r < u.rows; r++)
      u.m[r] = peak<T>(u.scores + r * line, scales, from(u.row + r), to(u.row + r));
  }

  void weigh_row(Unit &u, int r) const {
    look_ahead(u.row + r);
    u.sum[r] = weigh<T, tiles>(u.scores + r * line, scales, u.begin, u.end, from(u.row + r),
                            to(u.row + r), u.m[r]);
  }

  // Bytes from a block to the one that is read next.
  static int64_t ahead(const void *block, const void *next) {
    return static_cast<const uint8_t *>(next) - static_cast<const uint8_t *>(block);
  }

  void multiply_unit(Unit &u) const {
    const float *const q = scratch.q + u.row * line;
    for (int p = u.begin; p < u.end; p++) {
      float *const s = u.scores + p * page;
      if (expanded)
        multiply_panels<Float>(u.rows, q, scratch.keys + p * head.keys(), head.k_rows, page, 0, head.k_rows,
                               false, 0, s);
      else
        multiply_panels<T>(u.rows, q, static_cast<const Stored *>(keys[p]), head.k_rows, page, 0, head.k_rows,
                           false, ahead(keys[p], p + 1 < u.end ? keys[p + 1] : values[u.begin]), s);
    }
    find_peaks(u);
    for (int r = 0; r < u.rows; r++) weigh_row(u, r);
    if (expanded)
      multiply_panels<Float>(u.rows, u.scores + u.begin * page, scratch.values, segment, head.v_columns,
                             u.begin * page, (u.end - u.begin) * page, false, 0, u.part);
    for (int p = u.begin; !expanded && p < u.end; p++)
      multiply_panels<T>(u.rows, u.scores + p * page, static_cast<const Stored *>(values[p]), page,
                         head.v_columns, 0, page, p > u.begin,
                         ahead(values[p], values[p + 1 < u.end ? p + 1 : p]), u.part);
  }

  // Adds a unit's segment to what its rows have seen so far.
  void keep(Unit &u) const {
    if (!u.rows) return;
    const int64_t columns = head.v_columns;
    if (task.partial) {
      const Sums to = partial_sums(layer, task.partial);
      memcpy(to.m + u.row, u.m, size_t(u.rows) * 4);
      memcpy(to.sum + u.row, u.sum, size_t(u.rows) * 4);
      for (int r = 0; r < u.rows; r++)
        memcpy(to.acc + (u.row + r) * columns, u.part + r * line, size_t(columns) * 4);
      return;
    }
    const Sums &all = scratch.sums;
    const Sums mine{all.m + u.row, all.sum + u.row, all.acc + u.row * line, line};
    if (u.fresh) {
      memcpy(mine.m, u.m, size_t(u.rows) * 4);
      memcpy(mine.sum, u.sum, size_t(u.rows) * 4);
      return;
    }
    for (int r = u.rows - 1; r >= 0 && first_segment(layer, position(u.row + r)) == number; r--)
      clear(r, mine, columns);
    add_segment(u.rows, mine, {u.m, u.sum, u.part, line}, columns);
  }

#if defined(__AMX_BF16__)
  template <int tall_tiles>
  void score_half(const Unit &u, int index) const {
    const auto *const q = reinterpret_cast<const uint16_t *>(scratch.q) + u.row * line;
    const int p = u.begin + index / 2;
    tile_scores<tall_tiles>(q, static_cast<const uint16_t *>(keys[p]), head.k_rows, index % 2,
                            u.scores + p * page);
  }

  template <int tall_tiles>
  void sum_page(const Unit &u, int64_t column, int p) const {
    const int64_t across = least_of(head.v_columns - column, panel_columns);
    if (p == u.begin) tile_clear<tall_tiles>();
    tile_step<tall_tiles>(reinterpret_cast<const uint16_t *>(u.scores) + p * page, 4 * line,
                          static_cast<const uint16_t *>(values[p]) + column * page, across);
    if (p == u.end - 1) tile_store<tall_tiles>(u.part + column, across);
  }

  // The tile unit works beside the vector units: while the rows of one unit are weighed, the unit before
  // it is summed and the one after it scored, a step at a time.
  template <int tall_tiles>
  void walk_tiles(int64_t first, int64_t last) {
    constexpr int most = 16 * tall_tiles;
    Unit before{}, now = unit(first, last, most, 0);
    fence();
    for (int i = 0; i < 2 * (now.end - now.begin); i++) score_half<tall_tiles>(now, i);
    for (int turn = 1; now.rows; turn++) {
      Unit after = unit(now.row + now.rows, last, most, turn % buffers);
      const int64_t columns = before.rows ? head.v_columns : 0;
      const int64_t panels = (columns + panel_columns - 1) / panel_columns;
      const int64_t steps = panels * (before.end - before.begin) + 2 * (after.end - after.begin);
      int64_t done = 0, column = 0;
      int sum = before.begin, score = 0;
      fence();
      find_peaks(now);
      for (int r = 0; r < now.rows; r++) {
        weigh_row(now, r);
        for (; done * now.rows < steps * (r + 1); done++) {
          if (column == columns) {
            score_half<tall_tiles>(after, score++);
            continue;
          }
          sum_page<tall_tiles>(before, column, sum);
          if (++sum < before.end) continue;
          sum = before.begin;
          column = least_of(columns, column + panel_columns);
        }
      }
      fence();
      keep(before);
      before = now;
      now = after;
    }
    for (int64_t column = 0; column < head.v_columns; column += panel_columns)
      for (int p = before.begin; p < before.end; p++) sum_page<tall_tiles>(before, column, p);
    fence();
    keep(before);
  }
#endif

  void walk(int64_t first, int64_t last) {
#if defined(__AMX_BF16__)
    if constexpr (tiles) {
      if (last - first > 16)
        walk_tiles<unit_tiles>(first, last);
      else
        walk_tiles<1>(first, last);
      return;
    }
#endif
    const int64_t most = expanded ? tall : few_rows;
    for (int64_t row = first; row < last; row += most) {
      Unit now = unit(row, last, most, 0);
      multiply_unit(now);
      keep(now);
    }
  }
};

template <class T>
void attend(const Attend &job, const Task &task, const Scratch &scratch) {
  View<T> view(job, task, scratch);
  [[maybe_unused]] const Tiles tiles;
  for (view.number = task.begin; view.number < task.end; view.number++) {
    view.base = view.number * segment;
    int64_t first = 0, last = view.rows;  // the rows that see some of it
    while (view.to(first) <= 0) first++;
    while (view.from(last - 1) >= segment) last--;
    view.open(first, last);
    view.walk(first, last);
  }
  for (int64_t r = 0; !task.partial && r < view.rows; r++)
    finish(scratch.sums.sum[r], scratch.sums.acc + r * line, job.layer->head_dim,
           job.y + view.start(r, job.y_stride));
}

void run(const Attend &job, int64_t index, void *memory) {
  const Task task = find_task(job, index);
  const Scratch scratch = cut(*job.layer, memory);
  if (job.pages.dtype == OC_FP16) attend<Half>(job, task, scratch);
  if (job.pages.dtype == OC_BF16) attend<Brain>(job, task, scratch);
  if (job.pages.dtype == OC_INT8) attend<Int8>(job, task, scratch);
}

void merge(const Attend &job, int64_t index) {
  const oc_layer &layer = *job.layer;
  const int64_t group = layer.heads / layer.kv_heads, columns = Head(layer.head_dim).v_columns;
  const int64_t size = partial_size(layer);
  float *partial = job.partial;
  const Span *span = job.spans;
  int64_t segments = share(layer, *span, job.work.whole).segments, split = index / layer.kv_heads;
  while (!segments || split) {
    split -= segments > 0;
    partial += segments * layer.kv_heads * size;
    segments = share(layer, *++span, job.work.whole).segments;
  }
  const int64_t kv_head = index % layer.kv_heads;
  partial += kv_head * segments * size;
  for (int64_t first = 0; first < group; first += few_rows) {
    const int rows = int(least_of(few_rows, group - first));
    float m[few_rows], sum[few_rows], acc[few_rows * line];
    const Sums all{m, sum, acc, line};
    for (int r = 0; r < few_rows; r++) clear(r, all, columns);
    for (int64_t s = 0; s < segments; s++) {
      const Sums one = partial_sums(layer, partial + s * size);
      add_segment(rows, all, {one.m + first, one.sum + first, one.acc + first * columns, columns}, columns);
    }
    for (int r = 0; r < rows; r++)
      finish(sum[r], acc + r * line, layer.head_dim,
             job.y + span->row * job.y_stride + (kv_head * group + first + r) * layer.head_dim);
  }
}

}  // namespace

namespace oc::attention {

const Attention OC_CLASS = {page_bytes, store, work, run, merge, scratch_bytes};

}  // namespace oc::attention
