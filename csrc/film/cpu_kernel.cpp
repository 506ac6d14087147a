// CPU kernels of FiLM, compiled once per instruction set. Bound by memory: one read of each input and one write
// of each output, everything between in registers.
#include "cpu_kernel.h"

#include "common/simd.h"
#include "formula.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

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

// gamma or beta along a row.
template <typename T, bool is_vector>
struct Values {
  const T* values;
  Vec<T> one, offset;

  __attribute__((always_inline)) Values(const void* of, int64_t at, T offset)
      : values(static_cast<const T*>(of) + at) {
    this->offset = splat(offset);
    if constexpr (!is_vector) one = splat(*values + offset);
  }
  __attribute__((always_inline)) Vec<T> operator()(int64_t i) const {
    if constexpr (is_vector)
      return load(values + i) + offset;
    else
      return one;
  }
  __attribute__((always_inline)) Vec<T> tail(int64_t i, int64_t n) const {
    if constexpr (is_vector)
      return load_partial(values + i, n) + offset;
    else
      return one;
  }
};

// By halves: rows may be no longer than a vector, and lane after lane would be most of their time.
template <typename T, int half = LANES<T> / 2>
FUSEDATTN_INLINE T sum_of_lanes(Vec<T> v) {
  if constexpr (half == 0)
    return v[0];
  else
    return sum_of_lanes<T, half / 2>(fold<T, half>(v, v));
}

// Where dz x or dz of a row goes.
template <typename T, bool is_vector>
struct Sums {
  static constexpr int SEVERAL = 4;  // one sum alone would wait for each addition
  T* out;
  bool added;
  Vec<T> sum[SEVERAL] = {};

  __attribute__((always_inline)) Sums(void* to, int64_t step, int64_t row, bool is_fresh)
      : out(static_cast<T*>(to) + row * step), added(step == 0 && (row > 0 || !is_fresh)) {}
  __attribute__((always_inline)) void put(int64_t i, int which, Vec<T> v) {
    if constexpr (is_vector)
      store(out + i, added ? load(out + i) + v : v);
    else
      sum[which] += v;
  }
  __attribute__((always_inline)) void put_tail(int64_t i, int64_t n, Vec<T> v) {
    if constexpr (is_vector)
      store_partial(out + i, added ? load_partial(out + i, n) + v : v, n);
    else
      sum[0] += first_lanes<T>(n) ? v : Vec<T>{};
  }
  __attribute__((always_inline)) void close() {
    if constexpr (!is_vector) {
      const T total = sum_of_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
      *out = added ? *out + total : total;
    }
  }
};

template <Activation activation, typename S, bool gamma_is_vector, bool beta_is_vector>
struct Rows {
  using M = Simd<S>;
  using T = Arithmetic<S>;
  using Scale = Values<T, gamma_is_vector>;
  using Shift = Values<T, beta_is_vector>;
  static constexpr int W = LANES<T>;

  static void forward(const FilmRows t, const void* addend, void* out) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const Scale scale(t.gamma, r * t.gamma_step, T(t.offset));
      const Shift shift(t.beta, r * t.beta_step, T(0));
      const S* x = static_cast<const S*>(t.x) + r * t.step;
      const S* residual = addend == nullptr ? nullptr : static_cast<const S*>(addend) + r * t.step;
      S* y = static_cast<S*>(out) + r * t.step;
      int64_t i = 0;
      for (; i + W <= t.n; i += W) {
        Vec<T> v = activate<activation, M>(load(x + i) * scale(i) + shift(i));
        if (residual != nullptr) v += load(residual + i);
        put(y + i, v, t.streamed);
      }
      if (i == t.n) continue;
      const int64_t n = t.n - i;
      Vec<T> v = activate<activation, M>(load_partial(x + i, n) * scale.tail(i, n) + shift.tail(i, n));
      if (residual != nullptr) v += load_partial(residual + i, n);
      store_partial(y + i, v, n);
    }
  }

  static void backward(const FilmRows t, const void* grad, void* out, const FilmSums to) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const Scale scale(t.gamma, r * t.gamma_step, T(t.offset));
      const Shift shift(t.beta, r * t.beta_step, T(0));
      Sums<T, gamma_is_vector> dz_x(to.gamma, to.gamma_step, r, to.gamma_is_fresh);
      Sums<T, beta_is_vector> dz(to.beta, to.beta_step, r, to.beta_is_fresh);
      const S* x = static_cast<const S*>(t.x) + r * t.step;
      const S* dy = static_cast<const S*>(grad) + r * t.step;
      S* dx = static_cast<S*>(out) + (to.keeps_dx ? r * t.step : 0);
      const auto step = [&](int64_t i, int which) {
        const Vec<T> in = load(x + i), a = scale(i);
        Vec<T> g = load(dy + i);
        if constexpr (activation != Activation::NONE) g *= slope<activation, M>(in * a + shift(i));
        put(dx + i, g * a, t.streamed);
        dz_x.put(i, which, g * in);
        dz.put(i, which, g);
      };
      int64_t i = 0;
      if constexpr (!gamma_is_vector || !beta_is_vector) {
        constexpr int SEVERAL = Sums<T, false>::SEVERAL;
        for (; i + SEVERAL * W <= t.n; i += SEVERAL * W)
          for (int u = 0; u < SEVERAL; ++u) step(i + u * W, u);
      }
      for (; i + W <= t.n; i += W) step(i, 0);
      if (i < t.n) {
        const int64_t n = t.n - i;
        const Vec<T> in = load_partial(x + i, n), a = scale.tail(i, n);
        Vec<T> g = load_partial(dy + i, n);
        if constexpr (activation != Activation::NONE) g *= slope<activation, M>(in * a + shift.tail(i, n));
        store_partial(dx + i, g * a, n);
        dz_x.put_tail(i, n, g * in);
        dz.put_tail(i, n, g);
      }
      dz_x.close();
      dz.close();
    }
  }
};

// body(S{}) of a storage type known only at run time.
template <typename Body>
FUSEDATTN_INLINE void with_storage(FilmType type, const Body& body) {
  switch (type) {
    case FilmType::FLOAT:
      return body(float{});
    case FilmType::DOUBLE:
      return body(double{});
    case FilmType::HALF:
      return body(Half{});
    case FilmType::BFLOAT16:
      return body(BFloat16{});
  }
}

template <typename S, Activation activation, typename Body>
FUSEDATTN_INLINE void with_vectors(const FilmRows& t, const Body& body) {
  if (t.gamma_is_vector)
    t.beta_is_vector ? body(Rows<activation, S, true, true>{}) : body(Rows<activation, S, true, false>{});
  else
    t.beta_is_vector ? body(Rows<activation, S, false, true>{}) : body(Rows<activation, S, false, false>{});
}

// body(Rows<...>{}) of what is known only at run time.
template <typename Body>
FUSEDATTN_INLINE void with_rows(FilmType type, Activation activation, const FilmRows& t, const Body& body) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    switch (activation) {
      case Activation::NONE:
        return with_vectors<S, Activation::NONE>(t, body);
      case Activation::RELU:
        return with_vectors<S, Activation::RELU>(t, body);
      case Activation::LEAKY_RELU:
        return with_vectors<S, Activation::LEAKY_RELU>(t, body);
      case Activation::SILU:
        return with_vectors<S, Activation::SILU>(t, body);
      case Activation::GELU:
        return with_vectors<S, Activation::GELU>(t, body);
      case Activation::GELU_TANH:
        return with_vectors<S, Activation::GELU_TANH>(t, body);
      case Activation::TANH:
        return with_vectors<S, Activation::TANH>(t, body);
      case Activation::SIGMOID:
        return with_vectors<S, Activation::SIGMOID>(t, body);
    }
  });
}

void forward(FilmType type, Activation activation, const FilmRows& t, const void* residual, void* y) {
  with_rows(type, activation, t, [&](auto rows) { decltype(rows)::forward(t, residual, y); });
  if (t.streamed) stream_fence();
}

void backward(FilmType type, Activation activation, const FilmRows& t, const void* dy, void* dx,
              const FilmSums& sums) {
  with_rows(type, activation, t, [&](auto rows) { decltype(rows)::backward(t, dy, dx, sums); });
  if (t.streamed) stream_fence();
}

void widen(FilmType type, int64_t n, int64_t step, const void* from, void* to, bool added) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    constexpr int W = LANES<T>;
    const S* in = static_cast<const S*>(from);
    T* out = static_cast<T*>(to);
    if (step == 1) return FUSEDATTN_LEVEL::widen(n, in, out, added);
    for (int64_t i = 0; i < n; i += W) {
      const int64_t left = n - i < W ? n - i : W;
      S lanes[W] = {};
      for (int64_t l = 0; l < left; ++l) lanes[l] = in[(i + l) * step];
      const Vec<T> v = load(lanes);
      store_partial(out + i, added ? load_partial(out + i, left) + v : v, left);
    }
  });
}

void narrow(FilmType type, int64_t n, const void* from, void* to) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    FUSEDATTN_LEVEL::narrow(n, static_cast<const Arithmetic<S>*>(from), static_cast<S*>(to));
  });
}

}  // namespace

extern const FilmKernels film = {forward, backward, widen, narrow};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
