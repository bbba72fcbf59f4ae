// The parts of a forward pass that are compiled once per instruction-set class, and what they share.
// forward.cpp calls them from several threads at once; none of them starts a thread or allocates.
//
// The promise that rests on this file: a number depends on its own row alone. Each function fixes the
// order of every floating-point sum without looking at how many rows there are, which thread runs
// or where a chunk of a prompt begins, so a token's logits have the same bits in any batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "onecard.h"

namespace oc {

// Rows rounded to int8 per block: x = q * scale, and the sum of each block's q. They lie in chunks of 16
// rows x 64 columns, row after row within a chunk, a chunk's right neighbour behind it: what a matrix
// unit loads at once is contiguous, and so is what a row has within 64 columns. There is room for a
// multiple of 32 rows; columns are zero from the last to the end of its chunk.
struct Quantized {
  static constexpr int64_t chunk = 16 * 64;
  int8_t *q;
  float *scale;    // [rows][blocks]
  int32_t *sum;    // [rows][blocks]
  int64_t stride;  // bytes of 16 rows: chunks per row * chunk
  int64_t blocks;
  int block;

  const int8_t *at(int64_t row, int64_t column) const {
    return q + row / 16 * stride + column / 64 * chunk + row % 16 * 64 + column % 64;
  }
};

// Of a matrix that rounds its inputs: OC_BY_BLOCK ..., and the scale where it is given.
struct Rounding {
  int kind;
  float scale;
};

// What a matrix multiplies: float rows, and for integer matrices that are not `exact` their rounding.
struct Input {
  const float *x;
  int64_t stride;
  int64_t rows;
  const Quantized *quantized;
};

// How far ahead few rows call for weights, in bytes (native.cpp).
struct Reach {
  int64_t near, far;
};
extern Reach reach;

// matmul.cpp
struct Matmul {
  // y[m][16 t + r] for the tiles t of [begin, end), without bias; y has stride floats per row, and room
  // for whole tiles. `scratch` is the thread's own, scratch_bytes(matrix, rows) long, 64-byte aligned.
  void (*multiply)(const oc_matrix &w, const Input &input, int64_t begin, int64_t end, float *y,
                   int64_t stride, void *scratch);
  int64_t (*scratch_bytes)(const oc_matrix &w, int64_t rows);
  int panel_tiles;  // that many rows meet at once
};

// Tiles that many rows are multiplied with, in pieces that threads take as they come: two panels each, and
// towards the end one, so that the threads end together.
struct Pieces {
  int64_t tiles, panel, big;

  Pieces(int64_t tiles, int panel_tiles, int threads)
      : tiles(tiles), panel(panel_tiles), big(tiles / (2 * panel) - threads) {
    if (big < 0) big = 0;
  }
  int64_t count() const { return big + (tiles - 2 * big * panel + panel - 1) / panel; }
  int64_t begin(int64_t i) const {
    const int64_t at = i <= big ? 2 * i * panel : (big + i) * panel;
    return at < tiles ? at : tiles;
  }
};

// rows.cpp: one row at a time. NaN and infinity go through everything here and come out as such.
struct Rows {
  // out[i] = table[id][i] * scale
  void (*gather)(const void *table, int dtype, int64_t id, int64_t width, float scale, float *out);
  // y may be x. The sums are float32, 16 lanes (column modulo 16), halves added to halves.
  void (*norm)(const oc_norm &norm, const float *x, int64_t width, float *y);
  // q, scale and sum of one row. scale = max|x| / 127, q = rint(x * (127 / max|x|)), half to even, the
  // maximum that of a block or of the row; one of zeros, or of less than 2^-120, has scale 0. With a given
  // scale q = rint(x / scale), at most 127 either way. A block with NaN or infinity has that in its scale.
  void (*quantize)(const float *x, int64_t columns, const Rounding &how, const Quantized &to, int64_t row);
  // y[i] = act(gate[i]) * up[i]; up NULL: act(gate[i]). y may be either.
  void (*activate)(int activation, const float *gate, const float *up, int64_t count, float *y);
  // cos and sin [half] of position * inverse (a float32 product), times scale.
  void (*angles)(const oc_rope &rope, int64_t position, float *cos, float *sin);
  // The first 2 * half numbers of each of `heads` heads of x turn: (a, b) -> (a cos - b sin, b cos + a sin)
  // with a at i and b at half + i.
  void (*rotate)(float *x, int heads, int head_dim, int half, const float *cos, const float *sin);
  // y[i] += x[i] * factor
  void (*add)(const float *x, float factor, int64_t count, float *y);
  // x[i] = cap * tanh(x[i] / cap)
  void (*soft_cap)(float *x, int64_t count, float cap);
  // Chances of one row: x becomes softmax(x).
  void (*softmax)(float *x, int64_t count);

  // For sample.cpp. The largest number of each `peak_block`, NaN passed over; whether there is no NaN.
  bool (*peaks)(const float *x, int64_t count, float *peak);
  // The sum of exp(x[i] - most), as in norm; meant for a block.
  float (*exp_sum)(const float *x, int64_t count, float most);
  // chance[i] = exp((x[i] - most) / temperature) in float64, for x[i] <= most.
  void (*chances)(const float *x, int64_t count, float most, double temperature, double *chance);
};
constexpr int peak_block = 128;

// attention.cpp
constexpr int page_tokens = 32;      // positions in a page
constexpr int segment_tokens = 256;  // aligned positions that are summed as a whole; whole pages
constexpr int most_head_dim = 256;

// The keys and values of one layer: pages of page_bytes each. A page is zeros before its first use; what
// an earlier owner left in it later does no harm.
struct Pages {
  uint8_t *data;
  int64_t page_bytes;
  int dtype;  // OC_FP16, OC_BF16, OC_INT8, OC_FP8 or OC_INT4
  int kv_heads, head_dim;
};

// One request in a step: `count` new positions behind `past`, whose rows begin at `row`.
struct Span {
  const int32_t *table;  // page numbers
  int64_t past, count, row;
};

// What is to be shared out: all tasks in any order, then all merges in any order.
struct Work {
  int64_t tasks, merges;
  int64_t partial_floats;  // of memory that the threads share, aligned to 64 bytes
  int64_t whole;           // a single query that sees more segments is split into them
};

// One layer's attention in one step. Query heads lie side by side in a row of q and of y; q and y may not
// overlap. Of the layer its window, scale, soft cap and numbers of heads are read. In class amx, all caches but
// fp16 are multiplied in bf16, to which queries and weights are rounded; elsewhere both stay float32.
struct Attend {
  const oc_layer *layer;
  Pages pages;
  const Span *spans;
  int64_t count;
  Work work;
  const float *q;
  int64_t q_stride;
  float *y;
  int64_t y_stride;
  float *partial;
};

struct Attention {
  int64_t (*page_bytes)(int dtype, int kv_heads, int head_dim);
  // Writes the keys and values [kv_heads * head_dim] of one position; other positions may be written at
  // the same time. Where a key or a value is not finite in the cache's dtype, the head's keys become NaN
  // and its values zero: a query that sees the position becomes NaN, the others cannot tell.
  void (*store)(const Pages &pages, const int32_t *table, int64_t position, const float *k, const float *v);
  Work (*work)(const oc_layer &layer, const Span *spans, int64_t count, int threads);
  void (*run)(const Attend &job, int64_t task, void *scratch);
  void (*merge)(const Attend &job, int64_t merge);
  // Of a thread's own scratch for `run`, aligned to 64 bytes: 0.7 to 1.4 MB.
  int64_t (*scratch_bytes)(const oc_layer &layer);
};

// table.cpp, sparse.cpp and pattern.cpp: what `multiply` does for matrices of those kinds.
typedef void Multiply(const oc_matrix &w, const Input &input, int64_t begin, int64_t end, float *y, int64_t stride,
                      void *scratch);

namespace matmul {
extern const Matmul plain, avx2, avxvnni, avx512, avx512bf16, amx, dotprod;
}
namespace table {
extern Multiply plain, avx2, avxvnni, avx512, avx512bf16, amx, dotprod;
}
namespace sparse {
extern Multiply plain, avx2, avxvnni, avx512, avx512bf16, amx, dotprod;
}
namespace pattern {
extern Multiply plain, avx2, avxvnni, avx512, avx512bf16, amx, dotprod;
}
namespace rows {
extern const Rows plain, avx2, avxvnni, avx512, avx512bf16, amx, dotprod;
}
namespace attention {
extern const Attention plain, avx2, avxvnni, avx512, avx512bf16, amx, dotprod;
}

// native.cpp: the tables of one class, and the class in use.
struct Kernels;
struct Gptq;
struct Class {
  const char *name;
  const Kernels *kernels;
  const Gptq *gptq;
  const Matmul *matmul;
  const Rows *rows;
  const Attention *attention;
  bool supported;
};
const Class &chosen_class();

}  // namespace oc
