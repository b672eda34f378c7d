// The edges of a tile: mask, guard, certificate, coefficients, loss; the literal ones component by component.
#pragma once

#include "../block.cuh"

#include "graph.h"

namespace vrm {
namespace cuda {
namespace steps {

constexpr int64_t kLiteralDims = 4;  // in fewer dimensions cosines lose everything to rounding: all edges are literal

template <class T> __device__ __forceinline__ EdgeRule<T> edge_rule(const Graph<T>& g, T scale) {
  return {g.delta, g.eps * scale, g.eps};
}

// The difference of an edge, as packed, or where the centring cost its digits, from the inputs.
template <class T> struct Difference {
  const Graph<T>& g;
  int64_t i, j;
  T scale;
  bool raw;

  __device__ __forceinline__ T student(int64_t k) const {
    return raw ? scale * (g.a.student.at(i, k) - g.b.student.at(j, k)) : g.a.x_s[i * g.ld + k] - g.b.x_s[j * g.ld + k];
  }
  __device__ __forceinline__ T teacher(int64_t k) const {
    return raw ? g.a.teacher.at(i, k) - g.b.teacher.at(j, k) : g.a.x_t[i * g.ld + k] - g.b.x_t[j * g.ld + k];
  }
};

// What the gradient of a literal edge needs besides its differences: see literal_step. u < 0 says `raw`.
template <class T> struct LiteralEdge {
  T u, v, radial, loss;
};

// The component-wise formula of one edge, by a warp.
template <class T> __device__ __forceinline__ LiteralEdge<T> literal_edge(const Graph<T>& g, const EdgeRule<T>& rule,
                                                                          T scale, int64_t i, int64_t j) {
  Difference<T> d{g, i, j, scale, false};
  T student = 0, teacher = 0;
  const auto measure = [&] {
    student = teacher = T(0);
    for (int64_t k = lane_index(); k < g.dims; k += 32) {
      const T s = d.student(k), t = d.teacher(k);
      student += s * s;
      teacher += t * t;
    }
    student = warp_sum(student);
    teacher = warp_sum(teacher);
  };
  measure();
  // Nearly equal vectors: their difference has lost digits to the centring. Negated so that NaN comes here too.
  d.raw = !(student >= Guard<T>::rounded * (g.a.square_s[i] + g.b.square_s[j])) ||
          !(teacher >= Guard<T>::rounded * (g.a.square_t[i] + g.b.square_t[j]));
  if (d.raw) measure();
  const T ns = sqrt(student), se = ns + rule.eps_s;
  const T u = T(1) / se, v = T(1) / (sqrt(teacher) + rule.eps_t);
  T loss = 0, along = 0;
  for (int64_t k = lane_index(); k < g.dims; k += 32) {
    const T s = d.student(k), x = s * u - d.teacher(k) * v, h = huber_slope(x, rule.delta);
    loss += huber(x, h);
    along += h * s;
  }
  loss = warp_sum(loss);
  along = warp_sum(along);
  return {d.raw ? -u : u, v, radial_slope(along, ns, se), loss};
}

// Loss and coefficients of every edge, 32 x 32 edges a task.
template <class T> struct Weigh {
  static constexpr int64_t kSharedBytes = 6 * sizeof(Strip<T>);

  __host__ __device__ static int64_t tasks(const EdgeTile<T>& tile) {
    return ceil_div(tile.rows, kTile) * ceil_div(tile.columns, kTile);
  }

  __device__ static void run(const Graph<T>& g, const EdgeTile<T>& tile, int64_t task, char* shared) {
    const int64_t wide = ceil_div(tile.columns, kTile);
    const int64_t i0 = task / wide * kTile, j0 = task % wide * kTile;  // of the tile
    T dots[3][kOwn] = {};
    if (!tile.dots_given) multiply(g, tile, i0, j0, shared, dots);
    const T scale = g.status->scale;
    const EdgeRule<T> rule = edge_rule(g, scale);
    const T threshold = g.keep_all ? T(0) : *g.threshold;
    const int64_t j = j0 + lane_index();
    T loss = 0;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int64_t i = i0 + warp_index() * kOwn + r, at = i * tile.ld + j;
      const int64_t v = tile.row + i, w = tile.column + j;  // of the graph
      const bool valid = i < tile.rows && j < tile.columns;
      bool literal = false;
      if (valid) {
        const bool kept = v + g.self != w && (g.keep_all || tile.entropy[i * tile.entropy_ld + j] <= threshold);
        T beta = 0, gamma = 0;
        if (kept) {
          const EdgeInput<T> input = {tile.dots_given ? tile.beta[at] : dots[0][r],
                                      tile.dots_given ? tile.gamma[at] : dots[1][r],
                                      tile.dots_given ? tile.u[at] : dots[2][r],
                                      g.a.square_s[v] + g.b.square_s[w],
                                      g.a.square_t[v] + g.b.square_t[w],
                                      g.a.square_w[v] + g.b.square_w[w],
                                      g.a.reach_s[v] + g.b.reach_s[w],
                                      g.a.reach_t[v] + g.b.reach_t[w]};
          const auto terms = quadratic_edge(input, rule, SquareRoot());
          literal = g.dims < kLiteralDims || terms.literal;
          if (!literal) {
            loss += terms.loss;
            beta = terms.beta;
            gamma = terms.gamma;
          }
        }
        if (g.need_grad) {
          tile.beta[at] = beta;
          tile.gamma[at] = gamma;
        }
      }
      // The lanes of a row are 32 edges of one vertex: together they take the literal ones, one after the other.
      const unsigned marks = __ballot_sync(kFullWarp, literal);
      if (i < tile.rows && g.need_grad && lane_index() == 0) tile.literal[i * tile.words + j0 / kTile] = marks;
      for (unsigned left = marks; left != 0; left &= left - 1) {
        const int lane = __ffs(static_cast<int>(left)) - 1;
        const LiteralEdge<T> edge = literal_edge(g, rule, scale, v, tile.column + j0 + lane);
        if (lane_index() != lane) continue;
        loss += edge.loss;
        if (!g.need_grad) continue;
        tile.u[at] = edge.u;
        tile.v[at] = edge.v;
        tile.radial[at] = edge.radial;
      }
    }
    const double total = block_sum(static_cast<double>(loss), reinterpret_cast<double*>(shared));
    if (thread_index() == 0) tile.losses[task] = total;
  }

  // The three dot products of the edges, where no library has taken them.
  __device__ __forceinline__ static void multiply(const Graph<T>& g, const EdgeTile<T>& tile, int64_t i0, int64_t j0,
                                                  char* shared, T (&dots)[3][kOwn]) {
    Strip<T>* strip = reinterpret_cast<Strip<T>*>(shared);
    const int64_t rows = tile.rows - i0, columns = tile.columns - j0;
    for (int64_t k0 = 0; k0 < g.dims; k0 += kDepth) {
      const auto load = [&](Strip<T>& to, const T* x, int64_t v0, int64_t count) {
        load_strip(to, true, count, g.dims - k0, [&](int v, int k) { return x[(v0 + v) * g.ld + k0 + k]; });
      };
      load(strip[0], g.a.x_s, tile.row + i0, rows);
      load(strip[1], g.b.x_s, tile.column + j0, columns);
      load(strip[2], g.a.x_t, tile.row + i0, rows);
      load(strip[3], g.b.x_t, tile.column + j0, columns);
      load(strip[4], g.a.x_w, tile.row + i0, rows);
      load(strip[5], g.b.x_w, tile.column + j0, columns);
      __syncthreads();
#pragma unroll
      for (int part = 0; part < 3; ++part) multiply_strips(strip[2 * part], strip[2 * part + 1], dots[part]);
      __syncthreads();
    }
  }
};

// Adds the losses of a tile to the graph's, in a fixed order. One block.
template <class T> struct AddLosses {
  __device__ static void run(const Graph<T>& g, const EdgeTile<T>& tile, char* shared) {
    double sum = 0;
    for (int64_t k = thread_index(); k < Weigh<T>::tasks(tile); k += kThreads) sum += tile.losses[k];
    sum = block_sum(sum, reinterpret_cast<double*>(shared));
    if (thread_index() == 0) g.status->loss += sum;
  }
};

}  // namespace steps
}  // namespace cuda
}  // namespace vrm
