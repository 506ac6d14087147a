// CPU launcher of hard_additive_attention: rows of scores over all cores.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/box.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "cpu_kernel.h"
#include "philox/cpu_stream.h"

namespace fusedattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

const HardAttentionKernels<float>& kernels(float) { return FUSEDATTN_LEVEL_TABLE(hard_attention_f32); }
const HardAttentionKernels<double>& kernels(double) { return FUSEDATTN_LEVEL_TABLE(hard_attention_f64); }

// Rows of scores (B, [H,] Tq, Tk), and what hides keys from them.
struct Rows {
  Tensor scores;
  OptionalTensor mask;
  std::vector<int64_t> sizes;  // of a number for each row
  int64_t B, H, Tq, Tk, mask_stride[3];

  Rows(const Tensor& scores_, const OptionalTensor& mask_)
      : scores(contiguous(scores_, scores_.scalar_type())), mask(mask_) {
    const int64_t rank = scores.dim();
    STD_TORCH_CHECK((rank == 3 || rank == 4) &&
                        (scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double),
                    "hard_additive_attention: scores: expected float32 or float64 (B, [H,] Tq, Tk)");
    for (int64_t n = 0; n + 1 < rank; ++n) sizes.push_back(scores.size(n));
    B = scores.size(0), H = rank == 4 ? scores.size(1) : 1, Tq = scores.size(-2), Tk = scores.size(-1);
    if (!mask) return;
    bool same = mask->dim() == rank && mask->scalar_type() == ScalarType::Bool;
    for (int64_t n = 0; same && n < rank; ++n) same = mask->size(n) == scores.size(n);
    STD_TORCH_CHECK(same, "hard_additive_attention: mask: expected bool of the shape of scores");
    if (Tk > 1 && mask->stride(-1) != 1) mask = contiguous(*mask, ScalarType::Bool);
    mask_stride[0] = mask->stride(0), mask_stride[1] = rank == 4 ? mask->stride(1) : 0;
    mask_stride[2] = mask->stride(-2);
  }

  // body(row, its scores, -inf where they are hidden)
  template <typename T, typename Body>
  void for_each(const Body& body) const {
    const T* const data = scores.template const_data_ptr<T>();
    const bool* const visible = mask ? mask->template const_data_ptr<bool>() : nullptr;
    parallel_for(B * H * Tq, 1 + 8192 / (Tk + 1), [&](int64_t first, int64_t last) {
      const Buffer<T> room(mask ? Tk : 0);
      for (int64_t r = first; r < last; ++r) {
        const T* row = data + r * Tk;
        if (mask) {
          const int64_t b = r / Tq / H, h = r / Tq % H, i = r % Tq;
          const int64_t at = b * mask_stride[0] + h * mask_stride[1] + i * mask_stride[2];
          kernels(T()).hide(Tk, row, visible + at, room.get());
          row = room.get();
        }
        body(r, row);
      }
    });
  }
};

// run(T()) of the type of the scores.
template <typename Run>
auto with_arithmetic(const Tensor& scores, const Run& run) {
  return scores.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

Outputs hard_additive_attention_fwd(const Tensor& scores, const OptionalTensor& mask, const OptionalTensor& seed,
                                    const PhiloxPlace& place) {
  const Rows rows(scores, mask);
  std::optional<PhiloxStream> stream;
  if (seed) stream = stream_of("hard_additive_attention", *seed, rows.H, place);
  return with_arithmetic(scores, [&](auto zero) -> Outputs {
    using T = decltype(zero);
    const ScalarType type = scores.scalar_type();
    const Outputs outputs{empty(rows.sizes, type), empty(rows.sizes, type), empty(rows.sizes, type),
                          empty(rows.sizes, ScalarType::Long), empty(rows.sizes, type)};
    const auto& [log_prob, entropy, lse, index, best] = outputs;
    T *const l = log_prob.template mutable_data_ptr<T>(), *const h = entropy.template mutable_data_ptr<T>();
    T *const L = lse.template mutable_data_ptr<T>(), *const m = best.template mutable_data_ptr<T>();
    int64_t* const n = index.template mutable_data_ptr<int64_t>();
    rows.for_each<T>([&](int64_t r, const T* row) {
      PhiloxRow noise;
      if (stream) noise = philox_row(*stream, r / rows.Tq / rows.H, r / rows.Tq % rows.H, r % rows.Tq);
      const Choice<T> c = kernels(T()).choose(rows.Tk, row, stream ? &noise : nullptr);
      l[r] = c.log_prob, h[r] = c.entropy, L[r] = c.lse, n[r] = c.index, m[r] = c.best;
    });
    return outputs;
  });
}

Tensor hard_additive_attention_bwd(const OptionalTensor& grad_log_prob, const OptionalTensor& grad_entropy,
                                   const OptionalTensor& grad_lse, const Tensor& scores,
                                   const OptionalTensor& mask, const OptionalTensor&, const PhiloxPlace&,
                                   const Tensor& entropy, const Tensor& lse, const Tensor& index,
                                   OutputMask asked) {
  const Rows rows(scores, mask);
  const ScalarType type = scores.scalar_type();
  if (!asked[0]) return empty({0}, type);
  return with_arithmetic(scores, [&](auto zero) {
    using T = decltype(zero);
    // A number for each row, or none.
    const auto given = [&](const OptionalTensor& t, ScalarType of) {
      STD_TORCH_CHECK(!t || t->numel() == rows.B * rows.H * rows.Tq,
                      "hard_additive_attention: expected a number for each query");
      return t ? std::optional<Tensor>(contiguous(*t, of)) : t;
    };
    const auto numbers = [](const OptionalTensor& t) { return t ? t->template const_data_ptr<T>() : nullptr; };
    const OptionalTensor dl = given(grad_log_prob, type), dh = given(grad_entropy, type),
                         dL = given(grad_lse, type);
    const OptionalTensor H = given(entropy, type), L = given(lse, type), n = given(index, ScalarType::Long);
    const T *const of_log_prob = numbers(dl), *const of_entropy = numbers(dh), *const of_lse = numbers(dL);
    const T *const entropies = numbers(H), *const lses = numbers(L);
    const int64_t* const indices = n->template const_data_ptr<int64_t>();
    std::vector<int64_t> sizes = rows.sizes;
    sizes.push_back(rows.Tk);
    const Tensor grad = empty(sizes, type);
    T* const g = grad.template mutable_data_ptr<T>();
    const auto at = [](const T* numbers, int64_t r) { return numbers == nullptr ? T(0) : numbers[r]; };
    rows.for_each<T>([&](int64_t r, const T* row) {
      const Choice<T> choice{indices[r], 0, entropies[r], lses[r], 0};
      kernels(T()).gradients(rows.Tk, row, choice, {at(of_log_prob, r), at(of_entropy, r), at(of_lse, r)},
                             g + r * rows.Tk);
    });
    return grad;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("hard_additive_attention_fwd", boxed<hard_additive_attention_fwd>);
  m.impl("hard_additive_attention_bwd", boxed<hard_additive_attention_bwd>);
}

}  // namespace fusedattn
