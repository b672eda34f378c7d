// Stage 1: the inputs in the dtype and the order that the other stages read, softmax and surprisals, cross-entropies.
#pragma once

#include "inputs.cuh"

namespace vrm {
namespace cuda {

// What a row's cross-entropy compares with: weighted, smoothed; 0 where its label is ignored.
template <class T> struct Target {
  const Batch<T>& b;
  int64_t row, label;

  __device__ Target(const Batch<T>& b, int64_t row) : b(b), row(row), label(b.labels == nullptr ? 0 : b.labels[row]) {}
  __device__ bool ignored() const { return b.labels != nullptr && label == b.ignore_index; }
  __device__ bool exists() const { return ignored() || (label >= 0 && label < b.classes); }
  __device__ T weight() const {  // in the divisor of the mean
    if (ignored() || !exists()) return T(0);
    return b.labels != nullptr && b.class_weight != nullptr ? b.class_weight[label] : T(1);
  }
  __device__ T operator()(int64_t c) const {
    if (ignored()) return T(0);
    const T given = b.labels == nullptr ? b.target.at(row, c) : static_cast<T>(c == label);
    const T smooth = given * (T(1) - b.label_smoothing) + b.label_smoothing / static_cast<T>(b.classes);
    return b.class_weight == nullptr ? smooth : smooth * b.class_weight[c];
  }
};

// A row of a view, by a warp.
template <class T> __device__ __forceinline__ void prepare_sample(const Batch<T>& b, int view, int64_t row) {
  const int64_t all = view * b.samples + row, first = all * b.classes;
  const Vector<T> student{b.student[view], row}, teacher{b.teacher[view], row};
  T peak = student[0], poison = 0;
  for (int64_t c = lane_index(); c < b.classes; c += 32) {
    const T s = student[c], t = teacher[c];
    if (b.student_rows != nullptr) b.student_rows[first + c] = s, b.teacher_rows[first + c] = t;
    poison += poison_of(s) + poison_of(t);
    peak = s > peak ? s : peak;
  }
  peak = warp_max(peak);
  T sum = 0;
  for (int64_t c = lane_index(); c < b.classes; c += 32) sum += exp(student[c] - peak);
  sum = warp_sum(sum);
  const Target<T> target(b, row);
  if (b.cross_entropy[view] && !target.exists()) poison = kNotANumber<T>;
  const T log_sum = log(sum);
  T loss = 0, targets = 0;
  for (int64_t c = lane_index(); c < b.classes; c += 32) {
    if (b.probs != nullptr) {
      const T p = exp(student[c] - peak) / sum;
      b.probs[first + c] = p;
      b.surprisals[first + c] = -log(p + static_cast<T>(kEntropyEps));
    }
    if (!b.cross_entropy[view]) continue;
    const T wanted = target(c);
    targets += wanted;
    if (wanted != T(0)) loss -= wanted * (student[c] - peak - log_sum);
  }
  loss = warp_sum(loss);
  targets = warp_sum(targets);
  poison = warp_sum(poison);
  if (lane_index() != 0) return;
  b.peaks[all] = peak, b.sums[all] = sum, b.poison[all] = poison;
  b.ce_losses[all] = static_cast<double>(loss), b.ce_targets[all] = targets;
  b.ce_weights[all] = b.cross_entropy[view] ? target.weight() : T(0);
}

// The softmax of what prepare has summed up.
template <class T>
__device__ __forceinline__ T probability(const Batch<T>& b, int view, int64_t row, int64_t c) {
  const int64_t all = view * b.samples + row;
  return exp(element<T>(b.student[view], row, c) - b.peaks[all]) / b.sums[all];
}

// The same by classes: rows first ... first + kWarps of a view, which this block has written.
template <class T>
__device__ __forceinline__ void transpose(const Batch<T>& b, int view, int64_t first, const T* by_row, T* by_column) {
  if (by_column == nullptr) return;
  for (int64_t e = thread_index(); e < b.classes * kWarps; e += kThreads) {
    const int64_t c = e / kWarps, row = first + e % kWarps;
    if (row < b.samples)
      by_column[(view * b.classes + c) * b.samples + row] = by_row[(view * b.samples + row) * b.classes + c];
  }
}

// A vertex of one side, by a warp.
template <class T> __device__ __forceinline__ void prepare_vertex(const Vectors<T>& x, int side, int64_t v) {
  T poison = 0, largest = 0;
  for (int64_t k = lane_index(); k < x.dims; k += 32) {
    const T s = element<T>(x.student[side], v, k), t = element<T>(x.teacher[side], v, k);
    if (x.students[side] != nullptr) x.students[side][v * x.dims + k] = s, x.teachers[side][v * x.dims + k] = t;
    poison += poison_of(s) + poison_of(t);
  }
  for (int64_t k = lane_index(); k < x.depth; k += 32) {
    const T p = element<T>(x.probs[side], v, k);
    if (x.factors[side] != nullptr)
      x.factors[side][v * x.depth + k] = side == 0 ? p : -log(p + static_cast<T>(kEntropyEps));
    poison += p - p;
    largest = fabs(p) > largest ? fabs(p) : largest;
  }
  poison = warp_sum(poison);
  largest = warp_max(largest);
  if (lane_index() == 0) x.poison[side][v] = poison, x.largest[side][v] = largest;
}

// A block for the state of the graphs, then one for kWarps rows.
template <class T> int64_t prepare_blocks(const Problem<T>& p) {
  if (p.batch.samples > 0) return 1 + 2 * ceil_div(p.batch.samples, kWarps);
  return 1 + ceil_div(p.vectors.count[0], kWarps) + ceil_div(p.vectors.count[1], kWarps);
}

template <class T> __global__ void __launch_bounds__(kThreads, 2) prepare_kernel(const __grid_constant__ Problem<T> p) {
  if (blockIdx.x == 0) {
    for (int k = 0; k < p.graphs; ++k) {
      Status<T>& status = *p.graph[k].status;
      if (thread_index() == 0) status.kept = 0, status.uncertified = 0;
    }
    return;
  }
  const int64_t task = blockIdx.x - 1;
  const Batch<T>& b = p.batch;
  if (b.samples == 0) {
    const int64_t firsts = ceil_div(p.vectors.count[0], kWarps);
    const int side = task >= firsts;
    const int64_t v = (side == 0 ? task : task - firsts) * kWarps + warp_index();
    if (v < p.vectors.count[side]) prepare_vertex(p.vectors, side, v);
    return;
  }
  const int view = static_cast<int>(task & 1);
  const int64_t first = (task >> 1) * kWarps;
  if (first + warp_index() < b.samples) prepare_sample(b, view, first + warp_index());
  __syncthreads();
  transpose(b, view, first, b.student_rows, b.student_columns);
  transpose(b, view, first, b.teacher_rows, b.teacher_columns);
  transpose(b, view, first, b.probs, b.probs_columns);
  transpose(b, view, first, b.surprisals, b.surprisals_columns);
}

}  // namespace cuda
}  // namespace vrm
