// The operators of the `cuda` backend: tensors to the kernels' plain structures, on the current device and stream.

#include "../checks.h"
#include "../on_device.h"
#include "relation_graphs.h"

#include <cstddef>
#include <tuple>
#include <vector>

#if defined(VRM_CUDA_SHIM)  // the tests run all of this on the host
#define VRM_DISPATCH_KEY CPU
#define VRM_ADDMM_OUT aoti_torch_cpu_addmm_out
#else
#define VRM_DISPATCH_KEY CUDA
#define VRM_ADDMM_OUT aoti_torch_cuda_addmm_out
#endif

// Outside of the stable ABI, which has no product that adds to its result.
extern "C" AOTITorchError VRM_ADDMM_OUT(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a,
                                        AtenTensorHandle b, double beta, double alpha);

namespace vrm {
namespace cuda {
namespace steps {
namespace {

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

template <class T>
Tensor view_of(const T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
               const Tensor& like) {
  return torch::stable::from_blob(const_cast<T*>(data), {rows, columns}, {row_stride, column_stride}, like.device(),
                                  scalar_type_of<T>);
}

// torch's own product, which obeys torch's own switches (TF32), on the current stream.
template <class T> Multiply<T> multiply_like(const Tensor& like) {
  return [like](const ProductArguments<T>& p) {
    const Tensor out = view_of(p.out.data, p.m, p.n, p.out.vertex_stride, p.out.dim_stride, like);
    const Tensor a = view_of(p.a.data, p.m, p.depth, p.a.vertex_stride, p.a.dim_stride, like);
    const Tensor b = view_of(p.b.data, p.depth, p.n, p.b.dim_stride, p.b.vertex_stride, like);
    check(VRM_ADDMM_OUT(out.get(), out.get(), a.get(), b.get(), p.accumulate, p.alpha));
#if defined(VRM_CUDA_SHIM)
    for (int64_t i = 0; i < p.m; ++i) shim::note_written(p.out.data + i * p.out.vertex_stride, p.n * sizeof(T));
#endif
  };
}

void refuse(bool wrong, const std::string& why) {
  if (wrong) throw std::invalid_argument(why);  // a ValueError in Python
}

Tuning tuning_of(const std::string& form, int64_t tile_edge, int64_t stored_entropy_bytes) {
  Tuning tuning{Form::automatic, tile_edge, stored_entropy_bytes};
  if (form == "one_launch")
    tuning.form = Form::one_launch;
  else if (form == "launches")
    tuning.form = Form::launches;
  else if (form == "tiles")
    tuning.form = Form::tiles;
  else
    refuse(form != "auto", "the form is 'auto', 'one_launch', 'launches' or 'tiles', not '" + form + "'");
  check_tile_edge(tile_edge);
  return tuning;
}

void note_initialised([[maybe_unused]] const Tensor& x) {
#if defined(VRM_CUDA_SHIM)
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  shim::note_written(x.const_data_ptr(), (last + 1) * static_cast<int64_t>(x.element_size()));
#endif
}

void end_emulation() {
#if defined(VRM_CUDA_SHIM)
  shim::forget_buffers();
#endif
}

template <class T> void compute(Problem<T>& problem, const Tuning& tuning, const Tensor& like) {
  const OnDevice device(like);
  const int64_t bytes = plan(problem, tuning, nullptr), unit = sizeof(int64_t);
  const Tensor memory = empty_like<int64_t>(like, {(bytes + unit - 1) / unit});
  plan(problem, tuning, reinterpret_cast<char*>(memory.mutable_data_ptr<int64_t>()));
  run(problem, tuning, multiply_like<T>(like), device.stream());
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

template <class T> Tensor empty_grad(const Tensor& x, bool needed) {
  return needed ? empty_like<T>(x, {x.size(0), x.size(1)}) : empty_like<T>(x, {0});
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T> Four relation_graph(const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                       const Tensor& teacher_b, const OptionalTensor& probs, const OptionalTensor& logs,
                                       int64_t rank, double lerp_weight, double delta, double eps, bool exclude_self,
                                       bool need_grad, const Tuning& tuning) {
  const Tensor grad_a = empty_grad<T>(a, need_grad), grad_b = empty_grad<T>(b, need_grad);
  const Tensor loss = empty_like<T>(a, {}), kept = empty_like<int64_t>(a, {});
  Problem<T> problem{};
  problem.graphs = 1;
  Graph<T>& g = problem.graph[0];
  set_sizes(g, a.size(0), b.size(0), a.size(1), exclude_self);
  const auto side = [&](Side<T>& s, const Tensor& student, const Tensor& teacher, const OptionalTensor& factor,
                        const Tensor& grad) {
    s.student = {matrix_of<const T>(student, false), {}, s.count};
    s.teacher = {matrix_of<const T>(teacher, false), {}, s.count};
    if (factor.has_value()) s.factor = {matrix_of<const T>(*factor, false), {}, s.count};
    if (need_grad) s.out = {matrix_of<T>(grad, false), {}, s.count};
  };
  side(g.a, a, teacher_a, probs, grad_a);
  side(g.b, b, teacher_b, logs, grad_b);
  g.keep_all = !probs.has_value() || g.edges == 0;  // one vertex on both sides has no edge to be the threshold
  g.depth = g.keep_all ? 0 : probs->size(1);
  g.need_grad = need_grad;
  g.rank = rank, g.lerp_weight = lerp_weight;
  g.weight = 1, g.delta = static_cast<T>(delta), g.eps = static_cast<T>(eps);
  g.loss_out = pointer_of<T>(loss);
  g.kept_out = pointer_of<int64_t>(kept);
  compute(problem, tuning, a);
  return {loss, grad_a, grad_b, kept};
}

Four cuda_relation_graph(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                         const OptionalTensor& probs_a, const OptionalTensor& probs_b, int64_t rank,
                         double lerp_weight, double delta, double eps, bool exclude_self, bool need_grad,
                         const std::string& form, int64_t tile_edge, int64_t stored_entropy_bytes) {
  check_graph(a, b, teacher_a, teacher_b, probs_a, probs_b, exclude_self);
  check_settings(delta, eps);
  const int64_t edges = a.size(0) * b.size(0) - (exclude_self ? a.size(0) : 0);
  if (probs_a.has_value() && edges > 0) check_rank(rank, lerp_weight, edges);
  const OnDevice device(a);
  const auto type = compute_type({&a, &b, &teacher_a, &teacher_b});
  OptionalTensor p, l;
  if (probs_a.has_value()) {
    p = convert(*probs_a, type);
    l = log_of(convert(*probs_b, type), kEntropyEps);
  }
  const auto graph = type == ScalarType::Double ? relation_graph<double> : relation_graph<float>;
  return graph(convert(a, type), convert(b, type), convert(teacher_a, type), convert(teacher_b, type), p, l, rank,
               lerp_weight, delta, eps, exclude_self, need_grad, tuning_of(form, tile_edge, stored_entropy_bytes));
}

// ---- a share of a graph, for a batch that several processes compute together: see vrm_kernels/distributed.py

// How many keys of x [m, n] have each digit of `bits` bits from bit `shift` on behind the two prefixes.
template <class T> Tensor count_digits(const Tensor& x, const Tensor& prefixes, int64_t shift, int64_t bits) {
  int pass = 0;
  while (pass + 1 < kPasses<T> && digit_shift<T>(pass) != shift) ++pass;
  refuse(digit_shift<T>(pass) != shift || digit_bits<T>(pass) != bits || prefixes.numel() != 2,
         "no pass of a selection of float" + std::to_string(8 * sizeof(T)) + " counts " + std::to_string(bits) +
             " bits from bit " + std::to_string(shift) + " on behind " + std::to_string(prefixes.numel()) +
             " prefixes");
  static_assert(sizeof(Status<T>) % sizeof(int64_t) == 0, "a tensor of integers");
  Tensor status = empty_like<int64_t>(prefixes, {sizeof(Status<T>) / sizeof(int64_t)});
  check(aoti_torch_zero_(status.get()));
  if (pass > 0) {  // the kernel's keys are unsigned: as many more as there are negative ones
    const double half = static_cast<double>(int64_t{1} << (8 * sizeof(T) - shift - bits - 1));
    const auto integer = [](double value) { return torch::stable::full({}, value, ScalarType::Long); };
    const Tensor high_bits = aten("aten::bitwise_and", "Tensor", prefixes, integer(-2 * half));
    const Tensor low_bits = aten("aten::bitwise_xor", "Tensor", prefixes, high_bits);
    Tensor place = torch::stable::narrow(status, 0, offsetof(Status<T>, prefix) / sizeof(int64_t), 2);
    torch::stable::copy_(place, aten("aten::bitwise_xor", "Tensor", low_bits, integer(half)));
  }
  auto* at = reinterpret_cast<Status<T>*>(pointer_of<int64_t>(status));
  note_initialised(status);
  const Matrix<const T> entropy = matrix_of<const T>(x, false);
  const OnDevice device(x);
  count_entropies(at, pass, entropy.data, x.size(0), x.size(1), entropy.vertex_stride, device.stream());
  end_emulation();
  Tensor counts = torch::stable::narrow(status, 0, pass * 2 * kBins, 2 * kBins);
  counts = torch::stable::view(counts, {2, kBins});
  counts = torch::stable::narrow(counts, 1, 0, int64_t{1} << bits);
  const Tensor first = torch::stable::select(counts, 0, 0);
  if (pass == 0) return aten("aten::repeat", "", first, std::vector<int64_t>{2, 1});
  // Equal prefixes were counted once.
  const auto prefix = [&](int64_t which) { return torch::stable::select(prefixes, 0, which); };
  return aten("aten::where", "self", aten("aten::eq", "Tensor", prefix(0), prefix(1)), first, counts);
}

Tensor cuda_count_digits(const Tensor& x, const Tensor& prefixes, int64_t shift, int64_t bits) {
  STD_TORCH_CHECK(x.dim() == 2, "the entropies must be [m, n], not ", sizes_of(x));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "the entropies must be float32 or float64, not ", name_of(x));
  check_device(x, "the entropies", x);
  check_dense_rows(x, "the entropies");
  check_vector(prefixes, "prefixes", 2, x);
  check_type(prefixes, "prefixes", ScalarType::Long);
  const OnDevice device(x);
  return (x.scalar_type() == ScalarType::Double ? count_digits<double> : count_digits<float>)(x, prefixes, shift, bits);
}

// The caller's gradients are added to: those of many shares end in one matrix.
template <class T> Tensor relation_share(const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                         const Tensor& teacher_b, const OptionalTensor& entropy,
                                         const Tensor& threshold, const Tensor& kept, double weight, double delta,
                                         double eps, bool exclude_self, bool need_grad, const Tensor& grad_a,
                                         const Tensor& grad_b,
                                         const Tuning& tuning) {
  const Tensor loss = empty_like<T>(a, {}), count = empty_like<int64_t>(a, {});
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
  g.keep_all = !entropy.has_value();
  g.need_grad = need_grad;
  g.add_out = true;
  g.weight = weight, g.delta = static_cast<T>(delta), g.eps = static_cast<T>(eps);
  g.given = true;
  g.threshold = given_pointer<T>(threshold);
  g.kept = given_pointer<int64_t>(kept);
  if (!g.keep_all) {
    const Matrix<const T> given = matrix_of<const T>(*entropy, false);
    g.entropy = const_cast<T*>(given.data), g.entropy_ld = given.vertex_stride;
  }
  g.loss_out = pointer_of<T>(loss);
  g.kept_out = pointer_of<int64_t>(count);
  compute(problem, tuning, a);
  return loss;
}

Tensor cuda_relation_share(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                           const OptionalTensor& entropy, const Tensor& grad_a, const Tensor& grad_b,
                           const Tensor& threshold, const Tensor& kept, double weight, double delta, double eps,
                           bool exclude_self, bool need_grad, int64_t tile_edge) {
  check_sides(a, b, teacher_a, teacher_b);
  check_settings(delta, eps);
  const auto type = a.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "a must be float32 or float64, not ",
                  name_of(a));
  check_type(b, "b", type);
  check_type(teacher_a, "teacher_a", type);
  check_type(teacher_b, "teacher_b", type);
  if (entropy.has_value()) {
    check_matrix(*entropy, "entropy", a.size(0), b.size(0), a);
    check_type(*entropy, "entropy", type);
    check_dense_rows(*entropy, "entropy");
  }
  if (need_grad) {
    check_matrix(grad_a, "grad_a", a.size(0), a.size(1), a);
    check_matrix(grad_b, "grad_b", b.size(0), a.size(1), a);
    check_type(grad_a, "grad_a", type);
    check_type(grad_b, "grad_b", type);
  }
  check_scalar(threshold, "threshold", type, a);
  check_scalar(kept, "kept", ScalarType::Long, a);
  const OnDevice device(a);
  const auto share = a.scalar_type() == ScalarType::Double ? relation_share<double> : relation_share<float>;
  return share(a, b, teacher_a, teacher_b, entropy, threshold, kept, weight, delta, eps, exclude_self,
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
                                   const std::vector<int64_t>& ranks, const std::vector<double>& lerp_weights,
                                   bool keep_all, double delta, double eps, bool complete, bool need_grad,
                                   const Tuning& tuning) {
  const int64_t samples = student[0].size(0), classes = student[0].size(1);
  const Tensor grads[2] = {empty_grad<T>(student[0], need_grad), empty_grad<T>(student[1], need_grad)};
  const Tensor loss = empty_like<T>(student[0], {}), terms = empty_like<T>(student[0], {2});
  const Tensor kept = empty_like<int64_t>(student[0], {2});
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
    g.weight = by_class ? beta : alpha, g.delta = static_cast<T>(delta), g.eps = static_cast<T>(eps);
    g.loss_out = terms_out + k;
    g.kept_out = kept_out + k;
  }
  compute(problem, tuning, student[0]);
  return {loss, grads[0], grads[1], terms, kept};
}

Five cuda_vrm_graphs(const Tensor& student_real, const Tensor& student_virtual, const Tensor& teacher_real,
                     const Tensor& teacher_virtual, double alpha, double beta, const std::vector<int64_t>& ranks,
                     const std::vector<double>& lerp_weights, bool keep_all, double delta, double eps,
                     bool complete, bool need_grad, const std::string& form, int64_t tile_edge,
                     int64_t stored_entropy_bytes) {
  check_views(student_real, student_virtual, teacher_real, teacher_virtual);
  check_settings(delta, eps);
  check_two(ranks, lerp_weights);
  for (int k = 0; k < 2 && !keep_all; ++k) {
    const int64_t vertices = student_real.size(k) * (complete ? 2 : 1);
    const int64_t edges = vertices * vertices - (complete ? vertices : 0);
    if (edges > 0) check_rank(ranks[k], lerp_weights[k], edges);
  }
  const OnDevice device(student_real);
  const auto type = compute_type({&student_real, &student_virtual, &teacher_real, &teacher_virtual});
  const Tensor student[2] = {convert(student_real, type), convert(student_virtual, type)};
  const Tensor teacher[2] = {convert(teacher_real, type), convert(teacher_virtual, type)};
  const auto graphs = type == ScalarType::Double ? vrm_graphs<double> : vrm_graphs<float>;
  return graphs(student, teacher, alpha, beta, ranks, lerp_weights, keep_all, delta, eps, complete, need_grad,
                tuning_of(form, tile_edge, stored_entropy_bytes));
}

}  // namespace
}  // namespace steps
}  // namespace cuda
}  // namespace vrm

STABLE_TORCH_LIBRARY_FRAGMENT(vrm_kernels, m) {
  m.def(
      "cuda_relation_graph(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? probs_a, Tensor? probs_b, "
      "int rank, float lerp_weight, float delta, float eps, bool exclude_self, bool need_grad, str form, "
      "int tile_edge, int stored_entropy_bytes) -> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor kept)");
  m.def(
      "cuda_vrm_graphs(Tensor student_real, Tensor student_virtual, Tensor teacher_real, Tensor teacher_virtual, "
      "float alpha, float beta, int[] ranks, float[] lerp_weights, bool keep_all, float delta, float eps, "
      "bool complete, bool need_grad, str form, int tile_edge, int stored_entropy_bytes) "
      "-> (Tensor loss, Tensor grad_real, Tensor grad_virtual, Tensor terms, Tensor kept)");
  m.def("cuda_count_digits(Tensor x, Tensor prefixes, int shift, int bits) -> Tensor");
  m.def(
      "cuda_relation_share(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? entropy, Tensor(a!) grad_a, "
      "Tensor(b!) grad_b, Tensor threshold, Tensor kept, float weight, float delta, float eps, bool exclude_self, "
      "bool need_grad, int tile_edge) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vrm_kernels, VRM_DISPATCH_KEY, m) {
  m.impl("cuda_relation_graph", TORCH_BOX(&vrm::cuda::steps::cuda_relation_graph));
  m.impl("cuda_vrm_graphs", TORCH_BOX(&vrm::cuda::steps::cuda_vrm_graphs));
  m.impl("cuda_count_digits", TORCH_BOX(&vrm::cuda::steps::cuda_count_digits));
  m.impl("cuda_relation_share", TORCH_BOX(&vrm::cuda::steps::cuda_relation_share));
}
