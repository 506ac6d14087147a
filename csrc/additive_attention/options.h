// The options of additive attention, in the schema and in every C++ kernel. Bindings and launchers carry them as
// one: a new option is declared here, in both places, and used where it is computed with.
#pragma once

#define FUSEDATTN_ATTENTION_OPTIONS \
  "bool is_causal, float scale, float softcap, int activation, float negative_slope"

namespace fusedattn {

// Of q + k, numbered as SCORE_ACTIVATIONS in fusedattn/_options.py.
enum class ScoreActivation { TANH, SIGMOID, RELU, LEAKY_RELU };

struct AttentionOptions {
  bool is_causal;
  double scale;
  double softcap;  // 0: none
  ScoreActivation activation;
  double negative_slope;  // of LEAKY_RELU
};

}  // namespace fusedattn
