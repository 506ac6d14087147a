// What the CPU launcher (cpu.cpp) and the kernels (cpu_kernel_*.cpp, compiled once per level) share.
//
// The work runs in phases over a chunk of query rows; each phase is a list of independent tasks, and a
// function below carries out one of them. Only (rows of a chunk) x Tk scores exist between phases.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "options.h"

namespace fusedattn {

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
template <typename T>
struct AttentionProblem {
  int64_t B, H, Tq, Tk, D, Dv, D_padded;
  View<const T> query, key, value;
  const T* key_exp;  // (B, H, Tk, D) contiguous exp(2 key), or null
  T key_bound;       // max |key| where key_exp is given
  const bool* mask;  // (B, H, Tq, Tk), or null
  int64_t mask_stride[4];
  const int64_t* key_lengths;  // (B,), or null
  // Of each mask that differs: whether some query sees a key, and how many keys reach to the last such. What the
  // others hold is not looked at: it may be NaN. Null without a mask.
  const bool* seen;
  const int64_t* seen_end;
  int64_t seen_stride[2];  // from one mask to the next, by batch and head
  AttentionOptions options;
  const T* weight;         // (H, D_padded)
  const T* weight_scaled;  // (H, D_padded): weight / weight_max, so that no product overflows
  const T* weight_max;     // (H,)
  const T* weight_sum;     // (H,): sum of weight_scaled
  T* query_exp;            // (rows of the chunk, D_padded): exp(2 query)
  T* query_bound;          // (rows of the chunk,): max |query|
  // Of their gradients, when first written. Rows that are STREAMED are whole aligned vectors.
  Output key_output = Output::WRITTEN;
  Output value_output = Output::WRITTEN;

  // Keys at or after this one are invisible to every query of the head.
  __attribute__((always_inline)) int64_t visible_keys(int64_t b, int64_t h) const {
    int64_t keys = options.is_causal && Tq < Tk ? Tq : Tk;
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

constexpr int64_t KEY_BLOCK = 16;        // keys per score task
constexpr int64_t QUERY_BLOCK = 16;      // query rows per softmax and context task
constexpr int64_t ROWWISE_QUERIES = 16;  // up to so many queries the backward pass walks whole key rows

// cpu_kernel_fwd.cpp
template <typename T>
struct AttentionFwdKernels {
  int64_t lanes;

  // query_exp and query_bound of one row of the chunk.
  void (*prepare_query)(const AttentionProblem<T>&, const Chunk&, int64_t row);

  // scores (chunk rows, Tk) of one head and one block of keys: scaled, capped, masked with -inf.
  void (*score)(const AttentionProblem<T>&, const Chunk&, int64_t head, int64_t first_key, T* scores, T* scratch);

  // Softmax of n rows of length Tk: p may be scores itself. A row of -inf gives zeros and lse = -inf.
  void (*softmax)(int64_t n, int64_t Tk, const T* scores, T* p, T* lse);
};

// cpu_kernel_bwd.cpp
template <typename T>
struct AttentionBwdKernels {
  // One row: p = exp(score - lse); g, which holds dL/dp, becomes dL/d(unscaled score). Returns sum_j g.
  T (*grad_scores)(const AttentionProblem<T>&, const T* scores, T lse, T grad_lse, T* p, T* g);

  // The joint backward of one head over keys first_key .. last_key. Rowwise form: all channels, and
  // grad_query, grad_weight are D_padded wide partial sums. Strip form: channels d .. d + lanes. Without grad_key
  // (null) keys are read and nothing as large is written.
  void (*backward_rows)(const AttentionProblem<T>&, const Chunk&, int64_t head, int64_t first_key,
                        int64_t last_key, const T* g, T* grad_query, T* grad_key, T* grad_weight, T* scratch);
  void (*backward_strip)(const AttentionProblem<T>&, const Chunk&, int64_t head, int64_t d, int64_t first_key,
                         int64_t last_key, const T* g, T* grad_query, T* grad_key, T* grad_weight, T* scratch);
};

// cpu_kernel_product.cpp
template <typename T>
struct AttentionProducts {
  // out (M, N) from A (M, K) B (K, N); element (m, k) of A is at a[m * a_row + k * a_column]. Rows of B that are
  // not `seen` count as zero, whatever they hold; null: all are.
  void (*matmul)(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_column, const T* b,
                 int64_t b_row, const bool* seen, T* out, int64_t out_row, Output output);

  // products (chunk rows, Tk) = grad_context . value of one head and one block of keys.
  void (*grad_weights)(const AttentionProblem<T>&, const Chunk&, int64_t head, int64_t first_key,
                       View<const T> grad_context, T* products, T* scratch);
};

// Elements of scratch that each phase needs.
template <typename T>
static inline int64_t score_scratch(const AttentionProblem<T>& p, int64_t lanes) {
  const int64_t width = (p.D_padded > p.Dv ? p.D_padded : p.Dv) + lanes;
  return (2 * KEY_BLOCK + 4) * width;
}
template <typename T>
static inline int64_t backward_scratch(const AttentionProblem<T>& p, const Chunk& chunk, int64_t lanes) {
  const int64_t strip = (2 * chunk.queries + p.Tk) * lanes,
                rows = chunk.queries * (2 * p.D_padded + lanes) + p.D_padded;
  return strip > rows ? strip : rows;
}

FUSEDATTN_DECLARE_TABLE(AttentionFwdKernels<float>, attention_fwd_f32)
FUSEDATTN_DECLARE_TABLE(AttentionFwdKernels<double>, attention_fwd_f64)
FUSEDATTN_DECLARE_TABLE(AttentionBwdKernels<float>, attention_bwd_f32)
FUSEDATTN_DECLARE_TABLE(AttentionBwdKernels<double>, attention_bwd_f64)
FUSEDATTN_DECLARE_TABLE(AttentionProducts<float>, attention_products_f32)
FUSEDATTN_DECLARE_TABLE(AttentionProducts<double>, attention_products_f64)

}  // namespace fusedattn
