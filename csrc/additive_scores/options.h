// The options of the scores alone, in the schema and in C++: those of attention (additive_attention/options.h)
// that a score has.
#pragma once

#define FUSEDATTN_SCORES_OPTIONS "float scale, float softcap"

namespace fusedattn {

struct ScoresOptions {
  double scale;
  double softcap;  // 0: none
};

}  // namespace fusedattn
