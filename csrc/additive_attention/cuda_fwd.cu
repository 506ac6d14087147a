// CUDA launcher of additive_attention_fwd: checks (cuda_inputs.h), allocation, and the kernels of cuda_fwd.cuh.
#include <tuple>

#include "common/box.h"
#include "cuda_fwd.cuh"
#include "cuda_inputs.h"

namespace fusedattn {

// in cuda_fwd_linear.cu
FUSEDATTN_LINEAR_FWD(extern, float)
FUSEDATTN_LINEAR_FWD(extern, double)
FUSEDATTN_LINEAR_FWD(extern, __half)
FUSEDATTN_LINEAR_FWD(extern, __nv_bfloat16)

namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename S>
Forward forward(const AttentionInputs& in, bool return_weights, bool keep_scores, bool tf32) {
  using T = gpu::Arithmetic<S>;
  const ScalarType type = in.query.scalar_type(), acc = gpu::arithmetic_type<S>();
  const AttentionProblem<S> p = in.problem<S>();
  Tensor context = in.empty(in.shape(p.Tq, p.Dv), type), lse = in.empty(in.shape(p.Tq), acc);
  Tensor weights = return_weights ? in.empty(in.shape(p.Tq, p.Tk), type) : in.empty(0, type);
  Tensor scores = keep_scores ? in.empty(in.shape(p.Tq, p.Tk), acc) : in.empty(0, acc);
  Tensor unkept = scores;  // weights are made of scores, in their own memory where that is of the same type
  if (return_weights && !keep_scores) unkept = type == acc ? weights : in.empty(in.shape(p.Tq, p.Tk), acc);
  const Tensor memory = in.empty(additive_attention_fwd_workspace(p), acc);
  launch_additive_attention_fwd<S>(p, gpu::mutable_data<S>(context), gpu::mutable_data<T>(lse),
                                   return_weights || keep_scores ? gpu::mutable_data<T>(unkept) : nullptr,
                                   return_weights ? gpu::mutable_data<S>(weights) : nullptr,
                                   gpu::mutable_data<T>(memory), in.device.stream(), tf32);
  return {context, lse, weights, scores};
}

// Exponentials of keys at hand (key_exp) are not used: the kernel makes them as it stages keys, two per 64 x 64
// tanh.
Forward additive_attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& mask,
                               const OptionalTensor& key_lengths, const OptionalTensor& window_center,
                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor& dropout_seed,
                               const AttentionOptions& options, bool return_weights, bool keep_scores,
                               bool allow_tf32) {
  const AttentionInputs in(query, key, value, weight, bias, mask, key_lengths, window_center, dropout_seed,
                           options);
  return gpu::with_storage(query.scalar_type(), "additive_attention: query", [&](auto storage) {
    return forward<decltype(storage)>(in, return_weights, keep_scores, allow_tf32);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CUDA, m) { m.impl("additive_attention_fwd", boxed<additive_attention_fwd>); }

}  // namespace fusedattn
