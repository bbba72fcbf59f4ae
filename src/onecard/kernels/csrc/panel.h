// A panel: a few tiles of a matrix of integers, a chunk of columns, unpacked to bytes. It lies in the first cache
// while all rows pass over it. A format comes in by its `Unpack`; what multiplies (unit_amx.h,
// unit_avx512.h, unit_avx2.h) does not know how codes were stored.
#pragma once

#include "engine.h"
#include "tiles.h"

namespace {

using oc::Quantized;

#if defined(__AMX_INT8__)
constexpr int panel_tiles = 2, step_rows = 32, many_from = 9, many_bytes_from = 9;
constexpr bool signed_panel = true;
#elif defined(__AVX512VNNI__)
constexpr int panel_tiles = 3, step_rows = 4, many_from = 25, many_bytes_from = 25;
constexpr bool signed_panel = false;
#else
constexpr int panel_tiles = 3, step_rows = 4, many_from = 7, many_bytes_from = 33;
constexpr bool signed_panel = false;
#endif
constexpr int panel_rows = panel_tiles * tile_rows;
constexpr int chunk_columns = signed_panel || Lanes::count == 8 ? 256 : 512, chunk_blocks = chunk_columns / 32;

// Whether so many rows make good the unpacking. Integers of 8 bits are bytes already.
inline bool pays(const oc_matrix &w, int64_t rows) {
  return rows >= (w.bits == 8 && w.kind != OC_SPARSE ? many_bytes_from : many_from);
}

// Where the bytes of a tile of the panel lie that belong to the columns 4 quad .. 4 quad + 3: sixteen quads
// of one tile after another for the tile unit, else the tiles side by side.
constexpr int64_t place_of(int64_t quad, int tile) {
  return signed_panel ? ((quad / 16 * panel_tiles + tile) * 16 + quad % 16) * 64 : (quad * panel_tiles + tile) * 64;
}

// A few tiles, a chunk of columns, and what goes with each block.
struct Panel {
  alignas(64) uint8_t bytes[chunk_columns * panel_rows];
  alignas(64) float scale[chunk_blocks][panel_rows];
  // What the bytes still count too much of; where the panel is not signed, negated and cut to 16 bits.
  alignas(64) int32_t zero[chunk_blocks][panel_rows];
};

// Codes of 4 bits and less become u - zero where the panel is signed.
template <int bits>
inline void unpack(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int place, int64_t first, int blocks,
            Panel &panel) {
  const int quads = w.block / 4;
  for (int b = 0; b < blocks; b++) {
    const uint8_t *const codes = tile + g.codes + (first + b) * g.block_codes;
    for (int part = 0; part < parts; part++) {
      const int row = place * tile_rows + part * Lanes::count;
      const Ints zero = zero_of<bits>(w, g, tile, first + b, part);
      Ints left = Lanes::low_half(Lanes::sub(Lanes::ints(0), zero));
      Bytes shift = Lanes::ints(0);
      if constexpr (signed_panel) {
        shift = Lanes::mul(zero, Lanes::ints(0x01010101));
        if (bits == 8) shift = Lanes::ints(int32_t(0x80808080));
        left = bits == 8 ? Lanes::sub(zero, Lanes::ints(128)) : Lanes::ints(0);
      }
      Lanes::store(&panel.zero[b][row], left);
      Lanes::store(&panel.scale[b][row], scale_of(w, g, tile, first + b, part));
      for (int i = 0; i < quads; i += 8)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
          const Bytes u = quad_of<bits>(codes, i + j, part);
          uint8_t *const out = panel.bytes + place_of(int64_t(b) * quads + i + j, place) + 4 * Lanes::count * part;
          Lanes::store(out, signed_panel ? Lanes::less(u, shift) : u);
        }
    }
  }
}

// The codes of the next chunk are called for while this one is multiplied.
struct Ahead {
  const uint8_t *tile[panel_tiles];
  int64_t at, end, each;  // bytes of a tile's chunk, and how many of them at a time

  // With few rows there is no time to spread it out.
  void at_once(int t) const {
    for (int64_t i = 0; i < end; i += 64) _mm_prefetch(reinterpret_cast<const char *>(tile[t] + i), _MM_HINT_T0);
  }
  void some() {
    for (const int64_t stop = at + each < end ? at + each : end; at < stop; at += 64)
      for (const uint8_t *codes : tile) _mm_prefetch(reinterpret_cast<const char *>(codes + at), _MM_HINT_T1);
  }
};

typedef void Unpack(const oc_matrix &, const Geometry &, const uint8_t *tile, int place, int64_t first, int blocks,
                    Panel &);

// What a unit multiplies at once: all rows times one chunk of a panel. Sums grow in `sum` from chunk to chunk,
// as the unit likes them, and go to y with the last.
struct Chunk {
  const Panel &panel;
  int tiles;  // of the panel that are there
  int64_t first, blocks;
  bool last;
  const Quantized &a;
  const int32_t *start;  // [rows][blocks] what the sums of a block begin at, where all codes have the same zero
  int64_t rows;
  float *sum, *y;
  int64_t stride;
  Ahead &ahead;
};

}  // namespace
