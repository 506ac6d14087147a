// What the CPU launcher (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per level) of location_attention
// share. The launcher makes the location features of a block of keys by the matrix products of additive attention.
#pragma once

#include <cstdint>

#include "additive_attention/cpu_kernel.h"

namespace fusedattn {

// Neighbouring keys of one batch element against one query; all but keys in the type of the arithmetic.
template <typename S>
struct LocationRows {
  using T = Arithmetic<S>;
  int64_t rows, D;
  const S* key;
  int64_t key_step;
  const T *query, *weight;
  AttentionOptions options;
};

template <typename S>
struct LocationKernels {
  using T = Arithmetic<S>;

  // Scores of the rows, scaled and capped, from their location features (rows, D).
  void (*scores)(const LocationRows<S>&, const T* features, T* out);

  // From the gradients of the unscaled scores: features become their own gradients, which are added to those of
  // the query (D,) and keys (rows, D), and that of the weight (D,) grows. A row whose gradient is 0 is not looked
  // at. `dkey` may be null.
  void (*gradients)(const LocationRows<S>&, const T* g, T* features, T* dquery, T* dweight, T* dkey);

  // out[c][j + k] += x[j][c][k] of x (rows, C, K); rows of `out` lie `step` apart: the transposed convolution.
  void (*add_diagonals)(int64_t rows, int64_t C, int64_t K, const T* x, T* out, int64_t step);

  // n numbers to element `at` of a gradient.
  void (*write)(const GradientRows<S>&, int64_t at, const T* x, int64_t n);
};

FUSEDATTN_DECLARE_TABLE(LocationKernels<float>, location_f32)
FUSEDATTN_DECLARE_TABLE(LocationKernels<double>, location_f64)
FUSEDATTN_DECLARE_TABLE(LocationKernels<Half>, location_f16)
FUSEDATTN_DECLARE_TABLE(LocationKernels<BFloat16>, location_bf16)

}  // namespace fusedattn
