// What sizes may be, for the launchers that compute with them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace fusedattn {

// An expanded tensor may have any size: what is computed from these must stay below 2^63.
inline void check_sizes(int64_t B, int64_t H, int64_t Tq, int64_t Tk, int64_t D, int64_t Dv) {
  int64_t work = 1;
  bool fits = true;
  for (const int64_t size : {B, H, Tq, Tk, std::max(D, Dv)})
    fits = fits && !__builtin_mul_overflow(work, std::max<int64_t>(size, 1), &work);
  STD_TORCH_CHECK(fits && work < int64_t{1} << 56,
                  "additive_attention: query, key and value: expected sizes with "
                  "B H Tq Tk max(D, Dv) below 2^56, got B = ",
                  B, ", H = ", H, ", Tq = ", Tq, ", Tk = ", Tk, ", D = ", D, ", Dv = ", Dv);
}

}  // namespace fusedattn
