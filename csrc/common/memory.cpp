// Gradients as large as keys and values are made anew at every step of training. The C library hands freed blocks
// of that size back to the system, which clears each page before the next step may write it: in a step that is
// bound by memory, two fifths of its time.
//
// So large blocks that are given back are kept for the next request, within two bounds. Together with those in use
// they never exceed what was in use at once. And the pages of the largest are marked MADV_FREE: the system takes
// them as soon as it runs short of memory. FUSEDATTN_REUSE_MEMORY=0 keeps nothing.
#include "memory.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t CACHE_LINE = 64;
constexpr size_t HUGE_PAGE = size_t{2} << 20;
constexpr size_t LEAST_KEPT = size_t{1} << 20;  // smaller blocks the C library keeps by itself
constexpr size_t LEAST_HUGE = 2 * HUGE_PAGE;
constexpr size_t LEAST_OFFERED = size_t{32} << 20;  // smaller ones are not worth the call

std::align_val_t alignment(size_t bytes) { return std::align_val_t(bytes < LEAST_HUGE ? CACHE_LINE : HUGE_PAGE); }

void* allocate(size_t bytes) noexcept {
  void* data = ::operator new(bytes, alignment(bytes), std::nothrow);
  if (data != nullptr) advise_huge_pages(data, bytes);
  return data;
}

void release(Block block) noexcept { ::operator delete(block.data, alignment(block.bytes)); }

// The system may take the pages now, and clears those it took when they are written again.
void offer_pages(Block block) {
#if defined(__linux__) && defined(MADV_FREE)
  if (block.bytes >= LEAST_OFFERED) madvise(block.data, block.bytes / HUGE_PAGE * HUGE_PAGE, MADV_FREE);
#else
  (void)block;
#endif
}

bool reuses_memory() {
  static const bool reuses = [] {
    const char* wanted = std::getenv("FUSEDATTN_REUSE_MEMORY");
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, "1") == 0) return true;
    STD_TORCH_CHECK(std::strcmp(wanted, "0") == 0, "FUSEDATTN_REUSE_MEMORY: expected 0 or 1, got '", wanted, "'");
    return false;
  }();
  return reuses;
}

class Blocks {
 public:
  Block lend(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Block block = take(bytes);
    if (block.data == nullptr) block = {allocate(bytes), bytes};
    while (block.data == nullptr && !kept_.empty()) {
      free_oldest();
      block.data = allocate(bytes);
    }
    if (block.data == nullptr) return block;
    lent_bytes_ += block.bytes;
    most_lent_ = std::max(most_lent_, lent_bytes_);
    while (lent_bytes_ + kept_bytes_ > most_lent_) free_oldest();
    return block;
  }

  void take_back(Block block) noexcept {
    offer_pages(block);
    const std::lock_guard<std::mutex> lock(mutex_);
    lent_bytes_ -= block.bytes;
    kept_bytes_ += block.bytes;
    kept_.push_back(block);
  }

 private:
  // The smallest that is large enough, unless more than a third of it would lie idle.
  Block take(size_t bytes) {
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block)
      if (block->bytes >= bytes && block->bytes - bytes <= block->bytes / 3)
        if (best == kept_.end() || block->bytes < best->bytes) best = block;
    if (best == kept_.end()) return {};
    const Block block = *best;
    kept_.erase(best);
    kept_bytes_ -= block.bytes;
    return block;
  }

  void free_oldest() {
    kept_bytes_ -= kept_.front().bytes;
    release(kept_.front());
    kept_.erase(kept_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  size_t lent_bytes_ = 0, kept_bytes_ = 0, most_lent_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

bool is_kept(size_t bytes) { return bytes >= LEAST_KEPT && reuses_memory(); }

int32_t dtype_code(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

// Straight from the C interface: torch::stable::empty goes through the dispatcher, which a small call notices.
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype_code(type),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  advise_huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < LEAST_HUGE) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t last = (begin + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

Block lend(size_t bytes) {
  const Block block = is_kept(bytes) ? blocks().lend(bytes) : Block{allocate(bytes), bytes};
  STD_TORCH_CHECK(block.data != nullptr, "fusedattn: out of memory: tried to allocate ", bytes, " bytes");
  return block;
}

void take_back(Block block) noexcept {
  if (block.data == nullptr) return;
  if (is_kept(block.bytes))
    blocks().take_back(block);
  else
    release(block);
}

bool passes_caches(const Tensor& result, int64_t row_bytes) {
  constexpr int64_t CACHES = int64_t{32} << 20;
  const bool aligned = reinterpret_cast<uintptr_t>(result.const_data_ptr()) % CACHE_LINE == 0;
  return result.numel() * result.element_size() >= CACHES && aligned && row_bytes % int64_t{CACHE_LINE} == 0;
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t n = sizes.size(); n-- > 1;) strides[n - 1] = strides[n] * std::max<int64_t>(sizes[n], 1);
  return strides;
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  return empty_strided(sizes, contiguous_strides(sizes), type);
}

Tensor empty_lent(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  size_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  for (int64_t size : sizes) bytes *= size;
  if (!is_kept(bytes)) return empty_strided(sizes, strides, type);
  const Block block = lend(bytes);
  const auto give_back = [](void* data, void* size) { take_back({data, reinterpret_cast<size_t>(size)}); };
  AtenTensorHandle handle;
  const AOTITorchError error = torch_from_blob(
      block.data, sizes.size(), sizes.data(), strides.data(), 0, dtype_code(type), aoti_torch_device_type_cpu(),
      -1, &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, reinterpret_cast<void*>(block.bytes));
  if (error != AOTI_TORCH_SUCCESS) take_back(block);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

}  // namespace fusedattn
