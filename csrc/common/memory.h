// Memory of large results and of large working sets: what the system charges for fresh pages, and how not to pay
// it at every step.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace fusedattn {

// Writing fresh memory 4 KiB page by page is bound by page faults, not by bandwidth. Before its first write,
// asks for huge pages in the aligned inside of a large block; only a hint, so failure changes nothing.
void advise_huge_pages(void* data, size_t bytes);

// Uninitialised memory, aligned to cache lines. A large block is one that was given back, where there is one that
// fits, and what is given back is kept for the next (memory.cpp).
struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};
Block lend(size_t bytes);
void take_back(Block block) noexcept;

// lend() for as long as the object lives.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : block_(lend(sizeof(T) * size)) {}
  Buffer(Buffer&& other) noexcept : block_(other.block_) { other.block_ = {}; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Buffer() { take_back(block_); }
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  Block block_;
};

// Whether a result is better written past the caches: no cache holds all of it until it is read again, and its
// rows are whole aligned cache lines.
bool passes_caches(const torch::stable::Tensor& result, int64_t row_bytes);

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes);

// An uninitialised tensor on the CPU, in huge pages if it is large.
torch::stable::Tensor empty(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type);

// The same in memory that is lent: for what every step of training makes anew, gradients before all. Its storage
// cannot be resized.
torch::stable::Tensor empty_lent(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                 torch::headeronly::ScalarType type);

}  // namespace fusedattn
