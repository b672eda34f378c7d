// Stage 2: the joint entropies of all edges, and a histogram of them that narrows the selection.
#pragma once

#include "block.cuh"
#include "problem.h"

namespace vrm {
namespace cuda {

// A bin of entropies: 64 to an octave from 2^-16 to 2^16, in the order of the numbers; what lies beyond goes into the
// bins at the ends.
template <class T> __device__ __forceinline__ int bin_of(T entropy) {
  const float x = static_cast<float>(entropy);  // in the same order
  if (!(x > 0.0f)) return 0;
  const int bin = static_cast<int>(__float_as_uint(x) >> 17) - ((127 - 16) << 6);
  return bin < 0 ? 0 : bin >= kBins ? kBins - 1
                                    : bin;
}

// 32 x 32 edges a block.
template <class T> __host__ __device__ inline int64_t entropy_blocks(const Graph<T>& g) {
  return g.keep_all ? 0 : ceil_div(g.rows, kTile) * ceil_div(g.columns, kTile);
}

constexpr int kEntropyDepth = 64;  // of a strip: few trips to memory, one after the other
template <class T> constexpr int64_t kEntropyBytes = 2 * sizeof(Strip<T, kEntropyDepth>);

template <class T> __global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    entropy_kernel(const __grid_constant__ Problem<T> p) {
  auto* strip = reinterpret_cast<Strip<T, kEntropyDepth>*>(shared_memory());
  const bool second = blockIdx.x >= entropy_blocks(p.graph[0]);
  const Graph<T>& g = p.graph[second];
  const int64_t task = second ? blockIdx.x - entropy_blocks(p.graph[0]) : blockIdx.x;
  const int64_t wide = ceil_div(g.columns, kTile), i0 = task / wide * kTile, j0 = task % wide * kTile;
  T entropy[kOwn] = {};
  for (int64_t k0 = 0; k0 < g.depth; k0 += kEntropyDepth) {
    const auto load = [&](Strip<T, kEntropyDepth>& to, const T* factor, int64_t first, int64_t count) {
      load_strip(to, true, count - first, g.depth - k0,
                 [&](int v, int k) { return factor[(first + v) * g.depth + k0 + k]; });
    };
    load(strip[0], g.probs, i0, g.rows);
    load(strip[1], g.surprisals, j0, g.columns);
    __syncthreads();
    for (int k = 0; k < kEntropyDepth; k += kDepth) {
      T sum[kOwn] = {};  // a running sum over all classes would lose digits that decide edges
      multiply_strips(strip[0], strip[1], sum, k);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) entropy[r] += sum[r];
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int64_t i = i0 + warp_index() * kOwn + r, j = j0 + lane_index();
    const bool inside = i < g.rows && j < g.columns, edge = inside && !(g.exclude_self && i == j);
    if (inside) g.entropy[i * g.columns + j] = edge ? entropy[r] : kNotANumber<T>;
    const bool number = edge && entropy[r] == entropy[r];
    if (edge && !number) atomicOr(&g.status->nan, 1);
    // Neighbours often share a bin: one addition for all lanes of it.
    const int bin = number ? bin_of(entropy[r]) : -1;
    const unsigned same = __match_any_sync(kFullWarp, bin);
    if (number && __ffs(static_cast<int>(same)) - 1 == lane_index())
      atomicAdd(&g.status->histogram[bin], static_cast<unsigned>(__popc(same)));
  }
}

}  // namespace cuda
}  // namespace vrm
