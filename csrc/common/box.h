// TORCH_BOX for functions that take a bundle of options: a bundle stands for as many arguments of the schema as it
// has members. m.impl("film_fwd", boxed<film_fwd>);
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "common/bundle.h"

namespace fusedattn {
namespace box {

template <typename Parameter>
using Value = torch::stable::detail::unbox_type_t<Parameter>;

template <typename T>
constexpr bool IS_BUNDLE = std::is_class_v<T> && std::is_aggregate_v<T>;

template <typename T>
constexpr uint64_t slots() {
  if constexpr (IS_BUNDLE<T>)
    return MEMBERS<T>;
  else
    return 1;
}

// Converts to a member of a bundle, from the next place on the stack.
struct NextMember {
  StableIValue*& next;
  template <typename T>
  operator T() const {
    using torch::stable::detail::to;
    if constexpr (std::is_enum_v<T>)
      return static_cast<T>(to<int64_t>(*next++));
    else
      return to<T>(*next++);
  }
};

template <typename T>
T take(StableIValue*& next) {
  if constexpr (IS_BUNDLE<T>)
    return make_bundle<T>(NextMember{next});
  else
    return torch::stable::detail::to<T>(*next++);
}

template <typename... Results>
void put(StableIValue* stack, const std::tuple<Results...>& results) {
  torch::stable::detail::box_from_tuple<Results...>(stack, results);
}
template <typename Result>
void put(StableIValue* stack, const Result& result) {
  stack[0] = torch::stable::detail::from(result);
}

template <typename Result>
constexpr uint64_t RESULTS = 1;
template <typename... Results>
constexpr uint64_t RESULTS<std::tuple<Results...>> = sizeof...(Results);

template <auto function>
struct Boxed;
template <typename Result, typename... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    constexpr uint64_t parameters = (slots<Value<Parameters>>() + ... + 0);
    STD_TORCH_CHECK(arguments == parameters && results == RESULTS<Result>, "the schema has ", arguments,
                    " arguments and ", results, " results, its kernel ", parameters, " and ", RESULTS<Result>);
    StableIValue* next = stack;
    const std::tuple<Value<Parameters>...> values{take<Value<Parameters>>(next)...};  // in order: in braces
    put(stack, std::apply(function, values));
  }
};

}  // namespace box

template <auto function>
constexpr auto* boxed = &box::Boxed<function>::call;

}  // namespace fusedattn
