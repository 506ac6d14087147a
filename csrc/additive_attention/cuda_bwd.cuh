// Additive attention backward, without atomics: every sum has one owner or is added from parts in a fixed order.
//
//   rows    D_i = sum_j p_ij a_ij - dL_i                    a warp per row; sum_j p_ij (dc_i . x_j) = dc_i . c_i
//   scores  g_ij = p_ij (a_ij - D_i), a_ij = dc_i . x_j + dp_ij     64 x 64 tiles; scores kept or scored again
//   inputs  dq, dk, dw from g                               the joint pass, below
//   keys    dk = sum of the parts of each 64 queries
//   values  dx_j = sum_i p_ij dc_i                          64 x 64 tiles
//
// With dropout dc_i . x_j and the p of dx_j are those of weights that are kept, times 1 / (1 - P), and else 0.
//
//   weight  dw = sum of the parts
//
// The joint pass spends all the time. A block owns 64 queries and 32 channels and walks all keys; a warp owns 8 of
// the queries, a lane one channel. Eq, dq (8 each) and dw stay in registers, g_ij is broadcast from shared memory,
// and what the warp's 8 queries add to dk_jd is one value, summed over the 8 warps in shared memory once per 32
// keys and written as a part: dk needs neither a second pass nor atomics. Per two queries, that is two tanh:
//
//   2 FMA (t), FMUL (t1 t2), MUFU.RCP, 2 FMUL (r), 2 FMA (u = r - r^2), 2 FMA (dq), 2 FMA (dk), 2 FMA (dw)
//
// 7 slots and 0.5 MUFU per tanh, and 4 loads and stores per 8. Two passes, one for dq and one for dk, would cost
// 11 slots and a full MUFU.
//
// Memory is linear in the lengths: g, p and the parts of dk exist for a chunk of query rows at a time.
//
// Few queries would leave most rows of those tiles empty; they have kernels of their own (cuda_bwd_few.cuh).
#pragma once

#include "cuda_bwd_bias.cuh"
#include "cuda_bwd_few.cuh"
#include "cuda_problem.cuh"
#include "cuda_seen.cuh"

namespace fusedattn {

constexpr int BACKWARD_BLOCK = 256;  // threads of the joint pass: 8 warps of 8 queries
constexpr int BACKWARD_CHANNELS = 32;
template <typename T>
constexpr int BACKWARD_KEYS = sizeof(T) == 8 ? 16 : 32;  // as BLOCK_D
constexpr int BACKWARD_WARPS = BACKWARD_BLOCK / gpu::WARP;
constexpr int64_t BACKWARD_CHUNK = int64_t{1}
                                   << 24;  // elements of g, of p and of the parts of dk, if a tile allows it

static_assert(BACKWARD_WARPS * TILE_Q == BLOCK_Q, "a block of the joint pass owns a tile of queries");
static_assert(BLOCK_K % BACKWARD_KEYS<float> == 0, "its keys are read from whole tiles");

// The chunk of queries at hand: tiles [first_tile, first_tile + tiles) of heads [first_head, first_head + heads).
template <typename T>
struct BackwardChunk {
  int64_t first_head, heads, first_tile, tiles;
  int64_t keys, channels;    // BackwardPlan's
  bool follows;              // its
  bool first, last;          // of the queries of its heads
  T* g;                      // (heads, keys, rows)
  T* p;                      // (heads, rows, keys); scores, before they become p
  T* bias;                   // like p: gradients of scores with their bias; null: not asked for
  T* key_parts;              // (heads, tiles, keys, channels)
  T* weight_parts;           // (B, H, all tiles, channels)
  T* row_terms;              // (B, H, Tq)
  T *key_sums, *value_sums;  // like grad_key and grad_value; sums of earlier chunks

  FUSEDATTN_HOST_DEVICE int64_t rows() const { return tiles * BLOCK_Q; }

  // The key in the first column of a tile of queries that sees these.
  FUSEDATTN_DEVICE int64_t first_column(KeyRange of_tile) const {
    return follows ? of_tile.first / BLOCK_K * BLOCK_K : 0;
  }
};

// Scores of a chunk's rows, kept ones or those in its p; data is null where there are none.
template <typename T>
struct ScoreRows {
  const T* data;
  int64_t stride_head, stride_row;
  bool in_chunk;

  // Element j is the score of key j.
  FUSEDATTN_DEVICE const T* row(const BackwardChunk<T>& chunk, int64_t head, int64_t row, KeyRange of_tile) const {
    return data + head * stride_head + row * stride_row - (in_chunk ? chunk.first_column(of_tile) : 0);
  }
};

// Where the working memory of a problem lies and how its queries are cut, by its shape alone.
template <typename S>
struct BackwardPlan {
  using T = gpu::Arithmetic<S>;
  int64_t tiles, chunk_tiles, chunk_heads;
  int64_t keys, channels;  // that a tile of queries has columns for, and D; both up to whole tiles
  bool follows;            // whether those columns are of keys around the tile's windows, fewer than all
  int64_t g, p, key_parts, weight_parts, row_terms, key_sums, value_sums, size;

  explicit BackwardPlan(const AttentionProblem<S>& problem, int64_t chunk_elements = BACKWARD_CHUNK) {
    tiles = problem.query_tiles();
    keys = gpu::ceil_div(problem.Tk, BLOCK_K) * BLOCK_K;
    const int64_t left = problem.options.window_left, right = problem.options.window_right;
    int64_t in_windows = keys;
    if (problem.center == nullptr && left >= 0 && right >= 0 && left < keys && right < keys)
      in_windows = gpu::ceil_div(BLOCK_K - 1 + left + BLOCK_Q + right, BLOCK_K) * BLOCK_K;
    follows = in_windows < keys;
    keys = follows ? in_windows : keys;
    channels = gpu::ceil_div(problem.D, BACKWARD_CHANNELS) * BACKWARD_CHANNELS;
    const int64_t of_tile = keys * (channels > BLOCK_Q ? channels : BLOCK_Q),
                  wanted = of_tile == 0 ? tiles : chunk_elements / of_tile;
    chunk_tiles = wanted < 1 ? 1 : wanted < tiles ? wanted : tiles;
    const int64_t heads = problem.heads(), fitting = tiles == 0 ? heads : wanted / tiles;
    chunk_heads = chunk_tiles < tiles || fitting < 1 ? 1 : fitting < heads ? fitting : heads;
    const bool sums = chunk_tiles < tiles && sizeof(S) < sizeof(T);
    int64_t end = 0;
    const auto take = [&end](int64_t n) {
      const int64_t begin = end;
      end += whole_packs(n);
      return begin;
    };
    g = take(chunk_heads * keys * chunk_tiles * BLOCK_Q);
    p = take(chunk_heads * keys * chunk_tiles * BLOCK_Q);
    key_parts = take(chunk_heads * chunk_tiles * keys * channels);
    weight_parts = take(heads * tiles * channels);
    row_terms = take(heads * problem.Tq);
    key_sums = take(sums ? heads * problem.Tk * problem.D : 0);
    value_sums = take(sums ? heads * problem.Tk * problem.Dv : 0);
    size = end;
  }
};

// D_i, a warp per row of the chunk. `scores` only where there are gradients of weights.
template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK)
    additive_attention_bwd_kernel_rows(const AttentionProblem<S> p, const AttentionGradients<S> grads,
                                       const BackwardChunk<gpu::Arithmetic<S>> chunk,
                                       const ScoreRows<gpu::Arithmetic<S>> scores) {
  using T = gpu::Arithmetic<S>;
  const int lane = threadIdx.x % gpu::WARP;
  const int64_t local = int64_t{blockIdx.x} * (ATTENTION_BLOCK / gpu::WARP) + threadIdx.x / gpu::WARP;
  const int64_t head = local / chunk.rows(), row = local % chunk.rows(), i = chunk.first_tile * BLOCK_Q + row;
  if (head >= chunk.heads || i >= p.Tq) return;
  const Head at(p, chunk.first_head + head);
  const int64_t number = at.n * p.Tq + i;
  T sum = 0;
  if (grads.grad_context.data != nullptr) {
    const S *dc = grads.grad_context.row(at.b, at.h, i), *c = grads.context.row(at.b, at.h, i);
    for (int64_t v = lane; v < p.Dv; v += gpu::WARP)
      sum = gpu::fma(gpu::to_arithmetic(dc[v]), gpu::to_arithmetic(c[v]), sum);
  }
  if (grads.grad_weights != nullptr) {
    const T origin = grads.lse[number];
    const S* dp = grads.grad_weights + number * p.Tk;
    const KeyRange keys = p.keys_of_tile(at.b, at.h, i / BLOCK_Q * BLOCK_Q);
    const T* score = scores.row(chunk, head, row, keys);
    for (int64_t j = keys.first + lane; j < keys.end; j += gpu::WARP)
      if (const T biased = with_bias(p, at, i, j, score[j]); biased != -INFINITE<T>)
        sum = gpu::fma(gpu::exp_approx(biased - origin), gpu::to_arithmetic(dp[j]), sum);
  }
  sum = gpu::warp_sum(sum);
  if (lane == 0) chunk.row_terms[number] = sum - (grads.grad_lse == nullptr ? T(0) : grads.grad_lse[number]);
}

// A tile of g and p, or, if `only_scores`, of scores in the place of p.
template <typename S, typename Phi>
__global__ void __launch_bounds__(ATTENTION_BLOCK)
    additive_attention_bwd_kernel_scores(const AttentionProblem<S> p, const AttentionGradients<S> grads,
                                         const BackwardChunk<gpu::Arithmetic<S>> chunk,
                                         const ScoreRows<gpu::Arithmetic<S>> scores, bool only_scores) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const ScoreMemory<T> memory(shared);
  const int64_t key_tiles = chunk.keys / BLOCK_K, head = blockIdx.x / (key_tiles * chunk.tiles);
  const int64_t tile = blockIdx.x / key_tiles % chunk.tiles, column0 = blockIdx.x % key_tiles * BLOCK_K;
  const int64_t i0 = (chunk.first_tile + tile) * BLOCK_Q;
  const Head at(p, chunk.first_head + head);
  const KeyRange keys = p.keys_of_tile(at.b, at.h, i0);
  const int64_t j0 = chunk.first_column(keys) + column0;
  if (j0 >= keys.end || j0 + BLOCK_K <= keys.first) return;

  T score[TILE_Q][TILE_K];
  const int64_t row = tile * BLOCK_Q + tile_row(), column = column0 + tile_column(), j_first = j0 + tile_column();
  if (scores.data == nullptr) {
    const WeightScale<T> weight(p, at, memory.reduce, Phi{});
    score_tile<Phi>(p, at, weight, i0, j0, keys.end, memory, score);
  } else {
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
      for (int j = 0; j < TILE_K; ++j) {
        const bool exists = i0 + tile_row() + i < p.Tq && j_first + j < keys.end;
        score[i][j] = exists ? scores.row(chunk, head, row + i, keys)[j_first + j] : -INFINITE<T>;
      }
  }

  T grad[TILE_Q][TILE_K] = {};
  if (grads.grad_context.data != nullptr && !only_scores) {
    const auto same = [](T x) { return x; };
    for (int64_t v0 = 0; v0 < p.Dv; v0 += BLOCK_D<T>) {
      __syncthreads();
      stage_transposed(grads.grad_context, at, i0, lower(p.Tq, i0 + BLOCK_Q), v0, p.Dv, memory.q, same);
      stage_transposed(p.value, at, j0, keys.end, v0, p.Dv, memory.k, same);
      __syncthreads();
      multiply_tile(memory.q, memory.k, BLOCK_D<T>, grad);
    }
  }

  uint32_t kept = 0;
  if (p.drops() && !only_scores) {
    kept = kept_pairs(p, at, i0, j0);
    drop_pairs(kept, T(p.dropout.factor), grad);
  }
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i) {
    const int64_t query = i0 + tile_row() + i, number = at.n * p.Tq + query;
    const bool exists = query < p.Tq;
    const T lse = exists && !only_scores ? grads.lse[number] : T(0);
    const T term = exists && !only_scores ? chunk.row_terms[number] : T(0);
    gpu::Pack<T, TILE_K> of_bias;
#pragma unroll
    for (int j = 0; j < TILE_K; ++j) {
      if (only_scores) continue;
      const T biased = with_bias(p, at, query, j_first + j, score[i][j]);
      T a = grad[i][j] - term;
      if (score[i][j] != -INFINITE<T> && grads.grad_weights != nullptr)
        a += gpu::to_arithmetic(grads.grad_weights[number * p.Tk + j_first + j]);
      const auto pair = pair_gradient(p, score[i][j], biased, lse, a);
      score[i][j] = pair.weight;
      grad[i][j] = pair.g;
      of_bias.element[j] = pair.biased;
    }
    if (chunk.bias != nullptr && !only_scores)
      gpu::store_pack(chunk.bias + (head * chunk.rows() + row + i) * chunk.keys + column, of_bias);
  }
  if (p.drops() && !only_scores) drop_pairs(kept, T(p.dropout.factor), score);
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i) {
    gpu::Pack<T, TILE_K> pack;
#pragma unroll
    for (int j = 0; j < TILE_K; ++j) pack.element[j] = score[i][j];
    gpu::store_pack(chunk.p + (head * chunk.rows() + row + i) * chunk.keys + column, pack);
  }
  if (only_scores) return;
  store_transposed(grad, chunk.g + (head * chunk.keys + column) * chunk.rows() + row, chunk.rows());
}

// Shared memory of the joint pass.
template <typename T>
struct JointMemory {
  static constexpr int KEYS = BACKWARD_KEYS<T>;
  static constexpr int64_t SIZE =
      KEYS * (BLOCK_Q + BACKWARD_CHANNELS) + BACKWARD_WARPS * KEYS * BACKWARD_CHANNELS + BACKWARD_WARPS;
  T *g, *k, *parts, *reduce;  // [j][i], [j][d], [warp][j][d]
  FUSEDATTN_DEVICE explicit JointMemory(T* memory)
      : g(memory),
        k(g + KEYS * BLOCK_Q),
        parts(k + KEYS * BACKWARD_CHANNELS),
        reduce(parts + BACKWARD_WARPS * KEYS * BACKWARD_CHANNELS) {}
};

// Sums of a thread: of its channel, over its queries and the keys so far.
template <typename T>
struct JointSums {
  T query[TILE_Q], weight;
};

// Of the staged keys and q: exponentials, or themselves.
enum class JointForm { PRODUCT, SUM, RELU, LEAKY_RELU };

template <JointForm form, typename T>
FUSEDATTN_DEVICE void joint_keys(const JointMemory<T>& memory, const T (&q)[TILE_Q], const Factors<T>& by,
                                 JointSums<T>& sums) {
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  const T *g_of_warp = memory.g + warp * TILE_Q, *k_of_lane = memory.k + lane;
  T* part = memory.parts + warp * BACKWARD_KEYS<T> * BACKWARD_CHANNELS + lane;
#pragma unroll 4
  for (int key = 0; key < BACKWARD_KEYS<T>; ++key) {
    const T k = k_of_lane[key * BACKWARD_CHANNELS];
    T sum = 0;
#pragma unroll
    for (int half = 0; half < TILE_Q; half += 4) {
      const auto g = gpu::load_pack<4>(g_of_warp + key * BLOCK_Q + half);
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        if constexpr (form == JointForm::RELU || form == JointForm::LEAKY_RELU) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            constexpr bool leaky = form == JointForm::LEAKY_RELU;
            const T h =
                linear_gradient<leaky>(q[half + e + n] + k, g.element[e + n], by.negative_slope, sums.weight);
            sums.query[half + e + n] += h;
            sum += h;
          }
        } else {
          T r[2];
          if constexpr (form == JointForm::PRODUCT) {
            const T t1 = gpu::fma(q[half + e], k, T(1)), t2 = gpu::fma(q[half + e + 1], k, T(1));
            paired_reciprocal(t1, t2, r[0], r[1]);
          } else {
            r[0] = reciprocal_of_sum(by.argument * (q[half + e] + k));
            r[1] = reciprocal_of_sum(by.argument * (q[half + e + 1] + k));
          }
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const T u = gpu::fma(-r[n], r[n], r[n]);
            sums.query[half + e + n] = gpu::fma(g.element[e + n], u, sums.query[half + e + n]);
            sum = gpu::fma(g.element[e + n], u, sum);
            sums.weight = gpu::fma(g.element[e + n], r[n], sums.weight);
          }
        }
      }
    }
    part[key * BACKWARD_CHANNELS] = sum;
  }
}

// Blocks on a multiprocessor that registers must leave room for; 0: as the compiler likes. From sm_120 on its
// shared memory holds two, and registers for a third would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
constexpr int JOINT_BLOCKS = 3;
#else
constexpr int JOINT_BLOCKS = 2;
#endif
template <typename S, typename Phi>
constexpr int JOINT_OCCUPANCY =
    TAKES_EXPONENTIALS<Phi> ? (sizeof(S) < 8 ? JOINT_BLOCKS : 0) : (sizeof(S) < 8 ? 2 : 1);

template <typename S, typename Phi>
__global__ void __launch_bounds__(BACKWARD_BLOCK, JOINT_OCCUPANCY<S, Phi>)
    additive_attention_bwd_kernel_inputs(const AttentionProblem<S> p, const AttentionGradients<S> grads,
                                         const BackwardChunk<gpu::Arithmetic<S>> chunk) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const JointMemory<T> memory(shared);
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  const int64_t strips = chunk.channels / BACKWARD_CHANNELS, d0 = blockIdx.x % strips * BACKWARD_CHANNELS;
  const int64_t head = blockIdx.x / (strips * chunk.tiles);
  const int64_t tile = chunk.tiles - 1 - blockIdx.x / strips % chunk.tiles;  // the last first, as in forward
  const int64_t local = head * chunk.tiles + tile;
  const Head at(p, chunk.first_head + head);
  const int64_t i0 = (chunk.first_tile + tile) * BLOCK_Q, d = d0 + lane, first_row = i0 + warp * TILE_Q;
  const KeyRange keys_of_tile = p.keys_of_tile(at.b, at.h, i0);
  const int64_t first_column = chunk.first_column(keys_of_tile);

  T q[TILE_Q], bound = 0;
  const auto load_queries = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i) {
      const bool exists = first_row + i < p.Tq && d < p.D;
      q[i] = f(exists ? gpu::to_arithmetic(p.query.row(at.b, at.h, first_row + i)[d]) : T(0));
    }
  };
  const auto same = [](T x) { return x; };
  if constexpr (TAKES_EXPONENTIALS<Phi>) {
    load_queries([&](T x) {
      bound = gpu::max(bound, gpu::abs(x));
      return exponential(x, p.by);
    });
    bound = block_reduce(bound, memory.reduce, [](T a, T b) { return gpu::max(a, b); });
  } else {
    load_queries(same);
  }

  // What the thread stages and sums: 4 channels of a key, if there are as many, and packs of g.
  constexpr int KEYS = BACKWARD_KEYS<T>;
  const int key = static_cast<int>(threadIdx.x) / 8, channel = static_cast<int>(threadIdx.x) % 8 * PACK;
  const bool stages = key < KEYS;
  JointSums<T> sums = {};
  T g_sum = 0;
  bool raw = false;  // whether q holds q
  for (int64_t j0 = keys_of_tile.first / KEYS * KEYS; j0 < keys_of_tile.end; j0 += KEYS) {
    __syncthreads();
    const T* g = chunk.g + (head * chunk.keys + j0 - first_column) * chunk.rows() + tile * BLOCK_Q;
#pragma unroll
    for (int n = 0; n < KEYS * BLOCK_Q / (PACK * BACKWARD_BLOCK); ++n) {
      const int at_pack = static_cast<int>(threadIdx.x) + n * BACKWARD_BLOCK;
      const int row = at_pack / (BLOCK_Q / PACK), column = at_pack % (BLOCK_Q / PACK) * PACK;
      const auto pack = gpu::load_pack<PACK>(g + row * chunk.rows() + column);
#pragma unroll
      for (int e = 0; e < PACK; ++e) g_sum += pack.element[e];
      gpu::store_pack(memory.g + row * BLOCK_Q + column, pack);
    }
    const bool exists = stages && j0 + key < keys_of_tile.end && p.sees(at.b, at.h, j0 + key);
    const auto keys =
        load_channels(p.key.row(at.b, at.h, exists ? j0 + key : j0), p.key.packed, d0 + channel, exists ? p.D : 0);
    T key_bound = 0;
    gpu::Pack<T, PACK> pack;
#pragma unroll
    for (int e = 0; e < PACK; ++e) {
      const T x = gpu::to_arithmetic(keys.element[e]);
      key_bound = gpu::max(key_bound, gpu::abs(x));
      pack.element[e] = TAKES_EXPONENTIALS<Phi> ? exponential(x, p.by) : x;
    }
    const auto store_keys = [&] {
      if (stages) gpu::store_pack(memory.k + key * BACKWARD_CHANNELS + channel, pack);
    };
    store_keys();
    if constexpr (!TAKES_EXPONENTIALS<Phi>) {
      __syncthreads();
      if (p.options.activation == ScoreActivation::LEAKY_RELU)
        joint_keys<JointForm::LEAKY_RELU>(memory, q, p.by, sums);
      else
        joint_keys<JointForm::RELU>(memory, q, p.by, sums);
    } else if (!__syncthreads_or(!(bound + key_bound <= p.by.range))) {
      if (raw) load_queries([&](T x) { return exponential(x, p.by); });
      raw = false;
      joint_keys<JointForm::PRODUCT>(memory, q, p.by, sums);
    } else {
#pragma unroll
      for (int e = 0; e < PACK; ++e) pack.element[e] = gpu::to_arithmetic(keys.element[e]);
      store_keys();
      if (!raw) load_queries(same);
      raw = true;
      __syncthreads();
      joint_keys<JointForm::SUM>(memory, q, p.by, sums);
    }
    __syncthreads();
    if (!stages) continue;
#pragma unroll
    for (int e = 0; e < PACK; ++e) pack.element[e] = 0;
#pragma unroll
    for (int w = 0; w < BACKWARD_WARPS; ++w) {
      const auto part = gpu::load_pack<PACK>(memory.parts + (w * KEYS + key) * BACKWARD_CHANNELS + channel);
#pragma unroll
      for (int e = 0; e < PACK; ++e) pack.element[e] += part.element[e];
    }
    const int64_t column = j0 - first_column + key;
    gpu::store_pack(chunk.key_parts + (local * chunk.keys + column) * chunk.channels + d0 + channel, pack);
  }

  if (d < p.D) {
    const T w = p.weight_of(at.h, d);
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i)
      if (first_row + i < p.Tq)
        grads.grad_query[(at.n * p.Tq + first_row + i) * p.D + d] =
            gpu::to_storage<S>(p.by.slope * w * sums.query[i]);
  }
  g_sum = block_reduce(g_sum, memory.reduce, [](T a, T b) { return a + b; });
  memory.parts[threadIdx.x] = sums.weight;
  __syncthreads();
  if (warp == 0) {
    T sum = 0;
    for (int w = 0; w < BACKWARD_WARPS; ++w) sum += memory.parts[w * gpu::WARP + lane];
    chunk.weight_parts[(at.n * p.query_tiles() + chunk.first_tile + tile) * chunk.channels + d] =
        p.by.total * g_sum + p.by.sum * sum;
  }
}

// Tiles of a chunk, counted from its first one, outside of which none sees these keys.
template <typename S, typename T>
FUSEDATTN_DEVICE QueryRange tiles_of(const AttentionProblem<S>& p, const BackwardChunk<T>& chunk, KeyRange keys) {
  const QueryRange queries = p.queries_of(keys);
  return {higher(0, queries.first / BLOCK_Q - chunk.first_tile),
          lower(chunk.tiles, gpu::ceil_div(queries.end, BLOCK_Q) - chunk.first_tile)};
}

// dk of the chunk's heads from the parts of its tiles that see the key, and from earlier chunks.
template <typename S>
__global__ void __launch_bounds__(BACKWARD_BLOCK)
    additive_attention_bwd_kernel_keys(const AttentionProblem<S> p, const BackwardChunk<gpu::Arithmetic<S>> chunk,
                                       S* grad_key) {
  using T = gpu::Arithmetic<S>;
  const int64_t elements = chunk.heads * p.Tk * p.D;
  for (int64_t n = int64_t{blockIdx.x} * BACKWARD_BLOCK + threadIdx.x; n < elements;
       n += int64_t{gridDim.x} * BACKWARD_BLOCK) {
    const int64_t head = n / (p.Tk * p.D), j = n / p.D % p.Tk, d = n % p.D;
    const Head at(p, chunk.first_head + head);
    const int64_t to = (at.n * p.Tk + j) * p.D + d;
    T sum = chunk.first ? T(0) : chunk.key_sums[to];
    const QueryRange tiles = tiles_of(p, chunk, {j, j + 1});
    for (int64_t tile = tiles.first; tile < tiles.end; ++tile) {
      const KeyRange keys = p.keys_of_tile(at.b, at.h, (chunk.first_tile + tile) * BLOCK_Q);
      const int64_t column = j - chunk.first_column(keys);
      if (j >= keys.first && j < keys.end)
        sum += chunk.key_parts[((head * chunk.tiles + tile) * chunk.keys + column) * chunk.channels + d];
    }
    if (chunk.last)
      grad_key[to] = gpu::to_storage<S>(p.by.slope * p.weight_of(at.h, d) * sum);
    else
      chunk.key_sums[to] = sum;
  }
}

// A tile of dx: 64 keys x 64 columns.
template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK, sizeof(S) == 8 ? 2 : 0)
    additive_attention_bwd_kernel_values(const AttentionProblem<S> p, const RowsOf<S> grad_context,
                                         const BackwardChunk<gpu::Arithmetic<S>> chunk, S* grad_value) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);  // p as [i][j], dc as [i][v]
  T* const dc = shared + BLOCK_Q * BLOCK_K;
  const int64_t column_tiles = gpu::ceil_div(p.Dv, 64), key_tiles = gpu::ceil_div(p.Tk, BLOCK_K);
  const int64_t v0 = blockIdx.x % column_tiles * 64, j0 = blockIdx.x / column_tiles % key_tiles * BLOCK_K;
  const int64_t head = blockIdx.x / (column_tiles * key_tiles);
  const Head at(p, chunk.first_head + head);
  const RowsOf<T> weights(chunk.p + head * chunk.rows() * chunk.keys, 0, 0, chunk.keys);
  T acc[TILE_Q][TILE_K] = {};
  const QueryRange tiles = tiles_of(p, chunk, {j0, j0 + BLOCK_K});
  for (int64_t tile = tiles.first; tile < tiles.end; ++tile) {
    const int64_t i0 = (chunk.first_tile + tile) * BLOCK_Q, queries_end = lower(p.Tq, i0 + BLOCK_Q);
    const KeyRange keys = p.keys_of_tile(at.b, at.h, i0);
    if (j0 >= keys.end || j0 + BLOCK_K <= keys.first) continue;
    const int64_t column = j0 - chunk.first_column(keys);
    __syncthreads();
    stage_rows<BLOCK_K>(weights, at, tile * BLOCK_Q, (tile + 1) * BLOCK_Q, column, chunk.keys, shared);
    stage_rows<BLOCK_K>(grad_context, at, i0, queries_end, v0, p.Dv, dc);
    __syncthreads();
    multiply_tile<BLOCK_K>(shared, dc, static_cast<int>(queries_end - i0), acc);
  }
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i) {
    const int64_t j = j0 + tile_row() + i;
    if (j >= p.Tk) break;
#pragma unroll
    for (int c = 0; c < TILE_K; ++c) {
      const int64_t v = v0 + tile_column() + c, to = (at.n * p.Tk + j) * p.Dv + v;
      if (v >= p.Dv) break;
      const T sum = chunk.first ? acc[i][c] : chunk.value_sums[to] + acc[i][c];
      if (chunk.last)
        grad_value[to] = gpu::to_storage<S>(sum);
      else
        chunk.value_sums[to] = sum;
    }
  }
}

// dw of 32 channels of a head: 8 warps share the parts, `tiles` for every element of the batch, in a fixed order.
template <typename S>
__global__ void __launch_bounds__(BACKWARD_BLOCK)
    additive_attention_bwd_kernel_weight(const AttentionProblem<S> p, const gpu::Arithmetic<S>* parts,
                                         int64_t tiles, int64_t channels, gpu::Numbers<S> grad_weight) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  const int64_t strips = channels / BACKWARD_CHANNELS;
  const int64_t h = blockIdx.x / strips, d = blockIdx.x % strips * BACKWARD_CHANNELS + lane;
  T sum = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const T* const of = parts + (b * p.H + h) * tiles * channels + d;
    // Warps go on where those of the batch element before ended.
    const int64_t first = (warp + BACKWARD_WARPS - b * tiles % BACKWARD_WARPS) % BACKWARD_WARPS;
#pragma unroll 4
    for (int64_t tile = first; tile < tiles; tile += BACKWARD_WARPS) sum += of[tile * channels];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || d >= p.D) return;
  for (int w = 1; w < BACKWARD_WARPS; ++w) sum += shared[w * gpu::WARP + lane];
  grad_weight.set(h * p.D + d, sum);
}

template <typename S>
__global__ void __launch_bounds__(BACKWARD_BLOCK) additive_attention_bwd_kernel_zero(S* x, int64_t n) {
  const int64_t at = int64_t{blockIdx.x} * BACKWARD_BLOCK + threadIdx.x;
  if (at < n) x[at] = gpu::to_storage<S>(gpu::Arithmetic<S>(0));
}

// Elements of working memory: of the plan, of that of the bias, then what prepared takes.
struct BackwardMemory {
  int64_t bias, seen, size;  // where those begin, and all
};
template <typename S>
BiasPlan<S> bias_plan(const AttentionProblem<S>& p, const AttentionGradients<S>& grads, int64_t chunk_elements) {
  if (few_queries(p, grads)) return BiasPlan<S>(p, grads, p.heads(), 1, p.Tq, p.Tk);
  const BackwardPlan<S> plan(p, chunk_elements);
  return BiasPlan<S>(p, grads, plan.chunk_heads, plan.chunk_tiles, plan.chunk_tiles * BLOCK_Q, plan.keys);
}
template <typename S>
BackwardMemory backward_memory(const AttentionProblem<S>& p, const AttentionGradients<S>& grads,
                               int64_t chunk_elements) {
  const int64_t planned = few_queries(p, grads) ? FewPlan<S>(p).size : BackwardPlan<S>(p, chunk_elements).size;
  const int64_t bias = whole_packs(planned), seen = bias + bias_plan(p, grads, chunk_elements).size;
  return {bias, seen, seen + seen_workspace(p)};
}
template <typename S>
int64_t additive_attention_bwd_workspace(const AttentionProblem<S>& p, const AttentionGradients<S>& grads,
                                         int64_t chunk_elements = BACKWARD_CHUNK) {
  return backward_memory(p, grads, chunk_elements).size;
}

// Compiled for Phi as launch_tiles of cuda_fwd.cuh is.
template <typename Phi, typename S>
void launch_scores(const AttentionProblem<S>& p, const AttentionGradients<S>& grads,
                   const BackwardChunk<gpu::Arithmetic<S>>& chunk, const ScoreRows<gpu::Arithmetic<S>>& scores,
                   bool only_scores, cudaStream_t stream) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_LAUNCH((additive_attention_bwd_kernel_scores<S, Phi>),
                   chunk.heads * chunk.tiles * (chunk.keys / BLOCK_K), ATTENTION_BLOCK,
                   ScoreMemory<T>::SIZE * sizeof(T), stream, p, grads, chunk, scores, only_scores);
}
template <typename Phi, typename S>
void launch_inputs(const AttentionProblem<S>& p, const AttentionGradients<S>& grads,
                   const BackwardChunk<gpu::Arithmetic<S>>& chunk, cudaStream_t stream) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_LAUNCH((additive_attention_bwd_kernel_inputs<S, Phi>),
                   chunk.heads * chunk.tiles * (chunk.channels / BACKWARD_CHANNELS), BACKWARD_BLOCK,
                   JointMemory<T>::SIZE * sizeof(T), stream, p, grads, chunk);
}
#define FUSEDATTN_LINEAR_BWD(keyword, S)                                                                    \
  keyword template void launch_scores<Linear>(const AttentionProblem<S>&, const AttentionGradients<S>&,     \
                                              const BackwardChunk<gpu::Arithmetic<S>>&,                     \
                                              const ScoreRows<gpu::Arithmetic<S>>&, bool, cudaStream_t);    \
  keyword template void launch_inputs<Linear>(const AttentionProblem<S>&, const AttentionGradients<S>&,     \
                                              const BackwardChunk<gpu::Arithmetic<S>>&, cudaStream_t);      \
  keyword template void launch_few_inputs<Linear>(const AttentionProblem<S>&, const AttentionGradients<S>&, \
                                                  const FewParts<gpu::Arithmetic<S>>&, cudaStream_t);

template <typename S>
void launch_additive_attention_bwd(const AttentionProblem<S>& problem, const AttentionGradients<S>& grads,
                                   gpu::Arithmetic<S>* workspace, cudaStream_t stream,
                                   int64_t chunk_elements = BACKWARD_CHUNK) {
  using T = gpu::Arithmetic<S>;
  const BackwardMemory memory = backward_memory(problem, grads, chunk_elements);
  const auto p = prepared<true>(problem, workspace + memory.seen, stream);
  const auto zero = [&](auto* x, int64_t n) {
    if (n > 0 && x != nullptr)
      FUSEDATTN_LAUNCH(additive_attention_bwd_kernel_zero<std::remove_pointer_t<decltype(x)>>,
                       gpu::ceil_div(n, BACKWARD_BLOCK), BACKWARD_BLOCK, 0, stream, x, n);
  };
  const auto zero_numbers = [&](const gpu::Numbers<S>& x, int64_t n) {
    if (x.wide)
      zero(static_cast<T*>(x.data), n);
    else
      zero(static_cast<S*>(x.data), n);
  };
  const BiasPlan<S> bias = bias_plan(p, grads, chunk_elements);
  T* const of_bias = workspace + memory.bias;
  const int64_t values = p.heads() * p.Tk * p.Dv;
  const bool empty = p.heads() == 0 || p.Tq == 0 || p.Tk == 0;
  if (empty) {
    zero(grads.grad_query, p.heads() * p.Tq * p.D);
    zero(grads.grad_key, p.heads() * p.Tk * p.D);
    zero_numbers(grads.grad_weight, p.H * p.D);
    zero_numbers(grads.grad_bias, bias.elements);
  }
  if (empty || grads.grad_context.data == nullptr) zero(grads.grad_value, values);
  if (empty) return;
  zero(bias.sums_of(grads, of_bias), bias.elements);

  BackwardChunk<T> chunk;
  chunk.bias = bias.elements > 0 ? of_bias : nullptr;
  const auto add_to_bias = [&](int64_t rows, int64_t columns) {
    const BiasChunk<T> of_chunk = {of_bias,          rows,        columns,          chunk.follows,
                                   chunk.first_head, chunk.heads, chunk.first_tile, chunk.tiles};
    launch_bias_chunk(p, grads, bias, of_chunk, of_bias, stream);
  };
  const auto launch_rows = [&](const ScoreRows<T>& scores) {
    FUSEDATTN_LAUNCH(additive_attention_bwd_kernel_rows<S>,
                     gpu::ceil_div(chunk.heads * chunk.rows(), ATTENTION_BLOCK / gpu::WARP), ATTENTION_BLOCK, 0,
                     stream, p, grads, chunk, scores);
  };
  const auto launch_weight = [&](const T* parts, int64_t parts_of_head, int64_t channels) {
    FUSEDATTN_LAUNCH(additive_attention_bwd_kernel_weight<S>, p.H * (channels / BACKWARD_CHANNELS), BACKWARD_BLOCK,
                     BACKWARD_BLOCK * sizeof(T), stream, p, parts, parts_of_head, channels, grads.grad_weight);
  };
  if (few_queries(p, grads)) {
    const FewPlan<S> plan(p);
    FewParts<T> parts(plan, workspace);
    parts.bias = chunk.bias;
    chunk.first_head = 0, chunk.heads = p.heads(), chunk.first_tile = 0, chunk.tiles = 1;
    chunk.row_terms = parts.row_terms;
    chunk.follows = false;
    launch_rows({grads.scores, p.Tq * p.Tk, p.Tk, false});
    launch_additive_attention_bwd_few(p, grads, parts, stream);
    if (p.D > 0) launch_weight(parts.weight, parts.splits, parts.channels);
    add_to_bias(p.Tq, p.Tk);
    launch_bias_rounded(grads, bias, of_bias, stream);
    return;
  }

  const BackwardPlan<S> plan(p, chunk_elements);
  chunk.keys = plan.keys, chunk.channels = plan.channels, chunk.follows = plan.follows;
  chunk.g = workspace + plan.g, chunk.p = workspace + plan.p;
  chunk.key_parts = workspace + plan.key_parts, chunk.weight_parts = workspace + plan.weight_parts;
  chunk.row_terms = workspace + plan.row_terms;
  chunk.key_sums = workspace + plan.key_sums, chunk.value_sums = workspace + plan.value_sums;
  if constexpr (sizeof(S) == sizeof(T)) chunk.key_sums = grads.grad_key, chunk.value_sums = grads.grad_value;

  for (int64_t head = 0; head < p.heads(); head += plan.chunk_heads)
    for (int64_t tile = 0; tile < plan.tiles; tile += plan.chunk_tiles) {
      chunk.first_head = head, chunk.first_tile = tile;
      chunk.heads = plan.chunk_heads < p.heads() - head ? plan.chunk_heads : p.heads() - head;
      chunk.tiles = plan.chunk_tiles < plan.tiles - tile ? plan.chunk_tiles : plan.tiles - tile;
      chunk.first = tile == 0, chunk.last = tile + chunk.tiles == plan.tiles;

      ScoreRows<T> scores = {grads.scores, p.Tq * p.Tk, p.Tk, false};
      if (scores.data != nullptr) scores.data += head * scores.stride_head + tile * BLOCK_Q * scores.stride_row;
      const auto launch_score_tiles = [&](bool only_scores) {
        with_phi(p.options.activation,
                 [&](auto phi) { launch_scores<decltype(phi)>(p, grads, chunk, scores, only_scores, stream); });
      };
      if (scores.data == nullptr && grads.grad_weights != nullptr) {  // the rows need all scores first
        launch_score_tiles(true);
        scores = {chunk.p, chunk.rows() * chunk.keys, chunk.keys, true};
      }
      launch_rows(scores);
      launch_score_tiles(false);
      add_to_bias(chunk.rows(), chunk.keys);
      if (p.D > 0) {
        with_phi(p.options.activation, [&](auto phi) { launch_inputs<decltype(phi)>(p, grads, chunk, stream); });
        const int64_t key_blocks = gpu::ceil_div(chunk.heads * p.Tk * p.D, BACKWARD_BLOCK);
        if (grads.grad_key != nullptr)
          FUSEDATTN_LAUNCH(additive_attention_bwd_kernel_keys<S>, key_blocks < 65536 ? key_blocks : 65536,
                           BACKWARD_BLOCK, 0, stream, p, chunk, grads.grad_key);
      }
      if (grads.grad_context.data != nullptr && grads.grad_value != nullptr && p.Dv > 0)
        FUSEDATTN_LAUNCH(additive_attention_bwd_kernel_values<S>,
                         chunk.heads * gpu::ceil_div(p.Tk, BLOCK_K) * gpu::ceil_div(p.Dv, 64), ATTENTION_BLOCK,
                         2 * BLOCK_Q * BLOCK_K * sizeof(T), stream, p, grads.grad_context, chunk,
                         grads.grad_value);
    }
  if (p.D > 0) launch_weight(chunk.weight_parts, plan.tiles, plan.channels);
  launch_bias_rounded(grads, bias, of_bias, stream);
}

}  // namespace fusedattn
