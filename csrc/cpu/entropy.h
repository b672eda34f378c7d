// The joint entropies H[i][j] = -sum_k P[i][k] L[j][k], L = log(P' + 1e-7), of a graph's edges, by blocks of rows: the
// same bits whenever and wherever a block of them is computed.
#pragma once

#include "arena.h"
#include "graph.h"

#include <algorithm>
#include <limits>

namespace vrm {

template <class T> class EntropyBlocks {
 public:
  // Takes the memory for the packed panels.
  EntropyBlocks(Strided<T> probs, Strided<T> log_probs, int64_t rows, int64_t columns, int64_t depth, bool exclude_self,
                Arena& arena)
      : kernels_(kernels<T>()), probs_(probs), log_probs_(log_probs), rows_(rows), columns_(columns),
        exclude_self_(exclude_self), row_panels_((rows + kernels_.panel_rows - 1) / kernels_.panel_rows),
        column_panels_((columns + kernels_.panel_columns - 1) / kernels_.panel_columns) {
    row_data_ = arena.take<T>(padded_rows() * depth);
    column_data_ = arena.take<T>(padded_columns() * depth);
    panels_ = {depth, row_data_, column_data_};
  }

  static constexpr int64_t kColumnPanels = 16;  // of a block that is computed again

  // How many rows a block has: whole panels.
  static int64_t row_unit() {
    const int64_t height = kernels<T>().panel_rows;
    return std::max<int64_t>(1, kTileRows / height) * height;
  }
  int64_t row_blocks() const { return (rows_ + row_unit() - 1) / row_unit(); }
  // The matrix that a block is written into has this many elements a row, and this many rows.
  int64_t padded_columns() const { return column_panels_ * kernels_.panel_columns; }
  int64_t padded_rows() const { return row_panels_ * kernels_.panel_rows; }

  int64_t row_panels() const { return row_panels_; }

  int64_t pack_tasks() const { return row_panels_ + column_panels_; }
  void pack(int64_t task) {
    const int64_t depth = panels_.depth;
    if (task < row_panels_) {
      kernels_.pack_panel(probs_, rows_, depth, task, kernels_.panel_rows,
                          row_data_ + task * kernels_.panel_rows * depth);
    } else {
      task -= row_panels_;
      kernels_.pack_panel(log_probs_, columns_, depth, task, kernels_.panel_columns,
                          column_data_ + task * kernels_.panel_columns * depth);
    }
  }

  // H of up to `rows` rows from `row` on, whole panels, by panels [q0, q1) of columns. A vertex's edge with itself is made
  // infinite: never kept.
  void compute(int64_t row, int64_t rows, int64_t q0, int64_t q1, T* h, int64_t ld) const {
    const int64_t p0 = row / kernels_.panel_rows, p1 = std::min(row_panels_, p0 + rows / kernels_.panel_rows);
    kernels_.entropy_rows(panels_, p0, p1, q0, q1, h, ld);
    if (!exclude_self_) return;
    const int64_t c0 = q0 * kernels_.panel_columns, c1 = q1 * kernels_.panel_columns;
    for (int64_t i = row; i < p1 * kernels_.panel_rows; ++i)
      if (i >= c0 && i < c1) h[(i - row) * ld + i - c0] = std::numeric_limits<T>::infinity();
  }

  // One panel of rows of H, which begins at h.
  void compute_rows(int64_t panel, T* h, int64_t ld) const {
    const int64_t row = panel * kernels_.panel_rows;
    compute(row, kernels_.panel_rows, 0, column_panels_, h + row * ld, ld);
  }

  // The entropy of one edge: close to compute()'s, but not the same bits.
  T approximate(int64_t i, int64_t j) const {
    if (exclude_self_ && i == j) return std::numeric_limits<T>::infinity();
    const int64_t height = kernels_.panel_rows, width = kernels_.panel_columns, depth = panels_.depth;
    const T* p = row_data_ + i / height * height * depth + i % height;
    const T* l = column_data_ + j / width * width * depth + j % width;
    T sum = 0;
    for (int64_t k = 0; k < depth; ++k) sum -= p[k * height] * l[k * width];
    return sum;
  }

 private:
  const Kernels<T>& kernels_;
  Strided<T> probs_, log_probs_;
  int64_t rows_, columns_;
  bool exclude_self_;
  int64_t row_panels_, column_panels_;
  T *row_data_, *column_data_;
  Entropy<T> panels_;
};

}  // namespace vrm
