// What CPU launchers and the kernels (cpu_kernel.cpp, compiled once per level) that work with random words share.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/philox.h"

namespace fusedattn {

// Over n keys of a row.
struct PhiloxKernels {
  // The words less 2^31.
  void (*words)(const PhiloxRow&, int64_t n, int32_t* out);
  void (*drop_f32)(const PhiloxRow&, int64_t n, Dropout, float* x);
  void (*drop_f64)(const PhiloxRow&, int64_t n, Dropout, double* x);
};

FUSEDATTN_DECLARE_TABLE(PhiloxKernels, philox_kernels)

}  // namespace fusedattn
