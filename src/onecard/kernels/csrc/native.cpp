// The C interface: checks, the choice of the instruction-set class, threads and clocks. Compiled for
// the plainest processor; what needs more lives in kernels.cpp behind a table of functions.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <functional>
#include <new>
#include <vector>

#include <sys/mman.h>

#include "engine.h"
#include "kernels.h"
#include "onecard.h"
#include "threads.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace {

using oc::in_parallel;
using oc::in_shares;
using oc::most_threads;

// ---------------------------------------------------------------------- instruction-set classes

using oc::Class;

#define OC_TABLES(name) &oc::name, &oc::gptq::name, &oc::matmul::name, &oc::rows::name, &oc::attention::name

#if defined(__x86_64__)

// Whether one cpuid leaf has all the given bits.
bool cpuid_has(unsigned leaf, unsigned sub, unsigned eax, unsigned ebx, unsigned ecx, unsigned edx) {
  unsigned a, b, c, d;
  return __get_cpuid_count(leaf, sub, &a, &b, &c, &d) && (a & eax) == eax && (b & ebx) == ebx &&
         (c & ecx) == ecx && (d & edx) == edx;
}

// The register states that the system saves for us (XCR0).
bool system_saves(unsigned states) {
  if (!cpuid_has(1, 0, 0, 0, 1u << 27, 0)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & states) == states;
}

// Linux hands out the tile registers on request, once per process.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

std::vector<Class> find_classes() {
  constexpr unsigned f16c_fma = 1u << 29 | 1u << 12;
  constexpr unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  constexpr unsigned vnni = 1u << 11, vbmi_vbmi2 = 1u << 1 | 1u << 6;
  constexpr unsigned tile_int8_bf16 = 1u << 24 | 1u << 25 | 1u << 22;
  const bool avx2 = system_saves(0x6) && cpuid_has(1, 0, 0, 0, f16c_fma, 0) &&
                    cpuid_has(7, 0, 0, 1u << 5, 0, 0);
  const bool avxvnni = avx2 && cpuid_has(7, 1, 1u << 4, 0, 0, 0);
  const bool avx512 = avx2 && system_saves(0xe6) && cpuid_has(7, 0, 0, f_dq_bw_vl, vnni, 0);
  const bool avx512bf16 =
      avx512 && cpuid_has(7, 0, 0, 0, vbmi_vbmi2, 0) && cpuid_has(7, 1, 1u << 5, 0, 0, 0);
  const bool amx = avx512bf16 && system_saves(0x60000) &&
                   cpuid_has(7, 0, 0, 0, 0, tile_int8_bf16) && tiles_granted();
  return {{"plain", OC_TABLES(plain), true},
          {"avx2", OC_TABLES(avx2), avx2},
          {"avxvnni", OC_TABLES(avxvnni), avxvnni},
          {"avx512", OC_TABLES(avx512), avx512},
          {"avx512bf16", OC_TABLES(avx512bf16), avx512bf16},
          {"amx", OC_TABLES(amx), amx}};
}

#elif defined(__aarch64__)

std::vector<Class> find_classes() {
#if defined(__linux__)
  constexpr unsigned long asimddp = 1ul << 20;
  const bool dotprod = getauxval(AT_HWCAP) & asimddp;
#else
  const bool dotprod = true;  // every Apple processor with this architecture
#endif
  return {{"plain", OC_TABLES(plain), true}, {"dotprod", OC_TABLES(dotprod), dotprod}};
}

#else

std::vector<Class> find_classes() { return {{"plain", OC_TABLES(plain), true}}; }

#endif

const std::vector<Class> &classes() {
  static const std::vector<Class> found = find_classes();
  return found;
}

bool known(int isa) { return isa >= 0 && isa < int(classes().size()); }

std::atomic<int> preferred{-1};
std::atomic<bool> forced{false};

int best_class() {
  if (preferred >= 0) return preferred;
  int best = int(classes().size()) - 1;
  while (!classes()[size_t(best)].supported) best--;
  return best;
}

std::atomic<int> &chosen() {
  static std::atomic<int> isa{best_class()};
  return isa;
}

const oc::Kernels &kernels() { return *oc::chosen_class().kernels; }

const oc::Gptq &gptq() { return *oc::chosen_class().gptq; }

// ---------------------------------------------------------------------------------- rates, checks

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best rate of at least three sweeps within about `seconds`. One sweep is work(thread) -> amount on
// every thread; its time runs from the first start to the last end.
double best_rate(int threads, double seconds, const std::function<double(int)> &work) {
  struct alignas(64) Lap {
    double amount, start, end;
  };
  std::vector<Lap> laps{size_t(threads)};
  double best = 0;
  const double deadline = now() + seconds;
  for (int sweep = 0; sweep < 3 || now() < deadline; sweep++) {
    in_parallel(threads, [&](int thread) {
      const double start = now();
      const double amount = work(thread);
      laps[size_t(thread)] = {amount, start, now()};
    });
    Lap all = laps[0];
    for (int thread = 1; thread < threads; thread++) {
      const Lap &lap = laps[size_t(thread)];
      all = {all.amount + lap.amount, std::fmin(all.start, lap.start), std::fmax(all.end, lap.end)};
    }
    best = std::fmax(best, all.amount / (all.end - all.start));
  }
  return best;
}

bool sane(int threads, double seconds) {
  return threads >= 1 && threads <= most_threads && seconds > 0 && seconds <= 60;
}

const oc::Peak *peak_of(int dtype) {
  if (dtype == OC_FP32) return &kernels().fp32;
  if (dtype == OC_BF16) return &kernels().bf16;
  if (dtype == OC_INT8) return &kernels().int8;
  if (dtype == OC_INT4) return &kernels().int4;
  return nullptr;
}

bool sizes_fit(int64_t rows, int64_t columns, int bits, int threads) {
  constexpr int64_t most = int64_t(1) << 30;
  return rows >= 1 && rows <= most && columns >= 1 && columns <= most && bits >= 2 && bits <= 8 &&
         threads >= 1 && threads <= most_threads;
}

bool group_fits(int64_t columns, int64_t group) {
  return group >= 1 && columns % group == 0 && (group % 8 == 0 || group == columns);
}

bool is_float(int dtype) { return dtype == OC_FP32 || dtype == OC_FP16 || dtype == OC_BF16; }

}  // namespace

oc::Reach oc::reach = {8192, 12288};

const oc::Class &oc::chosen_class() { return classes()[size_t(chosen().load())]; }

// ------------------------------------------------------------------------------------- interface

int oc_abi(void) { return OC_ABI; }

int oc_isa_count(void) { return int(classes().size()); }

const char *oc_isa_name(int isa) { return known(isa) ? classes()[size_t(isa)].name : nullptr; }

int oc_isa_supported(int isa) { return known(isa) && classes()[size_t(isa)].supported; }

int oc_isa(void) { return chosen(); }

int oc_isa_force(int isa) {
  const int wanted = isa == -1 ? best_class() : isa;
  if (!oc_isa_supported(wanted)) return OC_BAD_ARGUMENT;
  forced = isa != -1;
  chosen() = wanted;
  return wanted;
}

int oc_isa_prefer(int isa) {
  if (!oc_isa_supported(isa)) return OC_BAD_ARGUMENT;
  preferred = isa;
  if (!forced) chosen() = isa;
  return chosen();
}

int oc_reach(int64_t near, int64_t far) {
  constexpr int64_t most = 1 << 20;
  if (near < 0 || near > most || far < 0 || far > most) return OC_BAD_ARGUMENT;
  oc::reach = {near, far};
  return 0;
}

double oc_read_bandwidth(int64_t bytes, int threads, double seconds) {
  constexpr int64_t step = 512;  // the granule of Kernels::sum
  if (!sane(threads, seconds) || bytes > int64_t(1) << 46 || bytes < threads * step)
    return OC_BAD_ARGUMENT;
  void *memory =
      mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return OC_NO_MEMORY;
#if defined(MADV_HUGEPAGE)
  madvise(memory, size_t(bytes), MADV_HUGEPAGE);
#endif
  uint64_t *const words = static_cast<uint64_t *>(memory);
  const size_t share = size_t(bytes / threads / step * step / 8);
  in_parallel(threads, [=](int thread) {
    uint64_t *const mine = words + size_t(thread) * share;
    for (size_t i = 0; i < share; i++) mine[i] = i;
  });
  std::atomic<uint64_t> sink{0};
  const double rate = best_rate(threads, seconds, [&, read = kernels().sum](int thread) {
    sink += read(words + size_t(thread) * share, share);
    return 8.0 * double(share);
  });
  munmap(memory, size_t(bytes));
  return rate;
}

double oc_peak(int dtype, int threads, double seconds) {
  const oc::Peak *const peak = peak_of(dtype);
  if (!peak || !sane(threads, seconds)) return OC_BAD_ARGUMENT;
  const double lap = std::fmin(0.05, seconds / 3);
  return best_rate(threads, seconds, [=](int) {
    double done = 0;
    for (const double end = now() + lap; now() < end;) done += peak->run(20000);
    return done;
  });
}

const char *oc_peak_unit(int dtype) {
  const oc::Peak *const peak = peak_of(dtype);
  return peak ? peak->unit : nullptr;
}

int64_t oc_round_pack(const void *weight, int weight_dtype, int64_t rows, int64_t columns, int bits,
                      int64_t group, int scale_dtype, int threads, int32_t *packed, void *scale,
                      int8_t *zero) {
  if (!sizes_fit(rows, columns, bits, threads) || !group_fits(columns, group)) return OC_BAD_ARGUMENT;
  if (!is_float(weight_dtype) || !is_float(scale_dtype) || !weight || !packed || !scale)
    return OC_BAD_ARGUMENT;
  const oc::RoundPack job{weight, weight_dtype, columns, bits, group, scale_dtype, packed, scale, zero};
  std::atomic<int64_t> not_finite{0};
  in_shares(rows, columns, 1, threads, [&, run = kernels().round_pack](int64_t begin, int64_t end) {
    not_finite += run(job, begin, end);
  });
  return not_finite;
}

int oc_pack(const int8_t *codes, int64_t rows, int64_t columns, int bits, int threads, int32_t *packed) {
  if (!sizes_fit(rows, columns, bits, threads) || !codes || !packed) return OC_BAD_ARGUMENT;
  const oc::Pack job{codes, columns, bits, packed};
  in_shares(rows, columns, 1, threads, [&, run = kernels().pack](int64_t begin, int64_t end) {
    run(job, begin, end);
  });
  return 0;
}

int oc_to_dense(const int32_t *packed, const void *scale, int scale_dtype, const int8_t *zero,
                int64_t rows, int64_t columns, int bits, int64_t group, int dense_dtype, int threads,
                void *dense) {
  if (!sizes_fit(rows, columns, bits, threads) || !group_fits(columns, group)) return OC_BAD_ARGUMENT;
  if (!is_float(scale_dtype) || !is_float(dense_dtype) || !packed || !scale || !dense)
    return OC_BAD_ARGUMENT;
  const oc::ToDense job{packed, scale, scale_dtype, zero, columns, bits, group, dense_dtype, dense};
  in_shares(rows, columns, 1, threads, [&, run = kernels().to_dense](int64_t begin, int64_t end) {
    run(job, begin, end);
  });
  return 0;
}

int oc_round_columns(const float *target, const float *carried, const float *r, const float *scale,
                     const float *zero, const uint8_t *keep, int64_t block, int64_t rows, int bits,
                     int threads, float *errors, int8_t *codes, float *loss) {
  constexpr int64_t most_block = 1 << 16;
  if (!sizes_fit(rows, block, bits, threads) || block > most_block) return OC_BAD_ARGUMENT;
  if (!target || !carried || !r || !scale || !zero || !errors || !codes || !loss) return OC_BAD_ARGUMENT;
  const oc::RoundColumns job{target, carried, r,    scale,  zero,  keep,
                             block,  rows,    bits, errors, codes, loss};
  std::atomic<int> result{0};
  in_shares(rows, block, oc::strip, threads,
            [&, run = gptq().round_columns](int64_t begin, int64_t end) {
    try {
      std::vector<float> scratch(size_t(block * oc::strip));
      run(job, scratch.data(), begin, end);
    } catch (const std::bad_alloc &) {
      result = OC_NO_MEMORY;
    }
  });
  return result;
}

int oc_search_grid(const float *weight, const float *importance, int64_t rows, int64_t columns, int bits,
                   int64_t group, int scale_dtype, const float *shrink, int candidates, int zero_point,
                   int threads, float *scale, float *zero) {
  if (!sizes_fit(rows, columns, bits, threads) || !group_fits(columns, group)) return OC_BAD_ARGUMENT;
  if (!is_float(scale_dtype) || !weight || !importance || !shrink || candidates < 1 || !scale || !zero)
    return OC_BAD_ARGUMENT;
  const oc::SearchGrid job{weight,         importance,  columns, bits,       group,
                           zero_point != 0, scale_dtype, shrink,  candidates, scale, zero};
  in_shares(rows, columns, 1, threads, [&, run = gptq().search_grid](int64_t begin, int64_t end) {
    run(job, begin, end);
  });
  return 0;
}
