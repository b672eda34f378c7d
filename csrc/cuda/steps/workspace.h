// Working memory: one allocation, cut into the arrays of the graphs.
#pragma once

#include "relation_graphs.h"
#include "select.cuh"

#include <algorithm>

namespace vrm {
namespace cuda {
namespace steps {

template <class T> inline int64_t tile_edge(const Tuning& tuning) { return ceil_div(tuning.tile_edge, kTile) * kTile; }

// Whether one array holds all entropies.
template <class T> inline bool stores_entropies(const Graph<T>& g, const Tuning& tuning) {
  return g.given || g.rows * g.columns * static_cast<int64_t>(sizeof(T)) <= tuning.stored_entropy_bytes;
}

// The arrays of the tiles of a graph; `whole`: one tile has all its edges.
template <class T>
void carve_tile(Carver& carver, const Graph<T>& g, EdgeTile<T>& tile, const Tuning& tuning, bool whole) {
  const int64_t edge = whole ? std::max(g.rows, g.columns) : tile_edge<T>(tuning);
  tile = EdgeTile<T>{};
  tile.rows = std::min(g.rows, edge);
  tile.columns = std::min(g.columns, edge);
  tile.dots_given = !whole;
  tile.ld = ceil_div(tile.columns, kTile) * kTile;
  tile.words = tile.ld / kTile;
  const bool stored = whole || stores_entropies(g, tuning);
  tile.entropy_ld = stored ? g.columns : tile.ld;
  if (g.given)
    tile.entropy = g.entropy, tile.entropy_ld = g.entropy_ld;
  else if (!g.keep_all)
    tile.entropy = carver.take<T>((stored ? g.rows : tile.rows) * tile.entropy_ld);
  tile.losses = carver.take<double>(ceil_div(tile.rows, kTile) * tile.words);
  const int64_t size = tile.rows * tile.ld;
  if (g.need_grad || tile.dots_given)
    for (T** array : {&tile.beta, &tile.gamma, &tile.u}) *array = carver.take<T>(size);
  if (!g.need_grad) return;
  for (T** array : {&tile.v, &tile.radial}) *array = carver.take<T>(size);
  tile.literal = carver.take<uint32_t>(tile.rows * tile.words);
}

template <class T> void carve_side(Carver& carver, const Graph<T>& g, Side<T>& side, const Side<T>* same) {
  if (same != nullptr) {
    side.x_s = same->x_s, side.x_t = same->x_t, side.x_w = same->x_w;
    side.square_s = same->square_s, side.square_t = same->square_t, side.square_w = same->square_w;
    side.reach_s = same->reach_s, side.reach_t = same->reach_t;
  } else {
    for (T** array : {&side.x_s, &side.x_t, &side.x_w}) *array = carver.take<T>(side.count * g.ld);
    for (T** array : {&side.square_s, &side.square_t, &side.square_w, &side.reach_s, &side.reach_t})
      *array = carver.take<T>(side.count);
  }
  side.grad = g.need_grad ? carver.take<T>(side.count * g.ld) : nullptr;
}

template <class T> void carve_graph(Carver& carver, Graph<T>& g, EdgeTile<T>& tile, const Tuning& tuning, bool whole) {
  const int64_t vertices = g.one_set ? g.rows : g.rows + g.columns;
  g.ld = ceil_div(g.dims + 2, 4) * 4;
  g.chunks = std::min(kMaxChunks, ceil_div(vertices, 4 * kTile));
  g.sums = carver.take<T>(g.chunks * 2 * g.dims);
  g.mean_s = carver.take<T>(g.dims);
  g.mean_t = carver.take<T>(g.dims);
  g.spread = carver.take<double>(2 * ceil_div(g.dims, kThreads));
  carve_side<T>(carver, g, g.a, nullptr);
  carve_side<T>(carver, g, g.b, g.one_set ? &g.a : nullptr);
  carve_tile(carver, g, tile, tuning, whole);
}

// Softmax rows are samples: the vertices of the first graph, and the depth of the second's entropies.
template <class T> void carve_softmax(Carver& carver, Problem<T>& p) {
  Softmax<T>& s = p.softmax;
  if (s.rows == 0) return;
  const bool one_set = p.graph[0].one_set;
  const int64_t size = s.rows * s.columns;
  s.probs[0] = carver.take<T>(size);
  s.probs[1] = one_set ? carver.take<T>(size) : nullptr;
  s.logs[0] = one_set ? carver.take<T>(size) : nullptr;
  s.logs[1] = carver.take<T>(size);
  for (int k = 0; k < p.graphs; ++k) {
    const int64_t vertex_stride = k == 0 ? s.columns : 1, dim_stride = k == 0 ? 1 : s.columns;
    const auto matrix = [&](const T* x) { return Matrix<const T>{x, vertex_stride, dim_stride}; };
    const int64_t cut = k == 0 ? s.rows : s.columns;
    p.graph[k].a.factor = {matrix(s.probs[0]), matrix(s.probs[1]), cut};
    p.graph[k].b.factor = {matrix(s.logs[one_set ? 0 : 1]), matrix(s.logs[1]), cut};
  }
}

}  // namespace steps
}  // namespace cuda
}  // namespace vrm
