// The engine: a step of many requests through the whole network, in one call.
//
// Every thread walks through the same code, `Walk`, and shares out each phase: rows of activations, tiles of
// matrices, tasks of attention. Phases that read what others wrote are parted by a barrier. With one row
// there is no point in sharing a norm or a rounding: every thread does it for itself, without a barrier.
//
// How work is cut never touches a result: each number depends on its own row (engine.h), so a token's
// logits have the same bits for any number of threads, any batch and any cutting of a prompt.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "engine.h"
#include "memory.h"
#include "onecard.h"
#include "pool.h"
#include "threads.h"

namespace {

using namespace oc;

constexpr int64_t few_rows = 8;     // up to here a thread takes one run of tiles, beyond as they come
constexpr int64_t row_multiple = 32;
constexpr int block_sizes[] = {32, 64, 128};

int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
int64_t padded(int64_t rows) { return up_to(rows, 16); }

// The bytes of `count` things; more than any machine has are refused before their number overflows.
int64_t bytes_of(int64_t count, int64_t size) {
  constexpr int64_t most = int64_t(1) << 47;
  if (size > 0 && count > most / size) throw std::bad_alloc();
  return count * size;
}

// Arrays in one piece of memory: the first round adds their sizes up, the second hands them out.
class Carver {
 public:
  template <class T>
  void take(T *&array, int64_t count) {
    if (base_) array = reinterpret_cast<T *>(base_ + at_);
    at_ = bytes_of(up_to(at_ + bytes_of(count, int64_t(sizeof(T))), 64), 1);
  }
  int64_t bytes() const { return at_; }
  void start(uint8_t *base) {
    base_ = base;
    at_ = 0;
  }

 private:
  uint8_t *base_ = nullptr;
  int64_t at_ = 0;
};

// Inputs rounded in blocks of each size that the model's matrices have.
struct Rounded {
  Quantized sizes[3] = {};

  const Quantized *of(int block) const { return &sizes[block / 64]; }
  static bool has(unsigned used, int i) { return used >> i & 1; }

  void carve(Carver &carver, unsigned used, int64_t rows, int64_t columns) {
    rows = up_to(rows, row_multiple);
    for (int i = 0; i < 3; i++) {
      if (!has(used, i)) continue;
      Quantized &q = sizes[i];
      q.block = block_sizes[i];
      q.blocks = up_to(columns, q.block) / q.block;
      carver.take(q.q, rows * up_to(columns, std::max(q.block, 64)));
      carver.take(q.scale, rows * q.blocks);
      carver.take(q.sum, rows * q.blocks);
    }
  }

  // For inputs of so many columns, at most those that were carved.
  void fit(int64_t columns) {
    for (Quantized &q : sizes) {
      if (!q.q) continue;
      q.blocks = up_to(columns, q.block) / q.block;
      q.stride = up_to(columns, std::max(q.block, 64)) / 64 * Quantized::chunk;
    }
  }
};

constexpr int most_factored = 3;  // matrices of one input that are products of two

// What one thread has to itself.
struct Own {
  float *x;
  Rounded rounded, low[most_factored];
  float *rest;
  uint8_t *scratch;
};

struct Sizes {
  int64_t columns = 0;  // of the widest input
  int64_t q = 0, k = 0, heads = 0, width = 0, experts = 0, top = 0, half = 0;
  int64_t rank = 0, rest = 0;           // columns of what is multiplied with a `right` before; rows of a `rest`
  unsigned blocks = 0, low_blocks = 0;  // bit i: block_sizes[i] is used; for inputs, and for right x

  void see(const oc_matrix &w) {
    if (w.right) {
      rank = std::max(rank, w.columns);
      low_blocks |= block_bit(w);
      see(*w.right);
      if (w.rest) see(*w.rest);
      if (w.rest) rest = std::max(rest, w.rows);
      return;
    }
    columns = std::max(columns, w.columns);
    blocks |= block_bit(w);
  }
  static unsigned block_bit(const oc_matrix &w) { return w.bits && !w.exact ? 1u << w.block / 64 : 0; }
};

// see(matrix) for all that are multiplied with: those that `sound` has looked at.
template <class See>
void each_matrix(const oc_layer &l, const See &see) {
  for (const oc_matrix *w : {&l.q, &l.k, &l.v, &l.o}) see(*w);
  if (l.experts) see(l.router);
  if (l.experts && l.shared_gate.data) see(l.shared_gate);
  for (int e = 0; e < (l.experts ? l.experts + l.shared : 1); e++)
    for (const oc_matrix *w : {&l.mlps[e].gate, &l.mlps[e].up, &l.mlps[e].down})
      if (w->data) see(*w);
}

template <class See>
void each_matrix(const oc_model &m, const See &see) {
  see(m.head);
  if (m.embed != m.hidden) see(m.project_in);
  if (m.embed != m.hidden) see(m.project_out);
  for (int i = 0; i < m.layers; i++) each_matrix(m.layer[i], see);
}

Rounding rounding_of(const oc_matrix &w) { return {w.rounding, w.input_scale}; }

bool sound_rounding(const oc_matrix &w) {
  if (w.rounding == OC_BY_SCALE) return w.input_scale > 0 && std::isfinite(w.input_scale);
  return (w.rounding == OC_BY_BLOCK || w.rounding == OC_BY_ROW) && w.input_scale == 0;
}

bool is_one(const oc_matrix &w, int64_t rows, int64_t columns) {
  return w.data && w.rows == rows && w.columns == columns && oc_layout_bytes(&w) > 0 && sound_rounding(w);
}
bool is_part(const oc_matrix &w, int64_t rows, int64_t columns) {
  return is_one(w, rows, columns) && !w.right && !w.rest && !w.bias;
}
bool is(const oc_matrix &w, int64_t rows, int64_t columns) {
  if (!w.right) return is_one(w, rows, columns) && !w.rest;
  return is_one(w, rows, w.columns) && is_part(*w.right, w.columns, columns) &&
         (!w.rest || is_part(*w.rest, rows, columns));
}
bool may_be(const oc_matrix &w, int64_t rows, int64_t columns) { return !w.data || is(w, rows, columns); }

// see(matrix) for those that multiply rounded inputs themselves, of matrices of one input.
template <class See>
void each_rounding(std::initializer_list<const oc_matrix *> matrices, const See &see) {
  for (const oc_matrix *w : matrices)
    for (const oc_matrix *part : {w->right ? w->right : w, w->rest})
      if (part && part->data && Sizes::block_bit(*part)) see(*part);
}

// How one input is rounded for all of them.
Rounding rounding_of(std::initializer_list<const oc_matrix *> matrices) {
  Rounding found{OC_BY_BLOCK, 0};
  each_rounding(matrices, [&](const oc_matrix &w) { found = rounding_of(w); });
  return found;
}

bool alike(std::initializer_list<const oc_matrix *> matrices) {
  const Rounding all = rounding_of(matrices);
  bool same = true;
  each_rounding(matrices, [&](const oc_matrix &w) {
    same = same && w.rounding == all.kind && w.input_scale == all.scale;
  });
  return same;
}

// A router's inputs are never rounded.
bool is_router(const oc_matrix &w, int64_t rows, int64_t columns) {
  return is_part(w, rows, columns) && (!w.bits || w.exact);
}

bool sound(const oc_norm &norm) { return !norm.weight || norm.kind == OC_RMS || norm.kind == OC_LAYER; }

bool sound(const oc_mlp &mlp, int64_t hidden) {
  return mlp.width >= 1 && mlp.activation >= OC_SILU && mlp.activation <= OC_GELU_TANH &&
         may_be(mlp.gate, mlp.width, hidden) && is(mlp.up, mlp.width, hidden) && is(mlp.down, hidden, mlp.width) &&
         alike({&mlp.gate, &mlp.up}) && alike({&mlp.down});
}

bool sound(const oc_layer &l, const oc_model &m) {
  const int64_t q = int64_t(l.heads) * l.head_dim, k = int64_t(l.kv_heads) * l.head_dim;
  if (l.order < OC_PRE || l.order > OC_PARALLEL || l.heads < 1 || l.kv_heads < 1 || l.heads % l.kv_heads ||
      l.head_dim < 1 || l.head_dim > most_head_dim || l.window < 0 || l.rope < -1 || l.rope >= m.ropes)
    return false;
  if (l.rope >= 0 && m.rope[l.rope].half * 2 > l.head_dim) return false;
  for (const oc_norm *norm : {&l.attention_in, &l.attention_out, &l.feed_forward_in, &l.feed_forward_out, &l.q_norm,
                              &l.k_norm})
    if (!sound(*norm)) return false;
  if ((l.order == OC_POST || l.order == OC_SANDWICH) && (!l.attention_out.weight || !l.feed_forward_out.weight))
    return false;
  if (!is(l.q, q, m.hidden) || !is(l.k, k, m.hidden) || !is(l.v, k, m.hidden) || !is(l.o, m.hidden, q) ||
      !alike({&l.q, &l.k, &l.v}) || !alike({&l.o}))
    return false;
  if (l.experts < 0 || l.experts > 4096 || !l.mlps) return false;
  if (l.experts && (l.order == OC_PARALLEL || l.top < 1 || l.top > l.experts || l.shared < 0 || l.shared > 1 ||
                    !is_router(l.router, l.experts, m.hidden) ||
                    (l.shared_gate.data && !is_router(l.shared_gate, 1, m.hidden))))
    return false;
  const int mlps = l.experts ? l.experts + l.shared : 1;
  for (int i = 0; i < mlps; i++)
    if (!sound(l.mlps[i], m.hidden)) return false;
  return true;
}

bool sound(const oc_model &m) {
  if (m.vocab < 1 || m.hidden < 1 || m.embed < 1 || m.layers < 0 || m.ropes < 0 || !m.embedding ||
      m.embedding_dtype < OC_FP32 || m.embedding_dtype > OC_BF16 || !is(m.head, m.vocab, m.embed) ||
      (m.layers && !m.layer) || (m.ropes && !m.rope) || !sound(m.norm))
    return false;
  if (m.positions && (m.position_offset < 0 || m.learned <= m.position_offset)) return false;
  if (m.embed != m.hidden && (!is(m.project_in, m.hidden, m.embed) || !is(m.project_out, m.embed, m.hidden)))
    return false;
  for (int i = 0; i < m.ropes; i++)
    if (m.rope[i].half < 1 || m.rope[i].half > most_head_dim / 2 || !m.rope[i].inverse) return false;
  for (int i = 0; i < m.layers; i++)
    if (!sound(m.layer[i], m)) return false;
  return true;
}

bool sound(const oc_engine_settings &s) {
  constexpr int64_t most_pages = int64_t(1) << 31, most_rows = 1 << 20;
  return s.threads >= 1 && s.threads <= most_threads && s.pages >= 1 && s.pages <= most_pages && s.rows >= 1 &&
         s.rows <= most_rows && s.kv_dtype >= OC_FP16 && s.kv_dtype <= OC_INT4;
}

}  // namespace

struct oc_engine {
  const oc_model m;
  const oc_engine_settings set;
  const Class c;
  Pool pool;
  Sizes sizes;
  int64_t work_bytes, kv_bytes;
  Memory arena, kv, partial;
  std::vector<Pages> pages;  // of each layer

  // Activations, [rows][...].
  float *h, *x, *qkv, *attended, *gate, *up, *branch, *logits, *cos, *sin;
  float *router, *chance;             // [rows][experts]; [rows][top]
  int32_t *expert, *member, *place;   // [rows][top]; rows of each expert, and which of a row's experts it is
  int64_t *first_member;              // [experts + 1]
  float *gathered, *expert_out;       // rows of one expert
  Rounded rounded, low_rounded[most_factored];
  float *low[most_factored];  // [rows][rank]
  std::vector<Own> own;

  int64_t low_stride, rest_floats, qkv_stride, k_at, v_at, attended_stride, width_stride, hidden_stride, logits_rows, logits_stride;

  // The pass that runs: rows of all active feeds, one after another.
  std::vector<oc_feed *> active;
  std::vector<Span> spans;
  std::vector<int32_t> row_id, row_position, row_feed;
  std::vector<int64_t> wanted;  // rows whose logits are needed
  int64_t phases;
  std::vector<std::atomic<int64_t>> counters;  // [1 + threads][phases]: everybody's, and of a thread's own run

  // `planned`: no memory is taken and nothing can be run; `work_bytes` and `kv_bytes` say what it would take.
  oc_engine(const oc_model &model, const oc_engine_settings &settings, bool planned = false)
      : m(model), set(settings), c(chosen_class()), pool(planned ? 1 : settings.threads) {
    measure();
    Carver carver;
    carve(carver);
    work_bytes = up_to(carver.bytes(), 4096);
    int64_t bytes = 0;
    for (int i = 0; i < m.layers; i++) {
      const oc_layer &l = m.layer[i];
      pages.push_back({nullptr, c.attention->page_bytes(set.kv_dtype, l.kv_heads, l.head_dim), set.kv_dtype,
                       l.kv_heads, l.head_dim});
      bytes = bytes_of(bytes + up_to(bytes_of(set.pages, pages.back().page_bytes), 4096), 1);
    }
    kv_bytes = bytes;
    if (planned) return;
    phases = count_phases();
    counters = std::vector<std::atomic<int64_t>>(size_t(phases * (settings.threads + 1)));
    arena = Memory(work_bytes);
    carver.start(arena.at());
    carve(carver);
    kv = Memory(kv_bytes);
    bytes = 0;
    for (Pages &p : pages) {
      p.data = kv.at() + bytes;
      bytes += up_to(p.page_bytes * set.pages, 4096);
    }
    row_id.reserve(size_t(set.rows));
    row_position.reserve(size_t(set.rows));
    row_feed.reserve(size_t(set.rows));
    wanted.reserve(size_t(set.rows));
    spans.reserve(size_t(set.rows));
    active.reserve(size_t(set.rows));
  }

  // Phases of a pass whose work is taken as it comes, at most.
  int64_t count_phases() const {
    int64_t count = 16 + 4 * (set.rows / logits_rows + 1);
    for (int i = 0; i < m.layers; i++) count += 16 + 4 * (m.layer[i].experts + 1);
    return count;
  }

  void measure() {
    each_matrix(m, [this](const oc_matrix &w) { sizes.see(w); });
    sizes.columns = std::max(sizes.columns, std::max(m.hidden, m.embed));
    for (int i = 0; i < m.ropes; i++) sizes.half = std::max<int64_t>(sizes.half, m.rope[i].half);
    for (int i = 0; i < m.layers; i++) {
      const oc_layer &l = m.layer[i];
      sizes.q = std::max(sizes.q, l.q.rows);
      sizes.k = std::max(sizes.k, l.k.rows);
      sizes.experts = std::max<int64_t>(sizes.experts, l.experts);
      if (l.experts) sizes.top = std::max<int64_t>(sizes.top, l.top);
      for (int e = 0; e < (l.experts ? l.experts + l.shared : 1); e++)
        sizes.width = std::max<int64_t>(sizes.width, l.mlps[e].width);
    }
  }

  int64_t scratch_bytes() const {
    int64_t most = oc_sample_scratch(m.vocab);
    each_matrix(m, [&](const oc_matrix &w) {
      for (const oc_matrix *part : {&w, w.right, w.rest})
        for (const int64_t rows : {int64_t(1), few_rows, set.rows})
          if (part) most = std::max(most, c.matmul->scratch_bytes(*part, rows));
    });
    for (int i = 0; i < m.layers; i++) most = std::max(most, c.attention->scratch_bytes(m.layer[i]));
    return most;
  }

  void carve(Carver &carver) {
    const int64_t rows = up_to(set.rows, row_multiple);
    k_at = padded(sizes.q);
    v_at = k_at + padded(sizes.k);
    qkv_stride = v_at + padded(sizes.k);
    attended_stride = padded(sizes.q);
    width_stride = padded(sizes.width);
    hidden_stride = padded(std::max(m.hidden, m.embed));
    logits_stride = padded(m.vocab);
    logits_rows = std::min(set.rows, std::max<int64_t>(1, (int64_t(1) << 21) / logits_stride));
    carver.take(h, rows * hidden_stride);
    carver.take(x, rows * hidden_stride);
    carver.take(branch, rows * hidden_stride);
    carver.take(qkv, rows * qkv_stride);
    carver.take(attended, rows * attended_stride);
    carver.take(gate, rows * width_stride);
    carver.take(up, rows * width_stride);
    carver.take(logits, logits_rows * logits_stride);
    carver.take(cos, m.ropes * rows * sizes.half);
    carver.take(sin, m.ropes * rows * sizes.half);
    if (sizes.experts) {
      carver.take(router, rows * padded(sizes.experts));
      carver.take(chance, rows * sizes.top);
      carver.take(expert, rows * sizes.top);
      carver.take(member, rows * sizes.top);
      carver.take(place, rows * sizes.top);
      carver.take(first_member, sizes.experts + 1);
      carver.take(gathered, rows * hidden_stride);
      carver.take(expert_out, rows * hidden_stride);
    }
    rounded.carve(carver, sizes.blocks, rows, sizes.columns);
    low_stride = padded(sizes.rank);
    for (int i = 0; sizes.rank && i < most_factored; i++) {
      carver.take(low[i], rows * low_stride);
      low_rounded[i].carve(carver, sizes.low_blocks, rows, sizes.rank);
    }
    // What a thread makes at once: a run of tiles for few rows, or a piece (engine.h).
    rest_floats = sizes.rest ? std::max(few_rows * padded(sizes.rest), rows * 2 * c.matmul->panel_tiles * 16) : 0;
    const int64_t scratch = scratch_bytes();
    own.resize(size_t(set.threads));
    for (Own &o : own) {
      carver.take(o.x, std::max(hidden_stride, sizes.columns));
      o.rounded.carve(carver, sizes.blocks, 1, sizes.columns);
      for (int i = 0; sizes.rank && i < most_factored; i++) o.low[i].carve(carver, sizes.low_blocks, 1, sizes.rank);
      carver.take(o.rest, rest_floats);
      carver.take(o.scratch, scratch);
    }
  }

  int step(oc_feed *feeds, int64_t count, int steps, const volatile int32_t *cancel);
  bool begin(bool first);
  void end();
};

namespace {

// One thread's way through one pass.
class Walk {
 public:
  Walk(oc_engine &engine, int thread)
      : e_(engine), m_(engine.m), c_(engine.c), t_(thread), threads_(engine.pool.size()),
        rows_(int64_t(engine.row_id.size())), own_(engine.own[size_t(thread)]) {}

  void run() {
    embed();
    for (int i = 0; i < m_.layers; i++) layer(m_.layer[i], e_.pages[size_t(i)]);
    answer();
  }

 private:
  struct Product {
    const oc_matrix *w;
    float *y;
    int64_t stride;
  };

  void barrier() { e_.pool.barrier(); }

  // work(row) for this thread's share of rows.
  template <class Work>
  void rows(int64_t count, const Work &work) {
    for (int64_t r = count * t_ / threads_, end = count * (t_ + 1) / threads_; r < end; r++) work(r);
  }

  // work(index) for indices as they come.
  template <class Work>
  void as_they_come(int64_t count, const Work &work) {
    auto &next = e_.counters[size_t(phase_++)];
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  }

  // work(begin, end) on tiles. With few rows a thread has one run, as memory likes it read; of the last
  // quarter of a run, those who are done take their part.
  template <class Work>
  void tiles(int64_t count, int64_t rows, const Work &work) {
    if (rows > few_rows) {
      const Pieces pieces(count, c_.matmul->panel_tiles, threads_);
      return as_they_come(pieces.count(), [&](int64_t i) { work(pieces.begin(i), pieces.begin(i + 1)); });
    }
    const int phase = phase_++;
    for (int n = 0; n < threads_; n++) {
      const int t = (t_ + n) % threads_;
      const int64_t begin = count * t / threads_, end = count * (t + 1) / threads_;
      const int64_t rest = threads_ == 1 ? end : end - (end - begin) / 4, step = std::max<int64_t>(1, (end - begin) / 64);
      if (n == 0 && begin < rest) work(begin, rest);
      auto &next = e_.counters[size_t((t + 1) * e_.phases + phase)];
      for (int64_t at; (at = rest + step * next.fetch_add(1, std::memory_order_relaxed)) < end;)
        work(at, std::min(end, at + step));
    }
  }

  static int64_t tiles_of(const oc_matrix &w) { return padded(w.rows) / 16; }

  // Inputs on their way to matrices: perhaps normed, and rounded in the blocks that these have. With one
  // row every thread has its own.
  struct Prepared {
    const float *x;
    int64_t stride, rows;
    const Rounded *rounded;
    // Of those that are products of two: right x, and its rounding.
    struct Low {
      const oc_matrix *w;
      const float *x;
      const Rounded *rounded;
    } low[most_factored];
    int64_t low_stride;

    Input input(const oc_matrix &w) const {
      const bool integers = w.bits && !w.exact;
      if (!w.right) return {x, stride, rows, integers ? rounded->of(w.block) : nullptr};
      const Low *own = low;
      while (own->w != &w) own++;
      return {own->x, low_stride, rows, integers ? own->rounded->of(w.block) : nullptr};
    }
  };

  Prepared prepare(const oc_norm *norm, const float *from, int64_t stride, int64_t count, int64_t columns,
                   std::initializer_list<const oc_matrix *> matrices) {
    unsigned blocks = 0;
    each_rounding(matrices, [&](const oc_matrix &w) { blocks |= Sizes::block_bit(w); });
    const Rounding how = rounding_of(matrices);
    if (norm && !norm->weight) norm = nullptr;
    const bool alone = count == 1;
    // One thread's own, or everybody's: the shared one has its shape set by all alike.
    Rounded &rounded = alone ? own_.rounded : shared_;
    if (!alone) shared_ = e_.rounded;
    rounded.fit(columns);
    float *const normed = alone ? own_.x : e_.x;
    const auto work = [&](int64_t r) {
      const float *row = from + r * stride;
      if (norm) {
        c_.rows->norm(*norm, row, columns, normed + r * e_.hidden_stride);
        row = normed + r * e_.hidden_stride;
      }
      for (int i = 0; i < 3; i++)
        if (blocks >> i & 1) c_.rows->quantize(row, columns, how, rounded.sizes[i], r);
    };
    if (alone) {
      work(0);
    } else {
      rows(count, work);
      barrier();
    }
    Prepared made = {norm ? normed : from, norm ? e_.hidden_stride : stride, count, &rounded, {}, e_.low_stride};
    lower(made, matrices);
    return made;
  }

  // right x of all matrices that are products of two, as one run of tiles; then its rounding.
  void lower(Prepared &in, std::initializer_list<const oc_matrix *> matrices) {
    Product list[most_factored];
    int count = 0;
    const bool alone = in.rows == 1;
    for (const oc_matrix *w : matrices) {
      if (!w->data || !w->right) continue;
      Rounded &rounded = alone ? own_.low[count] : shared_low_[count];
      if (!alone) rounded = e_.low_rounded[count];
      rounded.fit(w->columns);
      in.low[count] = {w, e_.low[count], &rounded};
      list[count] = {w->right, e_.low[count], e_.low_stride};
      count++;
    }
    if (!count) return;
    products(in, list, list + count);
    barrier();
    const auto work = [&](int64_t r) {
      for (int i = 0; i < count; i++) {
        const oc_matrix &w = *in.low[i].w;
        if (Sizes::block_bit(w))
          c_.rows->quantize(e_.low[i] + r * e_.low_stride, w.columns, rounding_of(w), *in.low[i].rounded->of(w.block), r);
      }
    };
    if (alone) return work(0);
    rows(in.rows, work);
    barrier();
  }

  void multiply(const oc_matrix &w, const Prepared &in, int64_t begin, int64_t end, float *y, int64_t stride) {
    c_.matmul->multiply(w, in.input(w), begin, end, y, stride, own_.scratch);
    if (w.rest) {
      const int64_t first = begin * 16, count = end * 16 - first;
      c_.matmul->multiply(*w.rest, in.input(*w.rest), begin, end, own_.rest - first, count, own_.scratch);
      for (int64_t r = 0; r < in.rows; r++) c_.rows->add(own_.rest + r * count, 1.0f, count, y + r * stride + first);
    }
    if (!w.bias) return;
    const int64_t last = std::min(w.rows, end * 16);
    for (int64_t r = 0; r < in.rows; r++)
      for (int64_t i = begin * 16; i < last; i++) y[r * stride + i] += w.bias[i];
  }

  // Several matrices of one input, as one run of tiles.
  void products(const Prepared &in, std::initializer_list<Product> list) { products(in, list.begin(), list.end()); }

  void products(const Prepared &in, const Product *list, const Product *list_end) {
    int64_t total = 0;
    for (const Product *p = list; p < list_end; p++) total += tiles_of(*p->w);
    tiles(total, in.rows, [&](int64_t begin, int64_t end) {
      int64_t at = 0;
      for (const Product *each = list; each < list_end; each++) {
        const Product &p = *each;
        const int64_t count = tiles_of(*p.w), from = std::max(begin, at), to = std::min(end, at + count);
        if (from < to) multiply(*p.w, in, from - at, to - at, p.y, p.stride);
        at += count;
      }
    });
  }

  // y = out of one matrix; then work(row, first column, last) on what this thread made.
  template <class Work>
  void product(const oc_matrix &w, const Prepared &in, float *y, int64_t stride, const Work &work) {
    tiles(tiles_of(w), in.rows, [&](int64_t begin, int64_t end) {
      multiply(w, in, begin, end, y, stride);
      for (int64_t r = 0; r < in.rows; r++) work(r, begin * 16, std::min(w.rows, end * 16));
    });
  }

  void embed() {
    const bool project = m_.embed != m_.hidden;
    float *const to = project ? e_.branch : e_.h;
    rows(rows_, [&](int64_t r) {
      float *const out = to + r * e_.hidden_stride;
      c_.rows->gather(m_.embedding, m_.embedding_dtype, e_.row_id[size_t(r)], m_.embed, m_.embed_scale, out);
      const int64_t position = e_.row_position[size_t(r)];
      for (int i = 0; i < m_.ropes; i++) {
        const int64_t at = (i * up_to(e_.set.rows, row_multiple) + r) * e_.sizes.half;
        c_.rows->angles(m_.rope[i], position, e_.cos + at, e_.sin + at);
      }
      if (!project) add_position(out, position);
    });
    barrier();
    if (!project) return;
    const Prepared in = prepare(nullptr, e_.branch, e_.hidden_stride, rows_, m_.embed, {&m_.project_in});
    products(in, {{&m_.project_in, e_.h, e_.hidden_stride}});
    barrier();
    rows(rows_, [&](int64_t r) { add_position(e_.h + r * e_.hidden_stride, e_.row_position[size_t(r)]); });
    barrier();
  }

  void add_position(float *out, int64_t position) {
    if (m_.positions) c_.rows->add(m_.positions + (position + m_.position_offset) * m_.hidden, 1.0f, m_.hidden, out);
  }

  float *hidden(int64_t r) { return e_.h + r * e_.hidden_stride; }
  float *branch(int64_t r) { return e_.branch + r * e_.hidden_stride; }

  void layer(const oc_layer &l, const Pages &pages) {
    attention(l, pages);
    join(l, l.attention_out);
    if (l.experts)
      experts(l);
    else
      dense(l);
    join(l, l.feed_forward_out);
  }

  // Where a norm stands behind a branch or behind the sum, the branch is added here.
  void join(const oc_layer &l, const oc_norm &norm) {
    if (l.order != OC_POST && l.order != OC_SANDWICH) return;
    rows(rows_, [&](int64_t r) {
      if (l.order == OC_SANDWICH) c_.rows->norm(norm, branch(r), m_.hidden, branch(r));
      c_.rows->add(branch(r), 1.0f, m_.hidden, hidden(r));
      if (l.order == OC_POST) c_.rows->norm(norm, hidden(r), m_.hidden, hidden(r));
    });
    barrier();
  }

  void attention(const oc_layer &l, const Pages &pages) {
    const Prepared in =
        prepare(&l.attention_in, e_.h, e_.hidden_stride, rows_, m_.hidden, {&l.q, &l.k, &l.v});
    products(in, {{&l.q, e_.qkv, e_.qkv_stride},
                  {&l.k, e_.qkv + e_.k_at, e_.qkv_stride},
                  {&l.v, e_.qkv + e_.v_at, e_.qkv_stride}});
    barrier();
    rows(2 * rows_, [&](int64_t i) { place(l, pages, i / 2, i % 2 == 0); });
    barrier();
    const int64_t count = int64_t(e_.spans.size());
    const Work work = c_.attention->work(l, e_.spans.data(), count, threads_);
    const Attend job = {&l, pages, e_.spans.data(), count, work, e_.qkv, e_.qkv_stride, e_.attended,
                        e_.attended_stride, reinterpret_cast<float *>(e_.partial.at())};
    as_they_come(work.tasks, [&](int64_t task) { c_.attention->run(job, task, own_.scratch); });
    barrier();
    if (work.merges) {
      as_they_come(work.merges, [&](int64_t merge) { c_.attention->merge(job, merge); });
      barrier();
    }
    const Prepared out = prepare(nullptr, e_.attended, e_.attended_stride, rows_, int64_t(l.heads) * l.head_dim, {&l.o});
    product(l.o, out, e_.branch, e_.hidden_stride, [&](int64_t r, int64_t begin, int64_t end) {
      if (l.order == OC_PRE) c_.rows->add(branch(r) + begin, 1.0f, end - begin, hidden(r) + begin);
    });
    barrier();
  }

  // Norms and turns the query heads of one row, or its key heads, and stores keys and values.
  void place(const oc_layer &l, const Pages &pages, int64_t r, bool queries) {
    float *const q = e_.qkv + r * e_.qkv_stride, *const k = q + e_.k_at, *const v = q + e_.v_at;
    float *const x = queries ? q : k;
    const int heads = queries ? l.heads : l.kv_heads;
    const oc_norm &norm = queries ? l.q_norm : l.k_norm;
    for (int i = 0; norm.weight && i < heads; i++)
      c_.rows->norm(norm, x + i * l.head_dim, l.head_dim, x + i * l.head_dim);
    if (l.rope >= 0) {
      const int64_t at = (l.rope * up_to(e_.set.rows, row_multiple) + r) * e_.sizes.half;
      c_.rows->rotate(x, heads, l.head_dim, m_.rope[l.rope].half, e_.cos + at, e_.sin + at);
    }
    if (queries) return;
    const Span &span = e_.spans[size_t(e_.row_feed[size_t(r)])];
    c_.attention->store(pages, span.table, e_.row_position[size_t(r)], k, v);
  }

  void dense(const oc_layer &l) {
    const oc_mlp &mlp = l.mlps[0];
    const Prepared in =
        prepare(&l.feed_forward_in, e_.h, e_.hidden_stride, rows_, m_.hidden, {&mlp.gate, &mlp.up});
    const bool parallel = l.order == OC_PARALLEL;
    float *const out = parallel ? e_.x : e_.branch;  // nobody reads x any more
    inner(mlp, in);
    const Prepared down = prepare(nullptr, e_.up, e_.width_stride, rows_, mlp.width, {&mlp.down});
    product(mlp.down, down, out, e_.hidden_stride, [&](int64_t r, int64_t begin, int64_t end) {
      if (parallel) c_.rows->add(branch(r) + begin, 1.0f, end - begin, hidden(r) + begin);
      if (parallel || l.order == OC_PRE)
        c_.rows->add(out + r * e_.hidden_stride + begin, 1.0f, end - begin, hidden(r) + begin);
    });
    barrier();
  }

  // up = act(gate) * up
  void inner(const oc_mlp &mlp, const Prepared &in) {
    tiles(tiles_of(mlp.up), in.rows, [&](int64_t begin, int64_t end) {
      if (mlp.gate.data) multiply(mlp.gate, in, begin, end, e_.gate, e_.width_stride);
      multiply(mlp.up, in, begin, end, e_.up, e_.width_stride);
      const int64_t first = begin * 16, count = std::min<int64_t>(mlp.width, end * 16) - first;
      for (int64_t r = 0; r < in.rows; r++) {
        float *const up = e_.up + r * e_.width_stride + first;
        if (mlp.gate.data)
          c_.rows->activate(mlp.activation, e_.gate + r * e_.width_stride + first, up, count, up);
        else
          c_.rows->activate(mlp.activation, up, nullptr, count, up);
      }
    });
    barrier();
  }

  // The experts in rising order, each over the rows that chose it; their sum grows in `branch`.
  void experts(const oc_layer &l) {
    float *const x = e_.x;  // shared, also for one row
    rows(rows_, [&](int64_t r) {
      float *const to = x + r * e_.hidden_stride;
      if (l.feed_forward_in.weight)
        c_.rows->norm(l.feed_forward_in, hidden(r), m_.hidden, to);
      else
        memcpy(to, hidden(r), size_t(m_.hidden) * 4);
    });
    barrier();
    const int64_t router_stride = padded(e_.sizes.experts);
    const Prepared plain = {x, e_.hidden_stride, rows_, nullptr, {}, 0};
    products(plain, {{&l.router, e_.router, router_stride}});
    barrier();
    rows(rows_, [&](int64_t r) {
      route(l, e_.router + r * router_stride, e_.expert + r * l.top, e_.chance + r * l.top);
      memset(branch(r), 0, size_t(m_.hidden) * 4);
    });
    barrier();
    if (t_ == 0) sort_members(l);
    barrier();
    for (int i = 0; i < l.experts; i++) {
      const int64_t first = e_.first_member[i], count = e_.first_member[i + 1] - first;
      if (!count) continue;
      rows(count, [&](int64_t n) {
        const float *const from = x + int64_t(e_.member[first + n]) * e_.hidden_stride;
        memcpy(e_.gathered + n * e_.hidden_stride, from, size_t(m_.hidden) * 4);
      });
      barrier();
      expert(l.mlps[i], e_.gathered, count);
      rows(count, [&](int64_t n) {
        const int64_t r = e_.member[first + n];
        c_.rows->add(e_.expert_out + n * e_.hidden_stride, e_.chance[r * l.top + e_.place[first + n]], m_.hidden,
                     branch(r));
      });
      barrier();
    }
    if (l.shared) {
      expert(l.mlps[l.experts], x, rows_);
      if (l.shared_gate.data) {
        products(plain, {{&l.shared_gate, e_.router, router_stride}});
        barrier();
      }
      rows(rows_, [&](int64_t r) {
        const float gate = l.shared_gate.data ? 1 / (1 + std::exp(-e_.router[r * router_stride])) : 1.0f;
        c_.rows->add(e_.expert_out + r * e_.hidden_stride, gate, m_.hidden, branch(r));
      });
      barrier();
    }
    if (l.order == OC_PRE) {
      rows(rows_, [&](int64_t r) { c_.rows->add(branch(r), 1.0f, m_.hidden, hidden(r)); });
      barrier();
    }
  }

  // expert_out = one expert of `count` rows.
  void expert(const oc_mlp &mlp, const float *from, int64_t count) {
    const Prepared in = prepare(nullptr, from, e_.hidden_stride, count, m_.hidden, {&mlp.gate, &mlp.up});
    inner(mlp, in);
    const Prepared down = prepare(nullptr, e_.up, e_.width_stride, count, mlp.width, {&mlp.down});
    products(down, {{&mlp.down, e_.expert_out, e_.hidden_stride}});
    barrier();
  }

  // The `top` likeliest experts, lower ones first on ties, and their chances.
  void route(const oc_layer &l, float *x, int32_t *expert, float *chance) {
    c_.rows->softmax(x, l.experts);
    float total = 0;
    for (int i = 0; i < l.top; i++) {
      int best = -1;
      for (int j = 0; j < l.experts; j++)
        if (std::find(expert, expert + i, j) == expert + i && (best < 0 || x[j] > x[best])) best = j;
      expert[i] = best;
      chance[i] = x[best];
      total += x[best];
    }
    for (int i = 0; l.renormalize && i < l.top; i++) chance[i] /= total;
  }

  void sort_members(const oc_layer &l) {
    int64_t at = 0;
    for (int i = 0; i < l.experts; i++) {
      e_.first_member[i] = at;
      for (int64_t r = 0; r < rows_; r++)
        for (int j = 0; j < l.top; j++)
          if (e_.expert[r * l.top + j] == i) {
            e_.member[at] = int32_t(r);
            e_.place[at++] = j;
          }
    }
    e_.first_member[l.experts] = at;
  }

  // Logits of the wanted rows, a group at a time, and the next ids.
  void answer() {
    const int64_t total = int64_t(e_.wanted.size());
    for (int64_t first = 0; first < total; first += e_.logits_rows) {
      const int64_t count = std::min(e_.logits_rows, total - first);
      rows(count, [&](int64_t n) {
        const float *const from = hidden(e_.wanted[size_t(first + n)]);
        float *const to = branch(n);
        if (m_.norm.weight)
          c_.rows->norm(m_.norm, from, m_.hidden, to);
        else
          memcpy(to, from, size_t(m_.hidden) * 4);
      });
      barrier();
      const float *last = e_.branch;
      if (m_.embed != m_.hidden) {
        const Prepared in = prepare(nullptr, e_.branch, e_.hidden_stride, count, m_.hidden, {&m_.project_out});
        products(in, {{&m_.project_out, e_.x, e_.hidden_stride}});
        barrier();
        last = e_.x;
      }
      const Prepared in = prepare(nullptr, last, e_.hidden_stride, count, m_.embed, {&m_.head});
      product(m_.head, in, e_.logits, e_.logits_stride, [&](int64_t r, int64_t begin, int64_t end) {
        if (m_.soft_cap > 0) c_.rows->soft_cap(e_.logits + r * e_.logits_stride + begin, end - begin, m_.soft_cap);
      });
      barrier();
      rows(count, [&](int64_t n) { give(e_.wanted[size_t(first + n)], e_.logits + n * e_.logits_stride); });
      barrier();
    }
  }

  // Logits of a row go where its feed wants them; behind the last row an id is chosen.
  void give(int64_t r, const float *logits) {
    oc_feed &feed = *e_.active[size_t(e_.row_feed[size_t(r)])];
    const Span &span = e_.spans[size_t(e_.row_feed[size_t(r)])];
    // The last row's thread may have chosen already: what it writes is not looked at before.
    const bool first_pass = span.past == feed.past, last = r == span.row + span.count - 1;
    if (feed.logits && first_pass && (feed.want == OC_ALL || (feed.want == OC_LAST && last)))
      memcpy(feed.logits + (feed.want == OC_ALL ? r - span.row : 0) * m_.vocab, logits, size_t(m_.vocab) * 4);
    if (!feed.most || !last || feed.status) return;
    oc_sampling s = feed.sampling;
    const int32_t i = feed.chosen_count;
    if (s.previous) s.count += i;
    s.draw = feed.draws ? feed.draws[i] : 0;
    s.logprob = feed.logprobs ? feed.logprobs + i : nullptr;
    s.ids = s.likeliest ? feed.likeliest_ids + int64_t(i) * s.likeliest : nullptr;
    s.logprobs = s.likeliest ? feed.likeliest_logprobs + int64_t(i) * s.likeliest : nullptr;
    const int32_t id = oc_sample(logits, m_.vocab, &s, own_.scratch);
    if (id < 0) {
      feed.status = id;
      return;
    }
    feed.chosen[i] = id;
    if (s.previous) const_cast<int32_t *>(s.previous)[s.count] = id;
    feed.chosen_count = i + 1;
  }

  oc_engine &e_;
  const oc_model &m_;
  const Class &c_;
  const int t_, threads_;
  const int64_t rows_;
  Own &own_;
  Rounded shared_, shared_low_[most_factored];
  int phase_ = 0;
};

bool goes_on(const oc_feed &f) {
  if (!f.most || f.status || f.chosen_count == 0 || f.chosen_count >= f.most) return false;
  return !std::binary_search(f.ends, f.ends + f.ends_count, f.chosen[f.chosen_count - 1]);
}

bool sound(const oc_feed &f, const oc_engine &e) {
  if (!f.ids || f.count < 1 || f.count > e.set.rows || f.past < 0 || f.past > INT32_MAX || f.most < 0 || !f.table ||
      f.want < OC_NONE || f.want > OC_ALL)
    return false;
  if ((f.want != OC_NONE && !f.logits) || (f.most && !f.chosen)) return false;
  if (f.ends_count < 0 || f.ends_count > e.m.vocab || (f.ends_count && !f.ends)) return false;
  const int32_t likeliest = f.sampling.likeliest;
  if (f.most && (likeliest < 0 || (likeliest && (!f.likeliest_ids || !f.likeliest_logprobs)))) return false;
  const int64_t positions = f.past + f.count + std::max(f.most - 1, 0);
  if (positions > std::min<int64_t>(e.set.pages * OC_PAGE, INT32_MAX)) return false;
  if (e.m.positions && positions > e.m.learned - e.m.position_offset) return false;
  for (int64_t i = 0; i < f.count; i++)
    if (f.ids[i] < 0 || f.ids[i] >= e.m.vocab) return false;
  for (int64_t p = 0; p < up_to(positions, OC_PAGE) / OC_PAGE; p++)
    if (f.table[p] < 0 || f.table[p] >= e.set.pages) return false;
  return true;
}

}  // namespace

// Lays out the next pass; false when there is none.
bool oc_engine::begin(bool first) {
  if (!first) {
    size_t kept = 0;
    for (oc_feed *f : active)
      if (goes_on(*f)) active[kept++] = f;
    active.resize(kept);
  }
  if (active.empty()) return false;
  spans.clear();
  row_id.clear();
  row_position.clear();
  row_feed.clear();
  wanted.clear();
  for (size_t i = 0; i < active.size(); i++) {
    const oc_feed &f = *active[i];
    const int64_t done = f.chosen_count;
    const Span span = {f.table, done ? f.past + f.count + done - 1 : f.past, done ? 1 : f.count,
                       int64_t(row_id.size())};
    spans.push_back(span);
    for (int64_t n = 0; n < span.count; n++) {
      const bool last = n == span.count - 1;
      if ((f.most && last) || (!done && (f.want == OC_ALL || (f.want == OC_LAST && last))))
        wanted.push_back(int64_t(row_id.size()));
      row_id.push_back(done ? f.chosen[done - 1] : f.ids[n]);
      row_position.push_back(int32_t(span.past + n));
      row_feed.push_back(int32_t(i));
    }
  }
  int64_t floats = 0;
  for (int i = 0; i < m.layers; i++)
    floats = std::max(floats, c.attention->work(m.layer[i], spans.data(), int64_t(spans.size()), pool.size()).partial_floats);
  if (floats * 4 > partial.bytes()) partial = Memory(floats * 4 * 5 / 4);
  for (auto &counter : counters) counter.store(0, std::memory_order_relaxed);
  return true;
}

int oc_engine::step(oc_feed *feeds, int64_t count, int steps, const volatile int32_t *cancel) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; i++) {
    if (!sound(feeds[i], *this)) return OC_BAD_ARGUMENT;
    total += feeds[i].count;
    if (total > set.rows) return OC_BAD_ARGUMENT;
  }
  active.clear();
  for (int64_t i = 0; i < count; i++) {
    feeds[i].chosen_count = feeds[i].status = 0;
    active.push_back(&feeds[i]);
  }
  for (int n = 0; n < steps; n++) {
    if (n && cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED)) break;
    if (!begin(n == 0)) break;
    pool.run([this](int thread) { Walk(*this, thread).run(); });
  }
  return 0;
}

// ------------------------------------------------------------------------------------- interface

int oc_engine_open(const oc_model *model, const oc_engine_settings *settings, oc_engine **engine) {
  if (!model || !settings || !engine || !sound(*model) || !sound(*settings)) return OC_BAD_ARGUMENT;
  try {
    *engine = new oc_engine(*model, *settings);
  } catch (const std::exception &) {
    return OC_NO_MEMORY;
  }
  return 0;
}

int oc_engine_need(const oc_model *model, const oc_engine_settings *settings, int64_t *work, int64_t *kv) {
  if (!model || !settings || !work || !kv || !sound(*model) || !sound(*settings)) return OC_BAD_ARGUMENT;
  try {
    const oc_engine engine(*model, *settings, true);
    *work = engine.work_bytes;
    *kv = engine.kv_bytes;
  } catch (const std::exception &) {
    return OC_NO_MEMORY;
  }
  return 0;
}

void oc_engine_close(oc_engine *engine) { delete engine; }

int64_t oc_engine_bytes(const oc_engine *e) { return e ? e->arena.bytes() + e->kv.bytes() + e->partial.bytes() : 0; }

int oc_engine_step(oc_engine *engine, oc_feed *feeds, int64_t count, int steps, const volatile int32_t *cancel) {
  if (!engine || !feeds || count < 1 || steps < 1) return OC_BAD_ARGUMENT;
  try {
    return engine->step(feeds, count, steps, cancel);
  } catch (const std::bad_alloc &) {
    return OC_NO_MEMORY;
  }
}

int oc_multiply(const oc_matrix *matrix, const float *x, int64_t rows, int threads, int repeats, float *y,
                double *seconds) {
  constexpr int64_t most_rows = 1 << 20;
  if (!matrix || !matrix->data || oc_layout_bytes(matrix) <= 0 || !sound_rounding(*matrix) || matrix->right || matrix->rest || !x || !y || rows < 1 || rows > most_rows ||
      threads < 1 || threads > most_threads || repeats < 1)
    return OC_BAD_ARGUMENT;
  const oc_matrix &w = *matrix;
  const Class &c = chosen_class();
  try {
    Sizes sizes;
    sizes.see(w);
    const int64_t stride = padded(w.rows), scratch_bytes = up_to(c.matmul->scratch_bytes(w, rows), 64);
    Rounded rounded;
    float *out = nullptr;
    uint8_t *scratch = nullptr;
    Memory memory;
    for (int round = 0; round < 2; round++) {
      Carver carver;
      if (round) carver.start(memory.at());
      rounded.carve(carver, sizes.blocks, rows, w.columns);
      carver.take(out, rows * stride);
      carver.take(scratch, scratch_bytes * threads);
      if (!round) memory = Memory(carver.bytes());
    }
    rounded.fit(w.columns);
    const bool integers = w.bits && !w.exact;
    if (integers)
      for (int64_t r = 0; r < rows; r++) c.rows->quantize(x + r * w.columns, w.columns, rounding_of(w), *rounded.of(w.block), r);
    const Input in = {x, w.columns, rows, integers ? rounded.of(w.block) : nullptr};
    Pool pool(threads);
    const int64_t tiles = stride / 16;
    const Pieces pieces(tiles, c.matmul->panel_tiles, pool.size());
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < repeats; i++) {
      std::atomic<int64_t> next{0};
      const auto start = std::chrono::steady_clock::now();
      pool.run([&](int t) {
        void *const mine = scratch + t * scratch_bytes;
        if (rows <= few_rows) {
          const int64_t begin = tiles * t / pool.size(), end = tiles * (t + 1) / pool.size();
          if (begin < end) c.matmul->multiply(w, in, begin, end, out, stride, mine);
          return;
        }
        for (int64_t i; (i = next.fetch_add(1)) < pieces.count();)
          c.matmul->multiply(w, in, pieces.begin(i), pieces.begin(i + 1), out, stride, mine);
      });
      least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    if (seconds) *seconds = least;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < w.rows; i++) y[r * w.rows + i] = out[r * stride + i] + (w.bias ? w.bias[i] : 0);
  } catch (const std::exception &) {
    return OC_NO_MEMORY;
  }
  return 0;
}
