// Additive attention forward for few queries (Tq <= 16) and many keys: decode steps, pooling.
//
// The keys of a head are split over blocks, some 500 in all, so that a single query fills the GPU; each block
// leaves an unnormalised context, a maximum and a sum per query, which a second kernel merges. The cut depends on
// the shape alone. A warp scores a key at a time, its lanes over the channels in packs of 4, so keys and values
// are read once, in order; exp(2q) of all queries stays in shared memory. Bound by memory for one query; with 16
// it is the score loop: about 3.5 slots of arithmetic per tanh, a 16-byte shared load per 4 and a warp's sum per
// key and query.
#pragma once

#include "cuda_problem.cuh"

namespace fusedattn {

constexpr int SPLIT_QUERIES = 16, SPLIT_KEYS = 64;  // most queries; keys that a block scores before it sums values
constexpr int64_t SPLIT_BLOCKS = 528;               // blocks worth having: 4 on each of 132 multiprocessors
constexpr int SPLIT_CHANNELS = gpu::WARP * PACK;    // that a warp takes at once

// Keys of a split: whole tiles, so that all heads together give SPLIT_BLOCKS blocks where there are enough keys.
inline int64_t keys_of_split(int64_t heads, int64_t Tk) {
  const int64_t tiles = gpu::ceil_div(Tk, SPLIT_KEYS), wanted = gpu::ceil_div(SPLIT_BLOCKS, heads);
  return Tk == 0 ? 0 : gpu::ceil_div(tiles, wanted < tiles ? wanted : tiles) * SPLIT_KEYS;
}

// How keys are split; no splits where the path does not apply.
template <typename S>
struct SplitPlan {
  using T = gpu::Arithmetic<S>;
  int64_t splits = 0, keys = 0;  // keys of a split
  int64_t channels = 0;          // D up to whole steps of a warp
  size_t shared = 0;             // bytes

  explicit SplitPlan(const AttentionProblem<S>& p) {
    channels = gpu::ceil_div(p.D, SPLIT_CHANNELS) * SPLIT_CHANNELS;
    shared = sizeof(T) * ((p.Tq + 1) * channels + p.Tq * (SPLIT_KEYS + 3) + ATTENTION_BLOCK / gpu::WARP);
    if (p.Tq > SPLIT_QUERIES || p.Tq == 0 || p.heads() == 0 || shared > gpu::SHARED_MOST) return;
    keys = keys_of_split(p.heads(), p.Tk);
    splits = keys == 0 ? 1 : gpu::ceil_div(p.Tk, keys);
  }
  int64_t size(const AttentionProblem<S>& p) const { return p.heads() * splits * p.Tq * (p.Dv + 2); }
};

// (B H, splits, Tq) each, sums with Dv columns.
template <typename T>
struct SplitParts {
  T *sums, *row_max, *row_sum;
};

// sum += w / t over four channels.
template <typename T>
FUSEDATTN_DEVICE void add_quotients(const gpu::Pack<T, PACK>& w, const T (&t)[PACK], T& sum) {
#pragma unroll
  for (int e = 0; e < PACK; e += 2) {
    const auto both = sum_of_quotients(w.element[e], t[e], w.element[e + 1], t[e + 1]);
    sum = gpu::fma(both.numerator, gpu::rcp_approx(both.denominator), sum);
  }
}

// sums[i] over the lane's channels of key j: of w r, or of w tanh where the weights are not finite.
template <int QUERIES, typename S, typename T>
FUSEDATTN_DEVICE void score_key(const AttentionProblem<S>& p, const Head& at, bool finite, T q_bound, const T* q,
                                const T* w, int64_t channels, int64_t j, T (&sums)[QUERIES]) {
  const int lane = threadIdx.x % gpu::WARP;
  const S* row = p.key.row(at.b, at.h, j);
#pragma unroll
  for (int i = 0; i < QUERIES; ++i) sums[i] = 0;
  for (int64_t d = lane * PACK; d < channels; d += SPLIT_CHANNELS) {
    const auto keys = load_channels(row, p.key.packed, d, p.D);
    const auto weights = gpu::load_pack<PACK>(w + d);
    T k[PACK], bound = 0;
#pragma unroll
    for (int e = 0; e < PACK; ++e) {
      k[e] = gpu::to_arithmetic(keys.element[e]);
      bound = gpu::max(bound, gpu::abs(k[e]));
    }
    if (finite && !__any_sync(gpu::ALL_LANES, !(bound + q_bound <= ScoreRange<T>::PAIR))) {
#pragma unroll
      for (int e = 0; e < PACK; ++e) k[e] = exp_of_twice(k[e]);
#pragma unroll
      for (int i = 0; i < QUERIES; ++i) {
        if (i >= p.Tq) break;
        const auto query = gpu::load_pack<PACK>(q + i * channels + d);
        T t[PACK];
#pragma unroll
        for (int e = 0; e < PACK; ++e) t[e] = gpu::fma(query.element[e], k[e], T(1));
        add_quotients(weights, t, sums[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < QUERIES; ++i) {
        if (i >= p.Tq) break;
        const auto query = load_channels(p.query.row(at.b, at.h, i), p.query.packed, d, p.D);
#pragma unroll
        for (int e = 0; e < PACK; ++e) {
          const T r = reciprocal_of_sum(gpu::to_arithmetic(query.element[e]) + k[e]);
          sums[i] = gpu::fma(weights.element[e], finite ? r : 1 - 2 * r, sums[i]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < QUERIES; ++i)
    if (i < p.Tq) sums[i] = gpu::warp_sum(sums[i]);
}

template <typename S, int QUERIES>
__global__ void __launch_bounds__(ATTENTION_BLOCK, 2)
    additive_attention_fwd_kernel_split(const AttentionProblem<S> p, const SplitPlan<S> plan,
                                        const SplitParts<gpu::Arithmetic<S>> parts, gpu::Arithmetic<S>* scores) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const int Tq = static_cast<int>(p.Tq), lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  constexpr int WARPS = ATTENTION_BLOCK / gpu::WARP;
  T *const q = shared, *const w = q + Tq * plan.channels;  // [i][d], [d]
  T* const weights = w + plan.channels;                    // [i][key]: sums, then p
  T *const row_max = weights + Tq * SPLIT_KEYS, *const row_sum = row_max + Tq, *const row_scale = row_sum + Tq;
  T* const reduce = row_scale + Tq;
  const Head at(p, blockIdx.x / plan.splits);
  const int64_t split = blockIdx.x % plan.splits, begin = split * plan.keys;
  const int64_t end = lower(begin + plan.keys, p.Tk), visible = p.keys_end(at.b, 0);

  const WeightScale<T> weight(p, at, reduce);
  T q_bound = 0;
  for (int64_t n = threadIdx.x; n < Tq * plan.channels; n += ATTENTION_BLOCK) {
    const int64_t i = n / plan.channels, d = n % plan.channels;
    const T x = d < p.D ? gpu::to_arithmetic(p.query.row(at.b, at.h, i)[d]) : T(0);
    q_bound = gpu::max(q_bound, gpu::abs(x));
    q[n] = exp_of_twice(x);
  }
  for (int64_t d = threadIdx.x; d < plan.channels; d += ATTENTION_BLOCK)
    w[d] = d < p.D ? gpu::to_arithmetic(p.weight[at.h * p.weight_stride_h + d]) / weight.top : T(0);
  if (static_cast<int>(threadIdx.x) < Tq) {
    row_max[threadIdx.x] = -INFINITE<T>;
    row_sum[threadIdx.x] = 0;
  }
  q_bound = block_reduce(q_bound, reduce, [](T a, T b) { return gpu::max(a, b); });

  T* const sums = parts.sums + (at.n * plan.splits + split) * Tq * p.Dv;
  for (int64_t v = threadIdx.x; v < Tq * p.Dv; v += ATTENTION_BLOCK) sums[v] = 0;
  for (int64_t j0 = begin; j0 < end; j0 += SPLIT_KEYS) {
    const int keys = static_cast<int>(lower(SPLIT_KEYS, end - j0));
    const int scored = static_cast<int>(lower(keys, visible - j0 < 0 ? 0 : visible - j0));
    for (int key = warp; key < scored; key += WARPS) {
      T key_sums[QUERIES];
      score_key<QUERIES>(p, at, weight.finite, q_bound, q, w, plan.channels, j0 + key, key_sums);
#pragma unroll
      for (int i = 0; i < QUERIES; ++i)
        if (i < Tq && lane == 0) weights[i * SPLIT_KEYS + key] = key_sums[i];
    }
    __syncthreads();
    for (int i = warp; i < Tq; i += WARPS) {
      T score[SPLIT_KEYS / gpu::WARP], top = row_max[i];
      const T before = top;
#pragma unroll
      for (int n = 0; n < SPLIT_KEYS / gpu::WARP; ++n) {
        const int key = lane + n * gpu::WARP;
        score[n] = key < scored ? finished_score(p, at, weight, i, j0 + key, weights[i * SPLIT_KEYS + key])
                                : -INFINITE<T>;
        if (scores != nullptr && key < keys) scores[(at.n * Tq + i) * p.Tk + j0 + key] = score[n];
        top = gpu::max(top, score[n]);
      }
      top = gpu::warp_max(top);
      const T origin = top == -INFINITE<T> ? T(0) : top;
      T sum = 0;
#pragma unroll
      for (int n = 0; n < SPLIT_KEYS / gpu::WARP; ++n) {
        const T e = gpu::exp_approx(score[n] - origin);
        weights[i * SPLIT_KEYS + lane + n * gpu::WARP] = e;
        sum += score[n] == INFINITE<T> ? T(1) : e;  // the context is NaN, the log-sum-exp inf
      }
      sum = gpu::warp_sum(sum);
      __syncwarp();
      if (lane == 0) {
        const T scale = before == top ? T(1) : gpu::exp_approx(before - origin);
        row_max[i] = top;
        row_scale[i] = scale;
        row_sum[i] = gpu::fma(row_sum[i], scale, sum);
      }
    }
    __syncthreads();
    for (int64_t v = threadIdx.x; v < p.Dv; v += ATTENTION_BLOCK) {
      T acc[QUERIES] = {};
#pragma unroll(QUERIES == 1 ? 8 : 2)
      for (int key = 0; key < scored; ++key) {
        const T x = gpu::to_arithmetic(p.value.row(at.b, at.h, j0 + key)[v]);
#pragma unroll
        for (int i = 0; i < QUERIES; ++i)
          if (i < Tq) acc[i] = gpu::fma(weights[i * SPLIT_KEYS + key], x, acc[i]);
      }
#pragma unroll
      for (int i = 0; i < QUERIES; ++i)
        if (i < Tq) sums[i * p.Dv + v] = gpu::fma(j0 == begin ? T(0) : sums[i * p.Dv + v], row_scale[i], acc[i]);
    }
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < Tq) {
    const int64_t row = (at.n * plan.splits + split) * Tq + threadIdx.x;
    parts.row_max[row] = row_max[threadIdx.x];
    parts.row_sum[row] = row_sum[threadIdx.x];
  }
}

// Context of 32 columns of a row, and its log-sum-exp: the warps of a block share the splits, in a fixed order.
template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK)
    additive_attention_fwd_kernel_merge(const SplitParts<gpu::Arithmetic<S>> parts, int64_t splits, int64_t Tq,
                                        int64_t Dv, int64_t column_tiles, S* context, gpu::Arithmetic<S>* lse) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  constexpr int WARPS = ATTENTION_BLOCK / gpu::WARP;
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  const int64_t row = blockIdx.x / column_tiles, v = blockIdx.x % column_tiles * gpu::WARP + lane;
  const int64_t first = row / Tq * splits * Tq + row % Tq;  // of the row's parts; the next one Tq further
  T top = -INFINITE<T>;
  for (int64_t split = threadIdx.x; split < splits; split += ATTENTION_BLOCK)
    top = gpu::max(top, parts.row_max[first + split * Tq]);
  top = block_reduce(top, shared, [](T a, T b) { return gpu::max(a, b); });
  const T origin = top == -INFINITE<T> ? T(0) : top;
  T total = 0, sum = 0;
#pragma unroll 4
  for (int64_t split = warp; split < splits; split += WARPS) {
    const int64_t part = first + split * Tq;
    const T scale = parts.row_max[part] == top ? T(1) : gpu::exp_approx(parts.row_max[part] - origin);
    total = gpu::fma(parts.row_sum[part], scale, total);
    if (v < Dv) sum = gpu::fma(parts.sums[part * Dv + v], scale, sum);
  }
  __syncthreads();
  shared[threadIdx.x] = sum;
  shared[ATTENTION_BLOCK + threadIdx.x] = total;
  __syncthreads();
  if (warp != 0) return;
  for (int other = 1; other < WARPS; ++other) {
    sum += shared[other * gpu::WARP + lane];
    total += shared[ATTENTION_BLOCK + other * gpu::WARP + lane];
  }
  if (v < Dv) context[row * Dv + v] = gpu::to_storage<S>(sum * normaliser(top, total));
  if (blockIdx.x % column_tiles == 0 && lane == 0) lse[row] = log_sum_exp(top, total);
}

// parts: plan.size(p) elements.
template <typename S>
void launch_additive_attention_split(const AttentionProblem<S>& p, const SplitPlan<S>& plan, S* context,
                                     gpu::Arithmetic<S>* lse, gpu::Arithmetic<S>* scores,
                                     gpu::Arithmetic<S>* workspace, cudaStream_t stream) {
  using T = gpu::Arithmetic<S>;
  const int64_t rows = p.heads() * plan.splits * p.Tq;
  const SplitParts<T> parts{workspace, workspace + rows * p.Dv, workspace + rows * (p.Dv + 1)};
  const unsigned blocks = static_cast<unsigned>(p.heads() * plan.splits);
  if (p.Tq == 1)
    FUSEDATTN_LAUNCH((additive_attention_fwd_kernel_split<S, 1>), blocks, ATTENTION_BLOCK, plan.shared, stream, p,
                     plan, parts, scores);
  else
    FUSEDATTN_LAUNCH((additive_attention_fwd_kernel_split<S, SPLIT_QUERIES>), blocks, ATTENTION_BLOCK, plan.shared,
                     stream, p, plan, parts, scores);
  const int64_t tiles = p.Dv == 0 ? 1 : gpu::ceil_div(p.Dv, gpu::WARP);
  FUSEDATTN_LAUNCH(additive_attention_fwd_kernel_merge<S>, static_cast<unsigned>(p.heads() * p.Tq * tiles),
                   ATTENTION_BLOCK, 2 * ATTENTION_BLOCK * sizeof(T), stream, parts, plan.splits, p.Tq, p.Dv, tiles,
                   context, lse);
}

}  // namespace fusedattn
