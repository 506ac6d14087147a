// Fixed-width vectors for the CPU kernels, from one source for every instruction set.
//
// A kernel file is compiled once per level (-DFUSEDATTN_LEVEL=default|avx2|avx512, see setup.py); the
// compiler's vector extension gives arithmetic, comparison and blending, and only the reciprocal estimate
// and the half-precision conversion need intrinsics. Everything sits in a namespace named after the level
// and is `static`: a weak symbol shared between levels could put AVX-512 code on a machine without it.
#pragma once

#include <cstdint>

#include "common/storage.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// From the C library; <cmath> would bring weak inline functions.
extern "C" {
double tanh(double);
double erfc(double);
}

#ifndef FUSEDATTN_LEVEL
#error "compile kernel files with -DFUSEDATTN_LEVEL=default|avx2|avx512"
#endif

#define FUSEDATTN_INLINE static inline __attribute__((always_inline))

namespace fusedattn {
namespace FUSEDATTN_LEVEL {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr int VECTOR_REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int VECTOR_REGISTERS = 16;
#else
constexpr int VECTOR_BYTES = 16;
#if defined(__aarch64__)
constexpr int VECTOR_REGISTERS = 32;
#else
constexpr int VECTOR_REGISTERS = 16;
#endif
#endif

template <typename T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t ints __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
using IntVec = typename VecOf<T>::ints;

template <typename T>
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename T>
FUSEDATTN_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 keeps -0.0, NaN and inf
}

template <typename T>
FUSEDATTN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// The first n lanes from memory, zeros above.
template <typename T>
FUSEDATTN_INLINE Vec<T> load_partial(const T* p, int64_t n) {
  Vec<T> v{};
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}

template <typename T>
FUSEDATTN_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
FUSEDATTN_INLINE void store_partial(T* p, Vec<T> v, int64_t n) {
  __builtin_memcpy(p, &v, n * sizeof(T));
}

// Whether a lane is one of the first n.
template <typename T>
FUSEDATTN_INLINE auto first_lanes(int64_t n) {
  IntVec<T> lane{};
  for (int l = 0; l < LANES<T>; ++l) lane[l] = l;
  return lane < (IntVec<T>{} + static_cast<decltype(lane[0] + 0)>(n));
}

// Without the call of memcpy that a variable size is.
#if defined(__AVX512F__)
FUSEDATTN_INLINE __mmask16 first_bits(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
FUSEDATTN_INLINE Vec<float> load_partial(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(first_bits(n), p);
}
FUSEDATTN_INLINE void store_partial(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_bits(n), v);
}
FUSEDATTN_INLINE Vec<double> load_partial(const double* p, int64_t n) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_bits(n)), p);
}
FUSEDATTN_INLINE void store_partial(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_bits(n)), v);
}
#elif defined(__AVX2__)
FUSEDATTN_INLINE Vec<float> load_partial(const float* p, int64_t n) {
  return _mm256_maskload_ps(p, (__m256i)first_lanes<float>(n));
}
FUSEDATTN_INLINE void store_partial(float* p, Vec<float> v, int64_t n) {
  _mm256_maskstore_ps(p, (__m256i)first_lanes<float>(n), v);
}
FUSEDATTN_INLINE Vec<double> load_partial(const double* p, int64_t n) {
  return _mm256_maskload_pd(p, (__m256i)first_lanes<double>(n));
}
FUSEDATTN_INLINE void store_partial(double* p, Vec<double> v, int64_t n) {
  _mm256_maskstore_pd(p, (__m256i)first_lanes<double>(n), v);
}
#endif

// A whole vector at an aligned place, for results too large for the caches: where a vector is a cache line, it
// goes to memory without reading first what it overwrites, and without driving out what is still needed.
template <typename T>
FUSEDATTN_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#else
  store(p, v);
#endif
}

// After the last stream(), before another thread may read.
FUSEDATTN_INLINE void stream_fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// max, min: b where either is NaN. So max(x, running) skips NaNs and keeps infinities, and max(limit, x)
// clamps x and lets a NaN through. multiply_add: a * b + c, rounded once where the CPU can.
#if defined(__AVX512F__)
FUSEDATTN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a, b); }
FUSEDATTN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a, b); }
FUSEDATTN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return _mm512_max_pd(a, b); }
FUSEDATTN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return _mm512_min_pd(a, b); }
FUSEDATTN_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
#elif defined(__AVX2__)
FUSEDATTN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
FUSEDATTN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
FUSEDATTN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
FUSEDATTN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a, b); }
FUSEDATTN_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
#else
template <typename V>
FUSEDATTN_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
FUSEDATTN_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
FUSEDATTN_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
#endif

FUSEDATTN_INLINE Vec<float> abs(Vec<float> a) { return (Vec<float>)((IntVec<float>)a & 0x7FFFFFFF); }
FUSEDATTN_INLINE Vec<double> abs(Vec<double> a) { return (Vec<double>)((IntVec<double>)a & 0x7FFFFFFFFFFFFFFF); }

// The larger of |a| and a bound that is no NaN; a NaN in a is skipped.
FUSEDATTN_INLINE Vec<float> max_abs(Vec<float> a, Vec<float> bound) {
#if defined(__AVX512F__)
  constexpr int MAGNITUDE = 0b1011;  // the larger magnitude, without its sign
  return _mm512_range_ps(a, bound, MAGNITUDE);
#else
  return max(abs(a), bound);
#endif
}
FUSEDATTN_INLINE Vec<double> max_abs(Vec<double> a, Vec<double> bound) { return max(abs(a), bound); }

// Whether a comparison holds in any lane. Compilers differ in the type of integer that comparing doubles gives.
template <typename V>
FUSEDATTN_INLINE bool any(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4)
    return _mm512_movepi32_mask((__m512i)v) != 0;
  else
    return _mm512_movepi64_mask((__m512i)v) != 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(v[0]) == 4)
    return _mm256_movemask_ps((__m256)v) != 0;
  else
    return _mm256_movemask_pd((__m256d)v) != 0;
#else
  bool found = false;
  for (unsigned l = 0; l < sizeof(v) / sizeof(v[0]); ++l) found |= v[l] != 0;
  return found;
#endif
}

template <typename T>
FUSEDATTN_INLINE T horizontal_sum(Vec<T> v) {
  T s = 0;
  for (int l = 0; l < LANES<T>; ++l) s += v[l];
  return s;
}

template <typename T>
FUSEDATTN_INLINE T horizontal_max(Vec<T> v) {
  T m = v[0];
  for (int l = 1; l < LANES<T>; ++l) m = v[l] > m ? v[l] : m;
  return m;
}

// a / b and 1 / x to float32 rounding. b and x must be finite and, with their reciprocal, normal numbers.
//
// Dividing has a unit of its own, beside which multiply-adds go on. Eight lanes keep it for five cycles (Intel
// since Skylake, AMD since Zen 3), no longer than what a quotient in our loops comes with; sixteen lanes keep
// Intel's for ten. There the estimate has 14 bits, and a Newton step doubles them.
FUSEDATTN_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}
FUSEDATTN_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return a * reciprocal(b);
#else
  return a / b;
#endif
}

FUSEDATTN_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }
FUSEDATTN_INLINE Vec<double> quotient(Vec<double> a, Vec<double> b) { return a / b; }

// exp(FACTOR x) for FACTOR 1 or 2 to 2 ulp. Any number may come out where |FACTOR x| > 87. NaN stays NaN. A FACTOR
// of exp(2q) and exp(2k) whose product is to be PAIRED may take log2 e rounded: x is then off by a fifth of its
// own rounding, and q + k by that of the sum, also where they cancel.
#if defined(__AVX2__)
// With n = round(POWERS FACTOR x log2 e) and |f| <= 1/2 this is 2^(n / POWERS) 2^(f / POWERS): the fractional
// powers of two are chosen from registers, and a short polynomial (Chebyshev fit of (2^(f / POWERS) - 1) / f,
// error 5e-8 with 32 of them, 1e-8 with 8) does for the rest. Three to five multiply-type operations fewer than
// with the whole of 2^f as a polynomial.
constexpr int POWERS = VECTOR_BYTES == 64 ? 32 : 8;

// Bits of 2^(j / POWERS), j the last bits of n, less those of j where n belongs: adding n there puts n / POWERS
// into the exponent and takes away the rest, j.
FUSEDATTN_INLINE IntVec<float> fractional_power(IntVec<float> n) {
#if defined(__AVX512F__)
  const IntVec<float> low = {0x3F800000, 0x3F7ECD87, 0x3F7DAAC3, 0x3F7C980F, 0x3F7B95C2, 0x3F7AA43A,
                             0x3F79C3D3, 0x3F78F4F0, 0x3F7837F0, 0x3F778D3A, 0x3F76F532, 0x3F767043,
                             0x3F75FED7, 0x3F75A15B, 0x3F75583F, 0x3F7523F6};
  const IntVec<float> high = {0x3F7504F3, 0x3F74FBAF, 0x3F7508A4, 0x3F752C4D, 0x3F75672A, 0x3F75B9BE,
                              0x3F76248C, 0x3F76A81E, 0x3F7744FD, 0x3F77FBB8, 0x3F78CCDF, 0x3F79B907,
                              0x3F7AC0C7, 0x3F7BE4BA, 0x3F7D257D, 0x3F7E83B3};
  return (IntVec<float>)_mm512_permutex2var_epi32((__m512i)low, (__m512i)n, (__m512i)high);
#else
  const IntVec<float> powers = {0x3F800000, 0x3F7B95C2, 0x3F7837F0, 0x3F75FED7,
                                0x3F7504F3, 0x3F75672A, 0x3F7744FD, 0x3F7AC0C7};
  return (IntVec<float>)_mm256_permutevar8x32_epi32((__m256i)powers, (__m256i)n);
#endif
}

template <int FACTOR = 1, bool PAIRED = false>
FUSEDATTN_INLINE Vec<float> exp_unclamped(Vec<float> x) {
  const float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
  const Vec<float> log2e = splat(FACTOR * POWERS * 1.44269502f);
  const Vec<float> shifted = multiply_add(x, log2e, splat(ROUND));
  const Vec<float> n = shifted - ROUND;
  Vec<float> f = multiply_add(x, log2e, -n);
  if constexpr (!PAIRED) f = x * (FACTOR * POWERS * 1.92596299e-8f) + f;  // log2 e in two parts
  const IntVec<float> bits = (IntVec<float>)shifted;                      // those of ROUND are shifted out
  const Vec<float> scaled = (Vec<float>)(fractional_power(bits) + (bits << (POWERS == 32 ? 18 : 20)));
  Vec<float> p;
  if constexpr (POWERS == 32)
    p = f * 2.345961984e-04f + 2.166116610e-02f;
  else
    p = (f * 1.084208488e-04f + 3.754025558e-03f) * f + 8.664339781e-02f;
  return multiply_add(p * f, scaled, scaled);
}
#else
// With n = round(FACTOR x log2 e) and |f| <= 1/2 this is 2^n 2^f, the second by a polynomial (Chebyshev fit of
// (2^f - 1) / f, error 5e-9).
template <int FACTOR = 1, bool PAIRED = false>
FUSEDATTN_INLINE Vec<float> exp_unclamped(Vec<float> x) {
  const float ROUND = 12582912.0f;  // as above
  const Vec<float> shifted = x * (FACTOR * 1.44269502f) + ROUND;
  const Vec<float> n = shifted - ROUND;
  const Vec<float> f = ((x * float(FACTOR) - n * 0.693359375f) + n * 2.12194440e-4f) * 1.44269502f;
  Vec<float> p = f * 1.546144746e-4f + 1.339086735e-3f;
  p = p * f + 9.618056670e-3f;
  p = p * f + 5.550357104e-2f;
  p = p * f + 2.402265092e-1f;
  p = p * f + 6.931471880e-1f;
  p = p * f + 1.0f;
  return p * (Vec<float>)(((IntVec<float>)shifted - (0x4B400000 - 127)) << 23);
}
#endif

// As above in float64, for |FACTOR x| <= 708: Taylor polynomial of degree 13, truncation error 4e-18.
template <int FACTOR = 1, bool PAIRED = false>
FUSEDATTN_INLINE Vec<double> exp_unclamped(Vec<double> x) {
  x *= double(FACTOR);
  const double ROUND = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> shifted = x * 1.4426950408889634074 + ROUND;
  const Vec<double> n = shifted - ROUND;
  const Vec<double> r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  Vec<double> p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0);
  p = p * r + (1.0 / 39916800.0);
  p = p * r + (1.0 / 3628800.0);
  p = p * r + (1.0 / 362880.0);
  p = p * r + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + 0.5;
  p = p * (r * r) + (r + 1.0);
  const IntVec<double> power = ((IntVec<double>)shifted - (0x4338000000000000 - 1023)) << 52;
  return p * (Vec<double>)power;
}

// Up to which |x| exp(x) and its reciprocal are normal numbers.
template <typename T>
constexpr T LARGEST_EXPONENT = sizeof(T) == 4 ? 87 : 708;

// exp(x) with x clamped to LARGEST_EXPONENT.
template <typename T>
FUSEDATTN_INLINE Vec<T> clamped_exp(Vec<T> x) {
  return exp_unclamped(min(splat(LARGEST_EXPONENT<T>), max(splat(-LARGEST_EXPONENT<T>), x)));
}
FUSEDATTN_INLINE Vec<float> exp(Vec<float> x) { return clamped_exp<float>(x); }
FUSEDATTN_INLINE Vec<double> exp(Vec<double> x) { return clamped_exp<double>(x); }

// exp(x), and 0 below the clamp.
template <typename T>
FUSEDATTN_INLINE Vec<T> exp_or_zero(Vec<T> x) {
  return x < -LARGEST_EXPONENT<T> ? Vec<T>{} : exp(x);
}

// tanh(x) with relative accuracy near zero, where 1 - 2 / (1 + exp(2x)) only has that of 1.
FUSEDATTN_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> y = x * x;
  Vec<float> p = y * 2.1869488e-2f - 5.3968254e-2f;
  p = p * y + 1.3333333e-1f;
  p = p * y - 3.3333333e-1f;
  // Of the magnitude: near 1 the reciprocal is small, and so is its error.
  const Vec<float> magnitude = abs(x);
  const Vec<float> large = 1 - 2 * reciprocal(1 + exp(magnitude + magnitude));
  const IntVec<float> sign = (IntVec<float>)x & (int32_t{1} << 31);
  return magnitude < 0.25f ? x + x * (y * p) : (Vec<float>)((IntVec<float>)large | sign);
}
FUSEDATTN_INLINE Vec<double> tanh(Vec<double> x) {
  for (int l = 0; l < LANES<double>; ++l) x[l] = ::tanh(x[l]);
  return x;
}

// Two vectors split into groups of 2h lanes, each group folded to h lanes: halves of a, then halves of b.
template <typename T, int h>
FUSEDATTN_INLINE Vec<T> fold(Vec<T> a, Vec<T> b) {
  constexpr int W = LANES<T>;
#if defined(__clang__)
  // Unrolled they become shuffles; as loops over lanes they would cost clang half of its time for the scores.
  Vec<T> low{}, high{};
#pragma unroll
  for (int l = 0; l < W; ++l) {
    const int from = l / h * 2 * h + l % h;  // lane l of the result; from W up they are b's
    low[l] = from < W ? a[from % W] : b[from % W];
    high[l] = from + h < W ? a[(from + h) % W] : b[(from + h) % W];
  }
  return low + high;
#else
  IntVec<T> low{}, high{};
  for (int l = 0; l < W; ++l) {
    low[l] = l / h * 2 * h + l % h;  // lane l of the result; indices from W up are b's
    high[l] = low[l] + h;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// out[i] = sum of the lanes of acc[i], for four vectors at once.
template <typename T>
FUSEDATTN_INLINE void horizontal_sum4(const Vec<T>* acc, T* out) {
  constexpr int W = LANES<T>;
  if constexpr (W >= 4) {
    Vec<T> v = fold<T, W / 4>(fold<T, W / 2>(acc[0], acc[1]), fold<T, W / 2>(acc[2], acc[3]));
    if constexpr (W >= 16) v = fold<T, 2>(v, v);
    if constexpr (W >= 8) v = fold<T, 1>(v, v);
    __builtin_memcpy(out, &v, 4 * sizeof(T));
  } else {
    for (int i = 0; i < 4; ++i) out[i] = horizontal_sum<T>(acc[i]);
  }
}

// Half precision is stored in half a vector.
typedef uint16_t Bits16 __attribute__((vector_size(VECTOR_BYTES / 2)));

// By intrinsics: GCC 12 converts half a vector at a time.
FUSEDATTN_INLINE IntVec<float> widened(Bits16 bits) {
#if defined(__AVX512F__)
  return (IntVec<float>)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
  return (IntVec<float>)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, IntVec<float>);
#endif
}
// Of numbers below 2^16.
FUSEDATTN_INLINE Bits16 narrowed(IntVec<float> words) {
#if defined(__AVX512F__)
  return (Bits16)_mm512_cvtepi32_epi16((__m512i)words);
#elif defined(__AVX2__)
  constexpr int EVEN = 0b1000;  // quarters 0 and 2: packing keeps to halves
  const __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);
  return (Bits16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, EVEN));
#else
  return __builtin_convertvector(words, Bits16);
#endif
}

FUSEDATTN_INLINE Vec<float> load(const BFloat16* p) {
  Bits16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(widened(bits) << 16);
}

FUSEDATTN_INLINE Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  // Shift the 15 magnitude bits into place; multiplying by 2^112 rebiases the exponent, subnormals included.
  Bits16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  const IntVec<float> h = widened(bits);
  const IntVec<float> magnitude = h & 0x7FFF;
  const IntVec<float> finite = (IntVec<float>)((Vec<float>)(magnitude << 13) * 0x1p112f);
  const IntVec<float> special = (magnitude << 13) | 0x7F800000;
  return (Vec<float>)((magnitude >= 0x7C00 ? special : finite) | ((h & 0x8000) << 16));
#endif
}

// To nearest even; NaN stays NaN. The upper halves are the result.
FUSEDATTN_INLINE IntVec<float> rounded_to_bfloat16(Vec<float> v) {
  const IntVec<float> word = (IntVec<float>)v, below_half = word + 0x7FFF;
  constexpr int LAST_BIT = 0x10000, QUIET = 0x400000;
#if defined(__AVX512F__)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)word, _mm512_set1_epi32(LAST_BIT));
  const __m512i nearest =
      _mm512_mask_add_epi32((__m512i)below_half, odd, (__m512i)below_half, _mm512_set1_epi32(1));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return (IntVec<float>)_mm512_mask_or_epi32(nearest, nan, (__m512i)word, _mm512_set1_epi32(QUIET));
#else
  return v == v ? below_half + ((word & LAST_BIT) != 0 ? IntVec<float>{} + 1 : IntVec<float>{}) : word | QUIET;
#endif
}

// The first argument tells the type.
FUSEDATTN_INLINE Bits16 rounded(const BFloat16*, Vec<float> v) {
  return narrowed((rounded_to_bfloat16(v) >> 16) & 0xFFFF);
}
FUSEDATTN_INLINE Bits16 rounded(const Half*, Vec<float> v) {
#if defined(__AVX512F__)
  return (Bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const IntVec<float> word = (IntVec<float>)v;
  const IntVec<float> sign = (word >> 16) & 0x8000;
  const IntVec<float> magnitude = word & 0x7FFFFFFF;
  // Normal results round by integer addition; subnormal ones by adding 0.5f, whose last bit is 2^-24.
  const IntVec<float> normal = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  const IntVec<float> subnormal = (IntVec<float>)((Vec<float>)magnitude + 0.5f) - 0x3F000000;
  IntVec<float> result = magnitude < (113 << 23) ? subnormal : normal;
  result = magnitude >= 0x477FF000 ? IntVec<float>{} + 0x7C00 : result;  // rounds past the largest half
  result = magnitude > 0x7F800000 ? IntVec<float>{} + 0x7E00 : result;
  return narrowed(result | sign);
#endif
}

FUSEDATTN_INLINE void store(BFloat16* p, Vec<float> v) {
  const Bits16 bits = rounded(p, v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
FUSEDATTN_INLINE void store(Half* p, Vec<float> v) {
  const Bits16 bits = rounded(p, v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// Two vectors, which together fill a cache line.
#if defined(__AVX512F__)
FUSEDATTN_INLINE __m512i rounded(const BFloat16*, Vec<float> low, Vec<float> high) {
  uint16_t odd __attribute__((vector_size(64)));
  for (int l = 0; l < 32; ++l) odd[l] = 2 * l + 1;
  return _mm512_permutex2var_epi16((__m512i)rounded_to_bfloat16(low), (__m512i)odd,
                                   (__m512i)rounded_to_bfloat16(high));
}
FUSEDATTN_INLINE __m512i rounded(const Half* p, Vec<float> low, Vec<float> high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)rounded(p, low)), (__m256i)rounded(p, high), 1);
}
template <typename S>
FUSEDATTN_INLINE void store(S* p, Vec<float> low, Vec<float> high, bool streamed) {
  const __m512i bits = rounded(p, low, high);
  if (streamed)
    _mm512_stream_si512((__m512i*)p, bits);
  else
    _mm512_storeu_si512((__m512i*)p, bits);
}
#else
template <typename S>
FUSEDATTN_INLINE void store(S* p, Vec<float> low, Vec<float> high, bool) {
  store(p, low);
  store(p + LANES<float>, high);
}
#endif

// Fewer than a vector of them.
template <typename S>
FUSEDATTN_INLINE Vec<float> load_partial_16(const S* p, int64_t n) {
  S lanes[LANES<float>] = {};
#if defined(__AVX512F__)
  const __m256i bits = _mm256_maskz_loadu_epi16(first_bits(n), p);
  __builtin_memcpy(lanes, &bits, sizeof(bits));
#else
  __builtin_memcpy(lanes, p, n * sizeof(S));
#endif
  return load(lanes);
}
template <typename S>
FUSEDATTN_INLINE void store_partial_16(S* p, Vec<float> v, int64_t n) {
  S lanes[LANES<float>];
  store(lanes, v);
#if defined(__AVX512F__)
  __m256i bits;
  __builtin_memcpy(&bits, lanes, sizeof(bits));
  _mm256_mask_storeu_epi16(p, first_bits(n), bits);
#else
  __builtin_memcpy(p, lanes, n * sizeof(S));
#endif
}
FUSEDATTN_INLINE Vec<float> load_partial(const Half* p, int64_t n) { return load_partial_16(p, n); }
FUSEDATTN_INLINE Vec<float> load_partial(const BFloat16* p, int64_t n) { return load_partial_16(p, n); }
FUSEDATTN_INLINE void store_partial(Half* p, Vec<float> v, int64_t n) { store_partial_16(p, v, n); }
FUSEDATTN_INLINE void store_partial(BFloat16* p, Vec<float> v, int64_t n) { store_partial_16(p, v, n); }

// n numbers into the type of the arithmetic, added to what is there or not; and back.
template <typename S>
FUSEDATTN_INLINE void widen(int64_t n, const S* in, Arithmetic<S>* out, bool added) {
  constexpr int W = LANES<Arithmetic<S>>;
  int64_t i = 0;  // whole vectors: what a masked store wrote, a load would wait for
  for (; i + W <= n; i += W) store(out + i, added ? load(out + i) + load(in + i) : load(in + i));
  if (i == n) return;
  const Vec<Arithmetic<S>> v = load_partial(in + i, n - i);
  store_partial(out + i, added ? load_partial(out + i, n - i) + v : v, n - i);
}
template <typename S>
FUSEDATTN_INLINE void narrow(int64_t n, const Arithmetic<S>* in, S* out) {
  constexpr int W = LANES<Arithmetic<S>>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(in + i));
  if (i < n) store_partial(out + i, load_partial(in + i, n - i), n - i);
}

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
