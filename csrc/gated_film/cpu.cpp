// CPU launcher of gated_film: rows of y over the two halves of x, a and b, with those of the condition in the
// places of gamma and beta (film/cpu_parameters.h).
#include <tuple>
#include <vector>

#include "common/box.h"
#include "cpu_kernel.h"
#include "film/cpu_parameters.h"
#include "options.h"

namespace fusedattn {
namespace {

using torch::headeronly::ScalarType;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

const GatedFilmKernels& gate_kernels() { return FUSEDATTN_LEVEL_TABLE(gated_film); }

// The condition and what is added to it, by halves.
struct Halves {
  FilmParameters of;
  FilmStrides strides;     // of the gradients, which are whole
  int64_t offset[2] = {};  // of their second halves
  bool is_shared[2] = {};  // both halves are the same numbers

  Halves(const Layout& x, const OptionalTensor& condition, const OptionalTensor& added) {
    if (condition) split(x, *condition, 0, of.gamma, of.beta);
    if (added) split(x, *added, 1, of.gamma_added, of.beta_added);
  }
  const OptionalTensor& operator[](int n) const { return of[n]; }

 private:
  void split(const Layout& x, const Tensor& t, int n, OptionalTensor& a, OptionalTensor& b) {
    const std::vector<int64_t> dims = x.dims_of(t);
    const int64_t d = std::find(dims.begin(), dims.end(), x.channel_dim) - dims.begin();
    strides[n] = strides[n + 2] = x.dense_strides(t);
    is_shared[n] = d == t.dim() || t.size(d) == 1;
    if (is_shared[n]) {
      a = b = t;
      return;
    }
    const int64_t C = x.C / 2;
    Tensor whole = t;
    a = torch::stable::narrow(whole, d, 0, C);
    b = torch::stable::narrow(whole, d, C, C);
    offset[n] = C * strides[n][d];
  }
};

Layout layout_of(const Tensor& x, const GatedFilmOptions& options) {
  const Layout in(x, options.channel_dim, "gated_film", "condition");
  STD_TORCH_CHECK(in.C % 2 == 0, "gated_film: x: expected an even number of channels, got ", in.C);
  return in;
}

// What is like y lies dense in the order of x.
struct Half {
  std::vector<int64_t> sizes, strides;
  ScalarType type;

  explicit Half(const Layout& x) : type(x.x.scalar_type()) {
    const auto of_x = x.x.sizes();
    sizes.assign(of_x.begin(), of_x.end());
    strides.resize(sizes.size());
    sizes[x.channel_dim] /= 2;
    int64_t step = 1;
    for (size_t n = x.order.size(); n-- > 0;) {
      strides[x.order[n]] = step;
      step *= sizes[x.order[n]];
    }
  }

  Tensor empty() const { return fusedattn::empty(sizes, strides, type); }

  Tensor like(const Tensor& t) const {
    bool same = t.dim() == int64_t(sizes.size()) && t.scalar_type() == type, in_place = true;
    for (int64_t d = 0; same && d < t.dim(); ++d) {
      same = t.size(d) == sizes[d];
      in_place &= sizes[d] == 1 || t.stride(d) == strides[d];
    }
    STD_TORCH_CHECK(same, "gated_film: grad_output: expected the shape and dtype of y");
    if (in_place) return t;
    Tensor copy = empty();
    torch::stable::copy_(copy, t);
    return copy;
  }
};

template <typename T>
Problem<T> problem(const Layout& y, StorageType type, const Halves& condition, const FilmWalk& walk) {
  return {y, type, condition.of, 0.0, T(0), false, walk};
}

template <typename T>
GatedFilmRows rows_of(const Problem<T>& p, const Layout& x, FilmRows rows, const FilmWalk::Offsets& at,
                      int64_t column) {
  rows.x = static_cast<const char*>(x.x.const_data_ptr()) + (at.of[SOURCE] + column) * p.size;
  return {rows, p.walk.line_step(SOURCE), x.C / 2 * x.x.stride(x.channel_dim)};
}

template <typename T>
Tensor forward(const Layout& x, StorageType type, const Halves& condition) {
  Tensor result = Half(x).empty();
  const Layout y = x.of(result);
  const FilmWalk walk = y.walk(condition.of, condition.strides, x.x);
  Problem<T> p = problem<T>(y, type, condition, walk);
  char* const out = static_cast<char*>(result.mutable_data_ptr());
  p.forward(p.streams(result), [&](const FilmRows& rows, const FilmWalk::Offsets& at, int64_t column) {
    gate_kernels().forward(type, rows_of(p, x, rows, at, column), out + (at.of[0] + column) * p.size);
  });
  return result;
}

template <typename T>
Gradients backward(const Tensor& grad_output, const Layout& x, StorageType type, const Halves& condition,
                   const OptionalTensor* parameters, OutputMask asked) {
  const Layout y = x.of(grad_output);
  FilmWalk walk = y.walk(condition.of, condition.strides, x.x);
  gather_sums(walk);
  Problem<T> p = problem<T>(y, type, condition, walk);
  std::vector<Gradient<T>> of_a, of_b;
  for (int n = 0; n < 2; ++n) {
    if (!parameters[n] || !asked[1 + n]) continue;
    const auto sizes = parameters[n]->sizes();
    const Tensor result = empty({sizes.begin(), sizes.end()}, condition.strides[n], parameters[n]->scalar_type());
    of_a.emplace_back(result, walk, GRADIENTS + n, 0, condition.is_shared[n]);
    of_b.emplace_back(result, walk, GRADIENTS + 2 + n, condition.offset[n], condition.is_shared[n]);
  }
  Tensor dx = asked[0] ? empty_like(x) : empty({0}, x.x.scalar_type());
  const char* const dy = static_cast<const char*>(grad_output.const_data_ptr());
  char* const out = static_cast<char*>(dx.mutable_data_ptr());
  // Both halves of a row of dx are whole cache lines.
  const bool streamed = asked[0] && passes_caches(dx, walk.row().size * p.size);
  backward_rows(
      p, of_a, of_b, asked[0], 2, streamed,
      [&](const FilmRows& rows, const FilmSums& sums, const FilmWalk::Offsets& at, int64_t column, char* unasked) {
        char* const to = asked[0] ? out + (at.of[SOURCE] + column) * p.size : unasked;
        gate_kernels().backward(type, rows_of(p, x, rows, at, column), dy + (at.of[0] + column) * p.size, to,
                                sums);
      });

  Tensor found[2];
  for (int n = 0, next = 0; n < 2; ++n)
    if (parameters[n] && asked[1 + n]) {
      found[n] = finished<T>(walk, {&of_a[next], &of_b[next]});
      ++next;
    } else {
      found[n] = empty({0}, x.x.scalar_type());
    }
  return {dx, found[0], found[1]};
}

Tensor half_of(const Tensor& x, const GatedFilmOptions& options) {
  Tensor whole = x;
  return torch::stable::narrow(whole, options.channel_dim, 0, x.size(options.channel_dim) / 2);
}

Tensor gated_film_fwd(const Tensor& x, const OptionalTensor& condition, const OptionalTensor& condition_added,
                      const GatedFilmOptions& options) {
  const StorageType type = storage_type(x.scalar_type());
  if (x.numel() == 0) return torch::stable::empty_like(half_of(x, options));
  const Layout in = layout_of(x, options);
  const Halves halves(in, condition, condition_added);
  const Tensor y =
      type == StorageType::DOUBLE ? forward<double>(in, type, halves) : forward<float>(in, type, halves);
  return in.copied ? as_empty_like(y, half_of(x, options)) : y;
}

Gradients gated_film_bwd(const Tensor& grad_output, const Tensor& x, const OptionalTensor& condition,
                         const OptionalTensor& condition_added, const GatedFilmOptions& options,
                         OutputMask asked) {
  const StorageType type = storage_type(x.scalar_type());
  if (x.numel() == 0) {
    const auto zeros = [&](int n, const OptionalTensor& t) {
      Tensor zero = t && asked[n] ? torch::stable::empty_like(*t) : empty({0}, x.scalar_type());
      torch::stable::zero_(zero);
      return zero;
    };
    return {zeros(0, x), zeros(1, condition), zeros(2, condition_added)};
  }
  const Layout in = layout_of(x, options);
  const Halves halves(in, condition, condition_added);
  const Tensor grad = Half(in).like(grad_output);
  const OptionalTensor parameters[2] = {condition, condition_added};
  auto [dx, of_condition, of_added] = type == StorageType::DOUBLE
                                          ? backward<double>(grad, in, type, halves, parameters, asked)
                                          : backward<float>(grad, in, type, halves, parameters, asked);
  return {asked[0] ? in.restored(dx, x) : dx, of_condition, of_added};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("gated_film_fwd", boxed<gated_film_fwd>);
  m.impl("gated_film_bwd", boxed<gated_film_bwd>);
}

}  // namespace fusedattn
