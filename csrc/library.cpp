// Every operator schema of the library, and nothing else. Kernels register themselves in their own files.
// output_mask of a backward operator: bit n asks for its n-th result, which else has shape (0,).
#include <torch/csrc/stable/library.h>

#include "additive_attention/options.h"
#include "additive_attention_varlen/options.h"
#include "additive_scores/options.h"
#include "common/philox.h"
#include "film/options.h"
#include "gated_film/options.h"
#include "norm_film/options.h"

STABLE_TORCH_LIBRARY(fusedattn, m) {
  m.def("cpu_capability() -> str");
  m.def("empty_cache() -> ()");
  m.def("cuda_error(int device) -> str");

  // Random words less 2^31, int32, of the shape of like: (B,H,Tq,Tk) or (B,Tq,Tk). seed (S,), S dividing H: see
  // common/philox.h.
  m.def("philox_words(Tensor seed, Tensor like, " FUSEDATTN_PHILOX_PLACE ") -> Tensor");

  // query (B,H,Tq,D), key (B,H,Tk,D), value (B,H,Tk,Dv), weight (H,D), bias (B,H,Tq,Tk), any size of which may be
  // 1, or None, mask (B,H,Tq,Tk) or None, or all without H, key_lengths (B,) or None, window_center (B,H,Tq) or
  // None for i, key_exp = exp(2 key) or None, with key_bound = max|key| of one element in its dtype. dropout_seed
  // (S,), S dividing H, or None: see common/philox.h.
  // weights and scores are (0,) unless asked for; what scores hold at keys outside of a window is left to chance.
  // allow_tf32: GPUs may round the factors of weights x value to TF32.
  m.def(
      "additive_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? mask, "
      "Tensor? key_lengths, Tensor? window_center, Tensor? key_exp, Tensor? key_bound, "
      "Tensor? dropout_seed, " FUSEDATTN_ATTENTION_OPTIONS
      ", bool return_weights, bool keep_scores, bool allow_tf32=False) "
      "-> (Tensor context, Tensor lse, Tensor weights, Tensor scores)");
  m.def(
      "additive_attention_bwd(Tensor? grad_context, Tensor? grad_lse, Tensor? grad_weights, Tensor query, "
      "Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? mask, Tensor? key_lengths, "
      "Tensor? window_center, Tensor? key_exp, Tensor? key_bound, "
      "Tensor? dropout_seed, " FUSEDATTN_ATTENTION_OPTIONS
      ", Tensor context, Tensor lse, Tensor scores, int output_mask) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight, Tensor grad_bias)");

  // As above with B = 1: the rows of all segments, one after the other, from cu_seqlens[s] to cu_seqlens[s + 1],
  // int32 (segments + 1,). scores (B,H,Tq,max_seqlen_k) hold those of each segment, (queries, keys) in one piece,
  // at its first query.
  m.def(
      "additive_attention_varlen_fwd(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, " FUSEDATTN_VARLEN_OPTIONS
      ", bool keep_scores, bool allow_tf32=False) "
      "-> (Tensor context, Tensor lse, Tensor scores)");
  m.def(
      "additive_attention_varlen_bwd(Tensor? grad_context, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor weight, Tensor cu_seqlens_q, Tensor cu_seqlens_k, " FUSEDATTN_VARLEN_OPTIONS
      ", Tensor context, Tensor lse, Tensor scores, int output_mask) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight)");

  // As additive_attention's, without value and what hides keys. scores (B,H,Tq,Tk) are in the dtype of query.
  m.def("additive_scores_fwd(Tensor query, Tensor key, Tensor weight, " FUSEDATTN_SCORES_OPTIONS ") -> Tensor");
  m.def(
      "additive_scores_bwd(Tensor grad_scores, Tensor query, Tensor key, Tensor weight, " FUSEDATTN_SCORES_OPTIONS
      ", int output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_weight)");

  // scores (B,H,Tq,Tk) or (B,Tq,Tk), float32 or float64, mask like them or None, seed (S,), S dividing H, or None
  // for the most likely key: see common/philox.h. index -1, -inf for lse and best, the largest perturbed score,
  // and else 0 where a query sees no key.
  m.def("hard_additive_attention_fwd(Tensor scores, Tensor? mask, Tensor? seed, " FUSEDATTN_PHILOX_PLACE
        ") -> (Tensor log_prob, Tensor entropy, Tensor lse, Tensor index, Tensor best)");
  m.def(
      "hard_additive_attention_bwd(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor? grad_lse, Tensor scores, "
      "Tensor? mask, Tensor? seed, " FUSEDATTN_PHILOX_PLACE
      ", Tensor entropy, Tensor lse, Tensor index, int output_mask) -> Tensor grad_scores");

  // query (B,Tq,D), key (B,Tk,D), value (B,Tk,Dv) or None, previous (B,Tq,C,Tk), mask (B,Tq,Tk) or None; for G
  // groups of batch elements weight (G,D), conv_weight (G,N,C,K), location_weight (G,D,N), or None where N is D.
  // All but query, key, value and mask are in the dtype of the arithmetic, and so are scores (B,Tq,Tk) and lse
  // (B,Tq). Without value the scores alone are made.
  m.def(
      "location_attention_fwd(Tensor query, Tensor key, Tensor? value, Tensor weight, Tensor previous, "
      "Tensor conv_weight, Tensor? location_weight, Tensor? mask, " FUSEDATTN_SCORES_OPTIONS
      ") -> (Tensor context, Tensor weights, Tensor scores, Tensor lse)");
  m.def(
      "location_attention_bwd(Tensor? grad_context, Tensor? grad_weights, Tensor? grad_scores, Tensor query, "
      "Tensor key, Tensor? value, Tensor weight, Tensor previous, Tensor conv_weight, Tensor? location_weight, "
      "Tensor? mask, " FUSEDATTN_SCORES_OPTIONS
      ", Tensor scores, Tensor lse, int output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_weight, Tensor grad_previous, Tensor grad_conv_weight, Tensor grad_location_weight)");
  // The same of a step of a loop: the gradient of the keys is added to key_sum (B,Tk,D), in the dtype of the
  // arithmetic, where that is given.
  m.def(
      "location_attention_step_bwd(Tensor? grad_context, Tensor? grad_weights, Tensor? grad_scores, Tensor query, "
      "Tensor key, Tensor? value, Tensor weight, Tensor previous, Tensor conv_weight, Tensor? location_weight, "
      "Tensor? mask, " FUSEDATTN_SCORES_OPTIONS
      ", Tensor scores, Tensor lse, Tensor(a!)? key_sum, int output_mask) -> (Tensor grad_query, Tensor grad_key, "
      "Tensor grad_value, Tensor grad_weight, Tensor grad_previous, Tensor grad_conv_weight, Tensor "
      "grad_location_weight)");

  // x (B, ...) with C channels at channel_dim, residual like x or None. gamma and beta, each the sum of one or two
  // tensors, or None: by their rank (), (C,), (B, C) or like x, any size of which may be 1. On CUDA (C,) or (B,
  // C), and nothing added. A gradient is (0,) where the argument is None.
  m.def(
      "film_fwd(Tensor x, Tensor? gamma, Tensor? beta, Tensor? gamma_added, Tensor? beta_added, "
      "Tensor? residual, " FUSEDATTN_FILM_OPTIONS ") -> Tensor");
  m.def(
      "film_bwd(Tensor grad_output, Tensor x, Tensor? gamma, Tensor? beta, Tensor? gamma_added, "
      "Tensor? beta_added, " FUSEDATTN_FILM_OPTIONS
      ", int output_mask) -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta, Tensor grad_gamma_added, Tensor "
      "grad_beta_added)");

  // x (B, ...) with 2C channels at channel_dim, condition and what is added to it as film's beta for them. y has C
  // channels.
  m.def("gated_film_fwd(Tensor x, Tensor? condition, Tensor? condition_added, " FUSEDATTN_GATED_FILM_OPTIONS
        ") -> Tensor");
  m.def(
      "gated_film_bwd(Tensor grad_output, Tensor x, Tensor? condition, Tensor? "
      "condition_added, " FUSEDATTN_GATED_FILM_OPTIONS
      ", int output_mask) -> (Tensor grad_x, Tensor grad_condition, Tensor grad_condition_added)");

  // hidden and gate or None (B,T,D), value (B,T,Dv) or None, weight (G,K,D) for as many groups of batch elements,
  // lengths (B,) or None. context (B,K,Dv) is (0,) without value; lse (B,K) and scores (B,K,T) are in the dtype of
  // the arithmetic.
  m.def(
      "attention_pool_fwd(Tensor hidden, Tensor? gate, Tensor? value, Tensor weight, Tensor? lengths) "
      "-> (Tensor context, Tensor lse, Tensor scores)");
  m.def(
      "attention_pool_bwd(Tensor? grad_context, Tensor? grad_lse, Tensor? grad_scores, Tensor hidden, "
      "Tensor? gate, Tensor? value, Tensor weight, Tensor? lengths, Tensor context, Tensor lse, Tensor scores, "
      "int output_mask) -> (Tensor grad_hidden, Tensor grad_gate, Tensor grad_value, Tensor grad_weight)");

  // x, gamma, beta and what is added to them as for film, but with one value per channel as (C,) or (B, C), or one
  // for each element as x; so is pre_gate. weight and bias (C,) or (B, C). pre_residual and residual like x.
  // running_mean and running_var (C,) where training is false. h is (0,) where neither pre_gate nor pre_residual
  // is given. mean and var, of each group, are float64.
  m.def(
      "norm_film_fwd(Tensor x, Tensor? gamma, Tensor? beta, Tensor? gamma_added, Tensor? beta_added, "
      "Tensor? weight, Tensor? bias, Tensor? pre_gate, Tensor? pre_gate_added, Tensor? pre_residual, "
      "Tensor? running_mean, Tensor? running_var, Tensor? residual, " FUSEDATTN_NORM_FILM_OPTIONS
      ") -> (Tensor y, Tensor h, Tensor mean, Tensor var)");
  m.def(
      "norm_film_bwd(Tensor? grad_y, Tensor? grad_h, Tensor x, Tensor? gamma, Tensor? beta, Tensor? gamma_added, "
      "Tensor? beta_added, Tensor? weight, Tensor? bias, Tensor? pre_gate, Tensor? pre_gate_added, "
      "Tensor? pre_residual, Tensor? running_mean, Tensor? running_var, " FUSEDATTN_NORM_FILM_OPTIONS
      ", Tensor h, Tensor mean, Tensor var, int output_mask) -> (Tensor grad_x, Tensor grad_gamma, Tensor "
      "grad_beta, "
      "Tensor grad_gamma_added, Tensor grad_beta_added, Tensor grad_weight, Tensor grad_bias, "
      "Tensor grad_pre_gate, Tensor grad_pre_gate_added, Tensor grad_pre_residual)");
}
