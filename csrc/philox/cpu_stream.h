// Dropout for CPU launchers.
#pragma once

#include "cpu_kernel.h"
#include "stream.h"

namespace fusedattn {

inline void drop(const PhiloxRow& row, int64_t n, Dropout dropout, float* x) {
  FUSEDATTN_LEVEL_TABLE(philox_kernels).drop_f32(row, n, dropout, x);
}
inline void drop(const PhiloxRow& row, int64_t n, Dropout dropout, double* x) {
  FUSEDATTN_LEVEL_TABLE(philox_kernels).drop_f64(row, n, dropout, x);
}

}  // namespace fusedattn
