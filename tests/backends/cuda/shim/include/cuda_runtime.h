// CUDA's dialect on the host, for the tests: as much of it as the kernels of csrc/cuda use, and no more.
//
// Every CUDA thread is a fibre; a block's fibres, or a whole grid's where the launch is cooperative, take turns on one
// thread of the host, switching at barriers and warp operations. The kernels are compiled with -fsanitize=thread but
// not linked with its library: the calls that the compiler puts before every access to memory come to shim.cpp, which
// checks that the access lies in a buffer, that what is read was written, and that no two threads touch the same word,
// one of them writing, without a barrier between.
#pragma once

#define VRM_CUDA_SHIM 1

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include <math.h>

#define VRM_UNCHECKED __attribute__((no_sanitize("thread")))  // the emulation's own accesses

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n)

struct dim3 {
  unsigned x, y, z;
  dim3() : dim3(1) {}
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fibre

namespace shim {

// Scratch must be written before it is read, and so must an output, of which every element must be written at the end.
enum class Access { scratch,
                    output,
                    initialised };

void sync_block();
void sync_grid();
void sync_warp();
// Every lane of the warp gives a value; returns all 32, valid until the lane's next warp operation.
const uint64_t* exchange(unsigned mask, uint64_t value);
char* shared_memory();
bool device_is_known();
void note_atomic(const void* address, int bytes);
void note_product(int64_t multiply_adds, bool half);

// The kernels may touch these bytes until forget_buffers(), which throws if part of an output was not written.
// Accesses are told apart by words of `granule` bytes.
void expect_buffer(const void* address, int64_t bytes, Access access, int64_t granule = 4);
void note_written(const void* address, int64_t bytes);
void forget_buffers();
void drop_buffers();  // of a call that has failed

using Entry = void (*)(const void* arguments);
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, Entry entry, const void* arguments,
              const void* kernel);

template <class V> uint64_t to_bits(V value) {
  static_assert(sizeof(V) <= 8, "one register pair");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  return bits;
}
template <class V> V from_bits(uint64_t bits) {
  V value;
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

}  // namespace shim

inline void __syncthreads() { shim::sync_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { shim::sync_warp(); }
template <class V> VRM_UNCHECKED V __shfl_xor_sync(unsigned mask, V value, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  return shim::from_bits<V>(shim::exchange(mask, shim::to_bits(value))[lane ^ lanes]);
}
template <class V> VRM_UNCHECKED V __shfl_up_sync(unsigned mask, V value, unsigned lanes) {
  const unsigned lane = threadIdx.x & 31;
  return shim::from_bits<V>(shim::exchange(mask, shim::to_bits(value))[lane >= lanes ? lane - lanes : lane]);
}
VRM_UNCHECKED inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = shim::exchange(mask, predicate != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(all[lane]) << lane;
  return ballot;
}
template <class V> VRM_UNCHECKED unsigned __match_any_sync(unsigned mask, V value) {
  const uint64_t mine = shim::to_bits(value), *all = shim::exchange(mask, mine);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= static_cast<unsigned>(all[lane] == mine) << lane;
  return same;
}

template <class V, class W> VRM_UNCHECKED V atomicAdd(V* address, W value) {
  shim::note_atomic(address, sizeof(V));
  const V old = *address;
  *address = static_cast<V>(old + value);
  return old;
}
template <class V> VRM_UNCHECKED V atomicMin(V* address, V value) {
  shim::note_atomic(address, sizeof(V));
  const V old = *address;
  *address = value < old ? value : old;
  return old;
}
template <class V> VRM_UNCHECKED V atomicMax(V* address, V value) {
  shim::note_atomic(address, sizeof(V));
  const V old = *address;
  *address = value > old ? value : old;
  return old;
}
template <class V> VRM_UNCHECKED V atomicOr(V* address, V value) {
  shim::note_atomic(address, sizeof(V));
  const V old = *address;
  *address = old | value;
  return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(shim::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return shim::from_bits<float>(x); }
inline long long __double_as_longlong(double x) { return static_cast<long long>(shim::to_bits(x)); }
inline double __longlong_as_double(long long x) { return shim::from_bits<double>(static_cast<uint64_t>(x)); }

// ---- the runtime
// -----------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16,
                      cudaDevAttrCooperativeLaunch = 95 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
using cudaStream_t = struct CUstream_st*;

union cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

constexpr int kShimSharedBytes = 99 << 10;  // of a block: the least that a supported device has
constexpr int kShimMultiprocessors = 3, kShimResidentBlocks = 2;  // an odd number of blocks: tasks do not divide evenly

inline const char* cudaGetErrorString(cudaError_t) { return "refused by the host emulation"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? kShimMultiprocessors : 1;
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= kShimSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}
struct cudaFuncAttributes {};
template <class Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return shim::device_is_known() ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
template <class Kernel> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = kShimResidentBlocks, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  shim::note_written(address, static_cast<int64_t>(bytes));
  return cudaSuccess;
}
template <class... Parameters, class... Arguments> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                                                                                  void (*kernel)(Parameters...),
                                                                                  Arguments&&... arguments) {
  if (!shim::device_is_known()) return shim::drop_buffers(), cudaErrorNoKernelImageForDevice;
  if (config->gridDim.x == 0 || config->blockDim.x % 32 != 0) return cudaErrorInvalidValue;
  const bool cooperative = config->numAttrs > 0 && config->attrs[0].val.cooperative != 0;
  if (cooperative && config->gridDim.x > kShimMultiprocessors * kShimResidentBlocks)
    return cudaErrorCooperativeLaunchTooLarge;
  const auto call = [&]() VRM_UNCHECKED { kernel(arguments...); };  // copies the parameters onto each fibre's stack
  shim::run_grid(
      config->gridDim, config->blockDim, config->dynamicSmemBytes, cooperative,
      [](const void* context) VRM_UNCHECKED { (*static_cast<const decltype(call)*>(context))(); }, &call,
      reinterpret_cast<const void*>(kernel));
  return cudaSuccess;
}
