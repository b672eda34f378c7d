// Working memory and launches: a kernel a stage.

#include "forms.h"

#include "entropy.cuh"
#include "finish.cuh"
#include "prepare.cuh"
#include "tiles.h"

#include <initializer_list>

namespace vrm {
namespace cuda {
namespace {

Input transposed(const Input& x) { return {x.data, x.dtype, x.column_stride, x.row_stride}; }

// The graphs of a batch are views of the arrays that prepare writes.
template <class T> void plan_batch(Carver& carver, Problem<T>& p, const Settings& settings) {
  Batch<T>& b = p.batch;
  const int64_t size = 2 * b.samples * b.classes;
  const bool pruned = !p.graph[0].keep_all;
  const auto take = [&](std::initializer_list<T**> arrays, int64_t count) {
    for (T** array : arrays) *array = carver.take<T>(count);
  };
  if (!settings.dense) take({&b.student_rows, &b.teacher_rows, &b.student_columns, &b.teacher_columns}, size);
  if (pruned && settings.half_level == kNoHalf)
    take({&b.probs, &b.surprisals, &b.probs_columns, &b.surprisals_columns}, size);
  b.ce_losses = carver.take<double>(2 * b.samples);
  take({&b.peaks, &b.sums, &b.ce_weights, &b.ce_targets, &b.poison}, 2 * b.samples);
  for (int k = 0; k < 2; ++k) {
    Graph<T>& g = p.graph[k];
    const int64_t count = k == 0 ? b.samples : b.classes;
    g.vertices = 2 * count, g.split = count;
    g.rows = g.columns = b.complete ? 2 * count : count;
    g.first_b = b.complete ? 0 : count;
    g.dims = g.depth = k == 0 ? b.classes : b.samples;
    g.student = k == 0 ? b.student_rows : b.student_columns;
    g.teacher = k == 0 ? b.teacher_rows : b.teacher_columns;
    g.probs = {k == 0 ? b.probs : b.probs_columns, false};
    // Of the second view where it is side b.
    if (b.probs != nullptr) g.surprisals = {(k == 0 ? b.surprisals : b.surprisals_columns) + g.first_b * g.depth, false};
    for (int view = 0; view < 2; ++view) {
      g.student_views[view] = k == 0 ? b.student[view] : transposed(b.student[view]);
      g.teacher_views[view] = k == 0 ? b.teacher[view] : transposed(b.teacher[view]);
      Output<T>& o = p.output[view];
      o.rows = b.samples, o.columns = b.classes;
      (k == 0 ? o.by_row : o.by_column) = view * count;
    }
  }
}

template <class T> void plan_vectors(Carver& carver, Problem<T>& p, const Settings& settings) {
  Vectors<T>& x = p.vectors;
  Graph<T>& g = p.graph[0];
  g.rows = x.count[0], g.columns = x.count[1], g.dims = x.dims, g.depth = x.depth;
  g.vertices = g.rows + g.columns, g.first_b = g.split = g.rows;
  T* student = settings.dense ? nullptr : carver.take<T>(g.vertices * g.dims);
  T* teacher = settings.dense ? nullptr : carver.take<T>(g.vertices * g.dims);
  for (int side = 0; side < 2; ++side) {
    const int64_t first = side == 0 ? 0 : g.first_b;
    g.student_views[side] = x.student[side], g.teacher_views[side] = x.teacher[side];
    if (!settings.dense) x.students[side] = student + first * g.dims, x.teachers[side] = teacher + first * g.dims;
    if (g.ranked() && settings.half_level == kNoHalf) x.factors[side] = carver.take<T>(x.count[side] * x.depth);
    x.poison[side] = carver.take<T>(x.count[side]);
    x.largest[side] = carver.take<T>(x.count[side]);
    p.output[side].rows = x.count[side], p.output[side].columns = x.dims, p.output[side].by_row = first;
  }
  g.student = student, g.teacher = teacher;
  g.probs = {x.factors[0], false}, g.surprisals = {x.factors[1], false};
}

template <class T> void plan_graph(Carver& carver, Graph<T>& g, const Settings& settings) {
  g.status = carver.take<Status<T>>(1);
  g.losses = carver.take<double>(g.rows);
  if (g.levels > 0) g.brackets = carver.take<Bracket>(g.levels);
  g.dense = settings.dense;
  if (g.dense)
    plan_dense(carver, g, settings);
  else if (g.ranked()) {
    g.entropy = carver.take<T>(g.rows * g.columns);
    g.entropy_depth = g.depth;
    plan_brackets(carver, g, true);
  }
  g.grad_ld = g.dense ? g.packed.ld : g.dims;
  if (g.need_grad) g.grad = carver.take<T>(g.vertices * g.grad_ld);
}

template <class T> int64_t both_graphs(const Problem<T>& p, int64_t (*count)(const Graph<T>&)) {
  return count(p.graph[0]) + (p.graphs > 1 ? count(p.graph[1]) : 0);
}

}  // namespace

const char* refusal() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, finish_kernel<float>);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // answered here: the next launch's check must not find it
  return cudaGetErrorString(error);
}

template <class T> int64_t plan(Problem<T>& problem, const Settings& settings, char* memory) {
  static_assert(sizeof(Problem<T>) + sizeof(Tile<T>) <= 4000, "the parameters of a kernel");
  Problem<T> counted = problem;
  Problem<T>& p = memory == nullptr ? counted : problem;
  Carver carver(memory);
  p.totals = carver.take<Totals>(1);
  p.batch.samples > 0 ? plan_batch(carver, p, settings) : plan_vectors(carver, p, settings);
  for (int k = 0; k < p.graphs; ++k) plan_graph(carver, p.graph[k], settings);
  if (!settings.dense) return carver.used();
  p.memory = memory == nullptr ? nullptr : memory + carver.used();
  int64_t most = 0;
  for (int k = 0; k < p.graphs; ++k) most = std::max(most, TiledGraph<T>::bytes(p.graph[k], settings));
  return carver.used() + most;
}

template <class T>
void run(const Problem<T>& p, const Settings& settings, const Multiply<T>& multiply, cudaStream_t stream) {
  const bool ranked = !p.graph[0].keep_all && !settings.dense;  // by the literal form
  launch(prepare_kernel<T>, {prepare_blocks(p)}, stream, p);
  if (ranked) launch(entropy_kernel<T>, {both_graphs(p, entropy_blocks<T>), kEntropyBytes<T>}, stream, p);
  for (int k = 0; k < p.graphs; ++k) {
    if (settings.dense) TiledGraph<T>(p, k, settings, multiply, stream).run();
    const Graph<T>& g = p.graph[k];
    if (ranked) run_brackets(p, k, stream, [&](const auto& count) { count(whole_tile(g.entropy, g.rows, g.columns)); });
  }
  if (!settings.dense || p.graph[0].keep_all)
    launch(exact_kernel<T>, {1 + (ranked ? p.graphs : 0), sizeof(SelectState), kRankThreads}, stream, p, 0);
  if (!settings.dense) launch(literal_kernel<T>, {both_graphs(p, literal_blocks<T>), kLiteralBytes<T>}, stream, p);
  launch(finish_kernel<T>, {finish_blocks(p), kFinishBytes<T>}, stream, p);
}

template <class T> void count_digits(const T* x, int64_t rows, int64_t columns, int64_t ld, const int64_t* prefixes,
                                     int round, int64_t* digits, cudaStream_t stream) {
  clear(digits, 2 * kBins, stream);
  const int64_t most = 4 * int64_t{attribute(cudaDevAttrMultiProcessorCount)};
  launch(digits_kernel<T>, {2 * std::min(rows, most), kBins * int64_t{sizeof(unsigned)}}, stream, x, rows, columns, ld,
         prefixes, round, reinterpret_cast<unsigned long long*>(digits));
}

#define VRM_INSTANTIATE(T)                                                                                      \
  template int64_t plan(Problem<T>&, const Settings&, char*);                                                   \
  template void count_digits(const T*, int64_t, int64_t, int64_t, const int64_t*, int, int64_t*, cudaStream_t); \
  template void run(const Problem<T>&, const Settings&, const Multiply<T>&, cudaStream_t);
VRM_INSTANTIATE(float)
VRM_INSTANTIATE(double)

}  // namespace cuda
}  // namespace vrm
