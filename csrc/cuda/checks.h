// What the operators refuse before any work, in words for the person who gets them. The public functions refuse the
// same earlier; these are for who calls the operators.
#pragma once

#include "../stable.h"
#include "problem.h"

#include <cuda_runtime_api.h>

#include <optional>
#include <string>
#include <vector>

namespace vrm {
namespace cuda {

using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::DeviceType;

#if defined(VRM_CUDA_SHIM)  // the tests run all of this on the host
constexpr DeviceType kDevice = DeviceType::CPU;
#else
constexpr DeviceType kDevice = DeviceType::CUDA;
#endif

inline void check_device(const Tensor& x, const char* name, const Tensor& first) {
  STD_TORCH_CHECK(x.device().type() == kDevice && x.get_device_index() == first.get_device_index(), name,
                  " must be on the CUDA device of the first argument");
}

inline void check_float(const Tensor& x, const char* name) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  name, " must be float64, float32, bfloat16 or float16, not ", name_of(x));
}

inline void check_type(const Tensor& x, const char* name, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", not ", name_of(x));
}

inline void check_matrix(const Tensor& x, const char* name, int64_t rows, int64_t columns, const Tensor& first) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, " must be [", rows, ", ", columns,
                  "], not ", sizes_of(x));
  check_float(x, name);
  check_device(x, name, first);
}

inline void check_vector(const Tensor& x, const char* name, int64_t size, const Tensor& first) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size, name, " must be [", size, "], not ", sizes_of(x));
  check_device(x, name, first);
}

// The rows of a matrix that a kernel reads in place.
inline void check_dense_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, name, " must have dense rows, not a stride of ", x.stride(1));
}

inline void check_scalar(const Tensor& x, const char* name, ScalarType type, const Tensor& first) {
  STD_TORCH_CHECK(x.numel() == 1, name, " must be one number, not ", sizes_of(x));
  check_type(x, name, type);
  check_device(x, name, first);
}

// The vectors of both sides of a graph.
inline void check_sides(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a and b must be [M, D] and [N, D], not ", sizes_of(a), " and ",
                  sizes_of(b));
  check_matrix(a, "a", a.size(0), a.size(1), a);
  check_matrix(b, "b", b.size(0), a.size(1), a);
  check_matrix(teacher_a, "teacher_a", a.size(0), a.size(1), a);
  check_matrix(teacher_b, "teacher_b", b.size(0), a.size(1), a);
}

inline void check_graph(const Tensor& a, const Tensor& b, const Tensor& teacher_a, const Tensor& teacher_b,
                        const OptionalTensor& probs_a, const OptionalTensor& probs_b, bool exclude_self,
                        bool share = false) {
  check_sides(a, b, teacher_a, teacher_b);
  STD_TORCH_CHECK(!exclude_self || share || a.size(0) == b.size(0), "one vertex set on both sides has one size, not ", a.size(0),
                  " and ", b.size(0));
  STD_TORCH_CHECK(a.numel() > 0 && b.numel() > 0, "a and b must not be empty: they are ", sizes_of(a), " and ",
                  sizes_of(b));
  STD_TORCH_CHECK(probs_a.has_value() == probs_b.has_value(), "probs are given for both sides or for none");
  if (!probs_a.has_value()) return;
  STD_TORCH_CHECK(probs_a->dim() == 2 && probs_a->size(1) > 0, "probs_a must be [", a.size(0), ", K], not ",
                  sizes_of(*probs_a));
  check_matrix(*probs_a, "probs_a", a.size(0), probs_a->size(1), a);
  check_matrix(*probs_b, "probs_b", b.size(0), probs_a->size(1), a);
}

// What a share of a graph is given: entropies, or none where every edge is kept; the threshold and the kept count.
inline void check_given(const Tensor& a, const Tensor& b, const OptionalTensor& entropy,
                        const OptionalTensor& threshold, const OptionalTensor& kept, bool ranked, ScalarType type) {
  STD_TORCH_CHECK(threshold.has_value() == kept.has_value(), "a threshold and a kept count are given both or neither");
  STD_TORCH_CHECK(kept.has_value() || !entropy.has_value(), "entropies are given with a threshold and a kept count");
  if (!kept.has_value()) return;
  STD_TORCH_CHECK(!ranked, "probs rank the edges of a whole graph, and a threshold is given for a share: not both");
  check_scalar(*threshold, "threshold", type, a);
  check_scalar(*kept, "kept", ScalarType::Long, a);
  if (!entropy.has_value()) return;
  check_matrix(*entropy, "entropy", a.size(0), b.size(0), a);
  check_type(*entropy, "entropy", type);
}

inline void check_views(const Tensor& student_real, const Tensor& student_virtual, const Tensor& teacher_real,
                        const Tensor& teacher_virtual) {
  STD_TORCH_CHECK(student_real.dim() == 2 && student_real.numel() > 0, "logits must be [B, C], and not empty, not ",
                  sizes_of(student_real));
  const int64_t rows = student_real.size(0), columns = student_real.size(1);
  check_matrix(student_real, "student_real", rows, columns, student_real);
  check_matrix(student_virtual, "student_virtual", rows, columns, student_real);
  check_matrix(teacher_real, "teacher_real", rows, columns, student_real);
  check_matrix(teacher_virtual, "teacher_virtual", rows, columns, student_real);
}

inline void check_settings(double delta, double eps) {
  STD_TORCH_CHECK(delta > 0, "delta must be positive, not ", delta);
  STD_TORCH_CHECK(eps > 0, "eps must be positive, not ", eps);
}

inline void check_tile_edge(int64_t tile_edge) {
  STD_TORCH_CHECK(tile_edge > 0, "the edge of a tile must be positive, not ", tile_edge);
}

inline void check_half_level(int64_t half_level, ScalarType computed, bool dense) {
  const int64_t most = dense && computed != ScalarType::Double ? 3 : 0;
  STD_TORCH_CHECK(half_level >= 0 && half_level <= most, "operands of the form ", dense ? "dense" : "literal", " in ",
                  torch::headeronly::toString(computed), " have a level of float16 from 0 to ", most, ", not ",
                  half_level);
}

inline void check_brackets(const std::vector<int64_t>& brackets) {
  bool sound = brackets.size() % 3 == 0 && brackets.size() <= 3 * kMostBrackets;
  for (const int64_t x : brackets) sound = sound && x > 0;
  STD_TORCH_CHECK(sound, "brackets are up to ", kMostBrackets,
                  " times three positive numbers: the size of a sample, its reach, and the room for what is inside");
}

inline void check_two(const std::vector<int64_t>& ranks, const std::vector<double>& lerp_weights) {
  STD_TORCH_CHECK(ranks.size() == 2 && lerp_weights.size() == 2, "a rank and a weight for each of two graphs, not ",
                  ranks.size(), " and ", lerp_weights.size());
}

}  // namespace cuda
}  // namespace vrm
