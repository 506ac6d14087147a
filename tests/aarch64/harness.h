// What the parts of the harness share: inputs that are the same on every machine, bit for bit, and results that
// are written or compared.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "common/storage.h"

namespace fusedattn {

[[noreturn]] inline void fail(const char* what) {
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
  void add(const char* what, const std::vector<double>& results, double epsilon, double limit = LIMIT) {
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
    if (units <= limit) return;
    ++failures;
    std::printf("%s: results differ by %g units of rounding, expected at most %g\n", what, units, limit);
  }

  static constexpr double LIMIT = 32;   // fused or separate multiply-adds and the order of sums make up to 16
  static constexpr double ROUNDED = 1;  // of what is rounded to 16 bits once, after such arithmetic
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

// Storage of 16 bits, by its exponent's width.
inline double value_of(uint16_t bits, int exponent_bits) {
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
  // Numbers up to 20, with what is special at the head if asked. 16-bit storage has every exponent up to that.
  std::vector<char> numbers(int64_t n, Random& random, bool with_special = true) const {
    std::vector<char> memory(n * size);
    const double special[] = {INFINITY, -INFINITY, NAN, 0.0, -0.0, 1e-30};
    for (int64_t e = 0; e < n; ++e) {
      const double x = with_special && e < 6 ? special[e] : 20 * random.next() * random.next();
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
        if (with_special && e < 2)
          bits = static_cast<uint16_t>((e << 15) | (((1 << exponent_bits) - 1) << (15 - exponent_bits)));
        std::memcpy(&memory[e * size], &bits, size);
      }
    }
    return memory;
  }
};

const Storage STORAGES[] = {{StorageType::FLOAT, 4, 0, std::numeric_limits<float>::epsilon()},
                            {StorageType::DOUBLE, 8, 0, std::numeric_limits<double>::epsilon()},
                            {StorageType::HALF, 2, 5, 0x1p-10},
                            {StorageType::BFLOAT16, 2, 8, 0x1p-7}};

// Results of one problem, under its name.
struct Named {
  std::string name;
  const Storage& storage;
  Results& results;

  void add(const std::vector<char>& memory) const {
    if (memory.empty()) return;
    std::vector<double> wide(memory.size() / storage.size);
    for (size_t n = 0; n < wide.size(); ++n) wide[n] = storage.read(memory.data(), static_cast<int64_t>(n));
    results.add(name.c_str(), wide, storage.epsilon, storage.size == 2 ? Results::ROUNDED : Results::LIMIT);
  }
  void add(const std::vector<double>& numbers) const {
    if (numbers.empty()) return;
    results.add(name.c_str(), numbers, storage.type == StorageType::DOUBLE ? 0x1p-52 : 0x1p-23);
  }
  void add(const std::vector<float>& numbers) const { add(widened(numbers)); }
};

void attention_results(Results&);
void attention_family_results(Results&);
void conditioning_results(Results&);

}  // namespace fusedattn
