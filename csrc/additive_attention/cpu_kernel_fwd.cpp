// Forward: scores and their softmax, compiled once per instruction set. Lanes run over score channels d.
//
// Per pair (i, j) and vector of channels: t = 1 + Eq Ek costs one multiply-add; four channels share one reciprocal
// (13 more operations per four). A tile of queries x keys keeps its sums in registers and folds the lanes once at
// the end. Where |q| + |k| could overflow the product, two channels share one. Beyond that range
// 1 / (1 + exp(2(q + k))) is taken of the sum, clamped where tanh is 1: any input is safe. A single query meets
// every key once: its keys are read, exponentiated and used in one go, and exponentials at hand asked for ahead as
// these are. Walked as a tile, without that, they took longer than keys where both came from memory.
//
// Activations that are linear on either side of zero cost an addition, a maximum and a multiply-add.
#include "cpu_kernel_common.h"

extern "C" double log1p(double);

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

// y = exp(2 argument x), zeros up to whole vectors; returns max |argument x|. Beyond ScoreRange::PAIR y is
// anything, and not used.
template <bool PAIRED = true, typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE T exp2x_padded(const S* x, int64_t n, T argument, T* y) {
  constexpr int W = LANES<T>;
  Vec<T> bound{};
  int64_t d = 0;
  for (; d + W <= n; d += W) {
    const Vec<T> v = argument * load(x + d);
    prefetch(x + d);
    bound = max_abs(v, bound);
    store(y + d, exp_unclamped<2, PAIRED>(v));
  }
  if (d < n) {
    const Vec<T> v = argument * load_partial(x + d, n - d);
    bound = max_abs(v, bound);
    store(y + d, Vec<T>{});
    store_partial(y + d, exp_unclamped<2, PAIRED>(v), n - d);
  }
  return horizontal_max<T>(bound);
}

// w0/t0 + w1/t1 + w2/t2 + w3/t3
template <typename T>
FUSEDATTN_INLINE Vec<T> sum_of_four_quotients(const Vec<T> (&w)[4], const Vec<T> (&t)[4]) {
  const auto sum = add(sum_of_quotients(w[0], t[0], w[1], t[1]), sum_of_quotients(w[2], t[2], w[3], t[3]));
  return quotient(sum.numerator, sum.denominator);
}

enum class Mode { QUAD, PAIR, SUM, TANH };

// Sums of w r (QUAD and PAIR: rows hold exponentials; SUM: rows hold q and k) or of w tanh (TANH).
template <Mode mode, typename T>
struct ScoreTile {
  static constexpr int QUERIES = 4;
  // Four sums, which are folded at once. More, or w in registers, was slower: 16 registers are few, and of 32 two
  // queries by four keys left too few for what goes on at a time.
  static constexpr int keys(int queries) { return 4 / queries; }
  const T* w;
  int64_t D_padded;
  T factor;  // in TANH: w (1 + factor r)

  FUSEDATTN_INLINE Vec<T> denominator(Vec<T> q, Vec<T> k) {
    if constexpr (mode == Mode::SUM || mode == Mode::TANH)
      return denominator_of_sum<T>(q, k, ScoreRange<T>::QUAD);
    else
      return q * k + 1;
  }

  template <int ROWS, int KEYS>
  __attribute__((always_inline)) void run(Rows<T> q, Rows<T> k, T* sums) const {
    constexpr int W = LANES<T>;
    Vec<T> acc[ROWS * KEYS] = {};
    int64_t d = 0;
    if constexpr (mode == Mode::QUAD || mode == Mode::SUM) {
      for (; d + 4 * W <= D_padded; d += 4 * W)
        for (int j = 0; j < KEYS; ++j)
          for (int i = 0; i < ROWS; ++i) {
            Vec<T> wd[4], t[4];
            for (int c = 0; c < 4; ++c) {
              wd[c] = load(w + d + c * W);
              t[c] = denominator(load(q.from(i).data + d + c * W), load(k.from(j).data + d + c * W));
            }
            acc[i * KEYS + j] += sum_of_four_quotients<T>(wd, t);
          }
    }
    if constexpr (mode != Mode::TANH) {
      for (; d + 2 * W <= D_padded; d += 2 * W) {
        const Vec<T> w0 = load(w + d), w1 = load(w + d + W);
        for (int j = 0; j < KEYS; ++j) {
          const Vec<T> k0 = load(k.data + j * k.stride + d), k1 = load(k.data + j * k.stride + d + W);
          for (int i = 0; i < ROWS; ++i) {
            const Vec<T> t0 = denominator(load(q.data + i * q.stride + d), k0);
            const Vec<T> t1 = denominator(load(q.data + i * q.stride + d + W), k1);
            const auto sum = sum_of_quotients(w0, t0, w1, t1);
            acc[i * KEYS + j] += quotient(sum.numerator, sum.denominator);
          }
        }
      }
    }
    for (; d < D_padded; d += W) {
      const Vec<T> wd = load(w + d);
      for (int j = 0; j < KEYS; ++j) {
        const Vec<T> kd = load(k.data + j * k.stride + d);
        for (int i = 0; i < ROWS; ++i) {
          const Vec<T> r = reciprocal(denominator(load(q.data + i * q.stride + d), kd));
          acc[i * KEYS + j] += wd * (mode == Mode::TANH ? 1 + factor * r : r);
        }
      }
    }
    fold_lanes(acc, sums);
  }
};

// Sums of w phi, where phi is linear on either side of zero; rows hold q and k.
template <ScoreActivation activation, typename T>
struct LinearTile {
  static constexpr int QUERIES = 2;
  static constexpr int keys(int) { return TILE_KEYS; }
  const T* w;
  int64_t D_padded;
  T negative_slope;

  template <int ROWS, int KEYS>
  __attribute__((always_inline)) void run(Rows<T> q, Rows<T> k, T* sums) const {
    constexpr int W = LANES<T>;
    Vec<T> acc[ROWS * KEYS] = {};
    for (int64_t d = 0; d < D_padded; d += W) {
      const Vec<T> wd = load(w + d);
      for (int j = 0; j < KEYS; ++j) {
        const Vec<T> kd = load(k.data + j * k.stride + d);
        for (int i = 0; i < ROWS; ++i)
          acc[i * KEYS + j] += wd * linear<activation, T>(load(q.data + i * q.stride + d) + kd, negative_slope);
      }
    }
    fold_lanes(acc, sums);
  }
};

template <typename S, typename T = Arithmetic<S>>
void prepare_query(const AttentionProblem<S>& p, const Chunk& chunk, int64_t row) {
  const Place at = place_of(p, chunk, row / chunk.queries);
  const S* q = p.query.row(at.b, at.h, chunk.first_query + row % chunk.queries);
  T* exps = p.query_exp + row * p.D_padded;
  if (!takes_exponentials(p.options.activation)) return copy_padded(q, p.D, exps);
  // Exponentials of keys that were made ahead are not rounded as ours are.
  p.query_bound[row] = p.key_exp == nullptr ? exp2x_padded(q, p.D, p.argument, exps)
                                            : exp2x_padded<false>(q, p.D, p.argument, exps);
}

// Rows of scores from sums over d: scaled, capped, masked. `keys` of them are visible, the block has `width`.
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void finish_scores(const AttentionProblem<S>& p, const Place& at, int64_t i, int64_t j,
                                    int64_t keys, int64_t width, T factor, T slope, T offset, const T* sums,
                                    T* out) {
  constexpr int W = LANES<T>;
  const T softcap = static_cast<T>(p.options.softcap);
  T row[KEY_BLOCK];
  for (int64_t c = 0; c < KEY_BLOCK; c += W) {
    Vec<T> s = factor * (slope * load(sums + c) + offset);  // their sum may be finite where neither is
    if (softcap != 0) s = softcap * tanh(s * (1 / softcap));
    s = s == -INF<T> ? splat(VISIBLE_MINUS_INF<T>) : s;
    store(row + c, s);
  }
  const KeyRange window = p.keys_of(at.b, at.h, i);
  keys = lower(keys, window.end - j);
  for (int64_t c = 0; c < width; ++c) out[c] = c < keys ? row[c] : -INF<T>;
  for (int64_t c = 0; c < lower(width, window.first - j); ++c) out[c] = -INF<T>;
  if (p.mask != nullptr) {
    const bool* mask =
        p.mask + at.b * p.mask_stride[0] + at.h * p.mask_stride[1] + i * p.mask_stride[2] + j * p.mask_stride[3];
    for (int64_t c = 0; c < width; ++c)
      if (!mask[c * p.mask_stride[3]]) out[c] = -INF<T>;
  }
}

// What the rows of keys that one query meets hold: keys, for the activations of formula.h, or exponentials.
enum class KeyForm { TANH, SIGMOID, RELU, LEAKY_RELU, EXPONENTIALS };

// sums[j] over d of w r, or w phi, for one query and KEYS keys j. `bound` grows to max |k| of keys of which
// exponentials are taken. Beyond ScoreRange::QUAD the sums over r are anything.
template <KeyForm form, int KEYS, typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void one_query_tile(const T* q, const S* k, int64_t k_row, const int* index, T slope, const T* w,
                                     int64_t D, T* sums, Vec<T>& bound) {
  constexpr int W = LANES<T>;
  Vec<T> acc[KEYS] = {};
  const S* key[KEYS];
  for (int j = 0; j < KEYS; ++j) key[j] = k + index[j] * k_row;
  const auto load_key = [&](int j, int64_t d, int64_t n) {
    prefetch(key[KEYS - 1] + d, (1 + j) * k_row * static_cast<int64_t>(sizeof(S)));
    return get(key[j] + d, n);
  };
  const auto denominator = [&](int j, int64_t d, int64_t n) {
    Vec<T> kd = load_key(j, d, n);
    if constexpr (form != KeyForm::EXPONENTIALS) {
      bound = max_abs(kd, bound);
      kd = exp_unclamped<form == KeyForm::TANH ? 2 : 1, true>(kd);
    }
    return load(q + d) * kd + 1;
  };
  int64_t d = 0;
  if constexpr (form != KeyForm::RELU && form != KeyForm::LEAKY_RELU) {
    for (; d + 4 * W <= D; d += 4 * W)
      for (int j = 0; j < KEYS; ++j) {
        Vec<T> wd[4], t[4];
        for (int c = 0; c < 4; ++c) wd[c] = load(w + d + c * W), t[c] = denominator(j, d + c * W, W);
        acc[j] += sum_of_four_quotients<T>(wd, t);
      }
    for (; d < D; d += W)
      for (int j = 0; j < KEYS; ++j) acc[j] += load(w + d) * reciprocal(denominator(j, d, lower(W, D - d)));
  } else {
    constexpr ScoreActivation activation =
        form == KeyForm::RELU ? ScoreActivation::RELU : ScoreActivation::LEAKY_RELU;
    for (; d < D; d += W)
      for (int j = 0; j < KEYS; ++j)
        acc[j] += load(w + d) * linear<activation, T>(load(q + d) + load_key(j, d, lower(W, D - d)), slope);
  }
  T folded[KEYS];
  fold_lanes(acc, folded);
  for (int j = 0; j < KEYS; ++j) sums[j] = folded[j];
}

template <KeyForm value_>
struct KeyFormConstant {
  static constexpr KeyForm value = value_;
};

template <KeyForm form, typename S, typename T = Arithmetic<S>>
__attribute__((noinline)) T one_query(const T* q, const S* k, int64_t k_row, const SeenKeys& keys, T slope,
                                      const T* w, int64_t D, T* sums) {
  Vec<T> bound{};
  int64_t n = 0;
  for (; n + 1 < keys.count; n += TILE_KEYS)  // the last key again costs less than single ones
    one_query_tile<form, TILE_KEYS>(q, k, k_row, keys.index + n, slope, w, D, sums + n, bound);
  for (; n < keys.count; ++n) one_query_tile<form, 1>(q, k, k_row, keys.index + n, slope, w, D, sums + n, bound);
  return horizontal_max<T>(bound);
}

// One head's queries against a block of keys. `keys` of its `width` reach to the last visible one; of these some
// query sees those in `seen`.
struct ScoreBlock {
  Place at;
  int64_t head, first_key, width, keys;
  SeenKeys seen;

  KeyRange range() const { return {first_key, first_key + width}; }

  // What follows works on `count` keys that lie next to each other.
  bool gathered() const { return seen.count < keys; }
};

// An odd number of vectors between rows keeps tall columns out of one cache set.
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE int64_t scratch_row(const AttentionProblem<S>& p) {
  return p.D_padded + LANES<T>;
}

// finish_rows(first row, rows, sums, factor, slope, offset): see finish_scores; the n-th sum of a row is that of
// the n-th key that is seen.
template <typename S, typename Finish, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void score_by_exponentials(const AttentionProblem<S>& p, const Chunk& chunk,
                                            const ScoreBlock& block, T* scratch, const Finish& finish_rows) {
  const Place at = block.at;
  const SeenKeys& seen = block.seen;
  const T* w = p.weight_scaled + at.h * p.D_padded;
  const ScoreFactors by = factors_of(p.options.activation);
  const T factor = static_cast<T>(p.options.scale) * p.weight_max[at.h], weight_sum = p.weight_sum[at.h];
  // The sum over r cancels against the sum of the weights, which an infinite weight does not survive.
  const bool finite = weight_sum - weight_sum == 0;
  const auto finish = [&](int64_t r, int64_t rows, T* sums) {
    finish_rows(r, rows, sums, factor, finite ? T(by.sum) : T(1), finite ? weight_sum : T(0));
  };
  T sums[ScoreTile<Mode::QUAD, T>::QUERIES * KEY_BLOCK] = {};
  const Rows<S> key_rows{p.key.row(at.b, at.h, block.first_key), p.key.stride_t};
  if (chunk.queries == 1 && finite) {
    const T* q = p.query_exp + block.head * p.D_padded;
    const T limit = ScoreRange<T>::QUAD - p.query_bound[block.head];
    const auto sum_up = [&](auto form, const auto* k, int64_t k_row) {
      return one_query<form.value>(q, k, k_row, seen, T(0), w, p.D, sums);
    };
    T bound = p.key_bound;
    if (p.key_exp != nullptr && bound <= limit)
      sum_up(KeyFormConstant<KeyForm::EXPONENTIALS>{}, p.key_exp + (at.n * p.Tk + block.first_key) * p.D, p.D);
    else if (p.key_exp == nullptr && p.options.activation == ScoreActivation::TANH)
      bound = sum_up(KeyFormConstant<KeyForm::TANH>{}, key_rows.data, key_rows.stride);
    else if (p.key_exp == nullptr)
      bound = p.argument * sum_up(KeyFormConstant<KeyForm::SIGMOID>{}, key_rows.data, key_rows.stride);
    if (bound <= limit) return finish(0, 1, sums);
  }

  const int64_t row_size = scratch_row(p);
  T* key_exp = scratch;
  T* key_raw = scratch + KEY_BLOCK * row_size;
  T* query_raw = key_raw + KEY_BLOCK * row_size;
  const bool padded = p.D != p.D_padded;

  Rows<T> exps{key_exp, row_size}, raw{};
  T key_bound = p.key_bound;
  if (p.key_exp != nullptr) {
    exps = {p.key_exp + (at.n * p.Tk + block.first_key) * p.D, p.D};
    if (padded || block.gathered()) exps = copied(exps, seen, p.D, key_exp, row_size);
  } else {
    key_bound = 0;
    for (int64_t n = 0; n < seen.count; ++n) {
      const T bound = exp2x_padded(key_rows.from(seen.index[n]).data, p.D, p.argument, key_exp + n * row_size);
      key_bound = bound > key_bound ? bound : key_bound;
    }
  }

  const auto score_rows = [&](int64_t r, int64_t rows) {
    const Rows<T> query_exp{p.query_exp + (block.head * chunk.queries + r) * p.D_padded, p.D_padded};
    const T* query_bound = p.query_bound + block.head * chunk.queries + r;
    T bound = query_bound[0];
    for (int64_t i = 1; i < rows; ++i) bound = query_bound[i] > bound ? query_bound[i] : bound;
    bound += key_bound;
    if (finite && bound <= ScoreRange<T>::QUAD) {
      pairwise(ScoreTile<Mode::QUAD, T>{w, p.D_padded}, rows, query_exp, exps, seen.count, sums);
    } else if (finite && bound <= ScoreRange<T>::PAIR) {
      pairwise(ScoreTile<Mode::PAIR, T>{w, p.D_padded}, rows, query_exp, exps, seen.count, sums);
    } else {
      if (raw.data == nullptr) {
        raw = block.gathered() ? copied(key_rows, seen, p.D, key_raw, row_size)
                               : as_vectors(key_rows, block.keys, p.D, key_raw, row_size);
        raw = times(p.argument, raw, seen.count, p.D_padded, key_raw, row_size);
      }
      const Rows<S> query_rows{p.query.row(at.b, at.h, chunk.first_query + r), p.query.stride_t};
      const Rows<T> queries = times(p.argument, as_vectors(query_rows, rows, p.D, query_raw, row_size), rows,
                                    p.D_padded, query_raw, row_size);
      if (finite)
        pairwise(ScoreTile<Mode::SUM, T>{w, p.D_padded}, rows, queries, raw, seen.count, sums);
      else
        pairwise(ScoreTile<Mode::TANH, T>{w, p.D_padded, T(by.sum)}, rows, queries, raw, seen.count, sums);
    }
    finish(r, rows, sums);
  };
  for_each_run(p, chunk, at, block.range(), [&](int64_t first, int64_t last) {
    for (int64_t r = first, rows; r < last; r += rows)
      score_rows(r, rows = tile_rows<ScoreTile<Mode::QUAD, T>>(last - r));
  });
}

// The same where the activation is linear on either side of zero.
template <ScoreActivation activation, typename S, typename Finish, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void score_linearly(const AttentionProblem<S>& p, const Chunk& chunk, const ScoreBlock& block,
                                     T* scratch, const Finish& finish_rows) {
  const Place at = block.at;
  using Tile = LinearTile<activation, T>;
  const Tile tile{p.weight + at.h * p.D_padded, p.D_padded, static_cast<T>(p.options.negative_slope)};
  const Rows<S> key_rows{p.key.row(at.b, at.h, block.first_key), p.key.stride_t};
  T sums[Tile::QUERIES * KEY_BLOCK] = {};
  const auto finish = [&](int64_t r, int64_t rows) {
    finish_rows(r, rows, sums, static_cast<T>(p.options.scale), T(1), T(0));
  };
  if (chunk.queries == 1) {
    constexpr KeyForm form = activation == ScoreActivation::RELU ? KeyForm::RELU : KeyForm::LEAKY_RELU;
    one_query<form>(p.query_exp + block.head * p.D_padded, key_rows.data, key_rows.stride, block.seen,
                    tile.negative_slope, tile.w, p.D, sums);
    return finish(0, 1);
  }
  const Rows<T> keys = block.gathered() ? copied(key_rows, block.seen, p.D, scratch, scratch_row(p))
                                        : as_vectors(key_rows, block.keys, p.D, scratch, scratch_row(p));
  for_each_run(p, chunk, at, block.range(), [&](int64_t first, int64_t last) {
    for (int64_t r = first, rows; r < last; r += rows) {
      rows = tile_rows<Tile>(last - r);
      const Rows<T> queries{p.query_exp + (block.head * chunk.queries + r) * p.D_padded, p.D_padded};
      pairwise(tile, rows, queries, keys, block.seen.count, sums);
      finish(r, rows);
    }
  });
}

template <typename S, typename T = Arithmetic<S>>
void score(const AttentionProblem<S>& p, const Chunk& chunk, int64_t head, int64_t first_key, T* scores,
           T* scratch) {
  const Place at = place_of(p, chunk, head);
  const int64_t width = lower(KEY_BLOCK, p.Tk - first_key);
  const int64_t keys = lower(width, p.visible_keys(at.b, at.h) - first_key);
  const ScoreBlock block{at, head, first_key, width, keys, seen_in_block(p, at, first_key, keys)};
  scores += head * chunk.queries * p.Tk + first_key;
  if (next_run(p, chunk, at, block.range(), 0).first == chunk.queries) return;
  if (block.seen.count == 0)
    return for_each_run(p, chunk, at, block.range(), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        for (int64_t c = 0; c < width; ++c) scores[r * p.Tk + c] = -INF<T>;
    });

  const auto finish = [&](int64_t r, int64_t rows, T* sums, T factor, T slope, T offset) {
    for (int64_t i = 0; i < rows; ++i) {
      T* row = sums + i * KEY_BLOCK;
      for (int64_t n = block.seen.count - 1; block.gathered() && n >= 0; --n) row[block.seen.index[n]] = row[n];
      finish_scores(p, at, chunk.first_query + r + i, first_key, keys, width, factor, slope, offset, row,
                    scores + (r + i) * p.Tk);
    }
  };
  with_activation(p.options.activation, [&](auto constant) {
    if constexpr (takes_exponentials(constant.activation))
      score_by_exponentials(p, chunk, block, scratch, finish);
    else
      score_linearly<constant.activation>(p, chunk, block, scratch, finish);
  });
}

template <typename T, typename B>
void add_bias(int64_t n, const T* scores, const B* bias, int64_t step, T* out) {
  constexpr int W = LANES<T>;
  // What overflows stays above the score that stands for -inf, and so does a bias of the lowest number, as float
  // masks have it.
  constexpr T LOWEST = VISIBLE_MINUS_INF<T> * (1 - (sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52)));
  const auto add = [&](int64_t j, int64_t lanes, Vec<T> b) {
    const Vec<T> s = get(scores + j, lanes);
    Vec<T> biased = max(splat(LOWEST), s + b);
    biased = s <= VISIBLE_MINUS_INF<T> ? s : biased;
    put(out + j, b == -INF<T> ? splat(-INF<T>) : biased, lanes);
  };
  if (step == 1) {
    for (int64_t j = 0; j < n; j += W) add(j, lower(W, n - j), get(bias + j, lower(W, n - j)));
    return;
  }
  for (int64_t j = 0; j < n; j += W) {
    B gathered[W] = {};
    const int64_t lanes = lower(W, n - j);
    for (int64_t c = 0; c < lanes; ++c) gathered[c] = bias[(j + c) * step];
    add(j, lanes, load(gathered));
  }
}

template <typename T>
T softmax(KeyRange keys, KeyRange columns, const T* scores, T* p) {
  constexpr int W = LANES<T>;
  constexpr int64_t BLOCK = 64 * W;  // lane sums are folded into float64 so often
  Vec<T> top = splat(-INF<T>);
  IntVec<T> is_nan{};
  int64_t j = keys.first;
  for (; j + W <= keys.end; j += W) {
    top = max(load(scores + j), top);
    is_nan |= load(scores + j) != load(scores + j);
  }
  T m = horizontal_max<T>(top);
  bool nan = any(is_nan);
  for (; j < keys.end; ++j) {
    m = scores[j] > m ? scores[j] : m;
    nan |= scores[j] != scores[j];
  }
  for (j = columns.first; j < keys.first; ++j) p[j] = 0;
  for (j = keys.end; j < columns.end; ++j) p[j] = 0;
  // No key is visible, or softmax is NaN.
  if (nan || m == INF<T> || m == -INF<T> || m == VISIBLE_MINUS_INF<T>) {
    for (j = keys.first; j < keys.end; ++j) p[j] = scores[j] == -INF<T> ? 0 : NOT_A_NUMBER<T>;
    return nan ? NOT_A_NUMBER<T> : m == INF<T> ? INF<T> : -INF<T>;
  }
  double sum = 0;
  for (int64_t first = keys.first; first < keys.end; first += BLOCK) {
    const int64_t last = lower(keys.end, first + BLOCK);
    Vec<T> lanes{};
    for (j = first; j < last; j += W) {
      const int64_t left = last - j;
      const Vec<T> x = (left < W ? load_partial(scores + j, left) : load(scores + j)) - m;
      Vec<T> e = exp_or_zero<T>(x);
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
  for (j = keys.first; j < keys.end; ++j) p[j] *= inverse;
  return m + static_cast<T>(log1p(sum - 1));
}
}  // namespace

extern const AttentionFwdKernels<float> attention_fwd_f32 = {LANES<float>, prepare_query, score, add_bias,
                                                             add_bias,     softmax,       widen, narrow};
extern const AttentionFwdKernels<double> attention_fwd_f64 = {LANES<double>, prepare_query, score, add_bias,
                                                              add_bias,      softmax,       widen, narrow};
extern const AttentionFwdKernels<Half> attention_fwd_f16 = {LANES<float>, prepare_query, score, add_bias,
                                                            add_bias,     softmax,       widen, narrow};
extern const AttentionFwdKernels<BFloat16> attention_fwd_bf16 = {LANES<float>, prepare_query, score, add_bias,
                                                                 add_bias,     softmax,       widen, narrow};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
