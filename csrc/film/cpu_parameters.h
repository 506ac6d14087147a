// What CPU launchers of ops with conditions share: gamma and beta of any shape, their gradients, and passes over
// all of them. gated_film's halves of a condition stand in for gamma and beta.
//
// x and whatever lies along it are walked in memory order (common/walk.h), in tasks: some rows, or a part of one.
// gamma and beta each have one value a row or one an element, whatever their shape; the walk has the steps from
// row to row. A task adds up what its rows share of a gradient; where that is not all of it, partial sums are
// added in a second step. The cut depends on shapes alone and sums have a fixed order: results are bitwise
// reproducible.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <utility>
#include <vector>

#include "common/cpu_level.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/storage_type.h"
#include "cpu_kernel.h"
#include "layout.h"

namespace fusedattn {
namespace {

constexpr int64_t PIECE = 16384;     // elements per task: long enough to stream, short enough to sum in one go
constexpr int64_t COLUMNS = 2048;    // of a row whose sums over other rows stay in cache
constexpr int64_t ALONE = 65536;     // elements that one thread does before a second has started
constexpr int64_t MOST_ROWS = 1024;  // of a sum in single precision

const FilmKernels& kernels() { return FUSEDATTN_LEVEL_TABLE(film); }

Tensor empty_like(const Layout& in) {
  const auto sizes = in.x.sizes(), strides = in.x.strides();
  return empty({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, in.x.scalar_type());
}

// The cut of a walk into tasks, each some rows of `columns` elements. Rows are cut so that no task needs parts of
// a span, rows that share one row of a gradient, unless that is longer than a task.
struct Cut {
  int64_t rows, length, columns, parts;  // parts of a row
  int64_t chunk, block, per_block;       // rows of a task; of what is cut into per_block tasks
  int64_t tasks, grain;

  Cut(const FilmWalk& walk, const std::vector<int64_t>& spans, int64_t columns, int64_t wanted, bool cheap)
      : rows(walk.rows()), length(walk.row().size), columns(std::min(columns, length)) {
    parts = ceil_div(length, columns);
    int64_t whole = 1;
    block = rows;
    for (const int64_t span : spans)
      if (span <= wanted)
        whole = std::max(whole, span);
      else
        block = std::min(block, span);
    chunk = std::min(block, wanted / whole * whole);
    per_block = ceil_div(block, chunk);
    tasks = rows / block * per_block * parts;
    grain = ceil_div(cheap ? ALONE : ALONE / 2, chunk * this->columns);
  }

  struct Task {
    int64_t chunk, part, first, last, column, columns;
  };
  Task task(int64_t n) const {
    const int64_t at = n / parts, part = n % parts, begin = at / per_block * block;
    const int64_t first = begin + at % per_block * chunk;
    return {at,
            part,
            first,
            std::min(first + chunk, begin + block),
            part * columns,
            std::min(columns, length - part * columns)};
  }
};

// gamma or beta as the kernels take it: an array of the arithmetic's type, or made one in the cache, from one
// tensor or a sum of two.
template <typename T>
class Values {
 public:
  bool is_vector = false;

  Values(const FilmWalk& walk, const FilmParameters& parameters, int first, T absent)
      : absent_(absent), line_repeats_(true) {
    for (int p = first; p < first + 2; ++p) {
      if (!parameters[p]) continue;
      const int view = VALUES + p;
      const StorageType type = storage_type(parameters[p]->scalar_type());
      STD_TORCH_CHECK((type == StorageType::DOUBLE) == (ARITHMETIC<T> == StorageType::DOUBLE),
                      "film: gamma and beta: expected float64 if x is, and only then");
      sources_[count_++] = {static_cast<const char*>(parameters[p]->const_data_ptr()),
                            type,
                            bytes_of(type),
                            view,
                            walk.row().step[view],
                            walk.line_step(view)};
      // By the steps of the gradient: an expanded parameter has one at each place.
      is_vector |= walk.row().step[GRADIENTS + p] != 0;
      line_repeats_ &= walk.line_step(view) == 0;
    }
    is_reread_ = line_repeats_ && walk.line() > 1;
    is_direct_ =
        count_ == 0 || (count_ == 1 && sources_[0].type == ARITHMETIC<T> && (!is_vector || sources_[0].step == 1));
  }
  bool is_absent() const { return count_ == 0; }
  bool needs_room() const { return !is_direct_; }
  // Not for one row alone, but for each of those that a kernel is called for.
  bool needs_room_for_rows() const { return !is_direct_ && !line_repeats_; }

  // Whether each row has neighbouring numbers of this type, one for each element, to be read but once.
  bool is_vector_of(StorageType type) const {
    return count_ == 1 && is_vector && !is_reread_ && sources_[0].type == type && sources_[0].step == 1;
  }
  void read_in_place() { is_direct_ = true; }

  // The values of some rows of a line, and the step from row to row.
  std::pair<const void*, int64_t> of(const FilmWalk::Offsets& at, int64_t rows, int64_t column, int64_t n,
                                     T* room) const {
    if (count_ == 0) return {&absent_, 0};
    if (is_direct_) {
      const Source& s = sources_[0];
      return {s.data + (at.of[s.view] + column * s.step) * s.size, s.line_step};
    }
    if (line_repeats_) rows = 1;
    for (int k = 0; k < count_; ++k) {
      const Source& s = sources_[k];
      const char* data = s.data + (at.of[s.view] + column * s.step) * s.size;
      if (!is_vector) {
        kernels().widen(s.type, rows, s.line_step, data, room, k > 0);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        kernels().widen(s.type, n, s.step, data + r * s.line_step * s.size, room + r * n, k > 0);
    }
    return {room, line_repeats_ ? 0 : is_vector ? n : 1};
  }

 private:
  struct Source {
    const char* data;
    StorageType type;
    int64_t size;
    int view;
    int64_t step, line_step;
  };
  T absent_;
  Source sources_[2];
  int count_ = 0;
  bool line_repeats_, is_reread_, is_direct_;  // values are the same for a line's rows; of which there are several
};

// What both passes are given. `in` is the layout of what the walk goes over, `absent` stands for gamma where there
// is none, `cheap` says that there is little arithmetic beside memory.
template <typename T>
struct Problem {
  const Layout& in;
  StorageType type;
  double gamma_offset;
  bool cheap;
  int64_t size;
  const FilmWalk& walk;
  Values<T> gamma, beta;
  bool narrow = false;  // gamma and beta are read as they are, in half precision

  Problem(const Layout& in, StorageType type, const FilmParameters& parameters, double gamma_offset, T absent,
          bool cheap, const FilmWalk& walk)
      : in(in),
        type(type),
        gamma_offset(gamma_offset),
        cheap(cheap),
        size(in.x.element_size()),
        walk(walk),
        gamma(walk, parameters, 0, absent),
        beta(walk, parameters, 2, T(0)) {}

  void read_narrow() {
    narrow = type != ARITHMETIC<T> && gamma.is_vector_of(type) && beta.is_vector_of(type);
    if (narrow) gamma.read_in_place(), beta.read_in_place();
  }

  bool has_vector() const { return gamma.is_vector || beta.is_vector; }
  int64_t columns() const { return std::min(has_vector() ? COLUMNS : PIECE, walk.row().size); }
  bool streams(const Tensor& result) const {
    return passes_caches(result, walk.rows() == 1 ? 64 : walk.row().size * size);
  }

  // body(rows, offsets, first row) for all rows of a task, by lines, and of no more elements at once than there is
  // room for where rows need it.
  template <typename Body>
  void for_each(const Cut::Task& task, bool needs_room, const Body& body) const {
    const bool limited = needs_room || gamma.needs_room_for_rows() || beta.needs_room_for_rows();
    const int64_t line = walk.line();
    const int64_t at_once = limited ? std::max<int64_t>(1, COLUMNS / task.columns) : MOST_ROWS;
    for (int64_t row = task.first; row < task.last;) {
      const FilmWalk::Offsets at = walk.at(row);
      const int64_t rows = std::min({line - at.in_line, task.last - row, at_once});
      body(rows, at, row);
      row += rows;
    }
  }

  // All but x, which the caller knows.
  FilmRows rows(const Cut::Task& task, int64_t rows, const FilmWalk::Offsets& at, T* room, bool streamed,
                bool needs_beta = true) const {
    const auto [a, a_step] = gamma.of(at, rows, task.column, task.columns, room);
    std::pair<const void*, int64_t> b{nullptr, 0};
    if (needs_beta || !beta.is_vector) b = beta.of(at, rows, task.column, task.columns, room + COLUMNS);
    return {rows,
            task.columns,
            walk.line_step(0),
            nullptr,
            a,
            b.first,
            a_step,
            b.second,
            gamma.is_vector,
            beta.is_vector,
            gamma.is_absent() ? 0.0 : gamma_offset,
            streamed,
            narrow};
  }

  // kernel(rows, offsets of the first of them, column) over all rows.
  template <typename Kernel>
  void forward(bool streamed, const Kernel& kernel) {
    read_narrow();
    const Cut cut(walk, {}, columns(), std::max<int64_t>(1, PIECE / columns()), cheap);
    const bool needs_room = gamma.needs_room() || beta.needs_room();
    parallel_for(cut.tasks, cut.grain, [&](int64_t first, int64_t last) {
      const Buffer<T> room(needs_room ? 2 * COLUMNS : 0);
      for (int64_t n = first; n < last; ++n) {
        const Cut::Task task = cut.task(n);
        for_each(task, false, [&](int64_t count, const FilmWalk::Offsets& at, int64_t) {
          kernel(rows(task, count, at, room.get(), streamed), at, task.column);
        });
      }
    });
  }
};

// The gradient of one parameter: written where it is to be, or as partial sums that are added in a second step.
template <typename T>
struct Gradient {
  Tensor result;
  StorageType type;
  int view, depth;
  int64_t size, step, line_step, span;  // span: rows that share one row of it
  int64_t offset;
  bool is_vector, is_shared;
  bool is_complete = false, is_direct = false;  // no task has part of a span; nor does anything remain to be added
  int64_t pieces = 1, length = 0, parts = 1;    // pieces of a span, parts of a row
  Buffer<T> sums;                               // (spans, pieces, length or parts) unless direct
  char* data = nullptr;

  // `result` may be that of several: from element `offset`, and added to what others write if it is shared.
  Gradient(const Tensor& result, const FilmWalk& walk, int view, int64_t offset = 0, bool is_shared = false)
      : result(result),
        type(storage_type(result.scalar_type())),
        view(view),
        depth(walk.depth(view)),
        size(bytes_of(type)),
        step(walk.row().step[view]),
        line_step(walk.line_step(view)),
        span(walk.rows_from(depth)),
        offset(offset),
        is_vector(step != 0),
        is_shared(is_shared),
        data(static_cast<char*>(result.mutable_data_ptr()) + offset * size) {}

  void prepare(const FilmWalk& walk, const Cut& cut) {
    length = walk.row().size, parts = cut.parts;
    is_complete = span <= cut.chunk;
    if (!is_complete) pieces = span / cut.block * cut.per_block;
    is_direct = !is_shared && is_complete && (is_vector || parts == 1) && (span == 1 || type == ARITHMETIC<T>);
    for (int d = 0; d < depth; ++d) is_direct &= walk.dims[d].step[view] != 0;
    if (!is_direct) sums = Buffer<T>(walk.rows() / span * pieces * width());
  }
  int64_t width() const { return is_vector ? length : parts; }
  bool is_of_arithmetic() const { return !is_direct || type == ARITHMETIC<T>; }
  // Whether each row has neighbouring numbers of this type, to which nothing remains to be added.
  bool is_vector_of(StorageType storage) const {
    return is_direct && is_vector && span == 1 && step == 1 && type == storage;
  }

  // Where what a task has of a row goes, in the type of the arithmetic or not, and the step from row to row there.
  std::pair<char*, int64_t> place(const Cut::Task& task, const FilmWalk::Offsets& at, int64_t row) const {
    if (is_direct) return {data + (at.of[view] + task.column * step) * size, line_step};
    const int64_t index =
        (is_complete ? row / span : task.chunk) * width() + (is_vector ? task.column : task.part);
    return {reinterpret_cast<char*>(sums.get() + index), span == 1 ? width() : 0};
  }
  // Whether a sum begins with this row of the task.
  bool begins(const Cut::Task& task, int64_t row) const { return row == task.first || row % span == 0; }

  // Takes `rows` rows of numbers, of n columns (in vectors) or one each; one row where the step is 0.
  void take(const Cut::Task& task, const FilmWalk::Offsets& at, int64_t row, int64_t rows, const T* from,
            int64_t from_step, bool vectors) const {
    const auto [to, to_step] = place(task, at, row);
    const int64_t n = vectors ? task.columns : 1, own = is_vector ? n : 1;
    if (from_step == 0) rows = 1;
    if (is_direct && type != ARITHMETIC<T>) {  // then span == 1
      if (own == n && rows > 1 && to_step == from_step && from_step == n)
        return kernels().narrow(type, rows * n, from, to);
      for (int64_t r = 0; r < rows; ++r) {
        const T sum = own == n ? T(0) : sum_of(from + r * from_step, n);
        kernels().narrow(type, own, own == n ? from + r * from_step : &sum, to + r * to_step * size);
      }
      return;
    }
    T* out = reinterpret_cast<T*>(to);
    for (int64_t r = 0; r < rows; ++r, from += from_step, out += to_step) {
      const bool added = span > 1 && (r > 0 || !begins(task, row));
      if (own < n)
        *out = sum_of(from, n) + (added ? *out : T(0));
      else if (added)
        for (int64_t i = 0; i < n; ++i) out[i] += from[i];
      else
        std::copy_n(from, n, out);
    }
  }

  static T sum_of(const T* from, int64_t n) {
    constexpr int SEVERAL = 8;
    T sums[SEVERAL] = {}, sum = T(0);
    int64_t i = 0;
    for (; i + SEVERAL <= n; i += SEVERAL)
      for (int s = 0; s < SEVERAL; ++s) sums[s] += from[i + s];
    for (; i < n; ++i) sum += from[i];
    for (int s = 0; s < SEVERAL; ++s) sum += sums[s];
    return sum;
  }

  // Adds the partial sums, in order.
  void add_to(double* total, const FilmWalk& walk) const {
    const int64_t each = is_vector ? 1 : pieces * parts;
    const T* part = sums.get();
    const int inner = depth - 1;
    const int64_t line = depth == 0 ? 1 : walk.dims[inner].size;
    const int64_t along = depth == 0 ? 0 : walk.dims[inner].step[view];
    const int64_t lines = walk.rows() / span / line;
    for (int64_t n = 0; n < lines; ++n) {
      int64_t rest = n;
      double* out = total + offset;
      for (int d = inner; d-- > 0; rest /= walk.dims[d].size)
        out += rest % walk.dims[d].size * walk.dims[d].step[view];
      if (!is_vector && each == 1 && along == 1) {  // the loop that the compiler turns into vectors
        for (int64_t i = 0; i < line; ++i) out[i] += *part++;
        continue;
      }
      for (int64_t i = 0; i < line; ++i, out += along) {
        if (is_vector)
          for (int64_t s = 0; s < pieces; ++s, part += length)
            for (int64_t c = 0; c < length; ++c) out[c] += part[c];
        else
          for (int64_t s = 0; s < each; ++s) *out += *part++;
      }
    }
  }
};

// The result of one gradient, or of some that share it.
template <typename T>
Tensor finished(const FilmWalk& walk, std::initializer_list<const Gradient<T>*> gradients) {
  const Gradient<T>& first = **gradients.begin();
  if (!first.is_direct) {
    const int64_t numel = first.result.numel();
    const Buffer<double> total(numel);
    const Buffer<T> rounded(numel);
    std::fill_n(total.get(), numel, 0.0);
    for (const Gradient<T>* g : gradients) g->add_to(total.get(), walk);
    for (int64_t n = 0; n < numel; ++n) rounded.get()[n] = static_cast<T>(total.get()[n]);
    kernels().narrow(first.type, numel, rounded.get(), first.result.mutable_data_ptr());
  }
  return first.result.is_contiguous() ? first.result : contiguous(first.result, first.result.scalar_type());
}

// What a kernel writes of gamma's or beta's gradient: straight to its place, or for Gradient::take.
template <typename T>
struct Written {
  const Gradient<T>* only = nullptr;
  T* to;
  int64_t step;
  bool is_fresh = true;

  Written(const std::vector<Gradient<T>>& gradients, const FilmWalk& walk, const Cut::Task& task,
          const FilmWalk::Offsets& at, int64_t row, bool is_vector, bool narrow, T* room)
      : to(room), step(0) {
    if (gradients.size() == 1 && (narrow || gradients[0].is_of_arithmetic())) {
      only = &gradients[0];
      const auto [place, place_step] = only->place(task, at, row);
      to = reinterpret_cast<T*>(place), step = place_step;
      is_fresh = only->span == 1 || only->begins(task, row);
      return;
    }
    for (const Gradient<T>& g : gradients)
      if (g.span == 1 && walk.outer() > 0) step = is_vector ? task.columns : 1;
  }
};

// Rows in another order where else a sum over outer dimensions would have partial sums as large as x: those that
// all gradients have rows for go outside, those that none has inside.
void gather_sums(FilmWalk& walk) {
  const auto kept = [&](const FilmWalk::Dim& dim, int view) { return dim.step[view] != 0; };
  int present = 0;
  bool apart = false;
  for (int view = GRADIENTS; view < GRADIENTS + FILM_PARAMETERS; ++view) {
    int from = 0;
    while (from < walk.outer() && kept(walk.dims[from], view)) ++from;
    const int depth = walk.depth(view);
    present += depth > 0 || kept(walk.row(), view);
    apart |= kept(walk.row(), view) && from < depth;
  }
  if (!apart) return;
  const auto place = [&](const FilmWalk::Dim& dim) {
    int count = 0;
    for (int view = GRADIENTS; view < GRADIENTS + FILM_PARAMETERS; ++view) count += kept(dim, view);
    return count == present ? 0 : count > 0 ? 1 : 2;
  };
  std::stable_sort(walk.dims, walk.dims + walk.outer(),
                   [&](const FilmWalk::Dim& a, const FilmWalk::Dim& b) { return place(a) < place(b); });
}

// Backward over all rows: kernel(rows, sums, offsets of the first row, column, room for what nobody asked for).
// Of x there are `halves` gradients, which `keeps_dx` asks for.
template <typename T, typename Kernel>
void backward_rows(Problem<T>& p, std::vector<Gradient<T>>& of_gamma, std::vector<Gradient<T>>& of_beta,
                   bool keeps_dx, int halves, bool streamed, const Kernel& kernel) {
  const FilmWalk& walk = p.walk;
  const int64_t columns = p.columns();
  int64_t wanted = std::max<int64_t>(1, PIECE / columns);
  std::vector<int64_t> spans;
  bool needs_room = false;
  for (const auto* gradients : {&of_gamma, &of_beta}) {
    for (const Gradient<T>& g : *gradients) {
      spans.push_back(g.span);
      // Few tasks, so that partial sums stay small beside x, but work for many cores.
      if (g.is_vector && g.span > 1)
        wanted = std::max({wanted, int64_t{16}, std::min(MOST_ROWS, ceil_div(walk.rows(), 256))});
    }
  }
  const Cut cut(walk, spans, columns, wanted, p.cheap);
  bool narrow = true;
  for (auto* gradients : {&of_gamma, &of_beta}) {
    for (Gradient<T>& g : *gradients) {
      g.prepare(walk, cut);
      needs_room |= gradients->size() > 1 || !g.is_of_arithmetic();
    }
    narrow &= gradients->size() == 1 && gradients->front().is_vector_of(p.type);
  }
  if (narrow) p.read_narrow();
  needs_room &= !p.narrow;
  const bool needs_rows = needs_room;
  // A sum that nobody asked for goes where the next overwrites it: a number, or as many as a vector has.
  const bool drops_gamma = of_gamma.empty(), drops_beta = of_beta.empty();
  needs_room |= p.gamma.needs_room() || p.beta.needs_room() || (drops_gamma && p.gamma.is_vector) ||
                (drops_beta && p.beta.is_vector);

  parallel_for(cut.tasks, cut.grain, [&](int64_t first, int64_t last) {
    const Buffer<T> room(needs_room ? 4 * COLUMNS : 0);
    const Buffer<char> unasked(keeps_dx ? 0 : halves * columns * p.size);
    T dropped[2];
    for (int64_t n = first; n < last; ++n) {
      const Cut::Task task = cut.task(n);
      p.for_each(task, needs_rows, [&](int64_t rows, const FilmWalk::Offsets& at, int64_t row) {
        T* const dz_x = drops_gamma && !p.gamma.is_vector ? &dropped[0] : room.get() + 2 * COLUMNS;
        T* const dz = drops_beta && !p.beta.is_vector ? &dropped[1] : room.get() + 3 * COLUMNS;
        const Written<T> a(of_gamma, walk, task, at, row, p.gamma.is_vector, p.narrow, dz_x);
        const Written<T> b(of_beta, walk, task, at, row, p.beta.is_vector, p.narrow, dz);
        kernel(p.rows(task, rows, at, room.get(), streamed, !p.cheap),
               FilmSums{a.to, b.to, a.step, b.step, a.is_fresh, b.is_fresh, keeps_dx}, at, task.column,
               unasked.get());
        if (a.only == nullptr)
          for (const Gradient<T>& g : of_gamma) g.take(task, at, row, rows, a.to, a.step, p.gamma.is_vector);
        if (b.only == nullptr)
          for (const Gradient<T>& g : of_beta) g.take(task, at, row, rows, b.to, b.step, p.beta.is_vector);
      });
    }
  });
}

}  // namespace
}  // namespace fusedattn
