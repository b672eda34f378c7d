// The gradients: products of the coefficients with the vectors, the literal edges' own, and what the caller gets.
#pragma once

#include "edges.cuh"

namespace vrm {
namespace cuda {
namespace steps {

// One side of a tile as the gradient sees it: `own` vertices with their edges to `other` ones.
template <class T> struct TileSide {
  const Graph<T>& g;
  const EdgeTile<T>& tile;
  bool by_column;

  __device__ const Side<T>& own() const { return by_column ? g.b : g.a; }
  __device__ const Side<T>& other() const { return by_column ? g.a : g.b; }
  __device__ int64_t own_first() const { return by_column ? tile.column : tile.row; }
  __device__ int64_t other_first() const { return by_column ? tile.row : tile.column; }
  __device__ int64_t own_count() const { return by_column ? tile.columns : tile.rows; }
  __device__ int64_t other_count() const { return by_column ? tile.rows : tile.columns; }
  __device__ int64_t at(int64_t own, int64_t other) const {
    return by_column ? other * tile.ld + own : own * tile.ld + other;
  }
  // Which of the 32 vertices from `first` on make a literal edge with `own`: one bit each; by a warp.
  __device__ __forceinline__ unsigned literal(int64_t own, int64_t first) const {
    if (!by_column) return tile.literal[own * tile.words + first / kTile];
    const int64_t i = first + lane_index();
    const bool marked = i < tile.rows && (tile.literal[i * tile.words + own / kTile] >> (own % kTile) & 1u) != 0;
    return __ballot_sync(kFullWarp, marked);
  }
};

// Adds the gradients of the literal edges of vertex `own` of the tile, dimensions k0 + lane + 32 n of N.
template <class T, int N> __device__ __forceinline__ void add_literal(const TileSide<T>& side, const EdgeRule<T>& rule,
                                                                      T scale, int64_t own, int64_t k0, T (&grad)[N]) {
  const Graph<T>& g = side.g;
  for (int64_t first = 0; first < side.other_count(); first += kTile) {
    for (unsigned left = side.literal(own, first); left != 0; left &= left - 1) {
      const int64_t other = first + __ffs(static_cast<int>(left)) - 1, at = side.at(own, other);
      const int64_t v = side.own_first() + own, w = side.other_first() + other;
      const T signed_u = side.tile.u[at], u = fabs(signed_u), teacher_u = side.tile.v[at],
              radial = side.tile.radial[at];
      const Difference<T> d{g, side.by_column ? w : v, side.by_column ? v : w, scale, signed_u < T(0)};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int64_t k = k0 + lane_index() + 32 * n;
        if (k >= g.dims) continue;
        const T s = d.student(k), h = huber_slope(s * u - d.teacher(k) * teacher_u, rule.delta);
        const T step = h * u - s * radial;
        grad[n] += side.by_column ? -step : step;
      }
    }
  }
}

// Small graphs: grad = gamma x_s - beta x_w over the edges, and the literal ones; 32 vertices by 32 dimensions a task.
template <class T> struct Gradient {
  static constexpr int64_t kSharedBytes = 4 * sizeof(Strip<T>);

  __host__ __device__ static int64_t side_tasks(const Graph<T>& g, const Side<T>& side) {
    return ceil_div(side.count, kTile) * ceil_div(g.ld, kTile);
  }
  __host__ __device__ static int64_t tasks(const Graph<T>& g) {
    return g.need_grad ? side_tasks(g, g.a) + side_tasks(g, g.b) : 0;
  }

  __device__ static void run(const Graph<T>& g, const EdgeTile<T>& tile, int64_t task, char* shared) {
    Strip<T>* strip = reinterpret_cast<Strip<T>*>(shared);
    const bool by_column = task >= side_tasks(g, g.a);
    if (by_column) task -= side_tasks(g, g.a);
    const TileSide<T> side{g, tile, by_column};
    const int64_t wide = ceil_div(g.ld, kTile), v0 = task / wide * kTile, k0 = task % wide * kTile;
    const int64_t own = side.own_count() - v0;
    T grad[kOwn] = {};
    for (int64_t e0 = 0; e0 < side.other_count(); e0 += kDepth) {
      const int64_t edges = side.other_count() - e0;
      load_strip(strip[0], !by_column, own, edges, [&](int v, int e) { return tile.gamma[side.at(v0 + v, e0 + e)]; });
      load_strip(strip[1], !by_column, own, edges, [&](int v, int e) { return -tile.beta[side.at(v0 + v, e0 + e)]; });
      const auto load = [&](Strip<T>& to, const T* x) {
        load_strip(to, false, g.ld - k0, edges, [&](int k, int e) { return x[(e0 + e) * g.ld + k0 + k]; });
      };
      load(strip[2], side.other().x_s);
      load(strip[3], side.other().x_w);
      __syncthreads();
      multiply_strips(strip[0], strip[2], grad);
      multiply_strips(strip[1], strip[3], grad);
      __syncthreads();
    }
    const T scale = g.status->scale;
    const EdgeRule<T> rule = edge_rule(g, scale);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int64_t v = v0 + warp_index() * kOwn + r, k = k0 + lane_index();
      if (v >= side.own_count()) continue;  // a whole warp
      T more[1] = {};
      add_literal(side, rule, scale, v, k0, more);
      if (k < g.ld) side.own().grad[v * g.ld + k] = grad[r] + more[0];
    }
  }
};

// Large graphs, whose products a library takes: adds the literal edges' gradients. A vertex a warp, 128 dimensions a
// task.
template <class T> struct LiteralGradient {
  static constexpr int kDims = 4;  // of a lane

  __host__ __device__ static int64_t side_tasks(const Graph<T>& g, int64_t vertices) {
    return ceil_div(vertices, kWarps) * ceil_div(g.dims, 32 * kDims);
  }
  __host__ __device__ static int64_t tasks(const Graph<T>& g, const EdgeTile<T>& tile) {
    return side_tasks(g, tile.rows) + side_tasks(g, tile.columns);
  }

  __device__ static void run(const Graph<T>& g, const EdgeTile<T>& tile, int64_t task) {
    const bool by_column = task >= side_tasks(g, tile.rows);
    if (by_column) task -= side_tasks(g, tile.rows);
    const TileSide<T> side{g, tile, by_column};
    const int64_t wide = ceil_div(g.dims, 32 * kDims), k0 = task % wide * (32 * kDims);
    const int64_t own = task / wide * kWarps + warp_index();
    if (own >= side.own_count()) return;  // a whole warp
    const T scale = g.status->scale;
    T grad[kDims] = {};
    add_literal(side, edge_rule(g, scale), scale, own, k0, grad);
    T* to = side.own().grad + (side.own_first() + own) * g.ld;
#pragma unroll
    for (int n = 0; n < kDims; ++n) {
      const int64_t k = k0 + lane_index() + 32 * n;
      if (k < g.dims) to[k] += grad[n];
    }
  }
};

// The gradient as the caller gets it: 32 vertices by 32 dimensions a task, written, or added to another graph's.
template <class T> struct Finish {
  __host__ __device__ static int64_t side_tasks(const Graph<T>& g, const Side<T>& side) {
    return ceil_div(side.count, kTile) * ceil_div(g.dims, kTile);
  }
  __host__ __device__ static int64_t tasks(const Graph<T>& g) {
    return !g.need_grad ? 0 : side_tasks(g, g.a) + (g.one_set ? 0 : side_tasks(g, g.b));
  }

  __device__ static void run(const Graph<T>& g, int64_t task, bool add, char* shared) {
    Square<T>& tile = *reinterpret_cast<Square<T>*>(shared);
    const bool second = task >= side_tasks(g, g.a);
    if (second) task -= side_tasks(g, g.a);
    const Side<T>& side = second ? g.b : g.a;
    const int64_t wide = ceil_div(g.dims, kTile), v0 = task / wide * kTile, k0 = task % wide * kTile;
    const double count = static_cast<double>(*g.kept) + kCountEps;
    const bool poisoned = g.status->not_finite != 0 || (!g.keep_all && !(*g.threshold == *g.threshold));
    const T scale =
        poisoned ? kNotANumber<T> : static_cast<T>(static_cast<double>(g.status->scale) * g.weight / count);
    load_square(tile, true, side.count - v0, g.dims - k0, [&](int v, int k) {
      const T* grad = side.grad + (v0 + v) * g.ld;
      T gamma_sum = grad[g.dims], beta_sum = -grad[g.dims + 1], sum = grad[k0 + k];
      if (g.one_set) {  // the vertex stood on both sides
        const T* more = g.b.grad + (v0 + v) * g.ld;
        gamma_sum += more[g.dims];
        beta_sum -= more[g.dims + 1];
        sum += more[k0 + k];
      }
      const int64_t at = (v0 + v) * g.ld + k0 + k;
      return scale * (sum + (beta_sum * side.x_w[at] - gamma_sum * side.x_s[at]));
    });
    __syncthreads();
    const bool along = side.out.first.dim_stride == 1;
#pragma unroll
    for (int r = 0; r < kTile / kWarps; ++r) {
      const int slow = warp_index() + r * kWarps, fast = lane_index(), v = along ? slow : fast, k = along ? fast : slow;
      if (v0 + v >= side.count || k0 + k >= g.dims) continue;
      T& to = side.out.at(v0 + v, k0 + k);
      to = add ? to + tile.x[v][k] : tile.x[v][k];
    }
  }
};

// Losses and counts of all graphs. One thread.
template <class T> __device__ inline void finish_losses(const Problem<T>& p) {
  double total = 0;
  for (int k = 0; k < p.graphs; ++k) {
    const Graph<T>& g = p.graph[k];
    const bool poisoned = g.status->not_finite != 0 || (!g.keep_all && !(*g.threshold == *g.threshold));
    const double loss =
        poisoned ? kNotANumber<double> : g.status->loss / (static_cast<double>(*g.kept) + kCountEps);
    *g.loss_out = static_cast<T>(loss);
    *g.kept_out = poisoned ? 0 : *g.kept;
    total += g.weight * loss;
  }
  if (p.total_out != nullptr) *p.total_out = static_cast<T>(total);
}

}  // namespace steps
}  // namespace cuda
}  // namespace vrm
