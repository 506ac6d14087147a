// The mathematics of additive attention without a tanh, for every C++ kernel of the op.
//
//   Eq = exp(2q), Ek = exp(2k):   tanh(q + k) = 1 - 2r,   r = 1 / t,   t = 1 + Eq Ek
//   sum_d w_d tanh(q_d + k_d) = sum_d w_d - 2 sum_d w_d / t_d
//   w1/t1 + w2/t2 = (w1 t2 + w2 t1) / (t1 t2)          so several channels share one reciprocal
//   1 - tanh^2 = 4 (r - r^2)                             backward
//
// sigmoid(q + k) = 1 - r of half the arguments: Eq = exp(q), Ek = exp(k).
//
// What is linear on either side of zero takes no exponentials: phi(z) = z > 0 ? z : slope z of z = q + k.
//
// V is float, double or a vector of them.
#pragma once

#include "options.h"

#ifndef FUSEDATTN_INLINE
#define FUSEDATTN_INLINE static inline
#endif

namespace fusedattn {

// Largest |q| + |k| for which a product of two or four denominators, each at most 1 + exp(2(|q| + |k|)), and its
// reciprocal stay normal numbers. Weights are divided by their largest magnitude first. Beyond PAIR the
// exponential is taken of the sum, min(q + k, limit): tanh is 1 to rounding at either limit, so no input is
// out of range.
template <typename T>
struct ScoreRange;
template <>
struct ScoreRange<float> {
  static constexpr float PAIR = 21.0f, QUAD = 10.0f;
};
template <>
struct ScoreRange<double> {
  static constexpr double PAIR = 170.0, QUAD = 85.0;
};

// Exponentials of all keys that are made ahead of a call have one bound of |k|. Up to this one they are used, with
// every query within PAIR of it; beyond it each tile of keys has exponentials, and a bound, of its own.
constexpr double KEY_EXP_BOUND = 20;

// Kernels sum w_d s_d over d, of s = r, or s = phi where that is linear on either side of zero:
//
//   score = total sum_d w_d + sum sum_d w_d s_d         dw_d = total sum_ij g_ij + sum sum_ij g_ij s_ijd
//   dq_id = slope w_d sum_j g_ij s'_ijd, with s' = r - r^2 or phi'; and dk_jd likewise
//
// Exponentials are those of twice `argument` q and k.
struct ScoreFactors {
  int total, sum, slope;
  double argument;
};
constexpr bool takes_exponentials(ScoreActivation activation) {
  return activation == ScoreActivation::TANH || activation == ScoreActivation::SIGMOID;
}
constexpr ScoreFactors factors_of(ScoreActivation activation) {
  if (!takes_exponentials(activation)) return {0, 1, 1, 1};
  return activation == ScoreActivation::TANH ? ScoreFactors{1, -2, 4, 1} : ScoreFactors{1, -1, 1, 0.5};
}

template <typename V>
struct Fraction {
  V numerator, denominator;
};

// w1/t1 + w2/t2
template <typename V>
FUSEDATTN_INLINE Fraction<V> sum_of_quotients(V w1, V t1, V w2, V t2) {
  return {w1 * t2 + w2 * t1, t1 * t2};
}

template <typename V>
FUSEDATTN_INLINE Fraction<V> add(Fraction<V> a, Fraction<V> b) {
  return sum_of_quotients(a.numerator, a.denominator, b.numerator, b.denominator);
}

// g (r - r^2) from gr = g r: a quarter of g (1 - tanh^2).
template <typename V>
FUSEDATTN_INLINE V score_gradient(V gr, V r) {
  return gr - gr * r;
}

}  // namespace fusedattn
