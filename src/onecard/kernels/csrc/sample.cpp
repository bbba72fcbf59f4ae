// Logits to the next id, by the rules of runtime/sample.py, without sorting the vocabulary.
//
// The largest logit of every block of 128 (peaks, per class) is most of the work. The k-th largest peak
// is a bound of the k-th largest logit, so the candidates of top-k are in the few blocks that reach it.
// What remains is turned into chances in float64; the nucleus of top-p is found by quickselect with
// weights. Every filter becomes a bound on the logits where it can, so that most ids are never looked
// at one by one.
//
// sample.py adds chances up one after the other, this file block by block: the same id, but for a draw
// within 1e-13 or so of a border between two.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "engine.h"
#include "numbers.h"
#include "onecard.h"

namespace {

constexpr int block = oc::peak_block;

int64_t blocks_of(int64_t count) { return (count + block - 1) / block; }

// The caller's memory. `id`, `value` and `chance` are the candidates, in the order of their ids.
struct Scratch {
  double *chance;    // [vocab]
  float *value;      // [vocab]
  float *penalized;  // [vocab]
  int32_t *id;       // [vocab]
  int32_t *order;    // [vocab]
  float *peak;       // [blocks]
  float *sorted;     // [blocks]

  Scratch(void *memory, int64_t vocab)
      : chance(static_cast<double *>(memory)),
        value(reinterpret_cast<float *>(chance + vocab)),
        penalized(value + vocab),
        id(reinterpret_cast<int32_t *>(penalized + vocab)),
        order(id + vocab),
        peak(reinterpret_cast<float *>(order + vocab)),
        sorted(peak + blocks_of(vocab)) {}
};

// One row of logits, and the largest of each block.
struct Row {
  const float *x;
  int64_t count;
  const float *peak;
  float most;  // NaN if one of them is
};

Row look_at(const oc::Rows &rows, const float *x, int64_t count, float *peak) {
  const bool numbers = rows.peaks(x, count, peak);
  return {x, count, peak, numbers ? *std::max_element(peak, peak + blocks_of(count)) : __builtin_nanf("")};
}

int32_t first_largest(const Row &row) {
  const int64_t at = std::find(row.peak, row.peak + blocks_of(row.count), row.most) - row.peak;
  return int32_t(std::find(row.x + at * block, row.x + row.count, row.most) - row.x);
}

// The ids whose logit is at least `least`, and those logits; returns how many.
int64_t collect(const Row &row, float least, int32_t *id, float *value) {
  int64_t found = 0;
  for (int64_t b = 0; b < blocks_of(row.count); b++) {
    if (row.peak[b] < least) continue;
    const int64_t end = std::min(row.count, (b + 1) * block);
    for (int64_t i = b * block; i < end; i++) {
      id[found] = int32_t(i);
      value[found] = row.x[i];
      found += row.x[i] >= least;
    }
  }
  return found;
}

// The k-th largest logit, 1 <= k <= count. Overwrites the candidates.
float largest_but(const Row &row, int64_t k, Scratch &scratch) {
  const int64_t blocks = blocks_of(row.count);
  float bound = -__builtin_inff();
  if (k <= blocks) {
    std::copy_n(row.peak, blocks, scratch.sorted);
    std::nth_element(scratch.sorted, scratch.sorted + k - 1, scratch.sorted + blocks, std::greater<>());
    bound = scratch.sorted[k - 1];
  }
  const int64_t found = collect(row, bound, scratch.id, scratch.value);
  std::nth_element(scratch.value, scratch.value + k - 1, scratch.value + found, std::greater<>());
  return scratch.value[k - 1];
}

// ----------------------------------------------------------------------------------------- penalties

// The logits with the three penalties, in float32; NULL for an id that is none.
const float *penalize(const float *logits, int64_t vocab, const oc_sampling &s, Scratch &scratch) {
  const bool counted = s.presence != 0 || s.frequency != 0;
  if (s.count == 0 || (s.repetition == 1 && !counted)) return logits;
  for (int64_t i = 0; i < s.count; i++)
    if (s.previous[i] < 0 || s.previous[i] >= vocab) return nullptr;
  memcpy(scratch.penalized, logits, size_t(vocab) * 4);
  // Only the entries of ids that occurred are ever set or read.
  int32_t *const seen = scratch.order;
  for (int64_t i = 0; i < s.count; i++) seen[s.previous[i]] = 0;
  const float repetition = float(s.repetition);
  for (int64_t i = 0; i < s.count; i++) {
    if (seen[s.previous[i]]++) continue;
    float &x = scratch.penalized[s.previous[i]];
    x = x < 0 ? x * repetition : x / repetition;
  }
  if (!counted) return scratch.penalized;
  for (int64_t i = s.prompt; i < s.count; i++) seen[s.previous[i]] = 0;
  for (int64_t i = s.prompt; i < s.count; i++) seen[s.previous[i]]++;
  for (int64_t i = s.prompt; i < s.count; i++) {
    int32_t &times = seen[s.previous[i]];
    if (times) scratch.penalized[s.previous[i]] -= float(s.presence + s.frequency * times);
    times = 0;
  }
  return scratch.penalized;
}

// ------------------------------------------------------------------------------------------- filters

// Integers in the order of the numbers that they stand for, and back.
int32_t key_of(float x) {
  const int32_t bits = int32_t(pattern(x));
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

float of_key(int64_t key) { return number(uint32_t(key < 0 ? int32_t(key) ^ INT32_MAX : int32_t(key))); }

double tempered(float x, float most, double temperature) {
  return (double(x) - double(most)) / temperature;
}

// The least logit that is `bound` <= 0 or more once tempered: by halving, since rounding may join neighbours.
float least_logit(float most, double temperature, double bound) {
  int64_t low = key_of(-__builtin_inff()), high = key_of(most);
  if (!(bound > tempered(-__builtin_inff(), most, temperature))) return -__builtin_inff();
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (tempered(of_key(middle), most, temperature) >= bound ? high : low) = middle;
  }
  return of_key(high);
}

constexpr double slack = 1e-9;  // what is near a bound is decided by its chance

// No id below this passes top-k, or min-p where top-p does not come first.
float least_of(const Row &row, const oc_sampling &s, Scratch &scratch) {
  float least = -__builtin_inff();
  if (s.top_k > 0 && s.top_k < row.count) {
    const float last = largest_but(row, s.top_k, scratch);
    least = least_logit(row.most, s.temperature, tempered(last, row.most, s.temperature));
  }
  if (s.top_p >= 1 && s.min_p > 0)
    least = std::max(least, least_logit(row.most, s.temperature, std::log(s.min_p) - slack));
  return least;
}

double sum(const double *x, int64_t count) {
  typedef double pair __attribute__((vector_size(16)));
  pair part[4] = {};
  double rest = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 4; j++) {
      pair y;
      memcpy(&y, x + i + 2 * j, sizeof y);
      part[j] += y;
    }
  for (; i < count; i++) rest += x[i];
  const pair all = (part[0] + part[2]) + (part[1] + part[3]);
  return all[0] + all[1] + rest;
}

// The least likely id of the nucleus, as an index: from the likeliest down, of equals the earlier first,
// each belongs while those before it sum to less than `wanted`.
int32_t last_of_nucleus(const double *chance, int64_t count, double wanted, int32_t *order) {
  for (int64_t i = 0; i < count; i++) order[i] = int32_t(i);
  const auto before = [chance](int32_t a, int32_t b) {
    return chance[a] > chance[b] || (chance[a] == chance[b] && a < b);
  };
  // What is ahead of `begin` belongs and sums to `sure`; what is at `end` or later does not belong.
  int64_t begin = 0, end = count;
  double sure = 0;
  constexpr int64_t few = 32;
  while (end - begin > few) {
    const int64_t middle = begin + (end - begin) / 2;
    // The median of three goes last while the others are parted.
    if (before(order[middle], order[begin])) std::swap(order[middle], order[begin]);
    if (before(order[end - 1], order[middle])) std::swap(order[end - 1], order[middle]);
    if (before(order[middle], order[begin])) std::swap(order[middle], order[begin]);
    std::swap(order[middle], order[end - 1]);
    const int32_t pivot = order[end - 1];
    int64_t border = begin;
    double ahead = 0;
    for (int64_t i = begin; i < end - 1; i++) {
      const int32_t one = order[i];
      const bool first = before(one, pivot);
      order[i] = order[border];
      order[border] = one;
      ahead += first ? chance[one] : 0;
      border += first;
    }
    std::swap(order[border], order[end - 1]);
    if (sure + ahead >= wanted) {
      end = border;
    } else {
      sure += ahead + chance[pivot];
      begin = border + 1;
    }
  }
  std::sort(order + begin, order + end, before);
  while (begin < end && sure < wanted) sure += chance[order[begin++]];
  return order[std::max<int64_t>(begin, 1) - 1];
}

// The first whose sum with all before it is more than `draw` of the whole.
int64_t drawn(const double *chance, int64_t count, double draw) {
  double whole = 0;
  for (int64_t i = 0; i < count; i += block) whole += sum(chance + i, std::min<int64_t>(block, count - i));
  const double wanted = draw * whole;
  double passed = 0;
  for (int64_t i = 0; i < count; i += block) {
    int64_t end = std::min(count, i + block);
    const double here = sum(chance + i, end - i);
    if (passed + here > wanted) {
      for (int64_t j = i; j < end; j++)
        if ((passed += chance[j]) > wanted) return j;
      while (chance[--end] == 0) continue;  // the two sums were rounded differently
      return end;
    }
    passed += here;
  }
  int64_t last = count - 1;  // the product was rounded up: the last that makes a difference
  while (whole + chance[last] == whole) last--;
  return last;
}

// The candidates: ids whose logit is at least `least`.
class Candidates {
 public:
  Candidates(const oc::Rows &rows, const Row &row, const oc_sampling &s, Scratch &scratch)
      : rows(rows), row(row), s(s), scratch(scratch), chance(scratch.chance) {}

  void take(float least) {
    all = least == -__builtin_inff();
    count = all ? row.count : collect(row, least, scratch.id, scratch.value);
    rows.chances(all ? row.x : scratch.value, count, row.most, s.temperature, scratch.chance);
  }

  void keep_nucleus(float least) {
    const double total = sum(chance, count);
    const double hopeless = total * (1 - s.top_p) / double(row.count) / 2;  // all of these are not needed
    take(std::max(least, least_logit(row.most, s.temperature, std::log(hopeless) - slack)));
    const int32_t last = last_of_nucleus(chance, count, s.top_p * total, scratch.order);
    const double border = chance[last];
    retain([=](int32_t i, double chance) { return chance > border || (chance == border && i <= last); });
  }

  // The likeliest has the chance 1 and is always there.
  void keep_likely() {
    retain([=](int32_t, double chance) { return chance >= s.min_p; });
  }

  int32_t draw() const {
    const int64_t i = drawn(chance, count, s.draw);
    return all ? int32_t(i) : scratch.id[i];
  }

 private:
  template <class Keep>
  void retain(Keep keep) {
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++) {
      const bool stays = keep(int32_t(i), chance[i]);
      scratch.id[left] = scratch.id[i];
      scratch.chance[left] = chance[i];
      left += stays;
    }
    count = left;
  }

  const oc::Rows &rows;
  const Row &row;
  const oc_sampling &s;
  Scratch &scratch;
  const double *chance;
  int64_t count = 0;
  bool all = false;
};

int32_t choose(const oc::Rows &rows, const Row &row, const oc_sampling &s, Scratch &scratch) {
  if (s.temperature == 0) return first_largest(row);
  const float least = least_of(row, s, scratch);
  Candidates candidates(rows, row, s, scratch);
  candidates.take(least);
  if (s.top_p < 1) candidates.keep_nucleus(least);
  if (s.min_p > 0) candidates.keep_likely();
  return candidates.draw();
}

// ------------------------------------------------------------------------------------- probabilities

// The logarithm of sum exp(x - most).
double log_sum(const oc::Rows &rows, const Row &row) {
  constexpr float nothing = -104;  // float32 has no smaller exp
  double total = 0;
  for (int64_t b = 0; b < blocks_of(row.count); b++)
    if (row.peak[b] - row.most >= nothing)
      total += double(rows.exp_sum(row.x + b * block, std::min<int64_t>(block, row.count - b * block), row.most));
  return std::log(total);
}

void likeliest(const Row &row, double log_total, const oc_sampling &s, Scratch &scratch) {
  const float least = largest_but(row, s.likeliest, scratch);
  const int64_t found = collect(row, least, scratch.id, scratch.value);
  const float *const value = scratch.value;
  int32_t *const order = scratch.order;
  for (int64_t i = 0; i < found; i++) order[i] = int32_t(i);
  std::partial_sort(order, order + s.likeliest, order + found, [value](int32_t a, int32_t b) {
    return value[a] > value[b] || (value[a] == value[b] && a < b);
  });
  for (int32_t i = 0; i < s.likeliest; i++) {
    s.ids[i] = scratch.id[order[i]];
    s.logprobs[i] = float(double(value[order[i]]) - double(row.most) - log_total);
  }
}

bool sane(int64_t vocab, const oc_sampling &s) {
  return vocab >= 1 && vocab <= INT32_MAX && s.temperature >= 0 &&
         std::isfinite(s.temperature) && s.top_k >= 0 && s.top_p >= 0 &&
         s.min_p >= 0 && s.min_p <= 1 && s.repetition > 0 && std::isfinite(s.presence) &&
         std::isfinite(s.frequency) && s.draw >= 0 && s.draw < 1 && s.count >= 0 &&
         s.count <= INT32_MAX && s.prompt >= 0 && (s.previous || !s.count) && s.likeliest >= 0 &&
         s.likeliest <= vocab && ((s.ids && s.logprobs) || !s.likeliest);
}

}  // namespace

int64_t oc_sample_scratch(int64_t vocab) {
  if (vocab < 1 || vocab > INT32_MAX) return OC_BAD_ARGUMENT;
  return vocab * 24 + blocks_of(vocab) * 8;
}

int32_t oc_sample(const float *logits, int64_t vocab, const oc_sampling *sampling, void *memory) {
  if (!logits || !sampling || !memory || !sane(vocab, *sampling)) return OC_BAD_ARGUMENT;
  const oc_sampling &s = *sampling;
  const oc::Rows &rows = *oc::chosen_class().rows;
  Scratch scratch(memory, vocab);
  Row row = look_at(rows, logits, vocab, scratch.peak);
  if (!std::isfinite(row.most)) return OC_NOT_FINITE;
  const float most = row.most;
  const double log_total = s.logprob || s.likeliest ? log_sum(rows, row) : 0;
  if (s.likeliest) likeliest(row, log_total, s, scratch);
  const float *const penalized = penalize(logits, vocab, s, scratch);
  if (!penalized) return OC_BAD_ARGUMENT;
  if (penalized != logits) row = look_at(rows, penalized, vocab, scratch.peak);
  if (!std::isfinite(row.most)) return OC_NOT_FINITE;
  const int32_t id = choose(rows, row, s, scratch);
  if (s.logprob) *s.logprob = float(double(logits[id]) - double(most) - log_total);
  return id;
}
