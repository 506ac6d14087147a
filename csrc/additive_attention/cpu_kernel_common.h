// What the CPU kernels of additive attention (cpu_kernel_*.cpp) share: places in the problem, rows of memory, and
// the walk over pairs of rows in tiles.
#pragma once

#include "common/simd.h"
#include "cpu_kernel.h"
#include "formula.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

// What is walked once from memory is asked for ahead of time: the hardware's own prefetching stops while the
// arithmetic in between runs. Into the second level: the first has too few places for loads on their way (one
// query, where a plain sum reads 30 GB/s: keys at 23 without, 24 into the first level, 32 into the second).
template <typename T>
FUSEDATTN_INLINE void prefetch(const T* p, int64_t bytes_ahead = 8192) {
  constexpr int SECOND_LEVEL = 2;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes_ahead), 0, SECOND_LEVEL);
}

template <typename T>
constexpr T INF = static_cast<T>(__builtin_huge_val());
template <typename T>
constexpr T NOT_A_NUMBER = static_cast<T>(__builtin_nan(""));

// Stands for a visible score of -inf, which only an infinite weight makes: softmax of a row of them is NaN, while
// a row of masked ones is zero.
template <typename T>
constexpr T VISIBLE_MINUS_INF = sizeof(T) == 4 ? T(-3.402823466e38) : T(-1.7976931348623157e308);

FUSEDATTN_INLINE int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDATTN_INLINE int64_t higher(int64_t a, int64_t b) { return a > b ? a : b; }

// One chunk head's place: batch b, head h, and its number among all heads.
struct Place {
  int64_t b, h, n;
};
template <typename S>
FUSEDATTN_INLINE Place place_of(const AttentionProblem<S>& p, const Chunk& chunk, int64_t head) {
  const int64_t n = chunk.first_head + head;
  return {n / p.H, n % p.H, n};
}

// Queries first .. last of a chunk, next to each other, that see some key of a block; none: both are the chunk's
// number of queries.
struct Run {
  int64_t first, last;
};

// The first such run from query r on.
template <typename S>
FUSEDATTN_INLINE Run next_run(const AttentionProblem<S>& p, const Chunk& chunk, const Place& at, KeyRange keys,
                              int64_t r) {
  const AttentionOptions& options = p.options;
  const int64_t none = chunk.queries;
  if (!has_window(options)) return {r, none};
  if (p.center == nullptr) {
    const int64_t first = options.window_right < 0 ? 0 : keys.first - options.window_right;
    const int64_t last = options.window_left < 0 ? p.Tq : keys.end + options.window_left;
    const int64_t from = higher(r, first - chunk.first_query), to = lower(none, last - chunk.first_query);
    return from < to ? Run{from, to} : Run{none, none};
  }
  const auto meets = [&](KeyRange seen) { return higher(seen.first, keys.first) < lower(seen.end, keys.end); };
  const auto sees = [&](int64_t row) { return meets(p.keys_of(at.b, at.h, chunk.first_query + row)); };
  const KeyRange* hulls = p.hulls + at.b * p.hull_stride[0] + at.h * p.hull_stride[1];
  for (; r < none; ++r) {
    const int64_t i = chunk.first_query + r;
    if (!meets(hulls[i / QUERY_BLOCK])) {
      r += QUERY_BLOCK - 1 - i % QUERY_BLOCK;
      continue;
    }
    if (!sees(r)) continue;
    int64_t last = r + 1;
    while (last < none && sees(last)) ++last;
    return {r, last};
  }
  return {none, none};
}

// body(first, last) of every run.
template <typename S, typename Body>
FUSEDATTN_INLINE void for_each_run(const AttentionProblem<S>& p, const Chunk& chunk, const Place& at,
                                   KeyRange keys, const Body& body) {
  for (Run run = next_run(p, chunk, at, keys, 0); run.first < chunk.queries;
       run = next_run(p, chunk, at, keys, run.last))
    body(run.first, run.last);
}

// All of them, in a chunk of few queries.
struct FewRuns {
  int count = 0;
  Run run[(ROWWISE_QUERIES + 1) / 2];
};
template <typename S>
FUSEDATTN_INLINE FewRuns few_runs(const AttentionProblem<S>& p, const Chunk& chunk, const Place& at,
                                  KeyRange keys) {
  FewRuns found;
  for_each_run(p, chunk, at, keys, [&](int64_t first, int64_t last) { found.run[found.count++] = {first, last}; });
  return found;
}

// Rows of a matrix whose elements lie next to each other.
template <typename S>
struct Rows {
  const S* data;
  int64_t stride;
  __attribute__((always_inline)) Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

// n elements of x into y, zeros up to whole vectors.
template <typename S>
FUSEDATTN_INLINE void copy_padded(const S* x, int64_t n, Arithmetic<S>* y) {
  constexpr int W = LANES<Arithmetic<S>>;
  int64_t d = 0;
  for (; d + W <= n; d += W) store(y + d, load(x + d));
  if (d < n) store(y + d, load_partial(x + d, n - d));
}

// n rows of `width` elements copied into whole vectors at y.
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE Rows<T> copied(Rows<S> x, int64_t n, int64_t width, T* y, int64_t stride) {
  for (int64_t r = 0; r < n; ++r) copy_padded(x.data + r * x.stride, width, y + r * stride);
  return {y, stride};
}

// The same n rows times a factor; in y, unless that is 1.
template <typename T>
FUSEDATTN_INLINE Rows<T> times(T factor, Rows<T> x, int64_t n, int64_t width, T* y, int64_t stride) {
  if (factor == 1) return x;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t d = 0; d < width; d += LANES<T>) store(y + r * stride + d, factor * load(x.from(r).data + d));
  return {y, stride};
}

// n rows as whole vectors of the arithmetic's type: as they are, or copied to y.
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE Rows<T> as_vectors(Rows<S> x, int64_t n, int64_t width, T* y, int64_t stride) {
  if constexpr (!IS_NARROW<S>)
    if (width % LANES<T> == 0) return x;
  return copied(x, n, width, y, stride);
}

// The keys of a block that some query sees, in order; the last one up to the end.
struct SeenKeys {
  int64_t count = 0;
  int index[KEY_BLOCK];
};

// Of `keys` keys from first_key on.
template <typename S>
FUSEDATTN_INLINE SeenKeys seen_in_block(const AttentionProblem<S>& p, const Place& at, int64_t first_key,
                                        int64_t keys) {
  SeenKeys found;
  const bool* seen = p.seen_keys(at.b, at.h);
  for (int j = 0; j < keys; ++j)
    if (seen == nullptr || seen[first_key + j]) found.index[found.count++] = j;
  for (int64_t n = found.count; n < KEY_BLOCK; ++n) found.index[n] = n > 0 ? found.index[n - 1] : 0;
  return found;
}

// The same of those rows of x alone.
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE Rows<T> copied(Rows<S> x, const SeenKeys& seen, int64_t width, T* y, int64_t stride) {
  for (int64_t n = 0; n < seen.count; ++n) copy_padded(x.from(seen.index[n]).data, width, y + n * stride);
  return {y, stride};
}

// n lanes, up to all.
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE Vec<T> get(const S* p, int64_t n) {
  return n == LANES<T> ? load(p) : load_partial(p, n);
}
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void put(S* p, Vec<T> x, int64_t n) {
  if (n == LANES<T>)
    store(p, x);
  else
    store_partial(p, x, n);
}

// n lanes of x to where they belong; STREAMED only whole vectors.
template <typename T>
FUSEDATTN_INLINE void write(T* out, Vec<T> x, int64_t n, Output output) {
  if (output == Output::STREAMED) return stream(out, x);
  if (output == Output::ADDED) x += get(out, n);
  put(out, x, n);
}

// Whether this chunk of queries is all of the gradient.
template <typename S>
FUSEDATTN_INLINE bool is_whole(const GradientRows<S>& to) {
  return !to.added && !to.unfinished;
}

// Whether a chunk of queries that adds nothing to a row has nothing to write.
template <typename S>
FUSEDATTN_INLINE bool stays(const GradientRows<S>& to) {
  return to.added && (!IS_NARROW<S> || to.unfinished);
}

// n lanes of x to element `at` of a gradient. Half precision is streamed two vectors at a time, in whole cache
// lines.
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void write(const GradientRows<S>& to, int64_t at, Vec<T> x, int64_t n) {
  if constexpr (!IS_NARROW<S>)
    if (to.streamed) return stream(to.rows + at, x);
  if (to.added) x += get(to.sums + at, n);
  if (to.unfinished) return put(to.sums + at, x, n);
  put(to.rows + at, x, n);
}

// n elements at x.
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void write_row(const GradientRows<S>& to, int64_t at, const T* x, int64_t n) {
  constexpr int W = LANES<T>;
  int64_t d = 0;
  if constexpr (IS_NARROW<S>)
    if (is_whole(to))
      for (; d + 2 * W <= n; d += 2 * W) store(to.rows + at + d, load(x + d), load(x + d + W), to.streamed);
  for (; d < n; d += W) write(to, at + d, get(x + d, lower(W, n - d)), lower(W, n - d));
}

// 1 + exp(2 min(q + k, limit))
template <typename T>
FUSEDATTN_INLINE Vec<T> denominator_of_sum(Vec<T> q, Vec<T> k, T limit) {
  // From below, where 1 + exp(2x) is 1 to rounding, the limit keeps exp_unclamped in its range.
  return exp_unclamped<2, true>(max(splat(-2 * limit), min(splat(limit), q + k))) + 1;
}

// body(ActivationConstant<...>{}) of the activation that kernels are compiled for: tanh's are those of sigmoid,
// too.
template <ScoreActivation activation_>
struct ActivationConstant {
  static constexpr ScoreActivation activation = activation_;
};
template <typename Body>
FUSEDATTN_INLINE void with_activation(ScoreActivation activation, const Body& body) {
  if (activation == ScoreActivation::RELU) return body(ActivationConstant<ScoreActivation::RELU>{});
  if (activation == ScoreActivation::LEAKY_RELU) return body(ActivationConstant<ScoreActivation::LEAKY_RELU>{});
  body(ActivationConstant<ScoreActivation::TANH>{});
}

// phi(z), and g phi'(z), where phi is linear on either side of zero. A NaN stays, and has PyTorch's gradient.
template <ScoreActivation activation, typename T>
FUSEDATTN_INLINE Vec<T> linear(Vec<T> z, T negative_slope) {
  if constexpr (activation == ScoreActivation::RELU)
    return max(Vec<T>{}, z);
  else
    return z > 0 ? z : negative_slope * z;
}
template <ScoreActivation activation, typename T>
FUSEDATTN_INLINE Vec<T> linear_gradient(Vec<T> z, T g, T negative_slope) {
  if constexpr (activation == ScoreActivation::RELU)
    return z <= 0 ? Vec<T>{} : splat(g);
  else
    return z > 0 ? splat(g) : splat(negative_slope * g);
}

// Pairs of rows are walked in tiles of Tile::QUERIES queries, or a half or quarter of those, and
// Tile::keys(queries) keys, whose sums over d stay in registers: tile.run<QUERIES, KEYS>(q, k, sums) leaves them
// at sums[i * KEYS + j].
constexpr int TILE_KEYS = VECTOR_REGISTERS >= 32 ? 4 : 2;

template <int N, typename T>
FUSEDATTN_INLINE void fold_lanes(const Vec<T> (&lanes)[N], T* sums) {
  if constexpr (N % 4 == 0) {
    for (int n = 0; n < N; n += 4) horizontal_sum4<T>(lanes + n, sums + n);
  } else {
    for (int n = 0; n < N; ++n) sums[n] = horizontal_sum<T>(lanes[n]);
  }
}

// QUERIES rows and any number of keys; sums[i * KEY_BLOCK + j].
template <int QUERIES, typename Tile, typename S, typename T = Arithmetic<S>>
__attribute__((noinline)) void pairwise_rows(Tile tile, Rows<T> q, Rows<S> k, int64_t keys, T* sums) {
  constexpr int KEYS = Tile::keys(QUERIES);
  T part[QUERIES * KEYS];
  int64_t j = 0;
  for (; j + KEYS <= keys; j += KEYS) {
    tile.template run<QUERIES, KEYS>(q, k.from(j), part);
    for (int i = 0; i < QUERIES; ++i)
      for (int c = 0; c < KEYS; ++c) sums[i * KEY_BLOCK + j + c] = part[i * KEYS + c];
  }
  for (; j < keys; ++j) {
    tile.template run<QUERIES, 1>(q, k.from(j), part);
    for (int i = 0; i < QUERIES; ++i) sums[i * KEY_BLOCK + j] = part[i];
  }
}

// How many of `queries` rows the next tile takes.
template <typename Tile>
FUSEDATTN_INLINE int64_t tile_rows(int64_t queries) {
  int64_t rows = Tile::QUERIES;
  while (rows > queries) rows /= 2;
  return rows;
}

template <typename Tile, typename S, typename T = Arithmetic<S>, int QUERIES = Tile::QUERIES>
FUSEDATTN_INLINE void pairwise(Tile tile, int64_t rows, Rows<T> q, Rows<S> k, int64_t keys, T* sums) {
  if constexpr (QUERIES > 1)
    if (rows < QUERIES) return pairwise<Tile, S, T, QUERIES / 2>(tile, rows, q, k, keys, sums);
  pairwise_rows<QUERIES>(tile, q, k, keys, sums);
}

}  // namespace
}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
