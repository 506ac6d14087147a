// The options of FiLM, in the schema and in every C++ kernel. Bindings and launchers carry them as one: a new
// option is declared here, in both places, and used where it is computed with.
#pragma once

#include <cstdint>

#include "common/activation.h"

#define FUSEDATTN_FILM_OPTIONS "int channel_dim, float gamma_offset, int activation"

namespace fusedattn {

struct FilmOptions {
  int64_t channel_dim;  // of x, from 0
  double gamma_offset;
  Activation activation;
};

}  // namespace fusedattn
