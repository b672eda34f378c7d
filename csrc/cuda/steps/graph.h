// The data of the relation graphs on the device: plain structures, passed to the kernels by value.
#pragma once

#include "../tensor.h"

namespace vrm {
namespace cuda {
namespace steps {

constexpr int64_t kMaxChunks = 64;  // partial sums of the vertices
constexpr int kBins = 2048;         // 11 bits
constexpr int64_t kNoSelf = -(int64_t{1} << 62);

// Vertices [0, cut) are those of the first matrix, the others those of the second: both views of a batch in one set.
template <class T> struct Stacked {
  Matrix<T> first, second;
  int64_t cut;

  VRM_HOST_DEVICE T& at(int64_t v, int64_t k) const { return v < cut ? first.at(v, k) : second.at(v - cut, k); }
};

// One side of a graph: `count` vertices.
template <class T> struct Side {
  int64_t count;
  Stacked<const T> student, teacher;  // the inputs, [count, D]
  Stacked<const T> factor;  // of the entropy, [count, K]: P on the side of the rows, log(P' + 1e-7) on the other
  // Row-major, ld elements a row: the centred vectors, their residual, then two columns more, which are 1 and 0 in x_s,
  // 0 and 1 in x_w: gradient products with them give the sums of the coefficients.
  T *x_s, *x_t, *x_w;
  T *square_s, *square_t, *square_w, *reach_s, *reach_t;  // [count]: see EdgeInput
  T* grad;                                                // [count, ld]: gamma x_s - beta x_w summed over the edges
  Stacked<T> out;                                         // [count, D]: the gradient in the caller's layout
};

// Of the selection: digits from the top, 11 + 11 + 10 bits in float32, 5 x 11 + 9 in float64, as NARROW_DIGITS of
// vrm_kernels/selection.py.
template <class T> constexpr int kPasses = sizeof(T) == 4 ? 3 : 6;
template <class T> VRM_HOST_DEVICE constexpr int digit_bits(int pass) {
  return sizeof(T) == 4 ? (pass < 2 ? 11 : 10) : (pass < 5 ? 11 : 9);
}
template <class T> VRM_HOST_DEVICE constexpr int digit_shift(int pass) {
  int shift = sizeof(T) * 8;
  for (int k = 0; k <= pass; ++k) shift -= digit_bits<T>(k);
  return shift;
}

// What is found out about a graph on the way; zero at first. The selection follows sorted[rank] and its successor.
template <class T> struct Status {
  unsigned long long histogram[kPasses<T>][2][kBins];  // how many keys have each digit
  unsigned long long nan;                              // how many entropies are not a number
  uint64_t prefix[2];                                  // the digits found so far
  int64_t rank[2];                                     // among the keys with this prefix
  int64_t kept;                                        // edges at or below the threshold
  double loss;                                         // the sum of the edges' losses
  T threshold;
  T scale;         // the student is scaled by it, a power of two
  int not_finite;  // an input is not finite
};

template <class T> struct Graph {
  int64_t rows, columns, dims, depth, ld;  // M, N, D, K
  Side<T> a, b;
  bool one_set;  // both sides are the same vertices: packed once, and their gradients are added
  bool keep_all, need_grad;
  bool add_out;        // the gradient is added to what `out` holds: another graph's
  int64_t self;        // the edges (i, i + self) do not exist; kNoSelf: all do
  int64_t edges;       // how many are ranked,
  int64_t rank;        // the threshold's rank among them, and
  double lerp_weight;  // the weight of the value after it
  double weight;       // of the graph in the loss
  T delta, eps;
  // Working memory.
  int64_t chunks;       // of the vertices, for sums
  T* sums;              // [chunks, 2, D]
  T *mean_s, *mean_t;   // [D]
  double* spread;       // [blocks of dimensions, 2]
  Status<T>* status;    // [1]
  const T* threshold;   // [1], and
  const int64_t* kept;  // [1]: what the edges are judged and the sums divided by: the selection's, or if `given`, the
  bool given;           // caller's: those of a batch that several processes share, of whose edges this graph has some.
  T* entropy;           // [M, N], entropy_ld elements a row: if `given`, of these edges; only read
  int64_t entropy_ld;
  // Results.
  T* loss_out;        // [1]
  int64_t* kept_out;  // [1]
};

// Edges rows [row, row + rows) x columns [column, column + columns). Small graphs are one tile.
template <class T> struct EdgeTile {
  int64_t row, column, rows, columns;
  T* entropy;  // of these edges, entropy_ld elements a row
  int64_t entropy_ld;
  // ld elements a row. Before the edges are weighed the first three hold their dot products (student, teacher,
  // residual) if `dots_given`; afterwards the coefficients, zero on edges that are pruned or literal, and u of the
  // literal ones.
  T *beta, *gamma, *u, *v, *radial;
  int64_t ld;
  bool dots_given;
  uint32_t* literal;  // [rows, words]: one bit an edge
  int64_t words;
  double* losses;  // [32 x 32 tiles]
};

// The softmax of the student's logits [rows, columns] of up to two views, and log(softmax + 1e-7).
template <class T> struct Softmax {
  Matrix<const T> logits[2];
  int64_t rows, columns;  // rows of one view; 0: nothing to do
  T *probs[2], *logs[2];  // [rows, columns]; null: not needed
};

// Everything that one launch works on: both graphs of the loss, or one.
template <class T> struct Problem {
  Softmax<T> softmax;
  int graphs;
  Graph<T> graph[2];
  EdgeTile<T> tile[2];
  T* total_out;  // [1], the weighted sum of the losses; null: not needed
  char* memory;  // for the graphs of the form `tiles`, one after the other
};

}  // namespace steps
}  // namespace cuda
}  // namespace vrm
