// Work shared between threads that are started for it and joined when it is done.
#pragma once

#include <cstdint>
#include <functional>

namespace oc {

constexpr int most_threads = 1024;

// Calls work(0) ... work(count - 1), each on its own thread where the system grants one, and waits.
void in_parallel(int count, const std::function<void(int)> &work);

// Calls work(begin, end) on shares of the rows, each of whole steps, in up to `threads` threads; a
// thread is not worth starting for less than 2^16 numbers.
void in_shares(int64_t rows, int64_t columns, int64_t step, int threads,
               const std::function<void(int64_t, int64_t)> &work);

}  // namespace oc
