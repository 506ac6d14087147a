// Random words and dropout for launchers: their arguments checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>

#include "common/philox.h"

namespace fusedattn {

// The stream of a call with H heads, from seed (S,), of which each is for H / S heads. name: of that argument.
inline PhiloxStream stream_of(const char* name, const torch::stable::Tensor& seed, int64_t H,
                              const PhiloxPlace& place) {
  const int64_t seeds = seed.dim() == 1 ? seed.size(0) : 0;
  STD_TORCH_CHECK(seeds > 0 && H % seeds == 0 && seed.is_contiguous() &&
                      seed.scalar_type() == torch::headeronly::ScalarType::Long,
                  name, ": expected an int64 Tensor (S,), contiguous, S dividing the ", H, " heads");
  STD_TORCH_CHECK(place.first_head >= 0 && place.heads >= 0 && place.first_query >= 0 && place.first_key >= 0,
                  name, ": first_head, heads, first_query and first_key: expected none below 0");
  return {seed.const_data_ptr<int64_t>(), std::max<int64_t>(H / seeds, 1), place};
}

// Of dropout with probability p; fusedattn/_philox.py has the same threshold.
inline Dropout dropout_of(const char* op, double p) {
  STD_TORCH_CHECK(p >= 0 && p < 1, op, ": dropout_p: expected a number in [0, 1), got ", p);
  return {static_cast<uint32_t>(std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1)), 1 / (1 - p)};
}

}  // namespace fusedattn
