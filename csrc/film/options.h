// The options of FiLM, in the schema and in every C++ kernel. Bindings and launchers carry them as one: a new
// option is declared here, in both places, and used where it is computed with.
#pragma once

#include <cstdint>

#define FUSEDATTN_FILM_OPTIONS "int channel_dim, float gamma_offset, int activation"

namespace fusedattn {

// Numbered as ACTIVATIONS in fusedattn/ops/film.py.
enum class Activation { NONE, RELU, LEAKY_RELU, SILU, GELU, GELU_TANH, TANH, SIGMOID };

struct FilmOptions {
  int64_t channel_dim;  // of x, from 0
  double gamma_offset;
  Activation activation;
};

}  // namespace fusedattn
