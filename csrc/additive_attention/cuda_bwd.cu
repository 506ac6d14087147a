// CUDA launcher of additive_attention_bwd: checks (cuda_inputs.h), allocation, and the kernels of cuda_bwd.cuh.
#include <tuple>

#include "common/box.h"
#include "cuda_bwd.cuh"
#include "cuda_inputs.h"

namespace fusedattn {

// in cuda_bwd_linear.cu
FUSEDATTN_LINEAR_BWD(extern, float)
FUSEDATTN_LINEAR_BWD(extern, double)
FUSEDATTN_LINEAR_BWD(extern, __half)
FUSEDATTN_LINEAR_BWD(extern, __nv_bfloat16)

namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// A gradient or a result of the forward pass, checked; contiguous unless only its rows are asked to be.
OptionalTensor checked(const AttentionInputs& in, const OptionalTensor& t, const char* name,
                       const std::vector<int64_t>& shape, ScalarType type, bool only_rows = false) {
  if (!t) return t;
  in.check_shape(*t, name, shape);
  STD_TORCH_CHECK(t->scalar_type() == type, "additive_attention: ", name, " does not have the expected dtype");
  const Tensor rows = in.rows(*t, name);
  return only_rows ? rows : torch::stable::contiguous(rows);
}

template <typename S>
Gradients backward(const AttentionInputs& in, const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                   const OptionalTensor& grad_weights, const Tensor& context, const Tensor& lse,
                   const Tensor& scores, OutputMask asked) {
  using T = gpu::Arithmetic<S>;
  const ScalarType type = in.query.scalar_type(), acc = gpu::arithmetic_type<S>();
  const AttentionProblem<S> p = in.problem<S>();
  const auto dc = checked(in, grad_context, "grad_context", in.shape(p.Tq, p.Dv), type, true);
  const auto dl = checked(in, grad_lse, "grad_lse", in.shape(p.Tq), acc);
  const auto dp = checked(in, grad_weights, "grad_weights", in.shape(p.Tq, p.Tk), type);
  const auto c = checked(in, context, "context", in.shape(p.Tq, p.Dv), type, true);
  const auto l = checked(in, lse, "lse", in.shape(p.Tq), acc);
  OptionalTensor s;
  if (scores.numel() > 0) s = checked(in, scores, "scores", in.shape(p.Tq, p.Tk), acc);

  // The two small ones are made in any case.
  const auto none = [&] { return in.empty(0, type); };
  Tensor dq = in.empty(in.shape(p.Tq, p.D), type), dk = asked[1] ? in.empty(in.shape(p.Tk, p.D), type) : none();
  Tensor dx = asked[2] ? in.empty(in.shape(p.Tk, p.Dv), type) : none();
  Tensor dw =
      in.empty(in.flat ? std::vector<int64_t>{p.D} : std::vector<int64_t>{p.H, p.D}, in.weight.scalar_type());
  AttentionGradients<S> grads;
  grads.grad_context = dc ? in.view<S>(*dc) : RowsOf<S>(nullptr, 0, 0, 0);
  grads.grad_lse = gpu::data<T>(dl), grads.grad_weights = gpu::data<S>(dp);
  grads.context = in.view<S>(*c), grads.lse = gpu::data<T>(l), grads.scores = gpu::data<T>(s);
  grads.grad_query = gpu::mutable_data<S>(dq), grads.grad_key = asked[1] ? gpu::mutable_data<S>(dk) : nullptr;
  grads.grad_value = asked[2] ? gpu::mutable_data<S>(dx) : nullptr, grads.grad_weight = in.numbers<S>(dw);
  const bool of_bias = asked[4] && in.bias;
  Tensor db = of_bias ? in.empty(in.bias_shape(), in.bias->scalar_type()) : none();
  if (of_bias) grads.grad_bias = in.numbers<S>(db, "bias");
  const Tensor memory = in.empty(additive_attention_bwd_workspace(p, grads), acc);
  launch_additive_attention_bwd<S>(p, grads, gpu::mutable_data<T>(memory), in.device.stream());
  return {asked[0] ? dq : none(), dk, dx, asked[3] ? dw : none(), db};
}

Gradients additive_attention_bwd(const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                                 const OptionalTensor& grad_weights, const Tensor& query, const Tensor& key,
                                 const Tensor& value, const Tensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& mask, const OptionalTensor& key_lengths,
                                 const OptionalTensor& window_center, const OptionalTensor&, const OptionalTensor&,
                                 const OptionalTensor& dropout_seed, const AttentionOptions& options,
                                 const Tensor& context, const Tensor& lse, const Tensor& scores,
                                 OutputMask asked) {
  const AttentionInputs in(query, key, value, weight, bias, mask, key_lengths, window_center, dropout_seed,
                           options);
  return gpu::with_storage(query.scalar_type(), "additive_attention: query", [&](auto storage) {
    return backward<decltype(storage)>(in, grad_context, grad_lse, grad_weights, context, lse, scores, asked);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CUDA, m) { m.impl("additive_attention_bwd", boxed<additive_attention_bwd>); }

}  // namespace fusedattn
