// Stage 4 of the dense form: the vertices as operands of its products, centred, and the student brought to the
// teacher's size, with what an edge needs to know of its two ends. See edge.h.
#pragma once

#include "block.cuh"
#include "problem.h"

namespace vrm {
namespace cuda {

template <class T> __device__ __forceinline__ T load(const Operand& x, int64_t at) {
  if (!x.half) return static_cast<const T*>(x.data)[at];
  return static_cast<T>(__uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(x.data)[at]) << 16));
}

// Rounded to nearest even; NaN stays NaN.
template <class T> __device__ __forceinline__ void store(const Operand& x, int64_t at, T value) {
  if (!x.half) {
    static_cast<T*>(x.data)[at] = value;
    return;
  }
  const uint32_t bits = __float_as_uint(static_cast<float>(value));
  const bool number = value == value;
  static_cast<uint16_t*>(x.data)[at] =
      static_cast<uint16_t>(number ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fc0u);
}

// sums[chunk] = the vertices of a chunk added up; 32 dimensions a block.
template <class T> int64_t sums_blocks(const Graph<T>& g) { return ceil_div(g.dims, kTile) * g.packed.chunks; }

template <class T>
__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ Problem<T> p, int which) {
  const Graph<T>& g = p.graph[which];
  const int64_t chunk = blockIdx.x % g.packed.chunks, k = blockIdx.x / g.packed.chunks * kTile + lane_index();
  const int64_t begin = g.vertices * chunk / g.packed.chunks, end = g.vertices * (chunk + 1) / g.packed.chunks;
  T* room = reinterpret_cast<T*>(shared_memory());
  T sum[2] = {};
  if (k < g.dims)
#pragma unroll 4
    for (int64_t v = begin + warp_index(); v < end; v += kWarps) {
      sum[0] += g.student[v * g.dims + k];
      sum[1] += g.teacher[v * g.dims + k];
    }
  room[thread_index()] = sum[0];
  room[kThreads + thread_index()] = sum[1];
  __syncthreads();
  if (warp_index() > 1 || k >= g.dims) return;  // a warp for the student, one for the teacher
  T total = 0;
  for (int w = 0; w < kWarps; ++w) total += room[warp_index() * kThreads + w * 32 + lane_index()];
  g.packed.sums[(chunk * 2 + warp_index()) * g.dims + k] = total;
}

// The mean vectors, and how far a few vertices lie from them; a dimension a thread.
template <class T> __host__ __device__ inline int64_t means_blocks(const Graph<T>& g) {
  return ceil_div(g.dims, kThreads);
}

template <class T>
__global__ void __launch_bounds__(kThreads) means_kernel(const __grid_constant__ Problem<T> p, int which) {
  const Graph<T>& g = p.graph[which];
  double* room = reinterpret_cast<double*>(shared_memory());
  const int64_t k = blockIdx.x * int64_t{kThreads} + thread_index();
  const int64_t step = g.vertices / 8 > 0 ? g.vertices / 8 : 1;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    double spread = 0;
    if (k < g.dims) {
      const T* x = side == 0 ? g.student : g.teacher;
      T sum = 0;
      for (int64_t chunk = 0; chunk < g.packed.chunks; ++chunk) sum += g.packed.sums[(chunk * 2 + side) * g.dims + k];
      sum /= static_cast<T>(g.vertices);
      const T mean = sum - sum == T(0) ? sum : T(0);  // the sum of huge finite logits may overflow
      g.packed.mean[side * g.dims + k] = mean;
      for (int64_t v = 0; v < g.vertices; v += step) {
        const double far = static_cast<double>(x[v * g.dims + k]) - static_cast<double>(mean);
        spread += far * far;
      }
    }
    spread = block_sum(spread, room);
    if (thread_index() == 0) g.packed.spread[blockIdx.x * 2 + side] = spread;
  }
}

// By a warp, the result in every lane.
template <class T> __device__ __forceinline__ T student_scale(const Graph<T>& g) {
  double student = 0, teacher = 0;
  for (int64_t k = lane_index(); k < means_blocks(g); k += 32) {
    student += g.packed.spread[2 * k];
    teacher += g.packed.spread[2 * k + 1];
  }
  const double exponent = rint(0.5 * log2(warp_sum(teacher) / warp_sum(student)));
  constexpr double most = sizeof(T) == 4 ? 64 : 512;
  const bool usable = exponent >= -most && exponent <= most;  // neither NaN nor a vanished student or teacher
  return usable ? static_cast<T>(ldexp(1.0, static_cast<int>(exponent))) : T(1);
}

// A component of a vertex: centred, the student scaled. The residual is student minus teacher first: exact near
// convergence.
template <class T> struct Centred {
  T student, teacher, residual;

  __device__ __forceinline__ Centred(const Graph<T>& g, T scale, int64_t vertex, int64_t k) {
    const T s = scale * g.student[vertex * g.dims + k], t = g.teacher[vertex * g.dims + k];
    const T mean_s = scale * g.packed.mean[k], mean_t = g.packed.mean[g.dims + k];
    student = s - mean_s, teacher = t - mean_t, residual = (s - t) - (mean_s - mean_t);
  }
};

// A vertex a warp.
template <class T> int64_t pack_blocks(const Graph<T>& g) { return ceil_div(g.vertices, kWarps); }

template <class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Problem<T> p, int which) {
  const Graph<T>& g = p.graph[which];
  const Packed<T>& to = g.packed;
  const int64_t v = blockIdx.x * int64_t{kWarps} + warp_index();
  const T scale = student_scale(g);
  if (blockIdx.x == 0 && thread_index() == 0) g.status->scale = scale;
  if (v >= g.vertices) return;  // a whole warp
  T square_s = 0, square_t = 0, square_w = 0, reach_s = 0, reach_t = 0;
  for (int64_t k = lane_index(); k < to.ld; k += 32) {
    const int64_t at = v * to.ld + k;
    if (k >= g.dims) {
      store(to.x_s, at, static_cast<T>(k == g.dims));
      store(to.x_t, at, T(0));
      store(to.x_w, at, static_cast<T>(k == g.dims + 1));
      continue;
    }
    const Centred<T> own(g, scale, v, k);
    store(to.x_s, at, own.student);
    store(to.x_t, at, own.teacher);
    store(to.x_w, at, own.residual);
    // Norms of what the products see, so that the distances are those of the rounded vectors.
    const T x = load<T>(to.x_s, at), y = load<T>(to.x_t, at), w = load<T>(to.x_w, at);
    square_s += x * x;
    square_t += y * y;
    square_w += w * w;
    reach_s = fabs(x) > reach_s ? fabs(x) : reach_s;
    reach_t = fabs(y) > reach_t ? fabs(y) : reach_t;
  }
  square_s = warp_sum(square_s);
  square_t = warp_sum(square_t);
  square_w = warp_sum(square_w);
  reach_s = warp_max(reach_s);
  reach_t = warp_max(reach_t);
  if (lane_index() != 0) return;
  to.square_s[v] = square_s;
  to.square_t[v] = square_t;
  to.square_w[v] = square_w;
  to.reach_s[v] = reach_s;
  to.reach_t[v] = reach_t;
}

// The factors of the entropy as sums of two bfloat16, side by side: [high, high, low] times [high, low, high]. A vertex
// a warp, those of the rows first.
template <class T> int64_t split_blocks(const Graph<T>& g) { return ceil_div(g.rows + g.columns, kWarps); }

template <class T>
__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ Problem<T> p, int which) {
  const Graph<T>& g = p.graph[which];
  int64_t v = blockIdx.x * int64_t{kWarps} + warp_index();
  if (v >= g.rows + g.columns) return;
  const bool row = v < g.rows;
  if (!row) v -= g.rows;
  const Operand& to = row ? g.packed.probs : g.packed.surprisals;
  const T* from = (row ? g.probs : g.surprisals) + v * g.depth;
  for (int64_t k = lane_index(); k < g.depth; k += 32) {
    const int64_t at = v * 3 * g.depth + k;
    store(to, at, from[k]);
    const T low = from[k] - load<T>(to, at);
    store(to, at + g.depth, row ? from[k] : low);
    store(to, at + 2 * g.depth, row ? low : from[k]);
  }
}

}  // namespace cuda
}  // namespace vrm
