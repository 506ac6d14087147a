// Which of the compiled kernels a device gets, and why it may get none.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>

#include "cuda.cuh"

namespace fusedattn {
namespace {

// Compiled for the same architectures as every other kernel.
__global__ void probe_kernel() {}

cudaError_t ask(cudaFuncAttributes& attributes) {
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
}

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Why these kernels cannot run on a device; empty if they can.
std::string cuda_error(int64_t device) {
  int driver = 0, runtime = 0;
  gpu::check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  gpu::check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  if (driver / 1000 < runtime / 1000)
    return "they were built with CUDA " + version(runtime) + ", " +
           (driver == 0 ? std::string("and there is no driver") : "the driver is one of CUDA " + version(driver));
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t error = ask(attributes);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // asked for, and answered
  return cudaGetErrorString(error);
}

}  // namespace

int gpu::architecture() {
  static std::atomic<int> known[MAX_DEVICES];
  std::atomic<int>& here = known[current_device()];
  int architecture = here.load(std::memory_order_relaxed);
  if (architecture == 0) {
    cudaFuncAttributes attributes;
    check(ask(attributes), "cudaFuncGetAttributes");
    architecture = attributes.ptxVersion;
    here.store(architecture, std::memory_order_relaxed);
  }
  return architecture;
}

STABLE_TORCH_LIBRARY_IMPL(fusedattn, CompositeExplicitAutograd, m) {
  m.impl("cuda_error", TORCH_BOX(&cuda_error));
}

}  // namespace fusedattn
