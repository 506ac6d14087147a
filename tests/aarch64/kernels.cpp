// Runs the CPU kernels of the default level on fixed problems, without torch, and keeps what comes out:
//
//   kernels write FILE     on one machine
//   kernels compare FILE   on another: how far its results are from those, an error where too far
//
// Inputs are the same on every machine, bit for bit. Buffers end where they are said to end, so that a sanitizer
// or an emulator sees what goes beyond.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "additive_attention/cpu_kernel.h"
#include "additive_attention/formula.h"
#include "film/cpu_kernel.h"

namespace {

using namespace fusedattn;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(2);
}

// Uniform in (-1, 1).
struct Random {
  uint64_t state;
  double next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state) >> 11) / (1ll << 52);
  }
  template <typename T>
  std::vector<T> numbers(int64_t n, double size = 1) {
    std::vector<T> x(n);
    for (T& e : x) e = static_cast<T>(size * next());
    return x;
  }
};

// Results in the order in which they are made, written to a file or compared with one.
class Results {
 public:
  Results(bool writes, const char* path) : writes(writes), file_(std::fopen(path, writes ? "wb" : "rb")) {
    if (file_ == nullptr) fail("cannot open the file of results");
  }
  ~Results() { std::fclose(file_); }

  // `epsilon`: the rounding unit of the results' type. Errors count against the largest result.
  void add(const char* what, const std::vector<double>& results, double epsilon) {
    ++arrays;
    if (writes) {
      std::fwrite(results.data(), sizeof(double), results.size(), file_);
      return;
    }
    std::vector<double> others(results.size());
    if (std::fread(others.data(), sizeof(double), others.size(), file_) != others.size())
      fail("the file is short");
    double largest = 0, error = 0;
    for (size_t n = 0; n < results.size(); ++n)
      if (std::isfinite(others[n]) && std::isfinite(results[n])) {
        error = std::fmax(error, std::fabs(results[n] - others[n]));
        largest = std::fmax(largest, std::fabs(others[n]));
      } else if (std::isnan(others[n]) ? !std::isnan(results[n]) : results[n] != others[n]) {
        error = std::numeric_limits<double>::infinity();
      }
    const double units = error == 0 ? 0 : error / (largest * epsilon);
    worst = std::fmax(worst, units);
    if (units <= LIMIT) return;
    ++failures;
    std::printf("%s: results differ by %g units of rounding, expected at most %g\n", what, units, LIMIT);
  }

  static constexpr double LIMIT = 32;  // fused or separate multiply-adds and the order of sums make up to 16
  const bool writes;
  int arrays = 0, failures = 0;
  double worst = 0;

 private:
  std::FILE* file_;
};

template <typename T>
std::vector<double> widened(const std::vector<T>& x) {
  return std::vector<double>(x.begin(), x.end());
}

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
  for (const std::vector<S>* result : {&dk, &dx}) results.add(c.name, widened(wide(*result)), rounding);
}

// Storage of 16 bits, by its exponent's width.
double value_of(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1),
            mantissa = bits & ((1 << mantissa_bits) - 1);
  double x = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
             : exponent == (1 << exponent_bits) - 1
                 ? (mantissa == 0 ? INFINITY : NAN)
                 : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  return bits >> 15 ? -x : x;
}

struct Storage {
  StorageType type;
  size_t size;
  int exponent_bits;  // of 16-bit storage
  double epsilon;

  double read(const void* memory, int64_t n) const {
    if (type == StorageType::DOUBLE) return static_cast<const double*>(memory)[n];
    if (type == StorageType::FLOAT) return static_cast<const float*>(memory)[n];
    return value_of(static_cast<const uint16_t*>(memory)[n], exponent_bits);
  }
  // Numbers up to 20, with what is special at the head. 16-bit storage has every exponent up to that.
  std::vector<char> numbers(int64_t n, Random& random) const {
    std::vector<char> memory(n * size);
    const double special[] = {INFINITY, -INFINITY, NAN, 0.0, -0.0, 1e-30};
    for (int64_t e = 0; e < n; ++e) {
      const double x = e < 6 ? special[e] : 20 * random.next() * random.next();
      if (type == StorageType::DOUBLE) {
        std::memcpy(&memory[e * size], &x, size);
      } else if (type == StorageType::FLOAT) {
        const float narrow = static_cast<float>(x);
        std::memcpy(&memory[e * size], &narrow, size);
      } else {
        const int bias = (1 << (exponent_bits - 1)) - 1;
        uint16_t bits = static_cast<uint16_t>(
            static_cast<int64_t>(std::fabs(random.next()) * (bias + 4) * (1 << (15 - exponent_bits))));
        if (random.next() < 0) bits |= 0x8000;
        if (e < 2) bits = static_cast<uint16_t>((e << 15) | (((1 << exponent_bits) - 1) << (15 - exponent_bits)));
        std::memcpy(&memory[e * size], &bits, size);
      }
    }
    return memory;
  }
};

template <typename T>
void film(const Storage& storage, Activation activation, int64_t count, int64_t n, Results& results) {
  const FilmKernels& kernels = default_::film;
  Random random{7};
  const int64_t size = count * n;
  const auto x = storage.numbers(size, random), residual = storage.numbers(size, random);
  auto dy = storage.numbers(size, random);
  std::vector<char> y(size * storage.size), dx(y);
  char name[64];
  std::snprintf(name, sizeof(name), "film, storage %d, activation %d", static_cast<int>(storage.type),
                static_cast<int>(activation));
  const auto add = [&](const std::vector<char>& memory) {
    std::vector<double> wide(size);
    for (int64_t e = 0; e < size; ++e) wide[e] = storage.read(memory.data(), e);
    results.add(name, wide, storage.epsilon);
  };
  // One value a row, one an element of each row, and the same for all rows, whose sums are added up.
  for (const int vectors : {0, 1, 2}) {
    const int64_t values = vectors == 0   ? count
                           : vectors == 1 ? size
                                          : n,
                  step = vectors == 0  ? 1
                         : values == n ? 0
                                       : n;
    const auto scale = random.numbers<T>(values, 2), shift = random.numbers<T>(values, 2);
    std::vector<T> dz_x(values), dz(values);
    const FilmRows rows{count, n,           n,           x.data(), scale.data(), shift.data(), step,
                        step,  vectors > 0, vectors > 0, 0.5,      false,        false};
    kernels.forward(storage.type, activation, rows, residual.data(), y.data());
    kernels.backward(storage.type, activation, rows, dy.data(), dx.data(),
                     {dz_x.data(), dz.data(), step, step, true, true});
    add(y);
    add(dx);
    results.add(name, widened(dz_x), std::numeric_limits<T>::epsilon());
    results.add(name, widened(dz), std::numeric_limits<T>::epsilon());
  }
  std::vector<T> wide(size);
  kernels.widen(storage.type, size, 1, x.data(), wide.data(), false);
  kernels.widen(storage.type, size / 3, 3, x.data(), wide.data(), true);
  kernels.narrow(storage.type, size, wide.data(), y.data());
  add(y);
}

}  // namespace

int main(int arguments, char** argument) {
  if (arguments != 3 || (std::strcmp(argument[1], "write") != 0 && std::strcmp(argument[1], "compare") != 0))
    fail("expected: kernels write|compare FILE");
  Results results(std::strcmp(argument[1], "write") == 0, argument[2]);
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
  const Storage storages[] = {{StorageType::FLOAT, 4, 0, std::numeric_limits<float>::epsilon()},
                              {StorageType::DOUBLE, 8, 0, std::numeric_limits<double>::epsilon()},
                              {StorageType::HALF, 2, 5, 0x1p-10},
                              {StorageType::BFLOAT16, 2, 8, 0x1p-7}};
  for (const Storage& storage : storages)
    for (int activation = 0; activation < 8; ++activation) {
      const auto run = storage.type == StorageType::DOUBLE ? film<double> : film<float>;
      run(storage, static_cast<Activation>(activation), 5, 37, results);
    }
  if (!results.writes)
    std::printf("%d arrays of results, at most %g units of rounding apart\n", results.arrays, results.worst);
  return results.failures == 0 ? 0 : 1;
}
