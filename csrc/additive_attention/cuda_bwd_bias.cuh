// The gradient of the bias: that of scores with their bias, which the kernels of scores leave behind, summed over
// the dimensions in which the bias is broadcast, in a fixed order.
//
// A block owns a tile of the bias, of 64 queries and 64 keys or fewer where these are broadcast, and adds up the
// tiles of scores that share it, a thread 32 rows of one key. Where tiles of the bias are fewer than fill a GPU,
// those of scores are cut into parts, which a second kernel adds. Sums of earlier chunks of queries lie in `sums`.
#pragma once

#include "cuda_problem.cuh"
#include "cuda_split.cuh"

namespace fusedattn {

// A chunk of the gradients of scores: tiles [first_tile, first_tile + tiles) of queries of heads [first_head,
// first_head + heads).
template <typename T>
struct BiasChunk {
  const T* grads;  // (heads, rows, columns)
  int64_t rows, columns;
  bool follows;  // BackwardChunk's: where columns begin
  int64_t first_head, heads, first_tile, tiles;
};

// How they are summed. Of each dimension: whether the bias has as many of its own as the scores.
struct BiasSum {
  bool batches, heads, queries, keys;
  int64_t query_tiles, key_tiles;  // of scores in a chunk
  int64_t splits;                  // parts of a tile of the bias

  template <typename S>
  BiasSum(const AttentionProblem<S>& p, int64_t first_head, int64_t chunk_heads, int64_t chunk_tiles)
      : batches(p.bias_size[0] == p.B),
        heads(p.bias_size[1] == p.H),
        queries(p.bias_size[2] == p.Tq),
        keys(p.bias_size[3] == p.Tk),
        query_tiles(chunk_tiles),
        key_tiles(gpu::ceil_div(p.Tk, BLOCK_K)) {
    const int64_t tiles = groups(p, first_head, chunk_heads) * tiles_of_group();
    const int64_t shared = (batches && heads ? 1
                            : heads          ? gpu::ceil_div(chunk_heads, p.H)
                                             : chunk_heads) *
                           query_tiles * key_tiles / tiles_of_group();
    const int64_t wanted = tiles == 0 ? 1 : gpu::ceil_div(SPLIT_BLOCKS, tiles);
    splits = wanted < shared ? wanted : shared < 1 ? 1 : shared;
  }

  // Heads of the bias that a chunk of those of scores belongs to.
  template <typename S>
  int64_t groups(const AttentionProblem<S>& p, int64_t first_head, int64_t chunk_heads) const {
    if (batches && heads) return chunk_heads;
    if (batches) return chunk_heads == 0 ? 0 : (first_head + chunk_heads - 1) / p.H - first_head / p.H + 1;
    return heads && p.H < chunk_heads ? p.H : heads ? chunk_heads : 1;
  }
  FUSEDATTN_HOST_DEVICE int64_t tiles_of_group() const {
    return (queries ? query_tiles : 1) * (keys ? key_tiles : 1);
  }
  FUSEDATTN_HOST_DEVICE int rows() const { return queries ? BLOCK_Q : 1; }
  FUSEDATTN_HOST_DEVICE int columns() const { return keys ? BLOCK_K : 1; }
};

// A tile of the bias, and which heads of scores share it.
struct BiasTile {
  int64_t first, last, step;  // heads, counted over all
  int64_t query_tile, key_tile;
  int64_t at, row_stride;  // in the gradient
  int64_t rows, columns;   // that exist

  template <typename S, typename T>
  FUSEDATTN_DEVICE BiasTile(const AttentionProblem<S>& p, const BiasChunk<T>& chunk, const BiasSum& sum, int64_t n)
      : first(chunk.first_head),
        last(chunk.first_head + chunk.heads),
        step(1),
        query_tile(sum.queries ? n / (sum.keys ? sum.key_tiles : 1) % chunk.tiles : 0),
        key_tile(sum.keys ? n % sum.key_tiles : 0),
        row_stride(p.bias_size[3]) {
    const int64_t group = n / ((sum.queries ? chunk.tiles : 1) * (sum.keys ? sum.key_tiles : 1));
    if (sum.heads) {
      first += group;
      step = sum.batches ? chunk.heads : p.H;
    } else if (sum.batches) {
      const int64_t b = chunk.first_head / p.H + group;
      first = higher(first, b * p.H), last = lower(last, (b + 1) * p.H);
    }
    const int64_t b = sum.batches ? first / p.H : 0, h = sum.heads ? first % p.H : 0;
    const int64_t i = sum.queries ? (chunk.first_tile + query_tile) * BLOCK_Q : 0, j = key_tile * BLOCK_K;
    at = ((b * p.bias_size[1] + h) * p.bias_size[2] + i) * p.bias_size[3] + j;
    rows = lower(sum.rows(), p.bias_size[2] - i), columns = lower(sum.columns(), p.bias_size[3] - j);
  }
};

template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK)
    additive_attention_bwd_kernel_bias(const AttentionProblem<S> p, const BiasChunk<gpu::Arithmetic<S>> chunk,
                                       const BiasSum sum, gpu::Arithmetic<S>* sums, gpu::Arithmetic<S>* parts) {
  using T = gpu::Arithmetic<S>;
  FUSEDATTN_DYNAMIC_SHARED(T, shared);
  constexpr int ROW_STEP = ATTENTION_BLOCK / BLOCK_K, ROWS = BLOCK_Q / ROW_STEP;
  const int key = static_cast<int>(threadIdx.x) % BLOCK_K, first_row = static_cast<int>(threadIdx.x) / BLOCK_K;
  const int64_t split = blockIdx.x % sum.splits;
  const BiasTile tile(p, chunk, sum, blockIdx.x / sum.splits);
  const int64_t query_tiles = sum.queries ? 1 : chunk.tiles, key_tiles = sum.keys ? 1 : sum.key_tiles;
  const int64_t heads = gpu::ceil_div(tile.last - tile.first, tile.step), all = heads * query_tiles * key_tiles;

  T acc[ROWS] = {};
  for (int64_t n = all * split / sum.splits; n < all * (split + 1) / sum.splits; ++n) {
    const Head at(p, tile.first + n / (query_tiles * key_tiles) * tile.step);
    const int64_t query_tile = tile.query_tile + n / key_tiles % query_tiles;
    const int64_t i0 = (chunk.first_tile + query_tile) * BLOCK_Q;
    const int64_t j = (tile.key_tile + n % key_tiles) * BLOCK_K + key;
    const KeyRange keys = p.keys_of_tile(at.b, at.h, i0);
    if (j < keys.first || j >= keys.end) continue;
    const int64_t column = chunk.follows ? j - keys.first / BLOCK_K * BLOCK_K : j;
    const int64_t row = (at.n - chunk.first_head) * chunk.rows + query_tile * BLOCK_Q + first_row;
    const T* from = chunk.grads + row * chunk.columns + column;
    const int rows = static_cast<int>(lower(BLOCK_Q, p.Tq - i0)) - first_row;
#pragma unroll
    for (int r = 0; r < ROWS; ++r, from += ROW_STEP * chunk.columns)
      if (r * ROW_STEP < rows) acc[r] += *from;
  }

  const auto put = [&](int row, int column, T x) {
    if (sum.splits > 1)
      parts[(int64_t{blockIdx.x} * sum.rows() + row) * sum.columns() + column] = x;
    else if (row < tile.rows && column < tile.columns)
      sums[tile.at + row * tile.row_stride + column] += x;
  };
  if (sum.queries && sum.keys) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) put(first_row + row * ROW_STEP, key, acc[row]);
    return;
  }
  // What the threads of other rows, or of other keys, have.
  constexpr int WARPS_OF_ROW = BLOCK_K / gpu::WARP;
  const int lane = threadIdx.x % gpu::WARP, warp = threadIdx.x / gpu::WARP;
  if (sum.queries) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const T x = gpu::warp_sum(acc[row]);
      if (lane == 0) shared[(first_row + row * ROW_STEP) * WARPS_OF_ROW + warp % WARPS_OF_ROW] = x;
    }
    __syncthreads();
    const int row = threadIdx.x;
    if (row < BLOCK_Q) put(row, 0, shared[row * WARPS_OF_ROW] + shared[row * WARPS_OF_ROW + 1]);
    return;
  }
  static_assert(WARPS_OF_ROW == 2 && ROW_STEP == 2, "sums of two");
  T of_rows = acc[0];
#pragma unroll
  for (int row = 1; row < ROWS; ++row) of_rows += acc[row];
  if (sum.keys) {
    shared[threadIdx.x] = of_rows;
    __syncthreads();
    if (first_row == 0) put(0, key, of_rows + shared[BLOCK_K + key]);
    return;
  }
  const T total = block_reduce(of_rows, shared, [](T a, T b) { return a + b; });
  if (threadIdx.x == 0) put(0, 0, total);
}

// Adds the parts of tiles of the bias to its sums, in their order.
template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK)
    additive_attention_bwd_kernel_bias_parts(const AttentionProblem<S> p,
                                             const BiasChunk<gpu::Arithmetic<S>> chunk, const BiasSum sum,
                                             int64_t elements, const gpu::Arithmetic<S>* parts,
                                             gpu::Arithmetic<S>* sums) {
  using T = gpu::Arithmetic<S>;
  const int64_t n = int64_t{blockIdx.x} * ATTENTION_BLOCK + threadIdx.x;
  if (n >= elements) return;
  const int64_t of_tile = sum.rows() * sum.columns(), e = n % of_tile;
  const int64_t row = e / sum.columns(), column = e % sum.columns();
  const BiasTile tile(p, chunk, sum, n / of_tile);
  if (row >= tile.rows || column >= tile.columns) return;
  T total = 0;
  for (int64_t split = 0; split < sum.splits; ++split)
    total += parts[(n / of_tile * sum.splits + split) * of_tile + e];
  sums[tile.at + row * tile.row_stride + column] += total;
}

// The sums in the type of the bias.
template <typename S>
__global__ void __launch_bounds__(ATTENTION_BLOCK)
    additive_attention_bwd_kernel_bias_rounded(const gpu::Arithmetic<S>* sums, int64_t elements, S* grad_bias) {
  const int64_t n = int64_t{blockIdx.x} * ATTENTION_BLOCK + threadIdx.x;
  if (n < elements) grad_bias[n] = gpu::to_storage<S>(sums[n]);
}

// Where its working memory lies, by the shape alone; empty where the gradient is not asked for.
template <typename S>
struct BiasPlan {
  using T = gpu::Arithmetic<S>;
  int64_t elements = 0;  // of the bias
  int64_t splits = 1;
  int64_t parts = 0, sums = 0, size = 0;  // behind the gradients of scores

  // Of chunks of so many heads and tiles of queries, whose scores have so many rows and columns.
  BiasPlan(const AttentionProblem<S>& p, const AttentionGradients<S>& gradients, int64_t heads, int64_t tiles,
           int64_t rows, int64_t columns) {
    if (gradients.grad_bias.data == nullptr) return;
    elements = p.bias_size[0] * p.bias_size[1] * p.bias_size[2] * p.bias_size[3];
    if (elements == 0) return;
    const BiasSum sum(p, 0, heads, tiles);
    splits = sum.splits;
    // A chunk that begins within a batch element may have one more of these.
    const int64_t of_parts = (sum.groups(p, 0, heads) + 1) * sum.tiles_of_group() * sum.rows() * sum.columns();
    parts = whole_packs(heads * rows * columns);
    sums = parts + (splits > 1 ? whole_packs(of_parts * splits) : 0);
    size = sums + (is_rounded(gradients) ? whole_packs(elements) : 0);
  }

  static bool is_rounded(const AttentionGradients<S>& gradients) {
    return sizeof(S) < sizeof(T) && !gradients.grad_bias.wide;
  }
  T* sums_of(const AttentionGradients<S>& gradients, T* memory) const {
    return is_rounded(gradients) ? memory + sums : static_cast<T*>(gradients.grad_bias.data);
  }
};

// Adds a chunk's gradients to the sums. memory: the plan's.
template <typename S>
void launch_bias_chunk(const AttentionProblem<S>& p, const AttentionGradients<S>& grads, const BiasPlan<S>& plan,
                       const BiasChunk<gpu::Arithmetic<S>>& chunk, gpu::Arithmetic<S>* memory,
                       cudaStream_t stream) {
  using T = gpu::Arithmetic<S>;
  if (plan.elements == 0) return;
  BiasSum sum(p, chunk.first_head, chunk.heads, chunk.tiles);
  sum.splits = plan.splits;
  T *const parts = memory + plan.parts, *const sums = plan.sums_of(grads, memory);
  const int64_t tiles = sum.groups(p, chunk.first_head, chunk.heads) * sum.tiles_of_group();
  FUSEDATTN_LAUNCH(additive_attention_bwd_kernel_bias<S>, tiles * sum.splits, ATTENTION_BLOCK,
                   ATTENTION_BLOCK * sizeof(T), stream, p, chunk, sum, sums, parts);
  const int64_t elements = tiles * sum.rows() * sum.columns();
  if (sum.splits > 1)
    FUSEDATTN_LAUNCH(additive_attention_bwd_kernel_bias_parts<S>, gpu::ceil_div(elements, ATTENTION_BLOCK),
                     ATTENTION_BLOCK, 0, stream, p, chunk, sum, elements, parts, sums);
}

// After the last chunk.
template <typename S>
void launch_bias_rounded(const AttentionGradients<S>& grads, const BiasPlan<S>& plan, gpu::Arithmetic<S>* memory,
                         cudaStream_t stream) {
  if constexpr (sizeof(S) < sizeof(gpu::Arithmetic<S>))
    if (plan.elements > 0 && BiasPlan<S>::is_rounded(grads))
      FUSEDATTN_LAUNCH(additive_attention_bwd_kernel_bias_rounded<S>,
                       gpu::ceil_div(plan.elements, ATTENTION_BLOCK), ATTENTION_BLOCK, 0, stream,
                       memory + plan.sums, plan.elements, static_cast<S*>(grads.grad_bias.data));
}

}  // namespace fusedattn
