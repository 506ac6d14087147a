// CPU launcher of attention_pool: instances in tasks of neighbouring rows, whose sums are added in a fixed order.
// The cut depends on shapes alone: results are bitwise reproducible.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "common/box.h"
#include "common/cpu_level.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/storage_type.h"
#include "cpu_kernel.h"

namespace fusedattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t MOST_ROWS = 1024;  // of a sum in single precision
constexpr int64_t LEAST_ROWS = 16;

const AttentionPoolKernels& kernels() { return FUSEDATTN_LEVEL_TABLE(attention_pool); }

// (B, T, width) whose rows may lie apart.
struct Rows {
  OptionalTensor tensor;
  const char* data = nullptr;
  int64_t width = 0, b_step = 0, step = 0, size = 0;

  Rows(const OptionalTensor& given, const char* name, int64_t B, int64_t T, ScalarType type) {
    if (!given) return;
    tensor = given->dim() == 3 && given->stride(2) == 1 ? *given : torch::stable::contiguous(*given);
    STD_TORCH_CHECK(
        tensor->dim() == 3 && tensor->size(0) == B && tensor->size(1) == T && tensor->scalar_type() == type,
        "attention_pool: ", name, ": expected shape (", B, ", ", T, ", width) and the dtype of hidden");
    data = static_cast<const char*>(tensor->const_data_ptr());
    width = tensor->size(2), b_step = tensor->stride(0), step = tensor->stride(1), size = tensor->element_size();
  }
  const void* at(int64_t b, int64_t t) const {
    return data == nullptr ? nullptr : data + (b * b_step + t * step) * size;
  }
};

// (rows, width) of gradients like these, or none.
struct Result {
  Tensor tensor;
  char* data = nullptr;
  int64_t row_bytes;
  bool streamed = false;

  Result(const Rows& like, int64_t B, int64_t T, ScalarType type, bool asked)
      : tensor(asked ? empty({B, T, like.width}, type) : empty({0}, type)), row_bytes(like.width * like.size) {
    if (!asked) return;
    data = static_cast<char*>(tensor.mutable_data_ptr());
    streamed = passes_caches(tensor, row_bytes);
  }
  void* at(int64_t row) const { return data == nullptr ? nullptr : data + row * row_bytes; }
  // Rows past the last one that counts.
  void clear(int64_t row, int64_t rows) const {
    if (data != nullptr) std::fill_n(data + row * row_bytes, rows * row_bytes, 0);
  }
};

// In the type of the arithmetic, contiguous; nothing of none.
template <typename T>
Buffer<T> widened(const OptionalTensor& t) {
  if (!t) return Buffer<T>(0);
  const Tensor dense = torch::stable::contiguous(*t);
  Buffer<T> out(t->numel());
  kernels().widen(storage_type(t->scalar_type()), t->numel(), 1, dense.const_data_ptr(), out.get(), false);
  return out;
}

template <typename T>
struct Problem {
  StorageType type;
  ScalarType dtype, wide;
  int64_t B, rows, groups, K;  // rows of a batch element
  Rows hidden, gate, value;
  OptionalTensor lengths;
  Buffer<T> weight;  // (groups, K, D)
  int64_t piece, pieces;

  Problem(const Tensor& hidden, const OptionalTensor& gate, const OptionalTensor& value, const Tensor& weight,
          const OptionalTensor& lengths)
      : type(storage_type(hidden.scalar_type())),
        dtype(hidden.scalar_type()),
        wide(type == StorageType::DOUBLE ? ScalarType::Double : ScalarType::Float),
        B(hidden.size(0)),
        rows(hidden.size(1)),
        groups(weight.size(0)),
        K(weight.size(1)),
        hidden(hidden, "hidden", B, rows, dtype),
        gate(gate, "gate", B, rows, dtype),
        value(value, "value", B, rows, dtype),
        lengths(lengths),
        weight(widened<T>(weight)) {
    const int64_t D = this->hidden.width;
    STD_TORCH_CHECK(weight.dim() == 3 && weight.size(2) == D && groups > 0 && B % groups == 0,
                    "attention_pool: weight: expected shape (groups of ", B, ", K, ", D, ")");
    STD_TORCH_CHECK(!gate || this->gate.width == D, "attention_pool: gate: expected the shape of hidden");
    STD_TORCH_CHECK(
        !lengths || (lengths->dim() == 1 && lengths->size(0) == B && lengths->scalar_type() == ScalarType::Long),
        "attention_pool: lengths: expected int64 of shape (", B, ",)");
    piece = std::clamp(ceil_div(B * rows, 256), LEAST_ROWS, MOST_ROWS);
    pieces = ceil_div(rows, piece);
  }

  int64_t length(int64_t b) const {
    if (!lengths) return rows;
    const int64_t n = static_cast<const int64_t*>(lengths->const_data_ptr())[b * lengths->stride(0)];
    return std::clamp<int64_t>(n, 0, rows);
  }
  const T* weight_of(int64_t b) const { return weight.get() + b / (B / groups) * K * hidden.width; }

  PoolFeatures features(int64_t b, int64_t t, int64_t count) const {
    return {count, hidden.width, K, hidden.at(b, t), gate.at(b, t), hidden.step, gate.step, weight_of(b)};
  }
  PoolValues values(int64_t b, int64_t t, int64_t count) const {
    return {count, value.width, K, value.at(b, t), value.step};
  }

  // body(task, batch element, first row, rows that count) over all pieces
  template <typename Body>
  void for_each_piece(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, 32768 / (piece * (hidden.width + 1)));
    parallel_for(B * pieces, grain, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t b = n / pieces, t = n % pieces * piece;
        body(n, b, t, std::clamp<int64_t>(length(b) - t, 0, piece));
      }
    });
  }
};

// out (groups, width) = sums over all tasks of a group of parts (tasks, width), in order
template <typename T>
Buffer<T> added_up(const T* parts, int64_t groups, int64_t each, int64_t width) {
  Buffer<T> out(groups * width);
  parallel_for(groups * width, 1024, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const T* part = parts + n / width * each * width + n % width;
      double total = 0;
      for (int64_t k = 0; k < each; ++k) total += part[k * width];
      out.get()[n] = static_cast<T>(total);
    }
  });
  return out;
}

template <typename T>
Outputs forward(const Problem<T>& p) {
  const int64_t K = p.K, N = p.rows, Dv = p.value.width;
  Tensor scores = empty({p.B, K, N}, p.wide), lse = empty({p.B, K}, p.wide);
  const bool pools = p.value.tensor.has_value();
  Tensor context = pools ? empty({p.B, K, Dv}, p.dtype) : empty({0}, p.dtype);
  T *const e = static_cast<T*>(scores.mutable_data_ptr()), *const l = static_cast<T*>(lse.mutable_data_ptr());
  const T minus_infinity = -std::numeric_limits<T>::infinity();
  p.for_each_piece([&](int64_t, int64_t b, int64_t t, int64_t count) {
    const Buffer<T> room(p.hidden.width);
    T* const at = e + b * K * N + t;
    kernels().score(p.type, p.features(b, t, count), at, N, room.get());
    for (int64_t k = 0; k < K; ++k)
      std::fill(at + k * N + count, at + k * N + std::min(p.piece, N - t), minus_infinity);
  });
  const Buffer<T> weights(pools ? p.B * K * N : 0), parts(pools ? p.B * p.pieces * K * Dv : 0);
  parallel_for(p.B * K, ceil_div(16384, std::max<int64_t>(N, 1)), [&](int64_t first, int64_t last) {
    const Buffer<T> room(pools ? 0 : N);
    for (int64_t n = first; n < last; ++n) {
      const int64_t length = p.length(n / K);
      const T* const row = e + n * N;
      T most = minus_infinity;
      bool is_nan = false;
      for (int64_t t = 0; t < length; ++t) most = std::max(most, row[t]), is_nan |= row[t] != row[t];
      T* const out = pools ? weights.get() + n * N : room.get();
      if (is_nan || std::isinf(most)) {
        // As a softmax has it: NaN but for a row of nothing.
        l[n] = length == 0 || (!is_nan && most < 0) ? minus_infinity : is_nan ? std::nan("") : most;
        if (pools) std::fill_n(out, length, length == 0 ? T(0) : static_cast<T>(std::nan("")));
        continue;
      }
      const double sum = kernels().exponentials(ARITHMETIC<T>, length, row, most, out);
      l[n] = static_cast<T>(most + std::log1p(sum - 1));  // log would be that of glibc 2.29
      if (pools)
        for (int64_t t = 0; t < length; ++t) out[t] = static_cast<T>(out[t] / sum);
    }
  });
  if (!pools) return {context, lse, scores};
  p.for_each_piece([&](int64_t task, int64_t b, int64_t t, int64_t count) {
    T* const sums = parts.get() + task * K * Dv;
    std::fill_n(sums, K * Dv, T(0));
    kernels().pool(p.type, p.values(b, t, count), weights.get() + b * K * N + t, N, sums);
  });
  const Buffer<T> found = added_up(parts.get(), p.B, p.pieces, K * Dv);
  kernels().narrow(p.type, p.B * K * Dv, found.get(), context.mutable_data_ptr());
  return {context, lse, scores};
}

template <typename T>
Gradients backward(const Problem<T>& p, const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                   const OptionalTensor& grad_scores, const Tensor& weight, const Tensor& context,
                   const Tensor& lse, const Tensor& scores, OutputMask asked) {
  const int64_t K = p.K, N = p.rows, D = p.hidden.width, Dv = p.value.width;
  const T *const e = static_cast<const T*>(scores.const_data_ptr()), *const l = static_cast<const T*>(
                                                                         lse.const_data_ptr());
  const Buffer<T> dcontext = widened<T>(grad_context), of_context = widened<T>(context);
  const Buffer<T> dlse = widened<T>(grad_lse), dscores = widened<T>(grad_scores);
  // of_row = dcontext . context - dlse, which the gradient of a weight's logarithm is relative to
  const Buffer<T> of_row(p.B * K), parts(p.B * p.pieces * K * D);
  for (int64_t n = 0; n < p.B * K; ++n) {
    double dot = grad_lse ? -double(dlse.get()[n]) : 0.0;
    for (int64_t d = 0; grad_context && d < Dv; ++d)
      dot += double(dcontext.get()[n * Dv + d]) * of_context.get()[n * Dv + d];
    of_row.get()[n] = static_cast<T>(dot);
  }
  const Result dhidden(p.hidden, p.B, N, p.dtype, asked[0]),
      dgate(p.gate, p.B, N, p.dtype, p.gate.tensor && asked[1]);
  const Result dvalue(p.value, p.B, N, p.dtype, p.value.tensor && asked[2]);
  const bool through_softmax = grad_context || grad_lse;
  p.for_each_piece([&](int64_t task, int64_t b, int64_t t, int64_t count) {
    const int64_t row = b * N + t, most = std::min(p.piece, N - t);
    for (const Result* result : {&dhidden, &dgate, &dvalue}) result->clear(row + count, most - count);
    T* const sums = parts.get() + task * K * D;
    std::fill_n(sums, K * D, T(0));
    const Buffer<T> weights(K * p.piece), de(K * p.piece);
    std::fill_n(de.get(), K * p.piece, T(0));
    if (through_softmax)
      for (int64_t k = 0; k < K && count > 0; ++k)
        kernels().exponentials(ARITHMETIC<T>, count, e + (b * K + k) * N + t, l[b * K + k],
                               weights.get() + k * p.piece);
    if (grad_context)
      kernels().value_gradients(p.type, p.values(b, t, count), dcontext.get() + b * K * Dv, weights.get(), p.piece,
                                de.get(), dvalue.at(row), dvalue.streamed);
    else
      dvalue.clear(row, count);
    for (int64_t k = 0; k < K; ++k) {
      T* const g = de.get() + k * p.piece;
      const T* const own = weights.get() + k * p.piece;
      if (through_softmax)
        for (int64_t i = 0; i < count; ++i) g[i] = own[i] * (g[i] - of_row.get()[b * K + k]);
      if (grad_scores)
        for (int64_t i = 0; i < count; ++i) g[i] += dscores.get()[(b * K + k) * N + t + i];
    }
    kernels().feature_gradients(p.type, p.features(b, t, count), de.get(), p.piece, dhidden.at(row), dgate.at(row),
                                sums, dhidden.streamed || dgate.streamed);
  });
  Tensor dweight = empty({0}, weight.scalar_type());
  if (asked[3]) {
    const Buffer<T> found = added_up(parts.get(), p.groups, p.B / p.groups * p.pieces, K * D);
    dweight = empty({p.groups, K, D}, weight.scalar_type());
    kernels().narrow(storage_type(weight.scalar_type()), dweight.numel(), found.get(), dweight.mutable_data_ptr());
  }
  return {dhidden.tensor, dgate.tensor, dvalue.tensor, dweight};
}

Outputs attention_pool_fwd(const Tensor& hidden, const OptionalTensor& gate, const OptionalTensor& value,
                           const Tensor& weight, const OptionalTensor& lengths) {
  if (storage_type(hidden.scalar_type()) == StorageType::DOUBLE)
    return forward(Problem<double>(hidden, gate, value, weight, lengths));
  return forward(Problem<float>(hidden, gate, value, weight, lengths));
}

Gradients attention_pool_bwd(const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                             const OptionalTensor& grad_scores, const Tensor& hidden, const OptionalTensor& gate,
                             const OptionalTensor& value, const Tensor& weight, const OptionalTensor& lengths,
                             const Tensor& context, const Tensor& lse, const Tensor& scores, OutputMask asked) {
  const auto run = [&](const auto& problem) {
    return backward(problem, grad_context, grad_lse, grad_scores, weight, context, lse, scores, asked);
  };
  if (storage_type(hidden.scalar_type()) == StorageType::DOUBLE)
    return run(Problem<double>(hidden, gate, value, weight, lengths));
  return run(Problem<float>(hidden, gate, value, weight, lengths));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("attention_pool_fwd", boxed<attention_pool_fwd>);
  m.impl("attention_pool_bwd", boxed<attention_pool_bwd>);
}

}  // namespace fusedattn
