// The tensors of FiLM as its CUDA kernels take them.
#pragma once

#include "common/cuda_torch.h"
#include "cuda_problem.cuh"
#include "layout.h"

namespace fusedattn {

// The public function adds the tensors of a pair where these kernels run.
inline void require_one_tensor(const OptionalTensor& gamma_added, const OptionalTensor& beta_added) {
  STD_TORCH_CHECK(!gamma_added && !beta_added, "film: gamma and beta: expected one tensor each on CUDA, got two");
}

struct FilmInputs {
  gpu::Device device;
  Layout layout;
  OptionalTensor gamma, beta;  // contiguous
  FilmOptions options;

  FilmInputs(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, const FilmOptions& options)
      : device(x),
        layout(x, options),
        gamma(parameter(gamma, "gamma")),
        beta(parameter(beta, "beta")),
        options(options) {}

  OptionalTensor parameter(const OptionalTensor& t, const char* name) const {
    if (!t) return t;
    device.require(t, "film", name);
    layout.check_parameter(*t);
    return torch::stable::contiguous(*t);
  }

  // gamma or beta, or a gradient of theirs.
  template <typename S>
  gpu::Numbers<S> numbers(const OptionalTensor& t, const char* name) const {
    return gpu::numbers<S>(t, layout.x.scalar_type(), name);
  }

  template <typename S>
  FilmProblem<S> problem() const {
    const auto stride_b = [&](const OptionalTensor& t) { return t && t->dim() == 2 ? layout.C : 0; };
    return {layout.B,
            layout.M,
            layout.C,
            layout.N,
            gpu::data<S>(layout.x),
            numbers<S>(gamma, "film: gamma"),
            numbers<S>(beta, "film: beta"),
            stride_b(gamma),
            stride_b(beta),
            options};
  }
};

}  // namespace fusedattn
