// What every form shares of the host's and the device's side: sizes of blocks, matrices by pointer and strides, and
// working memory.
#pragma once

#include "../edge.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vrm {
namespace cuda {

constexpr int kThreads = 256;  // of a block, but for a few kernels that say so
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 32;  // the kernels work on tiles of 32 vertices by 32 vertices, or by 32 dimensions

VRM_HOST_DEVICE constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Element (v, k) at data[v * vertex_stride + k * dim_stride].
template <class T> struct Matrix {
  T* data;
  int64_t vertex_stride, dim_stride;

  VRM_HOST_DEVICE T& at(int64_t v, int64_t k) const { return data[v * vertex_stride + k * dim_stride]; }
};

// Cuts consecutive arrays from `memory`; with null memory it only counts bytes.
class Carver {
 public:
  explicit Carver(char* memory) : memory_(memory) {}

  template <class V> V* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(V));
    char* at = memory_ == nullptr ? nullptr : memory_ + used_;
#if defined(VRM_CUDA_SHIM)  // the tests' host build: arrays must not touch, and what is read must have been written
    if (at != nullptr) shim::expect_buffer(at, bytes, shim::Access::scratch, sizeof(V) < 4 ? sizeof(V) : 4);
    used_ += kAlign;
#endif
    used_ += ceil_div(bytes, kAlign) * kAlign;
    return reinterpret_cast<V*>(at);
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlign = 256;
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace cuda
}  // namespace vrm
