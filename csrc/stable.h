// torch's stable ABI, as both bindings use it: one library runs beside every torch from TORCH_TARGET_VERSION on.
#pragma once

#if !defined(TORCH_TARGET_VERSION)
#error "the build sets the oldest torch that the library must run beside"
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>

// Declares a function of torch's, which is null beside a torch that lacks it.
#if defined(__APPLE__)
#define VRM_IF_THERE __attribute__((weak_import))
#else
#define VRM_IF_THERE __attribute__((weak))
#endif

// torch has it from 2.13 on.
extern "C" const char* torch_exception_get_what_without_backtrace() VRM_IF_THERE;

namespace vrm {

// Throws what torch threw, which the stable ABI gives back as a code.
inline void check(AOTITorchError code) {
  if (code == AOTI_TORCH_SUCCESS) return;
  if (torch_exception_get_what_without_backtrace != nullptr)
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  throw std::runtime_error("an operation of torch's failed; torch 2.13 and newer say here why");
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T> inline constexpr ScalarType scalar_type_of = ScalarType::Undefined;
template <> inline constexpr ScalarType scalar_type_of<float> = ScalarType::Float;
template <> inline constexpr ScalarType scalar_type_of<double> = ScalarType::Double;
template <> inline constexpr ScalarType scalar_type_of<int64_t> = ScalarType::Long;

// Calls an operator of ATen's that returns one tensor, through the dispatcher, with all arguments of its schema in the
// schema's types. The stable ABI has no Scalar.
template <class... Arguments> Tensor aten(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  check(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// An uninitialised dense tensor on the device of `like`.
template <class T> Tensor empty_like(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int64_t strides[4], count = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) strides[d] = count, count *= sizes.begin()[d];
  int32_t device, index;
  check(aoti_torch_get_device_type(like.get(), &device));
  check(aoti_torch_get_device_index(like.get(), &index));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type_of<T>));
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, type, device, index, &handle));
  return Tensor(handle);
}

// The dtype to compute in: float64 if any tensor is, else float32. Half precision is read, never computed in.
inline ScalarType compute_type(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* x : tensors)
    if (x->scalar_type() == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

inline Tensor convert(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

// P of logits, and log(P + eps) of P.
inline Tensor softmax(const Tensor& logits) {
  return aten("aten::softmax", "int", logits, int64_t{1}, std::optional<ScalarType>());
}
inline Tensor log_of(const Tensor& probs, double eps) {
  static const Tensor& one = *new Tensor(torch::stable::full({}, 1.0));
  return aten("aten::log_", "", torch::stable::subtract(probs, one, -eps));
}

// For messages.
inline std::string sizes_of(const Tensor& x) {
  std::string sizes;
  for (int64_t d = 0; d < x.dim(); ++d) sizes += (d == 0 ? "" : ", ") + std::to_string(x.size(d));
  return "[" + sizes + "]";
}

inline const char* name_of(const Tensor& x) { return torch::headeronly::toString(x.scalar_type()); }

inline void check_rank(int64_t rank, double lerp_weight, int64_t edges) {
  STD_TORCH_CHECK(rank >= 0 && rank < edges && lerp_weight >= 0 && lerp_weight <= 1, "the rank of a threshold among ",
                  edges, " entropies is ", rank, " with the weight ", lerp_weight);
}

}  // namespace vrm
