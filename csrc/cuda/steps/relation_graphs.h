// What the binding calls: the loss, the kept counts and the gradients of one or two relation graphs, on one stream.
#pragma once

#include "graph.h"

#include <cuda_runtime_api.h>

#include <functional>

namespace vrm {
namespace cuda {
namespace steps {

// How the graphs are computed. `automatic` decides by sizes alone, see docs/cuda.md.
enum class Form {
  automatic,
  one_launch,  // a single cooperative kernel for all graphs
  launches,    // the same steps, a kernel each
  tiles        // one graph after the other, products by `multiply`, tile by tile of edges
};

struct Tuning {
  Form form;
  int64_t tile_edge;             // vertices of a side of a tile
  int64_t stored_entropy_bytes;  // entropies of a graph are stored up to this size, and recomputed beyond it
};

// out(i, j) = alpha sum_k a(i, k) b(j, k), added to out if `accumulate`; i < m, j < n, k < depth; out(i, j) row-major.
template <class T> struct ProductArguments {
  Matrix<T> out;
  Matrix<const T> a, b;
  int64_t m, n, depth;
  double alpha;
  bool accumulate;
};
template <class T> using Multiply = std::function<void(const ProductArguments<T>&)>;

// Completes a problem: the caller has set the sizes, flags, inputs and results (softmax: the logits and sizes; factors
// that come from it are set here). Called twice: with `memory` null for the bytes of working memory that are needed,
// then with them.
template <class T> int64_t plan(Problem<T>& problem, const Tuning& tuning, char* memory);

// Computes the planned problem. Queues work on the stream and returns; never waits for it. Throws std::runtime_error
// where CUDA refuses a launch.
template <class T>
void run(const Problem<T>& problem, const Tuning& tuning, const Multiply<T>& multiply, cudaStream_t stream);

// Adds to the histograms of a pass the digits of entropies [rows, columns], ld elements a row, behind the prefixes that
// the status holds.
template <class T> void count_entropies(Status<T>* status, int pass, const T* entropy, int64_t rows, int64_t columns,
                                        int64_t ld, cudaStream_t stream);

}  // namespace steps
}  // namespace cuda
}  // namespace vrm
