// How a kernel walks over a dense tensor, and what lies along it: parameters, which repeat over some of its
// dimensions, and gradients, which are sums over these.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fusedattn {

// Of a tensor and VIEWS - 1 others of its rank, each with a step, in elements of its own, for every dimension: 0
// where it repeats. View 0 is the tensor. Dimensions stand from the outermost to the innermost in its memory; the
// last one is a row, whose elements are neighbours, and the product of the others counts rows.
template <int VIEWS>
struct Walk {
  static constexpr int MOST_DIMS = 64 + 1;  // of a tensor in torch, and close()

  struct Dim {
    int64_t size;
    int64_t step[VIEWS];
  };
  struct Offsets {
    int64_t of[VIEWS];
    int64_t in_line;  // the row's place in the innermost dimension of rows
  };

  Dim dims[MOST_DIMS];
  int count = 0;

  // The next dimension inwards; one with the last where every view goes on through both at one step.
  void add(const Dim& dim) {
    if (dim.size == 1) return;
    if (count > 0) {
      Dim& last = dims[count - 1];
      bool one = true;
      for (int v = 0; v < VIEWS; ++v) one &= last.step[v] == dim.step[v] * dim.size;
      if (one) {
        const int64_t size = last.size * dim.size;
        last = dim;
        last.size = size;
        return;
      }
    }
    dims[count++] = dim;
  }

  // After the last add(): a tensor of one element is a row, too, and so is each element where those of the tensor
  // are neighbours, but not in that other view.
  void close(int other) {
    if (count == 0 || row().step[other] != 1) dims[count++] = {1, {}};
  }

  const Dim& row() const { return dims[count - 1]; }
  int outer() const { return count - 1; }
  int64_t rows() const { return rows_from(0); }
  int64_t rows_from(int d) const {
    int64_t product = 1;
    for (; d < outer(); ++d) product *= dims[d].size;
    return product;
  }
  // Rows that follow each other at one step in every view.
  int64_t line() const { return outer() == 0 ? 1 : dims[outer() - 1].size; }
  int64_t line_step(int view) const { return outer() == 0 ? 0 : dims[outer() - 1].step[view]; }

  Offsets at(int64_t row) const {
    Offsets found{};
    for (int d = outer(); d-- > 0;) {
      const int64_t rest = row / dims[d].size, index = row - rest * dims[d].size;
      if (d == outer() - 1) found.in_line = index;
      for (int v = 0; v < VIEWS; ++v) found.of[v] += index * dims[d].step[v];
      row = rest;
    }
    return found;
  }

  // Leading dimensions up to the last in which a view does not repeat. What follows, rows_from(depth), shares one
  // row of the view.
  int depth(int view) const {
    int d = outer();
    while (d > 0 && dims[d - 1].step[view] == 0) --d;
    return d;
  }
};

}  // namespace fusedattn
