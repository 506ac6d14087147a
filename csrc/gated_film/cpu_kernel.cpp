// CPU kernels of gated_film, compiled once per instruction set: one read of each input and one write of each
// output. tanh and the logistic function, two exponentials and two reciprocals, take about as long as that.
#include "cpu_kernel.h"

#include "film/cpu_kernel_common.h"
// after the definition of FUSEDATTN_INLINE
#include "formula.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

// Of the next row: where halves are short pieces that take turns in memory, the hardware fetches neither ahead,
// which took a third of the time.
FUSEDATTN_INLINE void prefetch(const void* a, const void* b) {
  __builtin_prefetch(a);
  __builtin_prefetch(b);
}

// P: the type of the condition and its gradients.
template <typename S, bool is_vector, typename P = Arithmetic<S>>
struct Rows {
  using M = Simd<S>;
  using T = Arithmetic<S>;

  static void forward(const GatedFilmRows& t, void* out) {
    for (int64_t r = 0; r < t.rows.rows; ++r) {
      const Values<P, is_vector> h_a(t.rows.gamma, r * t.rows.gamma_step, T(0));
      const Values<P, is_vector> h_b(t.rows.beta, r * t.rows.beta_step, T(0));
      const S *a = static_cast<const S*>(t.rows.x) + r * t.x_step, *b = a + t.apart;
      S* y = static_cast<S*>(out) + r * t.rows.step;
      along<T>(t.rows.n, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
        prefetch(a + t.x_step + i, b + t.x_step + i);
        const Vec<T> z_a = get(part, a, i, n) + h_a(part, i, n), z_b = get(part, b, i, n) + h_b(part, i, n);
        set(part, y, i, n, gated<M>(z_a, z_b), t.rows.streamed);
      });
    }
  }

  static void backward(const GatedFilmRows& t, const void* grad, void* out, const FilmSums& to) {
    for (int64_t r = 0; r < t.rows.rows; ++r) {
      const Values<P, is_vector> h_a(t.rows.gamma, r * t.rows.gamma_step, T(0));
      const Values<P, is_vector> h_b(t.rows.beta, r * t.rows.beta_step, T(0));
      Sums<P, is_vector> sum_a(to.gamma, to.gamma_step, r, to.gamma_is_fresh);
      Sums<P, is_vector> sum_b(to.beta, to.beta_step, r, to.beta_is_fresh);
      const S *a = static_cast<const S*>(t.rows.x) + r * t.x_step, *b = a + t.apart;
      const S* dy = static_cast<const S*>(grad) + r * t.rows.step;
      S* da = static_cast<S*>(out) + (to.keeps_dx ? r * t.x_step : 0);
      S* db = da + (to.keeps_dx ? t.apart : t.rows.n);
      along<T>(t.rows.n, [&](auto part, int64_t i, int64_t n, int which) __attribute__((always_inline)) {
        prefetch(a + t.x_step + i, b + t.x_step + i);
        const Vec<T> z_a = get(part, a, i, n) + h_a(part, i, n), z_b = get(part, b, i, n) + h_b(part, i, n);
        const GateGradients<Vec<T>> g = gate_gradients<M>(z_a, z_b, get(part, dy, i, n));
        set(part, da, i, n, g.a, t.rows.streamed);
        set(part, db, i, n, g.b, t.rows.streamed);
        sum_a.put(part, i, n, which, g.a);
        sum_b.put(part, i, n, which, g.b);
      });
      sum_a.close();
      sum_b.close();
    }
  }
};

// body(Rows<...>{}) of what is known only at run time.
template <typename Body>
FUSEDATTN_INLINE void with_rows(StorageType type, const GatedFilmRows& t, const Body& body) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    if constexpr (IS_NARROW<S>)
      if (t.rows.narrow) return body(Rows<S, true, S>{});
    t.rows.gamma_is_vector ? body(Rows<S, true>{}) : body(Rows<S, false>{});
  });
}

void forward(StorageType type, const GatedFilmRows& t, void* y) {
  with_rows(type, t, [&](auto rows) { decltype(rows)::forward(t, y); });
  if (t.rows.streamed) stream_fence();
}

void backward(StorageType type, const GatedFilmRows& t, const void* dy, void* dx, const FilmSums& sums) {
  with_rows(type, t, [&](auto rows) { decltype(rows)::backward(t, dy, dx, sums); });
  if (t.rows.streamed) stream_fence();
}

}  // namespace

extern const GatedFilmKernels gated_film = {forward, backward};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
