// One relation graph on its way through the stages.
//
// A stage is a number of tasks that threads may run at once, or work that one thread does; the caller (relation_graph.cpp)
// shares the tasks out and puts a barrier behind each stage. The edges are cut into a grid of P x P blocks and visited in
// P steps, step s taking the blocks (r, (r + s) mod P) at once: no two of them share a row or a column of vertices, so
// every gradient is added to by one thread at a time, in an order that the grid alone fixes. Same inputs and thread count,
// same bits; no per-thread copy of a gradient.
#pragma once

#include "arena.h"
#include "entropy.h"
#include "relation_graph.h"
#include "runtime.h"
#include "select.h"
#include "team.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

namespace vrm {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Cuts [0, n) at multiples of `unit` into `parts` of nearly equal size; the first of part k.
inline int64_t cut(int64_t n, int64_t unit, int64_t parts, int64_t k) {
  return std::min(n, round_up(n, unit) / unit * k / parts * unit);
}

// A block of edges, cut into parts x parts blocks at multiples of the given units.
template <class T> struct Grid {
  Block<T> all;
  int64_t row_unit, column_unit, parts;

  Grid(const Block<T>& block, int64_t row_unit, int64_t column_unit, int64_t most_parts)
      : all(block), row_unit(row_unit), column_unit(column_unit),
        parts(std::max<int64_t>(1, std::min({most_parts, rows() / row_unit, columns() / column_unit}))) {}

  int64_t rows() const { return all.row_end - all.row_begin; }
  int64_t columns() const { return all.column_end - all.column_begin; }
  // The block that a step visits in its row r.
  Block<T> block(int64_t step, int64_t r) const {
    const int64_t c = (r + step) % parts;
    const int64_t r0 = cut(rows(), row_unit, parts, r), r1 = cut(rows(), row_unit, parts, r + 1);
    const int64_t c0 = cut(columns(), column_unit, parts, c), c1 = cut(columns(), column_unit, parts, c + 1);
    const T* h = all.entropy == nullptr ? nullptr : all.entropy + r0 * all.entropy_stride + c0;
    return {all.row_begin + r0, all.row_begin + r1, all.column_begin + c0, all.column_begin + c1, h, all.entropy_stride};
  }
};

template <class T> class GraphRun {
 public:
  // Takes all the memory that the graph needs, but for the dense form's blocks.
  GraphRun(const GraphInput<T>& input, int64_t threads, Arena& arena);

  // The stages, in their order.
  int64_t center_tasks() const { return static_cast<int64_t>(finite_by_part_.size()); }
  void center(int64_t part);
  void scale();  // by one thread; afterwards failed() says whether an input is not finite
  int64_t pack_tasks() const { return 4 * threads_; }
  void pack(int64_t task);
  int64_t entropy_pack_tasks() const { return entropy_ ? entropy_->pack_tasks() : 0; }
  void pack_entropy(int64_t task) { entropy_->pack(task); }
  int64_t entropy_tasks() const { return made_ != nullptr ? entropy_->row_panels() : 0; }
  void make_entropy(int64_t panel) { entropy_->compute_rows(panel, made_, stored_ld_); }
  void find_threshold(Team& team);  // by all threads of a team; failed() again
  int64_t edge_steps() const { return grid_->parts; }  // so many tasks each
  void visit_edges(int64_t step, int64_t row);
  void visit_dense();  // instead where dense(), outside of a parallel region: torch's products have threads of their own
  int64_t gradient_tasks() const { return in_.need_grad ? 2 * threads_ : 0; }
  void add_gradients(int view, int64_t part);

  bool failed() const { return !finite_; }
  bool dense() const { return dense_; }
  GraphResult result() const;
  // Makes the gradients of a graph that failed NaN.
  void poison() const;

 private:
  void make_side(Side<T>& side, int64_t count, Strided<T> student, Strided<T> teacher);
  void take_entropy();
  bool recomputed() const { return !in_.keep_all && stored_ == nullptr; }
  int64_t room_size() const;
  template <class Visit>
  void visit_entropy(int64_t row, int64_t begin, int64_t end, T* room, const Visit& visit) const;
  T sample_entropy(uint64_t draw) const;
  void select_threshold(Team& team);
  bool prefers_dense() const;
  void add_products(const Side<T>& own, int64_t o0, int64_t o1, const Side<T>& other, int64_t n0, int64_t n1,
                    const Matrix<T>& beta, const Matrix<T>& gamma);
  Matrix<T> vectors(const Side<T>& side, int64_t c, int64_t begin, int64_t end, int part) const;
  void add_gradient(const Side<T>& side, const GradTarget<T>& target, int view, int64_t part) const;
  Scratch scratch(int64_t part) const { return {scratch_ + part * scratch_bytes_}; }

  const GraphInput<T>& in_;
  const int64_t threads_;
  const Kernels<T>& kernels_;
  Arena& arena_;
  Graph<T> g_{};
  std::vector<double> losses_;  // of the blocks of the grid; not yet divided by the count
  int64_t kept_ = 0;
  bool finite_ = true, dense_ = false;
  T *center_s_, *center_t_;
  std::vector<char> finite_by_part_;
  std::optional<EntropyBlocks<T>> entropy_;  // empty where every edge is kept, or H is given
  int64_t row_unit_;                         // rows of a block of entropies, whole panels
  const T* stored_ = nullptr;                // H; null where recomputed
  T* made_ = nullptr;                        // the same where it is made here: rows x columns padded to whole panels
  int64_t stored_ld_ = 0;
  std::optional<Grid<T>> grid_;
  char* scratch_;  // of every thread
  int64_t scratch_bytes_;
  T* rooms_ = nullptr;  // of every thread, a block of recomputed entropies
  Selection<T> selection_;
  std::vector<T> ones_;  // whose product with a matrix sums its rows
};

// Calls visit(block) on the entropies of the block of rows from `row` on, columns [begin, end).
template <class T>
template <class Visit>
void GraphRun<T>::visit_entropy(int64_t row, int64_t begin, int64_t end, T* room, const Visit& visit) const {
  const int64_t row_end = std::min(in_.rows, row + row_unit_), width = kernels_.panel_columns;
  if (stored_ != nullptr)
    return visit(Block<T>{row, row_end, begin, end, stored_ + row * stored_ld_ + begin, stored_ld_});
  const int64_t step = EntropyBlocks<T>::kColumnPanels * width;
  for (int64_t c = begin; c < end; c += step) {
    const int64_t stop = std::min(end, c + step);
    entropy_->compute(row, row_unit_, c / width, (stop + width - 1) / width, room, step);
    visit(Block<T>{row, row_end, c, stop, room, step});
  }
}

template <class T> int64_t GraphRun<T>::room_size() const {
  return row_unit_ * EntropyBlocks<T>::kColumnPanels * kernels_.panel_columns;
}

}  // namespace vrm
