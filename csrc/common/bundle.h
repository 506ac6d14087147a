// Bundles of options (<op>/options.h), plain structs of scalars, made member by member without naming one; and
// which results are asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace fusedattn {

struct AnyScalar {
  template <typename T>
  operator T() const;
};

// How many members a bundle has: as many as it can be initialised with.
template <typename Bundle, typename Tried = void, typename... Members>
constexpr size_t MEMBERS = sizeof...(Members) - 1;
template <typename Bundle, typename... Members>
constexpr size_t MEMBERS<Bundle, std::void_t<decltype(Bundle{Members{}...})>, Members...> =
    MEMBERS<Bundle, void, Members..., AnyScalar>;

// A bundle whose members are, in order, what `next` converts to.
template <typename Bundle, typename Next, size_t... n>
Bundle make_bundle(Next next, std::index_sequence<n...>) {
  return Bundle{(static_cast<void>(n), next)...};
}
template <typename Bundle, typename Next>
Bundle make_bundle(Next next) {
  return make_bundle<Bundle>(next, std::make_index_sequence<MEMBERS<Bundle>>());
}

// Which gradients backward is asked for: bit n for the n-th of its results, which has shape (0,) if it is not.
struct OutputMask {
  int64_t bits;
  bool operator[](int n) const { return (bits >> n & 1) != 0; }
};

}  // namespace fusedattn
