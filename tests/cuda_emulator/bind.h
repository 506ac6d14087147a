// How a launcher of csrc/<op>/cuda_*.cuh becomes a Python function that runs it on the CPU.
//
// A file bind_<name>.cpp becomes the module <name>; nothing else has to know of it. It reads
//
//   BINDINGS(film, module) {
//     module.def("film_fwd", [](const std::string& dtype, const py::array& x, const Array& residual, ...) {
//       with_storage(dtype, [&](auto storage) {
//         using S = decltype(storage);
//         fusedattn::launch_film_fwd<S>(..., data<S>(x), data<S>(residual), ..., nullptr);
//       });
//     });
//   }
//
// and a test says `film = build.load("film")` (build.py). Arrays come with their strides and are passed on without
// a copy, so that AddressSanitizer knows where they end; outputs are arrays that the caller filled with NaN.
// float16 and bfloat16 travel as uint16 (arrays.py).
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

#include "common/bundle.h"
#include "common/cuda.cuh"
#include "cuda_emulator.h"

namespace py = pybind11;

using Array = std::optional<py::array>;

// Name of the Python module. pybind11 finds modules again by it, so what nvcc makes of the same file
// (tests/ptx/nvcc.py), and what has planted bugs (planted.py), needs another one.
#if defined(__CUDACC__)
#define MODULE_NAME(name) name##_ptx
#elif defined(KERNELS_PLANTED)
#define MODULE_NAME(name) name##_planted
#else
#define MODULE_NAME(name) name
#endif

#define BINDINGS(name, module)                                                                 \
  static void bind(py::module_& module);                                                       \
  PYBIND11_MODULE(MODULE_NAME(name), module) {                                                 \
    module.def("set_order", &cuda_emulator::set_order, py::arg("seed"));                       \
    module.def("set_architecture", &cuda_emulator::set_architecture, py::arg("architecture")); \
    module.def("switch_count", &cuda_emulator::switch_count);                                  \
    module.def("show_bug", &cuda_emulator::show_bug, py::arg("number"));                       \
    bind(module);                                                                              \
  }                                                                                            \
  static void bind(py::module_& module)

// body(S{}) for the storage type that torch calls `dtype`. Leaving some out makes it compile sooner.
template <typename Body>
void with_storage(const std::string& dtype, const Body& body) {
  if (dtype == "float32") return body(float{});
#if !defined(KERNELS_WITHOUT_FLOAT64)
  if (dtype == "float64") return body(double{});
#endif
#if !defined(KERNELS_WITHOUT_HALF)
  if (dtype == "float16") return body(__half{});
#endif
#if !defined(KERNELS_WITHOUT_BFLOAT16)
  if (dtype == "bfloat16") return body(__nv_bfloat16{});
#endif
  throw std::invalid_argument("dtype: expected one that was compiled, got " + dtype);
}

template <typename S>
S* data(const py::array& array) {
  if (array.itemsize() != sizeof(S)) throw std::invalid_argument("an array whose elements have the wrong size");
  return static_cast<S*>(const_cast<void*>(array.data()));
}
template <typename S>
S* data(const Array& array) {
  return array ? data<S>(*array) : nullptr;
}

// Of a parameter, which may be wider than the other arrays.
template <typename S>
fusedattn::gpu::Numbers<S> numbers(const Array& x) {
  if (!x) return {};
  const bool wide = x->itemsize() != static_cast<py::ssize_t>(sizeof(S));
  return {wide ? static_cast<void*>(data<fusedattn::gpu::Arithmetic<S>>(*x)) : data<S>(*x), wide};
}

// Converts to a member of a bundle of options, from the next element of a tuple.
struct NextElement {
  const py::tuple& values;
  size_t& next;
  template <typename T>
  operator T() const {
    if constexpr (std::is_enum_v<T>)
      return static_cast<T>(values[next++].cast<int64_t>());
    else
      return values[next++].cast<T>();
  }
};

template <typename Options>
Options bundle(const py::tuple& values) {
  if (values.size() != fusedattn::MEMBERS<Options>) throw std::invalid_argument("options of the wrong number");
  size_t next = 0;
  return fusedattn::make_bundle<Options>(NextElement{values, next});
}

// In elements.
inline int64_t stride(const py::array& array, int dimension) {
  return array.strides(dimension) / array.itemsize();
}
