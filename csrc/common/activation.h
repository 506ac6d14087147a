// Which activation an op with gamma and beta applies.
#pragma once

namespace fusedattn {

// Numbered as ACTIVATIONS in fusedattn/_conditioning.py.
enum class Activation { NONE, RELU, LEAKY_RELU, SILU, GELU, GELU_TANH, TANH, SIGMOID };

}  // namespace fusedattn
