// CPU kernels of location_attention, compiled once per instruction set: scores and their gradients from location
// features that lie in the first-level cache. Lanes run over score channels d.
//
// Features differ from query to query, so that exponentials of keys that are made ahead are of no use: per channel
// one exponential of the sum, and half a reciprocal.
#include "additive_attention/cpu_kernel_common.h"
// after the definition of FUSEDATTN_INLINE
#include "location_attention/cpu_kernel.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

template <typename T>
struct Pair {
  Vec<T> phi[2], slope[2];
};

// phi(z) and phi'(z) of two vectors.
template <ScoreActivation activation, typename T>
FUSEDATTN_INLINE Pair<T> activated(Vec<T> z0, Vec<T> z1, const ScoreFactors& by, T negative_slope) {
  Pair<T> out;
  if constexpr (takes_exponentials(activation)) {
    const T argument = static_cast<T>(by.argument), total = by.total, sum = by.sum, slope = by.slope;
    const Vec<T> t0 = denominator_of_sum<T>(argument * z0, Vec<T>{}, ScoreRange<T>::PAIR);
    const Vec<T> t1 = denominator_of_sum<T>(argument * z1, Vec<T>{}, ScoreRange<T>::PAIR);
    const Vec<T> shared = reciprocal(t0 * t1), r0 = t1 * shared, r1 = t0 * shared;
    out.phi[0] = total + sum * r0, out.phi[1] = total + sum * r1;
    out.slope[0] = slope * (r0 - r0 * r0), out.slope[1] = slope * (r1 - r1 * r1);
  } else {
    out.phi[0] = linear<activation, T>(z0, negative_slope), out.phi[1] = linear<activation, T>(z1, negative_slope);
    out.slope[0] = linear_gradient<activation, T>(z0, T(1), negative_slope);
    out.slope[1] = linear_gradient<activation, T>(z1, T(1), negative_slope);
  }
  return out;
}

// body(d, n0, n1, activated) for one key and its features u: n0 channels from d and n1 from d + a vector on.
template <ScoreActivation activation, typename S, typename Body, typename T = Arithmetic<S>>
FUSEDATTN_INLINE void by_pairs(const LocationRows<S>& m, int64_t j, const T* u, const Body& body) {
  constexpr int W = LANES<T>;
  const ScoreFactors by = factors_of(m.options.activation);
  const T negative_slope = static_cast<T>(m.options.negative_slope);
  const S* key = m.key + j * m.key_step;
  const auto z = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
    prefetch(key + d);
    return get(m.query + d, n) + get(key + d, n) + get(u + d, n);
  };
  const auto pair = [&](int64_t d, int64_t n0, int64_t n1) __attribute__((always_inline)) {
    body(d, n0, n1, activated<activation, T>(z(d, n0), z(d + W, n1), by, negative_slope));
  };
  int64_t d = 0;
  for (; d + 2 * W <= m.D; d += 2 * W) pair(d, W, W);
  if (d < m.D) pair(d, lower(W, m.D - d), higher(0, m.D - d - W));
}

template <ScoreActivation activation, typename S, typename T = Arithmetic<S>>
void scores_of(const LocationRows<S>& m, const T* features, T* out) {
  constexpr int W = LANES<T>;
  for (int64_t j = 0; j < m.rows; ++j) {
    Vec<T> sum{};
    const auto add = [&](int64_t d, int64_t n0, int64_t n1, const Pair<T>& pair) __attribute__((always_inline)) {
      sum += get(m.weight + d, n0) * pair.phi[0] + get(m.weight + d + W, n1) * pair.phi[1];
    };
    by_pairs<activation>(m, j, features + j * m.D, add);
    out[j] = horizontal_sum<T>(sum);
  }
}

template <typename S, typename T = Arithmetic<S>>
void scores(const LocationRows<S>& m, const T* features, T* out) {
  constexpr int W = LANES<T>;
  with_activation(m.options.activation, [&](auto constant) { scores_of<constant.activation>(m, features, out); });
  const T scale = static_cast<T>(m.options.scale), softcap = static_cast<T>(m.options.softcap);
  for (int64_t j = 0; j < m.rows; j += W) {
    const int64_t n = lower(W, m.rows - j);
    Vec<T> s = scale * get(out + j, n);
    if (softcap != 0) s = softcap * tanh(s * (1 / softcap));
    put(out + j, s == -INF<T> ? splat(VISIBLE_MINUS_INF<T>) : s, n);
  }
}

template <ScoreActivation activation, typename S, typename T = Arithmetic<S>>
void gradients_of(const LocationRows<S>& m, const T* g, T* features, T* dquery, T* dweight, T* dkey) {
  constexpr int W = LANES<T>;
  for (int64_t j = 0; j < m.rows; ++j) {
    T *const u = features + j * m.D, *const dk = dkey == nullptr ? nullptr : dkey + j * m.D;
    if (g[j] == 0) {
      for (int64_t d = 0; d < m.D; d += W) put(u + d, Vec<T>{}, lower(W, m.D - d));
      continue;
    }
    const auto add = [](T* to, Vec<T> x, int64_t n) { put(to, get(to, n) + x, n); };
    const auto spread = [&](int64_t d, int64_t n, Vec<T> phi, Vec<T> slope) __attribute__((always_inline)) {
      const Vec<T> dz = g[j] * get(m.weight + d, n) * slope;
      put(u + d, dz, n);
      add(dquery + d, dz, n);
      add(dweight + d, g[j] * phi, n);
      if (dk != nullptr) add(dk + d, dz, n);
    };
    by_pairs<activation>(
        m, j, u, [&](int64_t d, int64_t n0, int64_t n1, const Pair<T>& pair) __attribute__((always_inline)) {
          spread(d, n0, pair.phi[0], pair.slope[0]);
          spread(d + W, n1, pair.phi[1], pair.slope[1]);
        });
  }
}

template <typename S, typename T = Arithmetic<S>>
void gradients(const LocationRows<S>& m, const T* g, T* features, T* dquery, T* dweight, T* dkey) {
  with_activation(m.options.activation, [&](auto constant) {
    gradients_of<constant.activation>(m, g, features, dquery, dweight, dkey);
  });
}

template <typename T>
void add_diagonals(int64_t rows, int64_t C, int64_t K, const T* x, T* out, int64_t step) {
  constexpr int W = LANES<T>;
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t c = 0; c < C; ++c) {
      T* const to = out + c * step + j;
      for (int64_t k = 0; k < K; k += W) {
        const int64_t n = lower(W, K - k);
        put(to + k, get(to + k, n) + get(x + (j * C + c) * K + k, n), n);
      }
    }
}

template <typename S, typename T = Arithmetic<S>>
void write_gradient(const GradientRows<S>& to, int64_t at, const T* x, int64_t n) {
  write_row(to, at, x, n);
  if (to.streamed) stream_fence();
}

}  // namespace

extern const LocationKernels<float> location_f32 = {scores, gradients, add_diagonals, write_gradient};
extern const LocationKernels<double> location_f64 = {scores, gradients, add_diagonals, write_gradient};
extern const LocationKernels<Half> location_f16 = {scores, gradients, add_diagonals, write_gradient};
extern const LocationKernels<BFloat16> location_bf16 = {scores, gradients, add_diagonals, write_gradient};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
