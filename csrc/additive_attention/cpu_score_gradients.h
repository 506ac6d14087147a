// The joint backward of scores: gradients of query, key and weight from those of the scores, chunk by chunk.
#pragma once

#include "cpu_inputs.h"

namespace fusedattn {
namespace {

// The data of a gradient; null where it was not asked for, or has no elements.
template <typename E>
E* gradient_data(const Tensor& gradient) {
  return gradient.numel() == 0 ? nullptr : mutable_data_of<E>(gradient);
}

// The gradient of keys or values, `size` elements of each head; rows may go past the caches (common/memory.h).
template <typename S>
class HeadGradients {
 public:
  using T = Arithmetic<S>;
  HeadGradients(S* rows, int64_t width, bool streamed, const Inputs<S>& in)
      : rows_(rows),
        size_(in.p.Tk * width),
        queries_(in.p.Tq),
        sums_(IS_NARROW<S> && in.chunk_rows < queries_ && asked() ? size_ : 0),
        streamed_(streamed) {
    if (asked() && in.rows() == 0) std::fill_n(rows_, in.p.B * in.p.H * size_, S{});
  }

  bool asked() const { return rows_ != nullptr; }

  // Of a head of the chunk. Where there are several chunks of queries, each has one head.
  GradientRows<S> rows(const Chunk& chunk, int64_t head) const {
    if (!asked()) return {};
    S* const rows = rows_ + (chunk.first_head + head) * size_;
    const bool added = chunk.first_query > 0;
    const bool unfinished = IS_NARROW<S> && chunk.first_query + chunk.queries < queries_;
    return {unrounded(rows, sums_.get()), rows, added, unfinished, streamed_ && !added && !unfinished};
  }

 private:
  S* rows_;
  int64_t size_, queries_;
  Buffer<T> sums_;
  bool streamed_;
};

// The gradients that are asked for; the others are null. weight's is in the type of the arithmetic.
template <typename S>
struct ScoreGradientRows {
  S *query, *key;         // (B, H, Tq, D) and (B, H, Tk, D), contiguous
  Arithmetic<S>* weight;  // (H, D)
  bool is_key_streamed;   // past the caches
};

// Tensors for them; (0,) for those that are not asked for.
template <typename S>
struct ScoreGradientTensors {
  Tensor query, key, weight;

  ScoreGradientTensors(const Inputs<S>& in, bool of_query, bool of_key, bool of_weight)
      : query(in.empty_if(of_query, {in.p.Tq, in.p.D})),
        key(in.empty_if(of_key, {in.p.Tk, in.p.D})),
        weight(!of_weight ? fusedattn::empty({0}, scalar_type<Arithmetic<S>>())
               : in.flat  ? fusedattn::empty({in.p.D}, scalar_type<Arithmetic<S>>())
                          : fusedattn::empty({in.p.H, in.p.D}, scalar_type<Arithmetic<S>>())) {}

  ScoreGradientRows<S> rows() const {
    const bool is_streamed = passes_caches(key, key.size(-1) * key.element_size());
    return {gradient_data<S>(query), gradient_data<S>(key), gradient_data<Arithmetic<S>>(weight), is_streamed};
  }
};

template <typename S>
class ScoreGradients {
 public:
  using T = Arithmetic<S>;

  ScoreGradients(const Inputs<S>& in, const ScoreGradientRows<S>& to)
      : in_(in), to_(to), grad_key_(to.key, in.p.D, to.is_key_streamed, in) {
    const auto& p = in.p;
    const int64_t strips = in.chunk_rows <= ROWWISE_QUERIES ? 1 : p.D_padded / fwd<S>().lanes;
    splits_ = in.key_splits(in.chunk_heads * std::max<int64_t>(strips, 1));
    partial_query_ = Buffer<T>(in.chunk_heads * in.chunk_rows * splits_ * p.D_padded);
    partial_weight_ = Buffer<T>(p.B * p.H * splits_ * p.D_padded);
    std::fill_n(partial_weight_.get(), p.B * p.H * splits_ * p.D_padded, T(0));
    row_sums_ = Buffer<T>(in.rows());
  }

  // Of the gradients of scores, for each of all rows: to be filled before finish().
  T* row_sums() const { return row_sums_.get(); }

  // Whether add() reads those of the chunk's queries, or makes its own of one strip of channels at a time.
  bool reads_exponentials(const Chunk& chunk) const { return chunk.queries <= ROWWISE_QUERIES; }

  // g: the gradients of the chunk's unscaled, uncapped scores.
  void add(const Chunk& chunk, int64_t first_row, const T* g) {
    const auto& p = in_.p;
    if (p.D == 0 || !(to_.query || to_.key || to_.weight)) return;
    const bool rowwise = reads_exponentials(chunk);
    const int64_t strips = rowwise ? 1 : p.D_padded / fwd<S>().lanes;
    const int64_t part_keys = ceil_div(ceil_div(p.Tk, splits_), 4) * 4;
    const int64_t cost = chunk.queries * part_keys * p.D_padded / strips / 4;
    const auto visible = [&](int64_t head) {
      const int64_t n = chunk.first_head + head;
      return p.visible_keys(n / p.H, n % p.H);
    };
    for (int64_t head = 0; head < chunk.heads && chunk.first_query == 0 && grad_key_.asked(); ++head) {
      S* rows = grad_key_.rows(chunk, head).rows;
      std::fill(rows + visible(head) * p.D, rows + p.Tk * p.D, S{});  // padding is not looked at below
    }
    parallel<T>(chunk.heads * splits_ * strips, grain_for(cost), backward_scratch(p, chunk, fwd<S>().lanes),
                [&](int64_t first, int64_t last, T* scratch) {
                  for (int64_t task = first; task < last; ++task) {
                    const int64_t head = task / (splits_ * strips), split = task / strips % splits_;
                    const int64_t begin = std::min(visible(head), split * part_keys);
                    const int64_t end = std::min(visible(head), begin + part_keys);
                    T* dq = partial_query_.get() + (head * splits_ + split) * chunk.queries * p.D_padded;
                    T* dw = partial_weight_.get() + ((chunk.first_head + head) * splits_ + split) * p.D_padded;
                    const GradientRows<S> dk = grad_key_.rows(chunk, head);
                    if (rowwise)
                      bwd<S>().backward_rows(p, chunk, head, begin, end, g, dq, dk, dw, scratch);
                    else
                      bwd<S>().backward_strip(p, chunk, head, task % strips * fwd<S>().lanes, begin, end, g, dq,
                                              dk, dw, scratch);
                  }
                });
    if (to_.query == nullptr) return;
    const int64_t rows = chunk.heads * chunk.queries, unrounded_size = IS_NARROW<S> ? p.D : 0;
    const T slope = factors_of(p.options.activation).slope;
    parallel<T>(rows, grain_for(p.D * splits_), unrounded_size, [&](int64_t first, int64_t last, T* scratch) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t head = row / chunk.queries, i = row % chunk.queries;
        const T* w = p.weight + (chunk.first_head + head) % p.H * p.D_padded;
        S* const row_out = to_.query + (first_row + row) * p.D;
        T* const __restrict out = unrounded(row_out, scratch);  // by rows: loops that the compiler vectorises
        const T* part = partial_query_.get() + (head * splits_ * chunk.queries + i) * p.D_padded;
        std::copy_n(part, p.D, out);
        for (int64_t s = 1; s < splits_; ++s) {
          part += chunk.queries * p.D_padded;
          for (int64_t d = 0; d < p.D; ++d) out[d] += part[d];
        }
        for (int64_t d = 0; d < p.D; ++d) out[d] *= slope * w[d];
        round_into(row_out, out, p.D);
      }
    });
  }

  // Of weight, from its parts and the row sums.
  void finish() {
    if (to_.weight == nullptr) return;
    const auto& p = in_.p;
    const ScoreFactors by = factors_of(p.options.activation);
    for (int64_t h = 0; h < p.H; ++h) {
      double total = 0;
      for (int64_t b = 0; b < p.B && by.total != 0; ++b)
        for (int64_t i = 0; i < p.Tq; ++i) total += row_sums_.get()[(b * p.H + h) * p.Tq + i];
      parallel<T>(p.D, grain_for(p.B * splits_), 0, [&](int64_t first, int64_t last, T*) {
        for (int64_t d = first; d < last; ++d) {
          double sum = 0;
          for (int64_t b = 0; b < p.B; ++b)
            for (int64_t n = 0; n < splits_; ++n)
              sum += partial_weight_.get()[((b * p.H + h) * splits_ + n) * p.D_padded + d];
          to_.weight[h * p.D + d] = static_cast<T>(by.total * total + by.sum * sum);
        }
      });
    }
  }

 private:
  const Inputs<S>& in_;
  const ScoreGradientRows<S> to_;
  int64_t splits_;  // of the keys, among tasks
  HeadGradients<S> grad_key_;
  Buffer<T> partial_query_, partial_weight_;  // the latter: a row of D_padded for each head and split
  Buffer<T> row_sums_;
};

}  // namespace
}  // namespace fusedattn
