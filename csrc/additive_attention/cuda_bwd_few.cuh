// Additive attention backward for few queries (Tq <= 16, in double 8) whose scores were kept: decode steps,
// pooling.
//
// Bound by memory, so each of query, key, value and their gradients is touched once, in order. Keys are split over
// blocks as in the forward pass (cuda_split.cuh); lanes own columns or channels in packs of 4, queries are a loop:
//
//   few_values   a_ij = dc_i . x_j, g_ij and dx_j = sum_i p_ij dc_i     a warp 4 keys at a time: dc is read once
//                                                                       for all of them
//   few_inputs   dk_j, and what a split gives to dq and dw              a warp 4 keys at a time, one with more
//                                                                       than one query; 128 channels
//   few_query    dq = sum of the parts of the splits
//
// g is all that lies between them, Tq numbers for a key. With 16 queries the sum over channels is arithmetic
// again, 7 slots and 0.5 MUFU per tanh as in the joint pass, exp(2k) once for all queries.
//
// Without kept scores, that is for D < 16, the tiles of cuda_bwd.cuh do it all.
#pragma once

#include "cuda_bias.cuh"
#include "cuda_problem.cuh"
#include "cuda_split.cuh"

namespace fusedattn {

constexpr int FEW_KEYS = 4;  // of a warp at a time in few_values
// Most queries: 4 sums for each are in registers, which in double would spill beyond 8.
template <typename S>
constexpr int FEW_QUERIES = sizeof(S) < 8 ? SPLIT_QUERIES : SPLIT_QUERIES / 2;

// Of a warp at a time in few_inputs: one query waits for memory, 16 for arithmetic.
template <int QUERIES>
constexpr int KEYS_AT_ONCE = QUERIES == 1 ? 4 : 1;

// Whether backward takes this path.
template <typename S>
bool few_queries(const AttentionProblem<S>& p, const AttentionGradients<S>& grads) {
  return p.Tq <= FEW_QUERIES<S> && grads.scores != nullptr;
}

// How keys are split, and where the working memory lies, by the shape alone.
template <typename S>
struct FewPlan {
  int64_t keys, splits, channels;  // keys of a split; D up to whole steps of a warp
  int64_t queries;                 // Tq up to what the kernels are compiled for
  int64_t g, g_sums, query, weight, row_terms, size;

  explicit FewPlan(const AttentionProblem<S>& p)
      : keys(p.heads() == 0 ? 0 : keys_of_split(p.heads(), p.Tk)),
        splits(keys == 0 ? 0 : gpu::ceil_div(p.Tk, keys)),
        channels(gpu::ceil_div(p.D, SPLIT_CHANNELS) * SPLIT_CHANNELS),
        queries(p.Tq == 1 ? 1 : FEW_QUERIES<S>) {
    g = 0;
    g_sums = g + whole_packs(p.heads() * p.Tk * queries);
    query = g_sums + p.heads() * splits;
    weight = query + p.heads() * splits * p.Tq * channels;
    row_terms = weight + p.heads() * splits * channels;
    size = row_terms + p.heads() * p.Tq;
  }
};

// What passes from kernel to kernel.
template <typename T>
struct FewParts {
  int64_t keys, splits, channels;
  T *g, *g_sums;      // (B H, Tk, queries), (B H, splits)
  T *query, *weight;  // (B H, splits, Tq, channels), (B H, splits, channels)
  T* row_terms;       // (B H, Tq)
  T* bias = nullptr;  // (B H, Tq, Tk), gradients of scores with their bias; null: not asked for

  template <typename S>
  FewParts(const FewPlan<S>& plan, T* memory)
      : keys(plan.keys),
        splits(plan.splits),
        channels(plan.channels),
        g(memory + plan.g),
        g_sums(memory + plan.g_sums),
        query(memory + plan.query),
        weight(memory + plan.weight),
        row_terms(memory + plan.row_terms) {}
};

template <typename T>
struct PairGradient {
  T weight, biased, g;  // p_ij and the gradients of the score with its bias, and before scale and cap
};

// From the score, that with its bias, and a_ij - D_i (cuda_bwd.cuh). lse: of the row.
template <typename S, typename T>
FUSEDATTN_DEVICE PairGradient<T> pair_gradient(const AttentionProblem<S>& p, T score, T biased, T lse, T a) {
  if (biased == -INFINITE<T>) return {T(0), T(0), T(0)};
  const T origin = lse - lse == 0 ? lse : NOT_A_NUMBER<T>;  // of an infinite row: every weight is NaN
  const T weight = gpu::exp_approx(biased - origin),
          ratio = p.options.softcap == 0 ? T(0) : score / T(p.options.softcap);
  return {weight, weight * a, weight * a * T(p.options.scale) * (1 - ratio * ratio)};
}

// A bias takes registers that with 16 queries there are none left of: it has kernels of its own.
template <typename S, bool with_its_bias, int QUERIES>
__global__ void __launch_bounds__(ATTENTION_BLOCK, QUERIES > 1     ? (with_its_bias ? 2 : 3)
                                                   : sizeof(S) < 8 ? 6
                                                                   : 2)
    additive_attention_bwd_kernel_few_values(const AttentionProblem<S> p, const AttentionGradients<S> grads,
                                             const FewParts<gpu::Arithmetic<S>> parts) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  constexpr int WARPS = ATTENTION_BLOCK / gpu::WARP, PAIRS = FEW_KEYS * QUERIES;
  T* const pairs = shared + warp * PAIRS;  // [key][i]: dc . x, then p
  T* const reduce = shared + WARPS * PAIRS;
  const Head at(p, blockIdx.x / parts.splits);
  const int64_t begin = blockIdx.x % parts.splits * parts.keys, end = lower(begin + parts.keys, p.Tk);
  const KeyRange visible = p.keys_of_tile(at.b, at.h, 0);
  const int64_t first_key = lower(end, higher(begin, visible.first));
  const int64_t keys_end = higher(first_key, lower(end, visible.end));
  const int64_t columns = grads.grad_context.data == nullptr ? 0 : p.Dv;
  const int64_t written = grads.grad_value == nullptr ? 0 : columns;
  const bool packed = RowsOf<S>(grads.grad_value, 0, 0, p.Dv).packed;
  const auto load_gradient = [&](int i, int64_t v) {
    return load_channels(grads.grad_context.row(at.b, at.h, i), grads.grad_context.packed, v, columns);
  };

  T g_sum = 0;
  for (int64_t j0 = first_key + warp * FEW_KEYS; j0 < keys_end; j0 += WARPS * FEW_KEYS) {
    T sums[FEW_KEYS][QUERIES] = {};
    for (int64_t v = lane * PACK; v < columns; v += SPLIT_CHANNELS) {
      gpu::Pack<S, PACK> x[FEW_KEYS];
#pragma unroll
      for (int key = 0; key < FEW_KEYS; ++key) {
        const bool exists = j0 + key < keys_end;
        x[key] =
            load_channels(p.value.row(at.b, at.h, exists ? j0 + key : j0), p.value.packed, v, exists ? p.Dv : 0);
      }
#pragma unroll
      for (int i = 0; i < QUERIES; ++i) {
        if (i >= p.Tq) break;
        const auto dc = load_gradient(i, v);
#pragma unroll
        for (int key = 0; key < FEW_KEYS; ++key)
#pragma unroll
          for (int e = 0; e < PACK; ++e)
            sums[key][i] =
                gpu::fma(gpu::to_arithmetic(dc.element[e]), gpu::to_arithmetic(x[key].element[e]), sums[key][i]);
      }
    }
#pragma unroll
    for (int key = 0; key < FEW_KEYS; ++key)
#pragma unroll
      for (int i = 0; i < QUERIES; ++i) {
        const T sum = gpu::warp_sum(sums[key][i]);
        if (lane == 0) pairs[key * QUERIES + i] = sum;
      }
    __syncwarp();
    for (int n = lane; n < PAIRS; n += gpu::WARP) {
      const int64_t i = n % QUERIES, j = j0 + n / QUERIES, row = at.n * p.Tq + i;
      PairGradient<T> pair = {T(0), T(0), T(0)};
      if (i < p.Tq && j < keys_end) {
        const T score = grads.scores[row * p.Tk + j];
        const T biased = with_its_bias ? with_bias(p, here(at), i, j, score) : score;
        const T of_context = p.drops() ? dropped(p, at, i, j, pairs[n]) : pairs[n];
        T a = of_context - parts.row_terms[row];
        if (score != -INFINITE<T> && grads.grad_weights != nullptr)
          a += gpu::to_arithmetic(grads.grad_weights[row * p.Tk + j]);
        pair = pair_gradient(p, score, biased, grads.lse[row], a);
        if (with_its_bias && parts.bias != nullptr) parts.bias[row * p.Tk + j] = pair.biased;
        if (p.drops()) pair.weight = dropped(p, at, i, j, pair.weight);
      }
      pairs[n] = pair.weight;
      g_sum += pair.g;
      if (j < keys_end) parts.g[(at.n * p.Tk + j) * QUERIES + i] = pair.g;
    }
    __syncwarp();
    for (int64_t v = lane * PACK; v < written; v += SPLIT_CHANNELS) {
      T dx[FEW_KEYS][PACK] = {};
#pragma unroll
      for (int i = 0; i < QUERIES; ++i) {
        if (i >= p.Tq) break;
        const auto dc = load_gradient(i, v);
#pragma unroll
        for (int key = 0; key < FEW_KEYS; ++key)
#pragma unroll
          for (int e = 0; e < PACK; ++e)
            dx[key][e] = gpu::fma(pairs[key * QUERIES + i], gpu::to_arithmetic(dc.element[e]), dx[key][e]);
      }
#pragma unroll
      for (int key = 0; key < FEW_KEYS; ++key)
        if (j0 + key < keys_end)
          store_channels(grads.grad_value + (at.n * p.Tk + j0 + key) * p.Dv, packed && v + PACK <= p.Dv, v, p.Dv,
                         dx[key]);
    }
    __syncwarp();  // the next keys take the place of these
  }
  g_sum = block_reduce(g_sum, reduce, [](T a, T b) { return a + b; });
  if (threadIdx.x == 0) parts.g_sums[blockIdx.x] = g_sum;
  for (int64_t j = begin + warp; j < end; j += WARPS) {
    if (j >= first_key && j < keys_end) continue;
    constexpr T zeros[PACK] = {};  // of keys that no query sees
    for (int64_t v = lane * PACK; v < written; v += SPLIT_CHANNELS)
      store_channels(grads.grad_value + (at.n * p.Tk + j) * p.Dv, packed && v + PACK <= p.Dv, v, p.Dv, zeros);
  }
}

// What a lane sums over the keys of its warp, of its channels.
template <typename T, int QUERIES>
struct FewSums {
  T query[QUERIES][PACK], weight[PACK];

  // Of a pair, linear on either side of zero.
  template <bool leaky>
  FUSEDATTN_DEVICE void add_linear(int i, T g, const T (&z)[PACK], T negative_slope, T (&dk)[PACK]) {
#pragma unroll
    for (int e = 0; e < PACK; ++e) {
      const T h = linear_gradient<leaky>(z[e], g, negative_slope, weight[e]);
      query[i][e] += h;
      dk[e] += h;
    }
  }

  // A pair's; dk of its key, too.
  FUSEDATTN_DEVICE void add(int i, T g, const T (&r)[PACK], T (&dk)[PACK]) {
#pragma unroll
    for (int e = 0; e < PACK; ++e) {
      const T u = gpu::fma(-r[e], r[e], r[e]);
      query[i][e] = gpu::fma(g, u, query[i][e]);
      dk[e] = gpu::fma(g, u, dk[e]);
      weight[e] = gpu::fma(g, r[e], weight[e]);
    }
  }
};

template <typename S, typename Phi, int QUERIES>
__global__ void __launch_bounds__(ATTENTION_BLOCK, QUERIES == 1 && sizeof(S) < 8 ? 5 : 0)
    additive_attention_bwd_kernel_few_inputs(const AttentionProblem<S> p, const AttentionGradients<S> grads,
                                             const FewParts<gpu::Arithmetic<S>> parts) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  constexpr int WARPS = ATTENTION_BLOCK / gpu::WARP;
  T *const q = shared, *const w = q + QUERIES * SPLIT_CHANNELS;  // [i][channel], exp(2q) or q; 4w; then dq and dw
  T* const reduce = w + SPLIT_CHANNELS;
  const int64_t strips = parts.channels / SPLIT_CHANNELS, d0 = blockIdx.x % strips * SPLIT_CHANNELS;
  const int64_t split = blockIdx.x / strips % parts.splits;
  const Head at(p, blockIdx.x / (strips * parts.splits));
  const int64_t begin = split * parts.keys, end = lower(begin + parts.keys, p.Tk);
  const KeyRange visible = p.keys_of_tile(at.b, at.h, 0);
  const int64_t first_key = lower(end, higher(begin, visible.first)), d = d0 + lane * PACK;

  T q_bound = 0;
  for (int n = threadIdx.x; n < QUERIES * SPLIT_CHANNELS; n += ATTENTION_BLOCK) {
    const int64_t i = n / SPLIT_CHANNELS, channel = d0 + n % SPLIT_CHANNELS;
    const bool exists = i < p.Tq && channel < p.D;
    const T x = exists ? gpu::to_arithmetic(p.query.row(at.b, at.h, i)[channel]) : T(0);
    q_bound = gpu::max(q_bound, gpu::abs(x));
    q[n] = TAKES_EXPONENTIALS<Phi> ? exponential(x, p.by) : x;
  }
  const int64_t own = d0 + threadIdx.x;
  w[threadIdx.x] = own < p.D ? p.by.slope * p.weight_of(at.h, own) : T(0);
  const T k_limit = p.by.range - block_reduce(q_bound, reduce, [](T a, T b) { return gpu::max(a, b); });

  FewSums<T, QUERIES> sums = {};
  const int Tq = static_cast<int>(p.Tq);
  const S* key = p.key.row(at.b, at.h, first_key + warp) + d;
  const auto g_of = [&](int64_t j) { return parts.g + (at.n * p.Tk + j) * QUERIES; };
  const T* g_of_key = g_of(first_key + warp);
  int64_t out = (at.n * p.Tk + first_key + warp) * p.D + d;                   // in grad_key, which may be null
  const int channels = d < p.D ? static_cast<int>(lower(PACK, p.D - d)) : 0;  // of the lane's
  const bool whole = channels == PACK && p.key.packed;
  const bool whole_grad = channels == PACK && RowsOf<S>(grads.grad_key, 0, 0, p.D).packed;
  constexpr int KEYS = KEYS_AT_ONCE<QUERIES>;
  const int64_t keys_end = lower(end, visible.end);
  for (int64_t j = first_key + warp; j < keys_end; j += KEYS * WARPS) {
    gpu::Pack<S, PACK> keys[KEYS];
    gpu::Pack<T, QUERIES> g[KEYS];
    const auto load_all = [&](const auto& load) {
#pragma unroll
      for (int n = 0; n < KEYS; ++n) {
        const int64_t ahead = j + n * WARPS < keys_end ? n * WARPS : 0;
        keys[n] = load(key + ahead * p.key.stride_t);
        g[n] = gpu::load_pack<QUERIES>(g_of_key + ahead * QUERIES);
      }
    };
    if (whole)  // asked once: a branch for each key would wait for the one before
      load_all([](const S* row) { return gpu::load_pack<PACK>(row); });
    else
      load_all([&](const S* row) { return load_channels(row, false, 0, channels); });
#pragma unroll
    for (int n = 0; n < KEYS; ++n) {
      if (j + n * WARPS >= keys_end) break;
      T dk[PACK] = {};
      T k[PACK], r[PACK];
#pragma unroll
      for (int e = 0; e < PACK; ++e) k[e] = gpu::to_arithmetic(keys[n].element[e]);
      T bound = gpu::abs(k[0]);
#pragma unroll
      for (int e = 1; e < PACK; ++e) bound = gpu::max(bound, gpu::abs(k[e]));
      if constexpr (!TAKES_EXPONENTIALS<Phi>) {
        // Keys that no query sees may hold NaN, and 0 NaN is NaN.
        const bool seen = p.sees(at.b, at.h, j + n * WARPS);
        const auto add = [&](auto leaky) {
#pragma unroll
          for (int i = 0; i < QUERIES; ++i) {
            if ((i == 4 || i == 8) && i >= Tq) break;
            const auto query = gpu::load_pack<PACK>(q + i * SPLIT_CHANNELS + lane * PACK);
#pragma unroll
            for (int e = 0; e < PACK; ++e) r[e] = query.element[e] + (seen ? k[e] : T(0));
            sums.template add_linear<leaky.value>(i, g[n].element[i], r, p.by.negative_slope, dk);
          }
        };
        if (p.options.activation == ScoreActivation::LEAKY_RELU)
          add(std::true_type{});
        else
          add(std::false_type{});
      } else if (!__any_sync(gpu::ALL_LANES, !(bound <= k_limit))) {
#pragma unroll
        for (int e = 0; e < PACK; ++e) k[e] = exponential(k[e], p.by);
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
          if ((i == 4 || i == 8) && i >= Tq) break;  // g is 0 from Tq on, so 4, 8 or 16 are summed
          const auto query = gpu::load_pack<PACK>(q + i * SPLIT_CHANNELS + lane * PACK);
#pragma unroll
          for (int e = 0; e < PACK; e += 2)
            paired_reciprocal(gpu::fma(query.element[e], k[e], T(1)),
                              gpu::fma(query.element[e + 1], k[e + 1], T(1)), r[e], r[e + 1]);
          sums.add(i, g[n].element[i], r, dk);
        }
      } else {
        // Masked keys may hold NaN. Within the range they need no test, for their g is 0.
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
          if (i >= Tq) break;
          const auto query = load_channels(p.query.row(at.b, at.h, i), p.query.packed, d, p.D);
#pragma unroll
          for (int e = 0; e < PACK; ++e)
            r[e] = g[n].element[i] == 0
                       ? T(0)
                       : reciprocal_of_sum(p.by.argument * (gpu::to_arithmetic(query.element[e]) + k[e]));
          sums.add(i, g[n].element[i], r, dk);
        }
      }
      if (grads.grad_key == nullptr) continue;
      const auto weights = gpu::load_pack<PACK>(w + lane * PACK);
#pragma unroll
      for (int e = 0; e < PACK; ++e) dk[e] *= weights.element[e];
      store_channels(grads.grad_key + out + n * WARPS * p.D, whole_grad, 0, channels, dk);
    }
    key += KEYS * WARPS * p.key.stride_t, g_of_key += KEYS * WARPS * QUERIES, out += KEYS * WARPS * p.D;
  }
  for (int64_t j = begin + warp; j < end && grads.grad_key != nullptr; j += WARPS) {
    if (j >= first_key && j < keys_end) continue;
    constexpr T zeros[PACK] = {};  // of keys that no query sees
    store_channels(grads.grad_key + (at.n * p.Tk + j) * p.D + d, whole_grad, 0, channels, zeros);
  }

  // The warps add up in shared memory, one after the other.
  const auto add_to = [&](T* to, const T(&x)[PACK]) {
#pragma unroll
    for (int e = 0; e < PACK; ++e) to[lane * PACK + e] = x[e] + (warp == 0 ? T(0) : to[lane * PACK + e]);
  };
  for (int turn = 0; turn < WARPS; ++turn) {
    __syncthreads();
    if (turn != warp) continue;
#pragma unroll
    for (int i = 0; i < QUERIES; ++i) add_to(q + i * SPLIT_CHANNELS, sums.query[i]);
    add_to(w, sums.weight);
  }
  __syncthreads();
  const int64_t part = at.n * parts.splits + split;
  for (int i = 0; i < Tq; ++i)
    parts.query[(part * p.Tq + i) * parts.channels + own] = q[i * SPLIT_CHANNELS + threadIdx.x];
  parts.weight[part * parts.channels + own] = p.by.total * parts.g_sums[part] + p.by.sum * w[threadIdx.x];
}

static_assert(ATTENTION_BLOCK == SPLIT_CHANNELS, "a thread loads the weight of a channel and writes its sums");

// dq of 32 channels of a row: the warps of a block share the splits, in a fixed order.
template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK)
    additive_attention_bwd_kernel_few_query(const AttentionProblem<S> p, const FewParts<gpu::Arithmetic<S>> parts,
                                            S* grad_query) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  constexpr int WARPS = ATTENTION_BLOCK / gpu::WARP;
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  const int64_t strips = parts.channels / gpu::WARP, d = blockIdx.x % strips * gpu::WARP + lane;
  const int64_t row = blockIdx.x / strips, i = row % p.Tq;
  const Head at(p, row / p.Tq);
  T sum = 0;
#pragma unroll 4
  for (int64_t split = warp; split < parts.splits; split += WARPS)
    sum += parts.query[((at.n * parts.splits + split) * p.Tq + i) * parts.channels + d];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || d >= p.D) return;
  for (int other = 1; other < WARPS; ++other) sum += shared[other * gpu::WARP + lane];
  const T w = p.weight_of(at.h, d);
  grad_query[row * p.D + d] = gpu::to_storage<S>(p.by.slope * w * sum);
}

// Compiled for Phi as launch_tiles of cuda_fwd.cuh is.
template <typename Phi, typename S>
void launch_few_inputs(const AttentionProblem<S>& p, const AttentionGradients<S>& grads,
                       const FewParts<gpu::Arithmetic<S>>& parts, cudaStream_t stream) {
  const int64_t blocks = p.heads() * parts.splits * (parts.channels / SPLIT_CHANNELS);
  const auto memory = [](int queries) {
    return sizeof(gpu::Arithmetic<S>) * ((queries + 1) * SPLIT_CHANNELS + ATTENTION_BLOCK / gpu::WARP);
  };
  if (p.Tq == 1)
    FUSEDATTN_LAUNCH((additive_attention_bwd_kernel_few_inputs<S, Phi, 1>), blocks, ATTENTION_BLOCK, memory(1),
                     stream, p, grads, parts);
  else
    FUSEDATTN_LAUNCH((additive_attention_bwd_kernel_few_inputs<S, Phi, FEW_QUERIES<S>>), blocks, ATTENTION_BLOCK,
                     memory(FEW_QUERIES<S>), stream, p, grads, parts);
}

// dq, dk and dx, and the parts of dw; row_terms are there.
template <typename S>
void launch_additive_attention_bwd_few(const AttentionProblem<S>& p, const AttentionGradients<S>& grads,
                                       const FewParts<gpu::Arithmetic<S>>& parts, cudaStream_t stream) {
  using T = gpu::Arithmetic<S>;
  const int64_t splits = p.heads() * parts.splits;
  const int64_t value_blocks = splits;
  const int64_t query_blocks = p.heads() * p.Tq * (parts.channels / gpu::WARP);
  const auto value_memory = [](int queries) {
    return sizeof(T) * ATTENTION_BLOCK / gpu::WARP * (FEW_KEYS * queries + 1);
  };
  const auto launch_values = [&](auto biased) {
    if (p.Tq == 1)
      FUSEDATTN_LAUNCH((additive_attention_bwd_kernel_few_values<S, biased.value, 1>), value_blocks,
                       ATTENTION_BLOCK, value_memory(1), stream, p, grads, parts);
    else
      FUSEDATTN_LAUNCH((additive_attention_bwd_kernel_few_values<S, biased.value, FEW_QUERIES<S>>), value_blocks,
                       ATTENTION_BLOCK, value_memory(FEW_QUERIES<S>), stream, p, grads, parts);
  };
  if (p.has_bias())
    launch_values(std::true_type{});
  else
    launch_values(std::false_type{});
  if (p.D == 0) return;
  with_phi(p.options.activation, [&](auto phi) { launch_few_inputs<decltype(phi)>(p, grads, parts, stream); });
  FUSEDATTN_LAUNCH(additive_attention_bwd_kernel_few_query<S>, query_blocks, ATTENTION_BLOCK,
                   ATTENTION_BLOCK * sizeof(T), stream, p, parts, grads.grad_query);
}

}  // namespace fusedattn
