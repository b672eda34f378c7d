// The dense form of a graph's edges: blocks of all edges, whose dot products and gradients are matrix products of torch's.
#include "graph_run.h"

#include <atomic>

namespace vrm {
namespace {

// It pays from these sizes and this share of kept edges on, and works in such blocks.
constexpr int64_t kDenseDims = 64, kDenseEdges = int64_t{1} << 14;
constexpr double kDenseShare = 0.6;
constexpr int64_t kDenseRows = 512, kDenseColumns = 2048;

std::atomic<EdgesForm> chosen_form{EdgesForm::measured};

template <class T> Matrix<T> matrix(T* data, int64_t rows, int64_t columns, int64_t stride) {
  return {data, rows, columns, stride, 1};
}

}  // namespace

EdgesForm edges_form() { return chosen_form.load(std::memory_order_relaxed); }
void set_edges_form(EdgesForm form) { chosen_form.store(form, std::memory_order_relaxed); }

// Matrix products over every edge cost less than visiting the kept ones when most are kept: see docs/cpu.md.
template <class T> bool GraphRun<T>::prefers_dense() const {
  if (!can_multiply()) return false;
  if (edges_form() != EdgesForm::measured) return edges_form() == EdgesForm::dense;
  const double edges = in_.share ? in_.edges : static_cast<double>(in_.rows) * static_cast<double>(in_.columns);
  const double share = static_cast<double>(kept_) / edges;
  return in_.dims >= kDenseDims && in_.rows * in_.columns >= kDenseEdges && share > kDenseShare;
}

template <class T> void GraphRun<T>::visit_dense() {
  const int64_t block_rows = std::min(round_up(in_.rows, row_unit_), kDenseRows / row_unit_ * row_unit_);
  const int64_t width = kernels_.panel_columns, ld = std::min(round_up(in_.columns, width), kDenseColumns);
  T* dots[3];
  for (T*& dot : dots) dot = arena_.template take<T>(block_rows * ld);
  T* room = recomputed() ? arena_.template take<T>(block_rows * ld) : nullptr;
  std::vector<double> losses(block_rows);
  std::vector<int64_t> literals(block_rows);
  for (int64_t r0 = 0; r0 < in_.rows; r0 += block_rows)
    for (int64_t c0 = 0; c0 < in_.columns; c0 += ld) {
      const int64_t r1 = std::min(in_.rows, r0 + block_rows), c1 = std::min(in_.columns, c0 + ld);
      for (int part = 0; part < 3; ++part)
        for (int64_t c = 0; c < g_.chunks.count; ++c) {
          multiply(matrix(dots[part], r1 - r0, c1 - c0, ld), vectors(g_.a, c, r0, r1, part),
                   vectors(g_.b, c, c0, c1, part).transposed(), 1, c > 0);
        }
      Team::run(threads_, [&](Team& team) {
        if (recomputed())
          team.for_each((r1 - r0 + row_unit_ - 1) / row_unit_, [&](int64_t k) {
            entropy_->compute(r0 + k * row_unit_, row_unit_, c0 / width, (c1 + width - 1) / width,
                              room + k * row_unit_ * ld, ld);
          });
        team.for_each(r1 - r0, [&](int64_t r) {
          const T* h = recomputed() ? room + r * ld : stored_ ? stored_ + (r0 + r) * stored_ld_ + c0
                                                              : nullptr;
          literals[r] = 0;
          losses[r] = kernels_.weigh_row(g_, r0 + r, c0, c1, h, dots[0] + r * ld, dots[1] + r * ld, dots[2] + r * ld,
                                         &literals[r]);
        });
      });
      int64_t n_literal = 0;
      for (int64_t r = 0; r < r1 - r0; ++r) losses_[0] += losses[r], n_literal += literals[r];
      if (in_.need_grad) {
        const auto beta = matrix(dots[0], r1 - r0, c1 - c0, ld), gamma = matrix(dots[1], r1 - r0, c1 - c0, ld);
        add_products(g_.a, r0, r1, g_.b, c0, c1, beta, gamma);
        add_products(g_.b, c0, c1, g_.a, r0, r1, beta.transposed(), gamma.transposed());
      }
      if (n_literal == 0) continue;
      Graph<T> marked = g_;  // edge by edge, found by the marks that weigh_row left
      marked.threshold = T(0.5);
      const Grid<T> grid({r0, r1, c0, c1, dots[2], ld}, 4, 4, threads_);
      std::vector<double> losses_of_blocks(grid.parts * grid.parts);
      Team::run(threads_, [&](Team& team) {
        for (int64_t step = 0; step < grid.parts; ++step)
          team.for_each(grid.parts, [&](int64_t row) {
            losses_of_blocks[step * grid.parts + row] = kernels_.edges(marked, grid.block(step, row), scratch(row));
          });
      });
      for (double loss : losses_of_blocks) losses_[0] += loss;
    }
}

// One chunk of the vectors of vertices [begin, end): student (0), teacher (1) or residual (2).
template <class T>
Matrix<T> GraphRun<T>::vectors(const Side<T>& side, int64_t c, int64_t begin, int64_t end, int part) const {
  const int64_t width = g_.chunks.width_of(c);
  return matrix(const_cast<T*>(side.vectors(g_.chunks, c, begin)) + part * width, end - begin, width, 3 * width);
}

template <class T>
void GraphRun<T>::add_products(const Side<T>& own, int64_t o0, int64_t o1, const Side<T>& other, int64_t n0, int64_t n1,
                               const Matrix<T>& beta, const Matrix<T>& gamma) {
  ones_.resize(n1 - n0, T(1));
  const Matrix<T> ones = matrix(ones_.data(), n1 - n0, 1, 1);
  multiply(matrix(own.beta_sum + o0, o1 - o0, 1, 1), beta, ones, 1, true);
  multiply(matrix(own.gamma_sum + o0, o1 - o0, 1, 1), gamma, ones, 1, true);
  for (int64_t c = 0; c < g_.chunks.count; ++c) {
    const int64_t width = g_.chunks.width_of(c);
    const Matrix<T> grad = matrix(own.grads(g_.chunks, c, o0), o1 - o0, width, width);
    multiply(grad, beta, vectors(other, c, n0, n1, 2), -1, true);
    multiply(grad, gamma, vectors(other, c, n0, n1, 0), 1, true);
  }
}

template bool GraphRun<float>::prefers_dense() const;
template bool GraphRun<double>::prefers_dense() const;
template void GraphRun<float>::visit_dense();
template void GraphRun<double>::visit_dense();

}  // namespace vrm
