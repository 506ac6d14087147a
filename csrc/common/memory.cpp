// Results and gradients as large as keys and values are made anew at every step. The C library hands freed blocks
// of that size back to the system, which clears each page before the next step may write it: in a step that is
// bound by memory, two fifths of its time.
//
// So large blocks that are given back are kept for the next request, within bounds:
//   - those in use and kept together never exceed what was in use at once;
//   - beyond ALWAYS_KEPT, only as much is kept as was asked for again after the system had got it back: what is
//   made
//     once costs the process nothing later;
//   - what nobody asks for within IDLE goes at the next call, and both bounds fall with it;
//   - everything goes at empty_cache(), and where an allocation fails, which is then tried again.
// Pages kept beyond UNOFFERED are marked MADV_FREE: the system takes them as soon as it runs short of memory.
// Where the address space of the process is limited, which only unmapping helps, nothing is kept, as with
// FUSEDATTN_REUSE_MEMORY=0.
//
// Blocks from two huge pages up are mappings of their own in huge pages: writing fresh memory 4 KiB page by page
// is bound by page faults, and in memory of the C library the advice would outlive the block. Where nothing is
// kept, the C library still keeps what is smaller than MOST_OF_C_LIBRARY: a mapping would be made and cleared at
// each call.
#include "memory.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <sstream>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fusedattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Clock = std::chrono::steady_clock;

constexpr size_t MIB = size_t{1} << 20;
constexpr size_t CACHE_LINE = 64;
constexpr size_t LEAST_KEPT = MIB;  // smaller blocks the C library keeps by itself
constexpr size_t ALWAYS_KEPT = 256 * MIB;
constexpr size_t UNOFFERED = 32 * MIB;
constexpr size_t MOST_BLOCKS = 1024;
constexpr Clock::duration IDLE = std::chrono::seconds(5);

bool reuses_memory() {
  static const bool reuses = [] {
    const char* wanted = std::getenv("FUSEDATTN_REUSE_MEMORY");
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, "1") == 0) return true;
    STD_TORCH_CHECK(std::strcmp(wanted, "0") == 0, "FUSEDATTN_REUSE_MEMORY: expected 0 or 1, got '", wanted, "'");
    return false;
  }();
  return reuses;
}

#if defined(__linux__)

constexpr size_t HUGE_PAGE = 2 * MIB;
constexpr size_t MOST_OF_C_LIBRARY = 32 * MIB;  // glibc's largest threshold for mappings of its own

bool is_mapped(size_t bytes) noexcept {
  return bytes >= LEAST_KEPT && bytes >= (reuses_memory() ? 2 * HUGE_PAGE : MOST_OF_C_LIBRARY);
}

size_t mapped_bytes(size_t bytes) { return (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE; }

// From the first huge page of a mapping; what lies around it is unmapped. Only whole huge pages are advised: the
// last would make more resident than was asked for.
void* map(size_t bytes) noexcept {
  if (bytes > SIZE_MAX - 2 * HUGE_PAGE) return nullptr;
  const size_t length = mapped_bytes(bytes);
  void* const mapping =
      mmap(nullptr, length + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapping);
  const size_t before = (HUGE_PAGE - reinterpret_cast<uintptr_t>(mapping) % HUGE_PAGE) % HUGE_PAGE;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + length, HUGE_PAGE - before);
  madvise(begin + before, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
  return begin + before;
}

void* allocate(size_t bytes) noexcept {
  if (is_mapped(bytes)) return map(bytes);
  return ::operator new(bytes, std::align_val_t(CACHE_LINE), std::nothrow);
}

void release(Block block) noexcept {
  if (is_mapped(block.bytes))
    munmap(block.data, mapped_bytes(block.bytes));
  else
    ::operator delete(block.data, std::align_val_t(CACHE_LINE));
}

// The system may take the pages now, and clears those it took when they are written again.
void offer_pages(Block block) noexcept {
#if defined(MADV_FREE)
  if (is_mapped(block.bytes)) madvise(block.data, mapped_bytes(block.bytes), MADV_FREE);
#endif
}

bool address_space_is_limited() noexcept {
  rlimit limit;
  for (const auto resource : {RLIMIT_AS, RLIMIT_DATA})
    if (getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return true;
  return false;
}

#else

void* allocate(size_t bytes) noexcept { return ::operator new(bytes, std::align_val_t(CACHE_LINE), std::nothrow); }
void release(Block block) noexcept { ::operator delete(block.data, std::align_val_t(CACHE_LINE)); }
void offer_pages(Block) noexcept {}
bool address_space_is_limited() noexcept { return false; }

#endif

// Under the lock blocks are only listed and counted: what takes time, or locks of the system, happens outside.
class Blocks {
 public:
  Block lend(size_t bytes) noexcept {
    Block block = take(bytes);
    if (block.data == nullptr) {
      block = {allocate(bytes), bytes};
      for (Block kept; block.data == nullptr && (kept = take_oldest()).data != nullptr;) {
        release(kept);
        block.data = allocate(bytes);
      }
      if (block.data == nullptr) return block;
      count_fresh(bytes);
    }
    trim();
    return block;
  }

  void take_back(Block block) noexcept {
    if (address_space_is_limited()) {
      uncount(block);
      release(block);
    } else {
      const bool offered = is_to_be_offered(block);
      if (offered) offer_pages(block);
      const Block displaced = keep(block, offered);
      if (displaced.data != nullptr) release(displaced);
    }
    trim();
  }

  // Gives what is kept beyond the bounds back to the system.
  void trim() noexcept {
    if (kept_bytes_.load(std::memory_order_relaxed) == 0) return;
    const Clock::time_point now = Clock::now();
    for (Block surplus; (surplus = take_surplus(now)).data != nullptr;) release(surplus);
  }

  void empty() noexcept {
    for (Block kept; (kept = take_oldest()).data != nullptr;) release(kept);
  }

  // A child of fork() has only the thread that called it: were the lock another's, it would be so for ever.
  void before_fork() noexcept { mutex_.lock(); }
  void after_fork() noexcept { mutex_.unlock(); }

 private:
  using Lock = std::lock_guard<std::mutex>;
  struct Kept {
    Block block;
    Clock::time_point since;
    bool offered;
  };

  // The smallest that is large enough, unless more than a third of it would lie idle.
  Block take(size_t bytes) noexcept {
    const Lock lock(mutex_);
    size_t best = count_;
    for (size_t n = 0; n < count_; ++n) {
      const size_t size = kept_[n].block.bytes;
      if (size >= bytes && size - bytes <= size / 3 && (best == count_ || size < kept_[best].block.bytes))
        best = n;
    }
    if (best == count_) return {};
    const Block block = remove(best);
    lent_bytes_ += block.bytes;
    most_in_use_ = std::max(most_in_use_, lent_bytes_);
    return block;
  }

  void count_fresh(size_t bytes) noexcept {
    const Lock lock(mutex_);
    lent_bytes_ += bytes;
    most_in_use_ = std::max(most_in_use_, lent_bytes_);
    if (bytes > missed_) return;  // else a larger allowance would have kept a block for this request
    missed_ -= bytes;
    allowance_ += bytes;
  }

  void uncount(Block block) noexcept {
    const Lock lock(mutex_);
    lent_bytes_ -= block.bytes;
  }

  bool is_to_be_offered(Block block) noexcept {
    const Lock lock(mutex_);
    return unoffered_bytes_ + block.bytes > UNOFFERED;
  }

  // Returns the block whose place it takes, if any.
  Block keep(Block block, bool offered) noexcept {
    const Lock lock(mutex_);
    const Block displaced = count_ == MOST_BLOCKS ? remove(0) : Block{};
    kept_[count_++] = {block, Clock::now(), offered};
    lent_bytes_ -= block.bytes;
    kept_bytes_ += block.bytes;
    if (!offered) unoffered_bytes_ += block.bytes;
    return displaced;
  }

  Block take_oldest() noexcept {
    const Lock lock(mutex_);
    return count_ == 0 ? Block{} : remove(0);
  }

  Block take_surplus(Clock::time_point now) noexcept {
    const Lock lock(mutex_);
    if (count_ == 0) return {};
    const size_t bytes = kept_[0].block.bytes;
    if (now - kept_[0].since > IDLE) {
      most_in_use_ = lent_bytes_ + kept_bytes_ - bytes;
      allowance_ = std::max(ALWAYS_KEPT, kept_bytes_ - bytes);
      missed_ = 0;
    } else if (kept_bytes_ > allowance_) {
      missed_ += bytes;
    } else if (lent_bytes_ + kept_bytes_ <= most_in_use_) {
      return {};
    }
    return remove(0);
  }

  Block remove(size_t n) noexcept {
    const Kept kept = kept_[n];
    std::copy(kept_ + n + 1, kept_ + count_, kept_ + n);
    --count_;
    kept_bytes_ -= kept.block.bytes;
    if (!kept.offered) unoffered_bytes_ -= kept.block.bytes;
    return kept.block;
  }

  std::mutex mutex_;
  Kept kept_[MOST_BLOCKS];  // oldest first
  size_t count_ = 0;
  std::atomic<size_t> kept_bytes_{0};  // read without the lock where only zero matters
  size_t unoffered_bytes_ = 0, lent_bytes_ = 0, most_in_use_ = 0, allowance_ = ALWAYS_KEPT;
  size_t missed_ = 0;  // given to the system for want of allowance
};

// Never destroyed: tensors may outlive every static object.
Blocks& blocks = *new Blocks;

#if defined(__unix__) || defined(__APPLE__)
const int registered =
    pthread_atfork([] { blocks.before_fork(); }, [] { blocks.after_fork(); }, [] { blocks.after_fork(); });
#endif

bool is_kept(size_t bytes) { return bytes >= LEAST_KEPT && reuses_memory(); }

int32_t dtype_code(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

size_t size_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      STD_TORCH_CHECK(false, "fusedattn: no memory is made for tensors of dtype ", dtype_code(type));
  }
}

std::string text(const std::vector<int64_t>& sizes) {
  std::ostringstream out;
  for (size_t n = 0; n < sizes.size(); ++n) out << (n == 0 ? "(" : ", ") << sizes[n];
  out << ")";
  return out.str();
}

// In memory of torch's, straight from its C interface: torch::stable::empty goes through the dispatcher, which a
// small call notices.
Tensor small(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
             size_t bytes) {
  const auto create = [&](AtenTensorHandle* handle) {
    return aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype_code(type),
                                    aoti_torch_device_type_cpu(), 0, handle) == AOTI_TORCH_SUCCESS;
  };
  blocks.trim();
  AtenTensorHandle handle;
  if (create(&handle)) return Tensor(handle);
  blocks.empty();
  STD_TORCH_CHECK(create(&handle), "fusedattn: out of memory: tried to allocate ", bytes,
                  " bytes for a tensor of shape ", text(sizes));
  return Tensor(handle);
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t n = sizes.size(); n-- > 1;) strides[n - 1] = strides[n] * std::max<int64_t>(sizes[n], 1);
  return strides;
}

void empty_cache() { blocks.empty(); }

}  // namespace

size_t bytes_of(int64_t count, size_t size) {
  size_t bytes;
  STD_TORCH_CHECK(!__builtin_mul_overflow(count, size, &bytes), "fusedattn: out of memory: tried to allocate ",
                  count, " elements of ", size, " bytes");
  return bytes;
}

Block lend(size_t bytes) {
  const Block block = is_kept(bytes) ? blocks.lend(bytes) : Block{allocate(bytes), bytes};
  STD_TORCH_CHECK(block.data != nullptr, "fusedattn: out of memory: tried to allocate ", bytes, " bytes");
  return block;
}

void take_back(Block block) noexcept {
  if (block.data == nullptr) return;
  if (is_kept(block.bytes))
    blocks.take_back(block);
  else
    release(block);
}

bool passes_caches(const Tensor& result, int64_t row_bytes) {
  constexpr int64_t CACHES = int64_t{32} << 20;
  const bool aligned = reinterpret_cast<uintptr_t>(result.const_data_ptr()) % CACHE_LINE == 0;
  return result.numel() * result.element_size() >= CACHES && aligned && row_bytes % int64_t{CACHE_LINE} == 0;
}

Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  int64_t count = 1;
  for (int64_t size : sizes)
    STD_TORCH_CHECK(!__builtin_mul_overflow(count, size, &count), "fusedattn: out of memory: tried to allocate ",
                    "a tensor of shape ", text(sizes));
  const size_t bytes = bytes_of(count, size_of(type));
  if (bytes < LEAST_KEPT) return small(sizes, strides, type, bytes);
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

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  return empty(sizes, contiguous_strides(sizes), type);
}

Tensor contiguous(const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type && t.is_contiguous()) return t;
  const auto sizes = t.sizes();
  Tensor copy = empty({sizes.begin(), sizes.end()}, type);
  torch::stable::copy_(copy, t);
  return copy;
}

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}

}  // namespace fusedattn
