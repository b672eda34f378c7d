// The CPU operators: arguments to the kernels' own structures, and the schemas.
#include "../stable.h"
#include "relation_graph.h"
#include "select.h"
#include "stages.h"

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace vrm {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Brings tensors to one dtype and makes them dense, so that one stride of each matrix is 1.
Tensor prepare(const Tensor& x, ScalarType type) {
  const Tensor y = convert(x, type);
  return y.stride(1) == 1 || y.stride(0) == 1 ? y : torch::stable::contiguous(y);
}

// The two tensors of one side are dense the same way.
std::pair<Tensor, Tensor> prepare_side(const Tensor& student, const Tensor& teacher, ScalarType type) {
  const Tensor s = prepare(student, type), t = prepare(teacher, type);
  if ((s.stride(1) == 1 && t.stride(1) == 1) || (s.stride(0) == 1 && t.stride(0) == 1)) return {s, t};
  return {torch::stable::contiguous(s), torch::stable::contiguous(t)};
}

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

template <class T> Strided<T> rows_of(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1)};
}
template <class T> Strided<T> columns_of(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(1), x.stride(0)};
}

template <class T> Tensor scalar(const Tensor& like, T value) {
  const Tensor x = empty_like<T>(like, {});
  *x.mutable_data_ptr<T>() = value;
  return x;
}

template <class T> Tensor zero_grad(const Tensor& x, bool needed) {
  if (!needed) return empty_like<T>(x, {0});
  Tensor grad = empty_like<T>(x, {x.size(0), x.size(1)});
  check(aoti_torch_zero_(grad.get()));
  return grad;
}

// P and log(P' + 1e-7), or nothing; kept alive by the caller.
template <class T> void rank_by(GraphInput<T>& input, const OptionalTensor& probs, const OptionalTensor& logs) {
  input.keep_all = !probs.has_value();
  if (input.keep_all) return;
  input.depth = probs->size(1);
  input.probs = rows_of<T>(*probs), input.log_probs = rows_of<T>(*logs);
}

// Which of the edges' entropies the threshold is; a graph without edges has none.
template <class T> void rank_at(GraphInput<T>& input, int64_t rank, double lerp_weight) {
  const int64_t edges = input.rows * input.columns - (input.exclude_self ? input.rows : 0);
  if (edges == 0) input.keep_all = true;
  if (input.keep_all) return;
  check_rank(rank, lerp_weight, edges);
  input.rank = rank, input.lerp_weight = lerp_weight;
}

template <class T> void describe(GraphInput<T>& input, const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                 const Tensor& teacher_b, const Tensor& grad_a, const Tensor& grad_b, double delta,
                                 double eps, bool exclude_self, bool need_grad) {
  input.rows = a.size(0), input.columns = b.size(0), input.dims = a.size(1);
  input.student_a = rows_of<T>(a), input.student_b = rows_of<T>(b);
  input.teacher_a = rows_of<T>(teacher_a), input.teacher_b = rows_of<T>(teacher_b);
  input.exclude_self = exclude_self, input.need_grad = need_grad;
  input.delta = delta, input.eps = eps, input.weight = 1;
  if (!need_grad) return;
  input.grad_a = {{grad_a.mutable_data_ptr<T>(), nullptr}, input.rows, grad_a.stride(0), grad_a.stride(1)};
  input.grad_b = {{nullptr, grad_b.mutable_data_ptr<T>()}, 0, grad_b.stride(0), grad_b.stride(1)};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> relation_graph(const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                                          const Tensor& teacher_b, const OptionalTensor& probs,
                                                          const OptionalTensor& logs, int64_t rank, double lerp_weight,
                                                          double delta, double eps, bool exclude_self, bool need_grad) {
  const Tensor grad_a = zero_grad<T>(a, need_grad), grad_b = zero_grad<T>(b, need_grad);
  GraphInput<T> input{};
  describe(input, a, b, teacher_a, teacher_b, grad_a, grad_b, delta, eps, exclude_self, need_grad);
  rank_by(input, probs, logs);
  rank_at(input, rank, lerp_weight);
  const GraphResult result = run_graphs<T>({input})[0];
  return {scalar<T>(a, static_cast<T>(result.loss)), grad_a, grad_b, scalar<int64_t>(a, result.kept)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_relation_graph(const Tensor& a, const Tensor& b,
                                                              const Tensor& teacher_a, const Tensor& teacher_b,
                                                              const OptionalTensor& probs_a,
                                                              const OptionalTensor& probs_b, int64_t rank,
                                                              double lerp_weight, double delta, double eps, bool exclude_self,
                                                              bool need_grad) {
  const auto type = compute_type({&a, &b, &teacher_a, &teacher_b});
  OptionalTensor p, l;
  if (probs_a.has_value()) {
    p = prepare(*probs_a, type);
    l = prepare(log_of(convert(*probs_b, type), kEntropyEps), type);
  }
  const auto run = type == ScalarType::Double ? relation_graph<double> : relation_graph<float>;
  const auto [student_a, fixed_a] = prepare_side(a, teacher_a, type);
  const auto [student_b, fixed_b] = prepare_side(b, teacher_b, type);
  return run(student_a, student_b, fixed_a, fixed_b, p, l, rank,
             lerp_weight, delta, eps, exclude_self, need_grad);
}

// Entropies lie in whole panels, so that kernels write panels and read registers.
template <class T> Tensor empty_entropy(const Tensor& like, int64_t rows, int64_t columns) {
  constexpr int64_t pad = kEntropyPad;
  Tensor h = empty_like<T>(like, {rows + pad, (columns + pad - 1) / pad * pad});
  h = torch::stable::narrow(h, 0, 0, rows);
  return torch::stable::narrow(h, 1, 0, columns);
}

template <class T> Tensor joint_entropy(const Tensor& probs, const Tensor& logs) {
  const int64_t rows = probs.size(0), columns = logs.size(0);
  const Tensor h = empty_entropy<T>(probs, rows, columns);
  joint_entropy<T>(rows_of<T>(probs), rows_of<T>(logs), rows, columns, probs.size(1), h.mutable_data_ptr<T>(), h.stride(0));
  return h;
}

Tensor cpu_joint_entropy(const Tensor& probs_a, const Tensor& log_probs_b) {
  const auto type = compute_type({&probs_a, &log_probs_b});
  const Tensor p = prepare(probs_a, type), l = prepare(log_probs_b, type);
  return type == ScalarType::Double ? joint_entropy<double>(p, l) : joint_entropy<float>(p, l);
}

template <class T>
void count_prefixes(const Tensor& x, const int64_t* prefixes, int64_t n, int64_t shift, int64_t bits, int64_t* counts) {
  for (int64_t p = 0; p < n; ++p, counts += int64_t{1} << bits) {
    if (p > 0 && prefixes[p] == prefixes[p - 1]) {
      std::copy(counts - (int64_t{1} << bits), counts, counts);
    } else {
      count_matrix(x.const_data_ptr<T>(), x.size(0), x.size(1), x.stride(0), prefixes[p], static_cast<int>(shift),
                   static_cast<int>(bits), counts);
    }
  }
}

Tensor cpu_count_digits(const Tensor& x, const Tensor& prefixes, int64_t shift, int64_t bits) {
  const Tensor rows = x.stride(1) == 1 ? x : torch::stable::contiguous(x), wanted = dense(prefixes);
  const int64_t n = wanted.size(0);
  const Tensor counts = empty_like<int64_t>(wanted, {n, int64_t{1} << bits});
  check(aoti_torch_zero_(counts.get()));
  const auto run = rows.scalar_type() == ScalarType::Double ? count_prefixes<double> : count_prefixes<float>;
  run(rows, wanted.const_data_ptr<int64_t>(), n, shift, bits, counts.mutable_data_ptr<int64_t>());
  return counts;
}

template <class T> std::tuple<Tensor, Tensor> split(const Tensor& x, double low, double high) {
  std::vector<T> found;
  const Outside outside = split_matrix(x.const_data_ptr<T>(), x.size(0), x.size(1), x.stride(0), static_cast<T>(low),
                                       static_cast<T>(high), found);
  const Tensor counts = empty_like<int64_t>(x, {3}), inside = empty_like<T>(x, {static_cast<int64_t>(found.size())});
  int64_t* const out = counts.mutable_data_ptr<int64_t>();
  out[0] = outside.below, out[1] = outside.at_low, out[2] = outside.at_high;
  std::copy(found.begin(), found.end(), inside.mutable_data_ptr<T>());
  return {counts, inside};
}

std::tuple<Tensor, Tensor> cpu_split(const Tensor& x, double low, double high) {
  const Tensor rows = x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  return (rows.scalar_type() == ScalarType::Double ? split<double> : split<float>)(rows, low, high);
}

template <class T>
Tensor relation_share(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                      const OptionalTensor& probs, const OptionalTensor& logs, const OptionalTensor& entropy,
                      const Tensor& grad_a, const Tensor& grad_b, double threshold, int64_t kept, double edges, double weight, double delta,
                      double eps, bool exclude_self, bool need_grad) {
  GraphInput<T> input{};
  describe(input, a, b, teacher_a, teacher_b, grad_a, grad_b, delta, eps, exclude_self, need_grad);
  rank_by(input, probs, logs);
  OptionalTensor h = entropy;
  if (h.has_value()) {
    if (h->stride(1) != 1 || h->stride(0) % kEntropyPad != 0) {  // not of cpu_joint_entropy
      h = empty_entropy<T>(a, a.size(0), b.size(0));
      torch::stable::copy_(*h, *entropy);
    }
    input.keep_all = false;
    input.entropy = h->const_data_ptr<T>(), input.entropy_stride = h->stride(0);
  }
  input.weight = weight;
  input.share = true, input.edges = edges, input.threshold = threshold, input.kept = kept;
  return scalar<T>(a, static_cast<T>(run_graphs<T>({input})[0].loss));
}

// What a kernel reads or writes as it is.
void check_given(const Tensor& x, const char* name, int64_t rows, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns && x.scalar_type() == type, name, " must be [",
                  rows, ", ", columns, "] of ", torch::headeronly::toString(type), ", not ", sizes_of(x), " of ", name_of(x));
}

// Adds to the caller's gradients, because those of many shares end in one matrix.
Tensor cpu_relation_share(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                          const OptionalTensor& probs_a, const OptionalTensor& log_probs_b,
                          const OptionalTensor& entropy, const Tensor& grad_a, const Tensor& grad_b, double threshold,
                          int64_t kept, double edges, double weight, double delta, double eps, bool exclude_self, bool need_grad) {
  const auto type = compute_type({&a, &b, &teacher_a, &teacher_b});
  if (entropy.has_value()) check_given(*entropy, "entropy", a.size(0), b.size(0), type);
  if (need_grad) {
    check_given(grad_a, "grad_a", a.size(0), a.size(1), type);
    check_given(grad_b, "grad_b", b.size(0), a.size(1), type);
  }
  OptionalTensor p, l;
  if (!entropy.has_value() && probs_a.has_value()) {
    p = prepare(*probs_a, type);
    l = prepare(*log_probs_b, type);
  }
  const auto run = type == ScalarType::Double ? relation_share<double> : relation_share<float>;
  const auto [student_a, fixed_a] = prepare_side(a, teacher_a, type);
  const auto [student_b, fixed_b] = prepare_side(b, teacher_b, type);
  return run(student_a, student_b, fixed_a, fixed_b, p, l, entropy, grad_a,
             grad_b, threshold, kept, edges, weight, delta, eps, exclude_self, need_grad);
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Settings {
  double alpha, beta;
  bool ce_real, ce_virtual;
  const std::vector<int64_t>& ranks;
  const std::vector<double>& lerp_weights;
  bool keep_all;
  double delta, eps;
  bool complete;
  double label_smoothing;
  int64_t ignore_index;
  bool need_grad;
};

template <class T> T* writable(const OptionalTensor& x) { return x.has_value() ? x->mutable_data_ptr<T>() : nullptr; }

template <class T>
Five vrm_loss(const Tensor& student_real, const Tensor& student_virtual, const Tensor& teacher_real,
              const Tensor& teacher_virtual, const OptionalTensor& labels, const OptionalTensor& class_weight,
              const Settings& settings) {
  const int64_t samples = student_real.size(0), classes = student_real.size(1);
  const bool complete = settings.complete, keep_all = settings.keep_all, need_grad = settings.need_grad;
  const auto matrix = [&](bool wanted) {
    return wanted ? OptionalTensor(empty_like<T>(student_real, {samples, classes})) : OptionalTensor();
  };
  const Tensor grad_real = need_grad ? *matrix(true) : empty_like<T>(student_real, {0});
  const Tensor grad_virtual = need_grad ? *matrix(true) : empty_like<T>(student_real, {0});
  // An edge's entropy takes P of its first vertex and log P' of its second.
  const OptionalTensor p_real = matrix(!keep_all), p_virtual = matrix(!keep_all && complete);
  const OptionalTensor l_real = matrix(!keep_all && complete), l_virtual = matrix(!keep_all);

  SoftmaxInput<T> softmax{};
  softmax.views[0] = {student_real.const_data_ptr<T>(), writable<T>(p_real), writable<T>(l_real),
                      need_grad ? grad_real.mutable_data_ptr<T>() : nullptr, settings.ce_real};
  softmax.views[1] = {student_virtual.const_data_ptr<T>(), writable<T>(p_virtual), writable<T>(l_virtual),
                      need_grad ? grad_virtual.mutable_data_ptr<T>() : nullptr, settings.ce_virtual};
  softmax.samples = samples, softmax.classes = classes;
  if (labels.has_value() && labels->dim() == 1) softmax.labels = labels->const_data_ptr<int64_t>();
  if (labels.has_value() && labels->dim() == 2) softmax.target = labels->const_data_ptr<T>();
  if (class_weight.has_value()) softmax.weight = class_weight->const_data_ptr<T>();
  softmax.label_smoothing = settings.label_smoothing, softmax.ignore_index = settings.ignore_index;

  LossResult result;
  if (complete) result = run_loss<T>(softmax, {});  // first, because both views' vertices are stacked from what it writes
  std::vector<Tensor> alive;
  std::vector<GraphInput<T>> inputs;
  for (int graph = 0; graph < 2; ++graph) {
    const bool by_class = graph == 1;
    // One side's matrix: the first view's or the second's, or both views' vertices in one set.
    const auto side = [&](const Tensor& real, const Tensor& virtual_view, bool second) {
      if (complete) alive.push_back(aten("aten::cat", "", std::vector{real, virtual_view}, int64_t{by_class}));
      const Tensor& x = complete ? alive.back() : second ? virtual_view
                                                         : real;
      return by_class ? columns_of<T>(x) : rows_of<T>(x);
    };
    GraphInput<T> input{};
    const int64_t vertices = by_class ? classes : samples;
    input.rows = input.columns = complete ? 2 * vertices : vertices;
    input.dims = input.depth = by_class ? samples : classes;
    input.student_a = side(student_real, student_virtual, false);
    input.teacher_a = side(teacher_real, teacher_virtual, false);
    input.student_b = complete ? input.student_a : side(student_real, student_virtual, true);
    input.teacher_b = complete ? input.teacher_a : side(teacher_real, teacher_virtual, true);
    input.keep_all = keep_all;
    if (!keep_all) {
      input.probs = side(*p_real, *p_virtual, false);
      input.log_probs = side(complete ? *l_real : *l_virtual, *l_virtual, true);
    }
    input.exclude_self = complete, input.need_grad = need_grad;
    rank_at(input, settings.ranks[graph], settings.lerp_weights[graph]);
    input.delta = settings.delta, input.eps = settings.eps, input.weight = by_class ? settings.beta : settings.alpha;
    T *real = grad_real.mutable_data_ptr<T>(), *virtual_view = grad_virtual.mutable_data_ptr<T>();
    const int64_t vertex_stride = by_class ? 1 : classes, dim_stride = by_class ? classes : 1;
    input.grad_a = {{real, virtual_view}, vertices, vertex_stride, dim_stride};
    input.grad_b = {{real, virtual_view}, complete ? vertices : 0, vertex_stride, dim_stride};
    inputs.push_back(input);
  }
  if (complete) {
    result.graphs = run_graphs<T>(inputs);
  } else {
    result = run_loss<T>(softmax, inputs);
  }
  const Tensor terms = empty_like<T>(student_real, {4}), kept = empty_like<int64_t>(student_real, {2});
  double loss = 0;
  for (int k = 0; k < 2; ++k) {
    terms.mutable_data_ptr<T>()[k] = static_cast<T>(result.cross_entropies[k]);
    terms.mutable_data_ptr<T>()[2 + k] = static_cast<T>(result.graphs[k].loss);
    kept.mutable_data_ptr<int64_t>()[k] = result.graphs[k].kept;
    loss += result.cross_entropies[k] + (k == 0 ? settings.alpha : settings.beta) * result.graphs[k].loss;
  }
  return {scalar<T>(student_real, static_cast<T>(loss)), grad_real, grad_virtual, terms, kept};
}

Five cpu_vrm_loss(const Tensor& student_real, const Tensor& student_virtual, const Tensor& teacher_real,
                  const Tensor& teacher_virtual, const OptionalTensor& labels, const OptionalTensor& class_weight,
                  double alpha, double beta, bool ce_real, bool ce_virtual, const std::vector<int64_t>& ranks,
                  const std::vector<double>& lerp_weights, bool keep_all, double delta, double eps, bool complete,
                  double label_smoothing, int64_t ignore_index, bool need_grad) {
  const auto type = compute_type({&student_real, &student_virtual, &teacher_real, &teacher_virtual});
  const auto given = [type](const Tensor& x) { return dense(convert(x, type)); };
  const auto run = type == ScalarType::Double ? vrm_loss<double> : vrm_loss<float>;
  OptionalTensor dense_labels, dense_weight;
  if (labels.has_value()) dense_labels = labels->dim() == 1 ? dense(*labels) : given(*labels);
  if (class_weight.has_value()) dense_weight = given(*class_weight);
  return run(given(student_real), given(student_virtual), given(teacher_real), given(teacher_virtual), dense_labels,
             dense_weight,
             {alpha, beta, ce_real, ce_virtual, ranks, lerp_weights, keep_all, delta, eps, complete, label_smoothing,
              ignore_index, need_grad});
}

template <class T> void quantiles(const Tensor& x, const Tensor& below, const Tensor& weight, const Tensor& low,
                                  const Tensor& high) {
  for (int64_t k = 0; k < below.numel(); ++k) {
    T &low_k = low.mutable_data_ptr<T>()[k], &high_k = high.mutable_data_ptr<T>()[k];
    order_statistics(x.const_data_ptr<T>(), x.numel(), below.const_data_ptr<int64_t>()[k], &low_k, &high_k);
    if (weight.const_data_ptr<T>()[k] == T(0)) high_k = low_k;  // beside an infinity a product would make NaN of it
  }
}

Tensor cpu_quantile(const Tensor& x, const Tensor& below, const Tensor& weight) {
  const Tensor values = dense(x), ranks = dense(below), weights = dense(weight);
  const Tensor low = torch::stable::empty_like(weights), high = torch::stable::empty_like(weights);
  const auto run = values.scalar_type() == ScalarType::Double ? quantiles<double> : quantiles<float>;
  run(values, ranks, weights, low, high);
  return aten("aten::lerp", "Tensor", low, high, weights);
}

std::string cpu_isa() { return current_isa(); }

void cpu_select_isa(const std::string& isa) {
  if (!select_isa(isa.c_str())) throw std::invalid_argument("this processor does not run '" + isa + "'");
}

void cpu_set_edges_form(const std::string& form) {
  if (form != "measured" && form != "kept_only" && form != "dense")
    throw std::invalid_argument("the form is 'measured', 'kept_only' or 'dense', not '" + form + "'");
  set_edges_form(form == "dense"       ? EdgesForm::dense
                 : form == "kept_only" ? EdgesForm::kept_only
                                       : EdgesForm::measured);
}

std::vector<double> cpu_take_stage_seconds() {
  std::vector<double> seconds;
  for (auto& nanoseconds : stage_nanoseconds) seconds.push_back(1e-9 * static_cast<double>(nanoseconds.exchange(0)));
  return seconds;
}

}  // namespace
}  // namespace vrm

STABLE_TORCH_LIBRARY_FRAGMENT(vrm_kernels, m) {
  m.def(
      "cpu_relation_graph(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? probs_a, Tensor? probs_b, "
      "int rank, float lerp_weight, float delta, float eps, bool exclude_self, bool need_grad) "
      "-> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor kept)");
  m.def(
      "cpu_vrm_loss(Tensor student_real, Tensor student_virtual, Tensor teacher_real, Tensor teacher_virtual, "
      "Tensor? labels, Tensor? class_weight, float alpha, float beta, bool ce_real, bool ce_virtual, int[] ranks, "
      "float[] lerp_weights, bool keep_all, float delta, float eps, bool complete, float label_smoothing, "
      "int ignore_index, bool need_grad) "
      "-> (Tensor loss, Tensor grad_real, Tensor grad_virtual, Tensor terms, Tensor kept)");
  m.def("cpu_joint_entropy(Tensor probs_a, Tensor log_probs_b) -> Tensor");
  m.def("cpu_count_digits(Tensor x, Tensor prefixes, int shift, int bits) -> Tensor");
  m.def("cpu_split(Tensor x, float low, float high) -> (Tensor outside, Tensor inside)");
  m.def(
      "cpu_relation_share(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? probs_a, "
      "Tensor? log_probs_b, Tensor? entropy, Tensor(a!) grad_a, Tensor(b!) grad_b, float threshold, int kept, "
      "float edges, float weight, float delta, float eps, bool exclude_self, bool need_grad) -> Tensor");
  m.def("cpu_quantile(Tensor x, Tensor below, Tensor weight) -> Tensor");
  // The instruction set that the kernels use; for tests: use "avx512", "avx2" or "portable", or "" for the best.
  m.def("cpu_isa() -> str");
  m.def("cpu_select_isa(str isa) -> ()");
  m.def("cpu_set_edges_form(str form) -> ()");  // for tests and measurements: how the edges are visited from now on
  m.def("cpu_take_stage_seconds() -> float[]");  // in each of stages.h since the last call, summed over graphs
}

STABLE_TORCH_LIBRARY_IMPL(vrm_kernels, CPU, m) {
  m.impl("cpu_relation_graph", TORCH_BOX(&vrm::cpu_relation_graph));
  m.impl("cpu_vrm_loss", TORCH_BOX(&vrm::cpu_vrm_loss));
  m.impl("cpu_joint_entropy", TORCH_BOX(&vrm::cpu_joint_entropy));
  m.impl("cpu_count_digits", TORCH_BOX(&vrm::cpu_count_digits));
  m.impl("cpu_split", TORCH_BOX(&vrm::cpu_split));
  m.impl("cpu_relation_share", TORCH_BOX(&vrm::cpu_relation_share));
  m.impl("cpu_quantile", TORCH_BOX(&vrm::cpu_quantile));
}

STABLE_TORCH_LIBRARY_IMPL(vrm_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&vrm::cpu_isa));
  m.impl("cpu_select_isa", TORCH_BOX(&vrm::cpu_select_isa));
  m.impl("cpu_set_edges_form", TORCH_BOX(&vrm::cpu_set_edges_form));
  m.impl("cpu_take_stage_seconds", TORCH_BOX(&vrm::cpu_take_stage_seconds));
}
