#include "threads.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

void oc::in_parallel(int count, const std::function<void(int)> &work) {
  std::vector<std::thread> threads;
  int started = 1;
  try {
    threads.reserve(size_t(count));
    for (; started < count; started++) threads.emplace_back(work, started);
  } catch (const std::exception &) {
    // What could not be started is done here, after our own share.
  }
  work(0);
  for (; started < count; started++) work(started);
  for (auto &thread : threads) thread.join();
}

void oc::in_shares(int64_t rows, int64_t columns, int64_t step, int threads,
                   const std::function<void(int64_t, int64_t)> &work) {
  const int64_t steps = (rows + step - 1) / step;
  const int64_t useful = std::min(steps, 1 + rows * columns / (1 << 16));
  const int64_t count = std::min<int64_t>(threads, useful);
  in_parallel(int(count), [&](int part) {
    work(steps * part / count * step, std::min(rows, steps * (part + 1) / count * step));
  });
}
