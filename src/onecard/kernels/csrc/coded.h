// Rows times tiles whose weights are held as something else than integers of a block: the two loops of
// matmul.cpp over a `Codec`, which knows how to read a tile.
//
//   Codec(w, g, tile, part)   stands before the first block of `wide` parts of a tile from `part` on
//   seek(first)               stands before another block, one that begins at a multiple of 256 columns
//   block()                   goes on to the next block
//   group(k)                  goes on to the columns k .. k + 31 of the block, k rising
//   call_ahead()              calls for what few rows will read of a group like this one
//   quad(j)                   u of the columns 4 j .. 4 j + 3 of the group, j rising; of 8 bits u - 128 where
//                             Lanes::signed_bytes
//
// u - zero times the block's scale is the weight, zero = 2^(width - 1). The order of sums, and with it every bit,
// is that of integers of `width` bits without a zero point (matmul.cpp).
#pragma once

#include "engine.h"
#include "many.h"
#include "tiles.h"

namespace {

using oc::Input;
using oc::Quantized;

template <class Codec>
constexpr int32_t zero_of_codec = 1 << (Codec::width - 1);

template <class Codec>
constexpr bool is_signed = Codec::width == 8 && Lanes::signed_bytes;

template <class Codec, class L = Lanes>
inline Ints dot_of(Ints sum, Bytes u, const int8_t *quad) {
  if constexpr (is_signed<Codec>)
    return L::dot_signed(sum, u, quad);
  else
    return L::template dot_code<Codec::width>(sum, u, quad);
}

template <class Codec, int rows>
void few_rows(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Quantized &a, int64_t first, float *y,
              int64_t stride) {
  constexpr int chains = rows <= 2 ? 2 : 1;
  constexpr int32_t left = (is_signed<Codec> ? 128 : 0) - zero_of_codec<Codec>;
  for (int from = 0; from < parts; from += wide) {
    Floats sum[wide][rows];
    for (auto &part : sum)
      for (auto &s : part) s = Lanes::floats(0.0f);
    Codec codec(w, g, tile, from);
    for (int64_t b = 0; b < g.blocks; b++) {
      const int8_t *const q = a.at(first, b * w.block);
      Ints dots[chains][wide][rows];
#pragma GCC unroll 2
      for (int p = 0; p < wide; p++)
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
          dots[0][p][m] = Lanes::ints(int32_t(uint32_t(left) * uint32_t(a.sum[(first + m) * a.blocks + b])));
          for (int c = 1; c < chains; c++) dots[c][p][m] = Lanes::ints(0);
        }
      codec.block();
      for (int k = 0; k < w.block; k += 32) {
        codec.group(k);
        codec.call_ahead();
        const int8_t *const group = q + k / 64 * Quantized::chunk + k % 64;
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
          const Line u = codec.quad(j);
#pragma GCC unroll 2
          for (int p = 0; p < wide; p++)
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++) {
              Ints &dot = dots[j % chains][p][m];
              dot = dot_of<Codec>(dot, u.part[p], group + 4 * j + 64 * m);
            }
        }
      }
#pragma GCC unroll 2
      for (int p = 0; p < wide; p++) {
        const Floats scale = scale_of(w, g, tile, b, from + p);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
          Ints dot = dots[0][p][m];
          for (int c = 1; c < chains; c++) dot = Lanes::add(dot, dots[c][p][m]);
          const Floats factor = Lanes::mul(scale, Lanes::floats(a.scale[(first + m) * a.blocks + b]));
          sum[p][m] = Lanes::fma(Lanes::floats(dot), factor, sum[p][m]);
        }
      }
    }
    for (int p = 0; p < wide; p++)
      for (int m = 0; m < rows; m++) Lanes::store(y + m * stride + (from + p) * Lanes::count, sum[p][m]);
  }
}

template <class Codec>
void few(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Quantized &a, int64_t rows, float *y,
         int64_t stride) {
  int64_t m = 0;
#if defined(__AVX512BW__)
  for (; m + 8 <= rows; m += 8) few_rows<Codec, 8>(w, g, tile, a, m, y + m * stride, stride);
#endif
  for (; m + 4 <= rows; m += 4) few_rows<Codec, 4>(w, g, tile, a, m, y + m * stride, stride);
  for (; m + 2 <= rows; m += 2) few_rows<Codec, 2>(w, g, tile, a, m, y + m * stride, stride);
  for (; m < rows; m++) few_rows<Codec, 1>(w, g, tile, a, m, y + m * stride, stride);
}

// Inputs that stay float32: columns in rising order, first within a block.
template <class Codec, int rows>
void exact_rows(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const float *x, int64_t x_stride, float *y,
                int64_t stride) {
  const Ints zero = Lanes::ints(zero_of_codec<Codec>);
  for (int from = 0; from < parts; from += wide) {
    Floats sum[wide][rows];
    for (auto &part : sum)
      for (auto &s : part) s = Lanes::floats(0.0f);
    Codec codec(w, g, tile, from);
    for (int64_t b = 0; b < g.blocks; b++) {
      const int64_t left = w.columns - b * w.block;
      Floats dots[wide][rows];
      for (auto &part : dots)
        for (auto &dot : part) dot = Lanes::floats(0.0f);
      const auto column = [&](int p, int64_t k, Ints u) {
        if (k >= left) return;
        const Floats weight = Lanes::floats(Lanes::sub(u, zero));
        for (int m = 0; m < rows; m++)
          dots[p][m] = Lanes::fma(weight, Lanes::floats(x[m * x_stride + b * w.block + k]), dots[p][m]);
      };
      codec.block();
      for (int i = 0; i < w.block / 4; i++) {
        if (i % 8 == 0) codec.group(4 * i);
        const Line line = codec.quad(i % 8);
        for (int p = 0; p < wide; p++) {
          const Bytes u = is_signed<Codec> ? Lanes::flipped(line.part[p]) : line.part[p];
          column(p, 4 * i, Lanes::template column_of<0>(u));
          column(p, 4 * i + 1, Lanes::template column_of<1>(u));
          column(p, 4 * i + 2, Lanes::template column_of<2>(u));
          column(p, 4 * i + 3, Lanes::template column_of<3>(u));
        }
      }
      for (int p = 0; p < wide; p++) {
        const Floats scale = scale_of(w, g, tile, b, from + p);
        for (int m = 0; m < rows; m++) sum[p][m] = Lanes::fma(dots[p][m], scale, sum[p][m]);
      }
    }
    for (int p = 0; p < wide; p++)
      for (int m = 0; m < rows; m++) Lanes::store(y + m * stride + (from + p) * Lanes::count, sum[p][m]);
  }
}

#if defined(OC_PANELS)
template <class Codec>
void unpack_codes(const oc_matrix &w, const Geometry &g, const uint8_t *tile, int place, int64_t first, int blocks,
                  Panel &panel) {
  constexpr int32_t more = (signed_panel ? zero_of_codec<Codec> : 0) - (is_signed<Codec> ? 128 : 0);
  const Bytes shift = Lanes::ints(int32_t(uint32_t(more & 255) * 0x01010101));
  const int quads = w.block / 4;
  for (int from = 0; from < parts; from += wide) {
    const int row = place * tile_rows + from * Lanes::count;
    Codec codec(w, g, tile, from);
    codec.seek(first);
    for (int b = 0; b < blocks; b++) {
      for (int p = 0; p < wide; p++) {
        Lanes::store(&panel.zero[b][row + p * Lanes::count], Lanes::ints(0));
        Lanes::store(&panel.scale[b][row + p * Lanes::count], scale_of(w, g, tile, first + b, from + p));
      }
      codec.block();
      for (int i = 0; i < quads; i += 8) {
        codec.group(4 * i);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
          uint8_t *const out = panel.bytes + place_of(int64_t(b) * quads + i + j, place) + 4 * Lanes::count * from;
          const Line u = codec.quad(j);
          for (int p = 0; p < wide; p++) Lanes::store(out + 4 * Lanes::count * p, Lanes::less(u.part[p], shift));
        }
      }
    }
  }
}
#endif

typedef void FewRows(const oc_matrix &, const Geometry &, const uint8_t *tile, const Quantized &, int64_t rows, float *y,
                     int64_t stride);

template <class Codec, FewRows *few_of_tile = few<Codec>>
void multiply_coded(const oc_matrix &w, const Input &in, int64_t begin, int64_t end, float *y, int64_t stride,
                    void *scratch) {
  const Geometry g(w);
#if defined(OC_PANELS)
  if (!w.exact && pays(w, in.rows))
    return many(w, g, unpack_codes<Codec>, zero_of_codec<Codec>, w.data, begin, end, *in.quantized, in.rows, y, stride,
                scratch);
#endif
  (void)scratch;
  for (int64_t t = begin; t < end; t++) {
    const uint8_t *const tile = g.at(w.data, t);
    float *const out = y + t * tile_rows;
    if (!w.exact) {
      few_of_tile(w, g, tile, *in.quantized, in.rows, out, stride);
      continue;
    }
    int64_t m = 0;
    for (; m + 4 <= in.rows; m += 4)
      exact_rows<Codec, 4>(w, g, tile, in.x + m * in.stride, in.stride, out + m * stride, stride);
    for (; m < in.rows; m++)
      exact_rows<Codec, 1>(w, g, tile, in.x + m * in.stride, in.stride, out + m * stride, stride);
  }
}

}  // namespace
