// The memory layout of FiLM's tensors, for the launchers of every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <vector>

#include "common/strides.h"
#include "common/walk.h"
#include "options.h"

namespace fusedattn {

using OptionalTensor = std::optional<Tensor>;

// gamma and beta, each the sum of up to two tensors that repeat along x.
constexpr int FILM_PARAMETERS = 4;
struct FilmParameters {
  OptionalTensor gamma, gamma_added, beta, beta_added;
  const OptionalTensor& operator[](int n) const {
    return n == 0 ? gamma : n == 1 ? gamma_added : n == 2 ? beta : beta_added;
  }
};

// View 0 is x, then come the values of the parameters, then their gradients, which lie dense in the order of x;
// last what lies along x at steps of its own (gated_film's two halves, of which x is one).
using FilmWalk = Walk<2 + 2 * FILM_PARAMETERS>;
constexpr int VALUES = 1, GRADIENTS = 1 + FILM_PARAMETERS, SOURCE = 1 + 2 * FILM_PARAMETERS;
using FilmStrides = std::array<std::vector<int64_t>, FILM_PARAMETERS>;

// x as (B, M, C, N) in memory order: B batch, M positions before and N positions after the channel. Copied only
// where it is not dense with the batch outermost.
struct Layout {
  Tensor x;
  int64_t B, M, C, N, channel_dim;
  bool copied = false;

  std::vector<int64_t> order;  // of dimensions in memory
  const char *op, *parameters;

  Layout(const Tensor& input, const FilmOptions& options) : Layout(input, options.channel_dim) {}
  // `op` and `parameters`: for messages.
  Layout(const Tensor& input, int64_t channel_dim, const char* op = "film",
         const char* parameters = "gamma and beta")
      : x(input), channel_dim(channel_dim), order(memory_order(input)), op(op), parameters(parameters) {
    if (!dense_in(x, order) || order[0] != 0) {
      x = torch::stable::contiguous(x);
      copied = true;
      std::iota(order.begin(), order.end(), 0);
    }
    B = x.size(0), M = 1, C = x.size(channel_dim), N = 1;
    bool before = true;
    for (size_t n = 1; n < order.size(); ++n) {
      if (order[n] == channel_dim)
        before = false;
      else
        (before ? M : N) *= x.size(order[n]);
    }
  }

  // Which dimension of x each one of a parameter is, by their number alone: (), (C,), (B, C), or those of x.
  std::vector<int64_t> dims_of(const Tensor& t) const {
    std::vector<int64_t> dims(t.dim());
    if (t.dim() == x.dim())
      std::iota(dims.begin(), dims.end(), 0);
    else if (t.dim() == 1)
      dims = {channel_dim};
    else if (t.dim() == 2)
      dims = {0, channel_dim};
    else
      STD_TORCH_CHECK(t.dim() == 0, op, ": ", parameters, ": expected 0, 1, 2 or ", x.dim(), " dimensions, got ",
                      t.dim());
    for (size_t d = 0; d < dims.size(); ++d)
      STD_TORCH_CHECK(t.size(d) == 1 || t.size(d) == x.size(dims[d]), op, ": ", parameters,
                      ": expected size 1 or ", x.size(dims[d]), " in dimension ", d, ", got ", t.size(d));
    return dims;
  }

  // Strides of t's own dimensions that make it dense in the order of x.
  std::vector<int64_t> dense_strides(const Tensor& t) const {
    const std::vector<int64_t> dims = dims_of(t);
    std::vector<int64_t> strides(dims.size(), 1);
    int64_t step = 1;
    for (size_t n = order.size(); n-- > 0;)
      for (size_t d = 0; d < dims.size(); ++d)
        if (dims[d] == order[n]) {
          strides[d] = step;
          step *= t.size(d);
        }
    return strides;
  }

  // `gradients`: the strides of those of the parameters.
  FilmWalk walk(const FilmParameters& parameters, const FilmStrides& gradients, const Tensor& source) const {
    std::vector<FilmWalk::Dim> dims(x.dim());
    for (int64_t d = 0; d < x.dim(); ++d) {
      dims[d] = {x.size(d), {x.stride(d)}};
      dims[d].step[SOURCE] = source.stride(d);
    }
    for (int p = 0; p < FILM_PARAMETERS; ++p) {
      if (!parameters[p]) continue;
      const Tensor& t = *parameters[p];
      const std::vector<int64_t> own = dims_of(t);
      for (size_t d = 0; d < own.size(); ++d) {
        if (t.size(d) == 1) continue;
        dims[own[d]].step[VALUES + p] = t.stride(d);
        dims[own[d]].step[GRADIENTS + p] = gradients[p][d];
      }
    }
    FilmWalk walk;
    for (const int64_t d : order) walk.add(dims[d]);
    walk.close(SOURCE);
    return walk;
  }
  FilmWalk walk(const FilmParameters& parameters) const {
    FilmStrides gradients;
    for (int p = 0; p < FILM_PARAMETERS; ++p)
      if (parameters[p]) gradients[p] = dense_strides(*parameters[p]);
    return walk(parameters, gradients, x);
  }

  void check_parameter(const Tensor& t) const {
    STD_TORCH_CHECK(t.size(-1) == C && (t.dim() == 1 || (t.dim() == 2 && t.size(0) == B)),
                    "film: gamma and beta must be (C,) or (B, C)");
  }

  // residual or grad_output with the strides of x.
  Tensor like(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(is_like(t, x), op, ": ", name, ": expected the shape and dtype of x");
    if (same_strides(t, x)) return t;
    Tensor copy = torch::stable::empty_like(x);
    torch::stable::copy_(copy, t);
    return copy;
  }

  // That of y, dense in the order of x, with another number of channels.
  Layout of(const Tensor& y) const {
    Layout other = *this;
    other.x = y;
    other.C = y.size(channel_dim);
    return other;
  }

  Tensor restored(const Tensor& y, const Tensor& input) const { return copied ? as_empty_like(y, input) : y; }
};

}  // namespace fusedattn
