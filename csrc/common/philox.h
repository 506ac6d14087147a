// Random words, the same on every backend, tile and number of threads: Philox-4x32-10 (Salmon, Moraes, Dror and
// Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), a function of a counter and a key.
//
// The pair of query i and key j, of head number n = b H + h, has the word j % 4 of
//
//   counter  (j / 4, i, n, n / 2^32)    key  (seed, seed / 2^32)        each as 32 bits, the lowest first
//
// so four neighbouring keys share one evaluation. All numbers count from the beginning of the whole, of which a
// call may compute a part (PhiloxPlace). fusedattn/_philox.py says the same in Python, and what is made of a word.
#pragma once

#include <cstdint>

#ifndef FUSEDATTN_INLINE
#define FUSEDATTN_INLINE static inline
#endif

#define FUSEDATTN_PHILOX_PLACE "int first_head, int heads, int first_query, int first_key"

namespace fusedattn {

// Where in the whole a call computes: its first batch element and head, counted over B x H, the heads of the whole
// (0: as many as the call has), and its first query and key.
struct PhiloxPlace {
  int64_t first_head, heads, first_query, first_key;
};

// The words of one query, from key `first_key` on.
struct PhiloxRow {
  uint64_t seed, head;
  int64_t query, first_key;
};

// The seeds of a call: several, each for as many of its heads, where vmap has folded samples into these.
struct PhiloxStream {
  const int64_t* seeds;
  int64_t heads_of_seed;
  PhiloxPlace place;
};

// What dropout does to numbers: those whose word is below `threshold` become 0, the others are multiplied.
struct Dropout {
  uint32_t threshold;
  double factor;
};

// Of query i of head h of batch element b, as the call counts them.
FUSEDATTN_INLINE PhiloxRow philox_row(const PhiloxStream& s, int64_t b, int64_t h, int64_t i) {
  // Divided in 32 bits: a division of 64 is a call on GPUs.
  const int64_t sample = static_cast<uint32_t>(h) / static_cast<uint32_t>(s.heads_of_seed);
  const int64_t heads = s.place.heads != 0 ? s.place.heads : s.heads_of_seed;
  const int64_t head = s.place.first_head + b * heads + h - sample * s.heads_of_seed;
  return {static_cast<uint64_t>(s.seeds[sample]), static_cast<uint64_t>(head), s.place.first_query + i,
          s.place.first_key};
}

// c: the counter's four words, and then the random ones, in the lower halves of uint64_t or vectors of it; what is
// in the upper halves does not matter, and is anything afterwards. multiply: the product of two lower halves.
template <typename V, typename Multiply>
FUSEDATTN_INLINE void philox(V (&c)[4], uint64_t seed, const Multiply& multiply) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const V p0 = multiply(c[0], V{} + uint64_t{0xD2511F53}), p1 = multiply(c[2], V{} + uint64_t{0xCD9E8D57});
    c[0] = (p1 >> 32) ^ c[1] ^ uint64_t { k0 };
    c[2] = (p0 >> 32) ^ c[3] ^ uint64_t { k1 };
    c[1] = p1, c[3] = p0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

}  // namespace fusedattn
