// The CPU operators: arguments to the kernels' own structures, and the schemas.
#include "relation_graph.h"
#include "select.h"
#include "team.h"

#include <ATen/Parallel.h>

#include <torch/library.h>

#include <limits>
#include <tuple>

namespace vrm {
namespace {

using at::Tensor;

// Float64 if any input is, else float32; dense, so that one stride of each matrix is 1.
at::ScalarType compute_type(at::TensorList tensors) {
  for (const Tensor& x : tensors)
    if (x.scalar_type() == at::kDouble) return at::kDouble;
  return at::kFloat;
}

Tensor prepare(const Tensor& x, at::ScalarType type) {
  const Tensor y = x.to(type);
  return y.stride(1) == 1 || y.stride(0) == 1 ? y : y.contiguous();
}

template <class T> Strided<T> rows_of(const Tensor& x) { return {x.const_data_ptr<T>(), x.stride(0), x.stride(1)}; }
template <class T> Strided<T> columns_of(const Tensor& x) { return {x.const_data_ptr<T>(), x.stride(1), x.stride(0)}; }

Tensor log_probs(const Tensor& probs) { return at::add(probs, kEntropyEps).log_(); }

Tensor scalar(double value, at::ScalarType type) { return at::scalar_tensor(value, at::TensorOptions().dtype(type)); }

Tensor zero_grad(const Tensor& x, bool needed) {
  return needed ? at::zeros(x.sizes(), x.options()) : at::empty({0}, x.options());
}

// P and log(P' + 1e-7), or nothing; kept alive by the caller.
template <class T> void rank_by(GraphInput<T>& input, const Tensor& probs, const Tensor& logs) {
  input.keep_all = !probs.defined();
  if (input.keep_all) return;
  input.depth = probs.size(1);
  input.probs = rows_of<T>(probs), input.log_probs = rows_of<T>(logs);
}

template <class T> void describe(GraphInput<T>& input, const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                 const Tensor& teacher_b, const Tensor& grad_a, const Tensor& grad_b, double delta,
                                 bool exclude_self, bool need_grad) {
  input.rows = a.size(0), input.columns = b.size(0), input.dims = a.size(1);
  input.student_a = rows_of<T>(a), input.student_b = rows_of<T>(b);
  input.teacher_a = rows_of<T>(teacher_a), input.teacher_b = rows_of<T>(teacher_b);
  input.exclude_self = exclude_self, input.need_grad = need_grad;
  input.delta = delta, input.weight = 1;
  if (!need_grad) return;
  input.grad_a = {grad_a.template mutable_data_ptr<T>(), nullptr, input.rows, grad_a.stride(0), grad_a.stride(1)};
  input.grad_b = {grad_b.template mutable_data_ptr<T>(), nullptr, input.columns, grad_b.stride(0), grad_b.stride(1)};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> relation_graph(const Tensor& a, const Tensor& b, const Tensor& teacher_a,
                                                          const Tensor& teacher_b, const Tensor& probs,
                                                          const Tensor& log_probs, int64_t rank, double lerp_weight,
                                                          double delta, bool exclude_self, bool need_grad) {
  const auto grad_a = zero_grad(a, need_grad), grad_b = zero_grad(b, need_grad);
  GraphInput<T> input{};
  describe(input, a, b, teacher_a, teacher_b, grad_a, grad_b, delta, exclude_self, need_grad);
  rank_by(input, probs, log_probs);
  input.rank = rank, input.lerp_weight = lerp_weight;
  const GraphResult result = run_graphs<T>({input})[0];
  return {scalar(result.loss, a.scalar_type()), grad_a, grad_b, scalar(static_cast<double>(result.kept), at::kLong)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_relation_graph(const Tensor& a, const Tensor& b,
                                                              const Tensor& teacher_a, const Tensor& teacher_b,
                                                              const std::optional<Tensor>& probs_a,
                                                              const std::optional<Tensor>& probs_b, int64_t rank,
                                                              double lerp_weight, double delta, bool exclude_self,
                                                              bool need_grad) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto type = compute_type({a, b, teacher_a, teacher_b});
  Tensor p, l;
  if (probs_a.has_value()) {
    p = prepare(*probs_a, type);
    l = prepare(log_probs(probs_b->to(type)), type);
  }
  const auto run = type == at::kDouble ? relation_graph<double> : relation_graph<float>;
  return run(prepare(a, type), prepare(b, type), prepare(teacher_a, type), prepare(teacher_b, type), p, l, rank,
             lerp_weight, delta, exclude_self, need_grad);
}

template <class T> Tensor joint_entropy(const Tensor& probs, const Tensor& logs) {
  const int64_t rows = probs.size(0), columns = logs.size(0), pad = kEntropyPad;
  const int64_t stride = (columns + pad - 1) / pad * pad;
  const Tensor h = at::empty({rows + pad, stride}, probs.options());
  joint_entropy<T>(rows_of<T>(probs), rows_of<T>(logs), rows, columns, probs.size(1),
                   h.mutable_data_ptr<T>(), stride);
  return h.narrow(0, 0, rows).narrow(1, 0, columns);
}

Tensor cpu_joint_entropy(const Tensor& probs_a, const Tensor& log_probs_b) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto type = compute_type({probs_a, log_probs_b});
  const Tensor p = prepare(probs_a, type), l = prepare(log_probs_b, type);
  return type == at::kDouble ? joint_entropy<double>(p, l) : joint_entropy<float>(p, l);
}

// Of a matrix with dense rows.
template <class T>
void count_matrix(const Tensor& x, int64_t prefix, int64_t shift, int64_t bits, int64_t* counts) {
  const T* data = x.const_data_ptr<T>();
  const int64_t rows = x.size(0), columns = x.size(1), stride = x.stride(0), size = int64_t{1} << bits;
  const int64_t parts = at::in_parallel_region() || rows * columns < 16 * size ? 1 : at::get_num_threads();
  std::vector<std::vector<int64_t>> partial(parts, std::vector<int64_t>(size, 0));
  Team::run(parts, [&](Team& team) {
    team.for_each(parts, [&](int64_t part) {
      std::vector<int32_t> few(kCountSets * size, 0);
      const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
      const int64_t most = std::max<int64_t>(1, (int64_t{1} << 30) / columns);  // rows that cannot overflow a count
      for (int64_t i = begin; i < end; ++i) {
        count_digits(data + i * stride, columns, prefix, static_cast<int>(shift), static_cast<int>(bits), few.data());
        if (i + 1 < end && (i + 1 - begin) % most != 0) continue;
        for (int64_t d = 0; d < kCountSets * size; ++d) partial[part][d % size] += few[d];
        few.assign(few.size(), 0);
      }
    });
  });
  for (const auto& of_part : partial)
    for (int64_t d = 0; d < size; ++d) counts[d] += of_part[d];
}

Tensor cpu_count_digits(const Tensor& x, const Tensor& prefixes, int64_t shift, int64_t bits) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor rows = x.stride(1) == 1 ? x : x.contiguous(), wanted = prefixes.contiguous();
  const Tensor counts = at::zeros({wanted.size(0), int64_t{1} << bits}, wanted.options());
  const auto run = rows.scalar_type() == at::kDouble ? count_matrix<double> : count_matrix<float>;
  const int64_t* prefix = wanted.const_data_ptr<int64_t>();
  for (int64_t p = 0; p < wanted.size(0); ++p) {
    int64_t* of_prefix = counts.mutable_data_ptr<int64_t>() + (p << bits);
    if (p > 0 && prefix[p] == prefix[p - 1]) {
      std::copy(of_prefix - (int64_t{1} << bits), of_prefix, of_prefix);
    } else {
      run(rows, prefix[p], shift, bits, of_prefix);
    }
  }
  return counts;
}

template <class T>
Tensor relation_share(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                      const Tensor& probs, const Tensor& logs, const Tensor& entropy, const Tensor& grad_a,
                      const Tensor& grad_b, double threshold, int64_t kept, double edges, double weight, double delta,
                      bool exclude_self, bool need_grad) {
  GraphInput<T> input{};
  describe(input, a, b, teacher_a, teacher_b, grad_a, grad_b, delta, exclude_self, need_grad);
  rank_by(input, probs, logs);
  if (entropy.defined()) {
    input.keep_all = false;
    input.entropy = entropy.const_data_ptr<T>(), input.entropy_stride = entropy.stride(0);
  }
  input.weight = weight;
  input.share = true, input.edges = edges, input.threshold = threshold, input.kept = kept;
  return scalar(run_graphs<T>({input})[0].loss, a.scalar_type());
}

// The caller's gradients are added to: those of many shares end in one matrix.
Tensor cpu_relation_share(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                          const std::optional<Tensor>& probs_a, const std::optional<Tensor>& log_probs_b,
                          const std::optional<Tensor>& entropy, Tensor& grad_a, Tensor& grad_b, double threshold,
                          int64_t kept, double edges, double weight, double delta, bool exclude_self, bool need_grad) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto type = compute_type({a, b, teacher_a, teacher_b});
  Tensor p, l, h;
  if (entropy.has_value()) {
    h = *entropy;  // of cpu_joint_entropy, which left room behind every row
  } else if (probs_a.has_value()) {
    p = prepare(*probs_a, type);
    l = prepare(*log_probs_b, type);
  }
  const auto run = type == at::kDouble ? relation_share<double> : relation_share<float>;
  return run(prepare(a, type), prepare(b, type), prepare(teacher_a, type), prepare(teacher_b, type), p, l, h, grad_a,
             grad_b, threshold, kept, edges, weight, delta, exclude_self, need_grad);
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Five vrm_graphs(const Tensor& student_real, const Tensor& student_virtual, const Tensor& teacher_real,
                const Tensor& teacher_virtual, double alpha, double beta, at::IntArrayRef ranks,
                at::ArrayRef<double> lerp_weights, bool keep_all, double delta, bool complete, bool need_grad) {
  const int64_t samples = student_real.size(0), classes = student_real.size(1);
  const auto grad_real = zero_grad(student_real, need_grad), grad_virtual = zero_grad(student_virtual, need_grad);
  Tensor p_real, p_virtual, l_real, l_virtual;
  if (!keep_all) {
    p_real = at::softmax(student_real, 1);
    p_virtual = at::softmax(student_virtual, 1);
    l_virtual = log_probs(p_virtual);
    if (complete) l_real = log_probs(p_real);
  }
  std::vector<Tensor> alive;
  std::vector<GraphInput<T>> inputs;
  for (int graph = 0; graph < 2; ++graph) {
    const bool by_class = graph == 1;
    // One side's matrix: the first view's or the second's, or both views' vertices in one set.
    const auto side = [&](const Tensor& real, const Tensor& virtual_view, bool second) {
      if (!real.defined() && !virtual_view.defined()) return Strided<T>{};
      Tensor x = second ? virtual_view : real;
      if (complete) {
        x = at::cat({real, virtual_view}, by_class ? 1 : 0);
        alive.push_back(x);
      }
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
      input.probs = side(p_real, p_virtual, false);
      input.log_probs = side(complete ? l_real : l_virtual, l_virtual, true);
    }
    input.exclude_self = complete, input.need_grad = need_grad;
    input.rank = ranks[graph], input.lerp_weight = lerp_weights[graph];
    input.delta = delta, input.weight = by_class ? beta : alpha;
    T *real = grad_real.template mutable_data_ptr<T>(), *virtual_view = grad_virtual.template mutable_data_ptr<T>();
    const int64_t vertex_stride = by_class ? 1 : classes, dim_stride = by_class ? classes : 1;
    input.grad_a = {real, virtual_view, vertices, vertex_stride, dim_stride};
    input.grad_b = {virtual_view, nullptr, vertices, vertex_stride, dim_stride};
    if (complete) input.grad_b = input.grad_a;
    inputs.push_back(input);
  }
  const auto results = run_graphs<T>(inputs);
  const auto terms = at::empty({2}, student_real.options());
  const auto kept = at::empty({2}, at::TensorOptions().dtype(at::kLong));
  for (int graph = 0; graph < 2; ++graph) {
    terms.template mutable_data_ptr<T>()[graph] = static_cast<T>(results[graph].loss);
    kept.template mutable_data_ptr<int64_t>()[graph] = results[graph].kept;
  }
  const auto type = student_real.scalar_type();
  return {scalar(alpha * results[0].loss + beta * results[1].loss, type), grad_real, grad_virtual, terms, kept};
}

Five cpu_vrm_graphs(const Tensor& student_real, const Tensor& student_virtual, const Tensor& teacher_real,
                    const Tensor& teacher_virtual, double alpha, double beta, at::IntArrayRef ranks,
                    at::ArrayRef<double> lerp_weights, bool keep_all, double delta, bool complete, bool need_grad) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto type = compute_type({student_real, student_virtual, teacher_real, teacher_virtual});
  const auto dense = [type](const Tensor& x) { return x.to(type).contiguous(); };
  const auto run = type == at::kDouble ? vrm_graphs<double> : vrm_graphs<float>;
  return run(dense(student_real), dense(student_virtual), dense(teacher_real), dense(teacher_virtual), alpha, beta,
             ranks, lerp_weights, keep_all, delta, complete, need_grad);
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
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor values = x.contiguous(), ranks = below.contiguous(), weights = weight.contiguous();
  const Tensor low = at::empty_like(ranks, values.options()), high = at::empty_like(low);
  const auto run = values.scalar_type() == at::kDouble ? quantiles<double> : quantiles<float>;
  run(values, ranks, weights, low, high);
  return at::lerp(low, high, weights);
}

}  // namespace
}  // namespace vrm

TORCH_LIBRARY_FRAGMENT(vrm_kernels, m) {
  m.def(
      "cpu_relation_graph(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? probs_a, Tensor? probs_b, "
      "int rank, float lerp_weight, float delta, bool exclude_self, bool need_grad) "
      "-> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor kept)");
  m.def(
      "cpu_vrm_graphs(Tensor student_real, Tensor student_virtual, Tensor teacher_real, Tensor teacher_virtual, "
      "float alpha, float beta, int[] ranks, float[] lerp_weights, bool keep_all, float delta, bool complete, "
      "bool need_grad) -> (Tensor loss, Tensor grad_real, Tensor grad_virtual, Tensor terms, Tensor kept)");
  m.def("cpu_joint_entropy(Tensor probs_a, Tensor log_probs_b) -> Tensor");
  m.def("cpu_count_digits(Tensor x, Tensor prefixes, int shift, int bits) -> Tensor");
  m.def(
      "cpu_relation_share(Tensor a, Tensor b, Tensor teacher_a, Tensor teacher_b, Tensor? probs_a, "
      "Tensor? log_probs_b, Tensor? entropy, Tensor(a!) grad_a, Tensor(b!) grad_b, float threshold, int kept, float edges, float weight, "
      "float delta, bool exclude_self, bool need_grad) -> Tensor");
  m.def("cpu_quantile(Tensor x, Tensor below, Tensor weight) -> Tensor");
}

TORCH_LIBRARY_IMPL(vrm_kernels, CPU, m) {
  m.impl("cpu_relation_graph", vrm::cpu_relation_graph);
  m.impl("cpu_vrm_graphs", vrm::cpu_vrm_graphs);
  m.impl("cpu_joint_entropy", vrm::cpu_joint_entropy);
  m.impl("cpu_count_digits", vrm::cpu_count_digits);
  m.impl("cpu_relation_share", vrm::cpu_relation_share);
  m.impl("cpu_quantile", vrm::cpu_quantile);
}
