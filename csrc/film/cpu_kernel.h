// What the CPU launcher (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per level) of FiLM share.
//
// In memory order x is (B, M, C, N): B batch, M positions before and N positions after the channel. N > 1 walks
// runs of N elements that share a channel; N == 1 walks rows of C channels.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "options.h"

namespace fusedattn {

// Storage types of x; gamma, beta and the arithmetic are float, or double for DOUBLE.
enum class FilmType { FLOAT, DOUBLE, HALF, BFLOAT16 };

// streamed: y or dx goes past the caches; its runs or rows are whole cache lines.
struct FilmKernels {
  // y = activation(scale x + shift) + residual over `runs` channels of n elements each ...
  void (*forward_runs)(FilmType, const FilmOptions&, int64_t runs, int64_t n, const void* x, const void* scale,
                       const void* shift, const void* residual, void* y, bool streamed);
  // ... or over `rows` rows of C channels.
  void (*forward_rows)(FilmType, const FilmOptions&, int64_t rows, int64_t C, const void* x, const void* scale,
                       const void* shift, const void* residual, void* y, bool streamed);
  // dz = dy activation'(z), dx = scale dz; writes the sums of dz x and of dz, one per channel.
  void (*backward_runs)(FilmType, const FilmOptions&, int64_t runs, int64_t n, const void* dy, const void* x,
                        const void* scale, const void* shift, void* dx, void* sum_dz_x, void* sum_dz,
                        bool streamed);
  void (*backward_rows)(FilmType, const FilmOptions&, int64_t rows, int64_t C, const void* dy, const void* x,
                        const void* scale, const void* shift, void* dx, void* sum_dz_x, void* sum_dz,
                        bool streamed);
};

FUSEDATTN_DECLARE_TABLE(FilmKernels, film)

}  // namespace fusedattn
