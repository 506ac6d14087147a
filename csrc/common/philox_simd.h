// Words of common/philox.h in vectors, for CPU kernels: the words of one query come in blocks of neighbouring
// keys.
#pragma once

#include "common/simd.h"
// after the definition of FUSEDATTN_INLINE
#include "common/philox.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {

typedef uint64_t Words64 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words32 __attribute__((vector_size(VECTOR_BYTES)));
constexpr int WORDS_LANES = VECTOR_BYTES / 8;
constexpr int WORDS_BLOCK = 4 * WORDS_LANES;

// The products of the lower halves.
FUSEDATTN_INLINE Words64 multiply_low(Words64 a, Words64 b) {
#if defined(__AVX512F__)
  return (Words64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Words64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Lanes of a and b in turn: the first half of them, or the second.
template <bool second>
FUSEDATTN_INLINE Words64 interleaved(Words64 a, Words64 b) {
  constexpr int first = second ? WORDS_LANES / 2 : 0;
#if defined(__clang__)
  Words64 c{};
#pragma unroll
  for (int l = 0; l < WORDS_LANES; ++l) c[l] = l % 2 == 0 ? a[first + l / 2] : b[first + l / 2];
  return c;
#else
  Words64 from{};
  for (int l = 0; l < WORDS_LANES; ++l) from[l] = first + l / 2 + l % 2 * WORDS_LANES;
  return __builtin_shuffle(a, b, from);
#endif
}

// WORDS_BLOCK words, of keys from 4 * `fours` on.
FUSEDATTN_INLINE void random_words(const PhiloxRow& row, uint64_t fours, uint32_t* words) {
  Words64 c[4] = {};
  for (int l = 0; l < WORDS_LANES; ++l) c[0][l] = l;
  c[0] += fours;
  c[1] += static_cast<uint64_t>(row.query);
  c[2] += row.head;
  c[3] += row.head >> 32;
  philox(c, row.seed, [](Words64 a, Words64 b) { return multiply_low(a, b); });
  const Words64 low = (c[0] & 0xFFFFFFFFu) | c[1] << 32, high = (c[2] & 0xFFFFFFFFu) | c[3] << 32;
  const Words64 block[2] = {interleaved<false>(low, high), interleaved<true>(low, high)};
  __builtin_memcpy(words, block, sizeof(block));
}

// body(first, count, words) over n keys from that of the row on: `count` words, of keys `first` and following.
template <typename Body>
FUSEDATTN_INLINE void for_random_words(const PhiloxRow& row, int64_t n, const Body& body) {
  uint32_t words[WORDS_BLOCK];
  int64_t skipped = row.first_key % 4;
  uint64_t fours = static_cast<uint64_t>(row.first_key) / 4;
  for (int64_t first = 0; first < n; fours += WORDS_LANES) {
    random_words(row, fours, words);
    const int64_t left = n - first, there = WORDS_BLOCK - skipped, count = left < there ? left : there;
    body(first, count, words + skipped);
    first += count, skipped = 0;
  }
}

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
