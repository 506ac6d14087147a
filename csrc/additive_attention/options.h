// The options of additive attention, in the schema and in every C++ kernel. Bindings and launchers carry them as
// one: a new option is declared here, in both places, and used where it is computed with.
#pragma once

#include <cstdint>

#define FUSEDATTN_ATTENTION_OPTIONS                                                                       \
  "int window_left, int window_right, float scale, float softcap, int activation, float negative_slope, " \
  "float dropout_p, int first_head, int heads, int first_query, int first_key"

namespace fusedattn {

// Of q + k, numbered as SCORE_ACTIVATIONS in fusedattn/_options.py.
enum class ScoreActivation { TANH, SIGMOID, RELU, LEAKY_RELU };

struct AttentionOptions {
  int64_t window_left, window_right;  // of a query's center; -1: unbounded
  double scale;
  double softcap;  // 0: none
  ScoreActivation activation;
  double negative_slope;                              // of LEAKY_RELU
  double dropout_p;                                   // with a seed alone, as what follows
  int64_t first_head, heads, first_query, first_key;  // PhiloxPlace of common/philox.h
};

}  // namespace fusedattn
