// The gradient of the bias on the CPU: that of the scores, summed over the dimensions in which the bias is
// broadcast, chunk by chunk.
#pragma once

#include "cpu_inputs.h"

namespace fusedattn {
namespace {

// In the type of the arithmetic, contiguous in the shape of the bias; null: it is not asked for.
template <typename S>
class BiasGradient {
 public:
  using T = Arithmetic<S>;

  BiasGradient(const Inputs<S>& in, T* sums)
      : in_(in),
        sums_(sums),
        is_apart_(sums != nullptr && (in.p.options.softcap != 0 || in.p.options.scale != 1)),
        rows_(is_apart_ ? in.chunk_heads * in.chunk_rows * in.p.Tk : 0) {
    if (sums == nullptr) return;
    const auto& p = in.p;
    const int64_t rank = in.bias->dim();
    of_batch_ = own(0, p.B), of_head_ = in.flat || own(1, p.H);
    of_query_ = own(rank - 2, p.Tq), of_key_ = own(rank - 1, p.Tk);
    if (!is_written() || in.rows() == 0 || p.Tk == 0) std::fill_n(sums, in.bias->numel(), T(0));
  }

  // Where to leave the gradients of a row of the chunk's scores; null where scores have no cap or scale, so that
  // they are those of the unscaled ones.
  T* row(int64_t row) const { return is_apart_ ? rows_.get() + row * in_.p.Tk : nullptr; }

  // g: the gradients of the chunk's unscaled, uncapped scores.
  void add(const Chunk& chunk, const T* g) {
    const auto& p = in_.p;
    if (sums_ == nullptr || p.Tk == 0) return;
    const T* const grads = is_apart_ ? rows_.get() : g;
    const int64_t first_head = chunk.first_head, last_head = first_head + chunk.heads;
    const int64_t first_batch = first_head / p.H;
    // Each task owns part of a row of sums, and adds in the order of memory.
    const int64_t groups = of_batch_ && of_head_ ? chunk.heads
                           : of_batch_           ? ceil_div(last_head, p.H) - first_batch
                           : of_head_            ? std::min(p.H, chunk.heads)
                                                 : 1;
    const int64_t queries = of_query_ ? chunk.queries : 1, parts = of_key_ ? ceil_div(p.Tk, COLUMNS) : 1;
    const int64_t tasks = groups * queries * parts;
    parallel_for(
        tasks, grain_for(chunk.heads * chunk.queries * p.Tk / tasks / 8), [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            const int64_t group = task / (queries * parts), query = task / parts % queries, part = task % parts;
            int64_t first = first_head, last = last_head, step = 1;
            if (of_head_) {
              first += group, step = of_batch_ ? chunk.heads : p.H;
            } else if (of_batch_) {
              first = std::max(first, (first_batch + group) * p.H);
              last = std::min(last, (first_batch + group + 1) * p.H);
            }
            const int64_t b = of_batch_ ? first / p.H : 0, h = of_head_ ? first % p.H : 0;
            const int64_t i = of_query_ ? chunk.first_query + query : 0;
            const int64_t to = (b * (of_head_ ? p.H : 1) + h) * (of_query_ ? p.Tq : 1) + i;
            const int64_t first_key = part * COLUMNS;
            const int64_t last_key = of_key_ ? std::min(first_key + COLUMNS, p.Tk) : p.Tk;
            double total = 0;
            for (int64_t n = first; n < last; n += step)
              for (int64_t r = query; r < (of_query_ ? query + 1 : chunk.queries); ++r) {
                const int64_t row = (n - first_head) * chunk.queries + r;
                const KeyRange in_window = in_.keys_of_row(chunk, row).keys;
                const int64_t from = std::max(first_key, in_window.first);
                const int64_t keys = std::min(last_key, in_window.end) - from;
                const T* const g_row = grads + row * p.Tk + from;
                if (!of_key_)
                  for (int64_t j = 0; j < keys; ++j) total += g_row[j];
                else if (keys > 0)
                  fwd<T>().widen(keys, g_row, sums_ + to * p.Tk + from, !is_written());
              }
            if (!of_key_) sums_[to] = static_cast<T>(is_written() ? total : sums_[to] + total);
          }
        });
  }

 private:
  static constexpr int64_t COLUMNS = 128;  // of a task

  // Whether the bias has as many of its own in a dimension as the scores.
  bool own(int64_t dim, int64_t size) const { return in_.bias->size(dim) == size; }

  // Whether each number of the gradient is written once, not added to: it comes from one row of scores, all of it.
  bool is_written() const { return of_batch_ && of_head_ && of_query_ && !has_window(in_.p.options); }

  const Inputs<S>& in_;
  T* const sums_;
  bool of_batch_ = false, of_head_ = false, of_query_ = false, of_key_ = false;
  bool is_apart_;  // from those of unscaled, uncapped scores
  Buffer<T> rows_;
};

}  // namespace
}  // namespace fusedattn
