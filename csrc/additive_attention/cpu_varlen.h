// Packed sequences on the CPU (additive_attention_varlen): where the rows of each segment are, and who computes
// it.
//
// A segment is a problem of its own, cut as one that stands alone: the bits are those of a loop over the segments.
#pragma once

#include <cstring>
#include <numeric>
#include <type_traits>

#include "additive_attention_varlen/options.h"
#include "cpu_inputs.h"

namespace fusedattn {
namespace {

struct Segment {
  int64_t number, first_query, queries, first_key, keys;
};

// (segments + 1,) offsets into `total` rows, the lengths between them at most `longest`; checked, as kernels read
// and write by them.
inline const int32_t* checked_offsets(const Tensor& offsets, const char* side, int64_t total, int64_t longest) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0 && offsets.is_contiguous() &&
                      offsets.scalar_type() == ScalarType::Int,
                  "additive_attention_varlen: cu_seqlens_", side, ": expected contiguous int32 (segments + 1,)");
  const int32_t* at = offsets.const_data_ptr<int32_t>();
  const int64_t segments = offsets.size(0) - 1;
  STD_TORCH_CHECK(at[0] == 0 && at[segments] == total, "additive_attention_varlen: cu_seqlens_", side,
                  ": expected offsets from 0 to ", total, ", got ", at[0], " to ", at[segments]);
  for (int64_t s = 0; s < segments; ++s) {
    STD_TORCH_CHECK(at[s] <= at[s + 1], "additive_attention_varlen: cu_seqlens_", side,
                    ": expected offsets that do not decrease, got ", at[s + 1], " after ", at[s]);
    STD_TORCH_CHECK(at[s + 1] - at[s] <= longest, "additive_attention_varlen: max_seqlen_", side,
                    ": expected at least the longest segment, got ", longest, " for one of ", at[s + 1] - at[s]);
  }
  return at;
}

template <typename S>
std::vector<Segment> segments_of(const Inputs<S>& all, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                 const VarlenOptions& options) {
  STD_TORCH_CHECK(all.p.B == 1, "additive_attention_varlen: query: expected a batch of 1, got ", all.p.B);
  const int32_t* q = checked_offsets(cu_seqlens_q, "q", all.p.Tq, options.max_seqlen_q);
  const int32_t* k = checked_offsets(cu_seqlens_k, "k", all.p.Tk, options.max_seqlen_k);
  STD_TORCH_CHECK(cu_seqlens_q.size(0) == cu_seqlens_k.size(0),
                  "additive_attention_varlen: cu_seqlens_k: expected ", cu_seqlens_q.size(0),
                  " offsets as cu_seqlens_q, got ", cu_seqlens_k.size(0));
  std::vector<Segment> segments(cu_seqlens_q.size(0) - 1);
  for (size_t s = 0; s < segments.size(); ++s)
    segments[s] = {static_cast<int64_t>(s), q[s], q[s + 1] - q[s], k[s], k[s + 1] - k[s]};
  return segments;
}

// run(segment) of all, the most work first. One that is much of all work has every thread for itself, one after
// the other; of the rest each is a task of one thread. Results do not hang on which is which.
template <typename Run>
void for_each_segment(std::vector<Segment> segments, int64_t D, const Run& run) {
  const auto cost = [](const Segment& s) { return std::max(s.queries, s.keys) + s.queries * s.keys; };
  std::stable_sort(segments.begin(), segments.end(),
                   [&](const Segment& a, const Segment& b) { return cost(a) > cost(b); });
  const int64_t all = std::accumulate(segments.begin(), segments.end(), int64_t{0},
                                      [&](int64_t sum, const Segment& s) { return sum + cost(s); });
  const int64_t much = all / (4 * torch::stable::get_num_threads()), count = segments.size();
  int64_t alone = 0;
  while (alone < count && cost(segments[alone]) > much) run(segments[alone++]);
  parallel_for(count - alone, grain_for(all / std::max<int64_t>(count, 1) * D), [&](int64_t first, int64_t last) {
    for (int64_t n = alone + first; n < alone + last; ++n) run(segments[n]);
  });
}

// A segment's part of a packed tensor, (H, rows, width) with these strides, in one piece: where it is, if it is
// one, else a copy, to be gathered before it is read or scattered after it was written. Null stays null.
template <typename E>
class SegmentRows {
 public:
  SegmentRows(E* packed, int64_t H, int64_t head_stride, int64_t rows, int64_t row_stride, int64_t width)
      : packed_(packed),
        H_(H),
        head_stride_(head_stride),
        rows_(rows),
        row_stride_(row_stride),
        width_(width),
        copied_(packed != nullptr && H * rows * width > 0 && (H > 1 || (rows > 1 && row_stride != width))),
        copy_(copied_ ? H * rows * width : 0) {}

  E* get() const { return copied_ ? copy_.get() : packed_; }

  void gather() const {
    for_each_row(
        [](const E* packed, std::remove_const_t<E>* copy, size_t bytes) { std::memcpy(copy, packed, bytes); });
  }
  void scatter() const {
    for_each_row([](E* packed, const E* copy, size_t bytes) { std::memcpy(packed, copy, bytes); });
  }

 private:
  template <typename Move>
  void for_each_row(const Move& move) const {
    if (!copied_) return;
    for (int64_t h = 0; h < H_; ++h)
      for (int64_t i = 0; i < rows_; ++i)
        move(packed_ + h * head_stride_ + i * row_stride_, copy_.get() + (h * rows_ + i) * width_,
             width_ * sizeof(E));
  }

  E* packed_;
  int64_t H_, head_stride_, rows_, row_stride_, width_;
  bool copied_;
  Buffer<std::remove_const_t<E>> copy_;
};

// A result of a row for each of `rows` packed ones: (1, rows, width), or (1, H, rows, width) that lies in memory
// as (rows, H, width).
template <typename S>
Tensor empty_packed(const Inputs<S>& all, int64_t rows, int64_t width) {
  const int64_t H = all.p.H, row = H * width;
  if (all.flat) return empty({1, rows, width}, scalar_type<S>());
  return empty({1, H, rows, width}, {rows * row, width, row, 1}, scalar_type<S>());
}
template <typename S>
SegmentRows<S> rows_in(S* packed, int64_t H, int64_t first, int64_t rows, int64_t width) {
  return {packed == nullptr ? nullptr : packed + first * H * width, H, width, rows, H * width, width};
}

// Of what has one number, or one row of `most` numbers at most, for each of `total` queries of a head: (H, total)
// or (H, total, most). A segment's numbers, `count` a head, lie next to each other.
template <typename E>
SegmentRows<E> numbers_in(E* packed, int64_t H, int64_t total, const Segment& s, int64_t most, int64_t count) {
  return {packed == nullptr ? nullptr : packed + s.first_query * most, H, total * most, 1, count, count};
}

}  // namespace
}  // namespace fusedattn
