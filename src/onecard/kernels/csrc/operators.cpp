// Single operators of the engine behind the C interface, for tests and measurements: checks, memory and a
// simple team of threads around what engine.h offers.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "engine.h"
#include "memory.h"
#include "onecard.h"

namespace {

constexpr int most_threads = 1024;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Threads that run one loop after another together. They wait by yielding, so that a loop starts within
// a microsecond; meant for short measurements.
class Team {
 public:
  explicit Team(int size) : size_(size) {
    try {
      for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { follow(i); });
    } catch (const std::exception &) {
      size_ = int(threads_.size()) + 1;  // the system grants no more
    }
  }
  ~Team() {
    stop_ = true;
    turn_++;
    for (auto &thread : threads_) thread.join();
  }

  // work(index, thread) for every index below `count`, each on some thread.
  void loop(int64_t count, const std::function<void(int64_t, int)> &work) {
    next_ = 0;
    count_ = count;
    work_ = &work;
    busy_ = size_ - 1;
    turn_++;
    share(0);
    while (busy_ > 0) std::this_thread::yield();
  }

 private:
  void share(int thread) {
    for (int64_t i; (i = next_++) < count_;) (*work_)(i, thread);
  }
  void follow(int thread) {
    for (int64_t seen = 0;; seen++) {
      while (turn_ == seen) std::this_thread::yield();
      if (stop_) return;
      share(thread);
      busy_--;
    }
  }

  std::atomic<int> size_;
  std::vector<std::thread> threads_;
  std::atomic<int64_t> next_{0}, turn_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  int64_t count_ = 0;
  const std::function<void(int64_t, int)> *work_ = nullptr;
};

// Memory that begins at a multiple of 64 bytes.
class Aligned {
 public:
  explicit Aligned(int64_t bytes) : memory_(size_t(bytes) + 64) {}
  uint8_t *get() {
    void *start = memory_.data();
    size_t room = memory_.size();
    return static_cast<uint8_t *>(std::align(64, room - 64, start, room));
  }

 private:
  std::vector<uint8_t> memory_;
};

}  // namespace

int oc_attend(int heads, int kv_heads, int head_dim, int64_t window, float scale, float cap, int dtype,
              int64_t requests, const int64_t *past, const int64_t *count, const float *k, const float *v,
              const float *q, int threads, int repeats, float *y, double seconds[2]) {
  constexpr int64_t most = int64_t(1) << 30;
  if (heads < 1 || heads > 4096 || kv_heads < 1 || heads % kv_heads || head_dim < 1 ||
      head_dim > oc::most_head_dim || window < 0 || window > most || !std::isfinite(scale) || !(cap >= 0) ||
      dtype < OC_FP16 || dtype > OC_INT4)
    return OC_BAD_ARGUMENT;
  if (requests < 1 || requests > most || threads < 1 || threads > most_threads || repeats < 1 || !past ||
      !count || !k || !v || !q || !y)
    return OC_BAD_ARGUMENT;
  for (int64_t i = 0; i < requests; i++)
    if (past[i] < 0 || past[i] > most || count[i] < 1 || count[i] > most) return OC_BAD_ARGUMENT;
  try {
    const oc::Attention &attention = *oc::chosen_class().attention;
    oc_layer layer{};
    layer.heads = heads;
    layer.kv_heads = kv_heads;
    layer.head_dim = head_dim;
    layer.window = int32_t(window);
    layer.scale = scale;
    layer.soft_cap = cap;

    // Pages are handed out from the last to the first: no request's lie in order.
    int64_t pages = 0, rows = 0;
    for (int64_t i = 0; i < requests; i++) pages += (past[i] + count[i] - 1) / oc::page_tokens + 1;
    std::vector<int32_t> table(static_cast<size_t>(pages));
    for (int64_t i = 0; i < pages; i++) table[size_t(i)] = int32_t(pages - 1 - i);
    std::vector<oc::Span> spans;
    struct Position {
      const int32_t *table;
      int64_t at;
    };
    std::vector<Position> positions;
    const int32_t *next = table.data();
    for (int64_t i = 0; i < requests; i++) {
      spans.push_back({next, past[i], count[i], rows});
      for (int64_t at = 0; at < past[i] + count[i]; at++) positions.push_back({next, at});
      next += (past[i] + count[i] - 1) / oc::page_tokens + 1;
      rows += count[i];
    }
    const int64_t page_bytes = attention.page_bytes(dtype, kv_heads, head_dim);
    const oc::Memory memory(pages * page_bytes);
    const oc::Pages cache{memory.at(), page_bytes, dtype, kv_heads, head_dim};

    Team team(threads);
    const oc::Work work = attention.work(layer, spans.data(), requests, threads);
    Aligned partial(work.partial_floats * 4);
    std::vector<Aligned> scratch(size_t(threads), Aligned(attention.scratch_bytes(layer)));
    const int64_t k_width = int64_t(kv_heads) * head_dim, width = int64_t(heads) * head_dim;
    const oc::Attend job{&layer, cache, spans.data(), requests, work,
                         q,      width, y,            width,    reinterpret_cast<float *>(partial.get())};
    constexpr int64_t together = 32;  // positions that one thread stores in a row
    double least[2] = {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()};
    for (int repeat = 0; repeat < repeats; repeat++) {
      const double start = now();
      team.loop((int64_t(positions.size()) + together - 1) / together, [&](int64_t index, int) {
        const int64_t end = std::min<int64_t>(int64_t(positions.size()), (index + 1) * together);
        for (int64_t i = index * together; i < end; i++)
          attention.store(cache, positions[size_t(i)].table, positions[size_t(i)].at, k + i * k_width,
                          v + i * k_width);
      });
      const double stored = now();
      team.loop(work.tasks, [&](int64_t task, int thread) {
        attention.run(job, task, scratch[size_t(thread)].get());
      });
      if (work.merges)
        team.loop(work.merges, [&](int64_t merge, int) { attention.merge(job, merge); });
      least[0] = std::min(least[0], stored - start);
      least[1] = std::min(least[1], now() - stored);
    }
    if (seconds) memcpy(seconds, least, sizeof least);
  } catch (const std::bad_alloc &) {
    return OC_NO_MEMORY;
  }
  return 0;
}
