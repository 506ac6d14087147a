// CPU kernels of norm_film for groups that reach over positions: group, instance and batch norm.
//
// Rows of n neighbouring elements are either one channel's positions, whose numbers are one a row, or the channels
// of one position, whose numbers are vectors that all rows share. Moments are taken chunk by chunk, each
// relative to a number near its mean, and then merged (Chan et al. 1983): exact however far the mean is from 0.
#include "common/along.h"
#include "cpu_kernel.h"
#include "formula.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

constexpr int64_t CHUNK = 1024;  // elements of a row
constexpr int64_t CHUNK_ROWS = 16;
// A chunk's numbers are taken relative to the mean of part of them. Whatever they are, that is off by no more than
// sqrt(rest / part) deviations of the chunk, so that a square loses no more than this ratio of its precision.
constexpr int64_t SAMPLE = CHUNK / 8, SAMPLE_ROWS = CHUNK_ROWS / 4;

// One number for a row, or one for each of its elements.
template <typename T, bool is_vector>
struct Numbers {
  const T* of;
  Vec<T> one;

  __attribute__((always_inline)) explicit Numbers(const void* p) : of(static_cast<const T*>(p)) {
    if constexpr (!is_vector) one = splat(of == nullptr ? T(1) : *of);
  }
  template <typename Part>
  __attribute__((always_inline)) Vec<T> operator()(Part part, int64_t i, int64_t n) const {
    if constexpr (is_vector)
      return get(part, of, i, n);
    else
      return one;
  }
};

template <typename S, bool is_vector>
void form_rows(const NormMapRows& t, const void* gates, const void* before, void* formed) {
  using T = Arithmetic<S>;
  const Numbers<T, is_vector> gate(gates);
  for (int64_t r = 0; r < t.rows; ++r) {
    const S* x = static_cast<const S*>(t.h) + r * t.n;
    const S* pre_residual = before == nullptr ? nullptr : static_cast<const S*>(before) + r * t.n;
    S* h = static_cast<S*>(formed) + r * t.n;
    along<T>(t.n, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
      Vec<T> v = get(part, x, i, n);
      if (gates != nullptr) v *= gate(part, i, n);
      if (pre_residual != nullptr) v += get(part, pre_residual, i, n);
      set(part, h, i, n, v);
    });
  }
}

template <typename S>
Moments moments_of_row(const S* row, int64_t n) {
  using T = Arithmetic<S>;
  Moments found{0, 0};
  for (int64_t begin = 0; begin < n; begin += CHUNK) {
    const S* const chunk = row + begin;
    const int64_t size = n - begin < CHUNK ? n - begin : CHUNK;
    const int64_t part_of_it = size < SAMPLE ? size : SAMPLE;
    Sum<T> sum, rest, square;
    along<T>(part_of_it, [&](auto part, int64_t i, int64_t count, int which)
                             __attribute__((always_inline)) { sum.of[which] += get(part, chunk, i, count); });
    const T guess = static_cast<T>(sum.total() / part_of_it);
    along<T>(size, [&](auto part, int64_t i, int64_t count, int which) __attribute__((always_inline)) {
      const Vec<T> d = only<T>(part, count, get(part, chunk, i, count) - guess);
      rest.of[which] += d;
      square.of[which] += d * d;
    });
    const double left = rest.total() / size, off = guess + left - found.mean;
    found.mean += off * size / (begin + size);
    found.squares += square.total() - left * left * size + off * off * size * begin / (begin + size);
  }
  return found;
}

// Of each column: a number near the mean, how far from it the mean is, and the sum of squares around that.
template <typename S>
void moments_of_columns(int64_t rows, int64_t C, const S* x, Arithmetic<S>* near, Arithmetic<S>* off,
                        Arithmetic<S>* squares) {
  using T = Arithmetic<S>;
  for (int64_t begin = 0; begin < rows; begin += CHUNK_ROWS) {
    const S* const chunk = x + begin * C;
    const int64_t size = rows - begin < CHUNK_ROWS ? rows - begin : CHUNK_ROWS;
    const T part_of_all = T(size) / (begin + size), weight = part_of_all * begin, one = T(1) / size;
    const int64_t part_of_it = size < SAMPLE_ROWS ? size : SAMPLE_ROWS;
    const T one_of_it = T(1) / part_of_it;
    along<T>(C, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
      Vec<T> sum{}, rest{}, square{};
      for (int64_t r = 0; r < part_of_it; ++r) sum += get(part, chunk + r * C, i, n);
      const Vec<T> guess = sum * one_of_it;
      if (begin == 0) set(part, near, i, n, guess);
      for (int64_t r = 0; r < size; ++r) {
        const Vec<T> d = get(part, chunk + r * C, i, n) - guess;
        rest += d;
        square += d * d;
      }
      const Vec<T> left = rest * one, around = square - rest * left;
      if (begin == 0) {
        set(part, off, i, n, left);
        set(part, squares, i, n, around);
      } else {
        const Vec<T> mean = get(part, off, i, n), step = (guess - get(part, near, i, n)) + left - mean;
        set(part, off, i, n, mean + step * part_of_all);
        set(part, squares, i, n, get(part, squares, i, n) + around + step * step * weight);
      }
    });
  }
}

template <typename S, Activation activation, bool is_vector>
struct MapRows {
  using M = Simd<S>;
  using T = Arithmetic<S>;
  using Of = Numbers<T, is_vector>;

  static void forward(const NormMapRows& t, const void* addend, void* out) {
    const Of mean(t.mean), scale(t.scale), shift(t.shift);
    for (int64_t r = 0; r < t.rows; ++r) {
      const S* h = static_cast<const S*>(t.h) + r * t.n;
      const S* residual = addend == nullptr ? nullptr : static_cast<const S*>(addend) + r * t.n;
      S* y = static_cast<S*>(out) + r * t.n;
      along<T>(t.n, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
        const Vec<T> z = (get(part, h, i, n) - mean(part, i, n)) * scale(part, i, n) + shift(part, i, n);
        Vec<T> v = activate<activation, M>(z);
        if (residual != nullptr) v += get(part, residual, i, n);
        set(part, y, i, n, v, t.streamed);
      });
    }
  }

  // dz of an element, and what it is multiplied with
  struct Step {
    Vec<T> centred, scale, dz;
  };
  template <typename Part>
  FUSEDATTN_INLINE Step step(Part part, const S* h, const S* dy, const Of& mean, const Of& scale, const Of& shift,
                             int64_t i, int64_t n) {
    Step s{get(part, h, i, n) - mean(part, i, n), scale(part, i, n), get(part, dy, i, n)};
    if constexpr (activation != Activation::NONE)
      s.dz *= slope<activation, M>(s.centred * s.scale + shift(part, i, n));
    return s;
  }

  static void sums(const NormMapRows& t, const void* grad, void* kept, void* of_dz_h, void* of_dz) {
    const Of mean(t.mean), scale(t.scale), shift(t.shift);
    T *const dz_h = static_cast<T*>(of_dz_h), *const dz = static_cast<T*>(of_dz);
    Sum<T> product, sum;
    for (int64_t r = 0; r < t.rows; ++r) {
      const S* h = static_cast<const S*>(t.h) + r * t.n;
      const S* dy = static_cast<const S*>(grad) + r * t.n;
      S* const to = kept == nullptr ? nullptr : static_cast<S*>(kept) + r * t.n;
      along<T>(t.n, [&](auto part, int64_t i, int64_t n, int which) __attribute__((always_inline)) {
        const Step s = step(part, h, dy, mean, scale, shift, i, n);
        if (to != nullptr) set(part, to, i, n, s.dz);
        if constexpr (is_vector) {
          set(part, dz_h, i, n, get(part, dz_h, i, n) + s.dz * s.centred);
          set(part, dz, i, n, get(part, dz, i, n) + s.dz);
        } else {
          product.of[which] += only<T>(part, n, s.dz * s.centred);
          sum.of[which] += only<T>(part, n, s.dz);
        }
      });
    }
    if constexpr (!is_vector) {
      *dz_h = static_cast<T>(product.total());
      *dz = static_cast<T>(sum.total());
    }
  }

  static void backward(const NormMapRows& t, const NormMapGradients& to) {
    const Of mean(t.mean), scale(t.scale), shift(t.shift), slope_of_h(to.by_h), constant(to.by_mean),
        gate(to.gate);
    T* const dh_x = static_cast<T*>(to.dh_x);
    Sum<T> product;
    for (int64_t r = 0; r < t.rows; ++r) {
      const auto row = [&](const void* p) { return p == nullptr ? nullptr : static_cast<const S*>(p) + r * t.n; };
      const auto result = [&](void* p) { return p == nullptr ? nullptr : static_cast<S*>(p) + r * t.n; };
      const S *h = row(t.h), *dy = row(to.dy), *dh = row(to.dh), *x = row(to.x);
      S *dx = result(to.dx), *dr = result(to.dr);
      along<T>(t.n, [&](auto part, int64_t i, int64_t n, int which) __attribute__((always_inline)) {
        Vec<T> grad{};
        if (dy != nullptr) {
          const Step s = step(part, h, dy, mean, scale, shift, i, n);
          grad = s.dz * s.scale - s.centred * slope_of_h(part, i, n) - constant(part, i, n);
        }
        if (dh != nullptr) grad += get(part, dh, i, n);
        if (dr != nullptr) set(part, dr, i, n, grad, t.streamed);
        if (dx != nullptr) set(part, dx, i, n, to.gate == nullptr ? grad : grad * gate(part, i, n), t.streamed);
        if (dh_x == nullptr) return;
        const Vec<T> found = grad * get(part, x, i, n);
        if constexpr (is_vector)
          set(part, dh_x, i, n, get(part, dh_x, i, n) + found);
        else
          product.of[which] += only<T>(part, n, found);
      });
    }
    if constexpr (!is_vector)
      if (dh_x != nullptr) *dh_x = static_cast<T>(product.total());
  }
};

// body(MapRows<...>{}) of what is known only at run time.
template <typename Body>
FUSEDATTN_INLINE void with_rows(StorageType type, Activation activation, bool is_vector, const Body& body) {
  with_storage(type, [&](auto storage) {
    with_activation(activation, [&](auto chosen) {
      using S = decltype(storage);
      constexpr Activation known = decltype(chosen)::value;
      is_vector ? body(MapRows<S, known, true>{}) : body(MapRows<S, known, false>{});
    });
  });
}

void form(StorageType type, const NormMapRows& t, const void* gate, const void* pre_residual, void* h) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    t.is_vector ? form_rows<S, true>(t, gate, pre_residual, h) : form_rows<S, false>(t, gate, pre_residual, h);
  });
}

Moments row_moments(StorageType type, int64_t n, const void* h) {
  Moments found{};
  with_storage(type, [&](auto storage) { found = moments_of_row(static_cast<const decltype(storage)*>(h), n); });
  return found;
}

void column_moments(StorageType type, int64_t rows, int64_t C, const void* h, void* near, void* off,
                    void* squares) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    moments_of_columns(rows, C, static_cast<const S*>(h), static_cast<T*>(near), static_cast<T*>(off),
                       static_cast<T*>(squares));
  });
}

void forward(StorageType type, Activation activation, const NormMapRows& t, const void* residual, void* y) {
  with_rows(type, activation, t.is_vector, [&](auto rows) { decltype(rows)::forward(t, residual, y); });
  if (t.streamed) stream_fence();
}

void sums(StorageType type, Activation activation, const NormMapRows& t, const void* dy, void* kept, void* dz_h,
          void* dz) {
  with_rows(type, activation, t.is_vector, [&](auto rows) { decltype(rows)::sums(t, dy, kept, dz_h, dz); });
}

void backward(StorageType type, Activation activation, const NormMapRows& t, const NormMapGradients& to) {
  with_rows(type, activation, t.is_vector, [&](auto rows) { decltype(rows)::backward(t, to); });
  if (t.streamed) stream_fence();
}

}  // namespace

extern const NormFilmMapKernels norm_film_maps = {form, row_moments, column_moments, forward, sums, backward};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
