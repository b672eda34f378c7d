// The steps of the loss as kernels, and all of them in one: blocks take the tasks of a step in turn.
#pragma once

#include "gradient.cuh"
#include "prepare.cuh"
#include "select.cuh"

#include <cooperative_groups.h>

namespace vrm {
namespace cuda {
namespace steps {

enum class Step { prepare,
                  means,
                  pack,
                  entropy,
                  histogram,
                  advance,
                  weigh,
                  gradient,
                  finish,
                  losses };

template <class T> constexpr int64_t max_shared_bytes() {
  int64_t most = (kWarps + 6) * sizeof(int64_t);  // of Advance
  for (int64_t bytes :
       {Weigh<T>::kSharedBytes, Histogram<T>::kSharedBytes, static_cast<int64_t>(2 * sizeof(Square<T>))})
    if (bytes > most) most = bytes;
  return most;
}
template <class T> constexpr int64_t kSharedBytes = max_shared_bytes<T>();  // of the step that needs most
static_assert(kSharedBytes<double> <= 48 << 10, "more would have to be asked for");

// Calls run(task) for this block's share of `count` tasks. `taken` counts on over the kinds of tasks of a step, so that
// those of the second graph go to blocks that the first left free.
template <class Run> __device__ __forceinline__ void share_tasks(int64_t count, int64_t& taken, const Run& run) {
  const int64_t blocks = gridDim.x;
  for (int64_t task = (blockIdx.x + blocks - taken % blocks) % blocks; task < count; task += blocks) {
    run(task);
    __syncthreads();  // before the next task uses the shared memory
  }
  taken += count;
}

// `which` is the pass of the selection, or the graph to finish.
template <class T, Step step> __device__ __forceinline__ void run_step(const Problem<T>& p, int which, char* shared) {
  int64_t taken = 0;
  if constexpr (step == Step::prepare)
    share_tasks(SoftmaxStage<T>::tasks(p.softmax), taken, [&](int64_t t) { SoftmaxStage<T>::run(p.softmax, t); });
  if constexpr (step == Step::losses)
    if (blockIdx.x == 0 && threadIdx.x == 0) finish_losses(p);
  for (int k = 0; k < p.graphs && step != Step::losses; ++k) {
    const Graph<T>& g = p.graph[k];
    const EdgeTile<T>& tile = p.tile[k];
    if constexpr (step == Step::prepare) {
      share_tasks(ColumnSums<T>::tasks(g), taken, [&](int64_t t) { ColumnSums<T>::run(g, t, shared); });
      share_tasks(1, taken, [&](int64_t) {
        if (threadIdx.x == 0) begin_selection(g);
      });
    }
    if constexpr (step == Step::means)
      share_tasks(Means<T>::tasks(g), taken, [&](int64_t t) { Means<T>::run(g, t, shared); });
    if constexpr (step == Step::pack)
      share_tasks(Pack<T>::tasks(g), taken, [&](int64_t t) { Pack<T>::run(g, t, shared); });
    if constexpr (step == Step::weigh)
      share_tasks(Weigh<T>::tasks(tile), taken, [&](int64_t t) { Weigh<T>::run(g, tile, t, shared); });
    if constexpr (step == Step::gradient) {
      share_tasks(1, taken, [&](int64_t) { AddLosses<T>::run(g, tile, shared); });
      if (tile.dots_given) {
        if (g.need_grad)
          share_tasks(LiteralGradient<T>::tasks(g, tile), taken,
                      [&](int64_t t) { LiteralGradient<T>::run(g, tile, t); });
      } else {
        share_tasks(Gradient<T>::tasks(g), taken, [&](int64_t t) { Gradient<T>::run(g, tile, t, shared); });
      }
    }
    // The second graph is added to what the first wrote.
    if constexpr (step == Step::finish)
      if (k == which)
        share_tasks(Finish<T>::tasks(g), taken, [&](int64_t t) { Finish<T>::run(g, t, g.add_out, shared); });
    if (g.keep_all) continue;
    if constexpr (step == Step::entropy)
      share_tasks(Entropy<T>::tasks(tile), taken, [&](int64_t t) { Entropy<T>::run(g, tile, t, shared); });
    if constexpr (step == Step::histogram)
      share_tasks(Histogram<T>::tasks(tile), taken, [&](int64_t t) { Histogram<T>::run(g, tile, t, which, shared); });
    if constexpr (step == Step::advance) share_tasks(1, taken, [&](int64_t) { Advance<T>::run(g, which, shared); });
  }
}

template <class T, Step step> __global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    step_kernel(const __grid_constant__ Problem<T> p, int which) {
  run_step<T, step>(p, which, shared_memory());
}

// Every step, a barrier of the whole grid between two that depend on each other. Launched cooperatively.
template <class T> __global__ void __launch_bounds__(kThreads, 1)
    one_launch_kernel(const __grid_constant__ Problem<T> p) {
  char* shared = shared_memory();
  const auto grid = cooperative_groups::this_grid();
  run_step<T, Step::prepare>(p, 0, shared);
  grid.sync();
  run_step<T, Step::means>(p, 0, shared);
  run_step<T, Step::entropy>(p, 0, shared);
  grid.sync();
  run_step<T, Step::pack>(p, 0, shared);
  if (p.graph[0].keep_all) grid.sync();
  for (int pass = 0; pass < kPasses<T> && !p.graph[0].keep_all; ++pass) {
    run_step<T, Step::histogram>(p, pass, shared);
    grid.sync();
    run_step<T, Step::advance>(p, pass, shared);
    grid.sync();
  }
  run_step<T, Step::weigh>(p, 0, shared);
  grid.sync();
  run_step<T, Step::gradient>(p, 0, shared);
  grid.sync();
  for (int k = 0; k < p.graphs; ++k) {
    if (k > 0) grid.sync();
    run_step<T, Step::finish>(p, k, shared);
  }
  run_step<T, Step::losses>(p, 0, shared);
}

// How many tasks a step has at most, that is how many blocks can be of use.
template <class T> int64_t step_tasks(Step step, const Problem<T>& p) {
  int64_t count = step == Step::prepare ? SoftmaxStage<T>::tasks(p.softmax) : 0;
  for (int k = 0; k < p.graphs; ++k) {
    const Graph<T>& g = p.graph[k];
    const EdgeTile<T>& tile = p.tile[k];
    switch (step) {
      case Step::prepare: count += ColumnSums<T>::tasks(g) + 1; break;
      case Step::means: count += Means<T>::tasks(g); break;
      case Step::pack: count += Pack<T>::tasks(g); break;
      case Step::entropy: count += Entropy<T>::tasks(tile); break;
      case Step::histogram: count += Histogram<T>::tasks(tile); break;
      case Step::weigh: count += Weigh<T>::tasks(tile); break;
      case Step::gradient:
        count += 1 + (tile.dots_given ? LiteralGradient<T>::tasks(g, tile) : Gradient<T>::tasks(g));
        break;
      case Step::finish: count += Finish<T>::tasks(g); break;
      case Step::advance:
      case Step::losses: count += 1; break;
    }
  }
  return count;
}

}  // namespace steps
}  // namespace cuda
}  // namespace vrm
