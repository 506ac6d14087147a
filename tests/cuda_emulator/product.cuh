// Kernels that test the tensor cores of csrc/common/cuda.cuh, in the emulator and as PTX.
#pragma once

#include "common/cuda.cuh"

namespace fusedattn {

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

static __global__ void product_kernel_tf32(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto of_a = [&](int row, int k) { return gpu::to_tf32(a[row * 8 + k]); };
  const uint32_t left[4] = {of_a(g, t), of_a(g + 8, t), of_a(g, t + 4), of_a(g + 8, t + 4)};
  const uint32_t right[2] = {gpu::to_tf32(b[t * 8 + g]), gpu::to_tf32(b[(t + 4) * 8 + g])};
  float sums[4] = {};
  gpu::mma_16x8x8_tf32(sums, left, right);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

}  // namespace fusedattn
