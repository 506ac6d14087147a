// CUDA launcher of film_bwd: memory layout (layout.h), allocation, and the kernels of cuda_bwd.cuh.
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/box.h"
#include "cuda_bwd.cuh"
#include "cuda_inputs.h"

namespace fusedattn {
namespace {

Tensor empty_as(const Tensor& x, const OptionalTensor& t, bool asked = true) {
  if (!t || !asked) return torch::stable::new_empty(x, std::vector<int64_t>{0});
  return torch::stable::new_empty(*t, std::vector<int64_t>(t->sizes().begin(), t->sizes().end()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> film_bwd(const Tensor& grad_output, const Tensor& x,
                                                            const OptionalTensor& gamma,
                                                            const OptionalTensor& beta,
                                                            const OptionalTensor& gamma_added,
                                                            const OptionalTensor& beta_added,
                                                            const FilmOptions& options, OutputMask asked) {
  require_one_tensor(gamma_added, beta_added);
  const auto none = [&] { return empty_as(x, {}); };
  Tensor dgamma = empty_as(x, gamma, asked[1]), dbeta = empty_as(x, beta, asked[2]);
  if (x.numel() == 0) {
    torch::stable::zero_(dgamma);
    torch::stable::zero_(dbeta);
    return {asked[0] ? torch::stable::empty_like(x) : none(), dgamma, dbeta, none(), none()};
  }
  const FilmInputs in(x, gamma, beta, options);
  in.device.require(grad_output, "film", "grad_output");
  const Tensor dy = in.layout.like(grad_output, "grad_output");
  Tensor dx = torch::stable::empty_like(in.layout.x);
  gpu::with_storage(x.scalar_type(), "film: x", [&](auto storage) {
    using S = decltype(storage);
    const FilmProblem<S> problem = in.problem<S>();
    const Tensor sums =
        torch::stable::new_empty(x, std::vector<int64_t>{2 * film_bwd_parts(problem)}, gpu::arithmetic_type<S>());
    launch_film_bwd<S>(problem, gpu::data<S>(dy), gpu::mutable_data<S>(dx),
                       in.numbers<S>(gamma && asked[1] ? OptionalTensor(dgamma) : std::nullopt, "film: gamma"),
                       in.numbers<S>(beta && asked[2] ? OptionalTensor(dbeta) : std::nullopt, "film: beta"),
                       gpu::mutable_data<gpu::Arithmetic<S>>(sums), in.device.stream());
  });
  return {asked[0] ? in.layout.restored(dx, x) : none(), dgamma, dbeta, none(), none()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CUDA, m) { m.impl("film_bwd", boxed<film_bwd>); }

}  // namespace fusedattn
