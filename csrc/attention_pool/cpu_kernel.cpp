// CPU kernels of attention_pool, compiled once per instruction set. Each instance is read once in either direction
// but for its value, which is read when the weights are known.
#include "cpu_kernel.h"

#include "common/along.h"
// after the definition of FUSEDATTN_INLINE
#include "gated_film/formula.h"

namespace fusedattn {
namespace FUSEDATTN_LEVEL {
namespace {

template <typename S>
struct Pool {
  using M = Simd<S>;
  using T = Arithmetic<S>;

  static const S* row(const void* p, int64_t at) { return p == nullptr ? nullptr : static_cast<const S*>(p) + at; }
  static S* row(void* p, int64_t at) { return p == nullptr ? nullptr : static_cast<S*>(p) + at; }

  static void score(const PoolFeatures& t, T* scores, int64_t stride, T* room) {
    const T* const weight = static_cast<const T*>(t.weight);
    for (int64_t r = 0; r < t.rows; ++r) {
      const S *hidden = row(t.hidden, r * t.hidden_step), *gate = row(t.gate, r * t.gate_step);
      along<T>(t.D, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
        const Vec<T> h = get(part, hidden, i, n);
        set(part, room, i, n, gate == nullptr ? M::tanh(h) : gated<M>(h, get(part, gate, i, n)));
      });
      for (int64_t k = 0; k < t.K; ++k) {
        Sum<T> sum;
        along<T>(t.D, [&](auto part, int64_t i, int64_t n, int which) __attribute__((always_inline)) {
          sum.of[which] += get(part, room, i, n) * get(part, weight + k * t.D, i, n);
        });
        scores[k * stride + r] = static_cast<T>(sum.total());
      }
    }
  }

  static void pool(const PoolValues& t, const T* p, int64_t stride, T* sums) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const S* value = row(t.value, r * t.step);
      for (int64_t k = 0; k < t.K; ++k) {
        const Vec<T> weight = splat(p[k * stride + r]);
        T* const sum = sums + k * t.Dv;
        along<T>(t.Dv, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
          set(part, sum, i, n, get(part, sum, i, n) + weight * get(part, value, i, n));
        });
      }
    }
  }

  static void value_gradients(const PoolValues& t, const T* dcontext, const T* p, int64_t stride, T* dp, S* dvalue,
                              bool streamed) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const S* value = row(t.value, r * t.step);
      for (int64_t k = 0; k < t.K; ++k) {
        Sum<T> sum;
        along<T>(t.Dv, [&](auto part, int64_t i, int64_t n, int which) __attribute__((always_inline)) {
          sum.of[which] += get(part, value, i, n) * get(part, dcontext + k * t.Dv, i, n);
        });
        dp[k * stride + r] = static_cast<T>(sum.total());
      }
      if (dvalue == nullptr) continue;
      S* const out = dvalue + r * t.Dv;
      along<T>(t.Dv, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
        Vec<T> grad{};
        for (int64_t k = 0; k < t.K; ++k) grad += p[k * stride + r] * get(part, dcontext + k * t.Dv, i, n);
        set(part, out, i, n, grad, streamed);
      });
    }
  }

  static void feature_gradients(const PoolFeatures& t, const T* dscores, int64_t stride, S* dhidden, S* dgate,
                                T* dweight, bool streamed) {
    const T* const weight = static_cast<const T*>(t.weight);
    for (int64_t r = 0; r < t.rows; ++r) {
      const S *hidden = row(t.hidden, r * t.hidden_step), *gate = row(t.gate, r * t.gate_step);
      S *const to_hidden = row(dhidden, r * t.D), *const to_gate = row(dgate, r * t.D);
      along<T>(t.D, [&](auto part, int64_t i, int64_t n, int) __attribute__((always_inline)) {
        Vec<T> grad{};
        for (int64_t k = 0; k < t.K; ++k) grad += dscores[k * stride + r] * get(part, weight + k * t.D, i, n);
        const Vec<T> h = get(part, hidden, i, n);
        GateGradients<Vec<T>> g;
        if (gate == nullptr) {
          g.y = M::tanh(h);
          g.a = grad * (1 - g.y * g.y);
        } else {
          g = gate_gradients<M>(h, get(part, gate, i, n), grad);
        }
        if (to_hidden != nullptr) set(part, to_hidden, i, n, g.a, streamed);
        if (to_gate != nullptr) set(part, to_gate, i, n, g.b, streamed);
        for (int64_t k = 0; k < t.K; ++k) {
          T* const sum = dweight + k * t.D;
          set(part, sum, i, n, get(part, sum, i, n) + dscores[k * stride + r] * g.y);
        }
      });
    }
  }
};

template <typename T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}
template <typename T>
T* as(void* p) {
  return static_cast<T*>(p);
}

void score(StorageType type, const PoolFeatures& t, void* scores, int64_t stride, void* room) {
  with_storage(type, [&](auto storage) {
    using T = Arithmetic<decltype(storage)>;
    Pool<decltype(storage)>::score(t, as<T>(scores), stride, as<T>(room));
  });
}

template <typename T>
double exponentials_of(int64_t n, const T* scores, T shift, T* out) {
  Sum<T> sum;
  along<T>(n, [&](auto part, int64_t i, int64_t count, int which) __attribute__((always_inline)) {
    const Vec<T> p = exp_or_zero<T>(get(part, scores, i, count) - shift);
    set(part, out, i, count, p);
    sum.of[which] += only<T>(part, count, p);
  });
  return sum.total();
}

double exponentials(StorageType type, int64_t n, const void* scores, double shift, void* out) {
  if (type == StorageType::DOUBLE) return exponentials_of(n, as<double>(scores), shift, as<double>(out));
  return exponentials_of(n, as<float>(scores), static_cast<float>(shift), as<float>(out));
}

void pool(StorageType type, const PoolValues& t, const void* p, int64_t stride, void* sums) {
  with_storage(type, [&](auto storage) {
    using T = Arithmetic<decltype(storage)>;
    Pool<decltype(storage)>::pool(t, as<T>(p), stride, as<T>(sums));
  });
}

void value_gradients(StorageType type, const PoolValues& t, const void* dcontext, const void* p, int64_t stride,
                     void* dp, void* dvalue, bool streamed) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    Pool<S>::value_gradients(t, as<T>(dcontext), as<T>(p), stride, as<T>(dp), as<S>(dvalue), streamed);
  });
  if (streamed) stream_fence();
}

void feature_gradients(StorageType type, const PoolFeatures& t, const void* dscores, int64_t stride, void* dhidden,
                       void* dgate, void* dweight, bool streamed) {
  with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    Pool<S>::feature_gradients(t, as<T>(dscores), stride, as<S>(dhidden), as<S>(dgate), as<T>(dweight), streamed);
  });
  if (streamed) stream_fence();
}

}  // namespace

extern const AttentionPoolKernels attention_pool = {score, exponentials, pool, value_gradients, feature_gradients,
                                                    widen, narrow};

}  // namespace FUSEDATTN_LEVEL
}  // namespace fusedattn
