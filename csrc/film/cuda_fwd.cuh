// FiLM forward: y = activation(scale x + shift) + residual. See cuda_problem.cuh for the cut into tasks.
#pragma once

#include "cuda_problem.cuh"

namespace fusedattn {

// W elements of one row or run: channel e has scale[e * step] and shift[e * step] (step 0: they share a channel).
template <int W, int step, typename S>
FUSEDATTN_DEVICE void film_fwd_pack(const FilmProblem<S>& p, const ScaleShift<S>* channel, const S* residual, S* y,
                                    int64_t element) {
  using T = gpu::Arithmetic<S>;
  const gpu::Pack<S, W> x = gpu::load_pack<W>(p.x + element);
  T result[W], addend[W];
#pragma unroll
  for (int e = 0; e < W; ++e) addend[e] = T(0);
  if (residual != nullptr) {
    const gpu::Pack<S, W> r = gpu::load_pack<W>(residual + element);
#pragma unroll
    for (int e = 0; e < W; ++e) addend[e] = gpu::to_arithmetic(r.element[e]);
  }
  with_activation(p.options.activation, [&](auto activation) {
#pragma unroll
    for (int e = 0; e < W; ++e) {
      const T z = gpu::fma(gpu::to_arithmetic(x.element[e]), channel[e * step].scale, channel[e * step].shift);
      result[e] = activate<decltype(activation)::value, Scalar<T>>(z);
    }
  });
  gpu::Pack<S, W> out;
#pragma unroll
  for (int e = 0; e < W; ++e)
    out.element[e] = gpu::to_storage<S>(residual == nullptr ? result[e] : result[e] + addend[e]);
  gpu::store_pack_global(y + element, out);
}

template <typename S>
__global__ void __launch_bounds__(FILM_BLOCK, 2)
    film_fwd_kernel_runs(const FilmProblem<S> p, const RunCut cut, const S* __restrict__ residual,
                         S* __restrict__ y) {
  const RunTask task(cut, p);
  if (!task.exists) return;
  const ScaleShift<S> channel = scale_shift(p, task.b, task.c);
  for_each_pack(p.x, task, cut, [&](int64_t element, auto width) {
    film_fwd_pack<decltype(width)::value, 0>(p, &channel, residual, y, element);
  });
}

template <typename S, int W>
__global__ void __launch_bounds__(FILM_BLOCK, 2)
    film_fwd_kernel_rows(const FilmProblem<S> p, const RowCut cut, const S* __restrict__ residual,
                         S* __restrict__ y) {
  const RowTask task(cut, p);
  if (!task.exists) return;
  ScaleShift<S> channel[W];
#pragma unroll
  for (int e = 0; e < W; ++e) channel[e] = scale_shift(p, task.b, task.c + e);
  for (int64_t row = task.first; row < task.last; row += cut.rows)
    film_fwd_pack<W, 1>(p, channel, residual, y, row * p.C + task.c);
}

// y and residual (or null) like x; nothing may be empty.
template <typename S>
void launch_film_fwd(const FilmProblem<S>& problem, const S* residual, S* y, cudaStream_t stream) {
  constexpr int W = gpu::Pack<S>::SIZE;
  const FilmProblem<S> p = with_batch_folded(problem);
  const bool placed = same_placement(p.x, y, residual);
  if (p.N > 1) {
    const RunCut cut(p, placed);
    FUSEDATTN_LAUNCH(film_fwd_kernel_runs<S>, cut.grid(), FILM_BLOCK, 0, stream, p, cut, residual, y);
    return;
  }
  const RowCut cut(p, placed && gpu::aligned_16(y));
  if (cut.width == W)
    FUSEDATTN_LAUNCH((film_fwd_kernel_rows<S, W>), cut.grid(), cut.block(), 0, stream, p, cut, residual, y);
  else
    FUSEDATTN_LAUNCH((film_fwd_kernel_rows<S, 1>), cut.grid(), cut.block(), 0, stream, p, cut, residual, y);
}

}  // namespace fusedattn
