// What the CPU launcher (cpu.cpp) and the kernels (cpu_kernel*.cpp, compiled once per level) of norm_film share.
//
// Numbers of a channel are in the type of the arithmetic, float, or double for DOUBLE; statistics are doubles.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/storage.h"
#include "options.h"

namespace fusedattn {

// Rows of C neighbouring elements, each a group: layer and rms norm. All rows have the same numbers of channels.
struct NormRows {
  int64_t rows, C;
  const void *x, *pre_residual;      // pre_residual may be null
  const void *gate, *scale, *shift;  // of each channel; no gate is null
  double offset;                     // of scale
  bool is_rms;
  double eps;
  double *mean, *variance;  // of each row
  void* room;               // C numbers
  bool streamed;            // large results go past the caches; their rows are whole cache lines
};

// What backward reads and writes beside. Sums are added to what is there; null where nobody asks for them.
struct NormRowsGradients {
  const void *h, *dy, *dh;  // dh of the output h, may be null
  void *dx, *dr;            // dr, of pre_residual, may be null
  void *dz_n, *dz, *dh_x;   // of each channel
};

struct NormFilmKernels {
  // h = pre_residual + gate x where h is not null, else h is x; statistics; y = activation(scale n + shift) +
  // residual
  void (*rows_forward)(StorageType, Activation, const NormRows&, const void* residual, void* h, void* y);
  void (*rows_backward)(StorageType, Activation, const NormRows&, const NormRowsGradients&);
  // scale and shift from what they are made of, n channels; null for a factor of 1 or a term of 0
  void (*affine)(StorageType, int64_t n, const void* gamma, double offset, const void* weight, const void* bias,
                 const void* beta, void* scale, void* shift);
  // out = a b + c d, or that added to out; null for 1 (a) and for no second product (c)
  void (*products)(StorageType, int64_t n, const void* a, const void* b, const void* c, const void* d, void* out,
                   bool added);
  // see common/elementwise.h
  void (*widen)(StorageType, int64_t n, int64_t step, const void* in, void* out, bool added);
  void (*narrow)(StorageType, int64_t n, const void* in, void* out);
};

// Mean, and the sum of squares around it.
struct Moments {
  double mean, squares;
};

// Rows of n neighbouring elements in groups that reach over positions: a channel's positions, with one number a
// row, or (is_vector) a position's channels, with vectors that all rows share. y = activation((h - mean) scale +
// shift).
struct NormMapRows {
  int64_t rows, n;
  bool is_vector;
  const void* h;
  const void *mean, *scale, *shift;  // in the type of the arithmetic
  bool streamed;
};

// dh += dz scale - (h - mean) by_h - by_mean, dx = gate dh, dr = dh, and the sum of dh x. What is null is absent:
// dy and dh for 0, gate for 1.
struct NormMapGradients {
  const void *dy, *dh, *x, *by_h, *by_mean, *gate;
  void *dx, *dr, *dh_x;
};

struct NormFilmMapKernels {
  // h = pre_residual + gate x, of rows whose h is x
  void (*form)(StorageType, const NormMapRows&, const void* gate, const void* pre_residual, void* h);
  // of one row
  Moments (*row_moments)(StorageType, int64_t n, const void* h);
  // of each column: a number near its mean, how far from it the mean is, and squares around that
  void (*column_moments)(StorageType, int64_t rows, int64_t C, const void* h, void* near, void* off,
                         void* squares);
  void (*forward)(StorageType, Activation, const NormMapRows&, const void* residual, void* y);
  // sums of dz (h - mean) and of dz; vectors are added to what is there. `kept`, if any: dz itself, as dy is
  // stored
  void (*sums)(StorageType, Activation, const NormMapRows&, const void* dy, void* kept, void* dz_h, void* dz);
  void (*backward)(StorageType, Activation, const NormMapRows&, const NormMapGradients&);
};

FUSEDATTN_DECLARE_TABLE(NormFilmKernels, norm_film)
FUSEDATTN_DECLARE_TABLE(NormFilmMapKernels, norm_film_maps)

}  // namespace fusedattn
