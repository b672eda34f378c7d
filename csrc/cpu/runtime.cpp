#include "runtime.h"

#include "../stable.h"

#include <atomic>
#include <cmath>

// This is the one call outside of the stable ABI, which has no product that adds to its result. torch's own
// ahead-of-time compiler calls the same function.
extern "C" AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a,
                                                   AtenTensorHandle b, double beta, double alpha) VRM_IF_THERE;

namespace vrm {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void run_members(int64_t threads, Member member, void* context) {
  if (threads == 1) return member(context, 0, 1);
  // The first thread's range tells how many ranks torch gives to each, and so how many threads there are.
  std::atomic<int64_t> ranks{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == 0) ranks.store(end, std::memory_order_release);
    int64_t each;
    while ((each = ranks.load(std::memory_order_acquire)) == 0) continue;
    member(context, begin / each, (threads + each - 1) / each);
  });
}

namespace {

template <class T> Tensor tensor_of(const Matrix<T>& x) {
  return torch::stable::from_blob(x.data, {x.rows, x.columns}, {x.row_stride, x.column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type_of<T>);
}

}  // namespace

bool can_multiply() { return aoti_torch_cpu_addmm_out != nullptr; }

template <class T>
void multiply(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, double alpha, bool accumulate) {
  const Tensor to = tensor_of(out);
  check(aoti_torch_cpu_addmm_out(to.get(), to.get(), tensor_of(a).get(), tensor_of(b).get(), accumulate, alpha));
}

// Tries numbers on which the two roundings differ.
template <class T> bool lerp_is_fused() {
  static const bool fused = [] {
    const T weight = T(0.3);
    for (T high = T(1.1);; high += T(0.1)) {
      const volatile T product = weight * (high - T(1));  // rounded, whatever the compiler may contract
      const T twice = T(1) + product, once = std::fma(weight, high - T(1), T(1));
      if (once == twice) continue;
      T values[] = {T(1), high, weight};
      const auto value = [&](int k) { return tensor_of<T>({values + k, 1, 1, 1, 1}); };
      return *aten("aten::lerp", "Tensor", value(0), value(1), value(2)).template const_data_ptr<T>() == once;
    }
  }();
  return fused;
}

template void multiply(const Matrix<float>&, const Matrix<float>&, const Matrix<float>&, double, bool);
template void multiply(const Matrix<double>&, const Matrix<double>&, const Matrix<double>&, double, bool);
template bool lerp_is_fused<float>();
template bool lerp_is_fused<double>();

}  // namespace vrm
