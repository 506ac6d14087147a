// The activations of conditioning ops and their slopes, for every C++ kernel.
//
// M is the kernel's arithmetic: M::V is a number or a vector of numbers of type M::T, and M has exp (of its
// argument clamped to where the result and its reciprocal are normal numbers), reciprocal, tanh and half_erfc.
#pragma once

#include "activation.h"

#ifndef FUSEDATTN_INLINE
#define FUSEDATTN_INLINE static inline
#endif

namespace fusedattn {

constexpr double LEAKY_SLOPE = 0.01;
constexpr double SQRT_HALF = 0.70710678118654752440;
constexpr double INV_SQRT_2PI = 0.39894228040143267794;
constexpr double GELU_TANH_SCALE = 0.79788456080286535588;  // sqrt(2 / pi)
constexpr double GELU_TANH_CUBIC = 0.044715;

// Beyond it M::exp stays where it is. What decays is zero there: huge numbers times it are zero, infinities NaN,
// as in PyTorch.
template <typename M>
constexpr typename M::T LARGEST_EXPONENT = sizeof(typename M::T) == 4 ? 87 : 708;

// s = 1 / (1 + exp(-z)), and 1 - s without cancellation.
template <typename V>
struct Logistic {
  V s, complement;
};
template <typename M, typename V = typename M::V>
FUSEDATTN_INLINE Logistic<V> logistic(V z) {
  const V e = M::exp(-z);
  const V s = M::reciprocal(1 + e);
  return {z < -LARGEST_EXPONENT<M> ? V{} : s, z > LARGEST_EXPONENT<M> ? V{} : e * s};
}

// The distribution function of the standard normal. half_erfc(z) = erfc(z) / 2 for z >= 0.
template <typename M, typename V = typename M::V>
FUSEDATTN_INLINE V normal_cdf(V z) {
  const V tail = M::half_erfc((z < 0 ? -z : z) * typename M::T(SQRT_HALF));
  return z < 0 ? tail : 1 - tail;
}

template <typename M, typename V = typename M::V>
FUSEDATTN_INLINE V gelu_tanh_argument(V z) {
  using T = typename M::T;
  return T(2 * GELU_TANH_SCALE) * z * (1 + T(GELU_TANH_CUBIC) * z * z);
}

template <Activation activation, typename M, typename V = typename M::V>
FUSEDATTN_INLINE V activate(V z) {
  using T = typename M::T;
  if constexpr (activation == Activation::RELU) return z < 0 ? V{} : z;
  if constexpr (activation == Activation::LEAKY_RELU) return z > 0 ? z : z * T(LEAKY_SLOPE);
  if constexpr (activation == Activation::SILU) return z * logistic<M>(z).s;
  if constexpr (activation == Activation::GELU) return z * normal_cdf<M>(z);
  if constexpr (activation == Activation::GELU_TANH) return z * logistic<M>(gelu_tanh_argument<M>(z)).s;
  if constexpr (activation == Activation::TANH) return M::tanh(z);
  if constexpr (activation == Activation::SIGMOID) return logistic<M>(z).s;
  return z;
}

// exp(-z^2 / 2)
template <typename M, typename V = typename M::V>
FUSEDATTN_INLINE V bell(V z) {
  const V exponent = typename M::T(-0.5) * z * z;
  return exponent < -LARGEST_EXPONENT<M> ? V{} : M::exp(exponent);
}

// activation'(z)
template <Activation activation, typename M, typename V = typename M::V>
FUSEDATTN_INLINE V slope(V z) {
  using T = typename M::T;
  const V one = V{} + T(1);
  if constexpr (activation == Activation::RELU) return z <= 0 ? V{} : one;
  if constexpr (activation == Activation::LEAKY_RELU) return z > 0 ? one : V{} + T(LEAKY_SLOPE);
  if constexpr (activation == Activation::SILU) {
    const Logistic<V> p = logistic<M>(z);
    return p.s * (1 + z * p.complement);
  }
  if constexpr (activation == Activation::GELU) return normal_cdf<M>(z) + z * (T(INV_SQRT_2PI) * bell<M>(z));
  if constexpr (activation == Activation::GELU_TANH) {
    const Logistic<V> p = logistic<M>(gelu_tanh_argument<M>(z));
    const V decay = p.s * p.complement;
    const V growth = T(2 * GELU_TANH_SCALE) * (1 + T(3 * GELU_TANH_CUBIC) * z * z);  // overflows before z does
    return p.s + z * (decay == 0 ? V{} : decay * growth);
  }
  if constexpr (activation == Activation::TANH) {
    const V t = M::tanh(z);
    return 1 - t * t;
  }
  if constexpr (activation == Activation::SIGMOID) {
    const Logistic<V> p = logistic<M>(z);
    return p.s * p.complement;
  }
  return one;
}

// body(ActivationConstant<...>{}) of an activation known only at run time.
template <Activation activation>
struct ActivationConstant {
  static constexpr Activation value = activation;
};
template <typename Body>
FUSEDATTN_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::NONE:
      break;
    case Activation::RELU:
      return body(ActivationConstant<Activation::RELU>{});
    case Activation::LEAKY_RELU:
      return body(ActivationConstant<Activation::LEAKY_RELU>{});
    case Activation::SILU:
      return body(ActivationConstant<Activation::SILU>{});
    case Activation::GELU:
      return body(ActivationConstant<Activation::GELU>{});
    case Activation::GELU_TANH:
      return body(ActivationConstant<Activation::GELU_TANH>{});
    case Activation::TANH:
      return body(ActivationConstant<Activation::TANH>{});
    case Activation::SIGMOID:
      return body(ActivationConstant<Activation::SIGMOID>{});
  }
  body(ActivationConstant<Activation::NONE>{});
}

}  // namespace fusedattn
