// The options of the scores alone, in the schema and in C++: those of attention (additive_attention/options.h)
// that a score has.
#pragma once

#include "additive_attention/options.h"

#define FUSEDATTN_SCORES_OPTIONS "float scale, float softcap, int activation, float negative_slope"

namespace fusedattn {

struct ScoresOptions {
  double scale;
  double softcap;  // 0: none
  ScoreActivation activation;
  double negative_slope;  // of LEAKY_RELU
};

}  // namespace fusedattn
