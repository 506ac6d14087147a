// Backward: gradients of scores, queries, keys and weight, compiled once per instruction set.
//
// Per pair: two keys share a reciprocal; a lane owns a channel, so grad_query, grad_key and grad_weight accumulate
// without any reduction between lanes. 8 multiply-type operations per tanh, of which the additions run on their
// own ports where the CPU has them. Activations that are linear on either side of zero take a comparison, a choice
// of g, three additions, a maximum and a multiply-add.
#include "cpu_kernel_common.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

// g_ij = p_ij (a_ij - sum_j p_ij a_ij + dL_i), through the cap (1 - (s / C)^2) and the scale.
template <typename S, typename T = Arithmetic<S>>
T grad_scores(const AttentionProblem<S>& p, KeyRange keys, KeyRange columns, const T* scores, const T* capped,
              T lse, T grad_lse, T* prob, T* g, T* grad_bias) {
  constexpr int W = LANES<T>;
  for (int64_t j = columns.first; j < keys.first; ++j) prob[j] = g[j] = 0;
  for (int64_t j = keys.end; j < columns.end; ++j) prob[j] = g[j] = 0;
  if (lse - lse != 0) {  // no key is visible, or softmax is NaN
    T sum = 0;
    for (int64_t j = keys.first; j < keys.end; ++j)
      sum += prob[j] = g[j] = scores[j] == -INF<T> ? 0 : NOT_A_NUMBER<T>;
    for (int64_t j = keys.first; j < keys.end && grad_bias != nullptr; ++j) grad_bias[j] = g[j];
    return sum;
  }
  Vec<T> lanes{};
  for (int64_t j = keys.first; j < keys.end; j += W) {
    const int64_t left = keys.end - j;
    const Vec<T> x = (left >= W ? load(scores + j) : load_partial(scores + j, left)) - lse;
    const Vec<T> e = exp_or_zero<T>(x);
    if (left >= W) {
      store(prob + j, e);
      lanes += e * load(g + j);
    } else {
      store_partial(prob + j, e, left);
      lanes += load_partial(prob + j, left) * load_partial(g + j, left);
    }
  }
  const T shift = grad_lse - horizontal_sum<T>(lanes);
  const T scale = static_cast<T>(p.options.scale), softcap = static_cast<T>(p.options.softcap);
  const T inverse_cap = softcap != 0 ? 1 / softcap : 0;
  for (int64_t j = keys.first; j < keys.end && grad_bias != nullptr; ++j) grad_bias[j] = prob[j] * (g[j] + shift);
  double sum = 0;
  for (int64_t first = keys.first; first < keys.end; first += 1024) {
    T part = 0;
    for (int64_t j = first; j < lower(keys.end, first + 1024); ++j) {
      T slope = scale;
      if (softcap != 0) {
        const T part_of_cap = capped[j] * inverse_cap;
        slope = prob[j] == 0 ? 0 : slope * (1 - part_of_cap * part_of_cap);  // a masked score is -inf
      }
      g[j] = prob[j] * (g[j] + shift) * slope;
      part += g[j];
    }
    sum += part;
  }
  return static_cast<T>(sum);
}

// Whether q and k hold exponentials, or themselves: for the exponential of their sum, or for no exponential.
enum class Form { PRODUCT, SUM, RELU, LEAKY_RELU };

template <Form form_>
struct FormConstant {
  static constexpr Form form = form_;
};
constexpr bool is_linear(Form form) { return form == Form::RELU || form == Form::LEAKY_RELU; }
constexpr Form linear_form(ScoreActivation activation) {
  return activation == ScoreActivation::RELU ? Form::RELU : Form::LEAKY_RELU;
}

// For KEYS keys and one query, one vector of channels: adds g (r - r^2) to the gradients of q and k and g r to
// that of w; in the linear forms g phi' and g phi.
template <Form form, int KEYS, typename T>
FUSEDATTN_INLINE void backward_pairs(Vec<T> q, const Vec<T>* k, const T* g, T negative_slope, Vec<T>& dq,
                                     Vec<T>* dk, Vec<T>& dw) {
  const auto denominator = [](Vec<T> qd, Vec<T> kd) {
    if constexpr (form == Form::SUM)
      return denominator_of_sum<T>(qd, kd, ScoreRange<T>::PAIR);
    else
      return qd * kd + 1;
  };
  if constexpr (is_linear(form)) {
    constexpr ScoreActivation activation =
        form == Form::RELU ? ScoreActivation::RELU : ScoreActivation::LEAKY_RELU;
    Vec<T> sum{};
    for (int j = 0; j < KEYS; ++j) {
      const Vec<T> z = q + k[j], h = linear_gradient<activation, T>(z, g[j], negative_slope);
      dq += h;
      dk[j] += h;
      sum += g[j] * linear<activation, T>(z, negative_slope);
    }
    dw += sum;
  } else if constexpr (KEYS == 1) {
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
template <Form form, int KEYS, typename T>
FUSEDATTN_INLINE void backward_column(const T* q, const Vec<T>* k, const T* g, T negative_slope, int64_t Tk,
                                      int64_t first, int64_t last, T* dq, Vec<T>* dk, Vec<T>& dw) {
  constexpr int W = LANES<T>;
  for (int64_t i = first; i < last; ++i) {
    Vec<T> dqd = load(dq + i * W);
    backward_pairs<form, KEYS, T>(load(q + i * W), k, g + i * Tk, negative_slope, dqd, dk, dw);
    store(dq + i * W, dqd);
  }
}

// What walking whole rows of keys against the queries of a chunk works on, besides the keys.
template <typename T>
struct Rowwise {
  T limit;  // of |k|, for the product of exponentials
  T negative_slope;
  T slope;  // of ScoreFactors
  const T* g;
  // (vector of channels, query): what a column of pairs needs is in one piece, and in many sets of the cache.
  T *q, *dq;
  T *dw, *raw_query;
  T *zeros, *dk;  // D_padded: keys that no query sees; ROWWISE_KEYS rows of D_padded: gradients yet to be rounded
};

// Keys that no query of the chunk sees: n elements of each from `from` on, whose gradients are zero.
template <typename S, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void write_unseen(const GradientRows<S>& grad_key, int64_t D, KeyRange keys, int64_t from,
                                   int64_t n) {
  if (grad_key.rows == nullptr || stays(grad_key)) return;
  constexpr int W = LANES<T>;
  for (int64_t j = keys.first; j < keys.end; ++j)
    for (int64_t d = 0; d < n; d += W) write(grad_key, j * D + from + d, Vec<T>{}, lower(W, n - d));
}

// Those of `keys` that are in the windows of the chunk's queries, in whole steps of BACKWARD_KEYS; of the others
// the gradients are written, n elements from `from` on.
template <typename S>
FUSEDATTN_INLINE KeyRange keys_in_windows(const AttentionProblem<S>& p, const Chunk& chunk, const Place& at,
                                          KeyRange keys, const GradientRows<S>& grad_key, int64_t from,
                                          int64_t n) {
  const KeyRange all = p.keys_of(at.b, at.h, chunk.first_query, chunk.first_query + chunk.queries);
  const int64_t first = lower(keys.end, higher(keys.first, all.first));
  const int64_t steps = (higher(0, all.end - first) + BACKWARD_KEYS - 1) / BACKWARD_KEYS;
  const int64_t end = lower(keys.end, first + steps * BACKWARD_KEYS);
  write_unseen(grad_key, p.D, {keys.first, first}, from, n);
  write_unseen(grad_key, p.D, {end, keys.end}, from, n);
  return {first, end};
}

// exp(2 argument k) of KEYS vectors; argument is 1, or that of sigmoid.
template <int KEYS, typename T>
FUSEDATTN_INLINE void take_exponentials(T argument, Vec<T>* k) {
  if (argument == 1)
    for (int c = 0; c < KEYS; ++c) k[c] = exp_unclamped<2, true>(k[c]);
  else
    for (int c = 0; c < KEYS; ++c) k[c] = exp_unclamped<1, true>(k[c]);
}

// KEYS whole rows of keys from j: reads keys and writes their gradients once, in the order of memory, which is
// what few queries are bound by. The form says what these rows hold; keys themselves become exponentials where
// they are in range.
template <int KEYS, Form form, typename S, typename K, typename T = Arithmetic<S>>
void backward_key_rows(const AttentionProblem<S>& p, const Chunk& chunk, const Place& at, const Rowwise<T> m,
                       Rows<K> keys, int64_t j, const GradientRows<S> grad_key) {
  static_assert(KEYS <= ROWWISE_KEYS);
  constexpr int W = LANES<T>;
  const FewRuns runs = few_runs(p, chunk, at, {j, j + KEYS});
  if (runs.count == 0) return write_unseen(grad_key, p.D, {j, j + KEYS}, 0, p.D);
  const T* w = p.weight + at.h * p.D_padded;
  const bool* seen = p.seen_keys(at.b, at.h);
  const K *key = keys.from(j).data, *row[KEYS];
  for (int c = 0; c < KEYS; ++c)
    row[c] = seen == nullptr || seen[j + c] ? key + c * keys.stride : reinterpret_cast<const K*>(m.zeros);
  for (int64_t d = 0; d < p.D; d += W) {
    const int64_t n = lower(W, p.D - d), column = d * chunk.queries;
    Vec<T> k[KEYS], sum[KEYS] = {}, bound{}, dwd{};
    for (int c = 0; c < KEYS; ++c) {
      prefetch(key + c * keys.stride + d, KEYS * keys.stride * static_cast<int64_t>(sizeof(K)));
      k[c] = get(row[c] + d, n);
      bound = max_abs(k[c], bound);
    }
    const auto walk = [&](auto constant, const T* q) {
      for (int n = 0; n < runs.count; ++n)
        backward_column<constant.form, KEYS>(q, k, m.g + j, m.negative_slope, p.Tk, runs.run[n].first,
                                             runs.run[n].last, m.dq + column, sum, dwd);
    };
    if (form == Form::SUM && any(bound > m.limit)) {
      for (int c = 0; c < KEYS; ++c) k[c] *= p.argument;
      for (int64_t i = 0; i < chunk.queries; ++i)
        store(m.raw_query + i * W, p.argument * get(p.query.row(at.b, at.h, chunk.first_query + i) + d, n));
      walk(FormConstant<Form::SUM>{}, m.raw_query);
    } else {
      if constexpr (form == Form::SUM) take_exponentials<KEYS>(p.argument, k);
      walk(FormConstant<form == Form::SUM ? Form::PRODUCT : form>{}, m.q + column);
    }
    store(m.dw + d, load(m.dw + d) + dwd);
    if (grad_key.rows == nullptr) continue;
    const Vec<T> factor = m.slope * load(w + d);
    for (int c = 0; c < KEYS; ++c)
      if constexpr (IS_NARROW<S>)
        store(m.dk + c * p.D_padded + d, factor * sum[c]);
      else
        write(grad_key, (j + c) * p.D + d, factor * sum[c], n);
  }
  if (grad_key.rows == nullptr) return;
  for (int c = 0; c < KEYS && IS_NARROW<S>; ++c) write_row(grad_key, (j + c) * p.D, m.dk + c * p.D_padded, p.D);
}

template <Form form, typename S, typename K, typename T = Arithmetic<S>>
void backward_key_walk(const AttentionProblem<S>& p, const Chunk& chunk, const Place& at, const Rowwise<T>& m,
                       Rows<K> keys, int64_t j, int64_t last_key, const GradientRows<S>& grad_key) {
  // More keys at a time spare queries some of the reading, but are in each other's way in the first-level cache.
  for (; chunk.queries > 1 && j + BACKWARD_KEYS <= last_key; j += BACKWARD_KEYS)
    backward_key_rows<BACKWARD_KEYS, form>(p, chunk, at, m, keys, j, grad_key);
  for (; j + 4 <= last_key; j += 4) backward_key_rows<4, form>(p, chunk, at, m, keys, j, grad_key);
  for (; j < last_key; ++j) backward_key_rows<1, form>(p, chunk, at, m, keys, j, grad_key);
}

template <typename S, typename T = Arithmetic<S>>
void backward_rows(const AttentionProblem<S>& p, const Chunk& chunk, int64_t head, int64_t first_key,
                   int64_t last_key, const T* g, T* grad_query, const GradientRows<S>& grad_key, T* grad_weight,
                   T* scratch) {
  constexpr int W = LANES<T>;
  const Place at = place_of(p, chunk, head);
  const int64_t Tq = chunk.queries;
  Rowwise<T> m;
  m.q = scratch, m.dq = m.q + Tq * p.D_padded, m.raw_query = m.dq + Tq * p.D_padded;
  m.zeros = m.raw_query + Tq * W, m.dk = m.zeros + p.D_padded;
  m.g = g + head * Tq * p.Tk, m.dw = grad_weight;
  for (int64_t d = 0; d < p.D_padded; d += W) store(m.zeros + d, Vec<T>{});
  T query_bound = 0;
  for (int64_t i = 0; i < Tq; ++i) {
    const int64_t row = head * Tq + i;
    query_bound = p.query_bound[row] > query_bound ? p.query_bound[row] : query_bound;
    for (int64_t d = 0; d < p.D_padded; d += W) {
      store(m.q + d * Tq + i * W, load(p.query_exp + row * p.D_padded + d));
      store(m.dq + d * Tq + i * W, Vec<T>{});
    }
  }
  m.limit = (ScoreRange<T>::PAIR - query_bound) / p.argument;
  m.negative_slope = static_cast<T>(p.options.negative_slope);
  m.slope = factors_of(p.options.activation).slope;
  const Rows<S> keys{p.key.row(at.b, at.h, 0), p.key.stride_t};
  const KeyRange range = keys_in_windows(p, chunk, at, {first_key, last_key}, grad_key, 0, p.D);
  first_key = range.first, last_key = range.end;
  with_activation(p.options.activation, [&](auto constant) {
    if constexpr (!takes_exponentials(constant.activation)) {
      backward_key_walk<linear_form(constant.activation)>(p, chunk, at, m, keys, first_key, last_key, grad_key);
    } else if (p.key_exp != nullptr && p.key_bound <= m.limit) {
      const Rows<T> exponentials{p.key_exp + at.n * p.Tk * p.D, p.D};
      backward_key_walk<Form::PRODUCT>(p, chunk, at, m, exponentials, first_key, last_key, grad_key);
    } else {
      backward_key_walk<Form::SUM>(p, chunk, at, m, keys, first_key, last_key, grad_key);
    }
  });
  stream_fence();
  for (int64_t i = 0; i < Tq; ++i)
    for (int64_t d = 0; d < p.D_padded; d += W)
      store(grad_query + i * p.D_padded + d, load(m.dq + d * Tq + i * W));
}

// One vector of channels of the queries of a chunk and of `keys` keys from first_key on; the gradients of the keys
// take their place.
template <typename T>
struct Strip {
  int64_t first_key, keys, Tk;
  T negative_slope;
  const T *g, *q;
  T *dq, *k;
  Vec<T> factor, dw;  // of dk: slope of ScoreFactors times w
};

// runs(first key, last key, body): see for_each_run.
template <Form form, int KEYS, typename T, typename Runs>
FUSEDATTN_INLINE void backward_strip_keys(Strip<T>& s, int64_t j, const Runs& runs) {
  constexpr int W = LANES<T>;
  Vec<T> kd[KEYS], sum[KEYS] = {}, dwd{};
  for (int c = 0; c < KEYS; ++c) kd[c] = load(s.k + (j + c) * W);
  runs(s.first_key + j, s.first_key + j + KEYS, [&](int64_t first, int64_t last) {
    backward_column<form, KEYS>(s.q, kd, s.g + j, s.negative_slope, s.Tk, first, last, s.dq, sum, dwd);
  });
  s.dw += dwd;  // block by block: a long sum in one register would lose bits
  for (int c = 0; c < KEYS; ++c) store(s.k + (j + c) * W, s.factor * sum[c]);
}

template <Form form, typename T, typename Runs>
__attribute__((noinline)) void backward_strip_loop(Strip<T>& s, const Runs& runs) {
  int64_t j = 0;
  for (; j + BACKWARD_KEYS <= s.keys; j += BACKWARD_KEYS) backward_strip_keys<form, BACKWARD_KEYS>(s, j, runs);
  for (; j < s.keys; ++j) backward_strip_keys<form, 1>(s, j, runs);
}

template <typename S, typename T = Arithmetic<S>>
void backward_strip(const AttentionProblem<S>& p, const Chunk& chunk, int64_t head, int64_t d, int64_t first_key,
                    int64_t last_key, const T* g, T* grad_query, const GradientRows<S>& grad_key, T* grad_weight,
                    T* scratch) {
  constexpr int W = LANES<T>;
  const Place at = place_of(p, chunk, head);
  const int64_t n = lower(W, p.D - d);
  const KeyRange range = keys_in_windows(p, chunk, at, {first_key, last_key}, grad_key, d, n);
  first_key = range.first;
  const int64_t keys = range.end - first_key;
  T* q = scratch;
  T* dq = q + chunk.queries * W;
  T* k = dq + chunk.queries * W;

  const T argument = p.argument;
  Vec<T> bound{}, key_bound{};
  for (int64_t i = 0; i < chunk.queries; ++i) {
    const Vec<T> v = argument * get(p.query.row(at.b, at.h, chunk.first_query + i) + d, n);
    bound = max_abs(v, bound);
    store(q + i * W, v);
    store(dq + i * W, Vec<T>{});
  }
  const bool* seen = p.seen_keys(at.b, at.h);
  for (int64_t j = 0; j < keys; ++j) {
    const S* x = p.key.row(at.b, at.h, first_key + j) + d;
    const Vec<T> v = seen == nullptr || seen[first_key + j] ? argument * get(x, n) : Vec<T>{};
    __builtin_prefetch(x + W);  // the next strip's; rows lie too far apart for the hardware to see it
    key_bound = max_abs(v, key_bound);
    store(k + j * W, v);
  }
  const bool takes_any = takes_exponentials(p.options.activation);
  const bool in_range = horizontal_max<T>(bound) + horizontal_max<T>(key_bound) <= ScoreRange<T>::PAIR;
  if (takes_any && in_range) {
    for (int64_t i = 0; i < chunk.queries; ++i) store(q + i * W, exp_unclamped<2, true>(load(q + i * W)));
    for (int64_t j = 0; j < keys; ++j) store(k + j * W, exp_unclamped<2, true>(load(k + j * W)));
  }

  Strip<T> strip{first_key,
                 keys,
                 p.Tk,
                 static_cast<T>(p.options.negative_slope),
                 g + head * chunk.queries * p.Tk + first_key,
                 q,
                 dq,
                 k,
                 T(factors_of(p.options.activation).slope) * load(p.weight + at.h * p.D_padded + d),
                 load(grad_weight + d)};
  const auto runs = [&](int64_t first, int64_t last, const auto& body) {
    for_each_run(p, chunk, at, {first, last}, body);
  };
  with_activation(p.options.activation, [&](auto constant) {
    if constexpr (!takes_exponentials(constant.activation))
      backward_strip_loop<linear_form(constant.activation)>(strip, runs);
    else if (in_range)
      backward_strip_loop<Form::PRODUCT>(strip, runs);
    else
      backward_strip_loop<Form::SUM>(strip, runs);
  });
  store(grad_weight + d, strip.dw);
  for (int64_t j = 0; j < keys && grad_key.rows != nullptr; ++j)
    write(grad_key, (first_key + j) * p.D + d, load(k + j * W), n);
  for (int64_t i = 0; i < chunk.queries; ++i) store(grad_query + i * p.D_padded + d, load(dq + i * W));
}

}  // namespace

extern const AttentionBwdKernels<float> attention_bwd_f32 = {grad_scores, backward_rows, backward_strip};
extern const AttentionBwdKernels<double> attention_bwd_f64 = {grad_scores, backward_rows, backward_strip};
extern const AttentionBwdKernels<Half> attention_bwd_f16 = {grad_scores, backward_rows, backward_strip};
extern const AttentionBwdKernels<BFloat16> attention_bwd_bf16 = {grad_scores, backward_rows, backward_strip};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
