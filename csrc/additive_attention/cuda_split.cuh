// Additive attention forward for few queries (Tq <= 16) and many keys: decode steps, pooling.
//
// The keys of a head are split over blocks, some 660 in all, so that a single query fills the GPU; each block
// leaves an unnormalised context, a maximum and a sum per query, which a second kernel merges. The cut depends on
// the shape alone. A warp scores several keys at a time, its lanes over the channels in packs of 4, so keys and
// values are read once, in order; exp(2q) of all queries stays in shared memory. Bound by memory for one query,
// where four keys are on their way at once (a multiprocessor has to wait for some 20 KiB at a time); with 16 it is
// the score loop, 4.4 to 4.5 slots per tanh on sm_90:
//
//   3.5    as in every tile (cuda_problem.cuh)
//   0.5    exp(2k), 8 slots of which 16 queries share
//   0.13   a 16-byte shared load for 4 channels of a query: with one key at a time it would be twice that, and
//          shared memory, which gives a warp 16 bytes a lane in 4 clocks, as slow as the arithmetic
//   0.11   whether there are queries left, asked before every second one
//   0.2    the rest of a step: keys, their conversion and range, addresses
#pragma once

#include "cuda_bias.cuh"
#include "cuda_problem.cuh"

namespace fusedattn {

constexpr int SPLIT_QUERIES = 16, SPLIT_KEYS = 64;  // most queries; keys that a block scores before it sums values
constexpr int SPLIT_LEAST = 16;                     // least keys of a block: a step of each of its warps
constexpr int64_t SPLIT_BLOCKS = 660;               // blocks worth having: 5 on each of 132 multiprocessors
constexpr int SPLIT_CHANNELS = gpu::WARP * PACK;    // that a warp takes at once
constexpr int SPLIT_STEP = 2;                       // queries that are scored without a test between them
// That a warp scores at once. One query waits for memory: for four keys together. Two share the loads of 16
// queries; in double the arithmetic is slower than those, and the sums of a second key would leave registers for 2
// blocks instead of 3.
template <typename T, int QUERIES>
constexpr int KEYS_OF_WARP = QUERIES == 1     ? (sizeof(T) == 8 ? 2 : 4)
                             : sizeof(T) == 8 ? 1
                                              : 2;

// Keys of a split, so that all heads together give SPLIT_BLOCKS blocks where there are enough keys: whole tiles,
// or where those were too few, a part of one.
inline int64_t keys_of_split(int64_t heads, int64_t Tk) {
  const int64_t keys = gpu::ceil_div(Tk, gpu::ceil_div(SPLIT_BLOCKS, heads));
  const int64_t unit = keys < SPLIT_KEYS ? SPLIT_LEAST : SPLIT_KEYS;
  return gpu::ceil_div(keys, unit) * unit;
}

// How keys are split; no splits where the path does not apply.
template <typename S>
struct SplitPlan {
  using T = gpu::Arithmetic<S>;
  int64_t splits = 0, keys = 0;  // keys of a split
  int64_t channels = 0;          // D up to whole steps of a warp
  int64_t queries = 0;           // Tq up to whole steps; the added ones are zero
  size_t shared = 0;             // bytes

  explicit SplitPlan(const AttentionProblem<S>& p) {
    channels = gpu::ceil_div(p.D, SPLIT_CHANNELS) * SPLIT_CHANNELS;
    queries = p.Tq == 1 ? 1 : gpu::ceil_div(p.Tq, SPLIT_STEP) * SPLIT_STEP;
    shared = sizeof(T) * ((queries + 1) * channels + p.Tq * (SPLIT_KEYS + 3) + ATTENTION_BLOCK / gpu::WARP);
    if (p.Tq > SPLIT_QUERIES || p.Tq == 0 || p.heads() == 0 || shared > gpu::shared_most()) return;
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

// sums[key QUERIES + i] over the lane's channels: of w r, or of w phi where the weights are not finite, or phi is
// linear on either side of zero.
// rows: of the keys, at the lane's first channel
// step: w and then exp(2q) of each query, SPLIT_CHANNELS of them; those of the next channels lie `stride` further
// k_limit: largest |k| at which pairs may share a reciprocal; negative where the weights are not finite
template <typename Phi, int KEYS, int QUERIES, typename S, typename T>
FUSEDATTN_DEVICE void score_keys(const AttentionProblem<S>& p, const Head& at, bool finite, T k_limit,
                                 const S* (&rows)[KEYS], const T* step, int stride, T (&sums)[KEYS * QUERIES]) {
  const int Tq = static_cast<int>(p.Tq);
  const unsigned D = static_cast<unsigned>(p.D), first = threadIdx.x % gpu::WARP * PACK;
  const unsigned whole = p.key.packed && D >= PACK ? D - PACK + 1 : 0;  // packs that start before it are
  step += first;
#pragma unroll
  for (int n = 0; n < KEYS * QUERIES; ++n) sums[n] = 0;
#pragma unroll 1
  for (unsigned d = first; d < D + first; d += SPLIT_CHANNELS, step += stride) {
    T k[KEYS][PACK];
    const auto convert = [&](int key, const gpu::Pack<S, PACK>& keys) {
#pragma unroll
      for (int e = 0; e < PACK; ++e) k[key][e] = gpu::to_arithmetic(keys.element[e]);
    };
    if (d < whole) {
#pragma unroll
      for (int key = 0; key < KEYS; ++key) convert(key, gpu::load_pack<PACK>(rows[key]));
    } else {
#pragma unroll
      for (int key = 0; key < KEYS; ++key) convert(key, load_channels(rows[key], false, 0, p.D - d));
    }
    T bound = gpu::abs(k[0][0]);
#pragma unroll
    for (int key = 0; key < KEYS; ++key) {
      rows[key] += SPLIT_CHANNELS;
#pragma unroll
      for (int e = 0; e < PACK; ++e) bound = gpu::max(bound, gpu::abs(k[key][e]));
    }
    const auto weights = gpu::load_pack<PACK>(step);
    if constexpr (!TAKES_EXPONENTIALS<Phi>) {
      const auto add = [&](auto leaky) {
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
          if (i > 0 && i % SPLIT_STEP == 0 && i >= Tq) break;
          const auto query = gpu::load_pack<PACK>(step + (i + 1) * SPLIT_CHANNELS);
#pragma unroll
          for (int key = 0; key < KEYS; ++key)
#pragma unroll
            for (int e = 0; e < PACK; ++e)
              add_linear<leaky.value>(weights.element[e], p.by.negative_slope * weights.element[e],
                                      query.element[e] + k[key][e], sums[key * QUERIES + i]);
        }
      };
      if (p.options.activation == ScoreActivation::LEAKY_RELU)
        add(std::true_type{});
      else
        add(std::false_type{});
    } else if (!__any_sync(gpu::ALL_LANES, !(bound <= k_limit))) {
#pragma unroll
      for (int key = 0; key < KEYS; ++key)
#pragma unroll
        for (int e = 0; e < PACK; ++e) k[key][e] = exponential(k[key][e], p.by);
#pragma unroll
      for (int i = 0; i < QUERIES; ++i) {
        if (i > 0 && i % SPLIT_STEP == 0 && i >= Tq) break;
        const auto query = gpu::load_pack<PACK>(step + (i + 1) * SPLIT_CHANNELS);
#pragma unroll
        for (int key = 0; key < KEYS; ++key) {
          T t[PACK];
#pragma unroll
          for (int e = 0; e < PACK; ++e) t[e] = gpu::fma(query.element[e], k[key][e], T(1));
          add_quotients(weights, t, sums[key * QUERIES + i]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < QUERIES; ++i) {
        if (i >= Tq) break;
        const auto query = load_channels(p.query.row(at.b, at.h, i), p.query.packed, d, p.D);
#pragma unroll
        for (int key = 0; key < KEYS; ++key)
#pragma unroll
          for (int e = 0; e < PACK; ++e) {
            const T r = reciprocal_of_sum(p.by.argument * (gpu::to_arithmetic(query.element[e]) + k[key][e]));
            sums[key * QUERIES + i] =
                gpu::fma(weights.element[e], finite ? r : 1 + p.by.sum * r, sums[key * QUERIES + i]);
          }
      }
    }
  }
}

// Sums of N values over each LANES lanes: the first LANES / N lanes get that of x[0], the next ones that of x[1].
// Of two partners each adds up one half of the values only, so that N sums cost about N exchanges, not 5 N.
template <int LANES, int N, typename T>
FUSEDATTN_DEVICE T lane_sums(const T (&x)[N]) {
  constexpr int STEP = LANES / 2;
  if constexpr (LANES == 1) {
    return x[0];
  } else if constexpr (N == 1) {
    const T sum[1] = {x[0] + __shfl_xor_sync(gpu::ALL_LANES, x[0], STEP)};
    return lane_sums<STEP>(sum);
  } else {
    const bool upper = threadIdx.x & STEP;
    T sums[N / 2];
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      const T own = upper ? x[n + N / 2] : x[n], other = upper ? x[n] : x[n + N / 2];
      sums[n] = own + __shfl_xor_sync(gpu::ALL_LANES, other, STEP);
    }
    return lane_sums<STEP>(sums);
  }
}

// Of `keys` keys from j0 on those that some query sees, a bit each; asked by whole warps.
template <typename S>
FUSEDATTN_DEVICE uint64_t seen_in_split(const AttentionProblem<S>& p, const Head& at, int64_t j0, int keys) {
  static_assert(SPLIT_KEYS == 2 * gpu::WARP, "two ballots");
  const uint64_t existing = keys >= SPLIT_KEYS ? ~uint64_t{0} : (uint64_t{1} << keys) - 1;
  if (p.seen == nullptr) return existing;
  const int lane = threadIdx.x % gpu::WARP;
  uint64_t bits = 0;
  for (int first = gpu::WARP; first >= 0; first -= gpu::WARP)
    bits = bits << gpu::WARP |
           __ballot_sync(gpu::ALL_LANES, first + lane < keys && p.sees(at.b, at.h, j0 + first + lane));
  return bits;
}

template <typename S, typename Phi, int QUERIES>
__global__ void __launch_bounds__(ATTENTION_BLOCK, sizeof(S) == 8 ? 2
                                                   : QUERIES == 1 ? 5
                                                                  : 4)
    additive_attention_fwd_kernel_split(const AttentionProblem<S> p, const SplitPlan<S> plan,
                                        const SplitParts<gpu::Arithmetic<S>> parts, gpu::Arithmetic<S>* scores) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const int Tq = static_cast<int>(p.Tq), lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  constexpr int WARPS = ATTENTION_BLOCK / gpu::WARP, KEYS = KEYS_OF_WARP<T, QUERIES>, SUMS = KEYS * QUERIES;
  const int queries = static_cast<int>(plan.queries), stride = (queries + 1) * SPLIT_CHANNELS;
  T* const steps = shared;                                             // [step over channels][w, queries][channel]
  T* const weights = steps + plan.channels / SPLIT_CHANNELS * stride;  // [i][key]: sums, then p
  T *const row_max = weights + Tq * SPLIT_KEYS, *const row_sum = row_max + Tq, *const row_scale = row_sum + Tq;
  T* const reduce = row_scale + Tq;
  const Head at(p, blockIdx.x / plan.splits);
  const int64_t split = blockIdx.x % plan.splits, begin = split * plan.keys;
  const int64_t end = lower(begin + plan.keys, p.Tk);
  const KeyRange visible = p.keys_of_tile(at.b, at.h, 0);
  const int64_t first_key = lower(end, higher(begin, visible.first)), keys_end = lower(end, visible.end);

  const WeightScale<T> weight(p, at, reduce, Phi{});
  T q_bound = 0;
  T* to = steps + threadIdx.x;
  for (int64_t d = threadIdx.x; d < plan.channels; d += SPLIT_CHANNELS) {
    *to = d < p.D ? p.weight_of(at.h, d) / weight.top : T(0);
    to += SPLIT_CHANNELS;
    for (int i = 0; i < queries; ++i, to += SPLIT_CHANNELS) {
      const T x = i < Tq && d < p.D ? gpu::to_arithmetic(p.query.row(at.b, at.h, i)[d]) : T(0);
      q_bound = gpu::max(q_bound, gpu::abs(x));
      *to = TAKES_EXPONENTIALS<Phi> ? exponential(x, p.by) : x;
    }
  }
  if (static_cast<int>(threadIdx.x) < Tq) {
    row_max[threadIdx.x] = -INFINITE<T>;
    row_sum[threadIdx.x] = 0;
  }
  q_bound = block_reduce(q_bound, reduce, [](T a, T b) { return gpu::max(a, b); });
  const T k_limit = weight.finite ? p.by.range - q_bound : T(-1);

  if (scores != nullptr)
    for (int i = warp; i < Tq; i += WARPS) {
      T* const row = scores + (at.n * Tq + i) * p.Tk;
      for (int64_t j = begin + lane; j < first_key; j += gpu::WARP) row[j] = -INFINITE<T>;
      for (int64_t j = higher(first_key, keys_end) + lane; j < end; j += gpu::WARP) row[j] = -INFINITE<T>;
    }

  T* const sums = parts.sums + (at.n * plan.splits + split) * Tq * p.Dv;
  for (int64_t v = threadIdx.x; v < Tq * p.Dv; v += ATTENTION_BLOCK) sums[v] = 0;
  for (int64_t j0 = first_key; j0 < keys_end; j0 += SPLIT_KEYS) {
    const int scored = static_cast<int>(lower(SPLIT_KEYS, keys_end - j0));
    for (int key = warp * KEYS; key < scored; key += WARPS * KEYS) {
      int some = -1;  // that is seen
      unsigned seen = 0;
#pragma unroll
      for (int n = 0; n < KEYS; ++n)
        if (key + n < scored && p.sees(at.b, at.h, j0 + key + n)) some = n, seen |= 1u << n;
      if (some < 0) continue;
      const S* rows[KEYS];  // that of another key where one is not seen
#pragma unroll
      for (int n = 0; n < KEYS; ++n)
        rows[n] = p.key.row(at.b, at.h, j0 + key + (seen >> n & 1 ? n : some)) + lane * PACK;
      T key_sums[SUMS];
      score_keys<Phi, KEYS, QUERIES>(p, at, weight.finite, k_limit, rows, steps, stride, key_sums);
      const T sum = lane_sums<gpu::WARP>(key_sums);
      const int n = lane / (gpu::WARP / SUMS), own = key + n / QUERIES, i = n % QUERIES;
      if (lane % (gpu::WARP / SUMS) == 0 && own < scored && i < Tq) weights[i * SPLIT_KEYS + own] = sum;
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
        if (scores != nullptr && key < scored) scores[(at.n * Tq + i) * p.Tk + j0 + key] = score[n];
        top = gpu::max(top, score[n]);
      }
      if (p.has_bias()) {  // a pass of its own takes no registers from calls without
        top = before;
#pragma unroll
        for (int n = 0; n < SPLIT_KEYS / gpu::WARP; ++n) {
          score[n] = with_bias(p, here(at), i, j0 + lane + n * gpu::WARP, score[n]);
          top = gpu::max(top, score[n]);
        }
      }
      top = gpu::warp_max(top);
      const T origin = top == -INFINITE<T> ? T(0) : top;
      T sum = 0;
#pragma unroll
      for (int n = 0; n < SPLIT_KEYS / gpu::WARP; ++n) {
        const int key = lane + n * gpu::WARP;
        const T e = gpu::exp_approx(score[n] - origin);
        weights[i * SPLIT_KEYS + key] = p.drops() ? dropped(p, at, i, j0 + key, e) : e;
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
    const uint64_t seen_keys = seen_in_split(p, at, j0, scored);
    for (int64_t v = threadIdx.x; v < p.Dv; v += ATTENTION_BLOCK) {
      T acc[QUERIES] = {};
      uint64_t seen = seen_keys;
      const S* value = p.value.row(at.b, at.h, j0) + v;
#pragma unroll(QUERIES == 1 ? 2 : 1)
      for (int key = 0; key < scored; key += PACK, seen >>= PACK, value += PACK * p.value.stride_t) {
        T x[PACK];
#pragma unroll
        for (int e = 0; e < PACK; ++e)
          x[e] = seen & 1 << e ? gpu::to_arithmetic(value[e * p.value.stride_t]) : T(0);
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
          if (i >= Tq) break;
          const auto own = gpu::load_pack<PACK>(weights + i * SPLIT_KEYS + key);  // 0 from `scored` on
#pragma unroll
          for (int e = 0; e < PACK; ++e) acc[i] = gpu::fma(own.element[e], x[e], acc[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < QUERIES; ++i)
        if (i < Tq)
          sums[i * p.Dv + v] = gpu::fma(j0 == first_key ? T(0) : sums[i * p.Dv + v], row_scale[i], acc[i]);
    }
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < Tq) {
    const int64_t row = (at.n * plan.splits + split) * Tq + threadIdx.x;
    parts.row_max[row] = row_max[threadIdx.x];
    parts.row_sum[row] = row_sum[threadIdx.x];
  }
}

static_assert(ATTENTION_BLOCK == SPLIT_CHANNELS, "a thread keeps one channel of every step of a warp");

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
  T* const scales = shared + ATTENTION_BLOCK / gpu::WARP;
  T top = -INFINITE<T>;
  for (int64_t split = threadIdx.x; split < splits; split += ATTENTION_BLOCK)
    top = gpu::max(top, parts.row_max[first + split * Tq]);
  top = block_reduce(top, shared, [](T a, T b) { return gpu::max(a, b); });
  const T origin = top == -INFINITE<T> ? T(0) : top;
  T total = 0, sum = 0;
  for (int64_t begin = 0; begin < splits; begin += ATTENTION_BLOCK) {
    const int64_t own = begin + threadIdx.x;
    T scale = 0;
    if (own < splits) {
      const T row_max = parts.row_max[first + own * Tq];
      scale = row_max == top ? T(1) : gpu::exp_approx(row_max - origin);
      total = gpu::fma(parts.row_sum[first + own * Tq], scale, total);
    }
    __syncthreads();
    scales[threadIdx.x] = scale;
    __syncthreads();
    const int here = static_cast<int>(lower(ATTENTION_BLOCK, splits - begin));
    const T* const sums = parts.sums + (first + begin * Tq) * Dv + v;
#pragma unroll 8
    for (int split = warp; split < here; split += WARPS)
      if (v < Dv) sum = gpu::fma(sums[split * Tq * Dv], scales[split], sum);
  }
  total = block_reduce(total, shared, [](T a, T b) { return a + b; });
  __syncthreads();
  scales[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int other = 1; other < WARPS; ++other) sum += scales[other * gpu::WARP + lane];
  if (v < Dv) context[row * Dv + v] = gpu::to_storage<S>(sum * normaliser(top, total));
  if (blockIdx.x % column_tiles == 0 && lane == 0) lse[row] = log_sum_exp(top, total);
}

// Compiled for Phi as launch_tiles of cuda_fwd.cuh is.
template <typename Phi, typename S>
void launch_split_scores(const AttentionProblem<S>& p, const SplitPlan<S>& plan,
                         const SplitParts<gpu::Arithmetic<S>>& parts, gpu::Arithmetic<S>* scores,
                         cudaStream_t stream) {
  const int64_t blocks = p.heads() * plan.splits;
  if (p.Tq == 1)
    FUSEDATTN_LAUNCH((additive_attention_fwd_kernel_split<S, Phi, 1>), blocks, ATTENTION_BLOCK, plan.shared,
                     stream, p, plan, parts, scores);
  else
    FUSEDATTN_LAUNCH((additive_attention_fwd_kernel_split<S, Phi, SPLIT_QUERIES>), blocks, ATTENTION_BLOCK,
                     plan.shared, stream, p, plan, parts, scores);
}

// parts: plan.size(p) elements.
template <typename S>
void launch_additive_attention_split(const AttentionProblem<S>& p, const SplitPlan<S>& plan, S* context,
                                     gpu::Arithmetic<S>* lse, gpu::Arithmetic<S>* scores,
                                     gpu::Arithmetic<S>* workspace, cudaStream_t stream) {
  using T = gpu::Arithmetic<S>;
  const int64_t rows = p.heads() * plan.splits * p.Tq;
  const SplitParts<T> parts{workspace, workspace + rows * p.Dv, workspace + rows * (p.Dv + 1)};
  with_phi(p.options.activation,
           [&](auto phi) { launch_split_scores<decltype(phi)>(p, plan, parts, scores, stream); });
  const int64_t tiles = p.Dv == 0 ? 1 : gpu::ceil_div(p.Dv, gpu::WARP);
  FUSEDATTN_LAUNCH(additive_attention_fwd_kernel_merge<S>, p.heads() * p.Tq * tiles, ATTENTION_BLOCK,
                   (ATTENTION_BLOCK + ATTENTION_BLOCK / gpu::WARP) * sizeof(T), stream, parts, plan.splits, p.Tq,
                   p.Dv, tiles, context, lse);
}

}  // namespace fusedattn
