// CPU kernels of random words (common/philox.h), compiled once per instruction set: some 2 operations a word with
// AVX-512.
#include "common/philox_simd.h"
// after the definition of FUSEDATTN_INLINE
#include "cpu_kernel.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

void words(const PhiloxRow& row, int64_t n, int32_t* out) {
  for_random_words(row, n, [&](int64_t first, int64_t count, const uint32_t* block) {
    for (int64_t t = 0; t < count; ++t) out[first + t] = static_cast<int32_t>(block[t] ^ 0x80000000u);
  });
}

// Of LANES<T> words, whether each is at least the threshold.
FUSEDATTN_INLINE auto kept(const float*, const uint32_t* words, uint32_t threshold) {
  Words32 w;
  __builtin_memcpy(&w, words, sizeof(w));
  return w >= threshold;
}
FUSEDATTN_INLINE auto kept(const double*, const uint32_t* words, uint32_t threshold) {
  IntVec<double> w{};
  for (int l = 0; l < LANES<double>; ++l) w[l] = words[l];
  return w >= static_cast<int64_t>(threshold);
}

template <typename T>
void drop(const PhiloxRow& row, int64_t n, Dropout dropout, T* x) {
  constexpr int W = LANES<T>;
  const Vec<T> factor = splat(static_cast<T>(dropout.factor));
  for_random_words(row, n, [&](int64_t first, int64_t count, const uint32_t* block) {
    int64_t t = 0;
    for (; t + W <= count; t += W) {
      const Vec<T> v = load(x + first + t);
      store(x + first + t, kept(x, block + t, dropout.threshold) ? v * factor : Vec<T>{});
    }
    for (; t < count; ++t)
      x[first + t] = block[t] >= dropout.threshold ? x[first + t] * static_cast<T>(dropout.factor) : 0;
  });
}

}  // namespace

extern const PhiloxKernels philox_kernels = {words, drop<float>, drop<double>};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
