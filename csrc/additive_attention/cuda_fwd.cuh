// Additive attention forward: scores, masks, online softmax and context in one kernel.
//
// A block owns BLOCK_Q queries of a head and walks the keys BLOCK_K at a time (cuda_problem.cuh): scores in
// registers, weights p = exp(score - row maximum) to shared memory, then p . x, 64 columns of x at a time. The
// context is summed in global memory, each element always by one thread: 64 x Dv sums would take the registers
// that the score loop lives from, and reading and writing them once per tile moves 8 Dv bytes for 64 D tanh of a
// row, out of the L2 cache. So Dv has no limit. With a single tile of keys (Tk <= 64) the sums never leave the
// registers.
//
// p . x runs on tensor cores in half precision, and for float32 where PyTorch's setting allows TF32; else on fused
// multiply-adds, so in bfloat16 on GPUs whose tensor cores do not have it. Backward's products stay in float32, a
// small part of its work: TF32 reaches gradients through the context alone.
#pragma once

#include "cuda_bias.cuh"
#include "cuda_problem.cuh"
#include "cuda_seen.cuh"
#include "cuda_split.cuh"

namespace fusedattn {

// Blocks on a multiprocessor that registers must leave room for: 3 leaves 168 a thread, which from sm_100 on
// spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
template <typename S>
constexpr int FORWARD_OCCUPANCY = sizeof(S) < 8 ? 3 : 2;
#else
template <typename S>
constexpr int FORWARD_OCCUPANCY = 2;
#endif

// All contiguous. Weights and scores may be null; weights need scores.
template <typename S>
struct AttentionOutputs {
  using T = gpu::Arithmetic<S>;
  S* context;  // (B, H, Tq, Dv)
  T* lse;      // (B, H, Tq)
  T* scores;   // (B, H, Tq, Tk)
  T* sums;     // like context; may be context itself
};

// The product of p and x, 64 queries x 64 columns, as a block computes it: 32 sums a thread. Element is the type
// of p and x in shared memory, LEADING_P and LEADING_X the lengths of their rows, KEYS how many of x lie there at
// once.
//
// On fused multiply-adds, in the arithmetic type: p lies as [key][query], and a thread has the rows and columns of
// its scores.
template <typename S, bool tensor_cores>
struct ContextProduct {
  using Element = gpu::Arithmetic<S>;
  static constexpr int LEADING_P = LEADING, LEADING_X = LEADING,
                       KEYS = sizeof(Element) == 8 ? BLOCK_K / 2 : BLOCK_K;

  static FUSEDATTN_DEVICE void store_p(const Element (&p)[TILE_Q][TILE_K], Element* to) {
    store_transposed(p, to + tile_column() * LEADING_P + tile_row(), LEADING_P);
  }
  // With the keys of p from `key` on, `depth` of them.
  static FUSEDATTN_DEVICE void multiply(const Element* p, int key, const Element* x, int depth,
                                        Element (&acc)[TILE_Q][TILE_K]) {
    multiply_tile(p + key * LEADING_P, x, depth, acc);
  }
  static FUSEDATTN_DEVICE int row(int n, int) { return tile_row() + n; }
  static FUSEDATTN_DEVICE int column(int, int e) { return tile_column() + e; }
};

// On tensor cores: p lies as [query][key], a warp multiplies the 16 rows that it scored with 8 columns at a time.
// Of a fragment a lane has row `group` and columns from `first` on (of p), and the transposed of x.
template <typename E, int leading_p, int leading_x>
struct TensorCoreProduct {
  using Element = E;
  static constexpr int LEADING_P = leading_p, LEADING_X = leading_x, KEYS = BLOCK_K;

  static FUSEDATTN_DEVICE void store_p(const float (&p)[TILE_Q][TILE_K], Element* to) {
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i) {
      gpu::Pack<Element, TILE_K> pack;
#pragma unroll
      for (int j = 0; j < TILE_K; ++j) pack.element[j] = gpu::to_storage<Element>(p[i][j]);
      gpu::store_pack(to + (tile_row() + i) * LEADING_P + tile_column(), pack);
    }
  }
  static FUSEDATTN_DEVICE int group() { return static_cast<int>(threadIdx.x) % gpu::WARP / 4; }
  static FUSEDATTN_DEVICE int first_row() { return static_cast<int>(threadIdx.x) / gpu::WARP * 16 + group(); }
  static FUSEDATTN_DEVICE int row(int, int e) { return first_row() + e / 2 * 8; }
  static FUSEDATTN_DEVICE int column(int n, int e) {
    return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2;
  }
};

// In half precision. Rows of 36 words: the 8 rows and 4 columns of a fragment of p lie in 32 banks.
template <typename S>
struct HalfProduct : TensorCoreProduct<S, 72, 72> {
  using Base = TensorCoreProduct<S, 72, 72>;

  static FUSEDATTN_DEVICE uint32_t pair(S low, S high) {
    uint32_t bits;
    const S both[2] = {low, high};
    memcpy(&bits, both, sizeof(bits));
    return bits;
  }
  static FUSEDATTN_DEVICE void multiply(const S* p, int, const S* x, int depth, float (&acc)[TILE_Q][TILE_K]) {
    constexpr int P = Base::LEADING_P, X = Base::LEADING_X;
    const int pairs = threadIdx.x % 4 * 2;
    p += Base::first_row() * P + pairs;
    x += pairs * X + Base::group();
#pragma unroll 1
    for (int key = 0; key < depth; key += 16, p += 16, x += 16 * X) {
      const uint32_t a[4] = {pair(p[0], p[1]), pair(p[8 * P], p[8 * P + 1]), pair(p[8], p[9]),
                             pair(p[8 * P + 8], p[8 * P + 9])};
#pragma unroll
      for (int n = 0; n < TILE_Q; ++n) {
        const S* column = x + 8 * n;
        const uint32_t b[2] = {pair(column[0], column[X]), pair(column[8 * X], column[9 * X])};
        gpu::mma_16x8x16<S>(acc[n], a, b);
      }
    }
  }
};
template <>
struct ContextProduct<__half, true> : HalfProduct<__half> {};
template <>
struct ContextProduct<__nv_bfloat16, true> : HalfProduct<__nv_bfloat16> {};

// Of float32 where PyTorch's setting allows TF32: p and x keep 10 bits of their mantissas, sums are float32. The
// 32 lanes of a fragment meet every bank once: rows of p start 4 banks apart, rows of x 8.
template <>
struct ContextProduct<float, true> : TensorCoreProduct<gpu::Tf32, 68, 72> {
  static FUSEDATTN_DEVICE void multiply(const gpu::Tf32* p, int, const gpu::Tf32* x, int depth,
                                        float (&acc)[TILE_Q][TILE_K]) {
    constexpr int P = LEADING_P, X = LEADING_X;
    const int first = threadIdx.x % 4;
    p += first_row() * P + first;
    x += first * X + group();
#pragma unroll 1
    for (int key = 0; key < depth; key += 8, p += 8, x += 8 * X) {
      const uint32_t a[4] = {p[0].bits, p[8 * P].bits, p[4].bits, p[8 * P + 4].bits};
#pragma unroll
      for (int n = 0; n < TILE_Q; ++n) {
        const uint32_t b[2] = {x[8 * n].bits, x[4 * X + 8 * n].bits};
        gpu::mma_16x8x8_tf32(acc[n], a, b);
      }
    }
  }
};

// Shared memory of the kernel; x takes the place of the staged channels.
template <typename S, bool tensor_cores>
struct ForwardMemory {
  using T = gpu::Arithmetic<S>;
  using Product = ContextProduct<S, tensor_cores>;
  using Element = typename Product::Element;
  static constexpr int64_t P = BLOCK_Q * Product::LEADING_P * sizeof(Element) / sizeof(T);
  static constexpr int64_t X = Product::KEYS * Product::LEADING_X * sizeof(Element) / sizeof(T);
  static constexpr int64_t STAGE = ScoreMemory<T>::SIZE > X ? ScoreMemory<T>::SIZE : X;
  static constexpr int64_t SIZE = STAGE + P + 4 * BLOCK_Q;
  ScoreMemory<T> score;
  Element *x, *p;
  T *row_max, *row_sum, *row_scale, *row_normaliser;
  FUSEDATTN_DEVICE explicit ForwardMemory(T* memory)
      : score(memory),
        x(reinterpret_cast<Element*>(memory)),
        p(reinterpret_cast<Element*>(memory + STAGE)),
        row_max(memory + STAGE + P),
        row_sum(row_max + BLOCK_Q),
        row_scale(row_sum + BLOCK_Q),
        row_normaliser(row_scale + BLOCK_Q) {}
};

// Over the threads that share rows.
template <typename T, typename Combine>
FUSEDATTN_DEVICE T row_reduce(T x, const Combine& combine) {
#pragma unroll
  for (int step = ROW_LANES / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(gpu::ALL_LANES, x, step));
  return x;
}

// One step of the online softmax: scores become p, of which those that dropout keeps count in the context alone;
// the rows' maximum and sum move on, row_scale is what earlier sums must be multiplied with.
template <typename S, bool tensor_cores, typename T>
FUSEDATTN_DEVICE void softmax_step(T (&score)[TILE_Q][TILE_K], const ForwardMemory<S, tensor_cores>& memory) {
  T before[TILE_Q];
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i) before[i] = memory.row_max[tile_row() + i];
  __syncwarp();  // all lanes of a row have read what one will overwrite
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i) {
    const int row = tile_row() + i;
    T top = score[i][0];
#pragma unroll
    for (int j = 1; j < TILE_K; ++j) top = gpu::max(top, score[i][j]);
    top = gpu::max(before[i], row_reduce(top, [](T a, T b) { return gpu::max(a, b); }));
    const T origin = top == -INFINITE<T> ? T(0) : top;
    T sum = 0;
#pragma unroll
    for (int j = 0; j < TILE_K; ++j) {
      const bool infinite = score[i][j] == INFINITE<T>;  // the context is NaN, the log-sum-exp inf
      score[i][j] = gpu::exp_approx(score[i][j] - origin);
      sum += infinite ? T(1) : score[i][j];
    }
    sum = row_reduce(sum, [](T a, T b) { return a + b; });
    const T scale = before[i] == top ? T(1) : gpu::exp_approx(before[i] - origin);
    if (tile_column() == 0) {
      sum = gpu::fma(memory.row_sum[row], scale, sum);
      memory.row_max[row] = top;
      memory.row_sum[row] = sum;
      memory.row_scale[row] = scale;
      memory.row_normaliser[row] = normaliser(top, sum);
    }
  }
}

// sums = sums row_scale + p x, for the tile's keys and all columns; in the end times the normaliser to the
// context. Begins with a barrier.
template <typename S, bool tensor_cores>
FUSEDATTN_DEVICE void context_step(const AttentionProblem<S>& p, const AttentionOutputs<S>& out, const Head& at,
                                   int64_t i0, int64_t j0, KeyRange keys,
                                   const ForwardMemory<S, tensor_cores>& memory) {
  using T = gpu::Arithmetic<S>;
  using Product = ContextProduct<S, tensor_cores>;
  const bool first = j0 == keys.first, last = j0 + BLOCK_K >= keys.end;
  const int rows = static_cast<int>(lower(BLOCK_Q, p.Tq - i0));
  int64_t v0 = 0;
  do {  // once even without columns, for the barrier
    T acc[TILE_Q][TILE_K] = {};
#pragma unroll
    for (int key = 0; key < BLOCK_K; key += Product::KEYS) {
      __syncthreads();
      stage_rows<Product::LEADING_X, Product::KEYS>(p.value, at, j0 + key, keys.end, v0, p.Dv, memory.x,
                                                    SeenRows<S>{p, at});
      __syncthreads();
      const int depth = static_cast<int>(lower(Product::KEYS, keys.end - j0 - key));
      Product::multiply(memory.p, key, memory.x, depth, acc);
    }
    const int64_t corner = (at.n * p.Tq + i0) * p.Dv + v0;
#pragma unroll
    for (int n = 0; n < TILE_Q; ++n)
#pragma unroll
      for (int e = 0; e < TILE_K; ++e) {
        const int row = Product::row(n, e), column = Product::column(n, e);
        if (row >= rows || v0 + column >= p.Dv) continue;
        const int64_t to = corner + row * p.Dv + column;
        const T sum = first ? acc[n][e] : gpu::fma(out.sums[to], memory.row_scale[row], acc[n][e]);
        if (last)
          out.context[to] = gpu::to_storage<S>(sum * memory.row_normaliser[row]);
        else
          out.sums[to] = sum;
      }
    v0 += 64;
  } while (v0 < p.Dv);
}

template <typename S, typename Phi, bool tensor_cores>
__global__ void __launch_bounds__(ATTENTION_BLOCK, FORWARD_OCCUPANCY<S>)
    additive_attention_fwd_kernel(const AttentionProblem<S> p, const AttentionOutputs<S> out,
                                  int64_t query_tiles) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const ForwardMemory<S, tensor_cores> memory(shared);
  const Head at(p, blockIdx.x / query_tiles);
  // The last rows first: those of causal attention see the most keys, and nobody waits for the lightest.
  const int64_t i0 = (query_tiles - 1 - blockIdx.x % query_tiles) * BLOCK_Q;
  const KeyRange keys = p.keys_of_tile(at.b, at.h, i0);
  const WeightScale<T> weight(p, at, memory.score.reduce, Phi{});
  if (threadIdx.x < BLOCK_Q) {
    memory.row_max[threadIdx.x] = -INFINITE<T>;
    memory.row_sum[threadIdx.x] = 0;
  }
  __syncthreads();

  for (int64_t j0 = keys.first; j0 < keys.end; j0 += BLOCK_K) {
    T score[TILE_Q][TILE_K];
    score_tile<Phi>(p, at, weight, i0, j0, keys.end, memory.score, score);
    if (out.scores != nullptr) {
#pragma unroll
      for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
        for (int j = 0; j < TILE_K; ++j) {
          const int64_t row = i0 + tile_row() + i, column = j0 + tile_column() + j;
          if (row < p.Tq && column < p.Tk) out.scores[(at.n * p.Tq + row) * p.Tk + column] = score[i][j];
        }
    }
    if (p.has_bias()) add_bias(p, here(at), i0, j0, score);
    softmax_step(score, memory);
    if (p.drops()) drop_pairs(kept_pairs(p, at, i0, j0), T(p.dropout.factor), score);
    ContextProduct<S, tensor_cores>::store_p(score, memory.p);
    context_step(p, out, at, i0, j0, keys, memory);
  }

  __syncthreads();
  const int64_t rows = lower(BLOCK_Q, p.Tq - i0), first_row = at.n * p.Tq + i0;
  if (threadIdx.x < rows) {
    out.lse[first_row + threadIdx.x] = log_sum_exp(memory.row_max[threadIdx.x], memory.row_sum[threadIdx.x]);
  }
  if (keys.end == 0)
    for (int64_t n = threadIdx.x; n < rows * p.Dv; n += ATTENTION_BLOCK)
      out.context[first_row * p.Dv + n] = gpu::to_storage<S>(T(0));
  const int64_t tiles = gpu::ceil_div(keys.end - keys.first, BLOCK_K);
  const int64_t scored = lower(p.Tk - keys.first, tiles * BLOCK_K), rest = p.Tk - scored;
  if (out.scores != nullptr)
    for (int64_t n = threadIdx.x; n < rows * rest; n += ATTENTION_BLOCK) {
      const int64_t j = n % rest;
      out.scores[(first_row + n / rest) * p.Tk + j + (j < keys.first ? 0 : scored)] = -INFINITE<T>;
    }
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

// The same with a bias, a block for each row: beside a bias of the lowest number, as float masks have it, the
// log-sum-exp has no digits left for the sum.
template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK, 6)
    additive_attention_fwd_kernel_biased_weights(const AttentionProblem<S> p, const gpu::Arithmetic<S>* scores,
                                                 S* weights) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const int64_t row = blockIdx.x, i = row % p.Tq;
  const Head at(p, row / p.Tq);
  const auto each_score = [&](const auto& body) {
    for (int64_t j = threadIdx.x; j < p.Tk; j += ATTENTION_BLOCK)
      body(j, with_bias(p, at, i, j, scores[row * p.Tk + j]));
  };
  T top = -INFINITE<T>, sum = 0;
  each_score([&](int64_t, T score) { top = gpu::max(top, score); });
  top = block_reduce(top, shared, [](T a, T b) { return gpu::max(a, b); });
  const T origin = top == -INFINITE<T> ? T(0) : top;
  each_score([&](int64_t, T score) { sum += gpu::exp(score - origin); });
  sum = block_reduce(sum, shared, [](T a, T b) { return a + b; });
  const T factor = normaliser(top, sum);
  each_score([&](int64_t j, T score) {
    weights[row * p.Tk + j] = gpu::to_storage<S>(score == -INFINITE<T> ? T(0) : gpu::exp(score - origin) * factor);
  });
}

template <typename S>
void launch_additive_attention_weights(const AttentionProblem<S>& p, const gpu::Arithmetic<S>* scores,
                                       const gpu::Arithmetic<S>* lse, S* weights, cudaStream_t stream) {
  const int64_t elements = p.heads() * p.Tq * p.Tk, blocks = gpu::ceil_div(elements, ATTENTION_BLOCK * 4);
  if (elements == 0) return;
  if (p.has_bias())
    FUSEDATTN_LAUNCH(additive_attention_fwd_kernel_biased_weights<S>, p.heads() * p.Tq, ATTENTION_BLOCK,
                     ATTENTION_BLOCK / gpu::WARP * sizeof(gpu::Arithmetic<S>), stream, p, scores, weights);
  else
    FUSEDATTN_LAUNCH(additive_attention_fwd_kernel_weights<S>, blocks < 65536 ? blocks : 65536, ATTENTION_BLOCK, 0,
                     stream, scores, lse, elements, p.Tk, weights);
}

// Elements of working memory: the sums of the context in half precision, or the parts of few queries; then what
// prepared takes.
template <typename S>
int64_t additive_attention_fwd_sums(const AttentionProblem<S>& p) {
  const SplitPlan<S> plan(p);
  if (plan.splits > 0) return plan.size(p);
  return sizeof(S) < sizeof(gpu::Arithmetic<S>) ? p.heads() * p.Tq * p.Dv : 0;
}
template <typename S>
int64_t additive_attention_fwd_workspace(const AttentionProblem<S>& p) {
  return whole_packs(additive_attention_fwd_sums(p)) + seen_workspace(p);
}

// Whether p . x runs on tensor cores. tf32: whether float32 may be rounded for them.
template <typename S>
bool context_on_tensor_cores(bool tf32) {
  if (std::is_same_v<S, double> || (std::is_same_v<S, float> && !tf32)) return false;
  return std::is_same_v<S, __half> || gpu::architecture() >= gpu::SM_80;
}

// Launches of kernels that are compiled for Phi. Those of Linear are, in the extension, in a file of their own.
template <typename Phi, typename S>
void launch_tiles(const AttentionProblem<S>& p, const AttentionOutputs<S>& out, bool tensor_cores,
                  cudaStream_t stream) {
  using T = gpu::Arithmetic<S>;
  const int64_t tiles = p.query_tiles(), blocks = p.heads() * tiles;
  if constexpr (!std::is_same_v<S, double>)
    if (tensor_cores)
      FUSEDATTN_LAUNCH((additive_attention_fwd_kernel<S, Phi, true>), blocks, ATTENTION_BLOCK,
                       (ForwardMemory<S, true>::SIZE * sizeof(T)), stream, p, out, tiles);
  if constexpr (!std::is_same_v<S, __half>)
    if (!tensor_cores)
      FUSEDATTN_LAUNCH((additive_attention_fwd_kernel<S, Phi, false>), blocks, ATTENTION_BLOCK,
                       (ForwardMemory<S, false>::SIZE * sizeof(T)), stream, p, out, tiles);
}
#define FUSEDATTN_LINEAR_FWD(keyword, S)                                                                        \
  keyword template void launch_tiles<Linear>(const AttentionProblem<S>&, const AttentionOutputs<S>&, bool,      \
                                             cudaStream_t);                                                     \
  keyword template void launch_split_scores<Linear>(const AttentionProblem<S>&, const SplitPlan<S>&,            \
                                                    const SplitParts<gpu::Arithmetic<S>>&, gpu::Arithmetic<S>*, \
                                                    cudaStream_t);

// context (B, H, Tq, Dv), lse (B, H, Tq), scores (B, H, Tq, Tk) or null, weights like scores or null (they need
// scores). tf32: whether the product p . x of float32 may round its factors to TF32; few queries never do, which
// would gain nothing where memory is the bound.
template <typename S>
void launch_additive_attention_fwd(const AttentionProblem<S>& problem, S* context, gpu::Arithmetic<S>* lse,
                                   gpu::Arithmetic<S>* scores, S* weights, gpu::Arithmetic<S>* workspace,
                                   cudaStream_t stream, bool tf32 = false) {
  using T = gpu::Arithmetic<S>;
  if (problem.heads() * problem.Tq == 0) return;
  const auto p = prepared<false>(problem, workspace + whole_packs(additive_attention_fwd_sums(problem)), stream);
  const SplitPlan<S> plan(p);
  if (plan.splits > 0) {
    launch_additive_attention_split(p, plan, context, lse, scores, workspace, stream);
  } else {
    T* sums = workspace;
    if constexpr (sizeof(S) == sizeof(T)) sums = context;
    const AttentionOutputs<S> out{context, lse, scores, sums};
    with_phi(p.options.activation,
             [&](auto phi) { launch_tiles<decltype(phi)>(p, out, context_on_tensor_cores<S>(tf32), stream); });
  }
  if (weights != nullptr) launch_additive_attention_weights(p, scores, lse, weights, stream);
}

}  // namespace fusedattn
