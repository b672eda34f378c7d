// Launches: which kernels run, in what order, on what part of the graphs.

#include "relation_graphs.h"

#include "../launch.h"
#include "steps.cuh"
#include "workspace.h"

namespace vrm {
namespace cuda {
namespace steps {
namespace {

// The one kernel pays up to here: multiply-adds of all products of a kind, edges, and what one block adds up for a tile
// of them. Estimated, see docs/cuda.md.
constexpr int64_t kSmallWork = int64_t{1} << 27, kSmallEdges = int64_t{1} << 20, kSmallDepth = 4096;
constexpr int64_t kBlocksOfMultiprocessor = 8;

template <class T, Step step> void launch_step(const Problem<T>& p, int which, cudaStream_t stream) {
  const int64_t most = kBlocksOfMultiprocessor * attribute(cudaDevAttrMultiProcessorCount);
  const int64_t tasks = step_tasks(step, p);
  launch(step_kernel<T, step>, {std::min(tasks, most), kSharedBytes<T>}, stream, p, which);
}

template <class T> bool is_small(const Problem<T>& p) {
  int64_t work = 0;
  for (int k = 0; k < p.graphs; ++k) {
    const Graph<T>& g = p.graph[k];
    const int64_t depth = std::max(g.dims, g.keep_all ? 1 : g.depth);
    if (g.rows * g.columns > kSmallEdges || depth > kSmallDepth) return false;
    work += g.rows * g.columns * depth;
  }
  return work <= kSmallWork;
}

template <class T> bool whole_graphs(const Problem<T>& p, const Tuning& tuning) {
  if (p.graph[0].given) return false;
  return tuning.form == Form::automatic ? is_small(p) : tuning.form != Form::tiles;
}

template <class T> void run_one_launch(const Problem<T>& p, cudaStream_t stream) {
  int64_t blocks = 1;
  for (Step step : {Step::prepare, Step::means, Step::pack, Step::entropy, Step::histogram, Step::weigh, Step::gradient,
                    Step::finish})
    blocks = std::max(blocks, step_tasks(step, p));
  int resident = 0;  // all blocks must run at once
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, one_launch_kernel<T>, kThreads,
                                                      static_cast<size_t>(kSharedBytes<T>)),
        "tell how many blocks fit");
  const int64_t most = static_cast<int64_t>(resident) * attribute(cudaDevAttrMultiProcessorCount);
  launch(one_launch_kernel<T>, {std::min(blocks, most), kSharedBytes<T>, kThreads, true}, stream, p);
}

template <class T> void run_launches(const Problem<T>& p, cudaStream_t stream) {
  launch_step<T, Step::prepare>(p, 0, stream);
  launch_step<T, Step::means>(p, 0, stream);
  launch_step<T, Step::pack>(p, 0, stream);
  if (!p.graph[0].keep_all) launch_step<T, Step::entropy>(p, 0, stream);
  for (int pass = 0; pass < kPasses<T> && !p.graph[0].keep_all; ++pass) {
    launch_step<T, Step::histogram>(p, pass, stream);
    launch_step<T, Step::advance>(p, pass, stream);
  }
  launch_step<T, Step::weigh>(p, 0, stream);
  launch_step<T, Step::gradient>(p, 0, stream);
  for (int k = 0; k < p.graphs; ++k) launch_step<T, Step::finish>(p, k, stream);
  launch_step<T, Step::losses>(p, 0, stream);
}

// ---- large graphs --------------------------------------------------------------------------------------------------

// One graph, by tiles of edges whose products a library takes.
template <class T> class TiledGraph {
 public:
  TiledGraph(const Problem<T>& problem, int which, const Tuning& tuning, const Multiply<T>& multiply,
             cudaStream_t stream)
      : p_(problem), g_(p_.graph[0]), edge_(tile_edge<T>(tuning)), multiply_(multiply), stream_(stream) {
    p_.graphs = 1;
    p_.graph[0] = problem.graph[which];
    if (which > 0) p_.softmax.rows = 0;  // the first graph's launch has done it
    Carver carver(problem.memory);
    carve_graph(carver, p_.graph[0], base_, tuning, false);
    stored_ = stores_entropies(g_, tuning);
  }

  void run() {
    launch_step<T, Step::prepare>(p_, 0, stream_);
    launch_step<T, Step::means>(p_, 0, stream_);
    launch_step<T, Step::pack>(p_, 0, stream_);
    if (!g_.keep_all && !g_.given) {
      for (int pass = 0; pass < kPasses<T>; ++pass) {
        count(pass);
        launch_step<T, Step::advance>(p_, pass, stream_);
      }
    }
    edges();
    launch_step<T, Step::finish>(p_, 0, stream_);
  }

 private:
  // One pass of the selection over all edges.
  void count(int pass) {
    for_each_tile([&](const EdgeTile<T>& tile) {
      if (!stored_ || pass == 0) multiply_entropy(tile);
      launch_step<T, Step::histogram>(p_, pass, stream_);
    });
  }

  void edges() {
    if (g_.need_grad) {
      clear(g_.a.grad, g_.a.count * g_.ld, stream_);
      clear(g_.b.grad, g_.b.count * g_.ld, stream_);
    }
    for_each_tile([&](const EdgeTile<T>& tile) {
      if (!g_.keep_all && !stored_) multiply_entropy(tile);
      multiply_vectors(tile, tile.beta, g_.a.x_s, g_.b.x_s);
      multiply_vectors(tile, tile.gamma, g_.a.x_t, g_.b.x_t);
      multiply_vectors(tile, tile.u, g_.a.x_w, g_.b.x_w);
      launch_step<T, Step::weigh>(p_, 0, stream_);
      if (g_.need_grad) multiply_coefficients(tile);
      launch_step<T, Step::gradient>(p_, 0, stream_);
    });
  }

  // Tiles lie on one side of the border between two stacked views, because a product cannot cross it.
  template <class Visit> void for_each_tile(const Visit& visit) {
    const auto cut = [](const Graph<T>& g, const Side<T>& side) {
      return g.keep_all || g.given ? side.count : side.factor.cut;
    };
    const int64_t row_cut = cut(g_, g_.a), column_cut = cut(g_, g_.b);
    EdgeTile<T>& tile = p_.tile[0];
    for (int64_t row = 0, row_end; row < g_.rows; row = row_end) {
      row_end = std::min({g_.rows, row + edge_, row < row_cut ? row_cut : g_.rows});
      for (int64_t column = 0, column_end; column < g_.columns; column = column_end) {
        column_end = std::min({g_.columns, column + edge_, column < column_cut ? column_cut : g_.columns});
        tile = base_;
        tile.row = row, tile.rows = row_end - row;
        tile.column = column, tile.columns = column_end - column;
        if (stored_) tile.entropy = base_.entropy + row * base_.entropy_ld + column;
        visit(tile);
      }
    }
  }

  static Matrix<const T> from(const Stacked<const T>& x, int64_t vertex) {
    const bool second = vertex >= x.cut;
    const Matrix<const T>& m = second ? x.second : x.first;
    return {m.data + (second ? vertex - x.cut : vertex) * m.vertex_stride, m.vertex_stride, m.dim_stride};
  }

  void multiply_entropy(const EdgeTile<T>& tile) {
    multiply_({{tile.entropy, tile.entropy_ld, 1},
               from(g_.a.factor, tile.row),
               from(g_.b.factor, tile.column),
               tile.rows,
               tile.columns,
               g_.depth,
               -1.0,
               false});
  }
  void multiply_vectors(const EdgeTile<T>& tile, T* out, const T* a, const T* b) {
    multiply_({{out, tile.ld, 1},
               {a + tile.row * g_.ld, g_.ld, 1},
               {b + tile.column * g_.ld, g_.ld, 1},
               tile.rows,
               tile.columns,
               g_.dims,
               1.0,
               false});
  }
  // grad += gamma x_s - beta x_w, on both sides; the last columns of the vectors make it sum the coefficients too.
  void multiply_coefficients(const EdgeTile<T>& tile) {
    const auto add = [&](const T* coefficients, bool by_column, const T* x, T* grad, double alpha) {
      const Matrix<const T> a = {coefficients, by_column ? 1 : tile.ld, by_column ? tile.ld : 1};
      const int64_t own = by_column ? tile.column : tile.row, other = by_column ? tile.row : tile.column;
      multiply_({{grad + own * g_.ld, g_.ld, 1},
                 a,
                 {x + other * g_.ld, 1, g_.ld},
                 by_column ? tile.columns : tile.rows,
                 g_.ld,
                 by_column ? tile.rows : tile.columns,
                 alpha,
                 true});
    };
    add(tile.gamma, false, g_.b.x_s, g_.a.grad, 1);
    add(tile.beta, false, g_.b.x_w, g_.a.grad, -1);
    add(tile.gamma, true, g_.a.x_s, g_.b.grad, 1);
    add(tile.beta, true, g_.a.x_w, g_.b.grad, -1);
  }

  Problem<T> p_;
  const Graph<T>& g_;
  const int64_t edge_;
  const Multiply<T>& multiply_;
  cudaStream_t stream_;
  EdgeTile<T> base_;
  bool stored_;
};

}  // namespace

template <class T> int64_t plan(Problem<T>& problem, const Tuning& tuning, char* memory) {
  static_assert(sizeof(Problem<T>) <= 4096, "the parameters of a kernel");
  Problem<T> counted = problem;
  Problem<T>& p = memory == nullptr ? counted : problem;
  const bool whole = whole_graphs(p, tuning);
  Carver carver(memory);
  Status<T>* status = carver.take<Status<T>>(p.graphs);
  carve_softmax(carver, p);
  for (int k = 0; k < p.graphs; ++k) {
    Graph<T>& g = p.graph[k];
    g.status = status + k;
    if (!g.given) g.threshold = &g.status->threshold, g.kept = &g.status->kept;
    if (whole) carve_graph(carver, g, p.tile[k], tuning, true);
  }
  p.memory = memory == nullptr ? nullptr : memory + carver.used();
  int64_t most = 0;
  for (int k = 0; k < p.graphs && !whole; ++k) {
    Carver tiles(nullptr);
    Graph<T> g = p.graph[k];
    carve_graph(tiles, g, p.tile[k], tuning, false);
    most = std::max(most, tiles.used());
  }
  return carver.used() + most;
}

template <class T>
void run(const Problem<T>& p, const Tuning& tuning, const Multiply<T>& multiply, cudaStream_t stream) {
  clear(p.graph[0].status, p.graphs, stream);
  if (whole_graphs(p, tuning)) {
    const bool one = tuning.form != Form::launches && attribute(cudaDevAttrCooperativeLaunch) != 0;
    return one ? run_one_launch(p, stream) : run_launches(p, stream);
  }
  for (int k = 0; k < p.graphs; ++k) TiledGraph<T>(p, k, tuning, multiply, stream).run();
  launch_step<T, Step::losses>(p, 0, stream);
}

template <class T> void count_entropies(Status<T>* status, int pass, const T* entropy, int64_t rows, int64_t columns,
                                        int64_t ld, cudaStream_t stream) {
  Problem<T> p{};
  p.graphs = 1;
  p.graph[0].status = status;
  p.graph[0].self = kNoSelf;
  p.tile[0].rows = rows, p.tile[0].columns = columns;
  p.tile[0].entropy = const_cast<T*>(entropy), p.tile[0].entropy_ld = ld;
  launch_step<T, Step::histogram>(p, pass, stream);
}

#define VRM_INSTANTIATE(T)                                                               \
  template int64_t plan(Problem<T>&, const Tuning&, char*);                              \
  template void run(const Problem<T>&, const Tuning&, const Multiply<T>&, cudaStream_t); \
  template void count_entropies(Status<T>*, int, const T*, int64_t, int64_t, int64_t, cudaStream_t);
VRM_INSTANTIATE(float)
VRM_INSTANTIATE(double)

}  // namespace steps
}  // namespace cuda
}  // namespace vrm
