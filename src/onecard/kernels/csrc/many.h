// Many rows times a matrix of integers: panel after panel, chunk after chunk.
#pragma once

#include "engine.h"
#include "tiles.h"

#if (defined(__AVX512BW__) && defined(__AVX512VNNI__)) || (defined(__AVX2__) && !defined(__AVXVNNI__))
#define OC_PANELS

#include "panel.h"
#if defined(__AMX_INT8__)
#include "unit_amx.h"
#elif defined(__AVX512VNNI__)
#include "unit_avx512.h"
#else
#include "unit_avx2.h"
#endif

namespace {

struct Scratch {
  Panel panel;
  float *sum() { return reinterpret_cast<float *>(this + 1); }  // [rows][panel_rows]
  int32_t *start(int64_t rows) { return reinterpret_cast<int32_t *>(sum() + padded(rows) * panel_rows); }

  static int64_t padded(int64_t rows) { return (rows + step_rows - 1) / step_rows * step_rows; }
  static int64_t bytes(int64_t rows, int64_t blocks) {
    return int64_t(sizeof(Scratch)) + to_lines(padded(rows) * (panel_rows + blocks) * 4);
  }
};

// All rows times the tiles [begin, end) of a matrix, which `unpack` reads. `zero` is what all codes have in common
// (of `g`, only where the tile begins, its codes, and their bytes per block count).
inline void many(const oc_matrix &w, const Geometry &g, Unpack *unpack, int32_t zero, const void *data,
                 int64_t begin, int64_t end, const Quantized &a, int64_t rows, float *y, int64_t stride, void *scratch) {
  auto &own = *static_cast<Scratch *>(scratch);
  const bool zeros = w.zero_point && (w.bits == 8 || !signed_panel);
  const Unit unit(w);
  const auto begin_of_one = uint32_t(unit.less() - zero);
  int32_t *const start = own.start(rows);
  if (!zeros && !signed_panel)
    for (int64_t i = 0; i < Scratch::padded(rows) * g.blocks; i++)  // of a row with NaN the sum may be anything
      start[i] = int32_t(begin_of_one * uint32_t(a.sum[i]));
  const int64_t per_chunk = chunk_columns / w.block, turns = (rows + step_rows - 1) / step_rows;
  for (int64_t at = begin; at < end; at += panel_tiles) {
    const int tiles = int(end - at < panel_tiles ? end - at : panel_tiles);
    const uint8_t *tile[panel_tiles];
    for (int t = 0; t < panel_tiles; t++) tile[t] = g.at(data, at + (t < tiles ? t : 0));
    for (int64_t first = 0; first < g.blocks; first += per_chunk) {
      const int blocks = int(g.blocks - first < per_chunk ? g.blocks - first : per_chunk);
      // Behind the last chunk of a panel comes the first of the next one, if there is one.
      const bool last = first + per_chunk >= g.blocks;
      const int64_t next = g.codes + (last ? panel_tiles * g.tile : (first + per_chunk) * g.block_codes);
      const int64_t bytes = last && at + panel_tiles >= end ? 0 : per_chunk * g.block_codes;
      Ahead ahead = {{}, 0, bytes, to_lines((bytes + turns - 1) / turns)};
      for (int t = 0; t < panel_tiles; t++) ahead.tile[t] = tile[t] + next;
      for (int t = 0; t < panel_tiles; t++) {
        if (turns < 16) ahead.at_once(t);
        unpack(w, g, tile[t], t, first, blocks, own.panel);
      }
      const Chunk chunk = {own.panel, tiles, first, blocks, last, a, start, rows, own.sum(), y + at * tile_rows,
                           stride, ahead};
      if (zeros)
        unit.chunk<true>(chunk);
      else
        unit.chunk<false>(chunk);
    }
  }
}

}  // namespace

#endif
