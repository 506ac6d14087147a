// CPU kernels of norm_film, compiled once per instruction set: rows of neighbouring channels, each a group.
//
// Bound by memory: a row is read once, kept in the cache for the passes over it, and its results are written once.
// Its mean is found in two steps, of h and then of what the first left, and so is the variance: exact however far
// the mean is from 0.
#include "cpu_kernel.h"

#include "common/along.h"
#include "formula.h"

// From the C library; <cmath> would bring weak inline functions.
extern "C" double sqrt(double);

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

template <typename T>
FUSEDATTN_INLINE T* of_row(T* p, int64_t r, int64_t C) {
  return p == nullptr ? nullptr : p + r * C;
}

// Of a row whose squares are too large for T.
template <typename T>
Moments moments_of_huge(const T* row, int64_t C, bool is_rms) {
  double mean = 0, square = 0;
  if (!is_rms) {
    for (int64_t i = 0; i < C; ++i) mean += row[i];
    mean /= C;
  }
  for (int64_t i = 0; i < C; ++i) square += (row[i] - mean) * (row[i] - mean);
  return {mean, square};
}

template <typename T>
FUSEDATTN_INLINE Moments moments(const T* row, int64_t C, bool is_rms, double sum) {
  const T guess = static_cast<T>(is_rms ? 0 : sum / C);
  Sum<T> rest, square;
  along<T>(C, [&](auto part, int64_t i, int64_t n, int which) __attribute__((always_inline)) {
    const Vec<T> d = only<T>(part, n, get(part, row, i, n) - guess);
    rest.of[which] += d;
    square.of[which] += d * d;
  });
  const double left = is_rms ? 0 : rest.total() / C;
  const double variance = square.total() / C - left * left;
  if (!(variance < 1e38)) return moments_of_huge(row, C, is_rms);
  return {guess + left, variance > 0 ? variance * C : 0};
}

template <typename S, Activation activation>
struct Rows {
  using M = Simd<S>;
  using T = Arithmetic<S>;

  static void forward(const NormRows t, const void* addend, void* formed, void* out) {
    const T *gate = static_cast<const T*>(t.gate), *scale = static_cast<const T*>(t.scale),
            *shift = static_cast<const T*>(t.shift);
    T* const room = static_cast<T*>(t.room);
    const Vec<T> offset = splat(static_cast<T>(t.offset));
    for (int64_t r = 0; r < t.rows; ++r) {
      const S* x = static_cast<const S*>(t.x) + r * t.C;
      const S* pre_residual = of_row(static_cast<const S*>(t.pre_residual), r, t.C);
      const S* residual = of_row(static_cast<const S*>(addend), r, t.C);
      S* h = of_row(static_cast<S*>(formed), r, t.C);
      S* y = static_cast<S*>(out) + r * t.C;
      Sum<T> sum;
      along<T>(t.C, [&](auto part, int64_t i, int64_t n, int which) __attribute__((always_inline)) {
        Vec<T> v = get(part, x, i, n);
        if (h != nullptr) {
          if (gate != nullptr) v *= get(part, gate, i, n);
          if (pre_residual != nullptr) v += get(part, pre_residual, i, n);
          set(part, h, i, n, v, t.streamed);
          if constexpr (sizeof(S) != sizeof(T)) v = get(part, h, i, n);  // rounded, as it is returned
        }
        set(part, room, i, n, v);
        sum.of[which] += v;
      });
      const Moments found = moments(room, t.C, t.is_rms, sum.total());
      t.mean[r] = found.mean;
      t.variance[r] = found.squares / t.C;
      const auto normalise = Normalise<M>::of(found.mean, 1 / sqrt(t.variance[r] + t.eps));
      along<T>(t.C, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
        const Vec<T> z =
            normalise(get(part, room, i, n)) * (get(part, scale, i, n) + offset) + get(part, shift, i, n);
        Vec<T> v = activate<activation, M>(z);
        if (residual != nullptr) v += get(part, residual, i, n);
        set(part, y, i, n, v, t.streamed);
      });
    }
  }

  static void backward(const NormRows t, const NormRowsGradients to) {
    const T *gate = static_cast<const T*>(t.gate), *scale = static_cast<const T*>(t.scale),
            *shift = static_cast<const T*>(t.shift);
    T *const room = static_cast<T*>(t.room), *const dz_n = static_cast<T*>(to.dz_n),
             *const dz_sum = static_cast<T*>(to.dz), *const dh_x = static_cast<T*>(to.dh_x);
    const Vec<T> offset = splat(static_cast<T>(t.offset));
    for (int64_t r = 0; r < t.rows; ++r) {
      const S* x = static_cast<const S*>(t.x) + r * t.C;
      const S* h = static_cast<const S*>(to.h) + r * t.C;
      const S* dy = of_row(static_cast<const S*>(to.dy), r, t.C);
      const S* dh = of_row(static_cast<const S*>(to.dh), r, t.C);
      S* dx = of_row(static_cast<S*>(to.dx), r, t.C);
      S* dr = of_row(static_cast<S*>(to.dr), r, t.C);
      const auto normalise = Normalise<M>::of(t.mean[r], 1 / sqrt(t.variance[r] + t.eps));
      Sum<T> sum, product;
      if (dy != nullptr)
        along<T>(t.C, [&](auto part, int64_t i, int64_t count, int which) __attribute__((always_inline)) {
          const Vec<T> n = only<T>(part, count, normalise(get(part, h, i, count)));
          const Vec<T> a = get(part, scale, i, count) + offset;
          Vec<T> dz = get(part, dy, i, count);
          if constexpr (activation != Activation::NONE)
            dz *= slope<activation, M>(n * a + get(part, shift, i, count));
          const Vec<T> dn = dz * a;
          sum.of[which] += dn;
          product.of[which] += dn * n;
          set(part, room, i, count, dn);
          if (dz_n != nullptr) set(part, dz_n, i, count, get(part, dz_n, i, count) + dz * n);
          if (dz_sum != nullptr) set(part, dz_sum, i, count, get(part, dz_sum, i, count) + dz);
        });
      if (dx == nullptr && dr == nullptr && dh_x == nullptr) continue;
      const Vec<T> mean_dn = splat(static_cast<T>(t.is_rms ? 0 : sum.total() / t.C));
      const Vec<T> mean_dn_n = splat(static_cast<T>(product.total() / t.C));
      along<T>(t.C, [&](auto part, int64_t i, int64_t count, int) __attribute__((always_inline)) {
        Vec<T> grad{};
        if (dy != nullptr) {
          const Vec<T> n = normalise(get(part, h, i, count));
          grad = (get(part, room, i, count) - mean_dn - n * mean_dn_n) * normalise.rstd;
        }
        if (dh != nullptr) grad += get(part, dh, i, count);
        if (dr != nullptr) set(part, dr, i, count, grad, t.streamed);
        if (dx != nullptr)
          set(part, dx, i, count, gate == nullptr ? grad : grad * get(part, gate, i, count), t.streamed);
        if (dh_x != nullptr) set(part, dh_x, i, count, get(part, dh_x, i, count) + grad * get(part, x, i, count));
      });
    }
  }
};

void rows_forward(StorageType type, Activation activation, const NormRows& t, const void* residual, void* h,
                  void* y) {
  with_storage(type, [&](auto storage) {
    with_activation(activation, [&](auto chosen) {
      Rows<decltype(storage), decltype(chosen)::value>::forward(t, residual, h, y);
    });
  });
  if (t.streamed) stream_fence();
}

void rows_backward(StorageType type, Activation activation, const NormRows& t, const NormRowsGradients& to) {
  with_storage(type, [&](auto storage) {
    with_activation(activation,
                    [&](auto chosen) { Rows<decltype(storage), decltype(chosen)::value>::backward(t, to); });
  });
  if (t.streamed) stream_fence();
}

template <typename T>
void affine_of(int64_t n, const T* gamma, T offset, const T* weight, const T* bias, const T* beta, T* scale,
               T* shift) {
  along<T>(n, [&](auto part, int64_t i, int64_t count, int) __attribute__((always_inline)) {
    const Vec<T> factor = gamma == nullptr ? splat(T(1)) : get(part, gamma, i, count) + offset;
    set(part, scale, i, count, weight == nullptr ? factor : factor * get(part, weight, i, count));
    Vec<T> term = bias == nullptr ? Vec<T>{} : factor * get(part, bias, i, count);
    if (beta != nullptr) term += get(part, beta, i, count);
    set(part, shift, i, count, term);
  });
}

template <typename T>
void products_of(int64_t n, const T* a, const T* b, const T* c, const T* d, T* out, bool added) {
  along<T>(n, [&](auto part, int64_t i, int64_t count, int) __attribute__((always_inline)) {
    Vec<T> v = get(part, b, i, count);
    if (a != nullptr) v *= get(part, a, i, count);
    if (c != nullptr) v += get(part, c, i, count) * get(part, d, i, count);
    set(part, out, i, count, added ? get(part, out, i, count) + v : v);
  });
}

template <typename T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}

void affine(StorageType type, int64_t n, const void* gamma, double offset, const void* weight, const void* bias,
            const void* beta, void* scale, void* shift) {
  if (type == StorageType::DOUBLE)
    affine_of(n, as<double>(gamma), offset, as<double>(weight), as<double>(bias), as<double>(beta),
              static_cast<double*>(scale), static_cast<double*>(shift));
  else
    affine_of(n, as<float>(gamma), static_cast<float>(offset), as<float>(weight), as<float>(bias), as<float>(beta),
              static_cast<float*>(scale), static_cast<float*>(shift));
}

void products(StorageType type, int64_t n, const void* a, const void* b, const void* c, const void* d, void* out,
              bool added) {
  if (type == StorageType::DOUBLE)
    products_of(n, as<double>(a), as<double>(b), as<double>(c), as<double>(d), static_cast<double*>(out), added);
  else
    products_of(n, as<float>(a), as<float>(b), as<float>(c), as<float>(d), static_cast<float*>(out), added);
}

}  // namespace

extern const NormFilmKernels norm_film = {rows_forward, rows_backward, affine, products, widen, narrow};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
