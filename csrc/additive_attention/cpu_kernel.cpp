// CPU kernels of additive attention, compiled once per instruction set. Lanes run over score channels d.
//
// Forward, per pair (i, j) and vector of channels: t = 1 + Eq Ek costs one multiply-add; four channels share
// one reciprocal (13 more operations per four). A tile of queries x keys keeps its sums in registers and
// folds the lanes once at the end. Where |q| + |k| could overflow the product, two channels share one.
// Beyond that range 1 / (1 + exp(2(q + k))) is taken of the sum, clamped where tanh is 1: any input is safe.
// A single query meets every key once: its keys are read, exponentiated and used in one go.
//
// Backward, per pair: two keys share a reciprocal; a lane owns a channel, so grad_query, grad_key and
// grad_weight accumulate without any reduction between lanes. 8 multiply-type operations per tanh, of which
// the additions run on their own ports where the CPU has them.
#include "cpu_kernel.h"

#include "common/simd.h"
#include "formula.h"

extern "C" {
float logf(float);
double log(double);
}

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

enum class Mode { QUAD, PAIR, SUM, TANH, DOT };

// What is walked once from memory is asked for ahead of time: the hardware's own prefetching stops while the
// arithmetic in between runs. Into the second level: the first has too few places for loads on their way (one
// query, where a plain sum reads 30 GB/s: keys at 23 without, 24 into the first level, 32 into the second).
template <typename T>
FUSEDATTN_INLINE void prefetch(const T* p, int64_t bytes_ahead = 8192) {
  constexpr int SECOND_LEVEL = 2;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes_ahead), 0, SECOND_LEVEL);
}

constexpr int TILE_KEYS = VECTOR_REGISTERS >= 32 ? 4 : 2;
// A product needs fewer registers than a tanh.
template <Mode mode>
constexpr int TILE_QUERIES = mode == Mode::DOT && VECTOR_REGISTERS >= 32 ? 4 : 2;

FUSEDATTN_INLINE float log_of(float x) { return logf(x); }
FUSEDATTN_INLINE double log_of(double x) { return log(x); }

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
template <typename T>
FUSEDATTN_INLINE Place place_of(const AttentionProblem<T>& p, const Chunk& chunk, int64_t head) {
  const int64_t n = chunk.first_head + head;
  return {n / p.H, n % p.H, n};
}

// n elements of x into y, zeros up to whole vectors.
template <typename T>
FUSEDATTN_INLINE void copy_padded(const T* x, int64_t n, T* y) {
  constexpr int W = LANES<T>;
  int64_t d = 0;
  for (; d + W <= n; d += W) store(y + d, load(x + d));
  if (d < n) store(y + d, load_partial(x + d, n - d));
}

// Rows of a matrix whose elements lie next to each other.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

// n rows of `width` elements copied into whole vectors at y.
template <typename T>
FUSEDATTN_INLINE Rows<T> copied(Rows<T> x, int64_t n, int64_t width, T* y, int64_t stride) {
  for (int64_t r = 0; r < n; ++r) copy_padded(x.data + r * x.stride, width, y + r * stride);
  return {y, stride};
}

// y = exp(2x), zeros up to whole vectors; returns max |x|. Beyond ScoreRange::PAIR y is anything, and not used.
template <typename T>
FUSEDATTN_INLINE T exp2x_padded(const T* x, int64_t n, T* y) {
  constexpr int W = LANES<T>;
  Vec<T> bound{};
  int64_t d = 0;
  for (; d + W <= n; d += W) {
    const Vec<T> v = load(x + d);
    prefetch(x + d);
    bound = max(abs(v), bound);
    store(y + d, exp_unclamped<2>(v));
  }
  if (d < n) {
    const Vec<T> v = load_partial(x + d, n - d);
    bound = max(abs(v), bound);
    store(y + d, Vec<T>{});
    store_partial(y + d, exp_unclamped<2>(v), n - d);
  }
  return horizontal_max<T>(bound);
}

// 1 + exp(2 min(q + k, limit))
template <typename T>
FUSEDATTN_INLINE Vec<T> denominator_of_sum(Vec<T> q, Vec<T> k, T limit) {
  // From below, where 1 + exp(2x) is 1 to rounding, the limit keeps exp_unclamped in its range.
  return exp_unclamped<2>(max(splat(-2 * limit), min(splat(limit), q + k))) + 1;
}

// sums[i * KEYS + j] over d: sum of w r (QUAD and PAIR: rows hold exponentials; SUM: rows hold q and k), of
// w tanh (TANH) or of q k (DOT). Rows are D_padded long.
template <Mode mode, int QUERIES, int KEYS, typename T>
FUSEDATTN_INLINE void pairwise_tile(const T* q, int64_t q_row, const T* k, int64_t k_row, const T* w,
                                    int64_t D_padded, T* sums) {
  constexpr int W = LANES<T>;
  Vec<T> acc[QUERIES * KEYS] = {};
  int64_t d = 0;
  const auto denominator = [](Vec<T> qd, Vec<T> kd) {
    if constexpr (mode == Mode::SUM || mode == Mode::TANH)
      return denominator_of_sum<T>(qd, kd, ScoreRange<T>::QUAD);
    else
      return qd * kd + 1;
  };
  if constexpr (mode == Mode::QUAD || mode == Mode::SUM) {
    for (; d + 4 * W <= D_padded; d += 4 * W) {
      Vec<T> wd[4];
      for (int c = 0; c < 4; ++c) wd[c] = load(w + d + c * W);
      for (int j = 0; j < KEYS; ++j) {
        Vec<T> kd[4];
        for (int c = 0; c < 4; ++c) kd[c] = load(k + j * k_row + d + c * W);
        for (int i = 0; i < QUERIES; ++i) {
          Vec<T> t[4];
          for (int c = 0; c < 4; ++c) t[c] = denominator(load(q + i * q_row + d + c * W), kd[c]);
          const auto sum =
              add(sum_of_quotients(wd[0], t[0], wd[1], t[1]), sum_of_quotients(wd[2], t[2], wd[3], t[3]));
          acc[i * KEYS + j] += sum.numerator * reciprocal(sum.denominator);
        }
      }
    }
  }
  if constexpr (mode != Mode::TANH && mode != Mode::DOT) {
    for (; d + 2 * W <= D_padded; d += 2 * W) {
      const Vec<T> w0 = load(w + d), w1 = load(w + d + W);
      for (int j = 0; j < KEYS; ++j) {
        const Vec<T> k0 = load(k + j * k_row + d), k1 = load(k + j * k_row + d + W);
        for (int i = 0; i < QUERIES; ++i) {
          const Vec<T> t0 = denominator(load(q + i * q_row + d), k0);
          const Vec<T> t1 = denominator(load(q + i * q_row + d + W), k1);
          const auto sum = sum_of_quotients(w0, t0, w1, t1);
          acc[i * KEYS + j] += sum.numerator * reciprocal(sum.denominator);
        }
      }
    }
  }
  for (; d < D_padded; d += W) {
    const Vec<T> wd = mode == Mode::DOT ? Vec<T>{} : load(w + d);
    for (int j = 0; j < KEYS; ++j) {
      const Vec<T> kd = load(k + j * k_row + d);
      // Several queries find in cache what the first of them has met.
      if (mode == Mode::DOT && QUERIES == 1)
        prefetch(k + j * k_row + d, KEYS * k_row * static_cast<int64_t>(sizeof(T)));
      for (int i = 0; i < QUERIES; ++i) {
        const Vec<T> qd = load(q + i * q_row + d);
        if constexpr (mode == Mode::DOT)
          acc[i * KEYS + j] += qd * kd;
        else if constexpr (mode == Mode::TANH)
          acc[i * KEYS + j] += wd * (1 - 2 * reciprocal(denominator(qd, kd)));
        else
          acc[i * KEYS + j] += wd * reciprocal(denominator(qd, kd));
      }
    }
  }
  if constexpr (QUERIES * KEYS % 4 == 0) {
    for (int n = 0; n < QUERIES * KEYS; n += 4) horizontal_sum4<T>(acc + n, sums + n);
  } else {
    for (int n = 0; n < QUERIES * KEYS; ++n) sums[n] = horizontal_sum<T>(acc[n]);
  }
}

// pairwise_tile over QUERIES rows and any number of keys; sums[i * KEY_BLOCK + j].
template <Mode mode, int QUERIES, typename T>
__attribute__((noinline)) void pairwise_rows(const T* q, int64_t q_row, const T* k, int64_t k_row, int64_t keys,
                                             const T* w, int64_t D_padded, T* sums) {
  T tile[QUERIES * TILE_KEYS];
  int64_t j = 0;
  for (; j + TILE_KEYS <= keys; j += TILE_KEYS) {
    pairwise_tile<mode, QUERIES, TILE_KEYS>(q, q_row, k + j * k_row, k_row, w, D_padded, tile);
    for (int i = 0; i < QUERIES; ++i)
      for (int c = 0; c < TILE_KEYS; ++c) sums[i * KEY_BLOCK + j + c] = tile[i * TILE_KEYS + c];
  }
  for (; j < keys; ++j) {
    pairwise_tile<mode, QUERIES, 1>(q, q_row, k + j * k_row, k_row, w, D_padded, tile);
    for (int i = 0; i < QUERIES; ++i) sums[i * KEY_BLOCK + j] = tile[i];
  }
}

// How many of `queries` rows, TILE_QUERIES or a half or quarter of it, the next tile takes.
template <Mode mode>
FUSEDATTN_INLINE int64_t tile_rows(int64_t queries) {
  int64_t rows = TILE_QUERIES<mode>;
  while (rows > queries) rows /= 2;
  return rows;
}

template <Mode mode, typename T, int QUERIES = TILE_QUERIES<mode>>
FUSEDATTN_INLINE void pairwise(int64_t rows, const T* q, int64_t q_row, const T* k, int64_t k_row, int64_t keys,
                               const T* w, int64_t D_padded, T* sums) {
  if constexpr (QUERIES > 1)
    if (rows < QUERIES) return pairwise<mode, T, QUERIES / 2>(rows, q, q_row, k, k_row, keys, w, D_padded, sums);
  pairwise_rows<mode, QUERIES>(q, q_row, k, k_row, keys, w, D_padded, sums);
}

template <typename T>
void prepare_query(const AttentionProblem<T>& p, const Chunk& chunk, int64_t row) {
  const Place at = place_of(p, chunk, row / chunk.queries);
  const T* q = p.query.row(at.b, at.h, chunk.first_query + row % chunk.queries);
  p.query_bound[row] = exp2x_padded(q, p.D, p.query_exp + row * p.D_padded);
}

// Rows of scores from sums over d: scaled, capped, masked. `keys` of them are visible, the block has `width`.
template <typename T>
FUSEDATTN_INLINE void finish_scores(const AttentionProblem<T>& p, const Place& at, int64_t i, int64_t j,
                                    int64_t keys, int64_t width, T factor, T slope, T offset, const T* sums,
                                    T* out) {
  constexpr int W = LANES<T>;
  T row[KEY_BLOCK];
  for (int64_t c = 0; c < KEY_BLOCK; c += W) {
    Vec<T> s = factor * (slope * load(sums + c) + offset);  // their sum may be finite where neither is
    if (p.softcap != 0) s = p.softcap * tanh(s * (1 / p.softcap));
    s = s == -INF<T> ? splat(VISIBLE_MINUS_INF<T>) : s;
    store(row + c, s);
  }
  if (p.is_causal) keys = lower(keys, i - j + 1);
  for (int64_t c = 0; c < width; ++c) out[c] = c < keys ? row[c] : -INF<T>;
  if (p.mask != nullptr) {
    const bool* mask =
        p.mask + at.b * p.mask_stride[0] + at.h * p.mask_stride[1] + i * p.mask_stride[2] + j * p.mask_stride[3];
    for (int64_t c = 0; c < width; ++c)
      if (!mask[c * p.mask_stride[3]]) out[c] = -INF<T>;
  }
}

// sums[j] over d of w r for one query and KEYS keys that are not exponentials yet; returns max |k|. Beyond
// ScoreRange::QUAD the sums are anything.
template <int KEYS, typename T>
FUSEDATTN_INLINE T one_query_tile(const T* q, const T* k, int64_t k_row, const T* w, int64_t D, T* sums) {
  constexpr int W = LANES<T>;
  Vec<T> acc[KEYS] = {}, bound{};
  const auto denominator = [&](int j, int64_t d, int64_t n) {
    const T* x = k + j * k_row + d;
    prefetch(x, KEYS * k_row * static_cast<int64_t>(sizeof(T)));
    const Vec<T> kd = n < W ? load_partial(x, n) : load(x);
    bound = max(abs(kd), bound);
    return load(q + d) * exp_unclamped<2>(kd) + 1;
  };
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W)
    for (int j = 0; j < KEYS; ++j) {
      Vec<T> t[4];
      for (int c = 0; c < 4; ++c) t[c] = denominator(j, d + c * W, W);
      const auto sum = add(sum_of_quotients(load(w + d), t[0], load(w + d + W), t[1]),
                           sum_of_quotients(load(w + d + 2 * W), t[2], load(w + d + 3 * W), t[3]));
      acc[j] += sum.numerator * reciprocal(sum.denominator);
    }
  for (; d < D; d += W)
    for (int j = 0; j < KEYS; ++j) acc[j] += load(w + d) * reciprocal(denominator(j, d, D - d));
  for (int j = 0; j < KEYS; ++j) sums[j] = horizontal_sum<T>(acc[j]);
  return horizontal_max<T>(bound);
}

template <typename T>
__attribute__((noinline)) T one_query(const T* q, const T* k, int64_t k_row, int64_t keys, const T* w, int64_t D,
                                      T* sums) {
  T bound = 0;
  const auto include = [&](T tile) { bound = tile > bound ? tile : bound; };
  int64_t j = 0;
  for (; j + TILE_KEYS <= keys; j += TILE_KEYS)
    include(one_query_tile<TILE_KEYS>(q, k + j * k_row, k_row, w, D, sums + j));
  for (; j < keys; ++j) include(one_query_tile<1>(q, k + j * k_row, k_row, w, D, sums + j));
  return bound;
}

template <typename T>
void score(const AttentionProblem<T>& p, const Chunk& chunk, int64_t head, int64_t first_key, T* scores,
           T* scratch) {
  const Place at = place_of(p, chunk, head);
  const int64_t width = lower(KEY_BLOCK, p.Tk - first_key);
  const int64_t keys = lower(width, p.visible_keys(at.b) - first_key);
  scores += head * chunk.queries * p.Tk + first_key;
  // Queries before `start` see none of these keys.
  int64_t start = keys <= 0 ? chunk.queries : 0;
  if (p.is_causal) start = lower(chunk.queries, higher(start, first_key - chunk.first_query));
  for (int64_t r = 0; r < start; ++r)
    for (int64_t c = 0; c < width; ++c) scores[r * p.Tk + c] = -INF<T>;
  if (start == chunk.queries) return;

  const T* w = p.weight_scaled + at.h * p.D_padded;
  const T factor = p.scale * p.weight_max[at.h], weight_sum = p.weight_sum[at.h];
  // The sum over r cancels against the sum of the weights, which an infinite weight does not survive.
  const bool finite = weight_sum - weight_sum == 0;
  const auto finish = [&](int64_t r, const T* sums) {
    finish_scores(p, at, chunk.first_query + r, first_key, keys, width, factor, finite ? T(-2) : T(1),
                  finite ? weight_sum : T(0), sums, scores + r * p.Tk);
  };
  T sums[TILE_QUERIES<Mode::QUAD> * KEY_BLOCK] = {};
  if (chunk.queries == 1 && p.key_exp == nullptr && finite) {
    const T bound = one_query(p.query_exp + head * p.D_padded, p.key.row(at.b, at.h, first_key), p.key.stride_t,
                              keys, w, p.D, sums);
    if (bound + p.query_bound[head] <= ScoreRange<T>::QUAD) return finish(0, sums);
  }

  // An odd number of vectors between rows keeps tall columns out of one cache set.
  const int64_t row_size = p.D_padded + LANES<T>;
  T* key_exp = scratch;
  T* key_raw = scratch + KEY_BLOCK * row_size;
  T* query_raw = key_raw + KEY_BLOCK * row_size;
  const bool padded = p.D != p.D_padded;

  Rows<T> exps{key_exp, row_size}, raw{p.key.row(at.b, at.h, first_key), p.key.stride_t};
  T key_bound = p.key_bound;
  if (p.key_exp != nullptr) {
    exps = {p.key_exp + (at.n * p.Tk + first_key) * p.D, p.D};
    if (padded) exps = copied(exps, keys, p.D, key_exp, row_size);
  } else {
    key_bound = 0;
    for (int64_t j = 0; j < keys; ++j) {
      const T bound = exp2x_padded(raw.data + j * raw.stride, p.D, key_exp + j * row_size);
      key_bound = bound > key_bound ? bound : key_bound;
    }
  }

  bool raw_copied = !padded;
  for (int64_t r = start, rows; r < chunk.queries; r += rows) {
    rows = tile_rows<Mode::QUAD>(chunk.queries - r);
    const T* q = p.query_exp + (head * chunk.queries + r) * p.D_padded;
    const T* query_bound = p.query_bound + head * chunk.queries + r;
    T bound = query_bound[0];
    for (int64_t i = 1; i < rows; ++i) bound = query_bound[i] > bound ? query_bound[i] : bound;
    bound += key_bound;
    if (finite && bound <= ScoreRange<T>::QUAD) {
      pairwise<Mode::QUAD>(rows, q, p.D_padded, exps.data, exps.stride, keys, w, p.D_padded, sums);
    } else if (finite && bound <= ScoreRange<T>::PAIR) {
      pairwise<Mode::PAIR>(rows, q, p.D_padded, exps.data, exps.stride, keys, w, p.D_padded, sums);
    } else {
      if (!raw_copied) raw = copied(raw, keys, p.D, key_raw, row_size);
      raw_copied = true;
      Rows<T> queries{p.query.row(at.b, at.h, chunk.first_query + r), p.query.stride_t};
      if (padded) queries = copied(queries, rows, p.D, query_raw, row_size);
      if (finite)
        pairwise<Mode::SUM>(rows, queries.data, queries.stride, raw.data, raw.stride, keys, w, p.D_padded, sums);
      else
        pairwise<Mode::TANH>(rows, queries.data, queries.stride, raw.data, raw.stride, keys, w, p.D_padded, sums);
    }
    for (int64_t i = 0; i < rows; ++i) finish(r + i, sums + i * KEY_BLOCK);
  }
}

template <typename T>
void softmax(int64_t n, int64_t Tk, const T* scores, T* p, T* lse) {
  constexpr int W = LANES<T>;
  constexpr int64_t BLOCK = 64 * W;  // lane sums are folded into float64 so often
  for (int64_t r = 0; r < n; ++r, scores += Tk, p += Tk) {
    Vec<T> top = splat(-INF<T>);
    IntVec<T> is_nan{};
    int64_t j = 0;
    for (; j + W <= Tk; j += W) {
      top = max(load(scores + j), top);
      is_nan |= load(scores + j) != load(scores + j);
    }
    T m = horizontal_max<T>(top);
    bool nan = any(is_nan);
    for (; j < Tk; ++j) {
      m = scores[j] > m ? scores[j] : m;
      nan |= scores[j] != scores[j];
    }
    // No key is visible, or softmax is NaN.
    if (nan || m == INF<T> || m == -INF<T> || m == VISIBLE_MINUS_INF<T>) {
      for (j = 0; j < Tk; ++j) p[j] = scores[j] == -INF<T> ? 0 : NOT_A_NUMBER<T>;
      lse[r] = nan ? NOT_A_NUMBER<T> : m == INF<T> ? INF<T> : -INF<T>;
      continue;
    }
    double sum = 0;
    for (int64_t first = 0; first < Tk; first += BLOCK) {
      const int64_t last = lower(Tk, first + BLOCK);
      Vec<T> lanes{};
      for (j = first; j < last; j += W) {
        const int64_t left = last - j;
        const Vec<T> x = (left < W ? load_partial(scores + j, left) : load(scores + j)) - m;
        Vec<T> e = x < T(-87) ? Vec<T>{} : exp(x);  // exp() itself stops at the smallest normal number
        if (left < W) {
          store_partial(p + j, e, left);
          e = load_partial(p + j, left);
        } else {
          store(p + j, e);
        }
        lanes += e;
      }
      sum += horizontal_sum<T>(lanes);
    }
    const T inverse = static_cast<T>(1 / sum);
    for (j = 0; j < Tk; ++j) p[j] *= inverse;
    lse[r] = m + log_of(static_cast<T>(sum));
  }
}

// n lanes of x to where they belong; STREAMED only whole vectors.
template <typename T>
FUSEDATTN_INLINE void write(T* out, Vec<T> x, int64_t n, Output output) {
  const bool whole = n == LANES<T>;
  if (output == Output::STREAMED) return stream(out, x);
  if (output == Output::ADDED) x += whole ? load(out) : load_partial(out, n);
  if (whole)
    store(out, x);
  else
    store_partial(out, x, n);
}

// A ROWS x (VECTORS lanes) block of the product, in registers; `ahead` bytes further on lies what comes next.
template <int ROWS, int VECTORS, typename T>
FUSEDATTN_INLINE void matmul_tile(int64_t K, const T* a, int64_t a_row, int64_t a_column, const T* b,
                                  int64_t b_row, T* out, int64_t out_row, Output output, int64_t ahead) {
  constexpr int W = LANES<T>;
  Vec<T> acc[ROWS][VECTORS] = {};
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
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < VECTORS; ++v) write<T>(out + m * out_row + v * W, acc[m][v], W, output);
}

template <int ROWS, typename T>
void matmul_rows(int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row,
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

// One row of A: four rows of B at a time, each read from end to end, the sums in cache. B is read once, so
// the order in which memory sees it matters more than the arithmetic.
template <typename T>
void matmul_one_row(int64_t N, int64_t K, const T* a, int64_t a_column, const T* b, int64_t b_row, T* out,
                    Output output) {
  constexpr int W = LANES<T>;
  if (output != Output::ADDED)
    for (int64_t n = 0; n < N; ++n) out[n] = 0;
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    const T* row = b + k * b_row;
    const T s0 = a[k * a_column], s1 = a[(k + 1) * a_column], s2 = a[(k + 2) * a_column],
            s3 = a[(k + 3) * a_column];
    const int64_t next = 4 * b_row * static_cast<int64_t>(sizeof(T));
    int64_t n = 0;
    for (; n + W <= N; n += W) {
      for (int r = 0; r < 4; ++r) prefetch(row + r * b_row + n, next);
      Vec<T> o = load(out + n) + s0 * load(row + n);
      o += s1 * load(row + b_row + n);
      o += s2 * load(row + 2 * b_row + n);
      o += s3 * load(row + 3 * b_row + n);
      store(out + n, o);
    }
    for (; n < N; ++n)
      out[n] += s0 * row[n] + s1 * row[b_row + n] + s2 * row[2 * b_row + n] + s3 * row[3 * b_row + n];
  }
  for (; k < K; ++k)
    for (int64_t n = 0; n < N; ++n) out[n] += a[k * a_column] * b[k * b_row + n];
}

// matmul_rows of 1 .. MOST rows.
template <int MOST, typename T, typename... Arguments>
FUSEDATTN_INLINE void matmul_up_to(int64_t rows, Arguments... arguments) {
  if constexpr (MOST > 1)
    if (rows < MOST) return matmul_up_to<MOST - 1, T>(rows, arguments...);
  matmul_rows<MOST, T>(arguments...);
}

// B is taken in blocks of rows, some 128 KiB, each read once from memory, in order, and again from cache by the
// next tile.
template <typename T>
void matmul(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_column, const T* b,
            int64_t b_row, T* out, int64_t out_row, Output output) {
  constexpr int ROWS = VECTOR_REGISTERS >= 32 ? 8 : 4;
  const int64_t block = higher(32, 32768 / higher(N, 1));
  if (M == 1) return matmul_one_row(N, K, a, a_column, b, b_row, out, output);
  const int64_t tiles = (M + ROWS - 1) / ROWS;
  if (output == Output::STREAMED && K > block) output = Output::WRITTEN;  // and added to, from cache
  int64_t k = 0;
  do {  // K = 0 still writes zeros
    const int64_t depth = lower(block, K - k);
    int64_t ahead = k + block < K ? block * b_row * static_cast<int64_t>(sizeof(T)) : 0;
    for (int64_t tile = 0, m = 0, rows; tile < tiles; ++tile, m += rows) {
      rows = (M - m) / (tiles - tile);
      matmul_up_to<ROWS, T>(rows, N, depth, a + m * a_row + k * a_column, a_row, a_column, b + k * b_row, b_row,
                            out + m * out_row, out_row, output, ahead);
      ahead = 0;
    }
    k += block;
    output = Output::ADDED;
  } while (k < K);
  stream_fence();
}

// From so many queries on, sums over channels are taken as a matrix product with the values transposed: what that
// costs is less than folding the lanes of every sum.
constexpr int64_t TRANSPOSED_QUERIES = 64;

template <typename T>
void grad_weights(const AttentionProblem<T>& p, const Chunk& chunk, int64_t head, int64_t first_key,
                  View<const T> grad_context, T* products, T* scratch) {
  constexpr int W = LANES<T>;
  const Place at = place_of(p, chunk, head);
  const int64_t width = lower(KEY_BLOCK, p.Tk - first_key);
  // What lies in the padding is not looked at: it may be NaN.
  const int64_t keys = higher(0, lower(width, p.visible_keys(at.b) - first_key));
  const int64_t Dv_padded = (p.Dv + W - 1) / W * W;
  Rows<T> x{p.value.row(at.b, at.h, first_key), p.value.stride_t};
  products += head * chunk.queries * p.Tk + first_key;
  if (chunk.queries >= TRANSPOSED_QUERIES) {
    for (int64_t d = 0; d < p.Dv; ++d)
      for (int64_t c = 0; c < width; ++c) scratch[d * KEY_BLOCK + c] = c < keys ? x.data[c * x.stride + d] : 0;
    return matmul(chunk.queries, width, p.Dv, grad_context.row(at.b, at.h, chunk.first_query),
                  grad_context.stride_t, 1, scratch, KEY_BLOCK, products, p.Tk, Output::WRITTEN);
  }
  const bool padded = p.Dv != Dv_padded;
  if (padded) x = copied(x, keys, p.Dv, scratch, Dv_padded);
  T sums[TILE_QUERIES<Mode::DOT> * KEY_BLOCK];
  for (int64_t r = 0, rows; r < chunk.queries; r += rows) {
    rows = tile_rows<Mode::DOT>(chunk.queries - r);
    Rows<T> dc{grad_context.row(at.b, at.h, chunk.first_query + r), grad_context.stride_t};
    if (padded) dc = copied(dc, rows, p.Dv, scratch + KEY_BLOCK * Dv_padded, Dv_padded);
    pairwise<Mode::DOT, T>(rows, dc.data, dc.stride, x.data, x.stride, keys, nullptr, Dv_padded, sums);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < width; ++c) products[(r + i) * p.Tk + c] = c < keys ? sums[i * KEY_BLOCK + c] : 0;
  }
}

// g_ij = p_ij (a_ij - sum_j p_ij a_ij + dL_i), through the cap (1 - (s / C)^2) and the scale.
template <typename T>
T grad_scores(const AttentionProblem<T>& p, const T* scores, T lse, T grad_lse, T* prob, T* g) {
  constexpr int W = LANES<T>;
  if (lse - lse != 0) {  // no key is visible, or softmax is NaN
    T sum = 0;
    for (int64_t j = 0; j < p.Tk; ++j) sum += prob[j] = g[j] = scores[j] == -INF<T> ? 0 : NOT_A_NUMBER<T>;
    return sum;
  }
  const int64_t whole = p.Tk / W * W;
  Vec<T> lanes{};
  for (int64_t j = 0; j < p.Tk; j += W) {
    const int64_t left = p.Tk - j;
    const Vec<T> x = (j < whole ? load(scores + j) : load_partial(scores + j, left)) - lse;
    const Vec<T> e = x < T(-87) ? Vec<T>{} : exp(x);
    if (j < whole) {
      store(prob + j, e);
      lanes += e * load(g + j);
    } else {
      store_partial(prob + j, e, left);
      lanes += load_partial(prob + j, left) * load_partial(g + j, left);
    }
  }
  const T shift = grad_lse - horizontal_sum<T>(lanes);
  const T inverse_cap = p.softcap != 0 ? 1 / p.softcap : 0;
  double sum = 0;
  for (int64_t first = 0; first < p.Tk; first += 1024) {
    T part = 0;
    for (int64_t j = first; j < lower(p.Tk, first + 1024); ++j) {
      T slope = p.scale;
      if (p.softcap != 0) {
        const T capped = scores[j] * inverse_cap;
        slope = prob[j] == 0 ? 0 : slope * (1 - capped * capped);  // a masked score is -inf
      }
      g[j] = prob[j] * (g[j] + shift) * slope;
      part += g[j];
    }
    sum += part;
  }
  return static_cast<T>(sum);
}

// For KEYS keys and one query, one vector of channels: adds g (r - r^2) to the gradients of q and k and g r to
// that of w. q and k hold exponentials, or themselves in the sum form.
template <bool sum_form, int KEYS, typename T>
FUSEDATTN_INLINE void backward_pairs(Vec<T> q, const Vec<T>* k, const T* g, Vec<T>& dq, Vec<T>* dk, Vec<T>& dw) {
  const auto denominator = [](Vec<T> qd, Vec<T> kd) {
    if constexpr (sum_form)
      return denominator_of_sum<T>(qd, kd, ScoreRange<T>::PAIR);
    else
      return qd * kd + 1;
  };
  if constexpr (KEYS == 1) {
    const Vec<T> r = reciprocal(denominator(q, k[0])), gr = g[0] * r, h = score_gradient(gr, r);
    dq += h;
    dk[0] += h;
    dw += gr;
  } else {
    for (int j = 0; j < KEYS; j += 2) {
      const Vec<T> t0 = denominator(q, k[j]), t1 = denominator(q, k[j + 1]);
      const Vec<T> shared = reciprocal(t0 * t1);
      const Vec<T> r0 = t1 * shared, r1 = t0 * shared;
      const Vec<T> gr0 = g[j] * r0, gr1 = g[j + 1] * r1;
      const Vec<T> h0 = score_gradient(gr0, r0), h1 = score_gradient(gr1, r1);
      dq += h0 + h1;
      dk[j] += h0;
      dk[j + 1] += h1;
      dw += gr0 + gr1;
    }
  }
}

constexpr int BACKWARD_KEYS = VECTOR_REGISTERS >= 32 ? 8 : 4;

// backward_pairs for queries first .. last, whose vectors of channels lie next to each other at q and dq.
template <bool sum_form, int KEYS, typename T>
FUSEDATTN_INLINE void backward_column(const T* q, const Vec<T>* k, const T* g, int64_t Tk, int64_t first,
                                      int64_t last, T* dq, Vec<T>* dk, Vec<T>& dw) {
  constexpr int W = LANES<T>;
  for (int64_t i = first; i < last; ++i) {
    Vec<T> dqd = load(dq + i * W);
    backward_pairs<sum_form, KEYS, T>(load(q + i * W), k, g + i * Tk, dqd, dk, dw);
    store(dq + i * W, dqd);
  }
}

// KEYS whole rows of keys from j against every query of the chunk: reads keys and writes their gradients once, in
// the order of memory, which is what few queries are bound by. `limit`: of |k|, for the product of exponentials.
template <int KEYS, typename T>
void backward_key_rows(const AttentionProblem<T>& p, const Chunk& chunk, const Place& at, int64_t j, T limit,
                       const T* q, const T* g, T* dq, T* grad_key, T* dw, T* raw_query) {
  constexpr int W = LANES<T>;
  const Output output = chunk.first_query > 0 ? Output::ADDED : p.key_output;
  const bool exponentials = p.key_exp != nullptr && p.key_bound <= limit;
  const T* key = exponentials ? p.key_exp + (at.n * p.Tk + j) * p.D : p.key.row(at.b, at.h, j);
  const int64_t key_row = exponentials ? p.D : p.key.stride_t;
  const T* w = p.weight + at.h * p.D_padded;
  T* dk = grad_key + (at.n * p.Tk + j) * p.D;
  for (int64_t d = 0; d < p.D; d += W) {
    const int64_t n = lower(W, p.D - d);
    Vec<T> k[KEYS], sum[KEYS] = {}, bound{}, dwd{};
    for (int c = 0; c < KEYS; ++c) {
      const T* x = key + c * key_row + d;
      prefetch(x, KEYS * key_row * static_cast<int64_t>(sizeof(T)));
      k[c] = n == W ? load(x) : load_partial(x, n);
      bound = max(abs(k[c]), bound);
    }
    if (!exponentials && any(bound > limit)) {
      for (int64_t i = 0; i < chunk.queries; ++i)
        store(raw_query + i * W, load_partial(p.query.row(at.b, at.h, chunk.first_query + i) + d, n));
      backward_column<true, KEYS>(raw_query, k, g + j, p.Tk, 0, chunk.queries, dq + d * chunk.queries, sum, dwd);
    } else {
      for (int c = 0; c < KEYS && !exponentials; ++c) k[c] = exp_unclamped<2>(k[c]);
      backward_column<false, KEYS>(q + d * chunk.queries, k, g + j, p.Tk, 0, chunk.queries, dq + d * chunk.queries,
                                   sum, dwd);
    }
    store(dw + d, load(dw + d) + dwd);
    const Vec<T> w4 = 4 * load(w + d);
    for (int c = 0; c < KEYS; ++c) write<T>(dk + c * p.D + d, w4 * sum[c], n, output);
  }
}

template <typename T>
void backward_rows(const AttentionProblem<T>& p, const Chunk& chunk, int64_t head, int64_t first_key,
                   int64_t last_key, const T* g, T* grad_query, T* grad_key, T* grad_weight, T* scratch) {
  constexpr int W = LANES<T>;
  const Place at = place_of(p, chunk, head);
  const int64_t Tq = chunk.queries;
  // (vector of channels, query): what a column of pairs needs is in one piece, and in many sets of the cache.
  T *q = scratch, *dq = q + Tq * p.D_padded, *raw_query = dq + Tq * p.D_padded;
  T query_bound = 0;
  for (int64_t i = 0; i < Tq; ++i) {
    const int64_t row = head * Tq + i;
    query_bound = p.query_bound[row] > query_bound ? p.query_bound[row] : query_bound;
    for (int64_t d = 0; d < p.D_padded; d += W) {
      store(q + d * Tq + i * W, load(p.query_exp + row * p.D_padded + d));
      store(dq + d * Tq + i * W, Vec<T>{});
    }
  }
  const T limit = ScoreRange<T>::PAIR - query_bound;
  g += head * Tq * p.Tk;
  int64_t j = first_key;
  for (; j + BACKWARD_KEYS <= last_key; j += BACKWARD_KEYS)
    backward_key_rows<BACKWARD_KEYS>(p, chunk, at, j, limit, q, g, dq, grad_key, grad_weight, raw_query);
  for (; j + 2 <= last_key; j += 2)
    backward_key_rows<2>(p, chunk, at, j, limit, q, g, dq, grad_key, grad_weight, raw_query);
  for (; j < last_key; ++j)
    backward_key_rows<1>(p, chunk, at, j, limit, q, g, dq, grad_key, grad_weight, raw_query);
  stream_fence();
  for (int64_t i = 0; i < Tq; ++i)
    for (int64_t d = 0; d < p.D_padded; d += W) store(grad_query + i * p.D_padded + d, load(dq + d * Tq + i * W));
}

template <bool sum_form, int KEYS, typename T>
FUSEDATTN_INLINE void backward_strip_keys(const AttentionProblem<T>& p, const Chunk& chunk, int64_t diagonal,
                                          int64_t j, const T* q, const T* k, const T* g, T* dq, T* dk, int64_t n,
                                          Vec<T> w4, Vec<T>& dw) {
  constexpr int W = LANES<T>;
  Vec<T> kd[KEYS], sum[KEYS] = {}, dwd{};
  for (int c = 0; c < KEYS; ++c) kd[c] = load(k + (j + c) * W);
  backward_column<sum_form, KEYS>(q, kd, g + j, p.Tk, higher(0, j + diagonal), chunk.queries, dq, sum, dwd);
  dw += dwd;  // block by block: a long sum in one register would lose bits
  const Output output = chunk.first_query > 0 ? Output::ADDED : Output::WRITTEN;
  for (int c = 0; c < KEYS; ++c) write<T>(dk + (j + c) * p.D, w4 * sum[c], n, output);
}

// Queries before `diagonal` + the number of a key do not see it.
template <bool sum_form, typename T>
void backward_strip_loop(const AttentionProblem<T>& p, const Chunk& chunk, int64_t diagonal, int64_t keys,
                         const T* q, const T* k, const T* g, T* dq, T* dk, int64_t n, Vec<T> w4, Vec<T>& dw) {
  int64_t j = 0;
  for (; j + BACKWARD_KEYS <= keys; j += BACKWARD_KEYS)
    backward_strip_keys<sum_form, BACKWARD_KEYS>(p, chunk, diagonal, j, q, k, g, dq, dk, n, w4, dw);
  for (; j < keys; ++j) backward_strip_keys<sum_form, 1>(p, chunk, diagonal, j, q, k, g, dq, dk, n, w4, dw);
}

template <typename T>
void backward_strip(const AttentionProblem<T>& p, const Chunk& chunk, int64_t head, int64_t d, int64_t first_key,
                    int64_t last_key, const T* g, T* grad_query, T* grad_key, T* grad_weight, T* scratch) {
  constexpr int W = LANES<T>;
  const Place at = place_of(p, chunk, head);
  const int64_t n = lower(W, p.D - d), keys = last_key - first_key;
  T* q = scratch;
  T* dq = q + chunk.queries * W;
  T* k = dq + chunk.queries * W;

  Vec<T> bound{}, key_bound{};
  for (int64_t i = 0; i < chunk.queries; ++i) {
    const T* x = p.query.row(at.b, at.h, chunk.first_query + i) + d;
    const Vec<T> v = n == W ? load(x) : load_partial(x, n);
    bound = max(abs(v), bound);
    store(q + i * W, v);
    store(dq + i * W, Vec<T>{});
  }
  for (int64_t j = 0; j < keys; ++j) {
    const T* x = p.key.row(at.b, at.h, first_key + j) + d;
    const Vec<T> v = n == W ? load(x) : load_partial(x, n);
    __builtin_prefetch(x + W);  // the next strip's; rows lie too far apart for the hardware to see it
    key_bound = max(abs(v), key_bound);
    store(k + j * W, v);
  }
  const T limit = ScoreRange<T>::PAIR;
  const bool sum_form = !(horizontal_max<T>(bound) + horizontal_max<T>(key_bound) <= limit);
  if (!sum_form) {
    for (int64_t i = 0; i < chunk.queries; ++i) store(q + i * W, exp_unclamped<2>(load(q + i * W)));
    for (int64_t j = 0; j < keys; ++j) store(k + j * W, exp_unclamped<2>(load(k + j * W)));
  }

  g += head * chunk.queries * p.Tk + first_key;
  T* dk = grad_key + (at.n * p.Tk + first_key) * p.D + d;
  const Vec<T> w4 = 4 * load(p.weight + at.h * p.D_padded + d);
  const int64_t diagonal = p.is_causal ? first_key - chunk.first_query : -p.Tk;
  Vec<T> dw = load(grad_weight + d);
  if (sum_form)
    backward_strip_loop<true>(p, chunk, diagonal, keys, q, k, g, dq, dk, n, w4, dw);
  else
    backward_strip_loop<false>(p, chunk, diagonal, keys, q, k, g, dq, dk, n, w4, dw);
  store(grad_weight + d, dw);
  for (int64_t i = 0; i < chunk.queries; ++i) store(grad_query + i * p.D_padded + d, load(dq + i * W));
}

template <typename T>
constexpr AttentionKernels<T> kernels() {
  return {LANES<T>,        prepare_query<T>, score<T>,         softmax<T>,       matmul<T>,
          grad_weights<T>, grad_scores<T>,   backward_rows<T>, backward_strip<T>};
}

}  // namespace

extern const AttentionKernels<float> attention_f32 = kernels<float>();
extern const AttentionKernels<double> attention_f64 = kernels<double>();

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
