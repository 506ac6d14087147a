// What CPU kernels of elementwise ops share: storage types converted in registers, the arithmetic of activations,
// and what is known only at run time turned into template arguments. For kernel files alone (see simd.h).
#pragma once

#include "simd.h"
// after the definition of FUSEDATTN_INLINE
#include "activate.h"
#include "storage.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {

// A whole vector, past the caches if asked.
template <typename S>
FUSEDATTN_INLINE void put(S* p, Vec<Arithmetic<S>> v, bool streamed) {
  if constexpr (sizeof(S) == sizeof(Arithmetic<S>))
    if (streamed) return stream(p, v);
  store(p, v);
}

// erfc(z) / 2 for z >= 0: t exp(-z^2 + P(t)), t = 1 / (1 + z/2), relative error 1.2e-7 (Chebyshev fit,
// Numerical Recipes, section 6.2).
FUSEDATTN_INLINE Vec<float> half_erfc(Vec<float> z) {
  const Vec<float> t = reciprocal(1 + 0.5f * z);
  Vec<float> p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const Vec<float> e = exp(p - z * z);
  return z * z > 86.0f ? Vec<float>{} : 0.5f * t * e;
}
FUSEDATTN_INLINE Vec<double> half_erfc(Vec<double> z) {
  for (int l = 0; l < LANES<double>; ++l) z[l] = 0.5 * ::erfc(z[l]);
  return z;
}

// The arithmetic of activate.h on vectors.
template <typename S>
struct Simd {
  using T = Arithmetic<S>;
  using V = Vec<T>;
  FUSEDATTN_INLINE V splat(T x) { return FUSEDATTN_LEVEL::splat(x); }
  FUSEDATTN_INLINE V exp(V x) { return FUSEDATTN_LEVEL::exp(x); }
  FUSEDATTN_INLINE V reciprocal(V x) { return FUSEDATTN_LEVEL::reciprocal(x); }
  FUSEDATTN_INLINE V tanh(V x) { return FUSEDATTN_LEVEL::tanh(x); }
  FUSEDATTN_INLINE V half_erfc(V x) { return FUSEDATTN_LEVEL::half_erfc(x); }
};

// By halves: rows may be no longer than a vector, and lane after lane would be most of their time.
template <typename T, int half = LANES<T> / 2>
FUSEDATTN_INLINE T sum_of_lanes(Vec<T> v) {
  if constexpr (half == 0)
    return v[0];
  else
    return sum_of_lanes<T, half / 2>(fold<T, half>(v, v));
}

// body(S{}) of a storage type known only at run time.
template <typename Body>
FUSEDATTN_INLINE void with_storage(StorageType type, const Body& body) {
  switch (type) {
    case StorageType::FLOAT:
      return body(float{});
    case StorageType::DOUBLE:
      return body(double{});
    case StorageType::HALF:
      return body(Half{});
    case StorageType::BFLOAT16:
      return body(BFloat16{});
  }
}

// n numbers of a storage type, `step` elements apart, into the type of the arithmetic; added to what is there or
// not.
[[maybe_unused]] static void widen(StorageType type, int64_t n, int64_t step, const void* from, void* to,
                                   bool added) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    constexpr int W = LANES<T>;
    const S* in = static_cast<const S*>(from);
    T* out = static_cast<T*>(to);
    if (step == 1) return FUSEDATTN_LEVEL::widen(n, in, out, added);
    for (int64_t i = 0; i < n; i += W) {
      const int64_t left = n - i < W ? n - i : W;
      S lanes[W] = {};
      for (int64_t l = 0; l < left; ++l) lanes[l] = in[(i + l) * step];
      const Vec<T> v = load(lanes);
      store_partial(out + i, added ? load_partial(out + i, left) + v : v, left);
    }
  });
}

// And back, into neighbouring elements.
[[maybe_unused]] static void narrow(StorageType type, int64_t n, const void* from, void* to) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    FUSEDATTN_LEVEL::narrow(n, static_cast<const Arithmetic<S>*>(from), static_cast<S*>(to));
  });
}

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
