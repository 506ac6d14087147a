// What the CPU launcher (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per level) of FiLM share.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/storage.h"
#include "options.h"

namespace fusedattn {

// `rows` rows of n neighbouring elements. gamma and beta are in the type of the arithmetic: as many values as
// elements for each row (a vector), or one.
struct FilmRows {
  int64_t rows, n;
  int64_t step;  // elements from row to row, of x and all that is like x
  const void *x, *gamma, *beta;
  int64_t gamma_step, beta_step;  // values from row to row
  bool gamma_is_vector, beta_is_vector;
  double offset;  // of gamma
  bool streamed;  // y or dx goes past the caches; its rows are whole cache lines
  bool narrow;    // gamma and beta, both vectors, and what backward writes of them are in the type of x instead
};

// What backward writes beside dx: dz x, gamma's, and dz, beta's; as they are for a vector, else their sums over
// each row. Where the step from row to row is 0, all rows are added up.
struct FilmSums {
  void *gamma, *beta;
  int64_t gamma_step, beta_step;
  bool gamma_is_fresh, beta_is_fresh;  // else the sums over all rows are added to what is there
  bool keeps_dx = true;                // else its rows take the place of each other: nobody asked for it
};

struct FilmKernels {
  // y = activation((gamma + offset) x + beta) + residual
  void (*forward)(StorageType, Activation, const FilmRows&, const void* residual, void* y);
  // dz = dy activation'(z), dx = (gamma + offset) dz, and the sums
  void (*backward)(StorageType, Activation, const FilmRows&, const void* dy, void* dx, const FilmSums&);
  // n numbers of a storage type, `step` elements apart, into the type of the arithmetic; added to what is there or
  // not
  void (*widen)(StorageType, int64_t n, int64_t step, const void* in, void* out, bool added);
  // and back, into neighbouring elements
  void (*narrow)(StorageType, int64_t n, const void* in, void* out);
};

FUSEDATTN_DECLARE_TABLE(FilmKernels, film)

}  // namespace fusedattn
