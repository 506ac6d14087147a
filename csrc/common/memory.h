// Memory of results and of working sets: large blocks are kept from one step for the next, in huge pages.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace fusedattn {

// Uninitialised memory, aligned to cache lines. A large block is one that was given back, where there is one that
// fits, and what is given back may be kept for the next (memory.cpp).
struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};
Block lend(size_t bytes);
void take_back(Block block) noexcept;

// `count` elements of `size` bytes. An error where that is more than can be counted: expanded tensors have any
// size.
size_t bytes_of(int64_t count, size_t size);

// lend() for as long as the object lives; null where there is nothing to hold.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : block_(size == 0 ? Block{} : lend(bytes_of(size, sizeof(T)))) {}
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

// An uninitialised tensor on the CPU. A large one lies in memory that is lent: its storage cannot be resized.
torch::stable::Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            torch::headeronly::ScalarType type);
torch::stable::Tensor empty(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type);  // contiguous

// t, contiguous and of dtype `type`: a copy only where it must be.
torch::stable::Tensor contiguous(const torch::stable::Tensor& t, torch::headeronly::ScalarType type);

}  // namespace fusedattn
