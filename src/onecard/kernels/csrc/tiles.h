// A tile of integers: where its parts lie, and its codes, zeros and scales as vectors.
#pragma once

#include "lanes.h"

namespace {

constexpr int64_t to_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline int64_t width_of(int dtype) { return dtype == OC_FP32 ? 4 : 2; }

// Bytes of a tile's table, or tables of its rows.
inline int64_t table_bytes(int kind, int bits) {
  if (kind == OC_TABLES) return bits <= 2 ? 64 : 16 << bits;
  return kind == OC_TABLE ? 64 : 0;
}

// Parts that are multiplied together: where registers are half a line, both halves as it comes from memory, or one
// half of the time would be spent on what lies in the cache.
constexpr int wide = Lanes::count == 8 ? parts : 1;

struct Line {
  Bytes part[wide];
};

struct Geometry {
  int64_t blocks, zeros, codes, tile;  // where the zeros (or tables) and codes of a tile begin, and its bytes
  int64_t block_codes;                 // bytes of one block's codes
  int64_t scale_line;                  // bytes of one block's scales
  const uint64_t *begins = nullptr;    // of sparse tiles, which differ in length: `tile` is their mean

  explicit Geometry(const oc_matrix &w) {
    blocks = (w.columns + w.block - 1) / w.block;
    scale_line = tile_rows * width_of(w.dtype);
    zeros = to_lines(blocks * scale_line);
    codes = zeros + (w.zero_point ? to_lines(blocks * tile_rows) : 0) + table_bytes(w.kind, w.bits);
    block_codes = int64_t(w.block) * w.bits * 2;
    if (w.kind == OC_SPARSE) {
      const int64_t tiles = (w.rows + tile_rows - 1) / tile_rows;
      codes = zeros + to_lines((w.columns + 255) / 256 * 4);
      block_codes = w.block * 2 + w.slots * w.bits / 8 / (tiles * blocks);
      begins = static_cast<const uint64_t *>(w.data);
    }
    if (w.kind == OC_PATTERN) block_codes = int64_t(w.block) * (w.bits + 2);
    tile = codes + blocks * block_codes;
  }
  const uint8_t *at(const void *data, int64_t index) const {
    return static_cast<const uint8_t *>(data) + (begins ? int64_t(begins[index]) : index * tile);
  }
};

// The codes of the columns 4 i .. 4 i + 3 behind those that begin at `codes`, in the rows of one part of the tile.
template <int bits>
inline Bytes quad_of(const uint8_t *codes, int i, int part) {
  const auto line = [=](int number) { return Lanes::load(codes + 64 * number + 4 * Lanes::count * part); };
  if constexpr (bits == 8) return line(i);
  if constexpr (bits == 4) return i & 1 ? Lanes::field<4, 15>(line(i / 2)) : Lanes::field<0, 15>(line(i / 2));
  if constexpr (bits == 3) {
    const int first = i / 8 * 3, own = first + i % 8 / 2;
    if (i % 8 == 6) return Lanes::either(Lanes::field<6, 3>(line(first)), Lanes::field<4, 4>(line(first + 1)));
    if (i % 8 == 7) return Lanes::either(Lanes::field<7, 1>(line(first + 1)), Lanes::field<5, 6>(line(first + 2)));
    return i & 1 ? Lanes::field<3, 7>(line(own)) : Lanes::field<0, 7>(line(own));
  }
  if constexpr (bits == 2) {
    const Bytes four = line(i / 4);
    return i % 4 == 0   ? Lanes::field<0, 3>(four)
           : i % 4 == 1 ? Lanes::field<2, 3>(four)
           : i % 4 == 2 ? Lanes::field<4, 3>(four)
                        : Lanes::field<6, 3>(four);
  }
}

// What the products above count too much of: the zero, or what of it is not in the codes as read.
template <int bits>
inline Ints zero_of(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int64_t b, int part) {
  constexpr int32_t read = bits == 8 && Lanes::signed_bytes ? 128 : 0;
  if (!w.zero_point) return Lanes::ints((1 << (bits - 1)) - read);
  const Ints zero = Lanes::bytes(tile + g.zeros + b * tile_rows + part * Lanes::count);
  return Lanes::sub(zero, Lanes::ints(read));
}

// What the sum of a block begins at, if the sum of its inputs is `total`: -zero * total. (Without a sign: the sum
// of a row with NaN may be anything.)
template <int bits>
inline Ints begin_of(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int64_t b, int part, int32_t total) {
  constexpr uint32_t read = bits == 8 && Lanes::signed_bytes ? 128 : 0;
  if (w.zero_point) return Lanes::mul(zero_of<bits>(w, g, tile, b, part), Lanes::ints(int32_t(0u - uint32_t(total))));
  return Lanes::ints(int32_t((read - (1u << (bits - 1))) * uint32_t(total)));
}

inline Floats scale_of(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int64_t b, int part) {
  return Lanes::read(tile + b * g.scale_line + part * (g.scale_line / parts), w.dtype);
}

}  // namespace
