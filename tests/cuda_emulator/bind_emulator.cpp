// Kernels that test the emulator itself (tests/test_cuda_emulator.py).
#include "bind.h"
#include "common/cuda.cuh"

namespace {

using namespace fusedattn;

// c = a b for a (16, K), b (K, 8), by the register layout that cuda.cuh describes.
template <typename S>
__global__ void product_kernel(const S* a, const S* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](const S& low, const S& high) {
    uint16_t bits[2];
    std::memcpy(&bits[0], &low, 2);
    std::memcpy(&bits[1], &high, 2);
    return bits[0] | uint32_t{bits[1]} << 16;
  };
  const auto of_a = [&](int row, int k) { return pair(a[row * 16 + k], a[row * 16 + k + 1]); };
  const auto of_b = [&](int k, int column) { return pair(b[k * 8 + column], b[(k + 1) * 8 + column]); };
  const uint32_t left[4] = {of_a(g, 2 * t), of_a(g + 8, 2 * t), of_a(g, 2 * t + 8), of_a(g + 8, 2 * t + 8)};
  const uint32_t right[2] = {of_b(2 * t, g), of_b(2 * t + 8, g)};
  float sums[4] = {};
  gpu::mma_16x8x16<S>(sums, left, right);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

__global__ void product_kernel_tf32(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto of_a = [&](int row, int k) { return gpu::to_tf32(a[row * 8 + k]); };
  const uint32_t left[4] = {of_a(g, t), of_a(g + 8, t), of_a(g, t + 4), of_a(g + 8, t + 4)};
  const uint32_t right[2] = {gpu::to_tf32(b[t * 8 + g]), gpu::to_tf32(b[(t + 4) * 8 + g])};
  float sums[4] = {};
  gpu::mma_16x8x8_tf32(sums, left, right);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// Per thread: the sum over its warp, its left neighbour's number, the ballot of odd threads, and how many of the
// block are below 40.
__global__ void collectives_kernel(int64_t* out) {
  const int64_t n = threadIdx.x;
  int64_t* mine = out + n * 4;
  mine[0] = gpu::warp_sum(n);
  mine[1] = __shfl_up_sync(gpu::ALL_LANES, n, 1);
  mine[2] = __ballot_sync(gpu::ALL_LANES, n % 2);
  mine[3] = __syncthreads_count(n < 40);
}

__global__ void misuse_kernel(int kind) {
  if (kind == 0 && threadIdx.x < 32) __syncthreads();
  if (kind == 1 && threadIdx.x % 32 < 16) __shfl_xor_sync(gpu::ALL_LANES, 1.0f, 1);
  if (kind == 2 && threadIdx.x % 32 < 16) __shfl_sync(0xFFFFu, 1.0f, 20);
  if (kind == 3) {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncthreads();
  }
}

}  // namespace

BINDINGS(emulator, module) {
  module.def("product", [](const std::string& dtype, const py::array& a, const py::array& b, const py::array& c) {
    if (dtype == "float32")
      FUSEDATTN_LAUNCH(product_kernel_tf32, 1, 32, 0, nullptr, data<float>(a), data<float>(b), data<float>(c));
    if (dtype == "float16")
      FUSEDATTN_LAUNCH(product_kernel<__half>, 1, 32, 0, nullptr, data<__half>(a), data<__half>(b),
                       data<float>(c));
    if (dtype == "bfloat16")
      FUSEDATTN_LAUNCH(product_kernel<__nv_bfloat16>, 1, 32, 0, nullptr, data<__nv_bfloat16>(a),
                       data<__nv_bfloat16>(b), data<float>(c));
  });
  module.def("collectives", [](const py::array& out) {
    FUSEDATTN_LAUNCH(collectives_kernel, 1, 64, 0, nullptr, data<int64_t>(out));
  });
  module.def("misuse", [](int kind, int64_t grid, unsigned block, size_t shared_bytes) {
    FUSEDATTN_LAUNCH(misuse_kernel, grid, block, shared_bytes, nullptr, kind);
  });
}
