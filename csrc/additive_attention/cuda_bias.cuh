// The bias of the scores in CUDA kernels. Scores that are stored lie without it, for the slope of a cap needs them
// so; it is added wherever they are exponentiated, read as it lies.
#pragma once

#include "cuda_problem.cuh"

namespace fusedattn {

// Where that of a pair lies.
template <typename S>
FUSEDATTN_DEVICE int64_t bias_at(const AttentionProblem<S>& p, const Head& at, int64_t i, int64_t j) {
  return at.b * p.bias_stride[0] + at.h * p.bias_stride[1] + i * p.bias_stride[2] + j * p.bias_stride[3];
}

// A visible score with its bias, of which -inf hides a key as a mask does. What overflows stays above the score
// that stands for -inf, and so does a bias of the lowest number, as float masks have it.
template <typename S, typename T>
FUSEDATTN_DEVICE T biased_score(const AttentionProblem<S>& p, int64_t of_bias, T score) {
  constexpr T LOWEST = sizeof(T) == 4 ? T(-3.4028232635611926e38) : T(-1.7976931348623155e308);
  const T bias = p.bias.get(of_bias), sum = score + bias;
  if (bias == -INFINITE<T>) return bias;
  return score == VISIBLE_MINUS_INF<T> ? score : sum < LOWEST ? LOWEST : sum;
}

// A score with its bias where there is one.
template <typename S, typename T>
FUSEDATTN_DEVICE T with_bias(const AttentionProblem<S>& p, const Head& at, int64_t i, int64_t j, T score) {
  return p.has_bias() && score != -INFINITE<T> ? biased_score(p, bias_at(p, at, i, j), score) : score;
}

// The same head; what follows from it is computed here, not ahead of a loop that it would take registers from.
FUSEDATTN_DEVICE Head here(Head at) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(at.b), "+l"(at.h));
#endif
  return at;
}

// Those of the thread's pairs in the tile at (i0, j0).
template <typename S, typename T>
FUSEDATTN_DEVICE void add_bias(const AttentionProblem<S>& p, const Head& at, int64_t i0, int64_t j0,
                               T (&score)[TILE_Q][TILE_K]) {
  int64_t of_row = bias_at(p, at, i0 + tile_row(), j0 + tile_column());
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i, of_row += p.bias_stride[2])
#pragma unroll
    for (int j = 0; j < TILE_K; ++j)
      if (score[i][j] != -INFINITE<T>) score[i][j] = biased_score(p, of_row + j * p.bias_stride[3], score[i][j]);
}

}  // namespace fusedattn
