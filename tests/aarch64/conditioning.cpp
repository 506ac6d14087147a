// The conditioning ops: film, norm_film, whose groups are rows or reach over positions, and gated_film.
#include "film/cpu_kernel.h"
#include "gated_film/cpu_kernel.h"
#include "harness.h"
#include "norm_film/cpu_kernel.h"

namespace fusedattn {
namespace {

template <typename T>
constexpr StorageType WIDE = sizeof(T) == 8 ? StorageType::DOUBLE : StorageType::FLOAT;

std::string named(const char* what, const Storage& storage, int activation) {
  return std::string(what) + ", storage " + std::to_string(static_cast<int>(storage.type)) + ", activation " +
         std::to_string(activation);
}

template <typename T>
void film(const Storage& storage, Activation activation, int64_t count, int64_t n, Results& results) {
  const FilmKernels& kernels = default_::film;
  const Named found{named("film", storage, static_cast<int>(activation)), storage, results};
  Random random{7};
  const int64_t size = count * n;
  const auto x = storage.numbers(size, random), residual = storage.numbers(size, random);
  const auto dy = storage.numbers(size, random);
  std::vector<char> y(size * storage.size), dx(y);
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
    found.add(y), found.add(dx), found.add(dz_x), found.add(dz);
  }
  if (storage.size == 2) {  // gamma and beta as they are
    const auto scale = storage.numbers(size, random), shift = storage.numbers(size, random);
    std::vector<char> dz_x(y), dz(y);
    const FilmRows rows{count, n, n, x.data(), scale.data(), shift.data(), n, n, true, true, 0.5, false, true};
    kernels.forward(storage.type, activation, rows, residual.data(), y.data());
    kernels.backward(storage.type, activation, rows, dy.data(), dx.data(),
                     {dz_x.data(), dz.data(), n, n, true, true});
    for (const auto* result : {&y, &dx, &dz_x, &dz}) found.add(*result);
  }
  std::vector<T> wide(size);
  kernels.widen(storage.type, size, 1, x.data(), wide.data(), false);
  kernels.widen(storage.type, size / 3, 3, x.data(), wide.data(), true);
  kernels.narrow(storage.type, size, wide.data(), y.data());
  found.add(y);
}

// gamma, weight, bias and beta as one affine of n channels, as launchers make it.
template <typename T>
struct Affine {
  std::vector<T> scale, shift;

  Affine(int64_t n, Random& random, const Named& found) : scale(n), shift(n) {
    const auto gamma = random.numbers<T>(n), weight = random.numbers<T>(n, 2), bias = random.numbers<T>(n),
               beta = random.numbers<T>(n);
    const NormFilmKernels& kernels = default_::norm_film;
    kernels.affine(WIDE<T>, n, gamma.data(), 1.0, weight.data(), bias.data(), beta.data(), scale.data(),
                   shift.data());
    std::vector<T> products(beta);
    kernels.products(WIDE<T>, n, gamma.data(), weight.data(), bias.data(), scale.data(), products.data(), true);
    found.add(scale), found.add(shift), found.add(products);
  }
};

template <typename T>
void norm_rows(const Storage& storage, Activation activation, int64_t C, bool is_rms, bool gated,
               Results& results) {
  const NormFilmKernels& kernels = default_::norm_film;
  const char* const what = is_rms ? "norm_film, rms" : "norm_film, layer";
  const Named found{named(what, storage, static_cast<int>(activation)), storage, results};
  Random random{11};
  const int64_t count = 5, size = count * C;
  const Affine<T> affine(C, random, found);
  const auto gate = random.numbers<T>(C, 2);
  std::vector<double> mean(count), variance(count);
  std::vector<T> room(C), dz_n(C), dz(C), dh_x(C);
  std::vector<char> h(gated ? size * storage.size : 0), y(size * storage.size), dx(y), dr(y);
  // What is not a number is in the first row alone.
  for (const bool with_special : {true, false}) {
    const auto x = storage.numbers(size, random, with_special), before = storage.numbers(size, random, false),
               residual = storage.numbers(size, random, false);
    const NormRows rows{count,
                        C,
                        x.data(),
                        gated ? before.data() : nullptr,
                        gated ? gate.data() : nullptr,
                        affine.scale.data(),
                        affine.shift.data(),
                        0.25,
                        is_rms,
                        1e-5,
                        mean.data(),
                        variance.data(),
                        room.data(),
                        false};
    kernels.rows_forward(storage.type, activation, rows, residual.data(), gated ? h.data() : nullptr, y.data());
    found.add(y), found.add(h), found.add(mean), found.add(variance);
    if (with_special) continue;
    const auto dy = storage.numbers(size, random, false), dh = storage.numbers(size, random, false);
    kernels.rows_backward(storage.type, activation, rows,
                          {gated ? h.data() : x.data(), dy.data(), gated ? dh.data() : nullptr, dx.data(),
                           gated ? dr.data() : nullptr, dz_n.data(), dz.data(), gated ? dh_x.data() : nullptr});
    found.add(dx), found.add(dr), found.add(dz_n), found.add(dz), found.add(dh_x);
  }
}

// `is_vector`: rows are the channels of positions, else the positions of a channel.
template <typename T>
void norm_maps(const Storage& storage, Activation activation, int64_t count, int64_t n, bool is_vector,
               Results& results) {
  const NormFilmMapKernels& kernels = default_::norm_film_maps;
  const char* const what = is_vector ? "norm_film, channels last" : "norm_film, planes";
  const Named found{named(what, storage, static_cast<int>(activation)), storage, results};
  Random random{13};
  const int64_t size = count * n, width = is_vector ? n : 1;
  const Affine<T> affine(width, random, found);
  const auto gate = random.numbers<T>(width, 2), by_h = random.numbers<T>(width),
             by_mean = random.numbers<T>(width);
  const auto x = storage.numbers(size, random, false), before = storage.numbers(size, random, false),
             residual = storage.numbers(size, random, false), dy = storage.numbers(size, random, false),
             dh = storage.numbers(size, random, false);
  std::vector<char> h(size * storage.size), y(h), dx(h), dr(h);
  NormMapRows rows{count, n, is_vector, x.data(), nullptr, nullptr, nullptr, false};
  kernels.form(storage.type, rows, gate.data(), before.data(), h.data());
  found.add(h);
  rows.h = h.data();
  std::vector<T> mean(width), off(width), squares(width);
  if (is_vector) {
    kernels.column_moments(storage.type, count, n, h.data(), mean.data(), off.data(), squares.data());
    found.add(squares);
    for (int64_t c = 0; c < n; ++c) mean[c] += off[c];
  } else {
    const Moments moments = kernels.row_moments(storage.type, n, h.data());
    found.add(std::vector<double>{moments.squares});
    mean[0] = static_cast<T>(moments.mean);
  }
  found.add(mean);
  rows.mean = mean.data(), rows.scale = affine.scale.data(), rows.shift = affine.shift.data();
  kernels.forward(storage.type, activation, rows, residual.data(), y.data());
  std::vector<T> dz_h(width), dz(width), dh_x(width);
  kernels.sums(storage.type, activation, rows, dy.data(), nullptr, dz_h.data(), dz.data());
  kernels.backward(storage.type, activation, rows,
                   {dy.data(), dh.data(), x.data(), by_h.data(), by_mean.data(), gate.data(), dx.data(), dr.data(),
                    dh_x.data()});
  for (const auto* result : {&y, &dx, &dr}) found.add(*result);
  for (const auto* result : {&dz_h, &dz, &dh_x}) found.add(*result);
}

template <typename T>
void gated_film(const Storage& storage, int64_t count, int64_t n, Results& results) {
  const GatedFilmKernels& kernels = default_::gated_film;
  const Named found{named("gated_film", storage, 0), storage, results};
  Random random{17};
  const int64_t size = count * n;
  // The halves of a row take turns.
  const auto x = storage.numbers(2 * size, random), dy = storage.numbers(size, random, false);
  std::vector<char> y(size * storage.size), dx(2 * size * storage.size);
  const auto run = [&](const FilmRows& rows, const FilmSums& sums) {
    const GatedFilmRows t{rows, 2 * n, n};
    kernels.forward(storage.type, t, y.data());
    kernels.backward(storage.type, t, dy.data(), dx.data(), sums);
    found.add(y), found.add(dx);
  };
  for (const bool is_vector : {false, true}) {
    const int64_t values = is_vector ? size : count, step = is_vector ? n : 1;
    const auto a = random.numbers<T>(values, 2), b = random.numbers<T>(values, 2);
    std::vector<T> da(values), db(values);
    run({count, n, n, x.data(), a.data(), b.data(), step, step, is_vector, is_vector, 0.0, false, false},
        {da.data(), db.data(), step, step, true, true});
    found.add(da), found.add(db);
  }
  if (storage.size == 2) {  // the condition as it is
    const auto a = storage.numbers(size, random), b = storage.numbers(size, random);
    std::vector<char> da(y), db(y);
    run({count, n, n, x.data(), a.data(), b.data(), n, n, true, true, 0.0, false, true},
        {da.data(), db.data(), n, n, true, true});
    found.add(da), found.add(db);
  }
}

template <typename T>
void all(const Storage& storage, Results& results) {
  for (int number = 0; number < 8; ++number) {
    const Activation activation = static_cast<Activation>(number);
    film<T>(storage, activation, 5, 37, results);
    for (const bool is_rms : {false, true})
      for (const bool gated : {false, true})
        for (const int64_t C : {6, 16, 37}) norm_rows<T>(storage, activation, C, is_rms, gated, results);
    norm_maps<T>(storage, activation, 37, 13, true, results);
    norm_maps<T>(storage, activation, 1, 1500, false, results);
  }
  gated_film<T>(storage, 5, 37, results);
}

}  // namespace

void conditioning_results(Results& results) {
  for (const Storage& storage : STORAGES)
    storage.type == StorageType::DOUBLE ? all<double>(storage, results) : all<float>(storage, results);
}

}  // namespace fusedattn
