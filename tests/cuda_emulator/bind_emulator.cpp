// Kernels that test the emulator itself (tests/test_cuda_emulator.py).
#include "bind.h"
#include "common/cuda.cuh"
#include "product.cuh"

namespace {

using namespace fusedattn;

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
