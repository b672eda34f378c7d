// The CPU kernels, written once for every instruction set: included by kernels_<isa>.cpp, which define VRM_ISA_NAMESPACE,
// VRM_VECTOR_BYTES, VRM_PANEL_ROWS and the compilation target.

#include "graph.h"
#include "simd.h"

namespace vrm {
namespace VRM_ISA_NAMESPACE {

// In the order in which a graph goes through them.
#include "kernels/softmax.inl"
#include "kernels/prepare.inl"
#include "kernels/entropy.inl"
#include "kernels/select.inl"
#include "kernels/edges.inl"
#include "kernels/literal.inl"
#include "kernels/gradient.inl"
#include "kernels/dense.inl"

template <class T> double edges(const Graph<T>& g, const Block<T>& block, Scratch scratch) {
  Tile<T> tile = make_tile<T>(scratch);
  T* room = reinterpret_cast<T*>(scratch.data + tile_scratch_bytes<T>());
  for (int64_t k = 0; k < 2 * g.chunks.lanes_padded; ++k) room[k] = T(0);
  const int64_t columns = tile_columns<T>(g.chunks);
  double total = 0;
  for (int64_t r0 = block.row_begin; r0 < block.row_end; r0 += kTileRows) {
    const int64_t r1 = r0 + kTileRows < block.row_end ? r0 + kTileRows : block.row_end;
    for (int64_t c0 = block.column_begin; c0 < block.column_end; c0 += columns) {
      const int64_t c1 = c0 + columns < block.column_end ? c0 + columns : block.column_end;
      list_edges(g, block, r0, r1, c0, c1, tile);
      measure_edges(g, tile);
      total += weigh_edges(g, tile);
      for (int64_t k = 0; k < tile.n_literal; ++k)
        total += literal_edge(g, tile.row[tile.literal[k]], tile.column[tile.literal[k]], room);
      if (!g.need_grad || tile.n_literal == tile.count) continue;
      transpose_edges(c0, c1 - c0, tile);
      add_gradients(g, g.a, g.b, {r0, r1 - r0, tile.row_start, tile.column, tile.beta, tile.gamma});
      add_gradients(g, g.b, g.a,
                    {c0, c1 - c0, tile.column_start, tile.by_column_row, tile.by_column_beta, tile.by_column_gamma});
    }
  }
  return total;
}

template <class T> const Kernels<T>* kernels() {
  static const Kernels<T> table = {kPanelRows, kPanelColumns<T>, softmax_row<T>, sum_vertices<T>, spread<T>, pack_panel<T>,
                                   entropy_rows<T>, pack_side<T>, edges<T>, weigh_row<T>, unpack_grad<T>,
                                   split<T>};
  return &table;
}

}  // namespace VRM_ISA_NAMESPACE
}  // namespace vrm
