// What the CUDA kernels of additive attention share: the problem, and a tile of scores.
//
// A block of 128 threads scores BLOCK_Q x BLOCK_K = 64 x 64 pairs, a thread 8 queries x 4 keys of them in
// registers. BLOCK_D channels at a time, exp(2q) and exp(2k) are computed once per element as they are copied to
// shared memory, channel by channel ([d][i] and [d][j], rows of LEADING elements), so that the loop over d is
// nothing but
//
//   6 shared loads of 16 bytes and 1 of 8, then for each of 32 pairs (i, j) and two channels
//   2 FMA (t = 1 + Eq Ek), FMUL (t1 t2), FMUL + FMA (w1 t2 + w2 t1), MUFU.RCP, FMA: 3.5 slots and 0.5 MUFU per
//   tanh.
//
// LEADING = 68: a row starts 4 banks after the last, so a warp that writes 16 rows x 2 packs of 4 channels meets
// every bank once, and 16-byte loads stay aligned. Staging costs (1/64 + 1/64) exponential and about 0.3 slots per
// tanh.
//
// Range: the largest |q| and |k| of the staged channels are reduced over the block. If their sum may overflow the
// product of two denominators, the block stages q and k themselves and takes the exponential of the sum.
//
// sigmoid is tanh of half the arguments, with other factors. relu and leaky_relu have loops of their own over q
// and k as they are: an addition, a maximum or a choice of two weights, and an FMA.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
// after the definition of FUSEDATTN_INLINE
#include "common/philox.h"
#include "formula.h"
#include "options.h"
#include "window.h"

namespace fusedattn {

constexpr int BLOCK_Q = 64, BLOCK_K = 64;
template <typename T>
constexpr int BLOCK_D = sizeof(T) == 8 ? 16 : 32;  // in double 64 KiB of shared memory hold no more
constexpr int ATTENTION_BLOCK = 128;               // threads
constexpr int TILE_Q = 8, TILE_K = 4;              // of a thread
constexpr int ROW_LANES = BLOCK_K / TILE_K;        // threads that share TILE_Q rows; half a warp
constexpr int LEADING = 68;
constexpr int PACK = 4;  // elements that staging moves at once

template <typename T>
constexpr T INFINITE = static_cast<T>(__builtin_huge_val());
template <typename T>
constexpr T NOT_A_NUMBER = static_cast<T>(__builtin_nan(""));
// Stands for a visible score of -inf, which only an infinite weight makes: softmax of a row of them is NaN, while
// a row of masked ones is zero.
template <typename T>
constexpr T VISIBLE_MINUS_INF = sizeof(T) == 4 ? T(-3.402823466e38) : T(-1.7976931348623157e308);

// What score loops are compiled for: tanh and sigmoid by exponentials, or what is linear on either side of zero.
struct Tanh {};
struct Linear {};
template <typename Phi>
constexpr bool TAKES_EXPONENTIALS = std::is_same_v<Phi, Tanh>;

// body(Tanh{}) or body(Linear{})
template <typename Body>
void with_phi(ScoreActivation activation, const Body& body) {
  if (takes_exponentials(activation))
    body(Tanh{});
  else
    body(Linear{});
}

// ScoreFactors (formula.h) in the type of the arithmetic, and what follows from them.
template <typename T>
struct Factors {
  T total, sum, slope, argument;
  T range;           // of |q| + |k|, for the product of two denominators
  T rate, rate_low;  // e = exp(2 argument x): 2 argument; in float times log2 e, to twice the precision
  T negative_slope;

  Factors() = default;
  explicit Factors(const AttentionOptions& options) {
    const ScoreFactors f = factors_of(options.activation);
    total = T(f.total), sum = T(f.sum), slope = T(f.slope), argument = T(f.argument);
    range = ScoreRange<T>::PAIR / argument;
    constexpr double LOG2E = 2.8853900817779268;
    rate = T(sizeof(T) == 4 ? LOG2E : 2) * argument;
    rate_low = T(sizeof(T) == 4 ? LOG2E - T(LOG2E) : 0) * argument;
    negative_slope = T(options.negative_slope);
  }
};

// Elements of working memory are counted in whole packs, so that what follows is aligned for any type.
inline int64_t whole_packs(int64_t elements) { return gpu::ceil_div(elements, PACK) * PACK; }

// (B, H, T, width), elements of a row next to each other; any of the strides may be 0.
template <typename S>
struct RowsOf {
  const S* data;
  int64_t stride_b, stride_h, stride_t;
  bool packed;  // every row starts at a multiple of PACK elements

  RowsOf() = default;
  FUSEDATTN_HOST_DEVICE RowsOf(const S* data, int64_t stride_b, int64_t stride_h, int64_t stride_t)
      : data(data), stride_b(stride_b), stride_h(stride_h), stride_t(stride_t) {
    packed = reinterpret_cast<uintptr_t>(data) % (PACK * sizeof(S)) == 0 && stride_b % PACK == 0 &&
             stride_h % PACK == 0 && stride_t % PACK == 0;
  }
  FUSEDATTN_DEVICE const S* row(int64_t b, int64_t h, int64_t t) const {
    return data + b * stride_b + h * stride_h + t * stride_t;
  }
};

struct QueryRange {
  int64_t first, end;
};

template <typename S>
struct AttentionProblem {
  int64_t B, H, Tq, Tk, D, Dv;
  RowsOf<S> query, key, value;
  gpu::Numbers<S> weight;  // (H, D)
  int64_t weight_stride_h;
  gpu::Numbers<S> bias;    // or null
  int64_t bias_size[4];    // B, H, Tq and Tk, or 1 where it is broadcast
  int64_t bias_stride[4];  // 0 there
  const bool* mask;        // (B, H, Tq, Tk), true = may attend, or null
  int64_t mask_stride[4];
  const int64_t* key_lengths;  // (B,) or null
  const int64_t* center;       // (B, H, Tq): that of each query's window; null: i, and without windows
  int64_t center_stride[3];
  PhiloxStream random;  // of dropout; without seeds there is none
  Dropout dropout;
  AttentionOptions options;
  Factors<gpu::Arithmetic<S>> by;  // set by prepared (cuda_seen.cuh), as what follows
  // (B, H, Tk): whether mask and windows let some query see a key, or null.
  // What else a key or its value holds is not looked at: it may be NaN.
  const bool* seen = nullptr;
  int64_t seen_stride[3] = {};
  const KeyRange* hulls = nullptr;  // (B, H, query tiles): what the windows of a tile lie within, or null

  FUSEDATTN_HOST_DEVICE int64_t heads() const { return B * H; }
  FUSEDATTN_DEVICE gpu::Arithmetic<S> weight_of(int64_t h, int64_t d) const {
    return weight.get(h * weight_stride_h + d);
  }
  FUSEDATTN_HOST_DEVICE int64_t query_tiles() const { return gpu::ceil_div(Tq, BLOCK_Q); }

  FUSEDATTN_HOST_DEVICE bool has_bias() const { return bias.data != nullptr; }
  FUSEDATTN_DEVICE bool drops() const { return random.seeds != nullptr; }

  FUSEDATTN_DEVICE bool sees(int64_t b, int64_t h, int64_t j) const {
    return seen == nullptr || seen[b * seen_stride[0] + h * seen_stride[1] + j * seen_stride[2]];
  }

  // The keys in the window of query i.
  FUSEDATTN_DEVICE KeyRange keys_of(int64_t b, int64_t h, int64_t i) const {
    if (!has_window(options)) return {0, Tk};
    if (center != nullptr) i = center[b * center_stride[0] + h * center_stride[1] + i * center_stride[2]];
    return keys_around(options, i, Tk);
  }

  // Keys outside are invisible to every query of the tile that starts at i0; {0, 0} where all are.
  FUSEDATTN_DEVICE KeyRange keys_of_tile(int64_t b, int64_t h, int64_t i0) const {
    KeyRange keys = {0, Tk};
    if (hulls != nullptr)
      keys = hulls[(b * H + h) * query_tiles() + i0 / BLOCK_Q];
    else if (has_window(options))
      keys = {keys_of(b, h, i0).first, keys_of(b, h, (i0 + BLOCK_Q < Tq ? i0 + BLOCK_Q : Tq) - 1).end};
    if (key_lengths != nullptr && key_lengths[b] < keys.end) keys.end = key_lengths[b];
    return keys.first < keys.end ? keys : KeyRange{0, 0};
  }

  // Queries outside see none of these keys: known of windows around i.
  FUSEDATTN_DEVICE QueryRange queries_of(KeyRange keys) const {
    QueryRange queries = {0, Tq};
    if (center != nullptr) return queries;
    const int64_t left = options.window_left, right = options.window_right;
    if (right >= 0 && right < keys.first) queries.first = keys.first - right;
    if (left >= 0 && left < Tq - keys.end) queries.end = keys.end + left;
    return queries;
  }
};

// What comes in and what goes out; absent gradients are null (rows: data null). Scores are null or (B, H, Tq, Tk).
template <typename S>
struct AttentionGradients {
  using T = gpu::Arithmetic<S>;
  RowsOf<S> grad_context;
  const T* grad_lse;      // (B, H, Tq)
  const S* grad_weights;  // (B, H, Tq, Tk)
  RowsOf<S> context;
  const T *lse, *scores;
  S *grad_query, *grad_key, *grad_value;  // contiguous, as the next; the last two may be null: not asked for
  gpu::Numbers<S> grad_weight;
  gpu::Numbers<S> grad_bias;  // in the shape of the bias; may be null
};

// A head of a batch element: b, h, and its number among all.
struct Head {
  int64_t n, b, h;
  template <typename S>
  FUSEDATTN_DEVICE Head(const AttentionProblem<S>& p, int64_t n) : n(n), b(n / p.H), h(n % p.H) {}
};

FUSEDATTN_DEVICE int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDATTN_DEVICE int64_t higher(int64_t a, int64_t b) { return a > b ? a : b; }

// Where a thread's pairs begin in the tile.
FUSEDATTN_DEVICE int tile_row() { return static_cast<int>(threadIdx.x) / ROW_LANES * TILE_Q; }
FUSEDATTN_DEVICE int tile_column() { return static_cast<int>(threadIdx.x) % ROW_LANES * TILE_K; }

// exp(2 argument x), 3 ulp. 2x log2 e is kept to twice the precision: its rounding would be a relative error of
// |x| units.
FUSEDATTN_DEVICE float exponential(float x, const Factors<float>& by) {
  const float high = x * by.rate;
  const float low = gpu::fma(x, by.rate_low, gpu::fma(x, by.rate, -high));
  const float y = gpu::exp2_approx(high);
  return gpu::fma(y, low * 0.693147181f, y);
}
FUSEDATTN_DEVICE double exponential(double x, const Factors<double>& by) { return gpu::exp(by.rate * x); }

// 1 / (1 + exp(2s)) for any s; NaN stays NaN.
template <typename T>
FUSEDATTN_DEVICE T reciprocal_of_sum(T s) {
  const T limit = 2 * ScoreRange<T>::PAIR;  // tanh is 1 to rounding, and the denominator finite
  return gpu::rcp_approx(1 + gpu::exp_approx(2 * (s > limit ? limit : s < -limit ? -limit : s)));
}

// r1 = 1/t1, r2 = 1/t2 by one reciprocal
template <typename T>
FUSEDATTN_DEVICE void paired_reciprocal(T t1, T t2, T& r1, T& r2) {
  const T both = gpu::rcp_approx(t1 * t2);
  r1 = t2 * both;
  r2 = t1 * both;
}

// sum += w phi(z), linear on either side of zero. sloped: w times the negative slope
template <bool leaky, typename T>
FUSEDATTN_DEVICE void add_linear(T w, T sloped, T z, T& sum) {
  if constexpr (leaky)
    sum = gpu::fma(z > 0 ? w : sloped, z, sum);
  else
    sum = gpu::fma(w, gpu::relu(z), sum);
}

// The gradients of a pair: what z adds to those of q and k is returned, what it adds to that of w added.
template <bool leaky, typename T>
FUSEDATTN_DEVICE T linear_gradient(T z, T g, T negative_slope, T& weight) {
  if constexpr (leaky) {
    const T h = g * (z > 0 ? T(1) : negative_slope);
    weight = gpu::fma(h, z, weight);
    return h;
  } else {
    weight = gpu::fma(g, gpu::relu(z), weight);
    return z <= 0 ? T(0) : g;
  }
}

// Four elements of a row from d on, zeros from `width` on.
template <typename S>
FUSEDATTN_DEVICE gpu::Pack<S, PACK> load_channels(const S* row, bool packed, int64_t d, int64_t width) {
  if (packed && d + PACK <= width) return gpu::load_pack<PACK>(row + d);
  gpu::Pack<S, PACK> pack;
#pragma unroll
  for (int e = 0; e < PACK; ++e)
    pack.element[e] = d + e < width ? row[d + e] : gpu::to_storage<S>(gpu::Arithmetic<S>(0));
  return pack;
}

// The same to memory; nothing from `width` on. whole: all four lie before it, at a multiple of their size.
template <typename S, typename T>
FUSEDATTN_DEVICE void store_channels(S* row, bool whole, int64_t d, int64_t width, const T (&x)[PACK]) {
  gpu::Pack<S, PACK> pack;
#pragma unroll
  for (int e = 0; e < PACK; ++e) pack.element[e] = gpu::to_storage<S>(x[e]);
  if (whole) {
    gpu::store_pack(row + d, pack);
    return;
  }
#pragma unroll
  for (int e = 0; e < PACK; ++e)
    if (d + e < width) row[d + e] = pack.element[e];
}

// Of the rows to be staged those that are looked at; zeros stand for the others.
struct EveryRow {
  FUSEDATTN_DEVICE bool operator()(int64_t) const { return true; }
};
template <typename S>
struct SeenRows {
  const AttentionProblem<S>& p;
  const Head& at;
  FUSEDATTN_DEVICE bool operator()(int64_t j) const { return p.sees(at.b, at.h, j); }
};

// to[d][row] (rows of LEADING) = f(x[first + row][d0 + d]) for 64 rows and BLOCK_D channels; f(0) from `last` and
// `width` on, and where rows are not `seen`.
template <typename S, typename F, typename Seen = EveryRow>
FUSEDATTN_DEVICE void stage_transposed(const RowsOf<S>& x, const Head& at, int64_t first, int64_t last, int64_t d0,
                                       int64_t width, gpu::Arithmetic<S>* to, const F& f,
                                       const Seen& seen = EveryRow()) {
  const int lane = threadIdx.x % gpu::WARP, row = static_cast<int>(threadIdx.x) / gpu::WARP * 16 + lane / 2;
  const bool exists = first + row < last && seen(first + row);
  const S* source = x.row(at.b, at.h, exists ? first + row : first);
  constexpr int PACKS = BLOCK_D<gpu::Arithmetic<S>> / (2 * PACK);
  gpu::Pack<S, PACK> packs[PACKS];
#pragma unroll
  for (int n = 0; n < PACKS; ++n)
    packs[n] = load_channels(source, x.packed, d0 + (2 * n + lane % 2) * PACK, exists ? width : 0);
#pragma unroll
  for (int n = 0; n < PACKS; ++n)
#pragma unroll
    for (int e = 0; e < PACK; ++e)
      to[((2 * n + lane % 2) * PACK + e) * LEADING + row] = f(gpu::to_arithmetic(packs[n].element[e]));
}

template <typename To, typename S>
FUSEDATTN_DEVICE To convert(S x) {
  if constexpr (std::is_same_v<To, S>)
    return x;
  else
    return gpu::to_storage<To>(gpu::to_arithmetic(x));
}

// to[row][v] (rows of `leading`) = x[first + row][v0 + v] for `rows` rows and 64 columns, zeros from `last` and
// `width` on, and where rows are not `seen`.
template <int leading, int rows = 64, typename S, typename To, typename Seen = EveryRow>
FUSEDATTN_DEVICE void stage_rows(const RowsOf<S>& x, const Head& at, int64_t first, int64_t last, int64_t v0,
                                 int64_t width, To* to, const Seen& seen = EveryRow()) {
  const int v = static_cast<int>(threadIdx.x) % 16 * PACK;
#pragma unroll
  for (int n = 0; n < rows / 8; ++n) {
    const int row = static_cast<int>(threadIdx.x) / 16 + 8 * n;
    const bool exists = first + row < last && seen(first + row);
    const S* source = x.row(at.b, at.h, exists ? first + row : first);
    const auto pack = load_channels(source, x.packed, v0 + v, exists ? width : 0);
    gpu::Pack<To, PACK> converted;
#pragma unroll
    for (int e = 0; e < PACK; ++e) converted.element[e] = convert<To>(pack.element[e]);
    gpu::store_pack(to + row * leading + v, converted);
  }
}

// to[j][i] (rows of `leading`) = x[i][j], of the thread's pairs.
template <typename T>
FUSEDATTN_DEVICE void store_transposed(const T (&x)[TILE_Q][TILE_K], T* to, int64_t leading) {
#pragma unroll
  for (int j = 0; j < TILE_K; ++j)
#pragma unroll
    for (int half = 0; half < TILE_Q; half += PACK) {
      gpu::Pack<T, PACK> pack;
#pragma unroll
      for (int e = 0; e < PACK; ++e) pack.element[e] = x[half + e][j];
      gpu::store_pack(to + j * leading + half, pack);
    }
}

// acc[i][j] += sum over `depth` rows of a[.][i] b[.][j] (both in shared memory, rows of `leading`).
template <int leading = LEADING, typename T>
FUSEDATTN_DEVICE void multiply_tile(const T* a, const T* b, int depth, T (&acc)[TILE_Q][TILE_K]) {
  a += tile_row();
  b += tile_column();
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    const auto left = gpu::load_pack<TILE_Q / 2>(a + k * leading);
    const auto right = gpu::load_pack<TILE_Q / 2>(a + k * leading + TILE_Q / 2);
    const auto column = gpu::load_pack<TILE_K>(b + k * leading);
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
      for (int j = 0; j < TILE_K; ++j) {
        const T factor = i < TILE_Q / 2 ? left.element[i] : right.element[i - TILE_Q / 2];
        acc[i][j] = gpu::fma(factor, column.element[j], acc[i][j]);
      }
  }
}

// Largest x (NaN aside) or sum over the block, the same in every thread. `shared` holds an element per warp; the
// caller's last use of it must lie before a barrier.
template <typename T, typename Combine>
FUSEDATTN_DEVICE T block_reduce(T x, T* shared, const Combine& combine) {
#pragma unroll
  for (int step = gpu::WARP / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(gpu::ALL_LANES, x, step));
  __syncthreads();
  if (threadIdx.x % gpu::WARP == 0) shared[threadIdx.x / gpu::WARP] = x;
  __syncthreads();
  x = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / gpu::WARP; ++warp) x = combine(x, shared[warp]);
  return x;
}

// Weights of a head are divided by their largest magnitude: products of denominators and weights stay in range.
// Without denominators they are what they are.
template <typename T>
struct WeightScale {
  T top, sum;   // the largest magnitude, or 1; the sum of w / top
  bool finite;  // else scores are sums of w tanh: the sum over r would cancel infinities

  template <typename S, typename Phi>
  FUSEDATTN_DEVICE WeightScale(const AttentionProblem<S>& p, const Head& at, T* shared, Phi)
      : top(1), sum(0), finite(true) {
    if constexpr (TAKES_EXPONENTIALS<Phi>) {
      T largest = 0;
      for (int64_t d = threadIdx.x; d < p.D; d += blockDim.x)
        largest = gpu::max(largest, gpu::abs(p.weight_of(at.h, d)));
      top = block_reduce(largest, shared, [](T a, T b) { return gpu::max(a, b); });
      if (!(top > 0) || !(top < INFINITE<T>) || !(1 / top < INFINITE<T>)) top = 1;
      T total = 0;
      for (int64_t d = threadIdx.x; d < p.D; d += blockDim.x) total += p.weight_of(at.h, d) / top;
      sum = block_reduce(total, shared, [](T a, T b) { return a + b; });
      finite = sum - sum == 0;
    }
  }
};

// Shared memory of score_tile: channels of queries and keys, their weights, and an element per warp twice.
template <typename T>
struct ScoreMemory {
  static constexpr int64_t SIZE = 2 * BLOCK_D<T> * LEADING + BLOCK_D<T> + 2 * ATTENTION_BLOCK / gpu::WARP;
  T *q, *k, *w, *reduce;
  FUSEDATTN_DEVICE explicit ScoreMemory(T* memory)
      : q(memory), k(q + BLOCK_D<T> * LEADING), w(k + BLOCK_D<T> * LEADING), reduce(w + BLOCK_D<T>) {}
};

// acc += sum over the staged channels of w r, by pairs of channels.
template <typename T>
FUSEDATTN_DEVICE void score_channels(const ScoreMemory<T>& memory, T (&acc)[TILE_Q][TILE_K]) {
  const T *q = memory.q + tile_row(), *k = memory.k + tile_column();
#pragma unroll 2
  for (int d = 0; d < BLOCK_D<T>; d += 2) {
    T q1[TILE_Q], q2[TILE_Q];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto first = gpu::load_pack<4>(q + d * LEADING + 4 * half);
      const auto second = gpu::load_pack<4>(q + (d + 1) * LEADING + 4 * half);
#pragma unroll
      for (int e = 0; e < 4; ++e) q1[4 * half + e] = first.element[e], q2[4 * half + e] = second.element[e];
    }
    const auto k1 = gpu::load_pack<TILE_K>(k + d * LEADING), k2 = gpu::load_pack<TILE_K>(k + (d + 1) * LEADING);
    const auto w = gpu::load_pack<2>(memory.w + d);
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
      for (int j = 0; j < TILE_K; ++j) {
        const T t1 = gpu::fma(q1[i], k1.element[j], T(1)), t2 = gpu::fma(q2[i], k2.element[j], T(1));
        const auto sum = sum_of_quotients(w.element[0], t1, w.element[1], t2);
        acc[i][j] = gpu::fma(sum.numerator, gpu::rcp_approx(sum.denominator), acc[i][j]);
      }
  }
}

// As score_channels, of channels staged as they are: any value of q + k; w tanh where the weights are not finite.
template <typename T>
FUSEDATTN_DEVICE void score_channels_of_sums(const ScoreMemory<T>& memory, const Factors<T>& by, bool finite,
                                             T (&acc)[TILE_Q][TILE_K]) {
#pragma unroll 1
  for (int d = 0; d < BLOCK_D<T>; ++d) {
    const T *q = memory.q + d * LEADING + tile_row(), *k = memory.k + d * LEADING + tile_column();
    const T w = memory.w[d];
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
      for (int j = 0; j < TILE_K; ++j) {
        const T r = reciprocal_of_sum(by.argument * (q[i] + k[j]));
        acc[i][j] = gpu::fma(w, finite ? r : 1 + by.sum * r, acc[i][j]);
      }
  }
}

// acc += sum over the staged channels of w phi, linear on either side of zero.
template <bool leaky, typename T>
FUSEDATTN_DEVICE void score_channels_linearly(const ScoreMemory<T>& memory, T negative_slope,
                                              T (&acc)[TILE_Q][TILE_K]) {
  const T *q = memory.q + tile_row(), *k = memory.k + tile_column();
#pragma unroll 2
  for (int d = 0; d < BLOCK_D<T>; ++d) {
    const auto above = gpu::load_pack<TILE_Q / 2>(q + d * LEADING);
    const auto below = gpu::load_pack<TILE_Q / 2>(q + d * LEADING + TILE_Q / 2);
    const auto keys = gpu::load_pack<TILE_K>(k + d * LEADING);
    const T w = memory.w[d], sloped = negative_slope * w;
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
      for (int j = 0; j < TILE_K; ++j) {
        const T query = i < TILE_Q / 2 ? above.element[i] : below.element[i - TILE_Q / 2];
        add_linear<leaky>(w, sloped, query + keys.element[j], acc[i][j]);
      }
  }
}

// The scaled score from the sum over its channels, w - 2 w r or w phi. Multiplied last: it may be finite where
// neither term is.
template <typename T>
FUSEDATTN_DEVICE T scaled_score(const WeightScale<T>& weight, const Factors<T>& by, T scale, T sum) {
  return scale * weight.top * gpu::fma(weight.finite ? by.sum : T(1), sum, weight.finite ? weight.sum : T(0));
}

// Scores of the thread's pairs, scaled, capped and masked, from the sums over their channels; -inf where
// invisible.
template <typename S, typename T>
FUSEDATTN_DEVICE void finish_scores(const AttentionProblem<S>& p, const Head& at, const WeightScale<T>& weight,
                                    int64_t i0, int64_t j0, int64_t keys_end, T (&score)[TILE_Q][TILE_K]) {
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
    for (int j = 0; j < TILE_K; ++j) score[i][j] = scaled_score(weight, p.by, T(p.options.scale), score[i][j]);
  if (p.options.softcap != 0) {
    const T cap = T(p.options.softcap), inverse = 1 / cap;
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
      for (int j = 0; j < TILE_K; ++j) score[i][j] = cap * gpu::tanh(score[i][j] * inverse);
  }
  // Visible are the first `columns` of the thread's keys.
  const int64_t first_row = i0 + tile_row(), first_column = j0 + tile_column();
  const int columns = static_cast<int>(lower(TILE_K, keys_end - first_column < 0 ? 0 : keys_end - first_column));
  const int rows = static_cast<int>(lower(TILE_Q, p.Tq - first_row < 0 ? 0 : p.Tq - first_row));
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
    for (int j = 0; j < TILE_K; ++j) {
      if (score[i][j] == -INFINITE<T>) score[i][j] = VISIBLE_MINUS_INF<T>;
      if (i >= rows || j >= columns) score[i][j] = -INFINITE<T>;
    }
  if (has_window(p.options)) {
#pragma unroll
    for (int i = 0; i < TILE_Q; ++i) {
      const KeyRange keys = i < rows ? p.keys_of(at.b, at.h, first_row + i) : KeyRange{0, 0};
#pragma unroll
      for (int j = 0; j < TILE_K; ++j)
        if (first_column + j < keys.first || first_column + j >= keys.end) score[i][j] = -INFINITE<T>;
    }
  }
  if (p.mask == nullptr) return;
  const bool* mask = p.mask + at.b * p.mask_stride[0] + at.h * p.mask_stride[1] + first_row * p.mask_stride[2] +
                     first_column * p.mask_stride[3];
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i) {
    if (i < rows)
#pragma unroll
      for (int j = 0; j < TILE_K; ++j)
        if (j < columns && !mask[j * p.mask_stride[3]]) score[i][j] = -INFINITE<T>;
    mask += p.mask_stride[2];
  }
}

// score[i][j] of the thread's pairs in the tile at (i0, j0). Begins with a barrier, so whoever used the memory
// before may have finished late; ends without one.
template <typename Phi, typename S, typename T>
FUSEDATTN_DEVICE void score_tile(const AttentionProblem<S>& p, const Head& at, const WeightScale<T>& weight,
                                 int64_t i0, int64_t j0, int64_t keys_end, const ScoreMemory<T>& memory,
                                 T (&score)[TILE_Q][TILE_K]) {
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
    for (int j = 0; j < TILE_K; ++j) score[i][j] = 0;
  const int64_t queries_end = lower(p.Tq, i0 + BLOCK_Q);
  int64_t d0 = 0;
  do {  // once even without channels, for the barrier
    __syncthreads();
    if (threadIdx.x < BLOCK_D<T>) {
      const int64_t d = d0 + threadIdx.x;
      memory.w[threadIdx.x] = d < p.D ? p.weight_of(at.h, d) / weight.top : T(0);
    }
    const auto stage = [&](const auto& of_query, const auto& of_key) {
      stage_transposed(p.query, at, i0, queries_end, d0, p.D, memory.q, of_query);
      stage_transposed(p.key, at, j0, keys_end, d0, p.D, memory.k, of_key, SeenRows<S>{p, at});
    };
    const auto same = [](T x) { return x; };
    if constexpr (!TAKES_EXPONENTIALS<Phi>) {
      stage(same, same);
      __syncthreads();
      if (p.options.activation == ScoreActivation::LEAKY_RELU)
        score_channels_linearly<true>(memory, p.by.negative_slope, score);
      else
        score_channels_linearly<false>(memory, p.by.negative_slope, score);
    } else {
      T q_bound = 0, k_bound = 0;
      stage(
          [&](T x) {
            q_bound = gpu::max(q_bound, gpu::abs(x));
            return exponential(x, p.by);
          },
          [&](T x) {
            k_bound = gpu::max(k_bound, gpu::abs(x));
            return exponential(x, p.by);
          });
      q_bound = gpu::warp_max(q_bound);
      k_bound = gpu::warp_max(k_bound);
      constexpr int WARPS = ATTENTION_BLOCK / gpu::WARP;
      if (threadIdx.x % gpu::WARP == 0) {
        memory.reduce[threadIdx.x / gpu::WARP] = q_bound;
        memory.reduce[WARPS + threadIdx.x / gpu::WARP] = k_bound;
      }
      __syncthreads();
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) {
        q_bound = gpu::max(q_bound, memory.reduce[warp]);
        k_bound = gpu::max(k_bound, memory.reduce[WARPS + warp]);
      }
      if (weight.finite && q_bound + k_bound <= p.by.range) {
        score_channels(memory, score);
      } else {
        __syncthreads();
        stage(same, same);
        __syncthreads();
        score_channels_of_sums(memory, p.by, weight.finite, score);
      }
    }
    d0 += BLOCK_D<T>;
  } while (d0 < p.D);
  finish_scores(p, at, weight, i0, j0, keys_end, score);
}

// What the row's sums are multiplied with in the end.
template <typename T>
FUSEDATTN_DEVICE T normaliser(T row_max, T row_sum) {
  if (row_max == -INFINITE<T> && row_sum == 0) return T(0);
  return row_max == VISIBLE_MINUS_INF<T> ? NOT_A_NUMBER<T> : 1 / row_sum;
}

template <typename T>
FUSEDATTN_DEVICE T log_sum_exp(T row_max, T row_sum) {
  const bool none = (row_max == -INFINITE<T> && row_sum == 0) || row_max == VISIBLE_MINUS_INF<T>;
  return none ? -INFINITE<T> : row_max + gpu::log(row_sum);
}

// A bit for each of the four keys from j on: whether dropout keeps their weights of query i.
template <typename S>
FUSEDATTN_DEVICE unsigned kept_keys(const AttentionProblem<S>& p, const Head& at, int64_t i, int64_t j) {
  const PhiloxRow row = philox_row(p.random, at.b, at.h, i);
  const uint64_t first = row.first_key + j, skipped = first % PACK;
  const auto four = [&](uint64_t n) {
    uint64_t words[4] = {n, static_cast<uint64_t>(row.query), row.head, row.head >> 32};
    philox(words, row.seed,
           [](uint64_t a, uint64_t b) { return uint64_t{static_cast<uint32_t>(a)} * static_cast<uint32_t>(b); });
    unsigned kept = 0;
#pragma unroll
    for (int word = 0; word < 4; ++word)
      kept |= unsigned{static_cast<uint32_t>(words[word]) >= p.dropout.threshold} << word;
    return kept;
  };
  unsigned kept = four(first / PACK) >> skipped;
  if (skipped != 0) kept |= four(first / PACK + 1) << (PACK - skipped);
  return kept;
}

// The same of the thread's pairs in the tile at (i0, j0), TILE_K bits for each row.
template <typename S>
FUSEDATTN_DEVICE uint32_t kept_pairs(const AttentionProblem<S>& p, const Head& at, int64_t i0, int64_t j0) {
  static_assert(TILE_K == PACK && TILE_Q * TILE_K == 32, "a row is one call, the pairs are one word");
  constexpr unsigned ROW = (1u << TILE_K) - 1;
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < TILE_Q; ++i)
    kept |= (kept_keys(p, at, i0 + tile_row() + i, j0 + tile_column()) & ROW) << (TILE_K * i);
  return kept;
}

// What dropout makes of numbers of these pairs.
template <typename T>
FUSEDATTN_DEVICE void drop_pairs(uint32_t kept, T factor, T (&x)[TILE_Q][TILE_K]) {
#pragma unroll
  for (int i = 0; i < TILE_Q; ++i)
#pragma unroll
    for (int j = 0; j < TILE_K; ++j) x[i][j] = kept >> (TILE_K * i + j) & 1 ? x[i][j] * factor : T(0);
}

// What dropout makes of a number of a single pair.
template <typename S, typename T>
FUSEDATTN_DEVICE T dropped(const AttentionProblem<S>& p, const Head& at, int64_t i, int64_t j, T x) {
  return kept_keys(p, at, i, j) & 1 ? x * T(p.dropout.factor) : T(0);
}

// finish_scores of one visible-by-length pair.
template <typename S, typename T>
FUSEDATTN_DEVICE T finished_score(const AttentionProblem<S>& p, const Head& at, const WeightScale<T>& weight,
                                  int64_t i, int64_t j, T sum) {
  const KeyRange keys = p.keys_of(at.b, at.h, i);
  if (j < keys.first || j >= keys.end) return -INFINITE<T>;
  if (p.mask != nullptr &&
      !p.mask[at.b * p.mask_stride[0] + at.h * p.mask_stride[1] + i * p.mask_stride[2] + j * p.mask_stride[3]])
    return -INFINITE<T>;
  T score = scaled_score(weight, p.by, T(p.options.scale), sum);
  if (p.options.softcap != 0) score = T(p.options.softcap) * gpu::tanh(score * (1 / T(p.options.softcap)));
  return score == -INFINITE<T> ? VISIBLE_MINUS_INF<T> : score;
}

}  // namespace fusedattn
