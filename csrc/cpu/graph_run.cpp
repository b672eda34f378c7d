#include "graph_run.h"

#include <cmath>
#include <tuple>

namespace vrm {
namespace {

// Entropies up to this size are stored, beyond it recomputed wherever they are needed.
constexpr int64_t kStoredEntropyBytes = int64_t{72} << 20;
constexpr int64_t kLiteralDims = 4;  // fewer dimensions than this fit one register: the literal path costs no more

template <class T> void fill(const GradTarget<T>& target, int64_t vertices, int64_t dims, T value) {
  for (int64_t v = 0; v < vertices; ++v)
    for (int64_t k = 0; k < dims; ++k) {
      T* base = v < target.cut ? target.views[0] : target.views[1] - target.cut * target.vertex_stride;
      base[v * target.vertex_stride + k * target.dim_stride] = value;
    }
}

}  // namespace

template <class T>
GraphRun<T>::GraphRun(const GraphInput<T>& input, int64_t threads, Arena& arena)
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
  g_.center_s = center_s_ = arena_.take<T>(padded);
  g_.center_t = center_t_ = arena_.take<T>(padded);
  finite_by_part_.assign(std::min(threads_, padded * static_cast<int64_t>(sizeof(T)) / kAlignBytes), 1);
  row_unit_ = EntropyBlocks<T>::row_unit();
  if (!in_.keep_all) take_entropy();
  // Entropies that are made again are made by whole panels.
  const Block<T> all{0, in_.rows, 0, in_.columns, stored_, stored_ld_};
  grid_.emplace(all, recomputed() ? row_unit_ : 4, recomputed() ? kernels_.panel_columns : 4, threads_);
  losses_.assign(grid_->parts * grid_->parts, 0.0);
  scratch_bytes_ = round_up(tile_scratch_bytes<T>() + 2 * padded * static_cast<int64_t>(sizeof(T)), 4096);
  scratch_ = arena_.template take<char>(threads_ * scratch_bytes_);
  if (recomputed()) rooms_ = arena_.template take<T>(threads_ * room_size());
}

template <class T>
void GraphRun<T>::make_side(Side<T>& side, int64_t count, Strided<T> student, Strided<T> teacher) {
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

template <class T> void GraphRun<T>::take_entropy() {
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

// Any vector may be subtracted from all of them: the mean takes out most of what would cancel.
template <class T> void GraphRun<T>::center(int64_t part) {
  const int64_t unit = kAlignBytes / static_cast<int64_t>(sizeof(T)), parts = center_tasks();
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
}

// Scales to the teacher's size, see edge.h: a few vertices of each side tell it well enough.
template <class T> void GraphRun<T>::scale() {
  finite_ = std::all_of(finite_by_part_.begin(), finite_by_part_.end(), [](char ok) { return ok; });
  const auto size = [&](Strided<T> a, Strided<T> b, const T* center) {
    return kernels_.spread(a, in_.rows, std::max<int64_t>(1, in_.rows / 4), in_.dims, center) +
           kernels_.spread(b, in_.columns, std::max<int64_t>(1, in_.columns / 4), in_.dims, center);
  };
  const double ratio = size(in_.teacher_a, in_.teacher_b, center_t_) / size(in_.student_a, in_.student_b, center_s_);
  const int most = std::numeric_limits<T>::max_exponent / 2;
  const double exponent = std::round(0.5 * std::log2(ratio));
  const bool usable = exponent >= -most && exponent <= most;  // neither NaN nor a vanished student or teacher
  g_.student_scale = static_cast<T>(usable ? std::ldexp(1.0, static_cast<int>(exponent)) : 1.0);
  g_.rule = {static_cast<T>(in_.delta), static_cast<T>(in_.eps * static_cast<double>(g_.student_scale)),
             static_cast<T>(in_.eps)};
}

template <class T> void GraphRun<T>::pack(int64_t task) {
  const Side<T>& side = task % 2 == 0 ? g_.a : g_.b;
  const int64_t part = task / 2, parts = pack_tasks() / 2;
  kernels_.pack_side(g_, side, cut(side.count, 16, parts, part), cut(side.count, 16, parts, part + 1));
}

template <class T> void GraphRun<T>::find_threshold(Team& team) {
  if (!in_.keep_all && !in_.share) select_threshold(team);
  team.once([&] {
    if (in_.keep_all) g_.threshold = std::numeric_limits<T>::infinity();
    if (in_.keep_all && !in_.share) kept_ = in_.rows * in_.columns - (in_.exclude_self ? in_.rows : 0);
    if (in_.share) kept_ = in_.kept;
    if (in_.share && !in_.keep_all) g_.threshold = static_cast<T>(in_.threshold);
    finite_ = g_.threshold == g_.threshold;
    g_.scale = static_cast<double>(g_.student_scale) * in_.weight / (static_cast<double>(kept_) + kCountEps);
    dense_ = prefers_dense();
  });
}

template <class T> void GraphRun<T>::select_threshold(Team& team) {
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
  team.once([&] { g_.threshold = lerp(selection_.low, selection_.high, in_.lerp_weight); });
  if (!(g_.threshold == g_.threshold)) return;
  const int64_t kept = count_at_most(team, stream, selection_, g_.threshold);
  team.once([&] { kept_ = kept; });
}

template <class T> T GraphRun<T>::sample_entropy(uint64_t draw) const {
  const int64_t i = static_cast<int64_t>(((draw >> 32) * static_cast<uint64_t>(in_.rows)) >> 32);
  const int64_t j = static_cast<int64_t>(((draw & 0xffffffff) * static_cast<uint64_t>(in_.columns)) >> 32);
  if (stored_ != nullptr) return stored_[i * stored_ld_ + j];
  return entropy_->approximate(i, j);
}

template <class T> void GraphRun<T>::visit_edges(int64_t step, int64_t row) {
  const Block<T> part = grid_->block(step, row);
  double& loss = losses_[step * grid_->parts + row];
  if (!recomputed()) {
    loss = kernels_.edges(g_, part, scratch(row));
    return;
  }
  for (int64_t r = part.row_begin; r < part.row_end; r += row_unit_)
    visit_entropy(r, part.column_begin, part.column_end, rooms_ + row * room_size(),
                  [&](const Block<T>& block) { loss += kernels_.edges(g_, block, scratch(row)); });
}

// Both sides in one task: where they are one vertex set, they add to the same numbers.
template <class T> void GraphRun<T>::add_gradients(int view, int64_t part) {
  add_gradient(g_.a, in_.grad_a, view, part);
  add_gradient(g_.b, in_.grad_b, view, part);
}

template <class T>
void GraphRun<T>::add_gradient(const Side<T>& side, const GradTarget<T>& target, int view, int64_t part) const {
  const int64_t first = view == 0 ? 0 : target.cut, count = (view == 0 ? target.cut : side.count) - first;
  const int64_t begin = cut(count, 16, gradient_tasks(), part), end = cut(count, 16, gradient_tasks(), part + 1);
  if (begin == end) return;
  T* out = target.views[view] + begin * target.vertex_stride;
  kernels_.unpack_grad(g_, side, first + begin, first + end, out, target.vertex_stride, target.dim_stride);
}

template <class T> GraphResult GraphRun<T>::result() const {
  if (failed()) return {std::numeric_limits<double>::quiet_NaN(), 0};
  double loss = 0;
  for (double of_block : losses_) loss += of_block;
  return {loss / (static_cast<double>(kept_) + kCountEps), kept_};
}

template <class T> void GraphRun<T>::poison() const {
  if (!in_.need_grad) return;
  fill(in_.grad_a, in_.rows, in_.dims, std::numeric_limits<T>::quiet_NaN());
  fill(in_.grad_b, in_.columns, in_.dims, std::numeric_limits<T>::quiet_NaN());
}

template class GraphRun<float>;
template class GraphRun<double>;

}  // namespace vrm
