// How tensors lie in memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace fusedattn {

using torch::stable::Tensor;

// Dimensions from the outermost to the innermost in memory; ties keep their order.
inline std::vector<int64_t> memory_order(const Tensor& x) {
  std::vector<int64_t> order(x.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (x.size(a) == 1 || x.size(b) == 1) return false;
    return x.stride(a) > x.stride(b);
  });
  return order;
}

inline bool dense_in(const Tensor& x, const std::vector<int64_t>& order) {
  int64_t expected = 1;
  for (size_t n = order.size(); n-- > 0;) {
    const int64_t d = order[n];
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Whether t has the shape and dtype of x.
inline bool is_like(const Tensor& t, const Tensor& x) {
  bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  return same;
}

// y with the strides that empty_like gives for an input that was copied, which is what the operator's fake
// promises. Where the input is dense it gave them already.
inline Tensor as_empty_like(const Tensor& y, const Tensor& input) {
  Tensor out = torch::stable::empty_like(input);
  if (same_strides(out, y)) return y;
  torch::stable::copy_(out, y);
  return out;
}

}  // namespace fusedattn
