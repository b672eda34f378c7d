// How the kernels are put together and spread over threads.
//
// Phases of a graph: centre and check the vectors, pack them, entropies, threshold, edges, gradient; every thread of a
// team runs them all (team.h). The edges are cut into
// a grid of P x P blocks and visited in P steps, step s taking the blocks (r, (r + s) mod P) at once: no two of them
// share a row or a column of vertices, so every gradient is added to by one thread at a time, in an order that the grid
// alone fixes. Same inputs and thread count, same bits; no per-thread copy of a gradient.

#include "relation_graph.h"

#include "arena.h"
#include "entropy.h"
#include "runtime.h"
#include "select.h"
#include "softmax.h"
#include "stages.h"
#include "team.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>

namespace vrm {
namespace {

// Entropies up to this size are stored, beyond it recomputed wherever they are needed.
constexpr int64_t kStoredEntropyBytes = int64_t{72} << 20;
constexpr int64_t kFoundBytes = int64_t{48} << 20;     // candidates of the threshold's selection
constexpr int64_t kEntropyColumnPanels = 16;           // of a recomputed block
constexpr int64_t kOneThread = int64_t{1} << 17;       // multiply-adds under which all graphs are one thread's work ...
constexpr int64_t kThreadPerGraph = int64_t{1} << 18;  // ... and under which each graph is

// The dense form (see prefers_dense) pays from these sizes and this share of kept edges on, and works in such blocks.
constexpr int64_t kDenseDims = 64, kDenseEdges = int64_t{1} << 14;
constexpr double kDenseShare = 0.6;
constexpr int64_t kDenseRows = 512, kDenseColumns = 2048;
constexpr int64_t kLiteralDims = 4;  // fewer dimensions than this fit one register: the literal path costs no more

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Cuts [0, n) at multiples of `unit` into `parts` of nearly equal size; the first of part k.
int64_t cut(int64_t n, int64_t unit, int64_t parts, int64_t k) {
  return std::min(n, round_up(n, unit) / unit * k / parts * unit);
}

template <class T> class GraphRun {
 public:
  // Takes all the memory that the graph needs, but for the dense form's blocks.
  GraphRun(const GraphInput<T>& input, int64_t threads, Arena& arena)
      : in_(input), threads_(threads), kernels_(kernels<T>()), arena_(arena) {
    g_.rows = in_.rows;
    g_.columns = in_.columns;
    g_.chunks = make_chunks<T>(in_.dims);
    g_.exclude_self = in_.exclude_self;
    g_.need_grad = in_.need_grad;
    g_.literal_only = in_.dims < kLiteralDims;
    make_side(g_.a, in_.rows, in_.student_a, in_.teacher_a);
    make_side(g_.b, in_.columns, in_.student_b, in_.teacher_b);
    const int64_t padded = g_.chunks.lanes_padded;
    center_s_ = arena_.take<T>(padded);
    center_t_ = arena_.take<T>(padded);
    g_.center_s = center_s_;
    g_.center_t = center_t_;
    row_unit_ = EntropyBlocks<T>::row_unit();
    if (!in_.keep_all) make_entropy();
    scratch_bytes_ = round_up(tile_scratch_bytes<T>() + 2 * padded * static_cast<int64_t>(sizeof(T)), 4096);
    scratch_ = arena_.template take<char>(threads_ * scratch_bytes_);
    if (recomputed()) rooms_ = arena_.template take<T>(threads_ * room_size());
  }

  // Runs all phases but the edges. Afterwards failed() says whether an input is not finite.
  void prepare(Team& team) {
    center(team);
    if (failed()) return;
    pack(team);
    if (in_.keep_all) {
      team.once([&] {
        result_.kept = in_.share ? in_.kept : in_.rows * in_.columns - (in_.exclude_self ? in_.rows : 0);
        g_.threshold = std::numeric_limits<T>::infinity();
      });
    } else {
      if (entropy_) make_entropies(team);
      if (in_.share) {
        team.once([&] {
          result_.kept = in_.kept;
          g_.threshold = static_cast<T>(in_.threshold);
          finite_ = g_.threshold == g_.threshold;
        });
      } else {
        select_threshold(team);
      }
    }
    team.once([&] {
      g_.scale = static_cast<double>(g_.student_scale) * in_.weight / (static_cast<double>(result_.kept) + kCountEps);
    });
  }

  bool failed() const { return !finite_; }

  // Matrix products over every edge cost less than visiting the kept ones when most are kept: see docs/cpu.md.
  bool prefers_dense() const {
    if (!can_multiply()) return false;
    if (edges_form() != EdgesForm::measured) return edges_form() == EdgesForm::dense;
    const double edges = in_.share ? in_.edges : static_cast<double>(in_.rows) * static_cast<double>(in_.columns);
    const double share = static_cast<double>(result_.kept) / edges;
    return in_.dims >= kDenseDims && in_.rows * in_.columns >= kDenseEdges && share > kDenseShare;
  }

  void visit_edges(Team& team) {
    const StageTimer timer(Stage::edges, team.leads());
    const Block<T> all{0, in_.rows, 0, in_.columns, stored_, stored_ld_};
    if (!recomputed())
      return visit_grid(team, all, 4, 4,
                        [&](const Block<T>& block, Scratch scratch, T*) { return kernels_.edges(g_, block, scratch); });
    // The entropies are made again, by whole blocks.
    visit_grid(team, all, row_unit_, kernels_.panel_columns, [&](const Block<T>& part, Scratch scratch, T* room) {
      double loss = 0;
      for (int64_t r = part.row_begin; r < part.row_end; r += row_unit_)
        visit_entropy(r, part.column_begin, part.column_end, room,
                      [&](const Block<T>& block) { loss += kernels_.edges(g_, block, scratch); });
      return loss;
    });
  }

  // Blocks of all edges: the dot products and the gradients are matrix products of torch's, threaded by it.
  void visit_dense() {
    const StageTimer timer(Stage::edges);
    const int64_t block_rows = std::min(round_up(in_.rows, row_unit_), kDenseRows / row_unit_ * row_unit_);
    const int64_t width = kernels_.panel_columns, ld = std::min(round_up(in_.columns, width), kDenseColumns);
    T* dots[3];
    for (T*& dot : dots) dot = arena_.template take<T>(block_rows * ld);
    T* room = recomputed() ? arena_.template take<T>(block_rows * ld) : nullptr;
    std::vector<double> losses(block_rows);
    std::vector<int64_t> literals(block_rows);
    for (int64_t r0 = 0; r0 < in_.rows; r0 += block_rows)
      for (int64_t c0 = 0; c0 < in_.columns; c0 += ld) {
        const int64_t r1 = std::min(in_.rows, r0 + block_rows), c1 = std::min(in_.columns, c0 + ld);
        for (int part = 0; part < 3; ++part)
          for (int64_t c = 0; c < g_.chunks.count; ++c) {
            multiply(matrix(dots[part], r1 - r0, c1 - c0, ld), vectors(g_.a, c, r0, r1, part),
                     vectors(g_.b, c, c0, c1, part).transposed(), 1, c > 0);
          }
        Team::run(threads_, [&](Team& team) {
          if (recomputed())
            team.for_each((r1 - r0 + row_unit_ - 1) / row_unit_, [&](int64_t k) {
              entropy_->compute(r0 + k * row_unit_, c0 / width, (c1 + width - 1) / width, room + k * row_unit_ * ld, ld);
            });
          team.for_each(r1 - r0, [&](int64_t r) {
            const T* h = recomputed() ? room + r * ld : stored_ ? stored_ + (r0 + r) * stored_ld_ + c0
                                                                : nullptr;
            literals[r] = 0;
            losses[r] = kernels_.weigh_row(g_, r0 + r, c0, c1, h, dots[0] + r * ld, dots[1] + r * ld, dots[2] + r * ld,
                                           &literals[r]);
          });
        });
        int64_t n_literal = 0;
        for (int64_t r = 0; r < r1 - r0; ++r) result_.loss += losses[r], n_literal += literals[r];
        if (in_.need_grad) {
          const auto beta = matrix(dots[0], r1 - r0, c1 - c0, ld), gamma = matrix(dots[1], r1 - r0, c1 - c0, ld);
          add_products(g_.a, r0, r1, g_.b, c0, c1, beta, gamma);
          add_products(g_.b, c0, c1, g_.a, r0, r1, beta.transposed(), gamma.transposed());
        }
        if (n_literal == 0) continue;
        Graph<T> marked = g_;  // edge by edge, found by the marks that weigh_row left
        marked.threshold = T(0.5);
        Team::run(threads_, [&](Team& team) {
          visit_grid(team, Block<T>{r0, r1, c0, c1, dots[2], ld}, 4, 4, [&](const Block<T>& block, Scratch scratch, T*) {
            return kernels_.edges(marked, block, scratch);
          });
        });
      }
  }

  void add_gradients(Team& team) {
    const StageTimer timer(Stage::gradient, team.leads());
    add_gradient(team, g_.a, in_.grad_a);
    add_gradient(team, g_.b, in_.grad_b);
  }

  GraphResult result() const {
    if (failed()) return {std::numeric_limits<double>::quiet_NaN(), 0};
    return {result_.loss / (static_cast<double>(result_.kept) + kCountEps), result_.kept};
  }

 private:
  void make_side(Side<T>& side, int64_t count, Strided<T> student, Strided<T> teacher) {
    const int64_t size = count * g_.chunks.lanes_padded;
    side.count = count;
    side.student = student;
    side.teacher = teacher;
    side.packed = arena_.take<T>(3 * size);
    side.grad = in_.need_grad ? arena_.take<T>(size) : nullptr;
    for (T** array : {&side.square_s, &side.square_t, &side.square_w, &side.reach_s, &side.reach_t, &side.beta_sum,
                      &side.gamma_sum})
      *array = arena_.take<T>(count + kAlignBytes);  // read in whole registers
  }

  void make_entropy() {
    if (in_.entropy != nullptr) {
      stored_ = in_.entropy;
      stored_ld_ = in_.entropy_stride;
      return;
    }
    entropy_.emplace(in_.probs, in_.log_probs, in_.rows, in_.columns, in_.depth, in_.exclude_self, arena_);
    const int64_t rows = entropy_->padded_rows(), ld = entropy_->padded_columns();
    if (ld * rows * static_cast<int64_t>(sizeof(T)) > kStoredEntropyBytes) return;
    stored_ = made_ = arena_.template take<T>(ld * rows);
    stored_ld_ = ld;
  }

  bool recomputed() const { return !in_.keep_all && stored_ == nullptr; }
  int64_t room_size() const { return row_unit_ * kEntropyColumnPanels * kernels_.panel_columns; }

  // Any vector may be subtracted from all of them: the mean takes out most of what would cancel.
  void center(Team& team) {
    const StageTimer timer(Stage::center, team.leads());
    const int64_t padded = g_.chunks.lanes_padded, unit = kAlignBytes / static_cast<int64_t>(sizeof(T));
    const int64_t parts = std::min(threads_, padded / unit);
    team.once([&] { finite_by_part_.assign(parts, 1); });
    team.for_each(parts, [&](int64_t part) {
      const int64_t begin = cut(in_.dims, unit, parts, part), end = cut(in_.dims, unit, parts, part + 1);
      const T vertices = static_cast<T>(in_.rows + in_.columns);
      bool ok = true;
      for (auto [center, a, b] : {std::tuple(center_s_, in_.student_a, in_.student_b),
                                  std::tuple(center_t_, in_.teacher_a, in_.teacher_b)}) {
        std::fill(center + begin, center + end, T(0));
        ok &= kernels_.sum_vertices(a, in_.rows, begin, end, center);
        ok &= kernels_.sum_vertices(b, in_.columns, begin, end, center);
        for (int64_t k = begin; k < end; ++k) {
          const T mean = center[k] / vertices;
          center[k] = mean - mean == T(0) ? mean : T(0);  // the sum of huge finite logits may overflow
        }
      }
      finite_by_part_[part] = ok;
    });
    team.once([&] {
      finite_ = std::all_of(finite_by_part_.begin(), finite_by_part_.end(), [](char ok) { return ok; });
      scale_student();
    });
  }

  // Scales to the teacher's size, see edge.h: a few vertices of each side tell it well enough.
  void scale_student() {
    const auto size = [&](Strided<T> a, Strided<T> b, const T* center) {
      return kernels_.spread(a, in_.rows, std::max<int64_t>(1, in_.rows / 4), in_.dims, center) +
             kernels_.spread(b, in_.columns, std::max<int64_t>(1, in_.columns / 4), in_.dims, center);
    };
    const double ratio = size(in_.teacher_a, in_.teacher_b, center_t_) / size(in_.student_a, in_.student_b, center_s_);
    const int most = std::numeric_limits<T>::max_exponent / 2;
    const double exponent = std::round(0.5 * std::log2(ratio));
    const bool usable = exponent >= -most && exponent <= most;  // neither NaN nor a vanished student or teacher
    g_.student_scale = static_cast<T>(usable ? std::ldexp(1.0, static_cast<int>(exponent)) : 1.0);
    g_.rule = {static_cast<T>(in_.delta), static_cast<T>(in_.eps * static_cast<double>(g_.student_scale)), static_cast<T>(in_.eps)};
  }

  void pack(Team& team) {
    const StageTimer timer(Stage::pack, team.leads());
    const int64_t parts = 2 * threads_;
    team.for_each(2 * parts, [&](int64_t task) {
      const Side<T>& side = task % 2 == 0 ? g_.a : g_.b;
      const int64_t part = task / 2;
      kernels_.pack_side(g_, side, cut(side.count, 16, parts, part), cut(side.count, 16, parts, part + 1));
    });
  }

  void make_entropies(Team& team) {
    const StageTimer timer(Stage::entropy, team.leads());
    entropy_->pack(team);
    if (made_ != nullptr) entropy_->compute_all(team, made_, stored_ld_);
  }

  // Calls visit(block) on the entropies of the block of rows from `row` on, columns [begin, end).
  template <class Visit>
  void visit_entropy(int64_t row, int64_t begin, int64_t end, T* room, const Visit& visit) const {
    const int64_t row_end = std::min(in_.rows, row + row_unit_), width = kernels_.panel_columns;
    if (stored_ != nullptr) return visit(Block<T>{row, row_end, begin, end, stored_ + row * stored_ld_ + begin, stored_ld_});
    const int64_t step = kEntropyColumnPanels * width;
    for (int64_t c = begin; c < end; c += step) {
      const int64_t stop = std::min(end, c + step);
      entropy_->compute(row, c / width, (stop + width - 1) / width, room, step);
      visit(Block<T>{row, row_end, c, stop, room, step});
    }
  }

  void select_threshold(Team& team) {
    const StageTimer timer(Stage::threshold, team.leads());
    Stream<T> stream;
    stream.n = in_.rows * in_.columns;
    const int64_t blocks = entropy_->row_blocks();
    stream.parts = std::min(threads_, blocks);
    stream.visit_part = [&](int64_t part, const Run<T>& visit) {
      const int64_t begin = blocks * part / stream.parts, end = blocks * (part + 1) / stream.parts;
      for (int64_t b = begin; b < end; ++b)
        visit_entropy(b * row_unit_, 0, in_.columns, rooms_ + part * room_size(), [&](const Block<T>& block) {
          for (int64_t i = block.row_begin; i < block.row_end; ++i)
            visit(block.entropy + (i - block.row_begin) * block.entropy_stride, block.column_end - block.column_begin);
        });
    };
    stream.sample = [&](uint64_t draw) { return sample_entropy(draw); };
    select(team, stream, in_.rank, kFoundBytes / static_cast<int64_t>(sizeof(T)), selection_);
    team.once([&] {
      g_.threshold = lerp(selection_.low, selection_.high, in_.lerp_weight);
      finite_ = g_.threshold == g_.threshold;
    });
    if (failed()) return;
    const int64_t kept = count_at_most(team, stream, selection_, g_.threshold);
    team.once([&] { result_.kept = kept; });
  }

  T sample_entropy(uint64_t draw) const {
    const int64_t i = static_cast<int64_t>(((draw >> 32) * static_cast<uint64_t>(in_.rows)) >> 32);
    const int64_t j = static_cast<int64_t>(((draw & 0xffffffff) * static_cast<uint64_t>(in_.columns)) >> 32);
    if (stored_ != nullptr) return stored_[i * stored_ld_ + j];
    return entropy_->approximate(i, j);
  }

  // Cuts a block into the grid described above, at multiples of the given units, and adds visit() over it to the loss.
  template <class Visit>
  void visit_grid(Team& team, const Block<T>& all, int64_t row_unit, int64_t column_unit, const Visit& visit) {
    const int64_t rows = all.row_end - all.row_begin, columns = all.column_end - all.column_begin;
    const int64_t parts = std::max<int64_t>(1, std::min({threads_, rows / row_unit, columns / column_unit}));
    team.once([&] { losses_.assign(parts * parts, 0.0); });
    for (int64_t step = 0; step < parts; ++step)
      team.for_each(parts, [&](int64_t r) {
        const int64_t c = (r + step) % parts;
        const int64_t r0 = cut(rows, row_unit, parts, r), r1 = cut(rows, row_unit, parts, r + 1);
        const int64_t c0 = cut(columns, column_unit, parts, c), c1 = cut(columns, column_unit, parts, c + 1);
        const T* h = all.entropy == nullptr ? nullptr : all.entropy + r0 * all.entropy_stride + c0;
        const Block<T> part{all.row_begin + r0, all.row_begin + r1, all.column_begin + c0, all.column_begin + c1,
                            h, all.entropy_stride};
        losses_[r * parts + c] = visit(part, Scratch{scratch_ + r * scratch_bytes_}, rooms_ + r * room_size());
      });
    team.once([&] {
      for (double loss : losses_) result_.loss += loss;
    });
  }

  static Matrix<T> matrix(T* data, int64_t rows, int64_t columns, int64_t stride) {
    return {data, rows, columns, stride, 1};
  }

  // One chunk of the vectors of vertices [begin, end): student (0), teacher (1) or residual (2).
  Matrix<T> vectors(const Side<T>& side, int64_t c, int64_t begin, int64_t end, int part) const {
    const int64_t width = g_.chunks.width_of(c);
    return matrix(const_cast<T*>(side.vectors(g_.chunks, c, begin)) + part * width, end - begin, width, 3 * width);
  }

  void add_products(const Side<T>& own, int64_t o0, int64_t o1, const Side<T>& other, int64_t n0, int64_t n1,
                    const Matrix<T>& beta, const Matrix<T>& gamma) {
    ones_.resize(n1 - n0, T(1));
    const Matrix<T> ones = matrix(ones_.data(), n1 - n0, 1, 1);
    multiply(matrix(own.beta_sum + o0, o1 - o0, 1, 1), beta, ones, 1, true);
    multiply(matrix(own.gamma_sum + o0, o1 - o0, 1, 1), gamma, ones, 1, true);
    for (int64_t c = 0; c < g_.chunks.count; ++c) {
      const int64_t width = g_.chunks.width_of(c);
      const Matrix<T> grad = matrix(own.grads(g_.chunks, c, o0), o1 - o0, width, width);
      multiply(grad, beta, vectors(other, c, n0, n1, 2), -1, true);
      multiply(grad, gamma, vectors(other, c, n0, n1, 0), 1, true);
    }
  }

  void add_gradient(Team& team, const Side<T>& side, const GradTarget<T>& target) {
    const int64_t parts = 2 * threads_;
    team.for_each(parts, [&](int64_t part) {
      const int64_t begin = cut(side.count, 16, parts, part), end = cut(side.count, 16, parts, part + 1);
      const int64_t middle = std::clamp(target.cut, begin, end);
      if (begin < middle)
        kernels_.unpack_grad(g_, side, begin, middle, target.first, target.vertex_stride, target.dim_stride, true);
      if (middle < end)
        kernels_.unpack_grad(g_, side, middle, end, target.second - target.cut * target.vertex_stride,
                             target.vertex_stride, target.dim_stride, true);
    });
  }

  const GraphInput<T>& in_;
  const int64_t threads_;
  const Kernels<T>& kernels_;
  Arena& arena_;
  Graph<T> g_{};
  struct {
    double loss;  // not yet divided by the count
    int64_t kept;
  } result_{0, 0};
  bool finite_ = true;
  T *center_s_, *center_t_;
  std::optional<EntropyBlocks<T>> entropy_;  // empty where every edge is kept, or H is given
  int64_t row_unit_;  // rows of a block of entropies, whole panels
  const T* stored_ = nullptr;  // H; null where recomputed
  T* made_ = nullptr;          // the same where it is made here: rows x columns padded to whole panels
  int64_t stored_ld_ = 0;
  char* scratch_;  // of every thread
  int64_t scratch_bytes_;
  T* rooms_ = nullptr;  // of every thread, a block of recomputed entropies
  // Shared by the team's threads.
  std::vector<char> finite_by_part_;
  std::vector<double> losses_;
  Selection<T> selection_;
  std::vector<T> ones_;  // whose product with a matrix sums its rows
};

template <class T> void fill(const GradTarget<T>& target, int64_t vertices, int64_t dims, T value) {
  for (int64_t v = 0; v < vertices; ++v)
    for (int64_t k = 0; k < dims; ++k) {
      T* base = v < target.cut ? target.first : target.second - target.cut * target.vertex_stride;
      base[v * target.vertex_stride + k * target.dim_stride] = value;
    }
}

template <class T> void poison(const GraphInput<T>& input) {
  if (!input.need_grad) return;
  fill(input.grad_a, input.rows, input.dims, std::numeric_limits<T>::quiet_NaN());
  fill(input.grad_b, input.columns, input.dims, std::numeric_limits<T>::quiet_NaN());
}

std::atomic<EdgesForm> chosen_form{EdgesForm::measured};

}  // namespace

EdgesForm edges_form() { return chosen_form.load(std::memory_order_relaxed); }
void set_edges_form(EdgesForm form) { chosen_form.store(form, std::memory_order_relaxed); }

// All phases of one graph but the last, and what that leaves to do outside of a parallel region.
template <class T> void run_phases(Team& team, GraphRun<T>& run, bool need_grad, bool with_gradients) {
  run.prepare(team);
  if (run.failed() || run.prefers_dense()) return;
  run.visit_edges(team);
  if (need_grad && with_gradients) run.add_gradients(team);
}

// `softmax`, if there is one, comes before the graphs, in the first one's parallel region.
template <class T>
std::vector<GraphResult> run_graphs(const std::vector<GraphInput<T>>& inputs, SoftmaxRun<T>* softmax) {
  int64_t most = 0;
  for (const auto& input : inputs) most = std::max(most, input.rows * input.columns * input.dims);
  const int64_t threads = num_threads();
  std::vector<GraphResult> results;
  const auto finish = [&](const GraphInput<T>& input, GraphRun<T>& run, int64_t team_threads, bool gradients_added) {
    const bool dense = !run.failed() && run.prefers_dense();
    if (dense) run.visit_dense();
    if (run.failed()) {
      poison(input);
    } else if (input.need_grad && (dense || !gradients_added)) {
      Team::run(team_threads, [&](Team& team) { run.add_gradients(team); });
    }
    results.push_back(run.result());
  };
  if (most <= kThreadPerGraph) {
    // Small graphs: a thread each, and no barriers. Their gradients have common targets and are added one by one.
    const int64_t n = static_cast<int64_t>(inputs.size());
    std::vector<BorrowedArena> arenas(n);
    std::vector<std::unique_ptr<GraphRun<T>>> runs(n);
    for (int64_t k = 0; k < n; ++k) runs[k] = std::make_unique<GraphRun<T>>(inputs[k], 1, *arenas[k]);
    Team::run(most <= kOneThread ? 1 : std::min(threads, n), [&](Team& team) {
      if (softmax != nullptr) softmax->run(team);
      team.for_each(n, [&](int64_t k) {
        Team::run(1, [&](Team& alone) { run_phases(alone, *runs[k], inputs[k].need_grad, false); });
      });
    });
    for (int64_t k = 0; k < n; ++k) finish(inputs[k], *runs[k], 1, false);
    return results;
  }
  BorrowedArena arena;
  for (const auto& input : inputs) {  // one graph after the other, in the same memory
    (*arena).reset();
    GraphRun<T> run(input, threads, *arena);
    Team::run(threads, [&](Team& team) {
      if (softmax != nullptr && &input == &inputs[0]) softmax->run(team);
      run_phases(team, run, input.need_grad, true);
    });
    finish(input, run, threads, true);
  }
  return results;
}

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
    entropy.pack(team);
    entropy.compute_all(team, h, stride);
  });
}

template <class T>
void count_matrix(const T* x, int64_t rows, int64_t columns, int64_t stride, int64_t prefix, int shift, int bits,
                  int64_t* counts) {
  const int64_t size = int64_t{1} << bits, parts = rows * columns < 16 * size ? 1 : num_threads();
  std::vector<std::vector<int64_t>> partial(parts, std::vector<int64_t>(size, 0));
  Team::run(parts, [&](Team& team) {
    team.for_each(parts, [&](int64_t part) {
      std::vector<int32_t> few(kCountSets * size, 0);
      const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
      const int64_t most = std::max<int64_t>(1, (int64_t{1} << 30) / columns);  // rows that cannot overflow a count
      for (int64_t i = begin; i < end; ++i) {
        count_digits(x + i * stride, columns, prefix, shift, bits, few.data());
        if (i + 1 < end && (i + 1 - begin) % most != 0) continue;
        for (int64_t d = 0; d < kCountSets * size; ++d) partial[part][d % size] += few[d];
        few.assign(few.size(), 0);
      }
    });
  });
  for (const auto& of_part : partial)
    for (int64_t d = 0; d < size; ++d) counts[d] += of_part[d];
}

template <class T> void order_statistics(const T* x, int64_t n, int64_t rank, T* low, T* high) {
  const int64_t threads = num_threads();
  Stream<T> stream;
  stream.n = n;
  stream.parts = std::max<int64_t>(1, std::min<int64_t>(threads, n >> 14));
  stream.visit_part = [&](int64_t part, const Run<T>& visit) {
    const int64_t begin = n * part / stream.parts, end = n * (part + 1) / stream.parts;
    visit(x + begin, end - begin);
  };
  stream.sample = [&](uint64_t draw) { return x[draw % static_cast<uint64_t>(n)]; };
  Selection<T> selection;
  const int64_t room = std::min(n, kFoundBytes / static_cast<int64_t>(sizeof(T)));
  Team::run(stream.parts, [&](Team& team) { select(team, stream, rank, room, selection); });
  *low = selection.low;
  *high = selection.high;
}

template <class T> T lerp(T low, T high, double weight) {
  if (weight == 0) return low;  // beside an infinity a product would make NaN of it
  const T w = static_cast<T>(weight), difference = high - low;
  const T factor = w < T(0.5) ? w : w - T(1), base = w < T(0.5) ? low : high;
  if (lerp_is_fused<T>()) return std::fma(factor, difference, base);
  const volatile T product = factor * difference;  // rounded, whatever the compiler may contract
  return base + product;
}

template LossResult run_loss(const SoftmaxInput<float>&, const std::vector<GraphInput<float>>&);
template LossResult run_loss(const SoftmaxInput<double>&, const std::vector<GraphInput<double>>&);
template std::vector<GraphResult> run_graphs(const std::vector<GraphInput<float>>&);
template std::vector<GraphResult> run_graphs(const std::vector<GraphInput<double>>&);
template void joint_entropy(Strided<float>, Strided<float>, int64_t, int64_t, int64_t, float*, int64_t);
template void joint_entropy(Strided<double>, Strided<double>, int64_t, int64_t, int64_t, double*, int64_t);
template void count_matrix(const float*, int64_t, int64_t, int64_t, int64_t, int, int, int64_t*);
template void count_matrix(const double*, int64_t, int64_t, int64_t, int64_t, int, int, int64_t*);
template void order_statistics(const float*, int64_t, int64_t, float*, float*);
template void order_statistics(const double*, int64_t, int64_t, double*, double*);
template float lerp(float, float, double);
template double lerp(double, double, double);

}  // namespace vrm
