// CPU launcher of additive attention: allocation, and the phases of cpu_kernel.h over all cores (cpu_inputs.h).
#include <tuple>

#include "common/box.h"
#include "cpu_inputs.h"

namespace fusedattn {
namespace {

// context = p . value, rows by blocks of queries; keys are split where there are too few of those.
template <typename T>
void contexts(const Inputs<T>& in, const Chunk& chunk, const T* probabilities, T* context) {
  const auto& p = in.p;
  const int64_t blocks = ceil_div(chunk.queries, QUERY_BLOCK), tasks = chunk.heads * blocks;
  const int64_t splits = in.key_splits(tasks), part_keys = ceil_div(p.Tk, splits);
  const int64_t part_size = std::min(QUERY_BLOCK, chunk.queries) * p.Dv;
  const Buffer<T> parts(splits > 1 ? tasks * splits * part_size : 0);
  const int64_t cost = std::min(QUERY_BLOCK, chunk.queries) * part_keys * p.Dv / 16;
  parallel<T>(tasks * splits, grain_for(cost), 0, [&](int64_t first, int64_t last, T*) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t task = n / splits, head = task / blocks, r = task % blocks * QUERY_BLOCK;
      const int64_t b = (chunk.first_head + head) / p.H, h = (chunk.first_head + head) % p.H;
      const int64_t rows = std::min(QUERY_BLOCK, chunk.queries - r);
      int64_t visible = p.visible_keys(b, h);
      if (p.options.is_causal) visible = std::min(visible, chunk.first_query + r + rows);
      const int64_t first_key = std::min(visible, n % splits * part_keys);
      const int64_t keys = std::min(visible - first_key, part_keys);
      T* out = splits > 1 ? parts.get() + n * part_size : context + (head * chunk.queries + r) * p.Dv;
      const bool* seen = p.seen == nullptr ? nullptr : p.seen_keys(b, h) + first_key;
      products<T>().matmul(rows, p.Dv, keys, probabilities + (head * chunk.queries + r) * p.Tk + first_key, p.Tk,
                           1, p.value.row(b, h, first_key), p.value.stride_t, seen, out, p.Dv, Output::WRITTEN);
    }
  });
  if (splits == 1) return;
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t head = task / blocks, r = task % blocks * QUERY_BLOCK;
    const int64_t size = std::min(QUERY_BLOCK, chunk.queries - r) * p.Dv;
    T* out = context + (head * chunk.queries + r) * p.Dv;
    parallel<T>(size, 4096, 0, [&](int64_t first, int64_t last, T*) {
      for (int64_t e = first; e < last; ++e) {
        T sum = 0;
        for (int64_t s = 0; s < splits; ++s) sum += parts.get()[(task * splits + s) * part_size + e];
        out[e] = sum;
      }
    });
  }
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Forward forward(const Inputs<T>& in, ScalarType type, bool return_weights, bool keep_scores) {
  const auto& p = in.p;
  const ScalarType acc = scalar_type<T>();
  Tensor context = in.empty({p.Tq, p.Dv}), lse = in.empty({p.Tq});
  Tensor weights = return_weights ? in.empty({p.Tq, p.Tk}) : empty({0}, type);
  Tensor scores = keep_scores ? in.empty({p.Tq, p.Tk}) : empty({0}, acc);
  const int64_t buffer_size = in.chunk_heads * in.chunk_rows * p.Tk;
  const Buffer<T> buffer(return_weights ? 0 : buffer_size);
  in.for_each_chunk([&](const Chunk& chunk, int64_t first_row) {
    T* probabilities = return_weights ? weights.template mutable_data_ptr<T>() + first_row * p.Tk : buffer.get();
    T* s = keep_scores ? scores.template mutable_data_ptr<T>() + first_row * p.Tk : probabilities;
    in.prepare_queries(chunk);
    in.score(chunk, s);
    T* chunk_lse = lse.template mutable_data_ptr<T>() + first_row;
    parallel<T>(chunk.heads * chunk.queries, grain_for(p.Tk), 0, [&](int64_t first, int64_t last, T*) {
      fwd<T>().softmax(last - first, p.Tk, s + first * p.Tk, probabilities + first * p.Tk, chunk_lse + first);
    });
    contexts(in, chunk, probabilities, context.template mutable_data_ptr<T>() + first_row * p.Dv);
  });
  return {contiguous(context, type), lse, contiguous(weights, type), scores};
}

// Those not asked for are (0,).
template <typename T>
struct Gradients {
  Tensor query, key, value, weight;
};

// The joint backward of one chunk. `partial_weight` has one D_padded row per head and split.
template <typename T>
void backward_scores(const Inputs<T>& in, const Chunk& chunk, int64_t first_row, const T* g, int64_t splits,
                     const Gradients<T>& grads, T* partial_query, T* partial_weight) {
  const auto& p = in.p;
  if (p.D == 0) return;
  const bool rowwise = chunk.queries <= ROWWISE_QUERIES;
  const int64_t strips = rowwise ? 1 : p.D_padded / fwd<T>().lanes;
  const int64_t part_keys = ceil_div(ceil_div(p.Tk, splits), 4) * 4;
  T* grad_key = grads.key.numel() == 0 ? nullptr : grads.key.template mutable_data_ptr<T>();
  const int64_t cost = chunk.queries * part_keys * p.D_padded / strips / 4;
  const auto visible = [&](int64_t head) {
    const int64_t n = chunk.first_head + head;
    return p.visible_keys(n / p.H, n % p.H);
  };
  for (int64_t head = 0; head < chunk.heads && chunk.first_query == 0 && grad_key != nullptr; ++head) {
    T* rows = grad_key + (chunk.first_head + head) * p.Tk * p.D;
    std::fill(rows + visible(head) * p.D, rows + p.Tk * p.D, T(0));  // padding is not looked at below
  }
  parallel<T>(chunk.heads * splits * strips, grain_for(cost), backward_scratch(p, chunk, fwd<T>().lanes),
              [&](int64_t first, int64_t last, T* scratch) {
                for (int64_t task = first; task < last; ++task) {
                  const int64_t head = task / (splits * strips), split = task / strips % splits;
                  const int64_t begin = std::min(visible(head), split * part_keys);
                  const int64_t end = std::min(visible(head), begin + part_keys);
                  T* dq = partial_query + (head * splits + split) * chunk.queries * p.D_padded;
                  T* dw = partial_weight + ((chunk.first_head + head) * splits + split) * p.D_padded;
                  if (rowwise)
                    bwd<T>().backward_rows(p, chunk, head, begin, end, g, dq, grad_key, dw, scratch);
                  else
                    bwd<T>().backward_strip(p, chunk, head, task % strips * fwd<T>().lanes, begin, end, g, dq,
                                            grad_key, dw, scratch);
                }
              });
  if (grads.query.numel() == 0) return;
  T* grad_query = grads.query.template mutable_data_ptr<T>();
  parallel<T>(chunk.heads * chunk.queries, grain_for(p.D * splits), 0, [&](int64_t first, int64_t last, T*) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t head = row / chunk.queries, i = row % chunk.queries;
      const T* w = p.weight + (chunk.first_head + head) % p.H * p.D_padded;
      T* out = grad_query + (first_row + row) * p.D;
      for (int64_t d = 0; d < p.D; ++d) {
        T sum = 0;
        for (int64_t s = 0; s < splits; ++s)
          sum += partial_query[((head * splits + s) * chunk.queries + i) * p.D_padded + d];
        out[d] = 4 * w[d] * sum;
      }
    }
  });
}

template <typename T>
Gradients<T> backward(Inputs<T>& in, const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                      const OptionalTensor& grad_weights, const Tensor& lse, const Tensor& scores,
                      OutputMask asked) {
  auto& p = in.p;
  const ScalarType acc = scalar_type<T>();
  const auto none = [&] { return empty({0}, acc); };
  const Gradients<T> grads{asked[0] ? in.empty({p.Tq, p.D}) : none(), asked[1] ? in.empty({p.Tk, p.D}) : none(),
                           asked[2] ? in.empty({p.Tk, p.Dv}) : none(),
                           !asked[3] ? none()
                           : in.flat ? empty({p.D}, acc)
                                     : empty({p.H, p.D}, acc)};
  const auto first_output = [](const Tensor& t) {
    return passes_caches(t, t.size(-1) * t.element_size()) ? Output::STREAMED : Output::WRITTEN;
  };
  p.key_output = first_output(grads.key), p.value_output = first_output(grads.value);
  T* grad_value = grads.value.template mutable_data_ptr<T>();
  if (p.Tq == 0 || p.D == 0 || p.B * p.H == 0) {
    Tensor key = grads.key, value = grads.value;
    torch::stable::zero_(key);
    torch::stable::zero_(value);
  }
  const int64_t heads = p.B * p.H;
  const bool kept = scores.numel() > 0;
  const int64_t strips = in.chunk_rows <= ROWWISE_QUERIES ? 1 : p.D_padded / fwd<T>().lanes;
  const int64_t splits = in.key_splits(in.chunk_heads * std::max<int64_t>(strips, 1));
  const int64_t chunk_size = in.chunk_heads * in.chunk_rows;
  const Buffer<T> probabilities(chunk_size * p.Tk), g(chunk_size * p.Tk), row_sums(in.rows());
  const Buffer<T> partial_query(chunk_size * splits * p.D_padded);
  const Buffer<T> partial_weight(heads * splits * p.D_padded);
  std::fill_n(partial_weight.get(), heads * splits * p.D_padded, T(0));

  // Probabilities replace the scores in place, unless the slope of the cap still needs these.
  const Buffer<T> capped(!kept && p.options.softcap != 0 ? chunk_size * p.Tk : 0);
  T* const recomputed = p.options.softcap != 0 ? capped.get() : probabilities.get();
  in.for_each_chunk([&](const Chunk& chunk, int64_t first_row) {
    const int64_t rows = chunk.heads * chunk.queries;
    in.prepare_queries(chunk);
    const T* s = kept ? scores.template const_data_ptr<T>() + first_row * p.Tk : recomputed;
    if (!kept) in.score(chunk, recomputed);
    if (grad_context) {
      const View<const T> dc = view<T>(*grad_context);
      in.for_each_key_block(chunk, p.Dv / 4, [&](int64_t head, int64_t first_key, T* scratch) {
        products<T>().grad_weights(p, chunk, head, first_key, dc, g.get(), scratch);
      });
    } else {
      std::fill_n(g.get(), rows * p.Tk, T(0));
    }
    const T* extra = grad_weights ? grad_weights->template const_data_ptr<T>() + first_row * p.Tk : nullptr;
    const T* dl = grad_lse ? grad_lse->template const_data_ptr<T>() + first_row : nullptr;
    const T* l = lse.template const_data_ptr<T>() + first_row;
    parallel<T>(rows, grain_for(p.Tk), 0, [&](int64_t first, int64_t last, T*) {
      for (int64_t row = first; row < last; ++row) {
        T* g_row = g.get() + row * p.Tk;
        for (int64_t j = 0; extra != nullptr && j < p.Tk; ++j) g_row[j] += extra[row * p.Tk + j];
        row_sums.get()[first_row + row] = bwd<T>().grad_scores(
            p, s + row * p.Tk, l[row], dl == nullptr ? T(0) : dl[row], probabilities.get() + row * p.Tk, g_row);
      }
    });
    if (grad_context && asked[2]) {
      // dvalue = p^T dcontext, blocks of keys.
      const View<const T> dc = view<T>(*grad_context);
      in.for_each_key_block(chunk, p.Dv / 4, [&](int64_t head, int64_t first_key, T*) {
        const int64_t n = chunk.first_head + head;
        products<T>().matmul(std::min(KEY_BLOCK, p.Tk - first_key), p.Dv, chunk.queries,
                             probabilities.get() + head * chunk.queries * p.Tk + first_key, 1, p.Tk,
                             dc.row(n / p.H, n % p.H, chunk.first_query), dc.stride_t, nullptr,
                             grad_value + (n * p.Tk + first_key) * p.Dv, p.Dv,
                             chunk.first_query > 0 ? Output::ADDED : p.value_output);
      });
    }
    if (asked[0] || asked[1] || asked[3])
      backward_scores(in, chunk, first_row, g.get(), splits, grads, partial_query.get(), partial_weight.get());
  });
  if (!grad_context) {
    Tensor value = grads.value;
    torch::stable::zero_(value);
  }

  if (!asked[3]) return grads;
  // dw = sum of g - 2 sum of g r
  T* grad_weight = grads.weight.template mutable_data_ptr<T>();
  for (int64_t h = 0; h < p.H; ++h) {
    double total = 0;
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t i = 0; i < p.Tq; ++i) total += row_sums.get()[(b * p.H + h) * p.Tq + i];
    parallel<T>(p.D, grain_for(p.B * splits), 0, [&](int64_t first, int64_t last, T*) {
      for (int64_t d = first; d < last; ++d) {
        double sum = 0;
        for (int64_t b = 0; b < p.B; ++b)
          for (int64_t n = 0; n < splits; ++n)
            sum += partial_weight.get()[((b * p.H + h) * splits + n) * p.D_padded + d];
        grad_weight[h * p.D + d] = static_cast<T>(total - 2 * sum);
      }
    });
  }
  return grads;
}

// The last argument, allow_tf32, is ignored: no CPU has TF32.
Forward additive_attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight,
                               const OptionalTensor& mask, const OptionalTensor& key_lengths,
                               const OptionalTensor& key_exp, const OptionalTensor& key_bound,
                               const AttentionOptions& options, bool return_weights, bool keep_scores, bool) {
  const ScalarType type = query.scalar_type();
  const auto run = [&](auto zero) {
    const Inputs<decltype(zero)> in(query, key, value, weight, mask, key_lengths, key_exp, key_bound, options);
    return forward(in, type, return_weights, keep_scores);
  };
  return type == ScalarType::Double ? run(0.0) : run(0.0f);
}

Forward additive_attention_bwd(const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                               const OptionalTensor& grad_weights, const Tensor& query, const Tensor& key,
                               const Tensor& value, const Tensor& weight, const OptionalTensor& mask,
                               const OptionalTensor& key_lengths, const OptionalTensor& key_exp,
                               const OptionalTensor& key_bound, const AttentionOptions& options, const Tensor&,
                               const Tensor& lse, const Tensor& scores, OutputMask asked) {
  const ScalarType type = query.scalar_type();
  const auto run = [&](auto zero) -> Forward {
    using T = decltype(zero);
    const ScalarType acc = scalar_type<T>();
    const auto given = [&](const OptionalTensor& t) { return t ? contiguous(*t, acc) : t; };
    Inputs<T> in(query, key, value, weight, mask, key_lengths, key_exp, key_bound, options);
    const auto& p = in.p;
    if (grad_context) check_shape(*grad_context, "grad_context", in.shape({p.Tq, p.Dv}));
    if (grad_lse) check_shape(*grad_lse, "grad_lse", in.shape({p.Tq}));
    if (grad_weights) check_shape(*grad_weights, "grad_weights", in.shape({p.Tq, p.Tk}));
    check_shape(lse, "lse", in.shape({p.Tq}));
    if (scores.numel() > 0) check_shape(scores, "scores", in.shape({p.Tq, p.Tk}));
    STD_TORCH_CHECK(lse.scalar_type() == acc && scores.scalar_type() == acc,
                    "additive_attention: lse and scores must be in the dtype of the arithmetic");
    OptionalTensor dc;
    if (grad_context) dc = prepared(*grad_context, acc);
    const auto grads = backward(in, dc, given(grad_lse), given(grad_weights), contiguous(lse, acc),
                                contiguous(scores, acc), asked);
    return {contiguous(grads.query, type), contiguous(grads.key, type), contiguous(grads.value, type),
            contiguous(grads.weight, weight.scalar_type())};
  };
  return type == ScalarType::Double ? run(0.0) : run(0.0f);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("additive_attention_fwd", boxed<additive_attention_fwd>);
  m.impl("additive_attention_bwd", boxed<additive_attention_bwd>);
}

}  // namespace fusedattn
