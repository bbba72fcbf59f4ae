// The native library without Python, against plain loops in double precision: for sanitizers that an
// interpreter is in the way of, and for processors that are emulated (make sanitize, make neon).
//
// In every instruction-set class that runs here: products in every format, rows, attention, and a small
// model through oc_engine_step, whose logits may not depend on threads, chunks or company. Says what failed
// and leaves with 1.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <list>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "engine.h"
#include "onecard.h"

namespace {

typedef std::vector<float> Floats;
typedef std::vector<double> Doubles;

int failures = 0;
std::string where;

void expect(bool good, const char *what, double seen = 0, double most = 0) {
  if (good) return;
  if (++failures <= 20) printf("FAILED %s: %s (%g, at most %g)\n", where.c_str(), what, seen, most);
}

// xorshift: the same numbers everywhere.
struct Random {
  uint64_t state;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
  int64_t below(int64_t count) { return int64_t(next() >> 11) % count; }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  float normal() { return float(std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform())); }
  Floats normals(int64_t count, float size = 1) {
    Floats x(static_cast<size_t>(count));
    for (float &v : x) v = normal() * size;
    return x;
  }
};

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Memory that begins at a multiple of 64 bytes, and ends where a sanitizer sees it.
struct Bytes {
  explicit Bytes(int64_t size) : at(static_cast<uint8_t *>(std::aligned_alloc(64, size_t((size + 63) / 64 * 64)))) {
    memset(at, 0xa5, size_t((size + 63) / 64 * 64));
  }
  Bytes(Bytes &&other) noexcept : at(other.at) { other.at = nullptr; }
  ~Bytes() { std::free(at); }
  uint8_t *at;
};

// A matrix in the kernel layout and what it stands for, [rows][columns].
struct Laid {
  oc_matrix m{};
  std::vector<Bytes> memory;
  Doubles w;
};

struct Kind {
  int bits, block, dtype;
  bool zero, exact, sparse = false, pairs = false;
};

// The same integers without those that are zero.
void without_zeros(Laid &laid, bool pairs) {
  const void *const dense = laid.m.data;
  laid.m.kind = pairs ? OC_PATTERN : OC_SPARSE;
  laid.m.slots = pairs ? 0 : std::count_if(laid.w.begin(), laid.w.end(), [](double w) { return w != 0; });
  laid.memory.emplace_back(oc_layout_bytes(&laid.m));
  laid.m.data = laid.memory.back().at;
  expect(oc_layout_sparse(&laid.m, dense, 2, laid.memory.back().at) == 0, "layout without zeros");
}

Laid lay(Random &random, int64_t rows, int64_t columns, const Kind &kind, float size = 1) {
  Laid laid;
  oc_matrix &m = laid.m;
  m.rows = rows;
  m.columns = columns;
  m.bits = kind.bits;
  m.block = kind.bits ? kind.block : 0;
  m.dtype = kind.dtype;
  m.zero_point = kind.zero;
  m.exact = kind.exact;
  const int64_t bytes = oc_layout_bytes(&m);
  expect(bytes > 0, "layout bytes");
  laid.memory.emplace_back(bytes);
  m.data = laid.memory[0].at;
  Floats w = random.normals(rows * columns, size);
  if (kind.sparse)
    for (float &v : w) v = random.below(5) < 3 ? 0 : v;
  if (kind.pairs)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < columns; k += 4)
        for (int64_t gone = 0, first = random.below(4); gone < 2; gone++)
          if (const int64_t column = k + (first + 3 * gone) % 4; column < columns) w[size_t(r * columns + column)] = 0;
  laid.w.resize(w.size());
  if (!kind.bits) {
    expect(oc_layout_dense(&m, w.data(), OC_FP32, 2, laid.memory[0].at) == 0, "dense layout");
    for (size_t i = 0; i < w.size(); i++) laid.w[i] = kind.dtype == OC_BF16 ? from_bf16(to_bf16(w[i])) : w[i];
    return laid;
  }
  // One group to a row where blocks do not divide it.
  const int64_t group = columns % kind.block ? columns : kind.block, groups = columns / group;
  const int64_t words = (columns * kind.bits + 31) / 32;
  std::vector<int32_t> packed(static_cast<size_t>(rows * words));
  std::vector<uint8_t> scale(static_cast<size_t>(rows * groups * 4));
  std::vector<int8_t> zero(static_cast<size_t>(rows * groups));
  int8_t *const zeros = kind.zero ? zero.data() : nullptr;
  const bool fits = group % 8 == 0 || group == columns;
  expect(fits && oc_round_pack(w.data(), OC_FP32, rows, columns, kind.bits, group, kind.dtype, 2, packed.data(),
                               scale.data(), zeros) == 0, "rounding");
  expect(oc_layout_integers(&m, packed.data(), kind.bits, scale.data(), zeros, group, 2, laid.memory[0].at) == 0,
         "layout");
  Floats dense(w.size());
  expect(oc_to_dense(packed.data(), scale.data(), kind.dtype, zeros, rows, columns, kind.bits, group, OC_FP32, 2,
                     dense.data()) == 0, "dense values");
  laid.w.assign(dense.begin(), dense.end());
  if (kind.sparse || kind.pairs) without_zeros(laid, kind.pairs);
  return laid;
}

// Numbers of bf16 divided by scales of every significand, as doubles divide them.
void quotients() {
  where = std::string(oc_isa_name(oc_isa())) + " rounding bf16";
  constexpr int64_t rows = 128, columns = 896;
  std::vector<uint16_t> w(rows * columns);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < columns; k++) {
      const int64_t size = k % 128 ? 121 * 128 + k : 127 * 128 + r;  // every number up to its group's largest
      w[size_t(r * columns + k)] = uint16_t(size | (k & 1 ? 0x8000 : 0));
    }
  for (const int bits : {2, 4, 8}) {
    const int per_word = 32 / bits, half = 1 << (bits - 1);
    std::vector<int32_t> packed(rows * columns / per_word);
    std::vector<uint16_t> scale(rows * columns / 128);
    expect(oc_round_pack(w.data(), OC_BF16, rows, columns, bits, 128, OC_BF16, 2, packed.data(), scale.data(),
                         nullptr) == 0, "rounding");
    int64_t wrong = 0;
    for (int64_t i = 0; i < rows * columns; i++) {
      const double q = std::nearbyint(double(from_bf16(w[size_t(i)])) / from_bf16(scale[size_t(i / 128)]));
      const int code = int(uint32_t(packed[size_t(i / per_word)]) >> i % per_word * bits) & (2 * half - 1);
      wrong += code - half != int(std::clamp(q, double(-half), double(half - 1)));
    }
    expect(!wrong, "codes", double(wrong));
  }
}

// What the engine makes of inputs: int8 in blocks.
Doubles rounded(const Floats &x, int64_t rows, int64_t columns, int block) {
  Doubles y(x.size());
  for (int64_t r = 0; r < rows; r++)
    for (int64_t b = 0; b < columns; b += block) {
      const int64_t end = std::min(columns, b + block);
      float most = 0;
      for (int64_t k = b; k < end; k++) most = std::max(most, std::fabs(x[size_t(r * columns + k)]));
      const float up = most > 0 ? 127 / most : 0, scale = most / 127;
      for (int64_t k = b; k < end; k++)
        y[size_t(r * columns + k)] = std::nearbyint(x[size_t(r * columns + k)] * up) * double(scale);
    }
  return y;
}

Floats multiply(const oc_matrix &m, const float *x, int64_t rows, int threads) {
  Floats y(static_cast<size_t>(rows * m.rows));
  double seconds = 0;
  expect(oc_multiply(&m, x, rows, threads, 1, y.data(), &seconds) == 0, "oc_multiply");
  return y;
}

void product(Random &random, int64_t rows, int64_t columns, const Kind &kind) {
  constexpr int64_t most = 35;
  const Laid laid = lay(random, rows, columns, kind);
  const Floats x = random.normals(most * columns, 3);
  const Doubles in = kind.bits && !kind.exact ? rounded(x, most, columns, kind.block) : Doubles(x.begin(), x.end());
  const Floats y = multiply(laid.m, x.data(), most, 1);
  double worst = 0;
  for (int64_t m = 0; m < most; m++)
    for (int64_t r = 0; r < rows; r++) {
      double exact = 0, size = 1e-30;
      for (int64_t k = 0; k < columns; k++) {
        const double part = in[size_t(m * columns + k)] * laid.w[size_t(r * columns + k)];
        exact += part;
        size += std::fabs(part);
      }
      worst = std::max(worst, std::fabs(y[size_t(m * rows + r)] - exact) / size);
    }
  expect(worst < 2e-6, "product", worst, 2e-6);
  for (const int64_t count : {1, 2, 3, 4, 5, 8, 9, 17, 32})
    for (const int threads : {1, 3}) {
      const Floats some = multiply(laid.m, x.data() + (most - count) * columns, count, threads);
      expect(memcmp(some.data(), y.data() + (most - count) * rows, some.size() * 4) == 0, "bits of a row in company");
    }
}

void products() {
  Random random{17};
  const int64_t shapes[][2] = {{1, 8}, {17, 96}, {40, 320}, {70, 640}, {33, 152}, {16, 128}};
  int turn = 0;
  for (const int bits : {2, 3, 4, 8})
    for (const int block : {32, 64, 128})
      for (const bool zero : {false, true})
        for (const bool exact : {false, true}) {
          const int dtype = turn % 3;
          const auto &shape = shapes[turn++ % 6];
          char text[80];
          snprintf(text, sizeof text, "%s product int%d block %d zero %d exact %d dtype %d", oc_isa_name(oc_isa()), bits,
                   block, zero, exact, dtype);
          where = text;
          product(random, shape[0], shape[1], {bits, block, dtype, zero, exact});
        }
  for (const int bits : {4, 8})
    for (const bool exact : {false, true})
      for (const bool pairs : {false, true})
        for (const auto &shape : shapes) {
          where = std::string(oc_isa_name(oc_isa())) + (pairs ? " two of four, int" : " without zeros, int") +
                  std::to_string(bits);
          product(random, shape[0], shape[1], {bits, 32, OC_BF16, false, exact, !pairs, pairs});
        }
  for (const int dtype : {OC_FP32, OC_BF16})
    for (const auto &shape : shapes) {
      where = std::string(oc_isa_name(oc_isa())) + " dense product";
      product(random, shape[0], shape[1], {0, 0, dtype, false, false});
    }
}

// ---------------------------------------------------------------------------------------------- rows

double error(const Floats &mine, const Doubles &exact) {
  double worst = 0, size = 1e-30;
  for (size_t i = 0; i < mine.size(); i++) {
    worst = std::max(worst, std::fabs(mine[i] - exact[i]));
    size = std::max(size, std::fabs(exact[i]));
  }
  return worst / size;
}

double activated(int kind, double x) {
  if (kind == OC_SILU) return x / (1 + std::exp(-x));
  if (kind == OC_RELU) return x < 0 ? 0 : x;
  if (kind == OC_GELU) return x / 2 * std::erfc(-x / std::sqrt(2.0));
  return x / 2 * (1 + std::tanh(std::sqrt(2 / 3.141592653589793) * (x + 0.044715 * x * x * x)));
}

void rows() {
  const auto &table = *static_cast<const oc::Rows *>(oc_rows());
  Random random{23};
  for (const int64_t count : {1, 5, 16, 31, 64, 100, 257}) {
    where = std::string(oc_isa_name(oc_isa())) + " rows of " + std::to_string(count);
    const Floats x = random.normals(count, 4), w = random.normals(count), bias = random.normals(count);
    Floats y(x.size());
    Doubles exact(x.size());
    for (const int kind : {OC_RMS, OC_LAYER}) {
      double mean = 0, squares = 0;
      if (kind == OC_LAYER) mean = std::accumulate(x.begin(), x.end(), 0.0) / double(count);
      for (const float v : x) squares += (v - mean) * (v - mean);
      for (size_t i = 0; i < x.size(); i++)
        exact[i] = (x[i] - mean) / std::sqrt(squares / double(count) + 1e-2) * w[i] + bias[i];
      table.norm({w.data(), bias.data(), kind, 1e-2f}, x.data(), count, y.data());
      expect(error(y, exact) < 3e-6, "norm", error(y, exact), 3e-6);
    }
    for (int kind = OC_SILU; kind <= OC_GELU_TANH; kind++) {
      for (size_t i = 0; i < x.size(); i++) exact[i] = activated(kind, x[i]) * w[i];
      table.activate(kind, x.data(), w.data(), count, y.data());
      expect(error(y, exact) < 2e-6, "activation", error(y, exact), 2e-6);
    }
    for (size_t i = 0; i < x.size(); i++) exact[i] = w[i] + 0.3 * x[i];
    y = w;
    table.add(x.data(), 0.3f, count, y.data());
    expect(error(y, exact) < 1e-6, "add", error(y, exact), 1e-6);
    for (size_t i = 0; i < x.size(); i++) exact[i] = 5 * std::tanh(x[i] / 5.0);
    y = x;
    table.soft_cap(y.data(), count, 5);
    expect(error(y, exact) < 1e-6, "soft cap", error(y, exact), 1e-6);
    const double most = *std::max_element(x.begin(), x.end());
    double total = 0;
    for (const float v : x) total += std::exp(v - most);
    for (size_t i = 0; i < x.size(); i++) exact[i] = std::exp(x[i] - most) / total;
    y = x;
    table.softmax(y.data(), count);
    expect(error(y, exact) < 2e-6, "softmax", error(y, exact), 2e-6);
    std::vector<uint16_t> narrow;
    for (const float v : x) narrow.push_back(to_bf16(v));
    for (size_t i = 0; i < x.size(); i++) exact[i] = from_bf16(narrow[i]) * 2.0;
    table.gather(narrow.data(), OC_BF16, 0, count, 2, y.data());
    expect(error(y, exact) == 0, "gather", error(y, exact));
    const Floats inverse = {1.0f, 0.1f, 0.01f};
    Floats cos(3), sin(3);
    table.angles({inverse.data(), 3, 1.5f}, 1000 + count, cos.data(), sin.data());
    for (size_t i = 0; i < 3; i++) {
      const double angle = float(1000 + count) * inverse[i];
      expect(std::fabs(cos[i] - 1.5 * std::cos(angle)) < 1e-6 && std::fabs(sin[i] - 1.5 * std::sin(angle)) < 1e-6,
             "angles");
    }
    Floats head = random.normals(2 * 10);
    const Floats before = head;
    table.rotate(head.data(), 2, 10, 3, cos.data(), sin.data());
    for (size_t h = 0; h < 20; h += 10)
      for (size_t i = 0; i < 10; i++) {
        const size_t a = h + i % 3, b = a + 3;
        const double turned = i < 3   ? double(before[a]) * cos[i] - double(before[b]) * sin[i]
                              : i < 6 ? double(before[b]) * cos[i - 3] + double(before[a]) * sin[i - 3]
                                      : before[h + i];
        expect(std::fabs(head[h + i] - turned) < 2e-6, "rotation");
      }
  }
}

// ----------------------------------------------------------------------------------------- attention

struct Heads {
  int heads, kv_heads, dim;
  int64_t window;
  float cap;
};

void attend(Random &random, const Heads &h, int dtype, int64_t past, int64_t count, double most) {
  const int64_t length = past + count, q_width = h.heads * h.dim, k_width = h.kv_heads * h.dim;
  const Floats q = random.normals(count * q_width), k = random.normals(length * k_width),
               v = random.normals(length * k_width);
  const float scale = float(1 / std::sqrt(double(h.dim)));
  Floats y(q.size()), again(q.size());
  const auto run = [&](int threads, Floats &out) {
    double seconds[2];
    expect(oc_attend(h.heads, h.kv_heads, h.dim, h.window, scale, h.cap, dtype, 1, &past, &count, k.data(), v.data(),
                     q.data(), threads, 1, out.data(), seconds) == 0, "oc_attend");
  };
  run(1, y);
  run(3, again);
  expect(y == again, "bits of attention with threads");
  Doubles exact(q.size());
  for (int64_t t = 0; t < count; t++)
    for (int head = 0; head < h.heads; head++) {
      const int64_t end = past + t + 1, begin = h.window ? std::max<int64_t>(0, end - h.window) : 0;
      const int64_t of = head / (h.heads / h.kv_heads) * h.dim;
      Doubles chance;
      double total = 0;
      for (int64_t s = begin; s < end; s++) {
        double score = 0;
        for (int i = 0; i < h.dim; i++)
          score += double(q[size_t(t * q_width + head * h.dim + i)]) * k[size_t(s * k_width + of + i)];
        score *= scale;
        if (h.cap > 0) score = h.cap * std::tanh(score / h.cap);
        chance.push_back(std::exp(score));
        total += chance.back();
      }
      for (int64_t s = begin; s < end; s++)
        for (int i = 0; i < h.dim; i++)
          exact[size_t(t * q_width + head * h.dim + i)] +=
              chance[size_t(s - begin)] / total * v[size_t(s * k_width + of + i)];
    }
  expect(error(y, exact) < most, "attention", error(y, exact), most);
}

void attention() {
  Random random{29};
  const struct {
    int dtype;
    double most;
  } caches[] = {{OC_FP16, 2e-3}, {OC_BF16, 1.5e-2}, {OC_INT8, 3e-2}};
  const Heads shapes[] = {{4, 2, 16, 0, 0}, {3, 1, 10, 5, 0}, {2, 2, 64, 0, 5}, {6, 1, 17, 40, 0}};
  for (const auto &cache : caches)
    for (const Heads &heads : shapes)
      for (const auto &[past, count] : {std::pair<int64_t, int64_t>{0, 1}, {0, 37}, {300, 1}, {250, 20}}) {
        where = std::string(oc_isa_name(oc_isa())) + " attention in cache " + std::to_string(cache.dtype);
        attend(random, heads, cache.dtype, past, count, cache.most);
      }
}

// -------------------------------------------------------------------------------------------- engine

constexpr int64_t vocab = 90, hidden = 64, width = 100, window = 40;

// Two layers, one of them of experts, with everything that shares threads; owned by one object.
struct Model {
  Random random{31};
  std::list<Laid> laid;
  std::list<Floats> floats;
  std::vector<oc_mlp> mlps;
  oc_layer layers[2] = {};
  oc_rope rope{};
  oc_model m{};

  oc_matrix matrix(int64_t rows, int64_t columns, const Kind &kind, bool bias = false) {
    laid.push_back(lay(random, rows, columns, kind, 0.1f));
    oc_matrix w = laid.back().m;
    if (bias) w.bias = vector(rows);
    return w;
  }
  const float *vector(int64_t count, float of = 0.1f) {
    floats.push_back(random.normals(count, of));
    return floats.back().data();
  }
  oc_norm norm(int kind) { return {vector(hidden, 1), kind == OC_LAYER ? vector(hidden) : nullptr, kind, 1e-5f}; }
  oc_mlp mlp(const Kind &kind, int64_t w) {
    return {int32_t(w), OC_SILU, matrix(w, hidden, kind), matrix(w, hidden, kind), matrix(hidden, w, {8, 32, OC_BF16, false, false})};
  }

  Model() {
    const Kind int4{4, 32, OC_BF16, true, false}, int3{3, 64, OC_FP16, false, false}, dense{0, 0, OC_BF16, false, false};
    for (int i = 0; i < 6; i++) mlps.push_back(mlp(i % 2 ? int3 : int4, i == 5 ? 48 : width));
    for (int i = 0; i < 2; i++) {
      oc_layer &l = layers[i];
      l.order = OC_PRE;
      l.heads = 4;
      l.kv_heads = 2;
      l.head_dim = 16;
      l.window = i ? window : 0;
      l.scale = 0.25f;
      l.attention_in = norm(i ? OC_LAYER : OC_RMS);
      l.feed_forward_in = norm(OC_RMS);
      l.q = matrix(64, hidden, i ? dense : int4, true);
      l.k = matrix(32, hidden, int3);
      l.v = matrix(32, hidden, {8, 64, OC_FP32, true, i == 0});
      l.o = matrix(hidden, 64, int4);
      l.mlps = i ? mlps.data() + 1 : mlps.data();
    }
    layers[1].experts = 4;
    layers[1].top = 2;
    layers[1].renormalize = 1;
    layers[1].shared = 1;
    layers[1].router = matrix(4, hidden, {0, 0, OC_FP32, false, false});
    layers[1].shared_gate = matrix(1, hidden, {0, 0, OC_FP32, false, false});
    floats.push_back({1, 0.3f, 0.1f, 0.03f, 0.01f, 0.003f, 0.001f, 0.0003f});
    rope = {floats.back().data(), 8, 1};
    m.vocab = vocab;
    m.hidden = m.embed = hidden;
    m.layers = 2;
    m.ropes = 1;
    m.layer = layers;
    m.rope = &rope;
    m.embedding = vector(vocab * hidden, 1);
    m.embedding_dtype = OC_FP32;
    m.embed_scale = 1;
    m.norm = norm(OC_RMS);
    m.head = matrix(vocab, hidden, {8, 32, OC_BF16, false, false});
  }
};

struct Engine {
  oc_engine *engine = nullptr;
  Engine(const Model &model, int threads, int kv_dtype = OC_FP16) {
    const oc_engine_settings settings = {threads, kv_dtype, 24, 48};
    expect(oc_engine_open(&model.m, &settings, &engine) == 0, "oc_engine_open");
  }
  ~Engine() { oc_engine_close(engine); }
};

std::vector<int32_t> some_ids(int64_t count, uint64_t seed) {
  Random random{seed};
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t &id : ids) id = int32_t(random.below(vocab));
  return ids;
}

oc_feed feed_of(const std::vector<int32_t> &ids, int64_t past, int64_t count, const int32_t *table, float *logits) {
  oc_feed feed{};
  feed.ids = ids.data() + past;
  feed.count = count;
  feed.past = past;
  feed.table = table;
  feed.want = OC_ALL;
  feed.logits = logits;
  feed.sampling.repetition = 1;
  feed.sampling.top_p = 1;
  return feed;
}

// Logits of all ids, fed in pieces.
Floats logits_of(const Engine &e, const std::vector<int32_t> &ids, const std::vector<int64_t> &pieces,
                 const int32_t *table) {
  Floats logits(ids.size() * vocab);
  int64_t past = 0;
  for (size_t i = 0; past < int64_t(ids.size()); i++) {
    const int64_t count = std::min(pieces[i % pieces.size()], int64_t(ids.size()) - past);
    oc_feed feed = feed_of(ids, past, count, table, logits.data() + past * vocab);
    expect(oc_engine_step(e.engine, &feed, 1, 1, nullptr) == 0 && feed.status == 0, "oc_engine_step");
    past += count;
  }
  return logits;
}

void engine(bool compare_float) {
  where = std::string(oc_isa_name(oc_isa())) + " engine";
  const Model model;
  const auto ids = some_ids(300, 5);
  std::vector<int32_t> table(24);
  for (int i = 0; i < 24; i++) table[size_t(i)] = (7 * i + 3) % 24;
  Floats first;
  for (const int kv : {OC_FP16, OC_INT8}) {
    const Floats whole = logits_of(Engine(model, 1, kv), ids, {48}, table.data());
    for (const float v : whole) expect(std::isfinite(v), "finite logits");
    for (const int threads : {1, 2, 3, 4}) {
      const Engine e(model, threads, kv);
      expect(logits_of(e, ids, {1, 9, 1, 1, 33}, table.data()) == whole, "bits of chunks and threads");
      if (compare_float && kv == OC_FP16) {
        expect(logits_of(e, ids, {20}, table.data()) == whole, "the same pages again");
      }
    }
    if (kv == OC_FP16) first = whole;
  }
  expect(!first.empty(), "logits");

  // Five requests at once, each with a part of the pages, that go on choosing; once alone, once cut short.
  const Engine e(model, 3);
  std::vector<std::vector<int32_t>> prompts, chosen(5), alone(5), previous(5);
  std::vector<Floats> logits(5);
  const double draws[12] = {0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6, 0.05, 0.95, 0.45};
  std::vector<oc_feed> feeds;
  for (size_t i = 0; i < 5; i++) {
    prompts.push_back(some_ids(1 + int64_t(i * i) / 2, 40 + i));
    previous[i] = prompts[i];
    previous[i].resize(prompts[i].size() + 12);
    logits[i].resize(prompts[i].size() * vocab);
    chosen[i].resize(12);
    oc_feed feed = feed_of(prompts[i], 0, int64_t(prompts[i].size()), table.data() + 4 * i, logits[i].data());
    feed.most = 12;
    feed.chosen = chosen[i].data();
    feed.draws = draws;
    feed.sampling.temperature = i % 2 ? 0.8 : 0;
    feed.sampling.repetition = i % 3 ? 1 : 1.2;
    feed.sampling.previous = previous[i].data();
    feed.sampling.count = feed.sampling.prompt = int64_t(prompts[i].size());
    feeds.push_back(feed);
  }
  for (size_t i = 0; i < 5; i++) {
    oc_feed feed = feeds[i];
    expect(oc_engine_step(e.engine, &feed, 1, 12, nullptr) == 0 && feed.chosen_count == 12, "a reply");
    alone[i] = chosen[i];
  }
  int32_t cancel = 0;
  expect(oc_engine_step(e.engine, feeds.data(), 5, 12, &cancel) == 0, "five replies");
  for (size_t i = 0; i < 5; i++) expect(chosen[i] == alone[i] && feeds[i].chosen_count == 12, "a reply in company");
  for (int turn = 0; turn < 5; turn++) {
    cancel = 0;
    std::thread other([&] { __atomic_store_n(&cancel, 1, __ATOMIC_RELAXED); });
    expect(oc_engine_step(e.engine, feeds.data(), 5, 12, &cancel) == 0, "cancelled replies");
    other.join();
    for (size_t i = 0; i < 5; i++) {
      const int32_t count = feeds[i].chosen_count;
      expect(count >= 1 && count <= 12 && std::equal(alone[i].begin(), alone[i].begin() + count, chosen[i].begin()),
             "what was chosen before");
    }
  }
}

}  // namespace

int main(int argc, char **argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  int classes = 0;
  for (int isa = 0; isa < oc_isa_count(); isa++) {
    const std::string name = oc_isa_name(isa);
    if (!oc_isa_supported(isa) || (!only.empty() && only != name)) continue;
    expect(oc_isa_force(isa) == isa, "force");
    quotients();
    products();
    rows();
    attention();
    engine(true);
    classes++;
    printf("%s: %s\n", name.c_str(), failures ? "failures" : "good");
    fflush(stdout);
  }
  if (!classes) printf("no class %s runs here\n", only.c_str());
  return failures || !classes;
}
