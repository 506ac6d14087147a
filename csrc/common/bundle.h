// Bundles of options (<op>/options.h), plain structs of scalars, made member by member without naming one.
#pragma once

#include <cstddef>
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

}  // namespace fusedattn
