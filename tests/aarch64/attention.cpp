// Additive attention: the phases of cpu.cpp.
#include "additive_attention/cpu_kernel.h"
#include "additive_attention/formula.h"
#include "harness.h"

namespace fusedattn {
namespace {

struct AttentionCase {
  const char* name;
  int64_t B, H, Tq, Tk, D, Dv;
  double size;  // of query and key: products of four, of two denominators, or sums
  AttentionOptions options;
  bool masked, exponentials_at_hand, infinite_weight, biased = false;
};

// The phases of cpu.cpp over one chunk that holds every row.
template <typename S>
void attention(const AttentionCase& c, const AttentionFwdKernels<S>& fwd, const AttentionBwdKernels<S>& bwd,
               const AttentionProducts<S>& products, double rounding, Results& results) {
  using T = Arithmetic<S>;
  Random random{42};
  const auto stored = [&](int64_t n, double size) {
    std::vector<S> rounded(n);
    fwd.narrow(n, random.numbers<T>(n, size).data(), rounded.data());
    return rounded;
  };
  const auto wide = [&](const std::vector<S>& numbers) {
    std::vector<T> x(numbers.size());
    fwd.widen(x.size(), numbers.data(), x.data(), false);
    return x;
  };
  const int64_t heads = c.B * c.H, lanes = fwd.lanes, padded = (c.D + lanes - 1) / lanes * lanes;
  const auto query = stored(heads * c.Tq * c.D, c.size), key = stored(heads * c.Tk * c.D, c.size),
             value = stored(heads * c.Tk * c.Dv, 1);
  const auto grad_context = random.numbers<T>(heads * c.Tq * c.Dv);
  const auto grad_lse = random.numbers<T>(heads * c.Tq);
  std::vector<T> weight(c.H * padded), scaled(c.H * padded), weight_max(c.H), weight_sum(c.H), key_exp;
  for (int64_t h = 0; h < c.H; ++h) {
    weight_max[h] = 1;
    for (int64_t d = 0; d < c.D; ++d)
      weight[h * padded + d] = scaled[h * padded + d] = static_cast<T>(random.next());
    if (c.infinite_weight) weight[h * padded] = scaled[h * padded] = std::numeric_limits<T>::infinity();
    for (int64_t d = 0; d < c.D; ++d) weight_sum[h] += scaled[h * padded + d];
  }
  std::vector<T> query_exp(heads * c.Tq * padded), query_bound(heads * c.Tq);
  std::vector<int64_t> lengths(c.B);
  for (int64_t b = 0; b < c.B; ++b) lengths[b] = c.Tk - 3 * b;
  std::vector<char> mask(heads * c.Tq * c.Tk);
  for (char& visible : mask) visible = random.next() > -0.5;
  std::vector<char> seen(heads * c.Tk);
  std::vector<int64_t> seen_end(heads, c.Tk);
  for (int64_t n = 0; n < heads * c.Tk; ++n) {
    seen[n] = n % 5 != 1;
    for (int64_t i = 0; i < c.Tq && !seen[n]; ++i) mask[(n / c.Tk * c.Tq + i) * c.Tk + n % c.Tk] = false;
  }
  if (c.exponentials_at_hand)
    for (T k : wide(key)) key_exp.push_back(std::exp(2 * k));

  AttentionProblem<S> p = {};
  p.B = c.B, p.H = c.H, p.Tq = c.Tq, p.Tk = c.Tk, p.D = c.D, p.Dv = c.Dv, p.D_padded = padded;
  p.query = {query.data(), c.H * c.Tq * c.D, c.Tq * c.D, c.D};
  p.key = {key.data(), c.H * c.Tk * c.D, c.Tk * c.D, c.D};
  p.value = {value.data(), c.H * c.Tk * c.Dv, c.Tk * c.Dv, c.Dv};
  p.key_exp = c.exponentials_at_hand ? key_exp.data() : nullptr, p.key_bound = static_cast<T>(c.size);
  if (c.masked) {
    p.mask = reinterpret_cast<const bool*>(mask.data()), p.key_lengths = lengths.data();
    p.mask_stride[0] = c.H * c.Tq * c.Tk, p.mask_stride[1] = c.Tq * c.Tk, p.mask_stride[2] = c.Tk,
    p.mask_stride[3] = 1;
    p.seen = reinterpret_cast<const bool*>(seen.data()), p.seen_end = seen_end.data();
    p.seen_stride[0] = c.H, p.seen_stride[1] = 1;
  }
  p.options = c.options, p.argument = static_cast<T>(factors_of(c.options.activation).argument);
  p.weight = weight.data(), p.weight_scaled = scaled.data();
  p.weight_max = weight_max.data(), p.weight_sum = weight_sum.data();
  p.query_exp = query_exp.data(), p.query_bound = query_bound.data();
  const Chunk chunk{0, heads, 0, c.Tq};
  const auto dc = [&](int64_t head) { return &grad_context[head * c.Tq * c.Dv]; };

  std::vector<T> scores(heads * c.Tq * c.Tk), weights(scores.size()), lse(heads * c.Tq),
      context(heads * c.Tq * c.Dv);
  std::vector<T> score_memory(score_scratch(p, lanes)), memory(backward_scratch(p, chunk, lanes));
  for (int64_t row = 0; row < heads * c.Tq; ++row) fwd.prepare_query(p, chunk, row);
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t j = 0; j < c.Tk; j += KEY_BLOCK) fwd.score(p, chunk, head, j, scores.data(), score_memory.data());
  std::vector<T> biased = scores, grad_bias(scores.size());
  const auto bias = stored(2 * c.Tk, 3);
  const auto wide_bias = random.numbers<T>(c.Tk);
  for (int64_t row = 0; row < heads * c.Tq && c.biased; ++row) {
    fwd.add_bias(c.Tk, &scores[row * c.Tk], bias.data(), 2, &biased[row * c.Tk]);
    fwd.add_wide_bias(c.Tk, &biased[row * c.Tk], wide_bias.data(), 1, &biased[row * c.Tk]);
  }
  const auto keys_of = [&](int64_t row) { return p.keys_of(row / c.Tq / c.H, row / c.Tq % c.H, row % c.Tq); };
  const KeyRange columns{0, c.Tk};
  for (int64_t row = 0; row < heads * c.Tq; ++row)
    lse[row] = fwd.softmax(keys_of(row), columns, &biased[row * c.Tk], &weights[row * c.Tk]);
  for (int64_t head = 0; head < heads; ++head)
    products.matmul(c.Tq, c.Dv, c.Tk, &weights[head * c.Tq * c.Tk], c.Tk, 1,
                    p.value.row(head / c.H, head % c.H, 0), c.Dv, p.seen_keys(head / c.H, head % c.H),
                    &context[head * c.Tq * c.Dv], c.Dv, Output::WRITTEN);

  std::vector<T> g(scores.size()), probabilities(scores.size()), row_sums(heads * c.Tq);
  std::vector<T> dq(heads * c.Tq * padded), dw(heads * padded);
  std::vector<S> dk(heads * c.Tk * c.D), dx(heads * c.Tk * c.Dv);
  const auto rows = [](std::vector<S>& gradient, int64_t at) {
    T* sums = nullptr;
    if constexpr (!IS_NARROW<S>) sums = &gradient[at];
    return GradientRows<S>{sums, &gradient[at], false, false, false};
  };
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t j = 0; j < c.Tk; j += KEY_BLOCK)
      products.grad_weights(p, chunk, head, j, dc(head), c.Dv, g.data(), score_memory.data());
  for (int64_t row = 0; row < heads * c.Tq; ++row)
    row_sums[row] =
        bwd.grad_scores(p, keys_of(row), columns, &biased[row * c.Tk], &scores[row * c.Tk], lse[row],
                        grad_lse[row], &probabilities[row * c.Tk], &g[row * c.Tk], &grad_bias[row * c.Tk]);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t visible = p.visible_keys(head / c.H, head % c.H);
    for (int64_t j = 0; j < c.Tk; j += KEY_BLOCK)
      products.grad_values(p, chunk, head, j, probabilities.data(), dc(head), c.Dv, rows(dx, head * c.Tk * c.Dv),
                           score_memory.data());
    const GradientRows<S> head_dk = rows(dk, head * c.Tk * c.D);
    T *head_dq = &dq[head * c.Tq * padded], *head_dw = &dw[head * padded];
    if (c.Tq <= ROWWISE_QUERIES)
      bwd.backward_rows(p, chunk, head, 0, visible, g.data(), head_dq, head_dk, head_dw, memory.data());
    else
      for (int64_t d = 0; d < padded; d += lanes)
        bwd.backward_strip(p, chunk, head, d, 0, visible, g.data(), head_dq, head_dk, head_dw, memory.data());
  }
  for (const std::vector<T>* result :
       {&scores, &weights, &lse, &context, &probabilities, &g, &grad_bias, &row_sums, &dq, &dw})
    results.add(c.name, widened(*result), std::numeric_limits<T>::epsilon());
  for (const std::vector<S>* result : {&dk, &dx})
    results.add(c.name, widened(wide(*result)), rounding, IS_NARROW<S> ? Results::ROUNDED : Results::LIMIT);
}

}  // namespace

void attention_results(Results& results) {
  const AttentionOptions plain{-1, -1, 1.0, 0.0, ScoreActivation::TANH, 0},
      causal{-1, 0, 0.5, 0.0, ScoreActivation::TANH, 0}, capped{-1, -1, 1.0, 3.0, ScoreActivation::TANH, 0},
      sigmoid{-1, -1, 1.0, 0.0, ScoreActivation::SIGMOID, 0}, relu{-1, 0, 1.0, 0.0, ScoreActivation::RELU, 0},
      window{2, 9, 1.0, 0.0, ScoreActivation::TANH, 0},
      leaky_relu{-1, -1, 1.0, 3.0, ScoreActivation::LEAKY_RELU, 0.2};
  const AttentionCase cases[] = {
      {"one query", 2, 2, 1, 40, 64, 48, 2, plain, false, false, false},
      {"one query, exponentials at hand", 2, 2, 1, 40, 64, 48, 2, plain, true, true, false},
      {"few queries", 1, 2, 5, 37, 33, 17, 2, causal, false, false, false},
      {"many queries", 1, 1, 70, 50, 64, 40, 2, capped, true, false, false},
      {"products of two", 1, 2, 19, 33, 21, 19, 9, capped, false, false, false},
      {"products of two, few queries", 2, 1, 6, 21, 30, 8, 9, plain, true, false, false},
      {"sums", 1, 2, 21, 35, 19, 18, 60, causal, true, false, false},
      {"sums, few queries", 1, 1, 4, 20, 24, 16, 60, plain, false, true, false},
      {"a window", 1, 2, 37, 50, 24, 16, 2, window, true, false, false},
      {"an infinite weight", 1, 1, 5, 18, 16, 16, 1, plain, false, false, true},
      {"sigmoid, one query", 1, 2, 1, 40, 64, 48, 2, sigmoid, false, false, false},
      {"sigmoid, sums", 1, 1, 21, 20, 24, 16, 90, sigmoid, true, false, false},
      {"a bias", 1, 2, 19, 33, 21, 19, 2, capped, true, false, false, true},
      {"relu", 1, 2, 19, 33, 21, 19, 2, relu, true, false, false},
      {"leaky_relu, one query", 2, 1, 1, 37, 33, 17, 2, leaky_relu, false, false, false},
      {"leaky_relu, few queries", 1, 2, 5, 37, 33, 17, 2, leaky_relu, false, false, false},
  };
  for (const AttentionCase& c : cases) {
    using namespace default_;
    attention(c, attention_fwd_f32, attention_bwd_f32, attention_products_f32, 0x1p-23, results);
    attention(c, attention_fwd_f64, attention_bwd_f64, attention_products_f64, 0x1p-52, results);
    attention(c, attention_fwd_f16, attention_bwd_f16, attention_products_f16, 0x1p-10, results);
    attention(c, attention_fwd_bf16, attention_bwd_bf16, attention_products_bf16, 0x1p-7, results);
  }
}

}  // namespace fusedattn
