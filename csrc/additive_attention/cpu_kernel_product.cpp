// Products with the values, forward and backward, compiled once per instruction set: plain matrix products.
#include "cpu_kernel_common.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

// Adds a ROWS x (VECTORS lanes) block of the product, in registers; `ahead` bytes further on lies what comes next.
template <int ROWS, int VECTORS, typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void add_product(int64_t K, const T* a, int64_t a_row, int64_t a_column, const S* b,
                                  int64_t b_row, int64_t ahead, Vec<T> (&acc)[ROWS][VECTORS]) {
  constexpr int W = LANES<T>;
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> bk[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      if (ahead != 0) prefetch(b + k * b_row + v * W, ahead);
      bk[v] = load(b + k * b_row + v * W);
    }
    for (int m = 0; m < ROWS; ++m) {
      const T s = a[m * a_row + k * a_column];
      for (int v = 0; v < VECTORS; ++v) acc[m][v] += s * bk[v];
    }
  }
}

template <int ROWS, int VECTORS, typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void matmul_tile(int64_t K, const T* a, int64_t a_row, int64_t a_column, const S* b,
                                  int64_t b_row, T* out, int64_t out_row, Output output, int64_t ahead) {
  constexpr int W = LANES<T>;
  Vec<T> acc[ROWS][VECTORS] = {};
  add_product(K, a, a_row, a_column, b, b_row, ahead, acc);
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < VECTORS; ++v) write<T>(out + m * out_row + v * W, acc[m][v], W, output);
}

template <int ROWS, typename S, typename T = Arithmetic<S>>
void matmul_rows(int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_column, const S* b, int64_t b_row,
                 T* out, int64_t out_row, Output output, int64_t ahead) {
  constexpr int W = LANES<T>;
  int64_t n = 0;
  for (; n + 2 * W <= N; n += 2 * W)
    matmul_tile<ROWS, 2>(K, a, a_row, a_column, b + n, b_row, out + n, out_row, output, ahead);
  for (; n + W <= N; n += W)
    matmul_tile<ROWS, 1>(K, a, a_row, a_column, b + n, b_row, out + n, out_row, output, ahead);
  if (n == N) return;
  Vec<T> acc[ROWS] = {};
  for (int64_t k = 0; k < K; ++k) {
    const Vec<T> bk = load_partial(b + k * b_row + n, N - n);
    for (int m = 0; m < ROWS; ++m) acc[m] += a[m * a_row + k * a_column] * bk;
  }
  for (int m = 0; m < ROWS; ++m) write<T>(out + m * out_row + n, acc[m], N - n, output);
}

// out (N,) += sum_r a[r] b[r]; `next` elements further on lie the rows of B that come next.
template <int ROWS, typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void add_rows(int64_t N, const T* a, const S* const* b, int64_t next, T* out) {
  constexpr int W = LANES<T>;
  const auto sum = [&](int64_t n, int64_t lanes) {
    Vec<T> o = get(out + n, lanes);
    for (int r = 0; r < ROWS; ++r) o += a[r] * get(b[r] + n, lanes);
    return o;
  };
  int64_t n = 0;
  for (; n + W <= N; n += W) {
    for (int r = 0; r < ROWS; ++r) prefetch(b[ROWS - 1] + n, (1 + r) * next * static_cast<int64_t>(sizeof(S)));
    store(out + n, sum(n, W));
  }
  if (n < N) store_partial(out + n, sum(n, N - n), N - n);
}

// One row of A: four rows of B at a time, each read from end to end, the sums in cache. B is read once, so
// the order in which memory sees it matters more than the arithmetic.
template <typename S, typename T = Arithmetic<S>>
void matmul_one_row(int64_t N, int64_t K, const T* a, int64_t a_column, const S* b, int64_t b_row,
                    const bool* seen, T* out, Output output) {
  constexpr int ROWS = 4;
  if (output != Output::ADDED)
    for (int64_t n = 0; n < N; ++n) out[n] = 0;
  T factors[ROWS];
  const S* rows[ROWS];
  int found = 0;
  for (int64_t k = 0; k < K; ++k) {
    if (seen != nullptr && !seen[k]) continue;
    factors[found] = a[k * a_column], rows[found] = b + k * b_row;
    if (++found < ROWS) continue;
    add_rows<ROWS>(N, factors, rows, b_row, out);
    found = 0;
  }
  for (int r = 0; r < found; ++r) add_rows<1>(N, factors + r, rows + r, b_row, out);
}

// matmul_rows of 1 .. MOST rows.
template <int MOST, typename... Arguments>
FUSEDATTN_INLINE void matmul_up_to(int64_t rows, Arguments... arguments) {
  if constexpr (MOST > 1)
    if (rows < MOST) return matmul_up_to<MOST - 1>(rows, arguments...);
  matmul_rows<MOST>(arguments...);
}

// B is taken in blocks of rows, some 128 KiB, each read once from memory, in order, and again from cache by the
// next tile; with rows that are not seen, between those.
template <typename S, typename T = Arithmetic<S>>
void matmul(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_column, const S* b,
            int64_t b_row, const bool* seen, T* out, int64_t out_row, Output output) {
  constexpr int ROWS = VECTOR_REGISTERS >= 32 ? 8 : 4;
  const int64_t block = higher(32, 32768 / higher(N, 1));
  if (M == 1) return matmul_one_row(N, K, a, a_column, b, b_row, seen, out, output);
  const int64_t tiles = (M + ROWS - 1) / ROWS;
  const auto sees = [&](int64_t k) { return seen == nullptr || seen[k]; };
  if (output == Output::STREAMED && (K > block || seen != nullptr)) output = Output::WRITTEN;  // and added to
  int64_t k = 0;
  do {  // K = 0 still writes zeros
    while (k < K && !sees(k)) ++k;
    int64_t depth = lower(block, K - k);
    for (int64_t n = 0; seen != nullptr && n < depth; ++n)
      if (!sees(k + n)) depth = n;
    int64_t ahead = k + block < K ? block * b_row * static_cast<int64_t>(sizeof(S)) : 0;
    for (int64_t tile = 0, m = 0, rows; tile < tiles; ++tile, m += rows) {
      rows = (M - m) / (tiles - tile);
      matmul_up_to<ROWS>(rows, N, depth, a + m * a_row + k * a_column, a_row, a_column, b + k * b_row, b_row,
                         out + m * out_row, out_row, output, ahead);
      ahead = 0;
    }
    k += depth;
    output = Output::ADDED;
  } while (k < K);
  stream_fence();
}

// Sums of q k over `width` channels.
template <typename T>
struct DotTile {
  static constexpr int QUERIES = VECTOR_REGISTERS >= 32 ? 4 : 2;
  static constexpr int keys(int) { return TILE_KEYS; }
  int64_t width;

  template <int ROWS, int KEYS, typename S>
  __attribute__((always_inline)) void run(Rows<T> q, Rows<S> k, T* sums) const {
    constexpr int W = LANES<T>;
    Vec<T> acc[ROWS * KEYS] = {};
    for (int64_t d = 0; d < width; d += W)
      for (int j = 0; j < KEYS; ++j) {
        const Vec<T> kd = load(k.data + j * k.stride + d);
        // Several queries find in cache what the first of them has met.
        if (ROWS == 1) prefetch(k.data + j * k.stride + d, KEYS * k.stride * static_cast<int64_t>(sizeof(S)));
        for (int i = 0; i < ROWS; ++i) acc[i * KEYS + j] += load(q.data + i * q.stride + d) * kd;
      }
    fold_lanes(acc, sums);
  }
};

// From so many queries on, sums over channels are taken as a matrix product with the values transposed: what that
// costs is less than folding the lanes of every sum.
constexpr int64_t TRANSPOSED_QUERIES = 64;

template <typename S, typename T = Arithmetic<S>>
void grad_weights(const AttentionProblem<S>& p, const Chunk& chunk, int64_t head, int64_t first_key,
                  const T* grad_context, int64_t dc_row, T* products, T* scratch) {
  constexpr int W = LANES<T>;
  const Place at = place_of(p, chunk, head);
  const int64_t width = lower(KEY_BLOCK, p.Tk - first_key);
  // What no query sees is not looked at: it may be NaN.
  const int64_t keys = higher(0, lower(width, p.visible_keys(at.b, at.h) - first_key));
  const bool* seen = p.seen_keys(at.b, at.h);
  const auto sees = [&](int64_t c) { return c < keys && (seen == nullptr || seen[first_key + c]); };
  const int64_t Dv_padded = (p.Dv + W - 1) / W * W;
  const Rows<S> values{p.value.row(at.b, at.h, first_key), p.value.stride_t};
  products += head * chunk.queries * p.Tk + first_key;
  const KeyRange block{first_key, first_key + width};
  if (next_run(p, chunk, at, block, 0).first == chunk.queries) return;
  if (chunk.queries >= TRANSPOSED_QUERIES) {
    Rows<T> x;
    if constexpr (IS_NARROW<S>)
      x = copied(values, keys, p.Dv, scratch + KEY_BLOCK * Dv_padded, Dv_padded);
    else
      x = values;
    for (int64_t d = 0; d < p.Dv; ++d)
      for (int64_t c = 0; c < width; ++c) scratch[d * KEY_BLOCK + c] = c < keys ? x.data[c * x.stride + d] : 0;
    for (int64_t c = 0; c < keys; ++c)
      for (int64_t d = 0; !sees(c) && d < p.Dv; ++d) scratch[d * KEY_BLOCK + c] = 0;
    return for_each_run(p, chunk, at, block, [&](int64_t first, int64_t last) {
      matmul(last - first, width, p.Dv, grad_context + first * dc_row, dc_row, 1, scratch, KEY_BLOCK, nullptr,
             products + first * p.Tk, p.Tk, Output::WRITTEN);
    });
  }
  const bool padded = p.Dv != Dv_padded;
  T sums[DotTile<T>::QUERIES * KEY_BLOCK];
  const auto dot = [&](auto x) {
    for_each_run(p, chunk, at, block, [&](int64_t first, int64_t last) {
      for (int64_t r = first, rows; r < last; r += rows) {
        rows = tile_rows<DotTile<T>>(last - r);
        Rows<T> dc{grad_context + r * dc_row, dc_row};
        if (padded) dc = copied(dc, rows, p.Dv, scratch + KEY_BLOCK * Dv_padded, Dv_padded);
        pairwise(DotTile<T>{Dv_padded}, rows, dc, x, keys, sums);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t c = 0; c < width; ++c) products[(r + i) * p.Tk + c] = sees(c) ? sums[i * KEY_BLOCK + c] : 0;
      }
    });
  };
  if (padded)
    dot(copied(values, keys, p.Dv, scratch, Dv_padded));
  else
    dot(values);
}

// Row r of two vectors to out + r * stride. Not a loop: GCC 12 would keep the vectors in memory for it.
template <int r = 0, int ROWS, typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void store_pairs(S* out, int64_t stride, const Vec<T> (&x)[ROWS][2], bool streamed) {
  store(out + r * stride, x[r][0], x[r][1], streamed);
  if constexpr (r + 1 < ROWS) store_pairs<r + 1>(out, stride, x, streamed);
}

template <typename S, typename T = Arithmetic<S>>
void grad_values(const AttentionProblem<S>& p, const Chunk& chunk, int64_t head, int64_t first_key,
                 const T* probabilities, const T* grad_context, int64_t dc_row, const GradientRows<S>& grad_value,
                 T* scratch) {
  const Place at = place_of(p, chunk, head);
  const int64_t keys = lower(KEY_BLOCK, p.Tk - first_key);
  const KeyRange block{first_key, first_key + keys};
  if (stays(grad_value) && next_run(p, chunk, at, block, 0).first == chunk.queries) return;
  const T* a = probabilities + head * chunk.queries * p.Tk + first_key;
  const auto product = [&](T* out, Output output) {
    Run run = next_run(p, chunk, at, block, 0);
    do {  // a block that nobody sees is written, too
      const Run next = next_run(p, chunk, at, block, run.last);
      if (output == Output::STREAMED && next.first < chunk.queries) output = Output::WRITTEN;  // and added to
      matmul(keys, p.Dv, run.last - run.first, a + run.first * p.Tk, 1, p.Tk, grad_context + run.first * dc_row,
             dc_row, nullptr, out, p.Dv, output);
      output = Output::ADDED;
      run = next;
    } while (run.first < chunk.queries);
  };
  if constexpr (IS_NARROW<S>) {
    constexpr int W = LANES<T>, ROWS = 4;
    if (chunk.queries <= ROWWISE_QUERIES && is_whole(grad_value) && keys % ROWS == 0 && p.Dv % (2 * W) == 0) {
      const FewRuns runs = few_runs(p, chunk, at, block);
      for (int64_t c = 0; c < keys; c += ROWS)
        for (int64_t d = 0; d < p.Dv; d += 2 * W) {
          Vec<T> sums[ROWS][2] = {};
          for (int n = 0; n < runs.count; ++n) {
            const auto [first, last] = runs.run[n];
            add_product(last - first, a + c + first * p.Tk, 1, p.Tk, grad_context + d + first * dc_row, dc_row, 0,
                        sums);
          }
          store_pairs(grad_value.rows + (first_key + c) * p.Dv + d, p.Dv, sums, grad_value.streamed);
        }
    } else {
      product(scratch, Output::WRITTEN);
      for (int64_t c = 0; c < keys; ++c) write_row(grad_value, (first_key + c) * p.Dv, scratch + c * p.Dv, p.Dv);
    }
    stream_fence();
  } else {
    product(grad_value.rows + first_key * p.Dv, grad_value.streamed ? Output::STREAMED
                                                : grad_value.added  ? Output::ADDED
                                                                    : Output::WRITTEN);
  }
}

}  // namespace

extern const AttentionProducts<float> attention_products_f32 = {matmul, grad_weights, grad_values};
extern const AttentionProducts<double> attention_products_f64 = {matmul, grad_weights, grad_values};
extern const AttentionProducts<Half> attention_products_f16 = {matmul, grad_weights, grad_values};
extern const AttentionProducts<BFloat16> attention_products_bf16 = {matmul, grad_weights, grad_values};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
