// Which instruction set the CPU kernels use, found out once, at run time.
#include "graph.h"

#include <atomic>
#include <cstring>

namespace vrm {
namespace {

struct Isa {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
};

const Isa* usable_isas(int* count) {
  static int n = 0;
  static const Isa* const table = [] {
    static Isa found[3];
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      found[n++] = {"avx512", kernels_f32_avx512(), kernels_f64_avx512()};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found[n++] = {"avx2", kernels_f32_avx2(), kernels_f64_avx2()};
#endif
    found[n++] = {"portable", kernels_f32_portable(), kernels_f64_portable()};
    return found;
  }();
  *count = n;
  return table;
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& current() {
  const Isa* isa = chosen.load(std::memory_order_relaxed);
  if (isa != nullptr) return *isa;
  int n;
  return usable_isas(&n)[0];
}

}  // namespace

template <> const Kernels<float>& kernels<float>() { return *current().f32; }
template <> const Kernels<double>& kernels<double>() { return *current().f64; }

const char* current_isa() { return current().name; }

bool select_isa(const char* isa) {
  int n;
  const Isa* table = usable_isas(&n);
  for (int k = 0; k < n; ++k) {
    if (*isa != '\0' && std::strcmp(isa, table[k].name) != 0) continue;
    chosen.store(&table[k], std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace vrm
