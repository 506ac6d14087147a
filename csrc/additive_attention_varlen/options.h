// The options of packed sequences. Their kernels are additive_attention's (additive_attention/cpu_varlen.h). A
// compiled program need not know how long the longest segments are.
#pragma once

#include "additive_attention/options.h"

#define FUSEDATTN_VARLEN_OPTIONS                                                                              \
  "SymInt max_seqlen_q, SymInt max_seqlen_k, int window_left, int window_right, float scale, float softcap, " \
  "int activation, float negative_slope"

namespace fusedattn {

struct VarlenOptions {
  int64_t max_seqlen_q, max_seqlen_k;
  int64_t window_left, window_right;
  double scale;
  double softcap;
  ScoreActivation activation;
  double negative_slope;

  AttentionOptions of_attention() const {
    return {window_left, window_right, scale, softcap, activation, negative_slope, 0, 0, 0, 0, 0};
  }
};

}  // namespace fusedattn
