// The operators of the `cuda` backend: tensors to the kernels' plain structures, on the current device and stream.

#include "relation_graphs.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstddef>
#include <tuple>

#if defined(VRM_CUDA_SHIM)  // the tests run all of this on the host
#define VRM_DISPATCH_KEY CPU
#else
#define VRM_DISPATCH_KEY CUDA
#endif

namespace vrm {
namespace cuda {
namespace {

using at::Tensor;

at::ScalarType compute_type(at::TensorList tensors) {
  for (const Tensor& x : tensors)
    if (x.scalar_type() == at::kDouble) return at::kDouble;
  return at::kFloat;
}

// A matrix that the kernels may touch. The tests' emulation is told where it lies.
template <class T, class V = std::remove_const_t<T>> Matrix<T> matrix_of(const Tensor& x, bool transposed) {
  T* data = const_cast<V*>(x.const_data_ptr<V>());
#if defined(VRM_CUDA_SHIM)
  if (x.numel() > 0) {
    const int64_t last = (x.size(0) - 1) * x.stride(0) + (x.size(1) - 1) * x.stride(1);
    shim::expect_buffer(data, (last + 1) * sizeof(T),
                        std::is_const<T>::value ? shim::Access::initialised : shim::Access::output);
  }
#endif
  return {data, x.stride(transposed), x.stride(!transposed)};
}

template <class V> V* pointer_of(const Tensor& x) {
  V* data = x.mutable_data_ptr<V>();
#if defined(VRM_CUDA_SHIM)
  shim::expect_buffer(data, x.numel() * sizeof(V), shim::Access::output);
#endif
  return data;
}

template <class V> const V* given_pointer(const Tensor& x) {
#if defined(VRM_CUDA_SHIM)
  shim::expect_buffer(x.const_data_ptr<V>(), x.numel() * sizeof(V), shim::Access::initialised);
#endif
  return x.const_data_ptr<V>();
}

template <class T> Tensor view_of(const Matrix<const T>& x, int64_t rows, int64_t columns, const Tensor& like) {
  return at::for_blob(const_cast<T*>(x.data), {rows, columns})
      .strides({x.vertex_stride, x.dim_stride})
      .target_device(like.device())
      .options(like.options())
      .make_tensor();
}

// torch's own product, which obeys torch's own switches (TF32), on the current stream.
template <class T> Multiply<T> multiply_like(const Tensor& like) {
  return [like](const ProductArguments<T>& p) {
    Tensor out = view_of<T>({p.out.data, p.out.vertex_stride, p.out.dim_stride}, p.m, p.n, like);
    const Tensor a = view_of<T>(p.a, p.m, p.depth, like), b = view_of<T>(p.b, p.n, p.depth, like);
    at::addmm_out(out, out, a, b.t(), p.accumulate ? 1 : 0, p.alpha);
#if defined(VRM_CUDA_SHIM)
    for (int64_t i = 0; i < p.m; ++i) shim::note_written(p.out.data + i * p.out.vertex_stride, p.n * sizeof(T));
#endif
  };
}

Tuning tuning_of(c10::string_view form, int64_t tile_edge, int64_t stored_entropy_bytes) {
  Tuning tuning{Form::automatic, tile_edge, stored_entropy_bytes};
  if (form == "one_launch")
    tuning.form = Form::one_launch;
  else if (form == "launches")
    tuning.form = Form::launches;
  else if (form == "tiles")
    tuning.form = Form::tiles;
  else
    TORCH_CHECK_VALUE(form == "auto", "the form is 'auto', 'one_launch', 'launches' or 'tiles', not '", form, "'");
  TORCH_CHECK_VALUE(tile_edge > 0, "the edge of a tile must be positive, not ", tile_edge);
  return tuning;
}

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void note_initialised([[maybe_unused]] const Tensor& x) {
#if defined(VRM_CUDA_SHIM)
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  shim::note_written(x.const_data_ptr(), (last + 1) * static_cast<int64_t>(x.itemsize()));
#endif
}

void end_emulation() {
#if defined(VRM_CUDA_SHIM)
  shim::forget_buffers();
#endif
}

template <class T> void compute(Problem<T>& problem, const Tuning& tuning, const Tensor& like) {
  const Tensor memory = at::empty({plan(problem, tuning, nullptr)}, like.options().dtype(at::kByte));
  plan(problem, tuning, reinterpret_cast<char*>(memory.mutable_data_ptr<uint8_t>()));
  run(problem, tuning, multiply_like<T>(like), current_stream());
  end_emulation();
}

// The settings that all graphs of a call share.
template <class T> void set_sizes(Graph<T>& g, int64_t rows, int64_t columns, int64_t dims, bool exclude_self) {
  g.rows = g.a.count = rows;
  g.columns = g.b.count = columns;
  g.dims = dims;
  g.self = exclude_self ? 0 : kNoSelf;
  g.edges = rows * columns - (exclude_self ? rows : 0);
}

Tensor empty_grad(const Tensor& x, bool needed) {
  return needed ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T> Four relation_graph(const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                       const Tensor& teacher_b, const Tensor& probs, const Tensor& log_probs,
                                       int64_t rank, double lerp_weight, double delta, bool exclude_self,
                                       bool need_grad, const Tuning& tuning) {
  const Tensor grad_a = empty_grad(a, need_grad), grad_b = empty_grad(b, need_grad);
  const Tensor loss = at::empty({}, a.options()), kept = at::empty({}, a.options().dtype(at::kLong));
  Problem<T> problem{};
  problem.graphs = 1;
  Graph<T>& g = problem.graph[0];
  set_sizes(g, a.size(0), b.size(0), a.size(1), exclude_self);
  const auto side = [&](Side<T>& s, const Tensor& student, const Tensor& teacher, const Tensor& factor,
                        const Tensor& grad) {
    s.student = {matrix_of<const T>(student, false), {}, s.count};
    s.teacher = {matrix_of<const T>(teacher, false), {}, s.count};
    if (factor.defined()) s.factor = {matrix_of<const T>(factor, false), {}, s.count};
    if (need_grad) s.out = {matrix_of<T>(grad, false), {}, s.count};
  };
  side(g.a, a, teacher_a, probs, grad_a);
  side(g.b, b, teacher_b, log_probs, grad_b);
  g.keep_all = !probs.defined() || g.edges == 0;  // one vertex on both sides has no edge to be the threshold
  g.depth = g.keep_all ? 0 : probs.size(1);
  g.need_grad = need_grad;
  g.rank = rank, g.lerp_weight = lerp_weight;
  g.weight = 1, g.delta = static_cast<T>(delta);
  g.loss_out = pointer_of<T>(loss);
  g.kept_out = pointer_of<int64_t>(kept);
  compute(problem, tuning, a);
  return {loss, grad_a, grad_b, kept};
}

Four cuda_relation_graph(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                         const std::optional<Tensor>& probs_a, const std::optional<Tensor>& probs_b, int64_t rank,
                         double lerp_weight, double delta, bool exclude_self, bool need_grad, c10::string_view form,
                         int64_t tile_edge, int64_t stored_entropy_bytes) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard device(a.device());
  const auto type = compute_type({a, b, teacher_a, teacher_b});
  Tensor p, l;
  if (probs_a.has_value()) {
    p = probs_a->to(type);
    l = at::add(probs_b->to(type), kEntropyEps).log_();
  }
  const auto graph = type == at::kDouble ? relation_graph<double> : relation_graph<float>;
  return graph(a.to(type), b.to(type), teacher_a.to(type), teacher_b.to(type), p, l, rank, lerp_weight, delta,
               exclude_self, need_grad, tuning_of(form, tile_edge, stored_entropy_bytes));
}

// ---- a share of a graph, for a batch that several processes compute together: see vrm_kernels/distributed.py

// How many keys of x [m, n] have each digit of `bits` bits from bit `shift` on behind the two prefixes.
template <class T> Tensor count_digits(const Tensor& x, const Tensor& prefixes, int64_t shift, int64_t bits) {
  int pass = 0;
  while (pass + 1 < kPasses<T> && digit_shift<T>(pass) != shift) ++pass;
  TORCH_CHECK_VALUE(digit_shift<T>(pass) == shift && digit_bits<T>(pass) == bits && prefixes.numel() == 2,
                    "no pass of a selection of ", x.scalar_type(), " counts ", bits, " bits from bit ", shift,
                    " on behind ", prefixes.numel(), " prefixes");
  static_assert(sizeof(Status<T>) % sizeof(int64_t) == 0, "a tensor of integers");
  const Tensor status = at::zeros({sizeof(Status<T>) / sizeof(int64_t)}, prefixes.options());
  if (pass > 0) {  // the kernel's keys are unsigned: as many more as there are negative ones
    const int64_t half = int64_t{1} << (8 * sizeof(T) - shift - bits - 1);
    status.narrow(0, offsetof(Status<T>, prefix) / sizeof(int64_t), 2).copy_(prefixes + half);
  }
  auto* at = reinterpret_cast<Status<T>*>(pointer_of<int64_t>(status));
  note_initialised(status);
  const Matrix<const T> entropy = matrix_of<const T>(x, false);
  count_entropies(at, pass, entropy.data, x.size(0), x.size(1), entropy.vertex_stride, current_stream());
  end_emulation();
  const Tensor counts = status.narrow(0, pass * 2 * kBins, 2 * kBins).view({2, kBins}).narrow(1, 0, int64_t{1} << bits);
  if (pass == 0) return counts[0].repeat({2, 1});
  // Equal prefixes were counted once.
  return at::where(prefixes[0] == prefixes[1], counts[0], counts);
}

Tensor cuda_count_digits(const Tensor& x, const Tensor& prefixes, int64_t shift, int64_t bits) {
  const c10::cuda::CUDAGuard device(x.device());
  return (x.scalar_type() == at::kDouble ? count_digits<double> : count_digits<float>)(x, prefixes, shift, bits);
}

// The caller's gradients are added to: those of many shares end in one matrix.
template <class T> Tensor relation_share(const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                         const Tensor& teacher_b, const Tensor& entropy, const Tensor& threshold,
                                         const Tensor& kept, double weight, double delta, bool exclude_self,
                                         bool need_grad, const Tensor& grad_a, const Tensor& grad_b,
                                         const Tuning& tuning) {
  const Tensor loss = at::empty({}, a.options()), count = at::empty({}, kept.options());
  Problem<T> problem{};
  problem.graphs = 1;
  Graph<T>& g = problem.graph[0];
  set_sizes(g, a.size(0), b.size(0), a.size(1), exclude_self);
  const auto side = [&](Side<T>& s, const Tensor& student, const Tensor& teacher, const Tensor& grad) {
    s.student = {matrix_of<const T>(student, false), {}, s.count};
    s.teacher = {matrix_of<const T>(teacher, false), {}, s.count};
    if (!need_grad) return;
    s.out = {matrix_of<T>(grad, false), {}, s.count};
    note_initialised(grad);
  };
  side(g.a, a, teacher_a, grad_a);
  side(g.b, b, teacher_b, grad_b);
  g.keep_all = !entropy.defined();
  g.need_grad = need_grad;
  g.add_out = true;
  g.weight = weight, g.delta = static_cast<T>(delta);
  g.given = true;
  g.threshold = given_pointer<T>(threshold);
  g.kept = given_pointer<int64_t>(kept);
  if (!g.keep_all) {
    const Matrix<const T> given = matrix_of<const T>(entropy, false);
    g.entropy = const_cast<T*>(given.data), g.entropy_ld = given.vertex_stride;
  }
  g.loss_out = pointer_of<T>(loss);
  g.kept_out = pointer_of<int64_t>(count);
  compute(problem, tuning, a);
  return loss;
}

Tensor cuda_relation_share(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                           const std::optional<Tensor>& entropy, const Tensor& grad_a, const Tensor& grad_b,
                           const Tensor& threshold, const Tensor& kept, double weight, double delta, bool exclude_self,
                           bool need_grad, int64_t tile_edge) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard device(a.device());
  const auto share = a.scalar_type() == at::kDouble ? relation_share<double> : relation_share<float>;
  return share(a, b, teacher_a, teacher_b, entropy.value_or(Tensor()), threshold, kept, weight, delta, exclude_self,
               need_grad, grad_a, grad_b, tuning_of("tiles", tile_edge, 0));
}

// ---- both graphs of the loss
// -----------------------------------------------------------------------------------------

// The vertices of one view's matrix, its rows or its columns, or those of both in one set.
template <class T> Stacked<T> stacked(const Tensor (&views)[2], int view, bool complete, bool by_class, int64_t count) {
  if (!complete) return {matrix_of<T>(views[view], by_class), {}, count};
  return {matrix_of<T>(views[0], by_class), matrix_of<T>(views[1], by_class), count};
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T> Five vrm_graphs(const Tensor (&student)[2], const Tensor (&teacher)[2], double alpha, double beta,
                                   at::IntArrayRef ranks, at::ArrayRef<double> lerp_weights, bool keep_all,
                                   double delta, bool complete, bool need_grad, const Tuning& tuning) {
  const int64_t samples = student[0].size(0), classes = student[0].size(1);
  const Tensor grads[2] = {empty_grad(student[0], need_grad), empty_grad(student[1], need_grad)};
  const auto options = student[0].options();
  const Tensor loss = at::empty({}, options), terms = at::empty({2}, options);
  const Tensor kept = at::empty({2}, options.dtype(at::kLong));
  Problem<T> problem{};
  problem.graphs = 2;
  problem.total_out = pointer_of<T>(loss);
  T* terms_out = pointer_of<T>(terms);
  int64_t* kept_out = pointer_of<int64_t>(kept);
  if (!keep_all) {
    problem.softmax.rows = samples, problem.softmax.columns = classes;
    for (int view = 0; view < 2; ++view) problem.softmax.logits[view] = matrix_of<const T>(student[view], false);
  }
  for (int k = 0; k < 2; ++k) {
    const bool by_class = k == 1;
    const int64_t count = by_class ? classes : samples, dims = by_class ? samples : classes;
    Graph<T>& g = problem.graph[k];
    set_sizes(g, complete ? 2 * count : count, complete ? 2 * count : count, dims, complete);
    const auto side = [&](Side<T>& s, int view) {
      s.student = stacked<const T>(student, view, complete, by_class, count);
      s.teacher = stacked<const T>(teacher, view, complete, by_class, count);
      if (need_grad) s.out = stacked<T>(grads, view, complete, by_class, count);
    };
    side(g.a, 0);
    side(g.b, 1);
    g.keep_all = keep_all;
    g.depth = keep_all ? 0 : dims;
    g.need_grad = need_grad;
    g.one_set = complete;
    g.add_out = k > 0;
    g.rank = ranks[k], g.lerp_weight = lerp_weights[k];
    g.weight = by_class ? beta : alpha, g.delta = static_cast<T>(delta);
    g.loss_out = terms_out + k;
    g.kept_out = kept_out + k;
  }
  compute(problem, tuning, student[0]);
  return {loss, grads[0], grads[1], terms, kept};
}

Five cuda_vrm_graphs(const Tensor& student_real, const Tensor& student_virtual, const Tensor& teacher_real,
                     const Tensor& teacher_virtual, double alpha, double beta, at::IntArrayRef ranks,
                     at::ArrayRef<double> lerp_weights, bool keep_all, double delta, bool complete, bool need_grad,
                     c10::string_view form, int64_t tile_edge, int64_t stored_entropy_bytes) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard device(student_real.device());
  const auto type = compute_type({student_real, student_virtual, teacher_real, teacher_virtual});
  const Tensor student[2] = {student_real.to(type), student_virtual.to(type)};
  const Tensor teacher[2] = {teacher_real.to(type), teacher_virtual.to(type)};
  const auto graphs = type == at::kDouble ? vrm_graphs<double> : vrm_graphs<float>;
  return graphs(student, teacher, alpha, beta, ranks, lerp_weights, keep_all, delta, complete, need_grad,
                tuning_of(form, tile_edge, stored_entropy_bytes));
}

}  // namespace
}  // namespace cuda
}  // namespace vrm

TORCH_LIBRARY_FRAGMENT(vrm_kernels, m) {
  // Why the current device cannot run the kernels; empty: it can.
  m.def("cuda_refusal() -> str", [] {
    const char* why = vrm::cuda::refusal();
    return std::string(why == nullptr ? "" : why);
  });
  m.def(
      "cuda_relation_graph(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? probs_a, Tensor? probs_b, "
      "int rank, float lerp_weight, float delta, bool exclude_self, bool need_grad, str form, int tile_edge, "
      "int stored_entropy_bytes) -> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor kept)");
  m.def(
      "cuda_vrm_graphs(Tensor student_real, Tensor student_virtual, Tensor teacher_real, Tensor teacher_virtual, "
      "float alpha, float beta, int[] ranks, float[] lerp_weights, bool keep_all, float delta, bool complete, "
      "bool need_grad, str form, int tile_edge, int stored_entropy_bytes) "
      "-> (Tensor loss, Tensor grad_real, Tensor grad_virtual, Tensor terms, Tensor kept)");
  m.def("cuda_count_digits(Tensor x, Tensor prefixes, int shift, int bits) -> Tensor");
  m.def(
      "cuda_relation_share(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? entropy, Tensor(a!) grad_a, "
      "Tensor(b!) grad_b, Tensor threshold, Tensor kept, float weight, float delta, bool exclude_self, bool need_grad, "
      "int tile_edge) -> Tensor");
}

TORCH_LIBRARY_IMPL(vrm_kernels, VRM_DISPATCH_KEY, m) {
  m.impl("cuda_relation_graph", vrm::cuda::cuda_relation_graph);
  m.impl("cuda_vrm_graphs", vrm::cuda::cuda_vrm_graphs);
  m.impl("cuda_count_digits", vrm::cuda::cuda_count_digits);
  m.impl("cuda_relation_share", vrm::cuda::cuda_relation_share);
}
