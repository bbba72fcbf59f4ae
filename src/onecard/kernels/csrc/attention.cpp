// Attention over a paged cache of keys and values for one instruction-set class, compiled once per class
// like kernels.cpp.
//
//   y = sum_j 2^(t_j - m) v_j / sum_j 2^(t_j - m),    t_j = log2(e) cap(scale q . k_j),   m = max t_j
//
// Exactness. A result's bits depend on its query, on what it sees and on its position, however prompts
// are cut, batched or shared out. Positions are walked in segments of 256, aligned at position 0. Each
// gives (m, sum, acc) with every sum in a fixed order: a score over the head's numbers and acc over
// positions in rising order (tiles: in theirs), the sum of weights in lanes, folded by halves. Segments are
// added in rising order. What a query may not see has weight +0, and stored values are finite (`store`
// sees to it), so it adds zero: how far beyond its own positions a query's row is computed changes at most
// the sign of a zero, which the last step takes away.
//
// Work. A task takes up to `most_rows` rows (a row is a query and a head) that share a key/value head, or
// one segment of a single query. For many rows the panels of a segment are expanded to float32 once and
// stay in the second-level cache; few rows read them as they are stored; both multiply in the same order.
// Tiles read bf16 as it is stored, and bytes expanded to bf16, for any number of rows; int4 is always expanded.

#include "engine.h"
#include "panels.h"
#include "vectors.h"

namespace {

using oc::Attend;
using oc::Pages;
using oc::Span;
using oc::Work;

constexpr int most_rows = 256;  // of a task, unless one query has more heads
constexpr int few_rows = 16;    // up to here panels are read as they are stored

// ----------------------------------------------------------------------------------------- softmax

// What turns products into scores, and weights into factors of values.
struct Scales {
  float cap;  // 0: none
  const float *of_page[pages_of_segment];  // [2][page], of keys and of values; where positions have scales
};

// Positions of one page that are not among [from, to) get a score that weighs nothing.
inline void hide(float *s, int from, int to) {
  for (int i = 0; i < page; i += width) {
    const ints at = iota() + i;
    give(s + i, ((at >= from) & (at < to)) ? load(s + i) : splat(-__builtin_inff()));
  }
}

// The products s of one row, of which the positions [from, to) are seen, become scores; returns the largest.
template <class T>
inline float peak(float *s, const Scales &scales, int from, int to) {
  constexpr bool scaled = T::scaled;
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
// weights 2^(s - m), else 0: float32 in place or, for tiles, bf16 from s on. Returns their sum. Where
// positions have scales, they are then multiplied by those of the values.
template <class T, bool tiles>
inline float weigh(float *s, const Scales &scales, int begin, int end, int from, int to, float m) {
  constexpr bool scaled = T::scaled;
  const int first = from / page, last = (to - 1) / page;
#if defined(OC_TILES)
  if constexpr (tiles) {
    floats sum = {};
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
  constexpr int lanes = 16 / width;  // in every class
  floats sum[lanes] = {};
  for (int p = begin; p < first; p++) memset(s + p * page, 0, 4 * page);
  for (int p = first; p <= last; p++)
    for (int i = 0; i < page; i += width) {
      float *const x = s + p * page + i;
      const floats weight = exp2(load(x) - m);
      sum[i / width % lanes] += weight;
      give(x, scaled ? weight * load(scales.of_page[p] + page + i) : weight);
    }
  for (int p = last + 1; p < end; p++) memset(s + p * page, 0, 4 * page);
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) sum[i] += sum[i + half];
  return fold_sum(sum[0]);
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

// How requests are shared out.
struct Rule {
  int64_t queries;  // of a task
  int64_t whole;    // segments that a single query may see before each becomes a task
};

inline int64_t queries_of_task(const oc_layer &layer) {
  return most_of(1, most_rows / (layer.heads / layer.kv_heads));
}

// What becomes of one request, for each of its key/value heads.
struct Share {
  int64_t tasks;
  int64_t segments;  // all tasks, if they are segments of one query; else 0
};

inline Share share(const oc_layer &layer, const Span &span, const Rule &rule) {
  if (span.count > 1) return {(span.count + rule.queries - 1) / rule.queries, 0};
  const int64_t seen = span.past / segment + 1 - first_segment(layer, span.past);
  return seen > rule.whole ? Share{seen, seen} : Share{1, 0};
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
  constexpr int64_t short_enough = 4;
  Rule rule{queries_of_task(layer), INT64_MAX};
  Work all{};
  for (int64_t i = 0; i < count; i++) all.tasks += share(layer, spans[i], rule).tasks * layer.kv_heads;
  all.whole = rule.whole = all.tasks < 2 * threads ? 1 : short_enough;
  all.tasks = 0;
  for (int64_t i = 0; i < count; i++) {
    const Share mine = share(layer, spans[i], rule);
    all.tasks += mine.tasks * layer.kv_heads;
    all.merges += mine.segments ? layer.kv_heads : 0;
    all.partial_floats += mine.segments * layer.kv_heads * partial_size(layer);
  }
  return all;
}

// Rows are worked on in units. Those of tiles are in three stages at once, each with its scores.
constexpr int unit_rows = has_tiles ? 16 * unit_tiles : few_rows;  // the most
constexpr int buffers = has_tiles ? 3 : 1;
static_assert(unit_rows % 16 == 0 && unit_rows >= tall && unit_rows >= few_rows, "units fit");

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
  const Rule rule{queries_of_task(layer), job.work.whole};
  const Span *span = job.spans;
  Share mine = share(layer, *span, rule);
  int64_t segments = 0;  // of the split queries before this request
  while (index >= mine.tasks * layer.kv_heads) {
    index -= mine.tasks * layer.kv_heads;
    segments += mine.segments;
    mine = share(layer, *++span, rule);
  }
  Task task{span, index / mine.tasks, 0, 1, 0, 0, nullptr};
  const int64_t part = index % mine.tasks;
  if (mine.segments) {
    task.begin = first_segment(layer, span->past) + part;
    task.end = task.begin + 1;
    task.partial =
        job.partial + (segments * layer.kv_heads + task.kv_head * mine.segments + part) * partial_size(layer);
    return task;
  }
  task.query = (mine.tasks - 1 - part) * rule.queries;  // the longest first
  task.queries = least_of(rule.queries, span->count - task.query);
  task.begin = first_segment(layer, span->past + task.query);
  task.end = (span->past + task.query + task.queries - 1) / segment + 1;
  return task;
}

// Rows that are worked on together, over the pages [begin, end) of a segment that any of them sees.
struct Unit {
  int64_t row;
  int rows, begin, end;
  bool fresh;     // its rows see no earlier segment: acc goes where it belongs at once
  float *scores;
  float *part;    // acc
  float m[unit_rows], sum[unit_rows];
};

// A task at one of its segments.
template <class T>
struct View {
  typedef typename T::Stored Stored;
  static constexpr bool tiles = has_tiles && T::pair == 2;
  static constexpr bool narrow = sizeof(Stored) == 1, packed = T::packed;

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
#if defined(OC_TILES)
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
    expanded = packed || (tiles ? narrow : last - first > few_rows);
    for (int p = begin; p < end; p++) {
      const auto *const stored = reinterpret_cast<const Stored *>(
          job.pages.data + task.span->table[number * pages_of_segment + p] * job.pages.page_bytes +
          task.kv_head * head.bytes(job.pages.dtype));
      keys[p] = stored;
      values[p] = stored + head.keys();
      scales.of_page[p] = reinterpret_cast<const float *>(stored + head.keys() + head.values());
    }
    for (int p = begin; expanded && p < end; p++) {
      const auto *const stored = static_cast<const Stored *>(keys[p]);
#if defined(OC_TILES)
      if constexpr (tiles && narrow) {
        const int64_t numbers = head.keys() + head.values();
        auto *const to = reinterpret_cast<uint16_t *>(scratch.keys) + p * numbers;
        if constexpr (packed)
          expand_int4_to_bf16(head, Packed(head, stored), to, to + head.keys());
        else
          expand_to_bf16(stored, numbers, ahead(stored, keys[p + 1 < end ? p + 1 : p]), to);
        keys[p] = to;
        values[p] = to + head.keys();
        continue;
      }
#endif
      float *const to = scratch.keys + p * head.keys();
      if constexpr (packed) {
        expand_int4(head, Packed(head, stored), to, scratch.values, segment, p * page);
      } else {
        expand<T>(stored, head.k_rows, page, to, head.k_rows, 0);
        expand<T>(stored + head.keys(), page, head.v_columns, scratch.values, segment, p * page);
      }
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
      if (packed || expanded)
        multiply_panels<Float>(u.rows, q, scratch.keys + p * head.keys(), head.k_rows, page, 0, head.k_rows,
                               false, 0, s);
      else if constexpr (!packed)
        multiply_panels<T>(u.rows, q, static_cast<const Stored *>(keys[p]), head.k_rows, page, 0, head.k_rows,
                           false, ahead(keys[p], p + 1 < u.end ? keys[p + 1] : values[u.begin]), s);
    }
    find_peaks(u);
    for (int r = 0; r < u.rows; r++) weigh_row(u, r);
    if (expanded)
      multiply_panels<Float>(u.rows, u.scores + u.begin * page, scratch.values, segment, head.v_columns,
                             u.begin * page, (u.end - u.begin) * page, false, 0, u.part);
    if constexpr (!packed)
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

#if defined(OC_TILES)
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
#if defined(OC_TILES)
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
  [[maybe_unused]] const Tiles<View<T>::tiles> tiles;
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
  if (job.pages.dtype == OC_FP8) attend<Float8>(job, task, scratch);
  if (job.pages.dtype == OC_INT4) attend<Int4>(job, task, scratch);
}

void merge(const Attend &job, int64_t index) {
  const oc_layer &layer = *job.layer;
  const int64_t group = layer.heads / layer.kv_heads, columns = Head(layer.head_dim).v_columns;
  const int64_t size = partial_size(layer);
  const Rule rule{queries_of_task(layer), job.work.whole};
  float *partial = job.partial;
  const Span *span = job.spans;
  int64_t segments = share(layer, *span, rule).segments, split = index / layer.kv_heads;
  while (!segments || split) {
    split -= segments > 0;
    partial += segments * layer.kv_heads * size;
    segments = share(layer, *++span, rule).segments;
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
