// What the CUDA kernels of FiLM share: the problem, its cut into tasks, and memory by 16-byte packs.
//
// In memory order x is (B, M, C, N): B batch, M positions before and N positions after the channel. FiLM is bound
// by memory: each element is read once and written once, 16 bytes an instruction, and the arithmetic between
// (about 10 to 40 instructions an element with an activation, chosen once a pack) hides behind it. Memory answers
// after some 600 clocks: a thread asks for all packs of a step before it computes with the first.
//
//   runs (N > 1):  a group of 1 to 256 threads, a power of two fitted to N, walks a piece of one channel's run:
//   scalar
//                  head up to a 16-byte boundary, packs, scalar tail. Nothing is asked of N or of the alignment.
//   rows (N == 1): a thread owns the W neighbouring channels of a pack, keeps their scale and shift in registers
//   and
//                  walks rows. W is one pack where the rows start at its boundaries, else 1.
//
// The cut depends on the shape alone and sums are added in a fixed order: results are bitwise reproducible.
#pragma once

#include "common/cuda.cuh"
// after the definition of FUSEDATTN_INLINE
#include "common/activate.h"
#include "options.h"

namespace fusedattn {

constexpr int FILM_BLOCK = 256;      // threads
constexpr int PACKS_PER_THREAD = 8;  // of a run's piece
constexpr int PACKS_PER_STEP = 2;    // of an array, in flight at once
// Of rows: more where that leaves blocks enough, because each thread's rows end in partial sums to be written.
constexpr int64_t LEAST_ROWS_PER_THREAD = 16, MOST_ROWS_PER_THREAD = 256;
constexpr int64_t ROW_BLOCKS = 2048;  // worth having: 4 rounds of 4 on each of 132 multiprocessors

template <typename S>
struct FilmProblem {
  int64_t B, M, C, N;
  const S* x;
  gpu::Numbers<S> gamma;                  // (B, C) or (C,), contiguous, or null: scale 1
  gpu::Numbers<S> beta;                   // as gamma, or null: shift 0
  int64_t gamma_stride_b, beta_stride_b;  // C, or 0 where the batch shares them
  FilmOptions options;
};

template <typename S>
struct ScaleShift {
  gpu::Arithmetic<S> scale, shift;
};
template <typename S>
FUSEDATTN_DEVICE ScaleShift<S> scale_shift(const FilmProblem<S>& p, int64_t b, int64_t c) {
  using T = gpu::Arithmetic<S>;
  return {p.gamma.data == nullptr ? T(1) : p.gamma.get(b * p.gamma_stride_b + c) + T(p.options.gamma_offset),
          p.beta.data == nullptr ? T(0) : p.beta.get(b * p.beta_stride_b + c)};
}

// The arithmetic of common/activate.h.
template <typename Number>
struct Scalar {
  using T = Number;
  using V = Number;
  static FUSEDATTN_DEVICE T exp(T x) {
    const T limit = sizeof(T) == 4 ? 87 : 708;
    return gpu::exp(x < -limit ? -limit : x > limit ? limit : x);  // NaN stays NaN
  }
  static FUSEDATTN_DEVICE T reciprocal(T x) { return gpu::rcp_approx(x); }
  static FUSEDATTN_DEVICE T tanh(T x) { return gpu::tanh(x); }
  static FUSEDATTN_DEVICE T half_erfc(T x) { return T(0.5) * gpu::erfc(x); }
};

inline int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Tasks over runs: `pieces` of each of the B M C runs, `group` threads a task.
struct RunCut {
  int64_t N, piece, pieces, tasks;
  int group;
  bool packed;  // x and every other array lie at the same distance from a 16-byte boundary

  template <typename S>
  RunCut(const FilmProblem<S>& p, bool packed) : N(p.N), packed(packed) {
    constexpr int64_t W = gpu::Pack<S>::SIZE;
    const int64_t wanted = power_of_two_from(gpu::ceil_div(N, 2 * W));
    group = static_cast<int>(wanted < FILM_BLOCK ? wanted : FILM_BLOCK);
    piece = group < FILM_BLOCK ? N : FILM_BLOCK * PACKS_PER_THREAD * W;
    pieces = gpu::ceil_div(N, piece);
    tasks = p.B * p.M * p.C * pieces;
  }
  int64_t grid() const { return gpu::ceil_div(tasks, FILM_BLOCK / group); }
};

// The part of a run that the calling thread's group works on; none for the groups that are left over at the end.
struct RunTask {
  bool exists;
  int thread;            // in the group
  int64_t run, b, m, c;  // run: its place among (B, M, C)
  int64_t number;        // of the piece
  int64_t begin, length;

  template <typename S>
  FUSEDATTN_DEVICE RunTask(const RunCut& cut, const FilmProblem<S>& p) {
    const int64_t task = int64_t{blockIdx.x} * (FILM_BLOCK / cut.group) + threadIdx.x / cut.group;
    exists = task < cut.tasks;
    thread = threadIdx.x % cut.group;
    run = task / cut.pieces;
    number = task - run * cut.pieces;
    const int64_t row = run / p.C;
    c = run - row * p.C;
    b = row / p.M;
    m = row - b * p.M;
    begin = run * cut.N + number * cut.piece;
    const int64_t rest = cut.N - number * cut.piece;
    length = rest < cut.piece ? rest : cut.piece;
  }
};

// What a thread takes in a step: N times W neighbouring elements.
template <int W, int N>
struct Step {};

// body(index, Step<W, N>) for all indices from `first` on, `distance` apart; a step has N of them.
template <int W, typename Body>
FUSEDATTN_DEVICE void for_each_step(int64_t first, int64_t last, int64_t distance, const Body& body) {
  constexpr int N = PACKS_PER_STEP;
  for (; first + (N - 1) * distance < last; first += N * distance) body(first, Step<W, N>{});
  for (; first < last; first += distance) body(first, Step<W, 1>{});
}

// body(element, distance between the packs of a step, Step) for the task's share of elements of x.
template <typename S, typename Body>
FUSEDATTN_DEVICE void for_each_pack(const S* x, const RunTask& task, const RunCut& cut, const Body& body) {
  constexpr int W = gpu::Pack<S>::SIZE;
  const int64_t misplaced = reinterpret_cast<uintptr_t>(x + task.begin) % 16 / sizeof(S);
  int64_t head = cut.packed ? (W - misplaced) % W : task.length;
  if (head > task.length) head = task.length;
  const int64_t packs = (task.length - head) / W, scalars = task.length - packs * W;
  for_each_step<W>(task.thread, packs, cut.group,
                   [&](int64_t i, auto step) { body(task.begin + head + i * W, int64_t{cut.group} * W, step); });
  for (int64_t i = task.thread; i < scalars; i += cut.group)
    body(task.begin + (i < head ? i : i + packs * W), int64_t{0}, Step<1, 1>{});
}

// Tasks over rows: a block is (columns of W channels, rows of a task, tasks) threads; `pieces` of each of the B
// batches of M rows, each cut into `across` neighbouring blocks.
struct RowCut {
  int64_t piece, pieces, tasks;
  unsigned across;
  int columns, rows, groups, width;

  template <typename S>
  RowCut(const FilmProblem<S>& p, bool packed) {
    width = packed && p.C % gpu::Pack<S>::SIZE == 0 ? gpu::Pack<S>::SIZE : 1;
    const int64_t wanted = power_of_two_from(gpu::ceil_div(p.C, width)), down = power_of_two_from(p.M);
    columns = static_cast<int>(wanted < FILM_BLOCK ? wanted : FILM_BLOCK);
    across = static_cast<unsigned>(gpu::ceil_div(p.C, int64_t{width} * columns));
    rows = static_cast<int>(down < FILM_BLOCK / columns ? down : FILM_BLOCK / columns);
    groups = FILM_BLOCK / (columns * rows);
    if (groups > 64) groups = 64;  // the hardware's limit in this direction
    const int64_t enough = p.B * p.M * across / (int64_t{groups} * rows * ROW_BLOCKS);
    piece = rows * (enough < LEAST_ROWS_PER_THREAD  ? LEAST_ROWS_PER_THREAD
                    : enough > MOST_ROWS_PER_THREAD ? MOST_ROWS_PER_THREAD
                                                    : enough);
    pieces = gpu::ceil_div(p.M, piece);
    tasks = p.B * pieces;
  }
  dim3 block() const { return dim3(columns, rows, groups); }
  int64_t grid() const { return gpu::ceil_div(tasks, groups) * across; }
};

struct RowTask {
  bool exists;
  int64_t task, b, c;
  int64_t first, last;  // rows among B M: first, first + rows, ... below last

  template <typename S>
  FUSEDATTN_DEVICE RowTask(const RowCut& cut, const FilmProblem<S>& p) {
    const unsigned block = blockIdx.x / cut.across;
    task = int64_t{block} * cut.groups + threadIdx.z;
    c = (int64_t{blockIdx.x - block * cut.across} * cut.columns + threadIdx.x) * cut.width;
    exists = task < cut.tasks && c < p.C;
    b = task / cut.pieces;
    const int64_t begin = (task - b * cut.pieces) * cut.piece, end = begin + cut.piece;
    first = b * p.M + begin + threadIdx.y;
    last = b * p.M + (end < p.M ? end : p.M);
  }
};

// Whether all arrays (null: absent) lie at the same distance from a 16-byte boundary, or, for rows, at one.
inline bool same_placement(const void* a, const void* b, const void* c) {
  const auto place = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  return place(a) == place(b) && (c == nullptr || place(a) == place(c));
}

// A batch that shares gamma and beta is more positions of one element; fewer partial sums, and fuller blocks.
template <typename S>
FilmProblem<S> with_batch_folded(FilmProblem<S> p) {
  if ((p.gamma.data == nullptr || p.gamma_stride_b == 0) && (p.beta.data == nullptr || p.beta_stride_b == 0)) {
    p.M *= p.B;
    p.B = 1;
  }
  return p;
}

}  // namespace fusedattn
