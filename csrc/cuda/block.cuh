// What the stages share: sums over a warp and a block, loading a tile through shared memory, products of small tiles.
#pragma once

#include "tensor.h"

#include <cuda_runtime.h>

#include <limits>

namespace vrm {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
// Not NAN, which newer Windows SDKs make of a function that device code cannot call.
template <class T> constexpr T kNotANumber = std::numeric_limits<T>::quiet_NaN();

// 0 where squares of such components can be summed, else not a number.
template <class T> __device__ __forceinline__ T poison_of(T x) {
  return (x < 0 ? -x : x) <= Guard<T>::largest ? T(0) : kNotANumber<T>;
}

struct SquareRoot {
  template <class T> VRM_HOST_DEVICE T operator()(T x) const { return sqrt(x); }
};

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) >> 5; }

__device__ __forceinline__ char* shared_memory() {
#if defined(VRM_CUDA_SHIM)  // the tests' host build
  return shim::shared_memory();
#else
  extern __shared__ __align__(16) char vrm_shared[];
  return vrm_shared;
#endif
}

// In one fixed order, the result in every lane.
template <class V> __device__ __forceinline__ V warp_sum(V x) {
#pragma unroll
  for (int k = 16; k > 0; k >>= 1) x += __shfl_xor_sync(kFullWarp, x, k);
  return x;
}
template <class V> __device__ __forceinline__ V warp_max(V x) {
#pragma unroll
  for (int k = 16; k > 0; k >>= 1) {
    const V other = __shfl_xor_sync(kFullWarp, x, k);
    x = other > x ? other : x;
  }
  return x;
}

// In every thread of a block of Warps. `room` holds a value a warp and is free again when the call returns.
template <int Warps = kWarps, class V> __device__ __forceinline__ V block_sum(V x, V* room) {
  x = warp_sum(x);
  if (lane_index() == 0) room[warp_index()] = x;
  __syncthreads();
  V total = room[0];
#pragma unroll
  for (int k = 1; k < Warps; ++k) total += room[k];
  __syncthreads();
  return total;
}

// Over the threads before this one; `room` as above.
template <class V> __device__ __forceinline__ V block_sum_before(V x, V* room) {
  V sum = x;  // of the warp, up to this lane
#pragma unroll
  for (int k = 1; k < 32; k <<= 1) {
    const V other = __shfl_up_sync(kFullWarp, sum, k);
    if (lane_index() >= k) sum += other;
  }
  if (lane_index() == 31) room[warp_index()] = sum;
  __syncthreads();
  V before = sum - x;
  for (int k = 0; k < warp_index(); ++k) before += room[k];
  __syncthreads();
  return before;
}

// A square of 32 x 32 elements in shared memory; the odd row length keeps both ways of walking it free of conflicts.
template <class T> struct Square {
  T x[kTile][kTile + 1];
};

// square[v][k] = get(v, k) for the valid ones, else 0. Lanes run along the dimensions or along the vertices, whichever
// is contiguous in memory. The caller synchronises.
template <class T, class Get> __device__ __forceinline__ void load_square(Square<T>& square, bool along_dims,
                                                                          int64_t vertices, int64_t dims,
                                                                          const Get& get) {
#pragma unroll
  for (int r = 0; r < kTile / kWarps; ++r) {
    const int slow = warp_index() + r * kWarps, fast = lane_index();
    const int v = along_dims ? slow : fast, k = along_dims ? fast : slow;
    square.x[v][k] = v < vertices && k < dims ? get(v, k) : T(0);
  }
}

// One side's piece of a product: Depth steps of 32 vertices, element (k, v) at x[k][v].
constexpr int kDepth = 16;
template <class T, int Depth = kDepth> struct Strip {
  T x[Depth][kTile + 1];
};

// strip[k][v] = get(v, k) for v < vertices, k < depth, else 0.
template <class T, int Depth, class Get>
__device__ __forceinline__ void load_strip(Strip<T, Depth>& strip, bool along_depth, int64_t vertices, int64_t depth,
                                           const Get& get) {
#pragma unroll
  for (int r = 0; r < Depth * kTile / kThreads; ++r) {
    const int e = thread_index() + r * kThreads;
    const int v = along_depth ? e / Depth : e % kTile, k = along_depth ? e % Depth : e / kTile;
    strip.x[k][v] = v < vertices && k < depth ? get(v, k) : T(0);
  }
}

// A thread owns the elements (4 warp + r, lane) of a 32 x 32 tile of results, r = 0 ... 3. Adds kDepth steps from
// `first` on.
constexpr int kOwn = kTile / kWarps;
template <class T, int Depth>
__device__ __forceinline__ void multiply_strips(const Strip<T, Depth>& a, const Strip<T, Depth>& b, T (&sum)[kOwn],
                                                int first = 0) {
  const int i = warp_index() * kOwn, j = lane_index();
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const T y = b.x[first + k][j];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) sum[r] += a.x[first + k][i + r] * y;
  }
}

}  // namespace cuda
}  // namespace vrm
