// What the CPU launcher (cpu.cpp) and the kernels (cpu_kernel_*.cpp, compiled once per level) share.
//
// S is the type that query, key, value and their gradients are stored in, T = Arithmetic<S> that of all else. Half
// precision is widened in registers as rows are read, and rounded once, as results are written.
//
// The work runs in phases over a chunk of query rows; each phase is a list of independent tasks, and a
// function below carries out one of them. Only (rows of a chunk) x Tk scores exist between phases.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/storage.h"
#include "options.h"
#include "window.h"

namespace fusedattn {

constexpr int64_t KEY_BLOCK = 16;        // keys per score task
constexpr int64_t QUERY_BLOCK = 16;      // query rows per softmax and context task
constexpr int64_t ROWWISE_QUERIES = 16;  // up to so many queries the backward pass walks whole key rows,
constexpr int64_t ROWWISE_KEYS = 8;      // at most so many at a time

// A (B, H, rows, columns) view whose last dimension is contiguous; strides in elements.
template <typename T>
struct View {
  T* data;
  int64_t stride_b, stride_h, stride_t;

  __attribute__((always_inline)) T* row(int64_t b, int64_t h, int64_t t) const {
    return data + b * stride_b + h * stride_h + t * stride_t;
  }
};

// How a result reaches its memory: over what is there, added to it, or past the caches (common/simd.h).
enum class Output { WRITTEN, ADDED, STREAMED };

// Symbols as everywhere: B batch, H heads, Tq / Tk query / key length, D score width, Dv value width;
// i query, j key, d channel. D_padded is D rounded up to whole vectors, padding holds zeros.
template <typename S>
struct AttentionProblem {
  using T = Arithmetic<S>;
  int64_t B, H, Tq, Tk, D, Dv, D_padded;
  View<const S> query, key, value;
  const T* key_exp;  // (B, H, Tk, D) contiguous exp(2 key), or null
  T key_bound;       // max |key| where key_exp is given
  const bool* mask;  // (B, H, Tq, Tk), or null
  int64_t mask_stride[4];
  const int64_t* key_lengths;  // (B,), or null
  // Of each mask, or centers, that differ: whether some query sees a key, and how many keys reach to the last
  // such. What the others hold is not looked at: it may be NaN. Null without a mask and centers.
  const bool* seen;
  const int64_t* seen_end;
  int64_t seen_stride[2];  // from one mask to the next, by batch and head
  const int64_t* center;   // (B, H, Tq): that of each query's window; null: i
  int64_t center_stride[3];
  // With centers: the keys that QUERY_BLOCK queries see lie within these, (B, H, blocks).
  const KeyRange* hulls;
  int64_t hull_stride[2];
  AttentionOptions options;
  T argument;              // of ScoreFactors (formula.h)
  const T* weight;         // (H, D_padded)
  const T* weight_scaled;  // (H, D_padded): weight / weight_max, so that no product overflows
  const T* weight_max;     // (H,)
  const T* weight_sum;     // (H,): sum of weight_scaled
  T* query_exp;            // (rows of the chunk, D_padded): exponentials, or query where there are none
  T* query_bound;          // (rows of the chunk,): max |argument query| where there are exponentials

  // The keys in a query's window.
  __attribute__((always_inline)) KeyRange keys_of(int64_t b, int64_t h, int64_t i) const {
    if (!has_window(options)) return {0, Tk};
    const int64_t* c =
        center == nullptr ? nullptr : center + b * center_stride[0] + h * center_stride[1] + i * center_stride[2];
    return keys_around(options, c == nullptr ? i : *c, Tk);
  }

  // Those of the windows of queries first .. last, and what lies between them. `first` begins a QUERY_BLOCK.
  __attribute__((always_inline)) KeyRange keys_of(int64_t b, int64_t h, int64_t first, int64_t last) const {
    if (center == nullptr) return {keys_of(b, h, first).first, keys_of(b, h, last - 1).end};
    KeyRange all{Tk, 0};
    const KeyRange* hull = hulls + b * hull_stride[0] + h * hull_stride[1];
    for (int64_t n = first / QUERY_BLOCK; n * QUERY_BLOCK < last; ++n) {
      if (hull[n].first < all.first) all.first = hull[n].first;
      if (hull[n].end > all.end) all.end = hull[n].end;
    }
    return all.first < all.end ? all : KeyRange{0, 0};
  }

  // Where the rows of scores, weights and their gradients of query i hold numbers: at all keys that some query of
  // its QUERY_BLOCK sees, and at those that tasks take together with them.
  __attribute__((always_inline)) KeyRange columns_of(int64_t b, int64_t h, int64_t i) const {
    if (!has_window(options)) return {0, Tk};
    const int64_t first = i / QUERY_BLOCK * QUERY_BLOCK, last = first + QUERY_BLOCK;
    const KeyRange keys = keys_of(b, h, first, last < Tq ? last : Tq);
    const int64_t from = keys.first / KEY_BLOCK * KEY_BLOCK - KEY_BLOCK;
    const int64_t to = (keys.end + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK + KEY_BLOCK;
    return {from < 0 ? 0 : from, to < Tk ? to : Tk};
  }

  // Keys at or after this one are invisible to every query of the head.
  __attribute__((always_inline)) int64_t visible_keys(int64_t b, int64_t h) const {
    int64_t keys = center == nullptr && Tq > 0 ? keys_of(b, h, Tq - 1).end : Tk;
    if (key_lengths != nullptr && key_lengths[b] < keys) keys = key_lengths[b] < 0 ? 0 : key_lengths[b];
    if (seen == nullptr) return keys;
    const int64_t end = seen_end[b * seen_stride[0] + h * seen_stride[1]];
    return end < keys ? end : keys;
  }

  // Of these, whether some query sees each; null if one does of every key.
  __attribute__((always_inline)) const bool* seen_keys(int64_t b, int64_t h) const {
    return seen == nullptr ? nullptr : seen + (b * seen_stride[0] + h * seen_stride[1]) * Tk;
  }
};

// Query rows first_query .. first_query + queries of heads first_head .. first_head + heads, heads counted
// over B x H; row r of head n is (n * queries + r).
struct Chunk {
  int64_t first_head, heads, first_query, queries;
};

// Where the gradient of one head's keys or values goes, contiguous rows: a chunk of queries is added to those
// before it in the type of the arithmetic, and the last one writes what is returned. Null: it was not asked for.
template <typename S>
struct GradientRows {
  Arithmetic<S>* sums;  // those of `rows` where nothing is rounded
  S* rows;
  bool added;       // to what `sums` holds
  bool unfinished;  // the result goes to `sums`, for another chunk; not where these are `rows`
  bool streamed;    // `rows` are whole aligned cache lines that go past the caches
};

// cpu_kernel_fwd.cpp
template <typename S>
struct AttentionFwdKernels {
  using T = Arithmetic<S>;
  int64_t lanes;

  // query_exp and query_bound of one row of the chunk.
  void (*prepare_query)(const AttentionProblem<S>&, const Chunk&, int64_t row);

  // scores (chunk rows, Tk) of one head and one block of keys: scaled, capped, masked with -inf. Rows whose window
  // has none of these keys are left as they are.
  void (*score)(const AttentionProblem<S>&, const Chunk&, int64_t head, int64_t first_key, T* scores, T* scratch);

  // The scores of n keys with their bias, of the type of the inputs or of the arithmetic, `step` elements from key
  // to key; out may be scores itself. A bias of -inf hides a key as a mask does.
  void (*add_bias)(int64_t n, const T* scores, const S* bias, int64_t step, T* out);
  void (*add_wide_bias)(int64_t n, const T* scores, const T* bias, int64_t step, T* out);

  // Softmax of the `keys` of a row, and zeros in the other `columns`: p may be scores itself. Nothing but -inf
  // gives zeros and lse = -inf.
  T (*softmax)(KeyRange keys, KeyRange columns, const T* scores, T* p);

  // n numbers into the type of the arithmetic, added to what is there or not; and back.
  void (*widen)(int64_t n, const S* in, T* out, bool added);
  void (*narrow)(int64_t n, const T* in, S* out);
};

// cpu_kernel_bwd.cpp
template <typename S>
struct AttentionBwdKernels {
  using T = Arithmetic<S>;

  // The `keys` of one row: p = exp(score - lse); g, which holds dL/dp, becomes dL/d(unscaled score), and
  // grad_bias, if not null, dL/dscore. p and g are zero in the other `columns`. Returns sum_j g. `capped` are the
  // scores without their bias; p may be scores, not capped, itself.
  T (*grad_scores)(const AttentionProblem<S>&, KeyRange keys, KeyRange columns, const T* scores, const T* capped,
                   T lse, T grad_lse, T* p, T* g, T* grad_bias);

  // The joint backward of one head over keys first_key .. last_key. Rowwise form: all channels, and
  // grad_query, grad_weight are D_padded wide partial sums. Strip form: channels d .. d + lanes. Where rows of
  // grad_key are null, keys are read and nothing as large is written.
  void (*backward_rows)(const AttentionProblem<S>&, const Chunk&, int64_t head, int64_t first_key,
                        int64_t last_key, const T* g, T* grad_query, const GradientRows<S>& grad_key,
                        T* grad_weight, T* scratch);
  void (*backward_strip)(const AttentionProblem<S>&, const Chunk&, int64_t head, int64_t d, int64_t first_key,
                         int64_t last_key, const T* g, T* grad_query, const GradientRows<S>& grad_key,
                         T* grad_weight, T* scratch);
};

// cpu_kernel_product.cpp
template <typename S>
struct AttentionProducts {
  using T = Arithmetic<S>;

  // out (M, N) from A (M, K) B (K, N); element (m, k) of A is at a[m * a_row + k * a_column]. Rows of B that are
  // not `seen` count as zero, whatever they hold; null: all are.
  void (*matmul)(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_column, const S* b,
                 int64_t b_row, const bool* seen, T* out, int64_t out_row, Output output);

  // products (chunk rows, Tk) = grad_context . value of one head and one block of keys, for the rows whose window
  // has some of these. Rows of the head's grad_context in the chunk lie dc_row elements apart.
  void (*grad_weights)(const AttentionProblem<S>&, const Chunk&, int64_t head, int64_t first_key,
                       const T* grad_context, int64_t dc_row, T* products, T* scratch);

  // grad_value = probabilities^T grad_context of one head and one block of keys.
  void (*grad_values)(const AttentionProblem<S>&, const Chunk&, int64_t head, int64_t first_key,
                      const T* probabilities, const T* grad_context, int64_t dc_row,
                      const GradientRows<S>& grad_value, T* scratch);
};

// Elements of scratch that each phase needs.
template <typename S>
static inline int64_t score_scratch(const AttentionProblem<S>& p, int64_t lanes) {
  const int64_t width = (p.D_padded > p.Dv ? p.D_padded : p.Dv) + lanes;
  return (2 * KEY_BLOCK + 4) * width;
}
template <typename S>
static inline int64_t backward_scratch(const AttentionProblem<S>& p, const Chunk& chunk, int64_t lanes) {
  const int64_t strip = (2 * chunk.queries + p.Tk) * lanes;
  const int64_t rows = chunk.queries * (2 * p.D_padded + lanes) + (1 + ROWWISE_KEYS) * p.D_padded;
  return strip > rows ? strip : rows;
}

// The tables of every storage type: attention_fwd_f32 and so on.
#define FUSEDATTN_DECLARE_ATTENTION(S, suffix)                            \
  FUSEDATTN_DECLARE_TABLE(AttentionFwdKernels<S>, attention_fwd_##suffix) \
  FUSEDATTN_DECLARE_TABLE(AttentionBwdKernels<S>, attention_bwd_##suffix) \
  FUSEDATTN_DECLARE_TABLE(AttentionProducts<S>, attention_products_##suffix)
FUSEDATTN_DECLARE_ATTENTION(float, f32)
FUSEDATTN_DECLARE_ATTENTION(double, f64)
FUSEDATTN_DECLARE_ATTENTION(Half, f16)
FUSEDATTN_DECLARE_ATTENTION(BFloat16, bf16)

}  // namespace fusedattn
