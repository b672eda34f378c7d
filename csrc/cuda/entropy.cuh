// Stage 2: the joint entropies of all edges.
#pragma once

#include "pack.cuh"

namespace vrm {
namespace cuda {

// 32 x 32 edges a task.
VRM_HOST_DEVICE constexpr int64_t entropy_tasks(int64_t rows, int64_t columns) {
  return ceil_div(rows, kTile) * ceil_div(columns, kTile);
}
template <class T> __host__ __device__ inline int64_t entropy_blocks(const Graph<T>& g) {
  return g.ranked() ? entropy_tasks(g.rows, g.columns) : 0;
}

constexpr int kEntropyDepth = 64;  // of a strip: few trips to memory, one after the other
template <class T> constexpr int64_t kEntropyBytes = 2 * sizeof(Strip<T, kEntropyDepth>);

// visit(i, j, entropy) for the edges of a tile's task, those beyond the tile and of a vertex with itself among them, i
// and j being counted from its begin: all lanes of a warp together. By a block. Operands may be float16 if `Half`.
template <bool Half, class T, class Visit> __device__ __forceinline__ void
visit_entropies(const Graph<T>& g, int64_t task, const Tile<T>& tile, const Visit& visit) {
  auto* strip = reinterpret_cast<Strip<T, kEntropyDepth>*>(shared_memory());
  const int64_t wide = ceil_div(tile.columns, kTile), i0 = task / wide * kTile, j0 = task % wide * kTile;
  const int64_t depth = g.entropy_depth;
  T entropy[kOwn] = {};
  for (int64_t k0 = 0; k0 < depth; k0 += kEntropyDepth) {
    const auto load_factor = [&](Strip<T, kEntropyDepth>& to, const Operand& factor, int64_t first, int64_t count) {
      const int64_t at = first * depth + k0;
      load_strip(to, true, count - first, depth - k0, [&](int v, int k) {
        return Half ? load<T>(factor, at + v * depth + k) : static_cast<const T*>(factor.data)[at + v * depth + k];
      });
    };
    load_factor(strip[0], g.probs, tile.row + i0, g.rows);
    load_factor(strip[1], g.surprisals, tile.column + j0, g.columns);
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
  for (int r = 0; r < kOwn; ++r) visit(i0 + warp_index() * kOwn + r, j0 + lane_index(), entropy[r]);
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    entropy_kernel(const __grid_constant__ Problem<T> p) {
  const bool second = blockIdx.x >= entropy_blocks(p.graph[0]);
  const Graph<T>& g = p.graph[second];
  const int64_t task = second ? blockIdx.x - entropy_blocks(p.graph[0]) : blockIdx.x;
  Tile<T> whole{};
  whole.rows = g.rows, whole.columns = g.columns;
  visit_entropies<false>(g, task, whole, [&](int64_t i, int64_t j, T entropy) {
    if (i < g.rows && j < g.columns) g.entropy[i * g.columns + j] = g.exclude_self && i == j ? kNotANumber<T> : entropy;
  });
}

}  // namespace cuda
}  // namespace vrm
