// CPU launcher of location_attention: location features block by block of keys, which stay in the first-level
// cache. Their convolution and projection, and the transposed ones of the gradients, are matrix products: row j of
// a convolution's is the previous weights from j on. Work is cut by shape alone and partial sums are added in
// order: results are the same bits for any number of threads.
#include <algorithm>
#include <limits>
#include <tuple>

#include "additive_attention/cpu_inputs.h"
#include "additive_attention/cpu_score_gradients.h"
#include "additive_scores/options.h"
#include "common/box.h"
#include "cpu_kernel.h"

namespace fusedattn {
namespace {

constexpr int64_t BLOCK = 2 * KEY_BLOCK;  // keys whose features are made at a time
constexpr int64_t MOST_SUMS = 128;        // partial sums of each gradient of a parameter

template <typename S>
const LocationKernels<S>& kernels();
#define FUSEDATTN_LOCATION_TYPE(S, suffix)           \
  template <>                                        \
  const LocationKernels<S>& kernels<S>() {           \
    return FUSEDATTN_LEVEL_TABLE(location_##suffix); \
  }
FUSEDATTN_LOCATION_TYPE(float, f32)
FUSEDATTN_LOCATION_TYPE(double, f64)
FUSEDATTN_LOCATION_TYPE(Half, f16)
FUSEDATTN_LOCATION_TYPE(BFloat16, bf16)

// out (count, columns, rows) of x (count, rows, columns)
template <typename T>
Buffer<T> transposed(const T* x, int64_t count, int64_t rows, int64_t columns) {
  Buffer<T> out(count * rows * columns);
  for (int64_t n = 0; n < count * rows; ++n)
    for (int64_t c = 0; c < columns; ++c)
      out.get()[(n / rows * columns + c) * rows + n % rows] = x[n * columns + c];
  return out;
}

// The inputs that are not those of additive attention. N filters: as many as channels of the score where no
// projection follows. Parameters are those of G groups of neighbouring batch elements.
template <typename S>
struct Location {
  using T = Arithmetic<S>;
  const Inputs<S>& in;
  Tensor query, weight, previous, filters, projection;  // (B,Tq,D), (G,D), (B,Tq,C,Tk), (G,N,C,K), (G,D,N) or (0,)
  bool projects;
  int64_t G, N, C, K, splits, part;                  // keys are cut into `splits` parts of whole blocks
  Buffer<T> filters_by_place, projection_by_filter;  // (G, C, K, N) without a projection, else (G, N, D)

  Location(const Inputs<S>& in_, const Tensor& weight_, const Tensor& previous_, const Tensor& conv_weight,
           const OptionalTensor& location_weight)
      : in(in_),
        query(contiguous(in.query, scalar_type<T>())),
        weight(contiguous(weight_, scalar_type<T>())),
        previous(contiguous(previous_, scalar_type<T>())),
        filters(contiguous(conv_weight, scalar_type<T>())),
        projection(location_weight ? contiguous(*location_weight, scalar_type<T>())
                                   : fusedattn::empty({0}, scalar_type<T>())),
        projects(location_weight.has_value()) {
    const auto& p = in.p;
    STD_TORCH_CHECK(in.flat && filters.dim() == 4,
                    "location_attention: query, key and value must have 3 dimensions");
    G = filters.size(0), N = filters.size(1), C = filters.size(2), K = filters.size(3);
    STD_TORCH_CHECK(G > 0 && p.B % G == 0, "location_attention: expected parameters for groups of ", p.B,
                    " elements");
    STD_TORCH_CHECK(
        K % 2 == 1 && (projects || N == p.D),
        "location_attention: conv_weight: expected an odd width, and D filters without location_weight");
    check_shape(previous, "previous", {p.B, p.Tq, C, p.Tk});
    check_shape(weight, "weight", {G, p.D});
    if (projects) check_shape(projection, "location_weight", {G, p.D, N});
    part = ceil_div(ceil_div(std::max<int64_t>(p.Tk, 1), in.key_splits(p.B)), BLOCK) * BLOCK;
    splits = ceil_div(std::max<int64_t>(p.Tk, 1), part);
    if (projects)
      projection_by_filter = transposed(data_of<T>(projection), G, p.D, N);
    else
      filters_by_place = transposed(data_of<T>(filters), G, N, C * K);
  }

  int64_t group(int64_t b) const { return b / (in.p.B / G); }

  // The working memory of one block of keys. Lanes run over keys where there are few filters: of a convolution by
  // N of them, N / 16 of all lanes would be at work.
  struct Scratch {
    T *padded, *filtered, *features;  // (C, BLOCK + K - 1), (N, BLOCK), (BLOCK, D)
  };
  int64_t scratch_size() const { return C * (BLOCK + K - 1) + BLOCK * (N + in.p.D); }
  Scratch scratch_at(T* room) const {
    T* const filtered = room + C * (BLOCK + K - 1);
    return {room, filtered, filtered + BLOCK * N};
  }

  // Of `keys` keys from `first` on, for query i: the previous weights around them, with zeros at either end; what
  // the projection takes, if there is one; and the features.
  void make_features(int64_t b, int64_t i, int64_t first, int64_t keys, const Scratch& s) const {
    const int64_t Tk = in.p.Tk, width = BLOCK + K - 1, from = first - (K - 1) / 2;
    const int64_t before = std::clamp<int64_t>(-from, 0, width), end = std::clamp(Tk - from, before, width);
    for (int64_t c = 0; c < C; ++c) {
      const T* row = data_of<T>(previous) + ((b * in.p.Tq + i) * C + c) * Tk + from;
      T* const out = s.padded + c * width;
      std::fill(out, out + before, T(0));
      std::copy(row + before, row + end, out + before);
      std::fill(out + end, out + width, T(0));
    }
    for (int64_t c = 0; c < C; ++c) {
      const T* const x = s.padded + c * width;
      const Output output = c == 0 ? Output::WRITTEN : Output::ADDED;
      if (projects)
        products<T>().matmul(N, keys, K, data_of<T>(filters) + (group(b) * N * C + c) * K, C * K, 1, x, 1, nullptr,
                             s.filtered, BLOCK, output);
      else
        products<T>().matmul(keys, N, K, x, 1, 1, filters_by_place.get() + (group(b) * C + c) * K * N, N, nullptr,
                             s.features, N, output);
    }
    if (projects)
      products<T>().matmul(keys, in.p.D, N, s.filtered, 1, BLOCK,
                           projection_by_filter.get() + group(b) * N * in.p.D, in.p.D, nullptr, s.features, in.p.D,
                           Output::WRITTEN);
  }

  LocationRows<S> rows(int64_t b, int64_t i, int64_t first, int64_t keys) const {
    const auto& p = in.p;
    const T* const of_query = data_of<T>(query) + (b * p.Tq + i) * p.D;
    return {keys,     p.D, p.key.row(b, 0, first), p.key.stride_t, of_query, data_of<T>(weight) + group(b) * p.D,
            p.options};
  }

  bool sees(int64_t b, int64_t i, int64_t j) const {
    const auto& p = in.p;
    return p.mask == nullptr || p.mask[b * p.mask_stride[0] + i * p.mask_stride[2] + j * p.mask_stride[3]];
  }

  // body(first key, keys) of the blocks of a part
  template <typename Body>
  void for_each_block(int64_t split, const Body& body) const {
    const int64_t end = std::min((split + 1) * part, in.p.Tk);
    for (int64_t j = split * part; j < end; j += BLOCK) body(j, std::min(BLOCK, end - j));
  }
};

template <typename S, typename T = Arithmetic<S>>
void make_scores(const Location<S>& m, T* scores) {
  const auto& p = m.in.p;
  const int64_t cost = m.part * (p.D + (m.C * m.K + p.D) * m.N / 16), tasks = p.B * p.Tq * m.splits;
  parallel<T>(tasks, grain_for(cost), m.scratch_size(), [&](int64_t from, int64_t to, T* room) {
    const auto scratch = m.scratch_at(room);
    for (int64_t task = from; task < to; ++task) {
      const int64_t row = task / m.splits, b = row / p.Tq, i = row % p.Tq;
      m.for_each_block(task % m.splits, [&](int64_t j, int64_t keys) {
        T* const out = scores + row * p.Tk + j;
        int64_t begin = 0, end = keys;
        while (begin < end && !m.sees(b, i, j + begin)) ++begin;
        while (begin < end && !m.sees(b, i, j + end - 1)) --end;
        if (begin < end) {
          m.make_features(b, i, j + begin, end - begin, scratch);
          kernels<S>().scores(m.rows(b, i, j + begin, end - begin), scratch.features, out + begin);
        }
        for (int64_t c = 0; c < keys; ++c)
          if (!m.sees(b, i, j + c)) out[c] = -std::numeric_limits<T>::infinity();
      });
    }
  });
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename S, typename T = Arithmetic<S>>
Forward forward(const Location<S>& m, bool attends) {
  const auto& in = m.in;
  const auto& p = in.p;
  const ScalarType type = scalar_type<S>(), acc = scalar_type<T>();
  const Tensor scores = in.empty({p.Tq, p.Tk}, acc);
  make_scores(m, mutable_data_of<T>(scores));
  if (!attends) return {empty({0}, type), empty({0}, type), scores, empty({0}, acc)};
  const Tensor context = in.empty({p.Tq, p.Dv}), weights = in.empty({p.Tq, p.Tk}), lse = in.empty({p.Tq}, acc);
  const int64_t unrounded_size = IS_NARROW<S> ? p.Tk + p.Dv : 0;
  parallel<T>(in.rows(), grain_for(p.Tk * p.Dv / 16), unrounded_size, [&](int64_t first, int64_t last, T* room) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t b = row / p.Tq;
      S* const weights_out = mutable_data_of<S>(weights) + row * p.Tk;
      S* const context_out = mutable_data_of<S>(context) + row * p.Dv;
      T *const w = unrounded(weights_out, room), *const c = unrounded(context_out, room + p.Tk);
      mutable_data_of<T>(lse)[row] = fwd<S>().softmax({0, p.Tk}, {0, p.Tk}, data_of<T>(scores) + row * p.Tk, w);
      products<S>().matmul(1, p.Dv, p.visible_keys(b, 0), w, p.Tk, 1, p.value.row(b, 0, 0), p.value.stride_t,
                           p.seen_keys(b, 0), c, p.Dv, Output::WRITTEN);
      round_into(weights_out, w, p.Tk);
      round_into(context_out, c, p.Dv);
    }
  });
  return {context, weights, scores, lse};
}

// Of keys or values: (B, Tk, width), or (0,) if it was not asked for.
template <typename S>
HeadGradients<S> rows_of(const Tensor& gradient, int64_t width, const Inputs<S>& in) {
  const bool is_streamed = passes_caches(gradient, width * gradient.element_size());
  return {gradient_data<S>(gradient), width, is_streamed, in};
}

// Sums that tasks have a part of each, `size` numbers; none where they were not asked for.
template <typename T>
class Parts {
 public:
  Parts(bool asked, int64_t tasks, int64_t size) : tasks_(tasks), size_(asked ? size : 0), memory_(tasks * size_) {
    std::fill_n(memory_.get(), tasks_ * size_, T(0));
  }
  explicit operator bool() const { return size_ > 0; }
  T* of(int64_t task) const { return memory_.get() + task * size_; }

  // Of each group of neighbouring tasks, whose sum is (columns, rows), to out (groups, rows, columns).
  void write_sums(int64_t groups, int64_t rows, int64_t columns, T* out) const {
    const int64_t each = tasks_ / groups;
    parallel_for(groups, grain_for(each * size_), [&](int64_t from, int64_t to) {
      for (int64_t group = from; group < to; ++group) {
        std::vector<double> total(size_);
        for (int64_t task = group * each; task < (group + 1) * each; ++task)
          for (int64_t n = 0; n < size_; ++n) total[n] += of(task)[n];
        for (int64_t n = 0; n < size_; ++n)
          out[(group * rows + n % rows) * columns + n / rows] = static_cast<T>(total[n]);
      }
    });
  }

 private:
  int64_t tasks_, size_;
  Buffer<T> memory_;
};

// The gradients of what stands before the softmax, by parts of the keys and groups of batch elements.
template <typename S>
class FeatureGradients {
 public:
  using T = Arithmetic<S>;
  Tensor query, key, weight, previous, filters, projection;

  // `key_sum` (B, Tk, D): what is added to in place of a gradient of the keys of their own.
  FeatureGradients(const Location<S>& m, OutputMask asked, const OptionalTensor& key_sum)
      : query(made(asked[0], {m.in.p.B, m.in.p.Tq, m.in.p.D}, scalar_type<S>())),
        key(made(asked[1], {m.in.p.B, m.in.p.Tk, m.in.p.D}, scalar_type<S>())),
        weight(made(asked[3], {m.G, m.in.p.D})),
        previous(made(asked[4], {m.in.p.B, m.in.p.Tq, m.C, m.in.p.Tk})),
        filters(made(asked[5], {m.G, m.N, m.C, m.K})),
        projection(made(asked[6] && m.projects, {m.G, m.in.p.D, m.N})),
        m_(m),
        batches_(std::max<int64_t>(ceil_div(m.in.p.B, MOST_SUMS), 1)),
        runs_(ceil_div(m.in.p.B / m.G, batches_)),
        tasks_(m.G * runs_ * m.splits),
        width_(m.part + m.K - 1),
        dquery_(true, m.in.rows() * m.splits, m.in.p.D),
        dweight_(true, tasks_, m.in.p.D),
        dprevious_(asked[4], m.in.rows() * m.splits, m.C * width_),
        dfilters_(asked[5], tasks_, m.C * m.K * m.N),
        dprojection_(asked[6] && m.projects, tasks_, m.N * m.in.p.D),
        grad_key_(rows_of(key, m.in.p.D, m.in)),
        key_sum_(key_sum ? mutable_data_of<T>(*key_sum) : nullptr) {}

  // From those of unscaled scores (B, Tq, Tk).
  void make(const T* g) {
    const int64_t B = m_.in.p.B, sizes = m_.scratch_size() + BLOCK * (m_.in.p.D + m_.N + m_.C * m_.K);
    parallel<T>(tasks_, 1, sizes, [&](int64_t from, int64_t to, T* room) {
      for (int64_t task = from; task < to; ++task) {
        const int64_t group = task / m_.splits / runs_, of_group = B / m_.G;
        const int64_t first = task / m_.splits % runs_ * batches_, last = std::min(first + batches_, of_group);
        for (int64_t b = first; b < last; ++b) add_part(task, group * of_group + b, g, room);
      }
    });
    finish();
  }

 private:
  static Tensor made(bool asked, const std::vector<int64_t>& shape, ScalarType type = scalar_type<T>()) {
    return fusedattn::empty(asked ? shape : std::vector<int64_t>{0}, type);
  }

  int64_t row(int64_t b, int64_t i, int64_t split) const { return (b * m_.splits + split) * m_.in.p.Tq + i; }

  void add_part(int64_t task, int64_t b, const T* g, T* room) const {
    const auto& p = m_.in.p;
    const int64_t split = task % m_.splits, block_width = BLOCK + m_.K - 1;
    const auto scratch = m_.scratch_at(room);
    const T* const filters = data_of<T>(m_.filters) + m_.group(b) * m_.N * m_.C * m_.K;
    T* const of_block = room + m_.scratch_size();
    T *const dfiltered = of_block + BLOCK * p.D, *const diagonals = dfiltered + BLOCK * m_.N;
    const GradientRows<S> grad_key = grad_key_.rows(Chunk{0, p.B, 0, p.Tq}, b);
    m_.for_each_block(split, [&](int64_t j, int64_t keys) {
      T* const dkey = key_sum_ ? key_sum_ + (b * p.Tk + j) * p.D : grad_key_.asked() ? of_block : nullptr;
      if (dkey == of_block) std::fill_n(dkey, keys * p.D, T(0));
      for (int64_t i = 0; i < p.Tq; ++i) {
        const T* const own = g + (b * p.Tq + i) * p.Tk + j;
        if (std::all_of(own, own + keys, [](T x) { return x == 0; })) continue;
        m_.make_features(b, i, j, keys, scratch);
        T* const dz = scratch.features;
        kernels<S>().gradients(m_.rows(b, i, j, keys), own, dz, dquery_.of(row(b, i, split)), dweight_.of(task),
                               dkey);
        const T* dconvolved = dz;
        if (dprojection_)
          products<T>().matmul(m_.N, p.D, keys, scratch.filtered, BLOCK, 1, dz, p.D, nullptr,
                               dprojection_.of(task), p.D, Output::ADDED);
        if (!dfilters_ && !dprevious_) continue;
        if (m_.projects) {
          products<T>().matmul(keys, m_.N, p.D, dz, p.D, 1, data_of<T>(m_.projection) + m_.group(b) * p.D * m_.N,
                               m_.N, nullptr, dfiltered, m_.N, Output::WRITTEN);
          dconvolved = dfiltered;
        }
        for (int64_t c = 0; c < m_.C && dfilters_; ++c)
          add_filters(keys, dconvolved, scratch.padded + c * block_width, c, dfilters_.of(task));
        if (!dprevious_) continue;
        products<T>().matmul(keys, m_.C * m_.K, m_.N, dconvolved, m_.N, 1, filters, m_.C * m_.K, nullptr,
                             diagonals, m_.C * m_.K, Output::WRITTEN);
        kernels<S>().add_diagonals(keys, m_.C, m_.K, diagonals,
                                   dprevious_.of(row(b, i, split)) + j - split * m_.part, width_);
      }
      if (dkey == of_block) kernels<S>().write(grad_key, j * p.D, dkey, keys * p.D);
    });
  }

  // Gradients of the filters of channel c: (N, C K) where a projection follows, else, of as many filters as
  // channels of the score, (C K, N).
  void add_filters(int64_t keys, const T* dconvolved, const T* x, int64_t c, T* out) const {
    const int64_t N = m_.N, K = m_.K, taps = m_.C * K;
    if (m_.projects)
      products<T>().matmul(N, K, keys, dconvolved, 1, N, x, 1, nullptr, out + c * K, taps, Output::ADDED);
    else
      products<T>().matmul(K, N, keys, x, 1, 1, dconvolved, N, nullptr, out + c * K * N, N, Output::ADDED);
  }

  // What was asked for, from the parts.
  void finish() const {
    const auto& p = m_.in.p;
    const bool of_query = query.numel() > 0;
    parallel<T>(m_.in.rows(), grain_for(p.D + m_.C * p.Tk), p.D, [&](int64_t from, int64_t to, T* total) {
      for (int64_t n = from; n < to; ++n) {
        const int64_t b = n / p.Tq, i = n % p.Tq;
        if (of_query) {
          std::fill_n(total, p.D, T(0));
          for (int64_t s = 0; s < m_.splits; ++s)
            for (int64_t d = 0; d < p.D; ++d) total[d] += dquery_.of(row(b, i, s))[d];
          fwd<S>().narrow(p.D, total, mutable_data_of<S>(query) + n * p.D);
        }
        if (dprevious_) add_previous(b, i, mutable_data_of<T>(previous) + n * m_.C * p.Tk);
      }
    });
    if (weight.numel() > 0) dweight_.write_sums(m_.G, 1, p.D, mutable_data_of<T>(weight));
    const int64_t taps = m_.C * m_.K;
    if (dfilters_ && m_.projects)
      dfilters_.write_sums(m_.G, 1, m_.N * taps, mutable_data_of<T>(filters));
    else if (dfilters_)
      dfilters_.write_sums(m_.G, m_.N, taps, mutable_data_of<T>(filters));
    if (dprojection_) dprojection_.write_sums(m_.G, p.D, m_.N, mutable_data_of<T>(projection));
  }

  // The parts of neighbours overlap by what a filter reaches over.
  void add_previous(int64_t b, int64_t i, T* out) const {
    const int64_t Tk = m_.in.p.Tk;
    std::fill_n(out, m_.C * Tk, T(0));
    for (int64_t s = 0; s < m_.splits; ++s) {
      const T* const part = dprevious_.of(row(b, i, s));
      const int64_t first = s * m_.part - (m_.K - 1) / 2;
      for (int64_t c = 0; c < m_.C; ++c)
        for (int64_t t = std::max<int64_t>(0, -first); t < std::min(width_, Tk - first); ++t)
          out[c * Tk + first + t] += part[c * width_ + t];
    }
  }

  const Location<S>& m_;
  int64_t batches_, runs_, tasks_;  // batch elements of a task, such tasks of a group and a part, tasks of all
  int64_t width_;                   // of a part of the previous weights
  Parts<T> dquery_, dweight_, dprevious_, dfilters_, dprojection_;
  HeadGradients<S> grad_key_;
  T* key_sum_;
};

constexpr int VALUE = 2;  // among the inputs

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename S, typename T = Arithmetic<S>>
Gradients backward(const Location<S>& m, const OptionalTensor& grad_context, const OptionalTensor& grad_weights,
                   const OptionalTensor& grad_scores, bool attends, const Tensor& scores, const Tensor& lse,
                   const OptionalTensor& key_sum, OutputMask asked) {
  const auto& in = m.in;
  const auto& p = in.p;
  const Chunk all{0, p.B, 0, p.Tq};
  Tensor value = fusedattn::empty(
      attends && asked[VALUE] ? std::vector<int64_t>{p.B, p.Tk, p.Dv} : std::vector<int64_t>{0}, scalar_type<S>());
  const HeadGradients<S> grad_value = rows_of(value, p.Dv, in);
  const Buffer<T> probabilities(in.rows() * p.Tk), g(in.rows() * p.Tk);
  const bool through_softmax = attends && (grad_context || grad_weights);
  std::fill_n(g.get(), in.rows() * p.Tk, T(0));
  const bool of_features = key_sum || (asked.bits & ~(int64_t{1} << VALUE)) != 0;
  if (grad_context && of_features)
    in.for_each_key_block(all, p.Dv / 4, [&](int64_t b, int64_t first_key, T* scratch) {
      products<S>().grad_weights(p, all, b, first_key, data_of<T>(*grad_context) + b * p.Tq * p.Dv, p.Dv, g.get(),
                                 scratch);
    });
  const T scale = static_cast<T>(p.options.scale);
  const T inverse_cap = p.options.softcap != 0 ? static_cast<T>(1 / p.options.softcap) : T(0);
  parallel<T>(in.rows(), grain_for(p.Tk), 0, [&](int64_t first, int64_t last, T*) {
    for (int64_t row = first; row < last; ++row) {
      const T* const s = data_of<T>(scores) + row * p.Tk;
      T* const g_row = g.get() + row * p.Tk;
      if (grad_weights) fwd<S>().widen(p.Tk, data_of<S>(*grad_weights) + row * p.Tk, g_row, true);
      if (through_softmax)
        bwd<S>().grad_scores(p, {0, p.Tk}, {0, p.Tk}, s, s, data_of<T>(lse)[row], T(0),
                             probabilities.get() + row * p.Tk, g_row, nullptr);
      for (int64_t j = 0; grad_scores && j < p.Tk; ++j) {
        const T capped = s[j] * inverse_cap;
        if (s[j] != -std::numeric_limits<T>::infinity())
          g_row[j] += data_of<T>(*grad_scores)[row * p.Tk + j] * scale * (1 - capped * capped);
      }
    }
  });
  if (grad_value.asked() && !grad_context) torch::stable::zero_(value);
  if (grad_value.asked() && grad_context)
    in.for_each_key_block(all, p.Dv / 4, [&](int64_t b, int64_t first_key, T* scratch) {
      products<S>().grad_values(p, all, b, first_key, probabilities.get(),
                                data_of<T>(*grad_context) + b * p.Tq * p.Dv, p.Dv, grad_value.rows(all, b),
                                scratch);
    });
  FeatureGradients<S> grads(m, asked, key_sum);
  if (of_features) grads.make(g.get());
  return {grads.query, grads.key, value, grads.weight, grads.previous, grads.filters, grads.projection};
}

// Where there is no value, the keys stand for values, at which nobody looks; and one weight for all.
template <typename S>
Inputs<S> inputs(const Tensor& query, const Tensor& key, const OptionalTensor& value, const Tensor& weight,
                 const OptionalTensor& mask, const ScoresOptions& options) {
  return Inputs<S>(
      query, key, value ? *value : key, torch::stable::select(weight, 0, 0), {}, mask, {}, {}, {}, {},
      AttentionOptions{-1, -1, options.scale, options.softcap, options.activation, options.negative_slope});
}

Forward location_attention_fwd(const Tensor& query, const Tensor& key, const OptionalTensor& value,
                               const Tensor& weight, const Tensor& previous, const Tensor& conv_weight,
                               const OptionalTensor& location_weight, const OptionalTensor& mask,
                               const ScoresOptions& options) {
  return with_storage(query.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const Inputs<S> in = inputs<S>(query, key, value, weight, mask, options);
    return forward(Location<S>(in, weight, previous, conv_weight, location_weight), value.has_value());
  });
}

Gradients location_attention_step_bwd(const OptionalTensor& grad_context, const OptionalTensor& grad_weights,
                                      const OptionalTensor& grad_scores, const Tensor& query, const Tensor& key,
                                      const OptionalTensor& value, const Tensor& weight, const Tensor& previous,
                                      const Tensor& conv_weight, const OptionalTensor& location_weight,
                                      const OptionalTensor& mask, const ScoresOptions& options,
                                      const Tensor& scores, const Tensor& lse, const OptionalTensor& key_sum,
                                      OutputMask asked) {
  return with_storage(query.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const ScalarType type = scalar_type<S>(), acc = scalar_type<Arithmetic<S>>();
    const auto given = [](const OptionalTensor& t, ScalarType as) { return t ? contiguous(*t, as) : t; };
    const Inputs<S> in = inputs<S>(query, key, value, weight, mask, options);
    const auto& p = in.p;
    if (grad_context) check_shape(*grad_context, "grad_context", {p.B, p.Tq, p.Dv});
    for (const OptionalTensor* t : {&grad_weights, &grad_scores})
      if (*t) check_shape(**t, "gradients of weights and scores", {p.B, p.Tq, p.Tk});
    STD_TORCH_CHECK(!key_sum || (key_sum->scalar_type() == acc && key_sum->is_contiguous()),
                    "location_attention: key_sum: expected a contiguous tensor in the dtype of the arithmetic");
    if (key_sum) check_shape(*key_sum, "key_sum", {p.B, p.Tk, p.D});
    return backward(Location<S>(in, weight, previous, conv_weight, location_weight), given(grad_context, acc),
                    given(grad_weights, type), given(grad_scores, acc), value.has_value(), contiguous(scores, acc),
                    contiguous(lse, acc), key_sum, asked);
  });
}

Gradients location_attention_bwd(const OptionalTensor& grad_context, const OptionalTensor& grad_weights,
                                 const OptionalTensor& grad_scores, const Tensor& query, const Tensor& key,
                                 const OptionalTensor& value, const Tensor& weight, const Tensor& previous,
                                 const Tensor& conv_weight, const OptionalTensor& location_weight,
                                 const OptionalTensor& mask, const ScoresOptions& options, const Tensor& scores,
                                 const Tensor& lse, OutputMask asked) {
  return location_attention_step_bwd(grad_context, grad_weights, grad_scores, query, key, value, weight, previous,
                                     conv_weight, location_weight, mask, options, scores, lse, {}, asked);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CPU, m) {
  m.impl("location_attention_fwd", boxed<location_attention_fwd>);
  m.impl("location_attention_bwd", boxed<location_attention_bwd>);
  m.impl("location_attention_step_bwd", boxed<location_attention_step_bwd>);
}

}  // namespace fusedattn
