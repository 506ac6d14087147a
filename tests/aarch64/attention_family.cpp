// What has kernels of its own beside additive attention: pooling, location features, hard attention, random words.
#include "attention_pool/cpu_kernel.h"
#include "hard_additive_attention/cpu_kernel.h"
#include "harness.h"
#include "location_attention/cpu_kernel.h"
#include "philox/cpu_kernel.h"

namespace fusedattn {
namespace {

template <typename T>
constexpr StorageType WIDE = sizeof(T) == 8 ? StorageType::DOUBLE : StorageType::FLOAT;

template <typename T>
void attention_pool(const Storage& storage, bool gated, Results& results) {
  const AttentionPoolKernels& kernels = default_::attention_pool;
  const Named found{std::string("attention_pool") + (gated ? ", gated" : ""), storage, results};
  Random random{19};
  const int64_t count = 7, D = 37, Dv = 21, K = 3;
  const auto hidden = storage.numbers(count * D, random, false), gate = storage.numbers(count * D, random, false),
             value = storage.numbers(count * Dv, random, false);
  const auto weight = random.numbers<T>(K * D), dcontext = random.numbers<T>(K * Dv),
             dscores = random.numbers<T>(K * count);
  const PoolFeatures features{count, D, K, hidden.data(), gated ? gate.data() : nullptr, D, D, weight.data()};
  const PoolValues values{count, Dv, K, value.data(), Dv};
  std::vector<T> scores(K * count), p(scores), room(D), sums(K * Dv), dp(scores), dweight(K * D);
  kernels.score(storage.type, features, scores.data(), count, room.data());
  std::vector<double> totals;
  for (int64_t k = 0; k < K; ++k)
    totals.push_back(kernels.exponentials(WIDE<T>, count, scores.data() + k * count, 1.0, p.data() + k * count));
  kernels.pool(storage.type, values, p.data(), count, sums.data());
  std::vector<char> dvalue(value.size()), dhidden(hidden.size()), dgate(gated ? hidden.size() : 0);
  kernels.value_gradients(storage.type, values, dcontext.data(), p.data(), count, dp.data(), dvalue.data(), false);
  kernels.feature_gradients(storage.type, features, dscores.data(), count, dhidden.data(),
                            gated ? dgate.data() : nullptr, dweight.data(), false);
  found.add(totals);
  for (const auto* result : {&scores, &p, &sums, &dp, &dweight}) found.add(*result);
  for (const auto* result : {&dvalue, &dhidden, &dgate}) found.add(*result);
}

template <typename S>
void location(const LocationKernels<S>& kernels, const Storage& storage, const AttentionOptions& options,
              Results& results) {
  using T = Arithmetic<S>;
  const Named found{"location_attention, activation " + std::to_string(static_cast<int>(options.activation)),
                    storage, results};
  Random random{23};
  const int64_t count = 19, D = 37, C = 2, K = 5;
  const auto key = storage.numbers(count * D, random, false);
  const auto query = random.numbers<T>(D), weight = random.numbers<T>(D), made = random.numbers<T>(count * D, 3),
             x = random.numbers<T>(count * C * K);
  auto g = random.numbers<T>(count);
  g[3] = 0;
  const LocationRows<S> rows{count,         D,      reinterpret_cast<const S*>(key.data()), D, query.data(),
                             weight.data(), options};
  std::vector<T> scores(count), features(made), dquery(D), dweight(D), dkey(count * D),
      diagonals(C * (count + K - 1));
  kernels.scores(rows, features.data(), scores.data());
  kernels.gradients(rows, g.data(), features.data(), dquery.data(), dweight.data(), dkey.data());
  kernels.add_diagonals(count, C, K, x.data(), diagonals.data(), count + K - 1);
  for (const auto* result : {&scores, &features, &dquery, &dweight, &dkey, &diagonals}) found.add(*result);
  std::vector<char> written(key.size());
  S* const to = reinterpret_cast<S*>(written.data());
  T* sums = nullptr;
  if constexpr (!IS_NARROW<S>) sums = to;
  kernels.write({sums, to, false, false, false}, 0, dkey.data(), count * D);
  found.add(written);
}

template <typename T>
void hard_attention(const HardAttentionKernels<T>& kernels, const Storage& storage, Results& results) {
  const Named found{"hard_additive_attention", storage, results};
  Random random{29};
  const int64_t Tk = 1037;  // more than are added up at a time
  auto scores = random.numbers<T>(Tk, 5);
  std::vector<char> mask(Tk);
  for (char& visible : mask) visible = random.next() > -0.5;
  std::vector<T> hidden(Tk), dscores(Tk);
  kernels.hide(Tk, scores.data(), reinterpret_cast<const bool*>(mask.data()), hidden.data());
  found.add(hidden);
  const PhiloxRow noise{42, 1, 5, 3};
  for (const PhiloxRow* row : {static_cast<const PhiloxRow*>(nullptr), &noise})
    for (const T special : {T(0), std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()}) {
      std::vector<T> x = hidden;
      if (special != 0) x[700] = special;
      const Choice<T> c = kernels.choose(Tk, x.data(), row);
      found.add(std::vector<T>{c.log_prob, c.entropy, c.lse, c.best});
      results.add("hard_additive_attention, index", {static_cast<double>(c.index)}, 0x1p-52);
      if (special != 0) continue;
      kernels.gradients(Tk, x.data(), c, {T(0.5), T(-0.25), T(2)}, dscores.data());
      found.add(dscores);
    }
}

template <typename T>
void drop(void (*kernel)(const PhiloxRow&, int64_t, Dropout, T*), const PhiloxRow& row, Results& results) {
  Random random{31};
  auto x = random.numbers<T>(75);
  kernel(row, 75, {0x40000000u, 4.0 / 3}, x.data());
  results.add("dropout", widened(x), std::numeric_limits<T>::epsilon());
}

void philox(Results& results) {
  const PhiloxKernels& kernels = default_::philox_kernels;
  for (const PhiloxRow& row : {PhiloxRow{1, 0, 0, 0}, PhiloxRow{~uint64_t{0}, 1ull << 33, 123456, 4099}}) {
    std::vector<int32_t> words(75);
    kernels.words(row, 75, words.data());
    results.add("random words", widened(words), 0x1p-62);  // the same, every one
    drop(kernels.drop_f32, row, results);
    drop(kernels.drop_f64, row, results);
  }
}

}  // namespace

void attention_family_results(Results& results) {
  using namespace default_;
  for (const Storage& storage : STORAGES)
    for (const bool gated : {false, true})
      storage.type == StorageType::DOUBLE ? fusedattn::attention_pool<double>(storage, gated, results)
                                          : fusedattn::attention_pool<float>(storage, gated, results);
  for (const ScoreActivation activation :
       {ScoreActivation::TANH, ScoreActivation::SIGMOID, ScoreActivation::RELU, ScoreActivation::LEAKY_RELU}) {
    const AttentionOptions options{-1, -1, 0.5, 3.0, activation, 0.2};
    location(location_f32, STORAGES[0], options, results);
    location(location_f64, STORAGES[1], options, results);
    location(location_f16, STORAGES[2], options, results);
    location(location_bf16, STORAGES[3], options, results);
  }
  hard_attention(hard_attention_f32, STORAGES[0], results);
  hard_attention(hard_attention_f64, STORAGES[1], results);
  philox(results);
}

}  // namespace fusedattn
