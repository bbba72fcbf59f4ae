// Matrices as checkpoints store them become the kernel layout of onecard.h: once per model, into a file
// that is mapped from then on. Compiled once, for the plainest processor: codes are moved eight at a
// time in 64-bit registers, which is faster than a disk delivers them.
//
// A tile is made block by block: the codes of 16 rows as bytes (16 x 128 at most, so in the fastest
// cache), then woven into lines. A line is 16 words of 32 bits, one of each row, and such a word is made
// of `8 / bits` neighbouring words of codes shifted into each other.

#include <atomic>
#include <functional>
#include <new>
#include <vector>

#include "onecard.h"
#include "packing.h"
#include "threads.h"

namespace {

constexpr int64_t tile_rows = 16, most_block = 128;

struct Codes {
  alignas(64) uint8_t row[tile_rows][most_block];
};

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

bool is_float(int dtype) { return dtype == OC_FP32 || dtype == OC_FP16 || dtype == OC_BF16; }

int64_t bytes_of(int dtype) { return dtype == OC_FP32 ? 4 : 2; }

// Where the parts of a tile lie, in bytes from its beginning.
struct Tile {
  int64_t blocks, zeros, codes, bytes;
};

int64_t table_bytes(const oc_matrix &m) {
  if (m.kind == OC_TABLES) return m.bits <= 2 ? 64 : 16 << m.bits;
  return m.kind == OC_TABLE ? 64 : 0;
}

// Of a sparse matrix or a pattern, the tile of the same integers stored densely.
Tile tile_of(const oc_matrix &m) {
  if (m.bits == 0) return {0, 0, 0, whole_lines(m.columns * tile_rows * bytes_of(m.dtype))};
  const int64_t blocks = (m.columns + m.block - 1) / m.block;
  const int64_t zeros = whole_lines(blocks * tile_rows * bytes_of(m.dtype));
  const int64_t codes = zeros + (m.zero_point ? whole_lines(blocks * tile_rows) : 0) + table_bytes(m);
  return {blocks, zeros, codes, codes + blocks * m.block * tile_rows * m.bits / 8};
}

bool sound(const oc_matrix *m) {
  constexpr int64_t most = int64_t(1) << 30;
  if (!m || m->rows < 1 || m->rows > most || m->columns < 1 || m->columns > most) return false;
  if (!is_float(m->dtype)) return false;
  if (m->kind < OC_PLAIN || m->kind > OC_PATTERN || (m->kind && m->zero_point)) return false;
  if (m->slots < 0 || m->slots > m->rows * m->columns || (m->slots && m->kind != OC_SPARSE)) return false;
  if (m->bits == 0) return m->block == 0 && m->zero_point == 0 && m->kind == OC_PLAIN;
  bool known = m->bits == 2 || m->bits == 3 || m->bits == 4 || m->bits == 8;
  if (m->kind == OC_TABLE) known = m->bits >= 1 && m->bits <= 6;
  if (m->kind == OC_TABLES) known = m->bits >= 1 && m->bits <= 4;
  if (m->kind == OC_SPARSE || m->kind == OC_PATTERN) known = m->bits == 4 || m->bits == 8;
  const bool fits = m->block == 32 || m->block == 64 || m->block == 128;
  return known && fits && (m->zero_point == 0 || m->zero_point == 1);
}

bool runs(int threads, const void *in, const void *out) {
  return threads >= 1 && threads <= oc::most_threads && in && out;
}

// ------------------------------------------------------------------------------------------- weaving

uint32_t word(const Codes &codes, int64_t row, int64_t index) {
  uint32_t x;
  memcpy(&x, codes.row[row] + 4 * index, 4);
  return x;
}

template <int bits>
void weave(const Codes &codes, int block, uint8_t *out) {
  constexpr int joined = 8 / bits;  // words of codes in a word of a line
  constexpr uint32_t low = 0x01010101 * ((1u << (8 / joined)) - 1);
  for (int line = 0; line < block / 4 / joined; line++) {
    for (int r = 0; r < tile_rows; r++) {
      uint32_t x = 0;
      for (int i = 0; i < joined; i++)
        x |= (word(codes, r, line * joined + i) & low) << i * (8 / joined);
      memcpy(out + 64 * line + 4 * r, &x, 4);
    }
  }
}

// Bit `bit` of each code, eight bytes for four columns.
void weave_bit(const Codes &codes, int block, int bit, uint8_t *out) {
  for (int i = 0; i < block / 4; i++) {
    uint64_t line = 0;
    for (int r = 0; r < tile_rows; r++) {
      const uint32_t four = (word(codes, r, i) >> bit & 0x01010101) * 0x01020408u >> 24 & 15;
      line |= uint64_t(four) << 4 * r;
    }
    memcpy(out + 8 * i, &line, 8);
  }
}

// Eight words of codes in three: two each, and what is left of those takes the seventh and eighth.
template <>
void weave<3>(const Codes &codes, int block, uint8_t *out) {
  constexpr uint32_t one = 0x01010101;
  for (int group = 0; group < block / 32; group++, out += 192)
    for (int r = 0; r < tile_rows; r++) {
      const auto c = [&](int i) { return word(codes, r, 8 * group + i); };
      const uint32_t line[] = {c(0) | c(1) << 3 | (c(6) & 3 * one) << 6,
                               c(2) | c(3) << 3 | (c(6) & 4 * one) << 4 | (c(7) & one) << 7,
                               c(4) | c(5) << 3 | (c(7) & 6 * one) << 5};
      for (int l = 0; l < 3; l++) memcpy(out + 64 * l + 4 * r, &line[l], 4);
    }
}

template <>
void weave<1>(const Codes &codes, int block, uint8_t *out) {
  weave_bit(codes, block, 0, out);
}

template <>
void weave<5>(const Codes &codes, int block, uint8_t *out) {
  weave<4>(codes, block, out);
  weave_bit(codes, block, 4, out + 8 * block);
}

template <>
void weave<6>(const Codes &codes, int block, uint8_t *out) {
  weave<5>(codes, block, out);
  weave_bit(codes, block, 5, out + 10 * block);
}

typedef void Weave(const Codes &codes, int block, uint8_t *out);

Weave *weaver(int bits) {
  constexpr Weave *weavers[] = {weave<1>, weave<2>, weave<3>, weave<4>, weave<5>, weave<6>, nullptr, weave<8>};
  return weavers[bits - 1];
}

// ------------------------------------------------------------------------------------ stored integers

struct Integers {
  const int32_t *packed;
  int bits;
  const void *scale;
  const int8_t *zero;
  int64_t group;
};

// The bits as they are; false if they are not those of a number.
bool copy_scale(const void *from, int64_t index, int dtype, uint8_t *to, int64_t place) {
  if (dtype == OC_FP32) {
    const uint32_t bits = static_cast<const unaligned32 *>(from)[index];
    memcpy(to + 4 * place, &bits, 4);
    return (bits & Fp32::infinity) != Fp32::infinity;
  }
  const uint16_t bits = static_cast<const unaligned16 *>(from)[index];
  memcpy(to + 2 * place, &bits, 2);
  const uint16_t infinity = dtype == OC_FP16 ? Fp16::infinity : Bf16::infinity;
  return (bits & infinity) != infinity;
}

int64_t lay_integers(const oc_matrix &m, const Integers &in, int64_t begin, int64_t end, uint8_t *out) {
  const Tile tile = tile_of(m);
  const int64_t groups = m.columns / in.group, row_bytes = bytes_of_row(m.columns, in.bits);
  const int64_t block_bytes = m.block * tile_rows * m.bits / 8;
  const uint8_t shift = uint8_t((1 << (m.bits - 1)) - (1 << (in.bits - 1)));  // 0 unless bits differ
  const int half = 1 << (m.bits - 1);
  Weave *const weave_block = weaver(m.bits);
  Codes codes;
  int64_t not_finite = 0;
  for (int64_t first = begin; first < end; first += tile_rows) {
    uint8_t *const to = out + first / tile_rows * tile.bytes;
    memset(to, 0, size_t(tile.codes));
    const int64_t rows = end - first < tile_rows ? end - first : tile_rows;
    memset(codes.row[0] + rows * most_block, 0, size_t((tile_rows - rows) * most_block));
    for (int64_t b = 0; b < tile.blocks; b++) {
      const int64_t column = b * m.block;
      const int64_t left = m.columns - column, count = left < m.block ? left : m.block;
      const int64_t byte = column / 8 * in.bits;
      for (int64_t r = 0; r < rows; r++) {
        const int64_t index = (first + r) * groups + column / in.group;
        not_finite += !copy_scale(in.scale, index, m.dtype, to, b * tile_rows + r);
        const uint8_t zero = uint8_t(half + (in.zero ? in.zero[index] : 0));
        if (in.zero) to[tile.zeros + b * tile_rows + r] = zero;
        uint8_t *const row = codes.row[r];
        const uint8_t *from = reinterpret_cast<const uint8_t *>(in.packed) + (first + r) * row_bytes + byte;
        unpack_codes(count, in.bits, from, row_bytes - byte,
                     [=](int64_t at, int n, const uint8_t *code) { memcpy(row + at, code, size_t(n)); });
        if (shift)
          for (int64_t i = 0; i < count; i++) row[i] = uint8_t(row[i] + shift);
        memset(row + count, zero, size_t(m.block - count));
      }
      weave_block(codes, m.block, to + tile.codes + b * block_bytes);
    }
  }
  return not_finite;
}

// --------------------------------------------------------------------------------------------- dense

template <class From, class To>
int64_t lay_dense(const oc_matrix &m, const void *weight, int64_t begin, int64_t end, uint8_t *out) {
  const Tile tile = tile_of(m);
  const auto *const in = static_cast<const typename From::Stored *>(weight);
  int64_t not_finite = 0;
  for (int64_t first = begin; first < end; first += tile_rows) {
    uint8_t *const start = out + first / tile_rows * tile.bytes;
    auto *const to = reinterpret_cast<typename To::Stored *>(start);
    const int64_t rows = end - first < tile_rows ? end - first : tile_rows;
    if (rows < tile_rows || m.columns % 2) memset(start, 0, size_t(tile.bytes));
    for (int64_t k = 0; k < m.columns; k += most_block) {
      const int64_t left = m.columns - k, count = left < most_block ? left : most_block;
      for (int64_t r = 0; r < rows; r++) {
        const auto *const row = in + (first + r) * m.columns + k;
        int64_t odd = 0;
        for (int64_t i = 0; i < count; i++) odd += (row[i] & From::infinity) == From::infinity;
        for (int64_t i = 0; i < count; i++) to[(k + i) * tile_rows + r] = To::round(From::read(row[i]));
        not_finite += odd;
      }
    }
  }
  return not_finite;
}

typedef int64_t Lay(const oc_matrix &m, const void *weight, int64_t begin, int64_t end, uint8_t *out);

template <class From>
Lay *dense_layer(int dtype) {
  return dtype == OC_FP32 ? lay_dense<From, Fp32> : dtype == OC_FP16 ? lay_dense<From, Fp16>
                                                                     : lay_dense<From, Bf16>;
}

// ------------------------------------------------------------------------------------------ rounding

template <class From>
int64_t lay_rounded(const oc_matrix &m, const void *weight, int64_t begin, int64_t end, uint8_t *out) {
  const Tile tile = tile_of(m);
  const auto *const in = static_cast<const typename From::Stored *>(weight);
  const int64_t block_bytes = m.block * tile_rows * m.bits / 8;
  const uint8_t half = uint8_t(1 << (m.bits - 1));
  Weave *const weave_block = weaver(m.bits);
  Codes codes;
  int64_t not_finite = 0;
  for (int64_t first = begin; first < end; first += tile_rows) {
    uint8_t *const to = out + first / tile_rows * tile.bytes;
    memset(to, 0, size_t(tile.codes));
    const int64_t rows = end - first < tile_rows ? end - first : tile_rows;
    memset(codes.row[0] + rows * most_block, 0, size_t((tile_rows - rows) * most_block));
    for (int64_t b = 0; b < tile.blocks; b++) {
      const int64_t column = b * m.block;
      const int64_t left = m.columns - column, count = left < m.block ? left : m.block;
      for (int64_t r = 0; r < rows; r++) {
        const auto *const w = in + (first + r) * m.columns + column;
        Extremes<From> seen;
        seen.see(w, count);
        if (!seen.finite()) {
          for (int64_t i = 0; i < count; i++) not_finite += (w[i] & From::infinity) == From::infinity;
          continue;
        }
        const Grid grid =
            fit_grid(From::read(seen.below), From::read(seen.above), m.bits, false, m.dtype);
        write_scale(to, m.dtype, b * tile_rows + r, grid.scale);
        encode<From>(w, int(count), grid, half, codes.row[r]);
        memset(codes.row[r] + count, half, size_t(m.block - count));
      }
      weave_block(codes, m.block, to + tile.codes + b * block_bytes);
    }
  }
  return not_finite;
}

int64_t in_tiles(const oc_matrix &m, int threads, const std::function<int64_t(int64_t, int64_t)> &lay) {
  std::atomic<int64_t> not_finite{0};
  oc::in_shares(m.rows, m.columns, tile_rows, threads,
                [&](int64_t begin, int64_t end) { not_finite += lay(begin, end); });
  return not_finite;
}

// -------------------------------------------------------------------------------------------- tables

struct Looked {
  const uint8_t *codes;
  const void *scale;
  int64_t group;
  const uint8_t *table;
};

// The tables of the rows from `first` on, as a tile has them.
void lay_tables(const oc_matrix &m, const uint8_t *table, int64_t first, int64_t rows, uint8_t *out) {
  const int entries = 1 << m.bits;
  if (m.kind == OC_TABLE) {
    const int repeats = m.bits <= 4 ? 16 : 64;
    for (int i = 0; i < 64; i++) out[i] = i % repeats < entries ? table[i % repeats] : 0;
    return;
  }
  const int room = entries < 4 ? 4 : entries, rows_of_line = 16 / room;
  for (int64_t r = 0; r < rows; r++) {
    uint8_t *const to = out + r % 4 / rows_of_line * 64 + r / 4 * 16 + r % rows_of_line * room;
    memcpy(to, table + (first + r) * entries, size_t(entries));
  }
}

int64_t lay_table(const oc_matrix &m, const Looked &in, int64_t begin, int64_t end, uint8_t *out) {
  const Tile tile = tile_of(m);
  const int64_t groups = m.columns / in.group, block_bytes = m.block * tile_rows * m.bits / 8;
  const uint8_t mask = uint8_t((1 << m.bits) - 1);
  Weave *const weave_block = weaver(m.bits);
  Codes codes;
  int64_t not_finite = 0;
  for (int64_t first = begin; first < end; first += tile_rows) {
    uint8_t *const to = out + first / tile_rows * tile.bytes;
    memset(to, 0, size_t(tile.codes));
    const int64_t rows = end - first < tile_rows ? end - first : tile_rows;
    lay_tables(m, in.table, first, rows, to + tile.zeros);
    for (int64_t b = 0; b < tile.blocks; b++) {
      const int64_t column = b * m.block;
      const int64_t left = m.columns - column, count = left < m.block ? left : m.block;
      memset(&codes, 0, sizeof codes);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t index = (first + r) * groups + column / in.group;
        not_finite += !copy_scale(in.scale, index, m.dtype, to, b * tile_rows + r);
        const uint8_t *const from = in.codes + (first + r) * m.columns + column;
        for (int64_t i = 0; i < count; i++) codes.row[r][i] = from[i] & mask;
      }
      weave_block(codes, m.block, to + tile.codes + b * block_bytes);
    }
  }
  return not_finite;
}

// -------------------------------------------------------------------------------------------- sparse

// A line of four columns, as 64 bytes; a missing row is zero.
void line_of(const oc_matrix &m, const uint8_t *codes, int64_t rows, int64_t quad, uint8_t line[64]) {
  memcpy(line, codes + 64 * (m.bits == 8 ? quad : quad / 2), 64);
  if (m.bits == 4)
    for (int i = 0; i < 64; i++) line[i] = quad & 1 ? line[i] >> 4 : line[i] & 15;
  if (rows < tile_rows) memset(line + 4 * rows, 1 << (m.bits - 1), size_t(4 * (tile_rows - rows)));
}

// The stream of a tile and its marks. Returns where it ends; only counted if `out` is NULL.
uint64_t lay_stream(const oc_matrix &m, const uint8_t *codes, int64_t rows, uint8_t *marks, uint8_t *out) {
  const uint8_t zero = uint8_t(1 << (m.bits - 1));
  const int64_t quads = m.block / 4, blocks = (m.columns + m.block - 1) / m.block;
  uint64_t at = 0;
  for (int64_t b = 0; b < blocks; b++) {
    if (out && b * m.block % 256 == 0) {
      const uint32_t mark = uint32_t(at);
      memcpy(marks + b * m.block / 256 * 4, &mark, 4);
    }
    uint64_t masks = at;
    at += uint64_t(8 * quads);
    for (int64_t i = 0; i < quads; i++, masks += 8) {
      uint8_t line[64], kept[65] = {};
      uint64_t mask = 0, count = 0;
      line_of(m, codes, rows, b * quads + i, line);
      for (int n = 0; n < 64; n++) {
        mask |= uint64_t(line[n] != zero) << n;
        kept[count] = line[n];
        count += line[n] != zero;
      }
      kept[count] = 0;
      const uint64_t bytes = m.bits == 8 ? count : (count + 1) / 2;
      if (m.bits == 4)
        for (uint64_t n = 0; n < bytes; n++) kept[n] = uint8_t(kept[2 * n] | kept[2 * n + 1] << 4);
      if (out) {
        memcpy(out + masks, &mask, 8);
        memcpy(out + at, kept, size_t(bytes));
      }
      at += bytes;
    }
  }
  return at;
}

// Where the marks and the stream of a sparse tile lie.
struct Stream {
  int64_t tiles, first, marks, codes;
};

Stream stream_of(const oc_matrix &m) {
  const int64_t tiles = (m.rows + tile_rows - 1) / tile_rows, marks = tile_of(m).zeros;
  return {tiles, whole_lines(8 * tiles), marks, marks + whole_lines((m.columns + 255) / 256 * 4)};
}

// What any matrix with so many slots fits in, with room for a whole line to be read at its end.
int64_t sparse_bytes(const oc_matrix &m) {
  const Stream s = stream_of(m);
  const int64_t lines = s.tiles * tile_of(m).blocks * m.block / 4;
  const int64_t values = m.bits == 8 ? m.slots : (m.slots + lines + 1) / 2;
  return whole_lines(s.first + s.tiles * (s.codes + 63) + 8 * lines + values + 64);
}

// From the same integers with their zeros: 0, or OC_BAD_ARGUMENT if there are more than slots.
int64_t lay_sparse(const oc_matrix &m, const uint8_t *from, int threads, uint8_t *to) {
  const Tile dense = tile_of(m);
  const Stream s = stream_of(m);
  std::vector<uint64_t> begins(static_cast<size_t>(s.tiles) + 1);
  in_tiles(m, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin / tile_rows; t * tile_rows < end; t++)
      begins[size_t(t) + 1] = lay_stream(m, from + t * dense.bytes + dense.codes, m.rows - t * tile_rows, nullptr, nullptr);
    return 0;
  });
  begins[0] = uint64_t(s.first);
  for (size_t t = 0; t < size_t(s.tiles); t++) {
    if (begins[t + 1] > UINT32_MAX) return OC_BAD_ARGUMENT;
    begins[t + 1] = uint64_t(whole_lines(int64_t(begins[t] + begins[t + 1]) + s.codes));
  }
  const int64_t bytes = sparse_bytes(m);
  if (int64_t(begins[size_t(s.tiles)]) > bytes) return OC_BAD_ARGUMENT;
  memset(to, 0, size_t(bytes));
  memcpy(to, begins.data(), size_t(8 * s.tiles));
  return in_tiles(m, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin / tile_rows; t * tile_rows < end; t++) {
      uint8_t *const tile = to + begins[size_t(t)];
      const uint8_t *const codes = from + t * dense.bytes;
      memcpy(tile, codes, size_t(dense.zeros));
      lay_stream(m, codes + dense.codes, m.rows - t * tile_rows, tile + s.marks, tile + s.codes);
    }
    return 0;
  });
}

// ------------------------------------------------------------------------------------------- pattern

Tile pattern_tile(const oc_matrix &m) {
  const Tile dense = tile_of(m);
  return {dense.blocks, dense.zeros, dense.zeros, dense.zeros + dense.blocks * m.block * (m.bits + 2)};
}

// The groups of a tile; false if more than two of four are not zero.
bool lay_pairs(const oc_matrix &m, const uint8_t *codes, int64_t rows, uint8_t *out) {
  const uint8_t zero = uint8_t(1 << (m.bits - 1));
  const int64_t columns = (m.columns + m.block - 1) / m.block * m.block;
  for (int64_t k = 0; k < columns; k += 32, out += 64 * (1 + m.bits / 2)) {
    memset(out, 0, size_t(64 * (1 + m.bits / 2)));
    for (int i = 0; i < 8; i++) {
      uint8_t line[64];
      line_of(m, codes, rows, k / 4 + i, line);
      uint8_t *const values = out + 64 + (m.bits == 8 ? 64 * (i / 2) : 64 * (i / 4));
      const int shift = m.bits == 8 ? 0 : 4 * (i / 2 % 2);
      for (int r = 0; r < tile_rows; r++) {
        int found = 0;
        for (int j = 0; j < 4; j++) {
          if (line[4 * r + j] == zero) continue;
          if (found == 2) return false;
          const int slot = 4 * r + 2 * (i % 2) + found++;
          out[slot] |= uint8_t(j << i / 2 * 2);
          values[slot] |= uint8_t(line[4 * r + j] << shift);
        }
        for (; found < 2; found++) values[4 * r + 2 * (i % 2) + found] |= uint8_t(zero << shift);
      }
    }
  }
  return true;
}

// From the same integers with their zeros: 0, or OC_BAD_ARGUMENT if they are no such pattern.
int64_t lay_pattern(const oc_matrix &m, const uint8_t *from, int threads, uint8_t *to) {
  const Tile dense = tile_of(m), own = pattern_tile(m);
  const int64_t wrong = in_tiles(m, threads, [&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t t = begin / tile_rows; t * tile_rows < end; t++) {
      const uint8_t *const tile = from + t * dense.bytes;
      memcpy(to + t * own.bytes, tile, size_t(dense.zeros));
      count += !lay_pairs(m, tile + dense.codes, m.rows - t * tile_rows, to + t * own.bytes + own.codes);
    }
    return count;
  });
  return wrong ? int64_t(OC_BAD_ARGUMENT) : 0;
}

// ------------------------------------------------------------------------------------------ checksum

constexpr int64_t chunk_bytes = int64_t(1) << 20;

uint64_t step(uint64_t h, uint64_t w) {
  h ^= w;
  return (h << 29 | h >> 35) * 0x9e3779b97f4a7c15u;
}

uint64_t sum_of_chunk(const uint8_t *data, int64_t bytes, uint64_t index) {
  uint64_t lane[8];
  for (uint64_t l = 0; l < 8; l++) lane[l] = 8 * index + l + 1;
  const auto take = [&](const uint8_t *at) {
    for (int l = 0; l < 8; l++) {
      uint64_t w;
      memcpy(&w, at + 8 * l, 8);
      lane[l] = step(lane[l], w);
    }
  };
  const int64_t whole = bytes & ~int64_t(63);
  for (int64_t i = 0; i < whole; i += 64) take(data + i);
  if (bytes > whole) {
    uint8_t last[64] = {};
    memcpy(last, data + whole, size_t(bytes - whole));
    take(last);
  }
  uint64_t sum = index;
  for (uint64_t x : lane) sum = step(sum, x);
  return sum;
}

}  // namespace

// ----------------------------------------------------------------------------------------- interface

int64_t oc_layout_bytes(const oc_matrix *matrix) {
  if (!sound(matrix)) return OC_BAD_ARGUMENT;
  if (matrix->kind == OC_SPARSE) return sparse_bytes(*matrix);
  const Tile tile = matrix->kind == OC_PATTERN ? pattern_tile(*matrix) : tile_of(*matrix);
  return (matrix->rows + tile_rows - 1) / tile_rows * tile.bytes;  // at most 2^62
}

int64_t oc_layout_table(const oc_matrix *matrix, const uint8_t *codes, const void *scale, int64_t group,
                        const uint8_t *table, int threads, void *out) {
  if (!sound(matrix) || (matrix->kind != OC_TABLE && matrix->kind != OC_TABLES) || !runs(threads, codes, out) ||
      !scale || !table)
    return OC_BAD_ARGUMENT;
  if ((group != matrix->block || matrix->columns % group) && group != matrix->columns) return OC_BAD_ARGUMENT;
  const Looked in{codes, scale, group, table};
  return in_tiles(*matrix, threads, [&](int64_t begin, int64_t end) {
    return lay_table(*matrix, in, begin, end, static_cast<uint8_t *>(out));
  });
}

int64_t oc_layout_sparse(const oc_matrix *matrix, const void *integers, int threads, void *out) {
  if (!sound(matrix) || !runs(threads, integers, out)) return OC_BAD_ARGUMENT;
  const auto *const from = static_cast<const uint8_t *>(integers);
  auto *const to = static_cast<uint8_t *>(out);
  if (matrix->kind == OC_PATTERN) return lay_pattern(*matrix, from, threads, to);
  if (matrix->kind != OC_SPARSE) return OC_BAD_ARGUMENT;
  try {
    return lay_sparse(*matrix, from, threads, to);
  } catch (const std::bad_alloc &) {
    return OC_NO_MEMORY;
  }
}

int64_t oc_layout_integers(const oc_matrix *matrix, const int32_t *packed, int bits, const void *scale,
                           const int8_t *zero, int64_t group, int threads, void *out) {
  if (!sound(matrix) || !matrix->bits || matrix->kind || !runs(threads, packed, out) || !scale)
    return OC_BAD_ARGUMENT;
  if (bits < 2 || bits > 8 || matrix->bits != (bits > 4 ? 8 : bits)) return OC_BAD_ARGUMENT;
  if ((group != matrix->block || matrix->columns % group) && group != matrix->columns)
    return OC_BAD_ARGUMENT;
  if ((zero != nullptr) != (matrix->zero_point == 1)) return OC_BAD_ARGUMENT;
  const Integers in{packed, bits, scale, zero, group};
  return in_tiles(*matrix, threads, [&](int64_t begin, int64_t end) {
    return lay_integers(*matrix, in, begin, end, static_cast<uint8_t *>(out));
  });
}

int64_t oc_layout_dense(const oc_matrix *matrix, const void *weight, int weight_dtype, int threads,
                        void *out) {
  if (!sound(matrix) || matrix->bits || !is_float(weight_dtype) || !runs(threads, weight, out))
    return OC_BAD_ARGUMENT;
  Lay *const lay = weight_dtype == OC_FP32   ? dense_layer<Fp32>(matrix->dtype)
                   : weight_dtype == OC_FP16 ? dense_layer<Fp16>(matrix->dtype)
                                             : dense_layer<Bf16>(matrix->dtype);
  return in_tiles(*matrix, threads, [&](int64_t begin, int64_t end) {
    return lay(*matrix, weight, begin, end, static_cast<uint8_t *>(out));
  });
}

int64_t oc_layout_quantize(const oc_matrix *matrix, const void *weight, int weight_dtype, int threads,
                           void *out) {
  if (!sound(matrix) || !matrix->bits || matrix->kind || matrix->zero_point || !is_float(weight_dtype) ||
      !runs(threads, weight, out))
    return OC_BAD_ARGUMENT;
  Lay *const lay = weight_dtype == OC_FP32   ? lay_rounded<Fp32>
                   : weight_dtype == OC_FP16 ? lay_rounded<Fp16>
                                             : lay_rounded<Bf16>;
  return in_tiles(*matrix, threads, [&](int64_t begin, int64_t end) {
    return lay(*matrix, weight, begin, end, static_cast<uint8_t *>(out));
  });
}

int oc_checksum(const void *data, int64_t bytes, int threads, uint64_t *sum) {
  if (bytes < 0 || bytes > int64_t(1) << 62 || threads < 1 || threads > oc::most_threads || !sum ||
      (bytes && !data))
    return OC_BAD_ARGUMENT;
  const int64_t chunks = (bytes + chunk_bytes - 1) / chunk_bytes;
  try {
    std::vector<uint64_t> sums(static_cast<size_t>(chunks));
    const auto take = [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) {
        const int64_t left = bytes - c * chunk_bytes;
        sums[size_t(c)] = sum_of_chunk(static_cast<const uint8_t *>(data) + c * chunk_bytes,
                                       left < chunk_bytes ? left : chunk_bytes, uint64_t(c));
      }
    };
    if (chunks) oc::in_shares(chunks, chunk_bytes / 8, 1, threads, take);
    uint64_t total = uint64_t(bytes);
    for (uint64_t x : sums) total = step(total, x);
    *sum = total;
  } catch (const std::bad_alloc &) {
    return OC_NO_MEMORY;
  }
  return 0;
}
