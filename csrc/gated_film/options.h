// The options of gated_film, as csrc/film/options.h has those of film.
#pragma once

#include <cstdint>

#define FUSEDATTN_GATED_FILM_OPTIONS "int channel_dim"

namespace fusedattn {

struct GatedFilmOptions {
  int64_t channel_dim;  // of x, from 0
};

}  // namespace fusedattn
