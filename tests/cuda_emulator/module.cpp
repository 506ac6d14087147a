// The Python module of the emulator: every file bind_*.cpp adds its functions.
#include "bind.h"
#include "cuda_emulator.h"

PYBIND11_MODULE(emulated, module) {
  module.def("set_order", &cuda_emulator::set_order, py::arg("seed"));
  module.def("switch_count", &cuda_emulator::switch_count);
  for (Binder binder : binders()) binder(module);
}
