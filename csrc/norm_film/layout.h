// The memory layout of norm_film's tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "common/memory.h"
#include "common/strides.h"
#include "options.h"

namespace fusedattn {

using OptionalTensor = std::optional<Tensor>;

// x as (B, T, C) in memory: B batch, T positions, C channels; or, where a group may be planes of channels, as
// (B, C, T). Copied only where it lies otherwise.
struct NormLayout {
  Tensor x;
  int64_t B, T = 1, C, channel_dim;
  bool planes = false;
  std::vector<int64_t> sizes, strides;
  bool copied = false;

  NormLayout(const Tensor& input, const NormFilmOptions& options)
      : x(input), B(input.size(0)), C(input.size(options.channel_dim)), channel_dim(options.channel_dim) {
    const auto of = input.sizes();
    sizes.assign(of.begin(), of.end());
    int64_t before = 1;
    for (int64_t d = 1; d < x.dim(); ++d) {
      if (d != channel_dim) T *= sizes[d];
      if (d < channel_dim) before *= sizes[d];
    }
    if (!is_of_rows(options.norm) && before == 1 && T > 1) {
      set_strides(false);
      planes = lies_so(input);
    }
    if (!planes) set_strides(true);
    x = like(input, "x");
    copied = x.data_ptr() != input.data_ptr();
  }

  void set_strides(bool channels_last) {
    strides.assign(sizes.size(), 1);
    int64_t step = channels_last ? C : 1;
    for (int64_t d = x.dim(); d-- > 0;) {
      if (channels_last && d == channel_dim) continue;
      strides[d] = step;
      step *= sizes[d];
    }
  }

  Tensor empty_like() const { return empty(sizes, strides, x.scalar_type()); }

  bool lies_so(const Tensor& t) const {
    for (int64_t d = 0; d < t.dim(); ++d)
      if (sizes[d] != 1 && t.stride(d) != strides[d]) return false;
    return true;
  }

  // t, of the shape and dtype of x, in this layout.
  Tensor like(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(is_like(t, x), "norm_film: ", name, ": expected shape and dtype of x");
    return lies_so(t) ? t : in_layout(t);
  }

  Tensor in_layout(const Tensor& t) const {
    Tensor copy = empty(sizes, strides, t.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
  }

  Tensor restored(const Tensor& y, const Tensor& input) const { return copied ? as_empty_like(y, input) : y; }
};

// Which elements of x share a value: those of a channel, in all batch elements or in each, or none.
enum class Level { CHANNEL, BATCH, ELEMENT };

// A parameter, or one of the two of a pair, as steps through its memory.
struct Source {
  Tensor tensor;
  StorageType type;
  Level level;
  bool asked;  // for its gradient
  int64_t b_step = 0, t_step = 0, c_step = 0;
  const char* data;

  Source(const Tensor& t, const NormLayout& in, const char* name, bool asked)
      : tensor(t), type(storage_type(t.scalar_type())), level(Level::CHANNEL), asked(asked) {
    STD_TORCH_CHECK((type == StorageType::DOUBLE) == (storage_type(in.x.scalar_type()) == StorageType::DOUBLE),
                    "norm_film: ", name, ": expected float64 if x is, and only then");
    const int64_t rank = t.dim();
    bool fits = rank > 0 && rank <= in.x.dim();
    if (rank == 1) {
      fits = t.size(0) == in.C;
      c_step = t.stride(0);
    } else if (rank == 2) {
      level = Level::BATCH;
      fits = t.size(0) == in.B && t.size(1) == in.C && (in.x.dim() > 2 || in.channel_dim == 1);
      b_step = t.stride(0), c_step = t.stride(1);
    } else {
      level = Level::ELEMENT;
      for (int64_t d = 0; fits && d < rank; ++d) fits = rank == in.x.dim() && t.size(d) == in.sizes[d];
      if (fits) set_steps(in);
    }
    STD_TORCH_CHECK(fits, "norm_film: ", name, ": expected shape (", in.C, ",), (", in.B, ", ", in.C,
                    ") or that of x");
    data = static_cast<const char*>(tensor.const_data_ptr());
  }

  const char* at(int64_t b, int64_t t) const { return data + (b * b_step + t * t_step) * bytes_of(type); }

 private:
  // Positions at one step, of a copy if need be.
  void set_steps(const NormLayout& in) {
    int64_t size = 1;
    bool one = true;
    t_step = 0;
    for (int64_t d = in.x.dim(); d-- > 1;) {
      if (d == in.channel_dim || in.sizes[d] == 1) continue;
      if (size == 1)
        t_step = tensor.stride(d);
      else
        one &= tensor.stride(d) == t_step * size;
      size *= in.sizes[d];
    }
    if (!one) {
      tensor = in.in_layout(tensor);
      t_step = in.C;
    }
    b_step = tensor.stride(0), c_step = tensor.stride(in.channel_dim);
  }
};

}  // namespace fusedattn
