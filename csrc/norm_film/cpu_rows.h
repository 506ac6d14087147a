// Layer and rms norm on the CPU, whose groups are rows of neighbouring channels.
//
// Tasks are pieces of a batch element's positions, or of all positions where no parameter has a value for each
// batch element. What backward sums over a piece goes to an array of its own, and those are added in a second
// step.
#pragma once

#include "cpu_problem.h"

namespace fusedattn {
namespace {

// `count` rows from this one on, as the kernels take them; `result` is the large tensor that they write.
template <typename T>
NormRows rows_from(const Problem& p, int64_t row, int64_t count, const void* pre_residual,
                   const Channels<T>& channels, const Tensor& mean, const Tensor& variance, T* room,
                   const Tensor& result) {
  return {count,
          p.in.C,
          bytes(p.in.x) + row * p.in.C * p.size,
          pre_residual,
          channels.gate,
          channels.scale,
          channels.shift,
          channels.offset,
          p.options.norm == Norm::RMS,
          p.options.eps,
          numbers(mean) + row,
          numbers(variance) + row,
          room,
          p.streams(result)};
}

template <typename T>
Outputs rows_forward(const Problem& p, const OptionalTensor& pre_residual, const OptionalTensor& residual) {
  const NormLayout& in = p.in;
  const bool forms = pre_residual || p.gate.is_present();
  Outputs out{in.empty_like(), forms ? in.empty_like() : empty({0}, in.x.scalar_type()), statistic(in.B * in.T),
              statistic(in.B * in.T)};
  const OptionalTensor before = like(in, pre_residual, "pre_residual"), after = like(in, residual, "residual");
  const bool apart = p.rows_differ_in_affine() || p.rows_differ_in_gate();
  char *const y = static_cast<char*>(out.y.mutable_data_ptr()), *const h = forms ? static_cast<char*>(
                                                                                       out.h.mutable_data_ptr())
                                                                                 : nullptr;
  p.for_each_task([&](int64_t first, int64_t last) {
    const Buffer<T> room((Channels<T>::ROOMS + 1) * in.C);
    Channels<T> channels(p, room.get(), 0, in.C);
    for (int64_t n = first; n < last; ++n) {
      const Problem::Task task = p.task(n);
      const int64_t at_once = apart ? 1 : task.rows;
      for (int64_t row = task.first; row < task.first + task.rows; row += at_once) {
        channels.of_row(row, row == task.first, true);
        const int64_t at = row * in.C * p.size;
        const NormRows rows = rows_from(p, row, at_once, offset(bytes(before), at), channels, out.mean,
                                        out.variance, room.get() + Channels<T>::ROOMS * in.C, out.y);
        kernels().rows_forward(p.type, p.options.activation, rows, offset(bytes(after), at), offset(h, at),
                               y + at);
      }
    }
  });
  return out;
}

template <typename T>
GradientsOut rows_backward(const Problem& p, const OptionalTensor& grad_y, const OptionalTensor& grad_h,
                           const Tensor& formed, OutputMask asked, const Tensor& mean, const Tensor& variance) {
  const NormLayout& in = p.in;
  const int64_t C = in.C;
  const GradientsOut out(p, asked);
  const Sums<T> sums(p);
  const OptionalTensor dy = like(in, grad_y, "grad_y"), dh = like(in, grad_h, "grad_h");
  const Tensor h = formed.dim() == in.x.dim() ? in.like(formed, "h") : in.x;
  const bool of_rows_affine = p.rows_differ_in_affine(), of_rows_gate = p.rows_differ_in_gate();
  char *const dx = asked[X] ? static_cast<char*>(out.dx.mutable_data_ptr()) : nullptr,
              *const dr = asked[PRE_RESIDUAL] ? static_cast<char*>(out.dr.mutable_data_ptr()) : nullptr;
  p.for_each_task([&](int64_t first, int64_t last) {
    const Buffer<T> room((Channels<T>::ROOMS + 5) * C);
    T* const own = room.get() + Channels<T>::ROOMS * C;
    T *const dz_n = own + C, *const dz = own + 2 * C, *const dh_x = own + 3 * C, *const made = own + 4 * C;
    Channels<T> channels(p, room.get(), 0, C);
    for (int64_t n = first; n < last; ++n) {
      const Problem::Task task = p.task(n);
      sums.clear(n);
      const int64_t at_once = of_rows_affine || of_rows_gate ? 1 : task.rows;
      for (int64_t row = task.first; row < task.first + task.rows; row += at_once) {
        channels.of_row(row, row == task.first, true);
        if (of_rows_affine) std::fill_n(dz_n, 2 * C, T(0));
        if (of_rows_gate) std::fill_n(dh_x, C, T(0));
        const int64_t at = row * C * p.size;
        const NormRows rows =
            rows_from(p, row, at_once, nullptr, channels, mean, variance, own, asked[X] ? out.dx : out.dr);
        kernels().rows_backward(p.type, p.options.activation, rows,
                                {offset(bytes(h), at), offset(bytes(dy), at), offset(bytes(dh), at),
                                 offset(dx, at), offset(dr, at), of_rows_affine ? dz_n : sums.of(n, DZ_N),
                                 of_rows_affine ? dz : sums.of(n, DZ), of_rows_gate ? dh_x : sums.of(n, DH_X)});
        if (of_rows_affine) {
          const auto add = [&](Sum sum, const T* factor, const T* values) {
            if (sums.needed[sum])
              kernels().products(ARITHMETIC<T>, C, factor, values, nullptr, nullptr, sums.of(n, sum), true);
          };
          add(DZ_N, nullptr, dz_n), add(DZ, nullptr, dz);
          if (sums.needed[DU]) {
            const T* const factor = channels.factor();
            add(DU_N, factor, dz_n), add(DU, factor, dz);
          }
          if (p.gamma.is_asked(Level::ELEMENT)) {
            kernels().products(ARITHMETIC<T>, C, channels.weight, dz_n, channels.bias, dz, made, false);
            out.gamma.put(Level::ELEMENT, row, 0, C, made);
          }
          out.beta.put(Level::ELEMENT, row, 0, C, dz);
        }
        if (of_rows_gate) {
          if (sums.needed[DH_X])
            kernels().products(ARITHMETIC<T>, C, nullptr, dh_x, nullptr, nullptr, sums.of(n, DH_X), true);
          out.gate.put(Level::ELEMENT, row, 0, C, dh_x);
        }
      }
    }
  });
  if (sums.count > 0) add_up(sums, out);
  return out;
}

}  // namespace
}  // namespace fusedattn
