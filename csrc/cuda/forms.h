// What the binding calls: the loss of a batch, or one relation graph, with gradients, on one stream.
#pragma once

#include "problem.h"

#include <functional>

namespace vrm {
namespace cuda {

// Why the current device cannot run the kernels: they may not be compiled for it. Null: it can.
const char* refusal();

// The operands of the dense form's products: T; float16, sums of two for the entropies; sums of two for the edges as
// well; and for the gradient.
enum HalfLevel : int64_t { kNoHalf,
                           kHalf,
                           kHalfSumsOfEdges,
                           kHalfSums };

// What a call may decide beside its problem.
struct Settings {
  bool dense;
  int64_t half_level;            // of the dense form's operands: see HalfLevel
  int64_t tile_edge;             // vertices of a side of a tile of the dense form
  int64_t stored_entropy_bytes;  // of a graph: entropies are stored up to this size, and computed again beyond it
};

// Element (v, k) of an operand.
struct Factor {
  Operand x;
  int64_t first, vertex_stride, dim_stride;
};

// out(i, j) = sum_k a(i, k) b(j, k); i < m, j < n, k < depth; out(i, j) row-major.
template <class T> struct Product {
  T* out;
  int64_t ld;
  Factor a, b;
  int64_t m, n, depth;
};
template <class T> using Multiply = std::function<void(const Product<T>&)>;

// Completes a problem: the caller has set the sizes, settings, inputs and results; the graphs of a batch follow from
// it, but for their weights, ranks and settings. Called twice: with `memory` null for the bytes of working memory that
// are needed, then with them.
template <class T> int64_t plan(Problem<T>& problem, const Settings& settings, char* memory);

// digits [2, kBins] of x, whose rows have ld elements, behind two prefixes, by a round of kDigitBits: see digits_kernel.
template <class T> void count_digits(const T* x, int64_t rows, int64_t columns, int64_t ld, const int64_t* prefixes,
                                     int round, int64_t* digits, cudaStream_t stream);

// Computes the planned problem. Queues work on the stream and returns; never waits for it. Throws std::runtime_error
// where CUDA refuses a launch.
template <class T>
void run(const Problem<T>& problem, const Settings& settings, const Multiply<T>& multiply, cudaStream_t stream);

}  // namespace cuda
}  // namespace vrm
