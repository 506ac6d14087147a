// Additive attention forward: scores, masks, online softmax and context in one kernel.
//
// A block owns BLOCK_Q queries of a head and walks the keys BLOCK_K at a time (cuda_problem.cuh): scores in
// registers, weights p = exp(score - row maximum) to shared memory, then p . x, 64 columns of x at a time. The
// context is summed in global memory, each element always by one thread: 64 x Dv sums would take the registers
// that the score loop lives from, and reading and writing them once per tile moves 8 Dv bytes for 64 D tanh of a
// row, out of the L2 cache. So Dv has no limit. With a single tile of keys (Tk <= 64) the sums never leave the
// registers.
#pragma once

#include "cuda_problem.cuh"

namespace fusedattn {

// All contiguous. Weights and scores may be null; weights need scores.
template <typename S>
struct AttentionOutputs {
  using T = gpu::Arithmetic<S>;
  S* context;  // (B, H, Tq, Dv)
  T* lse;      // (B, H, Tq)
  T* scores;   // (B, H, Tq, Tk)
  T* sums;     // like context; may be context itself
};

template <typename T>
struct ForwardMemory {
  static constexpr int64_t STAGE = ScoreMemory<T>::SIZE, P = BLOCK_K * LEADING;
  static constexpr int64_t SIZE = (STAGE > P ? STAGE : P) + P + 3 * BLOCK_Q;
  ScoreMemory<T> score;
  T *x, *p, *row_max, *row_sum, *row_scale;
  FUSEDATTN_DEVICE explicit ForwardMemory(T* memory)
      : score(memory),
        x(memory),
        p(memory + (STAGE > P ? STAGE : P)),
        row_max(p + P),
        row_sum(row_max + BLOCK_Q),
        row_scale(row_sum + BLOCK_Q) {}
};

// Over the threads that share rows.
template <typename T, typename Combine>
FUSEDATTN_DEVICE T row_reduce(T x, const Combine& combine) {
#pragma unroll
  for (int step = ROW_LANES / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(gpu::ALL_LANES, x, step));
  return x;
}

// One step of the online softmax: scores become p, also in shared memory as [j][i]; the rows' maximum and sum move
// on, row_scale is what earlier sums must be multiplied with.
template <typename T>
FUSEDATTN_DEVICE void softmax_step(T (&score)[TILE_Q][TILE_K], const ForwardMemory<T>& memory) {
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i) {
    const int row = tile_row() + i;
    T top = score[i][0];
#pragma unroll
    for (int j = 1; j < TILE_K; ++j) top = gpu::max(top, score[i][j]);
    const T before = memory.row_max[row];
    top = gpu::max(before, row_reduce(top, [](T a, T b) { return gpu::max(a, b); }));
    const T origin = top == -INFINITE<T> ? T(0) : top;
    T sum = 0;
#pragma unroll
    for (int j = 0; j < TILE_K; ++j) {
      const bool infinite = score[i][j] == INFINITE<T>;  // the context is NaN, the log-sum-exp inf
      score[i][j] = gpu::exp_approx(score[i][j] - origin);
      sum += infinite ? T(1) : score[i][j];
    }
    sum = row_reduce(sum, [](T a, T b) { return a + b; });
    const T scale = before == top ? T(1) : gpu::exp_approx(before - origin);
    if (tile_column() == 0) {
      memory.row_max[row] = top;
      memory.row_sum[row] = gpu::fma(memory.row_sum[row], scale, sum);
      memory.row_scale[row] = scale;
    }
  }
#pragma unroll
  for (int j = 0; j < TILE_K; ++j)
#pragma unroll
    for (int half = 0; half < TILE_Q; half += 4) {
      gpu::Pack<T, 4> pack;
#pragma unroll
      for (int e = 0; e < 4; ++e) pack.element[e] = score[half + e][j];
      gpu::store_pack(memory.p + (tile_column() + j) * LEADING + tile_row() + half, pack);
    }
}

// What the row's sums are multiplied with in the end.
template <typename T>
FUSEDATTN_DEVICE T normaliser(T row_max, T row_sum) {
  if (row_max == -INFINITE<T> && row_sum == 0) return T(0);
  return row_max == VISIBLE_MINUS_INF<T> ? NOT_A_NUMBER<T> : 1 / row_sum;
}

// sums = sums row_scale + p x, for the tile's keys and all columns; in the end times the normaliser to the
// context.
template <typename S, typename T>
FUSEDATTN_DEVICE void context_step(const AttentionProblem<S>& p, const AttentionOutputs<S>& out, const Head& at,
                                   int64_t i0, int64_t j0, int64_t keys_end, const ForwardMemory<T>& memory) {
  const bool first = j0 == 0, last = j0 + BLOCK_K >= keys_end;
  const int depth = static_cast<int>(lower(BLOCK_K, keys_end - j0));
  for (int64_t v0 = 0; v0 < p.Dv; v0 += 64) {
    __syncthreads();
    stage_rows(p.value, at, j0, keys_end, v0, p.Dv, memory.x);
    __syncthreads();
    T acc[TILE_Q][TILE_K] = {};
    multiply_tile(memory.p, memory.x, depth, acc);
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i) {
      const int row = tile_row() + i;
      if (i0 + row >= p.Tq) break;
      const T scale = memory.row_scale[row];
      const T final = last ? normaliser(memory.row_max[row], memory.row_sum[row]) : T(1);
      const int64_t to = (at.n * p.Tq + i0 + row) * p.Dv + v0 + tile_column();
#pragma unroll
      for (int j = 0; j < TILE_K; ++j) {
        if (v0 + tile_column() + j >= p.Dv) break;
        const T sum = first ? acc[i][j] : gpu::fma(out.sums[to + j], scale, acc[i][j]);
        if (last)
          out.context[to + j] = gpu::to_storage<S>(sum * final);
        else
          out.sums[to + j] = sum;
      }
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK)
    additive_attention_fwd_kernel(const AttentionProblem<S> p, const AttentionOutputs<S> out,
                                  int64_t query_tiles) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const ForwardMemory<T> memory(shared);
  const Head at(p, blockIdx.x / query_tiles);
  const int64_t i0 = blockIdx.x % query_tiles * BLOCK_Q, keys_end = p.keys_end(at.b, i0);
  const WeightScale<T> weight(p, at, memory.score.reduce);
  if (threadIdx.x < BLOCK_Q) {
    memory.row_max[threadIdx.x] = -INFINITE<T>;
    memory.row_sum[threadIdx.x] = 0;
  }
  __syncthreads();

  for (int64_t j0 = 0; j0 < keys_end; j0 += BLOCK_K) {
    T score[TILE_Q][TILE_K];
    score_tile(p, at, weight, i0, j0, keys_end, memory.score, score);
    if (out.scores != nullptr) {
#pragma unroll
      for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
        for (int j = 0; j < TILE_K; ++j) {
          const int64_t row = i0 + tile_row() + i, column = j0 + tile_column() + j;
          if (row < p.Tq && column < p.Tk) out.scores[(at.n * p.Tq + row) * p.Tk + column] = score[i][j];
        }
    }
    softmax_step(score, memory);
    context_step(p, out, at, i0, j0, keys_end, memory);
  }

  __syncthreads();
  const int64_t rows = lower(BLOCK_Q, p.Tq - i0), first_row = at.n * p.Tq + i0;
  if (threadIdx.x < rows) {
    const T top = memory.row_max[threadIdx.x], sum = memory.row_sum[threadIdx.x];
    const bool none = (top == -INFINITE<T> && sum == 0) || top == VISIBLE_MINUS_INF<T>;
    out.lse[first_row + threadIdx.x] = none ? -INFINITE<T> : top + gpu::log(sum);
  }
  if (keys_end == 0)
    for (int64_t n = threadIdx.x; n < rows * p.Dv; n += ATTENTION_BLOCK)
      out.context[first_row * p.Dv + n] = gpu::to_storage<S>(T(0));
  const int64_t scored = lower(p.Tk, gpu::ceil_div(keys_end, BLOCK_K) * BLOCK_K), rest = p.Tk - scored;
  if (out.scores != nullptr)
    for (int64_t n = threadIdx.x; n < rows * rest; n += ATTENTION_BLOCK)
      out.scores[(first_row + n / rest) * p.Tk + scored + n % rest] = -INFINITE<T>;
}

// weights = exp(score - lse), 0 where invisible, NaN in a row whose log-sum-exp is infinite; scores and weights
// may be the same memory.
template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK)
    additive_attention_fwd_kernel_weights(const gpu::Arithmetic<S>* scores, const gpu::Arithmetic<S>* lse,
                                          int64_t elements, int64_t Tk, S* weights) {
  using T = gpu::Arithmetic<S>;
  for (int64_t n = int64_t{blockIdx.x} * ATTENTION_BLOCK + threadIdx.x; n < elements;
       n += int64_t{gridDim.x} * ATTENTION_BLOCK) {
    const T score = scores[n], origin = lse[n / Tk];
    const bool finite = origin - origin == 0 || origin != origin;
    weights[n] = gpu::to_storage<S>(score == -INFINITE<T> ? T(0)
                                    : finite              ? gpu::exp(score - origin)
                                                          : NOT_A_NUMBER<T>);
  }
}

template <typename S>
void launch_additive_attention_weights(const AttentionProblem<S>& p, const gpu::Arithmetic<S>* scores,
                                       const gpu::Arithmetic<S>* lse, S* weights, cudaStream_t stream) {
  const int64_t elements = p.heads() * p.Tq * p.Tk, blocks = gpu::ceil_div(elements, ATTENTION_BLOCK * 4);
  if (elements == 0) return;
  FUSEDATTN_LAUNCH(additive_attention_fwd_kernel_weights<S>,
                   static_cast<unsigned>(blocks < 65536 ? blocks : 65536), ATTENTION_BLOCK, 0, stream, scores, lse,
                   elements, p.Tk, weights);
}

// Elements of working memory: the sums of the context in half precision.
template <typename S>
int64_t additive_attention_fwd_workspace(const AttentionProblem<S>& p) {
  return sizeof(S) < sizeof(gpu::Arithmetic<S>) ? p.heads() * p.Tq * p.Dv : 0;
}

// context (B, H, Tq, Dv), lse (B, H, Tq), scores (B, H, Tq, Tk) or null, weights like scores or null (they need
// scores).
template <typename S>
void launch_additive_attention_fwd(const AttentionProblem<S>& p, S* context, gpu::Arithmetic<S>* lse,
                                   gpu::Arithmetic<S>* scores, S* weights, gpu::Arithmetic<S>* workspace,
                                   cudaStream_t stream) {
  using T = gpu::Arithmetic<S>;
  const int64_t tiles = p.query_tiles(), blocks = p.heads() * tiles;
  if (blocks == 0) return;
  T* sums = workspace;
  if constexpr (sizeof(S) == sizeof(T)) sums = context;
  FUSEDATTN_LAUNCH(additive_attention_fwd_kernel<S>, static_cast<unsigned>(blocks), ATTENTION_BLOCK,
                   ForwardMemory<T>::SIZE * sizeof(T), stream, p, AttentionOutputs<S>{context, lse, scores, sums},
                   tiles);
  if (weights != nullptr) launch_additive_attention_weights(p, scores, lse, weights, stream);
}

}  // namespace fusedattn
