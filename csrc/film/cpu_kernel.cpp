// CPU kernels of FiLM, compiled once per instruction set. Bound by memory: one read of each input and one write
// of each output, everything between in registers.
#include "cpu_kernel_common.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

// P: the type of gamma, beta and their gradients.
template <Activation activation, typename S, bool gamma_is_vector, bool beta_is_vector, typename P = Arithmetic<S>>
struct Rows {
  using M = Simd<S>;
  using T = Arithmetic<S>;
  using Scale = Values<P, gamma_is_vector>;
  using Shift = Values<P, beta_is_vector>;
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
        Vec<T> v = activate<activation, M>(load(x + i) * scale(Whole{}, i, W) + shift(Whole{}, i, W));
        if (residual != nullptr) v += load(residual + i);
        put(y + i, v, t.streamed);
      }
      if (i == t.n) continue;
      const int64_t n = t.n - i;
      Vec<T> v = activate<activation, M>(load_partial(x + i, n) * scale(Partial{}, i, n) + shift(Partial{}, i, n));
      if (residual != nullptr) v += load_partial(residual + i, n);
      store_partial(y + i, v, n);
    }
  }

  static void backward(const FilmRows t, const void* grad, void* out, const FilmSums to) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const Scale scale(t.gamma, r * t.gamma_step, T(t.offset));
      const Shift shift(t.beta, r * t.beta_step, T(0));
      Sums<P, gamma_is_vector> dz_x(to.gamma, to.gamma_step, r, to.gamma_is_fresh);
      Sums<P, beta_is_vector> dz(to.beta, to.beta_step, r, to.beta_is_fresh);
      const S* x = static_cast<const S*>(t.x) + r * t.step;
      const S* dy = static_cast<const S*>(grad) + r * t.step;
      S* dx = static_cast<S*>(out) + (to.keeps_dx ? r * t.step : 0);
      const auto step = [&](int64_t i, int which) {
        const Vec<T> in = load(x + i), a = scale(Whole{}, i, W);
        Vec<T> g = load(dy + i);
        if constexpr (activation != Activation::NONE) g *= slope<activation, M>(in * a + shift(Whole{}, i, W));
        put(dx + i, g * a, t.streamed);
        dz_x.put(Whole{}, i, W, which, g * in);
        dz.put(Whole{}, i, W, which, g);
      };
      int64_t i = 0;
      if constexpr (!gamma_is_vector || !beta_is_vector) {
        for (; i + SEVERAL * W <= t.n; i += SEVERAL * W)
          for (int u = 0; u < SEVERAL; ++u) step(i + u * W, u);
      }
      for (; i + W <= t.n; i += W) step(i, 0);
      if (i < t.n) {
        const int64_t n = t.n - i;
        const Vec<T> in = load_partial(x + i, n), a = scale(Partial{}, i, n);
        Vec<T> g = load_partial(dy + i, n);
        if constexpr (activation != Activation::NONE) g *= slope<activation, M>(in * a + shift(Partial{}, i, n));
        store_partial(dx + i, g * a, n);
        dz_x.put(Partial{}, i, n, 0, g * in);
        dz.put(Partial{}, i, n, 0, g);
      }
      dz_x.close();
      dz.close();
    }
  }
};

template <typename S, Activation activation, typename Body>
FUSEDATTN_INLINE void with_vectors(const FilmRows& t, const Body& body) {
  if constexpr (IS_NARROW<S>)
    if (t.narrow) return body(Rows<activation, S, true, true, S>{});
  if (t.gamma_is_vector)
    t.beta_is_vector ? body(Rows<activation, S, true, true>{}) : body(Rows<activation, S, true, false>{});
  else
    t.beta_is_vector ? body(Rows<activation, S, false, true>{}) : body(Rows<activation, S, false, false>{});
}

// body(Rows<...>{}) of what is known only at run time.
template <typename Body>
FUSEDATTN_INLINE void with_rows(StorageType type, Activation activation, const FilmRows& t, const Body& body) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    with_activation(activation, [&](auto chosen) { with_vectors<S, decltype(chosen)::value>(t, body); });
  });
}

void forward(StorageType type, Activation activation, const FilmRows& t, const void* residual, void* y) {
  with_rows(type, activation, t, [&](auto rows) { decltype(rows)::forward(t, residual, y); });
  if (t.streamed) stream_fence();
}

void backward(StorageType type, Activation activation, const FilmRows& t, const void* dy, void* dx,
              const FilmSums& sums) {
  with_rows(type, activation, t, [&](auto rows) { decltype(rows)::backward(t, dy, dx, sums); });
  if (t.streamed) stream_fence();
}

}  // namespace

extern const FilmKernels film = {forward, backward, widen, narrow};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
