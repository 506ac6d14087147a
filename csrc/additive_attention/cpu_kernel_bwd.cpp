// Backward: gradients of scores, queries, keys and weight, compiled once per instruction set.
//
// Per pair: two keys share a reciprocal; a lane owns a channel, so grad_query, grad_key and grad_weight accumulate
// without any reduction between lanes. 8 multiply-type operations per tanh, of which the additions run on their
// own ports where the CPU has them.
#include "cpu_kernel_common.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

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
    const Vec<T> e = exp_or_zero<T>(x);
    if (j < whole) {
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
  double sum = 0;
  for (int64_t first = 0; first < p.Tk; first += 1024) {
    T part = 0;
    for (int64_t j = first; j < lower(p.Tk, first + 1024); ++j) {
      T slope = scale;
      if (softcap != 0) {
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
// `zeros` stands for keys that no query sees.
template <int KEYS, typename T>
void backward_key_rows(const AttentionProblem<T>& p, const Chunk& chunk, const Place& at, int64_t j, T limit,
                       const T* q, const T* g, T* dq, T* grad_key, T* dw, T* raw_query, const T* zeros) {
  constexpr int W = LANES<T>;
  const Output output = chunk.first_query > 0 ? Output::ADDED : p.key_output;
  const bool exponentials = p.key_exp != nullptr && p.key_bound <= limit;
  const T* key = exponentials ? p.key_exp + (at.n * p.Tk + j) * p.D : p.key.row(at.b, at.h, j);
  const int64_t key_row = exponentials ? p.D : p.key.stride_t;
  const T* w = p.weight + at.h * p.D_padded;
  T* dk = grad_key == nullptr ? nullptr : grad_key + (at.n * p.Tk + j) * p.D;
  const bool* seen = p.seen_keys(at.b, at.h);
  const T* row[KEYS];
  for (int c = 0; c < KEYS; ++c) row[c] = seen == nullptr || seen[j + c] ? key + c * key_row : zeros;
  for (int64_t d = 0; d < p.D; d += W) {
    const int64_t n = lower(W, p.D - d);
    Vec<T> k[KEYS], sum[KEYS] = {}, bound{}, dwd{};
    for (int c = 0; c < KEYS; ++c) {
      const T* x = row[c] + d;
      prefetch(key + c * key_row + d, KEYS * key_row * static_cast<int64_t>(sizeof(T)));
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
    if (dk == nullptr) continue;
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
  T *q = scratch, *dq = q + Tq * p.D_padded, *raw_query = dq + Tq * p.D_padded, *zeros = raw_query + Tq * W;
  for (int64_t d = 0; d < p.D_padded; d += W) store(zeros + d, Vec<T>{});
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
    backward_key_rows<BACKWARD_KEYS>(p, chunk, at, j, limit, q, g, dq, grad_key, grad_weight, raw_query, zeros);
  for (; j + 2 <= last_key; j += 2)
    backward_key_rows<2>(p, chunk, at, j, limit, q, g, dq, grad_key, grad_weight, raw_query, zeros);
  for (; j < last_key; ++j)
    backward_key_rows<1>(p, chunk, at, j, limit, q, g, dq, grad_key, grad_weight, raw_query, zeros);
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
  if (dk == nullptr) return;
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
  const bool* seen = p.seen_keys(at.b, at.h);
  for (int64_t j = 0; j < keys; ++j) {
    const T* x = p.key.row(at.b, at.h, first_key + j) + d;
    Vec<T> v{};
    if (seen == nullptr || seen[first_key + j]) v = n == W ? load(x) : load_partial(x, n);
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
  T* dk = grad_key == nullptr ? nullptr : grad_key + (at.n * p.Tk + first_key) * p.D + d;
  const Vec<T> w4 = 4 * load(p.weight + at.h * p.D_padded + d);
  const int64_t diagonal = p.options.is_causal ? first_key - chunk.first_query : -p.Tk;
  Vec<T> dw = load(grad_weight + d);
  if (sum_form)
    backward_strip_loop<true>(p, chunk, diagonal, keys, q, k, g, dq, dk, n, w4, dw);
  else
    backward_strip_loop<false>(p, chunk, diagonal, keys, q, k, g, dq, dk, n, w4, dw);
  store(grad_weight + d, dw);
  for (int64_t i = 0; i < chunk.queries; ++i) store(grad_query + i * p.D_padded + d, load(dq + i * W));
}

}  // namespace

extern const AttentionBwdKernels<float> attention_bwd_f32 = {grad_scores, backward_rows, backward_strip};
extern const AttentionBwdKernels<double> attention_bwd_f64 = {grad_scores, backward_rows, backward_strip};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
