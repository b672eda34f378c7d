// The VRM loss on the CPU: one relation graph, or both graphs of the loss, with the gradients, in one call.
#pragma once

#include "graph.h"

#include <vector>

namespace vrm {

// Where a side's gradient is added: vertices before `cut` are of view 0, the others, counted from there, of view 1.
template <class T> struct GradTarget {
  T* views[2];
  int64_t cut, vertex_stride, dim_stride;
};

// How the edges are visited: in the way that was measured to be faster or, for tests and measurements, always in one.
enum class EdgesForm { measured,
                       kept_only,
                       dense };
EdgesForm edges_form();
void set_edges_form(EdgesForm form);

template <class T> struct GraphInput {
  int64_t rows, columns, dims, depth;
  Strided<T> student_a, student_b, teacher_a, teacher_b;
  Strided<T> probs, log_probs;  // P of side a and log(P' + 1e-7) of side b; unused where keep_all
  bool keep_all, exclude_self, need_grad;
  int64_t rank;        // the threshold is lerp(sorted[rank], sorted[rank + 1], lerp_weight) of the entropies ...
  double lerp_weight;
  bool share;  // ... unless this is a share of a larger graph, of so many edges, whose threshold and kept edges are known
  double edges, threshold;
  int64_t kept;
  const T* entropy;  // H of the share, room for a whole register behind each row; or null
  int64_t entropy_stride;
  double delta, eps, weight;  // weight: of this graph's loss in the gradient
  GradTarget<T> grad_a, grad_b;
};

struct GraphResult {
  double loss;
  int64_t kept;
};

// The softmax of both views and their cross-entropies, rows of `classes` elements without gaps.
template <class T> struct SoftmaxInput {
  struct View {
    const T* logits;
    T *probs, *log_probs, *grad;  // null: not wanted
    bool cross_entropy;
  };
  View views[2];
  int64_t samples, classes;
  const int64_t* labels;  // class indices, ...
  const T* target;        // ... or class probabilities, or neither
  const T* weight;        // of the classes, or null
  double label_smoothing;
  int64_t ignore_index;
};

struct LossResult {
  double cross_entropies[2];
  std::vector<GraphResult> graphs;
};

// The softmaxes, then the graphs, if any, whose probs and log_probs may be the former's outputs. Gradients of
// cross-entropies are written, those of graphs added. All inputs must stay alive; nothing is modified but the targets.
template <class T> LossResult run_loss(const SoftmaxInput<T>& softmax, const std::vector<GraphInput<T>>& graphs);

// The graphs alone.
template <class T> std::vector<GraphResult> run_graphs(const std::vector<GraphInput<T>>& graphs);

// Writes H of all edges into h, whose rows have `stride` elements: to the bit what run_graphs ranks by. h must hold
// whole panels: rows and columns rounded up to kEntropyPad.
constexpr int64_t kEntropyPad = 64;
template <class T>
void joint_entropy(Strided<T> probs, Strided<T> log_probs, int64_t rows, int64_t columns, int64_t depth, T* h,
                   int64_t stride);

// Adds to counts[digit] the values of x [rows, columns] that count_digits (select.h) counts; `stride` elements a row.
template <class T>
void count_matrix(const T* x, int64_t rows, int64_t columns, int64_t stride, int64_t prefix, int shift, int bits,
                  int64_t* counts);

// Where the values of x [rows, columns] lie to a bracket: how many are outside of it, and those inside, in any order.
template <class T>
Outside split_matrix(const T* x, int64_t rows, int64_t columns, int64_t stride, T low, T high, std::vector<T>& inside);

// Exact order statistics (sorted[rank], sorted[rank + 1]) of a contiguous array; NaN if any value is.
template <class T> void order_statistics(const T* x, int64_t n, int64_t rank, T* low, T* high);

// torch.lerp to the bit, so that a threshold is torch.quantile's.
template <class T> T lerp(T low, T high, double weight);

}  // namespace vrm
