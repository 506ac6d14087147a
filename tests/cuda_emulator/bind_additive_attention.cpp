#include <cmath>
#include <limits>

#include "additive_attention/cuda_bwd.cuh"
#include "additive_attention/cuda_fwd.cuh"
#include "bind.h"

namespace {

using fusedattn::AttentionProblem;
using fusedattn::RowsOf;

// (B, H, T, width); a width of 1 may have any stride.
template <typename S>
RowsOf<S> rows(const py::array& x) {
  if (x.ndim() != 4 || (x.size() > 0 && x.shape(3) > 1 && stride(x, 3) != 1))
    throw std::invalid_argument("rows: expected four dimensions, the last one contiguous");
  return RowsOf<S>(data<S>(x), stride(x, 0), stride(x, 1), stride(x, 2));
}
template <typename S>
RowsOf<S> rows(const Array& x) {
  return x ? rows<S>(*x) : RowsOf<S>(nullptr, 0, 0, 0);
}

template <typename S>
AttentionProblem<S> problem(const py::array& query, const py::array& key, const py::array& value,
                            const py::array& weight, const Array& bias, const Array& mask,
                            const Array& key_lengths, const Array& center, const Array& seed,
                            const py::tuple& options) {
  AttentionProblem<S> p;
  p.B = query.shape(0), p.H = query.shape(1), p.Tq = query.shape(2), p.D = query.shape(3);
  p.Tk = key.shape(2), p.Dv = value.shape(3);
  p.query = rows<S>(query), p.key = rows<S>(key), p.value = rows<S>(value);
  p.weight = numbers<S>(weight), p.weight_stride_h = stride(weight, 0);
  p.bias = numbers<S>(bias);
  for (int n = 0; n < 4; ++n) {
    p.bias_size[n] = bias ? bias->shape(n) : 1;
    p.bias_stride[n] = p.bias_size[n] == 1 ? 0 : stride(*bias, n);
  }
  p.mask = data<bool>(mask);
  for (int n = 0; n < 4; ++n) p.mask_stride[n] = mask ? stride(*mask, n) : 0;
  p.key_lengths = data<int64_t>(key_lengths);
  p.center = data<int64_t>(center);
  for (int n = 0; n < 3; ++n) p.center_stride[n] = center ? stride(*center, n) : 0;
  const auto o = p.options = bundle<fusedattn::AttentionOptions>(options);
  p.random = {data<int64_t>(seed),
              seed && seed->size() > 0 ? p.H / static_cast<int64_t>(seed->size()) : 1,
              {o.first_head, o.heads, o.first_query, o.first_key}};
  p.dropout = {static_cast<uint32_t>(std::nearbyint(o.dropout_p * 0x1p32)), 1 / (1 - o.dropout_p)};
  return p;
}

// On the heap and of the exact size, and NaN until written.
template <typename T>
std::vector<T> working_memory(int64_t size) {
  return std::vector<T>(size, std::numeric_limits<T>::quiet_NaN());
}

}  // namespace

BINDINGS(additive_attention, module) {
  module.def("additive_attention_fwd",
             [](const std::string& dtype, const py::array& query, const py::array& key, const py::array& value,
                const py::array& weight, const Array& bias, const Array& mask, const Array& key_lengths,
                const Array& center, const Array& seed, const py::tuple& options, const py::array& context,
                const py::array& lse, const Array& scores, const Array& weights, bool tf32) {
               with_storage(dtype, [&](auto storage) {
                 using S = decltype(storage);
                 using T = fusedattn::gpu::Arithmetic<S>;
                 const auto p =
                     problem<S>(query, key, value, weight, bias, mask, key_lengths, center, seed, options);
                 auto memory = working_memory<T>(additive_attention_fwd_workspace(p));
                 fusedattn::launch_additive_attention_fwd<S>(p, data<S>(context), data<T>(lse), data<T>(scores),
                                                             data<S>(weights), memory.data(), nullptr, tf32);
               });
             });
  module.def(
      "additive_attention_bwd",
      [](const std::string& dtype, const Array& grad_context, const Array& grad_lse, const Array& grad_weights,
         const py::array& query, const py::array& key, const py::array& value, const py::array& weight,
         const Array& bias, const Array& mask, const Array& key_lengths, const Array& center, const Array& seed,
         const py::tuple& options, const py::array& context, const py::array& lse, const Array& scores,
         const py::array& grad_query, const py::array& grad_key, const py::array& grad_value,
         const py::array& grad_weight, const Array& grad_bias, int64_t chunk_elements) {
        with_storage(dtype, [&](auto storage) {
          using S = decltype(storage);
          using T = fusedattn::gpu::Arithmetic<S>;
          const auto p = problem<S>(query, key, value, weight, bias, mask, key_lengths, center, seed, options);
          const fusedattn::AttentionGradients<S> grads = {
              rows<S>(grad_context), data<T>(grad_lse),       data<S>(grad_weights), rows<S>(context),
              data<T>(lse),          data<T>(scores),         data<S>(grad_query),   data<S>(grad_key),
              data<S>(grad_value),   numbers<S>(grad_weight), numbers<S>(grad_bias)};
          auto memory = working_memory<T>(additive_attention_bwd_workspace(p, grads, chunk_elements));
          fusedattn::launch_additive_attention_bwd<S>(p, grads, memory.data(), nullptr, chunk_elements);
        });
      });
}
