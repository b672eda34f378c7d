// What a call computes, as the kernels see it: pointers, sizes and settings, passed by value.
//
// The stages, in their order, a file each: prepare, entropy, select, literal, finish. docs/gpu.md has their counts.
#pragma once

#include "tensor.h"

namespace vrm {
namespace cuda {

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;  // of a key, that a round of counting looks at

enum class Dtype { float64,
                   float32,
                   bfloat16,
                   float16 };

// A matrix of the caller's, [rows, columns], as it lies.
struct Input {
  const void* data;
  Dtype dtype;
  int64_t row_stride, column_stride;
};

// Powers of two that bring the student to the teacher's size and both, as float16 operands, to kHalfLength.
template <class T> struct Scales {
  T student, teacher;
};

// What is found out about a graph on the way.
template <class T> struct Status {
  unsigned long long kept;  // edges at or below
  T threshold;
  Scales<T> scale;
  int uncertified;          // the last tile of the dense form with edges for the literal stage; 0: none
};

// Two keys of entropies, from a sample, and how many of a source lie below, at and between them. A source is all
// entropies, or what the bracket before has collected. See select.cuh and vrm_kernels/graph/forms.py.
enum Where { kBelow,
             kAtLow,
             kInside,
             kAtHigh,
             kAbove,
             kCounts };
struct Bracket {
  int64_t count[kCounts];
  uint64_t end[2];  // the first key that counts as at the end
  int64_t rank;     // the wanted one among the source
};
constexpr int kMostBrackets = 6;
template <class T> struct Level {
  int64_t sample, reach, room;  // of its bracket: as graph/forms.py says
  T* collected;                 // [room]: what lies inside
};

// An operand of the products of the dense form: T, or float16.
struct Operand {
  void* data;
  bool half;
};

// The length that float16 operands give a typical vertex. Components are then far from both ends of float16's range,
// and so are coefficients of typical edges, which are inverse squares of lengths, times its square. Sums of two take
// them 2^8 times as large, so that the second terms keep their digits.
constexpr int kHalfLength = 256;

// What an edge needs to know of an end: see EdgeInput.
template <class T> struct End {
  T square_s, square_t, square_w, reach_s, reach_t;
};

// What the dense form knows of the vertices, packed for products. Rows have `ld` elements: the dimensions, then two
// columns that are 1 and 0 in x_s, 0 and 1 in x_w, so that products with them give the sums of the coefficients.
template <class T> struct Packed {
  int64_t ld;
  // [V, parts, ld]: centred and scaled; x_w: the residual. One part, or four where operands are sums of two: [high,
  // high, low, high], of which one side of an edge takes the first three, the other the last three. The gradient takes
  // the first, and the third beside coefficients of two terms.
  Operand x_s, x_t, x_w;
  int64_t parts;
  int64_t coefficient_terms;  // float16 numbers that a coefficient is the sum of
  T coefficient_scale;        // of the coefficients as operands
  End<T>* ends;               // [V]
  // Working memory.
  int64_t chunks;       // of the vertices, for sums
  T* sums;              // [chunks, 2, D]
  T* mean;              // [2, D]
  double* spread;       // [blocks of dimensions, 2]
  double* losses;       // [blocks of 32 x 32 edges], of certified edges
};

// One relation graph: M x N edges of D dimensions, ranked by entropies of depth K. Matrices are dense, row by row. Side
// a has the vertices [0, M), side b [first_b, first_b + N): in a set of its own, or the same where first_b is 0.
template <class T> struct Graph {
  int64_t rows, columns, dims, depth;  // M, N, D, K
  int64_t vertices, first_b;           // V
  // The dense form reads the caller's matrices, the first `split` vertices the rows of one, the others of the second;
  // the literal form copies of them, [V, D].
  Input student_views[2], teacher_views[2];
  int64_t split;
  const T *student, *teacher;
  Operand probs, surprisals;           // P [M, K], -log(P' + 1e-7) [N, K]; or [.., 3 K], of two float16 terms
  int64_t entropy_depth;               // K or 3 K
  bool exclude_self;                   // the edges (i, i) do not exist
  bool keep_all, need_grad;
  int64_t edges;   // how many are ranked,
  int64_t rank;    // the threshold's rank among them, and
  T lerp_weight;   // the weight of the value after it
  const T* given_threshold;   // of a share of a graph, whose entropies, threshold and kept count the caller has:
  const int64_t* given_kept;  // [1] each; else null
  T delta, eps;
  double weight;   // of the graph in the loss
  // Working memory.
  Status<T>* status;
  T* entropy;      // [M, N], null where they are not stored; literal form: NaN where there is no edge
  int levels;  // of brackets; 0: one block ranks all entropies
  Level<T> level[kMostBrackets];
  Bracket* brackets;             // [levels]
  T* sample;                     // of the largest
  unsigned long long* counters;  // [kCounters]: see select.cuh; null: entropies are stored
  double* losses;  // [M], of the kept edges of a row; dense form: of those that are not certified
  T* grad;         // [V, grad_ld]: of the sum of the edges' losses; dense form: of the products, see graph_gradient
  int64_t grad_ld;
  bool dense;
  Packed<T> packed;

  VRM_HOST_DEVICE bool one_set() const { return first_b == 0; }
  VRM_HOST_DEVICE bool ranked() const { return !keep_all && given_kept == nullptr; }  // here
};

// Edges [row, row + rows) x [column, column + columns) of the dense form; pairwise arrays have ld elements a row.
template <class T> struct Tile {
  int number;  // from 1 on, in the order in which tiles are computed
  int64_t row, column, rows, columns, ld;
  T* entropy;
  int64_t entropy_ld;
  T* dots;  // three planes of rows x ld: dot products of the operands
  uint32_t *row_bits, *column_bits;  // [rows, words of columns] and the other way: kept edges that are not certified
  Operand gamma, beta;  // coefficients, 0 on edges that are pruned or not certified; a plane for each of their terms
  T* products;          // of a coefficient each with the vectors
};

// The batch that both graphs of the loss are made of: logits [B, C], and what the cross-entropies need.
template <class T> struct Batch {
  int64_t samples, classes;
  bool complete;                 // both views are one vertex set
  Input student[2], teacher[2];  // real and virtual view
  bool cross_entropy[2];         // whether that of a view counts
  const int64_t* labels;         // [B] class indices, or
  Matrix<const T> target;        // [B, C] class probabilities, where `labels` is null
  const T* class_weight;         // [C], or null
  int64_t ignore_index;
  T label_smoothing;
  // Working memory: both views one below the other, by samples [2 B, C] and by classes [2 C, B]; null where nothing
  // needs them: see plan_batch.
  T *student_rows, *teacher_rows, *student_columns, *teacher_columns;
  T *probs, *surprisals, *probs_columns, *surprisals_columns;
  T *peaks, *sums;  // [2 B]: a row's softmax is exp(x - peak) / sum
  // [2 B]: a row's cross-entropy, its weight in the mean's divisor, the sum of its target, and 0 or NaN.
  double* ce_losses;
  T *ce_weights, *ce_targets, *poison;
};

// The vertices of one graph alone, of two sides, as the caller has them.
template <class T> struct Vectors {
  int64_t count[2], dims, depth;  // M and N, D, K; depth 0: every edge is kept
  Input student[2], teacher[2], probs[2];
  // Working memory: [count, D], and P or -log(P' + 1e-7) [count, K], null as above; of each vertex 0 or NaN, and its
  // largest probability.
  T *students[2], *teachers[2], *factors[2], *poison[2], *largest[2];  // b's vectors follow a's
};

// What finish needs of the batch: written by select.
struct Totals {
  double cross_entropy[2];  // means
  double divisor[2];        // of the gradients
  int poisoned;             // an input is not finite, or a label is none
};

// Where the gradient of a view, or of a side, goes: dense, [rows, columns].
template <class T> struct Output {
  T* out;
  int64_t rows, columns;
  int64_t by_row, by_column;  // the vertex of its first row in the first graph, of its first column in the second
};

// Everything that a launch works on: both graphs of the loss, or one alone.
template <class T> struct Problem {
  Batch<T> batch;      // of both graphs, or
  Vectors<T> vectors;  // of one, where the batch has no samples
  int graphs;
  Graph<T> graph[2];
  Totals* totals;
  Output<T> output[2];
  T *loss_out, *terms_out;  // [1]; [4] of a batch
  int64_t* kept_out;        // [graphs]
  char* memory;             // of the dense form's graphs, one after the other
};

}  // namespace cuda
}  // namespace vrm
