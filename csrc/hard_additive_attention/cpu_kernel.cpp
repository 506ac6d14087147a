// CPU kernels of hard_additive_attention, compiled once per instruction set: rows of scores, which stay in the
// cache between the maximum and all else. fusedattn/ops/hard_additive_attention.py has the mathematics.
//
// argmax(e - log E) is argmax(exp(e - max) / E): the softmax has that exponential, and one logarithm a key is
// left.
#include "common/along.h"
#include "common/philox_simd.h"
// after the definition of FUSEDATTN_INLINE
#include "cpu_kernel.h"

extern "C" double log1p(double);

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

constexpr int64_t BLOCK = 1024;  // of a sum in the type of the arithmetic

template <typename T>
constexpr T INFINITE = static_cast<T>(__builtin_inf());

// -log(1 - v) of 0 < v < 1, with relative accuracy near 0: 1 - v = 2^n (1 + r), of which r is -v where n is 0, and
// log(1 + r) by a polynomial (Cephes' logf).
FUSEDATTN_INLINE Vec<float> exponential(Vec<float> v) {
  const IntVec<float> bits = (IntVec<float>)(1 - v);
  const IntVec<float> n = (bits - 0x3F3504F3) >> 23;  // the bits of sqrt(1/2)
  const Vec<float> r = n == 0 ? -v : (Vec<float>)(bits - (n << 23)) - 1;
  Vec<float> p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const Vec<float> square = r * r;
  return -(r + (square * (r * p - 0.5f) + __builtin_convertvector(n, Vec<float>) * 0.69314718f));
}
FUSEDATTN_INLINE Vec<double> exponential(Vec<double> v) {
  for (int l = 0; l < LANES<double>; ++l) v[l] = -::log1p(-v[l]);
  return v;
}

// (word + 1/2) / 2^32, no larger than 1 - 2^-24, of n <= LANES<T> words.
FUSEDATTN_INLINE Vec<float> uniform(const float*, const uint32_t* words, int64_t n) {
  Words32 w{};
  __builtin_memcpy(&w, words, n * sizeof(uint32_t));
  return min(splat(1 - 0x1p-24f), (__builtin_convertvector(w, Vec<float>) + 0.5f) * 0x1p-32f);
}
FUSEDATTN_INLINE Vec<double> uniform(const double*, const uint32_t* words, int64_t n) {
  Vec<double> v{};
  for (int64_t l = 0; l < n; ++l) v[l] = words[l];
  return min(splat(1 - 0x1p-24), (v + 0.5) * 0x1p-32);
}

// The largest of n numbers, and whether there is a NaN among them.
template <typename T>
FUSEDATTN_INLINE T largest(int64_t n, const T* x, bool* has_nan) {
  constexpr int W = LANES<T>;
  Vec<T> most = splat(-INFINITE<T>);
  IntVec<T> nan{};
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const Vec<T> v = load(x + j);
    most = max(v, most), nan |= (IntVec<T>)(v != v);
  }
  T top = horizontal_max<T>(most);
  *has_nan = any(nan);
  for (; j < n; ++j) {
    *has_nan |= x[j] != x[j];
    if (x[j] > top) top = x[j];
  }
  return top;
}

// Where scores are NaN or infinite: the first of those, as torch.max has it.
template <typename T>
Choice<T> choose_infinite(int64_t Tk, const T* scores, T top, bool has_nan) {
  const T nan = static_cast<T>(__builtin_nan(""));
  const T lse = has_nan ? nan : top;
  int64_t j = 0;
  while (j < Tk && !(has_nan ? scores[j] != scores[j] : scores[j] == top)) ++j;
  return {j, nan, nan, lse, lse};
}

// The largest numbers that each lane has seen in a block, and of which vector they are.
template <typename T>
struct Largest {
  Vec<T> value;
  IntVec<T> from{};

  __attribute__((always_inline)) void see(Vec<T> x, int64_t i) {
    const auto more = x > value;
    value = more ? x : value;
    from = more ? IntVec<T>{} + static_cast<decltype(from[0] + 0)>(i) : from;
  }
};

template <typename T>
Choice<T> choose(int64_t Tk, const T* scores, const PhiloxRow* noise) {
  constexpr int W = LANES<T>;
  bool has_nan;
  const T top = largest(Tk, scores, &has_nan);
  if (has_nan || top == INFINITE<T>) return choose_infinite(Tk, scores, top, has_nan);
  if (top == -INFINITE<T>) return {-1, 0, 0, top, top};

  int64_t index = -1;
  // Without noise the scores themselves are compared: exponentials of different ones may be the same.
  T best = noise == nullptr ? -INFINITE<T> : T(0);
  double sum = 0, weighted = 0;
  for (int64_t first = 0; first < Tk; first += BLOCK) {
    const int64_t count = Tk - first < BLOCK ? Tk - first : BLOCK;
    const T* const x = scores + first;
    Vec<T> sums{}, weighted_sums{};
    Largest<T> of_block{splat(best)};
    const auto see = [&](int64_t i, int64_t n, const uint32_t* words) __attribute__((always_inline)) {
      const Vec<T> score =
          n < W ? (first_lanes<T>(n) ? load_partial(x + i, n) : splat(-INFINITE<T>)) : load(x + i);
      const Vec<T> relative = score - top, p = exp_or_zero<T>(relative);
      sums += p;
      weighted_sums += p * max(splat(-LARGEST_EXPONENT<T>), relative);
      of_block.see(words == nullptr ? score : p * reciprocal(exponential(uniform(x, words, n < W ? n : W))), i);
    };
    if (noise == nullptr) {
      for (int64_t i = 0; i < count; i += W) see(i, count - i, nullptr);
    } else {
      const PhiloxRow row{noise->seed, noise->head, noise->query, noise->first_key + first};
      for_random_words(row, count, [&](int64_t at, int64_t n, const uint32_t* words) {
        for (int64_t t = 0; t < n; t += W) see(at + t, n - t, words + t);
      });
    }
    sum += sum_of_lanes<T>(sums), weighted += sum_of_lanes<T>(weighted_sums);
    const int64_t before = index;
    for (int l = 0; l < W; ++l) {
      const T value = of_block.value[l];
      const int64_t j = first + of_block.from[l] + l;
      if (value > best || (value == best && index != before && j < index)) index = j, best = value;
    }
  }
  const double log_sum = log1p(sum - 1);
  const double perturbed = noise == nullptr ? best : top + log1p(static_cast<double>(best) - 1);
  return {index, static_cast<T>(scores[index] - top - log_sum), static_cast<T>(log_sum - weighted / sum),
          static_cast<T>(top + log_sum), static_cast<T>(perturbed)};
}

template <typename T>
void hide(int64_t Tk, const T* scores, const bool* mask, T* out) {
  for (int64_t j = 0; j < Tk; ++j) out[j] = mask[j] ? scores[j] : -INFINITE<T>;
}

template <typename T>
void gradients(int64_t Tk, const T* scores, const Choice<T>& c, const ChoiceGradients<T>& d, T* dscores) {
  if (c.index < 0) {
    for (int64_t j = 0; j < Tk; ++j) dscores[j] = 0;
    return;
  }
  const T of_all = d.lse - d.log_prob;
  along<T>(Tk, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
    const Vec<T> log_p = get(part, scores, i, n) - c.lse;
    const Vec<T> finite = max(splat(-LARGEST_EXPONENT<T>), log_p);
    set(part, dscores, i, n, exp_or_zero<T>(log_p) * (of_all - d.entropy * (finite + c.entropy)));
  });
  dscores[c.index] += d.log_prob;
}

}  // namespace

extern const HardAttentionKernels<float> hard_attention_f32 = {choose, hide, gradients};
extern const HardAttentionKernels<double> hard_attention_f64 = {choose, hide, gradients};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
