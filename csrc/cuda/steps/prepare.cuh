// Softmax, centring and packing: everything an edge needs to know of its two vertices.
//
// A stage is a structure with tasks(), how many independent pieces of work a graph has, and run(), which a whole block
// does for one of them. Every result is written by one task, and every sum has an order that sizes alone fix.
#pragma once

#include "../block.cuh"

#include "graph.h"

namespace vrm {
namespace cuda {
namespace steps {

// probs = softmax(logits), logs = log(probs + 1e-7). A warp a row.
template <class T> struct SoftmaxStage {
  __host__ __device__ static int64_t tasks(const Softmax<T>& s) { return 2 * ceil_div(s.rows, kWarps); }

  __device__ static void run(const Softmax<T>& s, int64_t task) {
    const int view = static_cast<int>(task & 1);
    const int64_t row = (task >> 1) * kWarps + warp_index();
    if (row >= s.rows) return;  // a whole warp
    const Matrix<const T>& x = s.logits[view];
    T top = x.at(row, 0);
    for (int64_t c = lane_index(); c < s.columns; c += 32) {
      const T value = x.at(row, c);
      top = value > top ? value : top;
    }
    top = warp_max(top);
    T sum = 0;
    for (int64_t c = lane_index(); c < s.columns; c += 32) sum += exp(x.at(row, c) - top);
    sum = warp_sum(sum);
    for (int64_t c = lane_index(); c < s.columns; c += 32) {
      const T p = exp(x.at(row, c) - top) / sum;
      if (s.probs[view] != nullptr) s.probs[view][row * s.columns + c] = p;
      if (s.logs[view] != nullptr) s.logs[view][row * s.columns + c] = log(p + static_cast<T>(kEntropyEps));
    }
  }
};

// The vertices of both sides in one row, each once.
template <class T> __host__ __device__ inline int64_t vertex_count(const Graph<T>& g) {
  return g.one_set ? g.rows : g.rows + g.columns;
}
template <class T> __device__ __forceinline__ const T& student_at(const Graph<T>& g, int64_t v, int64_t k) {
  return v < g.rows ? g.a.student.at(v, k) : g.b.student.at(v - g.rows, k);
}
template <class T> __device__ __forceinline__ const T& teacher_at(const Graph<T>& g, int64_t v, int64_t k) {
  return v < g.rows ? g.a.teacher.at(v, k) : g.b.teacher.at(v - g.rows, k);
}
template <class T> __device__ __forceinline__ bool along_dims(const Stacked<const T>& x) {
  return x.first.vertex_stride != 1;
}

// sums[chunk] = the vertices of a chunk added up, 32 dimensions a task; and whether all are finite.
template <class T> struct ColumnSums {
  __host__ __device__ static int64_t tasks(const Graph<T>& g) { return ceil_div(g.dims, kTile) * g.chunks; }

  __device__ static void run(const Graph<T>& g, int64_t task, char* shared) {
    Square<T>* tile = reinterpret_cast<Square<T>*>(shared);  // student, teacher
    const int64_t chunk = task % g.chunks, k0 = task / g.chunks * kTile, dims = g.dims - k0;
    const int64_t count = vertex_count(g), begin = count * chunk / g.chunks, end = count * (chunk + 1) / g.chunks;
    T sum[2] = {}, poison = 0;  // x - x is 0, or not a number
    for (int64_t v0 = begin; v0 < end; v0 += kTile) {
      load_square(tile[0], along_dims(g.a.student), end - v0, dims,
                  [&](int v, int k) { return student_at(g, v0 + v, k0 + k); });
      load_square(tile[1], along_dims(g.a.teacher), end - v0, dims,
                  [&](int v, int k) { return teacher_at(g, v0 + v, k0 + k); });
      __syncthreads();
#pragma unroll
      for (int which = 0; which < 2; ++which)
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const T x = tile[which].x[warp_index() * kOwn + r][lane_index()];
          sum[which] += x;
          poison += poison_of(x);
        }
      __syncthreads();
    }
    if (!(poison == T(0))) atomicOr(&g.status->not_finite, 1);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      tile[which].x[warp_index()][lane_index()] = sum[which];
      __syncthreads();
      if (warp_index() == 0 && lane_index() < dims) {
        T total = 0;
        for (int w = 0; w < kWarps; ++w) total += tile[which].x[w][lane_index()];
        g.sums[(chunk * 2 + which) * g.dims + k0 + lane_index()] = total;
      }
      __syncthreads();
    }
  }
};

// The mean vectors, and how far a few vertices of each side lie from them; a dimension a thread.
template <class T> struct Means {
  __host__ __device__ static int64_t tasks(const Graph<T>& g) { return ceil_div(g.dims, kThreads); }

  __device__ static void run(const Graph<T>& g, int64_t task, char* shared) {
    double* room = reinterpret_cast<double*>(shared);
    const int64_t k = task * kThreads + thread_index();
    double spread[2] = {};
    if (k < g.dims) {
      const T count = static_cast<T>(vertex_count(g));
      T mean[2];
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        T sum = 0;
        for (int64_t chunk = 0; chunk < g.chunks; ++chunk) sum += g.sums[(chunk * 2 + which) * g.dims + k];
        sum /= count;
        mean[which] = sum - sum == T(0) ? sum : T(0);  // the sum of huge finite logits may overflow
      }
      g.mean_s[k] = mean[0];
      g.mean_t[k] = mean[1];
      const auto add = [&](const Side<T>& side) {
        const int64_t step = side.count / 4 > 0 ? side.count / 4 : 1;
        for (int64_t v = 0; v < side.count; v += step) {
          const double s = static_cast<double>(side.student.at(v, k)) - static_cast<double>(mean[0]);
          const double t = static_cast<double>(side.teacher.at(v, k)) - static_cast<double>(mean[1]);
          spread[0] += s * s;
          spread[1] += t * t;
        }
      };
      add(g.a);
      if (!g.one_set) add(g.b);
    }
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const double total = block_sum(spread[which], room);
      if (thread_index() == 0) g.spread[task * 2 + which] = total;
    }
  }
};

// Brings the student to the teacher's size, see edge.h; by a warp, the result in every lane.
template <class T> __device__ __forceinline__ T student_scale(const Graph<T>& g) {
  double student = 0, teacher = 0;
  for (int64_t k = lane_index(); k < Means<T>::tasks(g); k += 32) {
    student += g.spread[2 * k];
    teacher += g.spread[2 * k + 1];
  }
  student = warp_sum(student);
  teacher = warp_sum(teacher);
  const double exponent = rint(0.5 * log2(teacher / student));
  constexpr double most = sizeof(T) == 4 ? 64 : 512;
  const bool usable = exponent >= -most && exponent <= most;  // neither NaN nor a vanished student or teacher
  return usable ? static_cast<T>(ldexp(1.0, static_cast<int>(exponent))) : T(1);
}

// Packs 32 vertices a task.
template <class T> struct Pack {
  __host__ __device__ static int64_t side_tasks(const Side<T>& side) { return ceil_div(side.count, kTile); }
  __host__ __device__ static int64_t tasks(const Graph<T>& g) {
    return side_tasks(g.a) + (g.one_set ? 0 : side_tasks(g.b));
  }

  __device__ static void run(const Graph<T>& g, int64_t task, char* shared) {
    Square<T>* tile = reinterpret_cast<Square<T>*>(shared);
    const bool second = task >= side_tasks(g.a);
    const Side<T>& side = second ? g.b : g.a;
    const int64_t v0 = (second ? task - side_tasks(g.a) : task) * kTile, vertices = side.count - v0;
    const T scale = student_scale(g);
    if (task == 0 && thread_index() == 0) g.status->scale = scale;
    T square_s[kOwn] = {}, square_t[kOwn] = {}, square_w[kOwn] = {}, reach_s[kOwn] = {}, reach_t[kOwn] = {};
    for (int64_t k0 = 0; k0 < g.ld; k0 += kTile) {
      load_square(tile[0], along_dims(side.student), vertices, g.dims - k0,
                  [&](int v, int k) { return side.student.at(v0 + v, k0 + k); });
      load_square(tile[1], along_dims(side.teacher), vertices, g.dims - k0,
                  [&](int v, int k) { return side.teacher.at(v0 + v, k0 + k); });
      __syncthreads();
      const int64_t k = k0 + lane_index();
      const bool inside = k < g.dims;
      const T mean_s = inside ? g.mean_s[k] : T(0), mean_t = inside ? g.mean_t[k] : T(0);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const int v = warp_index() * kOwn + r;
        if (v >= vertices || k >= g.ld) continue;
        const T s = scale * tile[0].x[v][lane_index()], t = tile[1].x[v][lane_index()];
        const T x = s - scale * mean_s, y = t - mean_t;
        const T w = (s - t) - (scale * mean_s - mean_t);  // student minus teacher first: exact near convergence
        const int64_t at = (v0 + v) * g.ld + k;
        side.x_s[at] = inside ? x : static_cast<T>(k == g.dims);
        side.x_t[at] = inside ? y : T(0);
        side.x_w[at] = inside ? w : static_cast<T>(k == g.dims + 1);
        if (!inside) continue;
        square_s[r] += x * x;
        square_t[r] += y * y;
        square_w[r] += w * w;
        reach_s[r] = fabs(x) > reach_s[r] ? fabs(x) : reach_s[r];
        reach_t[r] = fabs(y) > reach_t[r] ? fabs(y) : reach_t[r];
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const T s2 = warp_sum(square_s[r]), t2 = warp_sum(square_t[r]), w2 = warp_sum(square_w[r]);
      const T top_s = warp_max(reach_s[r]), top_t = warp_max(reach_t[r]);
      const int64_t v = v0 + warp_index() * kOwn + r;
      if (lane_index() != 0 || v >= side.count) continue;
      side.square_s[v] = s2;
      side.square_t[v] = t2;
      side.square_w[v] = w2;
      side.reach_s[v] = top_s;
      side.reach_t[v] = top_t;
    }
  }
};

}  // namespace steps
}  // namespace cuda
}  // namespace vrm
