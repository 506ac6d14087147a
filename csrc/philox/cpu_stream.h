// Seeds of random words, checked, for CPU launchers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu_kernel.h"

namespace fusedattn {

// The stream of a call with H heads, from seed (S,), of which each is for H / S heads.
inline PhiloxStream stream_of(const char* op, const torch::stable::Tensor& seed, int64_t H,
                              const PhiloxPlace& place) {
  const int64_t seeds = seed.dim() == 1 ? seed.size(0) : 0;
  STD_TORCH_CHECK(seeds > 0 && H % seeds == 0 && seed.is_contiguous() &&
                      seed.scalar_type() == torch::headeronly::ScalarType::Long,
                  op, ": seed: expected an int64 Tensor (S,), contiguous, S dividing the ", H, " heads");
  STD_TORCH_CHECK(place.first_head >= 0 && place.heads >= 0 && place.first_query >= 0 && place.first_key >= 0, op,
                  ": first_head, heads, first_query and first_key: expected none below 0");
  return {seed.const_data_ptr<int64_t>(), std::max<int64_t>(H / seeds, 1), place};
}

}  // namespace fusedattn
