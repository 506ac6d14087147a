// CUDA launcher of film_fwd: memory layout (layout.h), allocation, and the kernels of cuda_fwd.cuh.
#include <torch/csrc/stable/ops.h>

#include "common/box.h"
#include "cuda_fwd.cuh"
#include "cuda_inputs.h"

namespace fusedattn {
namespace {

Tensor film_fwd(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                const OptionalTensor& gamma_added, const OptionalTensor& beta_added,
                const OptionalTensor& residual, const FilmOptions& options) {
  require_one_tensor(gamma_added, beta_added);
  if (x.numel() == 0) return torch::stable::empty_like(x);
  const FilmInputs in(x, gamma, beta, options);
  in.device.require(residual, "film", "residual");
  OptionalTensor addend;
  if (residual) addend = in.layout.like(*residual, "residual");
  Tensor y = torch::stable::empty_like(in.layout.x);
  gpu::with_storage(x.scalar_type(), "film: x", [&](auto storage) {
    using S = decltype(storage);
    launch_film_fwd<S>(in.problem<S>(), gpu::data<S>(addend), gpu::mutable_data<S>(y), in.device.stream());
  });
  return in.layout.restored(y, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CUDA, m) { m.impl("film_fwd", boxed<film_fwd>); }

}  // namespace fusedattn
