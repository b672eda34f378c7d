// How kernels are launched: refusals are errors, and every launch is checked.
#pragma once

#include "tensor.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace vrm {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("vrm_kernels: CUDA could not ") + what + ": " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "name the current device");
  check(cudaDeviceGetAttribute(&value, which, device), "describe the device");
  return value;
}

struct Launch {
  int64_t blocks;
  int64_t shared_bytes = 0;
  int threads = kThreads;
  bool cooperative = false;
};

// No blocks: nothing to do.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& size, cudaStream_t stream, const Arguments&... arguments) {
  if (size.blocks == 0) return;
  if (size.shared_bytes > 48 << 10)  // more than this has to be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(size.shared_bytes)),
          "give a kernel its shared memory");
  cudaLaunchAttribute attributes[1];
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(size.blocks));
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = static_cast<size_t>(size.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = size.cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch a kernel");
  check(cudaGetLastError(), "launch a kernel");
}

template <class T> void clear(T* x, int64_t count, cudaStream_t stream) {
  check(cudaMemsetAsync(x, 0, static_cast<size_t>(count) * sizeof(T), stream), "clear memory");
}

}  // namespace cuda
}  // namespace vrm
