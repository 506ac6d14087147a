// CPU launcher of additive attention: allocation, and the phases of cpu_kernel.h over all cores (cpu_inputs.h).
#include <tuple>

#include "common/box.h"
#include "cpu_bias_gradient.h"
#include "cpu_inputs.h"
#include "cpu_score_gradients.h"
#include "cpu_varlen.h"
#include "philox/cpu_stream.h"

namespace fusedattn {
namespace {

// context = p . value, rows by blocks of queries; keys are split where there are too few of those.
template <typename S, typename T = Arithmetic<S>>
void contexts(const Inputs<S>& in, const Chunk& chunk, const T* probabilities, S* context) {
  const auto& p = in.p;
  const int64_t blocks = ceil_div(chunk.queries, QUERY_BLOCK), tasks = chunk.heads * blocks;
  const int64_t splits = in.key_splits(tasks), part_keys = ceil_div(p.Tk, splits);
  const int64_t part_size = std::min(QUERY_BLOCK, chunk.queries) * p.Dv;
  const Buffer<T> parts(splits > 1 ? tasks * splits * part_size : 0);
  const int64_t cost = std::min(QUERY_BLOCK, chunk.queries) * part_keys * p.Dv / 16;
  const int64_t unrounded_size = IS_NARROW<S> ? part_size : 0;
  parallel<T>(tasks * splits, grain_for(cost), unrounded_size, [&](int64_t first, int64_t last, T* scratch) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t task = n / splits, head = task / blocks, r = task % blocks * QUERY_BLOCK;
      const int64_t b = (chunk.first_head + head) / p.H, h = (chunk.first_head + head) % p.H;
      const int64_t rows = std::min(QUERY_BLOCK, chunk.queries - r);
      const int64_t first_query = chunk.first_query + r;
      const KeyRange in_window = p.keys_of(b, h, first_query, first_query + rows);
      const int64_t visible = std::min(p.visible_keys(b, h), in_window.end);
      const int64_t first_key = std::min(visible, in_window.first + n % splits * part_keys);
      const int64_t keys = std::min(visible - first_key, part_keys);
      S* const rows_out = context + (head * chunk.queries + r) * p.Dv;
      T* out = splits > 1 ? parts.get() + n * part_size : unrounded(rows_out, scratch);
      const bool* seen = p.seen == nullptr ? nullptr : p.seen_keys(b, h) + first_key;
      products<S>().matmul(rows, p.Dv, keys, probabilities + (head * chunk.queries + r) * p.Tk + first_key, p.Tk,
                           1, p.value.row(b, h, first_key), p.value.stride_t, seen, out, p.Dv, Output::WRITTEN);
      if (splits == 1) round_into(rows_out, out, rows * p.Dv);
    }
  });
  if (splits == 1) return;
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t head = task / blocks, r = task % blocks * QUERY_BLOCK;
    const int64_t size = std::min(QUERY_BLOCK, chunk.queries - r) * p.Dv;
    S* const rows_out = context + (head * chunk.queries + r) * p.Dv;
    T* const part = parts.get() + task * splits * part_size;
    parallel<T>(size, 4096, 0, [&](int64_t first, int64_t last, T*) {
      T* out = unrounded(rows_out, part);  // over the first part, of which nothing is read twice
      for (int64_t e = first; e < last; ++e) {
        T sum = 0;
        for (int64_t s = 0; s < splits; ++s) sum += part[s * part_size + e];
        out[e] = sum;
      }
      round_into(rows_out + first, out + first, last - first);
    });
  }
}

// Dropout of weights, where a seed is given.
template <typename S>
class WeightDropout {
 public:
  using T = Arithmetic<S>;
  WeightDropout(const OptionalTensor& seed, const Inputs<S>& in) : is_given_(seed), H_(in.p.H) {
    if (!seed) return;
    const AttentionOptions& o = in.p.options;
    const PhiloxPlace place{o.first_head, o.heads, o.first_query, o.first_key};
    words_ = stream_of("additive_attention: dropout_seed", *seed, H_, place);
    dropout_ = dropout_of("additive_attention", o.dropout_p);
  }

  bool is_given() const { return is_given_; }

  // Some keys of a row of the chunk: weights, or the gradients of dropped ones.
  void apply(const Chunk& chunk, int64_t row, KeyRange keys, T* x) const {
    if (!is_given_) return;
    const int64_t n = chunk.first_head + row / chunk.queries, i = chunk.first_query + row % chunk.queries;
    PhiloxRow words = philox_row(words_, n / H_, n % H_, i);
    words.first_key += keys.first;
    drop(words, keys.end - keys.first, dropout_, x + keys.first);
  }

 private:
  bool is_given_;
  int64_t H_;
  PhiloxStream words_{};
  Dropout dropout_{};
};

// Where forward's results go, contiguous rows (B, H, Tq, ...); null: not asked for.
template <typename S>
struct Results {
  S* context;
  Arithmetic<S>* lse;
  S* weights;
  Arithmetic<S>* scores;
};

template <typename S, typename T = Arithmetic<S>>
void forward(const Inputs<S>& in, const WeightDropout<S>& dropout, const Results<S>& to) {
  const auto& p = in.p;
  const bool return_weights = to.weights != nullptr;
  const int64_t buffer_size = in.chunk_heads * in.chunk_rows * p.Tk;
  const bool in_place = return_weights && !IS_NARROW<S> && !dropout.is_given();  // the weights that are returned
  const Buffer<T> buffer(in_place ? 0 : buffer_size);
  in.for_each_chunk([&](const Chunk& chunk, int64_t first_row) {
    S* const returned = to.weights + first_row * p.Tk;
    T* probabilities = in_place ? unrounded(returned, buffer.get()) : buffer.get();
    T* s = to.scores != nullptr ? to.scores + first_row * p.Tk : probabilities;
    in.prepare_queries(chunk);
    in.score(chunk, s);
    T* chunk_lse = to.lse + first_row;
    parallel<T>(chunk.heads * chunk.queries, grain_for(p.Tk), 0, [&](int64_t first, int64_t last, T*) {
      for (int64_t row = first; row < last; ++row) {
        const auto [keys, columns] = in.keys_of_row(chunk, row);
        const T* row_scores = s + row * p.Tk;
        T* const weights = probabilities + row * p.Tk;
        if (in.bias) {
          in.add_bias(chunk, row, keys, row_scores, weights);
          row_scores = weights;
        }
        chunk_lse[row] = fwd<S>().softmax(keys, return_weights ? KeyRange{0, p.Tk} : columns, row_scores, weights);
        if (return_weights && !in_place) fwd<S>().narrow(p.Tk, weights, returned + row * p.Tk);
        dropout.apply(chunk, row, keys, weights);
      }
    });
    contexts(in, chunk, probabilities, to.context + first_row * p.Dv);
  });
}

// What backward reads besides the inputs, rows as in Results; null: not given. Those of grad_context may lie
// apart.
template <typename S>
struct Given {
  View<const S> grad_context;
  const Arithmetic<S>* grad_lse;
  const S* grad_weights;
  const Arithmetic<S>*lse, *scores;
};

// Where gradients go: those of the scores' inputs, value's (B, H, Tk, Dv), and the bias's in its shape.
template <typename S>
struct Gradients {
  ScoreGradientRows<S> of_scores;
  S* value;
  bool is_value_streamed;
  Arithmetic<S>* bias;
};

// The rows of grad_context that belong to a chunk, in the type of the arithmetic.
template <typename S>
class ContextGradients {
 public:
  using T = Arithmetic<S>;
  ContextGradients(const View<const S>& grad_context, const Inputs<S>& in)
      : given_(grad_context),
        H_(in.p.H),
        width_(in.p.Dv),
        wide_(IS_NARROW<S> ? in.chunk_heads * in.chunk_rows * width_ : 0) {}

  void take(const Chunk& chunk) const {
    if constexpr (IS_NARROW<S>)
      parallel<T>(chunk.heads * chunk.queries, grain_for(width_ / 16), 0, [&](int64_t first, int64_t last, T*) {
        for (int64_t row = first; row < last; ++row)
          fwd<S>().widen(width_, given(chunk, row / chunk.queries) + row % chunk.queries * given_.stride_t,
                         wide_.get() + row * width_, false);
      });
  }
  // Of a head of the chunk that was taken.
  const T* rows(const Chunk& chunk, int64_t head) const {
    if constexpr (IS_NARROW<S>)
      return wide_.get() + head * chunk.queries * width_;
    else
      return given(chunk, head);
  }
  int64_t stride() const { return IS_NARROW<S> ? width_ : given_.stride_t; }

 private:
  const S* given(const Chunk& chunk, int64_t head) const {
    const int64_t n = chunk.first_head + head;
    return given_.row(n / H_, n % H_, chunk.first_query);
  }

  View<const S> given_;
  int64_t H_, width_;
  Buffer<T> wide_;
};

template <typename S, typename T = Arithmetic<S>>
void backward(const Inputs<S>& in, const WeightDropout<S>& dropout, const Given<S>& given,
              const Gradients<S>& to) {
  const auto& p = in.p;
  ScoreGradients<S> grads(in, to.of_scores);
  BiasGradient<S> grad_bias(in, to.bias);
  const HeadGradients<S> grad_value(to.value, p.Dv, to.is_value_streamed, in);
  const bool has_context = given.grad_context.data != nullptr, kept = given.scores != nullptr;
  if (to.value != nullptr && !has_context) std::fill_n(to.value, p.B * p.H * p.Tk * p.Dv, S{});
  const int64_t chunk_size = in.chunk_heads * in.chunk_rows;
  const Buffer<T> probabilities(chunk_size * p.Tk), g(chunk_size * p.Tk);
  std::optional<ContextGradients<S>> dc;
  if (has_context) dc.emplace(given.grad_context, in);

  // Probabilities replace the scores in place, unless the slope of the cap still needs these, without a bias.
  const Buffer<T> capped(!kept && p.options.softcap != 0 ? chunk_size * p.Tk : 0);
  T* const recomputed = p.options.softcap != 0 ? capped.get() : probabilities.get();
  in.for_each_chunk([&](const Chunk& chunk, int64_t first_row) {
    const int64_t rows = chunk.heads * chunk.queries;
    if (!kept || grads.reads_exponentials(chunk)) in.prepare_queries(chunk);
    const T* s = kept ? given.scores + first_row * p.Tk : recomputed;
    if (!kept) in.score(chunk, recomputed);
    if (dc) {
      dc->take(chunk);
      in.for_each_key_block(chunk, p.Dv / 4, [&](int64_t head, int64_t first_key, T* scratch) {
        products<S>().grad_weights(p, chunk, head, first_key, dc->rows(chunk, head), dc->stride(), g.get(),
                                   scratch);
      });
    } else {
      std::fill_n(g.get(), rows * p.Tk, T(0));
    }
    const S* extra = given.grad_weights ? given.grad_weights + first_row * p.Tk : nullptr;
    const T* dl = given.grad_lse ? given.grad_lse + first_row : nullptr;
    const T* l = given.lse + first_row;
    parallel<T>(rows, grain_for(p.Tk), 0, [&](int64_t first, int64_t last, T*) {
      for (int64_t row = first; row < last; ++row) {
        T* g_row = g.get() + row * p.Tk;
        const auto [keys, columns] = in.keys_of_row(chunk, row);
        const T *const s_row = s + row * p.Tk, *biased = s_row;
        T* const p_row = probabilities.get() + row * p.Tk;
        if (dc) dropout.apply(chunk, row, keys, g_row);
        if (extra != nullptr)
          fwd<S>().widen(keys.end - keys.first, extra + row * p.Tk + keys.first, g_row + keys.first, true);
        if (in.bias) {
          in.add_bias(chunk, row, keys, s_row, p_row);
          biased = p_row;
        }
        grads.row_sums()[first_row + row] =
            bwd<S>().grad_scores(p, keys, columns, biased, s_row, l[row], dl == nullptr ? T(0) : dl[row], p_row,
                                 g_row, grad_bias.row(row));
        if (dc && grad_value.asked()) dropout.apply(chunk, row, keys, p_row);
      }
    });
    grad_bias.add(chunk, g.get());
    if (dc && grad_value.asked()) {
      in.for_each_key_block(chunk, p.Dv / 4, [&](int64_t head, int64_t first_key, T* scratch) {
        products<S>().grad_values(p, chunk, head, first_key, probabilities.get(), dc->rows(chunk, head),
                                  dc->stride(), grad_value.rows(chunk, head), scratch);
      });
    }
    grads.add(chunk, first_row, g.get());
  });
  grads.finish();
}

using Tensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The last argument, allow_tf32, is ignored: no CPU has TF32.
Tensors additive_attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& mask,
                               const OptionalTensor& key_lengths, const OptionalTensor& window_center,
                               const OptionalTensor& key_exp, const OptionalTensor& key_bound,
                               const OptionalTensor& dropout_seed, const AttentionOptions& options,
                               bool return_weights, bool keep_scores, bool) {
  return with_storage(query.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const Inputs<S> in(query, key, value, weight, bias, mask, key_lengths, window_center, key_exp, key_bound,
                       options);
    const auto& p = in.p;
    const Tensor context = in.empty({p.Tq, p.Dv}), lse = in.empty({p.Tq}, scalar_type<T>());
    const Tensor weights = in.empty_if(return_weights, {p.Tq, p.Tk});
    const Tensor scores = keep_scores ? in.empty({p.Tq, p.Tk}, scalar_type<T>()) : empty({0}, scalar_type<T>());
    forward<S>(in, WeightDropout<S>(dropout_seed, in),
               {mutable_data_of<S>(context), mutable_data_of<T>(lse),
                return_weights ? mutable_data_of<S>(weights) : nullptr,
                keep_scores ? mutable_data_of<T>(scores) : nullptr});
    return Tensors{context, lse, weights, scores};
  });
}

Backward additive_attention_bwd(const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                                const OptionalTensor& grad_weights, const Tensor& query, const Tensor& key,
                                const Tensor& value, const Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& mask, const OptionalTensor& key_lengths,
                                const OptionalTensor& window_center, const OptionalTensor& key_exp,
                                const OptionalTensor& key_bound, const OptionalTensor& dropout_seed,
                                const AttentionOptions& options, const Tensor&, const Tensor& lse,
                                const Tensor& scores, OutputMask asked) {
  return with_storage(query.scalar_type(), [&](auto storage) -> Backward {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const ScalarType type = scalar_type<S>(), acc = scalar_type<T>();
    const Inputs<S> in(query, key, value, weight, bias, mask, key_lengths, window_center, key_exp, key_bound,
                       options);
    const auto& p = in.p;
    if (grad_context) check_shape(*grad_context, "grad_context", in.shape({p.Tq, p.Dv}));
    if (grad_lse) check_shape(*grad_lse, "grad_lse", in.shape({p.Tq}));
    if (grad_weights) check_shape(*grad_weights, "grad_weights", in.shape({p.Tq, p.Tk}));
    check_shape(lse, "lse", in.shape({p.Tq}));
    if (scores.numel() > 0) check_shape(scores, "scores", in.shape({p.Tq, p.Tk}));
    STD_TORCH_CHECK(lse.scalar_type() == acc && scores.scalar_type() == acc,
                    "additive_attention: lse and scores must be in the dtype of the arithmetic");
    const OptionalTensor dc = if_given(grad_context, prepared, type);
    const OptionalTensor dl = if_given(grad_lse, contiguous, acc);
    const OptionalTensor dp = if_given(grad_weights, contiguous, type);
    const Tensor rows_lse = contiguous(lse, acc), rows_scores = contiguous(scores, acc);
    const ScoreGradientTensors<S> made(in, asked[0], asked[1], asked[3]);
    const Tensor value_gradient = in.empty_if(asked[2], {p.Tk, p.Dv});
    const Tensor bias_gradient = fusedattn::empty(in.bias_shape(asked[4]), acc);
    backward<S>(
        in, WeightDropout<S>(dropout_seed, in),
        {dc ? view<S>(*dc) : View<const S>{}, dl ? data_of<T>(*dl) : nullptr, dp ? data_of<S>(*dp) : nullptr,
         data_of<T>(rows_lse), scores.numel() > 0 ? data_of<T>(rows_scores) : nullptr},
        {made.rows(), gradient_data<S>(value_gradient),
         passes_caches(value_gradient, p.Dv * value_gradient.element_size()), gradient_data<T>(bias_gradient)});
    return {made.query, made.key, value_gradient, contiguous(made.weight, weight.scalar_type()),
            contiguous(bias_gradient, bias ? bias->scalar_type() : type)};
  });
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_varlen_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, const VarlenOptions& options, bool keep_scores, bool) {
  return with_storage(query.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const Inputs<S> all(query, key, value, weight, {}, {}, {}, {}, {}, {}, options.of_attention(), true);
    const int64_t H = all.p.H, Tq = all.p.Tq, Dv = all.p.Dv, most = options.max_seqlen_k;
    const auto segments = segments_of(all, cu_seqlens_q, cu_seqlens_k, options);
    const Tensor context = empty_packed(all, Tq, Dv), lse = all.empty({Tq}, scalar_type<T>());
    const Tensor scores = keep_scores ? all.empty({Tq, most}, scalar_type<T>()) : empty({0}, scalar_type<T>());
    S* const to_context = mutable_data_of<S>(context);
    T *const to_lse = mutable_data_of<T>(lse), *const to_scores = gradient_data<T>(scores);
    for_each_segment(segments, all.p.D, [&](const Segment& s) {
      const Inputs<S> in(all, s.first_query, s.queries, s.first_key, s.keys);
      const auto c = rows_in(to_context, H, s.first_query, s.queries, Dv);
      const auto l = numbers_in(to_lse, H, Tq, s, 1, s.queries);
      const auto e = numbers_in(to_scores, H, Tq, s, most, s.queries * s.keys);
      forward<S>(in, WeightDropout<S>({}, in), {c.get(), l.get(), nullptr, e.get()});
      c.scatter(), l.scatter(), e.scatter();
    });
    return std::tuple{context, lse, scores};
  });
}

Tensors additive_attention_varlen_bwd(const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                                      const Tensor& query, const Tensor& key, const Tensor& value,
                                      const Tensor& weight, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                      const VarlenOptions& options, const Tensor&, const Tensor& lse,
                                      const Tensor& scores, OutputMask asked) {
  return with_storage(query.scalar_type(), [&](auto storage) -> Tensors {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const ScalarType type = scalar_type<S>(), acc = scalar_type<T>();
    const Inputs<S> all(query, key, value, weight, {}, {}, {}, {}, {}, {}, options.of_attention(), true);
    const int64_t H = all.p.H, Tq = all.p.Tq, Tk = all.p.Tk, D = all.p.D, Dv = all.p.Dv,
                  most = options.max_seqlen_k;
    const auto segments = segments_of(all, cu_seqlens_q, cu_seqlens_k, options);
    if (grad_context) check_shape(*grad_context, "grad_context", all.shape({Tq, Dv}));
    if (grad_lse) check_shape(*grad_lse, "grad_lse", all.shape({Tq}));
    check_shape(lse, "lse", all.shape({Tq}));
    if (scores.numel() > 0) check_shape(scores, "scores", all.shape({Tq, most}));
    STD_TORCH_CHECK(lse.scalar_type() == acc && scores.scalar_type() == acc,
                    "additive_attention_varlen: lse and scores must be in the dtype of the arithmetic");
    const OptionalTensor dc = if_given(grad_context, prepared, type);
    const OptionalTensor dl = if_given(grad_lse, contiguous, acc);
    const Tensor rows_lse = contiguous(lse, acc), rows_scores = contiguous(scores, acc);
    const View<const S> contexts = dc ? view<S>(*dc) : View<const S>{};
    const T* const lses = data_of<T>(rows_lse);
    const T* const grad_lses = dl ? data_of<T>(*dl) : nullptr;
    const T* const kept = scores.numel() > 0 ? data_of<T>(rows_scores) : nullptr;

    const auto made = [&](bool is_asked, int64_t rows, int64_t width) {
      return is_asked ? empty_packed(all, rows, width) : empty({0}, type);
    };
    const Tensor to_query = made(asked[0], Tq, D), to_key = made(asked[1], Tk, D),
                 to_value = made(asked[2], Tk, Dv);
    const Tensor to_weight = !asked[3] ? empty({0}, acc) : all.flat ? empty({D}, acc) : empty({H, D}, acc);
    S *const dq = gradient_data<S>(to_query), *const dk = gradient_data<S>(to_key);
    S* const dx = gradient_data<S>(to_value);
    const Buffer<T> weights(asked[3] ? static_cast<int64_t>(segments.size()) * H * D : 0);
    for_each_segment(segments, D, [&](const Segment& s) {
      const Inputs<S> in(all, s.first_query, s.queries, s.first_key, s.keys);
      const auto l = numbers_in(lses, H, Tq, s, 1, s.queries), g = numbers_in(grad_lses, H, Tq, s, 1, s.queries);
      const auto e = numbers_in(kept, H, Tq, s, most, s.queries * s.keys);
      const auto q = rows_in(dq, H, s.first_query, s.queries, D), k = rows_in(dk, H, s.first_key, s.keys, D);
      const auto x = rows_in(dx, H, s.first_key, s.keys, Dv);
      l.gather(), g.gather(), e.gather();
      auto grad_contexts = contexts;
      if (dc) grad_contexts.data += s.first_query * contexts.stride_t;
      T* const w = asked[3] ? weights.get() + s.number * H * D : nullptr;
      backward<S>(in, WeightDropout<S>({}, in), {grad_contexts, g.get(), nullptr, l.get(), e.get()},
                  {{q.get(), k.get(), w, false}, x.get(), false});
      q.scatter(), k.scatter(), x.scatter();
    });
    for (int64_t n = 0; asked[3] && n < H * D; ++n) {
      double sum = 0;
      for (size_t s = 0; s < segments.size(); ++s) sum += weights.get()[s * H * D + n];
      mutable_data_of<T>(to_weight)[n] = static_cast<T>(sum);
    }
    return {to_query, to_key, to_value, contiguous(to_weight, weight.scalar_type())};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("additive_attention_varlen_fwd", boxed<additive_attention_varlen_fwd>);
  m.impl("additive_attention_varlen_bwd", boxed<additive_attention_varlen_bwd>);
  m.impl("additive_attention_fwd", boxed<additive_attention_fwd>);
  m.impl("additive_attention_bwd", boxed<additive_attention_bwd>);
}

}  // namespace fusedattn
