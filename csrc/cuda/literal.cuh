// Stage 4: the edges' losses and gradients, component by component. A block a vertex.
//
// Both ends of an edge visit it, each for its own gradient, so that nothing is added by two writers; the rows count the
// loss. A relation's sign turns with its edge's direction and the gradient turns with it, so that both ends may take
// the difference as their own vector minus the other's.
#pragma once

#include "inputs.cuh"

namespace vrm {
namespace cuda {

// One vertex and the range of vertices on the other side of its edges.
template <class T, bool Dense> struct Vertex {
  const Graph<T>& g;
  bool column;  // of the side b
  int64_t index, others, first_other;

  // Vectors, whose elements are [k].
  __device__ auto student(int64_t v) const { return vector(g.student, g.student_views, v); }
  __device__ auto teacher(int64_t v) const { return vector(g.teacher, g.teacher_views, v); }
  __device__ auto vector(const T* copies, const Input (&views)[2], int64_t v) const {
    if constexpr (Dense)
      return vector_of(g, views, v);
    else
      return copies + v * g.dims;
  }
};

// Up to kThreads kept edges of a vertex: the other end, and what the gradient needs of the edge.
template <class T> struct EdgeList {
  int other[kThreads];
  T u[kThreads], v[kThreads];  // 1 / (n + eps) of student and teacher
  T step[kThreads], radial[kThreads];
  int marks[kThreads];  // how often the edge is in the sums, 1 or 2 as both directions may be kept; 4 added: a row's
  T room[kThreads];
  double losses[kWarps];
  int counts[kWarps];
};

// The formula of one edge, by a warp; returns the loss.
template <class T, bool Dense>
__device__ __forceinline__ T measure_edge(const Vertex<T, Dense>& vertex, int64_t other, int times, int e,
                                          EdgeList<T>& list) {
  const Graph<T>& g = vertex.g;
  const auto own_s = vertex.student(vertex.index), other_s = vertex.student(vertex.first_other + other);
  const auto own_t = vertex.teacher(vertex.index), other_t = vertex.teacher(vertex.first_other + other);
  T student = 0, teacher = 0;
  for (int64_t k = lane_index(); k < g.dims; k += 32) {
    const T s = own_s[k] - other_s[k], t = own_t[k] - other_t[k];
    student += s * s;
    teacher += t * t;
  }
  const T ns = sqrt(warp_sum(student)), end = ns + g.eps;
  const T u = T(1) / end, v = T(1) / (sqrt(warp_sum(teacher)) + g.eps);
  T loss = 0, along = 0;
  for (int64_t k = lane_index(); k < g.dims; k += 32) {
    const T s = own_s[k] - other_s[k], x = s * u - (own_t[k] - other_t[k]) * v, h = huber_slope(x, g.delta);
    loss += huber(x, h);
    along += h * s;
  }
  loss = warp_sum(loss);
  along = warp_sum(along);
  if (lane_index() == 0) {
    list.u[e] = u;
    list.v[e] = v;
    list.step[e] = static_cast<T>(times) * u;
    list.radial[e] = static_cast<T>(times) * radial_slope(along, ns, end);
  }
  return loss;
}

// Adds the steps of the `count` edges of the list to the vertex's gradient, or begins it. Threads lie along the
// dimensions; where those are few, several groups share the edges.
template <class T, bool Dense>
__device__ __forceinline__ void add_steps(const Vertex<T, Dense>& vertex, int count, bool begin, EdgeList<T>& list) {
  const Graph<T>& g = vertex.g;
  const auto own_s = vertex.student(vertex.index);
  const auto own_t = vertex.teacher(vertex.index);
  T* grad = g.grad + vertex.index * g.grad_ld;
  const T scale = Dense ? g.packed.coefficient_scale / g.status->scale.student : T(1);  // of the products' gradients
  const int width = g.dims < kThreads ? static_cast<int>(ceil_div(g.dims, 32)) * 32 : kThreads;
  const int groups = kThreads / width, group = thread_index() / width;
  for (int64_t k0 = 0; k0 < g.dims; k0 += width) {
    const int64_t k = k0 + thread_index() % width;
    T sum = 0;
    if (k < g.dims && group < groups)
#pragma unroll 4
      for (int e = group; e < count; e += groups) {
        const int64_t other = vertex.first_other + list.other[e];
        const T s = own_s[k] - vertex.student(other)[k], t = own_t[k] - vertex.teacher(other)[k];
        sum += huber_slope(s * list.u[e] - t * list.v[e], g.delta) * list.step[e] - s * list.radial[e];
      }
    if (groups > 1) {
      list.room[thread_index()] = sum;
      __syncthreads();
      if (group == 0)
        for (int q = 1; q < groups; ++q) sum += list.room[thread_index() + q * width];
      __syncthreads();
    }
    if (group == 0 && k < g.dims) grad[k] = begin ? sum : grad[k] + scale * sum;
  }
}

// visits(as_column, other): whether the stage has to visit the edge that the vertex is a row of, or a column of. Where
// `both`, the vertex is both.
template <class T, bool Dense, class Visits>
__device__ __forceinline__ void visit_vertex(const Vertex<T, Dense>& vertex, bool both, const Visits& visits) {
  EdgeList<T>& list = *reinterpret_cast<EdgeList<T>*>(shared_memory());
  const Graph<T>& g = vertex.g;
  double loss = 0;
  unsigned long long kept = 0;
  for (int64_t first = 0; first < vertex.others; first += kThreads) {
    const int64_t other = first + thread_index();
    const bool inside = other < vertex.others;
    const bool as_row = inside && !vertex.column && visits(false, other);
    const bool as_column = inside && (vertex.column || both) && visits(true, other);
    const int times = as_row + as_column, mine = times > 0;
    const int place = block_sum_before(mine, list.counts), count = block_sum(mine, list.counts);
    if (mine) {
      list.other[place] = static_cast<int>(other);
      list.marks[place] = times | as_row << 2;
    }
    __syncthreads();
    for (int e = warp_index(); e < count; e += kWarps) {
      const int marks = list.marks[e];
      const T of_edge = measure_edge(vertex, list.other[e], marks & 3, e, list);
      if (marks >> 2 != 0) loss += static_cast<double>(of_edge);
    }
    kept += as_row;
    __syncthreads();
    const bool begin = first == 0 && !Dense;
    if (g.need_grad && (begin || count > 0)) add_steps(vertex, count, begin, list);
    __syncthreads();  // before the next edges take their places
  }
  if (vertex.column) return;
  const double total = block_sum(lane_index() == 0 ? loss : 0.0, list.losses);
  kept = warp_sum(kept);
  if (!Dense && lane_index() == 0 && kept != 0) atomicAdd(&g.status->kept, kept);
  if (thread_index() == 0) g.losses[vertex.index] = Dense ? g.losses[vertex.index] + total : total;
}

template <class T> constexpr int64_t kLiteralBytes = sizeof(EdgeList<T>);

// The literal form: all kept edges of all graphs.
template <class T> __host__ __device__ inline int64_t literal_blocks(const Graph<T>& g) {
  return g.rows + (g.need_grad && !g.one_set() ? g.columns : 0);
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    literal_kernel(const __grid_constant__ Problem<T> p) {
  const bool second = blockIdx.x >= literal_blocks(p.graph[0]);
  const Graph<T>& g = p.graph[second];
  const int64_t vertex = second ? blockIdx.x - literal_blocks(p.graph[0]) : blockIdx.x;
  const bool column = vertex >= g.rows;
  const int64_t own = column ? vertex - g.rows : vertex;
  const T threshold = g.keep_all ? T(0) : g.status->threshold;
  visit_vertex(Vertex<T, false>{g, column, column ? g.first_b + own : own, column ? g.rows : g.columns,
                                column ? 0 : g.first_b},
               g.one_set() && g.need_grad, [&](bool as_column, int64_t other) {
                 if (g.keep_all) return !(g.exclude_self && own == other);
                 const int64_t at = as_column ? other * g.columns + own : own * g.columns + other;
                 return g.entropy[at] <= threshold;  // NaN: no
               });
}

// The dense form: the edges of a tile that are kept and not certified. Tiles come one after the other, and each adds to
// the losses and gradients of those before it.
template <class T> VRM_HOST_DEVICE bool tile_is_diagonal(const Graph<T>& g, const Tile<T>& tile) {
  return g.one_set() && tile.row == tile.column;
}
template <class T> int64_t literal_tile_blocks(const Graph<T>& g, const Tile<T>& tile) {
  return tile.rows + (g.need_grad && !tile_is_diagonal(g, tile) ? tile.columns : 0);
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    literal_tile_kernel(const __grid_constant__ Problem<T> p, int which, const __grid_constant__ Tile<T> tile) {
  const Graph<T>& g = p.graph[which];
  if (g.status->uncertified != tile.number) return;
  const bool column = blockIdx.x >= tile.rows, both = g.need_grad && tile_is_diagonal(g, tile);
  const int64_t own = column ? blockIdx.x - tile.rows : blockIdx.x;
  const uint32_t* row = tile.row_bits + own * ceil_div(tile.columns, 32);
  const uint32_t* columns = tile.column_bits + own * ceil_div(tile.rows, 32);
  const Vertex<T, true> vertex{g, column, column ? g.first_b + tile.column + own : tile.row + own,
                               column ? tile.rows : tile.columns, column ? tile.row : g.first_b + tile.column};
  unsigned any = 0;  // of the edges
  for (int64_t w = thread_index(); w < ceil_div(vertex.others, 32); w += kThreads)
    any |= (column ? 0u : row[w]) | (column || both ? columns[w] : 0u);
  if (block_sum(static_cast<int>(any != 0), reinterpret_cast<int*>(shared_memory())) == 0) return;
  visit_vertex(vertex, both, [&](bool as_column, int64_t other) {
    return ((as_column ? columns : row)[other / 32] >> (other % 32) & 1u) != 0;
  });
}

}  // namespace cuda
}  // namespace vrm
