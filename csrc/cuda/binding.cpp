// The operators of the `cuda` backend: tensors to the kernels' plain structures, on the current device and stream.

#include <Python.h>  // first, as it asks

#include "relation_graphs.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

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
  shim::note_written(x.const_data_ptr(), static_cast<int64_t>(x.nbytes()));
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

// The threshold [] and the number of kept edges [] of a batch that several processes share, on the device. This graph
// has some of its rows and all of its columns; row 0 is the vertex of column `self`, if they are one set of vertices.
struct Given {
  Tensor threshold, kept;
  int64_t self;
};

template <class T> Four relation_graph(const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                       const Tensor& teacher_b, const Tensor& probs, const Tensor& log_probs,
                                       int64_t rank, double lerp_weight, double delta, bool exclude_self,
                                       bool need_grad, const Tuning& tuning, const Given& given) {
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
  if (given.threshold.defined()) {
    g.given = true;
    g.threshold = given_pointer<T>(given.threshold);
    g.kept = given_pointer<int64_t>(given.kept);
    g.self = given.self;
  }
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
    l = at::add(probs_b->to(type), 1e-7).log_();
  }
  const auto graph = type == at::kDouble ? relation_graph<double> : relation_graph<float>;
  return graph(a.to(type), b.to(type), teacher_a.to(type), teacher_b.to(type), p, l, rank, lerp_weight, delta,
               exclude_self, need_grad, tuning_of(form, tile_edge, stored_entropy_bytes), {});
}

// ---- the phases apart, for a batch that several processes share
// ------------------------------------------------------

template <class T> Tensor begin_selection(const Tensor& like, int64_t edges, int64_t rank) {
  static_assert(sizeof(Status<T>) % sizeof(int64_t) == 0, "a tensor of integers");
  const Tensor status = at::empty({sizeof(Status<T>) / sizeof(int64_t)}, like.options().dtype(at::kLong));
  begin_shared_selection(reinterpret_cast<Status<T>*>(pointer_of<int64_t>(status)), edges, rank, current_stream());
  return status;
}

// The status with the entropies of these rows and columns counted in.
template <class T> Tensor count_selection(const Tensor& status, const Tensor& probs, const Tensor& log_probs,
                                          int64_t self, int64_t pass, const Tuning& tuning) {
  const Tensor result = status.clone();
  Graph<T> g{};
  set_sizes(g, probs.size(0), log_probs.size(0), 1, false);
  g.depth = probs.size(1);
  g.self = self;
  g.status = reinterpret_cast<Status<T>*>(pointer_of<int64_t>(result));
  note_initialised(result);
  g.a.factor = {matrix_of<const T>(probs, false), {}, g.rows};
  g.b.factor = {matrix_of<const T>(log_probs, false), {}, g.columns};
  const Tensor memory = at::empty({count_entropies_bytes(g, tuning)}, probs.options().dtype(at::kByte));
  count_entropies(g, static_cast<int>(pass), tuning, reinterpret_cast<char*>(memory.mutable_data_ptr<uint8_t>()),
                  multiply_like<T>(probs), current_stream());
  return result;
}

// The status after a pass whose counts are complete, and the threshold and kept count, which the last pass gives.
template <class T> std::tuple<Tensor, Tensor, Tensor> advance_selection(const Tensor& status, int64_t pass,
                                                                        int64_t edges, int64_t rank, double lerp_weight,
                                                                        const Tensor& like) {
  const Tensor result = status.clone();
  auto* at = reinterpret_cast<Status<T>*>(pointer_of<int64_t>(result));
  note_initialised(result);
  advance_shared_selection(at, static_cast<int>(pass), edges, rank, lerp_weight, current_stream());
  const auto view = [&](const void* field, at::ScalarType type) {
    const auto options = like.options().dtype(type);
    return at::for_blob(const_cast<void*>(field), {})
        .target_device(like.device())
        .options(options)
        .make_tensor()
        .clone();
  };
  return {result, view(&at->threshold, like.scalar_type()), view(&at->kept, at::kLong)};
}

void check_pass(const Tensor& like, int64_t pass) {
  const int64_t passes = like.scalar_type() == at::kDouble ? kPasses<double> : kPasses<float>;
  TORCH_CHECK_VALUE(pass >= 0 && pass < passes, "a selection of ", like.scalar_type(), " has passes 0 to ", passes - 1,
                    ", not ", pass);
}

Tensor cuda_begin_selection(const Tensor& like, int64_t edges, int64_t rank) {
  const c10::cuda::CUDAGuard device(like.device());
  const auto begin = like.scalar_type() == at::kDouble ? begin_selection<double> : begin_selection<float>;
  const Tensor status = begin(like, edges, rank);
  end_emulation();
  return status;
}

Tensor cuda_count_selection(const Tensor& status, const Tensor& probs, const Tensor& log_probs,
                            std::optional<int64_t> self, int64_t pass, int64_t tile_edge) {
  check_pass(probs, pass);
  const c10::cuda::CUDAGuard device(probs.device());
  const auto count = probs.scalar_type() == at::kDouble ? count_selection<double> : count_selection<float>;
  const Tensor result = count(status, probs, log_probs, self.value_or(kNoSelf), pass, tuning_of("tiles", tile_edge, 0));
  end_emulation();
  return result;
}

std::tuple<Tensor, Tensor, Tensor> cuda_advance_selection(const Tensor& status, int64_t pass, int64_t edges,
                                                          int64_t rank, double lerp_weight, const Tensor& like) {
  check_pass(like, pass);
  const c10::cuda::CUDAGuard device(like.device());
  const auto advance = like.scalar_type() == at::kDouble ? advance_selection<double> : advance_selection<float>;
  auto result = advance(status, pass, edges, rank, lerp_weight, like);
  end_emulation();
  return result;
}

std::tuple<Tensor, Tensor, Tensor> cuda_relation_edges(const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                                       const Tensor& teacher_b, const Tensor& probs,
                                                       const Tensor& log_probs, const Tensor& threshold,
                                                       const Tensor& kept, std::optional<int64_t> self, double delta,
                                                       bool need_grad, int64_t tile_edge) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard device(a.device());
  const auto graph = a.scalar_type() == at::kDouble ? relation_graph<double> : relation_graph<float>;
  const auto [loss, grad_a, grad_b, all] =
      graph(a, b, teacher_a, teacher_b, probs, log_probs, 0, 0, delta, false, need_grad,
            tuning_of("tiles", tile_edge, 0), {threshold, kept, self.value_or(kNoSelf)});
  return {loss, grad_a, grad_b};
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
  // The first passes x 2 x 2048 + 1 integers of `status` are counts, which may be added over processes between count
  // and advance.
  m.def("cuda_begin_selection(Tensor like, int edges, int rank) -> Tensor status");
  m.def(
      "cuda_count_selection(Tensor status, Tensor probs, Tensor log_probs, int? self, int index, int tile_edge) "
      "-> Tensor status");
  m.def(
      "cuda_advance_selection(Tensor status, int index, int edges, int rank, float lerp_weight, Tensor like) "
      "-> (Tensor status, Tensor threshold, Tensor kept)");
  m.def(
      "cuda_relation_edges(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor probs, Tensor log_probs, "
      "Tensor threshold, Tensor kept, int? self, float delta, bool need_grad, int tile_edge) "
      "-> (Tensor loss, Tensor grad_a, Tensor grad_b)");
}

TORCH_LIBRARY_IMPL(vrm_kernels, VRM_DISPATCH_KEY, m) {
  m.impl("cuda_relation_graph", vrm::cuda::cuda_relation_graph);
  m.impl("cuda_vrm_graphs", vrm::cuda::cuda_vrm_graphs);
  m.impl("cuda_begin_selection", vrm::cuda::cuda_begin_selection);
  m.impl("cuda_count_selection", vrm::cuda::cuda_count_selection);
  m.impl("cuda_advance_selection", vrm::cuda::cuda_advance_selection);
  m.impl("cuda_relation_edges", vrm::cuda::cuda_relation_edges);
}

// `import vrm_kernels._cuda` registers the operators; the module itself is empty.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
