// The CPU kernels for AVX2. The target is set after the standard includes: see simd.h.
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
#endif

#define VRM_ISA_NAMESPACE avx2
#define VRM_VECTOR_BYTES 32
#define VRM_PANEL_ROWS 6
#include "kernels.inl"

namespace vrm {
const Kernels<float>* kernels_f32_avx2() { return avx2::kernels<float>(); }
const Kernels<double>* kernels_f64_avx2() { return avx2::kernels<double>(); }
}  // namespace vrm

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
#include "graph.h"
namespace vrm {
const Kernels<float>* kernels_f32_avx2() { return nullptr; }
const Kernels<double>* kernels_f64_avx2() { return nullptr; }
}  // namespace vrm
#endif
