// The types in which tensors are stored, and that of the arithmetic on them.
#pragma once

#include <cstdint>

namespace fusedattn {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename S>
struct ArithmeticOf {
  typedef float type;
};
template <>
struct ArithmeticOf<double> {
  typedef double type;
};
template <typename S>
using Arithmetic = typename ArithmeticOf<S>::type;

// Whether numbers are rounded on their way from the arithmetic to storage.
template <typename S>
constexpr bool IS_NARROW = sizeof(S) < sizeof(Arithmetic<S>);

// Which of them, known at run time.
enum class StorageType { FLOAT, DOUBLE, HALF, BFLOAT16 };

}  // namespace fusedattn
