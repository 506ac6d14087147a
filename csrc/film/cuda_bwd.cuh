// FiLM backward: dz = dy activation'(z), dx = scale dz, dgamma = sum dz x, dbeta = sum dz, in one pass over x and
// dy.
//
// The pass that writes dx also sums dz x and dz: in registers, then over the threads of a task, to one pair of
// partial sums a task. A second, small kernel adds the partial sums of each channel in a fixed order; there are no
// atomics. See cuda_problem.cuh for the cut into tasks.
#pragma once

#include "cuda_problem.cuh"

namespace fusedattn {

// (B, C, P) sums each: of dz x and of dz.
template <typename T>
struct PartialSums {
  T *dz_x, *dz;
  int64_t P;

  FUSEDATTN_DEVICE void store(int64_t B_index, int64_t C, int64_t c, int64_t part, T sum_dz_x, T sum_dz) const {
    const int64_t at = (B_index * C + c) * P + part;
    dz_x[at] = sum_dz_x;
    dz[at] = sum_dz;
  }
};

// As film_fwd_step; adds to sum_dz_x[e * stride] and sum_dz[e * stride].
template <int stride, int W, int N, typename S, typename T>
FUSEDATTN_DEVICE void film_bwd_step(const FilmProblem<S>& p, const ScaleShift<S>* channel, const S* dy, S* dx,
                                    int64_t element, int64_t distance, T* sum_dz_x, T* sum_dz, Step<W, N>) {
  gpu::Pack<S, W> x[N], grad[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = gpu::load_pack<W>(p.x + element + n * distance);
    grad[n] = gpu::load_pack<W>(dy + element + n * distance);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    T slopes[W];
    with_activation(p.options.activation, [&](auto activation) {
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const T z =
            gpu::fma(gpu::to_arithmetic(x[n].element[e]), channel[e * stride].scale, channel[e * stride].shift);
        slopes[e] = slope<decltype(activation)::value, Scalar<T>>(z);
      }
    });
    gpu::Pack<S, W> out;
#pragma unroll
    for (int e = 0; e < W; ++e) {
      const T dz = gpu::to_arithmetic(grad[n].element[e]) * slopes[e];
      out.element[e] = gpu::to_storage<S>(dz * channel[e * stride].scale);
      sum_dz_x[e * stride] = gpu::fma(dz, gpu::to_arithmetic(x[n].element[e]), sum_dz_x[e * stride]);
      sum_dz[e * stride] += dz;
    }
    gpu::store_pack_global(dx + element + n * distance, out);
  }
}

// Sum over the `group` threads of a task, by its first thread: inside warps, then over the task's warps.
template <typename T>
FUSEDATTN_DEVICE T group_sum(T x, int group, T* shared) {
  const int within = group < gpu::WARP ? group : gpu::WARP;
  for (int step = within / 2; step > 0; step /= 2) x += __shfl_xor_sync(gpu::ALL_LANES, x, step);
  if (group <= gpu::WARP) return x;
  __syncthreads();  // who reads what an earlier call left there is done
  if (threadIdx.x % gpu::WARP == 0) shared[threadIdx.x / gpu::WARP] = x;
  __syncthreads();
  T sum = T(0);
  for (int warp = 0; warp < group / gpu::WARP; ++warp)
    sum += shared[threadIdx.x / group * (group / gpu::WARP) + warp];
  return sum;
}

template <typename S>
__global__ void __launch_bounds__(FILM_BLOCK, 2)
    film_bwd_kernel_runs(const FilmProblem<S> p, const RunCut cut, const S* __restrict__ dy, S* __restrict__ dx,
                         const PartialSums<gpu::Arithmetic<S>> parts) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const RunTask task(cut, p);
  T sum_dz_x = T(0), sum_dz = T(0);
  if (task.exists) {
    const ScaleShift<S> channel = scale_shift(p, task.b, task.c);
    for_each_pack(p.x, task, cut, [&](int64_t element, int64_t distance, auto step) {
      film_bwd_step<0>(p, &channel, dy, dx, element, distance, &sum_dz_x, &sum_dz, step);
    });
  }
  sum_dz_x = group_sum(sum_dz_x, cut.group, shared);
  sum_dz = group_sum(sum_dz, cut.group, shared);
  if (task.exists && task.thread == 0)
    parts.store(task.b, p.C, task.c, task.m * cut.pieces + task.number, sum_dz_x, sum_dz);
}

template <typename S, int W>
__global__ void __launch_bounds__(FILM_BLOCK, 2)
    film_bwd_kernel_rows(const FilmProblem<S> p, const RowCut cut, const S* __restrict__ dy, S* __restrict__ dx,
                         const PartialSums<gpu::Arithmetic<S>> parts) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);  // [2 W][groups][rows][columns]
  const RowTask task(cut, p);
  T sums[2 * W];
#pragma unroll
  for (int e = 0; e < 2 * W; ++e) sums[e] = T(0);
  if (task.exists) {
    ScaleShift<S> channel[W];
#pragma unroll
    for (int e = 0; e < W; ++e) channel[e] = scale_shift(p, task.b, task.c + e);
    for_each_step<W>(task.first, task.last, cut.rows, [&](int64_t row, auto step) {
      film_bwd_step<1>(p, channel, dy, dx, row * p.C + task.c, cut.rows * p.C, sums, sums + W, step);
    });
  }

  // Rows r and r + half become one, until one is left.
  const int threads = cut.columns * cut.rows * cut.groups;
  const int thread = (threadIdx.z * cut.rows + threadIdx.y) * cut.columns + threadIdx.x;
  for (int half = cut.rows / 2; half > 0; half /= 2) {
    const int row = threadIdx.y;
    if (row >= half && row < 2 * half)
#pragma unroll
      for (int e = 0; e < 2 * W; ++e) shared[e * threads + thread] = sums[e];
    __syncthreads();
    if (row < half)
#pragma unroll
      for (int e = 0; e < 2 * W; ++e) sums[e] += shared[e * threads + thread + half * cut.columns];
  }
  if (!task.exists || threadIdx.y != 0) return;
#pragma unroll
  for (int e = 0; e < W; ++e)
    parts.store(task.b, p.C, task.c + e, task.task - task.b * cut.pieces, sums[e], sums[W + e]);
}

// out[o] = sum of the partial sums of output o, a warp each: B C outputs of P parts, or C outputs of B x P parts.
template <typename S>
__global__ void __launch_bounds__(FILM_BLOCK, 2)
    film_bwd_kernel_sums(const gpu::Arithmetic<S>* __restrict__ parts, int64_t B, int64_t C, int64_t P,
                         int64_t outputs, const gpu::Numbers<S> out) {
  using T = gpu::Arithmetic<S>;
  const int64_t output = int64_t{blockIdx.x} * (FILM_BLOCK / gpu::WARP) + threadIdx.x / gpu::WARP;
  if (output >= outputs) return;
  const int64_t batches = outputs == C ? B : 1;
  T sum = T(0);
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t part = threadIdx.x % gpu::WARP; part < P; part += gpu::WARP)
      sum += parts[(b * C + output) * P + part];
  sum = gpu::warp_sum(sum);
  if (threadIdx.x % gpu::WARP == 0) out.set(output, sum);
}

// How many partial sums of each kind a problem needs.
template <typename S>
int64_t film_bwd_parts(const FilmProblem<S>& problem) {
  const FilmProblem<S> p = with_batch_folded(problem);
  const int64_t parts = p.N > 1 ? p.M * RunCut(p, true).pieces : RowCut(p, true).pieces;
  const int64_t narrow = p.N > 1 ? parts : RowCut(p, false).pieces;
  return p.B * p.C * (parts > narrow ? parts : narrow);
}

// dy and dx like x; dgamma and dbeta like gamma and beta, null where those are; sums: room for twice
// film_bwd_parts(problem). Nothing may be empty.
template <typename S>
void launch_film_bwd(const FilmProblem<S>& problem, const S* dy, S* dx, gpu::Numbers<S> dgamma,
                     gpu::Numbers<S> dbeta, gpu::Arithmetic<S>* sums, cudaStream_t stream) {
  using T = gpu::Arithmetic<S>;
  constexpr int W = gpu::Pack<S>::SIZE;
  const FilmProblem<S> p = with_batch_folded(problem);
  const bool placed = same_placement(p.x, dx, dy);
  PartialSums<T> parts{sums, sums + film_bwd_parts(problem), 0};
  if (p.N > 1) {
    const RunCut cut(p, placed);
    parts.P = p.M * cut.pieces;
    FUSEDATTN_LAUNCH(film_bwd_kernel_runs<S>, cut.grid(), FILM_BLOCK, FILM_BLOCK / gpu::WARP * sizeof(T), stream,
                     p, cut, dy, dx, parts);
  } else {
    const RowCut cut(p, placed && gpu::aligned_16(dx));
    parts.P = cut.pieces;
    const dim3 block = cut.block();
    const size_t shared = cut.rows > 1 ? 2 * cut.width * sizeof(T) * block.x * block.y * block.z : 0;
    if (cut.width == W)
      FUSEDATTN_LAUNCH((film_bwd_kernel_rows<S, W>), cut.grid(), block, shared, stream, p, cut, dy, dx, parts);
    else
      FUSEDATTN_LAUNCH((film_bwd_kernel_rows<S, 1>), cut.grid(), block, shared, stream, p, cut, dy, dx, parts);
  }
  const auto finish = [&](const T* of, int64_t stride_b, gpu::Numbers<S> out) {
    if (out.data == nullptr) return;
    const int64_t outputs = stride_b == 0 ? p.C : p.B * p.C;
    FUSEDATTN_LAUNCH(film_bwd_kernel_sums<S>, gpu::ceil_div(outputs, FILM_BLOCK / gpu::WARP), FILM_BLOCK, 0,
                     stream, of, p.B, p.C, parts.P, outputs, out);
  };
  finish(parts.dz_x, problem.gamma_stride_b, dgamma);
  finish(parts.dz, problem.beta_stride_b, dbeta);
}

}  // namespace fusedattn
