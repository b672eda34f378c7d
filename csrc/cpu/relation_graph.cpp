// How the stages of the graphs, and the softmaxes before them, are spread over threads.

#include "relation_graph.h"

#include "arena.h"
#include "entropy.h"
#include "graph_run.h"
#include "runtime.h"
#include "softmax.h"
#include "stages.h"
#include "team.h"

#include <memory>

namespace vrm {
namespace {

constexpr int64_t kOneThread = int64_t{1} << 17;       // multiply-adds under which all graphs are one thread's work ...
constexpr int64_t kThreadPerGraph = int64_t{1} << 21;  // ... and under which each graph is

template <class Body> void stage(Team& team, Stage stage, int64_t tasks, const Body& body) {
  const StageTimer timer(stage, team.leads());
  if (tasks > 0) team.for_each(tasks, body);
}

// All stages of a graph but the dense form and the last. Every thread of a team calls it.
template <class T> void run_stages(Team& team, GraphRun<T>& run) {
  stage(team, Stage::center, run.center_tasks(), [&](int64_t part) { run.center(part); });
  stage(team, Stage::center, 1, [&](int64_t) { run.scale(); });
  if (run.failed()) return;
  stage(team, Stage::pack, run.pack_tasks(), [&](int64_t task) { run.pack(task); });
  stage(team, Stage::entropy, run.entropy_pack_tasks(), [&](int64_t task) { run.pack_entropy(task); });
  stage(team, Stage::entropy, run.entropy_tasks(), [&](int64_t panel) { run.make_entropy(panel); });
  {
    const StageTimer timer(Stage::threshold, team.leads());
    run.find_threshold(team);
  }
  if (run.failed() || run.dense()) return;
  for (int64_t step = 0; step < run.edge_steps(); ++step)
    stage(team, Stage::edges, run.edge_steps(), [&](int64_t row) { run.visit_edges(step, row); });
}

template <class T> void add_gradients(Team& team, GraphRun<T>& run, int view) {
  stage(team, Stage::gradient, run.gradient_tasks(), [&](int64_t part) { run.add_gradients(view, part); });
}

// What is left to do of a graph, outside of a parallel region.
template <class T> GraphResult finish(GraphRun<T>& run, int64_t threads) {
  if (run.failed()) {
    run.poison();
  } else if (run.dense()) {
    {
      const StageTimer timer(Stage::edges);
      run.visit_dense();
    }
    Team::run(threads, [&](Team& team) {
      for (int view = 0; view < 2; ++view) add_gradients(team, run, view);
    });
  }
  return run.result();
}

template <class T> bool has_gradients(const GraphRun<T>& run) { return !run.failed() && !run.dense(); }

// Small graphs, two at most: a thread each. No barriers, and no vector that one thread has written and another reads, which on some
// machines takes longer than the arithmetic.
template <class T>
std::vector<GraphResult> run_small(const std::vector<GraphInput<T>>& inputs, SoftmaxRun<T>* softmax, int64_t threads) {
  const int64_t n = static_cast<int64_t>(inputs.size());
  std::vector<BorrowedArena> arenas(n);
  std::vector<std::unique_ptr<GraphRun<T>>> runs(n);
  for (int64_t k = 0; k < n; ++k) runs[k] = std::make_unique<GraphRun<T>>(inputs[k], 1, *arenas[k]);
  Team::run(std::min(threads, n), [&](Team& team) {
    if (softmax != nullptr) softmax->run(team);
    team.for_each(n, [&](int64_t k) { Team::run(1, [&](Team& alone) { run_stages(alone, *runs[k]); }); });
    // To different views at a time, by the threads that have the graphs at hand.
    for (int turn = 0; turn < 2; ++turn)
      team.for_each(n, [&](int64_t k) {
        const int view = static_cast<int>((k + turn) % 2);
        if (has_gradients(*runs[k])) Team::run(1, [&](Team& alone) { add_gradients(alone, *runs[k], view); });
      });
  });
  std::vector<GraphResult> results;
  for (auto& run : runs) results.push_back(finish(*run, 1));
  return results;
}

// Others: all threads on one graph after the other, in the same memory.
template <class T>
std::vector<GraphResult> run_large(const std::vector<GraphInput<T>>& inputs, SoftmaxRun<T>* softmax, int64_t threads) {
  BorrowedArena arena;
  std::vector<GraphResult> results;
  for (const auto& input : inputs) {
    (*arena).reset();
    GraphRun<T> run(input, threads, *arena);
    Team::run(threads, [&](Team& team) {
      if (softmax != nullptr && results.empty()) softmax->run(team);
      run_stages(team, run);
      for (int view = 0; view < 2 && has_gradients(run); ++view) add_gradients(team, run, view);
    });
    results.push_back(finish(run, threads));
  }
  return results;
}

// `softmax`, if there is one, comes before the graphs, in the first one's parallel region.
template <class T>
std::vector<GraphResult> run_graphs(const std::vector<GraphInput<T>>& inputs, SoftmaxRun<T>* softmax) {
  int64_t most = 0;
  for (const auto& input : inputs) most = std::max(most, input.rows * input.columns * input.dims);
  const int64_t threads = most <= kOneThread ? 1 : num_threads();
  return most <= kThreadPerGraph ? run_small<T>(inputs, softmax, threads) : run_large<T>(inputs, softmax, threads);
}

}  // namespace

template <class T> std::vector<GraphResult> run_graphs(const std::vector<GraphInput<T>>& graphs) {
  return run_graphs<T>(graphs, nullptr);
}

template <class T> LossResult run_loss(const SoftmaxInput<T>& input, const std::vector<GraphInput<T>>& graphs) {
  SoftmaxRun<T> softmax(input);
  std::vector<GraphResult> results;
  if (graphs.empty()) {
    Team::run(input.samples * input.classes <= kOneThread ? 1 : num_threads(), [&](Team& team) { softmax.run(team); });
  } else {
    results = run_graphs<T>(graphs, &softmax);
  }
  return {{softmax.cross_entropy(0), softmax.cross_entropy(1)}, std::move(results)};
}

template <class T>
void joint_entropy(Strided<T> probs, Strided<T> log_probs, int64_t rows, int64_t columns, int64_t depth, T* h,
                   int64_t stride) {
  BorrowedArena arena;
  EntropyBlocks<T> entropy(probs, log_probs, rows, columns, depth, false, *arena);
  Team::run(num_threads(), [&](Team& team) {
    team.for_each(entropy.pack_tasks(), [&](int64_t task) { entropy.pack(task); });
    team.for_each(entropy.row_panels(), [&](int64_t panel) { entropy.compute_rows(panel, h, stride); });
  });
}

template LossResult run_loss(const SoftmaxInput<float>&, const std::vector<GraphInput<float>>&);
template LossResult run_loss(const SoftmaxInput<double>&, const std::vector<GraphInput<double>>&);
template std::vector<GraphResult> run_graphs(const std::vector<GraphInput<float>>&);
template std::vector<GraphResult> run_graphs(const std::vector<GraphInput<double>>&);
template void joint_entropy(Strided<float>, Strided<float>, int64_t, int64_t, int64_t, float*, int64_t);
template void joint_entropy(Strided<double>, Strided<double>, int64_t, int64_t, int64_t, double*, int64_t);

}  // namespace vrm
