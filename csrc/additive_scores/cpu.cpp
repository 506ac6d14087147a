// CPU launcher of the scores alone: the phases of attention that have to do with them.
#include <tuple>

#include "additive_attention/cpu_inputs.h"
#include "additive_attention/cpu_score_gradients.h"
#include "common/box.h"
#include "options.h"

namespace fusedattn {
namespace {

// The keys stand for values, at which nobody looks.
template <typename S>
Inputs<S> inputs(const Tensor& query, const Tensor& key, const Tensor& weight, const ScoresOptions& options) {
  return Inputs<S>(
      query, key, key, weight, {}, {}, {}, {}, {}, {},
      AttentionOptions{-1, -1, options.scale, options.softcap, options.activation, options.negative_slope});
}

// body(row among those of the chunk)
template <typename S, typename Body>
void for_each_row(const Inputs<S>& in, const Chunk& chunk, const Body& body) {
  parallel_for(chunk.heads * chunk.queries, grain_for(in.p.Tk), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) body(row);
  });
}

Tensor additive_scores_fwd(const Tensor& query, const Tensor& key, const Tensor& weight,
                           const ScoresOptions& options) {
  return with_storage(query.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const Inputs<S> in = inputs<S>(query, key, weight, options);
    const int64_t Tk = in.p.Tk;
    const Tensor scores = in.empty({in.p.Tq, Tk});
    const Buffer<T> wide(IS_NARROW<S> ? in.chunk_heads * in.chunk_rows * Tk : 0);
    in.for_each_chunk([&](const Chunk& chunk, int64_t first_row) {
      S* const rows = mutable_data_of<S>(scores) + first_row * Tk;
      T* const unrounded_rows = unrounded(rows, wide.get());
      in.prepare_queries(chunk);
      in.score(chunk, unrounded_rows);
      if constexpr (IS_NARROW<S>)
        for_each_row(in, chunk, [&](int64_t row) { round_into(rows + row * Tk, unrounded_rows + row * Tk, Tk); });
    });
    return scores;
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients additive_scores_bwd(const Tensor& grad_scores, const Tensor& query, const Tensor& key,
                              const Tensor& weight, const ScoresOptions& options, OutputMask asked) {
  return with_storage(query.scalar_type(), [&](auto storage) -> Gradients {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const Inputs<S> in = inputs<S>(query, key, weight, options);
    const int64_t Tk = in.p.Tk, chunk_size = in.chunk_heads * in.chunk_rows * Tk;
    check_shape(grad_scores, "grad_scores", in.shape({in.p.Tq, Tk}));
    STD_TORCH_CHECK(grad_scores.scalar_type() == query.scalar_type(),
                    "additive_scores: grad_scores must be in the dtype of query");
    const Tensor grad = contiguous(grad_scores, scalar_type<S>());
    const ScoreGradientTensors<S> made(in, asked[0], asked[1], asked[2]);
    ScoreGradients<S> grads(in, made.rows());
    const T scale = static_cast<T>(options.scale);
    const T inverse_cap = options.softcap != 0 ? static_cast<T>(1 / options.softcap) : T(0);
    const Buffer<T> g(chunk_size), scores(options.softcap != 0 ? chunk_size : 0);
    in.for_each_chunk([&](const Chunk& chunk, int64_t first_row) {
      if (options.softcap != 0 || grads.reads_exponentials(chunk)) in.prepare_queries(chunk);
      if (options.softcap != 0) in.score(chunk, scores.get());
      for_each_row(in, chunk, [&](int64_t row) {
        T* g_row = g.get() + row * Tk;
        const T* s = options.softcap != 0 ? scores.get() + row * Tk : nullptr;
        fwd<S>().widen(Tk, data_of<S>(grad) + (first_row + row) * Tk, g_row, false);
        double sum = 0;
        for (int64_t j = 0; j < Tk; ++j) {
          const T capped = s == nullptr ? T(0) : s[j] * inverse_cap;
          g_row[j] *= scale * (1 - capped * capped);
          sum += g_row[j];
        }
        grads.row_sums()[first_row + row] = static_cast<T>(sum);
      });
      grads.add(chunk, first_row, g.get());
    });
    grads.finish();
    return {made.query, made.key, contiguous(made.weight, weight.scalar_type())};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("additive_scores_fwd", boxed<additive_scores_fwd>);
  m.impl("additive_scores_bwd", boxed<additive_scores_bwd>);
}

}  // namespace fusedattn
