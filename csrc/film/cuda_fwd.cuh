// FiLM forward: y = activation(scale x + shift) + residual. See cuda_problem.cuh for the cut into tasks.
#pragma once

#include "cuda_problem.cuh"

namespace fusedattn {

template <typename S>
constexpr int FORWARD_BLOCKS = sizeof(S) == 8 ? 2 : 3;  // of a multiprocessor, at least: 80 registers a thread

// The packs of a step, `distance` apart: channel e of each has scale[e * stride] and shift[e * stride] (stride 0:
// they share a channel).
template <int stride, int W, int N, typename S>
FUSEDATTN_DEVICE void film_fwd_step(const FilmProblem<S>& p, const ScaleShift<S>* channel, const S* residual, S* y,
                                    int64_t element, int64_t distance, Step<W, N>) {
  using T = gpu::Arithmetic<S>;
  gpu::Pack<S, W> x[N], r[N] = {};
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = gpu::load_pack<W>(p.x + element + n * distance);
  if (residual != nullptr)
#pragma unroll
    for (int n = 0; n < N; ++n) r[n] = gpu::load_pack<W>(residual + element + n * distance);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    T result[W];
    with_activation(p.options.activation, [&](auto activation) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const T z =
            gpu::fma(gpu::to_arithmetic(x[n].element[e]), channel[e * stride].scale, channel[e * stride].shift);
        result[e] = activate<decltype(activation)::value, Scalar<T>>(z);
      }
    });
    gpu::Pack<S, W> out;
#pragma unroll
    for (int e = 0; e < W; ++e)
      out.element[e] =
          gpu::to_storage<S>(residual == nullptr ? result[e] : result[e] + gpu::to_arithmetic(r[n].element[e]));
    gpu::store_pack_global(y + element + n * distance, out);
  }
}

template <typename S>
__global__ void __launch_bounds__(FILM_BLOCK, FORWARD_BLOCKS<S>)
    film_fwd_kernel_runs(const FilmProblem<S> p, const RunCut cut, const S* __restrict__ residual,
                         S* __restrict__ y) {
  const RunTask task(cut, p);
  if (!task.exists) return;
  const ScaleShift<S> channel = scale_shift(p, task.b, task.c);
  for_each_pack(p.x, task, cut, [&](int64_t element, int64_t distance, auto step) {
    film_fwd_step<0>(p, &channel, residual, y, element, distance, step);
  });
}

template <typename S, int W>
__global__ void __launch_bounds__(FILM_BLOCK, FORWARD_BLOCKS<S>)
    film_fwd_kernel_rows(const FilmProblem<S> p, const RowCut cut, const S* __restrict__ residual,
                         S* __restrict__ y) {
  const RowTask task(cut, p);
  if (!task.exists) return;
  ScaleShift<S> channel[W];
#pragma unroll
  for (int e = 0; e < W; ++e) channel[e] = scale_shift(p, task.b, task.c + e);
  for_each_step<W>(task.first, task.last, cut.rows, [&](int64_t row, auto step) {
    film_fwd_step<1>(p, channel, residual, y, row * p.C + task.c, cut.rows * p.C, step);
  });
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
