// For the tests: the bytes of working memory that a call with gradients and both cross-entropies would take.

#include "../../../../csrc/cuda/forms.h"

extern "C" int64_t cuda_shim_workspace(int64_t samples, int64_t classes, int dense, int64_t half_level,
                                       int64_t tile_edge, int64_t stored_entropy_bytes, const int64_t* brackets,
                                       int levels) {
  vrm::cuda::Problem<float> problem{};
  problem.graphs = 2;
  problem.batch.samples = samples, problem.batch.classes = classes;
  for (auto& graph : problem.graph) graph.need_grad = true;
  auto& large = problem.graph[0];
  for (; large.levels < levels; ++large.levels, brackets += 3)
    large.level[large.levels].sample = brackets[0], large.level[large.levels].room = brackets[2];
  for (bool& wanted : problem.batch.cross_entropy) wanted = true;
  return vrm::cuda::plan(problem, {dense != 0, half_level, tile_edge, stored_entropy_bytes}, nullptr);
}
