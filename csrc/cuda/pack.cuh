// Stage 4 of the dense form: the vertices as operands of its products, centred, and the student brought to the
// teacher's size, with what an edge needs to know of its two ends. See edge.h.
#pragma once

#include "prepare.cuh"

namespace vrm {
namespace cuda {

constexpr float kHalfLargest = 65504.0f, kHalfSmallest = 6.103515625e-5f;  // of float16's normal numbers

template <class T> __device__ __forceinline__ T load(const Operand& x, int64_t at) {
  if (!x.half) return static_cast<const T*>(x.data)[at];
  return static_cast<T>(__half2float(__ushort_as_half(static_cast<const uint16_t*>(x.data)[at])));
}

template <class T> __device__ __forceinline__ void store(const Operand& x, int64_t at, T value) {
  if (x.half)
    static_cast<uint16_t*>(x.data)[at] = __half_as_ushort(__float2half_rn(static_cast<float>(value)));
  else
    static_cast<T*>(x.data)[at] = value;
}

// sums[chunk] = the vertices of a chunk added up; 32 dimensions a block.
template <class T> int64_t sums_blocks(const Graph<T>& g) { return ceil_div(g.dims, kTile) * g.packed.chunks; }

template <class T>
__global__ void __launch_bounds__(kThreads, 4) sums_kernel(const __grid_constant__ Problem<T> p, int which) {
  const Graph<T>& g = p.graph[which];
  const int64_t chunk = blockIdx.x % g.packed.chunks, k = blockIdx.x / g.packed.chunks * kTile + lane_index();
  const int64_t begin = g.vertices * chunk / g.packed.chunks, end = g.vertices * (chunk + 1) / g.packed.chunks;
  T* room = reinterpret_cast<T*>(shared_memory());
  T sum[2] = {};
  if (k < g.dims)
#pragma unroll 4
    for (int64_t v = begin + warp_index(); v < end; v += kWarps) {
      sum[0] += student_of(g, v)[k];
      sum[1] += teacher_of(g, v)[k];
    }
  room[thread_index()] = sum[0];
  room[kThreads + thread_index()] = sum[1];
  __syncthreads();
  if (warp_index() > 1 || k >= g.dims) return;  // a warp for the student, one for the teacher
  T total = 0;
  for (int w = 0; w < kWarps; ++w) total += room[warp_index() * kThreads + w * 32 + lane_index()];
  g.packed.sums[(chunk * 2 + warp_index()) * g.dims + k] = total;
}

// The mean vectors, and how far eight or some more vertices lie from them; a dimension a thread.
template <class T> VRM_HOST_DEVICE int64_t spread_step(const Graph<T>& g) {
  return g.vertices < 8 ? 1 : g.vertices / 8;
}
template <class T> VRM_HOST_DEVICE int64_t spread_vertices(const Graph<T>& g) {
  return ceil_div(g.vertices, spread_step(g));
}
template <class T> __host__ __device__ inline int64_t means_blocks(const Graph<T>& g) {
  return ceil_div(g.dims, kThreads);
}

template <class T>
__global__ void __launch_bounds__(kThreads) means_kernel(const __grid_constant__ Problem<T> p, int which) {
  const Graph<T>& g = p.graph[which];
  double* room = reinterpret_cast<double*>(shared_memory());
  const int64_t k = blockIdx.x * int64_t{kThreads} + thread_index();
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    double spread = 0;
    if (k < g.dims) {
      T sum = 0;
      for (int64_t chunk = 0; chunk < g.packed.chunks; ++chunk) sum += g.packed.sums[(chunk * 2 + side) * g.dims + k];
      sum /= static_cast<T>(g.vertices);
      const T mean = sum - sum == T(0) ? sum : T(0);  // the sum of huge finite logits may overflow
      g.packed.mean[side * g.dims + k] = mean;
      for (int64_t v = 0; v < g.vertices; v += spread_step(g)) {
        const T x = side == 0 ? student_of(g, v)[k] : teacher_of(g, v)[k];
        const double far = static_cast<double>(x) - static_cast<double>(mean);
        spread += far * far;
      }
    }
    spread = block_sum(spread, room);
    if (thread_index() == 0) g.packed.spread[blockIdx.x * 2 + side] = spread;
  }
}

// The square root of a ratio of squares, to a power of two.
template <class T> __device__ __forceinline__ T power_of_two(double ratio) {
  const double exponent = rint(0.5 * log2(ratio));
  constexpr double most = sizeof(T) == 4 ? 64 : 512;
  const bool usable = exponent >= -most && exponent <= most;  // neither NaN nor a vanished student or teacher
  return usable ? static_cast<T>(ldexp(1.0, static_cast<int>(exponent))) : T(1);
}

// By a warp, the result in every lane.
template <class T> __device__ __forceinline__ Scales<T> find_scales(const Graph<T>& g) {
  double student = 0, teacher = 0;
  for (int64_t k = lane_index(); k < means_blocks(g); k += 32) {
    student += g.packed.spread[2 * k];
    teacher += g.packed.spread[2 * k + 1];
  }
  student = warp_sum(student), teacher = warp_sum(teacher);
  const double wanted = static_cast<double>(kHalfLength) * kHalfLength * spread_vertices(g);
  const T both = g.packed.x_s.half ? power_of_two<T>(wanted / teacher) : T(1);
  return {both * power_of_two<T>(teacher / student), both};
}

// A component of a vertex: centred and scaled. The residual is student minus teacher first: exact near convergence.
template <class T> struct Centred {
  T student, teacher, residual;

  __device__ __forceinline__ Centred() : student(0), teacher(0), residual(0) {}
  __device__ __forceinline__ Centred(const Graph<T>& g, const Scales<T>& scale, int64_t vertex, int64_t k) {
    const T s = scale.student * student_of(g, vertex)[k], t = scale.teacher * teacher_of(g, vertex)[k];
    const T mean_s = scale.student * g.packed.mean[k], mean_t = scale.teacher * g.packed.mean[g.dims + k];
    student = s - mean_s, teacher = t - mean_t, residual = (s - t) - (mean_s - mean_t);
  }
};

// Component k of vertex v in all parts of an operand; returns what they add up to. The first part, which is the
// gradient's, may have a value of its own. A component beyond float16 is 0 there, since a pruned edge's coefficient 0
// times infinity would be NaN, and NaN in the vertex's norm, which leaves its edges to the literal stage.
template <class T> __device__ __forceinline__ T pack_component(const Packed<T>& to, const Operand& x, int64_t v,
                                                               int64_t k, T value, T first) {
  const int64_t at = v * to.parts * to.ld + k;
  const bool fits = !x.half || fabs(value) <= kHalfLargest;
  if (!fits) value = first = 0;
  store(x, at, first);
  if (to.parts == 1) return fits ? load<T>(x, at) : kNotANumber<T>;
  store(x, at + to.ld, value);
  const T high = load<T>(x, at + to.ld);
  store(x, at + 2 * to.ld, value - high);
  store(x, at + 3 * to.ld, value);
  return fits ? high + load<T>(x, at + 2 * to.ld) : kNotANumber<T>;
}

// A vertex a warp, so that the warps of a block share the sectors of neighbouring columns.
constexpr int kAhead = 4;
template <class T> int64_t pack_blocks(const Graph<T>& g) { return ceil_div(g.vertices, kWarps); }

template <class T>
__global__ void __launch_bounds__(kThreads, 3) pack_kernel(const __grid_constant__ Problem<T> p, int which) {
  const Graph<T>& g = p.graph[which];
  const Packed<T>& to = g.packed;
  const int64_t v = blockIdx.x * int64_t{kWarps} + warp_index();
  const Scales<T> scale = find_scales(g);
  if (blockIdx.x == 0 && thread_index() == 0) g.status->scale = scale;
  if (v >= g.vertices) return;  // a whole warp
  End<T> end = {};
  for (int64_t first = lane_index(); first < to.ld; first += kAhead * 32) {
    Centred<T> own[kAhead];  // loads before stores, which they could not pass
#pragma unroll
    for (int r = 0; r < kAhead; ++r)
      if (first + r * 32 < g.dims) own[r] = Centred<T>(g, scale, v, first + r * 32);
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const int64_t k = first + r * 32;
      if (k >= to.ld) break;
      const T one_s = static_cast<T>(k == g.dims), one_w = static_cast<T>(k == g.dims + 1);  // behind the dimensions
      // Norms of what the products see, so that the distances are those of the rounded vectors.
      const T x = pack_component(to, to.x_s, v, k, own[r].student, own[r].student + one_s);
      const T y = pack_component(to, to.x_t, v, k, own[r].teacher, own[r].teacher);
      const T w = pack_component(to, to.x_w, v, k, own[r].residual, own[r].residual + one_w);
      if (k >= g.dims) break;
      end.square_s += x * x;
      end.square_t += y * y;
      end.square_w += w * w;
      end.reach_s = fabs(x) > end.reach_s ? fabs(x) : end.reach_s;
      end.reach_t = fabs(y) > end.reach_t ? fabs(y) : end.reach_t;
    }
  }
  end = {warp_sum(end.square_s), warp_sum(end.square_t), warp_sum(end.square_w), warp_max(end.reach_s),
         warp_max(end.reach_t)};
  if (lane_index() == 0) to.ends[v] = end;
}

// The factors of the entropy as sums of two float16, side by side: [high, high, low] times [high, low, high]. A vertex
// a warp, those of the rows first. Both are scaled to the upper end of float16's range, so that the second terms keep
// their digits: all entropies are then as many times as large, and so is the threshold. No surprisal of a float32 is
// beyond 89; what the caller gives for probabilities may be of any size.
constexpr float kSurprisalsScale = 512.0f;
constexpr int64_t kSplitBlocks = 1024;  // each looks at all vertices that a caller gives
template <class T> int64_t split_blocks(const Graph<T>& g) {
  const int64_t blocks = ceil_div(g.rows + g.columns, kWarps);
  return blocks < kSplitBlocks ? blocks : kSplitBlocks;
}

// By a warp, the result in every lane.
template <class T> __device__ __forceinline__ T find_probs_scale(const Problem<T>& p) {
  T largest = p.batch.samples > 0 ? T(1) : T(0);
  for (int64_t v = lane_index(); v < p.vectors.count[0]; v += 32)
    largest = p.vectors.largest[0][v] > largest ? p.vectors.largest[0][v] : largest;
  int exponent = 0;
  frexp(warp_max(largest), &exponent);
  return ldexp(T(1), 15 - exponent);
}

template <class T> __device__ __forceinline__ void split_vertex(const Problem<T>& p, int which, int64_t v,
                                                                T probs_scale) {
  const Graph<T>& g = p.graph[which];
  const bool row = v < g.rows;
  if (!row) v -= g.rows;
  const Operand& to = row ? g.probs : g.surprisals;
  const int64_t vertex = row ? v : g.first_b + v;
  const int view = vertex >= g.split;
  for (int64_t k = lane_index(); k < g.depth; k += 32) {
    const int64_t at = v * g.entropy_depth + k, own = vertex - view * g.split;
    const T prob = p.batch.samples == 0 ? element<T>(p.vectors.probs[!row], v, k)
                                        : probability(p.batch, view, which == 0 ? own : k, which == 0 ? k : own);
    const T x = row ? prob * probs_scale : -log(prob + static_cast<T>(kEntropyEps)) * kSurprisalsScale;
    store(to, at, x);
    const T low = x - load<T>(to, at);
    store(to, at + g.depth, row ? x : low);
    store(to, at + 2 * g.depth, row ? low : x);
  }
  for (int64_t k = 3 * g.depth + lane_index(); k < g.entropy_depth; k += 32) store(to, v * g.entropy_depth + k, T(0));
}

template <class T>
__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ Problem<T> p, int which) {
  const Graph<T>& g = p.graph[which];
  const T probs_scale = find_probs_scale(p);
  for (int64_t v = blockIdx.x * int64_t{kWarps} + warp_index(); v < g.rows + g.columns; v += gridDim.x * kWarps)
    split_vertex(p, which, v, probs_scale);
}

}  // namespace cuda
}  // namespace vrm
