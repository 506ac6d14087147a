// The options of additive attention, in the schema and in every C++ kernel. Bindings and launchers carry them as
// one: a new option is declared here, in both places, and used where it is computed with.
#pragma once

#define FUSEDATTN_ATTENTION_OPTIONS "bool is_causal, float scale, float softcap"

namespace fusedattn {

struct AttentionOptions {
  bool is_causal;
  double scale;
  double softcap;  // 0: none
};

}  // namespace fusedattn
