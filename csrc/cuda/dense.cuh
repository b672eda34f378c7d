// Stage 5 of the dense form: from the dot products of a tile's edges, which a library has taken, loss and coefficients
// of those that are certified, and a bit for each kept one that is not.
#pragma once

#include "pack.cuh"

namespace vrm {
namespace cuda {

constexpr int64_t kLiteralDims = 4;  // in fewer dimensions cosines lose everything to rounding: no edge is certified

// 32 x 32 edges a warp, a column a lane; tasks of a graph are counted by its tiles of 32 x 32.
VRM_HOST_DEVICE constexpr int64_t dense_tasks(int64_t rows, int64_t columns) {
  return ceil_div(rows, kTile) * ceil_div(columns, kTile);
}
template <class T> int64_t dense_blocks(const Tile<T>& tile) {
  return ceil_div(dense_tasks(tile.rows, tile.columns), kWarps);
}

// Whether float16 holds the coefficients of an edge, to all digits of one term or of two. It does not where an end is a
// hundred times, or thirty, as far from the mean as others, or edges are as much shorter.
template <class T> __device__ __forceinline__ bool fits_half(const Packed<T>& packed, T beta, T gamma) {
  const T least = packed.coefficient_terms == 2 ? 2048 * kHalfSmallest : kHalfSmallest;
  return beta >= least && beta <= kHalfLargest && fabs(gamma) <= kHalfLargest;
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    dense_kernel(const __grid_constant__ Problem<T> p, int which, const __grid_constant__ Tile<T> tile) {
  const Graph<T>& g = p.graph[which];
  const Packed<T>& packed = g.packed;
  const int64_t task = blockIdx.x * int64_t{kWarps} + warp_index();
  if (task >= dense_tasks(tile.rows, tile.columns)) return;  // a whole warp
  const int64_t wide = ceil_div(tile.columns, kTile), plane = tile.rows * tile.ld;
  const int64_t i0 = task / wide * kTile, j = task % wide * kTile + lane_index();  // of the tile
  const int64_t column = tile.column + j, other = g.first_b + column;
  const bool has_column = j < tile.columns;
  const T threshold = g.keep_all ? T(0) : g.status->threshold;
  const EdgeRule<T> rule = {g.delta, g.eps * g.status->scale.student, g.eps * g.status->scale.teacher};
  const bool half = packed.x_s.half;
  const End<T> own = has_column ? packed.ends[other] : End<T>{};
  T loss = 0;
  unsigned kept = 0, literals = 0;  // of this column
#pragma unroll(sizeof(T) == 4 ? 4 : 1)  // more of float64 do not fit the registers
  for (int r = 0; r < kTile; ++r) {
    const int64_t i = i0 + r, row = tile.row + i, at = i * tile.ld + j;
    bool literal = false;
    if (i < tile.rows && has_column) {
      T beta = 0, gamma = 0;
      if (!(g.exclude_self && row == column) && (g.keep_all || tile.entropy[i * tile.entropy_ld + j] <= threshold)) {
        const End<T> end = packed.ends[row];
        const EdgeInput<T> input = {tile.dots[at], tile.dots[plane + at], tile.dots[2 * plane + at],
                                    own.square_s + end.square_s, own.square_t + end.square_t,
                                    own.square_w + end.square_w, own.reach_s + end.reach_s, own.reach_t + end.reach_t};
        const auto terms = quadratic_edge(input, rule, SquareRoot());
        beta = terms.beta * packed.coefficient_scale;
        gamma = terms.gamma * packed.coefficient_scale;
        literal = g.dims < kLiteralDims || terms.literal || (half && !fits_half(packed, beta, gamma));
        ++kept;
        if (literal)
          beta = gamma = 0;
        else
          loss += terms.loss;
      }
      if (g.need_grad) {
        store(tile.gamma, at, gamma);
        store(tile.beta, at, beta);
        if (packed.coefficient_terms == 2) {
          store(tile.gamma, plane + at, gamma - load<T>(tile.gamma, at));
          store(tile.beta, plane + at, beta - load<T>(tile.beta, at));
        }
      }
    }
    const unsigned marks = __ballot_sync(kFullWarp, literal);
    literals |= static_cast<unsigned>(literal) << r;
    if (lane_index() == 0 && i < tile.rows) tile.row_bits[i * ceil_div(tile.columns, 32) + j / 32] = marks;
  }
  if (has_column) tile.column_bits[j * ceil_div(tile.rows, 32) + i0 / 32] = literals;
  if (literals != 0) atomicMax(&g.status->uncertified, tile.number);
  kept = warp_sum(kept);
  const double total = warp_sum(static_cast<double>(loss));
  if (lane_index() != 0) return;
  if (kept != 0) atomicAdd(&g.status->kept, static_cast<unsigned long long>(kept));
  packed.losses[(tile.row + i0) / kTile * ceil_div(g.columns, kTile) + column / kTile] = total;
}

// The gradients of a tile, edge.h's gamma x_s - beta x_w from the products [count, width] of gamma, then as many of
// beta, added to those of the tiles before.
constexpr int64_t kAddOfBlock = 4 * kThreads;
inline int64_t add_blocks(int64_t count, int64_t width) { return count * ceil_div(width, kAddOfBlock); }

template <class T> __global__ void __launch_bounds__(kThreads)
    add_kernel(T* grad, int64_t ld, const T* products, int of_each, int64_t count, int64_t width) {
  const int64_t wide = ceil_div(width, kAddOfBlock), v = blockIdx.x / wide, first = blockIdx.x % wide * kAddOfBlock;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t k = first + r * kThreads + thread_index();
    if (k >= width) continue;
    T sum = 0;
    for (int q = 0; q < of_each; ++q)
      sum += products[(q * count + v) * width + k] - products[((of_each + q) * count + v) * width + k];
    grad[v * ld + k] += sum;
  }
}

}  // namespace cuda
}  // namespace vrm
