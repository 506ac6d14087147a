// Loops along a row in whole vectors and its end. For kernel files alone (see simd.h).
#pragma once

#include "elementwise.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

// Part of a row: a whole vector or the fewer than that at its end.
struct Whole {
  static constexpr bool value = true;
};
struct Partial {
  static constexpr bool value = false;
};
template <typename Part, typename S>
FUSEDATTN_INLINE auto get(Part, const S* p, int64_t i, int64_t n) {
  if constexpr (Part::value)
    return load(p + i);
  else
    return load_partial(p + i, n);
}
template <typename Part, typename S>
FUSEDATTN_INLINE void set(Part, S* p, int64_t i, int64_t n, Vec<Arithmetic<S>> v, bool streamed = false) {
  if constexpr (Part::value)
    put(p + i, v, streamed);
  else
    store_partial(p + i, v, n);
}
// v where there is an element, else 0
template <typename T, typename Part>
FUSEDATTN_INLINE Vec<T> only(Part, int64_t n, Vec<T> v) {
  if constexpr (Part::value)
    return v;
  else
    return first_lanes<T>(n) ? v : Vec<T>{};
}

constexpr int SEVERAL = 4;  // sums at once: one alone would wait for each addition
// body(part, first element, elements, which sum) along a row of n
template <typename T, typename Body>
FUSEDATTN_INLINE void along(int64_t n, const Body& body) {
  constexpr int W = LANES<T>;
  int64_t i = 0;
  for (; i + SEVERAL * W <= n; i += SEVERAL * W)
    for (int u = 0; u < SEVERAL; ++u) body(Whole{}, i + u * W, W, u);
  for (; i + W <= n; i += W) body(Whole{}, i, W, 0);
  if (i < n) body(Partial{}, i, n - i, 0);
}

template <typename T>
struct Sum {
  Vec<T> of[SEVERAL] = {};
  __attribute__((always_inline)) double total() const {
    return sum_of_lanes<T>((of[0] + of[1]) + (of[2] + of[3]));
  }
};

}  // namespace
}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
