// The mathematics of norm_film, for its C++ kernels (see fusedattn/ops/norm_film.py). M is the kernel's arithmetic
// as in common/activate.h.
//
// With n = (h - mean) rstd, scale = weight (gamma + offset) and shift = bias (gamma + offset) + beta the affines
// of the norm and of FiLM are one, y = activation(scale n + shift) + residual, and all that backward needs of a
// channel are sums of dz n and of dz:
//
//   dgamma = weight sum(dz n) + bias sum(dz)      dweight = (gamma + offset) sum(dz n)
//   dbeta = sum(dz)                               dbias = (gamma + offset) sum(dz)
#pragma once

#include "common/activate.h"

namespace fusedattn {

// n = (h - mean) rstd. The mean is known beyond the precision of h: where it is far from 0, what T cannot hold of
// it is no small part of the deviation. It costs no operation to take that away, too.
template <typename M>
struct Normalise {
  using V = typename M::V;
  using T = typename M::T;
  V mean, rstd, rest;

  FUSEDATTN_INLINE Normalise of(double mean, double rstd) {
    const T whole = static_cast<T>(mean);
    return {M::splat(whole), M::splat(static_cast<T>(rstd)), M::splat(static_cast<T>((whole - mean) * rstd))};
  }
  __attribute__((always_inline)) V operator()(V h) const { return (h - mean) * rstd + rest; }
};

}  // namespace fusedattn
