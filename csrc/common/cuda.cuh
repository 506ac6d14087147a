// CUDA behind thin wrappers: one kernel source for nvcc and, compiled by g++, for the emulator of
// tests/cuda_emulator.
//
// A kernel may use what CUDA and the emulator share (threadIdx, __syncthreads, __shfl_*_sync, atomicAdd, ...) and
// takes from here what they do not: launches, shared memory, approximate instructions and tensor cores. Shared
// memory is always dynamic: the emulator gives each block a heap array of exactly the size asked for, so that
// AddressSanitizer sees an overrun by one element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

#define FUSEDATTN_DEVICE __device__ __forceinline__
#define FUSEDATTN_HOST_DEVICE __host__ __device__ __forceinline__
#define FUSEDATTN_INLINE FUSEDATTN_DEVICE  // of the formulas

#if defined(__CUDACC__)
#define FUSEDATTN_DYNAMIC_SHARED(T, name)                                  \
  extern __shared__ __align__(16) unsigned char fusedattn_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(fusedattn_shared_memory)
#else
#define FUSEDATTN_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(cuda_emulator::dynamic_shared())
#endif

// FUSEDATTN_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...); a template with several arguments
// goes in parentheses: FUSEDATTN_LAUNCH((film_fwd_kernel<S, RELU>), ...). Throws std::runtime_error, naming the
// kernel.
#define FUSEDATTN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::fusedattn::gpu::launch<(kernel)>(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace fusedattn {
namespace gpu {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

// What the kernels were compiled for that run on the current device: 75 for compute capability 7.5. Launchers
// choose by it where a kernel needs more than that has.
#if defined(__CUDACC__)
int architecture();  // cuda_device.cu
#else
inline int architecture() { return cuda_emulator::architecture(); }
#endif

// Tensor cores multiply half precision everywhere, bfloat16 and TF32 from here on.
constexpr int SM_80 = 80;

// Shared memory that every block may have without asking, and with: what sm_75 gives, or the smallest of the later
// GPUs (sm_86, sm_120).
constexpr size_t SHARED_DEFAULT = 48 << 10;
inline size_t shared_most() { return (architecture() < SM_80 ? 64 : 99) << 10; }

FUSEDATTN_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned checked_blocks(const char* name, int64_t blocks) {
  constexpr int64_t MOST = 2147483647;  // of a grid's first dimension, on every GPU
  if (blocks > MOST)
    throw std::runtime_error(std::string(name) + ": expected at most " + std::to_string(MOST) +
                             " blocks, but these sizes need " + std::to_string(blocks));
  return static_cast<unsigned>(blocks);
}

#if defined(__CUDACC__)

constexpr int MAX_DEVICES = 128;  // torch counts them in 8 bits

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgotten, or the next launch would report it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// A kernel asks for the most, once on each device: were it what a call needs, the call of another thread could
// lower it before this one's launch.
template <auto kernel>
void allow_shared_most(const char* name) {
  static std::atomic<bool> allowed[MAX_DEVICES];
  std::atomic<bool>& here = allowed[current_device()];
  if (here.load(std::memory_order_relaxed)) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_most())),
        name);
  here.store(true, std::memory_order_relaxed);
}

template <auto kernel, typename... P, typename... A>
void launch(const char* name, void (*)(P...), int64_t blocks, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A&&... arguments) {
  const dim3 grid(checked_blocks(name, blocks));
  if (shared_bytes > SHARED_DEFAULT) allow_shared_most<kernel>(name);
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  check(cudaGetLastError(), name);
}

#else

template <auto kernel, typename... P, typename... A>
void launch(const char* name, void (*)(P...), int64_t blocks, dim3 block, size_t shared_bytes, cudaStream_t,
            A&&... arguments) {
  const dim3 grid(checked_blocks(name, blocks));
  cuda_emulator::launch(name, grid, block, shared_bytes, [&] { kernel(static_cast<P>(arguments)...); });
}

#endif

// Storage types and the type of the arithmetic on them.
template <typename S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <typename S>
using Arithmetic = typename ArithmeticOf<S>::type;

FUSEDATTN_HOST_DEVICE float to_arithmetic(float x) { return x; }
FUSEDATTN_HOST_DEVICE double to_arithmetic(double x) { return x; }
FUSEDATTN_HOST_DEVICE float to_arithmetic(__half x) { return __half2float(x); }
FUSEDATTN_HOST_DEVICE float to_arithmetic(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename S>
FUSEDATTN_HOST_DEVICE S to_storage(Arithmetic<S> x) {
  return x;
}
template <>
FUSEDATTN_HOST_DEVICE __half to_storage<__half>(float x) {
  return __float2half_rn(x);
}
template <>
FUSEDATTN_HOST_DEVICE __nv_bfloat16 to_storage<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Elements of type S or, where a parameter is wider than the other inputs, of the arithmetic's; null: absent.
template <typename S>
struct Numbers {
  using T = Arithmetic<S>;
  void* data = nullptr;
  bool wide = false;

  FUSEDATTN_DEVICE T get(int64_t n) const {
    return wide ? static_cast<const T*>(data)[n] : to_arithmetic(static_cast<const S*>(data)[n]);
  }
  FUSEDATTN_DEVICE void set(int64_t n, T x) const {
    if (wide)
      static_cast<T*>(data)[n] = x;
    else
      static_cast<S*>(data)[n] = to_storage<S>(x);
  }
};

// W neighbouring storage elements, 16 bytes unless said otherwise, moved by one instruction (by more beyond 16
// bytes). Their address must be a multiple of their size, or of 16.
template <typename S, int W = 16 / sizeof(S)>
struct alignas(W * sizeof(S) < 16 ? W * sizeof(S) : 16) Pack {
  static constexpr int SIZE = W;
  S element[W];
};

template <int W, typename S>
FUSEDATTN_DEVICE Pack<S, W> load_pack(const S* p) {
  return *reinterpret_cast<const Pack<S, W>*>(p);
}
template <typename S>
FUSEDATTN_DEVICE Pack<S> load_pack(const S* p) {
  return *reinterpret_cast<const Pack<S>*>(p);
}
template <typename S, int W>
FUSEDATTN_DEVICE void store_pack(S* p, const Pack<S, W>& pack) {
  *reinterpret_cast<Pack<S, W>*>(p) = pack;
}
// To global memory, always as one instruction: nvcc may split the assignment of a pack.
template <typename S, int W>
FUSEDATTN_DEVICE void store_pack_global(S* p, const Pack<S, W>& pack) {
#if defined(__CUDACC__)
  if constexpr (sizeof(pack) == 16) {
    uint4 bits;
    std::memcpy(&bits, &pack, sizeof(bits));
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
    return;
  }
#endif
  store_pack(p, pack);
}

FUSEDATTN_HOST_DEVICE bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// One instruction each in float (2 ulp; subnormal numbers count as zero).
FUSEDATTN_DEVICE float rcp_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return cuda_emulator::flush_subnormal(1.0f / cuda_emulator::flush_subnormal(x));
#endif
}
// In double by Newton steps from 20 bits: a division would be a call, with registers spilled around it. x and its
// reciprocal must be normal numbers.
FUSEDATTN_DEVICE double rcp_approx(double x) {
#if defined(__CUDACC__)
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  y = ::fma(y, ::fma(-x, y, 1.0), y);
  return ::fma(y, ::fma(-x, y, 1.0), y);
#else
  return 1.0 / x;
#endif
}

FUSEDATTN_DEVICE float exp2_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return cuda_emulator::flush_subnormal(::exp2f(cuda_emulator::flush_subnormal(x)));
#endif
}
FUSEDATTN_DEVICE double exp2_approx(double x) { return ::exp2(x); }

// Relative error 2^-23 |x|: rounding of x log2 e. Where |x| may be large, take exp.
FUSEDATTN_DEVICE float exp_approx(float x) { return exp2_approx(x * 1.44269504f); }
FUSEDATTN_DEVICE double exp_approx(double x) { return ::exp(x); }

// Accurate functions (1 to 2 ulp) by the type of their argument.
FUSEDATTN_DEVICE float exp(float x) { return ::expf(x); }
FUSEDATTN_DEVICE double exp(double x) { return ::exp(x); }
FUSEDATTN_DEVICE float log(float x) { return ::logf(x); }
FUSEDATTN_DEVICE double log(double x) { return ::log(x); }
FUSEDATTN_DEVICE float tanh(float x) { return ::tanhf(x); }
FUSEDATTN_DEVICE double tanh(double x) {  // without the division of ::tanh, for the reason given at rcp_approx
  const double t = ::expm1(-2 * ::fabs(x));
  return ::copysign(t * rcp_approx(2 + t), x);
}
FUSEDATTN_DEVICE float erfc(float x) { return ::erfcf(x); }
FUSEDATTN_DEVICE double erfc(double x) { return ::erfc(x); }
FUSEDATTN_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FUSEDATTN_DEVICE double fma(double a, double b, double c) { return ::fma(a, b, c); }
FUSEDATTN_DEVICE float abs(float x) { return ::fabsf(x); }
FUSEDATTN_DEVICE double abs(double x) { return ::fabs(x); }
// The other argument where one is NaN.
FUSEDATTN_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
FUSEDATTN_DEVICE double max(double a, double b) { return ::fmax(a, b); }
// max(x, 0), but NaN stays.
FUSEDATTN_DEVICE float relu(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x <= 0 ? 0 : x;
#endif
}
FUSEDATTN_DEVICE double relu(double x) { return x <= 0 ? 0 : x; }
FUSEDATTN_DEVICE float min(float a, float b) { return ::fminf(a, b); }
FUSEDATTN_DEVICE double min(double a, double b) { return ::fmin(a, b); }

// Every lane gets the result over the warp, added in the same order in each run.
template <typename T>
FUSEDATTN_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}
template <typename T>
FUSEDATTN_DEVICE T warp_max(T x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}

// Tensor cores: c (16 x 8, float) += a (16 x K) b (K x 8) by all lanes of a warp. With g = lane / 4 and t = lane %
// 4:
//   c[0], c[1]: row g,     columns 2t, 2t + 1       c[2], c[3]: row g + 8, the same columns
// K = 16, half or bfloat16, two elements a register (the lower index in the lower half):
//   a[0]: row g,     columns 2t, 2t + 1             a[1]: row g + 8, the same columns
//   a[2], a[3]: the same rows, columns 2t + 8, 2t + 9
//   b[0]: rows 2t, 2t + 1 of column g               b[1]: rows 2t + 8, 2t + 9 of column g
// K = 8, TF32, one element a register:
//   a[0]: row g, column t     a[1]: row g + 8, column t     a[2]: row g, column t + 4     a[3]: row g + 8, column
//   t + 4 b[0]: row t of column g   b[1]: row t + 4 of column g
template <typename S>
FUSEDATTN_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // half precision, K = 8 at a time; others are not launched

template <>
FUSEDATTN_DEVICE void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
}
template <>
FUSEDATTN_DEVICE void mma_16x8x16<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {
  __trap();
}
FUSEDATTN_DEVICE void mma_16x8x8_tf32(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) { __trap(); }

#elif defined(__CUDACC__)

template <>
FUSEDATTN_DEVICE void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
FUSEDATTN_DEVICE void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FUSEDATTN_DEVICE void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

template <>
FUSEDATTN_DEVICE void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_emulator::matrix_multiply(c, a, b, cuda_emulator::Multiplicand::HALF);
}
template <>
FUSEDATTN_DEVICE void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_emulator::matrix_multiply(c, a, b, cuda_emulator::Multiplicand::BFLOAT16);
}
FUSEDATTN_DEVICE void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_emulator::matrix_multiply(c, a, b, cuda_emulator::Multiplicand::TF32);
}

#endif

// Rounds to the 10 mantissa bits of TF32, to nearest, ties away from zero.
FUSEDATTN_HOST_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  std::memcpy(&bits, &x, sizeof(bits));
  if (x == x) bits = (bits + 0x1000u) & 0xFFFFE000u;
#endif
  return bits;
}

// float32 rounded for tensor cores, as it lies in shared memory; its arithmetic type is float.
struct Tf32 {
  uint32_t bits;
};
template <>
FUSEDATTN_HOST_DEVICE Tf32 to_storage<Tf32>(float x) {
  return {to_tf32(x)};
}

}  // namespace gpu
}  // namespace fusedattn
