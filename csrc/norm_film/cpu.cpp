// CPU launcher of norm_film: checks, and the choice between groups that are rows (cpu_rows.h) and groups that
// reach over positions (cpu_maps.h). How work is cut depends on shapes alone and sums have a fixed order: results
// are bitwise reproducible.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "common/box.h"
#include "cpu_maps.h"
#include "cpu_rows.h"

namespace fusedattn {
namespace {

Tensor zeros(const OptionalTensor& t, const Tensor& x) {
  Tensor zero = t ? torch::stable::empty_like(*t) : empty({0}, x.scalar_type());
  torch::stable::zero_(zero);
  return zero;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward norm_film_fwd(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                      const OptionalTensor& gamma_added, const OptionalTensor& beta_added,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& gate,
                      const OptionalTensor& gate_added, const OptionalTensor& pre_residual,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& residual, const NormFilmOptions& options) {
  const NormLayout in(x, options);
  const bool forms = pre_residual || gate;
  if (x.numel() == 0) {
    const int64_t groups = is_of_rows(options.norm) ? in.B * in.T : statistics_of(in, options);
    Tensor h = forms ? torch::stable::empty_like(x) : empty({0}, x.scalar_type());
    return {torch::stable::empty_like(x), h, statistic(groups), statistic(groups)};
  }
  const Problem p(in, {gamma, beta, gamma_added, beta_added, weight, bias, gate, gate_added}, options);
  const auto run = [&](auto arithmetic) {
    using T = decltype(arithmetic);
    return is_of_rows(options.norm) ? rows_forward<T>(p, pre_residual, residual)
                                    : maps_forward<T>(p, pre_residual, running_mean, running_var, residual);
  };
  const Outputs out = p.type == StorageType::DOUBLE ? run(double{}) : run(float{});
  return {in.restored(out.y, x), forms ? in.restored(out.h, x) : out.h, out.mean, out.variance};
}

Backward norm_film_bwd(const OptionalTensor& grad_y, const OptionalTensor& grad_h, const Tensor& x,
                       const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& gamma_added,
                       const OptionalTensor& beta_added, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& gate, const OptionalTensor& gate_added,
                       const OptionalTensor& pre_residual, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const NormFilmOptions& options, const Tensor& h,
                       const Tensor& mean, const Tensor& variance, OutputMask asked) {
  const auto type = x.scalar_type();
  if (!pre_residual) asked.bits &= ~(int64_t{1} << PRE_RESIDUAL);
  if (x.numel() == 0) {
    const auto of = [&](Result n, const OptionalTensor& t) { return zeros(asked[n] ? t : OptionalTensor(), x); };
    return {of(X, x),
            of(GAMMA, gamma),
            of(BETA, beta),
            of(GAMMA_ADDED, gamma_added),
            of(BETA_ADDED, beta_added),
            of(WEIGHT, weight),
            of(BIAS, bias),
            of(GATE, gate),
            of(GATE_ADDED, gate_added),
            of(PRE_RESIDUAL, pre_residual)};
  }
  const NormLayout in(x, options);
  const Problem p(in, {gamma, beta, gamma_added, beta_added, weight, bias, gate, gate_added}, options, asked);
  const auto run = [&](auto arithmetic) {
    using T = decltype(arithmetic);
    return is_of_rows(options.norm) ? rows_backward<T>(p, grad_y, grad_h, h, asked, mean, variance)
                                    : maps_backward<T>(p, grad_y, grad_h, h, asked, mean, variance);
  };
  const GradientsOut out = p.type == StorageType::DOUBLE ? run(double{}) : run(float{});
  return {asked[X] ? in.restored(out.dx, x) : out.dx, out.gamma.of(gamma, false, gamma, type),
          out.beta.of(beta, false, beta, type),       out.gamma.of(gamma, true, gamma_added, type),
          out.beta.of(beta, true, beta_added, type),  out.weight.of(weight, false, weight, type),
          out.bias.of(bias, false, bias, type),       out.gate.of(gate, false, gate, type),
          out.gate.of(gate, true, gate_added, type),  asked[PRE_RESIDUAL] ? in.restored(out.dr, x) : out.dr};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("norm_film_fwd", boxed<norm_film_fwd>);
  m.impl("norm_film_bwd", boxed<norm_film_bwd>);
}

}  // namespace fusedattn
