// Threads that stay: each runs the same function at the same time, and they meet at barriers. Between
// calls and at barriers they watch for a while, then sleep. (To yield instead of sleeping starves: beside
// busy processes a thread that yields has used its turn, and each barrier waits for all of theirs.)
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace oc {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int size) {
    try {
      threads_.reserve(size_t(size));
      for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { follow(i); });
    } catch (const std::exception &) {
      // The system grants no more: fewer do the work.
    }
    size_ = int(threads_.size()) + 1;
  }

  ~Pool() {
    call([](int) {}, true);
    for (auto &thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // work(thread) on every thread, the caller's own being thread 0.
  void run(const std::function<void(int)> &work) { call(work, false); }

  // Inside `run`: nobody goes on before all have come.
  void barrier() {
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    if (came_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      came_.store(0, std::memory_order_relaxed);
      // In one order with what a sleeper does: either it sees the turn, or it is seen.
      turn_.store(turn + 1, std::memory_order_seq_cst);
      if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
      { const std::lock_guard<std::mutex> lock(asleep_); }
      turned_.notify_all();
      return;
    }
    for (int spin = 0; spin < watch; spin++) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(asleep_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    turned_.wait(lock, [&] { return turn_.load(std::memory_order_seq_cst) != turn; });
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  static constexpr int watch = 4000;  // pauses: tens of microseconds

  void call(const std::function<void(int)> &work, bool stop) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      stop_ = stop;
      calls_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    if (!stop) work(0);
    if (!stop) barrier();
  }

  void follow(int thread) {
    for (uint32_t seen = 0;;) {
      for (int spin = 0; calls_.load(std::memory_order_acquire) == seen && spin < watch; spin++) relax();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return calls_.load(std::memory_order_relaxed) != seen; });
        seen = calls_.load(std::memory_order_relaxed);
        if (stop_) return;
      }
      (*work_)(thread);
      barrier();
    }
  }

  std::vector<std::thread> threads_;
  int size_ = 1;
  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void(int)> *work_ = nullptr;
  bool stop_ = false;
  std::mutex asleep_;
  std::condition_variable turned_;
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<uint32_t> calls_{0};
  alignas(64) std::atomic<int> came_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

}  // namespace oc
