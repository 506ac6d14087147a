// The tensors of additive attention as its CUDA kernels take them: checked, and copied only where the last
// dimension is not contiguous.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "common/cuda_torch.h"
#include "cuda_problem.cuh"
#include "philox/stream.h"
#include "sizes.h"

namespace fusedattn {

using gpu::ScalarType;
using gpu::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct AttentionInputs {
  gpu::Device device;
  bool flat;  // no dimension of heads
  int64_t B, H, Tq, Tk, D, Dv;
  Tensor query, key, value, weight;
  OptionalTensor bias, mask, key_lengths, window_center, dropout_seed;
  AttentionOptions options;

  AttentionInputs(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& weight_,
                  const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& key_lengths_,
                  const OptionalTensor& window_center, const OptionalTensor& dropout_seed,
                  const AttentionOptions& options)
      : device(query_),
        flat(query_.dim() == 3),
        query(rows(query_, "query")),
        key(rows(key_, "key")),
        value(rows(value_, "value")),
        weight(rows(weight_, "weight")),
        bias(bias),
        mask(mask),
        key_lengths(key_lengths_),
        window_center(window_center),
        dropout_seed(dropout_seed),
        options(options) {
    STD_TORCH_CHECK(query.dim() == key.dim() && query.dim() == value.dim() && (flat || query.dim() == 4),
                    "additive_attention: query, key and value must all have 3 or all 4 dimensions");
    B = query.size(0), H = flat ? 1 : query.size(1), Tq = query.size(-2), D = query.size(-1);
    Tk = key.size(-2), Dv = value.size(-1);
    check_sizes(B, H, Tq, Tk, D, Dv);
    check_shape(key, "key", shape(Tk, D));
    check_shape(value, "value", shape(Tk, Dv));
    check_shape(weight, "weight", flat ? std::vector<int64_t>{D} : std::vector<int64_t>{H, D});
    if (bias) {
      device.require(bias, "additive_attention", "bias");
      const std::vector<int64_t> full = shape(Tq, Tk);
      bool fits = bias->dim() == static_cast<int64_t>(full.size());
      for (int64_t n = 0; fits && n < bias->dim(); ++n) fits = bias->size(n) == 1 || bias->size(n) == full[n];
      STD_TORCH_CHECK(fits, "additive_attention: bias does not have a shape that broadcasts to the scores");
    }
    if (mask) {
      device.require(mask, "additive_attention", "mask");
      check_shape(*mask, "mask", shape(Tq, Tk));
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "additive_attention: mask must be of dtype bool");
    }
    if (key_lengths) {
      device.require(key_lengths, "additive_attention", "key_lengths");
      check_shape(*key_lengths, "key_lengths", {B});
      STD_TORCH_CHECK(key_lengths->scalar_type() == ScalarType::Long,
                      "additive_attention: key_lengths must be of dtype int64");
      key_lengths = torch::stable::contiguous(*key_lengths);
    }
    if (window_center) {
      device.require(window_center, "additive_attention", "window_center");
      check_shape(*window_center, "window_center", shape(Tq));
      STD_TORCH_CHECK(window_center->scalar_type() == ScalarType::Long,
                      "additive_attention: window_center must be of dtype int64");
    }
  }

  // (B, H, ...), or (B, ...) without heads. Not a list in braces: nvcc spoils those in templates.
  template <typename... Sizes>
  std::vector<int64_t> shape(Sizes... rest) const {
    std::vector<int64_t> sizes{B};
    if (!flat) sizes.push_back(H);
    (sizes.push_back(rest), ...);
    return sizes;
  }

  void check_shape(const Tensor& t, const char* name, const std::vector<int64_t>& shape) const {
    bool same = t.dim() == static_cast<int64_t>(shape.size());
    int64_t n = 0;
    for (int64_t size : shape) same = same && t.size(n++) == size;
    STD_TORCH_CHECK(same, "additive_attention: ", name, " does not have the shape that the other inputs ask for");
  }

  // Of the dtype and device of query, with a contiguous last dimension.
  Tensor rows(const Tensor& t, const char* name) const {
    device.require(t, "additive_attention", name);
    return t.dim() > 0 && t.size(-1) > 1 && t.stride(-1) != 1 ? torch::stable::contiguous(t) : t;
  }

  template <typename S>
  RowsOf<S> view(const Tensor& t) const {
    return {gpu::data<S>(t), t.stride(0), flat ? 0 : t.stride(1), t.stride(-2)};
  }

  std::vector<int64_t> bias_shape() const {
    std::vector<int64_t> sizes;
    for (int64_t n = 0; n < bias->dim(); ++n) sizes.push_back(bias->size(n));
    return sizes;
  }

  // A weight or a bias, or its gradient.
  template <typename S>
  gpu::Numbers<S> numbers(const OptionalTensor& t, const char* name = "weight") const {
    return gpu::numbers<S>(t, query.scalar_type(), (std::string("additive_attention: ") + name).c_str());
  }

  template <typename S>
  AttentionProblem<S> problem() const {
    STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                    "additive_attention: key and value must be of the dtype of query");
    AttentionProblem<S> p;
    p.B = B, p.H = H, p.Tq = Tq, p.Tk = Tk, p.D = D, p.Dv = Dv;
    p.query = view<S>(query), p.key = view<S>(key), p.value = view<S>(value);
    p.weight = numbers<S>(weight), p.weight_stride_h = flat ? 0 : weight.stride(0);
    p.bias = numbers<S>(bias, "bias");
    for (int64_t n = 0; n < 4; ++n) {
      const int64_t dim = flat && n > 1 ? n - 1 : n;
      p.bias_size[n] = !bias || (flat && n == 1) ? 1 : bias->size(dim);
      p.bias_stride[n] = p.bias_size[n] == 1 ? 0 : bias->stride(dim);
    }
    p.mask = gpu::data<bool>(mask);
    for (int64_t n = 0; n < 4; ++n)
      p.mask_stride[n] = !mask    ? 0
                         : !flat  ? mask->stride(n)
                         : n == 0 ? mask->stride(0)
                         : n == 1 ? 0
                                  : mask->stride(n - 1);
    p.key_lengths = gpu::data<int64_t>(key_lengths);
    const bool windows = options.window_left >= 0 || options.window_right >= 0;
    p.center = windows ? gpu::data<int64_t>(window_center) : nullptr;
    for (int64_t n = 0; n < 3; ++n)
      p.center_stride[n] = !window_center ? 0
                           : n == 0       ? window_center->stride(0)
                           : n == 2       ? window_center->stride(-1)
                           : flat         ? 0
                                          : window_center->stride(1);
    if (dropout_seed) {
      const AttentionOptions& o = options;
      device.require(dropout_seed, "additive_attention", "dropout_seed");
      p.random = stream_of("additive_attention: dropout_seed", *dropout_seed, H,
                           {o.first_head, o.heads, o.first_query, o.first_key});
      p.dropout = dropout_of("additive_attention", o.dropout_p);
    } else {
      p.random.seeds = nullptr;
    }
    p.options = options;
    return p;
  }

  // On the device, from torch's caching allocator.
  Tensor empty(const std::vector<int64_t>& shape, ScalarType type) const {
    return torch::stable::new_empty(query, shape, type);
  }
  Tensor empty(int64_t size, ScalarType type) const { return empty(std::vector<int64_t>(1, size), type); }
};

}  // namespace fusedattn
