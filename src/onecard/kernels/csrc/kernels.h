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

struct Pack {
  const int8_t *codes;
  int64_t columns;
  int bits;
  int32_t *packed;
};

struct ToDense {
  const int32_t *packed;
  const void *scale;
  int scale_dtype;
  const int8_t *zero;
  int64_t columns;
  int bits;
  int64_t group;
  int dense_dtype;
  void *dense;
};

struct RoundColumns {
  const float *target, *carried, *r, *scale, *zero;
  const uint8_t *keep;
  int64_t block, rows;
  int bits;
  float *errors;
  int8_t *codes;
  float *loss;
};

struct SearchGrid {
  const float *weight, *importance;
  int64_t columns;
  int bits;
  int64_t group;
  bool zero_point;
  int scale_dtype;
  const float *shrink;
  int candidates;
  float *scale, *zero;
};

// kernels.cpp. Whatever has a range works on the rows [begin, end).
struct Kernels {
  uint64_t (*sum)(const uint64_t *words, size_t count);  // count is a multiple of 64
  Peak fp32, bf16, int8, int4;
  int64_t (*round_pack)(const RoundPack &job, int64_t begin, int64_t end);
  void (*pack)(const Pack &job, int64_t begin, int64_t end);
  void (*to_dense)(const ToDense &job, int64_t begin, int64_t end);
};

// gptq.cpp
constexpr int64_t strip = 64;  // rows; the widest that a class works on at once
struct Gptq {
  // `scratch` has block * strip numbers.
  void (*round_columns)(const RoundColumns &job, float *scratch, int64_t begin, int64_t end);
  void (*search_grid)(const SearchGrid &job, int64_t begin, int64_t end);
};

// One table per compiled class; CMakeLists.txt names the flags of each.
extern const Kernels plain, avx2, avxvnni, avx512, avx512bf16, amx, dotprod;
namespace gptq {
extern const Gptq plain, avx2, avxvnni, avx512, avx512bf16, amx, dotprod;
}

}  // namespace oc
