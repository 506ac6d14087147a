#include <limits>

#include "bind.h"
#include "film/cuda_bwd.cuh"
#include "film/cuda_fwd.cuh"

namespace {

using fusedattn::FilmProblem;

// x (B, M, C, N) contiguous, gamma and beta (B, C) or (C,).
template <typename S>
FilmProblem<S> problem(const py::array& x, const Array& gamma, const Array& beta, const py::tuple& options) {
  const auto stride_b = [](const Array& a) { return a && a->ndim() == 2 ? a->shape(1) : 0; };
  return {x.shape(0),       x.shape(1),
          x.shape(2),       x.shape(3),
          data<S>(x),       numbers<S>(gamma),
          numbers<S>(beta), stride_b(gamma),
          stride_b(beta),   bundle<fusedattn::FilmOptions>(options)};
}

}  // namespace

BINDINGS(film, module) {
  module.def("film_fwd", [](const std::string& dtype, const py::array& x, const Array& gamma, const Array& beta,
                            const Array& residual, const py::tuple& options, const py::array& y) {
    with_storage(dtype, [&](auto storage) {
      using S = decltype(storage);
      fusedattn::launch_film_fwd<S>(problem<S>(x, gamma, beta, options), data<S>(residual), data<S>(y), nullptr);
    });
  });
  module.def("film_bwd", [](const std::string& dtype, const py::array& dy, const py::array& x, const Array& gamma,
                            const Array& beta, const py::tuple& options, const py::array& dx, const Array& dgamma,
                            const Array& dbeta) {
    with_storage(dtype, [&](auto storage) {
      using S = decltype(storage);
      using T = fusedattn::gpu::Arithmetic<S>;
      const FilmProblem<S> p = problem<S>(x, gamma, beta, options);
      // On the heap and of the exact size, and NaN until written.
      std::vector<T> sums(2 * film_bwd_parts(p), std::numeric_limits<T>::quiet_NaN());
      fusedattn::launch_film_bwd<S>(p, data<S>(dy), data<S>(dx), numbers<S>(dgamma), numbers<S>(dbeta),
                                    sums.data(), nullptr);
    });
  });
}
