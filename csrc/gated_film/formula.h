// The mathematics of gated_film, for every C++ kernel. M is the kernel's arithmetic (common/activate.h).
#pragma once

#include "common/activate.h"

namespace fusedattn {

// tanh(a) sigmoid(b)
template <typename M, typename V = typename M::V>
FUSEDATTN_INLINE V gated(V a, V b) {
  return M::tanh(a) * logistic<M>(b).s;
}

// The same, and its gradients of a and b.
template <typename V>
struct GateGradients {
  V y, a, b;
};
template <typename M, typename V = typename M::V>
FUSEDATTN_INLINE GateGradients<V> gate_gradients(V a, V b, V dy) {
  const V t = M::tanh(a);
  const Logistic<V> p = logistic<M>(b);
  const V dy_s = dy * p.s;
  return {t * p.s, dy_s * (1 - t * t), dy_s * t * p.complement};
}

}  // namespace fusedattn
