// GPTQ's two inner loops for one instruction-set class, compiled once per class like kernels.cpp: the
// columns of one block, and the search for the grid of each group. onecard.h has the formulas.
//
// Columns: each row of W is a problem of its own, so a lane is a row, and a strip of rows goes through
// the whole block with its errors in the first-level cache. The sums over the errors before a tile of
// columns are one small matrix product, in registers; the triangle within the tile follows.
//
// Search: a lane is every sixteenth weight of a group, whatever the width of a register, so that every
// class adds in the same order.

#include "kernels.h"
#include "numbers.h"
#include "onecard.h"

namespace {

using oc::RoundColumns;
using oc::SearchGrid;

#if defined(__AVX512F__)
constexpr int width = 16, vectors = 4;
#elif defined(__AVX2__)
constexpr int width = 8, vectors = 2;
#else
constexpr int width = 4, vectors = 2;
#endif
typedef float floats __attribute__((vector_size(4 * width)));

inline floats load(const float *from) {
  floats x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float *to, floats x) { memcpy(to, &x, sizeof x); }

// rint(x) within [low, high], which are integers; NaN gives low.
inline floats nearest(floats x, floats low, floats high) {
  x = x > low ? x : low;
  x = x < high ? x : high;
  return (x + magic) - magic;
}

// ----------------------------------------------------------------------------------------- columns

constexpr int strip = width * vectors, tile = 4;  // rows, columns
static_assert(oc::strip % strip == 0, "the scratch of a strip must fit");

struct Strip {
  floats part[vectors];
};

// `count` numbers, the rest of the strip is 1.
inline Strip take(const float *from, int64_t count) {
  float some[strip];
  if (count < strip) {
    for (float &x : some) x = 1;
    memcpy(some, from, size_t(count) * 4);
    from = some;
  }
  Strip x;
  for (int v = 0; v < vectors; v++) x.part[v] = load(from + width * v);
  return x;
}

inline void give(float *to, const Strip &x, int64_t count) {
  if (count == strip)
    for (int v = 0; v < vectors; v++) store(to + width * v, x.part[v]);
  else
    memcpy(to, &x, size_t(count) * 4);
}

// aim[c] += r[i, first + c] * errors[i] for `wide` columns and i in [from, to).
template <int wide>
inline void gather(const RoundColumns &job, const float *errors, int64_t from, int64_t to, int64_t first,
                   Strip *aim) {
  floats sum[wide][vectors];
  for (int c = 0; c < wide; c++)
    for (int v = 0; v < vectors; v++) sum[c][v] = aim[c].part[v];
  for (int64_t i = from; i < to; i++) {
    const float *const r = job.r + i * job.block + first;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      const floats error = load(errors + i * strip + width * v);
#pragma GCC unroll 4
      for (int c = 0; c < wide; c++) sum[c][v] += r[c] * error;
    }
  }
  for (int c = 0; c < wide; c++)
    for (int v = 0; v < vectors; v++) aim[c].part[v] = sum[c][v];
}

// Rounds column j of the strip that starts at `row`; `aim` holds its sum.
inline void round_column(const RoundColumns &job, Strip aim, int64_t j, int64_t row, int64_t count,
                         float *errors, Strip &loss) {
  const float half = float(1 << (job.bits - 1)), diagonal = job.r[j * job.block + j];
  const int64_t at = j * job.rows + row;
  const Strip target = take(job.target + at, count), scale = take(job.scale + at, count);
  const Strip zero = take(job.zero + at, count);
  Strip step;  // q - zero
  for (int v = 0; v < vectors; v++) {
    aim.part[v] = target.part[v] + aim.part[v] / diagonal;
    step.part[v] = nearest(aim.part[v] / scale.part[v], -half - zero.part[v], half - 1 - zero.part[v]);
  }
  if (job.keep) {
    float steps[strip];
    memcpy(steps, &step, sizeof step);
    for (int64_t i = 0; i < count; i++) steps[i] = job.keep[at + i] ? steps[i] : 0;
    memcpy(&step, steps, sizeof step);
  }
  Strip error;
  float q[strip];
  for (int v = 0; v < vectors; v++) {
    const floats value = step.part[v] * scale.part[v], off = (aim.part[v] - value) * diagonal;
    error.part[v] = target.part[v] - value;
    loss.part[v] += off * off;
    store(q + width * v, step.part[v] + zero.part[v]);
  }
  memcpy(errors + j * strip, &error, sizeof error);
  give(job.errors + at, error, count);
  int8_t codes[strip];
  for (int i = 0; i < strip; i++) codes[i] = int8_t(pattern(q[i] + magic));
  memcpy(job.codes + at, codes, count == strip ? size_t(strip) : size_t(count));
}

void round_strip(const RoundColumns &job, float *errors, int64_t row, int64_t count) {
  Strip loss = take(job.loss + row, count);
  for (int64_t first = 0; first < job.block; first += tile) {
    const int wide = int(job.block - first < tile ? job.block - first : tile);
    Strip aim[tile];
    for (int c = 0; c < wide; c++) aim[c] = take(job.carried + (first + c) * job.rows + row, count);
    if (wide == tile)
      gather<tile>(job, errors, 0, first, first, aim);
    else
      for (int c = 0; c < wide; c++) gather<1>(job, errors, 0, first, first + c, aim + c);
    for (int c = 0; c < wide; c++) {
      gather<1>(job, errors, first, first + c, first + c, aim + c);
      round_column(job, aim[c], first + c, row, count, errors, loss);
    }
  }
  give(job.loss + row, loss, count);
}

void round_columns(const RoundColumns &job, float *scratch, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += strip)
    round_strip(job, scratch, row, end - row < strip ? end - row : strip);
}

// ------------------------------------------------------------------------------------------ search

constexpr int lanes = 16, parts = lanes / width;

struct Sums {
  floats part[parts] = {};

  inline void add(const float *w, const float *importance, const Grid &grid) {
    const floats low = grid.low + floats{}, high = grid.high + floats{};
    for (int p = 0; p < parts; p++) {
      const floats x = load(w + width * p);
      const floats off = nearest(x / grid.scale, low, high) * grid.scale - x;
      part[p] += off * off * load(importance + width * p);
    }
  }

  float total() const {
    float sum[lanes];
    memcpy(sum, part, sizeof sum);
    for (int half = lanes / 2; half; half /= 2)
      for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
  }
};

float error_of(const float *w, const float *importance, int64_t count, const Grid &grid) {
  Sums sums;
  const int64_t whole = count - count % lanes;
  for (int64_t i = 0; i < whole; i += lanes) sums.add(w + i, importance + i, grid);
  if (whole < count) {
    float last[lanes] = {}, last_importance[lanes] = {};
    memcpy(last, w + whole, size_t(count - whole) * 4);
    memcpy(last_importance, importance + whole, size_t(count - whole) * 4);
    sums.add(last, last_importance, grid);
  }
  return sums.total();
}

Grid best_grid(const SearchGrid &job, const float *w, const float *importance) {
  Extremes<Fp32> seen;
  seen.see(reinterpret_cast<const unaligned32 *>(w), job.group);
  if (!seen.finite()) return {__builtin_inff(), 0, 0, 0};
  const float below = Fp32::read(uint32_t(seen.below)), above = Fp32::read(uint32_t(seen.above));
  Grid best{};
  float least = __builtin_inff();
  for (int c = 0; c < job.candidates; c++) {
    const float shrink = job.shrink[c];
    const Grid grid =
        fit_grid(below * shrink, above * shrink, job.bits, job.zero_point, job.scale_dtype);
    const float error = error_of(w, importance, job.group, grid);
    if (c && !(error < least)) continue;
    best = grid;
    least = error < least ? error : least;
  }
  return best;
}

void search_grid(const SearchGrid &job, int64_t begin, int64_t end) {
  const int64_t groups = job.columns / job.group;
  for (int64_t row = begin; row < end; row++)
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = group * job.group;
      const Grid best = best_grid(job, job.weight + row * job.columns + first, job.importance + first);
      job.scale[row * groups + group] = best.scale;
      job.zero[row * groups + group] = best.zero;
    }
}

}  // namespace

namespace oc {
namespace gptq {

const Gptq OC_CLASS = {round_columns, search_grid};

}  // namespace gptq
}  // namespace oc
