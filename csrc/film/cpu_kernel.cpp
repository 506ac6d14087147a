// CPU kernels of FiLM, compiled once per instruction set. Bound by memory: one read of each input and one write
// of each output, everything between in registers.
#include "cpu_kernel.h"

#include "common/simd.h"
#include "formula.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

template <typename S>
struct ArithmeticOf {
  typedef float type;
};
template <>
struct ArithmeticOf<double> {
  typedef double type;
};

template <typename S>
using Arithmetic = typename ArithmeticOf<S>::type;

// Fewer than a vector of storage elements, through a zero-padded copy.
template <typename S>
FUSEDATTN_INLINE Vec<Arithmetic<S>> load_tail(const S* p, int64_t n) {
  S tail[LANES<Arithmetic<S>>] = {};
  __builtin_memcpy(tail, p, n * sizeof(S));
  return load(tail);
}
template <typename S>
FUSEDATTN_INLINE void store_tail(S* p, Vec<Arithmetic<S>> v, int64_t n) {
  S tail[LANES<Arithmetic<S>>];
  store(tail, v);
  __builtin_memcpy(p, tail, n * sizeof(S));
}

// A whole vector, past the caches if asked.
template <typename S>
FUSEDATTN_INLINE void put(S* p, Vec<Arithmetic<S>> v, bool streamed) {
  if constexpr (sizeof(S) == sizeof(Arithmetic<S>))
    if (streamed) return stream(p, v);
  store(p, v);
}

// erfc(z) / 2 for z >= 0: t exp(-z^2 + P(t)), t = 1 / (1 + z/2), relative error 1.2e-7 (Chebyshev fit,
// Numerical Recipes, section 6.2).
FUSEDATTN_INLINE Vec<float> half_erfc(Vec<float> z) {
  const Vec<float> t = reciprocal(1 + 0.5f * z);
  Vec<float> p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const Vec<float> e = exp(p - z * z);
  return z * z > 86.0f ? Vec<float>{} : 0.5f * t * e;
}
FUSEDATTN_INLINE Vec<double> half_erfc(Vec<double> z) {
  for (int l = 0; l < LANES<double>; ++l) z[l] = 0.5 * ::erfc(z[l]);
  return z;
}

// The arithmetic of formula.h on vectors.
template <typename S>
struct Simd {
  using T = Arithmetic<S>;
  using V = Vec<T>;
  FUSEDATTN_INLINE V exp(V x) { return FUSEDATTN_LEVEL::exp(x); }
  FUSEDATTN_INLINE V reciprocal(V x) { return FUSEDATTN_LEVEL::reciprocal(x); }
  FUSEDATTN_INLINE V tanh(V x) { return FUSEDATTN_LEVEL::tanh(x); }
  FUSEDATTN_INLINE V half_erfc(V x) { return FUSEDATTN_LEVEL::half_erfc(x); }
};

template <Activation activation, typename S>
struct Run {
  using M = Simd<S>;
  using T = Arithmetic<S>;
  static constexpr int W = LANES<T>;

  static void forward(int64_t n, const S* x, const T* scale, const T* shift, const S* residual, S* y,
                      bool streamed) {
    const Vec<T> a = splat(*scale), b = splat(*shift);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      Vec<T> v = activate<activation, M>(load(x + i) * a + b);
      if (residual != nullptr) v += load(residual + i);
      put(y + i, v, streamed);
    }
    if (i == n) return;
    Vec<T> v = activate<activation, M>(load_tail(x + i, n - i) * a + b);
    if (residual != nullptr) v += load_tail(residual + i, n - i);
    store_tail(y + i, v, n - i);
  }

  static void forward_rows(int64_t rows, int64_t C, const S* x, const T* scale, const T* shift, const S* residual,
                           S* y, bool streamed) {
    for (int64_t r = 0; r < rows; ++r, x += C, y += C) {
      int64_t c = 0;
      for (; c + W <= C; c += W) {
        Vec<T> v = activate<activation, M>(load(x + c) * load(scale + c) + load(shift + c));
        if (residual != nullptr) v += load(residual + c);
        put(y + c, v, streamed);
      }
      if (c < C) {
        const int64_t n = C - c;
        Vec<T> v =
            activate<activation, M>(load_tail(x + c, n) * load_tail(scale + c, n) + load_tail(shift + c, n));
        if (residual != nullptr) v += load_tail(residual + c, n);
        store_tail(y + c, v, n);
      }
      if (residual != nullptr) residual += C;
    }
  }

  // A vector of dx, and what it adds to the two sums.
  FUSEDATTN_INLINE Vec<T> gradient(Vec<T> dy, Vec<T> x, Vec<T> a, Vec<T> b, Vec<T>& dz_x, Vec<T>& dz_sum) {
    const Vec<T> dz = dy * slope<activation, M>(x * a + b);
    dz_x += dz * x;
    dz_sum += dz;
    return dz * a;
  }

  static void backward(int64_t n, const S* dy, const S* x, const T* scale, const T* shift, S* dx, T* sum_dz_x,
                       T* sum_dz, bool streamed) {
    constexpr int SUMS = 4;  // one sum alone would wait for each addition
    const Vec<T> a = splat(*scale), b = splat(*shift);
    Vec<T> dz_x[SUMS] = {}, dz_sum[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * W <= n; i += SUMS * W)
      for (int u = 0; u < SUMS; ++u) {
        const int64_t k = i + u * W;
        put(dx + k, gradient(load(dy + k), load(x + k), a, b, dz_x[u], dz_sum[u]), streamed);
      }
    for (; i + W <= n; i += W)
      put(dx + i, gradient(load(dy + i), load(x + i), a, b, dz_x[0], dz_sum[0]), streamed);
    if (i < n) {  // dy is zero above the tail
      const Vec<T> tail = gradient(load_tail(dy + i, n - i), load_tail(x + i, n - i), a, b, dz_x[0], dz_sum[0]);
      store_tail(dx + i, tail, n - i);
    }
    *sum_dz_x = horizontal_sum<T>((dz_x[0] + dz_x[1]) + (dz_x[2] + dz_x[3]));
    *sum_dz = horizontal_sum<T>((dz_sum[0] + dz_sum[1]) + (dz_sum[2] + dz_sum[3]));
  }

  static void backward_rows(int64_t rows, int64_t C, const S* dy, const S* x, const T* scale, const T* shift,
                            S* dx, T* sum_dz_x, T* sum_dz, bool streamed) {
    for (int64_t c = 0; c < C; ++c) sum_dz_x[c] = sum_dz[c] = 0;
    for (int64_t r = 0; r < rows; ++r, x += C, dy += C, dx += C) {  // several at once: slower beyond the cache
      int64_t c = 0;
      for (; c + W <= C; c += W) {
        Vec<T> dz_x = load(sum_dz_x + c), dz = load(sum_dz + c);
        put(dx + c, gradient(load(dy + c), load(x + c), load(scale + c), load(shift + c), dz_x, dz), streamed);
        store(sum_dz_x + c, dz_x);
        store(sum_dz + c, dz);
      }
      if (c < C) {
        const int64_t n = C - c;
        const Vec<T> a = load_tail(scale + c, n), b = load_tail(shift + c, n);
        Vec<T> dz_x = load_partial(sum_dz_x + c, n), dz = load_partial(sum_dz + c, n);
        store_tail(dx + c, gradient(load_tail(dy + c, n), load_tail(x + c, n), a, b, dz_x, dz), n);
        store_partial(sum_dz_x + c, dz_x, n);
        store_partial(sum_dz + c, dz, n);
      }
    }
  }
};

// body(Run<activation, S>{}, S{}) of a storage type and activation known only at run time.
template <typename S, typename Body>
FUSEDATTN_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::NONE:
      return body(Run<Activation::NONE, S>{}, S{});
    case Activation::RELU:
      return body(Run<Activation::RELU, S>{}, S{});
    case Activation::LEAKY_RELU:
      return body(Run<Activation::LEAKY_RELU, S>{}, S{});
    case Activation::SILU:
      return body(Run<Activation::SILU, S>{}, S{});
    case Activation::GELU:
      return body(Run<Activation::GELU, S>{}, S{});
    case Activation::GELU_TANH:
      return body(Run<Activation::GELU_TANH, S>{}, S{});
    case Activation::TANH:
      return body(Run<Activation::TANH, S>{}, S{});
    case Activation::SIGMOID:
      return body(Run<Activation::SIGMOID, S>{}, S{});
  }
}

template <typename Body>
FUSEDATTN_INLINE void with_type(FilmType type, Activation activation, const Body& body) {
  switch (type) {
    case FilmType::FLOAT:
      return with_activation<float>(activation, body);
    case FilmType::DOUBLE:
      return with_activation<double>(activation, body);
    case FilmType::HALF:
      return with_activation<Half>(activation, body);
    case FilmType::BFLOAT16:
      return with_activation<BFloat16>(activation, body);
  }
}

template <typename To>
FUSEDATTN_INLINE const To* as(const void* p) {
  return static_cast<const To*>(p);
}

void forward_runs(FilmType type, const FilmOptions& options, int64_t runs, int64_t n, const void* x,
                  const void* scale, const void* shift, const void* residual, void* y, bool streamed) {
  with_type(type, options.activation, [&](auto run, auto s) {
    using S = decltype(s);
    using T = Arithmetic<S>;
    for (int64_t c = 0; c < runs; ++c)
      decltype(run)::forward(n, as<S>(x) + c * n, as<T>(scale) + c, as<T>(shift) + c,
                             residual == nullptr ? nullptr : as<S>(residual) + c * n, static_cast<S*>(y) + c * n,
                             streamed);
  });
  stream_fence();
}

void forward_rows(FilmType type, const FilmOptions& options, int64_t rows, int64_t C, const void* x,
                  const void* scale, const void* shift, const void* residual, void* y, bool streamed) {
  with_type(type, options.activation, [&](auto run, auto s) {
    using S = decltype(s);
    using T = Arithmetic<S>;
    decltype(run)::forward_rows(rows, C, as<S>(x), as<T>(scale), as<T>(shift), as<S>(residual), static_cast<S*>(y),
                                streamed);
  });
  stream_fence();
}

void backward_runs(FilmType type, const FilmOptions& options, int64_t runs, int64_t n, const void* dy,
                   const void* x, const void* scale, const void* shift, void* dx, void* sum_dz_x, void* sum_dz,
                   bool streamed) {
  with_type(type, options.activation, [&](auto run, auto s) {
    using S = decltype(s);
    using T = Arithmetic<S>;
    for (int64_t c = 0; c < runs; ++c)
      decltype(run)::backward(n, as<S>(dy) + c * n, as<S>(x) + c * n, as<T>(scale) + c, as<T>(shift) + c,
                              static_cast<S*>(dx) + c * n, static_cast<T*>(sum_dz_x) + c,
                              static_cast<T*>(sum_dz) + c, streamed);
  });
  stream_fence();
}

void backward_rows(FilmType type, const FilmOptions& options, int64_t rows, int64_t C, const void* dy,
                   const void* x, const void* scale, const void* shift, void* dx, void* sum_dz_x, void* sum_dz,
                   bool streamed) {
  with_type(type, options.activation, [&](auto run, auto s) {
    using S = decltype(s);
    using T = Arithmetic<S>;
    decltype(run)::backward_rows(rows, C, as<S>(dy), as<S>(x), as<T>(scale), as<T>(shift), static_cast<S*>(dx),
                                 static_cast<T*>(sum_dz_x), static_cast<T*>(sum_dz), streamed);
  });
  stream_fence();
}

}  // namespace

extern const FilmKernels film = {forward_runs, forward_rows, backward_runs, backward_rows};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
