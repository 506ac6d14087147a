// CPU launcher of additive attention: allocation, and the phases of cpu_kernel.h over all cores (cpu_inputs.h).
#include <tuple>

#include "common/box.h"
#include "cpu_inputs.h"
#include "cpu_score_gradients.h"

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
      int64_t visible = p.visible_keys(b, h);
      if (p.options.is_causal) visible = std::min(visible, chunk.first_query + r + rows);
      const int64_t first_key = std::min(visible, n % splits * part_keys);
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

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename S, typename T = Arithmetic<S>>
Forward forward(const Inputs<S>& in, bool return_weights, bool keep_scores) {
  const auto& p = in.p;
  const ScalarType acc = scalar_type<T>();
  Tensor context = in.empty({p.Tq, p.Dv}), lse = in.empty({p.Tq}, acc);
  Tensor weights = return_weights ? in.empty({p.Tq, p.Tk}) : empty({0}, scalar_type<S>());
  Tensor scores = keep_scores ? in.empty({p.Tq, p.Tk}, acc) : empty({0}, acc);
  const int64_t buffer_size = in.chunk_heads * in.chunk_rows * p.Tk;
  const Buffer<T> buffer(return_weights && !IS_NARROW<S> ? 0 : buffer_size);
  in.for_each_chunk([&](const Chunk& chunk, int64_t first_row) {
    S* const returned = mutable_data_of<S>(weights) + first_row * p.Tk;
    T* probabilities = return_weights ? unrounded(returned, buffer.get()) : buffer.get();
    T* s = keep_scores ? scores.template mutable_data_ptr<T>() + first_row * p.Tk : probabilities;
    in.prepare_queries(chunk);
    in.score(chunk, s);
    T* chunk_lse = lse.template mutable_data_ptr<T>() + first_row;
    parallel<T>(chunk.heads * chunk.queries, grain_for(p.Tk), 0, [&](int64_t first, int64_t last, T*) {
      T* rows = probabilities + first * p.Tk;
      fwd<S>().softmax(last - first, p.Tk, s + first * p.Tk, rows, chunk_lse + first);
      if (return_weights) round_into(returned + first * p.Tk, rows, (last - first) * p.Tk);
    });
    contexts(in, chunk, probabilities, mutable_data_of<S>(context) + first_row * p.Dv);
  });
  return {context, lse, weights, scores};
}

// Those not asked for are (0,).
struct Gradients {
  Tensor query, key, value, weight;
};

// The rows of grad_context that belong to a chunk, in the type of the arithmetic.
template <typename S>
class ContextGradients {
 public:
  using T = Arithmetic<S>;
  ContextGradients(const Tensor& grad_context, const Inputs<S>& in)
      : given_(view<S>(grad_context)),
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
Gradients backward(const Inputs<S>& in, const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                   const OptionalTensor& grad_weights, const Tensor& lse, const Tensor& scores, OutputMask asked) {
  const auto& p = in.p;
  ScoreGradients<S> grads(in, asked[0], asked[1], asked[3]);
  Tensor value = asked[2] ? in.empty({p.Tk, p.Dv}) : empty({0}, scalar_type<S>());
  const HeadGradients<S> grad_value(value, p.Dv, in);
  if (!grad_context || in.rows() == 0) torch::stable::zero_(value);
  const bool kept = scores.numel() > 0;
  const int64_t chunk_size = in.chunk_heads * in.chunk_rows;
  const Buffer<T> probabilities(chunk_size * p.Tk), g(chunk_size * p.Tk);
  std::optional<ContextGradients<S>> dc;
  if (grad_context) dc.emplace(*grad_context, in);

  // Probabilities replace the scores in place, unless the slope of the cap still needs these.
  const Buffer<T> capped(!kept && p.options.softcap != 0 ? chunk_size * p.Tk : 0);
  T* const recomputed = p.options.softcap != 0 ? capped.get() : probabilities.get();
  in.for_each_chunk([&](const Chunk& chunk, int64_t first_row) {
    const int64_t rows = chunk.heads * chunk.queries;
    if (!kept || grads.reads_exponentials(chunk)) in.prepare_queries(chunk);
    const T* s = kept ? scores.template const_data_ptr<T>() + first_row * p.Tk : recomputed;
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
    const S* extra = grad_weights ? data_of<S>(*grad_weights) + first_row * p.Tk : nullptr;
    const T* dl = grad_lse ? grad_lse->template const_data_ptr<T>() + first_row : nullptr;
    const T* l = lse.template const_data_ptr<T>() + first_row;
    parallel<T>(rows, grain_for(p.Tk), 0, [&](int64_t first, int64_t last, T*) {
      for (int64_t row = first; row < last; ++row) {
        T* g_row = g.get() + row * p.Tk;
        if (extra != nullptr) fwd<S>().widen(p.Tk, extra + row * p.Tk, g_row, true);
        grads.row_sums()[first_row + row] = bwd<S>().grad_scores(
            p, s + row * p.Tk, l[row], dl == nullptr ? T(0) : dl[row], probabilities.get() + row * p.Tk, g_row);
      }
    });
    if (dc && asked[2]) {
      in.for_each_key_block(chunk, p.Dv / 4, [&](int64_t head, int64_t first_key, T* scratch) {
        products<S>().grad_values(p, chunk, head, first_key, probabilities.get(), dc->rows(chunk, head),
                                  dc->stride(), grad_value.rows(chunk, head), scratch);
      });
    }
    grads.add(chunk, first_row, g.get());
  });
  grads.finish();
  return {grads.query, grads.key, value, grads.weight};
}

// The last argument, allow_tf32, is ignored: no CPU has TF32.
Forward additive_attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight,
                               const OptionalTensor& mask, const OptionalTensor& key_lengths,
                               const OptionalTensor& key_exp, const OptionalTensor& key_bound,
                               const AttentionOptions& options, bool return_weights, bool keep_scores, bool) {
  return with_storage(query.scalar_type(), [&](auto storage) {
    const Inputs<decltype(storage)> in(query, key, value, weight, mask, key_lengths, key_exp, key_bound, options);
    return forward(in, return_weights, keep_scores);
  });
}

Forward additive_attention_bwd(const OptionalTensor& grad_context, const OptionalTensor& grad_lse,
                               const OptionalTensor& grad_weights, const Tensor& query, const Tensor& key,
                               const Tensor& value, const Tensor& weight, const OptionalTensor& mask,
                               const OptionalTensor& key_lengths, const OptionalTensor& key_exp,
                               const OptionalTensor& key_bound, const AttentionOptions& options, const Tensor&,
                               const Tensor& lse, const Tensor& scores, OutputMask asked) {
  return with_storage(query.scalar_type(), [&](auto storage) -> Forward {
    using S = decltype(storage);
    const ScalarType type = scalar_type<S>(), acc = scalar_type<Arithmetic<S>>();
    const auto given = [&](const OptionalTensor& t, ScalarType as) { return t ? contiguous(*t, as) : t; };
    const Inputs<S> in(query, key, value, weight, mask, key_lengths, key_exp, key_bound, options);
    const auto& p = in.p;
    if (grad_context) check_shape(*grad_context, "grad_context", in.shape({p.Tq, p.Dv}));
    if (grad_lse) check_shape(*grad_lse, "grad_lse", in.shape({p.Tq}));
    if (grad_weights) check_shape(*grad_weights, "grad_weights", in.shape({p.Tq, p.Tk}));
    check_shape(lse, "lse", in.shape({p.Tq}));
    if (scores.numel() > 0) check_shape(scores, "scores", in.shape({p.Tq, p.Tk}));
    STD_TORCH_CHECK(lse.scalar_type() == acc && scores.scalar_type() == acc,
                    "additive_attention: lse and scores must be in the dtype of the arithmetic");
    OptionalTensor dc;
    if (grad_context) dc = prepared(*grad_context, type);
    const auto grads = backward(in, dc, given(grad_lse, acc), given(grad_weights, type), contiguous(lse, acc),
                                contiguous(scores, acc), asked);
    return {grads.query, grads.key, grads.value, contiguous(grads.weight, weight.scalar_type())};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("additive_attention_fwd", boxed<additive_attention_fwd>);
  m.impl("additive_attention_bwd", boxed<additive_attention_bwd>);
}

}  // namespace fusedattn
