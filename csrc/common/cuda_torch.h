// What the CUDA launchers of every op share: device, stream and storage types, through LibTorch's stable ABI.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda.cuh"

namespace fusedattn {
namespace gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the device of a tensor the current one while it lives, and holds torch's current stream there.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(index(t)), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // The dispatcher chooses CUDA if any input is there; the others might not be.
  void require(const Tensor& t, const char* op, const char* name) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == index_, op, ": ", name,
                    ": expected a tensor on device cuda:", index_, " like the first input");
  }
  void require(const std::optional<Tensor>& t, const char* op, const char* name) const {
    if (t) require(*t, op, name);
  }

 private:
  static int32_t index(const Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), "fusedattn: expected the first input on a CUDA device, where others are");
    return t.get_device_index();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// body(S{}) for the storage type S of a dtype.
template <typename Body>
auto with_storage(ScalarType type, const char* op, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(__half{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, float16 or bfloat16");
      return body(float{});
  }
}

// The dtype of the arithmetic on a storage type.
template <typename S>
constexpr ScalarType arithmetic_type() {
  return sizeof(S) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

template <typename S>
const S* data(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <typename S>
const S* data(const std::optional<Tensor>& t) {
  return t ? data<S>(*t) : nullptr;
}
template <typename S>
S* mutable_data(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

// A parameter beside inputs of dtype `type`, whose storage type is S, or its gradient.
template <typename S>
Numbers<S> numbers(const Tensor& t, ScalarType type, const char* name) {
  const bool wide = t.scalar_type() != type;
  STD_TORCH_CHECK(!wide || t.scalar_type() == arithmetic_type<S>(), name,
                  ": expected the dtype of the first input or, beside half precision, float32");
  return {const_cast<void*>(t.const_data_ptr()), wide};
}
template <typename S>
Numbers<S> numbers(const std::optional<Tensor>& t, ScalarType type, const char* name) {
  return t ? numbers<S>(*t, type, name) : Numbers<S>{};
}

}  // namespace gpu
}  // namespace fusedattn
