// How a paged cache stores keys and values, and the products with them: in float32 on vectors, or in bf16 on
// tile registers.
//
// A page holds, for each key/value head, K, V and for int8 and fp8 their scales [2][32]. K is a matrix
// [head_dim][32 positions] and V a matrix [32 positions][head_dim], so that the sum runs down the rows of
// both and lanes are columns. Either is stored as panels of 32 columns (the last may be 16), each
// contiguous. fp16 panels are row-major; in the others two rows are interleaved, number by number, which
// is what dot products of pairs and tiles read.
//
// int4 has a bf16 scale for each 32 numbers of a key or value and is expanded before it is multiplied. A
// number is (code - 8) * scale; keys are bytes [head_dim / 2][32 positions], two rows in a byte, values
// bytes [32 positions][groups][16], columns i and 16 + i of a group in a byte; then scales [2][groups][32].
#pragma once

#include "engine.h"
#include "vectors.h"

namespace {

constexpr int page = oc::page_tokens, segment = oc::segment_tokens, pages_of_segment = segment / page;
constexpr int panel_columns = 32;
constexpr int line = 288;  // floats from row to row of every matrix that is not stored: not a power of two
static_assert(line >= segment && line >= oc::most_head_dim, "a row must fit");

inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

// ------------------------------------------------------------------------------------------ panels

// How the numbers of a panel are stored. `load` reads `pair` rows of `width` columns as float32.
struct Float {
  static constexpr bool stored = false, scaled = false;
  typedef float Stored;
  static constexpr int pair = 1;
  static inline void load(const float *from, floats *x) { x[0] = ::load(from); }
};

struct Half {
  static constexpr bool stored = true, scaled = false, packed = false;
  typedef uint16_t Stored;
  static constexpr int pair = 1;
  static inline void load(const uint16_t *from, floats *x) { x[0] = widen_fp16(take<halves>(from)); }
};

struct Brain {
  static constexpr bool stored = true, scaled = false, packed = false;
  typedef uint16_t Stored;
  static constexpr int pair = 2;
  static inline void load(const uint16_t *from, floats *x) {
    const words both = take<words>(from);
    x[0] = floats_of(both << 16);
    x[1] = floats_of(both & 0xffff0000);
  }
};

// Numbers in a byte, with a scale per position: `top` is the largest, and a read number times `unit` is it.
struct Int8 {
  static constexpr bool stored = true, scaled = true, packed = false;
  typedef int8_t Stored;
  static constexpr int pair = 2;
  static constexpr float top = 127, unit = 1;
  static inline int8_t code(float x) { return int8_t(pattern(x + magic)); }
  static inline void load(const int8_t *from, floats *x) {
    const ints both = __builtin_convertvector(take<shorts>(from), ints);
    x[0] = __builtin_convertvector((ints)((words)both << 24) >> 24, floats);
    x[1] = __builtin_convertvector(both >> 8, floats);
  }
};

// e4m3 is read as the fp16 with the same bits, whose exponent counts from another place.
struct Float8 {
  static constexpr bool stored = true, scaled = true, packed = false;
  typedef uint8_t Stored;
  static constexpr int pair = 2;
  static constexpr float top = 448, unit = 256;
  static inline uint8_t code(float x) {
    const uint32_t sign = pattern(x) >> 24 & 0x80, bits = pattern(x) & 0x7fffffff;
    const uint32_t tiny = pattern(number(bits) * 0x1p9f + magic) - pattern(magic);
    const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return uint8_t(sign | (bits < pattern(0x1p-6f) ? tiny : normal));
  }
  static inline void load(const uint8_t *from, floats *x) {
    const halves both = take<halves>(from);
    x[0] = widen_fp16((both << 8 & 0x8000) | (both << 7 & 0x3f80));
    x[1] = widen_fp16((both & 0x8000) | (both >> 1 & 0x3f80));
  }
};

struct Int4 {
  static constexpr bool stored = true, scaled = false, packed = true;
  typedef uint8_t Stored;
  static constexpr int pair = 2;
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
  int64_t groups() const { return (v_columns + panel_columns - 1) / panel_columns; }
  int64_t bytes(int dtype) const {
    const int64_t numbers = keys() + values();
    if (dtype == OC_INT4) return keys() / 2 + groups() * page * 16 + 2 * groups() * page * 2;
    return dtype == OC_INT8 || dtype == OC_FP8 ? numbers + 2 * page * 4 : 2 * numbers;
  }
};

// The parts of an int4 head of a page.
template <class Byte, class Scale>
struct Nibbles {
  Byte *keys, *values;
  Scale *key_scale, *value_scale;

  Nibbles(const Head &head, Byte *at)
      : keys(at), values(keys + head.keys() / 2),
        key_scale(reinterpret_cast<Scale *>(values + head.groups() * page * 16)),
        value_scale(key_scale + head.groups() * page) {}
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
  const bool good = round_to<T>(k, head_dim, key) && round_to<T>(v, head_dim, value);
  for (int i = 0; !good && i < head_dim; i++) {
    key[i] = nan;
    value[i] = 0;
  }
  uint16_t *const keys = reinterpret_cast<uint16_t *>(to), *const values = keys + head.keys();
  for (int i = 0; i < head_dim; i++) keys[offset(pair, head.k_rows, page, i, at)] = key[i];
  for (int i = 0; i < head_dim; i++) values[offset(pair, page, head.v_columns, at, i)] = value[i];
}

inline uint32_t largest(const float *x, int count) {  // its pattern; infinity and NaN are above all
  uint32_t most = 0;
  for (int i = 0; i < count; i++) {
    const uint32_t bits = pattern(x[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most;
}

// Codes and scale with x = code * scale; scale = max|x| / top. Returns whether all is finite.
template <class T>
inline bool quantize(const float *x, int count, typename T::Stored *q, float *scale) {
  const uint32_t most = largest(x, count);
  const float top = number(most), up = most >= pattern(0x1p-100f) ? T::top / top : 0;
  if (most >= 0x7f800000) return false;
  for (int i = 0; i < count; i++) q[i] = T::code(x[i] * up);
  *scale = up ? top / T::top * T::unit : 0;
  return true;
}

template <class T>
void store_scaled(const Head &head, int head_dim, uint8_t *to, int at, const float *k, const float *v) {
  typedef typename T::Stored Stored;
  Stored key[oc::most_head_dim], value[oc::most_head_dim];
  float k_scale, v_scale;
  if (!quantize<T>(k, head_dim, key, &k_scale) || !quantize<T>(v, head_dim, value, &v_scale)) {
    memset(key, 0, sizeof key);
    memset(value, 0, sizeof value);
    k_scale = __builtin_nanf("");
    v_scale = 0;
  }
  Stored *const keys = reinterpret_cast<Stored *>(to), *const values = keys + head.keys();
  for (int i = 0; i < head_dim; i++) keys[offset(2, head.k_rows, page, i, at)] = key[i];
  for (int i = 0; i < head_dim; i++) values[offset(2, page, head.v_columns, at, i)] = value[i];
  float *const scale = reinterpret_cast<float *>(to + head.keys() + head.values());
  scale[at] = k_scale;
  scale[page + at] = v_scale;
}

// Codes of a group and the bits of its scale: the number of the largest magnitude over -8, so that the
// grid from -8 to 7 holds it; the others are at most 7 of it on its other side.
inline void quantize_group(const float *x, int count, uint8_t *code, uint16_t *scale) {
  float most = 0;
  for (int i = 0; i < count; i++)
    if (pattern(x[i]) << 1 > pattern(most) << 1) most = x[i];
  const bool some = (pattern(most) & 0x7fffffff) >= pattern(0x1p-100f);
  *scale = some ? Bf16::round(most * -0.125f) : 0;
  const float up = some ? 1 / Bf16::read(*scale) : 0;
  for (int i = 0; i < panel_columns; i++) {
    const int32_t q = i < count ? int32_t(pattern(x[i] * up + magic) - pattern(magic)) : 0;
    code[i] = uint8_t(8 + (q > 7 ? 7 : q < -8 ? -8 : q));
  }
}

void store_int4(const Head &head, int head_dim, uint8_t *to, int at, const float *k, const float *v) {
  constexpr uint16_t nan = 0x7fc0;
  const Nibbles<uint8_t, uint16_t> all(head, to);
  const bool good = largest(k, head_dim) < 0x7f800000 && largest(v, head_dim) < 0x7f800000;
  for (int64_t g = 0; g < head.groups(); g++) {
    const int first = int(g) * panel_columns, count = int(least_of(panel_columns, head_dim - first));
    uint8_t key[panel_columns], value[panel_columns];
    uint16_t k_scale = nan, v_scale = 0;
    memset(key, 8, sizeof key);
    memset(value, 8, sizeof value);
    if (good) quantize_group(k + first, count, key, &k_scale);
    if (good) quantize_group(v + first, count, value, &v_scale);
    for (int i = 0; i < count; i += 2)
      all.keys[(first + i) / 2 * page + at] = uint8_t(key[i] | key[i + 1] << 4);
    for (int i = 0; i < 16; i++)
      all.values[(at * head.groups() + g) * 16 + i] = uint8_t(value[i] | value[16 + i] << 4);
    all.key_scale[g * page + at] = k_scale;
    all.value_scale[g * page + at] = v_scale;
  }
}

void store(const oc::Pages &pages, const int32_t *table, int64_t position, const float *k, const float *v) {
  const Head head(pages.head_dim);
  uint8_t *const to = pages.data + table[position / page] * pages.page_bytes;
  const int at = int(position % page), head_dim = pages.head_dim;
  for (int i = 0; i < pages.kv_heads; i++, k += head_dim, v += head_dim) {
    uint8_t *const place = to + i * head.bytes(pages.dtype);
    if (pages.dtype == OC_FP16) store_float<Fp16>(head, head_dim, 1, place, at, k, v);
    if (pages.dtype == OC_BF16) store_float<Bf16>(head, head_dim, 2, place, at, k, v);
    if (pages.dtype == OC_INT8) store_scaled<Int8>(head, head_dim, place, at, k, v);
    if (pages.dtype == OC_FP8) store_scaled<Float8>(head, head_dim, place, at, k, v);
    if (pages.dtype == OC_INT4) store_int4(head, head_dim, place, at, k, v);
  }
}

// ------------------------------------------------------------------------------------- multiplying

// tall x wide vectors of sums fit into the registers beside their operands.
#if defined(__AVX512F__)
constexpr int wide = 2, tall = 12;
#elif defined(__AVX2__)
constexpr int wide = 2, tall = 6;
#elif defined(__ARM_NEON)
constexpr int wide = 4, tall = 6;
#else
constexpr int wide = 2, tall = 4;
#endif

// c[rows][vectors * width] = a[rows][count] b[count][...], or added to c; a row of b has `across` numbers.
// Where b is as it was stored, what lies `ahead` bytes behind it is fetched meanwhile.
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

// The two numbers of each byte.
inline void nibbles(const uint8_t *from, floats *low, floats *high) {
  const ints both = __builtin_convertvector(take<bytes>(from), ints);
  *low = __builtin_convertvector((both & 15) - 8, floats);
  *high = __builtin_convertvector((both >> 4) - 8, floats);
}

inline floats widen_bf16(const uint16_t *from) {
  return floats_of(__builtin_convertvector(take<halves>(from), words) << 16);
}

typedef Nibbles<const uint8_t, const uint16_t> Packed;

// Keys of a page as rows of 32, and values as rows of a matrix [to_stored][v_columns] from `to_first` on.
inline void expand_int4(const Head &head, const Packed &from, float *keys, float *values, int64_t to_stored,
                        int64_t to_first) {
  floats low, high;
  for (int64_t row = 0; row < head.k_rows; row += 2)
    for (int i = 0; i < page; i += width) {
      const floats scale = widen_bf16(from.key_scale + row / panel_columns * page + i);
      nibbles(from.keys + row / 2 * page + i, &low, &high);
      give(keys + row * page + i, low * scale);
      give(keys + (row + 1) * page + i, high * scale);
    }
  for (int64_t g = 0; g < head.groups(); g++) {
    const int64_t column = g * panel_columns, across = least_of(head.v_columns - column, panel_columns);
    float *out = values + column * to_stored + to_first * across;
    for (int at = 0; at < page; at++, out += across) {
      const floats scale = splat(Bf16::read(from.value_scale[g * page + at]));
      for (int i = 0; i < 16; i += width) {
        nibbles(from.values + (at * head.groups() + g) * 16 + i, &low, &high);
        give(out + i, low * scale);
        if (across > 16) give(out + 16 + i, high * scale);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------- tiles

// With tile registers, all caches but fp16 are multiplied in bf16 (exact for int8 and fp8), 16 rows at a
// time; the queries and the weights are rounded. A row of a tile knows nothing of the others.
#if defined(OC_TILES)
constexpr bool has_tiles = true;
constexpr int unit_tiles = 2;  // of 16 rows, that are worked on together

// gcc 12's tile loads do not say that they read memory.
inline void fence() { asm volatile("" : : : "memory"); }

template <bool used>
struct Tiles {};

template <>
struct Tiles<true> {
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

inline __m512i widen_codes(const int8_t *from) {
  return (__m512i)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, take<__m128i>(from)));
}

inline __m512i widen_codes(const uint8_t *from) {
  const __m256i x = _mm256_cvtepu8_epi16(take<__m128i>(from));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7);
  return (__m512i)widen_fp16((halves)_mm256_or_si256(sign, rest));
}

// A stored matrix in bf16, panels as they are; what lies `ahead` bytes behind it is fetched meanwhile.
template <class Code>
inline void expand_to_bf16(const Code *from, int64_t count, int64_t ahead, uint16_t *to) {
  for (int64_t i = 0; i < count; i += 2 * width) {
    __builtin_prefetch(from + i + ahead);
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)widen_codes(from + i + width), (__m512)widen_codes(from + i));
    memcpy(to + i, &both, sizeof both);
  }
}

// Two rows of bf16, number by number.
inline void give_pair(uint16_t *to, floats one, floats two) {
  const __m512i low = _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh(one));
  const __m512i high = _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh(two));
  const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  memcpy(to, &both, sizeof both);
}

// A page of int4 as one of bf16.
inline void expand_int4_to_bf16(const Head &head, const Packed &from, uint16_t *keys, uint16_t *values) {
  floats low[2], high[2];
  for (int64_t row = 0; row < head.k_rows; row += 2)
    for (int i = 0; i < page; i += width) {
      const floats scale = widen_bf16(from.key_scale + row / panel_columns * page + i);
      nibbles(from.keys + row / 2 * page + i, low, high);
      give_pair(keys + row * page + 2 * i, low[0] * scale, high[0] * scale);
    }
  for (int64_t g = 0; g < head.groups(); g++) {
    const int64_t column = g * panel_columns, across = least_of(head.v_columns - column, panel_columns);
    uint16_t *out = values + column * page;
    for (int at = 0; at < page; at += 2, out += 2 * across) {
      floats scale[2];
      for (int r = 0; r < 2; r++) {
        scale[r] = splat(Bf16::read(from.value_scale[g * page + at + r]));
        nibbles(from.values + ((at + r) * head.groups() + g) * 16, low + r, high + r);
      }
      give_pair(out, low[0] * scale[0], low[1] * scale[1]);
      if (across > 16) give_pair(out + 32, high[0] * scale[0], high[1] * scale[1]);
    }
  }
}
#else
constexpr bool has_tiles = false;
constexpr int unit_tiles = 0;

template <bool used>
struct Tiles {};
#endif

}  // namespace
