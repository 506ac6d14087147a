// Runs CUDA kernels on the CPU: what g++ needs in order to compile csrc/**/*.cuh, and a launcher that executes
// them.
//
// Each CUDA thread is a fiber with a stack of its own. It runs until it reaches a barrier or a warp collective,
// where the next one continues; a block's threads, and the blocks of a grid, run in an order drawn from a seed.
// What a GPU leaves to chance or to luck is an error here, thrown as std::runtime_error that names kernel, block
// and threads:
//   - a barrier or collective that some of the threads it waits for never reach, or that they reach at another
//   line,
//   - a lane that reads a lane outside the mask, an impossible grid, block or amount of shared memory,
//   - what the architecture to stand in for does not have.
// Fresh shared memory holds NaN. Built with AddressSanitizer, overruns of global and shared memory are reported;
// built with ThreadSanitizer, data races, within a block (a missing barrier) and between blocks. As in CUDA's
// memory model
// __syncthreads and __syncwarp order memory between their threads; shuffles, ballots and mma do not.
//
// Not modelled: time, caches, memory spaces other than by address, and the hardware's rounding of approximate
// instructions and of tensor-core sums.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace cuda_emulator {

// Runs `thread` once per CUDA thread of the grid.
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// Order of threads and blocks of the launches that follow; 0 is ascending.
void set_order(uint32_t seed);

// The GPU to stand in for: 75 for compute capability 7.5. Default: 80. It decides how much shared memory a block
// may have and what tensor cores multiply.
void set_architecture(int architecture);
int architecture();

// Switches between fibers since the process began.
uint64_t switch_count();

// Which of the bugs that planted.py put into a copy of the kernels shows; 0: none.
void show_bug(int number);
bool bug_shows(int number);

void* dynamic_shared();

// Barrier of the block; the number of its threads whose predicate holds.
int synchronise_block(const char* where, bool predicate = false);

void synchronise_warp(const char* where, uint32_t mask);

// What the lanes of the mask gave, each up to 64 bytes, by lane; valid until this thread's next collective.
using Slot = unsigned char[64];
const Slot* exchange(const char* where, uint32_t mask, const void* mine, size_t bytes);

// Lane of the calling thread; throws unless `source` is a lane of the mask.
int lane();
void require_lane(const char* where, uint32_t mask, int source);

enum class Multiplicand { HALF, BFLOAT16, TF32 };

// The mma instructions that csrc/common/cuda.cuh describes. Products are exact, sums are rounded to float one by
// one. Throws where the architecture does not have the type.
void matrix_multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Multiplicand type);

inline float flush_subnormal(float x) { return x > -1.17549435e-38f && x < 1.17549435e-38f ? x * 0.0f : x; }

template <typename T>
T shuffle(const char* where, uint32_t mask, T mine, int source) {
  const Slot* all = exchange(where, mask, &mine, sizeof(T));
  require_lane(where, mask, source);
  T theirs;
  std::memcpy(&theirs, all[source], sizeof(T));
  return theirs;
}

}  // namespace cuda_emulator

// What kernels use by CUDA's names.

#undef __shared__
#define __shared__ shared_memory_is_dynamic_here_use_FUSEDATTN_DYNAMIC_SHARED
#undef __launch_bounds__
#define __launch_bounds__(...)

struct CUstream_st;
using cudaStream_t = CUstream_st*;

// Set whenever a fiber continues.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#define CUDA_EMULATOR_TEXT_(x) #x
#define CUDA_EMULATOR_TEXT(x) CUDA_EMULATOR_TEXT_(x)
#define CUDA_EMULATOR_AT(name) name " at " __FILE__ ":" CUDA_EMULATOR_TEXT(__LINE__)

#define __syncthreads() ((void)cuda_emulator::synchronise_block(CUDA_EMULATOR_AT("__syncthreads")))
#define __syncthreads_count(predicate) \
  cuda_emulator::synchronise_block(CUDA_EMULATOR_AT("__syncthreads_count"), predicate)
#define __syncthreads_or(predicate) \
  static_cast<int>(cuda_emulator::synchronise_block(CUDA_EMULATOR_AT("__syncthreads_or"), predicate) > 0)
#define __syncthreads_and(predicate) \
  static_cast<int>(cuda_emulator::synchronise_block(CUDA_EMULATOR_AT("__syncthreads_and"), !(predicate)) == 0)

inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { cuda_emulator::synchronise_warp("__syncwarp", mask); }

template <typename T>
T __shfl_sync(uint32_t mask, T x, int source, int width = 32) {
  const int first = cuda_emulator::lane() & ~(width - 1);
  return cuda_emulator::shuffle("__shfl_sync", mask, x, first + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T x, int other, int width = 32) {
  const int lane = cuda_emulator::lane(), source = lane ^ other;
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, x, source / width > lane / width ? lane : source);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T x, unsigned distance, int width = 32) {
  const int lane = cuda_emulator::lane(), source = lane - static_cast<int>(distance);
  return cuda_emulator::shuffle("__shfl_up_sync", mask, x, source < (lane & ~(width - 1)) ? lane : source);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T x, unsigned distance, int width = 32) {
  const int lane = cuda_emulator::lane(), source = lane + static_cast<int>(distance);
  return cuda_emulator::shuffle("__shfl_down_sync", mask, x, source > (lane | (width - 1)) ? lane : source);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const unsigned char mine = predicate != 0;
  const cuda_emulator::Slot* all = cuda_emulator::exchange("__ballot_sync", mask, &mine, sizeof(mine));
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) && all[lane][0]) ballot |= 1u << lane;
  return ballot;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Sequentially consistent, which also serves the counter by which the last block of a grid is found.
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T>
T atomicAdd(T* address, T x) {
  T old, sum;
  __atomic_load(address, &old, __ATOMIC_SEQ_CST);
  do {
    sum = old + x;
  } while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
