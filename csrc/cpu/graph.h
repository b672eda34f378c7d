// The data of one relation graph on the CPU, and the table of kernels that work on it.
//
// Storage is chunk-major: the D dimensions are cut into chunks of at most kChunkBytes a vector, and within a chunk the
// vertices follow one another, so that a tile of edges reads a few contiguous kilobytes whatever D is.
#pragma once

#include "../edge.h"

#include <cstdint>

namespace vrm {

constexpr int64_t kAlignBytes = 64;      // the widest vector register; every stored row is padded to it
constexpr int64_t kChunkBytes = 512;     // of one vertex's vector in one chunk
constexpr int64_t kTileRows = 64;        // edges are visited in tiles of so many rows ...
constexpr int64_t kTileBytes = 40 << 10; // ... and as many columns as fit the first-level cache
constexpr int64_t kMaxTileColumns = 64;

// A matrix of vertices by dimensions, in place: element (v, k) at data[v * vertex_stride + k * dim_stride].
template <class T> struct Strided {
  const T* data;
  int64_t vertex_stride, dim_stride;
  const T* at(int64_t v) const { return data + v * vertex_stride; }
};

struct Chunks {
  int64_t dims, lanes_padded;  // D, and D rounded up to the widest register
  int64_t width;               // of every chunk but the last
  int64_t count;
  int64_t width_of(int64_t c) const { return c + 1 < count ? width : lanes_padded - width * (count - 1); }
  int64_t dims_of(int64_t c) const { return c + 1 < count ? width : dims - width * (count - 1); }
  int64_t begin(int64_t c) const { return c * width; }
};

template <class T> Chunks make_chunks(int64_t dims) {
  const int64_t lanes = kAlignBytes / sizeof(T), most = kChunkBytes / sizeof(T);
  const int64_t padded = (dims + lanes - 1) / lanes * lanes;
  const int64_t count = (padded + most - 1) / most;
  // Chunks as even as whole registers allow: a narrow last chunk would be mostly overhead.
  const int64_t width = ((padded + count - 1) / count + lanes - 1) / lanes * lanes;
  return {dims, padded, width, (padded + width - 1) / width};
}

// One side of a graph: `count` vertices. The centred and scaled vectors of student and teacher and their residual
// (student - teacher) are stored side by side.
template <class T> struct Side {
  int64_t count;
  Strided<T> student, teacher;  // the inputs, uncentred
  T* packed;                    // [chunk][vertex][student, teacher, residual][width]
  T* grad;                      // [chunk][vertex][width], or null; lacks the row-sum terms below
  T *square_s, *square_t, *square_w, *reach_s, *reach_t;  // [vertex]: see EdgeInput
  T *beta_sum, *gamma_sum;                                // [vertex]: sums of the coefficients over its edges

  const T* vectors(const Chunks& chunks, int64_t c, int64_t vertex) const {
    return packed + 3 * (count * chunks.begin(c) + vertex * chunks.width_of(c));
  }
  T* grads(const Chunks& chunks, int64_t c, int64_t vertex) const {
    return grad + count * chunks.begin(c) + vertex * chunks.width_of(c);
  }
};

// The joint entropy H[i][j] = -sum_k P[i][k] L[j][k], L = log(P' + 1e-7), from panels packed for entropy_rows.
template <class T> struct Entropy {
  int64_t depth;                       // K; 0 where every edge is kept
  const T *probs_panels, *log_panels;  // [panel][K][panel height / width], zero padded
};

template <class T> struct Graph {
  int64_t rows, columns;  // M, N
  Chunks chunks;
  Side<T> a, b;
  const T *center_s, *center_t;  // [D padded]: subtracted from every vector, which changes no difference
  bool exclude_self, need_grad;
  bool literal_only;  // so few dimensions that differences of cosines would lose everything to rounding
  T student_scale;    // the power of two that brings the student to the teacher's size; packed vectors are scaled
  EdgeRule<T> rule;
  T threshold;
  double scale;       // of the gradient: student_scale * weight / (#kept + 1e-7)
};

// The edges rows [row_begin, row_end) x columns [column_begin, column_end), whose entropy is
// entropy[(i - row_begin) * entropy_stride + j - column_begin], or null where every edge is kept.
template <class T> struct Block {
  int64_t row_begin, row_end, column_begin, column_end;
  const T* entropy;
  int64_t entropy_stride;
};

// Working memory of one thread, sized by tile_scratch_bytes().
struct Scratch {
  char* data;
};

// One row of logits; what is null is not wanted. The cross-entropy is that with weight[c] (hot t[c] + even) for class
// c, where t is `target`, or 1 for class `label` and 0 for the others.
template <class T> struct SoftmaxRow {
  const T* logits;
  int64_t classes;
  T *probs, *log_probs;  // P, log(P + 1e-7)
  bool cross_entropy;
  const T *target, *weight;
  int64_t label;
  T hot, even;
  double scale;  // of the gradient
  T* grad;       // overwritten: zeros without a cross-entropy
};

// How many of some values lie below a bracket and at its ends; where the ends are equal, at_high is 0.
struct Outside {
  int64_t below = 0, at_low = 0, at_high = 0;
  Outside& operator+=(const Outside& other) {
    below += other.below, at_low += other.at_low, at_high += other.at_high;
    return *this;
  }
};

template <class T> struct Kernels {
  int64_t panel_rows, panel_columns;  // of the register tile of entropy_rows

  // The row's cross-entropy, unscaled.
  double (*softmax_row)(const SoftmaxRow<T>& row);
  // Adds every vertex to sums[dim], dims [begin, end); false if an element there is not a number, or too large.
  bool (*sum_vertices)(Strided<T> m, int64_t count, int64_t begin, int64_t end, T* sums);
  // Adds up the squared distances of every step-th vertex from the centre.
  double (*spread)(Strided<T> m, int64_t count, int64_t step, int64_t dims, const T* center);
  // Packs P or L, vertices [panel * height, (panel + 1) * height), into one panel.
  void (*pack_panel)(Strided<T> m, int64_t count, int64_t depth, int64_t panel, int64_t height, T* out);
  // Computes H of the given panels of rows and of columns: whole panels, row-major with leading dimension ld.
  void (*entropy_rows)(const Entropy<T>& e, int64_t row_panel_begin, int64_t row_panel_end,
                       int64_t column_panel_begin, int64_t column_panel_end, T* h, int64_t ld);
  // Centres, packs and measures vertices [begin, end) of a side.
  void (*pack_side)(const Graph<T>& g, const Side<T>& side, int64_t begin, int64_t end);
  // Loss of the kept edges of a block, unscaled; adds their gradients, scaled, to both sides.
  double (*edges)(const Graph<T>& g, const Block<T>& block, Scratch scratch);
  // The dense form of `edges` for row i and columns [begin, end), all dot products given; see its definition.
  double (*weigh_row)(const Graph<T>& g, int64_t i, int64_t begin, int64_t end, const T* entropy, T* dot_s, T* dot_t,
                      T* dot_w, int64_t* n_literal);
  // Completes the gradient of vertices [begin, end) and adds it to out, where vertex `begin` is the first.
  void (*unpack_grad)(const Graph<T>& g, const Side<T>& side, int64_t begin, int64_t end, T* out,
                      int64_t vertex_stride, int64_t dim_stride);
  // Counts the values among n that are less than `low` or equal to an end, and appends those strictly between the ends
  // to `found`, up to `room` of them; NaN counts as between.
  Outside (*split)(const T* x, int64_t n, T low, T high, T* found, int64_t room, int64_t* n_found);
};

// The fastest kernels this processor runs, or those of `isa` ("avx512", "avx2", "portable") set by select_isa.
template <class T> const Kernels<T>& kernels();
const char* current_isa();
bool select_isa(const char* isa);  // false, and nothing changed, if this processor lacks it; "" goes back to the best

template <class T> int64_t tile_columns(const Chunks& chunks) {
  const int64_t fit = kTileBytes / (3 * chunks.width * static_cast<int64_t>(sizeof(T)));
  return fit < 8 ? 8 : fit > kMaxTileColumns ? kMaxTileColumns
                                             : fit;
}

// An edge takes five measures of its ends, three dot products, twice two coefficients, four indices, three registers of
// partial sums.
template <class T> int64_t tile_scratch_bytes() {
  constexpr int64_t edges = kTileRows * kMaxTileColumns + 64;
  return edges * (12 * sizeof(T) + 4 * sizeof(int32_t)) + 3 * edges * kAlignBytes + 4096;
}

const Kernels<float>* kernels_f32_avx512();
const Kernels<float>* kernels_f32_avx2();
const Kernels<float>* kernels_f32_portable();
const Kernels<double>* kernels_f64_avx512();
const Kernels<double>* kernels_f64_avx2();
const Kernels<double>* kernels_f64_portable();

}  // namespace vrm
