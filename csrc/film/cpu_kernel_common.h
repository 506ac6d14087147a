// gamma and beta, and the sums that are their gradients, along a row: for the kernel files of ops with such
// parameters.
#pragma once

#include "common/along.h"
#include "cpu_kernel.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

// gamma or beta along a row, numbers of type P.
template <typename P, bool is_vector>
struct Values {
  using T = Arithmetic<P>;
  const P* values;
  Vec<T> one, offset;

  __attribute__((always_inline)) Values(const void* of, int64_t at, T offset)
      : values(static_cast<const P*>(of) + at) {
    this->offset = splat(offset);
    if constexpr (!is_vector) one = splat(*values + offset);
  }
  template <typename Part>
  __attribute__((always_inline)) Vec<T> operator()(Part part, int64_t i, int64_t n) const {
    if constexpr (is_vector)
      return get(part, values, i, n) + offset;
    else
      return one;
  }
};

// Where what is added up of a row goes, numbers of type P.
template <typename P, bool is_vector>
struct Sums {
  using T = Arithmetic<P>;
  P* out;
  bool added;
  Vec<T> sum[SEVERAL] = {};

  __attribute__((always_inline)) Sums(void* to, int64_t step, int64_t row, bool is_fresh)
      : out(static_cast<P*>(to) + row * step), added(step == 0 && (row > 0 || !is_fresh)) {}
  template <typename Part>
  __attribute__((always_inline)) void put(Part part, int64_t i, int64_t n, int which, Vec<T> v) {
    if constexpr (is_vector)
      set(part, out, i, n, added ? get(part, out, i, n) + v : v);
    else
      sum[which] += only<T>(part, n, v);
  }
  __attribute__((always_inline)) void close() {
    if constexpr (!is_vector) {
      const T total = sum_of_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
      *out = added ? *out + total : total;
    }
  }
};

}  // namespace
}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
