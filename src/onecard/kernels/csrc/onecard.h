/* The native core behind one plain C header: this file is the whole contract.
 *
 * Every function is safe to call from any thread, starts the threads it needs and joins them before
 * it returns. Sizes are checked; pointers and the extents behind them are the caller's word.
 * A negative result is an error code, never a value.
 *
 * The same kernels are compiled once per instruction-set class (`oc_isa_name`), and the best class
 * that the processor and the system allow is picked when the library is first used. In rounding, packing
 * and GPTQ all classes give the same bits; in the engine all do that have a fused multiply-add, but for
 * attention in tiles (amx, with keys and values in bf16 or int8). Bits depend on nothing but their own row.
 */
#ifndef ONECARD_H
#define ONECARD_H

#include <stdint.h>

#define OC_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature below changes: the loader refuses a library of another age. */
enum { OC_ABI = 5 };

enum { OC_FP32 = 0, OC_FP16 = 1, OC_BF16 = 2, OC_INT8 = 3, OC_FP8 = 4, OC_INT4 = 5 };

enum {
  OC_BAD_ARGUMENT = -1, /* a size, a code or a pointer that makes no sense */
  OC_NO_MEMORY = -2,    /* the system refused memory */
  OC_NOT_FINITE = -3    /* NaN, or no finite number where one is needed */
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

/* What a measurement of this machine found (kernels/tune.py), none of which changes a bit of any result:
 * `prefer` makes a class the best one, unless one is forced at the moment (the class now in use, or
 * OC_BAD_ARGUMENT); `reach` says how many bytes ahead decoding calls for weights, twice each (0 or
 * OC_BAD_ARGUMENT). Not to be called while the engine runs. */
OC_API int oc_isa_prefer(int isa);
OC_API int oc_reach(int64_t near, int64_t far);

/* Bytes per second that `threads` threads read from `bytes` of memory, each its own contiguous range:
 * the best of at least three sweeps within about `seconds`. */
OC_API double oc_read_bandwidth(int64_t bytes, int threads, double seconds);

/* Operations per second (a multiply-add is two) of the best unit of the class in use, on registers
 * only, for OC_FP32, OC_BF16, OC_INT8 or OC_INT4 (codes of at most 4 bits by int8); and that unit's name (NULL for
 * another dtype). Where bf16 has no unit of its own it is widened, so its peak is that of fp32. */
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

/* ------------------------------------------------------------------------------ running a model
 *
 * The kernel layout of a matrix [rows, columns]: tiles of 16 rows, each contiguous, missing rows zero.
 * Every tile begins at a multiple of 64 bytes.
 *
 *   integers  columns are padded to whole blocks; a block shares a scale in every row, as in
 *             w = (u - zero) * scale with u = q + 2^(bits-1) >= 0. A tile is
 *               scales  [blocks][16] in `dtype`, padded to 64 bytes
 *               zeros   [blocks][16] uint8, padded to 64 bytes; only with a zero point, else 2^(bits-1)
 *               codes   lines of 64 bytes: byte 4 r + j belongs to row r
 *                 8 bits  a line has columns k .. k+3: u of column k + j
 *                 4 bits  k .. k+7: u of k + j in the low half, of k + 4 + j in the high half
 *                 2 bits  k .. k+15: u of k + 4 i + j in bits 2 i and 2 i + 1
 *                 3 bits  three lines have columns k .. k+31; of the eight quads of columns k + 4 i + j, line l has
 *                         i = 2 l in the low three bits and i = 2 l + 1 in the next three; of i = 6 the low two
 *                         bits are the first line's highest, then its high bit and the low one of i = 7 the
 *                         second's, and the other two of i = 7 the third's
 *             A padded column has u = zero, a padded row scale 0.
 *   dense     [columns][16] in `dtype`
 *
 * Three kinds more are blocks of integers without a zero point, held in fewer bytes:
 *
 *   table     w = (table[code] - 128) * scale, codes of 1 to 6 bits, `table` of bytes; a tile is
 *               scales  as above
 *               table   a shared one of 16 entries four times over (a code of 1 bit: entries 0 and 1), or of
 *                       64 entries for 5 and 6 bits. A table per row (at most 4 bits) has E = max(4, 2^bits)
 *                       entries and max(1, E / 4) lines: byte n of the 16 bytes i of line l is entry
 *                       n % E of row 4 i + l * 16 / E + n / E
 *               codes   2, 3 and 4 bits as above; 1 bit: for each four columns k .. k+3 eight bytes whose bit
 *                       4 r + j is the code; 5 and 6 bits are per block the low four as with 4 bits and
 *                       then one or two times such bytes of their higher bits
 *   sparse    of 8 or 4 bits, without those that are zero. All begins with uint64 [tiles], the byte where
 *             each tile begins, padded to 64 bytes. A tile is
 *               scales  as above
 *               marks   uint32 [ceil(columns / 256)]: the byte of the stream where they begin, padded to 64
 *               stream  per block, uint64 [block / 4]: bit 4 r + j says that row r has something in
 *                       column k + j; then, four columns after four columns, these u in the order of
 *                       the bits, as bytes or two in a byte, the first one low
 *   pattern   of 8 or 4 bits, of which in each row at most two of four columns 4 i .. 4 i + 3 are not zero.
 *             They and, where there are fewer, zeros are two slots. A tile is
 *               scales  as above
 *               groups  of columns k .. k+31: a line of places, then the u of the slots. Byte 4 r + s belongs to
 *                       row r and slot s, those of columns k + 8 i .. k + 8 i + 3 being slots 0 and 1, those of the
 *                       next four columns slots 2 and 3; bits 2 i and 2 i + 1 of its place say which of the four
 *                       it is. With 8 bits a line has u of one i, with 4 bits of an even one in the low half
 *                       and of the next in the high half
 */
enum { OC_PLAIN = 0, OC_TABLE = 1, OC_TABLES = 2, OC_SPARSE = 3, OC_PATTERN = 4 };

/* Inputs x become q * scale with q from -127 to 127: a block's scale is its own max|x| / 127, or that of the
 * whole row, or given. Matrices that read one input round it alike. */
enum { OC_BY_BLOCK = 0, OC_BY_ROW = 1, OC_BY_SCALE = 2 };

typedef struct oc_matrix {
  const void *data;   /* NULL: there is no such matrix */
  int64_t rows, columns;
  int32_t bits;       /* 2, 3, 4 or 8; 0 for dense; 1 to 6 for a table, 1 to 4 for tables, 4 or 8 for sparse and pattern */
  int32_t block;      /* 32, 64 or 128; 0 for dense */
  int32_t dtype;      /* of the scales, or of the dense weights: OC_FP32, OC_FP16 or OC_BF16 */
  int32_t zero_point; /* 1 if there are zeros */
  int32_t exact;      /* 1: inputs stay float32; 0: integers multiply inputs rounded to int8 */
  int32_t kind;       /* OC_PLAIN (integers, dense), OC_TABLE, OC_TABLES (one per row), OC_SPARSE or OC_PATTERN */
  int64_t slots;      /* sparse: that many weights are not zero, at most; else 0 */
  int32_t rounding;   /* of inputs: OC_BY_BLOCK, OC_BY_ROW or OC_BY_SCALE */
  float input_scale;  /* OC_BY_SCALE: above 0; else 0 */
  const float *bias;  /* [rows] or NULL */
  /* A product of two, and what it leaves: y = this (right x) + rest x + bias. The engine alone knows it; neither
   * of them has a bias, a right or a rest of its own. */
  const struct oc_matrix *right; /* NULL: this x; else this has as many columns as it has rows */
  const struct oc_matrix *rest;  /* NULL: 0 */
} oc_matrix;

/* Bytes of the kernel layout that a matrix describes (its `data`, `exact`, `rounding`, `input_scale` and `bias` do not
 * matter), or
 * OC_BAD_ARGUMENT for a description that makes no sense. Rows and columns are at most 2^30.
 *
 * The functions below fill that many bytes at `out`, which is aligned to 64 bytes. Tiles know nothing of
 * each other, so a run of rows that begins at a multiple of 16 may be laid out as a matrix of its own.
 * They return how many of the scales or weights are not finite (unless that is 0, what was written is
 * of no use), or an error. */
OC_API int64_t oc_layout_bytes(const oc_matrix *matrix);

/* From words of `bits` bits and groups as oc_round_pack writes them. The matrix has those bits, or 8 for 5,
 * 6 and 7: integers and zeros keep their value. Its block is `group`, or any if `group` is `columns`:
 * then the scale of a row is repeated. Its dtype is that of `scale`; `zero` is there or not as it says. */
OC_API int64_t oc_layout_integers(const oc_matrix *matrix, const int32_t *packed, int bits,
                                  const void *scale, const int8_t *zero, int64_t group, int threads,
                                  void *out);

/* From a row-major matrix to a dense layout, each weight rounded to the layout's dtype. */
OC_API int64_t oc_layout_dense(const oc_matrix *matrix, const void *weight, int weight_dtype, int threads,
                               void *out);

/* From a row-major matrix to integers without a zero point, rounded by the formulas of oc_round_pack in
 * groups of the layout's block; the last block of a row may be short. */
OC_API int64_t oc_layout_quantize(const oc_matrix *matrix, const void *weight, int weight_dtype,
                                  int threads, void *out);

/* From codes [rows, columns], each below 2^bits, and scales as for oc_layout_integers; `table` is uint8
 * [2^bits], or [rows][2^bits] for OC_TABLES. */
OC_API int64_t oc_layout_table(const oc_matrix *matrix, const uint8_t *codes, const void *scale, int64_t group,
                               const uint8_t *table, int threads, void *out);

/* Sparse or a pattern, from the layout of the same integers stored with their zeros, of 4 or 8 bits without a zero
 * point. `slots` says how many are not zero at most; more of them, or than the pattern has, are an error. */
OC_API int64_t oc_layout_sparse(const oc_matrix *matrix, const void *integers, int threads, void *out);

/* A 64-bit sum that says whether bytes are those that were written: any change within eight bytes is seen
 * for sure, anything else with a chance of 1 - 2^-64. It does not withstand an adversary.
 *
 *   step(h, w) = rotate_left(h ^ w, 29) * 0x9e3779b97f4a7c15
 *
 * The bytes, padded with zeros to a multiple of 64, are little-endian words w, in chunks of 2^17 words. Lane
 * l < 8 of chunk c begins with 8 c + l + 1 and takes the words l, l + 8 ... of the chunk, one step each;
 * a chunk's sum begins with c and takes its lanes; `sum` begins with `bytes` and takes the chunks. 0 or
 * an error. */
OC_API int oc_checksum(const void *data, int64_t bytes, int threads, uint64_t *sum);

enum { OC_RMS = 0, OC_LAYER = 1 };

/* `weight` has the offset added already. */
typedef struct {
  const float *weight; /* [width]; NULL: there is no such norm */
  const float *bias;   /* or NULL */
  int32_t kind;
  float eps;
} oc_norm;

enum { OC_SILU = 0, OC_RELU = 1, OC_GELU = 2, OC_GELU_TANH = 3 };
enum { OC_PRE = 0, OC_POST = 1, OC_SANDWICH = 2, OC_PARALLEL = 3 };

typedef struct {
  int32_t width, activation;
  oc_matrix gate; /* may be absent */
  oc_matrix up, down;
} oc_mlp;

typedef struct {
  int32_t order;
  int32_t heads, kv_heads, head_dim;
  int32_t window; /* positions a token sees, itself included; 0: all */
  int32_t rope;   /* index of the model's ropes, or -1 */
  float scale, soft_cap; /* cap 0: none */
  oc_norm attention_in, attention_out, feed_forward_in, feed_forward_out, q_norm, k_norm;
  oc_matrix q, k, v, o;
  int32_t experts, top, renormalize; /* experts 0: mlps[0] is the feed-forward */
  oc_matrix router;
  oc_matrix shared_gate; /* may be absent */
  int32_t shared;        /* 1: mlps[experts] is the shared expert */
  const oc_mlp *mlps;
} oc_layer;

/* The first 2 * half numbers of a head turn; cos and sin are multiplied by scale. */
typedef struct {
  const float *inverse; /* [half] */
  int32_t half;
  float scale;
} oc_rope;

typedef struct {
  int64_t vocab, hidden, embed;
  int32_t layers, ropes;
  const oc_layer *layer;
  const oc_rope *rope;
  const void *embedding; /* [vocab, embed] row-major */
  int32_t embedding_dtype;
  float embed_scale;
  const float *positions; /* [learned, hidden] or NULL */
  int64_t learned, position_offset;
  oc_matrix project_in, project_out; /* embed <-> hidden; may be absent */
  oc_norm norm;                      /* may be absent */
  oc_matrix head;
  float soft_cap; /* of the logits; 0: none */
} oc_model;

/* How the next id of one request is chosen, by the rules of runtime/sample.py. */
typedef struct {
  double temperature, top_p, min_p; /* neutral: 1, 1, 0; temperature 0 takes the largest logit */
  double repetition, presence, frequency; /* neutral: 1, 0, 0 */
  int64_t top_k;                          /* 0: all */
  const int32_t *previous; /* [count] ids, `prompt` of the prompt and then the reply's; for the penalties */
  int64_t count, prompt;
  double draw;       /* from [0, 1) */
  float *logprob;    /* NULL, or where the logarithm of the chosen id's chance goes: softmax(logits) */
  int32_t likeliest; /* how many of the likeliest ids (lower ids first on ties) are told, with the same */
  int32_t *ids;      /* [likeliest] */
  float *logprobs;   /* [likeliest] */
} oc_sampling;

/* The next id from logits [vocab], or an error: OC_NOT_FINITE for NaN or a largest logit that is infinite
 * (others may be -infinity), OC_BAD_ARGUMENT for settings out of range. `scratch` has oc_sample_scratch
 * (vocab) bytes, aligned to 8; what is in it does not matter. No threads, no memory of its own. */
OC_API int64_t oc_sample_scratch(int64_t vocab);
OC_API int32_t oc_sample(const float *logits, int64_t vocab, const oc_sampling *sampling, void *scratch);

/* The table `Rows` of engine.h of the class in use: for tests. */
OC_API const void *oc_rows(void);
/* The engine runs a model for many requests at once. Keys and values lie in pages of OC_PAGE positions
 * (page p of every layer belongs to whoever the caller says); a step takes new ids of some requests,
 * runs the whole network and may choose the next ids. */
enum { OC_PAGE = 32 };

typedef struct oc_engine oc_engine;

typedef struct {
  int32_t threads;
  int32_t kv_dtype; /* OC_FP16, OC_BF16, OC_INT8, OC_FP8 or OC_INT4 */
  int64_t pages;
  int64_t rows; /* new ids of a step, at most */
} oc_engine_settings;

/* The model, and what it points to, stay where they are until the engine is closed. 0 or an error. */
OC_API int oc_engine_open(const oc_model *model, const oc_engine_settings *settings, oc_engine **engine);
/* What it would take, of which nothing is: its work space, and keys and values. Matrices need no data but an
 * address that is not NULL. 0 or an error. */
OC_API int oc_engine_need(const oc_model *model, const oc_engine_settings *settings, int64_t *work, int64_t *kv);
OC_API void oc_engine_close(oc_engine *engine);
OC_API int64_t oc_engine_bytes(const oc_engine *engine); /* of memory that it holds */

enum { OC_NONE = 0, OC_LAST = 1, OC_ALL = 2 };

/* One request's part of a step. `table` has pages for past + count + most - 1 positions. The sampling's
 * `previous` has room for `most` ids more; its draw, logprob, ids and logprobs are not read. */
typedef struct {
  const int32_t *ids; /* [count] at positions past, past + 1 ... */
  int64_t count, past;
  const int32_t *table;
  int32_t want;  /* whose logits are written to `logits` [1 or count][vocab] */
  int32_t most;  /* ids to choose at most; 0: none */
  float *logits;
  oc_sampling sampling;
  const double *draws; /* [most]; NULL if the temperature is 0 */
  const int32_t *ends; /* [ends_count] ascending; nothing is chosen behind one of them */
  int64_t ends_count;
  int32_t *chosen;            /* [most] */
  float *logprobs;            /* [most], or NULL */
  int32_t *likeliest_ids;     /* [most][sampling.likeliest] */
  float *likeliest_logprobs;  /* [most][sampling.likeliest] */
  int32_t chosen_count;       /* written */
  int32_t status;             /* written: 0, or the error that stopped this request */
} oc_feed;

/* One pass over all feeds, then up to steps - 1 more over those that go on choosing. Between passes `cancel`
 * is read: what is not 0 ends the call. 0 or an error of the whole call, which is found before any work
 * but for OC_NO_MEMORY. Calls for one engine do not overlap. */
OC_API int oc_engine_step(oc_engine *engine, oc_feed *feeds, int64_t count, int steps,
                          const volatile int32_t *cancel);

/* y [rows][matrix rows] = x [rows][columns] times a matrix, with its bias: the engine's product, for tests and
 * measurements. It is done `repeats` times; `seconds`, if not NULL, becomes the least time of one. */
OC_API int oc_multiply(const oc_matrix *matrix, const float *x, int64_t rows, int threads, int repeats,
                       float *y, double *seconds);

/* ------------------------------------------------------------------------------ single operators
 *
 * For tests and measurements: what the engine does in one step, on plain arrays.
 *
 * Attention of one layer. Request i has past[i] old positions and count[i] new ones behind them; k and v
 * are [sum of past + count][kv_heads * head_dim], q and y [sum of count][heads * head_dim], one request
 * after another. Keys and values are stored in a paged cache of `dtype` (OC_FP16 to OC_INT4, but
 * for OC_FP32); the new positions then attend to all positions up to themselves, at most `window` of them (0: all), with
 * scores cap * tanh(scale * q.k / cap), or scale * q.k where cap is 0. A query's bits depend on itself, on
 * what it sees and on its position, and on nothing else here. This is done `repeats` times; `seconds`,
 * if not NULL, becomes the least time of one: storing, then attention. head_dim is at most 256. 0 or an
 * error. */
OC_API int oc_attend(int heads, int kv_heads, int head_dim, int64_t window, float scale, float cap, int dtype,
                     int64_t requests, const int64_t *past, const int64_t *count, const float *k,
                     const float *v, const float *q, int threads, int repeats, float *y,
                     double seconds[2]);

#ifdef __cplusplus
}
#endif
#endif
