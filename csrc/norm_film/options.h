// The options of norm_film, in the schema and in every C++ kernel. Bindings and launchers carry them as one: a new
// option is declared here, in both places, and used where it is computed with.
#pragma once

#include <cstdint>

#include "common/activation.h"

#define FUSEDATTN_NORM_FILM_OPTIONS \
  "int norm, int num_groups, bool training, float eps, int channel_dim, float gamma_offset, int activation"

namespace fusedattn {

// Numbered as NORMS in fusedattn/ops/norm_film.py.
enum class Norm { LAYER, RMS, GROUP, INSTANCE, BATCH };

inline bool is_of_rows(Norm norm) { return norm == Norm::LAYER || norm == Norm::RMS; }

struct NormFilmOptions {
  Norm norm;
  int64_t num_groups;  // of group norm
  bool training;       // statistics are those of the input, else given
  double eps;
  int64_t channel_dim;  // of x, from 0
  double gamma_offset;
  Activation activation;
};

}  // namespace fusedattn
