// The part of the CUDA runtime that nvcc's host code calls, without a driver: a launch goes to a callback.
//
// Linked into a module whose kernels the executor of PTX runs (../nvcc.py). Memory from operator new is listed, so
// that the executor knows the bounds of what a launcher allocates.
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <new>

namespace {

using Callback = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                          size_t shared_bytes);
using Visitor = void (*)(const void* memory, size_t size);

template <typename T>
struct Malloc {  // the maps' own memory, which operator new must not see
  using value_type = T;
  Malloc() = default;
  template <typename U>
  Malloc(const Malloc<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(std::malloc(n * sizeof(T))); }
  void deallocate(T* p, size_t) { std::free(p); }
  bool operator==(const Malloc&) const { return true; }
  bool operator!=(const Malloc&) const { return false; }
};
template <typename K, typename V>
using Map = std::map<K, V, std::less<K>, Malloc<std::pair<const K, V>>>;

Callback callback = nullptr;
struct {
  dim3 grid, block;
  size_t shared_bytes;
} configuration;

// Never destroyed: memory is freed after the destructors of statics, too.
Map<const void*, const char*>& kernels() {
  static auto* names = new (std::malloc(sizeof(Map<const void*, const char*>))) Map<const void*, const char*>;
  return *names;
}
Map<void*, size_t>& allocations() {
  static auto* sizes = new (std::malloc(sizeof(Map<void*, size_t>))) Map<void*, size_t>;
  return *sizes;
}

}  // namespace

namespace fusedattn::gpu {
int architecture() { return 80; }  // as nvcc.py compiles
}  // namespace fusedattn::gpu

extern "C" {

__attribute__((visibility("default"))) void ptx_on_launch(Callback f) { callback = f; }
__attribute__((visibility("default"))) void ptx_visit_memory(Visitor f) {
  for (const auto& [memory, size] : allocations()) f(memory, size);
}

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st*) {
  configuration = {grid, block, shared_bytes};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void*) {
  *grid = configuration.grid, *block = configuration.block, *shared_bytes = configuration.shared_bytes;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t) {
  const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  callback(kernels().at(kernel), blocks, threads, arguments, shared_bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

}  // extern "C"

void* operator new(size_t size) {
  void* memory = std::malloc(size != 0 ? size : 1);
  if (memory == nullptr) throw std::bad_alloc();
  allocations()[memory] = size;
  return memory;
}
void operator delete(void* memory) noexcept {
  allocations().erase(memory);
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept { operator delete(memory); }
