/* The native core behind one plain C header: this file is the whole contract.
 *
 * Every function is safe to call from any thread, starts the threads it needs and joins them before
 * it returns. Sizes are checked; pointers and the extents behind them are the caller's word.
 * A negative result is an error code, never a value.
 *
 * The same kernels are compiled once per instruction-set class (`oc_isa_name`), and the best class
 * that the processor and the system allow is picked when the library is first used. All classes give
 * the same bits.
 */
#ifndef ONECARD_H
#define ONECARD_H

#include <stdint.h>

#define OC_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature below changes: the loader refuses a library of another age. */
enum { OC_ABI = 2 };

enum { OC_FP32 = 0, OC_FP16 = 1, OC_BF16 = 2, OC_INT8 = 3 };

enum {
  OC_BAD_ARGUMENT = -1, /* a size, a code or a pointer that makes no sense */
  OC_NO_MEMORY = -2     /* the system refused memory */
};

OC_API int oc_abi(void);

/* Instruction-set classes, worst first. `force` picks one (-1: the best again) and returns the class
 * now in use, or OC_BAD_ARGUMENT where this machine cannot run it. It is meant for tests and
 * measurements, and applies to the calls that begin after it. */
OC_API int oc_isa_count(void);
OC_API const char *oc_isa_name(int isa); /* NULL outside the table */
OC_API int oc_isa_supported(int isa);    /* 1 or 0 */
OC_API int oc_isa(void);
OC_API int oc_isa_force(int isa);

/* Bytes per second that `threads` threads read from `bytes` of memory, each its own contiguous range:
 * the best of at least three sweeps within about `seconds`. */
OC_API double oc_read_bandwidth(int64_t bytes, int threads, double seconds);

/* Operations per second (a multiply-add is two) of the best unit of the class in use, on registers
 * only, for OC_FP32, OC_BF16 or OC_INT8; and that unit's name (NULL for another dtype). Where bf16 has
 * no unit of its own it is widened, so its peak is that of fp32. */
OC_API double oc_peak(int dtype, int threads, double seconds);
OC_API const char *oc_peak_unit(int dtype);

/* Rounds a row-major matrix [rows, columns] to integers of 2 to 8 bits in groups along the row.
 *
 *   weight   [rows, columns]                    fp32, fp16 or bf16
 *   packed   [rows, ceil(columns * bits / 32)]  q + 2^(bits-1), dense, low bits first, zero padded
 *   scale    [rows, columns / group]            fp32, fp16 or bf16
 *   zero     [rows, columns / group]            NULL for symmetric groups
 *
 * `group` divides `columns`, and is a multiple of 8 unless it is `columns`. All arithmetic is float32,
 * division is true division, rounding is half to even, lo = -2^(bits-1) and hi = -lo - 1:
 *
 *   symmetric   scale = max|w| / ((2^bits - 1) / 2)
 *               q     = clamp(rint(w / scale), lo, hi)
 *   with zero   a = min(min w, 0), b = max(max w, 0), scale = (b - a) / (2^bits - 1)
 *               zero  = clamp(rint(lo - a / scale), lo, hi)
 *               q     = clamp(rint(w / scale) + zero, lo, hi)
 *
 * A scale is rounded to its dtype before it is used, and is 1 where that gives less than 2^-126, the
 * smallest normal float32. A scale that overflows its dtype is stored as infinity.
 *
 * Returns how many weights are not finite; unless that is 0, what was written is of no use. */
OC_API int64_t oc_round_pack(const void *weight, int weight_dtype, int64_t rows, int64_t columns,
                             int bits, int64_t group, int scale_dtype, int threads,
                             int32_t *packed, void *scale, int8_t *zero);

/* Packs codes [rows, columns], each from -2^(bits-1) to 2^(bits-1) - 1, into such words. 0 or an error. */
OC_API int oc_pack(const int8_t *codes, int64_t rows, int64_t columns, int bits, int threads,
                   int32_t *packed);

/* The matrix [rows, columns] that such words stand for: (q - zero) * scale in float32, rounded to fp32,
 * fp16 or bf16. `zero` is int8 [rows, columns / group] or NULL; scales are finite. 0 or an error. */
OC_API int oc_to_dense(const int32_t *packed, const void *scale, int scale_dtype, const int8_t *zero,
                       int64_t rows, int64_t columns, int bits, int64_t group, int dense_dtype,
                       int threads, void *dense);

/* GPTQ within one block of columns. Every matrix is [block, rows]: a column of W lies along the rows.
 *
 *   target     the weights
 *   carried    sum_k r_kj errors_k over the columns k before this block
 *   r          [block, block], upper triangular: this block of the factor of the Hessian
 *   scale      and zero (integers): the grid of each weight
 *   keep       0 where a weight stays zero; NULL where there is none such
 *   errors     target - value                                           written
 *   codes      q                                                        written
 *   loss       [rows]: sum_j ((aim - value) r_jj)^2                     added to
 *
 * For each column j in turn, in float32 with true division, the sum in rising order of i, no fused
 * multiply-adds, rounding half to even:
 *
 *   aim   = target_j + (carried_j + sum_{i<j} r_ij errors_i) / r_jj
 *   q     = clamp(rint(aim / scale_j) + zero_j, lo, hi), or zero_j where keep_j is 0
 *   value = (q - zero_j) * scale_j
 *
 * Rows do not meet, so the bits are the same for any class and number of threads. 0 or an error. */
OC_API int oc_round_columns(const float *target, const float *carried, const float *r, const float *scale,
                            const float *zero, const uint8_t *keep, int64_t block, int64_t rows, int bits,
                            int threads, float *errors, int8_t *codes, float *loss);

/* The best of several grids for each group of a float32 matrix [rows, columns]: those of oc_round_pack
 * for the group's largest magnitude (or its two extremes) times shrink[c], c < candidates. Least
 *
 *   sum over the group of (value - w)^2 * importance[column]
 *
 * wins, the earlier candidate where they are equal. The sum is in float32: 16 sums, one for each column
 * modulo 16 from the start of the group, then halves added to halves; the same bits for any class and
 * number of threads, but not for another order of summation, which may find another winner among
 * near-equals. `scale` and `zero` are float32 [rows, columns / group]; the scales are values of their
 * dtype, and infinite for a group that holds a weight that is not finite. 0 or an error. */
OC_API int oc_search_grid(const float *weight, const float *importance, int64_t rows, int64_t columns,
                          int bits, int64_t group, int scale_dtype, const float *shrink, int candidates,
                          int zero_point, int threads, float *scale, float *zero);

#ifdef __cplusplus
}
#endif
#endif
