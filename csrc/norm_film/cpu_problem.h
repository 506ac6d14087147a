// What both launchers of norm_film on the CPU share: the problem, what a row is computed with, and how sums over
// positions become gradients of the parameters.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/cpu_level.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/storage_type.h"
#include "cpu_kernel.h"
#include "layout.h"

namespace fusedattn {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t PIECE = 16384;     // elements per task
constexpr int64_t ALONE = 32768;     // elements that one thread does before a second has started
constexpr int64_t MOST_ROWS = 1024;  // of a sum in single precision
constexpr int64_t COLUMNS = 256;     // of a task of the second step

const NormFilmKernels& kernels() { return FUSEDATTN_LEVEL_TABLE(norm_film); }

// The inputs of both passes that have values along x.
struct Inputs {
  OptionalTensor gamma, beta, gamma_added, beta_added, weight, bias, gate, gate_added;
};

// Where the gradients are among the results.
enum Result { X, GAMMA, BETA, GAMMA_ADDED, BETA_ADDED, WEIGHT, BIAS, GATE, GATE_ADDED, PRE_RESIDUAL };

// A parameter: absent, one tensor, or the sum of two.
struct Pair {
  std::vector<Source> sources;

  Pair(const NormLayout& in, const char* name, const OptionalTensor& first, bool asked,
       const OptionalTensor& added = {}, bool asked_of_added = false) {
    if (first) sources.emplace_back(*first, in, name, asked);
    if (added) sources.emplace_back(*added, in, name, asked_of_added);
  }
  // Whether gradients are asked for.
  bool is_asked() const {
    return std::any_of(sources.begin(), sources.end(), [](const Source& s) { return s.asked; });
  }
  bool is_asked(Level level) const {
    return std::any_of(sources.begin(), sources.end(),
                       [&](const Source& s) { return s.asked && s.level == level; });
  }
  bool has(Level level) const {
    return std::any_of(sources.begin(), sources.end(), [&](const Source& s) { return s.level == level; });
  }
  bool is_present() const { return !sources.empty(); }

  // In the type of the arithmetic: where they are, or made in room.
  template <typename T>
  const T* widened(int64_t b, int64_t t, int64_t column, int64_t n, T* room) const {
    if (sources.size() == 1 && sources[0].type == ARITHMETIC<T> && sources[0].c_step == 1)
      return reinterpret_cast<const T*>(sources[0].at(b, t)) + column;
    for (size_t k = 0; k < sources.size(); ++k) {
      const Source& s = sources[k];
      const char* data = s.at(b, t) + column * s.c_step * bytes_of(s.type);
      kernels().widen(s.type, n, s.c_step, data, room, k > 0);
    }
    return is_present() ? room : nullptr;
  }
};

struct Problem {
  const NormLayout& in;
  const NormFilmOptions& options;
  StorageType type;
  int64_t size;  // of an element
  Pair gamma, beta, gate, weight, bias;
  int64_t batches, positions;  // tasks are pieces of the positions of these batches
  int64_t piece, pieces;       // rows of a piece; pieces of a batch

  Problem(const NormLayout& in, const Inputs& inputs, const NormFilmOptions& options, OutputMask asked = {0})
      : in(in),
        options(options),
        type(storage_type(in.x.scalar_type())),
        size(in.x.element_size()),
        gamma(in, "gamma", inputs.gamma, asked[GAMMA], inputs.gamma_added, asked[GAMMA_ADDED]),
        beta(in, "beta", inputs.beta, asked[BETA], inputs.beta_added, asked[BETA_ADDED]),
        gate(in, "pre_gate", inputs.gate, asked[GATE], inputs.gate_added, asked[GATE_ADDED]),
        weight(in, "weight", inputs.weight, asked[WEIGHT]),
        bias(in, "bias", inputs.bias, asked[BIAS]) {
    const bool of_rows = is_of_rows(options.norm);
    STD_TORCH_CHECK(options.norm != Norm::GROUP || (options.num_groups > 0 && in.C % options.num_groups == 0),
                    "norm_film: num_groups: expected a divisor of the ", in.C, " channels, got ",
                    options.num_groups);
    STD_TORCH_CHECK(of_rows || (!rows_differ_in_affine() && !rows_differ_in_gate()),
                    "norm_film: gamma, beta and pre_gate: expected shape (C,) or (B, C) for this norm");
    STD_TORCH_CHECK(!weight.has(Level::ELEMENT) && !bias.has(Level::ELEMENT),
                    "norm_film: weight and bias: expected shape (C,) or (B, C)");
    const bool of_norm = weight.has(Level::BATCH) || bias.has(Level::BATCH);
    bool per_batch = of_norm;
    for (Pair* pair : {&gamma, &beta, &gate})
      for (Source& s : pair->sources)
        if (s.level == Level::BATCH) {
          // Its gradient is no sum, then, and can be written at once.
          if (in.T == 1 && !of_norm && of_rows)
            s.level = Level::ELEMENT;
          else
            per_batch = true;
        }
    batches = per_batch ? in.B : 1;
    positions = per_batch ? in.T : in.B * in.T;
    if (!of_rows) {  // their sums are those of batch elements
      piece = in.T, pieces = in.B / batches;
      return;
    }
    // Few pieces, so that partial sums stay small beside x, but work for many cores.
    const int64_t wanted = std::max({int64_t{16}, PIECE / in.C, ceil_div(in.B * in.T, 256)});
    piece = std::min({wanted, MOST_ROWS, positions});
    pieces = ceil_div(positions, piece);
  }

  int64_t tasks() const { return batches * pieces; }
  int64_t grain() const { return ceil_div(ALONE, piece * in.C); }
  bool streams(const Tensor& result) const { return passes_caches(result, in.C * size); }
  bool rows_differ_in_affine() const { return gamma.has(Level::ELEMENT) || beta.has(Level::ELEMENT); }
  bool rows_differ_in_gate() const { return gate.has(Level::ELEMENT); }

  // body(batch, first row of all, rows)
  template <typename Body>
  void for_each_task(const Body& body) const {
    parallel_for(tasks(), grain(), [&](int64_t first, int64_t last) { body(first, last); });
  }
  struct Task {
    int64_t first, rows;  // of all rows
  };
  Task task(int64_t n) const {
    const int64_t begin = n % pieces * piece;
    return {n / pieces * positions + begin, std::min(piece, positions - begin)};
  }
};

// The numbers of channels that a row is computed with, in the type of the arithmetic.
template <typename T>
class Channels {
 public:
  static constexpr int ROOMS = 8;
  const T *scale, *shift;
  double offset = 0;  // of scale, as rows take it
  const T *gate = nullptr, *weight = nullptr, *bias = nullptr;

  Channels(const Problem& p, T* room, int64_t column, int64_t n) : p_(p), room_(room), column_(column), n_(n) {
    made_scale_ = room_ + 5 * n_, made_shift_ = room_ + 6 * n_;
    scale = made_scale_, shift = made_shift_;
  }
  // Of a row; where it shares them with the one before, that has them. With apart, gamma and beta may be taken as
  // they are, and gamma_offset left to the kernel.
  void of_row(int64_t row, bool is_first, bool apart = false) {
    const int64_t b = row / p_.in.T, t = row % p_.in.T;
    if (is_first) {
      weight = p_.weight.widened(b, t, column_, n_, room_);
      bias = p_.bias.widened(b, t, column_, n_, room_ + n_);
    }
    if (is_first || p_.rows_differ_in_gate()) gate = p_.gate.widened(b, t, column_, n_, room_ + 2 * n_);
    if (is_first || p_.rows_differ_in_affine()) {
      gamma_ = p_.gamma.widened(b, t, column_, n_, room_ + 3 * n_);
      const T* beta = p_.beta.widened(b, t, column_, n_, room_ + 4 * n_);
      if (apart && weight == nullptr && bias == nullptr && gamma_ != nullptr && beta != nullptr) {
        scale = gamma_, shift = beta, offset = p_.options.gamma_offset;
        return;
      }
      kernels().affine(ARITHMETIC<T>, n_, gamma_, p_.options.gamma_offset, weight, bias, beta, made_scale_,
                       made_shift_);
    }
  }
  // gamma + gamma_offset, or 1
  const T* factor() {
    T* const out = room_ + 7 * n_;
    kernels().affine(ARITHMETIC<T>, n_, gamma_, p_.options.gamma_offset, nullptr, nullptr, nullptr, out,
                     room_ + 4 * n_);
    return out;
  }

 private:
  const Problem& p_;
  T* room_;
  int64_t column_, n_;
  const T* gamma_ = nullptr;
  T *made_scale_, *made_shift_;
};

Tensor statistic(int64_t groups) { return empty({groups}, ScalarType::Double); }
double* numbers(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

const char* bytes(const OptionalTensor& t) { return t ? static_cast<const char*>(t->const_data_ptr()) : nullptr; }
template <typename Byte>
Byte* offset(Byte* p, int64_t bytes) {
  return p == nullptr ? nullptr : p + bytes;
}
OptionalTensor like(const NormLayout& in, const OptionalTensor& t, const char* name) {
  return t ? OptionalTensor(in.like(*t, name)) : t;
}

struct Outputs {
  Tensor y, h, mean, variance;
};

// The sums that backward makes of each channel, over the rows of a task.
enum Sum { DZ_N, DZ, DU_N, DU, DH_X, SUMS };

template <typename T>
struct Sums {
  const Problem& p;
  bool needed[SUMS] = {};
  Buffer<T> data;  // (tasks, count, C)
  int64_t place[SUMS], count = 0;

  explicit Sums(const Problem& p) : p(p) {
    const auto is_summed = [](const Pair& pair) {
      return pair.is_asked(Level::CHANNEL) || pair.is_asked(Level::BATCH);
    };
    const bool rows_have_gamma = p.gamma.has(Level::ELEMENT);
    const bool of_norm = p.weight.is_asked() || p.bias.is_asked();
    needed[DU_N] = needed[DU] = of_norm && rows_have_gamma;
    needed[DZ_N] = is_summed(p.gamma) || (of_norm && !rows_have_gamma);
    needed[DZ] = needed[DZ_N] || is_summed(p.beta);
    needed[DH_X] = is_summed(p.gate);
    for (int s = 0; s < SUMS; ++s) {
      place[s] = count;
      count += needed[s];
    }
    data = Buffer<T>(p.tasks() * count * p.in.C);
  }
  T* of(int64_t task, Sum s) const {
    return needed[s] ? data.get() + (task * count + place[s]) * p.in.C : nullptr;
  }
  void clear(int64_t task) const { std::fill_n(data.get() + task * count * p.in.C, count * p.in.C, T(0)); }
};

// The gradients of a parameter's tensors, of rows of C: one for all, one for each batch element or each position.
struct Results {
  std::vector<Tensor> tensors;
  std::vector<const Source*> sources;
  int64_t C;

  Results(const Pair& pair, const NormLayout& in) : C(in.C) {
    for (const Source& s : pair.sources) {
      const auto shape = s.tensor.sizes();
      const std::vector<int64_t> sizes(shape.begin(), shape.end());
      const bool like_x = sizes.size() > 2;
      tensors.push_back(!s.asked ? empty({0}, s.tensor.scalar_type())
                        : like_x ? empty(sizes, in.strides, s.tensor.scalar_type())
                                 : empty(sizes, s.tensor.scalar_type()));
      sources.push_back(&s);
    }
  }
  template <typename T>
  void put(Level level, int64_t row, int64_t column, int64_t n, const T* from) const {
    for (size_t k = 0; k < tensors.size(); ++k) {
      if (!sources[k]->asked || sources[k]->level != level) continue;
      const StorageType type = sources[k]->type;
      char* const to = static_cast<char*>(tensors[k].mutable_data_ptr()) + (row * C + column) * bytes_of(type);
      kernels().narrow(type, n, from, to);
    }
  }
  // The gradient of the first or second tensor given, contiguous; (0,) for one that is not.
  Tensor of(const OptionalTensor& first, bool second, const OptionalTensor& given, ScalarType type) const {
    if (!given) return fusedattn::empty({0}, type);
    const Tensor& found = tensors[second && first ? 1 : 0];
    return contiguous(found, found.scalar_type());
  }
};

struct GradientsOut {
  Tensor dx, dr;
  Results gamma, beta, gate, weight, bias;

  GradientsOut(const Problem& p, OutputMask asked)
      : dx(like_x(p.in, asked[X])),
        dr(like_x(p.in, asked[PRE_RESIDUAL])),
        gamma(p.gamma, p.in),
        beta(p.beta, p.in),
        gate(p.gate, p.in),
        weight(p.weight, p.in),
        bias(p.bias, p.in) {}

 private:
  static Tensor like_x(const NormLayout& in, bool asked) {
    return asked ? in.empty_like() : empty({0}, in.x.scalar_type());
  }
};

// Adds the sums of all tasks, in order, and makes gradients of them, column by column of all batches.
template <typename T>
void add_up(const Sums<T>& sums, const GradientsOut& out) {
  const Problem& p = sums.p;
  const int64_t C = p.in.C;
  parallel_for(
      ceil_div(C, COLUMNS), ceil_div(ALONE, p.tasks() * sums.count * COLUMNS), [&](int64_t first, int64_t last) {
        const Buffer<T> room((Channels<T>::ROOMS + SUMS + 1) * COLUMNS);
        const Buffer<double> totals((SUMS + 5) * COLUMNS);
        T *const of_batch = room.get() + Channels<T>::ROOMS * COLUMNS, *const made = of_batch + SUMS * COLUMNS;
        for (int64_t block = first; block < last; ++block) {
          const int64_t column = block * COLUMNS, n = std::min(COLUMNS, C - column);
          double *const total = totals.get(), *const of_all = total + SUMS * COLUMNS;
          std::fill_n(of_all, 5 * COLUMNS, 0.0);
          Channels<T> channels(p, room.get(), column, n);
          for (int64_t batch = 0; batch < p.batches; ++batch) {
            channels.of_row(batch * p.positions, true);
            for (int s = 0; s < SUMS; ++s) {
              if (!sums.needed[s]) continue;
              double* const sum = total + s * COLUMNS;
              std::fill_n(sum, n, 0.0);
              for (int64_t task = batch * p.pieces; task < (batch + 1) * p.pieces; ++task) {
                const T* const part = sums.of(task, static_cast<Sum>(s)) + column;
                for (int64_t c = 0; c < n; ++c) sum[c] += part[c];
              }
              std::copy_n(sum, n, of_batch + s * COLUMNS);
            }
            const auto sum = [&](Sum s) { return of_batch + s * COLUMNS; };
            // What a gradient has from this batch: for its own row, and for that of all.
            const auto give = [&](const Pair& pair, const Results& to, int which, const T* found) {
              to.put(Level::BATCH, batch, column, n, found);
              if (pair.is_asked(Level::CHANNEL))
                for (int64_t c = 0; c < n; ++c) of_all[which * COLUMNS + c] += found[c];
            };
            const bool rows_have_gamma = p.gamma.has(Level::ELEMENT);
            if (sums.needed[DZ_N] && p.gamma.is_asked()) {
              kernels().products(ARITHMETIC<T>, n, channels.weight, sum(DZ_N), channels.bias, sum(DZ), made,
                                 false);
              give(p.gamma, out.gamma, 0, made);
            }
            if (sums.needed[DZ] && p.beta.is_asked()) give(p.beta, out.beta, 1, sum(DZ));
            if (sums.needed[DH_X]) give(p.gate, out.gate, 2, sum(DH_X));
            const T* const factor = rows_have_gamma ? nullptr : channels.factor();
            const auto give_norm = [&](const Pair& pair, const Results& to, int which, Sum of_dz, Sum of_du) {
              if (!pair.is_asked()) return;
              kernels().products(ARITHMETIC<T>, n, factor, sum(rows_have_gamma ? of_du : of_dz), nullptr, nullptr,
                                 made, false);
              give(pair, to, which, made);
            };
            give_norm(p.weight, out.weight, 3, DZ_N, DU_N);
            give_norm(p.bias, out.bias, 4, DZ, DU);
          }
          const Results* const results[] = {&out.gamma, &out.beta, &out.gate, &out.weight, &out.bias};
          for (int which = 0; which < 5; ++which) {
            std::copy_n(of_all + which * COLUMNS, n, made);
            results[which]->put(Level::CHANNEL, 0, column, n, made);
          }
        }
      });
}

}  // namespace
}  // namespace fusedattn
