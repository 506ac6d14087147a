// What the CPU launcher (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per level) of gated_film share.
#pragma once

#include "film/cpu_kernel.h"

namespace fusedattn {

// Rows of y: x is where the first half begins of which y is made, and the halves of the condition, h_a and h_b,
// are gamma and beta. Both are vectors or neither is.
struct GatedFilmRows {
  FilmRows rows;
  int64_t x_step, apart;  // elements of x from row to row, and from half to half
};

struct GatedFilmKernels {
  // y = tanh(a + h_a) sigmoid(b + h_b)
  void (*forward)(StorageType, const GatedFilmRows&, void* y);
  // da and db into dx, as far apart as the halves of x unless nobody asked for them; and their sums
  void (*backward)(StorageType, const GatedFilmRows&, const void* dy, void* dx, const FilmSums&);
};

FUSEDATTN_DECLARE_TABLE(GatedFilmKernels, gated_film)

}  // namespace fusedattn
