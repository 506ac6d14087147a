// Group, instance and batch norm on the CPU, whose groups reach over positions.
//
// A domain holds whole groups: one group of channels' planes (NCHW), or all channels of a batch element where they
// are neighbours, and for batch norm a channel, or everything. It is cut into units, pieces of a plane or of the
// positions. A first step takes of each unit what is added up over a group, a second one has the results. Where a
// domain stays in the cache one task does both steps of it, else each step is spread over all units. The planes of
// batch norm's channels lie apart: to visit them channel by channel takes longer than to read x twice as it lies.
#pragma once

#include <cmath>

#include "cpu_problem.h"

namespace fusedattn {
namespace {

constexpr int64_t PLANE_PIECE = 8192;     // elements of a unit of a plane
constexpr int64_t ROWS_PIECE = 32768;     // of a unit of rows of channels
constexpr int64_t IN_CACHE = 256 * 1024;  // of a domain that stays there between both steps

const NormFilmMapKernels& map_kernels() { return FUSEDATTN_LEVEL_TABLE(norm_film_maps); }

template <typename T>
class Maps {
 public:
  Maps(const Problem& p, const Tensor& mean, const Tensor& variance)
      : p_(p),
        in_(p.in),
        is_batch_(p.options.norm == Norm::BATCH),
        groups_(p.options.norm == Norm::GROUP ? p.options.num_groups : p.in.C),
        width_(p.in.C / groups_),
        per_batch_(p.batches > 1 || p.in.B == 1 || !is_batch_),
        mean_(numbers(mean)),
        variance_(numbers(variance)),
        channels_(COUNT * (per_batch_ ? in_.B : 1) * in_.C) {
    piece_ = std::min(in_.T, in_.planes ? PLANE_PIECE : std::clamp<int64_t>(ROWS_PIECE / in_.C, 16, MOST_ROWS));
    pieces_ = ceil_div(in_.T, piece_);
    domains_ = in_.planes ? (is_batch_ ? in_.C : in_.B * groups_) : is_batch_ ? 1 : in_.B;
    units_ = pieces_ * (is_batch_ ? in_.B : in_.planes ? width_ : 1);
    const Buffer<T> room(Channels<T>::ROOMS * in_.C);
    Channels<T> channels(p, room.get(), 0, in_.C);
    for (int64_t b = 0; b < (per_batch_ ? in_.B : 1); ++b) {
      channels.of_row(b * in_.T, b == 0 || p.batches > 1);
      std::copy_n(channels.scale, in_.C, number(SCALE, b, 0));
      std::copy_n(channels.shift, in_.C, number(SHIFT, b, 0));
      if (channels.gate != nullptr) std::copy_n(channels.gate, in_.C, number(GATE, b, 0));
    }
  }

  void forward(const OptionalTensor& pre_residual, const OptionalTensor& residual, const Outputs& out) {
    const bool forms = pre_residual || p_.gate.is_present();
    const OptionalTensor before = like(in_, pre_residual, "pre_residual"), after = like(in_, residual, "residual");
    char *const y = static_cast<char*>(out.y.mutable_data_ptr()), *const h = forms ? static_cast<char*>(
                                                                                         out.h.mutable_data_ptr())
                                                                                   : nullptr;
    const char* const x = bytes(in_.x);
    const char* const normed = forms ? h : x;
    const bool streamed = streams(out.y);
    const Buffer<Moments> moments(in_.planes ? domains_ * units_ : 0);
    const Buffer<T> columns(in_.planes || !p_.options.training ? 0 : domains_ * units_ * 3 * in_.C);
    const auto first = [&](const Unit& u) {
      if (forms)
        map_kernels().form(p_.type, rows(u, x, false), p_.gate.is_present() ? number(GATE, u.b, u.c) : nullptr,
                           offset(bytes(before), u.at), h + u.at);
      if (!p_.options.training) return;
      if (in_.planes) {
        moments.get()[u.index] = map_kernels().row_moments(p_.type, u.size, normed + u.at);
      } else {
        T* const found = columns.get() + u.index * 3 * in_.C;
        map_kernels().column_moments(p_.type, u.size, in_.C, normed + u.at, found, found + in_.C,
                                     found + 2 * in_.C);
      }
    };
    const auto close = [&](int64_t domain) {
      if (!p_.options.training) return normalise(domain);
      const int64_t n = elements_of_group();
      for_each_group(domain, [&](int64_t statistic, int64_t channel) {
        // body(elements, their mean, squares around it)
        const auto each = [&](const auto& body) {
          for (int64_t k = 0; k < units_; ++k) {
            const int64_t index = domain * units_ + k, size = size_of(k);
            if (in_.planes) {
              body(size, moments.get()[index].mean, moments.get()[index].squares);
              continue;
            }
            const T* const found = columns.get() + index * 3 * in_.C;
            for (int64_t c = channel; c < channel + width_; ++c)
              body(size, double(found[c]) + found[in_.C + c], double(found[2 * in_.C + c]));
          }
        };
        double mean = 0, squares = 0;
        each([&](int64_t size, double of, double) { mean += of * size; });
        mean /= n;
        each(
            [&](int64_t size, double of, double around) { squares += around + (of - mean) * (of - mean) * size; });
        mean_[statistic] = mean;
        variance_[statistic] = squares / n;
      });
      normalise(domain);
    };
    run(first, close, [&](const Unit& u) {
      map_kernels().forward(p_.type, p_.options.activation, rows(u, normed, streamed), offset(bytes(after), u.at),
                            y + u.at);
    });
  }

  void backward(const OptionalTensor& grad_y, const OptionalTensor& grad_h, const Tensor& formed,
                const GradientsOut& out, OutputMask asked, const Sums<T>& sums) {
    const OptionalTensor dy = like(in_, grad_y, "grad_y"), dh = like(in_, grad_h, "grad_h");
    const Tensor normed = formed.dim() == in_.x.dim() ? in_.like(formed, "h") : in_.x;
    const char *const h = bytes(normed), *const x = bytes(in_.x);
    char *const dx = asked[X] ? static_cast<char*>(out.dx.mutable_data_ptr()) : nullptr,
                *const dr = out.dr.dim() == in_.x.dim() ? static_cast<char*>(out.dr.mutable_data_ptr()) : nullptr;
    const bool streamed = streams(asked[X] ? out.dx : out.dr), of_gate = sums.needed[DH_X];
    const int64_t of_unit = in_.planes ? 1 : in_.C;
    // An activation's derivative costs more than to keep dz, where what will be dx holds it unrounded.
    const bool is_wide = p_.type == StorageType::FLOAT || p_.type == StorageType::DOUBLE;
    const bool keeps = dx && dy && !streamed && is_wide && p_.options.activation != Activation::NONE;
    const Buffer<T> parts(3 * domains_ * units_ * of_unit);
    for (int64_t domain = 0; domain < domains_; ++domain) normalise(domain);
    const auto part = [&](int64_t index, int which) { return parts.get() + (3 * index + which) * of_unit; };
    const auto first = [&](const Unit& u) {
      std::fill_n(part(u.index, 0), 3 * of_unit, T(0));
      if (dy)
        map_kernels().sums(p_.type, p_.options.activation, rows(u, h, false), bytes(dy) + u.at,
                           keeps ? dx + u.at : nullptr, part(u.index, 0), part(u.index, 1));
    };
    const auto close = [&](int64_t domain) {
      const double n = elements_of_group();
      for_each_group(domain, [&](int64_t statistic, int64_t channel) {
        const double rstd = rstd_of(statistic), rest = static_cast<T>(mean_[statistic]) - mean_[statistic];
        double sum = 0, product = 0;
        // of the units of one channel of one batch element
        for_each_channel(domain, channel, [&](int64_t b, int64_t c, int64_t k) {
          double dz_h = 0, dz = 0;
          for (int64_t of = k; of < k + pieces_; ++of) {
            const int64_t index = domain * units_ + of;
            dz_h += part(index, 0)[in_.planes ? 0 : c];
            dz += part(index, 1)[in_.planes ? 0 : c];
          }
          const double dz_n = (dz_h + rest * dz) * rstd;
          if (sums.needed[DZ_N]) sums.of(b, DZ_N)[c] = static_cast<T>(dz_n);
          if (sums.needed[DZ]) sums.of(b, DZ)[c] = static_cast<T>(dz);
          sum += dz * *number(SCALE, b, c);
          product += dz_n * *number(SCALE, b, c);
        });
        const double by_h = p_.options.training ? rstd * rstd * product / n : 0;
        const double by_mean = p_.options.training ? rstd * sum / n + rest * by_h : 0;
        for_each_channel(domain, channel, [&](int64_t b, int64_t c, int64_t) {
          *number(BY_H, b, c) = static_cast<T>(by_h);
          *number(BY_MEAN, b, c) = static_cast<T>(by_mean);
        });
      });
    };
    run(first, close, [&](const Unit& u) {
      const char* const grad = keeps ? dx + u.at : offset(bytes(dy), u.at);
      map_kernels().backward(p_.type, keeps ? Activation::NONE : p_.options.activation, rows(u, h, streamed),
                             {grad, offset(bytes(dh), u.at), x + u.at, number(BY_H, u.b, u.c),
                              number(BY_MEAN, u.b, u.c), p_.gate.is_present() ? number(GATE, u.b, u.c) : nullptr,
                              offset(dx, u.at), offset(dr, u.at), of_gate ? part(u.index, 2) : nullptr});
    });
    if (of_gate)
      for (int64_t domain = 0; domain < domains_; ++domain)
        for_each_group(domain, [&](int64_t, int64_t channel) {
          for_each_channel(domain, channel, [&](int64_t b, int64_t c, int64_t k) {
            double total = 0;
            for (int64_t of = k; of < k + pieces_; ++of)
              total += part(domain * units_ + of, 2)[in_.planes ? 0 : c];
            sums.of(b, DH_X)[c] = static_cast<T>(total);
          });
        });
  }

 private:
  // Of each channel, in the type of the arithmetic: z = SCALE n + SHIFT = (h - MEAN) FACTOR + TERM; see
  // NormMapGradients.
  enum Number { SCALE, SHIFT, GATE, MEAN, FACTOR, TERM, BY_H, BY_MEAN, COUNT };
  T* number(Number which, int64_t b, int64_t c) const {
    const int64_t batch = per_batch_ ? b : 0, batches = per_batch_ ? in_.B : 1;
    return channels_.get() + (which * batches + batch) * in_.C + c;
  }

  struct Unit {
    int64_t index, b, c, size, at;  // c: of a plane, else 0; positions; bytes from the first element
  };
  Unit unit(int64_t domain, int64_t k) const {
    const int64_t begin = k % pieces_ * piece_, other = k / pieces_;
    const int64_t b = is_batch_ ? other : in_.planes ? domain / groups_ : domain;
    const int64_t c = !in_.planes ? 0 : is_batch_ ? domain : domain % groups_ * width_ + other;
    const int64_t element = in_.planes ? (b * in_.C + c) * in_.T + begin : (b * in_.T + begin) * in_.C;
    return {domain * units_ + k, b, c, size_of(k), element * p_.size};
  }
  // By its place in memory.
  Unit unit(int64_t n) const {
    if (!has_planes_apart()) return unit(n / units_, n % units_);
    const int64_t plane = n / pieces_;
    return unit(plane % in_.C, plane / in_.C * pieces_ + n % pieces_);
  }
  bool has_planes_apart() const { return is_batch_ && in_.planes && in_.B > 1; }
  int64_t size_of(int64_t k) const { return std::min(piece_, in_.T - k % pieces_ * piece_); }
  NormMapRows rows(const Unit& u, const char* h, bool streamed) const {
    return {in_.planes ? 1 : u.size,  in_.planes ? u.size : in_.C, !in_.planes, h + u.at, number(MEAN, u.b, u.c),
            number(FACTOR, u.b, u.c), number(TERM, u.b, u.c),      streamed};
  }
  bool streams(const Tensor& result) const {
    return passes_caches(result, (in_.planes ? in_.T : in_.C) * p_.size);
  }

  int64_t elements_of_group() const { return width_ * in_.T * (is_batch_ ? in_.B : 1); }
  double rstd_of(int64_t statistic) const { return 1 / std::sqrt(variance_[statistic] + p_.options.eps); }

  // body(number of its statistics, first channel)
  template <typename Body>
  void for_each_group(int64_t domain, const Body& body) const {
    if (in_.planes) return body(domain, is_batch_ ? domain : domain % groups_ * width_);
    for (int64_t g = 0; g < groups_; ++g) body(is_batch_ ? g : domain * groups_ + g, g * width_);
  }
  // body(batch element, channel, first unit) for a group's channels
  template <typename Body>
  void for_each_channel(int64_t domain, int64_t channel, const Body& body) const {
    const int64_t batches = is_batch_ ? in_.B : 1;
    for (int64_t n = 0; n < batches; ++n)
      for (int64_t c = channel; c < channel + width_; ++c) {
        const int64_t k = is_batch_ ? n * pieces_ : in_.planes ? (c - channel) * pieces_ : 0;
        body(is_batch_ ? n : in_.planes ? domain / groups_ : domain, c, k);
      }
  }

  void normalise(int64_t domain) {
    for_each_group(domain, [&](int64_t statistic, int64_t channel) {
      const double rstd = rstd_of(statistic), mean = mean_[statistic];
      const T whole = static_cast<T>(mean);
      for_each_channel(domain, channel, [&](int64_t b, int64_t c, int64_t) {
        const double factor = *number(SCALE, b, c) * rstd;
        *number(MEAN, b, c) = whole;
        *number(FACTOR, b, c) = static_cast<T>(factor);
        *number(TERM, b, c) = static_cast<T>((whole - mean) * factor + *number(SHIFT, b, c));
      });
    });
  }

  template <typename First, typename Close, typename Second>
  void run(const First& first, const Close& close, const Second& second) const {
    const int64_t size = in_.B * in_.T * in_.C, of_domain = size / domains_, of_unit = size / (domains_ * units_);
    if (domains_ >= 4 && of_domain <= IN_CACHE && !has_planes_apart()) {
      parallel_for(domains_, ceil_div(ALONE, of_domain), [&](int64_t begin, int64_t end) {
        for (int64_t domain = begin; domain < end; ++domain) {
          for (int64_t k = 0; k < units_; ++k) first(unit(domain, k));
          close(domain);
          for (int64_t k = 0; k < units_; ++k) second(unit(domain, k));
        }
      });
      return;
    }
    const auto spread = [&](const auto& step) {
      parallel_for(domains_ * units_, ceil_div(ALONE, std::max<int64_t>(of_unit, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t n = begin; n < end; ++n) step(unit(n));
                   });
    };
    spread(first);
    parallel_for(domains_, ceil_div(ALONE, units_ * width_), [&](int64_t begin, int64_t end) {
      for (int64_t domain = begin; domain < end; ++domain) close(domain);
    });
    spread(second);
  }

  const Problem& p_;
  const NormLayout& in_;
  const bool is_batch_;
  const int64_t groups_, width_;  // channels of a group
  const bool per_batch_;
  double *mean_, *variance_;
  Buffer<T> channels_;
  int64_t piece_, pieces_, domains_, units_;
};

int64_t statistics_of(const NormLayout& in, const NormFilmOptions& options) {
  const int64_t groups = options.norm == Norm::GROUP ? options.num_groups : in.C;
  return options.norm == Norm::BATCH ? in.C : in.B * groups;
}

template <typename T>
Outputs maps_forward(const Problem& p, const OptionalTensor& pre_residual, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, const OptionalTensor& residual) {
  const NormLayout& in = p.in;
  const int64_t groups = statistics_of(in, p.options);
  Outputs out{in.empty_like(),
              pre_residual || p.gate.is_present() ? in.empty_like() : empty({0}, in.x.scalar_type()),
              statistic(groups), statistic(groups)};
  if (!p.options.training) {
    STD_TORCH_CHECK(
        running_mean && running_var && running_mean->numel() == groups && running_var->numel() == groups,
        "norm_film: running_mean and running_var: expected shape (", groups, ",)");
    torch::stable::copy_(out.mean, *running_mean);
    torch::stable::copy_(out.variance, *running_var);
  }
  Maps<T>(p, out.mean, out.variance).forward(pre_residual, residual, out);
  return out;
}

template <typename T>
GradientsOut maps_backward(const Problem& p, const OptionalTensor& grad_y, const OptionalTensor& grad_h,
                           const Tensor& formed, OutputMask asked, const Tensor& mean, const Tensor& variance) {
  const GradientsOut out(p, asked);
  const Sums<T> sums(p);
  Maps<T>(p, mean, variance).backward(grad_y, grad_h, formed, out, asked, sums);
  if (sums.count > 0) add_up(sums, out);
  return out;
}

}  // namespace
}  // namespace fusedattn
