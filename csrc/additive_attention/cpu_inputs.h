// The inputs of additive attention on the CPU: checked, cut into chunks, and the loops over them (cpu_kernel.h).
//
// Query rows are processed in chunks, so that only chunk x Tk scores exist between phases (besides the kept
// scores, which the caller asks for only where they are smaller than query and key). Work is cut by shape alone
// and partial sums are added in a fixed order: results are the same bits for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "common/cpu_level.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "cpu_kernel.h"
#include "formula.h"
#include "sizes.h"

namespace fusedattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Elements of the score buffer of one chunk: small enough for the cache, large enough for all cores.
constexpr int64_t CHUNK_ELEMENTS = 1 << 20;

// Tasks of which there should be as many, or keys are split.
constexpr int64_t SPLIT_TASKS = 64;

// Of each storage type: torch's name of it, and the kernels of cpu_kernel_fwd.cpp, cpu_kernel_bwd.cpp and
// cpu_kernel_product.cpp for this machine.
template <typename S>
constexpr ScalarType scalar_type();
template <typename S>
const AttentionFwdKernels<S>& fwd();
template <typename S>
const AttentionBwdKernels<S>& bwd();
template <typename S>
const AttentionProducts<S>& products();

#define FUSEDATTN_STORAGE_TYPE(S, name, suffix)                \
  template <>                                                  \
  constexpr ScalarType scalar_type<S>() {                      \
    return ScalarType::name;                                   \
  }                                                            \
  template <>                                                  \
  inline const AttentionFwdKernels<S>& fwd() {                 \
    return FUSEDATTN_LEVEL_TABLE(attention_fwd_##suffix);      \
  }                                                            \
  template <>                                                  \
  inline const AttentionBwdKernels<S>& bwd() {                 \
    return FUSEDATTN_LEVEL_TABLE(attention_bwd_##suffix);      \
  }                                                            \
  template <>                                                  \
  inline const AttentionProducts<S>& products() {              \
    return FUSEDATTN_LEVEL_TABLE(attention_products_##suffix); \
  }
FUSEDATTN_STORAGE_TYPE(float, Float, f32)
FUSEDATTN_STORAGE_TYPE(double, Double, f64)
FUSEDATTN_STORAGE_TYPE(Half, Half, f16)
FUSEDATTN_STORAGE_TYPE(BFloat16, BFloat16, bf16)

// run(S{}) of the storage type of that name.
template <typename Run>
auto with_storage(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Double:
      return run(double{});
    case ScalarType::Half:
      return run(Half{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    default:
      STD_TORCH_CHECK(type == ScalarType::Float,
                      "additive_attention: query: expected dtype float32, float64, float16 or bfloat16");
      return run(float{});
  }
}

// body(first, last, scratch) over [0, tasks); grain is how many tasks are worth a thread.
template <typename T, typename Body>
void parallel(int64_t tasks, int64_t grain, int64_t scratch_size, const Body& body) {
  parallel_for(tasks, grain, [&](int64_t first, int64_t last) {
    const Buffer<T> scratch(scratch_size);
    body(first, last, scratch.get());
  });
}

// Tasks of `cost` elementary steps each: below some 16,000 steps a second thread costs more than it brings.
inline int64_t grain_for(int64_t cost) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(cost, 1)); }

inline void check_shape(const Tensor& t, const char* name, const std::vector<int64_t>& shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t n = 0;
  for (int64_t size : shape) same = same && t.size(n++) == size;
  STD_TORCH_CHECK(same, "additive_attention: ", name, " does not have the shape that the other inputs ask for");
}

// In dtype `type`, with a contiguous last dimension; a copy only where it must be.
inline Tensor prepared(const Tensor& t, ScalarType type) {
  const bool contiguous_rows = t.size(-1) <= 1 || t.stride(-1) == 1;
  return t.scalar_type() == type && contiguous_rows ? t : contiguous(t, type);
}

// make(t, type), of what is given.
inline OptionalTensor if_given(const OptionalTensor& t, Tensor (*make)(const Tensor&, ScalarType),
                               ScalarType type) {
  if (!t) return std::nullopt;
  return make(*t, type);
}

template <typename S>
const S* data_of(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <typename S>
S* mutable_data_of(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

template <typename S>
View<const S> view(const Tensor& t) {
  if (t.dim() == 3) return {data_of<S>(t), t.stride(0), 0, t.stride(1)};
  return {data_of<S>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// Where to make n numbers that belong at `out`, in the type of the arithmetic: there, or at `scratch`; and then to
// bring them there.
template <typename S, typename T = Arithmetic<S>>
T* unrounded(S* out, T* scratch) {
  if constexpr (IS_NARROW<S>)
    return scratch;
  else
    return out;
}
template <typename S, typename T = Arithmetic<S>>
void round_into(S* out, const T* from, int64_t n) {
  if constexpr (IS_NARROW<S>) fwd<S>().narrow(n, from, out);
}

// Inputs, the problem that points into them, and its working memory.
template <typename S>
struct Inputs {
  using T = Arithmetic<S>;
  Tensor query, key, value;
  OptionalTensor bias, mask, key_lengths, window_center, key_exp;
  Buffer<T> weight, weight_scaled, weight_max, weight_sum, query_exp, query_bound;
  Buffer<bool> seen;
  Buffer<int64_t> seen_end;
  Buffer<KeyRange> hulls;
  AttentionProblem<S> p;
  int64_t bias_stride[4];  // 0 where the bias is broadcast
  int64_t chunk_rows = 0, chunk_heads = 0;
  bool flat;  // no dimension of heads

  // in_parts: it is not worked on itself, but by the constructor that follows.
  Inputs(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& weight_,
         const OptionalTensor& bias_, const OptionalTensor& mask_, const OptionalTensor& key_lengths_,
         const OptionalTensor& window_center_, const OptionalTensor& key_exp_, const OptionalTensor& key_bound,
         const AttentionOptions& options, bool in_parts = false)
      : query(prepared(query_, scalar_type<S>())),
        key(prepared(key_, scalar_type<S>())),
        value(prepared(value_, scalar_type<S>())),
        bias(bias_),
        mask(mask_),
        key_lengths(key_lengths_),
        window_center(window_center_),
        key_exp(key_exp_) {
    flat = query.dim() == 3;
    STD_TORCH_CHECK(query.dim() == key.dim() && query.dim() == value.dim() && (flat || query.dim() == 4),
                    "additive_attention: query, key and value must all have 3 or all 4 dimensions");
    p.B = query.size(0), p.H = flat ? 1 : query.size(1), p.Tq = query.size(-2), p.D = query.size(-1);
    p.Tk = key.size(-2), p.Dv = value.size(-1);
    check_sizes(p.B, p.H, p.Tq, p.Tk, p.D, p.Dv);
    check_shape(key, "key", shape({p.Tk, p.D}));
    check_shape(value, "value", shape({p.Tk, p.Dv}));
    check_shape(weight_, "weight", flat ? std::vector<int64_t>{p.D} : std::vector<int64_t>{p.H, p.D});
    p.query = view<S>(query), p.key = view<S>(key), p.value = view<S>(value);
    p.options = options;
    p.argument = static_cast<T>(factors_of(options.activation).argument);
    p.key_exp = nullptr, p.key_bound = 0;
    if (key_exp) {
      check_shape(*key_exp, "key_exp", shape({p.Tk, p.D}));
      STD_TORCH_CHECK(key_exp->is_contiguous() && key_exp->scalar_type() == scalar_type<T>(),
                      "additive_attention: key_exp must be contiguous, in the dtype of the arithmetic");
      STD_TORCH_CHECK(key_bound && key_bound->numel() == 1 && key_bound->scalar_type() == scalar_type<T>(),
                      "additive_attention: key_bound must be one element in the dtype of key_exp");
      p.key_bound = *key_bound->template const_data_ptr<T>();
      if (options.activation == ScoreActivation::TANH && p.key_bound <= KEY_EXP_BOUND)
        p.key_exp = key_exp->template const_data_ptr<T>();  // not if NaN
    }
    if (bias) set_bias();
    p.mask = nullptr, p.seen = nullptr, p.center = nullptr;
    if (window_center && has_window(options)) {
      check_shape(*window_center, "window_center", shape({p.Tq}));
      STD_TORCH_CHECK(window_center->scalar_type() == ScalarType::Long,
                      "additive_attention: window_center must be of dtype int64");
      p.center = window_center->template const_data_ptr<int64_t>();
      p.center_stride[0] = window_center->stride(0), p.center_stride[1] = flat ? 0 : window_center->stride(1);
      p.center_stride[2] = window_center->stride(-1);
      find_hulls();
    }
    if (mask) {
      check_shape(*mask, "mask", shape({p.Tq, p.Tk}));
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "additive_attention: mask must be of dtype bool");
      p.mask = mask->template const_data_ptr<bool>();
      for (int64_t n = 0; n < 4; ++n)
        p.mask_stride[n] = !flat ? mask->stride(n) : n == 0 ? mask->stride(0) : n == 1 ? 0 : mask->stride(n - 1);
    }
    if (mask || p.center != nullptr) find_seen_keys();
    p.key_lengths = nullptr;
    if (key_lengths) {
      check_shape(*key_lengths, "key_lengths", {p.B});
      STD_TORCH_CHECK(key_lengths->scalar_type() == ScalarType::Long,
                      "additive_attention: key_lengths must be of dtype int64");
      key_lengths = contiguous(*key_lengths, ScalarType::Long);
      p.key_lengths = key_lengths->template const_data_ptr<int64_t>();
    }
    const int64_t lanes = fwd<S>().lanes;
    p.D_padded = ceil_div(p.D, lanes) * lanes;
    set_weight(prepared(weight_, scalar_type<T>()));
    if (!in_parts) set_chunks();
  }

  // Of one batch element, `queries` queries from first_query on with `keys` keys from first_key on, as a problem
  // of its own. `all` is to stay.
  Inputs(const Inputs& all, int64_t first_query, int64_t queries, int64_t first_key, int64_t keys)
      : query(all.query), key(all.key), value(all.value), p(all.p), flat(all.flat) {
    p.Tq = queries, p.Tk = keys;
    p.query.data += first_query * p.query.stride_t;
    p.key.data += first_key * p.key.stride_t, p.value.data += first_key * p.value.stride_t;
    set_chunks();
  }

  void set_chunks() {
    // With few keys it is the channels of queries that are to stay in the cache.
    const int64_t width = p.Tk <= KEY_BLOCK ? std::max(p.Tk, 4 * p.D_padded) : p.Tk;
    const int64_t per_head = std::max<int64_t>(p.Tq * width, 1), heads = std::max<int64_t>(p.B * p.H, 1);
    const int64_t fitting = CHUNK_ELEMENTS / std::max<int64_t>(width, 1) / QUERY_BLOCK * QUERY_BLOCK;
    chunk_rows = std::min(p.Tq, std::max(fitting, QUERY_BLOCK));
    chunk_heads = chunk_rows < p.Tq ? 1 : std::min(heads, std::max<int64_t>(1, CHUNK_ELEMENTS / per_head));
    query_exp = Buffer<T>(chunk_heads * chunk_rows * p.D_padded);
    query_bound = Buffer<T>(chunk_heads * chunk_rows);
    p.query_exp = query_exp.get(), p.query_bound = query_bound.get();
  }

  // Any size of it may be 1.
  void set_bias() {
    const std::vector<int64_t> full = shape({p.Tq, p.Tk});
    bool fits = bias->dim() == static_cast<int64_t>(full.size());
    for (size_t n = 0; fits && n < full.size(); ++n) fits = bias->size(n) == 1 || bias->size(n) == full[n];
    STD_TORCH_CHECK(fits, "additive_attention: bias does not have a shape that broadcasts to the scores");
    STD_TORCH_CHECK(bias->scalar_type() == scalar_type<S>() || bias->scalar_type() == scalar_type<T>(),
                    "additive_attention: bias must be of the dtype of query or of the arithmetic");
    const auto stride = [&](int64_t dim) { return bias->size(dim) == 1 ? 0 : bias->stride(dim); };
    bias_stride[0] = stride(0), bias_stride[1] = flat ? 0 : stride(1);
    bias_stride[2] = stride(flat ? 1 : 2), bias_stride[3] = stride(flat ? 2 : 3);
  }

  // (0,) without a bias, or where its gradient is not asked for.
  std::vector<int64_t> bias_shape(bool is_asked) const {
    std::vector<int64_t> sizes;
    for (int64_t dim = 0; is_asked && bias && dim < bias->dim(); ++dim) sizes.push_back(bias->size(dim));
    return sizes.empty() ? std::vector<int64_t>{0} : sizes;
  }

  // To the scores of a row of a chunk at some keys; out may be scores.
  void add_bias(const Chunk& chunk, int64_t row, KeyRange keys, const T* scores, T* out) const {
    const int64_t head = chunk.first_head + row / chunk.queries, i = chunk.first_query + row % chunk.queries;
    const int64_t at = head / p.H * bias_stride[0] + head % p.H * bias_stride[1] + i * bias_stride[2] +
                       keys.first * bias_stride[3];
    const int64_t n = keys.end - keys.first;
    if (bias->scalar_type() == scalar_type<S>())
      fwd<S>().add_bias(n, scores + keys.first, data_of<S>(*bias) + at, bias_stride[3], out + keys.first);
    else
      fwd<S>().add_wide_bias(n, scores + keys.first, data_of<T>(*bias) + at, bias_stride[3], out + keys.first);
  }

  void set_weight(const Tensor& source) {
    weight = Buffer<T>(p.H * p.D_padded), weight_scaled = Buffer<T>(p.H * p.D_padded);
    weight_max = Buffer<T>(p.H), weight_sum = Buffer<T>(p.H);
    for (int64_t h = 0; h < p.H; ++h) {
      const T* w = source.const_data_ptr<T>() + (flat ? 0 : h * source.stride(0));
      T* padded = weight.get() + h * p.D_padded;
      T* scaled = weight_scaled.get() + h * p.D_padded;
      T top = 0;
      for (int64_t d = 0; d < p.D; ++d) top = std::max(top, std::abs(w[d]));
      if (!(top > 0) || !std::isfinite(top) || !std::isfinite(1 / top)) top = 1;
      double sum = 0;
      for (int64_t d = 0; d < p.D_padded; ++d) {
        padded[d] = d < p.D ? w[d] : 0;
        scaled[d] = padded[d] / top;
        sum += scaled[d];
      }
      weight_max.get()[h] = top, weight_sum.get()[h] = static_cast<T>(sum);
    }
    p.weight = weight.get(), p.weight_scaled = weight_scaled.get();
    p.weight_max = weight_max.get(), p.weight_sum = weight_sum.get();
  }

  // What the kernels ask of a mask and centers before they look at keys and values: a byte of it costs D or Dv
  // operations less than a pair.
  void find_seen_keys() {
    const auto differ = [&](int64_t n) {
      return (mask && p.mask_stride[n] != 0) || (p.center != nullptr && p.center_stride[n] != 0);
    };
    const int64_t heads = differ(1) ? p.H : 1, batches = differ(0) ? p.B : 1;
    const int64_t masks = p.B * p.H == 0 ? 0 : batches * heads;  // one that nobody has is nowhere in memory
    p.seen_stride[0] = differ(0) ? heads : 0, p.seen_stride[1] = differ(1) ? 1 : 0;
    seen = Buffer<bool>(masks * p.Tk), seen_end = Buffer<int64_t>(masks);
    p.seen = seen.get(), p.seen_end = seen_end.get();
    parallel_for(masks, grain_for(p.Tq * p.Tk / 16), [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        bool* of_keys = seen.get() + n * p.Tk;
        see(n / heads, n % heads, of_keys);
        int64_t end = p.Tk;
        while (end > 0 && !of_keys[end - 1]) --end;
        seen_end.get()[n] = end;
      }
    });
  }

  // By the queries of one head.
  void see(int64_t b, int64_t h, bool* of_keys) const {
    std::fill_n(of_keys, p.Tk, false);
    if (!mask) {
      for (int64_t i = 0; i < p.Tq; ++i) {
        const KeyRange keys = p.keys_of(b, h, i);
        std::fill(of_keys + keys.first, of_keys + keys.end, true);
      }
      return;
    }
    const bool* rows = p.mask + b * p.mask_stride[0] + h * p.mask_stride[1];
    const int64_t step = p.mask_stride[3];
    // Of a mask without rows of its own the last query sees most, unless windows end.
    const bool is_one_row = p.mask_stride[2] == 0 && p.options.window_left < 0 && p.center == nullptr;
    for (int64_t i = is_one_row ? std::max<int64_t>(p.Tq - 1, 0) : 0; i < p.Tq; ++i) {
      const bool* row = rows + i * p.mask_stride[2];
      const KeyRange keys = p.keys_of(b, h, i);
      if (step == 1)  // vectorised
        for (int64_t j = keys.first; j < keys.end; ++j) of_keys[j] |= row[j];
      else
        for (int64_t j = keys.first; j < keys.end; ++j) of_keys[j] |= row[j * step];
      if (i % 16 == 15 && std::find(of_keys, of_keys + p.Tk, false) == of_keys + p.Tk) return;
    }
  }

  // See AttentionProblem.
  void find_hulls() {
    const int64_t blocks = ceil_div(p.Tq, QUERY_BLOCK);
    const int64_t heads = p.center_stride[1] == 0 ? 1 : p.H, batches = p.center_stride[0] == 0 ? 1 : p.B;
    const int64_t all = p.B * p.H == 0 ? 0 : batches * heads;
    p.hull_stride[0] = p.center_stride[0] == 0 ? 0 : heads * blocks;
    p.hull_stride[1] = p.center_stride[1] == 0 ? 0 : blocks;
    hulls = Buffer<KeyRange>(all * blocks);
    p.hulls = hulls.get();
    for (int64_t n = 0; n < all * blocks; ++n) {
      const int64_t head = n / blocks, first = n % blocks * QUERY_BLOCK;
      KeyRange hull{p.Tk, 0};
      for (int64_t i = first; i < std::min(p.Tq, first + QUERY_BLOCK); ++i) {
        const KeyRange keys = p.keys_of(head / heads, head % heads, i);
        if (keys.first >= keys.end) continue;
        hull = {std::min(hull.first, keys.first), std::max(hull.end, keys.end)};
      }
      hulls.get()[n] = hull;
    }
  }

  // Of a row of a chunk: the keys in its window, and the columns at which the rows of its scores hold numbers.
  struct RowKeys {
    KeyRange keys, columns;
  };
  RowKeys keys_of_row(const Chunk& chunk, int64_t row) const {
    const KeyRange all{0, p.Tk};
    if (!has_window(p.options)) return {all, all};
    const int64_t n = chunk.first_head + row / chunk.queries, i = chunk.first_query + row % chunk.queries;
    return {p.keys_of(n / p.H, n % p.H, i), p.columns_of(n / p.H, n % p.H, i)};
  }

  // (B, H, ...), or (B, ...) without heads.
  std::vector<int64_t> shape(std::initializer_list<int64_t> rest) const {
    std::vector<int64_t> sizes{p.B};
    if (!flat) sizes.push_back(p.H);
    sizes.insert(sizes.end(), rest);
    return sizes;
  }

  Tensor empty(std::initializer_list<int64_t> rest, ScalarType type = scalar_type<S>()) const {
    return fusedattn::empty(shape(rest), type);
  }

  Tensor empty_if(bool is_asked, std::initializer_list<int64_t> rest) const {
    return is_asked ? empty(rest) : fusedattn::empty({0}, scalar_type<S>());
  }

  int64_t rows() const { return p.B * p.H * p.Tq; }

  // body(chunk, first row of the chunk among all B H Tq rows)
  template <typename Body>
  void for_each_chunk(const Body& body) const {
    for (int64_t head = 0; head < p.B * p.H; head += chunk_heads)
      for (int64_t i = 0; i < p.Tq; i += chunk_rows)
        body(Chunk{head, std::min(chunk_heads, p.B * p.H - head), i, std::min(chunk_rows, p.Tq - i)},
             head * p.Tq + i);
  }

  void prepare_queries(const Chunk& chunk) const {
    parallel<T>(chunk.heads * chunk.queries, grain_for(p.D), 0, [&](int64_t first, int64_t last, T*) {
      for (int64_t row = first; row < last; ++row) fwd<S>().prepare_query(p, chunk, row);
    });
  }

  // body(head, first key of a block, scratch)
  template <typename Body>
  void for_each_key_block(const Chunk& chunk, int64_t cost, const Body& body) const {
    const int64_t blocks = ceil_div(p.Tk, KEY_BLOCK);
    parallel<T>(chunk.heads * blocks, grain_for(KEY_BLOCK * chunk.queries * cost / 4),
                score_scratch(p, fwd<S>().lanes), [&](int64_t first, int64_t last, T* scratch) {
                  for (int64_t task = first; task < last; ++task)
                    body(task / blocks, task % blocks * KEY_BLOCK, scratch);
                });
  }

  void score(const Chunk& chunk, T* scores) const {
    for_each_key_block(chunk, p.D, [&](int64_t head, int64_t first_key, T* scratch) {
      fwd<S>().score(p, chunk, head, first_key, scores, scratch);
    });
  }

  // Into how many parts to cut the keys of each of `tasks` tasks, so that every core has work: whatever their
  // number, for on it would hang how results are rounded.
  int64_t key_splits(int64_t tasks) const {
    if (tasks >= SPLIT_TASKS || p.Tk < 8 * KEY_BLOCK) return 1;
    return std::min(ceil_div(SPLIT_TASKS, std::max<int64_t>(tasks, 1)), p.Tk / (4 * KEY_BLOCK));
  }
};

}  // namespace
}  // namespace fusedattn
