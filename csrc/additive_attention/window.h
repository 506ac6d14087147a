// Which keys a query sees by window_size and window_center, for every C++ kernel of the op.
#pragma once

#include <cstdint>

#include "options.h"

#ifndef FUSEDATTN_INLINE
#define FUSEDATTN_INLINE static inline
#endif

namespace fusedattn {

struct KeyRange {
  int64_t first, end;
};

FUSEDATTN_INLINE bool has_window(const AttentionOptions& options) {
  return options.window_left >= 0 || options.window_right >= 0;
}

// center - left <= j <= center + right, of Tk keys. Any center: those far outside see nothing.
FUSEDATTN_INLINE KeyRange keys_around(const AttentionOptions& options, int64_t center, int64_t Tk) {
  constexpr int64_t FAR = int64_t{1} << 61;  // sums of two stay in range
  const int64_t c = center < -FAR ? -FAR : center > FAR ? FAR : center;
  const int64_t left = options.window_left > FAR ? FAR : options.window_left;
  const int64_t right = options.window_right > FAR ? FAR : options.window_right;
  const int64_t first = left < 0 || c <= left ? 0 : c - left;
  const int64_t end = right < 0 || c >= Tk - right ? Tk : c + right + 1;
  return {first > Tk ? Tk : first, end < 0 ? 0 : end};
}

}  // namespace fusedattn
