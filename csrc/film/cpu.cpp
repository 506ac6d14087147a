// CPU launcher of FiLM: its two passes over x, gamma and beta (cpu_parameters.h).
#include <tuple>
#include <vector>

#include "common/box.h"
#include "cpu_parameters.h"

namespace fusedattn {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Problem<T> problem(const Layout& in, StorageType type, const FilmParameters& parameters,
                   const FilmOptions& options, const FilmWalk& walk) {
  return {in, type, parameters, options.gamma_offset, T(1), options.activation == Activation::NONE, walk};
}

template <typename T>
Tensor forward(const Layout& in, StorageType type, const FilmParameters& parameters,
               const OptionalTensor& residual, const FilmOptions& options) {
  const FilmWalk walk = in.walk(parameters);
  Problem<T> p = problem<T>(in, type, parameters, options, walk);
  Tensor y = empty_like(in);
  OptionalTensor addend;
  if (residual) addend = in.like(*residual, "residual");
  const char* const x = static_cast<const char*>(in.x.const_data_ptr());
  const char* const r = addend ? static_cast<const char*>(addend->const_data_ptr()) : nullptr;
  char* const out = static_cast<char*>(y.mutable_data_ptr());
  p.forward(p.streams(y), [&](FilmRows rows, const FilmWalk::Offsets& at, int64_t column) {
    const int64_t element = (at.of[0] + column) * p.size;
    rows.x = x + element;
    kernels().forward(type, options.activation, rows, r == nullptr ? nullptr : r + element, out + element);
  });
  return y;
}

// Where the gradient of parameter n, in the order of FilmParameters, is among the results.
constexpr int RESULT[FILM_PARAMETERS] = {1, 3, 2, 4};

template <typename T>
Gradients backward(const Tensor& grad_output, const Layout& in, StorageType type, const FilmParameters& parameters,
                   const FilmOptions& options, OutputMask asked) {
  FilmWalk walk = in.walk(parameters);
  gather_sums(walk);
  Problem<T> p = problem<T>(in, type, parameters, options, walk);
  std::vector<Gradient<T>> of_gamma, of_beta;
  for (int n = 0; n < FILM_PARAMETERS; ++n) {
    if (!parameters[n] || !asked[RESULT[n]]) continue;
    const Tensor& of = *parameters[n];
    const Tensor result = empty({of.sizes().begin(), of.sizes().end()}, in.dense_strides(of), of.scalar_type());
    (n < 2 ? of_gamma : of_beta).emplace_back(result, walk, GRADIENTS + n);
  }

  const Tensor grad = in.like(grad_output, "grad_output");
  Tensor dx = asked[0] ? empty_like(in) : empty({0}, in.x.scalar_type());
  const char* const x = static_cast<const char*>(in.x.const_data_ptr());
  const char* const dy = static_cast<const char*>(grad.const_data_ptr());
  char* const out = static_cast<char*>(dx.mutable_data_ptr());
  backward_rows(
      p, of_gamma, of_beta, asked[0], 1, asked[0] && p.streams(dx),
      [&](FilmRows rows, const FilmSums& sums, const FilmWalk::Offsets& at, int64_t column, char* unasked) {
        const int64_t element = (at.of[0] + column) * p.size;
        rows.x = x + element;
        kernels().backward(type, options.activation, rows, dy + element, asked[0] ? out + element : unasked, sums);
      });

  std::vector<Tensor> found{dx};
  size_t next[2] = {0, 0};
  for (int n = 0; n < FILM_PARAMETERS; ++n) {
    if (!parameters[n] || !asked[RESULT[n]])
      found.push_back(empty({0}, in.x.scalar_type()));
    else
      found.push_back(finished<T>(walk, {&(n < 2 ? of_gamma : of_beta)[next[n / 2]++]}));
  }
  return {found[0], found[1], found[2], found[3], found[4]};
}

Tensor film_fwd(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                const OptionalTensor& gamma_added, const OptionalTensor& beta_added,
                const OptionalTensor& residual, const FilmOptions& options) {
  const StorageType type = storage_type(x.scalar_type());
  if (x.numel() == 0) return torch::stable::empty_like(x);
  const Layout in(x, options);
  const FilmParameters parameters{gamma, gamma_added, beta, beta_added};
  return in.restored(type == StorageType::DOUBLE ? forward<double>(in, type, parameters, residual, options)
                                                 : forward<float>(in, type, parameters, residual, options),
                     x);
}

Gradients film_bwd(const Tensor& grad_output, const Tensor& x, const OptionalTensor& gamma,
                   const OptionalTensor& beta, const OptionalTensor& gamma_added, const OptionalTensor& beta_added,
                   const FilmOptions& options, OutputMask asked) {
  const StorageType type = storage_type(x.scalar_type());
  const auto zeros = [&](int n, const OptionalTensor& t) {
    Tensor zero = t && asked[n] ? torch::stable::empty_like(*t) : empty({0}, x.scalar_type());
    torch::stable::zero_(zero);
    return zero;
  };
  if (x.numel() == 0)
    return {zeros(0, x), zeros(1, gamma), zeros(2, beta), zeros(3, gamma_added), zeros(4, beta_added)};
  const Layout in(x, options);
  const FilmParameters parameters{gamma, gamma_added, beta, beta_added};
  auto [dx, dgamma, dgamma_added, dbeta, dbeta_added] =
      type == StorageType::DOUBLE ? backward<double>(grad_output, in, type, parameters, options, asked)
                                  : backward<float>(grad_output, in, type, parameters, options, asked);
  return {asked[0] ? in.restored(dx, x) : dx, dgamma, dbeta, dgamma_added, dbeta_added};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("film_fwd", boxed<film_fwd>);
  m.impl("film_bwd", boxed<film_bwd>);
}

}  // namespace fusedattn
