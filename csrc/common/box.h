// TORCH_BOX for functions that take a bundle of options: a bundle stands for as many arguments of the schema as it
// has members. m.impl("film_fwd", boxed<film_fwd>);
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "common/bundle.h"

// What torch says of its last error in this thread. Since torch 2.13; absent before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fusedattn {
namespace box {

// The error itself where a call of torch failed, of which its headers say no more than the name of the call.
inline void throw_what_torch_says(const std::runtime_error& error) {
  if (torch_exception_get_what_without_backtrace != nullptr && std::strstr(error.what(), " API call failed at "))
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
}

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
    try {
      put(stack, std::apply(function, values));
    } catch (const std::runtime_error& error) {
      throw_what_torch_says(error);
      throw;
    }
  }
};

}  // namespace box

template <auto function>
constexpr auto* boxed = &box::Boxed<function>::call;

}  // namespace fusedattn
