// The mathematics of FiLM, for every C++ kernel of the op: y = activation(z) + residual, z = scale x + shift,
// with scale = gamma + gamma_offset and shift = beta per channel.
#pragma once

#ifndef FUSEDATTN_INLINE
#define FUSEDATTN_INLINE static inline
#endif

namespace fusedattn {

// Numbered as ACTIVATIONS in fusedattn/ops/film.py.
enum class Activation { NONE, RELU, LEAKY_RELU, SILU, GELU, GELU_TANH, TANH, SIGMOID };

constexpr double LEAKY_SLOPE = 0.01;
constexpr double SQRT_HALF = 0.70710678118654752440;
constexpr double INV_SQRT_2PI = 0.39894228040143267794;
constexpr double GELU_TANH_SCALE = 0.79788456080286535588;  // sqrt(2 / pi)
constexpr double GELU_TANH_CUBIC = 0.044715;

}  // namespace fusedattn
