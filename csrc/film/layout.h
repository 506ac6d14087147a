// The memory layout of FiLM's tensors, for the launchers of every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "options.h"

namespace fusedattn {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

// x as (B, M, C, N) in memory order: B batch, M positions before and N positions after the channel. Copied only
// where it is not dense with the batch outermost.
struct Layout {
  Tensor x;
  int64_t B, M, C, N;
  bool copied = false;

  Layout(const Tensor& input, const FilmOptions& options) : x(input) {
    std::vector<int64_t> order = memory_order(x);
    if (!dense_in(x, order) || order[0] != 0) {
      x = torch::stable::contiguous(x);
      copied = true;
      std::iota(order.begin(), order.end(), 0);
    }
    B = x.size(0), M = 1, C = x.size(options.channel_dim), N = 1;
    bool before = true;
    for (size_t n = 1; n < order.size(); ++n) {
      if (order[n] == options.channel_dim)
        before = false;
      else
        (before ? M : N) *= x.size(order[n]);
    }
  }

  void check_parameter(const Tensor& t) const {
    STD_TORCH_CHECK(t.size(-1) == C && (t.dim() == 1 || (t.dim() == 2 && t.size(0) == B)),
                    "film: gamma and beta must be (C,) or (B, C)");
  }

  // t with the strides of x.
  Tensor like(const Tensor& t) const {
    bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
    STD_TORCH_CHECK(same, "film: residual and grad_output: expected the shape and dtype of x");
    if (same_strides(t, x)) return t;
    Tensor copy = torch::stable::empty_like(x);
    torch::stable::copy_(copy, t);
    return copy;
  }

  // y with the strides that empty_like gives for the input, which is what the operator's fake promises. Where the
  // input is dense it gave them already.
  Tensor restored(const Tensor& y, const Tensor& input) const {
    if (!copied) return y;
    Tensor out = torch::stable::empty_like(input);
    if (same_strides(out, y)) return y;
    torch::stable::copy_(out, y);
    return out;
  }
};

}  // namespace fusedattn
