// The storage type of a tensor.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "storage.h"

namespace fusedattn {

inline StorageType storage_type(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return StorageType::FLOAT;
    case ScalarType::Double:
      return StorageType::DOUBLE;
    case ScalarType::Half:
      return StorageType::HALF;
    case ScalarType::BFloat16:
      return StorageType::BFLOAT16;
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, float16 or bfloat16");
      return StorageType::FLOAT;
  }
}

inline int64_t bytes_of(StorageType type) {
  return type == StorageType::DOUBLE ? 8 : type == StorageType::FLOAT ? 4 : 2;
}

template <typename T>
constexpr StorageType ARITHMETIC = sizeof(T) == 8 ? StorageType::DOUBLE : StorageType::FLOAT;

}  // namespace fusedattn
