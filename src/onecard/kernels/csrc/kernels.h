// What one instruction-set class offers to native.cpp. Threads, checks and choice live there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace oc {

struct Peak {
  const char *unit;
  double (*run)(int64_t turns);  // returns the operations done
};

struct RoundPack {
  const void *weight;
  int weight_dtype;
  int64_t columns;
  int bits;
  int64_t group;
  int scale_dtype;
  int32_t *packed;
  void *scale;
  int8_t *zero;
};

struct Kernels {
  uint64_t (*sum)(const uint64_t *words, size_t count);  // count is a multiple of 64
  Peak fp32, bf16, int8;
  int64_t (*round_pack)(const RoundPack &job, int64_t begin, int64_t end);  // rows [begin, end)
};

// One table per compiled class; CMakeLists.txt names the flags of each.
extern const Kernels plain, avx2, avxvnni, avx512, avx512bf16, amx, dotprod;

}  // namespace oc
