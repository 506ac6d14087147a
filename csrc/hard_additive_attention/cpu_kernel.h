// What the CPU launcher (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per level) of
// hard_additive_attention share. Scores and numbers are in the type of the arithmetic, T.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/philox.h"

namespace fusedattn {

template <typename T>
struct Choice {
  int64_t index;  // -1: the row sees no key
  T log_prob, entropy, lse, best;
};

template <typename T>
struct ChoiceGradients {
  T log_prob, entropy, lse;
};

template <typename T>
struct HardAttentionKernels {
  // Of a row of Tk scores; noise is null where the most likely key is to be chosen. A hidden key has score -inf.
  Choice<T> (*choose)(int64_t Tk, const T* scores, const PhiloxRow* noise);
  // Scores, -inf where the mask hides.
  void (*hide)(int64_t Tk, const T* scores, const bool* mask, T* out);
  // The gradients of scores; best of the choice is not read.
  void (*gradients)(int64_t Tk, const T* scores, const Choice<T>&, const ChoiceGradients<T>&, T* dscores);
};

FUSEDATTN_DECLARE_TABLE(HardAttentionKernels<float>, hard_attention_f32)
FUSEDATTN_DECLARE_TABLE(HardAttentionKernels<double>, hard_attention_f64)

}  // namespace fusedattn
