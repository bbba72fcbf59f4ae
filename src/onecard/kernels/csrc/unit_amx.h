// Panels times rows in the tile unit (AMX): 32 rows by two tiles at a time.
#pragma once

#include "panel.h"

namespace {

// Tiles: 0..3 sums, 4 and 5 rows, 6 and 7 the panel.
struct TileConfig {
  alignas(64) uint8_t bytes[64] = {1};
  explicit TileConfig(int columns) {
    for (int tile = 0; tile < 8; tile++) {
      const bool input = tile == 4 || tile == 5, weights = tile >= 6;
      bytes[16 + 2 * tile] = uint8_t(input ? columns : 64);
      bytes[48 + tile] = uint8_t(weights ? columns / 4 : 16);
    }
  }
};

// Integer sums [blocks][tile][16][16] of 32 rows, on their way to the float sums [tile][16][16]; the tiles
// are those of rows 0..15 and 16..31 times those of the panel. At most two blocks, from `b` of the panel on.
struct Ready {
  const int32_t *dots;
  int blocks, b;
  const float *factor;  // of the first row and block; rows are a.blocks apart
  const int32_t *total;
  float *sum;
  __mmask16 begun;  // 0 where these are the first blocks
};

// Adds the rows [begin, end) of the 32, which two tiles each share.
template <bool zeros, int blocks, int begin, int end>
inline __attribute__((always_inline)) void rescale(const Ready &ready, const Panel &panel, int64_t stride) {
  Floats scale[blocks][2];
#pragma GCC unroll 4
  for (int n = 0; n < 2 * blocks; n++) scale[n / 2][n % 2] = _mm512_load_ps(panel.scale[ready.b + n / 2] + n % 2 * 16);
#pragma GCC unroll 32
  for (int m = begin; m < end; m++) {
    constexpr int tile = 256;
    const int at = m / 16 * 2 * tile + m % 16 * 16;
    Floats left = _mm512_maskz_load_ps(ready.begun, ready.sum + at);
    Floats right = _mm512_maskz_load_ps(ready.begun, ready.sum + at + tile);
#pragma GCC unroll 2
    for (int n = 0; n < blocks; n++) {
      Ints x = _mm512_load_si512(ready.dots + n * 1024 + at), y = _mm512_load_si512(ready.dots + n * 1024 + at + tile);
      if constexpr (zeros) {
        const Ints total = Lanes::ints(ready.total[m * stride + n]);
        x = Lanes::sub(x, Lanes::mul(_mm512_load_si512(panel.zero[ready.b + n]), total));
        y = Lanes::sub(y, Lanes::mul(_mm512_load_si512(panel.zero[ready.b + n] + 16), total));
      }
      const Floats factor = Lanes::floats(ready.factor[m * stride + n]);
      left = Lanes::fma(Lanes::floats(x), Lanes::mul(scale[n][0], factor), left);
      right = Lanes::fma(Lanes::floats(y), Lanes::mul(scale[n][1], factor), right);
    }
    _mm512_store_ps(ready.sum + at, left);
    _mm512_store_ps(ready.sum + at + tile, right);
  }
}

template <bool zeros, int begin, int end>
inline __attribute__((always_inline)) void rescale(const Ready &ready, const Panel &panel, int64_t stride) {
  if constexpr (begin < end) {
    if (ready.blocks == 2) rescale<zeros, 2, begin, end>(ready, panel, stride);
    if (ready.blocks == 1) rescale<zeros, 1, begin, end>(ready, panel, stride);
  }
}

// A product of tiles takes 16 cycles, and so does a store, which blocks what follows while it waits. So sums
// leave one tile at a time, just before its next use, and between the products the vector units add a
// few rows of sums that left before. Rows past the last mean nothing.
struct Unit {
  explicit Unit(const oc_matrix &w) {
    const TileConfig config(w.block < 64 ? w.block : 64);
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(config.bytes);
  }
  ~Unit() { _tile_release(); }
  static constexpr int32_t less() { return 0; }

  // Products of `blocks` blocks of `steps` steps each, while the sums of the tiles go to `leaving`, and then
  // to `out`; the last block's sums stay.
  template <bool zeros, int blocks, int steps>
  static inline __attribute__((always_inline)) void pair(const Quantized &a, int64_t row, int64_t column, int width,
                                                         const Panel &panel, int64_t quad, int32_t *leaving,
                                                         int32_t *out, const Ready &ready) {
    constexpr int slots = blocks * steps * 4, free = slots > 4 ? slots - 4 : 1;
#define MEANWHILE(slot)                                                               \
  if constexpr ((slot) >= 4 && (slot) < slots)                                        \
  rescale<zeros, ((slot) - 4) * 32 / free, ((slot) - 3) * 32 / free>(ready, panel, a.blocks)
#define STEP(n)                                                                       \
  if constexpr ((n) < blocks * steps) {                                               \
    constexpr bool first = (n) % steps == 0;                                          \
    int32_t *const gone = (n) == 0 ? leaving : out;                                   \
    const int8_t *const q = a.at(row, column + (n) * width);                          \
    const uint8_t *const bytes = panel.bytes + place_of(quad + (n) * width / 4, 0);   \
    _tile_loadd(6, bytes, 64);                                                        \
    _tile_loadd(4, q, 64);                                                            \
    if (first) { _tile_stored(0, gone, 64); _tile_zero(0); }                          \
    _tile_dpbssd(0, 4, 6);                                                            \
    MEANWHILE(4 * (n));                                                               \
    _tile_loadd(7, bytes + 1024, 64);                                                 \
    if (first) { _tile_stored(1, gone + 256, 64); _tile_zero(1); }                    \
    _tile_dpbssd(1, 4, 7);                                                            \
    MEANWHILE(4 * (n) + 1);                                                           \
    _tile_loadd(5, q + a.stride, 64);                                                 \
    if (first) { _tile_stored(2, gone + 512, 64); _tile_zero(2); }                    \
    _tile_dpbssd(2, 5, 6);                                                            \
    MEANWHILE(4 * (n) + 2);                                                           \
    if (first) { _tile_stored(3, gone + 768, 64); _tile_zero(3); }                    \
    _tile_dpbssd(3, 5, 7);                                                            \
    MEANWHILE(4 * (n) + 3);                                                           \
    asm volatile("" : : : "memory");                                                  \
  }
    STEP(0) STEP(1) STEP(2) STEP(3)
#undef STEP
#undef MEANWHILE
    if constexpr (slots <= 4) rescale<zeros, 0, 32>(ready, panel, a.blocks);
  }

  template <bool zeros, int steps>
  static void chunk(const Chunk &c) {
    alignas(64) int32_t buffers[2][2 * 1024];
    const Panel &panel = c.panel;
    const Quantized &a = c.a;
    float *const sum = c.sum;
    const int64_t first = c.first, blocks = c.blocks;
    const int width = a.block / steps;
    int32_t *leaving = buffers[0];
    Ready ready = {buffers[0], 0, 0, nullptr, nullptr, sum, 0};
    int turn = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t row = 0; row < c.rows; row += step_rows) {
      c.ahead.some();
      for (int64_t b = 0; b < blocks; b += 2) {
        int32_t *const out = buffers[turn ^= 1];
        const int64_t column = (first + b) * a.block, quad = int64_t(b) * a.block / 4;
        if (blocks - b >= 2)
          pair<zeros, 2, steps>(a, row, column, width, panel, quad, leaving, out, ready);
        else
          pair<zeros, 1, steps>(a, row, column, width, panel, quad, leaving, out, ready);
        const int count = blocks - b >= 2 ? 2 : 1;
        const int64_t at = row * a.blocks + first + b;
        ready = {out, count, int(b), a.scale + at, a.sum + at, sum + row * panel_rows, __mmask16(first + b ? -1 : 0)};
        leaving = out + (count - 1) * 1024;
      }
    }
    _tile_stored(0, leaving, 64);
    _tile_stored(1, leaving + 256, 64);
    _tile_stored(2, leaving + 512, 64);
    _tile_stored(3, leaving + 768, 64);
    asm volatile("" : : : "memory");
    rescale<zeros, 0, 32>(ready, panel, a.blocks);
    for (int64_t row = 0; c.last && row < c.rows; row++)
      for (int t = 0; t < c.tiles; t++)
        _mm512_storeu_ps(c.y + row * c.stride + t * tile_rows, _mm512_load_ps(sum + place(row, t)));
  }

  template <bool zeros>
  static void chunk(const Chunk &c) {
    if (c.a.block == 128)
      chunk<zeros, 2>(c);
    else
      chunk<zeros, 1>(c);
  }

  // Where the sum of a row and a tile lies.
  static int64_t place(int64_t row, int tile) {
    return row / 32 * 1024 + (row % 32 / 16 * 2 + tile) * 256 + row % 16 * 16;
  }
};

}  // namespace
