// The operators of the two forms: tensors, checked, to the kernels' plain structures, on their device and its stream.

#include "checks.h"
#include "forms.h"
#include "on_device.h"

#include <string>
#include <tuple>
#include <vector>

#if defined(VRM_CUDA_SHIM)  // the tests run all of this on the host
#define VRM_DISPATCH_KEY CPU
#else
#define VRM_DISPATCH_KEY CUDA
#endif

namespace vrm {
namespace cuda {
namespace {

// ---- tensors to structures; the tests' emulation is told what the kernels may touch --------------------------------

void may_touch([[maybe_unused]] const Tensor& x, [[maybe_unused]] bool output) {
#if defined(VRM_CUDA_SHIM)
  if (x.numel() == 0) return;
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  shim::expect_buffer(x.const_data_ptr(), (last + 1) * static_cast<int64_t>(x.element_size()),
                      output ? shim::Access::output : shim::Access::initialised);
#endif
}

Input input(const Tensor& x) {
  may_touch(x, false);
  const auto type = x.scalar_type();
  const Dtype dtype = type == ScalarType::Double     ? Dtype::float64
                      : type == ScalarType::Float    ? Dtype::float32
                      : type == ScalarType::BFloat16 ? Dtype::bfloat16
                                                     : Dtype::float16;
  return {x.const_data_ptr(), dtype, x.stride(0), x.stride(1)};
}

template <class V> V* output(const Tensor& x) {
  may_touch(x, true);
  return x.mutable_data_ptr<V>();
}

template <class T> Tensor gradient(const Tensor& x, bool needed) {
  return needed ? empty_like<T>(x, {x.size(0), x.size(1)}) : empty_like<T>(x, {0});
}

template <class T> Tensor tensor_of(const Factor& x, int64_t rows, int64_t columns, const Tensor& like) {
  char* data = static_cast<char*>(x.x.data) + x.first * static_cast<int64_t>(x.x.half ? 2 : sizeof(T));
  return torch::stable::from_blob(data, {rows, columns}, {x.vertex_stride, x.dim_stride}, like.device(),
                                  x.x.half ? ScalarType::Half : scalar_type_of<T>);
}

// torch's own product, which obeys its switch for float32, on its current stream; of float16 with sums in float32.
template <class T> void multiply(const Product<T>& p, const Tensor& like) {
  const Tensor out =
      torch::stable::from_blob(p.out, {p.m, p.n}, {p.ld, int64_t{1}}, like.device(), scalar_type_of<T>);
  const Tensor a = tensor_of<T>(p.a, p.m, p.depth, like);
  const Tensor b = torch::stable::transpose(tensor_of<T>(p.b, p.n, p.depth, like), 0, 1);
#if defined(VRM_CUDA_SHIM)  // the CPU has no product of mixed types
  shim::note_product(p.m * p.n * p.depth, p.a.x.half);
  aten("aten::mm", "out", convert(a, scalar_type_of<T>), convert(b, scalar_type_of<T>), out);
  for (int64_t i = 0; i < p.m; ++i) shim::note_written(p.out + i * p.ld, p.n * sizeof(T));
#else
  if (p.a.x.half)
    aten("aten::mm", "dtype_out", a, b, scalar_type_of<T>, out);
  else
    aten("aten::mm", "out", a, b, out);
#endif
}

template <class T> void compute(Problem<T>& problem, const Settings& settings, const Tensor& like) {
  const OnDevice device(like);
  const int64_t bytes = plan(problem, settings, nullptr);
  const Tensor memory = empty_like<int64_t>(like, {ceil_div(bytes, sizeof(int64_t))});
  plan(problem, settings, reinterpret_cast<char*>(memory.mutable_data_ptr<int64_t>()));
  run<T>(problem, settings, [&like](const Product<T>& p) { multiply(p, like); }, device.stream());
#if defined(VRM_CUDA_SHIM)
  shim::forget_buffers();
#endif
}

struct GraphArguments {
  const std::vector<int64_t>& brackets;
  int64_t rank;
  double lerp_weight, delta, eps, weight;
  bool keep_all, exclude_self, need_grad;
};

template <class T> void describe(Graph<T>& g, int64_t rows, int64_t columns, const GraphArguments& arguments) {
  g.edges = rows * columns - (arguments.exclude_self ? rows : 0);
  g.keep_all = arguments.keep_all || g.edges == 0;  // one vertex on both sides has no edge to be the threshold
  if (g.ranked()) check_rank(arguments.rank, arguments.lerp_weight, g.edges);
  g.levels = static_cast<int>(arguments.brackets.size() / 3);
  for (int k = 0; k < g.levels; ++k) {
    const int64_t* bracket = &arguments.brackets[3 * k];
    g.level[k].sample = bracket[0], g.level[k].reach = bracket[1], g.level[k].room = bracket[2];
  }
  g.exclude_self = arguments.exclude_self, g.need_grad = arguments.need_grad;
  g.rank = arguments.rank, g.lerp_weight = static_cast<T>(arguments.lerp_weight);
  g.delta = static_cast<T>(arguments.delta), g.eps = static_cast<T>(arguments.eps), g.weight = arguments.weight;
}

// ---- one graph -----------------------------------------------------------------------------------------------------

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The selection of a graph that this is a share of.
struct Given {
  OptionalTensor entropy, threshold, kept;
};

template <class T>
Four relation_loss(const Tensor (&student)[2], const Tensor (&teacher)[2], const OptionalTensor (&probs)[2],
                   const Given& given, const GraphArguments& arguments, const Settings& settings) {
  const Tensor& a = student[0];
  const bool need_grad = arguments.need_grad;
  const Tensor grads[2] = {gradient<T>(a, need_grad), gradient<T>(student[1], need_grad)};
  const Tensor loss = empty_like<T>(a, {}), kept = empty_like<int64_t>(a, {});
  Problem<T> problem{};
  problem.graphs = 1;
  Vectors<T>& x = problem.vectors;
  Graph<T>& g = problem.graph[0];
  if (given.kept.has_value()) {
    for (const OptionalTensor* x : {&given.entropy, &given.threshold, &given.kept})
      if (x->has_value()) may_touch(**x, false);
    g.given_kept = given.kept->const_data_ptr<int64_t>(), g.given_threshold = given.threshold->const_data_ptr<T>();
    if (given.entropy.has_value()) g.entropy = const_cast<T*>(given.entropy->const_data_ptr<T>());
  }
  describe(g, a.size(0), student[1].size(0), arguments);
  x.dims = a.size(1);
  for (int side = 0; side < 2; ++side) {
    x.count[side] = student[side].size(0);
    x.student[side] = input(student[side]), x.teacher[side] = input(teacher[side]);
    if (g.ranked()) x.probs[side] = input(*probs[side]), x.depth = probs[side]->size(1);
    if (need_grad) problem.output[side].out = output<T>(grads[side]);
  }
  problem.loss_out = output<T>(loss), problem.kept_out = output<int64_t>(kept);
  compute(problem, settings, a);
  return {loss, grads[0], grads[1], kept};
}

Four cuda_relation_loss(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                        const OptionalTensor& probs_a, const OptionalTensor& probs_b, const OptionalTensor& entropy,
                        const OptionalTensor& threshold, const OptionalTensor& kept, int64_t rank, double lerp_weight,
                        double delta, double eps, bool exclude_self, bool need_grad, bool dense, int64_t half_level,
                        int64_t tile_edge, int64_t stored_entropy_bytes, const std::vector<int64_t>& brackets) {
  check_graph(a, b, teacher_a, teacher_b, probs_a, probs_b, exclude_self, kept.has_value());
  check_settings(delta, eps);
  check_tile_edge(tile_edge);
  check_brackets(brackets);
  const Tensor student[2] = {a, b}, teacher[2] = {teacher_a, teacher_b};
  const OptionalTensor probs[2] = {probs_a, probs_b};
  const auto type = compute_type({&a, &b, &teacher_a, &teacher_b});
  check_half_level(half_level, type, dense);
  check_given(a, b, entropy, threshold, kept, probs_a.has_value(), type);
  Given given{entropy, threshold, kept};
  if (entropy.has_value()) given.entropy = torch::stable::contiguous(*entropy);
  const bool keep_all = !probs_a.has_value() && !entropy.has_value();
  const auto compute = type == ScalarType::Double ? relation_loss<double> : relation_loss<float>;
  return compute(student, teacher, probs, given,
                 {brackets, rank, lerp_weight, delta, eps, 1.0, keep_all, exclude_self, need_grad},
                 {dense, half_level, tile_edge, stored_entropy_bytes});
}

template <class T> Tensor digits_of(const Tensor& x, const Tensor& prefixes, int64_t round, int64_t bits) {
  Tensor digits = empty_like<int64_t>(prefixes, {2, kBins});
  for (const Tensor* given : {&x, &prefixes}) may_touch(*given, false);
  const OnDevice device(x);
  count_digits(x.const_data_ptr<T>(), x.size(0), x.size(1), x.stride(0), prefixes.const_data_ptr<int64_t>(),
               static_cast<int>(round), output<int64_t>(digits), device.stream());
#if defined(VRM_CUDA_SHIM)
  shim::forget_buffers();
#endif
  return torch::stable::narrow(digits, 1, 0, int64_t{1} << bits);
}

Tensor cuda_digits(const Tensor& x, const Tensor& prefixes, int64_t shift, int64_t bits) {
  STD_TORCH_CHECK(x.dim() == 2, "the entropies must be [m, n], not ", sizes_of(x));
  const int64_t width = 8 * static_cast<int64_t>(x.element_size()), round = (width - shift - bits) / kDigitBits;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "the entropies must be float32 or float64, not ", name_of(x));
  STD_TORCH_CHECK(shift >= 0 && width - shift - bits == round * kDigitBits && round >= 0 &&
                      bits == (shift > 0 ? kDigitBits : width - round * kDigitBits) && bits <= kDigitBits,
                  "no round counts ", bits, " bits from bit ", shift, " on: they have ", kDigitBits,
                  " from the top, and the last what is left");
  check_device(x, "the entropies", x);
  check_dense_rows(x, "the entropies");
  check_vector(prefixes, "prefixes", 2, x);
  check_type(prefixes, "prefixes", ScalarType::Long);
  return (x.scalar_type() == ScalarType::Double ? digits_of<double> : digits_of<float>)(x, prefixes, round, bits);
}

// ---- the loss of a batch -------------------------------------------------------------------------------------------

struct CrossEntropies {
  OptionalTensor labels, class_weight;
  bool wanted[2];
  double label_smoothing;
  int64_t ignore_index;
};

template <class T> void describe(Batch<T>& b, const CrossEntropies& ce) {
  b.cross_entropy[0] = ce.wanted[0], b.cross_entropy[1] = ce.wanted[1];
  b.label_smoothing = static_cast<T>(ce.label_smoothing), b.ignore_index = ce.ignore_index;
  if (!ce.wanted[0] && !ce.wanted[1]) return;
  const Tensor& labels = *ce.labels;
  may_touch(labels, false);
  if (labels.scalar_type() == ScalarType::Long)
    b.labels = labels.const_data_ptr<int64_t>();
  else
    b.target = {labels.const_data_ptr<T>(), labels.stride(0), labels.stride(1)};
  if (!ce.class_weight.has_value()) return;
  may_touch(*ce.class_weight, false);
  b.class_weight = ce.class_weight->const_data_ptr<T>();
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Five vrm_loss(const Tensor (&student)[2], const Tensor (&teacher)[2], const CrossEntropies& ce, bool complete,
              const GraphArguments (&arguments)[2], const Settings& settings) {
  const Tensor& real = student[0];
  const bool need_grad = arguments[0].need_grad;
  const Tensor grads[2] = {gradient<T>(real, need_grad), gradient<T>(student[1], need_grad)};
  const Tensor loss = empty_like<T>(real, {}), terms = empty_like<T>(real, {4}), kept = empty_like<int64_t>(real, {2});
  Problem<T> problem{};
  problem.graphs = 2;
  Batch<T>& b = problem.batch;
  b.samples = real.size(0), b.classes = real.size(1), b.complete = complete;
  describe(b, ce);
  for (int k = 0; k < 2; ++k) {
    b.student[k] = input(student[k]), b.teacher[k] = input(teacher[k]);
    const int64_t vertices = real.size(k) * (complete ? 2 : 1);
    describe(problem.graph[k], vertices, vertices, arguments[k]);
    if (need_grad) problem.output[k].out = output<T>(grads[k]);
  }
  problem.loss_out = output<T>(loss), problem.terms_out = output<T>(terms);
  problem.kept_out = output<int64_t>(kept);
  compute(problem, settings, real);
  return {loss, grads[0], grads[1], terms, kept};
}

// Labels as the kernels read them: dense indices, or probabilities of the compute dtype.
Tensor checked_labels(const Tensor& labels, const Tensor& first, ScalarType type) {
  if (labels.scalar_type() != ScalarType::Long) {
    STD_TORCH_CHECK(labels.dim() == 2, "labels must be [", first.size(0), "] class indices in int64, or [",
                    first.size(0), ", ", first.size(1), "] class probabilities, not ", sizes_of(labels), " in ",
                    name_of(labels));
    check_matrix(labels, "labels", first.size(0), first.size(1), first);
    return convert(labels, type);
  }
  check_vector(labels, "labels", first.size(0), first);
  return labels.is_contiguous() ? labels : torch::stable::contiguous(labels);
}

Five cuda_vrm_loss(const Tensor& student_real, const Tensor& student_virtual, const Tensor& teacher_real,
                   const Tensor& teacher_virtual, const OptionalTensor& labels, const OptionalTensor& class_weight,
                   double alpha, double beta, bool ce_real, bool ce_virtual, const std::vector<int64_t>& ranks,
                   const std::vector<double>& lerp_weights, bool keep_all, double delta, double eps, bool complete,
                   double label_smoothing, int64_t ignore_index, bool need_grad, bool dense, int64_t half_level,
                   int64_t tile_edge, int64_t stored_entropy_bytes, const std::vector<int64_t>& brackets_0,
                   const std::vector<int64_t>& brackets_1) {
  check_views(student_real, student_virtual, teacher_real, teacher_virtual);
  check_settings(delta, eps);
  check_tile_edge(tile_edge);
  check_two(ranks, lerp_weights);
  for (const auto* brackets : {&brackets_0, &brackets_1}) check_brackets(*brackets);
  const Tensor student[2] = {student_real, student_virtual}, teacher[2] = {teacher_real, teacher_virtual};
  const auto type = compute_type({&student_real, &student_virtual, &teacher_real, &teacher_virtual});
  check_half_level(half_level, type, dense);
  CrossEntropies ce{{}, {}, {ce_real, ce_virtual}, label_smoothing, ignore_index};
  if (ce_real || ce_virtual) {
    STD_TORCH_CHECK(labels.has_value(), "a cross-entropy needs labels");
    ce.labels = checked_labels(*labels, student_real, type);
    if (class_weight.has_value()) {
      check_vector(*class_weight, "class_weight", student_real.size(1), student_real);
      check_float(*class_weight, "class_weight");
      ce.class_weight = torch::stable::contiguous(convert(*class_weight, type));
    }
  }
  const auto graph = [&](int k) {
    return GraphArguments{k == 0 ? brackets_0 : brackets_1, ranks[k], lerp_weights[k], delta, eps,
                          k == 0 ? alpha : beta, keep_all, complete, need_grad};
  };
  const auto compute = type == ScalarType::Double ? vrm_loss<double> : vrm_loss<float>;
  return compute(student, teacher, ce, complete, {graph(0), graph(1)},
                 {dense, half_level, tile_edge, stored_entropy_bytes});
}

std::string cuda_refusal() {
  const char* why = refusal();
  return why == nullptr ? "" : why;
}

}  // namespace
}  // namespace cuda
}  // namespace vrm

STABLE_TORCH_LIBRARY_FRAGMENT(vrm_kernels, m) {
  m.def("cuda_digits(Tensor x, Tensor prefixes, int shift, int bits) -> Tensor");
  m.def("cuda_refusal() -> str");  // why the current device cannot run the kernels; empty: it can
  m.def(
      "cuda_relation_loss(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? probs_a, Tensor? probs_b, "
      "Tensor? entropy, Tensor? threshold, Tensor? kept, int rank, float lerp_weight, float delta, float eps, bool exclude_self, bool need_grad, bool dense, "
      "int half_level, int tile_edge, int stored_entropy_bytes, int[] brackets) "
      "-> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor kept)");
  m.def(
      "cuda_vrm_loss(Tensor student_real, Tensor student_virtual, Tensor teacher_real, Tensor teacher_virtual, "
      "Tensor? labels, Tensor? class_weight, float alpha, float beta, bool ce_real, bool ce_virtual, int[] ranks, "
      "float[] lerp_weights, bool keep_all, float delta, float eps, bool complete, float label_smoothing, "
      "int ignore_index, bool need_grad, bool dense, int half_level, int tile_edge, int stored_entropy_bytes, "
      "int[] brackets_0, int[] brackets_1) -> (Tensor loss, Tensor grad_real, Tensor grad_virtual, Tensor terms, Tensor kept)");
}

STABLE_TORCH_LIBRARY_IMPL(vrm_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_refusal", TORCH_BOX(&vrm::cuda::cuda_refusal));
}

STABLE_TORCH_LIBRARY_IMPL(vrm_kernels, VRM_DISPATCH_KEY, m) {
  m.impl("cuda_digits", TORCH_BOX(&vrm::cuda::cuda_digits));
  m.impl("cuda_relation_loss", TORCH_BOX(&vrm::cuda::cuda_relation_loss));
  m.impl("cuda_vrm_loss", TORCH_BOX(&vrm::cuda::cuda_vrm_loss));
}
