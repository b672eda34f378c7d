// The device of a tensor, for both bindings: current while this lives; and torch's current stream on it.
#pragma once

#include "../stable.h"

#include <cuda_runtime_api.h>

namespace vrm {
namespace cuda {
namespace {

#if defined(VRM_CUDA_SHIM)
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};
#else
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {}
  cudaStream_t stream() const {
    void* stream = nullptr;
    vrm::check(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

}  // namespace
}  // namespace cuda
}  // namespace vrm
