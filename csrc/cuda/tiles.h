// The dense form's middle: one graph, tile by tile of edges, whose products a library takes.
#pragma once

#include "dense.cuh"
#include "forms.h"
#include "launch.h"
#include "literal.cuh"
#include "select.cuh"

#include <algorithm>
#include <utility>

namespace vrm {
namespace cuda {

// Components of the gradients of a tile's vertices that are computed at a time.
constexpr int64_t kProductWidth = 4096;

inline Operand take_operand(Carver& carver, int64_t count, bool half, size_t bytes) {
  if (half) return {carver.take<uint16_t>(count), true};
  return {bytes == 4 ? static_cast<void*>(carver.take<float>(count)) : carver.take<double>(count), false};
}

// What outlives the graph's turn: what the literal stage and the end need.
template <class T> void plan_dense(Carver& carver, Graph<T>& g, const Settings& settings) {
  Packed<T>& packed = g.packed;
  packed.coefficient_terms = settings.half_level == kHalfSums ? 2 : 1;
  packed.coefficient_scale = static_cast<T>(settings.half_level > kNoHalf ? kHalfLength * kHalfLength : 1);
  if (packed.coefficient_terms == 2) packed.coefficient_scale *= 256;
  packed.ld = ceil_div(g.dims + 2, 8) * 8;
  packed.mean = carver.take<T>(2 * g.dims);
  packed.losses = carver.take<double>(dense_tasks(g.rows, g.columns));
}

template <class T> void plan_brackets(Carver& carver, Graph<T>& g, bool stored) {
  if (g.levels == 0) return;
  int64_t largest = 0;
  for (int k = 0; k < g.levels; ++k) {
    largest = std::max(largest, g.level[k].sample);
    g.level[k].collected = carver.take<T>(g.level[k].room);
  }
  g.sample = carver.take<T>(largest);
  if (!stored) g.counters = carver.take<unsigned long long>(kCounters<T>);
}

// Numbers that are no part of a larger matrix, as a tile.
template <class T> Tile<T> whole_tile(T* numbers, int64_t rows, int64_t columns) {
  Tile<T> tile{};
  tile.rows = rows, tile.columns = tile.entropy_ld = columns, tile.entropy = numbers;
  return tile;
}

// each_tile(count) calls count(tile) for all tiles of the graph, whose entropies are there by then.
template <class T, class EachTile>
void run_brackets(const Problem<T>& p, int which, cudaStream_t stream, const EachTile& each_tile) {
  const Graph<T>& g = p.graph[which];
  for (int level = 0; level < g.levels; ++level) {
    launch(bracket_kernel<T>, {1, sizeof(SelectState), kRankThreads}, stream, p, which, level);
    const auto count = [&](const Tile<T>& tile) {
      launch(count_kernel<T>, {ceil_div(tile.rows * tile.columns, kCountOfBlock), kCountBytes}, stream, p, which, level,
             tile);
    };
    level == 0 ? each_tile(count) : count(whole_tile(g.level[level - 1].collected, 1, g.level[level - 1].room));
  }
}

template <class T> class TiledGraph {
 public:
  TiledGraph(const Problem<T>& problem, int which, const Settings& settings, const Multiply<T>& multiply,
             cudaStream_t stream)
      : p_(problem), which_(which), g_(p_.graph[which]), edge_(ceil_div(settings.tile_edge, kTile) * kTile),
        settings_(settings), multiply_(multiply), stream_(stream), stored_(stores(g_, settings)) {}

  // Bytes that a graph needs while it has its turn.
  static int64_t bytes(Graph<T> g, const Settings& settings) {
    Carver edges(nullptr);
    Tile<T> tile;
    carve_entropies(edges, g, tile, settings);
    Carver brackets = edges;
    plan_brackets(brackets, g, stores(g, settings));
    carve_edges(edges, g, tile, settings);
    return std::max(edges.used(), brackets.used());
  }

  void run() {
    Graph<T>& g = p_.graph[which_];
    Carver carver(p_.memory);
    carve_entropies(carver, g, base_, settings_);
    if (g.ranked()) rank(carver);
    if (!g.keep_all) launch(exact_kernel<T>, {2, sizeof(SelectState), kRankThreads}, stream_, p_, which_);
    carve_edges(carver, g, base_, settings_);
    launch(sums_kernel<T>, {sums_blocks(g_), 2 * kThreads * int64_t{sizeof(T)}}, stream_, p_, which_);
    launch(means_kernel<T>, {means_blocks(g_), kWarps * int64_t{sizeof(double)}}, stream_, p_, which_);
    launch(pack_kernel<T>, {pack_blocks(g_)}, stream_, p_, which_);
    clear(g_.losses, g_.rows, stream_);
    if (g_.need_grad) clear(g_.grad, g_.vertices * g_.grad_ld, stream_);
    for_each_tile([&](const Tile<T>& tile) {
      if (!g_.keep_all && !stored_) {
        multiply_entropy(tile);
        use_missed(tile, kRounds<T>);
      }
      multiply_edges(tile);
      launch(dense_kernel<T>, {dense_blocks(tile)}, stream_, p_, which_, tile);
      if (g_.need_grad) multiply_coefficients(tile);
      launch(literal_tile_kernel<T>, {literal_tile_blocks(g_, tile), kLiteralBytes<T>}, stream_, p_, which_, tile);
    });
  }

 private:
  // Of a coefficient with the vectors of a side.
  static int gradient_products(const Graph<T>& g) { return g.packed.coefficient_terms == 2 ? 3 : 1; }

  static bool stores(const Graph<T>& g, const Settings& settings) {
    return g.levels == 0 || g.rows * g.columns * static_cast<int64_t>(sizeof(T)) <= settings.stored_entropy_bytes;
  }

  static void carve_entropies(Carver& carver, Graph<T>& g, Tile<T>& tile, const Settings& settings) {
    const bool half = settings.half_level > kNoHalf;
    const int64_t edge = ceil_div(settings.tile_edge, kTile) * kTile;
    tile = Tile<T>{};
    tile.rows = std::min(g.rows, edge), tile.columns = std::min(g.columns, edge);
    tile.ld = ceil_div(tile.columns, 8) * 8;
    if (g.keep_all) return;
    const bool stored = stores(g, settings);
    tile.entropy_ld = stored ? g.columns : tile.ld;
    tile.entropy = g.ranked() ? carver.take<T>((stored ? g.rows : tile.rows) * tile.entropy_ld) : g.entropy;
    if (!g.ranked()) return;
    if (stored) g.entropy = tile.entropy;
    g.entropy_depth = half ? ceil_div(3 * g.depth, 8) * 8 : g.depth;  // rows of float16 at multiples of 16 bytes
    if (half) g.probs = take_operand(carver, g.rows * g.entropy_depth, true, sizeof(T));
    if (half) g.surprisals = take_operand(carver, g.columns * g.entropy_depth, true, sizeof(T));
  }

  // What the edges' pass needs, where the brackets' memory was.
  static void carve_edges(Carver& carver, Graph<T>& g, Tile<T>& tile, const Settings& settings) {
    Packed<T>& packed = g.packed;
    const bool half = settings.half_level > kNoHalf;
    packed.parts = settings.half_level >= kHalfSumsOfEdges ? 4 : 1;
    for (Operand* x : {&packed.x_s, &packed.x_t, &packed.x_w})
      *x = take_operand(carver, g.vertices * packed.parts * packed.ld, half, sizeof(T));
    packed.ends = carver.take<End<T>>(g.vertices);
    packed.chunks = std::min(int64_t{32}, ceil_div(g.vertices, 4 * kTile));
    packed.sums = carver.take<T>(packed.chunks * 2 * g.dims);
    packed.spread = carver.take<double>(2 * means_blocks(g));
    tile.dots = carver.take<T>(3 * tile.rows * tile.ld);
    tile.row_bits = carver.take<uint32_t>(tile.rows * ceil_div(tile.columns, 32));
    tile.column_bits = carver.take<uint32_t>(tile.columns * ceil_div(tile.rows, 32));
    if (!g.need_grad) return;
    for (Operand* x : {&tile.gamma, &tile.beta})
      *x = take_operand(carver, packed.coefficient_terms * tile.rows * tile.ld, half, sizeof(T));
    const int64_t width = std::min(packed.ld, kProductWidth);
    tile.products = carver.take<T>(2 * gradient_products(g) * std::max(tile.rows, tile.columns) * width);
  }

  void rank(Carver carver) {
    plan_brackets(carver, p_.graph[which_], stored_);
    if constexpr (sizeof(T) == 4)
      if (g_.probs.half) launch(split_kernel<T>, {split_blocks(g_)}, stream_, p_, which_);
    if (stored_)
      for_each_tile([&](const Tile<T>& tile) { multiply_entropy(tile); });
    else
      launch(sample_kernel<T>, {ceil_div(g_.level[0].sample, kWarps)}, stream_, p_, which_);
    run_brackets(p_, which_, stream_, [&](const auto& count) {
      if (stored_) return count(whole_tile(g_.entropy, g_.rows, g_.columns));
      for_each_tile([&](const Tile<T>& tile) {
        multiply_entropy(tile);
        count(tile);
      });
    });
    for (int round = 0; round < kRounds<T> && !stored_; ++round)
      use_missed(whole_tile<T>(nullptr, g_.rows, g_.columns), round);
  }

  void use_missed(const Tile<T>& tile, int round) {
    const int64_t blocks = 4 * int64_t{attribute(cudaDevAttrMultiProcessorCount)};
    launch(missed_kernel<T>, {blocks, kMissedBytes<T>}, stream_, p_, which_, round, tile);
  }

  template <class Visit> void for_each_tile(const Visit& visit) {
    int number = 0;
    for (int64_t row = 0; row < g_.rows; row += edge_) {
      for (int64_t column = 0; column < g_.columns; column += edge_) {
        Tile<T> tile = base_;
        tile.number = ++number;
        tile.row = row, tile.rows = std::min(edge_, g_.rows - row);
        tile.column = column, tile.columns = std::min(edge_, g_.columns - column);
        if (stored_ && tile.entropy != nullptr) tile.entropy += row * tile.entropy_ld + column;
        visit(tile);
      }
    }
  }

  static Factor from(const Operand& x, int64_t vertex, int64_t ld) { return {x, vertex * ld, ld, 1}; }
  static Factor transposed(const Factor& x) { return {x.x, x.first, x.dim_stride, x.vertex_stride}; }

  void multiply_entropy(const Tile<T>& tile) {
    const int64_t depth = g_.entropy_depth;
    const Factor probs = from(g_.probs, tile.row, depth);
    const Factor surprisals = from(g_.surprisals, tile.column, depth);
    multiply_({tile.entropy, tile.entropy_ld, probs, surprisals, tile.rows, tile.columns, depth});
  }

  void multiply_edges(const Tile<T>& tile) {
    const Packed<T>& packed = g_.packed;
    const int64_t row = packed.parts * packed.ld, shift = packed.parts > 1 ? packed.ld : 0;
    const int64_t depth = packed.parts > 1 ? 3 * packed.ld : g_.dims;
    T* out = tile.dots;
    for (const Operand& x : {packed.x_s, packed.x_t, packed.x_w}) {
      Factor other = from(x, g_.first_b + tile.column, row);
      other.first += shift;
      multiply_({out, tile.ld, from(x, tile.row, row), other, tile.rows, tile.columns, depth});
      out += tile.rows * tile.ld;
    }
  }

  // grad += gamma x_s - beta x_w, on both sides.
  void multiply_coefficients(const Tile<T>& tile) {
    const int64_t ld = g_.packed.ld, row = tile.row, column = g_.first_b + tile.column;
    for (int side = 0; side < 2; ++side) {
      const bool by_row = side == 0;
      const int64_t own = by_row ? row : column, other = by_row ? column : row;
      const int64_t count = by_row ? tile.rows : tile.columns, edges = by_row ? tile.columns : tile.rows;
      for (int64_t k = 0; k < ld; k += kProductWidth) {
        const int64_t width = std::min(kProductWidth, ld - k);
        T* out = tile.products;
        for (const auto& [coefficients, x] :
             {std::pair(tile.gamma, g_.packed.x_s), std::pair(tile.beta, g_.packed.x_w)})
          for (int product = 0; product < gradient_products(g_); ++product, out += count * width) {
            const int term = product == 2, part = product == 1 ? 2 : 0;  // high high, high low, low high
            const Factor c = from(coefficients, term * tile.rows, tile.ld);
            Factor vectors = transposed(from(x, other, g_.packed.parts * ld));
            vectors.first += part * ld + k;
            multiply_({out, width, by_row ? c : transposed(c), vectors, count, width, edges});
          }
        launch(add_kernel<T>, {add_blocks(count, width)}, stream_, g_.grad + own * ld + k, ld, tile.products,
               gradient_products(g_), count, width);
      }
    }
  }

  Problem<T> p_;
  const int which_;
  const Graph<T>& g_;
  const int64_t edge_;
  const Settings& settings_;
  const Multiply<T>& multiply_;
  cudaStream_t stream_;
  const bool stored_;
  Tile<T> base_;
};

}  // namespace cuda
}  // namespace vrm
