// How the kernels are put together and spread over threads.
//
// Phases of a graph: centre and check the vectors, pack them, entropies, threshold, edges, gradient. The edges are cut into
// a grid of P x P blocks and visited in P steps, step s taking the blocks (r, (r + s) mod P) at once: no two of them share
// a row or a column of vertices, so every gradient is added to by one thread at a time, in an order that the grid alone
// fixes. Same inputs and thread count, same bits; no per-thread copy of a gradient.

#include "relation_graph.h"

#include "arena.h"
#include "select.h"
#include "stages.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <memory>

namespace vrm {
namespace {

// Entropies up to this size are stored, beyond it recomputed wherever they are needed.
constexpr int64_t kStoredEntropyBytes = int64_t{72} << 20;
constexpr int64_t kFoundBytes = int64_t{48} << 20;     // candidates of the threshold's selection
constexpr int64_t kEntropyColumnPanels = 16;           // of a recomputed block
constexpr int64_t kSmallGraph = int64_t{1} << 21;      // multiply-adds under which a graph is one thread's work

// The dense form (see prefers_dense) pays from these sizes and this share of kept edges on, and works in such blocks.
constexpr int64_t kDenseDims = 64, kDenseEdges = int64_t{1} << 14;
constexpr double kDenseShare = 0.6;
constexpr int64_t kDenseRows = 512, kDenseColumns = 2048;
constexpr int64_t kLiteralDims = 4;  // fewer dimensions than this fit one register: the literal path costs no more

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class Body> void for_each(int64_t n, const Body& body) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) body(k);
  });
}

// Cuts [0, n) at multiples of `unit` into `parts` of nearly equal size; the first of part k.
int64_t cut(int64_t n, int64_t unit, int64_t parts, int64_t k) {
  return std::min(n, round_up(n, unit) / unit * k / parts * unit);
}

template <class T> class GraphRun {
 public:
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
  }

  // False if an input is not finite: then the loss is NaN and so is every gradient.
  bool run() {
    result_ = {std::numeric_limits<double>::quiet_NaN(), 0};
    if (!center()) return false;
    pack();
    if (in_.keep_all) {
      result_.kept = in_.rows * in_.columns - (in_.exclude_self ? in_.rows : 0);
      g_.threshold = std::numeric_limits<T>::infinity();
    } else {
      pack_entropy();
      if (!select_threshold()) return false;
    }
    g_.scale = static_cast<double>(g_.student_scale) * in_.weight / (static_cast<double>(result_.kept) + kCountEps);
    const double loss = prefers_dense() ? visit_dense() : visit_edges();
    result_.loss = loss / (static_cast<double>(result_.kept) + kCountEps);
    return true;
  }

  void add_gradients() {
    const StageTimer timer(Stage::gradient);
    add_gradient(g_.a, in_.grad_a);
    add_gradient(g_.b, in_.grad_b);
  }

  const GraphResult& result() const { return result_; }

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

  // Any vector may be subtracted from all: the mean takes out most of what would cancel.
  bool center() {
    const StageTimer timer(Stage::center);
    const int64_t padded = g_.chunks.lanes_padded, unit = kAlignBytes / static_cast<int64_t>(sizeof(T));
    T* centers = arena_.take<T>(2 * padded);
    std::fill(centers, centers + 2 * padded, T(0));
    const int64_t parts = std::min(threads_, padded / unit);
    std::vector<char> finite(parts, 1);
    for_each(parts, [&](int64_t part) {
      const int64_t begin = cut(in_.dims, unit, parts, part), end = cut(in_.dims, unit, parts, part + 1);
      bool ok = kernels_.sum_vertices(in_.student_a, in_.rows, begin, end, centers);
      ok &= kernels_.sum_vertices(in_.teacher_a, in_.rows, begin, end, centers + padded);
      ok &= kernels_.sum_vertices(in_.student_b, in_.columns, begin, end, centers);
      ok &= kernels_.sum_vertices(in_.teacher_b, in_.columns, begin, end, centers + padded);
      const T vertices = static_cast<T>(in_.rows + in_.columns);
      for (int64_t k = begin; k < end; ++k) {
        centers[k] = finite_or_zero(centers[k] / vertices);
        centers[padded + k] = finite_or_zero(centers[padded + k] / vertices);
      }
      finite[part] = ok;
    });
    g_.center_s = centers;
    g_.center_t = centers + padded;
    scale_student();
    return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; });
  }

  // To the teacher's size, see edge.h: a few dozen vertices of each side tell it well enough.
  void scale_student() {
    const auto size = [&](Strided<T> a, Strided<T> b, const T* center) {
      return kernels_.spread(a, in_.rows, std::max<int64_t>(1, in_.rows / 16), in_.dims, center) +
             kernels_.spread(b, in_.columns, std::max<int64_t>(1, in_.columns / 16), in_.dims, center);
    };
    const double ratio = size(in_.teacher_a, in_.teacher_b, g_.center_t) / size(in_.student_a, in_.student_b, g_.center_s);
    const int most = std::numeric_limits<T>::max_exponent / 2;
    const double exponent = std::round(0.5 * std::log2(ratio));
    const bool usable = exponent >= -most && exponent <= most;  // neither NaN nor a vanished student or teacher
    g_.student_scale = static_cast<T>(usable ? std::ldexp(1.0, static_cast<int>(exponent)) : 1.0);
    g_.rule = {static_cast<T>(in_.delta), static_cast<T>(kRelationEps * static_cast<double>(g_.student_scale)),
               static_cast<T>(kRelationEps)};
  }

  static T finite_or_zero(T x) { return x - x == T(0) ? x : T(0); }  // the sum of huge finite logits may overflow

  void pack() {
    const StageTimer timer(Stage::pack);
    const int64_t parts = threads_;
    for_each(2 * parts, [&](int64_t task) {
      const Side<T>& side = task < parts ? g_.a : g_.b;
      const int64_t part = task % parts;
      kernels_.pack_side(g_, side, cut(side.count, 16, parts, part), cut(side.count, 16, parts, part + 1));
    });
  }

  void pack_entropy() {
    const StageTimer timer(Stage::entropy);
    row_panels_ = (in_.rows + kernels_.panel_rows - 1) / kernels_.panel_rows;
    column_panels_ = (in_.columns + kernels_.panel_columns - 1) / kernels_.panel_columns;
    T* probs = arena_.take<T>(row_panels_ * kernels_.panel_rows * in_.depth);
    T* logs = arena_.take<T>(column_panels_ * kernels_.panel_columns * in_.depth);
    for_each(row_panels_ + column_panels_, [&](int64_t task) {
      if (task < row_panels_) {
        kernels_.pack_panel(in_.probs, in_.rows, in_.depth, task, kernels_.panel_rows,
                            probs + task * kernels_.panel_rows * in_.depth);
      } else {
        task -= row_panels_;
        kernels_.pack_panel(in_.log_probs, in_.columns, in_.depth, task, kernels_.panel_columns,
                            logs + task * kernels_.panel_columns * in_.depth);
      }
    });
    g_.entropy = {in_.depth, probs, logs};
    row_block_panels_ = std::max<int64_t>(1, kTileRows / kernels_.panel_rows);
    row_blocks_ = (row_panels_ + row_block_panels_ - 1) / row_block_panels_;
    const int64_t ld = column_panels_ * kernels_.panel_columns, rows = row_panels_ * kernels_.panel_rows;
    if (ld * rows * static_cast<int64_t>(sizeof(T)) > kStoredEntropyBytes) return;
    stored_ = arena_.take<T>(ld * rows);
    stored_ld_ = ld;
    for_each(row_blocks_, [&](int64_t block) {
      compute_entropy(block, 0, column_panels_, stored_ + block * row_block_panels_ * kernels_.panel_rows * ld, ld);
    });
  }

  // H of one block of rows by panels [q0, q1) of columns. A vertex's edge with itself is made infinite: never kept.
  void compute_entropy(int64_t row_block, int64_t q0, int64_t q1, T* h, int64_t ld) const {
    const int64_t p0 = row_block * row_block_panels_, p1 = std::min(row_panels_, p0 + row_block_panels_);
    kernels_.entropy_rows(g_.entropy, p0, p1, q0, q1, h, ld);
    if (!in_.exclude_self) return;
    const int64_t c0 = q0 * kernels_.panel_columns, c1 = q1 * kernels_.panel_columns;
    for (int64_t i = p0 * kernels_.panel_rows; i < p1 * kernels_.panel_rows; ++i)
      if (i >= c0 && i < c1) h[(i - p0 * kernels_.panel_rows) * ld + i - c0] = std::numeric_limits<T>::infinity();
  }

  int64_t block_begin(int64_t row_block) const {
    return std::min(in_.rows, row_block * row_block_panels_ * kernels_.panel_rows);
  }

  int64_t row_block_of(int64_t row) const { return row / (row_block_panels_ * kernels_.panel_rows); }

  int64_t recomputed_block_size() const {
    return row_block_panels_ * kernels_.panel_rows * kEntropyColumnPanels * kernels_.panel_columns;
  }

  // Calls visit(block) on the row block's entropies of columns [begin, end), whole panels unless the last.
  template <class Visit>
  void visit_entropy(int64_t row_block, int64_t begin, int64_t end, T* room, const Visit& visit) const {
    const int64_t r0 = block_begin(row_block), r1 = block_begin(row_block + 1);
    if (stored_ != nullptr) {
      visit(Block<T>{r0, r1, begin, end, stored_ + r0 * stored_ld_ + begin, stored_ld_});
      return;
    }
    const int64_t step = kEntropyColumnPanels * kernels_.panel_columns;
    for (int64_t c = begin; c < end; c += step) {
      const int64_t stop = std::min(end, c + step), q0 = c / kernels_.panel_columns;
      compute_entropy(row_block, q0, (stop + kernels_.panel_columns - 1) / kernels_.panel_columns, room, step);
      visit(Block<T>{r0, r1, c, stop, room, step});
    }
  }

  // False if an entropy is NaN.
  bool select_threshold() {
    const StageTimer timer(Stage::threshold);
    Stream<T> stream;
    stream.n = in_.rows * in_.columns;
    stream.parts = std::min(threads_, row_blocks_);
    stream.for_each = [](int64_t n, const std::function<void(int64_t)>& body) { for_each(n, body); };
    stream.visit_part = [&](int64_t part, const Run<T>& visit) {
      std::vector<T> room(stored_ == nullptr ? recomputed_block_size() : 0);
      for (int64_t b = row_blocks_ * part / stream.parts; b < row_blocks_ * (part + 1) / stream.parts; ++b)
        visit_entropy(b, 0, in_.columns, room.data(), [&](const Block<T>& block) {
          for (int64_t i = block.row_begin; i < block.row_end; ++i)
            visit(block.entropy + (i - block.row_begin) * block.entropy_stride, block.column_end - block.column_begin);
        });
    };
    stream.sample = [&](int64_t m) { return sample_entropies(m); };
    const auto statistics = select(stream, in_.rank, kFoundBytes / static_cast<int64_t>(sizeof(T)));
    g_.threshold = lerp(statistics.low, statistics.high, in_.lerp_weight);
    if (!(g_.threshold == g_.threshold)) return false;
    result_.kept = count_at_most(stream, statistics, g_.threshold);
    return true;
  }

  std::vector<T> sample_entropies(int64_t m) const {
    std::vector<T> sample(m);
    const uint64_t n = static_cast<uint64_t>(in_.rows) * static_cast<uint64_t>(in_.columns);
    if (stored_ != nullptr) {
      for (int64_t s = 0; s < m; ++s) {
        const uint64_t draw = mix(s);
        const uint64_t i = ((draw >> 32) * static_cast<uint64_t>(in_.rows)) >> 32;
        const uint64_t j = ((draw & 0xffffffff) * static_cast<uint64_t>(in_.columns)) >> 32;
        sample[s] = stored_[static_cast<int64_t>(i) * stored_ld_ + static_cast<int64_t>(j)];
      }
      return sample;
    }
    for_each(threads_, [&](int64_t part) {
      for (int64_t s = m * part / threads_; s < m * (part + 1) / threads_; ++s) {
        const int64_t at = static_cast<int64_t>(mix(s) % n), i = at / in_.columns, j = at % in_.columns;
        const int64_t height = kernels_.panel_rows, width = kernels_.panel_columns;
        const T* p = g_.entropy.probs_panels + i / height * height * in_.depth + i % height;
        const T* l = g_.entropy.log_panels + j / width * width * in_.depth + j % width;
        T sum = 0;
        for (int64_t k = 0; k < in_.depth; ++k) sum -= p[k * height] * l[k * width];
        sample[s] = in_.exclude_self && i == j ? std::numeric_limits<T>::infinity() : sum;
      }
    });
    return sample;
  }

  // Matrix products over every edge cost less than visiting the kept ones when most are kept: see docs/cpu.md.
  bool prefers_dense() const {
    if (edges_form() != EdgesForm::measured) return edges_form() == EdgesForm::dense;
    const double edges = static_cast<double>(in_.rows) * static_cast<double>(in_.columns);
    const double share = static_cast<double>(result_.kept) / edges;
    return in_.dims >= kDenseDims && in_.rows * in_.columns >= kDenseEdges && share > kDenseShare;
  }

  double visit_edges() {
    const StageTimer timer(Stage::edges);
    if (stored_ != nullptr || in_.keep_all)
      return visit_grid(Block<T>{0, in_.rows, 0, in_.columns, stored_, stored_ld_}, 4, 4,
                        [&](const Block<T>& block, Scratch scratch, T*) { return kernels_.edges(g_, block, scratch); });
    // The entropies are made again, by whole blocks.
    return visit_grid(Block<T>{0, in_.rows, 0, in_.columns, nullptr, 0}, row_block_panels_ * kernels_.panel_rows,
                      kernels_.panel_columns, [&](const Block<T>& part, Scratch scratch, T* room) {
                        double loss = 0;
                        for (int64_t b = row_block_of(part.row_begin); block_begin(b) < part.row_end; ++b)
                          visit_entropy(b, part.column_begin, part.column_end, room, [&](const Block<T>& block) {
                            loss += kernels_.edges(g_, block, scratch);
                          });
                        return loss;
                      });
  }

  // Cuts a block into the grid described above, at multiples of the given units, and sums visit() over it.
  template <class Visit>
  double visit_grid(const Block<T>& all, int64_t row_unit, int64_t column_unit, const Visit& visit) {
    const int64_t rows = all.row_end - all.row_begin, columns = all.column_end - all.column_begin;
    const int64_t parts = std::max<int64_t>(1, std::min({threads_, rows / row_unit, columns / column_unit}));
    if (scratch_ == nullptr) {
      scratch_bytes_ = round_up(
          tile_scratch_bytes<T>() + 2 * g_.chunks.lanes_padded * static_cast<int64_t>(sizeof(T)), 4096);
      scratch_ = arena_.template take<char>(threads_ * scratch_bytes_);
      if (!in_.keep_all && stored_ == nullptr) rooms_ = arena_.template take<T>(threads_ * recomputed_block_size());
    }
    std::vector<double> losses(parts * parts, 0.0);
    for (int64_t step = 0; step < parts; ++step)
      for_each(parts, [&](int64_t r) {
        const int64_t c = (r + step) % parts;
        const int64_t r0 = cut(rows, row_unit, parts, r), r1 = cut(rows, row_unit, parts, r + 1);
        const int64_t c0 = cut(columns, column_unit, parts, c), c1 = cut(columns, column_unit, parts, c + 1);
        const T* h = all.entropy == nullptr ? nullptr : all.entropy + r0 * all.entropy_stride + c0;
        const Block<T> part{all.row_begin + r0, all.row_begin + r1, all.column_begin + c0, all.column_begin + c1,
                            h, all.entropy_stride};
        T* room = rooms_ == nullptr ? nullptr : rooms_ + r * recomputed_block_size();
        losses[r * parts + c] = visit(part, Scratch{scratch_ + r * scratch_bytes_}, room);
      });
    double total = 0;
    for (double loss : losses) total += loss;
    return total;
  }

  // Blocks of all edges: the dot products and the gradients are matrix products of torch's, threaded by it.
  double visit_dense() {
    const StageTimer timer(Stage::edges);
    const bool recomputed = !in_.keep_all && stored_ == nullptr;
    const int64_t row_unit = in_.keep_all ? 64 : row_block_panels_ * kernels_.panel_rows;
    const int64_t block_rows = std::min(round_up(in_.rows, row_unit), kDenseRows / row_unit * row_unit);
    const int64_t ld = std::min(round_up(in_.columns, kernels_.panel_columns), kDenseColumns);
    T* dots[3];
    for (T*& dot : dots) dot = arena_.template take<T>(block_rows * ld);
    T* entropy = recomputed ? arena_.template take<T>(block_rows * ld) : nullptr;
    std::vector<double> losses(block_rows);
    std::vector<int64_t> literals(block_rows);
    double total = 0;
    for (int64_t r0 = 0; r0 < in_.rows; r0 += block_rows)
      for (int64_t c0 = 0; c0 < in_.columns; c0 += ld) {
        const int64_t r1 = std::min(in_.rows, r0 + block_rows), c1 = std::min(in_.columns, c0 + ld);
        for (int part = 0; part < 3; ++part)
          for (int64_t c = 0; c < g_.chunks.count; ++c) {
            at::Tensor out = matrix(dots[part], r1 - r0, c1 - c0, ld);
            at::addmm_out(out, out, vectors(g_.a, c, r0, r1, part), vectors(g_.b, c, c0, c1, part).t(), c == 0 ? 0 : 1);
          }
        if (recomputed)
          for_each((r1 - r0 + row_unit - 1) / row_unit, [&](int64_t k) {
            compute_entropy(row_block_of(r0) + k, c0 / kernels_.panel_columns,
                            (c1 + kernels_.panel_columns - 1) / kernels_.panel_columns, entropy + k * row_unit * ld, ld);
          });
        for_each(r1 - r0, [&](int64_t r) {
          const T* h = recomputed ? entropy + r * ld : stored_ ? stored_ + (r0 + r) * stored_ld_ + c0 : nullptr;
          literals[r] = 0;
          losses[r] = kernels_.weigh_row(g_, r0 + r, c0, c1, h, dots[0] + r * ld, dots[1] + r * ld, dots[2] + r * ld,
                                         &literals[r]);
        });
        int64_t n_literal = 0;
        for (int64_t r = 0; r < r1 - r0; ++r) total += losses[r], n_literal += literals[r];
        if (in_.need_grad) {
          const auto beta = matrix(dots[0], r1 - r0, c1 - c0, ld), gamma = matrix(dots[1], r1 - r0, c1 - c0, ld);
          add_dense_gradients(g_.a, r0, r1, g_.b, c0, c1, beta, gamma);
          add_dense_gradients(g_.b, c0, c1, g_.a, r0, r1, beta.t(), gamma.t());
        }
        if (n_literal > 0) {  // edge by edge, found by the marks that weigh_row left
          Graph<T> marked = g_;
          marked.threshold = T(0.5);
          total += visit_grid(Block<T>{r0, r1, c0, c1, dots[2], ld}, 4, 4,
                              [&](const Block<T>& block, Scratch scratch, T*) {
                                return kernels_.edges(marked, block, scratch);
                              });
        }
      }
    return total;
  }

  static at::Tensor matrix(T* data, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(data, {rows, columns}, {stride, 1},
                         at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
  }

  // One chunk of the vectors of vertices [begin, end): student (0), teacher (1) or residual (2).
  at::Tensor vectors(const Side<T>& side, int64_t c, int64_t begin, int64_t end, int part) const {
    const int64_t width = g_.chunks.width_of(c);
    return matrix(const_cast<T*>(side.vectors(g_.chunks, c, begin)) + part * width, end - begin, width, 3 * width);
  }

  void add_dense_gradients(const Side<T>& own, int64_t o0, int64_t o1, const Side<T>& other, int64_t n0, int64_t n1,
                           const at::Tensor& beta, const at::Tensor& gamma) const {
    matrix(own.beta_sum + o0, 1, o1 - o0, 1).add_(beta.sum(1));
    matrix(own.gamma_sum + o0, 1, o1 - o0, 1).add_(gamma.sum(1));
    for (int64_t c = 0; c < g_.chunks.count; ++c) {
      const int64_t width = g_.chunks.width_of(c);
      at::Tensor grad = matrix(own.grads(g_.chunks, c, o0), o1 - o0, width, width);
      at::addmm_out(grad, grad, beta, vectors(other, c, n0, n1, 2), 1, -1);
      at::addmm_out(grad, grad, gamma, vectors(other, c, n0, n1, 0), 1, 1);
    }
  }

  void add_gradient(const Side<T>& side, const GradTarget<T>& target) {
    const int64_t parts = 4 * threads_;
    for_each(parts, [&](int64_t part) {
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
  GraphResult result_{};
  char* scratch_ = nullptr;  // of every thread
  int64_t scratch_bytes_ = 0;
  T* rooms_ = nullptr;   // of every thread, a block of recomputed entropies
  T* stored_ = nullptr;  // H, rows x columns padded to whole panels; null where recomputed
  int64_t stored_ld_ = 0, row_panels_ = 0, column_panels_ = 0, row_block_panels_ = 0, row_blocks_ = 0;
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

template <class T> std::vector<GraphResult> run_graphs(const std::vector<GraphInput<T>>& inputs) {
  int64_t most = 0;
  for (const auto& input : inputs) most = std::max(most, input.rows * input.columns * input.dims);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const bool small = most <= kSmallGraph;
  const int64_t n = static_cast<int64_t>(inputs.size());
  std::vector<GraphResult> results;
  const auto finish = [&](int64_t k, GraphRun<T>& run, bool finite) {
    if (!finite) {
      poison(inputs[k]);
    } else if (inputs[k].need_grad) {
      run.add_gradients();
    }
    results.push_back(run.result());
  };
  if (small && n > 1) {  // a thread a graph; then the gradients, which share their targets
    std::vector<std::unique_ptr<GraphRun<T>>> runs(n);
    std::vector<BorrowedArena> arenas(n);
    std::vector<char> finite(n, 1);
    for_each(n, [&](int64_t k) {
      runs[k] = std::make_unique<GraphRun<T>>(inputs[k], 1, *arenas[k]);
      finite[k] = runs[k]->run();
    });
    for (int64_t k = 0; k < n; ++k) finish(k, *runs[k], finite[k]);
    return results;
  }
  BorrowedArena arena;  // one graph after the other, in the same memory
  for (int64_t k = 0; k < n; ++k) {
    (*arena).reset();
    GraphRun<T> run(inputs[k], threads, *arena);
    const bool finite = run.run();
    finish(k, run, finite);
  }
  return results;
}

template <class T> void order_statistics(const T* x, int64_t n, int64_t rank, T* low, T* high) {
  Stream<T> stream;
  stream.n = n;
  stream.parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), n >> 14));
  stream.for_each = [](int64_t parts, const std::function<void(int64_t)>& body) { for_each(parts, body); };
  stream.visit_part = [&](int64_t part, const Run<T>& visit) {
    const int64_t begin = n * part / stream.parts, end = n * (part + 1) / stream.parts;
    visit(x + begin, end - begin);
  };
  stream.sample = [&](int64_t m) {
    std::vector<T> sample(m);
    for (int64_t s = 0; s < m; ++s) sample[s] = x[mix(s) % static_cast<uint64_t>(n)];
    return sample;
  };
  const auto statistics = select(stream, rank, std::min(n, kFoundBytes / static_cast<int64_t>(sizeof(T))));
  *low = statistics.low;
  *high = statistics.high;
}

template <class T> T lerp(T low, T high, double weight) {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const at::Tensor ends = at::tensor({low, high}, options);
  return at::lerp(ends[0], ends[1], at::scalar_tensor(weight, options)).template item<T>();
}

template std::vector<GraphResult> run_graphs(const std::vector<GraphInput<float>>&);
template std::vector<GraphResult> run_graphs(const std::vector<GraphInput<double>>&);
template void order_statistics(const float*, int64_t, int64_t, float*, float*);
template void order_statistics(const double*, int64_t, int64_t, double*, double*);
template float lerp(float, float, double);
template double lerp(double, double, double);

}  // namespace vrm
