// Stage 5: the gradients as the caller gets them, the loss and its terms.
#pragma once

#include "dense.cuh"
#include "prepare.cuh"

namespace vrm {
namespace cuda {

template <class T> __device__ __forceinline__ bool is_poisoned(const Problem<T>& p, int graph) {
  const Graph<T>& g = p.graph[graph];
  return p.totals->poisoned != 0 || (!g.keep_all && !(g.status->threshold == g.status->threshold));
}

template <class T> __device__ __forceinline__ int64_t kept_of(const Graph<T>& g) {
  return g.given_kept != nullptr ? *g.given_kept : static_cast<int64_t>(g.status->kept);
}

// What a graph's gradient is multiplied by; NaN poisons all of it.
template <class T> __device__ __forceinline__ T gradient_scale(const Problem<T>& p, int graph) {
  if (is_poisoned(p, graph)) return kNotANumber<T>;
  const Graph<T>& g = p.graph[graph];
  return static_cast<T>(g.weight / (static_cast<double>(kept_of(g)) + kCountEps));
}

// Of a vertex, of the sum of its edges' losses.
template <class T> __device__ __forceinline__ T graph_gradient(const Graph<T>& g, int64_t vertex, int64_t k) {
  const T* grad = g.grad + vertex * g.grad_ld;
  if (!g.dense) return grad[k];
  // Products give the sums over the other vertices, edge.h's gamma x_s - beta x_w; what remains has the vertex's own
  // vectors, which are not rounded as operands are, and the sums of the coefficients, behind the dimensions.
  const Scales<T> scale = g.status->scale;
  const Centred<T> own(g, scale, vertex, k);
  return scale.student / g.packed.coefficient_scale *
         (grad[k] - grad[g.dims + 1] * own.residual - grad[g.dims] * own.student);
}

template <class T> __host__ __device__ inline int64_t finish_tasks(const Output<T>& o) {
  return ceil_div(o.rows, kTile) * ceil_div(o.columns, kTile);
}

// 32 x 32 elements of an output.
template <class T>
__device__ __forceinline__ void finish_tile(const Problem<T>& p, int which, int64_t task, Square<T>& square) {
  const Output<T>& o = p.output[which];
  const int64_t wide = ceil_div(o.columns, kTile), v0 = task / wide * kTile, k0 = task % wide * kTile;
  const bool two = p.graphs > 1;
  if (two)
    load_square(square, false, o.rows - v0, o.columns - k0,
                [&](int v, int k) { return graph_gradient(p.graph[1], o.by_column + k0 + k, v0 + v); });
  __syncthreads();
  const T by_row = gradient_scale(p, 0), by_column = two ? gradient_scale(p, 1) : T(0);
  const Batch<T>& b = p.batch;
  const bool cross_entropy = b.samples > 0 && b.cross_entropy[which];
  const T per_divisor = cross_entropy ? static_cast<T>(1.0 / p.totals->divisor[which]) : T(0);
  const int64_t k = k0 + lane_index();
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int64_t v = v0 + warp_index() * kOwn + r, at = v * o.columns + k;
    if (v >= o.rows || k >= o.columns) continue;
    T grad = by_row * graph_gradient(p.graph[0], o.by_row + v, k);
    if (two) grad += by_column * square.x[warp_index() * kOwn + r][lane_index()];
    if (cross_entropy) {
      const int64_t row = which * b.samples + v;
      grad += per_divisor * (probability(b, which, v, k) * b.ce_targets[row] - Target<T>(b, v)(k));
    }
    o.out[at] = grad;
  }
}

// Losses, terms and counts, by a block.
template <class T> __device__ __forceinline__ void finish_loss(const Problem<T>& p, double* room) {
  const Batch<T>& b = p.batch;
  double total = 0;
  for (int view = 0; view < 2 && b.samples > 0; ++view) {
    const double mean = p.totals->cross_entropy[view];
    total += mean;
    if (thread_index() == 0) p.terms_out[view] = static_cast<T>(mean);
  }
  for (int k = 0; k < p.graphs; ++k) {
    const Graph<T>& g = p.graph[k];
    double sum = 0;
    for (int64_t i = thread_index(); i < g.rows; i += kThreads) sum += g.losses[i];
    if (g.dense)
      for (int64_t i = thread_index(); i < dense_tasks(g.rows, g.columns); i += kThreads) sum += g.packed.losses[i];
    sum = block_sum(sum, room);
    const bool poisoned = is_poisoned(p, k);
    const double loss = poisoned ? kNotANumber<double> : sum / (static_cast<double>(kept_of(g)) + kCountEps);
    total += g.weight * loss;
    if (thread_index() != 0) continue;
    if (b.samples > 0) p.terms_out[2 + k] = static_cast<T>(loss);
    p.kept_out[k] = poisoned ? 0 : kept_of(g);
  }
  if (thread_index() == 0) *p.loss_out = static_cast<T>(total);
}

template <class T> int64_t finish_blocks(const Problem<T>& p) {
  return 1 + (p.graph[0].need_grad ? finish_tasks(p.output[0]) + finish_tasks(p.output[1]) : 0);
}
template <class T> constexpr int64_t kFinishBytes = sizeof(Square<T>);

template <class T> __global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Problem<T> p) {
  if (blockIdx.x == 0) return finish_loss(p, reinterpret_cast<double*>(shared_memory()));
  const int64_t task = blockIdx.x - 1, first = finish_tasks(p.output[0]);
  const int which = task >= first;
  finish_tile(p, which, which == 0 ? task : task - first, *reinterpret_cast<Square<T>*>(shared_memory()));
}

}  // namespace cuda
}  // namespace vrm
