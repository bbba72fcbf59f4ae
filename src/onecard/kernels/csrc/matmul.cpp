// Rows times a matrix in the kernel layout (onecard.h), compiled once per instruction-set class.
//
// Integer matrices multiply rows that were rounded to int8 in the same blocks. Within a block the sum is
// an integer and exact in any order; blocks are then added in rising order, as in
//
//   y = fma(float(sum of (u - zero) * q), weight scale * input scale, y)
//
// so the bits of a result do not depend on how many rows there are, on the unit that multiplies, nor on
// the class. Two ways to get them:
//
//   few rows   a tile's codes are read once, straight from memory, in one sequential stream: the speed of
//              decoding is that of memory.
//   many rows  a few tiles are unpacked, a chunk of columns at a time, to a panel of bytes that lies in the
//              first cache while all rows pass over it; codes are unpacked once per panel, not per row.
//              The panel meets the rows in tiles (unit_amx.h) or in vector registers (unit_avx512.h, unit_avx2.h).
//
// Dense matrices, and integer ones whose inputs stay float32, add columns in rising order, one fused
// multiply-add each; integer ones first within a block.

#include "engine.h"
#include "many.h"
#include "tiles.h"

namespace {

using oc::Input;
using oc::Quantized;

// ---------------------------------------------------------------------------------------- few rows

constexpr int few_most = Lanes::count == 16 ? 8 : 4;

// What is called for while a block is multiplied, so many bytes before it is needed; what lies around the
// codes comes along. Twice, because a processor that has enough to fetch may drop a call.
struct Calls {
  const uint8_t *near, *far;
  int64_t step;  // of a block

  Calls(const Geometry &g, const uint8_t *tile)
      : near(tile + oc::reach.near), far(tile + oc::reach.far), step(g.tile / g.blocks) {}
  inline void line(int i) const {
    __builtin_prefetch(near + 64 * i);
    __builtin_prefetch(far + 64 * i);
  }
  inline void next() { near += step, far += step; }
};

// `rows` rows from `first` on, times one tile, into y[row][16]. With one or two rows, products of neighbouring
// quads go to sums of their own, so that none waits for the one before it, and a block is one piece of code:
// a loop's end that is guessed wrong costs as much as half a block.
template <int bits, int block, int rows, class L = Lanes>
void few_rows(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Quantized &a,
              int64_t first, float *y, int64_t stride) {
  constexpr bool by_pairs = L::by_pairs && bits <= 4;
  constexpr int chains = rows <= 2 ? 2 : 1, quads = block / 4;
  constexpr int at_once = rows > 2 && bits != 3 && !by_pairs ? 4 : Lanes::count == 8 ? 8 : quads;
  constexpr int lines = block * bits * 2 / 64;
  for (int from = 0; from < parts; from += wide) {
    Floats sum[wide][rows];
    for (auto &part : sum)
      for (auto &s : part) s = Lanes::floats(0.0f);
    const uint8_t *codes = tile + g.codes;
    Calls calls(g, tile);
    for (int64_t b = 0; b < g.blocks; b++, codes += g.block_codes, calls.next()) {
      const int8_t *const q = a.at(first, b * block);
      Ints dots[chains][wide][rows];
#pragma GCC unroll 2
      for (int p = 0; p < wide; p++)
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
          const int32_t total = a.sum[(first + m) * a.blocks + b];
          dots[0][p][m] = begin_of<bits>(w, g, tile, b, from + p, total);
          for (int c = 1; c < chains; c++) dots[c][p][m] = Lanes::ints(0);
        }
      calls.line(lines);
#pragma GCC unroll 1
      for (int i = 0; i < quads; i += at_once) {
        const uint8_t *const own = codes + 8 * bits * i;
        const int8_t *const begin = q + i / 16 * Quantized::chunk + i % 16 * 4;
        Ints pairs[wide][rows];
#pragma GCC unroll 32
        for (int j = 0; j < at_once; j++) {
          if (j * lines % quads < lines) calls.line((i * lines + j * lines) / quads);
          const int8_t *const quad = begin + j / 16 * Quantized::chunk + j % 16 * 4;
#pragma GCC unroll 2
          for (int p = 0; p < wide; p++) {
            const Bytes u = quad_of<bits>(own, j, from + p);
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++) {
              if constexpr (by_pairs) {
                static_assert(at_once <= L::template pairs_fit<bits>);
                const Ints both = L::pairs(u, quad + 64 * m);
                pairs[p][m] = j ? L::add_pairs(pairs[p][m], both) : both;
              } else {
                Ints &dot = dots[j % chains][p][m];
                dot = L::template dot_code<bits>(dot, u, quad + 64 * m);
              }
            }
          }
        }
        if constexpr (by_pairs)
#pragma GCC unroll 2
          for (int p = 0; p < wide; p++)
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++) {
              Ints &dot = dots[i / at_once % chains][p][m];
              dot = L::widened(dot, pairs[p][m]);
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

typedef void FewRows(const oc_matrix &, const Geometry &, const uint8_t *, const Quantized &, int64_t,
                     float *, int64_t);

template <int bits, int block>
void few(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Quantized &a, int64_t rows,
         float *y, int64_t stride) {
  static constexpr FewRows *kernels[] = {
      few_rows<bits, block, 1>, few_rows<bits, block, 2>, few_rows<bits, block, 3>, few_rows<bits, block, 4>,
#if defined(__AVX512BW__)
      few_rows<bits, block, 5>, few_rows<bits, block, 6>, few_rows<bits, block, 7>, few_rows<bits, block, 8>,
#endif
  };
  for (int64_t first = 0; first < rows; first += few_most) {
    const int64_t count = rows - first < few_most ? rows - first : few_most;
    kernels[count - 1](w, g, tile, a, first, y + first * stride, stride);
  }
}

template <int bits>
void few(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Quantized &a, int64_t rows,
         float *y, int64_t stride) {
  if (w.block == 128) few<bits, 128>(w, g, tile, a, rows, y, stride);
  if (w.block == 64) few<bits, 64>(w, g, tile, a, rows, y, stride);
  if (w.block == 32) few<bits, 32>(w, g, tile, a, rows, y, stride);
}

// --------------------------------------------------------------------------------------- float rows

constexpr int float_rows = 4;

// Calls each(column, weights of a part of the tile), a block at a time: block(b) begins it, end(b) ends it.
template <int bits, class Each>
void columns_of_block(const oc_matrix &w, const uint8_t *codes, int part, Ints zero, const Each &each) {
  for (int i = 0; i < w.block / 4; i += 8)
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      const Bytes u = quad_of<bits>(codes, i + j, part);
      const int k = 4 * (i + j);
      each(k, Lanes::floats(Lanes::sub(Lanes::template column_of<0>(u), zero)));
      each(k + 1, Lanes::floats(Lanes::sub(Lanes::template column_of<1>(u), zero)));
      each(k + 2, Lanes::floats(Lanes::sub(Lanes::template column_of<2>(u), zero)));
      each(k + 3, Lanes::floats(Lanes::sub(Lanes::template column_of<3>(u), zero)));
    }
}

template <int bits, int rows>
void exact_rows(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const float *x,
                int64_t x_stride, float *y, int64_t stride) {
  for (int part = 0; part < parts; part++) {
    Floats sum[rows];
    for (auto &s : sum) s = Lanes::floats(0.0f);
    for (int64_t b = 0; b < g.blocks; b++) {
      Ints zero = w.zero_point ? Lanes::bytes(tile + g.zeros + b * tile_rows + part * Lanes::count)
                               : Lanes::ints(1 << (bits - 1));
      const int64_t left = w.columns - b * w.block;
      Floats dots[rows];
      for (auto &dot : dots) dot = Lanes::floats(0.0f);
      columns_of_block<bits>(w, tile + g.codes + b * g.block_codes, part, zero, [&](int k, Floats u) {
        if (k >= left) return;
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
          dots[m] = Lanes::fma(u, Lanes::floats(x[m * x_stride + b * w.block + k]), dots[m]);
      });
      const Floats scale = scale_of(w, g, tile, b, part);
      for (int m = 0; m < rows; m++) sum[m] = Lanes::fma(dots[m], scale, sum[m]);
    }
    for (int m = 0; m < rows; m++) Lanes::store(y + m * stride + part * Lanes::count, sum[m]);
  }
}

template <int bits>
void exact(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Input &in, float *y,
           int64_t stride) {
  int64_t m = 0;
  for (; m + float_rows <= in.rows; m += float_rows)
    exact_rows<bits, float_rows>(w, g, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
  for (; m < in.rows; m++)
    exact_rows<bits, 1>(w, g, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
}

// ------------------------------------------------------------------------------------------- dense

template <int rows>
void dense_rows(const oc_matrix &w, const uint8_t *tile, const float *x, int64_t x_stride, float *y,
                int64_t stride) {
  const int64_t line = tile_rows * width_of(w.dtype), part_bytes = line / parts;
  for (int part = 0; part < parts; part++) {
    Floats sum[rows];
    for (auto &s : sum) s = Lanes::floats(0.0f);
    for (int64_t k = 0; k < w.columns; k++) {
      const Floats column = Lanes::read(tile + k * line + part * part_bytes, w.dtype);
#pragma GCC unroll 12
      for (int m = 0; m < rows; m++) sum[m] = Lanes::fma(column, Lanes::floats(x[m * x_stride + k]), sum[m]);
    }
    for (int m = 0; m < rows; m++) Lanes::store(y + m * stride + part * Lanes::count, sum[m]);
  }
}

void dense(const oc_matrix &w, const uint8_t *tile, const Input &in, float *y, int64_t stride) {
  constexpr int most = Lanes::count == 16 ? 12 : 8;
  int64_t m = 0;
  for (; m + most <= in.rows; m += most)
    dense_rows<most>(w, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
  for (; m + 4 <= in.rows; m += 4)
    dense_rows<4>(w, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
  for (; m < in.rows; m++)
    dense_rows<1>(w, tile, in.x + m * in.stride, in.stride, y + m * stride, stride);
}

// ------------------------------------------------------------------------------------------- table

int64_t tile_bytes(const oc_matrix &w) {
  return w.bits ? Geometry(w).tile : to_lines(w.columns * tile_rows * width_of(w.dtype));
}

template <int bits>
void multiply_tile(const oc_matrix &w, const Geometry &g, const uint8_t *tile, const Input &in, float *y,
                   int64_t stride) {
  if (w.exact) return exact<bits>(w, g, tile, in, y, stride);
  few<bits>(w, g, tile, *in.quantized, in.rows, y, stride);
}

void multiply(const oc_matrix &w, const Input &in, int64_t begin, int64_t end, float *y, int64_t stride,
              void *scratch) {
  if (w.kind == OC_PATTERN) return oc::pattern::OC_CLASS(w, in, begin, end, y, stride, scratch);
  if (w.kind == OC_SPARSE) return oc::sparse::OC_CLASS(w, in, begin, end, y, stride, scratch);
  if (w.kind) return oc::table::OC_CLASS(w, in, begin, end, y, stride, scratch);
  const auto *const data = static_cast<const uint8_t *>(w.data);
  const int64_t bytes = tile_bytes(w);
  (void)scratch;
  if (!w.bits) {
    for (int64_t t = begin; t < end; t++) dense(w, data + t * bytes, in, y + t * tile_rows, stride);
    return;
  }
  const Geometry g(w);
#if defined(OC_PANELS)
  if (!w.exact && pays(w, in.rows)) {
    Unpack *const unpack_tile = w.bits == 8   ? unpack<8>
                                : w.bits == 4 ? unpack<4>
                                : w.bits == 3 ? unpack<3>
                                              : unpack<2>;
    return many(w, g, unpack_tile, 1 << (w.bits - 1), data, begin, end, *in.quantized, in.rows, y, stride, scratch);
  }
#endif
  for (int64_t t = begin; t < end; t++) {
    const uint8_t *const tile = data + t * bytes;
    float *const out = y + t * tile_rows;
    if (w.bits == 8) multiply_tile<8>(w, g, tile, in, out, stride);
    if (w.bits == 4) multiply_tile<4>(w, g, tile, in, out, stride);
    if (w.bits == 3) multiply_tile<3>(w, g, tile, in, out, stride);
    if (w.bits == 2) multiply_tile<2>(w, g, tile, in, out, stride);
  }
}

int64_t scratch_bytes(const oc_matrix &w, int64_t rows) {
#if defined(OC_PANELS)
  if (w.bits && !w.exact && pays(w, rows))
    return Scratch::bytes(rows, Geometry(w).blocks);
#endif
  (void)w, (void)rows;
  return 0;
}

}  // namespace

namespace oc::matmul {

#if defined(OC_PANELS)
const Matmul OC_CLASS = {multiply, scratch_bytes, panel_tiles};
#else
const Matmul OC_CLASS = {multiply, scratch_bytes, 3};
#endif

}  // namespace oc::matmul
