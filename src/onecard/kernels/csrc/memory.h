// Memory of the engine, and of the measurements that are to find it as the engine does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

#include <sys/mman.h>

namespace oc {

// Zeroed memory of the system, in huge pages where it has them.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes) : bytes_((std::max<int64_t>(bytes, 1) + 4095) / 4096 * 4096) {
    void *const at = mmap(nullptr, size_t(bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    at_ = static_cast<uint8_t *>(at);
#if defined(MADV_HUGEPAGE)
    if (bytes_ >= 1 << 21) madvise(at_, size_t(bytes_), MADV_HUGEPAGE);
#endif
  }
  Memory(Memory &&other) noexcept { swap(other); }
  Memory &operator=(Memory &&other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory() {
    if (at_) munmap(at_, size_t(bytes_));
  }
  uint8_t *at() const { return at_; }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(Memory &other) {
    std::swap(at_, other.at_);
    std::swap(bytes_, other.bytes_);
  }
  uint8_t *at_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace oc
