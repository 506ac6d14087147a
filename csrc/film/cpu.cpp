// CPU launcher of FiLM: memory layout (layout.h), allocation, and the kernels of cpu_kernel.h over all cores.
//
// Work is cut into pieces by shape alone and partial sums are added in a fixed order: results are bitwise
// reproducible.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <tuple>
#include <vector>

#include "common/box.h"
#include "common/cpu_level.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "cpu_kernel.h"
#include "layout.h"

namespace fusedattn {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t PIECE = 16384;  // elements per task: long enough to stream, short enough to sum in one go

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

FilmType storage_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return FilmType::FLOAT;
    case ScalarType::Double:
      return FilmType::DOUBLE;
    case ScalarType::Half:
      return FilmType::HALF;
    case ScalarType::BFloat16:
      return FilmType::BFLOAT16;
    default:
      STD_TORCH_CHECK(false, "film: x: expected float32, float64, float16 or bfloat16");
      return FilmType::FLOAT;
  }
}

// scale = gamma + offset (1 without gamma) or shift = beta (0 without), per batch element and channel, in the
// dtype of the arithmetic; one row where all elements of the batch share it.
template <typename T>
struct ChannelValues {
  Buffer<T> memory;
  int64_t stride;
  const T* row(int64_t b) const { return memory.get() + b * stride; }
};

template <typename T>
ChannelValues<T> channel_values(const OptionalTensor& source, const Layout& layout, T offset, T absent) {
  const int64_t C = layout.C;
  const int64_t rows = source && source->dim() == 2 ? layout.B : 1;
  ChannelValues<T> values{Buffer<T>(rows * C), rows > 1 ? C : 0};
  T* out = values.memory.get();
  if (!source) {
    std::fill_n(out, C, absent);
    return values;
  }
  layout.check_parameter(*source);
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor t = contiguous(*source, type);
  const T* in = t.const_data_ptr<T>();
  for (int64_t n = 0; n < rows * C; ++n) out[n] = in[n] + offset;
  return values;
}

Tensor empty_like(const Layout& in) {
  const auto sizes = in.x.sizes(), strides = in.x.strides();
  return empty({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, in.x.scalar_type());
}

const FilmKernels& kernels() { return FUSEDATTN_LEVEL_TABLE(film); }

// Tasks over (B, M, C) runs of N elements: neighbouring channels share one where runs are short, and long runs are
// cut into pieces.
struct Runs {
  const Layout& in;
  int64_t pieces, group, groups, tasks, grain;

  explicit Runs(const Layout& layout) : in(layout) {
    pieces = ceil_div(in.N, PIECE);
    group = std::min(in.C, std::max<int64_t>(1, PIECE / in.N));
    groups = ceil_div(in.C, group);
    tasks = in.B * in.M * groups * pieces;
    grain = std::max<int64_t>(1, PIECE / (group * in.N));
  }

  struct Task {
    int64_t b, c, channels, element, length, part;  // part: its first place among (B, M, C, pieces) sums
  };
  Task task(int64_t n) const {
    const int64_t piece = n % pieces, c = n / pieces % groups * group, row = n / (pieces * groups);
    const int64_t run = row * in.C + c;
    return {row / in.M,
            c,
            std::min(group, in.C - c),
            run * in.N + piece * PIECE,
            std::min(PIECE, in.N - piece * PIECE),
            run * pieces + piece};
  }
};

template <typename T>
Tensor forward(const Layout& in, FilmType type, const OptionalTensor& gamma, const OptionalTensor& beta,
               const OptionalTensor& residual, const FilmOptions& options) {
  const ChannelValues<T> scale = channel_values<T>(gamma, in, static_cast<T>(options.gamma_offset), T(1));
  const ChannelValues<T> shift = channel_values<T>(beta, in, T(0), T(0));
  Tensor y = empty_like(in);
  const int64_t size = in.x.element_size();
  OptionalTensor addend;
  if (residual) addend = in.like(*residual);
  const char* x = static_cast<const char*>(in.x.const_data_ptr());
  const char* r = addend ? static_cast<const char*>(addend->const_data_ptr()) : nullptr;
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const bool streamed = passes_caches(y, (in.N > 1 ? in.N : in.C) * size);
  const auto at = [&](int64_t element) { return r == nullptr ? nullptr : r + element * size; };

  if (in.N > 1) {
    const Runs runs(in);
    parallel_for(runs.tasks, runs.grain, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const Runs::Task t = runs.task(n);
        kernels().forward_runs(type, options, t.channels, t.length, x + t.element * size, scale.row(t.b) + t.c,
                               shift.row(t.b) + t.c, at(t.element), out + t.element * size, streamed);
      }
    });
  } else {
    const int64_t rows = std::max<int64_t>(1, PIECE / std::max<int64_t>(in.C, 1)), pieces = ceil_div(in.M, rows);
    parallel_for(in.B * pieces, ceil_div(PIECE, rows * in.C), [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t b = n / pieces, begin = n % pieces * rows, element = (b * in.M + begin) * in.C;
        kernels().forward_rows(type, options, std::min(rows, in.M - begin), in.C, x + element * size, scale.row(b),
                               shift.row(b), at(element), out + element * size, streamed);
      }
    });
  }
  return y;
}

// Sums over the pieces of each batch element and channel, and over the batch where all elements share the
// parameter. parts: (B, pieces, C), or (B, M, C, pieces) for runs.
template <typename T>
Tensor reduced(const Tensor& like, const Layout& in, const Buffer<T>& parts, int64_t pieces, bool runs) {
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = like.dim() == 2 ? in.B : 1, C = in.C, added = in.B / rows;
  Tensor sums = empty({like.sizes().begin(), like.sizes().end()}, type);
  T* out = sums.template mutable_data_ptr<T>();
  const T* part = parts.get();
  const int64_t summands = runs ? in.M : pieces, each = runs ? pieces : 1;  // part is read in order
  std::vector<double> sum(C);
  for (int64_t row = 0; row < rows; ++row) {
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t n = 0; n < added * summands; ++n)
      if (each == 1)  // the loop that the compiler turns into vectors
        for (int64_t c = 0; c < C; ++c) sum[c] += *part++;
      else
        for (int64_t c = 0; c < C; ++c)
          for (int64_t s = 0; s < each; ++s) sum[c] += *part++;
    for (int64_t c = 0; c < C; ++c) out[row * C + c] = static_cast<T>(sum[c]);
  }
  return contiguous(sums, like.scalar_type());
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Tensor& grad_output, const Layout& in, FilmType type, const OptionalTensor& gamma,
                   const OptionalTensor& beta, const FilmOptions& options) {
  const ChannelValues<T> scale = channel_values<T>(gamma, in, static_cast<T>(options.gamma_offset), T(1));
  const ChannelValues<T> shift = channel_values<T>(beta, in, T(0), T(0));
  const Tensor grad = in.like(grad_output);
  Tensor dx = empty_like(in);
  const int64_t size = in.x.element_size();
  const char* x = static_cast<const char*>(in.x.const_data_ptr());
  const char* dy = static_cast<const char*>(grad.const_data_ptr());
  char* out = static_cast<char*>(dx.mutable_data_ptr());

  const bool runs = in.N > 1;
  const bool streamed = passes_caches(dx, (runs ? in.N : in.C) * size);
  int64_t pieces;
  Buffer<T> dz_x, dz;
  if (runs) {
    const Runs cut(in);
    pieces = cut.pieces;
    const int64_t parts = in.B * in.M * in.C * pieces;
    dz_x = Buffer<T>(parts), dz = Buffer<T>(parts);
    parallel_for(cut.tasks, cut.grain, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const Runs::Task t = cut.task(n);
        kernels().backward_runs(type, options, t.channels, t.length, dy + t.element * size, x + t.element * size,
                                scale.row(t.b) + t.c, shift.row(t.b) + t.c, out + t.element * size,
                                dz_x.get() + t.part, dz.get() + t.part, streamed);
      }
    });
  } else {
    // Few pieces, so that partial sums stay small beside x, but work for many cores; no sum longer than in a run.
    const int64_t least = std::max<int64_t>(16, PIECE / std::max<int64_t>(in.C, 1));
    const int64_t rows = std::max(least, std::min<int64_t>(1024, ceil_div(in.B * in.M, 256)));
    pieces = ceil_div(in.M, rows);
    dz_x = Buffer<T>(in.B * pieces * in.C), dz = Buffer<T>(in.B * pieces * in.C);
    parallel_for(in.B * pieces, ceil_div(PIECE, rows * in.C), [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t b = n / pieces, begin = n % pieces * rows, element = (b * in.M + begin) * in.C;
        kernels().backward_rows(type, options, std::min(rows, in.M - begin), in.C, dy + element * size,
                                x + element * size, scale.row(b), shift.row(b), out + element * size,
                                dz_x.get() + n * in.C, dz.get() + n * in.C, streamed);
      }
    });
  }
  const auto none = [&] { return empty({0}, in.x.scalar_type()); };
  return {dx, gamma ? reduced<T>(*gamma, in, dz_x, pieces, runs) : none(),
          beta ? reduced<T>(*beta, in, dz, pieces, runs) : none()};
}

Tensor film_fwd(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                const OptionalTensor& residual, const FilmOptions& options) {
  const FilmType type = storage_type(x.scalar_type());
  if (x.numel() == 0) return torch::stable::empty_like(x);
  const Layout in(x, options);
  return in.restored(type == FilmType::DOUBLE ? forward<double>(in, type, gamma, beta, residual, options)
                                              : forward<float>(in, type, gamma, beta, residual, options),
                     x);
}

Gradients film_bwd(const Tensor& grad_output, const Tensor& x, const OptionalTensor& gamma,
                   const OptionalTensor& beta, const FilmOptions& options) {
  const FilmType type = storage_type(x.scalar_type());
  const auto zeros = [&](const OptionalTensor& t) {
    Tensor zero =
        t ? torch::stable::empty_like(*t) : torch::stable::empty(std::vector<int64_t>{0}, x.scalar_type());
    torch::stable::zero_(zero);
    return zero;
  };
  if (x.numel() == 0) return {torch::stable::empty_like(x), zeros(gamma), zeros(beta)};
  const Layout in(x, options);
  auto [dx, dgamma, dbeta] = type == FilmType::DOUBLE
                                 ? backward<double>(grad_output, in, type, gamma, beta, options)
                                 : backward<float>(grad_output, in, type, gamma, beta, options);
  return {in.restored(dx, x), dgamma, dbeta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("film_fwd", boxed<film_fwd>);
  m.impl("film_bwd", boxed<film_bwd>);
}

}  // namespace fusedattn
