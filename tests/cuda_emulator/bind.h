// How a launcher of csrc/<op>/cuda_*.cuh becomes a Python function of the emulator's module.
//
// One file bind_<op>.cpp for each launcher or op; every such file is found and compiled by build.py. It defines
//
//   BINDINGS(module) {
//     module.def("film_fwd", [](const std::string& dtype, py::array x, std::optional<py::array> residual, ...) {
//       with_storage(dtype, [&](auto storage) {
//         using S = decltype(storage);
//         launch_film_fwd<S>(..., data<S>(x), data<S>(residual), ..., nullptr);
//       });
//     });
//   }
//
// Arrays come with their strides and are passed on without a copy, so that AddressSanitizer knows where they end;
// outputs are arrays that the caller filled with NaN. float16 and bfloat16 travel as uint16 (arrays.py).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

using Binder = void (*)(py::module_&);

inline std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

#define BINDINGS(module)                                                \
  static void bind(py::module_& module);                                \
  static const bool bound = (binders().push_back(&bind), sizeof(bool)); \
  static void bind(py::module_& module)

// body(S{}) for the storage type that torch calls `dtype`.
template <typename Body>
void with_storage(const std::string& dtype, const Body& body) {
  if (dtype == "float32") return body(float{});
  if (dtype == "float64") return body(double{});
  if (dtype == "float16") return body(__half{});
  if (dtype == "bfloat16") return body(__nv_bfloat16{});
  throw std::invalid_argument("dtype: expected float32, float64, float16 or bfloat16, got " + dtype);
}

template <typename S>
S* data(const py::array& array) {
  if (array.itemsize() != sizeof(S)) throw std::invalid_argument("an array whose elements have the wrong size");
  return static_cast<S*>(const_cast<void*>(array.data()));
}
template <typename S>
S* data(const std::optional<py::array>& array) {
  return array ? data<S>(*array) : nullptr;
}

// In elements.
inline int64_t stride(const py::array& array, int dimension) {
  return array.strides(dimension) / array.itemsize();
}
